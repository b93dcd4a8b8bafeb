"""Who takes part in a comparison: recipes to train and finished runs, one contender a row.

Finished runs that differ in nothing but the seed are one contender, and so are a recipe and its
own finished runs. All contenders must be about the same problem: the same tasks section, the same
number of evaluation tasks, the same data.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metablocks.compare.results import FinishedRun, is_run, read_run
from metablocks.errors import RecipeError, suggest
from metablocks.recipe import Recipe, load
from metablocks.recipe.load import find_recipe, recipe_files
from metablocks.recipe.record import leaves


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    label: str
    """The stem, and where that is not enough, in what it differs."""
    stem: str
    """Of the recipe's file."""
    values: dict[str, Any]
    """Of the recipe, with the seed of its first run."""
    recipe: Recipe | None
    """To be trained; None where there are only finished runs."""
    finished: tuple[FinishedRun, ...] = ()


def read_contenders(
    names: Sequence[str], overrides: Sequence[str] = (), allow: Sequence[str] = ()
) -> list[Contender]:
    """The contenders that arguments name, in their order: recipes (names, paths) or run folders.

    `overrides` and `allow` are for recipes, as `load` takes them. Raises `RecipeError`.

    >>> [contender.label for contender in read_contenders(["maml_sinusoid", "fomaml_sinusoid"])]
    ['maml_sinusoid', 'fomaml_sinusoid']
    """
    found: list[Contender] = []
    seen: set[object] = set()
    for name in names:
        path = Path(name)
        if is_run(path):
            if path.resolve() not in seen:
                _add_run(found, read_run(path))
            seen.add(path.resolve())
        else:
            _refuse_folder(path)
            recipe = load(name, overrides, allow)
            if recipe.hash in seen:
                raise RecipeError(
                    f"{name}: the same recipe is given twice; a variant is a file of its own: "
                    f"metablocks show {name} --set PATH=VALUE > variant.yaml"
                )
            seen.add(recipe.hash)
            stem = find_recipe(name).stem
            found.append(Contender(stem, stem, recipe.values, recipe))
    return labelled(found)


def absorb(contenders: Sequence[Contender]) -> list[Contender]:
    """Finished runs go to the recipe that they are runs of, where that is trained on more seeds."""
    trained = [each for each in contenders if each.recipe]
    owner = {
        id(each): next((t for t in trained if _identity(t.values) == _identity(each.values)), each)
        for each in contenders
    }
    result = []
    for contender in contenders:
        if owner[id(contender)] is not contender:
            continue
        runs = [run for each in contenders if owner[id(each)] is contender for run in each.finished]
        result.append(replace(contender, finished=tuple(runs)))
    return labelled(result)


def check_same_problem(contenders: Sequence[Contender], data: dict[str, str] | None = None) -> None:
    """Raise `RecipeError`, naming what differs first, unless all are about the same problem.

    `data` is the checksum of the data by label, for contenders with data behind their tasks.
    """
    first = contenders[0]
    checksums = data or {}
    for other in contenders[1:]:
        differences = differing(_problem(first), _problem(other))
        block = ("tasks.block", *_pair(first, other, "tasks.block"))
        if block[1] != block[2]:
            differences = [block]  # the other fields belong to the blocks
        if differences:
            raise RecipeError(_refusal(first, other, differences))
        mine, theirs = checksums.get(first.label), checksums.get(other.label)
        if mine and theirs and mine != theirs:
            raise RecipeError(
                f"{first.label} and {other.label} were made of other data: checksum {mine[:12]}, "
                f"{theirs[:12]}"
            )


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The leaves in which two values differ, with both values; None where there is none.

    >>> differing({"tasks": {"ways": 5, "shots": 1}}, {"tasks": {"ways": 20, "shots": 1}})
    [('tasks.ways', 5, 20)]
    """
    left, right = dict(leaves(one)), dict(leaves(other))
    return [
        (path, left.get(path), right.get(path))
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]


def labelled(contenders: Sequence[Contender]) -> list[Contender]:
    """With labels that tell contenders apart: those that clash say in what they differ."""
    result: list[Contender] = []
    for contender in contenders:
        twins = [each for each in contenders if each.stem == contender.stem]
        label = contender.stem
        if len(twins) > 1:
            label = " ".join([label, *_distinctions(contender, twins)])
        while label in (each.label for each in result):
            label += "'"
        result.append(replace(contender, label=label))
    return result


def at(values: dict[str, Any], path: str) -> Any:
    """The leaf at a path, None where there is none."""
    return dict(leaves(values)).get(path)


def _add_run(found: list[Contender], run: FinishedRun) -> None:
    """Give a run to the contender that differs in nothing but the seed, or make a new one."""
    for index, contender in enumerate(found):
        if contender.recipe or _identity(contender.values) != _identity(run.values):
            continue
        if any(_made_on(run) != _made_on(other) for other in contender.finished):
            continue
        same = [other for other in contender.finished if other.seed == run.seed]
        if same:
            raise RecipeError(
                f"{run.path} and {same[0].path} are runs of the same recipe with the same seed; "
                "counted as two they would look like more evidence than they are. Give one of them"
            )
        found[index] = replace(contender, finished=(*contender.finished, run))
        return
    stem = Path(str(run.record.get("source", ""))).stem
    if stem in ("", "recipe"):  # of a run's own copy: its folder says more
        stem = run.path.name
    found.append(Contender(stem, stem, run.values, None, (run,)))


def _made_on(run: FinishedRun) -> tuple[object, object]:
    """Device and data: what runs of one recipe may differ in beside the seed."""
    return run.record.get("device"), run.record.get("data", {}).get("checksum")


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "seed"}


def _refuse_folder(path: Path) -> None:
    """Errors of folders that `load` cannot know: a folder of runs, a mistyped run."""
    if not path.is_dir():
        parent = path.parent
        if not path.exists() and parent.is_dir() and len(path.parts) > 1 and not path.suffix:
            hint = suggest(path.name, [each.name for each in parent.iterdir()])
            raise RecipeError(f"{path}: no such recipe or run{hint}")
        return
    if len(path.parts) == 1 and path.name in {file.stem for file in recipe_files()}:
        return
    runs = [each for each in sorted(path.glob("*")) if is_run(each)]
    below = path / "runs"
    if runs:
        raise RecipeError(
            f"{path}: holds {len(runs)} runs; give the runs themselves: {shlex.quote(str(path))}/*"
        )
    if below.is_dir():
        its = f"{shlex.quote(str(below))}/*"
        raise RecipeError(f"{path}: not the folder of a run; its runs are {its}")


def _distinctions(contender: Contender, twins: Iterable[Contender]) -> list[str]:
    paths = dict.fromkeys(
        path
        for twin in twins
        for path, _, _ in differing(_identity(contender.values), _identity(twin.values))
        if path not in ("name", "cite")
    )
    told = [f"{path}={_shown(at(contender.values, path))}" for path in list(paths)[:2]]
    return told or sorted({str(run.record.get("device")) for run in contender.finished})


def _problem(contender: Contender) -> dict[str, Any]:
    values = contender.values
    return {"tasks": values["tasks"], "evaluation": {"tasks": values["evaluation"]["tasks"]}}


def _pair(first: Contender, other: Contender, path: str) -> tuple[Any, Any]:
    return at(first.values, path), at(other.values, path)


def _refusal(first: Contender, other: Contender, differences: list[tuple[str, Any, Any]]) -> str:
    told = "; ".join(
        f"{path} is {_shown(one)} in {first.label}, {_shown(two)} in {other.label}"
        for path, one, two in differences[:3]
    )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    paths = {path for path, _, _ in differences}
    what = "have different tasks"
    remedy = "--set PATH=VALUE sets a field of all recipes; finished runs stay as they are"
    if paths == {"tasks.block"}:
        remedy = "Compare recipes for one kind of tasks"
    elif paths == {"evaluation.tasks"}:
        what = "are judged on different numbers of tasks"
        remedy = "--tasks N sets it for all recipes; finished runs stay as they are"
    return (
        f"{first.label} and {other.label} {what}, so their scores do not compare: "
        f"{told}{more}. {remedy}"
    )


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)
