"""The zoo's settings: no network, quiet libraries, and what is run only by `--long`."""

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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a combination that only `--long` runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the long ones without `--long`; add the filters of warnings."""
    ours = [item for item in items if "zoo" in item.path.parts]
    for item in ours:
        for line in NOT_OURS:
            item.add_marker(pytest.mark.filterwarnings(line))
    if not config.getoption("--long"):
        long = {item for item in ours if item.get_closest_marker("long")}
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]
