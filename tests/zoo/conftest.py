"""The zoo's settings: no network, quiet libraries."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

NOT_OURS = (
    # PyTorch's, of what nn.TransformerEncoder makes by itself in eval() without gradients.
    "ignore:The PyTorch API of nested tensors is in prototype stage",
    # PyTorch's, of an operator that vmap runs example by example; the result is right.
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the filters of warnings."""
    for item in items:
        if "zoo" in item.path.parts:
            for line in NOT_OURS:
                item.add_marker(pytest.mark.filterwarnings(line))
