"""Few of the shipped recipes that together choose every block that any of them does."""

import functools

import pytest
import yaml

from metablocks.recipe.load import recipe_files


def covering_first(*, tasks=False):
    """All recipes' paths as parameters of a test; those that bring no choice of their own are long."""
    few = [*_covering(tasks)]
    return [
        pytest.param(path, id=path.stem, marks=[] if path in few else [pytest.mark.long])
        for path in recipe_files()
    ]


def _covering(tasks):
    left = {path: _choices(path, tasks) for path in recipe_files()}
    while any(left.values()):
        path = max(left, key=lambda path: len(left[path]))
        yield path
        left = {other: left[other] - left[path] for other in left}


@functools.cache
def _read(path):
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), loader)


def _choices(path, tasks):
    """What a recipe chooses, without the numbers."""
    recipe = _read(path)
    outer = {slot: recipe["outer"][slot] for slot in ("step_loss", "estimator")}
    parts = {**recipe["inner"], **outer, "executor": recipe["hardware"]["executor"]}
    beside = ("model", "surgery", *["tasks"] * tasks)
    parts |= {slot: recipe[slot] for slot in beside if slot in recipe}
    return {
        f"{slot}: {value['block'] if isinstance(value, dict) else value}"
        for slot, values in parts.items()
        if slot != "steps"
        for value in (values if slot in ("surgery", "rule") else [values])
    }
