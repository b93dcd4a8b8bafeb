"""What `verify` is asked about: a block, its protocol, and the Python that makes it.

Blocks come as values (a class, a factory, an instance) or by name: the short name of a shipped block,
or `my_pkg.my_module:MyRule`.
"""

import copy
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import metablocks
from metablocks.errors import BlockError, MetablocksError, RecipeError, suggest, suggest_then
from metablocks.laws.norms import in_place_of_batch_norms
from metablocks.prove.protocols import (
    PROTOCOLS,
    SLOTS_OF,
    check_protocol,
    is_instance,
    is_norm,
    parameters,
    protocol_of,
)
from metablocks.recipe import schema
from metablocks.recipe.parse import Problem, parse_value
from metablocks.recipe.slots import SLOTS, import_block

EXAMPLES: dict[str, dict[str, Any]] = {
    "learning_rate": {"init": 0.1},
    "meta_sgd": {"init": 0.1},
    "lslr": {"init": 0.1},
    "clip_norm": {"max_norm": 0.5},
    "weight_decay": {"decay": 0.1},
    "proximal": {"strength": 0.5},
    "truncated": {"last": 1},
    "order annealed": {"first_order_epochs": 2},
    "step_loss annealed": {"epochs": 5},
}
"""Values for the required fields of shipped blocks, where none are given."""


@dataclass(frozen=True)
class Subject:
    """A block to be held to the laws of its protocol."""

    protocol: str
    make: Callable[[], Any]
    """A new one."""
    code: str
    """The Python that makes it, `MyRule(rate=0.1)`."""
    imports: str
    """The line that imports what `code` names; empty where nothing does."""
    file: str | None
    """Where it is written."""

    @property
    def argument(self) -> Any:
        """What a law takes: of a rule what makes it, of other blocks the block."""
        return self.make if self.protocol == "rule" else self.make()

    @property
    def argument_code(self) -> str:
        """`argument` in Python."""
        if self.protocol != "rule":
            return self.code
        bare = self.code.removesuffix("()")
        return bare if bare.isidentifier() else f"lambda: {self.code}"


def named(name: str, settings: Sequence[str] = (), protocol: str | None = None) -> Subject:
    """The block that a name means, with fields `field=value`.

    Raises `RecipeError` for a name that leads nowhere, an unknown or missing field, and a block whose
    protocol cannot be told.
    """
    check_protocol(protocol)
    if ":" in name:
        _check_importable(name)
        module, _, attribute = name.partition(":")
        target: Any = import_block(name)
        return subject(target, settings, protocol, source=(module, attribute))
    blocks = {key: dict(slot.blocks) for key, slot in SLOTS_OF.items()}
    norm = "per_step_batch_norm"  # of surgery, what is a norm
    blocks["norm"] = {norm: SLOTS["surgery"].blocks[norm]}
    asked = [key for key in blocks if protocol in (None, key)]
    found = [key for key in asked if name in blocks[key]]
    if not found:
        known = [block for key in asked for block in blocks[key]]
        takes = (
            f"it takes a block of one's own, my_pkg.my_module:MyRule, or one of: {', '.join(known)}"
        )
        raise RecipeError(f'no block is called "{name}"{suggest_then(name, known, takes)}')
    if len(found) > 1:
        kinds = " and ".join(PROTOCOLS[key] for key in found)
        raise RecipeError(f'"{name}" is {kinds}; say which: --as {found[0]}')
    (key,) = found
    given = {setting.partition("=")[0].strip() for setting in settings}
    example = EXAMPLES.get(name, EXAMPLES.get(f"{key} {name}", {}))
    more = [f"{field}={value}" for field, value in example.items() if field not in given]
    return subject(blocks[key][name], [*more, *settings], key)


def subject(
    block: Any,
    settings: Sequence[str] = (),
    protocol: str | None = None,
    *,
    source: tuple[str, str] | None = None,
) -> Subject:
    """A class, factory or instance as a subject; `source` is the module and name it was found under.

    Raises `RecipeError` for fields that do not fit, `BlockError` for what is no block.
    """
    check_protocol(protocol)
    name, imports = _origin(block) if source is None else _found(*source)
    if is_norm(block, protocol):
        return Subject("norm", *_norm(block, name, settings), imports, _file(block))
    if is_instance(block, protocol):
        if settings:
            raise RecipeError(f"{name} is made already; --set {settings[0]} has nothing to set")
        kind = protocol_of(block, name, protocol)
        code = name if source or inspect.isfunction(block) else repr(block).splitlines()[0]
        if source and kind == "rule":  # each learner sets up its own
            code, imports = f"copy.deepcopy({name})", f"import copy\n\n{imports}"
        return Subject(kind, partial(copy.deepcopy, block), code, imports, _file(block))
    if isinstance(block, partial) and not settings:
        kind = protocol_of(_make(block, name, {}), name, protocol)
        told = ", ".join([*map(repr, block.args), _arguments(block.keywords)])
        return Subject(kind, block, f"{name}({told.strip(', ')})", imports, _file(block))
    fields = _fields(block, name, settings)
    kind = protocol_of(_make(block, name, fields), name, protocol)
    code = f"{name}({_arguments(fields)})"
    return Subject(kind, partial(block, **fields), code, imports, _file(block))


def _norm(block: Any, name: str, settings: Sequence[str]) -> tuple[Callable[[], Any], str]:
    """Surgery `(model, steps, …) -> model`, or a module class `(channels, …)`."""
    module = isinstance(block, type)
    takes = "channels" if module else "model, steps"
    context = parameters(block)[:1] if module else ["model", "steps"]
    fields = _fields(block, name, settings, context=context)
    code = f"lambda {takes}: {name}({takes}, {_arguments(fields)})" if fields else name
    bound = partial(block, **fields)
    if not module:
        return (lambda: bound), code

    def make() -> Any:
        norm: Any = in_place_of_batch_norms(bound)
        norm.module = block
        return norm

    return make, f"norms.in_place_of_batch_norms({code})"


def _check_importable(name: str) -> None:
    """Raises `RecipeError`, with what is near, where there is no such module."""
    module = name.partition(":")[0]
    parts = module.split(".")
    if not all(map(str.isidentifier, parts)):  # import_block() says what a path looks like
        return
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        try:
            spec = importlib.util.find_spec(path)
        except Exception:  # importing the packages above it failed; import_block() says how
            return
        if spec is None:
            above = importlib.util.find_spec(".".join(parts[: count - 1])) if count > 1 else None
            places = None if above is None else list(above.submodule_search_locations or [])
            near = suggest(parts[count - 1], [m.name for m in pkgutil.iter_modules(places)])
            raise RecipeError(
                f'there is no module "{path}"{near or ";"} it is looked for in the working directory '
                "and where Python finds packages"
            )


def _fields(
    block: Any, name: str, settings: Sequence[str], *, context: Sequence[str] = ()
) -> dict[str, Any]:
    """The values of `field=value`, checked by the signature."""
    try:
        known = schema.fields(block, context)
    except RecipeError as error:
        raise BlockError(f"{name} is no block: {error}") from None
    fields: dict[str, Any] = {}
    problems: list[Problem] = []
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip()
        if not equals:
            raise RecipeError(f"--set {setting}: no = in it; it takes field=value")
        if field not in known:
            takes = ", ".join(known) or "no field"
            raise RecipeError(
                f"--set {setting}: unknown field{suggest(field, known) or ';'} {name} takes: {takes}"
            )
        node = parse_value(text, f"--set {setting}", problems)
        fields[field] = schema.check(node, known[field].annotation, field, problems)
    if problems:
        raise RecipeError("\n".join(map(str, problems)))
    missing = [f.name for f in known.values() if f.required and f.name not in fields]
    if missing:
        raise RecipeError(f"{name} needs {', '.join(missing)}: --set {missing[0]}=VALUE")
    return fields


def _make(block: Any, name: str, fields: Mapping[str, Any]) -> Any:
    if not callable(block):
        raise BlockError(
            f"{block!r} is a {type(block).__name__}; it takes a class, factory or block"
        )
    try:
        return block(**fields)
    except MetablocksError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise BlockError(f"{name}({_arguments(fields)}) failed: {kind}: {error}") from error


def _arguments(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _found(module: str, attribute: str) -> tuple[str, str]:
    """The name of what was found in a module, and the line that imports it."""
    return attribute, f"from {module} import {attribute.partition('.')[0]}"


def _origin(block: Any) -> tuple[str, str]:
    """The name of a class or function, or of an object's class, and the line that imports it."""
    kind = _kind(block)
    name, module = kind.__qualname__, kind.__module__
    if "<" in name:
        return "make", f"make = ...  # what was handed to verify, from {module}"
    public = module.startswith("metablocks.") and name in metablocks.__all__
    return _found("metablocks" if public else module, name)


def _kind(block: Any) -> Any:
    """What has a name and a file: a class or function itself, that of a partial, an object's class."""
    if isinstance(block, partial):
        return block.func
    return block if hasattr(block, "__qualname__") else type(block)


def _file(block: Any) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(_kind(block)))
    except (TypeError, OSError):  # made in C, or typed at a prompt
        return None
