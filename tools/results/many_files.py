"""100 000 image files by class: time to the first task, memory, and drawing beside training.

    python tools/results/many_files.py [SIDE] [THREADS]

Makes 1 000 folders of 100 PNG files of SIDE × SIDE pixels of noise (84 unless given; of each class one
image, linked 100 times over) in a temporary folder, and draws 5-way 1-shot tasks of 15 queries from
them by `Folders`, decoded images bounded to 64 MiB. Draws and training steps of second-order MAML take
turns, so that what else the machine does slows both: of Conv4 as in the recipes of mini-ImageNet (32
filters, 5 inner steps), and of one that has less to do for a task than any recipe (8 filters, 1 step).
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import metablocks as mb
from metablocks.memory import forget_peak, keep_freed_memory, peak_memory
from metablocks.models import Conv4

CLASSES, IMAGES, TASKS, DRAWS = 1000, 100, 4, 500
MIB = 2**20


def make(root: Path, side: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        split = "train" if number < 640 else "val" if number < 800 else "test"
        folder = root / split / f"{number:04d}"
        folder.mkdir(parents=True)
        noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "00.png")
        for link in range(1, IMAGES):
            os.link(folder / "00.png", folder / f"{link:02d}.png")


def rates(source: Any, learner: mb.MetaLearner, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds for a batch of tasks: of drawing it, and of a training step on it."""
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    drawing, training = [], []
    for number in range(rounds + 1):  # the first also looks at the model
        draw = partial(source.sample, "train", range(number * TASKS, (number + 1) * TASKS))
        tasks, seconds = timed(draw)
        drawing.append(seconds)
        optimizer.zero_grad()
        training.append(timed(partial(learner.backward, tasks))[1])
        optimizer.step()
    return drawing[1:], training[1:]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main(side: int = 84, threads: int = 2) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a run does
    with TemporaryDirectory() as folder:
        make(Path(folder), side)
        fields = {"size": side, "ways": 5, "shots": 1, "queries": 15, "cache": 64}
        source, built = timed(lambda: mb.tasks.Folders(folder, **fields))
        _, first = timed(lambda: source.sample("train", [0]))
        print(f"{side} × {side}, {threads} threads: first task after {built + first:.2f} s")
        for number in range(100):  # the cache is full, and what a draw takes is held
            source.sample("train", [number])
        device = torch.device("cpu")
        for window in range(1, 3):
            forget_peak(device)
            before = peak_memory(device) or 0
            for number in range(DRAWS):
                source.sample("train", [DRAWS * window + number])
            grown = (peak_memory(device) or 0) - before
            print(f"peak memory over {DRAWS} draws: +{grown / MIB:.1f} MiB of {before / MIB:.0f}")
        for filters, steps, rounds in ((8, 1, 40), (32, 5, 10)):
            learner = mb.MetaLearner(
                Conv4(input_shape=source.input_shape, outputs=5, filters=filters),
                loss=F.cross_entropy,
                steps=steps,
                rule=mb.LearningRate(0.01),
                executor=mb.Loop(workers=threads, channels_last="query"),
            )
            print(f"Conv4 of {filters} filters, inner steps: {steps}")
            both = rates(source, learner, rounds)
            for name, seconds in zip(("drawing", "training"), both, strict=True):
                low, middle, high = 1000 * np.quantile(seconds, [0.1, 0.5, 0.9])
                spread = f"{low:.0f} – {middle:.0f} – {high:.0f} ms for {TASKS} tasks"
                print(f"  {name}: {1000 * TASKS / middle:.1f} tasks a second; {spread}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
