"""The zoo: all entries, and the table of what PyTorch itself cannot do with them.

python tests/zoo/zoo.py > tests/zoo/README.md      writes the table anew
"""

import zoo_recurrent
import zoo_timm
import zoo_torch
import zoo_torchvision
import zoo_transformers
from zoo_entry import Entry

ENTRIES: list[Entry] = [
    *zoo_torch.ENTRIES,
    *zoo_recurrent.ENTRIES,
    *zoo_torchvision.ENTRIES,
    *zoo_timm.ENTRIES,
    *zoo_transformers.ENTRIES,
]

HEAD = """# The zoo

{count} public models at tiny size, with random weights, in float64. Under every executor, estimator and
order, the meta-gradient is that of plain autograd (`zoo_reference.py`), except for what PyTorch itself
cannot do. That is refused: under `Vmap` with the way out, at second order with the module's name.
`tests/zoo/test_limits.py` holds each cell of this table to PyTorch alone.

    tools/test tests/zoo               # each model, a covering choice of combinations
    tools/test tests/zoo --long        # the full product

| model | its kind | `Loop` | `Vmap` |
|---|---|---|---|
"""


def readme() -> str:
    """The text of README.md."""
    return HEAD.format(count=len(ENTRIES)) + "".join(map(_row, ENTRIES))


def _row(entry: Entry) -> str:
    loop = "both orders"
    if entry.no_second:
        loop = f"first order; `{entry.no_second}` has no second derivative"
    elif entry.fused_attention:
        loop = "both orders; second in math attention alone"
    vmap = f"no: {entry.no_vmap}" if entry.no_vmap else "as `Loop`"
    if entry.random and not entry.no_vmap:
        vmap += ", with other draws"
    if entry.no_vmap_evaluate:
        vmap += f"; not `evaluate`: {entry.no_vmap_evaluate}"
    return f"| {entry.name} | {entry.kind} | {loop} | {vmap} |\n"


if __name__ == "__main__":
    print(readme(), end="")
