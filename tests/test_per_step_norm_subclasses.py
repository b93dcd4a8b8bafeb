"""Per-step batch norms of classes that are not torch's own: each step's function is the original's.

The oracle is the class itself: a module of it that has the row of a step for its tensors.
"""

import copy
import pickle
from functools import partial

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import perturbed
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError
from metablocks.laws import gradients, norms, purity
from metablocks.laws.compare import assert_close

STEPS = 3
float64 = pytest.mark.usefixtures("float64")


class NormAct(nn.BatchNorm2d):
    """The forward pass of timm's BatchNormAct2d: batch norm written out, dropout, activation."""

    def __init__(self, channels, drop=0.0):
        super().__init__(channels, eps=1e-3)
        self.drop = nn.Dropout(drop)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        batch = self.training or (self.running_mean is None and self.running_var is None)
        reads = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if reads else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, batch, factor, self.eps)
        return self.act(self.drop(x))


class Adding(nn.BatchNorm2d):
    """Something in front of the norm and something behind, with a parameter, a buffer and a module."""

    def __init__(self, channels, front=0.5):
        super().__init__(channels)
        self.front = front
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, channels)[:, None, None])
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("note", torch.ones(1), persistent=False)
        self.behind = nn.PReLU(channels)

    def forward(self, x):
        self.passes += 1
        return self.behind(self.gain * super().forward(x + self.front * x.square()))


class Leaning(nn.BatchNorm2d):
    """Reads its running mean in training, and keeps a new one by assignment, not in place."""

    def forward(self, x):
        if self.running_mean is None:
            return super().forward(x)
        lean = self.running_mean[:, None, None]
        out = F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.training:
            self.running_mean = 0.5 * self.running_mean + x.mean((0, 2, 3))
        return out + 0.3 * lean


class Bare(nn.BatchNorm2d):
    """Adds nothing."""


class Frozen(nn.BatchNorm2d):
    """Stays in `eval()`, as detectors have it."""

    def train(self, mode=True):
        super().train(False)
        self.weight.requires_grad_(False)
        return self


class Conditioned(nn.BatchNorm2d):
    """Takes a second input and gives two outputs."""

    def forward(self, x, *, shift):
        out = super().forward(x)
        return out + shift, out


def moved(norm):
    generator = torch.Generator().manual_seed(2)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            tensor.data.copy_(noise.to(tensor) + 0.5)
    return norm


CASES = {
    "norm-act": lambda: NormAct(4),
    "norm-act, dropout": lambda: NormAct(4, drop=0.4),
    "adding": lambda: Adding(4),
    "leaning": lambda: Leaning(4),
    "bare": lambda: Bare(4, momentum=0.3),
    "bare, cumulative": lambda: Bare(4, momentum=None),
    "bare, no affine": lambda: Bare(4, affine=False),
}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def same(got, expected, within=1e-14):
    torch.testing.assert_close(got, expected, rtol=0, atol=within)


def drawn(module, x):
    torch.manual_seed(0)
    return module(x.clone())


@float64
@pytest.mark.parametrize("affine", ["per_step", "shared"])
@cases
def test_each_row_is_the_norm_it_was_and_comes_back_as_its_class(make, affine):
    norm = moved(make())
    new = mb.per_step_batch_norm(norm, STEPS, statistics="running", affine=affine)
    for step in range(STEPS):
        new = copy.deepcopy(new)  # extra buffers are one for all steps: the same start for each
        twin, original = copy.deepcopy(new), copy.deepcopy(norm)
        twin.inner_step = step
        for training in (True, True, False):
            x = torch.randn(6, 4, 3, 3)
            same(drawn(twin.train(training), x), drawn(original.train(training), x))
        back = twin.at_step(step)
        assert type(back) is type(norm)
        assert list(back.state_dict()) == list(original.state_dict())
        assert_close("at step", back.state_dict(), original.state_dict(), 1e-14)
        for training in (False, True):
            x = torch.randn(6, 4, 3, 3)
            same(drawn(back.train(training), x), drawn(original.train(training), x))
        untouched = {n: t for n, t in new.state_dict().items() if "running" in n}
        for name, tensor in untouched.items():
            assert torch.equal(tensor, norm.state_dict()[name].expand_as(tensor))


@float64
@cases
def test_unequal_rows_each_have_the_function_of_their_step(make):
    new = mb.per_step_batch_norm(moved(make()), STEPS, statistics="running")
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(new, name)
        if tensor is not None:
            tensor.data.add_(torch.rand_like(tensor))
    x, outputs = torch.randn(6, 4, 3, 3), []
    for training in (True, False):
        for step in range(STEPS):
            twin = copy.deepcopy(new).train(training)
            twin.inner_step = step
            outputs.append(drawn(twin, x))
            same(outputs[-1], drawn(new.at_step(step).train(training), x))
    assert not torch.equal(outputs[-1], outputs[-2])


@float64
@cases
def test_by_batch_statistics_it_is_the_norm_that_keeps_none(make):
    norm = moved(make()).eval()
    new = mb.per_step_batch_norm(norm, STEPS)
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    x, before = torch.randn(6, 4, 3, 3), copy.deepcopy(new.state_dict())
    same(drawn(new, x), drawn(norm, x))
    statistics = [n for n in before if "running" in n or "tracked" in n]
    assert all(torch.equal(new.state_dict()[n], before[n]) for n in statistics)


def test_names_and_what_is_added_stay():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Adding(4, front=0.25))
    model[1].behind.weight = nn.Parameter(torch.ones(4))
    new = mb.per_step_batch_norm(model, STEPS)
    assert list(new.state_dict()) == list(model.state_dict())
    assert "1.note" not in new.state_dict()
    assert [n for n, _ in new.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert new[1].weight.shape == new[1].running_var.shape == (STEPS, 4)
    assert new[1].gain.shape == model[1].gain.shape
    assert (new[1].front, new[1].eps, type(new[1].behind)) == (0.25, model[1].eps, nn.PReLU)
    assert new[1].behind is not model[1].behind
    assert new[1].behind.weight is not model[1].behind.weight
    assert mb.norm_patterns(new) == ["*", "!1.weight", "!1.bias"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = new[1].nothing
    again = mb.per_step_batch_norm(model, STEPS)
    again.load_state_dict(new.state_dict())


def test_attributes_set_on_it_reach_its_class():
    new = mb.per_step_batch_norm(Bare(2), STEPS)
    new.momentum, new.eps = 1.0, 3.0
    x = torch.randn(5, 2, 1, 1)
    torch.testing.assert_close(
        new(x), F.batch_norm(x, None, None, training=True, eps=3.0), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(new.running_mean[0], x.mean((0, 2, 3)))


def test_parameters_and_modules_that_norms_share_stay_shared():
    first, second = Adding(3), Adding(3)
    second.weight, second.gain, second.behind = first.weight, first.gain, first.behind
    new = mb.per_step_batch_norm(nn.Sequential(first, second), STEPS)
    assert new[0].weight is new[1].weight
    assert new[0].gain is new[1].gain
    assert new[0].behind is new[1].behind
    assert new[0].bias is not new[1].bias


def test_one_that_stays_in_eval_does_so():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Frozen(4).train(), nn.Dropout())
    new = mb.per_step_batch_norm(model, STEPS, statistics="running").train()
    assert (new.training, new[1].training, new[2].training) == (True, False, True)
    assert not new[1].weight.requires_grad
    before = copy.deepcopy(new[1].state_dict())
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(new[1](x), model[1](x))
    assert all(torch.equal(new[1].state_dict()[n], t) for n, t in before.items())


def test_other_arguments_and_outputs_pass():
    norm = Conditioned(2)
    new = mb.per_step_batch_norm(norm, STEPS)
    x, shift = torch.randn(3, 2, 2, 2), torch.ones(1)
    for got, expected in zip(new(x, shift=shift), norm(x, shift=shift), strict=True):
        assert torch.equal(got, expected)


def test_hooks_of_a_norm_run():
    for norm in (nn.BatchNorm2d(2), Bare(2)):
        shapes = []
        norm.register_forward_hook(
            lambda module, args, out, shapes=shapes: shapes.append(module.weight.shape)
        )
        mb.per_step_batch_norm(norm, STEPS)(torch.randn(3, 2, 2, 2))
        assert shapes == [(2,)]


@cases
def test_it_pickles_and_copies_before_and_after_it_ran(make):
    new = mb.per_step_batch_norm(make(), STEPS)
    x = torch.randn(6, 4, 3, 3, requires_grad=True)
    for _ in range(2):
        twin, copied = pickle.loads(pickle.dumps(new)), copy.deepcopy(new)
        expected = drawn(new, x)
        assert torch.equal(drawn(twin, x), expected)
        assert torch.equal(drawn(copied, x), expected)
        expected.sum().backward()
    with pytest.raises(RuntimeError):
        new(torch.randn(6, 5, 3, 3))
    pickle.dumps(new)


# ---- in learners


def with_norms(make, place):
    """A conv net with norms of a class of its own, and its tasks."""
    small = problem.classification(**place)
    swap = norms.in_place_of_batch_norms(make)

    def model():
        return perturbed(swap(small.model(), 1), ".norm.")

    return problem.Problem(model, small.loss, small.tasks, steps=2)


@pytest.mark.parametrize("make", [NormAct, Adding], ids=lambda make: make.__name__)
def test_learners_of_it_obey_the_laws_of_norms(make, place):
    small, norm = with_norms(make, place), mb.per_step_batch_norm
    norms.keeps_the_function(norm, small)
    # Asks for addresses, which not every device has.
    norms.is_not_aliased(norm, with_norms(make, {"dtype": place["dtype"]}))
    norms.has_a_row_for_each_step(norm, small)
    gradients.one_gradient(
        small, [mb.Vmap(), mb.Vmap(chunk=2)], lambda e: norms.learner_of(norm, small, executor=e)
    )
    gradients.one_estimator(
        small, [mb.Adjoint()], lambda e: norms.learner_of(norm, small, estimator=e)
    )
    learner = norms.learner_of(norm, small, step_loss=mb.UniformStepLoss())
    gradients.plain_autograd(learner, small.tasks)
    purity.calls_leave_no_trace(small, partial(norms.learner_of, norm))


def test_its_gradient_is_the_slope_of_the_loss(device64, float64):
    small = with_norms(NormAct, {"device": device64})
    learner = norms.learner_of(mb.per_step_batch_norm, small, step_loss=mb.UniformStepLoss())
    gradients.finite_differences(learner, small.tasks)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_adapted_models_have_the_class_and_predict_as_evaluation_does(statistics, place, within):
    small = with_norms(NormAct, place)
    model = mb.per_step_batch_norm(small.model(), small.steps, statistics=statistics)
    learner = mb.MetaLearner(
        model, loss=small.loss, steps=small.steps, rule=mb.LearningRate(0.1), executor=mb.Vmap()
    )
    learner.backward(small.tasks)
    task = small.tasks[1]
    adapted = learner.adapt(task.support)
    kinds = [type(m) for m in adapted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [NormAct] * 2
    prediction = adapted.train(statistics == "batch")(task.query[0])
    expected = learner.evaluate(small.tasks).predictions[1]
    torch.testing.assert_close(prediction, expected, rtol=within(1e-10), atol=within(1e-12))


# ---- refusals


class _Lazy(nn.LazyBatchNorm2d):
    pass


class _Clash(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("steps", torch.zeros(1))


def _parametrized():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    norm = nn.BatchNorm2d(2)
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _Lazy(device="cpu"), "0 is a _Lazy that has not seen data yet; run the model on"),
        (lambda: _Clash(2), "0 is a _Clash that has a tensor or module called steps"),
        (
            _parametrized,
            "0 is a ParametrizedBatchNorm2d whose weight is computed from other tensors",
        ),
        (_parametrized, "remove_parametrizations"),
    ],
)
def test_what_cannot_have_rows_is_refused_by_name(make, message):
    with pytest.raises(BlockError) as caught:
        mb.per_step_batch_norm(nn.Sequential(make()), STEPS)
    assert message in str(caught.value)
