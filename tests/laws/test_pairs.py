"""Every pair of axes: each value of one with each value of another, held to the laws of learners.

A learner is a row: a net, what adapts, and a block of every axis. Any two values of different axes
stand together in some row (a covering array of strength 2), so that two blocks that do not go
together show, in as few learners as there are pairs of the two longest axes.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_learners import exchanging
from torch import nn

import metablocks as mb
from metablocks.laws import gradients, purity
from metablocks.laws.cases import Case
from metablocks.laws.compare import fixed_draws, perturb
from metablocks.laws.strategies import RULES
from metablocks.selection import select_parameters
from metablocks.types import map_tensors


def _surgery(convert, **fields):
    """A case whose net has been through surgery, and moved off the identity."""

    def make(**place):
        plain = Case(steps=2, **fields).problem(**place)

        def model():
            with fixed_draws():
                return perturb(convert(plain.model()))

        return replace(plain, model=model)

    return make


class Learned(nn.Module):
    """A loss with a learned factor of a penalty on the weights."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, prediction, target, *, params):
        squares = sum(p.square().mean() for p in params.values())
        return self.loss(prediction, target) * (1 + self.factor**2) + self.factor * squares


def asking(loss):
    """A loss that asks for everything."""

    def asks(prediction, target, *, inputs, params, step, model):
        again = loss(model(inputs), target)
        return (
            loss(prediction, target)
            + again / (1 + step.at)
            + sum(p.mean() for p in params.values())
        )

    return asks


def whole(learner):
    """The learner, its rule moved off the identity, its losses where and how exactly the model is."""
    like = next(learner.model.parameters())
    return perturb(learner.to(like.device, like.dtype), "rule.")


IMPOSSIBLE = [{("objective", "learned"), ("order", order)} for order in ("first", "annealed")]
"""Values that are refused together: a support loss is learned through the inner steps."""


def _case(**fields):
    return lambda **place: Case(steps=2, **fields).problem(**place)


AXES = {
    "net": {
        "dense": _case(tasks=3),
        "dense-batch-tied": _case(tasks=2, norm="batch", tied=True),
        "conv-batch": _case(kind="conv", tasks=3, norm="batch", activation="softplus"),
        "dense-layer-frozen": _case(tasks=2, depth=2, width=4, norm="layer", frozen=True),
        "tnet": _surgery(mb.insert_tnet, tasks=2, kind="conv", norm="batch"),
        "per-step": _surgery(lambda m: mb.per_step_batch_norm(m, 2), tasks=3, norm="batch"),
        "linnet": _surgery(lambda m: mb.append_linear(m, depth=2, width=3), tasks=2),
    },
    "adapt": {"all": "*", "head": "head.*", "body": "!head.*"},
    "start": {name: name for name in ("as learned", "fixed", "zeros", "zero head", "prototypes")},
    "batches": {"full": mb.FullBatch(), "mini": mb.Minibatches(2), "stream": mb.Stream()},
    "rule": {make.code: make for make in RULES}
    | {
        "MTMask, all on": lambda: mb.Chain(mb.MTMask(init=50.0), mb.lslr(0.1)),
        "layer": lambda: mb.LearningRate(0.1, granularity="layer", per_step=True, learn=True),
        "Nesterov": lambda: mb.Chain(mb.Momentum(0.5, nesterov=True), mb.lslr(0.1)),
        "Adam, β₁ = 0": lambda: mb.Chain(mb.Adam(beta1=0.0, beta2=0.5, eps=0.1), mb.lslr(0.1)),
        "five": lambda: mb.Chain(
            mb.ClipNorm(0.3), mb.Momentum(0.5), mb.Adam(eps=0.1), mb.WeightDecay(0.1), mb.lslr(0.1)
        ),
        "deep KFO": lambda: mb.Chain(mb.KFO(hidden=1, activation="tanh", psd=True), mb.lslr(0.1)),
    },
    "order": {
        "mixed": lambda step, steps, progress: step % 2 == 0,
        "second": mb.SecondOrder(),
        "first": mb.FirstOrder(),
        "truncated": mb.TruncatedOrder(last=1),
        "annealed": mb.AnnealedOrder(first_order_epochs=3),
    },
    "objective": {
        "loss": lambda loss: {},
        "support": lambda loss: {"support_loss": lambda p, y: 0.5 * loss(p, y)},
        "asking": lambda loss: {"support_loss": asking(loss), "loss": asking(loss)},
        "learned": lambda loss: {"support_loss": Learned(loss)},
        "learned-both": lambda loss: {"loss": Learned(loss)},
    },
    "step_loss": {
        "final": mb.FinalStepLoss(),
        "uniform": mb.UniformStepLoss(),
        "annealed": mb.AnnealedStepLoss(epochs=5),
    },
    "estimator": {
        "unrolled": mb.Unrolled(),
        "adjoint": mb.Adjoint(),
        "adjoint-2": mb.Adjoint(keep_every=2, offload=True),
    },
    "executor": {
        "loop": mb.Loop(),
        "loop-workers": mb.Loop(workers=2, channels_last=True),
        "vmap": mb.Vmap(),
        "vmap-chunk": mb.Vmap(chunk=2),
    },
}


def _start(name, small, adapt):
    """The start, or one that fits: heads are plain linear layers, and prototypes are of classes."""
    model = small.model()
    names = select_parameters(adapt, model)
    if "head.bias" not in names or type(model.head) is not nn.Linear:
        name = {"zero head": "zeros", "prototypes": "fixed"}.get(name, name)
    elif name == "prototypes" and small.tasks.support[1].is_floating_point():
        name = "zero head"
    starts = {
        "as learned": mb.AsLearned,
        "fixed": lambda: mb.Fixed(names[:1]),
        "zeros": lambda: mb.Zeros(names[-1:]),
        "zero head": mb.ZeroHead,
        "prototypes": mb.Prototypes,
    }
    return starts[name]()


def _problem(values, **place):
    """The problem of a row, and the rule; the start among the values, which it fits."""
    small, make = values.pop("net")(**place), values.pop("rule")
    values |= values.pop("objective")(small.loss)
    values["start"] = _start(values["start"], small, values["adapt"])
    if isinstance(values["start"], mb.Prototypes) and isinstance(values["batches"], mb.Stream):
        values["start"] = mb.ZeroHead()
    if isinstance(values["batches"], mb.Stream):
        tasks = small.tasks

        def rows(leaf):
            return torch.stack([leaf.roll(-k, 0) for k in range(small.steps + 1)], 1)

        small = replace(small, tasks=mb.TaskBatch(*map_tensors(rows, (tasks.support, tasks.query))))
    return small, make


def _covering():
    """Rows in which any two values of different axes stand together, greedily few."""
    left = {
        frozenset(pair)
        for one, other in itertools.combinations(AXES, 2)
        for pair in itertools.product(*([(axis, v) for v in AXES[axis]] for axis in (one, other)))
        if set(pair) not in IMPOSSIBLE
    }
    used = Counter()
    while left:
        row = dict(min(left, key=sorted))

        for axis in [axis for axis in AXES if axis not in row]:
            gains = {  # how many pairs a value would bring; of equals, the one that was used less
                value: (sum(frozenset([(axis, value), o]) in left for o in row.items()),
                        -used[axis, value])
                for value in AXES[axis]
                if not any({(axis, value), o} in IMPOSSIBLE for o in row.items())
            }  # fmt: skip
            row[axis] = max(gains, key=gains.__getitem__)
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        used.update(row.items())
        yield row


ROWS = list(_covering())


@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[axis] for axis in AXES))
def test_any_two_blocks_go_together(row, place):
    values = {axis: AXES[axis][name] for axis, name in row.items()}
    small, make = _problem(values, **place)
    progress = mb.Progress(epoch=3)

    ours = whole(small.learner(make(), **values))
    purity.leaves_no_trace(ours, lambda learner: learner.meta_gradient(small.tasks))
    purity.leaves_no_trace(ours, lambda learner: learner.evaluate(small.tasks))
    if not values["batches"].draws:
        gradients.mean_of_tasks(ours, small.tasks)
    for law, name in ((gradients.one_gradient, "executor"), (gradients.one_estimator, "estimator")):
        law(small, [values[name]], exchanging(ours, name), progress=progress)


@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row["order"] in ("second", "annealed")],
    ids=lambda row: "-".join(row[axis] for axis in AXES),
)
def test_their_gradient_is_the_slope_of_every_meta_parameter(row, device):
    """On one task, of which the mean is made."""
    values = {axis: AXES[axis][name] for axis, name in row.items()}
    small, make = _problem(values, device=device)
    one = replace(small, tasks=mb.TaskBatch.stack([small.tasks[0]]))
    learner = whole(one.learner(make(), **values))
    if values["batches"].draws:  # which are others at evaluation
        gradients.plain_autograd(learner, one.tasks, progress=mb.Progress(epoch=3))
    else:
        gradients.finite_differences(learner, one.tasks, progress=mb.Progress(epoch=3))
