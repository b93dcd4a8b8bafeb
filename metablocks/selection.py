"""Selection of parameters by shell-style patterns over their names.

`"*"` is every parameter, `"head.*"` the head (ANIL), `"!head.*"` everything but the head (BOIL). A
list is read from left to right, each pattern adding names or, with `!`, removing them; a list that
opens with `!` starts from every name. `*` also crosses dots.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from metablocks.errors import SelectionError, suggest_then


def select(patterns: str | Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that the patterns select, in the order of `names`.

    >>> select("head.*", ["body.weight", "head.weight", "head.bias"])
    ('head.weight', 'head.bias')
    >>> select(["*", "!*.bias"], ["body.weight", "head.weight", "head.bias"])
    ('body.weight', 'head.weight')

    Raises `SelectionError` where a pattern matches nothing or where nothing is left.
    """
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise SelectionError('no pattern given; "*" selects every parameter')
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            below = (
                [f"{pattern}.*"] if any(name.startswith(f"{pattern}.") for name in names) else []
            )
            known = suggest_then(pattern, [*below, *names], f"the names are: {_shorten(names)}")
            raise SelectionError(f'pattern "{pattern}" matches no parameter{known}')
    selected = tuple(name for name in names if fits(patterns, name))
    if not selected:
        raise SelectionError(f"patterns {patterns} leave no parameter selected")
    return selected


def fits(patterns: str | Sequence[str], name: str) -> bool:
    """True if the patterns select a name.

    >>> fits(["*", "!*.bias"], "body.weight"), fits("!head.*", "head.bias")
    (True, False)
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    selected = patterns[0].startswith("!")
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            selected = not pattern.startswith("!")
    return selected


def select_parameters(patterns: str | Sequence[str], module: nn.Module) -> tuple[str, ...]:
    """The trainable parameters of `module` that the patterns select, each under its first name.

    Frozen parameters (`requires_grad=False`) are never selected. A tied parameter has several
    names, and the patterns must agree on all of them.

    >>> select_parameters("*.bias", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    ('0.bias', '1.bias')

    Raises `SelectionError` as `select` does, for a tied parameter that is half selected, and if what
    is selected is frozen.
    """
    aliases: dict[int, list[str]] = {}
    frozen: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        if not parameter.requires_grad:
            frozen.add(id(parameter))
    if len(frozen) == len(aliases):
        raise SelectionError(
            f"{type(module).__name__} has no trainable parameter (requires_grad=True) to adapt"
        )
    chosen = set(select(patterns, [name for names in aliases.values() for name in names]))
    for names in aliases.values():
        if chosen & set(names) and not chosen >= set(names):
            raise SelectionError(
                f"{' and '.join(names)} are one tied parameter, of which {patterns!r} selects only "
                f"{' and '.join(sorted(chosen & set(names)))}; select all of its names or none"
            )
    found = tuple(n[0] for key, n in aliases.items() if n[0] in chosen and key not in frozen)
    if not found:
        raise SelectionError(
            f"{patterns!r} selects {_shorten(sorted(chosen))}, all frozen; what is to adapt needs "
            "requires_grad_(True)"
        )
    return found


def _shorten(names: Sequence[str], most: int = 12) -> str:
    rest = f", … ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
