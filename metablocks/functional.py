"""The stateful functional wrapper: a module as a pure function of its state.

    output, new_state = fmodule(state, *args)

The wrapped module is never mutated, patched or hooked, and no copy of it is kept. What runs is a
*twin*, made for one pass: new module objects with the attributes that the module has at that moment,
and the tensors of the state in the places of its parameters and buffers. So every change of the module
is seen by the next call, what a pass stores in attributes ends with it, and calls nest and run in
threads. Parameters, buffers and tensor attributes that a pass writes in place are found out in a first
pass, which is watched (`ModuleView.watch`: in several), and copied in every pass from then on; others
are not.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from metablocks.checks import check, checked
from metablocks.errors import ModuleError
from metablocks.fingerprint import fingerprint
from metablocks.generators import (
    Calls,
    Watch,
    Written,
    generators_of,
    get_states,
    set_states,
    storage,
)
from metablocks.module_parts import Part, Tree
from metablocks.norm_statistics import NormStatistics, norm_buffers
from metablocks.per_step import Position, collected_buffers
from metablocks.twins import Once, Survey
from metablocks.types import (
    Tensors,
    aliased,
    as_input,
    is_mapping,
    map_tensors,
    tensors_of,
    versions_of,
)


class ModuleState(NamedTuple):
    """Parameters and buffers, in their shapes, by the module's own names; a pytree. Tied ones stand once.

    >>> import torch
    >>> import metablocks as mb
    >>> state = mb.FunctionalModule(torch.nn.BatchNorm1d(2)).state()
    >>> list(state.params), list(state.buffers)
    (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """

    params: Tensors
    buffers: Tensors


@checked(ModuleError)
class FunctionalModule:
    """A module as a pure function `(state, *args) -> (output, new state)`.

    `norm_statistics` says what every batch norm (and tracking instance norm) normalises by, in
    `train()` and `eval()` alike: `"batch"`, its own input, its running buffers being no part of the
    state; `"running"`, its stored statistics, which stay as they are; `"support"`, its own input, whose
    statistics it leaves in its buffers, for `"running"` to predict by; derivatives flow through both.
    With None each norm does as its flags say.

    Modules follow the `train()`/`eval()` flags of the wrapped module at the time of the call. A
    `StepAware` module finds the index of the inner step in `inner_step` while it runs. A parameter
    that the module writes in place is in the new state as written.

    Law: a call changes neither `module` nor any tensor of `state`; the same state and arguments (and
    random state) give the same output. Containers and plain objects that attributes hold are followed
    five deep: what a pass writes further inside stays there.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.BatchNorm1d(3)
    >>> fmodel = mb.FunctionalModule(model)
    >>> state = fmodel.state()
    >>> output, new = fmodel(state, torch.ones(4, 3))
    >>> int(new.buffers["num_batches_tracked"]), int(model.num_batches_tracked)
    (1, 0)

    Raises `ModuleError` for a module that cannot be wrapped (lazy parameters not yet initialised,
    `DistributedDataParallel` and other wrappers that act on `.grad`, compiled and scripted modules),
    for a state with missing or unknown names, and for a pass that cannot be without a trace: one that
    takes a buffer away, sets an attribute of a class, takes the next item of an iterator, or writes a
    tensor of the module past the attributes of self.
    """

    def __init__(self, module: nn.Module, *, norm_statistics: NormStatistics | None = None) -> None:
        self.module = module
        self.norm_statistics = norm_statistics
        self._views: dict[Any, ModuleView] = {}
        self.now()

    def now(self) -> "ModuleView":
        """The module as it is now, to be called several times."""
        key = fingerprint(self.module)
        if key not in self._views:
            views = [*self._views.items()][-3:]  # flags go back and forth; other changes do not
            self._views = {**dict(views), key: ModuleView(self.module, key, self.norm_statistics)}
        return self._views[key]

    def state(self) -> ModuleState:
        """The module's current tensors themselves, not copies: autograd reaches the module's `.grad`."""
        return self.now().state()

    def __call__(self, state: ModuleState, *args: Any, **kwargs: Any) -> tuple[Any, ModuleState]:
        """`module(*args, **kwargs)` under `state`."""
        return self.now().call("forward", state, *map_tensors(as_input, (args, kwargs)))

    def apply(
        self,
        state: ModuleState,
        inputs: Any,
        *,
        step: int | Position = 0,
        training: bool | None = None,
    ) -> tuple[Any, ModuleState]:
        """The module on a batch's inputs, as `ModuleView.apply`."""
        return self.now().apply(state, inputs, step=step, training=training)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": {}}


class ModuleView:
    """A module as it was at one moment, as a pure function. `FunctionalModule.now` makes them."""

    def __init__(
        self, module: nn.Module, key: Any, norm_statistics: NormStatistics | None = None
    ) -> None:
        _check(module)
        survey = Survey(module)
        self.module = module
        self.key = (key, norm_statistics)
        """The module's fingerprint, and what its norms normalise by."""
        self.generators = survey.generators
        """The random generators that modules hold."""
        self.collected = collected_buffers(module)
        """The buffers whose changes a learner collects."""
        self.statistics = norm_buffers(module)
        """The buffers of norms that keep running statistics."""
        named = (*module.named_parameters(), *module.named_buffers())
        names = {id(tensor): name for name, tensor in named}
        self._tensors = survey.tensors  # that attributes hold, by path
        self._parts = [
            Part(own, survey, index, names, norm_statistics)
            for index, own in enumerate(survey.modules)
        ]
        self._parameters = self._places("_parameters", names.values())
        self._buffers = self._places("_buffers", names.values())
        self._once = {id(it): Once(path, it) for path, it in survey.iterators.items()}
        self._special = [part for part in self._parts if part.special]
        self._wrapped = [part for part in self._parts if part.norm or part.recurrent]
        self._tree = Tree(self._parts)
        self._hooking = False  # True once a pass has registered a hook
        self.differentiates = False
        """True once a pass, or the loss after it, has taken a derivative of its own."""
        self._written: dict[tuple[str, bool | None], frozenset[str]] = {}
        self._changing: dict[bool | None, frozenset[str]] = {}
        self._watched: dict[bool | None, int] = {}

    def state(self) -> ModuleState:
        """The module's current tensors themselves, not copies."""
        params, buffers = (
            {name: part.module.__dict__[kind][leaf] for name, (part, leaf) in places.items()}
            for kind, places in (("_parameters", self._parameters), ("_buffers", self._buffers))
        )
        return ModuleState(params, buffers)

    def apply(
        self,
        state: ModuleState,
        inputs: Any,
        *,
        step: int | Position = 0,
        training: bool | None = None,
    ) -> tuple[Any, ModuleState]:
        """The module on a batch's inputs (see `module_arguments`).

        `step` is the inner step that step-aware modules see; `training` overrides the wrapped
        module's flags.
        """
        arguments = _own_arguments(inputs)
        return self.call("forward", state, *arguments, step=step, training=training)

    def entering(
        self, name: str, state: ModuleState, inputs: Any, *, training: bool | None = None
    ) -> Any:
        """The argument that enters the module `name` on a batch's inputs, at inner step 0.

        Raises `ModuleError` for a name that is none, and a module that is not called once.
        """
        entered: list[Any] = []
        arguments = _own_arguments(inputs)
        self.call("forward", state, *arguments, training=training, entered={name: entered})
        if len(entered) != 1:
            raise ModuleError(
                f"{name} of {type(self.module).__name__} is called {len(entered)} times in a pass; what "
                "enters it is asked of a module that is called once, with one argument"
            )
        return entered[0]

    def call(
        self,
        method: str,
        state: ModuleState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        entered: Mapping[str, list[Any]] | None = None,
        step: int | Position = 0,
        training: bool | None = None,
    ) -> tuple[Any, ModuleState]:
        """Any method of the module under `state`; `"forward"` is the call of it, hooks and all."""
        if (
            type(state) is not ModuleState
            or state.params.keys() != self._parameters.keys()
            or state.buffers.keys() != self._buffers.keys()
        ):
            self._refuse(state)
        arguments = args, kwargs or {}
        written = self._written.get((method, training))
        if written is None:
            run = partial(self._run, method, step, training, entered=entered)
            output, buffers, tensors, written = self._first_run(state, arguments, run)
            self._written[method, training] = written
            changed = {n for n, b in buffers.items() if n in written or b is not tensors[n]}
            self._changing[training] = frozenset(changed)
        else:
            tensors = self._given(state)
            for name in written:
                if name != _ARGUMENTS:
                    tensors[name] = tensors[name].clone()
            if _ARGUMENTS in written:
                arguments = map_tensors(torch.clone, arguments)
            versions = versions_of(tensors.values())
            output, buffers = self._run(method, step, training, tensors, arguments, entered=entered)
            if versions_of(tensors.values()) != versions:
                self._check_versions(tensors, versions, written)
        if not written:
            return output, ModuleState(state.params, buffers)
        params = {n: tensors[n] if n in written else t for n, t in state.params.items()}
        return output, ModuleState(params, buffers)

    def written(self, *, method: str = "forward", training: bool | None = None) -> frozenset[str]:
        """The names of the tensors that the method writes in place; none before its first call."""
        return self._written.get((method, training), frozenset())

    def has_run(self, method: str, *, training: bool | None = None) -> bool:
        """True if a call of the method has told what it writes."""
        return (method, training) in self._written

    def watch(
        self, state: ModuleState, inputs: Any, passes: int, *, training: bool | None = None
    ) -> None:
        """Find out what the module writes in so many passes, each with the buffers of the one before.

        A counter among them may ask for a write in a later pass. Without a buffer that changes, one
        pass tells all.
        """
        for _ in range(passes):
            known = self._written.pop(("forward", training), frozenset())
            changing = self._changing.get(training, frozenset())
            _, state = self.apply(state, inputs, training=training)
            self._written["forward", training] |= known
            self._changing[training] |= changing
            state = state._replace(buffers=detach(state.buffers))
            if not self._changing[training]:
                break
        self._watched[training] = passes

    def was_watched(self, passes: int, *, training: bool | None = None) -> bool:
        """True if so many passes have told what the module writes."""
        known = self._watched.get(training, 0)
        return known >= passes or (known > 0 and not self._changing[training])

    def changing_buffers(self, *, training: bool | None = None) -> Set[str]:
        """The names of the buffers that a pass changes; all of them before the first pass."""
        return self._changing.get(training, self._buffers.keys())

    def _first_run(
        self, state: ModuleState, arguments: Any, run: Callable[[Tensors, Any], tuple[Any, Tensors]]
    ) -> tuple[Any, Tensors, Tensors, frozenset[str]]:
        """A run that finds out what the module writes in place; run again, on copies, if anything."""
        states = get_states(generators_of([*state.params.values()], self.generators))
        given = self._given(state)
        own = self.state()
        shared = {kind: dict(vars(kind)) for kind in {part.kind for part in self._parts}}
        guarded = {storage(x): _ARGUMENTS for x in tensors_of(arguments)}
        for tree in (own.params, own.buffers, given):
            guarded |= {storage(tensor): name for name, tensor in tree.items()}
        guarded.pop(0, None)
        tensors = {name: aliased(tensor) for name, tensor in given.items()}
        watch = Watch(guarded)
        try:
            with watch, Calls(watch.exported):
                output, buffers = run(tensors, arguments)
            self._check_classes(shared)
            if all(storage(tensors[name]) == storage(given[name]) for name in given):
                return output, buffers, tensors, _asked(tensors, given)
        except Written:
            pass
        set_states(watch.drawn_from(states))
        tensors = {name: tensor.clone() for name, tensor in given.items()}
        arguments = map_tensors(torch.clone, arguments)
        before = {name: storage(tensor) for name, tensor in tensors.items()}
        noted = {storage(x): _ARGUMENTS for x in tensors_of(arguments)}
        noted |= {address: name for name, address in before.items()}
        noted.pop(0, None)
        watch = Watch(guarded, noted)
        try:
            with watch, Calls(watch.exported):
                output, buffers = run(tensors, arguments)
        except Written as error:
            raise ModuleError(
                f"a pass of {type(self.module).__name__} writes {error} in place, and reaches it by a "
                "global, by an object that a function closes over or from a container deep inside "
                "others: the module's own would be written. Reach it by attributes of self"
            ) from error
        self._check_classes(shared)
        set_anew = {name for name in tensors if storage(tensors[name]) != before[name]}
        written = watch.written | set_anew | _asked(tensors, given)
        return output, buffers, tensors, frozenset(written)

    def _run(
        self,
        method: str,
        step: int | Position,
        training: bool | None,
        tensors: Tensors,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        entered: Mapping[str, list[Any]] | None = None,
    ) -> tuple[Any, Tensors]:
        """The method with these tensors in the places of the module's own, and the buffers after it."""
        first = (method, training) not in self._written
        apart = first or self._hooking or self._tree.is_hooked()
        twins = self._tree.twins(tensors, step, training, hooks=apart)
        if self._special:
            memo: dict[int, Any] = {
                id(part.module): made for part, made in zip(self._parts, twins, strict=True)
            }
            memo |= self._once
            memo |= {id(tensor): tensors[path] for path, tensor in self._tensors.items()}
            for part in self._parts:
                memo |= part.tensors(tensors)
            for functions in (False, True):
                for part in self._special:
                    part.put_twins(twins[part.index], memo, functions)
        for part in self._wrapped:
            part.wrap(twins[part.index])
        for name, values in (entered or {}).items():
            values.clear()
            module = twins[0].get_submodule(name)
            module.__dict__["forward"] = _noting(module.forward, values)
        try:
            if method == "forward":
                output = twins[0](*arguments[0], **arguments[1])
            else:
                output = getattr(twins[0], method)(*arguments[0], **arguments[1])
        except (RuntimeError, AttributeError) as error:
            missing = getattr(error, "name", None)
            if missing and any(missing in vars(p) for p in self.module.parameters()):
                raise ModuleError(
                    f"a pass of {type(self.module).__name__} reads {missing}, an attribute that was set "
                    "on a parameter, and what stands there in an inner loop is another tensor; hold it "
                    "in an attribute of the module"
                ) from error
            for words, what in _UNFIT.items():
                if words in str(error):
                    raise ModuleError(f"a pass of {type(self.module).__name__} {what}") from error
            raise
        finally:
            if first:
                self._hooking |= self._tree.are_hooked(twins)
            elif not apart and self._tree.is_hooked():
                self._hooking = True
                self._tree.unhook()
        if parametrize._cache_enabled:  # which knows modules by their ids: none may come again
            _cached.append(twins)
        elif _cached:
            _cached.clear()
        buffers = {
            name: twins[part.index].__dict__["_buffers"].get(leaf)
            for name, (part, leaf) in self._buffers.items()
        }
        for name, buffer in buffers.items():
            if buffer is None:
                raise ModuleError(
                    f"a pass of {type(self.module).__name__} takes the buffer {name} away; each pass "
                    "hands the buffers to the next. Write another tensor into it, or hold it in a plain "
                    "attribute, which begins each pass as the module has it"
                )
        return output, buffers

    def _given(self, state: ModuleState) -> Tensors:
        """Every tensor of a pass: the state's, by name, and those that attributes hold, by path."""
        tensors = {**state.params, **state.buffers}
        for name, tensor in tensors.items():
            if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):
                tensors[name] = aliased(tensor)
        return tensors | self.beside() if self._special else tensors

    def beside(self) -> Tensors:
        """The tensors that attributes hold beside the state, by path."""
        tensors = dict(self._tensors)
        for part in self._parts:
            if part.hidden:
                tensors |= part.held()
        return tensors

    def _places(self, kind: str, names: Iterable[str]) -> "dict[str, tuple[Part, str]]":
        """The first place of each named tensor."""
        places: dict[str, tuple[Part, str]] = {}
        for part in self._parts:
            for leaf, name in part.slots[kind].items():
                if name is not None and not part.hidden:
                    places.setdefault(name, (part, leaf))
        return {name: places[name] for name in names if name in places}

    def _refuse(self, state: ModuleState) -> None:
        """Raise `ModuleError` for what is no state of this module."""
        if type(state) is not ModuleState:
            check(type(self.module).__name__, "state", state, ModuleState, ModuleError)
        for kind, given, known in (
            ("parameter", state.params, self._parameters),
            ("buffer", state.buffers, self._buffers),
        ):
            if given.keys() == known.keys():
                continue
            missing = [name for name in known if name not in given]
            unknown = [name for name in given if name not in known]
            problem = f"lacks {missing}" if missing else f"has unknown names {unknown}"
            raise ModuleError(
                f"the {kind}s of the state given to {type(self.module).__name__} {problem}; "
                "start from FunctionalModule.state()"
            )

    def _check_classes(self, before: Mapping[type, Mapping[str, Any]]) -> None:
        """Raise `ModuleError` for an attribute of a class that a pass has changed, and put it back."""
        for kind, attributes in before.items():
            for name, value in attributes.items():
                now = vars(kind).get(name)
                if value is not None and now is not value and not name.startswith("__"):
                    setattr(kind, name, value)
                    raise ModuleError(
                        f"a pass of {type(self.module).__name__} sets {name} of the class "
                        f"{kind.__name__}, which outlives the pass and is every module's; set it on self"
                    )

    def _check_versions(
        self, tensors: Tensors, versions: list[int], written: frozenset[str]
    ) -> None:
        for name, before, now in zip(tensors, versions, versions_of(tensors.values()), strict=True):
            if now != before and name not in written:
                raise ModuleError(
                    f"a pass of {type(self.module).__name__} wrote {name} in place, which its first "
                    "pass did not; such writes are found out in the first pass, so that this one has "
                    "reached the tensor itself. Write it in every pass, or write a copy of it"
                )


def module_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch's inputs are for a module.

    A tuple or list is its positional arguments, a mapping its keywords; anything else, a named tuple,
    a packed sequence and a `TensorDict` too, is its one argument.

    >>> module_arguments((1, 2)), module_arguments({"x": 1}), module_arguments(1)
    (((1, 2), {}), ((), {'x': 1}), ((1,), {}))
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if is_mapping(inputs):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def _own_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for a pass, which may ask for derivatives by them: others of the same numbers."""
    args, kwargs = module_arguments(inputs)
    return tuple([map_tensors(as_input, value) for value in args]), map_tensors(as_input, kwargs)


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


def _noting(forward: Callable[..., Any], values: list[Any]) -> Callable[..., Any]:
    """The method, which puts its argument on a list."""

    def run(value: Any) -> Any:
        values.append(value)
        return forward(value)

    return run


_UNFIT = {
    "only change requires_grad flags of leaf": "sets requires_grad of a parameter, which is no leaf "
    "here, but the result of an inner step; set it before the call, or use .detach() in the pass",
    "support the deepcopy protocol": "copies a parameter by copy.deepcopy, which PyTorch does for leaves "
    "alone, and here it is the result of an inner step; clone it, and use torch.func.functional_call",
    "is not an nn.Parameter": "asks for an nn.Parameter, as by get_parameter(), and what stands there in "
    "an inner loop is a tensor; use the attribute",
    "Inference tensors cannot be saved for backward": "uses a tensor made under torch.inference_mode(), "
    "which autograd cannot save; make it under torch.no_grad(), or clone it",
    "functions with out=... arguments": "writes by out= into a tensor through which a derivative may go, "
    "as it may through every buffer that changes under Adjoint; take .copy_(), or estimator=Unrolled()",
    "Can't call numpy() on Tensor that requires grad": "hands a tensor to NumPy through which a "
    "derivative goes; take .detach().numpy()",
}
"""By PyTorch's words: what a pass does that fits no tensor on the way of a derivative, and a remedy."""

_cached: list[list[nn.Module]] = []
"""The twins of passes that ended within `parametrize.cached()`."""

_ARGUMENTS = "@arguments"  # stands for all of them in what a pass writes

_WRAPPERS = {
    "DistributedDataParallel": "whose hooks average what loss.backward() computes, and a "
    "meta-gradient passes them by; give the learner model.module, and average .grad over processes "
    "after backward()",
    "FullyShardedDataParallel": "which gathers parameters while its own forward runs, and fast weights "
    "are not its parameters; give the learner the plain module",
    "FSDPModule": "whose parameters are sharded, and fast weights are not its parameters; give the "
    "learner the plain module",
    "DataParallel": "which copies the module to other devices; give the learner model.module",
    "AbstractGradSampleModule": "whose hooks take gradients by example of what loss.backward() computes, "
    "and a meta-gradient passes them by; give the learner the module inside",
    "OptimizedModule": "made by torch.compile, through which there is no second derivative; give the "
    "learner the plain module, and compile by the executor: Loop(compile=True)",
    "ScriptModule": "whose parameters stand outside of Python; give the learner the plain module",
}


def _check(module: nn.Module) -> None:
    """Raise `ModuleError` for what cannot be wrapped."""
    for name, member in module.named_modules():
        for base in type(member).__mro__:
            if base.__name__ in _WRAPPERS:
                where = f"{name} of {type(module).__name__}" if name else "the module given"
                raise ModuleError(f"{where} is a {base.__name__}, {_WRAPPERS[base.__name__]}")
        if member._backward_hooks and not member._is_full_backward_hook:
            raise ModuleError(
                f"{name or 'the model'} has a hook by register_backward_hook, which asks for the module "
                "after a pass, when the module of the pass is gone; use register_full_backward_hook"
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ModuleError(
                f"parameter {name} of {type(module).__name__} is lazy and has no shape yet; "
                "run the module on one batch before wrapping it"
            )


def _asked(tensors: Tensors, given: Tensors) -> frozenset[str]:
    """The names of tensors that a pass has asked for derivatives: a flag, which it would write."""
    return frozenset(
        n for n, t in tensors.items() if t.requires_grad and not given[n].requires_grad
    )
