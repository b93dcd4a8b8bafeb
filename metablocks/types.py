"""The values that flow between blocks: named tensors, tasks, batches of tasks, progress.

A *batch* is a pair `(inputs, target)`, each any pytree of tensors `[examples, ...]`. A *task* is a
support batch to adapt on and a query batch to judge the adaptation by. A *task batch* stacks tasks
of equal size along a new first dimension: `[tasks, examples, ...]`.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Device, NonNegative, Such, check, checked, shown
from metablocks.devices import in_float64
from metablocks.errors import TaskError

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors: parameters, buffers, gradients, updates, meta-gradients."""

Batch: TypeAlias = Annotated[tuple[Any, Any], Such(lambda _: True, "a pair (inputs, target)")]
"""`(inputs, target)`, each any pytree of tensors `[examples, ...]`."""


@checked()
@dataclass(frozen=True)
class Progress:
    """Progress of training, which policies read.

    `epoch` counts epochs from 0 and may be fractional.

    >>> import metablocks as mb
    >>> mb.Progress(epoch=3)
    Progress(epoch=3)
    """

    epoch: NonNegative = 0.0


class Drawn(NamedTuple):
    """The part of a task that a learner draws; with tasks stacked, each leaf is `[tasks, ...]`."""

    seed: Tensor
    """Of the random numbers that the work on the task draws: an integer, on the CPU."""
    state: Any
    """The state that the learner's `batches` have for it; None if they draw nothing."""


@dataclass(frozen=True)
class Task:
    """One task: a support batch to adapt on, a query batch to judge by, and its weight in a meta-batch.

    Tensors of both are `[examples, ...]`; the weight is a scalar.

    >>> import torch
    >>> import metablocks as mb
    >>> task = mb.Task(support=(torch.zeros(5, 1), torch.zeros(5, 1)),
    ...             query=(torch.zeros(10, 1), torch.zeros(10, 1)))
    >>> task.query[0].shape
    torch.Size([10, 1])
    """

    support: Batch
    query: Batch
    weight: Tensor | float | None = None
    """By which its sums count in the meta-gradient, 0 or more; 1 if None."""
    drawn: Drawn | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _as_dicts(self)
        _weigh(self, like=(self.support, self.query))

    @property
    def seed(self) -> int | None:
        """The seed of the random numbers that work on it draws, if a learner gave it one."""
        return None if self.drawn is None else int(self.drawn.seed)


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of equal size, stacked: every tensor is `[tasks, examples, ...]`.

    `weight` `[tasks]`, 0 or more and not all 0, are the weights by which the tasks count in the
    meta-gradient; without it all count alike. Numbers by task and `evaluate` stay unweighted.

    What is not a tensor (None, a flag, a number) is the same for every task. Mappings of other kinds
    become dicts, here and in `Task`.

    Raises `TaskError` if the tensors disagree on the number of tasks.

    >>> import torch
    >>> import metablocks as mb
    >>> tasks = mb.TaskBatch(support=(torch.zeros(3, 5, 1), torch.zeros(3, 5, 1)),
    ...                   query=(torch.zeros(3, 10, 1), torch.zeros(3, 10, 1)))
    >>> len(tasks), tasks[0].support[0].shape, len(tasks[:2])
    (3, torch.Size([5, 1]), 2)
    """

    support: Batch
    query: Batch
    weight: Tensor | Sequence[float] | None = None
    drawn: Drawn | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _as_dicts(self)
        _weigh(self, like=(self.support, self.query))
        shapes = [leaf.shape for leaf in tensors_of((self.support, self.query))]
        if not shapes:
            words = "and query hold no tensor; they are pairs of tensors"
            raise TaskError.about("TaskBatch", "support", words)
        if len({shape[:1] for shape in shapes}) != 1 or not all(shapes[0][:1] or (0,)):
            given = (
                f"{side}{pytree.keystr(path)} {list(leaf.shape)}"
                for side in ("support", "query")
                for path, leaf in pytree.tree_leaves_with_path(getattr(self, side))
                if isinstance(leaf, Tensor)
            )
            message = (
                "every tensor of a TaskBatch is [tasks, examples, ...] with one number of tasks "
                f"(at least 1); given {', '.join(given)}"
            )
            raise TaskError(message, block="TaskBatch", field="support")
        object.__setattr__(self, "_tasks", shapes[0][0])
        if isinstance(self.weight, Tensor) and self.weight.shape != (len(self),):
            takes = f"it takes one number for each of {len(self)} tasks"
            raise TaskError.about("TaskBatch", "weight", f"is {shown(self.weight)}; {takes}")

    def __len__(self) -> int:
        tasks: int = self.__dict__["_tasks"]
        return tasks

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskBatch": ...
    def __getitem__(self, index: int | slice) -> "Task | TaskBatch":
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if not chosen or chosen.step < 1:
                words = (
                    f"is {index.start}:{index.stop}:{index.step}, of {len(self)} {[*chosen][:3]}"
                )
                takes = "a batch has one task or more, in their order"
                raise TaskError.about("TaskBatch", "index", f"{words}; {takes}")
        else:
            if type(index) is not int:
                check("TaskBatch", "index", index, int | slice, TaskError)
            if not -len(self) <= index < len(self):
                raise IndexError(f"task {index} of a batch of {len(self)}")
        every = (self.support, self.query, self.weight, self.drawn)
        *parts, drawn = map_tensors(lambda leaf: leaf[index], every)
        return (TaskBatch if isinstance(index, slice) else Task)(*parts, drawn=drawn)

    def to(self, target: torch.device | str | torch.dtype) -> "TaskBatch":
        """The same tasks on a device, or with floating-point tensors of a dtype."""
        check("TaskBatch", "target", target, torch.dtype | Device, TaskError)

        def move(leaf: Tensor) -> Tensor:
            keeps = isinstance(target, torch.dtype) and not leaf.is_floating_point()
            return leaf if keeps else leaf.to(target)

        return TaskBatch(*map_tensors(move, (self.support, self.query, self.weight)))

    @staticmethod
    def stack(tasks: Sequence[Task]) -> "TaskBatch":
        """Stack tasks of equal size; raises `TaskError` naming the shapes where they differ."""
        check("TaskBatch", "tasks", tasks, Sequence[Task], TaskError)
        if not tasks:
            words = "is an empty list of tasks; at least one task is needed"
            raise TaskError.about("TaskBatch", "tasks", words)
        trees = [(task.support, task.query, task.drawn) for task in tasks]
        flat = [pytree.tree_flatten(tree) for tree in trees]
        forms = [[_form(leaf) for leaf in leaves] for leaves, _ in flat]
        for index, (_, spec) in enumerate(flat):
            if forms[index] != forms[0] or spec != flat[0][1]:
                raise TaskError(
                    f"{_difference(tasks, index)}; pass them as a list and use executor=Loop()"
                )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        stacked = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        weights: Any = None
        if any(task.weight is not None for task in tasks):
            weights = torch.stack([weight_of(task) for task in tasks])
        support, query, drawn = pytree.tree_unflatten(stacked, flat[0][1])
        return TaskBatch(support, query, weights, drawn=drawn)


def weight_of(task: Task) -> Tensor:
    """The weight of a task, a scalar: 1 if it has none.

    >>> batch = torch.zeros(2, 1), torch.zeros(2, 1)
    >>> weight_of(Task(batch, batch)), weight_of(Task(batch, batch, weight=2.0))
    (tensor(1.), tensor(2.))
    """
    if isinstance(task.weight, Tensor):
        return task.weight
    return Task(task.support, task.query, 1.0).weight  # type: ignore[return-value]


class TaskList(list[Task]):
    """Tasks of any size, as a list that goes to a device or dtype as a `TaskBatch` does.

    >>> short, long = (Task((torch.zeros(n, 1),) * 2, (torch.zeros(n, 1),) * 2) for n in (2, 3))
    >>> [task.query[0].dtype for task in TaskList([short, long]).to(torch.float64)]
    [torch.float64, torch.float64]
    """

    def to(self, target: torch.device | str | torch.dtype) -> "TaskList":
        """The same tasks on a device, or with floating-point tensors of a dtype."""
        alone = (TaskBatch.stack([task]).to(target)[0] for task in self)
        return TaskList(alone)

    @staticmethod
    def gather(tasks: Sequence[Task]) -> "TaskBatch | TaskList":
        """The tasks stacked, if they are of one size, and else as a list.

        >>> task = Task((torch.zeros(2, 1),) * 2, (torch.zeros(2, 1),) * 2)
        >>> type(TaskList.gather([task, task])).__name__
        'TaskBatch'
        """
        shapes = {
            tuple(leaf.shape for leaf in tensors_of((task.support, task.query))) for task in tasks
        }
        return TaskBatch.stack(tasks) if len(shapes) == 1 else TaskList(tasks)


def aliased(tensor: Tensor) -> Tensor:
    """The same tensor as another object; a sparse one, of which there are no views, by a copy.

    >>> tensor = torch.ones(1)
    >>> aliased(tensor).data_ptr() == tensor.data_ptr()
    True
    """
    if tensor.layout is not torch.strided:
        return tensor.clone() if tensor.requires_grad else tensor.detach()
    # A view, whose backward takes sparse gradients as they are.
    return tensor[...]


def as_input(tensor: Tensor) -> Tensor:
    """The tensor as a pass is given it: another object of the same numbers, class and attributes.

    Itself, if it requires a gradient: every outer derivative goes through it.

    >>> tensor = torch.ones(1)
    >>> as_input(tensor).requires_grad_() is tensor, tensor.requires_grad
    (False, False)
    """
    if tensor.requires_grad:
        return tensor
    made = aliased(tensor) if type(tensor) is Tensor else tensor.detach()
    if tensor.__dict__:
        made.__dict__.update(tensor.__dict__ | made.__dict__)
    return made


def versions_of(tensors: Collection[Tensor]) -> list[int]:
    """The number of times that each tensor has been written in place.

    >>> tensor = torch.ones(1)
    >>> versions_of([tensor]) == versions_of([tensor.add_(1)])
    False
    """
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # those of inference mode have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


_version = operator.attrgetter("_version")


def constant(tensor: Tensor) -> Tensor:
    """The tensor itself; if it requires a gradient, cut off from every derivative.

    >>> tensor = torch.ones(1)
    >>> constant(tensor) is tensor, constant(tensor.requires_grad_()).requires_grad
    (True, False)
    """
    return tensor.detach() if tensor.requires_grad else tensor


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in its order.

    >>> tensors_of({"a": torch.ones(1), "b": (None, torch.zeros(1))})
    [tensor([1.]), tensor([0.])]
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, tree)
    return found


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The pytree with `function(tensor)` in the place of every tensor, all else as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)([map_tensors(function, value) for value in tree])
    if tree is None:
        return None
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all tensors together; inf if names differ or for NaN.

    Together, since a bias in front of a batch norm has a gradient of zero and no scale of its own.

    >>> relative_error({"a": torch.tensor([1.0, 1.1])}, {"a": torch.tensor([1.0, 1.0])}) < 0.08
    True
    """
    if set(got) != set(expected):
        return float("inf")
    with torch.no_grad():
        true = {name: in_float64(tensor) for name, tensor in expected.items()}
        difference = sum(float((in_float64(got[k]) - true[k]).square().sum()) for k in expected)
        scale = sum(float(tensor.square().sum()) for tensor in true.values())
    error = (difference / scale) ** 0.5 if scale else difference**0.5
    return error if error == error else float("inf")


def as_pair(batch: Any) -> tuple[Any, Any] | None:
    """Support and query of a batch of tasks as a `DataLoader` makes it, lists for tuples; else None.

    It is a pair `(support, query)` or a mapping with these keys, each a pair `(inputs, target)`.

    >>> x = torch.zeros(3, 5, 1)
    >>> as_pair([[x, x], [x, x]]) is not None, as_pair([x, x])
    (True, None)
    """
    if isinstance(batch, Mapping) and {"support", "query"} <= batch.keys():
        batch = (batch["support"], batch["query"])
    pairs = (batch, *batch) if isinstance(batch, list | tuple) else (batch,)
    if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        support, query = batch
        return support, query
    return None


def as_tasks(tasks: Any) -> Any:
    """A `TaskBatch` of what a `DataLoader` makes of pairs (support, query); all else as it is.

    >>> x = torch.zeros(3, 5, 1)
    >>> len(as_tasks([[x, x], [x, x]]))
    3
    """
    pair = None if isinstance(tasks, TaskBatch) else as_pair(tasks)
    return TaskBatch(*pair) if pair else tasks


Tasks: TypeAlias = TaskBatch | Sequence[Task]
"""Tasks of one size, stacked, or a list of tasks of any size."""


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    plain = leaf is None or isinstance(leaf, bool | int | float | str)
    return leaf if plain else f"a {type(leaf).__name__}, {id(leaf)}"


def _difference(tasks: Sequence[Task], index: int) -> str:
    """The reason for which a task cannot be stacked with the first one."""
    first, other = (
        {
            f"{side}{pytree.keystr(path)}": leaf
            for side in ("support", "query")
            for path, leaf in pytree.tree_leaves_with_path(getattr(tasks[number], side))
        }
        for number in (0, index)
    )
    for place in (*first, *other):
        if place not in first or place not in other:
            alone = 0 if place in first else index
            return f"tasks of unequal form cannot be stacked: task {alone} alone has {place}"
        one, two = first[place], other[place]
        if _form(one) == _form(two):
            continue
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            sizes = f"{[*one.shape]} in task 0 and {[*two.shape]} in task {index}"
            return f"tasks of unequal size cannot be stacked: {place} is {sizes}"
        return (
            f"tasks cannot be stacked: {place} is {shown(one)} in task 0 and another object in task "
            f"{index}, and what is no tensor is one for all tasks of a batch"
        )
    return f"tasks of unequal form cannot be stacked: task 0 and task {index}"


def _weigh(owner: Any, like: Any) -> None:
    """Make a tensor of floats of weights, where the tensors of `like` are."""
    weight = owner.weight
    if weight is None:
        return
    takes = Tensor | float if isinstance(owner, Task) else Tensor | Sequence[float]
    check(type(owner).__name__, "weight", weight, takes, TaskError)
    where = next((x.device for x in pytree.tree_leaves(like) if isinstance(x, Tensor)), None)
    floats = isinstance(weight, Tensor) and weight.is_floating_point()
    dtype = weight.dtype if floats else torch.get_default_dtype()
    made = torch.as_tensor(weight, dtype=dtype, device=where)
    object.__setattr__(owner, "weight", made)


def _as_dicts(owner: Any) -> None:
    """Make dicts of the mappings of other kinds, such as a tokenizer's, in support and query."""
    for side in ("support", "query"):
        batch = getattr(owner, side)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            words = f"is {shown(batch)}; it takes a pair (inputs, target)"
            raise TaskError.about(type(owner).__name__, side, words)
        object.__setattr__(owner, side, tuple(_with_dicts(batch, isinstance(owner, TaskBatch))))
    if owner.drawn is not None and not isinstance(owner.drawn, Drawn):
        words = f"is {shown(owner.drawn)}; it takes none of yours: a learner sets it"
        raise TaskError.about(type(owner).__name__, "drawn", words)


def is_mapping(tree: Any) -> bool:
    """True for a mapping; a `TensorDict`, a kind of pytree by itself, is one value.

    >>> is_mapping({"x": 1}), is_mapping([1])
    (True, False)
    """
    itself = type(tree) in pytree.SUPPORTED_NODES and not isinstance(tree, dict)
    return isinstance(tree, Mapping) and not itself


def _with_dicts(tree: Any, stacked: bool) -> Any:
    if is_mapping(tree):
        return {key: _with_dicts(value, stacked) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)([_with_dicts(value, stacked) for value in tree])
    if stacked and isinstance(tree, Mapping):
        raise TaskError(
            f"a TaskBatch holds a {type(tree).__name__}, which has a batch size of its own; give dicts "
            "of tensors, or a list of Task, with executor=Loop()",
            block="TaskBatch",
            field="support",
        )
    return tree
