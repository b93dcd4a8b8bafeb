"""A learner's work on tasks, as executors take it: to estimate the meta-gradient, and to judge.

Both are functions of one task that may be driven in pieces instead, and compiled. `owner` tells one
learner's work from another's where their pieces are kept.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metablocks.batches import drawn_for
from metablocks.checks import name_of, wrong_answer
from metablocks.derivatives import detach_tree
from metablocks.estimators import Estimator
from metablocks.estimators.base import filled, is_cut, task_gradient
from metablocks.estimators.sweep import start, step
from metablocks.executors import Executor, TaskFunction, TaskWork
from metablocks.generators import drawn_seed
from metablocks.inner_loop import Carry, InnerLoop, QueryPass
from metablocks.pieces import At, InPieces, Pieces, weighed
from metablocks.reads import reading
from metablocks.types import Batch, Task, Tasks, Tensors, constant, map_tensors


def training_work(owner: object, estimator: Estimator, inner: InnerLoop, meta: Tensors) -> TaskWork:
    """Sums of gradients, buffer changes, metrics, losses; and `[tasks, steps + 1]`: losses, scores."""
    cut = is_cut(estimator)
    meta_gradient = estimator.in_pieces if cut else partial(Estimator.in_pieces, estimator)

    def estimate(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
        meta, tensors = shared
        weight = task.weight
        if weight is not None:
            task = replace(task, weight=None)
        result = task_gradient(estimator, inner.with_tensors(tensors), meta, buffers, task)
        totals = (filled(result.grads, meta), result.changes, result.metrics, result.loss)
        scores = () if result.scores is None else result.scores
        return weighed(totals, weight), (result.query_losses, scores)

    def drive(run: Pieces) -> tuple[Any, Any]:
        result = meta_gradient(run)
        totals = run.sum((result.changes, result.metrics, result.loss))
        scores = () if result.scores is None else result.scores
        return (filled(result.grads, meta), *totals), (result.query_losses, scores)

    def short() -> TaskWork:
        return training_work(owner, estimator, inner.shortened(), meta)

    pieces = InPieces(inner, meta, drive, short if cut else None)
    return _compilable(owner, estimator, estimate, pieces)


def evaluation_work(
    owner: object, inner: InnerLoop, meta: Tensors, check: Callable[[Tensor], None]
) -> TaskWork:
    """Query losses, predictions and scores before the first step and after each; nothing is summed.

    `check` is given a loss that requires a gradient, which one of constants does not.
    """

    def judge(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
        meta, tensors = shared
        support, query = map_tensors(constant, (task.support, task.query))
        loop = inner.with_tensors(tensors)
        return drive(Pieces(loop, meta, buffers, replace(task, support=support, query=query)))

    def drive(run: Pieces) -> tuple[Any, Any]:
        passes: list[QueryPass] = []
        reads = run.inner.start_reads
        (carry,) = run(("start",), start, (run.buffers,), data=reads)
        for index in range(inner.steps + 1):
            at = At(index)
            passed, prediction = run(("judge",), _judge, (carry,), at=at, data=("query",))
            passes.append(run.open(passed))
            if passes[-1].loss.requires_grad:
                check(passes[-1].loss)
            if index < inner.steps:
                (carry,) = run(("step", False), step, (carry,), at=at, data=("support",))
        losses = torch.stack([passed.loss.detach() for passed in passes], -1)
        scores = [passed.score for passed in passes if passed.score is not None]
        rows = torch.stack(scores, -1) if scores else ()
        return (), (losses, detach_tree(run.open(prediction)), rows)

    def short() -> TaskWork:
        return evaluation_work(owner, inner.shortened(), meta, check)

    return _compilable(owner, "evaluation", judge, InPieces(inner, meta, drive, short))


def execute(executor: Executor, work: TaskWork, buffers: Tensors, tasks: Tasks) -> tuple[Any, Any]:
    """The work on every task: what is summed, and what is stacked.

    Raises `BlockError` for an executor that answers with anything else.
    """
    assert work.pieces is not None
    answer: Any = executor(work, work.pieces.shared, buffers, tasks)
    if not isinstance(answer, tuple) or len(answer) != 2:
        takes = "a pair: the sum over tasks, and what is stacked"
        raise wrong_answer("executor", name_of(executor), answer, takes)
    return answer


@contextmanager
def seeded(tasks: Tasks, inner: InnerLoop, *, put_back: bool, first: int = 0) -> Iterator[Tasks]:
    """The tasks with what is drawn for each, seeded by one draw of torch's generator and its number.

    Tasks are counted from `first` on. The draw is made if the work, or a block before it, draws; with
    `put_back`, what is drawn here and in the block is put back.
    """
    draws, block = inner.draws, inner.training is None and inner.batches.draws
    if draws.known and not draws.kinds and not block:
        with draws.put_back() if put_back else nullcontext():
            yield tasks
        return
    begin = torch.get_rng_state()
    number = drawn_seed()
    after = torch.get_rng_state()
    idle = True  # which it is if the work fails, too
    try:
        with draws.put_back() if put_back else nullcontext():
            yield drawn_for(tasks, inner.batches if block else None, inner.steps, number, first)
        idle = put_back or not (block or draws.kinds)
    finally:
        if idle and torch.equal(torch.get_rng_state(), after):
            torch.set_rng_state(begin)


def _judge(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[QueryPass, Any]:
    passed = inner.look(meta, carry, batch, at.index)
    return passed._replace(prediction=None), passed.prediction


def _compilable(owner: object, kind: Hashable, call: TaskFunction, pieces: InPieces) -> TaskWork:
    """Work with its key, which tells it from work of another kind."""
    inner = pieces.inner

    def identify() -> Hashable:
        losses = inner.loss, inner.support_loss
        views = [inner.model, inner.rule, *(loss.view for loss in losses if loss.view is not None)]
        things: list[Any] = [loss.objective.loss for loss in losses if loss.view is None]
        things += [inner.metric, inner.batches, inner.starting, kind]
        read = reading(*things, known=[view.module for view in views])
        made = torch.get_default_dtype(), torch.get_default_device()  # of tensors made under way
        return owner, inner.training, *made, *(view.key for view in views), read

    return TaskWork(call, inner.draws, pieces, identify)
