"""LinNet: appending and collapsing, its laws, and what it refuses."""

import copy

import pytest
import small_problems as problem
import surgery_laws
import torch
import torch.nn.functional as F
from small_learners import learner_of, perturbed, small, tasks_of
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, LawError
from metablocks.laws import gradients
from metablocks.models import MLP, Conv4

pytestmark = pytest.mark.usefixtures("placed")

STEPS = 3


def shaken(model):
    """The same model with appended layers away from the identity."""
    return perturbed(model, "appended")


def deep_problem(make=problem.regression, depth=2, width=5, place=None, **options):
    plain = make(steps=STEPS, **(place or {}))

    def model():
        torch.manual_seed(2)
        return shaken(mb.append_linear(plain.model(), depth=depth, width=width, **options))

    return problem.Problem(model, plain.loss, plain.tasks, STEPS)


MODELS = [
    lambda: nn.Linear(3, 4),
    lambda: nn.Linear(3, 4, bias=False),
    lambda: MLP(input_shape=(3,), outputs=2, hidden=(5,)),
    lambda: nn.Sequential(small(), nn.Sequential(nn.Tanh(), nn.Linear(2, 3))),
]


# ---- appending and collapsing


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("width", [None, 4, 9])
def test_identity_leaves_the_function_exactly(make, depth, width):
    model, x = make(), torch.randn(6, 3)
    before = copy.deepcopy(model.state_dict())
    deep = mb.append_linear(model, depth=depth, width=width)
    assert torch.equal(deep.eval()(x), model.eval()(x))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    added = [m for n, m in deep.named_modules() if n.rpartition(".")[0].endswith("appended")]
    outputs = model(x).shape[-1]
    assert len(added) == depth
    width = width or outputs
    assert [layer.out_features for layer in added] == [width] * (depth - 1) + [outputs]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    ("depth", "width", "init"), [(1, None, "identity"), (3, 7, "identity"), (3, 2, "random")]
)
def test_collapse_gives_a_model_of_the_original_names_and_classes(make, depth, width, init, within):
    model, x = make(), torch.randn(6, 3)
    deep = shaken(mb.append_linear(model, depth=depth, width=width, init=init))
    flat = mb.collapse_linear(deep)
    assert repr(flat) == repr(model)
    assert {n: p.shape for n, p in flat.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    model.load_state_dict(flat.state_dict())
    assert not torch.allclose(deep.eval()(x), make().eval()(x), atol=1e-2)
    for same in (model, flat):
        torch.testing.assert_close(same.eval()(x), deep.eval()(x), rtol=0, atol=within(1e-12))


def test_collapse_is_the_formula(within):
    """W = W_2 W_1 W, b = W_2 W_1 b + W_2 b_1 + b_2."""
    deep = shaken(mb.append_linear(nn.Linear(3, 2), depth=2, width=4))
    one, two = deep.appended
    flat = mb.collapse_linear(deep)
    expected = two.weight @ one.weight @ deep.weight
    torch.testing.assert_close(flat.weight, expected, rtol=0, atol=within(1e-14))
    expected = two.weight @ one.weight @ deep.bias + two.weight @ one.bias + two.bias
    torch.testing.assert_close(flat.bias, expected, rtol=0, atol=within(1e-14))


def test_names_and_state_dict_round_trip():
    model = MLP(input_shape=(3,), outputs=2, hidden=(5,))
    deep = shaken(mb.append_linear(model, depth=2, width=4))
    assert [name for name in deep.state_dict() if "head" in name] == [
        "head.weight",
        "head.bias",
        "head.appended.0.weight",
        "head.appended.0.bias",
        "head.appended.1.weight",
        "head.appended.1.bias",
    ]
    again = mb.append_linear(MLP(input_shape=(3,), outputs=2, hidden=(5,)), depth=2, width=4)
    again.load_state_dict(deep.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(again(x), deep(x))


def test_units_beyond_the_outputs_are_alive():
    """Wider than the outputs, every unit moves: random weights in front, zeros behind."""
    deep = mb.append_linear(nn.Linear(3, 2), depth=2, width=5)
    deep(torch.randn(6, 3)).square().sum().backward()
    assert (deep.appended[1].weight.grad.abs().sum(0) > 0).all()
    assert torch.equal(deep.appended[1].weight[:, 2:], torch.zeros(2, 3))
    assert (deep.appended[0].weight[2:].abs().sum(1) > 0).all()


def test_a_model_that_ends_elsewhere_says_how_many_features_it_has(within):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten())
    x = torch.randn(5, 1, 4, 4)
    for depth, width in ((1, None), (3, None), (2, 20)):
        deep = mb.append_linear(model, depth=depth, width=width, features=16)
        torch.testing.assert_close(deep(x), model(x), rtol=0, atol=within(1e-14))
        flat = mb.collapse_linear(shaken(deep))
        assert repr(flat.linear) == repr(nn.Linear(16, 16))
        torch.testing.assert_close(flat(x), deep(x), rtol=0, atol=within(1e-12))
        assert list(flat.state_dict()) == [
            "model.0.weight",
            "model.0.bias",
            "linear.weight",
            "linear.bias",
        ]


def test_a_layer_is_named_and_a_frozen_one_stays_frozen():
    model = MLP(input_shape=(3,), outputs=2, hidden=(5,))
    model.body.linear0.requires_grad_(False)
    deep = mb.append_linear(model, depth=1, layer="body.linear0")
    assert type(deep.head) is nn.Linear
    assert deep.body.linear0.appended[0].weight.requires_grad
    assert not mb.collapse_linear(deep).body.linear0.weight.requires_grad


def test_with_transforms_elsewhere_in_the_model():
    model = MLP(input_shape=(3,), outputs=2, hidden=(5,))
    tnet = mb.insert_tnet(mb.append_linear(model, depth=2), layers=["*", "!head.*"])
    other = mb.append_linear(mb.insert_tnet(model, layers=["*", "!head.*"]), depth=2)
    assert list(tnet.state_dict()) == list(other.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(mb.collapse_linear(mb.fold_tnet(tnet))(x), model(x))


class _OwnLinear(nn.Linear):
    pass


def _tied():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    return model


def _mlp():
    return MLP(input_shape=(3,), outputs=2)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: mb.append_linear(_mlp(), depth=0),
            "depth is 0; it takes a whole number, 1 to 1000",
        ),
        (lambda: mb.append_linear(_mlp(), depth=True), "depth is True"),
        (lambda: mb.append_linear(_mlp(), depth=2, width=0), "width is 0"),
        (lambda: mb.append_linear(_mlp(), depth=2, width=1), "width is 1, narrower than the 2"),
        (lambda: mb.append_linear(_mlp(), depth=1, init="identty"), 'did you mean "identity"?'),
        (lambda: mb.append_linear(nn.Tanh(), depth=1), "Tanh ends in a Tanh, which has no linear"),
        (
            lambda: mb.append_linear(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), depth=1),
            "Sequential ends in a ReLU, which has no linear layer to append to; say how many",
        ),
        (lambda: mb.append_linear(_mlp(), depth=1, layer="hed"), 'did you mean "head"?'),
        (lambda: mb.append_linear(_mlp(), depth=1, layer="body"), "body is a Sequential"),
        (
            lambda: mb.append_linear(_mlp(), depth=1, layer="head", features=2),
            "takes layer, for a model with that linear layer, or features",
        ),
        (
            lambda: mb.append_linear(mb.append_linear(_mlp(), depth=1), depth=1),
            "MLP has appended layers already",
        ),
        (
            lambda: mb.append_linear(nn.LazyLinear(2, device="cpu"), depth=1),
            "run the model on one batch first",
        ),
        (lambda: mb.append_linear(_OwnLinear(1, 1), depth=1), "the model is a _OwnLinear"),
        (lambda: mb.append_linear(mb.insert_tnet(_mlp()), depth=1), "head is a TransformedLinear"),
        (lambda: mb.insert_tnet(mb.append_linear(_mlp(), depth=1)), "head is a DeepLinear"),
        (lambda: mb.append_linear(_tied(), depth=1), "1 shares a parameter with 0"),
        (lambda: mb.collapse_linear(_mlp()), "MLP has no appended layers; append_linear"),
    ],
)
def test_misuse_is_refused(act, message):
    with pytest.raises(BlockError) as caught:
        act()
    assert message in str(caught.value)


# ---- the laws


@pytest.mark.parametrize("make", [problem.regression, problem.classification])
@pytest.mark.parametrize("options", [{}, {"width": 2, "init": "random"}, {"depth": 1}])
def test_collapse_keeps_the_function_and_comes_after_adaptation(make, options, place):
    deep = deep_problem(make, place=place, **options)
    surgery_laws.collapse_keeps_the_function(deep)
    surgery_laws.collapse_after_adaptation(deep)


def test_the_law_notices_where_collapse_does_not_matter():
    """With a rate of zero nothing adapts, and collapsing before is collapsing after."""
    with pytest.raises(LawError, match="collapse before adaptation: the adapted functions differ"):
        surgery_laws.collapse_after_adaptation(deep_problem(), rate=0.0)


@pytest.mark.parametrize("adapt", ["*", "head.*", "!head.*", "!*.appended.*"])
def test_finite_differences_of_every_meta_parameter(adapt):
    deep = deep_problem()
    learner = deep.learner(
        mb.lslr(0.1), adapt=adapt, step_loss=mb.UniformStepLoss(), executor=mb.Vmap()
    )
    gradients.finite_differences(learner, deep.tasks)


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_every_executor_gives_the_loops_gradient(order, place):
    deep = deep_problem(problem.classification, place=place)
    gradients.one_gradient(
        deep,
        [mb.Vmap(), mb.Vmap(chunk=1), mb.Vmap(chunk=2)],
        lambda executor: deep.learner(order=order, executor=executor),
    )


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_function_and_gradient_are_those_of_the_net_written_out(order, within):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model, x = shaken(mb.append_linear(model, depth=2, width=3)), torch.randn(5, 3)
    due = torch.tanh(F.linear(x, model[0].weight, model[0].bias))
    for layer in (model[2], *model[2].appended):
        due = due @ layer.weight.T + layer.bias
    torch.testing.assert_close(model(x), due, rtol=0, atol=within(1e-14))
    own = problem.Problem(lambda: copy.deepcopy(model), F.mse_loss, tasks_of(3), STEPS)
    learner = own.learner(mb.LearningRate(0.1, learn=True), order=order)
    gradients.plain_autograd(learner, own.tasks)


def test_on_images_head_and_appended_layers_adapt_alone(place, within):
    model = Conv4(input_shape=(1, 8, 8), outputs=3, filters=3, layers=2)
    learner = learner_of(mb.append_linear(model, depth=2), loss=F.cross_entropy, adapt="head.*")
    tasks = problem.classification(**place).tasks
    adapted = learner.adapt(tasks[0].support)
    flat = mb.collapse_linear(adapted)
    x = tasks[0].query[0]
    torch.testing.assert_close(flat(x), adapted(x), rtol=0, atol=within(1e-12))
    model.load_state_dict(flat.state_dict())
