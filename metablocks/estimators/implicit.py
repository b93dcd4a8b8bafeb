"""iMAML: the meta-gradient by the implicit function theorem, whatever way the inner loop took.

    φ* = argmin L_s(φ) + (λ/2) ‖φ − θ‖²,     (I + H/λ) v = ∇L_q(φ*),     H = ∇²L_s(φ*)
    ∂/∂θ = v,     ∂/∂ρ = ∂L_q/∂ρ − (1/λ) (∂²L_s/∂φ∂ρ)ᵀ v

with ρ the parameters that do not adapt. Memory is that of one step, for any number of steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metablocks.batches import Side
from metablocks.checks import Count, NonNegative, Positive, checked
from metablocks.derivatives import gradient, vjp
from metablocks.estimators.base import Estimator, TaskGradient, at_the_end, filled, reached
from metablocks.estimators.conjugate_gradient import conjugate_gradient
from metablocks.estimators.neumann import neumann_series
from metablocks.inner_loop import InnerLoop, QueryPass
from metablocks.rules.base import Chain, UpdateRule, inner_product, members
from metablocks.rules.regularizers import Proximal
from metablocks.types import Task, Tensors

_LEAST_CURVATURE = 0.1  # of the inner problem along a direction of the solver, in units of λ


@checked()
@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    """The meta-gradient (I + ∇²L_s(φ*)/λ)⁻¹ ∇L_q(φ*), by `solver`; λ is `proximal`.

    The inner loop minimises L_s(φ) + (λ/2) ‖φ − θ‖², in training and at evaluation alike: the
    learner's rule starts with `Proximal(λ)`, which is put in front where a rule does not have it. φ*
    is where the inner steps end; the gradient is exact in so far as they converge, and costs no
    memory for them. λ much below the curvature of L_s is slow to converge, and λ above 2/α diverges
    under a rate α.

    Inner steps on mini-batches (`Minibatches`) are steps towards the same φ*: gradients and Hessian
    there are those of the whole support set. So are, with `norm_statistics="support"`, the statistics
    at φ* by which the query pass normalises.

    The system is solved by `cg_steps` products with the Hessian; a task stops where the residual of
    the recursion, relative to ∇L_q, is at most `tolerance`. Reported as `metrics`: `cg_residual`,
    ‖∇L_q − (I + H/λ) v‖ / ‖∇L_q‖ of the v at hand, by one more product, and `inner_gradient`,
    ‖∇L_s(φ) + λ (φ − θ)‖ where the inner loop ended (0 at φ*).

    `solver="neumann"` sums the series Σ (−H/λ)ᵏ ∇L_q to its term `cg_steps` in place of conjugate
    gradients. It needs ‖H‖ < λ; its `metrics` are `neumann_residual`, and `neumann_growth`, a lower
    bound of ‖H‖/λ: the series diverges where that is above 1, and a task then keeps the sum up to the
    term before the first that grew.

    Parameters that do not adapt get their implicit gradient too. What has none is refused: learned
    rates and transforms, on which φ* does not depend; and models that differ from step to step, rules
    that add to the loss themselves, steps = 0, other step losses than the final one, and orders that
    single out steps.

    - `proximal`: λ, above 0.
    - `cg_steps`: products with the Hessian, at most.
    - `tolerance`: the relative residual at which a task stops earlier.
    - `solver`: "cg" for conjugate gradients, "neumann" for the Neumann series.

    Laws: on a quadratic its closed form, λ (A + λI)⁻¹ (C φ* − d); → the plain gradient ∇L_q(φ*) as
    λ → ∞; the finite differences of the loss where the inner loop converges.

    Source: Rajeswaran, Finn, Kakade, Levine 2019; the series: Lorraine, Vicol, Duvenaud 2020. Notes
    and deviations:
    1. The operator is the paper's. The released code solves with 2v + Hv/(λ + 10).
    2. The solver stops, too, along a direction in which L_s(φ) + (λ/2) ‖φ − θ‖² curves less than
       0.1 λ, or downwards: there φ is no minimum that the theorem speaks of, and a step would be
       long and wrong. The released code's operator, twice the identity at least, hides such ones.
    3. The released code takes its inner steps on L_s alone, then one step of the proximal term, and
       evaluates without it; here it is in every step, as in the paper, at evaluation too.

    >>> import metablocks as mb
    >>> mb.Implicit(proximal=2.0, cg_steps=5)
    Implicit(proximal=2.0, cg_steps=5, tolerance=1e-10, solver='cg')

    Raises `BlockError` for a `proximal` not above 0, `cg_steps` below 1, a negative `tolerance`, an
    unknown `solver`, and the combinations above.
    """

    reads: ClassVar[tuple[Side, ...]] = ("support", "query")
    proximal: Positive = 2.0
    cg_steps: Count = 5
    tolerance: NonNegative = 1e-10
    solver: Literal["cg", "neumann"] = "cg"

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        inner = inner.first_order()
        carry = begin = inner.start(meta, buffers, inner.support_of(task, -1))
        for index in range(inner.steps):
            carry, _ = inner.step(meta, carry, inner.support_of(task, index), index)
        adapted = {f"model.{name}" for name in inner.adapted}
        rest = {name: tensor for name, tensor in meta.items() if name not in adapted}

        def query_loss(fast: Tensors, rest: Tensors) -> tuple[Tensor, QueryPass]:
            at, last = carry._replace(params=fast), inner.steps
            if inner.predicting is not None:  # the statistics are a function of φ*, too
                whole = inner.support_of(task, -1)
                at = inner.with_statistics(meta | rest, at, whole, last)
            passed = inner.query(meta | rest, at, inner.query_of(task, last), last)
            return passed.loss, passed._replace(prediction=None)

        def slope(fast: Tensors, rest: Tensors) -> tuple[Tensors, tuple[()]]:
            def support_loss(fast: Tensors) -> tuple[Tensor, tuple[()]]:
                at, whole = carry._replace(params=fast), inner.support_of(task, -1)
                return inner.support_value(meta | rest, at, whole, inner.steps), ()

            slopes, _, _ = gradient(support_loss, fast, differentiable=True)
            return slopes, ()

        value, pull, query = vjp(query_loss, carry.params, rest)
        own, direct = pull(torch.ones_like(value))
        target = filled(own, carry.params)
        # One graph of ∇L_s gives every product: with H, which is symmetric, and with ∂²L_s/∂φ∂ρ.
        support_gradient, transposed, _ = vjp(slope, carry.params, rest, reuse=True)

        def product(vector: Tensors) -> Tensors:
            curved = reached(transposed(vector)[0])
            return {
                n: x + curved[n] / self.proximal if n in curved else x for n, x in vector.items()
            }

        solution, metrics = self._solve(product, target)
        mixed = {n: -m / self.proximal for n, m in reached(transposed(solution)[1]).items()}
        grads = {f"model.{name}": v for name, v in solution.items() if f"model.{name}" in meta}
        grads |= reached(direct)
        grads |= {name: grads[name] + m if name in grads else m for name, m in mixed.items()}

        pulls = {
            name: support_gradient[name] + self.proximal * (p - begin.params[name])
            for name, p in carry.params.items()
        }
        metrics["inner_gradient"] = inner_product(pulls, pulls).sqrt()
        changes = inner.changes((buffers, carry.buffers), (carry.buffers, query.buffers))
        return TaskGradient(
            grads, query.loss, changes=changes, metrics=metrics, **at_the_end(inner, query)
        )

    def _solve(
        self, product: Callable[[Tensors], Tensors], target: Tensors
    ) -> tuple[Tensors, Tensors]:
        """The solution, and the solver's metrics."""
        if self.solver == "neumann":
            series = neumann_series(product, target, steps=self.cg_steps, tolerance=self.tolerance)
            metrics = {"neumann_residual": series.residual, "neumann_growth": series.growth}
            return series.vector, metrics
        solved = conjugate_gradient(
            product,
            target,
            steps=self.cg_steps,
            tolerance=self.tolerance,
            least=_LEAST_CURVATURE,
        )
        return solved.vector, {"cg_residual": solved.residual}

    def inner_rule(self, rule: UpdateRule) -> UpdateRule:
        """The rule with `Proximal` in front, unless it starts with one."""
        pulled = isinstance(members(rule)[0], Proximal)
        return rule if pulled else Chain(Proximal(self.proximal), rule)
