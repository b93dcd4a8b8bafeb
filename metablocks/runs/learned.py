"""Rates and spectra: the inner rates and the transforms that the outer loop has learned.

A run logs the rates of every epoch (`metrics.jsonl`), and of the best checkpoint the spectra
(`test.npz`); `metablocks report` draws both.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metablocks.learner import MetaLearner
from metablocks.rules import KFO, LearningRate, MetaCurvature, NamedTensors
from metablocks.rules.base import members
from metablocks.step_loss import step_weights
from metablocks.types import Progress

LARGEST = 2048
"""Rows of the largest factor of which a spectrum is computed: a second or two."""
_FACTOR = re.compile(r"((?:hidden\d+\.(?:on|off)\.)?\w+?)\.(.+)")


def learned(learner: MetaLearner, epoch: int) -> dict[str, Any]:
    """Step-loss weights in force in an epoch, counted from 0, and the learned inner rates after it.

    `rates` are by name, each a list over inner steps (of one, if all steps share it): the mean over
    the entries of a tensor of rates, and in `negative_rates` the share of entries below 0, of those
    that have any.

    >>> from metablocks.rules import lslr
    >>> model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> learned(MetaLearner(model, loss=loss, steps=2, rule=lslr(0.1)), 0)["rates"]
    {'weight': [0.1, 0.1], 'bias': [0.1, 0.1]}
    """
    weights = step_weights(learner.step_loss, learner.steps, Progress(epoch))
    row: dict[str, Any] = {"step_loss": list(map(_short, weights))}
    rates, negative = dict[str, list[float]](), dict[str, list[float]]()
    for name, rate in _rates(learner):
        steps = rate.reshape(len(rate), -1).double()
        rates[name] = list(map(_short, steps.mean(1).tolist()))
        if (steps < 0).any():
            negative[name] = list(map(_short, (steps < 0).double().mean(1).tolist()))
    learned_rates = {"rates": rates, "negative_rates": negative}
    return row | {name: values for name, values in learned_rates.items() if values}


def spectra(learner: MetaLearner) -> dict[str, dict[str, Tensor]]:
    """Singular values, the largest first, of the factors of KFO and Meta-Curvature: side, then name.

    1 is a direction of the gradient that the factor leaves as it is. Those of a vector of factors are
    their absolute values. Biases are left out, and factors of more than `LARGEST` rows.

    >>> from metablocks.rules import Chain
    >>> model, loss = torch.nn.Linear(2, 1), torch.nn.functional.mse_loss
    >>> rule = Chain(MetaCurvature(), LearningRate(0.1))
    >>> spectra(MetaLearner(model, loss=loss, steps=1, rule=rule))["in"]["weight"]
    tensor([1., 1.])
    """
    values: dict[str, dict[str, Tensor]] = {}
    for rule in members(learner.rule):
        if isinstance(rule, KFO | MetaCurvature) and rule.factors is not None:
            squared = isinstance(rule, KFO) and rule.psd
            for key, factor in rule.factors.named_parameters():
                matched = _FACTOR.fullmatch(key)
                assert matched is not None
                side, name = matched.groups()
                if not side.endswith("bias") and max(factor.shape, default=1) <= LARGEST:
                    values.setdefault(side, {})[name] = _spectrum(factor.detach().cpu(), squared)
    return values


def _spectrum(factor: Tensor, squared: bool) -> Tensor:
    if factor.ndim == 2:
        values: Tensor = torch.linalg.svdvals(factor)
    else:
        values = factor.abs().flatten().sort(descending=True).values
    return values.square() if squared else values


def _rates(learner: MetaLearner) -> Iterator[tuple[str, Tensor]]:
    """Learned rates `[steps, ...]` by what they serve, with the number of their rule if there are two.

    Those of any rule that keeps them as `rate`, as `LearningRate` does and `UpdateRule` shows.
    """
    kept = [(rule, getattr(rule, "rate", None)) for rule in members(learner.rule)]
    rates = [(r, t) for r, t in kept if isinstance(t, NamedTensors) and [*t.parameters()]]
    for number, (rule, tensors) in enumerate(rates, 1):
        for name, rate in tensors.named_parameters():
            suffix = f" ({number})" if len(rates) > 1 else ""
            steps = isinstance(rule, LearningRate) and rule.per_step
            yield name + suffix, rate.detach() if steps else rate.detach().unsqueeze(0)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
