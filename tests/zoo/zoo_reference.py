"""What a model's meta-gradient is held to: MAML written by hand in plain autograd.

    θ_{k+1} = θ_k − α ∇L_s(θ_k),    L = mean over tasks of L_q(θ_K)

Nothing of metablocks is used. Every task starts from clones of the parameters and of the buffers.
What a module writes into them while it runs goes into these clones: a task's support passes hand it
on, a query pass sees it and keeps nothing. Batch norms normalise by the statistics of their input;
the running ones that they write are never read.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from zoo_entry import RATE, SEED, STEPS, Batch, Entry, seed

Tensors = dict[str, Tensor]


class Reference(NamedTuple):
    """The meta-gradient and the query losses of plain autograd."""

    grads: Tensors
    """Of every trainable parameter; zero where the loss does not depend on it."""
    losses: Tensor
    """Query losses after the last step, `[tasks]`."""


def reference(
    entry: Entry, *, second: bool, model: nn.Module | None = None, number: int = SEED
) -> Reference:
    """The meta-gradient of second or first order, draws being seeded by `number`."""
    model = model or entry.plain_model()
    tasks = entry.tasks()
    params = dict(_trainable(model))
    losses = []
    seed(number)
    for task in tasks:
        *_, (fast, buffers) = _carries(entry, model, task.support, second)
        losses.append(_pass(entry, model, fast, buffers, task.query)[0])
    stacked = torch.stack(losses)
    grads = torch.autograd.grad(stacked.mean(), list(params.values()), allow_unused=True)
    named = zip(params.items(), grads, strict=True)
    filled = {n: torch.zeros_like(p) if g is None else g.to_dense() for (n, p), g in named}
    return Reference(filled, stacked.detach())


def evaluation(entry: Entry, model: nn.Module | None = None) -> tuple[Tensor, list[Any]]:
    """Query losses `[tasks, steps + 1]` and last predictions, in `eval()` mode but for batch norms."""
    model = (model or entry.plain_model()).eval()
    for norm in batch_norms(model):
        norm.train()
    tasks = entry.tasks()
    losses, predictions = [], []
    seed(SEED)
    for task in tasks:
        for fast, buffers in _carries(entry, model, task.support, second=False):
            loss, prediction = _pass(entry, model, fast, buffers, task.query)[:2]
            losses.append(loss.detach())
        predictions.append(prediction)
    return torch.stack(losses).reshape(len(tasks), STEPS + 1), predictions


def vmapped(entry: Entry, *, second: bool) -> Tensors:
    """The meta-gradient by PyTorch's own transforms: what `vmap(grad(...))` runs, `Vmap` can."""
    model = entry.model()
    for norm in batch_norms(model):  # running statistics are neither read nor written
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    tasks = entry.tasks()
    params = {name: p.detach() for name, p in _trainable(model)}
    buffers = {n: b.expand(len(tasks), *b.shape).clone() for n, b in model.named_buffers()}

    def task_loss(params: Tensors, buffers: Tensors, support: Batch, query: Batch) -> Tensor:
        def loss(fast: Tensors, buffers: Tensors) -> tuple[Tensor, Tensors]:
            value, _, buffers = _pass(entry, model, fast, buffers, support)
            return value, buffers

        fast = params
        for _ in range(STEPS):
            gradient, buffers = torch.func.grad(loss, has_aux=True)(fast, buffers)
            fast = {
                name: tensor - RATE * (gradient[name] if second else gradient[name].detach())
                for name, tensor in fast.items()
            }
        return _pass(entry, model, fast, buffers, query)[0]

    seed(SEED)
    stacked = pytree.tree_map(
        lambda *leaves: torch.stack(leaves), *[(task.support, task.query) for task in tasks]
    )
    over_tasks = torch.func.vmap(
        torch.func.grad(task_loss), in_dims=(None, 0, 0, 0), randomness="different"
    )
    return {name: g.mean(0) for name, g in over_tasks(params, buffers, *stacked).items()}


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """The norms that may keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


def attention(entry: Entry) -> AbstractContextManager[None]:
    """Where the second derivatives of the entry's attention exist."""
    return sdpa_kernel(SDPBackend.MATH) if entry.fused_attention else nullcontext()


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch's inputs as arguments of a model: a tuple is positional ones, a dict keywords."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence):
        return inputs, {}
    return (inputs,), {}


def distance(actual: Tensors, expected: Tensors) -> float:
    """The largest ‖actual − expected‖ over named tensors, each relative to ‖expected‖.

    A tensor whose gradient is rounding noise (the bias before a batch norm) would have no relative
    error: 1e-3 of the norm of all tensors is the least that one is compared with.
    """
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(
        float((actual[name].to_dense() - g).norm() / g.norm().clamp(min=1e-3 * whole))
        for name, g in expected.items()
    )


def tensors_in(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_in(part)]
    return []


def _carries(
    entry: Entry, model: nn.Module, support: Batch, second: bool
) -> Iterator[tuple[Tensors, Tensors]]:
    """Fast weights and buffers after 0 … K steps."""
    fast = {name: p.clone() for name, p in _trainable(model)}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    yield fast, buffers
    for _ in range(STEPS):
        loss, _, buffers = _pass(entry, model, fast, buffers, support)
        gradients = torch.autograd.grad(
            loss, list(fast.values()), create_graph=second, allow_unused=True
        )
        fast = {
            name: tensor if gradient is None else tensor - RATE * gradient
            for (name, tensor), gradient in zip(fast.items(), gradients, strict=True)
        }
        yield fast, buffers


def _pass(
    entry: Entry, model: nn.Module, fast: Tensors, buffers: Tensors, batch: Batch
) -> tuple[Tensor, Any, Tensors]:
    """The loss and the output on a batch, and the buffers afterwards."""
    inputs, target = batch
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    args, kwargs = arguments(inputs)
    prediction = functional_call(model, fast | own, args, kwargs)
    return entry.loss(prediction, target), prediction, own


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
