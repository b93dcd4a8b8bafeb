"""Check a block: run the laws of its protocol on many small problems, and report.

    report = verify(MyRule)
    print(report)

In your own pytest, `metablocks.laws.parametrize_with_laws` makes a test of every law.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metablocks.errors import BlockError, MissingError, RecipeError, suggest, suggest_then
from metablocks.laws.blocks import PROTOCOLS, Block, as_block, is_instance, is_norm, parameters
from metablocks.laws.check import EXAMPLES, Result, checks
from metablocks.recipe import schema
from metablocks.recipe.parse import Problem, parse_value
from metablocks.recipe.slots import SLOTS, import_block

THOROUGH = 200
FIELDS: dict[str, dict[str, Any]] = {
    "learning_rate": {"init": 0.1},
    "meta_sgd": {"init": 0.1},
    "lslr": {"init": 0.1},
    "clip_norm": {"max_norm": 0.5},
    "weight_decay": {"decay": 0.1},
    "proximal": {"strength": 0.5},
    "truncated": {"last": 1},
    "order annealed": {"first_order_epochs": 2},
    "step_loss annealed": {"epochs": 5},
    "linear": {"shots": 2, "queries": 3},
    "logistic": {"shots": 2, "queries": 3, "dim": 2},
    **{
        name: {"ways": 3, "shots": 1, "queries": 2}
        for name in ("strokes", "omniglot", "mini_imagenet", "tiered_imagenet", "cifar_fs", "cub")
    },
}
"""Values for the required fields of shipped blocks, if none are given."""


@dataclass(frozen=True)
class BlockReport:
    """The result of `verify`: a row for each law of the block's protocol. `str` gives the report."""

    block: str
    """The Python that makes the block."""
    protocol: str
    rows: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """True if no law breaks."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.law) for row in self.rows)
        lines = [f"{self.block}, by the laws of the {self.protocol.replace('_', ' ')} protocol", ""]
        for row in self.rows:
            verdict = row.verdict if row.ok else row.verdict.upper()
            lines.append(f"  {row.law:<{width}}  {verdict:<14}  {_brief(row)}".rstrip())
        broken = [row for row in self.rows if not row.ok]
        run = sum(row.verdict != "does not apply" for row in self.rows)
        verdict = (
            f"{len(broken)} of {run} laws broken" if broken else f"all {run} laws that apply hold"
        )
        lines += ["", verdict]
        alike: dict[str, list[Result]] = {}
        for row in broken:
            key = row.message if row.verdict == "crashes" else row.law
            alike.setdefault(key, []).append(row)
        for number, rows in enumerate(alike.values(), start=1):
            lines += ["", *_details(number, rows)]
        return "\n".join(lines)


def verify(
    block: Any,
    *,
    protocol: str | None = None,
    device: torch.device | str = "cpu",
    examples: int = EXAMPLES,
    progress: Callable[[str], None] | None = None,
) -> BlockReport:
    """Run every law of a block's protocol on `examples` drawn problems each, in float64.

    - `block`: a class without required fields, an instance, a function that makes one, or a `Block`.
    - `protocol`: one of `laws.blocks.PROTOCOLS`, if the block does not
      tell.
    - `progress`: called with the name of each law before it is run.

    The problems are small nets with smooth activations: dense and convolutional, deep and flat, with
    batch norm, tied or frozen parameters, over several tasks and steps, with other blocks of every
    axis. Draws are the same at every call.

    >>> import metablocks as mb
    >>> report = verify(mb.FinalStepLoss(), examples=3)
    >>> report.ok, report.protocol, [row.law for row in report.rows][:2]
    (True, 'step_loss', ['a weighting', 'weighted sum'])

    Raises `BlockError` for a value that is not a block, `DataError` for a task source without its data,
    `MissingError` without hypothesis.
    """
    block = block if isinstance(block, Block) else as_block(block, protocol=protocol)
    rows = []
    try:
        for check in checks([block], examples=examples, device=device):
            if progress is not None:
                progress(check.law.name)
            rows.append(check.result())
    except MissingError as error:
        raise MissingError(f"metablocks verify: {error}") from error.__cause__
    return BlockReport(block.code, block.protocol, tuple(rows))


def named_block(name: str, settings: Sequence[str] = (), protocol: str | None = None) -> Block:
    """The block of a short name, or of a path `my_pkg.my_module:MyRule`, with fields `field=value`.

    Raises `RecipeError` for an unknown name, an unknown or missing field, and `BlockError` for a block
    whose protocol does not show.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _with_fields(import_block(name), attribute, settings, protocol, (module, attribute))
    blocks = {key: dict(SLOTS[key].blocks) for key in PROTOCOLS if key in SLOTS}
    norm = "per_step_batch_norm"  # the one surgery that is a norm
    blocks["norm"] = {norm: SLOTS["surgery"].blocks[norm]}
    if protocol is not None and protocol not in blocks:
        as_block(None, protocol=protocol)  # raises
    searched = [key for key in blocks if protocol in (None, key)]
    matches = [key for key in searched if name in blocks[key]]
    if not matches:
        known = dict.fromkeys(block for key in searched for block in blocks[key])
        takes = f"it takes a path, my_pkg.my_module:MyRule, or one of: {', '.join(known)}"
        raise RecipeError(f'no block is called "{name}"{suggest_then(name, known, takes)}')
    if len(matches) > 1:
        raise RecipeError(f'"{name}" is of {" and ".join(matches)}; say which: --as {matches[0]}')
    (key,) = matches
    stated = {setting.partition("=")[0].strip() for setting in settings}
    defaults = FIELDS.get(name, FIELDS.get(f"{key} {name}", {}))
    more = [f"{field}={value}" for field, value in defaults.items() if field not in stated]
    return _with_fields(blocks[key][name], name, [*more, *settings], key)


def _with_fields(
    value: Any,
    name: str,
    settings: Sequence[str],
    protocol: str | None,
    source: tuple[str, str] | None = None,
) -> Block:
    """A value as a block, with the fields `field=value`, checked by its signature."""
    norm = protocol == "norm" or (protocol is None and is_norm(value))
    stated = {setting.partition("=")[0].strip(): None for setting in settings}
    if not norm and is_instance(value, protocol, stated):
        if settings:
            raise RecipeError(f"{name} is an instance; --set {settings[0]} has no field to set")
        return as_block(value, protocol=protocol, source=source)
    name = getattr(value, "__name__", name)
    context = [] if not norm else parameters(value)[: 1 if isinstance(value, type) else 2]
    try:
        known = schema.fields(value, context)
    except RecipeError as error:
        raise BlockError(f"{name} is not a block: {error}") from None
    fields: dict[str, Any] = {}
    problems: list[Problem] = []
    for setting in settings:
        field, equals, text = (part.strip() for part in setting.partition("="))
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
    return as_block(value, fields, protocol=protocol, source=source)


def _brief(result: Result) -> str:
    if result.verdict == "holds":
        return f"on {result.examples} problem{'' if result.examples == 1 else 's'}"
    if result.verdict == "does not apply":
        return result.message
    return f"on {result.case}" if result.case else ""


def _details(number: int, rows: list[Result]) -> list[str]:
    """Details of a failed law, or of all that crash alike."""

    def wrapped(label: str, text: str) -> list[str]:
        return textwrap.wrap(
            text, 100, initial_indent=f"   {label:<10}", subsequent_indent=" " * 13,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    row, *others = rows
    return [
        f"{number}. {row.law} {row.verdict}",
        *wrapped("the law", row.statement),
        *wrapped("error", row.message),
        *wrapped("also in", ", ".join(other.law for other in others)),
        *wrapped("smallest", row.case),
        "   again, in Python:",
        "",
        textwrap.indent(row.reproduce, " " * 6),
    ]
