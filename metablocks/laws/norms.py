"""Laws of norms: per-step surgery, and norm modules of one's own.

`norm(model, steps)` returns a copy of the model with other norms in the places of its batch norms, as
`per_step_batch_norm` does. `in_place_of_batch_norms` makes such surgery of a norm module.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metablocks.errors import LawError
from metablocks.functional import FunctionalModule
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, perturb
from metablocks.learner import MetaLearner
from metablocks.models.surgery import replace_modules

Norm: TypeAlias = Callable[[nn.Module, int], nn.Module]


def in_place_of_batch_norms(make: Callable[[int], nn.Module]) -> Norm:
    """Surgery that puts `make(channels)` in the place of every batch norm.

    >>> norm = in_place_of_batch_norms(lambda channels: nn.GroupNorm(1, channels))
    >>> type(norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 1)[1]).__name__
    'GroupNorm'
    """

    def convert(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _BatchNorm):
            return None
        made = make(module.num_features)
        return made.to(module.weight) if isinstance(module.weight, Tensor) else made

    return lambda model, steps: replace_modules(copy.deepcopy(model), convert)


def keeps_the_function(norm: Norm, problem: Problem) -> None:
    """In training, at every step, the new model is the old one; and the old one is as it was."""
    model = problem.model().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = norm(model, problem.steps).train()
    assert_close("keeps the function: the original stays", model.state_dict(), before, within=0)
    plain, fresh = FunctionalModule(model), FunctionalModule(new)
    inputs = problem.tasks[0].query[0]
    expected, _ = plain.apply(plain.state(), inputs)
    for step in range(problem.steps):
        got, _ = fresh.apply(fresh.state(), inputs, step=step)
        named = {"output": got.detach()}, {"output": expected.detach()}
        assert_close(f"keeps the function at step {step}", *named, 1e-12)


def is_not_aliased(norm: Norm, problem: Problem) -> None:
    """Statistics and parameters are the new model's own, and so is every row of them.

    Nothing shares memory with the original, and no two entries of a tensor are one number. What
    evaluation sees stays as it is, and training moves it by exactly the changes it reports.
    """
    original = problem.model()
    new = norm(original, problem.steps)
    theirs = {t.untyped_storage().data_ptr(): name for name, t in original.state_dict().items()}
    for name, tensor in new.state_dict().items():
        if tensor.untyped_storage().data_ptr() in theirs:
            raise LawError(
                f"not aliased: {name} shares its memory with "
                f"{theirs[tensor.untyped_storage().data_ptr()]} of the original; clone it"
            )
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise LawError(
                f"not aliased: rows of {name} share their memory; clone the expanded tensor"
            )
    learner = learner_of(norm, problem)
    kept = _tensors(learner)  # the tensors themselves: a write into them shows
    before = {name: t.detach().clone() for name, t in kept.items()}
    learner.evaluate(problem.tasks)
    assert_close("not aliased: evaluation leaves what is stored", kept, before, within=0)
    changes = learner.backward(problem.tasks).buffer_changes
    after = {name: t + changes[name] if name in changes else t for name, t in before.items()}
    assert_close("not aliased: training moves by its changes", _tensors(learner), after, within=0)


def has_a_row_for_each_step(norm: Norm, problem: Problem) -> None:
    """With unequal rows, each step has a function of its own: it reads its row, and no other."""
    steps = max(problem.steps, 2)
    new = perturb(norm(problem.model(), steps)).train()
    model, inputs = FunctionalModule(new), problem.tasks[0].query[0]
    rows = [p for p in new.parameters() if p.ndim == 2 and len(p) == steps]
    outputs: list[Tensor] = []
    for step in range(steps):
        output, _ = model.apply(model.state(), inputs, step=step)
        for earlier, other in enumerate(outputs):
            if torch.equal(output, other):
                raise LawError(
                    f"a row for each step: steps {earlier} and {step} have one function, though "
                    f"{len(rows)} parameters have {steps} unequal rows"
                )
        outputs.append(output)


def training_ignores_what_is_stored(norm: Norm, problem: Problem) -> None:
    """In training, support and query passes normalise by the batch: stored statistics do not count."""
    results = []
    for noise in (0.0, 1.0):
        learner = learner_of(norm, problem)
        for name, buffer in learner.named_buffers():
            if name.startswith("model.") and buffer.is_floating_point():
                buffer.add_(noise)
        results.append(learner.meta_gradient(problem.tasks).grads)
    assert_close("training ignores what is stored", results[1], results[0], within=0)


def learner_of(norm: Norm, problem: Problem, **blocks: Any) -> MetaLearner:
    """A learner of the new model, whose rows differ from step to step."""
    new = replace(problem, model=lambda: perturb(norm(problem.model(), problem.steps)))
    return new.learner(**blocks)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
