"""One measurement in a process of its own: how long, how much memory, is the gradient right.

    python -m tools.benchmarks.worker '{"case": {"name": "sinusoid", …}, "contender": "higher", …}'

The last line of its output is the result, as JSON.
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch

from metablocks import CompileWarning
from metablocks.memory import forget_peak, keep_freed_memory, peak_memory
from tools.benchmarks.contenders import make
from tools.benchmarks.end_to_end import PARTS, Iteration, draw_images
from tools.benchmarks.lineup import CONTENDERS, REFERENCE, Case
from tools.benchmarks.problem import build

CHECKED_TASKS = 3
"""How many tasks the gradient is checked on: enough to tell a mean from a sum, and soon done."""

WARM_UPS = 2


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Times in seconds, peak memory in bytes, and, where asked for, the error of the gradient.

    `peak` is what the process held beyond its start, `tensors` what tensors held, which is the same in
    every run; None where it cannot be told. `weights` are those of the model. `first` is the time of the
    first call. Where that compiles, `compiling` is its peak memory, and `peak` is that of the calls
    after it; compiled code itself counts as loaded. `parts` is where the time of a whole meta-iteration
    goes.
    """
    case, contender = Case(**request["case"]), CONTENDERS[request["contender"]]
    device, dtype = request["device"], getattr(torch, request["dtype"])
    torch.set_num_threads(request["threads"])
    if request["keep_freed_memory"]:
        keep_freed_memory()

    # One run at a tiny size loads what loads on first use (libraries, kernels, thread pools), so
    # that the memory measured is the computation's. It compiles nothing: the first call pays that.
    tiny = replace(case.quick(), tasks=1)
    make(replace(contender, compile=False), build(tiny, device=device, dtype=dtype))()
    gc.collect()
    published = request["as_published"]
    problem = build(case, device=device, dtype=dtype, as_published=published)
    weights = sum(p.nbytes for p in problem.model.parameters())
    run = make(contender, problem)
    if case.whole:
        if not (folder := Path(request["folder"])).exists():
            draw_images(folder, case)
        iteration = Iteration(run, contender, case, problem, folder)
        run = partial(iteration, partial(_clock, device))
    peak = _watch_memory(device)
    result = {"first": _time(lambda: _first(run), device), "device": _device_name(device)}
    result["weights"] = weights
    if contender.compile:
        result["compiling"] = peak()
        gc.collect()
        peak = _watch_memory(device)
    for _ in range(WARM_UPS - 1):
        run()
    gc.collect()
    result["times"] = [_time(run, device) for _ in range(request["repeats"])]
    result["peak"] = peak()
    if case.whole:
        times = zip(*iteration.times[-request["repeats"] :], strict=True)
        result["parts"] = dict(zip(PARTS, map(median, times), strict=True))
    if request["check"]:
        result["tensors"] = _tensors(run, device) if not contender.wide else None
        if contender.name != REFERENCE and contender.role != "scale":
            result["error"] = gradient_error(contender.name, case, device=device)
    return result


def _first(run: Callable[[], Any]) -> None:
    """The first call, which compiles where the contender does; no plain run passes for a compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        run()


def gradient_error(contender: str, case: Case, *, device: str = "cpu") -> float:
    """‖g − g₀‖ / ‖g₀‖ in float64, g₀ being the plain loop's; float32 is cast down for bfloat16."""
    case = replace(case, tasks=min(case.tasks, CHECKED_TASKS))
    own = torch.float32 if CONTENDERS[contender].bfloat16 else torch.float64
    expected, given = (
        make(CONTENDERS[name], build(case, device=device, dtype=dtype))()
        for name, dtype in ((REFERENCE, torch.float64), (contender, own))
    )
    given = {name: g.double() for name, g in given.items()}
    if expected.keys() != given.keys():
        raise ValueError(f"gradients of {sorted(given)} where {sorted(expected)} are due")
    difference = sum(float((given[name] - g).square().sum()) for name, g in expected.items())
    norm = sum(float(g.square().sum()) for g in expected.values())
    return (difference / norm) ** 0.5


def _time(run: Callable[[], Any], device: str) -> float:
    start = _clock(device)
    run()
    return _clock(device) - start


def _clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device


def _tensors(run: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors held at a time in a run in this thread, beyond those before it."""
    if device != "cpu":
        peak = _watch_memory(device)
        run()
        return peak()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes, initial=0))


def _watch_memory(device: str) -> Callable[[], int]:
    """Starts watching; the function it returns gives the peak beyond the memory held at the start."""
    where = torch.device(device)
    forget_peak(where)
    held = peak_memory(where) or 0
    return lambda: max(0, (peak_memory(where) or 0) - held)


def main(argv: list[str]) -> int:
    request = json.loads(argv[0])
    try:
        result = measure(request)
    except ModuleNotFoundError as error:
        result = {"failure": f"{error.name} is not installed"}
    except CompileWarning as reason:
        result = {"failure": str(reason)}
    except Exception as error:  # whatever a contender raises belongs into its row of the table
        lines = str(error).splitlines() or ["no message"]
        result = {"failure": f"{type(error).__name__}: {lines[0]}"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
