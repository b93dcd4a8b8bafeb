"""Bad values are refused where they come in: a table of bad calls, each a `MetablocksError`.

The first half of the table is made from signatures: every field of every block and public function is
given values that its annotation does not take. The second half is written out: what the answers of a
protocol, tasks, names and combinations may be. None may be accepted in silence, and none refused in
Python's or torch's own words.
"""

import inspect
import json
import math
import pickle
import typing
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import nn

import metablocks as mb
from metablocks.checks import UNCHECKED, Count, Interval, check
from metablocks.errors import (
    BlockError,
    ExecutorError,
    GradientError,
    MetablocksError,
    ModuleError,
    RecipeError,
    RuleError,
    SelectionError,
    TaskError,
)
from metablocks.models import (
    GRU,
    MLP,
    Conv4,
    Transformer,
    huggingface_model,
    torchvision_classifier,
)
from metablocks.recipe import load, schema
from metablocks.recipe.slots import SLOTS
from metablocks.tasks.base import SPLITS
from metablocks.tasks.torchvision_sets import DATASETS
from metablocks.tasks.transforms import (
    center_crop,
    normalize,
    random_crop,
    random_resized_crop,
    random_rotation,
    resize,
)

NAN = math.nan
WEIGHTS = {"w": torch.ones(2)}


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def optimizer():
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)


def learner_of(model=None, **blocks):
    given = {"loss": F.mse_loss, "steps": 1, "rule": mb.LearningRate(0.1), **blocks}
    return mb.MetaLearner(model or nn.Linear(2, 1), **given)


class Bias(nn.Module):
    """A loss with a parameter, which it may leave unused."""

    def __init__(self, by=1):
        super().__init__()
        self.by = by
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, prediction, target):
        bias = self.bias if self.by else 0.0
        return F.mse_loss(prediction + bias, target)


class Frame(nn.Module):
    """A loss that holds a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prediction, target):
        return F.mse_loss(prediction, target) + self.model.weight.square().sum()


def _loss_that_holds_its_model():
    model = nn.Linear(2, 1)
    return learner_of(model, loss=Frame(model))


def _writing(prediction, target, *, params):
    params["weight"].clamp_(max=0.0)
    return F.mse_loss(prediction, target)


def half(*lead, inputs=2, examples=6):
    return torch.randn(*lead, examples, inputs), torch.randn(*lead, examples, 1)


def tasks(support=None, query=None):
    return mb.TaskBatch(support or half(3), query or half(3))


class Emnist:
    """A data set, as a recipe writes it a block with a folder."""

    fields: typing.ClassVar = {"folder": "."}

    def __len__(self):
        return 1

    def __getitem__(self, row):
        return torch.zeros(1), 0


EPISODES = {"ways": 5, "shots": 1, "queries": 2}
SIZES = {"input_shape": (1, 8, 8), "outputs": 2}
IMAGES = {**SIZES, "layers": 2}
VIT = {"model_type": "vit", "patch_size": 4, "hidden_size": 8, "num_attention_heads": 2}
PARAMETERS = {"parameters": [("w", nn.Parameter(torch.ones(1)))]}

# What a good call of a block gives beside its defaults.
NEEDED: dict[Any, dict[str, Any]] = {
    mb.LearningRate: {"init": 0.1},
    mb.meta_sgd: {"init": 0.1},
    mb.lslr: {"init": 0.1},
    mb.ClipNorm: {"max_norm": 1.0},
    mb.WeightDecay: {"decay": 0.1},
    mb.Proximal: {"strength": 0.1},
    mb.Minibatches: {"size": 1},
    mb.Fixed: {"pattern": "*"},
    mb.Zeros: {"pattern": "*"},
    mb.TruncatedOrder: {"last": 1},
    mb.AnnealedOrder: {"first_order_epochs": 1},
    mb.AnnealedStepLoss: {"epochs": 1},
    mb.LearnedLoss: {"outputs": 2},
    mb.tasks.Linear: {"shots": 1, "queries": 1},
    mb.tasks.Logistic: {"shots": 1, "queries": 1},
    mb.tasks.Strokes: EPISODES,
    mb.tasks.Omniglot: EPISODES,
    mb.tasks.MiniImagenet: EPISODES,
    mb.tasks.CifarFS: EPISODES,
    mb.tasks.TieredImagenet: EPISODES,
    mb.tasks.CUB: EPISODES,
    mb.tasks.Classes: {**EPISODES, "classes": {"train": {"a": torch.zeros(3, 1)}}},
    mb.tasks.Episodes: {**EPISODES, "datasets": Emnist(), "splits": (1, 0, 0)},
    mb.tasks.Mix: {"sources": [mb.tasks.Sinusoid()]},
    mb.tasks.BySplit: dict.fromkeys(SPLITS, mb.tasks.Sinusoid()),
    mb.tasks.Folders: {**EPISODES, "root": ".", "size": 28},
    Conv4: IMAGES,
    MLP: {"input_shape": (1,), "outputs": 1},
    GRU: {"input_shape": (4,), "outputs": 3},
    Transformer: {"input_shape": (4,), "outputs": 3},
    torchvision_classifier: {**SIZES, "name": "shufflenet_v2_x0_5"},
    huggingface_model: {**SIZES, "config": VIT},
    mb.per_step_batch_norm: {"model": net(), "steps": 2},
    mb.PerStepBatchNorm: {"norm": nn.BatchNorm1d(2), "steps": 2},
    mb.append_linear: {"model": net(), "depth": 1},
    mb.collapse_linear: {"model": mb.append_linear(net(), depth=1)},
    mb.insert_tnet: {"model": net()},
    mb.insert_lora: {"model": net(), "rank": 1},
    mb.fold_lora: {"model": mb.insert_lora(net(), rank=1)},
    mb.fold_tnet: {"model": mb.insert_tnet(net())},
    mb.norm_patterns: {"model": net()},
    mb.transform_patterns: {"model": net()},
    mb.FunctionalModule: {"module": net()},
    mb.MetaLearner: {
        "model": nn.Linear(2, 1),
        "loss": F.mse_loss,
        "steps": 1,
        "rule": mb.LearningRate(0.1),
    },
    mb.adapt: {
        "loss_fn": lambda params, batch: (params["w"] ** 2).sum(),
        "params": WEIGHTS,
        "batch": (),
        "rule": mb.LearningRate(0.1).setup(WEIGHTS, 1),
        "steps": 1,
    },
    mb.choose_executor: {"learner": learner_of(), "tasks": tasks()},
    mb.train_maml: {"model": nn.Linear(2, 1), "tasks": [tasks()], "progress": False},
    mb.fit: {
        "learner": learner_of(),
        "tasks": [tasks()],
        "optimizer": optimizer(),
        "progress": False,
    },
    mb.load_run: {"folder": "."},
    mb.Task: {"support": half(), "query": half()},
    mb.TaskBatch: {"support": half(3), "query": half(3)},
    **{
        SLOTS["optimizer"].blocks[name]: {**PARAMETERS, "lr": 0.1}
        for name in ("adam", "adamw", "sgd")
    },
    random_rotation: {"degrees": 10},
    **{block: {"size": 8} for block in (random_crop, random_resized_crop, center_crop)},
    resize: {"size": (8, 8)},
    normalize: {"mean": [0.5], "std": [0.2]},
    **{block: {"folder": "."} for block in DATASETS.values()},
    **{block: {**PARAMETERS, "maximum": 1.0} for block in SLOTS["clip"].blocks.values()},
    **{
        SLOTS["schedule"].blocks[name]: {"optimizer": optimizer(), "final": 0.1, "epochs": 2}
        for name in ("cosine", "linear")
    },
    SLOTS["schedule"].blocks["constant"]: {"optimizer": optimizer()},
}

# Public names that nobody calls with values of their own: what the house makes, and what one subclasses.
NOT_CALLED = {
    *("Batch", "Tensors", "Granularity", "RULES", "laws", "tasks"),
    *("Order", "StepLoss", "Executor", "Estimator", "UpdateRule", "StepAware", "StepInfo"),
    *("Batches", "Start"),
    *(
        "Carry",
        "Epoch",
        "Evaluation",
        "InnerLoop",
        "LoadedRun",
        "MetaGradient",
        "ModuleState",
        "TaskGradient",
        "Trajectory",
        "Validation",
    ),
    *("CompileWarning", "MetablocksError", "RandomDrawsWarning", "NamedTensors"),
}

BLOCKS = {
    **{f"mb.{name}": getattr(mb, name) for name in mb.__all__ if name not in NOT_CALLED},
    **{f"{s.name}.{name}": block for s in SLOTS.values() for name, block in s.blocks.items()},
}
UNIQUE = {block: name for name, block in BLOCKS.items()}


def fields(block):
    target = block.__init__ if inspect.isclass(block) else block
    hints = typing.get_type_hints(target, include_extras=True)
    parameters = inspect.signature(block).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.name != "self"}


def members(annotation):
    """An annotation's alternatives, and the marks of its ranges."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        kinds, marks = members(arguments[0])
        return kinds, [*marks, *arguments[1:]]
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        both = [members(argument) for argument in arguments]
        return [k for kinds, _ in both for k in kinds], [m for _, marks in both for m in marks]
    return [annotation], []


def misfits(annotation):
    """Values that do not fit an annotation."""
    kinds, marks = members(annotation)
    if Any in kinds or UNCHECKED in marks:
        return
    literals = [x for kind in kinds for x in typing.get_args(kind) if isinstance(x, str)]
    listed = any(isinstance(typing.get_origin(k), type) and typing.get_args(k) for k in kinds)
    yield from (object(), b"", NAN, math.inf, -math.inf, [[]], {1, 2}, np.float32("nan"))
    yield nn.Linear  # a class in the place of an instance
    if type(None) not in kinds:
        yield None
    if bool not in kinds:
        yield from (True, np.True_)
    if str not in kinds or literals:
        yield "no"
    if float not in kinds:
        yield from (1.5, torch.tensor(1.5))
    if int not in kinds and float not in kinds:
        yield 1
    if not listed:
        yield []
    yield from (-1 for mark in marks if isinstance(mark, Ge | Gt))
    yield from (0.0 for mark in marks if isinstance(mark, Gt))
    yield from (mark.lt for mark in marks if isinstance(mark, Lt))


def test_every_public_name_and_every_block_of_a_recipe_is_in_the_table():
    assert set(mb.__all__) >= NOT_CALLED
    for block, name in UNIQUE.items():
        if block is mb.Chain:
            block(mb.LearningRate(0.1))
        elif block not in (mb.load_run, *DATASETS.values()):  # which need their data
            block(**NEEDED.get(block, {}))
        for field, annotation in fields(block).items():
            assert annotation is not inspect.Parameter.empty, (name, field)


@pytest.mark.parametrize("block", [pytest.param(b, id=n) for b, n in UNIQUE.items()])
def test_a_field_takes_nothing_but_what_its_signature_says(block):
    for field, annotation in fields(block).items():
        for value in misfits(annotation):
            needed = {name: v for name, v in NEEDED.get(block, {}).items() if name != field}
            with pytest.raises(MetablocksError) as caught:
                block(value) if block is mb.Chain else block(**needed, **{field: value})
            error, name = caught.value, block.__name__
            assert error.block == name
            assert error.field.partition("[")[0] == field
            assert f"{name} {error.field} is " in str(error)
            assert "; it " in str(error) or "? It " in str(error)


# `Task` and `TaskBatch` are made for each task of a step: of their fields, but not of names, they say it.
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=n) for b, n in UNIQUE.items() if b not in (mb.Task, mb.TaskBatch)],
)
def test_a_name_that_is_no_field_or_a_field_that_is_missing_is_named(block):
    needed = {} if block is mb.Chain else NEEDED.get(block, {})
    with pytest.raises(
        MetablocksError, match=f"^{block.__name__} has no parameter learnt"
    ) as caught:
        block(**needed, learnt=1)
    assert isinstance(caught.value, TypeError)
    for field in needed:
        if inspect.signature(block).parameters[field].default is inspect.Parameter.empty:
            with pytest.raises(
                MetablocksError, match=f"^{block.__name__} {field} is missing; it takes"
            ):
                block(**{name: value for name, value in needed.items() if name != field})


RECIPE = "maml_strokes"
PLACES = {
    "tasks": "tasks",
    "model": "model",
    "surgery": "surgery[0]",
    "rule": "inner.rule[0]",
    "order": "inner.order",
    "batches": "inner.batches",
    "start": "inner.start",
    "support_loss": "inner.support_loss",
    "executor": "hardware.executor",
    "transform": "tasks.support_transform[0]",
    "dataset": "tasks.datasets",
}
HOLDERS = {  # of blocks that are held by others
    "transform": "tasks={block: cifar_fs, ways: 5, shots: 1, queries: 2, support_transform: [IT]}",
    "dataset": "tasks={block: episodes, splits: [1, 0, 0], ways: 5, shots: 1, queries: 2, datasets: IT}",
}


def plain_misfits(annotation):
    """Some of `misfits`, as a recipe writes them."""
    written = {
        "nan": ".nan",
        "True": "true",
        "None": "null",
        "no": "'no'",
        "1.5": "1.5",
        "-1": "-1",
    }
    return {written[str(value)] for value in misfits(annotation) if str(value) in written}


def as_block(source):
    """A block that another one holds, as a recipe writes it."""
    return {"block": type(source).__name__.lower(), **getattr(source, "fields", {})}


@pytest.mark.parametrize(
    ("slot", "name"),
    [pytest.param(s, n, id=f"{s.name}.{n}") for s in SLOTS.values() for n in s.blocks],
)
def test_a_field_of_a_recipe_takes_nothing_but_what_its_signature_says(slot, name):
    block, place = slot.blocks[name], PLACES.get(slot.name, f"outer.{slot.name}")
    known = schema.fields(block, slot.context)
    needed = {k: v for k, v in NEEDED.get(block, {}).items() if k in known}
    plain = f"{place.removesuffix('[0]')}={'[IT]' if '[0]' in place else 'IT'}"
    for field in known:
        for value in plain_misfits(known[field].annotation):
            given = {k: json.dumps(v, default=as_block) for k, v in needed.items()}
            entry = {**given, field: value}
            written = ", ".join(f"{k}: {v}" for k, v in {"block": name, **entry}.items())
            with pytest.raises(RecipeError) as caught:
                load(RECIPE, [HOLDERS.get(slot.name, plain).replace("IT", f"{{{written}}}")])
            assert f"{place}.{field}" in str(caught.value)


class Unused(nn.Linear):
    """A model with a part that its forward pass leaves out."""

    def __init__(self):
        super().__init__(2, 1)
        self.spare = nn.Linear(3, 2)


class Branching(nn.Linear):
    """A model that looks at its data, which vmap refuses."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Answers(mb.UpdateRule):
    """A rule that answers whatever it is made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, updates, state, step):
        return self.answer(updates, state)


class Writes(mb.UpdateRule):
    """A rule that writes its steps itself."""

    def forward(self, updates, state, step):
        for name, update in updates.items():
            step.params[name].sub_(0.1 * update)
        return {name: torch.zeros_like(update) for name, update in updates.items()}, state


class Estimates(mb.Estimator):
    """An estimator that answers whatever it is made with."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, inner, meta, buffers, task):
        return self.answer


def always(answer):
    def policy(*arguments):
        return answer

    return policy


def meta(batch=None, **blocks):
    return learner_of(**blocks).meta_gradient(batch or tasks())


def labelled(dtype, executor):
    batch = torch.randn(3, 6, 2), torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype).expand(3, 6)
    return learner_of(nn.Linear(2, 3), loss=F.cross_entropy, executor=executor).meta_gradient(
        mb.TaskBatch(batch, batch)
    )


def functional(**given):
    return mb.adapt(**{**NEEDED[mb.adapt], **given})


STEP_LOSS = "it returns weights [steps + 1] = [2], a tensor of floats"
RULE = "it returns a pair: updates {name: tensor}, and the new state"
LOSS = "it must return a scalar tensor of floats"
METRIC = "it returns a scalar tensor or a number"

ANSWERS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    **{
        f"order {answer!r}": (
            lambda a=answer: meta(order=always(a)),
            BlockError,
            "order",
            "it returns True or False",
        )
        for answer in (None, "no", 1, 0.0, [True], torch.tensor(True))
    },
    "order of adapt": (
        lambda: functional(order=always("no")),
        BlockError,
        "order",
        "the order policy returned 'no'; it returns True or False",
    ),
    **{
        f"step loss {answer!r}": (
            lambda a=answer: meta(step_loss=always(a)),
            BlockError,
            "step_loss",
            STEP_LOSS,
        )
        for answer in (
            *(None, 1, [0.0, 1.0], torch.tensor([0, 1]), torch.tensor([False, True])),
            *(torch.tensor([0.0, NAN]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.6])),
            *(torch.ones(3) / 3, torch.tensor(1.0)),
        )
    },
    **{
        f"rule {name}{' in a chain' if chained else ''}": (
            lambda a=answer, c=chained: learner_of(
                rule=mb.Chain(Answers(a), mb.LearningRate(0.1)) if c else Answers(a)
            ).evaluate(tasks()),
            RuleError,
            "rule",
            RULE,
        )
        for chained in (False, True)
        for name, answer in {
            "none": lambda updates, state: None,
            "list": lambda updates, state: [updates, state],
            "updates alone": lambda updates, state: updates,
            "number": lambda updates, state: 3,
            "numbers": lambda updates, state: (dict.fromkeys(updates, 0.0), state),
        }.items()
    },
    "rule with integers": (
        lambda: meta(rule=Answers(lambda u, s: ({k: v.long() for k, v in u.items()}, s))),
        RuleError,
        "rule",
        "returned an update of [1, 2] torch.int64 for weight, which is [1, 2] torch.float",
    ),
    "rule without a name": (
        lambda: meta(rule=Answers(lambda u, s: ({}, s))),
        RuleError,
        "rule",
        "no update for ['weight', 'bias']",
    ),
    **{
        f"loss {answer!r}{of}": (
            lambda a=answer, act=act: act(loss=always(a)),
            GradientError,
            "loss",
            LOSS,
        )
        for of, act in {
            "": meta,
            " at evaluation": lambda **blocks: learner_of(**blocks).evaluate(tasks()),
        }.items()
        for answer in (None, [0.0], 1, 1.0, torch.tensor(1), torch.zeros(6), torch.tensor(1j))
    },
    **{
        f"metric {answer!r}": (
            lambda a=answer: learner_of().evaluate(tasks(), metric=always(a)),
            BlockError,
            "metric",
            METRIC,
        )
        for answer in (None, "0.5", [0.5], torch.zeros(6), torch.tensor(1j))
    },
    **{
        f"estimator {answer!r}": (
            lambda a=answer: meta(estimator=Estimates(a)),
            BlockError,
            "estimator",
            "it returns a TaskGradient, its grads by the names of `meta`",
        )
        for answer in (None, [], {}, ({}, torch.ones(())))
    },
    "estimator of another name": (
        lambda: meta(estimator=Estimates(mb.TaskGradient(WEIGHTS, torch.ones(()), torch.ones(2)))),
        BlockError,
        "estimator",
        "it returns for w none of that name",
    ),
    **{
        f"executor {answer!r}": (
            lambda a=answer: meta(executor=always(a)),
            BlockError,
            "executor",
            "it returns a pair: the sum over tasks, and what is stacked",
        )
        for answer in (None, [], 3)
    },
}

EMPTY = (torch.zeros(3, 0, 2), torch.zeros(3, 0, 1))
LISTS = ([[1.0, 2.0]], [[1.0]])
ARRAYS = (np.ones((4, 2)), np.ones((4, 1)))
FAR = (torch.randn(3, 6, 2), torch.full((3, 6), 7))

TASKS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    **{
        f"empty {side}, {method}": (
            lambda s=side, m=method: getattr(learner_of(), m)(tasks(**{s: EMPTY})),
            TaskError,
            side,
            f"tasks.{side}[0] has no examples",
        )
        for side in ("support", "query")
        for method in ("meta_gradient", "backward", "evaluate")
    },
    "empty support, adapt": (
        lambda: learner_of().adapt(half(examples=0)),
        TaskError,
        "support",
        "has no examples",
    ),
    "adapt(task)": (
        lambda: learner_of().adapt(tasks()[0]),
        BlockError,
        "support",
        "adapt support is a Task; it takes a pair (inputs, target)",
    ),
    "adapt(inputs)": (
        lambda: learner_of().adapt(torch.ones(3, 2)),
        BlockError,
        "support",
        "adapt support is a Tensor [3, 2]",
    ),
    "adapt(None)": (lambda: learner_of().adapt(None), BlockError, "support", "support is None"),
    "lists": (lambda: learner_of().adapt(LISTS), TaskError, "support", "the inputs are a list"),
    "arrays": (
        lambda: learner_of().adapt(ARRAYS),
        TaskError,
        "support",
        "the inputs are a ndarray",
    ),
    "a list for the target": (
        lambda: learner_of().adapt((torch.ones(2, 2), [1.0, 2.0])),
        TaskError,
        "support",
        "the target is a list: give tensors",
    ),
    "a list of lists": (
        lambda: meta([mb.Task(LISTS, LISTS)]),
        TaskError,
        "tasks",
        "the inputs are a list",
    ),
    **{
        f"inputs of {dtype}, {executor!r}": (
            lambda d=dtype, e=executor: meta(
                tasks((torch.ones(3, 6, 2, dtype=d), torch.ones(3, 6, 1))), executor=e
            ),
            TaskError,
            "tasks",
            f"the inputs are a Tensor [6, 2] of {dtype}",
        )
        for dtype in (torch.float16, torch.int64)
        for executor in (mb.Loop(), mb.Vmap())
    },
    **{
        f"labels of {dtype}, {executor!r}": (
            lambda d=dtype, e=executor: labelled(d, e),
            TaskError,
            "tasks",
            "class numbers as target.long()",
        )
        for dtype in (torch.int32, torch.int16, torch.int8, torch.bool)
        for executor in (mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace"), mb.Vmap())
    },
    "class beyond the outputs": (
        lambda: learner_of(nn.Linear(2, 3), loss=F.cross_entropy).meta_gradient(tasks(FAR, FAR)),
        TaskError,
        "tasks",
        "Target 7 is out of bounds; the inputs are a Tensor [6, 2]",
    ),
    "inputs of another width": (
        lambda: meta(tasks(half(3, inputs=1))),
        TaskError,
        "tasks",
        "the inputs are a Tensor [6, 1]",
    ),
    "support and query that Reptile cannot join": (
        lambda: meta(tasks(half(3), half(3, inputs=1)), estimator=mb.Reptile()),
        TaskError,
        "examples",
        "joins support and query, whose tensors differ in form",
    ),
    "more steps than rates": (
        lambda: learner_of(rule=mb.lslr(0.1)).evaluate(tasks(), steps=2),
        BlockError,
        "steps",
        "take at most 1",
    ),
    "no tasks": (lambda: learner_of().meta_gradient([]), TaskError, "tasks", "an empty list"),
    "a tensor": (
        lambda: learner_of().evaluate(torch.ones(3)),
        TaskError,
        "tasks",
        "tasks is a Tensor",
    ),
    "a number": (lambda: learner_of().evaluate([1]), TaskError, "tasks", "tasks[0] is a int"),
    "a task": (
        lambda: learner_of().backward(tasks()[0]),
        TaskError,
        "tasks",
        "it takes a TaskBatch or a list of Task",
    ),
    "none": (lambda: learner_of().meta_gradient(None), TaskError, "tasks", "tasks is a NoneType"),
    "progress": (
        lambda: learner_of().backward(tasks(), progress=3),
        BlockError,
        "progress",
        "backward progress is 3; it takes a Progress",
    ),
    "a metric": (
        lambda: learner_of().evaluate(tasks(), metric="accuracy"),
        BlockError,
        "metric",
        "it takes a function",
    ),
    "steps": (
        lambda: learner_of().evaluate(tasks(), steps=1.5),
        BlockError,
        "steps",
        "evaluate steps is 1.5; it takes a whole number, 0 or more",
    ),
    "statistics": (
        lambda: learner_of().evaluate(tasks(), norm_statistics="bach"),
        BlockError,
        "norm_statistics",
        'did you mean "batch"? It takes "batch", "running" or "support"',
    ),
    "numbers of tasks": (
        lambda: mb.TaskBatch(half(3), half(2)),
        TaskError,
        "support",
        "one number of tasks",
    ),
    "index": (lambda: tasks()["a"], TaskError, "index", "it takes a whole number"),
    "place": (lambda: tasks().to("nope"), TaskError, "target", "target is 'nope'"),
    "stack": (lambda: mb.TaskBatch.stack([1]), TaskError, "tasks", "each a Task"),
    **{
        f"sample {split!r} {indices!r}": (
            lambda s=split, i=indices: mb.tasks.Sinusoid().sample(s, i),
            TaskError,
            field,
            message,
        )
        for split, indices, field, message in (
            ("train", 3, "indices", "it takes a list of task numbers, at least one"),
            ("train", [0.5], "indices", "indices is [0.5]"),
            ("train", [NAN], "indices", "indices is [nan]"),
            ("train", [True], "indices", "indices is [True]"),
            ("train", [-1], "indices", "they count from 0"),
            ("train", "1", "indices", "indices is '1'"),
            ("train", None, "indices", "indices is None"),
            ("trian", [0], "split", "it is one of train, validation, test"),
            (None, [0], "split", "unknown split None"),
        )
    },
    "device that is not here": (
        lambda: mb.train_maml(nn.Linear(2, 1), [tasks()], device="nope", progress=False),
        BlockError,
        "device",
        '"nope" is no device; it takes auto, cpu',
    ),
    "tasks of train_maml": (
        lambda: mb.train_maml(nn.Linear(2, 1), None, progress=False),
        TaskError,
        "tasks",
        "it takes a TaskSource, or an iterable of batches",
    ),
    "batch of train_maml": (
        lambda: mb.train_maml(nn.Linear(2, 1), [3], progress=False),
        TaskError,
        "tasks",
        "batch 1 of epoch 1 is a int",
    ),
    "memory": (
        lambda: mb.choose_executor(learner_of(), tasks(), memory="lots"),
        BlockError,
        "memory",
        "choose_executor memory is 'lots'; it takes bytes, or a size such as",
    ),
    "parameters to set up for": (
        lambda: mb.LearningRate(0.1).setup({"w": 3}, 1),
        RuleError,
        "params",
        "setup params is {'w': 3}; it takes a dict",
    ),
    "steps to set up for": (lambda: mb.lslr(0.1).setup(WEIGHTS, -1), RuleError, "steps", "is -1"),
    "state of a module": (
        lambda: mb.FunctionalModule(nn.Linear(2, 1))(None, torch.ones(1, 2)),
        ModuleError,
        "state",
        "Linear state is None; it takes a ModuleState",
    ),
}

COMBINATIONS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    "a rule that does not negate": (
        lambda: learner_of(rule=mb.Adam()),
        BlockError,
        "rule",
        "Adam does not negate it, and updates are added",
    ),
    "another": (
        lambda: learner_of(rule=mb.Momentum()),
        BlockError,
        "rule",
        "put a learning rate behind it, Chain(Momentum(…), LearningRate(0",
    ),
    "a chain that does not": (
        lambda: learner_of(rule=mb.Chain(mb.KFO(), mb.ClipNorm(1.0))),
        BlockError,
        "rule",
        "KFO, ClipNorm does not negate it",
    ),
    "a chain that negates twice": (
        lambda: learner_of(rule=mb.Chain(mb.lslr(0.1), mb.meta_sgd(1.0))),
        BlockError,
        "rule",
        "LearningRate and LearningRate each",
    ),
    "a negative rate": (
        lambda: learner_of(rule=mb.LearningRate(-0.1)),
        BlockError,
        "rule.init",
        "LearningRate init is -0.1: a negative rate goes up",
    ),
    "a negative rate inside": (
        lambda: learner_of(rule=mb.Chain(mb.KFO(), mb.Chain(mb.lslr(-1.0)))),
        BlockError,
        "rule.rules.1.rules.0.init",
        "init is -1:",
    ),
    "pattern": (lambda: learner_of(adapt="haed"), SelectionError, "adapt", '"haed" matches no'),
    "no pattern": (lambda: learner_of(adapt=[]), SelectionError, "adapt", "no pattern given"),
    "class for a rule": (
        lambda: learner_of(rule=mb.LearningRate),
        BlockError,
        "rule",
        "it takes a UpdateRule; did you mean LearningRate(…)?",
    ),
    "class for a loss": (
        lambda: learner_of(loss=nn.MSELoss),
        BlockError,
        "loss",
        "did you mean MSELoss(…)?",
    ),
    "a loss of one argument": (
        lambda: learner_of(loss=nn.PReLU()),
        BlockError,
        "loss",
        "loss PReLU takes input alone in the first places; a loss takes two, (prediction, target)",
    ),
    "a loss that needs more": (
        lambda: learner_of(support_loss=lambda p, y, *, parms: p.mean()),
        BlockError,
        "support_loss",
        "support_loss <lambda> requires parms, for which a learner has no value in that place; did you "
        'mean "params"?',
    ),
    "a name in the third place": (
        lambda: learner_of(loss=lambda p, y, params: p.mean()),
        BlockError,
        "loss",
        "loss <lambda> requires params, for which a learner has no value in that place; make it "
        "keyword-only, (prediction, target, *, params)",
    ),
    "a loss that holds the model": (
        lambda: _loss_that_holds_its_model(),
        BlockError,
        "loss",
        "loss Frame holds model.weight as its model.weight",
    ),
    "a support loss learned in first order": (
        lambda: learner_of(support_loss=Bias(), order=mb.FirstOrder()),
        BlockError,
        "order",
        "support_loss.bias is learned through the inner steps, and FirstOrder() takes the gradient",
    ),
    "a support loss learned in no step": (
        lambda: learner_of(support_loss=Bias(), steps=0),
        BlockError,
        "steps",
        "support_loss.bias is learned through the inner steps; give it steps: 1 or more, not 0",
    ),
    "in first order at first": (
        lambda: learner_of(support_loss=Bias(), order=mb.AnnealedOrder(first_order_epochs=2)),
        BlockError,
        "order",
        "for a constant in epoch 0",
    ),
    "through no last step": (
        lambda: learner_of(support_loss=Bias(), order=mb.TruncatedOrder(last=0)),
        BlockError,
        "order",
        "TruncatedOrder(last=0) takes the gradient",
    ),
    "a loss learned by Reptile": (
        lambda: learner_of(support_loss=Bias(), estimator=mb.Reptile()),
        BlockError,
        "support_loss.bias",
        "Reptile has a gradient for what adapts inside a task alone, and support_loss.bias does not",
    ),
    "a stepwise loss with Implicit": (
        lambda: learner_of(loss=lambda p, y, *, step: p.mean(), estimator=mb.Implicit()),
        BlockError,
        "loss",
        "Implicit needs one inner loss for all steps, and loss <lambda> asks for the step",
    ),
    "statistics of no pass": (
        lambda: learner_of(support_loss=lambda *, params: 0, norm_statistics="support"),
        BlockError,
        "norm_statistics",
        "support_loss <lambda> takes none",
    ),
    "a metric of no prediction": (
        lambda: learner_of(loss=lambda *, params: 0).evaluate(tasks(), metric=F.mse_loss),
        BlockError,
        "metric",
        "metric is mse_loss, but the loss <lambda> takes no prediction",
    ),
    "a loss that no task reaches": (
        lambda: learner_of(loss=Bias(by=0)).meta_gradient(tasks()),
        GradientError,
        "loss.bias",
        "does not depend on loss.bias in any task",
    ),
    "a weight below 0": (
        lambda: learner_of().meta_gradient(mb.TaskBatch(half(3), half(3), [1, -2.5, 1])),
        TaskError,
        "weight",
        "a weight of tasks is -2.5; weights are 0 or more and finite",
    ),
    "no weight above 0": (
        lambda: learner_of().meta_gradient([mb.Task(half(), half(), weight=0)]),
        TaskError,
        "weight",
        "all weights of tasks are 0; ",
    ),
    "a weight that is learned": (
        lambda: learner_of().meta_gradient(
            mb.TaskBatch(half(3), half(3), torch.ones(3, requires_grad=True))
        ),
        TaskError,
        "tasks",
        "the weight of a task requires a gradient",
    ),
    "weights of other tasks": (
        lambda: mb.TaskBatch(half(3), half(3), weight=[1, 2]),
        TaskError,
        "weight",
        "TaskBatch weight is a Tensor [2] of torch.float32; it takes one number for each of 3 tasks",
    ),
    "a weight that is no number": (
        lambda: mb.Task(half(), half(), weight="much"),
        TaskError,
        "weight",
        "Task weight is 'much'; it takes a Tensor or a finite number",
    ),
    "a loss that writes parameters": (
        lambda: learner_of(loss=_writing).evaluate(tasks()),
        BlockError,
        "loss",
        "loss _writing writes in place into weight, which is the model's own",
    ),
    "a part that is not used": (
        lambda: meta(model=Unused()),
        GradientError,
        "model.spare.weight",
        "does not depend on model.spare.weight, model.spare.bias",
    ),
    "rates of no step": (
        lambda: meta(steps=0, rule=mb.lslr(0.1)),
        GradientError,
        "rule.rate.weight",
        "does not depend on rule.rate.weight",
    ),
    "a model that branches": (
        lambda: meta(model=Branching(2, 1), executor=mb.Vmap()),
        ExecutorError,
        "executor",
        "Vmap cannot run this model or loss",
    ),
    "more last steps than steps": (
        lambda: learner_of(order=mb.TruncatedOrder(last=3)),
        BlockError,
        "order.last",
        "TruncatedOrder last is 3, but the learner takes 1 inner steps",
    ),
}


@pytest.mark.filterwarnings("ignore::metablocks.CompileWarning")
@pytest.mark.parametrize(
    ("call", "kind", "field", "message"),
    [
        pytest.param(*row, id=f"{table}: {name}")
        for table, rows in {
            "answer": ANSWERS,
            "tasks": TASKS,
            "names and combinations": COMBINATIONS,
        }.items()
        for name, row in rows.items()
    ],
)
def test_a_bad_call_is_refused_by_name(call, kind, field, message):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, MetablocksError)
    assert message in str(caught.value)
    assert caught.value.block
    assert caught.value.field == field


@pytest.mark.parametrize(
    "executor", [mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace"), mb.Vmap()]
)
@pytest.mark.parametrize("act", ["evaluate", "meta_gradient"])
def test_a_rule_that_writes_the_fast_weights_is_refused_before_it_does(executor, act):
    learner = learner_of(rule=Writes(), executor=executor)
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    with pytest.raises(RuleError, match=r"^the rule Writes writes in place into step\.params"):
        getattr(learner, act)(tasks())
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


@pytest.mark.parametrize("learned", [False, True])
def test_a_rule_that_writes_the_fast_weights_of_adapt_is_refused(learned):
    params = {"w": torch.ones(2, requires_grad=learned)}
    with pytest.raises(RuleError, match=r"^the rule Writes writes in place into step\.params"):
        functional(params=params, rule=Writes())


class WritesItsOwn(mb.UpdateRule):
    def setup(self, params, steps):
        self.scale = nn.Parameter(torch.ones(()))
        return self

    def forward(self, updates, state, step):
        self.scale.add_(1)
        return {name: -self.scale * u for name, u in updates.items()}, state


def test_a_rule_that_writes_its_own_parameter_is_not_said_to_write_the_fast_weights():
    with pytest.raises(RuntimeError, match=r"^a leaf Variable that requires grad"):
        functional(rule=WritesItsOwn().setup({}, 1))


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace")])
def test_bytes_are_class_numbers_where_torch_takes_them_for_some(executor):
    torch.manual_seed(0)
    losses = []
    for dtype in (torch.int64, torch.uint8):
        torch.manual_seed(0)
        losses.append(labelled(dtype, executor).loss)
    assert torch.equal(*losses)
    with pytest.raises(ExecutorError, match=r"Vmap cannot run .* Use executor=Loop\(\)"):
        labelled(torch.uint8, mb.Vmap())


def test_batch_norm_in_mixed_precision_under_vmap_names_the_loop():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))
    batch = torch.randn(3, 5, 3, 2), torch.randn(3, 5, 2)
    tasks = mb.TaskBatch(batch, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ExecutorError, match=r"expected scalar type .*Use executor=Loop"):
            learner_of(model, executor=mb.Vmap()).meta_gradient(tasks)
        assert learner_of(model, executor=mb.Loop()).meta_gradient(tasks).loss.isfinite()


@pytest.mark.parametrize(
    ("value", "annotation", "read"),
    [
        (3, Count, 3),
        (np.int32(3), Count, 3),
        (np.float32(0.5), float, 0.5),
        (np.int64(0), float, 0.0),
        (np.True_, bool, True),
        ([0, np.float64(3)], Interval, (0, 3.0)),
        ((1.0, 1.0), Interval, (1.0, 1.0)),
    ],
)
def test_numbers_of_numpy_and_lists_for_tuples_are_taken(value, annotation, read):
    taken = check("Loop", "workers", value, annotation)
    assert taken == read
    assert type(taken) is type(read)


@pytest.mark.parametrize("value", [(1.0, 0.5), (0.0, NAN), (1.0,), 1.0, (True, 2), None, 10**400])
def test_what_is_not_a_pair_in_order_is_not_an_interval(value):
    with pytest.raises(TaskError, match=r"^Sinusoid phase is .*low <= high"):
        mb.tasks.Sinusoid(phase=value)


def test_an_error_carries_its_block_and_field_and_so_does_its_pickle():
    with pytest.raises(BlockError) as caught:
        Conv4(**IMAGES, norm=["batch"])
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.block, error.field) == ("Conv4", "norm")
    assert (BlockError("x").block, BlockError("x").field) == (None, None)


class Halves(mb.UpdateRule):
    def forward(self, updates, state, step):
        return {name: u / 2 for name, u in updates.items()}, state


@pytest.mark.parametrize("rule", [Halves(), mb.Chain(mb.ClipNorm(1.0), Halves())])
def test_a_rule_of_ones_own_that_does_not_say_whether_it_negates_is_let_through(rule):
    assert rule.negates is None
    learner_of(rule=rule).meta_gradient(tasks())
