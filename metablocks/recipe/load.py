"""Recipes from files: names to paths, text to a `Recipe`.

Shipped recipes lie in the checkout's `recipes/` or, installed, in `metablocks/_recipes/`.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from metablocks.errors import RecipeError, command, suggest
from metablocks.recipe.assemble import try_blocks
from metablocks.recipe.notes import recipe_notes
from metablocks.recipe.overrides import apply_overrides
from metablocks.recipe.parse import Problem, parse, plain, raise_problems
from metablocks.recipe.record import Recipe
from metablocks.recipe.resolve import resolve

MAX_BYTES = 1_000_000
_PACKAGE = Path(__file__).resolve().parents[1]


class Shipped(NamedTuple):
    """One line of `metablocks recipes`."""

    name: str
    title: str
    cite: str


def load(
    name_or_path: str | Path, overrides: Sequence[str] = (), allow: Sequence[str] = ()
) -> Recipe:
    """The resolved recipe of a shipped name (`maml_sinusoid`) or of a file.

    `overrides` are `path=value`, applied from left to right; `allow` names the packages that
    outside blocks (`my_pkg.my_module:MyRule`) may come from.

    Raises `RecipeError` that lists everything wrong with the recipe, each with its place.

    >>> recipe = load("maml_sinusoid", ["inner.steps=3"])
    >>> recipe.at("inner.steps"), recipe.origins["inner.steps"]
    (3, '--set')
    """
    path = find_recipe(name_or_path)
    return from_text(read_text(path), shown(path), overrides, allow)


def from_text(
    text: str, source: str = "recipe", overrides: Sequence[str] = (), allow: Sequence[str] = ()
) -> Recipe:
    """The resolved recipe of YAML text; `source` names it in messages. Raises as `load` does."""
    problems: list[Problem] = []
    root = parse(text, source, problems)
    root, notes = apply_overrides(root, overrides, problems, allow)
    values, places = resolve(root, allow, problems)
    recipe = Recipe(source, values, places, tuple(notes), tuple(allow))
    try_blocks(recipe, problems)
    raise_problems(problems)
    return replace(recipe, notes=(*notes, *recipe_notes(recipe)))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped name or a path. Raises `RecipeError` if there is none."""
    name = str(name_or_path)
    if not name:
        raise RecipeError(f'an empty name; "{command("recipes")}" lists the recipes that ship')
    path = Path(os.path.expanduser(name_or_path))
    looks_like_path = len(path.parts) != 1 or path.suffix in (".yaml", ".yml") or name[-1:] == "/"
    names = {file.stem: file for file in recipe_files()}
    if looks_like_path and path.is_file():
        return path
    if not looks_like_path and name in names:
        return names[name]
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.yaml"))
        example = f", such as {path / inside[0]}" if inside else ""
        raise RecipeError(f"{name}: a directory; a recipe is one file{example}")
    if path.exists() and looks_like_path:
        return path  # a pipe, such as /dev/stdin
    hint = suggest(path.stem, names)
    beside = f"; ./{name} is a file, give it with ./" if path.is_file() else ""
    what = "no such file" if looks_like_path else "no recipe of that name"
    listing = f'; "{command("recipes")}" lists those that ship' if not hint else ""
    raise RecipeError(f"{name}: {what}{hint}{beside}{listing}")


def recipes_folder() -> Path:
    """The folder of the shipped recipes: the checkout's, else the package's."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "recipes").is_dir():
        return checkout / "recipes"
    return _PACKAGE / "_recipes"


def recipe_files() -> list[Path]:
    """The files of the shipped recipes, by name."""
    return sorted(recipes_folder().glob("*.yaml"))


def shipped() -> list[Shipped]:
    """Name, title and citation of every shipped recipe.

    >>> [recipe.name for recipe in shipped() if recipe.name.startswith("fomaml_s")]
    ['fomaml_sinusoid', 'fomaml_strokes']
    """
    return [_describe(path) for path in recipe_files()]


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises `RecipeError` for one that is unreadable or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{shown(path)}: more than {MAX_BYTES} bytes; this is no recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - before.rfind(b"\n")
        place = f"{shown(path)}:{before.count(10) + 1}:{column}"
        byte = data[error.start]
        raise RecipeError(f"{place}: not UTF-8 text (byte 0x{byte:02x})") from None


def shown(path: Path) -> str:
    """A path as messages show it: relative if it lies below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(path)


def _describe(path: Path) -> Shipped:
    try:
        values = plain(parse(read_text(path), shown(path), []))
    except RecipeError as error:
        return Shipped(path.stem, f"unreadable: {error}", "")
    stated = values if isinstance(values, dict) else {}
    return Shipped(path.stem, *(str(stated.get(key, "")) for key in ("name", "cite")))
