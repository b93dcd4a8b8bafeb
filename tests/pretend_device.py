"""An accelerator that is none: `pytest --device pretend` finds on any machine what only a GPU would.

A tensor of the device `pretend` holds one of the CPU, which computes. All else is as strict as a GPU
is: an operation on tensors of two devices is an error (but for copies, indices and tensors without
dimensions), so is a generator of another device, there is no `.numpy()`, random numbers come from a
state of the device's own, and tensors beyond its `CAPACITY` are out of memory. It is one of two:

    pretend        as CUDA: float64, a name, counted memory
    pretend-mps    as Apple's mps: none of these

`installed` makes it known to every process that imports torch, as a vendor's package would: so
commands run on it. What it cannot show is what a GPU's kernels and speed are; nor has it autocast or
lazy layers.

It rests on `torch.utils.backend_registration`'s backends in Python, which torch calls experimental.
"""

import os
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

MOVES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
DRAWS = torch.Tag.nondeterministic_seeded


class PretendModule:
    """What `torch.get_device_module("pretend")` is."""

    states: ClassVar = [
        torch.Generator().manual_seed(0).get_state()
    ]  # one device, and where its draws are

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return len(self.states)

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        self.states[0] = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return self.states[0].clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        self.states[0] = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class CountingModule(PretendModule):
    """The same with what `torch.cuda` has besides."""

    def is_initialized(self) -> bool:
        return True

    def get_device_name(self, device: Any = None) -> str:
        return "a pretended GPU"

    def max_memory_allocated(self, device: Any = None) -> int:
        return Memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        Memory.peak = Memory.used


class Waits:
    """How often the host has waited for a number of the device."""

    count = 0


class Memory:
    """The bytes of the device's tensors that are alive."""

    capacity = 2**40
    used = peak = 0
    short = False
    tensors: ClassVar[dict[int, tuple[int, int]]] = {}
    """How many share a storage, and its bytes, by its address."""

    @classmethod
    def take(cls, tensor: "PretendTensor", storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in cls.tensors:
            cls.short = cls.short or cls.used + size > cls.capacity
            in_python = not isinstance(threading.current_thread(), threading._DummyThread)
            if (
                cls.short and in_python
            ):  # what is raised in autograd's own thread aborts the process
                cls.short = False
                error = torch.OutOfMemoryError if _FLOAT64 else RuntimeError
                raise error(f"pretend backend out of memory. Tried to allocate {size} bytes")
            cls.used += size
            cls.peak = max(cls.peak, cls.used)
            cls.tensors[address] = (0, size)
        count, size = cls.tensors[address]
        cls.tensors[address] = (count + 1, size)
        weakref.finalize(tensor, cls.give_back, address).atexit = False

    @classmethod
    def give_back(cls, address: int) -> None:
        count, size = cls.tensors.pop(address)
        if count > 1:
            cls.tensors[address] = (count - 1, size)
        else:
            cls.used -= size


class PretendTensor(torch.Tensor):
    """A tensor of the device, around the tensor of the CPU that has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        if held.dtype in (torch.float64, torch.complex128) and not _FLOAT64:
            raise TypeError(f"Cannot convert a pretend Tensor to {held.dtype}: it has no such type")
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
            "layout": held.layout,
            "device": torch.device("pretend", 0),
        }
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held
        Memory.take(self, held.untyped_storage())

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Pretend({self.held})"

    # What torch writes in C++ for its own devices.

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: "PretendTensor") -> None:
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def tolist(self) -> Any:
        Waits.count += 1
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def new_tensor(self, data: Any, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return made.requires_grad_(requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self.held, self.requires_grad)


def _again(held: torch.Tensor, requires_grad: bool) -> PretendTensor:
    return PretendTensor(held).requires_grad_(requires_grad)


def _compute(operation, args, kwargs):
    """The operation on what the tensors hold; its results are the device's, but where it leaves it."""
    leaves = pytree.tree_leaves((args, kwargs))
    own = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, PretendTensor)}
    name = operation._schema.name
    for leaf in leaves:
        foreign = isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor)
        if foreign and leaf.ndim and name not in MOVES | INDEXING:
            raise RuntimeError(f"{operation}: tensors of two devices, {leaf.device} and pretend:0")
        if isinstance(leaf, torch.Generator):
            raise RuntimeError(f"{operation}: a generator of {leaf.device} for a tensor of pretend")
    to = kwargs.get("device")
    stays = to is None or torch.device(to).type == "pretend"
    stays = stays and not (name == "aten::copy_" and not isinstance(args[0], PretendTensor))
    held_args, held_kwargs = pytree.tree_map(
        lambda leaf: leaf.held if isinstance(leaf, PretendTensor) else leaf, (args, dict(kwargs))
    )
    if to is not None and stays:
        held_kwargs["device"] = torch.device("cpu")
    if DRAWS in operation.tags:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(PretendModule.states[0])
            result = operation(*held_args, **held_kwargs)
            PretendModule.states[0] = torch.get_rng_state()
    else:
        result = operation(*held_args, **held_kwargs)

    if not stays or name in WAITS:
        Waits.count += 1

    def give(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not stays:
            return leaf
        if id(leaf) not in own:
            return PretendTensor(leaf)
        tensor = own[id(leaf)]
        if (tensor.size(), tensor.stride()) != (leaf.size(), leaf.stride()):  # resized in place
            torch.Tensor.data.__set__(tensor, PretendTensor(leaf))
        return tensor

    return pytree.tree_map(give, result)


def _through_the_cpu(make):
    """`torch.tensor` and its like, which cannot write to a device in Python."""

    def made(*args, device=None, requires_grad=False, **options):
        modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]
        default = modes[-1].device if modes else "cpu"
        to = torch.device(default if device is None else device)
        tensor = make(*args, device="cpu" if to.type == "pretend" else device, **options)
        tensor = tensor.to(to) if to.type == "pretend" else tensor
        return tensor.requires_grad_() if requires_grad else tensor

    return made


def register(name: str = "pretend") -> None:
    """Make the device of this name known to torch, as `pretend`: for this process, and once."""
    global _FLOAT64
    _FLOAT64 = name == "pretend"
    module = CountingModule() if _FLOAT64 else PretendModule()
    _setup_privateuseone_for_python_backend("pretend", backend_module=module)
    _LIBRARIES.append(torch.library.Library("_", "IMPL"))
    _LIBRARIES[0].fallback(
        lambda operation, *args, **kwargs: _compute(operation, args, kwargs), "PrivateUse1"
    )
    torch.accelerator.synchronize = lambda device=None: None
    torch.serialization.add_safe_globals([_again])  # in checkpoints
    # A Parameter has no other class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.tensor, torch.as_tensor = map(_through_the_cpu, (torch.tensor, torch.as_tensor))


def installed(name: str, folder: Path) -> dict[str, str]:
    """Environment in which every process has the device: by torch's entry point for backends."""
    package = folder / "pretend-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: pretend\nVersion: 1\n")
    start = f"register_{name.replace('-', '_')}"
    (package / "entry_points.txt").write_text(f"[torch.backends]\nx = pretend_device:{start}\n")
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here, folder)))}


register_pretend = register
register_pretend_mps = partial(register, "pretend-mps")

_FLOAT64 = True
_LIBRARIES: list[torch.library.Library] = []  # kept: what they register goes with them
