"""One measurement in a process of its own: how long, how much memory, is the gradient right.

    python -m tools.benchmarks.worker '{"case": "sinusoid", "contender": "higher", ...}'

The last line of its output is the result, as JSON.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tools.benchmarks import contenders
from tools.benchmarks.lineup import CASES, REFERENCE, Case
from tools.benchmarks.problem import build

CHECKED_TASKS = 3
"""How many tasks the gradient is checked on: enough to tell a mean from a sum, and soon done."""

WARM_UPS = 2


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Times in seconds, peak memory in bytes, and, where asked for, the error of the gradient."""
    case = CASES[request["case"]]
    case = case.quick() if request["quick"] else case
    make = getattr(contenders, request["contender"])
    device, dtype = request["device"], getattr(torch, request["dtype"])
    torch.set_num_threads(request["threads"])

    # One run at a tiny size loads what loads on first use (libraries, kernels, thread pools), so
    # that the memory measured is the computation's.
    make(build(replace(case.quick(), tasks=1), device=device, dtype=dtype))()
    gc.collect()
    run = make(build(case, device=device, dtype=dtype))
    peak = _watch_memory(device)
    for _ in range(WARM_UPS):
        run()
    gc.collect()
    times = [_time(run, device) for _ in range(request["repeats"])]
    result = {"times": times, "peak": peak(), "device": _device_name(device)}
    if request["check"]:
        result["error"] = gradient_error(request["contender"], case, device=device)
    return result


def gradient_error(contender: str, case: Case, *, device: str = "cpu") -> float:
    """‖g − g₀‖ / ‖g₀‖ in float64, g₀ being the plain loop's."""
    case = replace(case, tasks=min(case.tasks, CHECKED_TASKS))
    expected, given = (
        getattr(contenders, name)(build(case, device=device, dtype=torch.float64))()
        for name in (REFERENCE, contender)
    )
    if expected.keys() != given.keys():
        raise ValueError(f"gradients of {sorted(given)} where {sorted(expected)} are due")
    difference = sum(float((given[name] - g).square().sum()) for name, g in expected.items())
    norm = sum(float(g.square().sum()) for g in expected.values())
    return (difference / norm) ** 0.5


def _time(run: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device


def _watch_memory(device: str) -> Callable[[], int]:
    """Starts watching; the function it returns gives the peak beyond the memory held at the start."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        held = torch.accelerator.memory_allocated(device)
        return lambda: torch.accelerator.max_memory_allocated(device) - held
    try:
        # Linux. The peak of getrusage would not do: a process inherits it from the one that
        # started it, and it cannot be put back after the imports.
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        held = _status("VmRSS")
        return lambda: max(0, _status("VmHWM") - held)
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return lambda: unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main(argv: list[str]) -> int:
    request = json.loads(argv[0])
    try:
        result = measure(request)
    except ModuleNotFoundError as error:
        result = {"failure": f"{error.name} is not installed"}
    except Exception as error:  # whatever a contender raises belongs into its row of the table
        lines = str(error).splitlines() or ["no message"]
        result = {"failure": f"{type(error).__name__}: {lines[0]}"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
