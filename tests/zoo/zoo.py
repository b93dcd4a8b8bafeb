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
BY_HAND = """
## Held by hand

{count} modules of other public packages were held to plain autograd once, by hand, at tiny size:
`Loop` and `Vmap`, `Unrolled` and `Adjoint`, both orders, `evaluate`, `adapt`, one prediction, and the
user's module bit for bit. No test needs the packages: what was wrong is a small module in
`test_user_modules.py`. Under `Vmap`, graphs, solvers, quantisers and Gaussian processes are refused
as PyTorch refuses them (masks, `.item()`, branches on data, functions without `setup_context`), and
the group norms of diffusion nets where nested `torch.func.grad` runs them.

| packages | modules | `Loop` |
|---|---|---|
"""

HELD = (
    (45, "right, with `Batch` objects as inputs too", "torch_geometric 2.8.1"),
    (55, "right; fused attention first order", "x-transformers 2.31.10, vit-pytorch 1.26.11"),
    (
        15,
        "right; the three reversible ones are refused by name",
        "performer 1.1.4, reformer 1.4.4, perceiver 0.11.0, linformer 0.2.3, conformer 0.3.2, "
        "linear-attention-transformer 0.19.1, g-mlp 0.1.5, rotary-embedding 0.9.1",
    ),
    (
        20,
        "right; a parallel scan first order",
        "vector-quantize 1.32.0, siren 0.1.7, pytorch-tcn 1.2.3, mambapy 1.2.0, pykan 0.2.8",
    ),
    (
        12,
        "right; of adjoint methods the second order is the first in PyTorch, without a word, or refused",
        "torchdiffeq 0.2.5, torchode 1.0.1, torchcde 0.2.5, torchdyn 1.0.6",
    ),
    (
        17,
        "right; of reduced memory first order; pyro's global store of parameters is refused by name",
        "zuko 1.6.0, normflows 1.7.3, nflows 0.14, pyro 1.9.2",
    ),
    (10, "right; kernels by cdist first order", "gpytorch 1.15.2"),
    (
        13,
        "right; e3nn's batch norm, which writes by out=, is refused under `Adjoint`",
        "e3nn 0.6.0, geotorch 0.4.0",
    ),
    (
        19,
        "right; `GradSampleModule` is refused by name",
        "peft 0.21.2, opacus 1.6.0, torch-pruning 1.6.1",
    ),
    (27, "right", "monai 1.6.1, kornia 0.9.0, segmentation-models 0.6.0"),
    (10, "right", "torchaudio 2.11.0, speechbrain 1.1.2"),
    (12, "right", "torchrl 0.14.1, tensordict 0.14.3, lightning 2.6.6, avalanche 0.6.0"),
    (
        10,
        "right",
        "diffusers 0.42.1, open_clip 3.3.0, sentence-transformers 6.2.0, pytorch-forecasting 1.8.0, "
        "pytorch-tabnet 4.1.0, rtdl 0.0.2",
    ),
    (
        10,
        "right; losses by cdist first order",
        "entmax 1.3, pytorch-crf 0.7.2, pytorch-metric-learning 2.9.0",
    ),
)
"""Modules, what holds of them, packages with versions."""


def readme() -> str:
    """The text of README.md."""
    by_hand = BY_HAND.format(count=sum(count for count, _, _ in HELD))
    held = "".join(f"| {packages} | {count} | {verdict} |\n" for count, verdict, packages in HELD)
    return HEAD.format(count=len(ENTRIES)) + "".join(map(_row, ENTRIES)) + by_hand + held


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
