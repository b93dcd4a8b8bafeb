"""The meta-gradient by a sweep backwards over the inner steps: exact, and no graph outlives a step.

A forward sweep keeps the carries and no graph; each product on the way back goes through one step,
recomputed with the random draws it had.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from metablocks.checks import Count, CountFrom0, checked
from metablocks.estimators.base import Estimator, TaskGradient
from metablocks.estimators.sweep import Sweep
from metablocks.inner_loop import InnerLoop
from metablocks.pieces import Pieces
from metablocks.types import Task, Tensors


@checked()
@dataclass(frozen=True, kw_only=True)
class Adjoint(Estimator):
    """The discrete adjoint of the inner loop: `Unrolled`'s gradient at the memory of one step.

        λ_k = (∂c_{k+1}/∂c_k)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂c,    ∂L/∂φ = Σ_k (∂c_{k+1}/∂φ)ᵀ λ_{k+1} + …

    Memory is that of one step's graph and, for each inner step, a copy of the carry: the fast
    weights, the rule's state, the model's buffers. A first-order step keeps its gradient too, so as
    not to take it twice, and a query loss that counts before the last step its own. Time is
    `Unrolled`'s and a second gradient for each step that is differentiated through.

    - `keep_every`: every so many carries one is kept, and those between are recomputed from it: a third
      gradient for these steps, and the query losses at them, none of whose gradients is kept.
    - `offload`: True has what is kept wait on the CPU, if it is on another device.
    - `graphs`: steps at the end whose graphs are kept, and are not gone through again: `Unrolled`'s time
      and memory for these.

    Law: equals `Unrolled`, random draws (dropout, masks) included, for every rule, order, step loss
    and executor, and leaves the generators where `Unrolled` leaves them.

    Source: the classical adjoint with checkpoints (Griewank, Walther 2000); Kemaev et al. 2025
    (MixFlow-MG) for meta-gradients.

    Deviation from MixFlow-MG: the product with the Hessian is reverse-over-reverse. Its
    forward-over-reverse was measured in torch 2.13 on CPU: no less memory, 1.1 to 1.5 times as long
    on a conv net and an MLP, and no derivative of `mse_loss` under `vmap`. (Reverse-over-forward is
    quicker, and silently wrong through batch norm.) What saves the memory is the sweep.

    >>> import metablocks as mb
    >>> mb.Adjoint()
    Adjoint(keep_every=1, offload=False, graphs=0)

    Raises `BlockError` for `keep_every` below 1 and negative `graphs`.
    """

    exact: ClassVar[bool] = True
    keep_every: Count = 1
    offload: bool = False
    graphs: CountFrom0 = 0

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        return self.in_pieces(Pieces(inner, meta, buffers, task))

    def in_pieces(self, run: Pieces) -> TaskGradient:
        return Sweep(run, self.graphs, self.keep_every, self.offload)()

    def low_memory(self, steps: int) -> "Adjoint | None":
        """The same sweep with the fewest copies, about 2√steps of them, where that is fewer."""
        stride = round(steps**0.5)
        fewer = self.keep_every == 1 and stride > 1
        return replace(self, keep_every=stride, graphs=0) if fewer or self.graphs else None
