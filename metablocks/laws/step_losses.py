"""Laws of step losses."""

import torch

from metablocks.errors import LawError
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, named
from metablocks.laws.purity import EPOCHS, is_a_function
from metablocks.step_loss import StepLoss
from metablocks.types import Progress


def is_a_weighting(step_loss: StepLoss, *, steps: int, progress: Progress) -> None:
    """Law 5: float64 weights `[steps + 1]`, each ≥ 0, summing to 1, a function of steps and progress.

    Asked hundreds of times and out of order a step loss gives the same weights, and keeps nothing.
    """
    weights = step_loss(steps, progress)
    if not isinstance(weights, torch.Tensor):
        raise LawError(f"a weighting: {named(step_loss)} gave {weights!r}, not a tensor")
    if weights.shape != (steps + 1,):
        raise LawError(
            f"a weighting: {named(step_loss)} gave {list(weights.shape)} for {steps} steps, not "
            f"[steps + 1] = [{steps + 1}]"
        )
    if weights.dtype != torch.float64:
        raise LawError(
            f"a weighting: {named(step_loss)} gave {weights.dtype}, whose rounding is that of a loss in "
            "float32; weights are torch.float64"
        )
    if not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-12:
        raise LawError(
            f"a weighting: {named(step_loss)} gave {weights.tolist()}, whose sum is "
            f"{float(weights.sum()):.6g}; each is ≥ 0, and their sum is 1"
        )
    moments = [progress, *map(Progress, EPOCHS)]
    is_a_function("a weighting", step_loss, [(steps, moment) for moment in moments])


def is_the_weighted_sum(
    step_loss: StepLoss, problem: Problem, *, progress: Progress | None = None
) -> None:
    """Law 5: the loss is Σ_k v_k L_q(θ_k), its gradient the sum of the final step loss's gradients.

    Those of a learner of k steps, weighted by v_k.
    """
    progress = progress or Progress()
    result = problem.learner(step_loss=step_loss).meta_gradient(problem.tasks, progress=progress)
    weights = step_loss(problem.steps, progress)
    loss = torch.zeros_like(result.loss)
    grads = {name: torch.zeros_like(grad) for name, grad in result.grads.items()}
    for steps in [k for k, weight in enumerate(weights.tolist()) if weight]:
        alone = problem.with_steps(steps).learner().meta_gradient(problem.tasks)
        weight = weights[steps].to(alone.loss)
        loss = loss + weight * alone.loss
        for name, grad in alone.grads.items():
            grads[name] = grads[name] + weight * grad
    assert_close("weighted sum, loss", {"loss": result.loss}, {"loss": loss}, 1e-10)
    assert_close("weighted sum, gradient", result.grads, grads, 1e-10)
