"""Per-step batch norm: the conversion, its laws, its statistics, and what evaluation leaves alone."""

import copy
import itertools

import pytest
import small_problems as problem
import surgery_laws
import torch
import torch.nn.functional as F
from small_learners import EXECUTORS, learner_of, perturbed, small, tasks_of
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError
from metablocks.laws import gradients, purity
from metablocks.laws.compare import assert_close
from metablocks.models import Conv4

pytestmark = pytest.mark.usefixtures("placed")

STEPS = 3


def converted(model=None, steps=STEPS, **options):
    return mb.per_step_batch_norm(model or small(), steps, **options)


def conv_problem(place, steps=STEPS, **options):
    """A smooth conv net whose rows differ from step to step."""
    small = problem.classification(steps=steps, **place)

    def model():
        return perturbed(mb.per_step_batch_norm(small.model(), steps, **options), ".norm.")

    return problem.Problem(model, small.loss, small.tasks, steps)


# ---- the conversion


@pytest.mark.parametrize("affine", ["per_step", "shared"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(4), (6, 4)),
        (lambda: nn.BatchNorm1d(4), (6, 4, 5)),
        (lambda: nn.BatchNorm2d(4, eps=0.1, momentum=0.3), (6, 4, 3, 3)),
        (lambda: nn.BatchNorm3d(4, momentum=None), (6, 4, 2, 3, 3)),
        (lambda: nn.BatchNorm2d(4, affine=False), (6, 4, 3, 3)),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), (6, 4, 3, 3)),
    ],
)
def test_each_row_is_the_batch_norm_it_was(make, shape, affine, within):
    norm = make()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    new = mb.per_step_batch_norm(norm, STEPS, statistics="running", affine=affine)
    for step in range(STEPS):
        new.inner_step = step
        original = copy.deepcopy(norm)
        for training in (True, True, False):
            if training or norm.running_mean is not None:
                x = torch.randn(shape)
                got, expected = new.train(training)(x), original.train(training)(x)
                torch.testing.assert_close(got, expected, rtol=0, atol=within(1e-14))
        back = new.at_step(step)
        assert type(back) is type(norm)
        for name, tensor in original.state_dict().items():
            torch.testing.assert_close(
                back.state_dict()[name], tensor, rtol=within(1e-14), atol=within(1e-14)
            )


def test_names_stay_and_shapes_gain_a_step_dimension():
    model = small()
    new = converted(model)
    assert list(new.state_dict()) == list(model.state_dict())
    assert new[1].weight.shape == new[1].running_mean.shape == (STEPS, 4)
    assert converted(model, affine="shared")[1].weight.shape == (4,)
    again = converted(small())
    again.load_state_dict(new.state_dict())
    for name, tensor in new.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_original_is_left_alone_and_a_norm_used_twice_stays_one():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    new = converted(model)
    assert model[1] is model[3] is norm
    assert new[1] is new[3]
    assert isinstance(converted(norm), mb.PerStepBatchNorm)


def test_parameters_that_norms_share_stay_shared():
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.weight = first.weight
    new = converted(nn.Sequential(first, nn.Linear(3, 3), second))
    assert new[0].weight is new[2].weight
    assert new[0].bias is not new[2].bias
    assert first.weight is second.weight
    assert first.weight.shape == (3,)


def test_a_model_without_data_converts_too():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert {t.device.type for t in converted(model).state_dict().values()} == {"meta"}


def test_frozen_norms_stay_frozen():
    model = small()
    model[1].requires_grad_(False)
    new = converted(model)
    assert not new[1].weight.requires_grad
    assert mb.norm_patterns(new) == ["*"]
    assert not new[1].at_step(0).weight.requires_grad


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: converted(steps=0), "steps is 0; it takes a whole number, 1 or more"),
        (lambda: converted(steps=True), "steps is True"),
        (lambda: converted(nn.Linear(1, 1)), "Linear has no batch norm to convert"),
        (lambda: converted(statistics="runing"), 'did you mean "running"?'),
        (lambda: converted(affine="each"), "it is one of per_step, shared"),
        (lambda: converted(beyond="lst"), 'did you mean "last"?'),
        (lambda: converted(nn.LazyBatchNorm1d(device="cpu")), "run the model on one batch first"),
        (lambda: converted(nn.BatchNorm2d(3))(torch.ones(2, 3)), "takes 4D input, given 2D [2, 3]"),
        (
            lambda: learner_of(converted(steps=2), steps=3, rule=mb.LearningRate(0.1)),
            "3 inner steps asked for",
        ),
    ],
)
def test_misuse_is_refused(act, message):
    with pytest.raises(BlockError) as caught:
        act()
    assert message in str(caught.value)


# ---- the laws of learners


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
@EXECUTORS
def test_shared_affine_and_batch_statistics_are_the_learner_without(executor, order, place):
    surgery_laws.same_as_without(
        lambda model: converted(model, affine="shared"),
        problem.classification(steps=STEPS, **place),
        exact=True,
        order=order,
        executor=executor,
    )


def test_equal_rows_are_the_shared_norm_and_their_gradients_sum_to_its(place, within):
    small = problem.classification(steps=STEPS, **place)
    adapt = ["*", "!*.norm.*"]
    shared = small.learner(adapt=adapt).meta_gradient(small.tasks)
    model = mb.per_step_batch_norm(small.model(), STEPS)
    rows = mb.MetaLearner(
        model, loss=small.loss, steps=STEPS, rule=mb.LearningRate(0.1), adapt=adapt
    ).meta_gradient(small.tasks)
    got = {n: g.sum(0) if ".norm." in n else g for n, g in rows.grads.items()}
    assert_close("equal rows", got, shared.grads, within=within(1e-12))


@pytest.mark.parametrize("adapt", ["*", "inner loop leaves γ, β alone"])
@pytest.mark.parametrize("affine", ["per_step", "shared"])
@pytest.mark.parametrize("step_loss", [mb.FinalStepLoss(), mb.AnnealedStepLoss(epochs=5)], ids=repr)
def test_every_executor_gives_the_loops_gradient_and_statistics(affine, adapt, step_loss, place):
    small = conv_problem(place, affine=affine, statistics="running")
    adapt = adapt if adapt == "*" else mb.norm_patterns(small.model())

    def learner(executor):
        return small.learner(adapt=adapt, step_loss=step_loss, executor=executor)

    executors = [mb.Vmap(), mb.Vmap(chunk=1), mb.Vmap(chunk=2)]
    gradients.one_gradient(small, executors, learner)
    assert learner(mb.Vmap()).meta_gradient(small.tasks).buffer_changes


@pytest.mark.parametrize("affine", ["per_step", "shared"])
def test_finite_differences_of_every_meta_parameter(affine, device64, float64):
    small = conv_problem({"device": device64}, affine=affine)
    for adapt in ("*", mb.norm_patterns(small.model())):
        learner = small.learner(
            mb.lslr(0.1), adapt=adapt, step_loss=mb.UniformStepLoss(), executor=mb.Vmap()
        )
        gradients.finite_differences(learner, small.tasks)


@pytest.mark.parametrize("affine", ["per_step", "shared"])
@EXECUTORS
def test_its_gradient_is_that_of_plain_autograd(executor, affine, place):
    small = conv_problem(place, affine=affine)
    for adapt in ("*", mb.norm_patterns(small.model())):
        blocks = {"step_loss": mb.UniformStepLoss(), "executor": executor}
        gradients.plain_autograd(small.learner(adapt=adapt, **blocks), small.tasks)


@EXECUTORS
def test_each_row_collects_the_passes_of_its_step_and_tasks_take_the_mean(executor, within):
    """By hand, of a norm on the inputs: support before update k, then query after it, in row k."""
    model = converted(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    tasks = tasks_of(3)
    learner = learner_of(model, steps=STEPS, step_loss=mb.UniformStepLoss(), executor=executor)
    learner.backward(tasks)

    def after(old, batch_statistic):
        support, query = (batch_statistic(batch[0]) for batch in (tasks.support, tasks.query))
        return (0.9 * (0.9 * old + 0.1 * support) + 0.1 * query).mean(0).expand(STEPS, 3)

    close = {"rtol": within(1e-12), "atol": within(1e-14)}
    torch.testing.assert_close(model[0].running_mean, after(0, lambda x: x.mean(1)), **close)
    torch.testing.assert_close(model[0].running_var, after(1, lambda x: x.var(1)), **close)
    assert model[0].num_batches_tracked.tolist() == [2] * STEPS


def test_tasks_of_unequal_size_and_cumulative_momentum_combine_too(within):
    model = converted(nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 2)))
    tasks = [
        tasks_of(3, tasks=1)[0],
        mb.Task(*[(x[:3], y[:3]) for x, y in _batches(tasks_of(3)[0])]),
    ]
    learner = learner_of(model, steps=1)
    learner.backward(tasks)
    learner.backward(tasks)
    passes = [batch[0] for task in tasks for batch in (task.support, task.query)]
    mean = torch.stack([x.mean(0) for x in passes]).mean(0)
    torch.testing.assert_close(
        model[0].running_mean[0], mean, rtol=within(1e-12), atol=within(1e-14)
    )
    assert model[0].num_batches_tracked.tolist() == [4, 0, 0]


def _batches(task):
    return task.support, task.query


# ---- evaluation


@pytest.mark.parametrize("statistics", ["batch", "running"])
@EXECUTORS
def test_looking_leaves_statistics_bit_identical(executor, statistics):
    tasks = tasks_of(3)
    learner = learner_of(converted(statistics=statistics), executor=executor)
    learner.backward(tasks)
    purity.leaves_no_trace(learner, lambda learner: learner.evaluate(tasks))
    purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))
    purity.leaves_no_trace(learner, lambda learner: learner.adapt(tasks[0].support))


def test_running_statistics_are_read_only_when_asked():
    tasks = tasks_of(3)
    outcomes = {}
    for statistics in ("batch", "running"):
        torch.manual_seed(1)
        learner = learner_of(converted(statistics=statistics), steps=STEPS)
        before = learner.evaluate(tasks).query_losses
        with torch.no_grad():
            learner.model[1].running_mean += torch.randn(STEPS, 4)
        outcomes[statistics] = before, learner.evaluate(tasks).query_losses
    assert torch.equal(*outcomes["batch"])
    assert not torch.allclose(*outcomes["running"])


def test_batch_norms_inside_a_module_that_collects_keep_their_buffers():
    class Counting(mb.StepAware, nn.Sequential):
        collects_buffers = True

        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    learner = learner_of(Counting(), steps=STEPS)
    changes = learner.backward(tasks_of(3)).buffer_changes
    assert {name: float(change) for name, change in changes.items()} == {"model.passes": STEPS + 1}
    assert torch.equal(learner.model[1].running_mean, torch.zeros(4))


def test_training_is_the_same_whatever_evaluation_reads():
    tasks = tasks_of(3)
    results = []
    for statistics in ("batch", "running"):
        torch.manual_seed(1)
        learner = learner_of(converted(statistics=statistics))
        results.append((learner.backward(tasks), learner.state_dict()))
    (one, state), (other, twin) = results
    assert all(torch.equal(one.grads[name], other.grads[name]) for name in one.grads)
    assert all(torch.equal(state[name], twin[name]) for name in state)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_adapted_models_are_plain_and_predict_as_evaluation_does(statistics, within):
    tasks = tasks_of(3)
    learner = learner_of(converted(statistics=statistics), steps=STEPS, rule=mb.lslr(0.1))
    for _ in range(3):
        learner.backward(tasks)
    task = tasks[1]
    adapted = learner.adapt(task.support)
    assert type(adapted[1]) is nn.BatchNorm1d
    inputs = task.query[0]
    one_by_one = torch.cat([adapted(x[None]) for x in inputs])
    torch.testing.assert_close(one_by_one, adapted(inputs), rtol=within(1e-10), atol=within(1e-12))
    prediction = adapted(inputs) if statistics == "running" else adapted.train()(inputs)
    expected = learner.evaluate(tasks).predictions[1]
    torch.testing.assert_close(prediction, expected, rtol=within(1e-10), atol=within(1e-12))
    assert type(learner.model[1]) is mb.PerStepBatchNorm


# ---- past the trained steps


@pytest.mark.parametrize(
    ("rule", "norm", "most"),
    [("error", "error", 3), ("last", "error", 3), ("error", "last", 3), ("last", "last", None)],
)
def test_every_block_says_what_happens_past_its_last_step(rule, norm, most):
    learner = learner_of(
        converted(beyond=norm), steps=STEPS, rule=mb.lslr(0.1, beyond=rule), adapt=["*", "!1.*"]
    )
    assert learner.max_steps == most
    tasks = tasks_of(3)
    if most is None:
        assert learner.evaluate(tasks, steps=7).query_losses.shape == (3, 8)
        learner.adapt(tasks[0].support, steps=7)
        return
    for act in (
        lambda: learner.evaluate(tasks, steps=7),
        lambda: learner.adapt(tasks[0].support, steps=7),
    ):
        with pytest.raises(BlockError, match="7 inner steps asked for"):
            act()


def test_past_the_last_step_the_last_row_goes_on():
    tasks = tasks_of(3)
    model = converted(beyond="last", steps=2)
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    learner = learner_of(model, steps=2, adapt=mb.norm_patterns(model))
    with torch.no_grad():
        by_hand = converted(steps=4)
        state = model.state_dict()
        rows = torch.tensor([0, 1, 1, 1])
        by_hand.load_state_dict({n: t[rows] if n.startswith("1.") else t for n, t in state.items()})
    expected = learner_of(by_hand, steps=4, adapt=mb.norm_patterns(by_hand)).evaluate(tasks)
    assert torch.equal(learner.evaluate(tasks, steps=4).query_losses, expected.query_losses)


def test_deep_nets_and_every_option_together_run(place):
    model = Conv4(input_shape=(1, 8, 8), outputs=3, filters=3, layers=2)
    tasks = problem.classification(**place).tasks
    for statistics, affine, beyond in itertools.product(
        ("batch", "running"), ("per_step", "shared"), ("error", "last")
    ):
        new = converted(model, statistics=statistics, affine=affine, beyond=beyond)
        learner = learner_of(new, loss=F.cross_entropy, executor=mb.Vmap())
        assert learner.backward(tasks).loss.isfinite()
        assert learner.evaluate(tasks).query_losses.isfinite().all()
