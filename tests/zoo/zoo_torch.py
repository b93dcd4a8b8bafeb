"""Habits of PyTorch code: reparametrised weights, own functions, state in attributes, generators."""

import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from zoo_entry import CLASSES, NO_SAVED_TENSOR_HOOKS, Entry, images, normal, vectors

POWER = "the power iteration writes through out="


class Reversal(torch.autograd.Function):
    """Gradient reversal, in the form without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversarial(nn.Module):
    """A head that learns against its features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Reversal.apply(self.body(x).tanh()))


class Pinn(nn.Module):
    """u + ∂u/∂x: a net that differentiates itself by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope[:, :CLASSES]


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return self.head(checkpoint(self.block, x, use_reentrant=False))
        return self.head(self.block(x))


class Spectral(nn.Module):
    """A Fourier layer: its weight is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x)) * self.weight
        return self.project(torch.fft.irfft(spectrum, n=6).tanh())


class Remembers(nn.Module):
    """Keeps its last activation, and has run once."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.features: Tensor | None = None
        self.history: list[float] = []
        self(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x).tanh()
        self.history.append(1.0)
        return self.head(self.features)


class OwnGenerator(nn.Module):
    """Noise from a generator that the module brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return self.net(x)


class PythonDraws(nn.Module):
    """Draws of Python's `random` and of NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * random.random() + np.random.rand()
        return self.head(self.body(x).tanh())


class Experts(nn.Module):
    """One expert for a whole batch, chosen by what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, CLASSES) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0] > 0)](self.body(x).tanh())


class Lambda(nn.Module):
    """An autoencoder whose decoder is a lambda over `self`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, CLASSES)
        self.decode = lambda code: F.linear(code, self.encoder.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x).tanh())


class Distances(nn.Module):
    """Classes by distance from learned prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.prototypes = nn.Linear(4, 5), nn.Parameter(torch.randn(CLASSES, 5))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.body(x).tanh(), self.prototypes)


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ELU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LayerNorm(100),
        nn.Linear(100, CLASSES),
        nn.BatchNorm1d(CLASSES, momentum=None),
    )


def _normed(norm: Any) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, CLASSES))


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    prune.random_structured(model[2], "weight", amount=1, dim=1)
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[1].register_forward_hook(lambda module, args, output: output * model[0].bias)
    return model


def _by_domain(n: int, task: int) -> tuple[Tensor, Tensor]:
    """Batches that choose the expert of the task's number."""
    x = normal(n, 4)
    x[0, 0] = task - 0.5
    return x, normal(n, CLASSES)


def _reconstructed(n: int, _: int) -> tuple[Tensor, Tensor]:
    x = normal(n, 4)
    return x, x


def _old(norm: Any) -> Any:
    """A norm by hooks, without the warning that it is deprecated."""

    def quiet(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return quiet


def _regression(name: str, kind: str, make: Any, **settings: Any) -> Entry:
    batch = settings.pop("batch", vectors(4))
    return Entry(name=name, kind=kind, make=make, batch=batch, loss=F.mse_loss, **settings)


ENTRIES = [
    Entry(
        name="norms",
        kind="batch, instance, group and layer norm; an activation in place; momentum=None",
        make=_norms,
        batch=images(5),
    ),
    _regression(
        "spectral_norm",
        "a parametrization with buffers that every pass in train() moves",
        lambda: _normed(parametrizations.spectral_norm),
        no_vmap=POWER,
    ),
    _regression(
        "spectral_norm_hook",
        "the old spectral norm: a hook that writes buffers, and the weight as an attribute",
        lambda: _normed(nn.utils.spectral_norm),
        no_vmap=POWER,
    ),
    _regression(
        "weight_norm",
        "a parametrization of two tensors",
        lambda: _normed(parametrizations.weight_norm),
    ),
    _regression(
        "weight_norm_hook",
        "the old weight norm: the weight is an attribute with a graph, copy.deepcopy refuses it",
        lambda: _normed(_old(nn.utils.weight_norm)),
    ),
    _regression("prune", "masks as buffers, the weight as an attribute made by a hook", _pruned),
    _regression(
        "pinn",
        "takes derivatives by its input inside forward",
        Pinn,
        no_vmap="requires_grad_() within a transform",
    ),
    _regression(
        "checkpoint",
        "torch.utils.checkpoint(use_reentrant=False)",
        lambda: Checkpointed(True),
        plain=lambda: Checkpointed(False),
        no_vmap=NO_SAVED_TENSOR_HOOKS,
    ),
    _regression(
        "autograd.Function",
        "an own function without setup_context",
        Adversarial,
        no_vmap="torch.func.grad needs setup_context",
    ),
    _regression("complex_weight", "a complex parameter, real loss", Spectral),
    _regression("kept_activation", "stores its activation and a list in attributes", Remembers),
    _regression("own_generator", "a torch.Generator of its own", OwnGenerator, random=True),
    _regression("python_draws", "draws of Python's random and of NumPy", PythonDraws, random=True),
    _regression(
        "experts",
        "each task uses another part of the model",
        Experts,
        batch=_by_domain,
        no_vmap="looks into the data for where to go",
    ),
    _regression(
        "lambda", "a lambda of __init__ that closes over self", Lambda, batch=_reconstructed
    ),
    _regression("hook", "a forward hook that reads a parameter of another module", _hooked),
    Entry(
        name="cdist",
        kind="no second derivative, and no module of torch's to blame",
        make=Distances,
        no_second="Distances",
        batch=lambda n, _: (normal(n, 4), torch.randint(0, CLASSES, (n,))),
    ),
]
