"""The modules of a tree one by one, and what the twin of each is filled with for a pass."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metablocks.fingerprint import HOOKS, attributes_of, slots_of
from metablocks.kernels import second_derivative_wanted, unfused
from metablocks.norm_statistics import NormStatistics, by_statistics, leaving_statistics, tracks
from metablocks.per_step import Position, StepAware
from metablocks.twins import Survey, referent_of, twin
from metablocks.types import Tensors

_FLAGS: dict[NormStatistics, dict[str, bool]] = {
    "running": {"training": False},
    "support": {"training": True, "track_running_stats": False},
    "batch": {"track_running_stats": False},
}
"""The attributes of a norm that say what it normalises by."""


class Part:
    """One module of a tree: what its twin is filled with."""

    def __init__(
        self,
        module: nn.Module,
        survey: Survey,
        index: int,
        names: Mapping[int, str],
        norm_statistics: NormStatistics | None,
    ) -> None:
        self.module = module
        self.index = index
        self.kind = type(module)
        self.hidden = index >= survey.registered
        """True if it stands in a plain attribute alone: its tensors are not part of the state."""
        self.special = survey.special[index]
        self.members = slots_of(self.kind)
        self.norm = norm_statistics if tracks(module) else None
        self.step_aware = isinstance(module, StepAware)
        self.recurrent = isinstance(module, nn.RNNBase)
        self.hooks = [name for name in HOOKS if not module.__dict__.get(name)]
        """The stores of hooks that hold none; twins are made of the others."""
        self.slots: dict[str, dict[str, str | None]] = {
            kind: {
                leaf: None
                if tensor is None or (kind == "_buffers" and self.norm == "batch")
                else names.get(id(tensor), f"{index}.{leaf}")
                for leaf, tensor in module.__dict__[kind].items()
            }
            for kind in ("_parameters", "_buffers")
        }
        places = {id(own): place for place, own in enumerate(survey.modules)}
        self.children = {
            leaf: None if child is None else places[id(referent_of(child) or child)]
            for leaf, child in module._modules.items()
        }

    def held(self) -> Tensors:
        """The module's own tensors, by name or path."""
        return {
            name: self.module.__dict__[kind][leaf]
            for kind, slots in self.slots.items()
            for leaf, name in slots.items()
            if name is not None
        }

    def tensors(self, tensors: Tensors) -> dict[int, Tensor]:
        """The tensors of this pass, by the id of the module's own in their place."""
        return {
            id(self.module.__dict__[kind][leaf]): tensors[name]
            for kind, slots in self.slots.items()
            for leaf, name in slots.items()
            if name is not None
        }

    def fill(self, made: nn.Module, step: int | Position) -> None:
        """Give the twin what the module's own attributes do not say."""
        if self.step_aware:
            made.__dict__["_step"] = step
        if self.norm is not None:
            made.__dict__.update(_FLAGS[self.norm])
        if self.members:
            for name, value in attributes_of(self.module).items():
                if name in self.members:
                    self.members[name].__set__(made, value)

    def put_twins(self, made: nn.Module, memo: dict[int, Any], functions: bool) -> None:
        """Put twins in the places of attributes; of `functions` last, which may hold other attributes."""
        own = made.__dict__
        for name in self.special:
            if name in self.members:
                value = self.members[name].__get__(made)
            else:
                value = own[name] if name in own else getattr(self.kind, name)
            if functions != ("hooks" in name or isinstance(value, FunctionType)):
                continue
            if name in self.members:
                self.members[name].__set__(made, twin(value, memo))
            else:
                own[name] = twin(value, memo)

    def wrap(self, made: nn.Module) -> None:
        """Put wrappers around the twin's `forward`, where what it does asks for them."""
        own = made.__dict__
        if self.norm == "running":
            own["forward"] = by_statistics(made)  # type: ignore[arg-type]
        elif self.norm == "support":
            own["forward"] = leaving_statistics(made)  # type: ignore[arg-type]
        if self.recurrent and second_derivative_wanted():
            own["forward"] = unfused(made.forward)


class Tree:
    """The modules of a tree, and what all their twins are made of: flat, since every pass makes them."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._modules = [part.module for part in parts]
        self._kinds = [part.kind for part in parts]
        self._tensors = [
            (part.index, kind, leaf, name)
            for part in parts
            for kind, slots in part.slots.items()
            for leaf, name in slots.items()
        ]
        self._children = [
            (part.index, leaf, place) for part in parts for leaf, place in part.children.items()
        ]
        self._hooks = [(part.index, name) for part in parts for name in part.hooks]
        self._filled = [part for part in parts if part.step_aware or part.norm or part.members]
        self._stores = [self._modules[index].__dict__[name] for index, name in self._hooks]
        self._handle = RemovableHandle.next_id

    def twins(
        self, tensors: Tensors, step: int | Position, training: bool | None, *, hooks: bool
    ) -> list[Any]:
        """New modules with the attributes that the own have now, and the tensors of this pass.

        With `hooks` also stores of their own for those that the pass registers.
        """
        made: list[Any] = [*map(object.__new__, self._kinds)]
        attributes = [module.__dict__.copy() for module in self._modules]
        for own in attributes:
            own["_parameters"], own["_buffers"], own["_modules"] = {}, {}, {}
            own["_non_persistent_buffers_set"] = own["_non_persistent_buffers_set"].copy()
            if training is not None:
                own["training"] = training
        for index, kind, leaf, name in self._tensors:
            attributes[index][kind][leaf] = name and tensors[name]
        for index, leaf, place in self._children:
            attributes[index]["_modules"][leaf] = None if place is None else made[place]
        if hooks:
            for index, name in self._hooks:
                attributes[index][name] = OrderedDict()
        for one, own in zip(made, attributes, strict=True):
            object.__setattr__(one, "__dict__", own)
        for part in self._filled:
            part.fill(made[part.index], step)
        return made

    def is_hooked(self) -> bool:
        """True if one of the modules has a hook in a store that was empty."""
        if RemovableHandle.next_id == self._handle:
            return False
        handle = RemovableHandle.next_id
        if any(self._stores):
            return True
        self._handle = handle
        return False

    def unhook(self) -> None:
        """Empty the stores that were empty."""
        for store in self._stores:
            store.clear()

    def are_hooked(self, made: Sequence[nn.Module]) -> bool:
        """True if a pass has registered hooks in the stores of these twins."""
        return any(made[index].__dict__[name] for index, name in self._hooks)
