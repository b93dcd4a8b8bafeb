"""Entries of a comparison: recipes to train and finished runs, one entry a row of the table.

Finished runs that differ in nothing but the seed are one entry, and so are a recipe and its own
finished runs. All entries must be about the same problem: the same tasks section, the same number of
evaluation tasks, the same data.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metablocks.errors import RecipeError, command, quoted, suggest
from metablocks.recipe import Recipe, load
from metablocks.recipe.load import find_recipe, from_text, recipe_files
from metablocks.recipe.record import Differences, differing, shown_value
from metablocks.runs.finished import FinishedRun, is_run, read_run


@dataclass(frozen=True)
class Entry:
    """One row of the table: what it is made of."""

    label: str
    """The stem, and if several entries share it, the values in which this one differs."""
    stem: str
    """Of the recipe's file."""
    values: dict[str, Any]
    """Of the recipe, with the seed of its first run."""
    recipe: Recipe | None
    """To be trained; None if there are only finished runs."""
    finished: tuple[FinishedRun, ...] = ()

    @property
    def epochs(self) -> int:
        return int(self.values["outer"]["epochs"])

    @property
    def steps(self) -> int:
        """Meta-steps of the whole training."""
        return self.epochs * int(self.values["outer"]["steps_per_epoch"])

    @property
    def settings(self) -> dict[str, Any]:
        """The values without the seed: equal for runs of one row."""
        return {key: value for key, value in self.values.items() if key != "seed"}

    def with_override(self, override: str) -> "Entry":
        """The same with one value of the recipe changed. Raises `RecipeError` if it is refused."""
        if self.recipe is None:
            return self
        text, source, allow = self.recipe.to_yaml(), self.recipe.source, self.recipe.allow
        recipe = from_text(text, source, [override], allow)
        return replace(self, recipe=recipe, values=recipe.values)


def read_entries(
    names: Sequence[str], overrides: Sequence[str] = (), allow: Sequence[str] = ()
) -> list[Entry]:
    """The entries that arguments name, in their order: recipes (names, paths) or run folders.

    `overrides` and `allow` are for recipes, as `load` takes them. Raises `RecipeError`.

    >>> [entry.label for entry in read_entries(["maml_sinusoid", "fomaml_sinusoid"])]
    ['maml_sinusoid', 'fomaml_sinusoid']
    """
    entries: list[Entry] = []
    seen: set[object] = set()
    for name in names:
        path = Path(os.path.expanduser(name))
        if is_run(path):
            if path.resolve() not in seen:
                _add_run(entries, read_run(path))
            seen.add(path.resolve())
        else:
            _refuse_folder(path)
            recipe = load(name, overrides, allow)
            if recipe.hash in seen:
                raise RecipeError(
                    f"{name}: the same recipe is given twice; a variant is a file of its own: "
                    f"{command('show', name)} --set PATH=VALUE > variant.yaml"
                )
            seen.add(recipe.hash)
            stem = find_recipe(name).stem
            entries.append(Entry(stem, stem, recipe.values, recipe))
    return labelled(entries)


def stems(entries: Sequence[Entry]) -> str:
    """The name of a folder about the entries: their recipes, in short."""
    return "-".join(dict.fromkeys(entry.stem for entry in entries))[:80]


def absorb(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, with finished runs moved to the recipe that they are runs of, if it is trained."""
    result: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.recipe is None):  # recipes first
        for index, other in enumerate(result):
            if other.recipe and other.settings == entry.settings:
                result[index] = replace(other, finished=(*other.finished, *entry.finished))
                break
        else:
            result.append(entry)
    order = {entry.label: place for place, entry in enumerate(entries)}
    return labelled(sorted(result, key=lambda entry: order[entry.label]))


def check_same_problem(entries: Sequence[Entry], checksums: Mapping[str, str | None]) -> None:
    """Raise `RecipeError`, naming what differs first, unless all are about the same problem.

    `checksums` are of the data of recipes, by label; None without data behind the tasks.
    """
    first = entries[0]
    sums = {e.label: e.finished[0].checksum for e in entries if e.finished} | {**checksums}
    for other in entries[1:]:
        differences = differing(_problem(first), _problem(other))
        if differences:
            raise RecipeError(_refusal(first, other, differences))
        one, two = sums[first.label], sums[other.label]
        if one and two and one != two:
            raise RecipeError(
                f"{first.label} and {other.label} were made of other data: checksum {one[:12]}, "
                f"{two[:12]}"
            )


def labelled(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with different labels: those that share a stem name the values they differ in."""
    result: list[Entry] = []
    for entry in entries:
        twins = [each for each in entries if each.stem == entry.stem]
        label = entry.stem
        if len(twins) > 1:
            differences = [
                (path, value)
                for twin in twins
                for path, value, _ in differing(entry.settings, twin.settings)
                if path not in ("name", "cite")
            ]
            words = [f"{path}={shown_value(value)}" for path, value in dict(differences).items()]
            devices = sorted({str(run.record.get("device")) for run in entry.finished})
            label = " ".join([label, *(words[:2] or devices)])
        while label in (each.label for each in result):
            label += "'"
        result.append(replace(entry, label=label))
    return result


def _add_run(entries: list[Entry], run: FinishedRun) -> None:
    """Give a run to the entry that differs in nothing but the seed, or make a new one."""
    stem = Path(str(run.record.get("source", ""))).stem
    if stem in ("", "recipe"):  # of a run's own copy: its folder says more
        stem = run.path.name
    new = Entry(stem, stem, run.values, None, (run,))
    for index, entry in enumerate(entries):
        if entry.recipe or entry.settings != new.settings:
            continue
        if any(run.circumstances != other.circumstances for other in entry.finished):
            continue
        same = [other for other in entry.finished if other.seed == run.seed]
        if same:
            raise RecipeError(
                f"{run.path} and {same[0].path} are runs of the same recipe with the same seed; "
                "counted as two they would look like more evidence than they are. Give one of them"
            )
        entries[index] = replace(entry, finished=(*entry.finished, run))
        return
    entries.append(new)


def _refuse_folder(path: Path) -> None:
    """Errors of folders that `load` cannot know: a folder of runs, a mistyped run."""
    if not path.exists() and path.parent.is_dir() and len(path.parts) > 1 and not path.suffix:
        hint = suggest(path.name, [each.name for each in path.parent.iterdir()])
        raise RecipeError(f"{path}: no such recipe or run{hint}")
    if len(path.parts) == 1 and path.name in {file.stem for file in recipe_files()}:
        return
    for folder in (path, path / "runs"):
        if any(map(is_run, folder.glob("*"))):
            pattern = f"{quoted(folder)}/*"
            raise RecipeError(f"{path}: not the folder of a run; its runs are {pattern}")


def _problem(entry: Entry) -> dict[str, Any]:
    return {
        "tasks": entry.values["tasks"],
        "evaluation": {"tasks": entry.values["evaluation"]["tasks"]},
    }


def _refusal(first: Entry, other: Entry, differences: Differences) -> str:
    message = "; ".join(
        f"{path} is {shown_value(one)} in {first.label}, {shown_value(two)} in {other.label}"
        for path, one, two in differences[:3]
    )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return (
        f"{first.label} and {other.label} are not about the same tasks, so their scores do not "
        f"compare: {message}{more}. --set PATH=VALUE sets a field of all recipes; finished runs stay "
        "as they are"
    )
