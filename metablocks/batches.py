"""Batches: the examples that each inner step sees, and those that a carry is judged by.

    g_k = ∇L(θ_k; select(support, state, k)),    L_q(θ_k) on query(query set, k)

`state` is what a block draws, once a task.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Count, checked, name_of, wrong_answer
from metablocks.errors import TaskError
from metablocks.generators import Draws, combined, generators_of
from metablocks.types import Batch, Drawn, TaskBatch, Tasks, map_tensors, tensors_of

Side: TypeAlias = Literal["support", "query"]


class Batches:
    """The examples of each inner step: by default the whole support set. Subclass it to write a block.

    Laws: functions of their arguments, except for what `draw` draws from torch, Python and NumPy; they
    compose with `torch.func.vmap`, so that no control flow depends on numbers; batches of one support
    set have the same shapes at every step, or are compiled for each of them.

    >>> import torch
    >>> import metablocks as mb
    >>> class Halves(mb.Batches):
    ...     def select(self, support, state, index):
    ...         inputs, target = support
    ...         half = len(inputs) // 2
    ...         rows = slice(half) if index % 2 == 0 else slice(half, None)
    ...         return inputs[rows], target[rows]
    >>> Halves().select((torch.arange(4), torch.arange(4)), None, index=1)
    (tensor([2, 3]), tensor([2, 3]))
    """

    def draw(self, support: Batch, steps: int) -> Any:
        """The state drawn for `steps` steps of a task in training: a pytree of constants, or None.

        It is called before the tasks are spread over the hardware, with generators seeded by the
        number of the task; whatever the executor, a task has the same state.
        """
        return None

    def select(self, support: Batch, state: Any, index: int) -> Batch:
        """The batch of inner step `index`, its tensors `[examples, ...]` as those of `support`.

        `state` is None at evaluation, where nothing is drawn.
        """
        return support

    def query(self, query: Batch, index: int) -> Batch:
        """The batch that judges carry `index`: 0 before adaptation, then after each step."""
        return query

    def check(self, support: Batch, query: Batch | None, steps: int) -> None:
        """Raise `TaskError` for sets of a task that do not do for `steps` steps."""

    @property
    def draws(self) -> bool:
        """True if a task has a state of its own."""
        return type(self).draw is not Batches.draw

    def selects(self, side: Side) -> bool:
        """True if a batch may be other than the whole support or query set."""
        name = "select" if side == "support" else "query"
        return getattr(type(self), name) is not getattr(Batches, name)


@checked()
@dataclass(frozen=True)
class FullBatch(Batches):
    """MAML: every step sees the whole support set, every carry is judged by the whole query set.

    >>> import metablocks as mb
    >>> support = [[0.0], [1.0]], [0, 1]
    >>> mb.FullBatch().select(support, None, index=3) is support
    True
    """


@checked()
@dataclass(frozen=True)
class Minibatches(Batches):
    """Each step sees `size` examples of the support set, drawn without replacement.

    One shuffled pass through the examples after another, batches running on from pass to pass.
    `evaluate` and `adapt` take the full batch.

    - `size`: examples of a step; of all examples or more it is the full batch.

    Law: the same batches on every executor and device.

    Source: Nichol, Achiam, Schulman 2018, and its released code.

    >>> import torch
    >>> import metablocks as mb
    >>> support = torch.arange(6), torch.arange(6)
    >>> block = mb.Minibatches(2)
    >>> state = block.draw(support, steps=3)
    >>> torch.cat([block.select(support, state, k)[0] for k in range(3)]).sort().values
    tensor([0, 1, 2, 3, 4, 5])

    Raises `BlockError` for a `size` below 1.
    """

    size: Count

    def draw(self, support: Batch, steps: int) -> Tensor | None:
        first = tensors_of(support)[0]
        if self.size >= len(first):
            return None
        passes = -(-steps * self.size // len(first))
        order = torch.rand(passes, len(first), device="cpu").argsort(1)
        return order.flatten().to(first.device)

    def select(self, support: Batch, state: Any, index: int) -> Batch:
        if state is None:
            return support
        chosen = state[index * self.size : (index + 1) * self.size]
        batch: Batch = map_tensors(lambda leaf: leaf[chosen], support)
        return batch


@checked()
@dataclass(frozen=True, init=False, repr=False)
class Stream(Batches):
    """Each step sees a batch of its own: row k of support leaves `[steps, examples, ...]`.

    `evaluate(steps=k)` goes through the first k rows.

    - `query`: True, and the loss at carry k is judged by row k of query leaves
      `[steps + 1, examples, ...]`; False, and one query set judges every carry.

    Law: with equal rows it is `FullBatch`.

    Source: Tandon et al. 2025 (test-time training, end to end). There query row k is support row k: each
    chunk is judged by weights that have seen all before it, with `UniformStepLoss(initial=True)`.

    >>> import torch
    >>> import metablocks as mb
    >>> chunks = torch.arange(6.0).reshape(3, 2, 1)
    >>> mb.Stream().select((chunks, chunks), None, index=2)[0]
    tensor([[4.],
            [5.]])

    Raises `TaskError` for fewer rows than steps.
    """

    rows: bool
    """True if the query set has a row for each carry."""

    def __init__(self, *, query: bool = True) -> None:
        object.__setattr__(self, "rows", query)

    def __repr__(self) -> str:
        return f"Stream(query={self.rows})"

    def select(self, support: Batch, state: Any, index: int) -> Batch:
        return _row(support, index)

    def query(self, query: Batch, index: int) -> Batch:
        return _row(query, index) if self.rows else query

    def check(self, support: Batch, query: Batch | None, steps: int) -> None:
        sets = [("support", support, max(steps, 1), "steps")]
        if query is not None and self.rows:
            sets.append(("query", query, steps + 1, "steps + 1"))
        for side, batch, least, words in sets:
            for leaf in tensors_of(batch):
                if leaf.ndim < 2 or len(leaf) < least:
                    raise TaskError(
                        f"{self} goes through the rows of {side} leaves [{words}, examples, ...], of "
                        f"which it needs {least} for {steps} inner steps; given one of shape "
                        f"{list(leaf.shape)}",
                        block="Task",
                        field=side,
                    )


def drawn_for(
    tasks: Tasks, batches: Batches | None, steps: int, number: int, first: int = 0
) -> Tasks:
    """The tasks, each with a seed made of `number` and its place, and with what a block draws for it.

    Places are counted from `first` on.
    """
    states: list[Any] = [None] * len(tasks)
    for index in range(len(tasks)):
        if batches is None:
            break
        support = tasks[index].support
        draws = Draws(generators_of(support))
        with torch.no_grad(), draws.seeded(combined(number, first + index, 1)):
            states[index] = batches.draw(support, steps)
    seeds = torch.tensor(
        [combined(number, first + index) for index in range(len(tasks))], device="cpu"
    )
    if not isinstance(tasks, TaskBatch):
        rows = zip(tasks, seeds, states, strict=True)
        return [replace(task, drawn=Drawn(seed, state)) for task, seed, state in rows]
    return replace(tasks, drawn=Drawn(seeds, _stacked(states, name_of(batches))))


def _stacked(states: list[Any], block: str) -> Any:
    """The states of tasks of one size, each leaf `[tasks, ...]`."""
    if all(state is None for state in states):
        return None
    forms = {
        (pytree.tree_structure(state), *(getattr(leaf, "shape", None) for leaf in leaves))
        for state in states
        for leaves in [pytree.tree_leaves(state)]
    }
    if len(forms) != 1 or None in next(iter(forms))[1:]:
        takes = "None or a pytree of tensors, of the same shapes for tasks of one size"
        raise wrong_answer("batches", block, states[0], takes)
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)


def _row(batch: Batch, index: int) -> Batch:
    row: Batch = map_tensors(lambda leaf: leaf[index], batch)
    return row
