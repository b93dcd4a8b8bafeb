"""Text that `run` and `eval` print: scores, the deployed model, commands to try next."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch.nn.modules.batchnorm import _BatchNorm

from metablocks.batches import Stream
from metablocks.errors import command
from metablocks.models import PerStepBatchNorm
from metablocks.recipe import Experiment
from metablocks.runs.deployment import Deployment
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import MEASURES, Scores
from metablocks.runs.state import TrainingState

_DONE = {"fold_lora": "added", "fold_tnet": "folded", "collapse_linear": "collapsed"}

TRANSDUCTIVE = "transductive: batch norm uses the statistics of the query set it predicts on"


def report(
    experiment: Experiment,
    scores: Scores,
    ensemble: Scores | None = None,
    deployed: Deployment | None = None,
) -> str:
    """A table of scores and of an ensemble's, the convention of batch norms, the deployed model."""
    lines: list[str] = []
    for each in filter(None, (scores, ensemble)):
        lines += _table(experiment, each)
    if transductive(experiment):
        lines.append(f"  {TRANSDUCTIVE}")
    if deployed:
        lines.append(deployment_text(deployed, scores))
    return "\n".join(lines)


def deployment_text(found: Deployment, scores: Scores) -> str:
    """The deployed model in a few lines; `scores` are those of the learner that it comes from.

    >>> scores = Scores("test", 9, "accuracy", [0.7], [0.1], [0.1], [0.6], [0.5])
    >>> print(deployment_text(Deployment(1200, 1000, 1000), scores))
    deployed: 1,000 parameters; 1,200 meta-parameters were trained
    >>> print(deployment_text(Deployment(1200, 1120, 1000, ["fold_tnet"], 4, 2e-16), scores))
    deployed: 1,120 → 1,000 parameters by fold_tnet; 1,200 meta-parameters were trained
      adapted, then folded: the same predictions up to 2.0e-16, relatively (4 tasks, float64)
    """
    trained = f"{found.meta_parameters:,} meta-parameters were trained"
    if not found.reductions:
        return f"deployed: {found.parameters:,} parameters; {trained}"
    done = " and ".join(_DONE[name] for name in found.reductions)
    lines = [
        f"deployed: {found.parameters:,} → {found.reduced_parameters:,} parameters by "
        f"{' and '.join(found.reductions)}; {trained}"
    ]
    after, before = f"  adapted, then {done}:", f"  {done}, then adapted:"
    if found.difference is not None:
        lines.append(
            f"{after} the same predictions up to {found.difference:.1e}, relatively "
            f"({found.tasks} task{'s' * (found.tasks != 1)}, float64)"
        )
    if found.reduced_first is not None:
        first = found.reduced_first
        percent = scores.measure == "accuracy"
        unit, scale = (" points", 100) if percent else ("", 1)
        digits = 2 if percent else 4
        change = round(scale * first.change, digits) + 0.0  # no −0
        half = f"{scale * first.interval:.{digits}f}" if first.scores.tasks > 1 else "–"
        lines.append(
            f"{before} {first.scores.text(-1)} in place of {scores.text(-1)}; task by task "
            f"{change:+.{digits}f} ± {half}{unit}, {first.verdict}"
        )
    reasons = {"difference": after, "reduced_first": before}
    lines += [f"{reasons[name]} left out: {why}" for name, why in found.left_out.items()]
    return "\n".join(lines)


def facts(experiment: Experiment) -> str:
    """Size and length of a training, in one line."""
    meta = sum(p.numel() for p in experiment.learner.learned.values())
    steps = experiment.epochs * experiment.steps_per_epoch
    inner = experiment.learner.steps
    return (
        f"{meta:,} meta-parameters, {steps:,} meta-steps of {experiment.tasks_per_step} tasks, "
        f"{inner} inner step{'s' * (inner != 1)}, on {experiment.device}"
    )


def summary(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    report: str,
    where: Sequence[str],
) -> str:
    """The end of a run: its `report`, its directory, and commands to try next, with `where` behind."""

    def hint(what: str, *words: object) -> str:
        return f"  {command(*words, *where)}    {what}"

    recipe, path = experiment.recipe, directory.path
    stream = isinstance(experiment.learner.batches, Stream)  # which has as many steps as rows
    if experiment.learner.max_steps is None and not stream:
        longer = 2 * experiment.evaluation.inner_steps
        evaluate = hint("more inner steps", "eval", path, "--steps", longer)
    else:
        evaluate = hint("more tasks", "eval", path, "--tasks", 2000)
    first = recipe.at("inner.order.block") == "first_order"
    order = "second_order" if first else "first_order"
    words = ("run", directory.recipe, "--set", f"inner.order.block={order}")
    # First order takes the inner gradient for a constant: a support loss would not learn.
    learned = experiment.learner.named_parameters()
    looks_through = recipe.at("outer.estimator.block") not in ("reptile", "implicit") and not any(
        name.startswith("support_loss.") and tensor.requires_grad for name, tensor in learned
    )
    orders = [hint(f"{order.replace('_', '-')} gradients", *words)]
    best = f"best of {state.epochs} epochs by validation: epoch {state.best_epoch}"
    if state.ranking and not math.isfinite(state.ranking[0][1]):
        best = f"no epoch of {state.epochs} has a finite score; tested is epoch {state.best_epoch}"
    return "\n".join(
        [
            "",
            best,
            report,
            f"run directory: {path}",
            "to try next:",
            evaluate,
            *(orders if looks_through else []),
            f"  {command('recipes')}    what else there is",
        ]
    )


def place_arguments(allow: Sequence[str], data: Path | None, device: str | None) -> tuple[str, ...]:
    """The arguments of the command that name packages, data and device."""
    named = [("--data", data), ("--device", device), *(("--allow", package) for package in allow)]
    return tuple(word for name, value in named if value for word in (name, str(value)))


def _table(experiment: Experiment, scores: Scores) -> list[str]:
    """A row for each inner step; of an ensemble its members, and one row."""
    title = f"{scores.split}, {scores.tasks} tasks: mean ± 95 % confidence interval over tasks"
    lines, steps = [title], list(range(len(scores.mean)))
    if scores.inner_steps is not None:
        lines, steps = [_members(experiment, scores), title], [scores.inner_steps]
    head = ["inner steps", f"query {MEASURES[scores.measure][0]}", "std", "worst 10 %"]
    head += ["query loss"] if scores.measure == "accuracy" else []
    rows = [
        [str(step), scores.text(index), *scores.spread_text(index), f"{scores.loss[index]:.4f}"]
        for index, step in enumerate(steps)
    ]
    table = [f"  {line}" for line in aligned([head, *(row[: len(head)] for row in rows)])]
    if scores.inner_steps is None and experiment.learner.steps in steps:
        table[1 + experiment.learner.steps] += "  (as trained)"
    return [*lines, *table]


def _members(experiment: Experiment, scores: Scores) -> str:
    members, asked = scores.members or [], experiment.evaluation.ensemble
    count = len(members)
    best = "best validation checkpoint" if count == 1 else f"{count} best validation checkpoints"
    mean = "predictions" if scores.measure == "mse" else "logits"
    epochs = f"epoch{'' if count == 1 else 's'} {', '.join(map(str, members))}"
    few = f"; {asked} asked for, {count} validated" if count < asked else ""
    return f"ensemble of the {best}: mean {mean} ({epochs}{few})"


def aligned(rows: Sequence[Sequence[str]], between: str = "  ") -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    >>> aligned([["recipe", "time"], ["a", "3 s"]])
    ['recipe  time', 'a        3 s']
    """
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        between.join(
            [f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, others, strict=True))]
        )
        for name, *cells in rows
    ]


def transductive(experiment: Experiment) -> bool:
    """True if a batch norm predicts on the query set by the query set's own statistics."""
    return experiment.learner.norm_statistics == "batch" and any(
        isinstance(module, _BatchNorm)
        or (isinstance(module, PerStepBatchNorm) and not module.keeps_statistics)
        for module in experiment.learner.model.modules()
    )
