"""Laws of step losses."""

import torch

from metablocks.errors import LawError
from metablocks.laws.problem import Problem, hold
from metablocks.step_loss import FinalStepLoss, StepLoss
from metablocks.types import Progress


def is_a_weighting(step_loss: StepLoss, steps: int, progress: Progress) -> None:
    """Law 5: weights `[steps + 1]`, each ≥ 0, summing to 1; the same when asked again."""
    weights = step_loss(steps, progress)
    if weights.shape != (steps + 1,):
        raise LawError(
            f"{step_loss!r} gave {list(weights.shape)} for {steps} steps, not [{steps + 1}]"
        )
    if not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-12:
        raise LawError(f"{step_loss!r} gave {weights.tolist()}: not ≥ 0 with sum 1")
    if not torch.equal(weights, step_loss(steps, progress)):
        raise LawError(f"{step_loss!r} is not a pure function of steps and progress")


def ends_at_final(step_loss: StepLoss, steps: int, progress: Progress) -> None:
    """Law 5: at the end of its annealing a step loss is the final one, exactly."""
    weights, final = step_loss(steps, progress), FinalStepLoss()(steps, progress)
    if not torch.equal(weights, final):
        raise LawError(
            f"{step_loss!r} at {progress} is {weights.tolist()}, not the final step alone"
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


def is_the_weighted_sum(problem: Problem, step_loss: StepLoss, progress: Progress) -> None:
    """The loss is Σ_k v_k L_q(θ_k), and so is its gradient."""
    result = problem.learner(step_loss=step_loss).meta_gradient(problem.tasks, progress=progress)
    weights = step_loss(problem.steps, progress)
    loss = torch.zeros((), dtype=torch.float64)
    grads: dict[str, torch.Tensor] = {}
    for steps in [k for k, weight in enumerate(weights.tolist()) if weight]:
        alone = problem.with_steps(steps).learner().meta_gradient(problem.tasks)
        weight = weights[steps].to(alone.loss)
        loss = loss.to(alone.loss) + weight * alone.loss
        for name, grad in alone.grads.items():
            grads[name] = grads.get(name, torch.zeros_like(grad)) + weight * grad
    hold("weighted sum, loss", {"loss": result.loss}, {"loss": loss}, within=1e-10)
    hold("weighted sum, gradient", result.grads, grads, within=1e-10)
