"""A recipe made small and smooth, so that its gradient can be measured in a second.

Everything that the gradient goes through stays as the recipe states it: adapt patterns, surgery, every
rule, order, step loss, estimator, executor. The scale does not: few filters and hidden units, few ways,
queries and tasks, small images, at most three inner steps, float64; and modules with kinks, where no
gradient can be measured, become smooth.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.devices import find_device, has_float64
from metablocks.errors import DataError
from metablocks.gradcheck.check import check_learner
from metablocks.gradcheck.report import GradientReport
from metablocks.models.surgery import replace_modules
from metablocks.recipe.assemble import construct
from metablocks.recipe.build import build
from metablocks.recipe.record import Recipe
from metablocks.recipe.slots import SLOTS
from metablocks.tasks.base import Kind, Split, TaskSource
from metablocks.types import Batch, TaskBatch

_STEPS, _TASKS, _WAYS, _UNITS, _FILTERS = 3, 5, 4, 5, 3
_BATCH, _LENGTH = 5, 6  # of Reptile; of texts
_IMAGE, _NARROWER = 28, 16  # of a ResNet
_SMOOTH = {"relu": "Softplus for ReLU", "leaky_relu": "Softplus for LeakyReLU"}


def check_gradients(recipe: Recipe, *, device: str | torch.device | None = None) -> GradientReport:
    """Compare the meta-gradient of a recipe, made small and smooth, with its definition.

    As `check_learner` does, over the recipe's epochs. `device` stands in for the recipe's; in place of
    one without float64 it is the CPU. No data is needed.

    Law: the report is ok for every recipe of right blocks.

    >>> from metablocks.recipe import load
    >>> report = check_gradients(load("maml_sinusoid", ["hardware.device=cpu"]))
    >>> report.ok, [row.group for row in report.rows]
    (True, ['model.body', 'model.head'])

    Raises `RecipeError` if the recipe's blocks do not go together.
    """
    small, changes = shrink(recipe)
    try:
        place = find_device(str(device or recipe.at("hardware.device")))
        if not has_float64(place):
            device, changes = "cpu", (*changes, f"on the CPU, as {place} has no float64")
    except ValueError:
        pass  # `build` refuses it, with its place
    experiment = build(small, device=device)
    tasks = made_up(experiment.source, shots=2, queries=3).sample("train", range(_TASKS))
    try:
        drawn = experiment.source.sample("train", range(_TASKS))
        if isinstance(drawn, TaskBatch):
            tasks = drawn
        else:
            changes = (*changes, "made-up tasks of one size, the recipe's own being unequal")
    except DataError:
        changes = (*changes, "made-up data, the tasks' own not being here")
    report = check_learner(
        experiment.learner,
        tasks.to(experiment.device).to(torch.float64),
        epochs=experiment.epochs,
        name=recipe.name,
    )
    return replace(report, changes=changes)


def shrink(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The small recipe, and its differences, in words.

    >>> from metablocks.recipe import load
    >>> small, changes = shrink(load("maml_omniglot_20w1s"))
    >>> small.at("inner.steps"), small.at("tasks.shape"), small.at("model.filters")
    (3, [1, 16, 16], 3)
    """
    values = copy.deepcopy(recipe.values)
    source = _source(recipe)
    changes = [
        *_shrink_model(values),
        *_shrink_tasks(values, source),
        *shrink_steps(values),
        *_shrink_rest(values, source.outputs),
    ]
    values["hardware"]["precision"] = "float64"
    allow = (*recipe.allow, __name__.rpartition(".")[0])
    return replace(recipe, values=values, allow=allow), tuple(changes)


def smooth(model: nn.Module) -> nn.Module:
    """A copy of `model` without kinks: softplus for ReLU and leaky ReLU, the mean for the maximum.

    >>> smooth(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))[1]
    AvgPool2d(kernel_size=2, stride=2, padding=0)
    """

    def convert(_: str, module: nn.Module) -> nn.Module | None:
        if type(module) in (nn.ReLU, nn.LeakyReLU):
            return nn.Softplus().train(module.training)
        if type(module) is nn.MaxPool2d:
            mean = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            return mean.train(module.training)
        return None

    return replace_modules(copy.deepcopy(model), convert)


def narrow(model: nn.Module, by: int) -> nn.Module:
    """A copy of a ResNet with a `by`-th of the channels and the first block of each stage.

    >>> from metablocks.models import torchvision_classifier
    >>> net = torchvision_classifier(input_shape=(3, 28, 28), outputs=5, name="resnet18")
    >>> narrow(net, 16).fc
    Linear(in_features=32, out_features=5, bias=True)
    """

    def convert(_: str, layer: Any) -> nn.Module | None:
        made: nn.Module
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels if layer.in_channels <= 3 else layer.in_channels // by
            names = ("kernel_size", "stride", "padding", "dilation")
            same: dict[str, Any] = {name: getattr(layer, name) for name in names}
            made = nn.Conv2d(inputs, layer.out_channels // by, **same, bias=False)
        elif isinstance(layer, nn.BatchNorm2d):
            made = nn.BatchNorm2d(layer.num_features // by)
        elif isinstance(layer, nn.Linear):
            made = nn.Linear(layer.in_features // by, layer.out_features)
        else:
            return None
        return made.train(layer.training)

    model = copy.deepcopy(model)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, name, getattr(model, name)[:1])
    return replace_modules(model, convert)


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Tasks of random inputs of any shape, in place of a data set: a class is noise around a mean.

    Targets are class numbers 0 … ways − 1, class-major, or, with the kind `regression`, `ways`
    random numbers an example; with the kind `text` inputs and targets are random tokens below `ways`,
    of `shots` and `queries` examples. Obeys the law of `TaskSource`.

    >>> MadeUp(ways=3, shots=1, queries=2, shape=(1, 8, 8)).sample("train", [0, 1]).query[0].shape
    torch.Size([2, 6, 1, 8, 8])
    """

    ways: int
    shots: int
    queries: int
    shape: tuple[int, ...]
    kind: Kind = "classification"
    seed: int = 0
    device: str | torch.device = "cpu"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input."""
        return tuple(self.shape)

    @property
    def outputs(self) -> int:
        """Width of a model's output."""
        return self.ways

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split, float64 `[len(indices), ways * examples, *shape]`."""
        pairs = [self._task(split, index) for index in indices]
        support, query = (
            (torch.stack([x for x, _ in side]), torch.stack([y for _, y in side]))
            for side in zip(*pairs, strict=True)
        )
        return TaskBatch(support, query).to(self.device)

    def _task(self, split: Split, index: int) -> tuple[Batch, Batch]:
        seed = (self.seed * 1009 + index) * 3 + ("train", "validation", "test").index(split)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        means = draw(self.ways, 1, *self.shape)

        def side(examples: int) -> Batch:
            if self.kind == "text":
                shape = (2, examples, *self.shape)
                tokens = torch.randint(self.ways, shape, generator=generator, device="cpu")
                return tokens[0], tokens[1]
            inputs = (means + draw(self.ways, examples, *self.shape)).flatten(0, 1) / 2
            if self.kind == "regression":
                return inputs, draw(len(inputs), self.ways)
            return inputs, torch.arange(self.ways).repeat_interleave(examples)

        return side(self.shots), side(self.queries)


def _source(recipe: Recipe) -> TaskSource:
    """The recipe's own task source, which reads no data until it is asked for tasks."""
    context = {"seed": recipe.at("seed"), "device": torch.device("cpu"), "data": None}
    source: TaskSource = construct(recipe, "tasks", SLOTS["tasks"], context, [])
    return source


def made_up(source: TaskSource, *, shots: int, queries: int) -> MadeUp:
    """Made-up tasks of a source's shapes, on its device."""
    return MadeUp(
        ways=source.outputs,
        shots=shots,
        queries=queries,
        shape=source.input_shape,
        kind=source.kind,
        device=getattr(source, "device", "cpu"),
    )


def _limit(values: dict[str, Any], **most: int) -> None:
    """Lower the numbers of these names, if they are there and no ranges, to the most that is stated."""
    held = {name: n for name, n in most.items() if isinstance(values.get(name), int | float)}
    values.update({name: min(values[name], n) for name, n in held.items()})


def _shrink_model(values: dict[str, Any]) -> list[str]:
    model, changes = values["model"], []
    if ":" in model["block"]:
        return []
    # The Hessian of the implicit gradient is written out.
    filters = _FILTERS - (values["outer"]["estimator"]["block"] == "implicit")
    if model.get("filters", 0) > filters:
        model["filters"] = filters
        changes.append(f"{filters} filters")
    if (model.get("config") or {}).get("num_hidden_layers", 1) > 1:
        model["config"]["num_hidden_layers"] = 1
        changes.append("one layer")
    if model["block"] in ("transformer", "gru"):
        width = 2 * min(model.get("heads", 1), 2)
        _limit(model, heads=2, layers=2)
        model["width"] = min(model["width"], width)
        changes.append(f"width {model['width']}, at most 2 layers")
    if any(width > _UNITS for width in model.get("hidden", ())):
        model["hidden"] = [min(width, _UNITS) for width in model["hidden"]]
        changes.append(f"hidden layers of {_UNITS}")
    layered = model.get("layers", 0) or model.get("hidden", ())
    if layered and model.get("activation") in _SMOOTH:
        changes.append(_SMOOTH[model["activation"]])
    if model.get("downsample") == "pool":
        changes.append("AvgPool2d for MaxPool2d")
    before: list[dict[str, Any]] = [{"block": f"{__name__}:smooth"}]
    if model["block"] == "torchvision" and "resnet" in model["name"]:
        before.append({"block": f"{__name__}:narrow", "by": _NARROWER})
        changes.append(f"a {_NARROWER}th of the channels, a block a stage")
    values["surgery"] = [*before, *(values.get("surgery") or [])]
    return changes


def _shrink_tasks(values: dict[str, Any], source: TaskSource) -> list[str]:
    tasks = values["tasks"]
    if ":" in tasks["block"]:
        return []
    _limit(tasks, shots=5, queries=5, dim=4, length=_LENGTH, chunks=_STEPS)
    if "ways" not in tasks:
        return []
    for name in ("ways", "shots", "queries"):  # the least of a range
        tasks[name] = tasks[name][0] if isinstance(tasks[name], list) else tasks[name]
    _limit(tasks, ways=_WAYS, shots=2, queries=3)
    shape, model = list(source.input_shape), values["model"]
    if model["block"] == "torchvision":  # its batch norms need more than two numbers
        tasks.update(shots=2, queries=3)
        shape = [shape[0], *(_IMAGE,) * 2] if "resnet" in model["name"] else shape
    elif model["block"] in ("conv4", "mlp") and len(shape) == 3:
        size = min(shape[1], max(8, 2 ** min(model.get("layers", 0), 5)))
        shape = [shape[0], size, size]
    kept = {name: tasks[name] for name in ("ways", "shots", "queries")}
    block = f"{__name__}:MadeUp"
    values["tasks"] = {"block": block, **kept, "shape": shape, "kind": source.kind}
    ways, shots, queries = kept.values()
    size_text = "×".join(map(str, shape))
    return [f"{ways}-way {shots}-shot tasks, {queries} queries, of made-up {size_text} images"]


def shrink_steps(values: dict[str, Any]) -> list[str]:
    """Lower a recipe's inner steps to three in its values; returns the change, in words."""
    inner, order = values["inner"], values["inner"]["order"]
    steps = inner["steps"]
    _limit(inner, steps=_STEPS)
    _limit(values["evaluation"], inner_steps=inner["steps"])
    if order["block"] == "truncated":
        between = 0 < order["last"] < steps  # and stays between
        _limit(order, last=inner["steps"] - between)
    return [f"{_STEPS} inner steps of {steps}"] if steps > _STEPS else []


def _shrink_rest(values: dict[str, Any], outputs: int) -> list[str]:
    changes = []
    ways = values["tasks"].get("ways", outputs)
    for block in values["surgery"]:
        if block["block"] == "append_linear":
            if block.get("features") == outputs:
                block["features"] = ways
            if block.get("width") is not None:
                _limit(block, width=ways + 1)
                changes.append(f"appended layers of width {block['width']}")
    inner, executor = values["inner"], values["hardware"]["executor"]
    for block in [*inner["rule"], *filter(None, [inner["support_loss"]])]:
        kinked = block.get("activation") in _SMOOTH and block.get("hidden", 1)
        if ":" not in block["block"] and kinked:
            block["activation"] = "softplus"
            changes.append(f"softplus in {block['block']}")
    batches = inner["batches"]
    if batches["block"] == "minibatches" and batches["size"] > _BATCH:
        batches["size"] = _BATCH
        changes.append(f"batches of {_BATCH}")
    if executor.get("compile") in (True, "auto"):
        executor["compile"] = "trace"
        changes.append("traced, not compiled")
    if executor.get("chunk"):
        _limit(executor, chunk=2)  # and a rest
    return changes
