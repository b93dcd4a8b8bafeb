"""Options, devices, precisions and hypothesis profiles for all tests.

    pytest --device cuda                     the blocks run there; their numbers are the CPU's
    pytest --device pretend                  the same without a GPU: see `pretend_device.py`
    pytest --device pretend-mps              … and without float64, as `--device mps`: in single precision
    pytest --dtype float32                   … and in single precision, within its rounding
    pytest --hypothesis-profile=thorough     300 examples of every law in place of 15

What is no matter of device and precision (files, messages, recipes that state their own) is tested
as ever. Finite differences are always float64: in float32 a slope has three digits at best, and would
hold nothing. The tests of those ask for `device64`, or for `float64`: the device, or the CPU if it has
no float64.
"""

import importlib
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from metablocks.devices import has_float64

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)
settings.load_profile("default")

collect_ignore_glob = ["*/conftest.py"]  # they hold no doctest, and all have one name
torch.set_num_threads(1)  # the laws run on tiny tensors; threads would only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="run the laws there: cpu, cuda, …, or pretend, pretend-mps",
    )
    parser.addoption(
        "--dtype",
        default="float64",
        choices=["float32", "float64"],
        help="run the laws in this precision; finite differences are float64 in any case",
    )
    parser.addoption(
        "--long", action="store_true", help="also what takes too long for every commit"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A device that is absent is an error before anything runs, not a skip."""
    config.addinivalue_line("markers", "long: what only `--long` runs")
    name = config.getoption("--device")
    try:
        if name.startswith("pretend"):
            importlib.import_module("pretend_device").register(name)
        torch.zeros(1, device=_device(config))
    except (ImportError, RuntimeError, AssertionError) as error:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        raise pytest.UsageError(
            f"--device {name}: torch {torch.__version__} cannot compute there "
            f"({str(error).splitlines()[0]}); it can on: cpu{f', {found.type}' if found else ''}"
        ) from error


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device").removesuffix("-mps"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the long ones without `--long`."""
    if not config.getoption("--long"):
        long = {item for item in items if item.get_closest_marker("long")}
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that blocks run on."""
    return _device(request.config)


@pytest.fixture(scope="session")
def device64(device: torch.device) -> torch.device:
    """The device that float64 is computed on: the CPU, if `device` has none."""
    return device if has_float64(device) else torch.device("cpu")


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """The precision that blocks run in, where a law is not one of float64 alone."""
    name = request.config.getoption("--dtype")
    dtype: torch.dtype = getattr(torch, name) if has_float64(device) else torch.float32
    return dtype


@pytest.fixture(scope="session")
def place(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and how exactly to compute, as tensors and the builders of problems take it."""
    return {"device": device, "dtype": dtype}


@pytest.fixture(scope="session")
def within(dtype: torch.dtype) -> Callable[[float], float]:
    """The one place where tolerances scale: `within(1e-12)` is that in float64, and 1e-4 in float32.

    A test states what float64 leaves, 1e-14 to 1e-9 by the number of its operations. In float32 all
    of them have what `metablocks.laws.compare.assert_close` allows: a thousand times the precision. What
    is to be exact states 0, and is exact in both.
    """
    return lambda tolerance: (
        max(tolerance, 1e-4) if dtype != torch.float64 and tolerance else tolerance
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def placed(place: dict[str, Any]) -> Iterator[None]:
    """New tensors have the run's device and precision, and the draws are the same for every test."""
    with _defaults(**place):
        yield


@pytest.fixture
def float64(device64: torch.device) -> Iterator[None]:
    """New tensors are float64 on the device for it, and the draws are the same for every test."""
    with _defaults(device64, torch.float64):
        yield


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if device.type == "cpu":  # a device mode costs a Python call at every operation
            yield
        else:
            with device:
                yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which `maml_own_folder` runs: its images are there, and few."""
    place = tmp_path_factory.mktemp("own")
    script = Path(__file__).parents[1] / "recipes" / "python" / "draw_folder.py"
    runpy.run_path(str(script))["main"](place / "drawn_characters", train=5, others=5, images=6)
    return place
