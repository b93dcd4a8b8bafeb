"""Law 15 under `compile="trace"`: what is changed between two calls is seen by the next one.

What is expected is plain autograd, written by hand: MAML with one inner step on three tasks.
"""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metablocks as mb
from metablocks.executors.compiled import CompileWarning

pytestmark = pytest.mark.usefixtures("float64")

RATE = 0.1
TRACED = pytest.mark.parametrize("block", [mb.Loop, mb.Vmap], ids=lambda block: block.__name__)


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh())


def some_tasks():
    def batch(examples):
        return torch.randn(3, examples, 2), torch.randint(0, 3, (3, examples))

    return mb.TaskBatch(batch(5), batch(4))


def learner_of(executor, model=None, loss=F.cross_entropy):
    rule = mb.LearningRate(RATE)
    return mb.MetaLearner(model or net(), loss=loss, steps=1, rule=rule, executor=executor)


def by_hand(model, loss, tasks):
    """The mean query loss after one inner step, and its gradient by every parameter."""
    params = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.zeros(())
    for index in range(len(tasks)):
        task = tasks[index]
        value = loss(model(task.support[0]), task.support[1])
        slopes = torch.autograd.grad(value, list(params.values()), create_graph=True)
        fast = {
            name.removeprefix("model."): p - RATE * slope
            for (name, p), slope in zip(params.items(), slopes, strict=True)
        }
        prediction = functional_call(model, fast, (task.query[0],))
        total = total + loss(prediction, task.query[1]) / len(tasks)
    slopes = torch.autograd.grad(total, list(params.values()))
    return total.detach(), dict(zip(params, slopes, strict=True))


def assert_by_hand(learner, tasks, model=None):
    result = learner.meta_gradient(tasks)
    loss, grads = by_hand(model or learner.model, learner.loss, tasks)
    torch.testing.assert_close(result.loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.grads, grads, rtol=1e-10, atol=1e-12)
    return result.loss


SMOOTHING = 0.0


class Settings:
    """Global, and read by a loss."""

    temperature = 1.0


def by_global(prediction, target):
    return F.cross_entropy(prediction, target, label_smoothing=SMOOTHING)


def by_global_class(prediction, target):
    return F.cross_entropy(prediction / Settings.temperature, target)


def put_global(learner, new):
    globals()["SMOOTHING"] = 0.4 if new else 0.0


def put_temperature(learner, new):
    Settings.temperature = 3.0 if new else 1.0


def put_loss(learner, new):
    learner.loss = by_other if new else F.cross_entropy


def by_other(prediction, target):
    return F.nll_loss(prediction, target) + prediction.square().mean()


def put_loss_attribute(learner, new):
    learner.loss.label_smoothing = 0.4 if new else 0.0


def with_closure():
    beta = 0.1

    def loss(prediction, target):
        return F.cross_entropy(prediction, target) + beta * prediction.square().mean()

    def put(learner, new):
        nonlocal beta
        beta = 2.0 if new else 0.1

    loss.put = put
    return loss


def put_closure(learner, new):
    learner.loss.put(learner, new)


def with_default(prediction, target, beta=0.1):
    return F.cross_entropy(prediction, target) + beta * prediction.square().mean()


def put_partial(learner, new):
    learner.loss = functools.partial(with_default, beta=2.0 if new else 0.1)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.scale = net(), 1.0
        self.activation = torch.tanh

    def forward(self, x):
        return self.activation(self.layers(x) * self.scale)


def put_attribute(learner, new):
    learner.model.scale = 3.0 if new else 1.0


class ByOptions(nn.Module):
    """Reads what its class has, by a function."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        return scaled(self.layers(x), type(self))


def scaled(x, options):
    return x * options.scale * Settings.temperature


def put_options(learner, new):
    ByOptions.scale = 3.0 if new else 1.0


def put_function(learner, new):
    learner.model.activation = torch.sin if new else torch.tanh


def put_submodule(learner, new):
    learner.model.layers[1] = SIGMOID if new else TANH


SIGMOID, TANH = nn.Sigmoid(), nn.Tanh()


def put_frozen(learner, new):
    learner.model.layers[0].bias.requires_grad_(not new)


class Holds(nn.Module):
    """Holds a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.layers, self.held = net(), torch.ones(1)

    def forward(self, x):
        return self.layers(x) * self.held


def put_data(learner, new):
    learner.model.held.data = torch.tensor([1.0, 3.0, 2.0]) if new else torch.ones(1)


def plain_loss():
    return F.cross_entropy


CHANGES = {
    "another loss": (plain_loss, net, put_loss),
    "an attribute of a loss module": (nn.CrossEntropyLoss, net, put_loss_attribute),
    "a global that the loss names": (lambda: by_global, net, put_global),
    "an attribute of a global class": (lambda: by_global_class, net, put_temperature),
    "a number of a closure": (with_closure, net, put_closure),
    "a partial": (lambda: functools.partial(with_default, beta=0.1), net, put_partial),
    "a number of the model": (plain_loss, Scaled, put_attribute),
    "a class attribute of the model": (plain_loss, ByOptions, put_options),
    "a global of a function of the model": (plain_loss, ByOptions, put_temperature),
    "a function of the model": (plain_loss, Scaled, put_function),
    "a submodule": (plain_loss, Scaled, put_submodule),
    "what is frozen": (plain_loss, Scaled, put_frozen),
    "the shape of a tensor it holds": (plain_loss, Holds, put_data),
}


@pytest.mark.parametrize(("loss", "model", "put"), CHANGES.values(), ids=CHANGES.keys())
def test_the_next_call_sees_a_change_and_going_back_compiles_nothing_new(loss, model, put):
    executor = mb.Loop(compile="trace")
    learner, tasks = learner_of(executor, model(), loss()), some_tasks()
    compiler = executor._compiler
    put(learner, False)
    try:
        first = assert_by_hand(learner, tasks)
        assert compiler.count == 1
        put(learner, True)
        assert put is put_frozen or assert_by_hand(learner, tasks) != first
        assert_by_hand(learner, tasks)  # by what was traced
        assert compiler.count == 2
    finally:
        put(learner, False)
    if put is not put_partial:  # a partial made anew is another one
        assert assert_by_hand(learner, tasks) == first
        assert compiler.count == 2


def test_what_reads_too_much_is_not_traced():
    holds = [[0.0] * 100 for _ in range(100)]
    learner, tasks = learner_of(mb.Loop(compile="trace")), some_tasks()
    learner.loss = lambda p, t: F.cross_entropy(p, t) + holds[50][0] * p.mean()
    with pytest.warns(CompileWarning, match="more than 10000 values"):
        first = assert_by_hand(learner, tasks)
    holds[50][0] = 1.0
    assert assert_by_hand(learner, tasks) != first


@TRACED
def test_class_weights_changed_in_place_are_seen(block):
    weight = torch.ones(3)
    executor = block(compile="trace")
    learner = learner_of(executor, loss=lambda p, t: F.cross_entropy(p, t, weight=weight))
    tasks = some_tasks()
    first = assert_by_hand(learner, tasks)
    weight[0] *= 5
    assert assert_by_hand(learner, tasks) != first
    module = nn.CrossEntropyLoss(weight=torch.ones(3))
    learner.loss = module
    first = assert_by_hand(learner, tasks)
    module.weight[1] = 9.0
    assert assert_by_hand(learner, tasks) != first


def test_parameters_and_buffers_are_arguments_that_compile_nothing_new():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net()
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x):
            return self.layers(x) + self.shift

    executor = mb.Loop(compile="trace")
    learner, tasks = learner_of(executor, Shifted()), some_tasks()
    losses = {float(assert_by_hand(learner, tasks))}
    with torch.no_grad():
        learner.model.layers[0].weight.mul_(2)
    losses.add(float(assert_by_hand(learner, tasks)))
    learner.model.shift.copy_(torch.tensor([1.0, 0.0, -1.0]))
    losses.add(float(assert_by_hand(learner, tasks)))
    learner.model.shift = torch.tensor([0.0, 2.0, -1.0])
    losses.add(float(assert_by_hand(learner, tasks)))
    assert len(losses) == 4
    assert executor._compiler.count == 1


def test_two_learners_of_one_executor_do_not_share():
    executor, tasks = mb.Loop(compile="trace"), some_tasks()
    learners = [learner_of(executor, Scaled()) for _ in range(2)]
    learners[1].model.load_state_dict(learners[0].model.state_dict())
    put_attribute(learners[1], True)
    losses = [assert_by_hand(learner, tasks) for _ in range(2) for learner in learners]
    assert losses[0] == losses[2] != losses[1] == losses[3]
    assert executor._compiler.count == 2


def test_two_losses_on_one_model_do_not_share():
    executor, model, tasks = mb.Loop(compile="trace"), net(), some_tasks()
    one, other = learner_of(executor, model), learner_of(executor, model, by_other)
    losses = [assert_by_hand(learner, tasks) for learner in (one, other, one, other)]
    assert losses[0] == losses[2] != losses[1] == losses[3]


@TRACED
def test_support_and_query_that_are_one_tensor_in_the_first_task_are_two_in_the_next(block):
    learner, tasks = learner_of(block(compile="trace")), some_tasks()
    x, y = tasks.support
    assert_by_hand(learner, mb.TaskBatch((x, y), (x, y)))
    assert_by_hand(learner, mb.TaskBatch((x, y), (x + 1, y.roll(1, 1))))
    assert_by_hand(learner, mb.TaskBatch((x - 1, y.roll(1, 1)), (x, y)))
    assert learner.executor._compiler.count == 1


class Doubled(torch.Tensor):
    """Another tensor, whose layers give twice as much."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is F.linear else result


@pytest.mark.parametrize("first", [True, False])
def test_inputs_of_another_class_are_other_inputs(first):
    learner, tasks = learner_of(mb.Loop(compile="trace")), some_tasks()

    def task(task, doubled):
        kind = Doubled if doubled else torch.Tensor
        support, query = ((x.as_subclass(kind), y) for x, y in (task.support, task.query))
        return mb.Task(support, query)

    def check(*kinds):
        for doubled in kinds:
            assert_by_hand(learner, [task(tasks[index], doubled) for index in range(3)])

    with pytest.warns(CompileWarning, match="not traced, but run as it is"):
        check(first, not first, first)
    assert learner.executor._compiler.count == 1  # the plain ones


def test_one_task_object_twice_in_a_list():
    learner, tasks = learner_of(mb.Loop(compile="trace")), some_tasks()
    x, y = tasks[0].support
    same = mb.Task((x, y), (x, y))
    assert_by_hand(learner, [same, same, mb.Task((x, y), (x + 1, y.roll(1)))])


class Selects(nn.Module):
    """Its sizes depend on the data."""

    def __init__(self, select):
        super().__init__()
        self.layers, self.select = net(), select

    def forward(self, x):
        return self.layers(x) * self.select(x)


SELECTS = {
    "a mask": lambda x: x[x > 0].mean(),
    "nonzero": lambda x: x.flatten()[(x > 0).flatten().nonzero()[:, 0]].mean(),
}


@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS.keys())
def test_sizes_that_depend_on_the_data_are_not_traced(select):
    executor = mb.Loop(compile="trace")
    learner, tasks = learner_of(executor, Selects(select)), some_tasks()
    with pytest.warns(CompileWarning, match="sizes in it depend on the data"):
        learner.meta_gradient(tasks)
    assert_by_hand(learner, tasks)
    assert_by_hand(learner, some_tasks())
    assert executor._compiler.count == 0


def test_indices_that_are_no_mask_are_traced():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Parameter(torch.randn(4, 2)), net()

        def forward(self, x):
            return self.last(self.table[(x[:, 0] > 0).long()] + x)

    executor = mb.Loop(compile="trace")
    learner = learner_of(executor, Looks())
    for _ in range(2):
        assert_by_hand(learner, some_tasks())
    assert executor._compiler.count == 1


@pytest.mark.parametrize(
    "number",
    [
        lambda x: 2.0 if float(x.sum()) > 0 else 0.5,
        lambda x: 2.0 if torch.equal(x, x.abs()) else 0.5,
        lambda x: float(f"{x.sum():.3f}"),
        lambda x: torch.from_numpy(x.numpy()).sum(),
        lambda x: torch.as_tensor(np.asarray(x)).sum(),
        lambda x: sum(x.flatten().tolist()),
        lambda x: torch.from_dlpack(x).sum(),
    ],
)
def test_a_number_that_depends_on_the_data_is_not_kept(number):
    """A value that Python or NumPy gets hold of: it is found, and the function runs as it is."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net()

        def forward(self, x):
            return self.layers(x) * number(x)

    executor = mb.Loop(compile="trace")
    learner, tasks = learner_of(executor, Branches()), some_tasks()
    with pytest.warns(CompileWarning, match="not traced"):
        learner.meta_gradient(tasks)
    assert_by_hand(learner, tasks)
    negative = mb.TaskBatch(*((-x, y) for x, y in (tasks.support, tasks.query)))
    assert_by_hand(learner, negative)
    assert executor._compiler.count == 0


def frozen():
    held = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    return held, held.fill_


def behind_data():
    held = torch.tensor(1.0)
    return held, held.data.fill_


def inferred():
    with torch.inference_mode():
        held = torch.tensor(1.0)
    return held, torch.inference_mode()(held.fill_)


@pytest.mark.parametrize("make", [frozen, behind_data, inferred])
@pytest.mark.parametrize("number", [torch.Tensor.item, float, bool], ids=["item", "float", "bool"])
def test_a_number_of_a_tensor_that_is_written_unseen_is_not_kept(make, number):
    held, put = make()
    learner, tasks = learner_of(mb.Loop(compile="trace")), some_tasks()
    learner.loss = lambda p, t: F.cross_entropy(p * (0.5 + number(held)), t)
    with pytest.warns(CompileWarning, match="takes numbers out of PyTorch"):
        first = assert_by_hand(learner, tasks)
    put(0.0)
    assert assert_by_hand(learner, tasks) != first


def test_a_copied_learner_compiles_for_itself():
    learner, tasks = learner_of(mb.Loop(compile="trace"), Scaled()), some_tasks()
    first = assert_by_hand(learner, tasks)
    other = copy.deepcopy(learner)
    other.model.scale = 3.0
    assert assert_by_hand(other, tasks) != first
    assert assert_by_hand(learner, tasks) == first
