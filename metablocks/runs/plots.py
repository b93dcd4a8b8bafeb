"""The pictures of a run: how training went, and how well the learner adapts at the end."""

import math
from pathlib import Path
from typing import Any

from metablocks.runs.directory import RunDirectory, write_atomically


def draw(directory: RunDirectory) -> list[str]:
    """Write `training.png` and `adaptation.png`; returns what there is to say about it.

    Without matplotlib nothing is drawn, and the note says how to get it.
    """
    try:
        import matplotlib
    except ImportError:
        return ["no plots: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    rows = directory.read_metrics()
    _training(directory, [row for row in rows if "epoch" in row])
    _adaptation(directory, [row for row in rows if "test" in row][-1])
    return []


def _training(directory: RunDirectory, rows: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    (loss,) = axes.plot(epochs, [row["train_loss"] for row in rows], color="tab:gray")
    axes.set(xlabel="epoch", ylabel="training query loss (mean of the epoch)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    judged = [row for row in rows if "validation" in row]
    right = axes.twinx()
    scale, label = _scale(judged[0]["validation"])
    right.errorbar(
        [row["epoch"] for row in judged],
        [scale * row["validation"]["mean"][-1] for row in judged],
        [scale * row["validation"]["interval"][-1] for row in judged],
        color="tab:blue",
        capsize=2,
        marker="o",
        markersize=3,
    )
    steps = len(judged[0]["validation"]["mean"]) - 1
    right.set_ylabel(f"validation {label} after {steps} inner steps", color="tab:blue")
    axes.yaxis.label.set_color(loss.get_color())
    axes.set_title("training")
    _save(figure, directory.path / "training.png")


def _adaptation(directory: RunDirectory, row: dict[str, Any]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(5.0, 4.0), layout="constrained")
    test, ensemble = row["test"], row.get("ensemble")
    scale, label = _scale(test)
    steps = range(len(test["mean"]))
    axes.errorbar(
        steps,
        [scale * value for value in test["mean"]],
        [scale * value for value in test["interval"]],
        capsize=3,
        marker="o",
        label="mean, 95 % confidence interval",
    )
    axes.plot(
        steps,
        [scale * value for value in test["worst_decile"]],
        color="tab:gray",
        linestyle="--",
        marker="v",
        label="worst 10 % of tasks",
    )
    if ensemble:
        axes.plot(
            ensemble["inner_steps"],
            scale * ensemble["mean"][0],
            color="tab:red",
            linestyle="none",
            marker="*",
            markersize=11,
            markeredgecolor="white",
            zorder=5,  # above the mean, which may be close
            label=f"ensemble of {len(ensemble['members'])}",
        )
    axes.set(xlabel="inner steps", ylabel=f"query {label}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"adaptation, {test['tasks']} test tasks")
    values = [*test["mean"], *test["worst_decile"]]
    if test["measure"] == "mse" and min(values) > 0 and math.isfinite(max(values)):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    _save(figure, directory.path / "adaptation.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def _scale(scores: dict[str, Any]) -> tuple[float, str]:
    return (100.0, "accuracy, %") if scores["measure"] == "accuracy" else (1.0, "MSE")
