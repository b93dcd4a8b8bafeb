"""T-net: the surgery and its folding, its laws, and what it refuses."""

import copy

import pytest
import small_problems as problem
import surgery_laws
import torch
import torch.nn.functional as F
from small_learners import EXECUTORS, learner_of, perturbed, small, tasks_of
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, SelectionError
from metablocks.laws import gradients, purity
from metablocks.models import MLP, Conv4

pytestmark = pytest.mark.usefixtures("placed")

STEPS = 3
WITHOUT = ["*", "!*.transform.*"]


def shaken(model):
    """The same model with transforms away from the identity."""
    return perturbed(model, "transform")


def tnet_problem(make=problem.classification, **options):
    """A smooth problem whose model has transforms away from the identity."""
    plain = make(steps=STEPS, **options)
    return problem.Problem(
        lambda: shaken(mb.insert_tnet(plain.model())), plain.loss, plain.tasks, STEPS
    )


def count(model):
    return sum(p.numel() for p in model.parameters())


# ---- the surgery and its folding

LAYERS = [
    (lambda: nn.Linear(3, 4), (6, 3)),
    (lambda: nn.Linear(3, 4, bias=False), (2, 6, 3)),
    (lambda: nn.Conv1d(2, 4, 3, padding=1), (5, 2, 7)),
    (lambda: nn.Conv2d(2, 4, (3, 2), stride=2, dilation=(1, 2), padding="valid"), (5, 2, 7, 8)),
    (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", bias=False), (5, 2, 6, 6)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 5, 5)),
    (lambda: nn.Conv3d(2, 3, 2), (5, 2, 3, 4, 3)),
    (lambda: nn.Conv2d(2, 4, 3), (2, 6, 6)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_identity_changes_nothing_and_folding_is_exact(make, shape, within):
    layer = make()
    x = torch.randn(shape)
    new = mb.insert_tnet(layer)
    assert torch.equal(new(x), layer(x))
    assert isinstance(new, type(layer))
    shaken(new)
    assert not torch.allclose(new(x), layer(x), atol=1e-3)
    torch.testing.assert_close(new(x), new.transform(layer(x)), rtol=0, atol=within(1e-13))
    folded = mb.fold_tnet(new)
    assert type(folded) is type(layer)
    assert repr(folded) == repr(layer)
    torch.testing.assert_close(folded(x), new(x), rtol=0, atol=within(1e-12))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv4(input_shape=(1, 8, 8), outputs=3, filters=3, layers=2),
        lambda: MLP(input_shape=(3,), outputs=2, hidden=(5, 4)),
        small,
    ],
)
def test_names_shapes_and_counts(make, within):
    model = make()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    new = mb.insert_tnet(model)
    assert torch.equal(state, torch.get_rng_state())
    plain = {n: p for n, p in new.state_dict().items() if "transform" not in n}
    assert list(plain) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    outputs = [len(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert count(new) == count(model) + sum(n * n for n in outputs)

    again = mb.insert_tnet(make())
    again.load_state_dict(shaken(new).state_dict())
    folded = mb.fold_tnet(again)
    assert count(folded) == count(model)
    assert {n: p.shape for n, p in folded.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    model.load_state_dict(folded.state_dict())
    x = torch.randn(6, 1, 8, 8) if isinstance(model, Conv4) else torch.randn(6, 3)
    torch.testing.assert_close(model(x), new(x), rtol=0, atol=within(1e-12))


def test_layers_are_selected_by_the_names_of_their_weights():
    model = MLP(input_shape=(3,), outputs=2, hidden=(5, 4))
    only = mb.insert_tnet(model, layers=["*", "!head.*"])
    assert mb.transform_patterns(only) == [
        "*",
        "!body.linear0.transform.weight",
        "!body.linear1.transform.weight",
    ]
    assert type(only.head) is nn.Linear


def test_tied_layers_share_a_transform_and_stay_tied_when_folded(within):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    new = shaken(mb.insert_tnet(model))
    assert new[0].weight is new[2].weight
    assert new[0].transform is new[2].transform
    x = torch.randn(4, 3)
    folded = mb.fold_tnet(new)
    assert folded[0].weight is folded[2].weight
    assert folded[0].bias is not folded[2].bias
    torch.testing.assert_close(folded(x), new(x), rtol=0, atol=within(1e-12))
    learner = learner_of(new, adapt=mb.transform_patterns(new))
    assert learner.adapted == ("0.weight", "0.bias", "2.bias")


def test_a_layer_used_twice_stays_one():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    new = mb.insert_tnet(model)
    assert new[0] is new[2]
    assert mb.transform_patterns(new) == ["*", "!0.transform.weight", "!2.transform.weight"]
    folded = mb.fold_tnet(shaken(new))
    assert folded[0] is folded[2]


def test_frozen_layers_get_none():
    model = MLP(input_shape=(3,), outputs=2)
    model.head.requires_grad_(False)
    assert type(mb.insert_tnet(model).head) is nn.Linear


def test_dtype_and_training_flag_are_kept():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).float()
    model[1].eval()
    new = mb.insert_tnet(model)
    assert new[0].transform.weight.dtype == torch.float32
    assert [new[0].training, new[1].training, new[1].transform.training] == [True, False, False]


class _OwnLinear(nn.Linear):
    pass


def _tied(model):
    model[1].weight = model[0].weight
    return model


def _hooked():
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _frozen():
    return nn.Linear(1, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: mb.insert_tnet(nn.Tanh()), "Tanh has no linear or convolutional layer"),
        (lambda: mb.insert_tnet(_frozen()), "no linear or convolutional layer with a trainable"),
        (lambda: mb.insert_tnet(mb.insert_tnet(nn.Linear(1, 1))), "has transforms already"),
        (
            lambda: mb.insert_tnet(nn.Sequential(nn.ConvTranspose2d(1, 1, 2))),
            "0 is a ConvTranspose2d; it takes Linear, Conv1d, Conv2d, Conv3d; to leave it without "
            'a T: layers=["*", "!0.weight"]',
        ),
        (lambda: mb.insert_tnet(nn.Bilinear(1, 1, 1)), "the model is a Bilinear; it takes Linear"),
        (lambda: mb.insert_tnet(nn.Sequential(_OwnLinear(1, 1))), "0 is a _OwnLinear; it takes"),
        (
            lambda: mb.insert_tnet(nn.LazyLinear(2, device="cpu")),
            "run the model on one batch first",
        ),
        (lambda: mb.insert_tnet(_hooked()), "0 has hooks, which would be lost"),
        (
            lambda: mb.insert_tnet(nn.MultiheadAttention(2, 1)),
            "out_proj is a NonDynamicallyQuantizableLinear",
        ),
        (
            lambda: mb.insert_tnet(
                nn.TransformerEncoderLayer(2, 1, 4), layers=["*", "!self_attn.*"]
            ),
            "linear1 belongs to a TransformerEncoderLayer, which reads its weight",
        ),
        (
            lambda: mb.insert_tnet(_tied(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)))),
            "1 shares a parameter with 0, and they could not share a T",
        ),
        (
            lambda: mb.insert_tnet(
                _tied(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), layers="0.*"
            ),
            "0 shares a parameter with 1",
        ),
        (lambda: mb.fold_tnet(nn.Linear(1, 1)), "Linear has no transform to fold; insert_tnet"),
    ],
)
def test_misuse_is_refused(act, message):
    with pytest.raises(BlockError) as caught:
        act()
    assert message in str(caught.value)


def test_a_pattern_that_matches_no_layer_is_refused():
    with pytest.raises(SelectionError, match=r'pattern "hed\.\*" matches no parameter'):
        mb.insert_tnet(MLP(input_shape=(3,), outputs=2), layers="hed.*")


# ---- the laws of learners


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
@pytest.mark.parametrize("make", [problem.classification, problem.regression])
@EXECUTORS
def test_identity_is_the_learner_without(make, executor, order, place):
    blocks = {"order": order, "executor": executor, "step_loss": mb.UniformStepLoss()}
    plain = make(steps=STEPS, **place)
    surgery_laws.same_as_without(mb.insert_tnet, plain, adapt=WITHOUT, **blocks)


def test_one_step_moves_the_folded_layer_by_its_metric(within):
    """A = T W ← A − α T Tᵀ ∇_A L, and T b alike: the gradient at A by `torch.autograd` alone."""
    rate, layer = 0.1, nn.Linear(3, 4)
    new = shaken(mb.insert_tnet(layer))
    x, y = torch.randn(6, 3), torch.randn(6, 4)
    before = mb.fold_tnet(new)
    grads = torch.autograd.grad(F.mse_loss(before(x), y), [before.weight, before.bias])
    learner = learner_of(new, steps=1, rule=mb.LearningRate(rate), adapt=mb.transform_patterns(new))
    after = mb.fold_tnet(learner.adapt((x, y)))
    metric = new.transform.weight @ new.transform.weight.T
    expected = [before.weight - rate * metric @ grads[0], before.bias - rate * metric @ grads[1]]
    torch.testing.assert_close(after.weight, expected[0], rtol=0, atol=within(1e-14))
    torch.testing.assert_close(after.bias, expected[1], rtol=0, atol=within(1e-14))


@pytest.mark.parametrize("make", [problem.classification, problem.regression])
@pytest.mark.parametrize("step_loss", [mb.FinalStepLoss(), mb.UniformStepLoss()], ids=repr)
def test_finite_differences_of_every_meta_parameter(make, step_loss, device):
    small = tnet_problem(make, device=device)
    learner = small.learner(mb.lslr(0.1), adapt=WITHOUT, step_loss=step_loss, executor=mb.Vmap())
    assert any("transform" in name for name, _ in learner.named_parameters())
    gradients.finite_differences(learner, small.tasks)


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_every_executor_gives_the_loops_gradient(order, place):
    small = tnet_problem(**place)
    gradients.one_gradient(
        small,
        [mb.Vmap(), mb.Vmap(chunk=1), mb.Vmap(chunk=2)],
        lambda executor: small.learner(adapt=WITHOUT, order=order, executor=executor),
    )


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_function_and_gradient_are_those_of_the_net_written_out(order, within):
    """Convolution, T, softplus, linear, T."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(27, 2)
    )
    model, x = shaken(mb.insert_tnet(model)), torch.randn(5, 1, 6, 6)
    p = dict(model.named_parameters())
    due = F.conv2d(x, p["0.weight"], p["0.bias"], stride=2, padding=1)
    due = F.softplus(torch.einsum("pc,ncij->npij", p["0.transform.weight"].flatten(1), due))
    due = (due.flatten(1) @ p["3.weight"].T + p["3.bias"]) @ p["3.transform.weight"].T
    torch.testing.assert_close(model(x), due, rtol=0, atol=within(1e-14))
    own = problem.Problem(
        lambda: copy.deepcopy(model), F.mse_loss, tasks_of(1, 6, 6), STEPS, WITHOUT
    )
    learner = own.learner(mb.LearningRate(0.1, learn=True), order=order)
    gradients.plain_autograd(learner, own.tasks)


@pytest.mark.parametrize("adapt", [WITHOUT, ["head.*", "!*.transform.*"]])
def test_an_adapted_model_folds_to_a_plain_one_that_predicts_the_same(adapt, within, place):
    small = tnet_problem(**place)
    learner = small.learner(adapt=adapt)
    task = small.tasks[0]
    adapted = learner.adapt(task.support)
    for name, parameter in learner.model.named_parameters():
        moves = name in learner.adapted
        assert torch.equal(adapted.get_parameter(name), parameter) != moves
    folded = mb.fold_tnet(adapted)
    assert not any("transform" in name for name in folded.state_dict())
    for model in (folded.eval(), adapted.eval()), (folded.train(), adapted.train()):
        got, expected = (m(task.query[0]) for m in model)
        torch.testing.assert_close(got, expected, rtol=0, atol=within(1e-12))
    prediction = learner.evaluate(mb.TaskBatch.stack([task])).predictions[0]
    torch.testing.assert_close(
        folded.train()(task.query[0]), prediction, rtol=0, atol=within(1e-12)
    )


def test_with_per_step_batch_norm(device):
    plain = problem.classification(steps=STEPS, device=device)
    model = shaken(mb.insert_tnet(mb.per_step_batch_norm(plain.model(), STEPS)))
    adapt = [*mb.transform_patterns(model), *mb.norm_patterns(model)[1:]]
    learner = learner_of(model, loss=plain.loss, steps=STEPS, adapt=adapt, executor=mb.Vmap())
    gradients.finite_differences(learner, plain.tasks)
    adapted = learner.adapt(plain.tasks[0].support)
    x = plain.tasks[0].query[0]
    torch.testing.assert_close(mb.fold_tnet(adapted)(x), adapted(x), rtol=0, atol=1e-12)


def test_folding_before_adaptation_loses_the_metric(place):
    small = tnet_problem(problem.regression, **place)
    task = small.tasks[0]
    expected = small.learner(adapt=WITHOUT).adapt(task.support)(task.query[0])
    before = problem.Problem(
        lambda: mb.fold_tnet(small.model()), small.loss, small.tasks, STEPS
    ).learner()
    assert (before.adapt(task.support)(task.query[0]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("act", ["meta_gradient", "evaluate"])
def test_learners_leave_everything_as_it_was(act, place):
    small = tnet_problem(**place)
    learner = small.learner(adapt=WITHOUT)
    purity.leaves_no_trace(learner, lambda learner: getattr(learner, act)(small.tasks))
