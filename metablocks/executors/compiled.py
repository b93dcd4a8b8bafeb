"""The pieces of tasks' work, each traced once for its kind of arguments, and compiled.

What is traced contains its own derivatives: a piece runs once under a tracer that sees through autograd
and `torch.func`. The flat graph of operations that comes out may run as it is, without the many layers
of Python and of transforms above them, or go to PyTorch's compiler. (A double backward *through* a
compiled region is what `torch.compile` does not do.) An inner step is one graph whatever its index, so
that what it takes does not grow with the number of steps.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.devices import has_float64
from metablocks.errors import BlockError, caller_stacklevel
from metablocks.executors.base import TaskWork
from metablocks.executors.graphs import (
    Graph,
    Unfit,
    compiled,
    compiled_apart,
    difference,
    double,
    forgetting_sources,
    trace,
)
from metablocks.executors.leaves import Form, Forms, Leaves, Other, parted
from metablocks.generators import devices_of, kept_draws, set_states
from metablocks.inner_loop import InnerLoop
from metablocks.per_step import Position, told
from metablocks.pieces import PARTS, At, Part, Piece, Pieces
from metablocks.reads import Unbounded
from metablocks.types import Task, Tensors, map_tensors, tensors_of

Compile: TypeAlias = bool | Literal["trace"]

log = logging.getLogger("metablocks")

_MOST = 64  # kinds of work that are kept; the oldest goes
_TRIES = 4  # comparisons of which one has to hold
_ANEW = 16  # calls one after another that all made something


class CompileWarning(UserWarning):
    """Warns that work could not be traced or compiled and runs as it is.

    >>> import warnings
    >>> import metablocks as mb
    >>> with warnings.catch_warnings():                  # once it is known, and accepted
    ...     warnings.simplefilter("ignore", mb.CompileWarning)
    """


class Compiler:
    """Runs tasks' work in pieces, traced or compiled where that gives the same numbers.

    The settings are

    - False: the work as it is;
    - "trace": the operations that each piece came down to, one after another. It takes seconds to make
      and keeps their order;
    - True: those, fused and compiled by PyTorch. It takes ten seconds to a minute to make.

    A piece is made when it is first needed, for tensors of its shapes, dtypes and devices. It serves all
    inner steps, any number of steps and any weights of the step loss; with a rule or a module that reads
    the index of its step, it is made for each index apart. It draws the random numbers of the plain work.

    Each piece is held to what it was made of, at carries and cotangents as they never come, and all of
    them together to the plain work, at two inner steps: to what rounding explains, which is the square
    root of the dtype's precision, or as much as is measured in double precision, in one of a few
    comparisons by other numbers, as a kink of the net may lie between two. Where it differs by more, has
    sizes that depend on the data, draws from a generator of its own, takes numbers out of tensors, reads
    more than can be looked at, or cannot be traced or compiled, a `CompileWarning` says why, and the work
    runs as it is; where every call makes something anew, one says so. Threads may share one.

    What a learner puts into the key of its work are fingerprints of all blocks: `metablocks.fingerprint`
    and `metablocks.reads` say what they see, and what they do not. A change that is seen makes the pieces
    anew, and one that goes back to what was finds what was made.
    """

    def __init__(self, setting: Compile) -> None:
        self.setting = setting
        self._plans: dict[Hashable, _Plan] = {}
        self.forms = Forms()
        self.lock = threading.RLock()
        self._anew = 0

    @property
    def done(self) -> str:
        """The word for what it does."""
        return "compiled" if self.setting is True else "traced"

    @property
    def count(self) -> int:
        """The number of kinds of work that are compiled."""
        return sum(plan.fit for plan in self._plans.values())

    def __call__(
        self,
        plain: Callable[[TaskWork, Any, Tensors, Task], tuple[Any, Any]],
        work: TaskWork,
        buffers: Tensors,
        task: Task,
        width: int | None = None,
    ) -> tuple[tuple[Any, Any], bool]:
        """The result of the work, and True if it was compiled.

        `task` is one task, or `width` of them, stacked. `plain(work, shared, buffers, task)` runs them as
        they are.
        """
        cut = work.pieces
        assert cut is not None
        begin, shared = self.forms.flatten(buffers), self._shared(cut.inner, cut.meta)
        given = _Given(self.forms, Pieces(cut.inner, cut.meta, buffers, task), width)
        parts = (shared, begin, *(given.batch(part, 0) for part in PARTS))
        autocast = _autocast(tensor for part in parts for tensor in part.tensors)
        try:
            kind = (work.key, width, *autocast, *(part.form for part in parts))
            plan = self._plans.get(kind)
        except TypeError as error:
            raise BlockError(
                f"what is to be compiled cannot be told by its key: {error}"
            ) from error
        except Unbounded as error:
            plan = self._plans.setdefault(Unbounded, _Plan(self, width, autocast))
            if plan.fit:
                plan.give_up(Unfit(str(error)))
            return plain(work, cut.shared, buffers, task), False
        if plan is None:
            with self.lock:  # the threads that come meanwhile wait, and find it made
                plan = self._plans.get(kind)
                if plan is None:
                    plan = _Plan(self, width, autocast)
                    run = _Run(cut.inner, cut.meta, begin, task, plan, shared, given)
                    self._prepare(run, plain, work, buffers)
                    if len(self._plans) >= _MOST:
                        del self._plans[next(iter(self._plans))]
                    self._plans[kind] = plan
                    self._count_anew()
        else:
            self._anew = 0
        if plan.fit:
            states = work.draws.states() if work.draws.kinds else []
            run = _Run(cut.inner, cut.meta, begin, task, plan, shared, given)
            try:
                return cut.drive(run), True
            except Unfit as error:
                set_states(states)
                plan.give_up(error)
        return plain(work, cut.shared, buffers, task), False

    def __deepcopy__(self, memo: Any) -> "Compiler":
        return Compiler(self.setting)

    def __reduce__(self) -> Any:
        return Compiler, (self.setting,)

    def _count_anew(self) -> None:
        """Warn, once in a row, if every call makes something anew."""
        self._anew += 1
        if self._anew == _ANEW:
            warnings.warn(
                f"the last {_ANEW} tasks or chunks were each {self.done} anew, which takes far longer "
                "than to run them as they are: their sizes, or what model, rule or loss read, change "
                "from one to the next. Hold a number that changes in a buffer of a module, give tasks of "
                "few sizes, or leave compile off",
                CompileWarning,
                stacklevel=caller_stacklevel(),
            )

    def _shared(self, inner: InnerLoop, meta: Tensors) -> Leaves:
        """The tensors that all tasks and all pieces read."""
        buffers = inner.model_buffers, inner.rule_buffers, inner.loss_buffers
        return self.forms.flatten((meta, inner.constants, *buffers))

    def _prepare(
        self,
        run: "_Run",
        plain: Callable[[TaskWork, Any, Tensors, Task], tuple[Any, Any]],
        work: TaskWork,
        buffers: Tensors,
    ) -> None:
        """Make what the work needs at two inner steps, and hold the whole of it to the work as it is."""
        assert work.pieces is not None
        short: TaskWork = work if work.pieces.short is None else work.pieces.short()
        cut, task = short.pieces, run.task
        assert cut is not None
        with work.draws.put_back():
            expected = tensors_of(plain(short, cut.shared, buffers, task))
        started = time.perf_counter()
        try:
            own = work.draws.kinds - {"torch"}
            if own:
                raise Unfit(
                    f"it draws random numbers ({', '.join(sorted(own))}) that no trace sees"
                )
            if self.setting is True:
                log.info("compiling, once for these shapes; that takes ten seconds to a minute")

            def compare(seed: int) -> str | None:
                nonlocal expected
                meta = {name: _generic(t, seed) if seed else t for name, t in cut.meta.items()}
                given = (meta, cut.inner.tensors), buffers
                if seed:
                    with work.draws.put_back():
                        expected = tensors_of(plain(short, *given, task))
                shared = self._shared(cut.inner, meta)
                own = replace(run, inner=cut.inner, meta=meta, shared=shared)
                with work.draws.put_back():
                    got = tensors_of(cut.drive(own))

                def in_double() -> list[Tensor]:
                    support, query = map_tensors(double, (task.support, task.query))
                    shared, own = map_tensors(double, given)
                    precise = replace(task, support=support, query=query)
                    return tensors_of(plain(short, shared, own, precise))

                return difference(got, expected, in_double)

            _once(compare)
        except Unfit as error:
            run.plan.give_up(error)
        else:
            log.info("%s in %.0f s", self.done, time.perf_counter() - started)


class _Made(NamedTuple):
    """A piece that was made."""

    run: Graph
    forms: list[Form]
    """Of the parts that it returns."""
    totals: list[str]
    """The names of the sums over tasks that it returns behind them."""
    back: Graph | None = None
    """Of what `run` returned behind the first part, and a cotangent."""


@dataclass
class _Plan:
    """The pieces that were made for one kind of work."""

    compiler: Compiler
    width: int | None
    autocast: list[tuple[str, torch.dtype]]
    fit: bool = True
    made: dict[Hashable, _Made] = field(default_factory=dict)
    told: dict[Hashable, set[str]] = field(default_factory=dict)
    """The numbers of its step that a trace was told, which tie it to them."""
    positions: dict[int, Tensor] = field(default_factory=dict)

    def find(self, key: tuple[Any, ...], numbers: dict[str, int]) -> _Made | None:
        """A piece that was made, for these numbers where it is tied to them."""
        return self.made.get(self.full(key, numbers)) if key in self.told else None

    def full(self, key: tuple[Any, ...], numbers: dict[str, int]) -> tuple[Any, ...]:
        return key, *(numbers[what] for what in sorted(self.told[key]))

    def index(self, index: int, shared: Leaves) -> Tensor:
        """The index of a step as a tensor."""
        if index not in self.positions:
            device = devices_of(shared.tensors)[-1]
            dtype = torch.float64 if has_float64(device) else torch.float32
            self.positions[index] = torch.tensor(index, dtype=dtype, device=device)
        return self.positions[index]

    def give_up(self, error: Unfit) -> None:
        """Run the work as it is from now on, and say why."""
        self.fit = False
        message = f"not {self.compiler.done}, but run as it is: {error}"
        warnings.warn(message, CompileWarning, stacklevel=caller_stacklevel())

    @contextmanager
    def running(self) -> Iterator[None]:
        """The mode in which graphs run: their operations have been cast already."""
        with ExitStack() as stack:
            for kind, _ in self.autocast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


@dataclass(frozen=True)
class _Given:
    """The data of a task, or of many, flat: batches are selected outside of what is compiled."""

    forms: Forms
    plain: Pieces
    width: int | None
    whole: dict[str, Leaves] = field(default_factory=dict)
    """Sets that are handed over whole, and what was drawn."""

    @property
    def drawn(self) -> Leaves:
        """The part of the tasks that was drawn."""
        return self._whole("drawn")

    def batch(self, part: Part, index: int) -> Leaves:
        """The batch of an inner step or carry; −1 for the whole set."""
        if index < 0 or part == "weight" or not self.plain.inner.batches.selects(part):
            return self._whole(part)
        batch = self.plain.batch(part, index) if self.width is None else self._rows(part, index)
        # The same strides at every step and for any number of them.
        alike = map_tensors(lambda leaf: leaf if leaf.is_contiguous() else leaf.clone(), batch)
        return self.forms.flatten(alike)

    def _whole(self, part: str) -> Leaves:
        if part not in self.whole:
            self.whole[part] = self.forms.flatten(getattr(self.plain.task, part))
        return self.whole[part]

    def _rows(self, part: Part, index: int) -> Any:
        """The batches of many tasks, stacked; what is not a tensor is the same for every task."""
        task = self.plain.task
        leaves, spec = pytree.tree_flatten((task.support, task.query, task.drawn))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        form: list[Any] = []

        def one(rows: dict[int, Tensor]) -> dict[int, Tensor]:
            own = [rows.get(i, leaf) for i, leaf in enumerate(leaves)]
            support, query, drawn = pytree.tree_unflatten(own, spec)
            alone = replace(self.plain, task=Task(support, query, drawn=drawn))
            made, whole = pytree.tree_flatten(alone.batch(part, index))
            form[:] = made, whole
            return {i: leaf for i, leaf in enumerate(made) if isinstance(leaf, Tensor)}

        rows = torch.func.vmap(one)(tensors)
        made, whole = form
        return pytree.tree_unflatten([rows.get(i, leaf) for i, leaf in enumerate(made)], whole)


@dataclass(frozen=True)
class _Run(Pieces):
    """The pieces of one task's work, or of many tasks' at once, as the plan has them."""

    plan: _Plan
    shared: Leaves
    given: _Given

    def __call__(
        self,
        name: tuple[Any, ...],
        piece: Piece,
        state: Sequence[Leaves] = (),
        *,
        at: At | None = None,
        data: Sequence[Part] = (),
        totals: Tensors | None = None,
    ) -> tuple[Leaves, ...]:
        made, arguments = self._ready(name, piece, state, at or At(), data)
        return self._parts(made.forms, made.totals, self._call(made.run, arguments), totals)

    def recorded(
        self,
        name: tuple[Any, ...],
        piece: Piece,
        state: Sequence[Leaves] = (),
        *,
        cotangent: Callable[[Any], list[Tensor]],
        at: At | None = None,
        data: Sequence[Part] = (),
    ) -> tuple[Leaves, Callable[[Leaves, Tensors], Leaves]]:
        made, arguments = self._ready(name, piece, state, at or At(), data, cotangent=cotangent)
        back = made.back
        assert back is not None
        outputs = self._call(made.run, arguments)
        first, second = made.forms
        saved = outputs[first.count :]

        def pull(adjoint: Leaves, totals: Tensors) -> Leaves:
            gradients = self._call(back, [*saved, *adjoint.tensors])
            (part,) = self._parts([second], made.totals, gradients, totals)
            return part

        return Leaves([*outputs[: first.count]], first), pull

    @property
    def drawn(self) -> Leaves:
        return self.given.drawn

    def batch(self, part: Part, index: int) -> Leaves:
        return self.given.batch(part, index)

    def open(self, part: Leaves) -> Any:
        return part.form.tree(iter(part.tensors))

    def add(self, one: Leaves, other: Leaves) -> Leaves:
        sums = [a + b for a, b in zip(one.tensors, other.tensors, strict=True)]
        return Leaves(sums, one.form)

    def sum(self, tree: Any) -> Any:
        tree = super().sum(tree)
        return tree if self.plan.width is None else map_tensors(lambda leaf: leaf.sum(0), tree)

    def _call(self, graph: Graph, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.plan.autocast:
            return graph(arguments)
        with self.plan.running():
            return graph(arguments)

    def _parts(
        self,
        forms: list[Form],
        names: list[str],
        outputs: Sequence[Tensor],
        totals: Tensors | None,
    ) -> tuple[Leaves, ...]:
        parts, begin = [], 0
        for form in forms:
            parts.append(Leaves([*outputs[begin : begin + form.count]], form))
            begin += form.count
        if totals is not None:
            for name, more in zip(names, outputs[begin:], strict=True):
                totals[name] = totals[name] + more if name in totals else more
        return tuple(parts)

    def _ready(
        self,
        name: tuple[Any, ...],
        piece: Piece,
        state: Sequence[Leaves],
        at: At,
        data: Sequence[Part],
        *,
        cotangent: Callable[[Any], list[Tensor]] | None = None,
    ) -> tuple[_Made, list[Tensor]]:
        """The piece as it was made, now or before, and the arguments of this call."""
        batches = [self.batch(part, at.index) for part in data]
        own = [*state, *batches]
        beside = [] if at.index < 0 else [self.plan.index(at.index, self.shared)]
        beside += (at.weights or {}).values()
        arguments = [*self.shared.tensors, *beside]
        for part in own:
            arguments += part.tensors
        key = (name, *(part.form for part in own))
        numbers = {"index": at.index, "steps": self.inner.steps}
        made = self.plan.find(key, numbers)
        if made is None:
            with self.plan.compiler.lock:
                made = self.plan.find(key, numbers)
                if made is None:
                    flat = _Flat(self, piece, own, at, len(beside), len(batches))
                    made = self._make(flat, arguments, cotangent)
                    self.plan.told[key] = flat.told | self.plan.told.get(key, set())
                    self.plan.made[self.plan.full(key, numbers)] = made
        return made, arguments

    @forgetting_sources()
    def _make(
        self,
        flat: "_Flat",
        arguments: list[Tensor],
        cotangent: Callable[[Any], list[Tensor]] | None,
    ) -> _Made:
        """Trace and compile a piece, and hold it to itself at numbers as they never come."""
        compiler = self.plan.compiler
        fuse = compiler.setting is True
        if cotangent is not None:
            flat.cotangents = cotangent(self.open(flat.own[0]))
        leaves = flat.generic(arguments, 0)
        inputs = len(arguments)
        got: list[Tensor] = []
        try:
            with warnings.catch_warnings(), kept_draws(devices_of(leaves)):
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about PyTorch
                with told() as flat.told:
                    traced = trace(flat, leaves)
                back, first = None, sum(flat.sizes[:1])
                if cotangent is None:
                    run = compiled(traced, leaves, fuse=fuse)
                else:
                    run, back = compiled_apart(traced, leaves, inputs, first, fuse=fuse)

            def compare(seed: int) -> str | None:
                leaves = flat.generic(arguments, seed)
                with kept_draws(devices_of(leaves)):
                    expected = flat(*leaves)
                with self.plan.running(), kept_draws(devices_of(leaves)):
                    got[:] = run(leaves[:inputs])
                    if back is not None:
                        got[first:] = back([*got[first:], *leaves[inputs:]])
                return difference(got, expected, lambda: flat(*map(double, leaves)))

            _once(compare)
        except Unfit:
            raise
        except Exception as error:  # whatever tracer, compiler and C++ compiler raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise Unfit(f"{type(error).__name__}: {' '.join(lines[:3])}") from error
        forms, begin = [], 0
        for size, (others, spec) in zip(flat.sizes, flat.parts, strict=True):
            forms.append(compiler.forms.of(got[begin : begin + size], others, spec))
            begin += size
        return _Made(run, forms, flat.totals, back)


class _Flat:
    """A piece as a function of tensors in a row, to the tensors of its parts and the sums over tasks."""

    def __init__(
        self, run: _Run, piece: Piece, own: Sequence[Leaves], at: At, beside: int, data: int
    ) -> None:
        self.run = run
        self.piece = piece
        self.own = own
        self.at = at
        self.beside = beside
        self.data = data
        """So many of the arguments, the last ones, are data."""
        self.cotangents: list[Tensor] | None = None
        self.told: set[str] = set()
        self.parts: list[tuple[tuple[Other | None, ...], Any]] = []
        self.sizes: list[int] = []
        self.totals: list[str] = []

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        given = iter(leaves)
        run, at = self.run, self.at
        meta, constants, *buffers = run.shared.form.tree(given)
        model_buffers, rule_buffers, loss_buffers = buffers
        beside = [next(given) for _ in range(self.beside)]
        position = Position(at.index, beside.pop(0)) if at.index >= 0 else None
        inner = replace(
            run.inner,
            constants=constants,
            model_buffers=model_buffers,
            rule_buffers=rule_buffers,
            loss_buffers=loss_buffers,
            weights=dict(zip(at.weights or {}, beside, strict=True)),
            position=position,
        )

        def one(rows: list[Tensor]) -> tuple[list[Tensor], Tensors]:
            own = iter(rows)
            trees = [part.form.tree(own) for part in self.own]
            totals: Tensors = {}
            parts = self.piece(inner, meta, totals, at, *trees)
            if self.cotangents is not None:
                result, back = parts
                parts = (result, back([*own], totals))
            return self._flatten(parts), totals

        rows = [*given]
        width = run.plan.width
        if width is None:
            outputs, totals = one(rows)
        else:
            many = torch.func.vmap(lambda rows, _: one(rows), randomness="different")
            outputs, totals = many(
                rows, torch.zeros(width, device="cpu")
            )  # which has rows, whatever else has
            totals = {name: total.sum(0) for name, total in totals.items()}
        self.totals = [*totals]
        # Carries and cotangents of every step have the same strides.
        return [output.contiguous() for output in (*outputs, *totals.values())]

    def generic(self, arguments: list[Tensor], seed: int) -> list[Tensor]:
        """The arguments, their state and cotangents at numbers as they never come."""
        first = len(self.run.shared.tensors) + self.beside
        data = self.own[len(self.own) - self.data :]
        last = len(arguments) - sum(len(part.tensors) for part in data)
        own = [*[_generic(x, seed) for x in arguments[first:last]], *arguments[last:]]
        cotangents = [_generic(x, seed) for x in self.cotangents or ()]
        return [*arguments[:first], *own, *cotangents]

    def _flatten(self, parts: Sequence[Any]) -> list[Tensor]:
        tensors: list[Tensor] = []
        self.parts, self.sizes = [], []
        for part in parts:
            own, others, spec = parted(part)
            alien = Form(spec, others, 0).alien
            if alien:
                raise Unfit(f"it returns {alien}, whose tensors would be taken for constants")
            tensors += own
            self.parts.append((others, spec))
            self.sizes.append(len(own))
        return tensors


def _once(compare: Callable[[int], str | None]) -> None:
    """Compare by other numbers as long as results differ, a few times; then that is `Unfit`.

    Where a kink of the net (ReLU, a maximum) lies within rounding of the one, but not of the other, the
    two differ by more than rounding; by the next numbers it is elsewhere.
    """
    for seed in range(_TRIES):
        reason = compare(seed)
        if reason is None:
            return
    raise Unfit(reason)


def _generic(tensor: Tensor, seed: int) -> Tensor:
    """Other numbers near a tensor's, in its layout: no two alike, none zero, signs as they are."""
    floats = tensor.is_floating_point() or tensor.is_complex()
    if not floats or 0 in tensor.stride():  # as what all tasks begin with
        return tensor
    numbers = torch.Generator().manual_seed(seed)
    drawn = torch.rand(tensor.shape, generator=numbers, device="cpu")
    near = tensor + (0.1 * tensor.abs() + 0.01) * drawn.to(tensor.device, tensor.dtype)
    return torch.empty_like(tensor).copy_(near)


def _autocast(tensors: Iterable[Tensor]) -> list[tuple[str, torch.dtype]]:
    types = sorted({tensor.device.type for tensor in tensors})
    return [(t, torch.get_autocast_dtype(t)) for t in types if torch.is_autocast_enabled(t)]
