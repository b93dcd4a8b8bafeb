"""Options, devices and hypothesis profiles for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)
settings.load_profile("default")

torch.set_num_threads(1)  # the laws run on tiny tensors; threads would only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="run the laws on this device: cpu, cuda, …")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that blocks run on. Asking for one that is absent is an error, not a skip."""
    device = torch.device(request.config.getoption("--device"))
    torch.zeros(1, device=device)
    return device


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64, and the draws are the same for every test."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
