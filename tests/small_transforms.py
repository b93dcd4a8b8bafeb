"""The transforms of the gradient that the tests of KFO and Meta-Curvature share."""

import pytest
import torch

from metablocks import KFO, MetaCurvature
from metablocks.laws import problem

RATE = 0.2
ADAPTS = {"adapt_transform": True, "rate": RATE}
TRANSFORMS = {
    "kfo": KFO,
    "kfo-no-bias": lambda: KFO(bias=False),
    "kfo-psd": lambda: KFO(psd=True),
    "kfo-right": lambda: KFO(vector_right_factor=True),
    "kfo-hidden": lambda: KFO(hidden=1, activation="gelu"),
    "kfo-hidden-psd": lambda: KFO(hidden=1, activation="tanh", psd=True, bias=False),
    "meta_curvature": MetaCurvature,
}
ADAPTING = {
    "kfo-adapt": lambda: KFO(**ADAPTS),
    "kfo-adapt-right": lambda: KFO(vector_right_factor=True, **ADAPTS),
    "kfo-adapt-hidden": lambda: KFO(hidden=1, activation="gelu", psd=True, **ADAPTS),
}
transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
all_transforms = pytest.mark.parametrize(
    "make", (TRANSFORMS | ADAPTING).values(), ids=(TRANSFORMS | ADAPTING).keys()
)
problems = pytest.mark.parametrize("small", [problem.regression, problem.classification])


def perturb(rule, amount=0.2):
    """Move every factor away from the identity, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in rule.named_parameters():
            if "factors." in name:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu")
                p.add_((amount * noise).to(p))
    return rule
