"""Random numbers: the generators that work can draw from, and which of them it does draw from.

A generator belongs to the whole process, so its state is put back only if the work at hand has drawn
from it: what another thread draws meanwhile stays drawn.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metablocks.errors import ModuleError

States: TypeAlias = list[tuple["Generator", Any]]


@dataclass(frozen=True, eq=False)
class Generator:
    """A source of random numbers, by its state."""

    kind: str
    """"torch", "python", "numpy": the process's own; "held": an object that a module holds."""
    get: Callable[[], Any]
    put: Callable[[Any], None]
    seed: Callable[[int], object] | None = None
    """Seeds one of the process's own."""
    watched: bool = False
    """True for a generator of PyTorch, whose draws a `Watch` sees; others are told by their states."""

    def is_at(self, state: Any) -> bool:
        """True if it is in that state."""
        return same_state(self.get(), state)


def generators_of(tree: Any, held: Iterable[Any] = ()) -> list[Generator]:
    """The generators that a computation on a tree's tensors can draw from, and those held.

    >>> [generator.kind for generator in generators_of(torch.ones(1))]
    ['torch', 'python', 'numpy']
    """
    of_devices = map(_of_device, devices_of(tree))
    python = Generator("python", random.getstate, random.setstate, random.seed)
    numpy = Generator("numpy", np.random.get_state, np.random.set_state, _seed_numpy)
    return [*of_devices, python, numpy, *(known for known in map(_held, held) if known)]


def is_generator(value: object) -> bool:
    """True for a random generator of PyTorch, Python or NumPy."""
    return isinstance(value, _HELD)


def devices_of(tree: Any) -> list[torch.device]:
    """The devices of a tree's tensors, the CPU's first, which is always there."""
    found = {leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}
    others = sorted((d for d in found if d.type not in ("cpu", "meta")), key=str)
    return [torch.device("cpu"), *others]


def get_states(generators: Iterable[Generator]) -> States:
    """The generators with their states.

    >>> generators = generators_of(torch.ones(1))
    >>> states = get_states(generators)
    >>> first = torch.rand(2), random.random(), np.random.rand()
    >>> set_states(states)
    >>> torch.equal(first[0], torch.rand(2)), first[1:] == (random.random(), np.random.rand())
    (True, True)
    """
    return [(generator, generator.get()) for generator in generators]


def set_states(states: States) -> None:
    """Put generators back into earlier states."""
    for generator, state in states:
        generator.put(state)


@contextmanager
def kept_draws(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """Leave torch's generators of some devices as they are found: by default CPU and accelerator.

    As `torch.random.fork_rng`, which would have to be given the type of the accelerator.

    >>> with kept_draws():
    ...     first = torch.rand(1)
    >>> torch.equal(first, torch.rand(1))
    True
    """
    if devices is None:
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        devices = [torch.device("cpu"), *([here] if here else [])]
    states = get_states(map(_of_device, devices))
    try:
        yield
    finally:
        set_states(states)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators of the CPU by `key`, and put their states back at the end.

    They belong to the process: threads that come here at once take turns.

    >>> with seeded(3, 1):
    ...     first = torch.rand(1), random.random(), np.random.rand()
    >>> with seeded(3, 1):
    ...     first == (torch.rand(1), random.random(), np.random.rand())
    True
    """
    with _seeding, Draws(generators_of(())).seeded(combined(*key)):
        yield


def drawn_seed() -> int:
    """A seed by one draw of torch's generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def combined(*key: int) -> int:
    """One seed of several numbers.

    >>> combined(3, 1) == combined(3, 1), combined(3, 1) == combined(1, 3)
    (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class Draws:
    """The generators that one kind of work draws from, learned from its first run.

    >>> draws = Draws(generators_of(torch.ones(1)))
    >>> with draws.put_back(), draws.observed():
    ...     first = torch.rand(1)
    >>> draws.kinds, torch.equal(first, torch.rand(1))
    ({'torch'}, True)
    """

    def __init__(self, generators: list[Generator]) -> None:
        self.generators = generators
        self.known = False
        """True once the work was observed to its end."""
        self.kinds: set[str] = set()
        """The kinds of generators that it has drawn from so far."""
        self.alone = False
        """True if it uses what PyTorch has once for all threads (see `_look`)."""

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Run the work; unless `known`, see what this thread draws."""
        if self.known:
            yield
            return
        begin = [(g, g.get()) for g in self.generators if not g.watched]
        watch = Watch()
        before, _local.watch = _local.watch, (watch, begin)
        try:
            with watch, Calls(self._look):
                yield
        finally:
            self.kinds |= self._so_far()
            _local.watch = before
        self.known = True

    def states(self) -> States:
        """The states of the generators that the work may draw from."""
        cheap = ("torch", "held")
        return get_states(
            g for g in self.generators if not self.known or g.kind in cheap or g.kind in self.kinds
        )

    def restore(self, states: States) -> None:
        """Put back what the work has drawn from."""
        if not self.known:
            self.kinds |= self._so_far()
        set_states([(g, state) for g, state in states if g.kind in self.kinds])

    @contextmanager
    def seeded(self, seed: int | None) -> Iterator[None]:
        """Seed what the work may draw from, except for generators held, and leave it as found.

        With None the work goes on from where they are.
        """
        if seed is None or (self.known and not self.kinds):
            yield
            return
        states = [
            (g, g.get())
            for g in self.generators
            if g.seed is not None and (not self.known or g.kind in self.kinds)
        ]
        try:
            for generator, _ in states:
                assert generator.seed is not None
                generator.seed(seed)
            yield
        finally:
            set_states(states)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Leave the generators as they were found."""
        states, known = self.states(), self.known
        try:
            yield
        except BaseException:
            self.kinds |= {g.kind for g, state in states if not g.is_at(state)}
            raise
        finally:
            moved = [(g, s) for g, s in states if g.kind not in self.kinds and not g.is_at(s)]
            if known and moved:  # whoever it was, the work is observed again
                self.known = False
                if threading.active_count() == 1:  # no other thread: it was the work
                    set_states(moved)
            self.restore(states)

    def _look(self, function: Any, args: tuple[Any, ...]) -> None:
        """The levels of forward-mode derivatives and the cache of parametrizations are every thread's."""
        if parametrize._cache_enabled or getattr(function, "__name__", "") == "_make_dual":
            self.alone = True

    def _so_far(self) -> set[str]:
        if _local.watch is None:
            return set()
        watch, begin = _local.watch
        return watch.draws | {generator.kind for generator, _ in watch.drawn_from(begin)}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations of this thread: what they draw from, and which guarded storages they write.

    `guarded` and `noted` name storages by their address. What would write a guarded one raises `Written`
    instead; of the noted ones those that are written come into `written`.
    """

    supports_higher_order_operators = True

    def __init__(
        self, guarded: Mapping[int, str] | None = None, noted: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guarded = guarded or {}
        self.noted = noted or {}
        self.written: set[str] = set()
        self.draws: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, so that the compiler need not be imported (80 MiB, a second)."""
        return False

    def drawn_from(self, states: "States") -> "States":
        """Of the generators with earlier states, those that have been drawn from.

        Python's and NumPy's are told by their states: of the process's own it may have been another
        thread.
        """
        return [
            (generator, state)
            for generator, state in states
            if generator.kind in self.draws or not (generator.watched or generator.is_at(state))
        ]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):
            raise ModuleError(
                f"a pass uses {function}, an operator of the compiler, in which draws and writes are not "
                "seen; take Python's own if and while, or torch.where"
            )
        if is_random(function, args, kwargs):
            generator = kwargs.get("generator")
            if generator is not None:
                self.draws.add("held")
            if generator is None or generator is torch.default_generator:
                self.draws.add("torch")
        if (self.guarded or self.noted) and (
            function._schema.is_mutable or "batch_norm" in function._schema.name
        ):
            self._check(function._schema.arguments, args, kwargs)
        return function(*map(_made_solid, args), **kwargs)

    def _check(self, arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        for argument in arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            # Which kernels of batch norm write in training, whatever their schema says.
            writes |= argument.name in _STATISTICS and bool(given.get("training"))
            if not writes:
                continue
            value = given.get(argument.name)
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor):
                    self.touch(leaf)

    def exported(self, function: Any, args: tuple[Any, ...]) -> None:
        """A function is about to be called: what hands memory to NumPy may write it, unseen."""
        if function in EXPORTING:
            self.touch(args[0])

    def touch(self, tensor: Tensor) -> None:
        """A tensor is about to be written."""
        address = storage(tensor)
        if address in self.guarded:
            raise Written(self.guarded[address])
        if address in self.noted:
            self.written.add(self.noted[address])


EXPORTING: tuple[Any, ...] = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
"""The functions that hand the memory of a tensor to NumPy and others, which may write it, unseen."""


class Calls(TorchFunctionMode):
    """Calls `note(function, arguments)` before every function of PyTorch that this thread calls."""

    def __init__(self, note: Callable[[Any, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.note(function, args)
        return function(*args, **(kwargs or {}))


class Written(BaseException):
    """A guarded tensor is about to be written. No `Exception`: the code at work must not catch it."""


def storage(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has none of its own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return int(tensor.untyped_storage()._cdata) if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # a sparse tensor, for one
        return 0


class _Local(threading.local):
    watch: "tuple[Watch, States] | None" = None


_local = _Local()
_seeding = threading.RLock()
_STATISTICS = ("running_mean", "running_var")
_HELD = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def _made_solid(argument: Any) -> Any:
    """The argument; a zero that PyTorch has not made yet is made, of which `mul` crashes in a mode."""
    if isinstance(argument, Tensor) and argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return argument


def _held(value: Any) -> Generator | None:
    if isinstance(value, torch.Generator):
        return Generator("held", value.get_state, partial(_set_torch, value), watched=True)
    if isinstance(value, random.Random):
        return Generator("held", value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return Generator("held", value.get_state, value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Generator("held", lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _set_torch(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _of_device(device: torch.device) -> Generator:
    if device.type == "cpu":
        seed = torch.default_generator.manual_seed
        return Generator("torch", torch.get_rng_state, torch.set_rng_state, seed, watched=True)
    module = torch.get_device_module(device.type)
    put = partial(_set_accelerator, module, device)

    def seed_accelerator(number: int) -> None:
        if own := getattr(module, "default_generators", ()):
            own[device.index or 0].manual_seed(number)
        else:  # of a backend with one device
            (getattr(module, "manual_seed_all", None) or module.manual_seed)(number)

    get = partial(module.get_rng_state, device)
    return Generator("torch", get, put, seed_accelerator, watched=True)


def _seed_numpy(number: int) -> None:
    np.random.seed(number % 2**32)


def _set_accelerator(module: Any, device: torch.device, state: Tensor) -> None:
    module.set_rng_state(state, device)


def same_state(one: Any, other: Any) -> bool:
    """True if two states of one generator are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return repr(one) == repr(other)
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(one, other, strict=True)
    )


def is_random(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if an operation draws random numbers; fused attention with the dropout rate 0 does not.

    >>> attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    >>> is_random(attention, (), {}), is_random(attention, (None, None, None, 0.1), {})
    (False, True)
    """
    if torch.Tag.nondeterministic_seeded not in getattr(function, "tags", ()):
        return False
    for index, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            given = args[index] if index < len(args) else kwargs.get("dropout_p", 0.0)
            return bool(given != 0)
    return True
