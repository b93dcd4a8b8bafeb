"""LoRA: the surgery and its folding, its laws, and what it refuses."""

import copy

import pytest
import small_problems as problem
import torch
from small_learners import EXECUTORS, perturbed
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, SelectionError
from metablocks.laws import gradients
from metablocks.laws.compare import assert_close
from metablocks.models import MLP, Transformer, torchvision_classifier
from metablocks.models.lora import LowRank

pytestmark = pytest.mark.usefixtures("placed")

STEPS = 3
ONLY = "*lora.*"


def shaken(model):
    """The same model with updates away from zero."""
    return perturbed(model, "lora.up")


def lora_problem(make=problem.classification, *, freeze=(), **options):
    """A smooth problem whose model has low-rank updates away from zero."""
    plain = make(steps=STEPS, **options)

    def model():
        torch.manual_seed(0)
        return shaken(mb.insert_lora(plain.model(), rank=1, freeze=freeze))

    return problem.Problem(model, plain.loss, plain.tasks, STEPS)


LAYERS = [
    (lambda: nn.Linear(3, 4), (6, 3)),
    (lambda: nn.Linear(3, 4, bias=False), (2, 6, 3)),
    (lambda: nn.Conv2d(2, 4, (3, 2), stride=2, dilation=(1, 2), padding="valid"), (5, 2, 7, 8)),
    (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", bias=False), (5, 2, 6, 6)),
    (lambda: nn.Conv2d(2, 4, 3), (2, 6, 6)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_identity_changes_nothing_and_folding_is_exact(make, shape, within):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape)
    new = mb.insert_lora(layer, rank=2)
    assert torch.equal(new(x), layer(x))
    assert isinstance(new, type(layer))
    shaken(new)
    assert not torch.allclose(new(x), layer(x), atol=1e-3)
    folded = mb.fold_lora(new)
    assert type(folded) is type(layer)
    assert repr(folded) == repr(layer)
    torch.testing.assert_close(folded(x), new(x), rtol=0, atol=within(1e-12))
    change = (folded.weight - layer.weight).flatten(1)
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_layers_are_selected_and_the_rest_is_frozen_by_the_names_of_parameters():
    model = MLP(input_shape=(3,), outputs=2, hidden=(5, 4))
    new = mb.insert_lora(model, rank=2, layers="body.*", freeze=["*", "!head.*"])
    trainable = [name for name, p in new.named_parameters() if p.requires_grad]
    layers = ["body.linear0", "body.linear1"]
    factors = [f"{layer}.lora.{side}.weight" for layer in layers for side in ("down", "up")]
    assert sorted(trainable) == sorted([*factors, "head.weight", "head.bias"])
    assert all(p.requires_grad for p in model.parameters())
    assert mb.fold_lora(new).head.weight.requires_grad
    assert not mb.fold_lora(new).body.linear0.weight.requires_grad


@pytest.mark.parametrize("make", [problem.classification, problem.regression])
@EXECUTORS
def test_identity_is_the_learner_without(make, executor, place):
    """What was there has the gradient that it had, and B one of its own."""
    plain = make(steps=STEPS, **place)
    blocks = {"executor": executor, "step_loss": mb.UniformStepLoss()}
    model = mb.insert_lora(plain.model(), rank=1)
    adapt = ["*", "!*lora.*"]
    learner = mb.MetaLearner(
        model, loss=plain.loss, steps=STEPS, rule=mb.LearningRate(0.1), adapt=adapt, **blocks
    )
    expected = plain.learner(mb.LearningRate(0.1), **blocks).meta_gradient(plain.tasks)
    got = learner.meta_gradient(plain.tasks)
    there = {name: grad for name, grad in got.grads.items() if name in expected.grads}
    assert_close("identity, θ", there, expected.grads, 1e-12)
    assert all(bool(grad.any()) for name, grad in got.grads.items() if "lora.up" in name)


@pytest.mark.parametrize("make", [problem.classification, problem.regression])
@pytest.mark.parametrize("freeze", [(), "*"])
def test_finite_differences_of_every_meta_parameter(make, freeze, device):
    small = lora_problem(make, freeze=freeze, device=device)
    learner = small.learner(mb.lslr(0.1), adapt=ONLY, executor=mb.Vmap())
    gradients.finite_differences(learner, small.tasks)
    frozen = [name for name, _ in learner.named_parameters() if name.startswith("model.")]
    assert all("lora" in name for name in frozen if learner.get_parameter(name).requires_grad) == (
        freeze == "*"
    )


def test_every_executor_and_the_adjoint_give_the_loops_gradient(place):
    small = lora_problem(**place)
    gradients.one_gradient(
        small,
        [mb.Vmap(), mb.Vmap(chunk=2)],
        lambda executor: small.learner(adapt=ONLY, executor=executor),
    )
    gradients.one_gradient(
        small,
        [mb.Adjoint()],
        lambda block: small.learner(
            adapt=ONLY, estimator=block if isinstance(block, mb.Adjoint) else mb.Unrolled()
        ),
    )


def test_an_adapted_model_folds_to_a_plain_one_that_predicts_the_same(within, place):
    small = lora_problem(**place)
    learner = small.learner(adapt=ONLY)
    task = small.tasks[0]
    adapted = learner.adapt(task.support)
    folded = mb.fold_lora(adapted)
    assert not any("lora" in name for name in folded.state_dict())
    for model in (folded.eval(), adapted.eval()), (folded.train(), adapted.train()):
        got, expected = (m(task.query[0]) for m in model)
        torch.testing.assert_close(got, expected, rtol=0, atol=within(1e-12))
    prediction = learner.evaluate(mb.TaskBatch.stack([task])).predictions[0]
    torch.testing.assert_close(
        folded.train()(task.query[0]), prediction, rtol=0, atol=within(1e-12)
    )


def _tied():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    return model


class _ReadsTheWeight(nn.Module):
    """A layer that is never called, as in torchvision's Swin transformers, beside one that is."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        x = self.outer(x.to(self.outer.weight.dtype))
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def _swin():
    with torch.device("meta"):
        return torchvision_classifier(input_shape=(3, 32, 32), outputs=2, name="swin_t")


def test_a_layer_that_is_called_may_have_its_weight_read_as_well():
    assert isinstance(_with(_ReadsTheWeight(), layers="outer.*").outer, LowRank)


def _with(model, **options):
    return mb.insert_lora(model, **{"rank": 1, **options})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: _with(nn.Tanh()), "Tanh has no linear or convolutional layer"),
        (lambda: _with(_with(nn.Linear(1, 1))), "has low-rank updates already"),
        (lambda: _with(nn.Linear(3, 4), rank=4), "rank is 4, and the model has a weight of rank 3"),
        (lambda: _with(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))), "0 has 2 groups"),
        (lambda: _with(nn.Sequential(nn.Conv1d(1, 1, 2))), "0 is a Conv1d; it takes Linear"),
        (lambda: _with(_tied()), "1 shares its weight with 0"),
        (lambda: _with(nn.MultiheadAttention(2, 1)), "out_proj is a NonDynamically"),
        (lambda: _with(_ReadsTheWeight()), "inner belongs to a _ReadsTheWeight, which reads its"),
        (lambda: mb.insert_tnet(_ReadsTheWeight()), "inner belongs to a _ReadsTheWeight, which"),
        (lambda: mb.append_linear(_ReadsTheWeight(), depth=1), "inner belongs to a _ReadsTheWei"),
        (lambda: _with(_swin()), "attn.qkv belongs to a ShiftedWindowAttention, which reads its"),
        (lambda: mb.fold_lora(nn.Linear(1, 1)), "Linear has no low-rank update to fold"),
        (lambda: mb.insert_tnet(_with(nn.Sequential(nn.Linear(1, 1)))), "0 is a LowRankLinear"),
        (
            lambda: mb.insert_tnet(_with(nn.Sequential(nn.Linear(1, 1))), layers="0.lora.up.*"),
            "0.lora.up belongs to a Factors, which reads its weight",
        ),
        (
            lambda: mb.append_linear(_with(nn.Sequential(nn.Linear(1, 1))), depth=1),
            "0.lora.up belongs to a Factors, which reads its weight",
        ),
    ],
)
def test_misuse_is_refused(act, message):
    with pytest.raises(BlockError) as caught:
        act()
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["layers", "freeze"])
def test_a_pattern_that_matches_nothing_is_refused(field):
    with pytest.raises(SelectionError, match=r'pattern "hed\.\*" matches no parameter') as caught:
        _with(MLP(input_shape=(3,), outputs=2), **{field: "hed.*"})
    assert caught.value.field == field


def test_updates_on_other_surgery_fold_before_it(within):
    model = mb.append_linear(mb.insert_tnet(nn.Sequential(nn.Linear(3, 4))), depth=2, features=4)
    layers = ["*transform.weight", "linear.appended.*"]
    new = shaken(_with(model, rank=2, layers=layers))
    x = torch.randn(5, 3)
    folded = mb.collapse_linear(mb.fold_tnet(mb.fold_lora(new)))
    torch.testing.assert_close(folded(x), new(x), rtol=0, atol=within(1e-12))
    assert [name for name, _ in folded.named_parameters()] == [
        *("model.0.weight", "model.0.bias", "linear.weight", "linear.bias")
    ]


def test_models_of_other_packages_and_of_tokens_take_it():
    net = Transformer(input_shape=(6,), outputs=9, width=8, heads=2, layers=1)
    new = _with(net, layers=["*query*", "*value*"])
    tokens = torch.randint(0, 9, (2, 6))
    assert torch.equal(new(tokens), net(tokens))
    resnet = torchvision_classifier(input_shape=(1, 16, 16), outputs=3, name="resnet18").eval()
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(_with(resnet, rank=3)(x), resnet(x))
