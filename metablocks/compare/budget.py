"""One budget for all entries, as overrides of their recipes; and the seeds to train with.

A budget changes `outer.steps_per_epoch` alone. The number of epochs stays, so that schedules and
annealings, which are counted in epochs, keep their shape over the training.

- steps: every recipe takes the same number of meta-steps.
- minutes: meta-steps and validations of a run take that long, as measured beforehand (`timing`).
- neither: as the recipes state, if they state the same.
"""

import math
from collections.abc import Sequence

from metablocks.compare.entries import Entry
from metablocks.compare.request import Request
from metablocks.compare.table import seconds_text
from metablocks.compare.timing import Pace, measure_paces
from metablocks.errors import RecipeError


def check_arguments(entries: Sequence[Entry], request: Request) -> None:
    """Raise `RecipeError` for arguments that make no sense together."""
    trained = any(entry.recipe for entry in entries)
    several = not isinstance(request.seeds, int) or request.seeds > 1
    if sum(len(entry.finished) or 1 for entry in entries) < 2 and not several:
        raise RecipeError(
            f"only {entries[0].label} is given; compare takes two or more recipes or runs, or "
            "one recipe with several --seeds"
        )
    options = {
        "--steps": request.steps is not None,
        "--minutes": request.minutes is not None,
        "--tasks": request.tasks is not None,
        "--seeds": several,
        "--set": bool(request.overrides),
    }
    for option, is_set in options.items():
        if is_set and not trained:
            raise RecipeError(
                f"{option}: all that is given is trained already; there is nothing to set"
            )


def with_budget(entries: Sequence[Entry], request: Request) -> tuple[list[Entry], list[str]]:
    """The entries with one budget for all that are trained, and notes on it.

    Measures the pace of recipes if they are trained for minutes. Raises `RecipeError`, and what
    `measure_paces` raises.
    """
    trained = [entry for entry in entries if entry.recipe]
    if not trained or (request.steps is None and request.minutes is None):
        check_same_budget(trained)
        return list(entries), []
    if request.minutes is not None:
        paces = measure_paces(trained, request)
        pairs = list(zip(trained, paces, strict=True))
        steps = [by_minutes(request.minutes, entry, pace) for entry, pace in pairs]
        remarks = [
            f", about {request.minutes:g} min: {seconds_text(pace.step)} a meta-step and "
            f"{seconds_text(pace.validation)} a validation measured"
            for pace in paces
        ]
    else:
        steps = by_steps(request.steps or 0, trained)
        exact = all(e.epochs * n == request.steps for e, n in zip(trained, steps, strict=True))
        remarks = ["" if exact else f", nearest to {request.steps:,}"] * len(trained)
    chosen, notes = {}, []
    for entry, count, remark in zip(trained, steps, remarks, strict=True):
        changed = entry.with_override(f"outer.steps_per_epoch={count}")
        length = f"{entry.epochs} epochs × {count:,} = {changed.steps:,} meta-steps"
        notes.append(f"{entry.label}: {length}{remark}")
        chosen[entry.label] = changed
    _check_different(list(chosen.values()))
    return [chosen.get(entry.label, entry) for entry in entries], notes


def check_same_budget(trained: Sequence[Entry]) -> None:
    """Raise `RecipeError` if recipes that are trained as they are state different budgets."""
    labels: dict[str, str] = {}
    for entry in trained:
        tasks = entry.values["outer"]["tasks_per_step"]
        labels.setdefault(f"{entry.steps:,} meta-steps of {tasks} tasks", entry.label)
    if len(labels) > 1:
        budgets = "; ".join(f"{label} trains {budget}" for budget, label in labels.items())
        raise RecipeError(
            f"the recipes state different budgets: {budgets}. Give one to all: --steps N "
            "(meta-steps) or --minutes M (training time of a run)"
        )


def by_steps(wanted: int, trained: Sequence[Entry]) -> list[int]:
    """Steps per epoch nearest to `wanted` meta-steps, one total for all if one is within 25 %.

    Raises `RecipeError` for fewer meta-steps than a recipe has epochs.
    """
    epochs = [entry.epochs for entry in trained]
    for entry in trained:
        if wanted < entry.epochs:
            raise RecipeError(
                f"--steps {wanted}: {entry.label} has {entry.epochs} epochs of at least one "
                f"meta-step; take --steps {max(epochs)} or more, or fewer epochs: "
                "--set outer.epochs=10 (what a recipe anneals is counted in epochs)"
            )
    common = nearest_multiple(math.lcm(*epochs), wanted)
    if abs(common - wanted) <= wanted / 4:
        return [common // count for count in epochs]
    return [nearest_multiple(count, wanted) // count for count in epochs]


def by_minutes(minutes: float, entry: Entry, pace: Pace) -> int:
    """The most steps per epoch that fit, validations included: E·(S·step) + V·validation ≤ minutes.

    Raises `RecipeError` if not even one does.
    """
    # a run validates every so many epochs, and after the last
    validations = math.ceil(entry.epochs / int(entry.values["evaluation"]["every"]))
    fixed = validations * pace.validation
    steps = math.floor((60 * minutes - fixed) / (entry.epochs * pace.step))
    if steps < 1:
        least = (fixed + entry.epochs * pace.step) / 60
        raise RecipeError(
            f"--minutes {minutes:g}: {entry.label} needs {least:.2g} minutes for {entry.epochs} "
            f"epochs of one meta-step ({seconds_text(pace.step)}) and {validations} validations "
            f"({seconds_text(pace.validation)} each); give more minutes, fewer --tasks, or rarer "
            "validations: --set evaluation.every=…"
        )
    return steps


def nearest_multiple(unit: int, wanted: int) -> int:
    """The multiple of `unit` nearest to `wanted`, at least one; of two equally near, the smaller.

    >>> nearest_multiple(120, 300), nearest_multiple(120, 310), nearest_multiple(120, 1)
    (240, 360, 120)
    """
    return unit * max(1, math.ceil(wanted / unit - 0.5))


def choose_seeds(entries: Sequence[Entry], request: Request) -> tuple[tuple[int, ...], list[str]]:
    """The seeds of all runs, and a note if a recipe's own seed is not the one it starts from."""
    if not isinstance(request.seeds, int):
        return request.seeds, []
    seeds = {entry.label: int(entry.values["seed"]) for entry in entries if entry.recipe}
    first = next(iter(seeds.values()), 0)
    others = ", ".join(f"{label} {seed}" for label, seed in seeds.items() if seed != first)
    note = f"all are trained from seed {first} on, in place of their own ({others})"
    return tuple(range(first, first + request.seeds)), [note] if others else []


def _check_different(trained: Sequence[Entry]) -> None:
    """Raise `RecipeError` for recipes that differed in nothing but the budget."""
    labels: dict[str, str] = {}
    for entry in trained:
        assert entry.recipe is not None
        twin = labels.setdefault(entry.recipe.hash, entry.label)
        if twin != entry.label:
            raise RecipeError(
                f"{twin} and {entry.label} differ in nothing but the budget, which is one "
                "for all here; give one of them"
            )
