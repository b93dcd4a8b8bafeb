"""The transforms of the gradient that the tests of KFO and Meta-Curvature share."""

import pytest
import small_problems as problem

from metablocks import KFO, MetaCurvature

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
all_transforms = pytest.mark.parametrize(
    "make", (TRANSFORMS | ADAPTING).values(), ids=(TRANSFORMS | ADAPTING).keys()
)
problems = pytest.mark.parametrize("small", [problem.regression, problem.classification])
