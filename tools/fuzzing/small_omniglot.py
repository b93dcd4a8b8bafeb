"""Small data sets in Omniglot's layout, drawn by the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def draw_omniglot(parent: Path, halves: dict[str, dict[str, int]]) -> Path:
    """Write an unpacked `omniglot-py` of `{half: {alphabet: characters}}` by 20 drawers each."""
    rng = np.random.default_rng(0)
    character = 0
    for half, alphabets in halves.items():
        for alphabet, characters in alphabets.items():
            for number in range(1, characters + 1):
                character += 1
                folder = parent / "omniglot-py" / half / alphabet / f"character{number:02d}"
                folder.mkdir(parents=True)
                base = rng.integers(10, 55, size=(3, 2))
                for drawer in range(1, 21):
                    _draw(rng, base).save(folder / f"{character:04d}_{drawer:02d}.png")
    return parent


def _draw(rng: np.random.Generator, base: np.ndarray) -> Image.Image:
    """One drawing: a few thick dark lines of the character, moved by the drawer."""
    paper = np.ones((105, 105), dtype=bool)
    for row, column in base + rng.integers(-4, 5, size=(1, 2)):
        paper[row : row + 3, column : column + 40] = False
        paper[row : row + 40, column : column + 3] = False
    return Image.fromarray(paper).convert("1")
