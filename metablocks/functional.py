"""The stateful functional wrapper: a module as a pure function of its state.

    output, new_state = fmodule(state, *args)

The wrapped module is never mutated, patched or hooked. What runs is a *skeleton*: a copy of the
module whose parameters and buffers live on the `meta` device, so that a tensor nobody passed is an
error and not a stale value. Skeletons are borrowed from a pool, one for each call in flight, which
makes a call re-entrant and thread-safe although `torch.func.functional_call` is neither. Buffers
are cloned before the call, so an in-place update reaches the returned state only.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from metablocks.errors import ModuleError
from metablocks.types import Tensors


class ModuleState(NamedTuple):
    """Parameters and buffers by the module's own names; a pytree. A tied tensor stands once."""

    params: Tensors
    buffers: Tensors


class FunctionalModule:
    """A module as a pure function `(state, *args) -> (output, new state)`.

    `batch_statistics=True` makes every batch norm (and tracking instance norm) normalise by the
    statistics of its own input, in `train()` and in `eval()` alike: its running buffers are not part
    of the state, and are neither read nor written.

    Modules follow the `train()`/`eval()` flags of the wrapped module at the time of the call. A
    *step-aware* module, one with an attribute `inner_step`, finds the index of the inner step there
    while it runs.

    Law: a call changes neither `module` nor any tensor of `state`; the same state and arguments (and
    random state) give the same output.

    >>> model = nn.BatchNorm1d(3)
    >>> fmodel = FunctionalModule(model)
    >>> state = fmodel.state()
    >>> output, new = fmodel(state, torch.ones(4, 3))
    >>> int(new.buffers["num_batches_tracked"]), int(model.num_batches_tracked)
    (1, 0)

    Raises `ModuleError` for a module that cannot be copied (lazy parameters not yet initialised,
    tensors computed by hooks) and for a state with missing or unknown names.
    """

    def __init__(self, module: nn.Module, *, batch_statistics: bool = False) -> None:
        self.module = module
        self.batch_statistics = batch_statistics
        self._blueprint = _skeleton(module, batch_statistics)
        self._idle: list[_Skeleton] = []
        self._parameters = tuple(name for name, _ in self._blueprint.module.named_parameters())
        self._buffers = tuple(name for name, _ in self._blueprint.module.named_buffers())
        self._aliases = _aliases(self._blueprint.module)

    def state(self) -> ModuleState:
        """The module's current tensors themselves, not copies: autograd reaches the module's `.grad`."""
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        return ModuleState(
            {name: parameters[name] for name in self._parameters},
            {name: buffers[name] for name in self._buffers},
        )

    def __call__(self, state: ModuleState, *args: Any, **kwargs: Any) -> tuple[Any, ModuleState]:
        """`module(*args, **kwargs)` under `state`."""
        return self.call("forward", state, args, kwargs)

    def apply(
        self, state: ModuleState, inputs: Any, *, step: int = 0, training: bool | None = None
    ) -> tuple[Any, ModuleState]:
        """The module on a batch's inputs: a tuple is its positional arguments, a dict its keywords.

        Anything else is its one argument. `step` is the inner step that step-aware modules see;
        `training` overrides the wrapped module's flags.
        """
        args, kwargs = module_arguments(inputs)
        return self.call("forward", state, args, kwargs, step=step, training=training)

    def call(
        self,
        method: str,
        state: ModuleState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        step: int = 0,
        training: bool | None = None,
    ) -> tuple[Any, ModuleState]:
        """Any method of the module under `state`."""
        self._check(state)
        own = state.params | {name: buffer.clone() for name, buffer in state.buffers.items()}
        tensors = {key: own[name] for key, name in self._aliases.items()}
        with self._borrow(step, training) as skeleton:
            # Every name is given, tied ones too: functional_call need not look for them each time.
            output = functional_call(
                skeleton, tensors, (method, args, kwargs or {}), tie_weights=False
            )
        buffers = {name: tensors[f"module.{name}"] for name in state.buffers}
        return output, ModuleState(state.params, buffers)

    def _check(self, state: ModuleState) -> None:
        for kind, given, known in (
            ("parameter", state.params, self._parameters),
            ("buffer", state.buffers, self._buffers),
        ):
            missing = [name for name in known if name not in given]
            if not missing and len(given) == len(known):
                continue
            unknown = sorted(set(given) - set(known))
            problem = f"lacks {missing}" if missing else f"has unknown names {unknown}"
            raise ModuleError(
                f"the {kind}s of the state given to {type(self.module).__name__} {problem}; "
                "start from FunctionalModule.state()"
            )

    @contextmanager
    def _borrow(self, step: int, training: bool | None) -> "Iterator[_Skeleton]":
        skeleton = self._idle.pop() if self._idle else copy.deepcopy(self._blueprint)
        for own, wrapped in zip(skeleton.members, self.module.modules(), strict=True):
            mode = wrapped.training if training is None else training
            if own.training != mode:  # setting attributes of modules takes its time
                own.training = mode
        for module in skeleton.step_aware:
            module.inner_step = step  # type: ignore[assignment]
        try:
            yield skeleton
        finally:
            self._idle.append(skeleton)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": []}


class _Skeleton(nn.Module):
    """A tensorless copy of a module, with one door to all of its methods."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.members = list(module.modules())
        self.step_aware = step_aware_modules(module)

    def forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "forward":
            return self.module(*args, **kwargs)
        return getattr(self.module, method)(*args, **kwargs)


def module_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch's inputs become the arguments of a module.

    >>> module_arguments((1, 2)), module_arguments({"x": 1}), module_arguments(1)
    (((1, 2), {}), ((), {'x': 1}), ((1,), {}))
    """
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs,), {}


def step_aware_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that behave differently at each inner step: those with an `inner_step`."""
    return [member for member in module.modules() if hasattr(member, "inner_step")]


def tracking_norms(module: nn.Module) -> dict[str, _NormBase]:
    """The batch and instance norms that keep running statistics, by name."""
    return {
        name: member
        for name, member in module.named_modules()
        if isinstance(member, _NormBase) and member.running_mean is not None
    }


def _skeleton(module: nn.Module, batch_statistics: bool) -> _Skeleton:
    kind = type(module).__name__
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ModuleError(
                f"parameter {name} of {kind} is lazy and has no shape yet; "
                "run the module on one batch before wrapping it"
            )
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        skeleton = copy.deepcopy(module, memo)
    except Exception as error:
        raise ModuleError(
            f"{kind} cannot be copied, which a functional wrapper needs: {error}. Tensors that a "
            "hook computes from parameters are the usual cause: use "
            "torch.nn.utils.parametrizations instead of torch.nn.utils.weight_norm, for one"
        ) from error
    if batch_statistics:
        for norm in tracking_norms(skeleton).values():
            norm.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, name, None)
    return _Skeleton(skeleton)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every name of every tensor, as the skeleton sees it, and the name under which the tensor stands."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[f"module.{name}"] = first.setdefault(id(tensor), name)
    return names


def detach(tree: Tensors) -> Tensors:
    """The same named tensors, cut off from every derivative."""
    return {name: tensor.detach() for name, tensor in tree.items()}


def trainable(params: Tensors) -> Tensors:
    """All but the frozen parameters: those that are `nn.Parameter` with `requires_grad=False`.

    >>> frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    >>> list(trainable({"a": torch.ones(1), "b": frozen}))
    ['a']
    """
    return {
        name: tensor
        for name, tensor in params.items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
