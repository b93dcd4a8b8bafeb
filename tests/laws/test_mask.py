"""MT-net's mask: its draws, its straight-through gradient, and the laws of rules and learners."""

import math
import warnings

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, RuleError
from metablocks.laws import executors, gradients, rules
from metablocks.models import MLP, Conv4

pytestmark = pytest.mark.usefixtures("placed")

STEPS = 3
ON = 50.0


def on():
    return mb.MTMask(init=ON)


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mb.RandomDrawsWarning)
        return call()


# ---- laws of rules


@pytest.mark.parametrize("make", [problem.regression, problem.classification])
def test_all_masks_on_is_the_learner_without(make, device64):
    for dtype in (torch.float32, torch.float64):
        rules.same_as_without(on, make(device=device64, dtype=dtype))


def test_all_masks_off_does_not_adapt(place):
    small = problem.regression(**place)
    learner = small.learner(mb.Chain(mb.MTMask(init=-ON), mb.LearningRate(0.1)))
    losses = learner.evaluate(small.tasks).query_losses
    assert torch.equal(losses, losses[:, :1].expand(-1, STEPS + 1))


def test_one_mask_is_drawn_for_a_task(place):
    assert rules.draws(mb.MTMask, problem.shapes(**place)) == (True, False)


# ---- the mask


def test_one_entry_for_each_unit_shared_by_weight_and_bias():
    conv = Conv4(input_shape=(1, 8, 8), outputs=3, filters=4, layers=1)
    rule = mb.MTMask().setup(dict(conv.named_parameters()), STEPS)
    assert {name: tuple(p.shape) for name, p in rule.named_parameters()} == {
        "logit.body.0.conv.*": (4,),
        "logit.body.0.norm.*": (4,),
        "logit.head.*": (3,),
    }
    state = rule.init({})
    ones = {name: torch.ones_like(p) for name, p in conv.named_parameters()}
    updates, _ = rule(ones, state, mb.StepInfo(0, STEPS, {}))
    for layer in ("body.0.conv", "body.0.norm", "head"):
        mask = state[f"{layer}.*"]
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert torch.equal(updates[f"{layer}.bias"], mask)
        rows = updates[f"{layer}.weight"].flatten(1) if "norm" not in layer else mask[:, None]
        assert torch.equal(rows, mask[:, None].expand_as(rows))


def test_other_tensors_have_units_too():
    tensors = {
        "scale": torch.zeros(()),
        "table.weight": torch.zeros(7, 2),
        "norm.weight": torch.zeros(4, 5),
        "norm.bias": torch.zeros(4, 5),
        "rnn.weight_ih_l0": torch.zeros(6, 2),
        "rnn.weight_hh_l0": torch.zeros(6, 3),
        "rnn.bias_ih_l0": torch.zeros(6),
    }
    rule = mb.MTMask().setup(tensors, STEPS)
    assert {name: tuple(p.shape) for name, p in rule.named_parameters()} == {
        "logit.scale": (),
        "logit.table.*": (7,),
        "logit.norm.*": (4, 5),
        "logit.rnn.*_ih_l0": (6,),
        "logit.rnn.*_hh_l0": (6,),
    }


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("logit", [-1.5, 0.0, 0.7])
def test_masks_are_on_with_the_stated_chance(temperature, logit):
    """10 000 draws: four standard errors of a coin's mean are 0.02."""
    rule = mb.MTMask(temperature=temperature, init=logit).setup({"b": torch.zeros(10_000)}, 1)
    mask = rule.init({})["b"]
    chance = torch.sigmoid(torch.tensor(logit))
    assert abs(mask.mean() - chance) < 0.02


def test_the_gradient_is_the_soft_ones_at_the_same_draws(monkeypatch, within):
    """By hand: u fixed, s = σ((ζ + log u − log(1 − u)) / T), ∂M/∂ζ = s (1 − s) / T."""
    uniform = torch.tensor([0.1, 0.4, 0.6, 0.95])
    logit = torch.tensor([0.5, -0.2, 1.0, -4.0])
    monkeypatch.setattr(torch, "rand_like", lambda tensor, dtype: uniform.clone())
    rule = mb.MTMask(temperature=0.7).setup({"fc.weight": torch.zeros(4, 2)}, 1)
    rule.logit["fc.*"].data.copy_(logit)
    mask = rule.init({})["fc.*"]
    soft = torch.sigmoid((logit + torch.log(uniform / (1 - uniform))) / 0.7)
    assert mask.tolist() == [0.0, 0.0, 1.0, 0.0]
    (got,) = torch.autograd.grad(mask @ torch.tensor([1.0, 2.0, 3.0, 4.0]), rule.logit["fc.*"])
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) * soft * (1 - soft) / 0.7
    torch.testing.assert_close(got, expected, rtol=within(1e-13), atol=0)


def test_low_precision_draws_are_as_fine_as_float32s():
    """A bfloat16 uniform has 256 values; a chance of 0.0015 lies between the last two."""
    rule = mb.MTMask(init=-6.5).setup({"w": torch.zeros(100_000, dtype=torch.bfloat16)}, 1)
    mask = rule.init({})["w"]
    assert mask.dtype == torch.bfloat16
    assert abs(float(mask.detach().float().mean()) - 1 / (1 + math.exp(6.5))) < 0.0005


# ---- the laws of learners


def test_its_gradient_is_that_of_plain_autograd_and_of_the_soft_mask(place):
    small = problem.regression(**place)
    learner = rules.learner_of(lambda: mb.MTMask(temperature=0.8), small)
    gradients.plain_autograd(learner, small.tasks)


@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap(), mb.Vmap(chunk=2)], ids=repr)
def test_tasks_draw_independently_and_the_seed_reproduces(executor, place):
    def rule():
        return mb.Chain(mb.MTMask(), mb.LearningRate(0.1))

    small = problem.regression(hidden=(16,), **place)
    executors.draws_are_independent(executor, small, rule=rule)


def test_vmap_says_that_its_draws_are_its_own(place):
    small = problem.regression(**place)
    rule = mb.Chain(mb.MTMask(), mb.LearningRate(0.1))
    learner = small.learner(rule, executor=mb.Vmap())
    with pytest.warns(mb.RandomDrawsWarning):
        learner.meta_gradient(small.tasks)


def test_every_executor_gives_the_loops_gradient_where_nothing_is_left_to_chance(place):
    small = problem.classification(**place)

    def learner(executor):
        rule = mb.Chain(on(), mb.LearningRate(0.1))
        return small.learner(rule, executor=executor)

    vmaps = [mb.Vmap(), mb.Vmap(chunk=2)]
    quietly(lambda: gradients.one_gradient(small, vmaps, learner))


def test_mt_net_is_a_tnet_with_a_mask(place):
    small = problem.classification(**place)
    model = mb.insert_tnet(small.model())
    learner = mb.MetaLearner(
        model,
        loss=small.loss,
        steps=STEPS,
        rule=mb.Chain(mb.MTMask(), mb.LearningRate(0.1)),
        adapt=mb.transform_patterns(model),
    )
    grads = learner.meta_gradient(small.tasks).grads
    assert all(g.isfinite().all() for g in grads.values())
    assert not any("transform" in name for name in grads if "logit" in name)
    folded = mb.fold_tnet(learner.adapt(small.tasks[0].support))
    assert folded(small.tasks[0].query[0]).isfinite().all()


def _transposed():
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 1))
    return mb.MetaLearner(model, loss=F.mse_loss, steps=1, rule=mb.MTMask())


def _twice():
    rule = mb.MTMask().setup({}, 1)
    rule.setup({}, 1)


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: mb.MTMask(temperature=0),
            RuleError,
            "temperature is 0; it takes a finite number above",
        ),
        (lambda: mb.MTMask(temperature=True), RuleError, "temperature is True"),
        (lambda: mb.MTMask(init=float("inf")), RuleError, "init is inf; it takes a finite"),
        (lambda: mb.MTMask().init({}), RuleError, "MTMask is not set up; call .setup"),
        (_twice, RuleError, "is set up already"),
        (
            lambda: mb.MTMask().setup({}, 1)({"w": torch.ones(1)}, {}, mb.StepInfo(0, 1, {})),
            RuleError,
            "set up without a mask for w",
        ),
        (
            lambda: mb.MTMask().setup({"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(3)}, 1),
            RuleError,
            "a.weight [2, 3], a.bias [3] share a mask, but disagree",
        ),
        (_transposed, BlockError, "0.weight belongs to a ConvTranspose1d, whose output units"),
    ],
)
def test_misuse_is_refused(act, kind, message):
    with pytest.raises(kind) as caught:
        act()
    assert message in str(caught.value)


def test_anil_learns_logits_for_the_head_alone():
    learner = mb.MetaLearner(
        MLP(input_shape=(3,), outputs=2),
        loss=F.mse_loss,
        steps=1,
        rule=mb.Chain(mb.MTMask(), mb.LearningRate(0.1)),
        adapt="head.*",
    )
    assert [name for name, _ in learner.rule.named_parameters()] == ["rules.0.logit.head.*"]
