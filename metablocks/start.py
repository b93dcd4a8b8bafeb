"""Starts: the fast weights that a task begins with.

    θ_0 = start(θ, support, features)

θ are the parameters that adapt, as the learner holds them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from metablocks.checks import checked
from metablocks.errors import BlockError
from metablocks.selection import fits, select
from metablocks.types import Batch, Tensors

Features: TypeAlias = Callable[[str], Tensor]
"""`features(name)`: what enters module `name` over the support examples; derivatives flow through it."""


class Start:
    """The fast weights that a task begins with: by default those of the learner. Subclass it.

    Laws: a function of its arguments, which composes with `torch.func.vmap`, so that no control flow
    depends on numbers; its result has the names of `params`, and their shapes.

    >>> import torch
    >>> import metablocks as mb
    >>> class Halved(mb.Start):
    ...     def __call__(self, params, support, features):
    ...         return {name: tensor / 2 for name, tensor in params.items()}
    >>> Halved()({"w": torch.ones(2)}, None, None)
    {'w': tensor([0.5000, 0.5000])}
    """

    reads: ClassVar[bool] = False
    """True if it reads the support set, or what enters a module over it."""

    def __call__(self, params: Tensors, support: Batch, features: Features) -> Tensors:
        """θ_0, under the names of `params`, the parameters that adapt.

        `features(name)` is what enters that module over the support examples, in the mode and by the
        statistics of support passes, at inner step 0. It and `support` are there for a block that
        declares `reads`.
        """
        return params

    def replaced(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the parameters that adapt from other values than learned ones.

        They are not learned: nothing is to be gained from a gradient by what a task does not begin with.
        Raises `MetablocksError` for a model that it does not fit.
        """
        return ()

    def shaped(self, params: Tensors, support: Batch) -> Tensors:
        """The parameters in the shapes that a task asks for, where an executor takes tasks one by one."""
        return params


@checked()
@dataclass(frozen=True)
class AsLearned(Start):
    """MAML: every task begins with the learned parameters.

    Source: Finn, Abbeel, Levine 2017.

    >>> import metablocks as mb
    >>> params = {"w": [1.0, 1.0]}
    >>> mb.AsLearned()(params, None, None) is params
    True
    """


@dataclass(frozen=True)
class _Replacing(Start):
    """A start of what `pattern` selects, which is not learned."""

    pattern: str | Sequence[str]

    def replaced(self, model: nn.Module) -> tuple[str, ...]:
        return select(self.pattern, [name for name, _ in model.named_parameters()])


@checked()
@dataclass(frozen=True)
class Fixed(_Replacing):
    """Parameters that `pattern` selects begin with the values stored in the model, which are not learned.

    Other parameters are.

    - `pattern`: which parameters, patterns over their names, as those of `adapt`.

    >>> from torch import nn
    >>> import metablocks as mb
    >>> mb.Fixed("0.*").replaced(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    ('0.weight', '0.bias')

    Raises `SelectionError` for patterns that select nothing, `BlockError` for parameters that do not
    adapt.
    """


@checked()
@dataclass(frozen=True)
class Zeros(_Replacing):
    """Parameters that `pattern` selects begin at zero, whatever the model has stored; others are learned.

    Tensors keep their shapes. CAVIA is `Zeros("context")` with `adapt="context"`: context parameters
    alone adapt, and the others are learned.

    - `pattern`: which parameters, patterns over their names, as those of `adapt`.

    Source: Zintgraf et al. 2019.

    >>> from torch import nn
    >>> import metablocks as mb
    >>> mb.Zeros("bias").replaced(nn.Linear(2, 1))
    ('bias',)

    Raises `SelectionError` for patterns that select nothing, `BlockError` for parameters that do not
    adapt.
    """

    def __call__(self, params: Tensors, support: Batch, features: Features) -> Tensors:
        return {
            name: torch.zeros_like(tensor) if fits(self.pattern, name) else tensor
            for name, tensor in params.items()
        }


@dataclass(frozen=True)
class _Head(Start):
    """A start of a linear head, which has a row for each class."""

    reads: ClassVar[bool] = True
    head: str = "head"

    def replaced(self, model: nn.Module) -> tuple[str, ...]:
        block = type(self).__name__
        modules = dict(model.named_modules(remove_duplicate=False))
        linear = [name for name, module in modules.items() if type(module) is nn.Linear and name]
        module = modules.get(self.head)
        names = self._names
        if module is None:
            problem = f'the model has no module "{self.head}"'
        elif type(module) is not nn.Linear:
            problem = f"{self.head} is a {type(module).__name__}, not a plain nn.Linear"
        elif module.bias is None:
            problem = f"{self.head} has no bias"
        else:
            every = list(model.named_parameters(remove_duplicate=False))
            own = {id(module.weight), id(module.bias)}
            if len([name for name, p in every if id(p) in own]) == 2:
                return names
            problem = f"{self.head} is tied to another layer, or used under two names"
        known = f"; its linear layers are {', '.join(linear)}" if linear else ""
        raise BlockError(
            f"{block}(head={self.head!r}) takes a plain, untied nn.Linear with a bias, and {problem}"
            f"{known}",
            block="MetaLearner",
            field="start.head",
        )

    @property
    def _names(self) -> tuple[str, str]:
        return f"{self.head}.weight", f"{self.head}.bias"

    def shaped(self, params: Tensors, support: Batch) -> Tensors:
        """The parameters with as many rows in the head as the task has classes."""
        labels = support[1]
        if (
            not _are_labels(labels) or labels.ndim != 1
        ):  # of tokens, say, whose number is the model's
            return params
        classes = int(labels.max()) + 1
        weight, bias = (params[name] for name in self._names)
        if classes == len(bias):
            return params
        rows = weight.new_zeros(classes, weight.shape[1]), bias.new_zeros(classes)
        return params | dict(zip(self._names, rows, strict=True))


@checked()
@dataclass(frozen=True)
class ZeroHead(_Head):
    """The linear layer `head` begins at zero: neither the order of classes nor their number matters.

    - `head`: the name of the layer.

    Under `Loop`, not compiled, it has as many rows as the task has classes, the largest label of the
    support set `[examples]` + 1; elsewhere as many as the model's layer.

    Law: a permutation of the classes of a task permutes its predictions, under rules without rates of
    single parameters.

    Source: Ye, Chao 2021.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
    >>> mb.ZeroHead()(params, None, None)["head.bias"]
    tensor([0., 0.])

    Raises `BlockError` for a head that is not a plain, untied `nn.Linear` with a bias, or does not adapt.
    """

    def __call__(self, params: Tensors, support: Batch, features: Features) -> Tensors:
        return params | {name: torch.zeros_like(params[name]) for name in self._names}


@checked()
@dataclass(frozen=True)
class Prototypes(_Head):
    """Proto-MAML: the linear layer `head` begins as the prototypical net of the support set.

        w_c = 2 μ_c,    b_c = −‖μ_c‖²,    μ_c the mean of the features of class c

    - `head`: the name of the layer.

    The gradient flows through μ. A class without support examples begins at 0. Features are what enters
    the layer, `[examples, ..., features]`; the head has as many rows as with `ZeroHead`.

    Laws: with 0 steps it is the prototypical net, whose scores are −‖f − μ_c‖² + ‖f‖²; a permutation of
    the classes of a task permutes its predictions, under rules without rates of single parameters.

    Source: Triantafillou et al. 2020; Snell, Swersky, Zemel 2017.

    >>> import torch
    >>> import metablocks as mb
    >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> params = {"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}
    >>> support = None, torch.tensor([0, 0, 1])
    >>> mb.Prototypes()(params, support, lambda name: features)["head.weight"]
    tensor([[4., 0.],
            [0., 2.]])

    Raises `BlockError` for a head that is not a plain, untied `nn.Linear` with a bias, or does not adapt,
    and for targets that are not class labels, one for each row of features.
    """

    def __call__(self, params: Tensors, support: Batch, features: Features) -> Tensors:
        labels, rows = support[1], features(self.head)
        if not _are_labels(labels) or rows.ndim < 2 or labels.shape != rows.shape[:-1]:
            given = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            kind = labels.dtype if isinstance(labels, Tensor) else ""
            raise BlockError(
                "Prototypes takes class labels [examples, ...] and features [examples, ..., features]; "
                f"the support set has targets {given} {kind}, and what enters {self.head} is "
                f"{list(rows.shape)}",
                block="MetaLearner",
                field="start",
            )
        labels, rows = labels.flatten(), rows.flatten(0, -2)
        weight, bias = (params[name] for name in self._names)
        classes = torch.arange(len(bias), device=labels.device)
        member = (labels == classes[:, None]).to(rows.dtype)
        means = member @ rows / member.sum(1, keepdim=True).clamp(min=1)
        own = (2 * means).to(weight.dtype), -means.square().sum(1).to(bias.dtype)
        return params | dict(zip(self._names, own, strict=True))


def _are_labels(target: object) -> bool:
    """True for whole numbers, as class labels are."""
    return (
        isinstance(target, Tensor)
        and not target.is_floating_point()
        and not target.is_complex()
        and target.dtype != torch.bool
    )
