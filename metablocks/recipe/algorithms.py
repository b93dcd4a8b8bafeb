"""The table of algorithms by choice, read off the recipes that ship."""

from typing import Any

from metablocks.recipe.load import read_text, recipes_folder, shown
from metablocks.recipe.parse import parse, plain
from metablocks.recipe.record import Recipe

ALGORITHMS = {
    "MAML": "maml_strokes",
    "FOMAML": "fomaml_strokes",
    "ANIL": "anil_omniglot_5w1s",
    "BOIL": "boil_omniglot_5w1s",
    "Meta-SGD": "meta_sgd_sinusoid",
    "MAML++": "maml_pp_strokes",
    "Reptile": "reptile_sinusoid",
    "iMAML": "imaml_sinusoid",
    "T-Net": "tnet_strokes",
    "MT-net": "mtnet_strokes",
    "KFO": "kfo_strokes",
    "Meta-Curvature": "meta_curvature_strokes",
    "LinNet": "linnet_strokes",
    "LoRA": "lora_vit_strokes",
    "Learned loss": "learned_loss_sinusoid",
    "Example weights": "reweighting_strokes",
    "CAVIA": "cavia_sinusoid",
    "Proto-MAML": "proto_maml_strokes",
    "Zero head": "zero_head_maml_strokes",
}
"""The algorithms that ship, each with the recipe that states it; the first is what others vary."""

CHOICES = {
    "surgery": "surgery",
    "adapt": "inner.adapt",
    "start": "inner.start",
    "batches": "inner.batches",
    "support loss": "inner.support_loss",
    "rule": "inner.rule",
    "order": "inner.order",
    "step loss": "outer.step_loss",
    "estimator": "outer.estimator",
}
"""The choices of an algorithm, by the places where a recipe states them."""


def algorithms_text() -> str:
    """A table in Markdown, algorithm by choice: what each chooses otherwise than MAML.

    Recipes are read as text, so that it needs nothing that their blocks need.

    >>> algorithms_text().splitlines()[3].replace(" ", "")
    '|FOMAML|`fomaml_strokes`|||||||`first_order`|||'
    """
    rows = [["algorithm", "recipe", *CHOICES], ["---"] * (len(CHOICES) + 2)]
    usual: list[str] = []
    for algorithm, name in ALGORITHMS.items():
        path = recipes_folder() / f"{name}.yaml"
        recipe = Recipe(name, plain(parse(read_text(path), shown(path), [])), {})
        cells = [_cell(recipe.at(choice)) for choice in CHOICES.values()]
        other = [
            "" if same == cell else cell for cell, same in zip(cells, usual or cells, strict=True)
        ]
        rows.append([algorithm, f"`{name}`", *(other if usual else cells)])
        usual = usual or cells
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    """Patterns, or blocks by name, with a mark of a learned rate."""
    entries = value if isinstance(value, list) else [value] if value else []
    if entries and isinstance(entries[0], str):
        return " ".join(f'`"{pattern}"`' for pattern in entries)
    words = [f"{'learned ' if e.get('learn') else ''}`{e['block']}`" for e in entries]
    return " → ".join(words) or "–"
