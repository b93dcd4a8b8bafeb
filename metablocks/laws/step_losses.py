"""Laws of step losses."""

from typing import Any

import torch

from metablocks.errors import LawError
from metablocks.estimators import Adjoint
from metablocks.laws import gradients
from metablocks.laws.problem import MakeRule, Problem, hold, named, tolerance
from metablocks.step_loss import FinalStepLoss, StepLoss
from metablocks.types import Progress


def is_a_weighting(step_loss: StepLoss, *, steps: int, progress: Progress) -> None:
    """Law 5: weights `[steps + 1]`, each ≥ 0, summing to 1; the same when asked again."""
    weights = step_loss(steps, progress)
    if not isinstance(weights, torch.Tensor):
        raise LawError(f"a weighting: {named(step_loss)} gave {weights!r}, not a tensor")
    if weights.shape != (steps + 1,):
        raise LawError(
            f"a weighting: {named(step_loss)} gave {list(weights.shape)} for {steps} steps, not "
            f"[steps + 1] = [{steps + 1}]"
        )
    if not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-12:
        raise LawError(
            f"a weighting: {named(step_loss)} gave {weights.tolist()}, whose sum is "
            f"{float(weights.sum()):.6g}; each is ≥ 0, and their sum is 1"
        )
    if not torch.equal(weights, step_loss(steps, progress)):
        raise LawError(
            f"a weighting: {named(step_loss)} is not a pure function of steps and progress"
        )


def ends_at_final(step_loss: Any, *, steps: int, later: float) -> None:
    """Law 5: from the end of its annealing on a step loss is the final one, exactly.

    `step_loss` has a field `epochs`, which says where it ends; `later` is how many epochs after.
    """
    progress = Progress(step_loss.epochs + later)
    weights, final = step_loss(steps, progress), FinalStepLoss()(steps, progress)
    if not torch.equal(weights.double(), final):
        raise LawError(
            f"ends at final: {named(step_loss)} at {progress} is {weights.tolist()}, not the final step "
            "alone"
        )


def one_hot_is_final(problem: Problem) -> None:
    """Law 5: all weight on the last step is the final step loss; nothing else is computed."""

    def one_hot(steps: int, progress: Progress) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(steps), steps + 1).double()

    got = problem.learner(step_loss=one_hot).meta_gradient(problem.tasks)
    expected = problem.learner(step_loss=FinalStepLoss()).meta_gradient(problem.tasks)
    hold("one-hot at the last step is final", got.grads, expected.grads, within=0)
    if int(torch.isfinite(got.query_losses[0]).sum()) != 1:
        raise LawError(f"a step of weight 0 was computed: {got.query_losses[0].tolist()}")


def is_the_weighted_sum(
    step_loss: StepLoss, problem: Problem, *, progress: Progress | None = None
) -> None:
    """The loss is Σ_k v_k L_q(θ_k), its gradient the sum of those that the final step loss gives."""
    progress = progress or Progress()
    within = tolerance(problem, float64=1e-10)
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
    hold("weighted sum, loss", {"loss": result.loss}, {"loss": loss}, within)
    hold("weighted sum, gradient", result.grads, grads, within)


def one_gradient(
    step_loss: StepLoss, problem: Problem, *, rule: MakeRule, progress: Progress | None = None
) -> None:
    """Law 8: under a step loss, `Adjoint` gives the gradient of `Unrolled`."""
    gradients.one_estimator(
        problem,
        [Adjoint(), Adjoint(keep_every=2)],
        lambda estimator: problem.learner(rule(), step_loss=step_loss, estimator=estimator),
        progress=progress,
    )
