"""The contenders: each turns a problem into a function that computes its whole meta-gradient.

Ours are built from the line-up's words. Any other has the name under which the line-up lists it,
imports its library when it is built, and uses it as its own documentation does. The loops free a task's
graph before the next task begins.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from tools.benchmarks.lineup import Contender
from tools.benchmarks.problem import Problem

Gradients: TypeAlias = dict[str, Tensor]
Run: TypeAlias = Callable[[], Gradients]


def make(contender: Contender, problem: Problem) -> Run:
    """The contender's function for this problem."""
    if contender.role == "ours":
        return metablocks(contender, problem)
    run: Run = globals()[contender.name](problem)
    return run


def plain_loop(problem: Problem) -> Run:
    """Written by hand: `torch.autograd.grad` with `create_graph`, one task after another."""
    model, loss, rate = problem.model, problem.loss, problem.case.rate
    initial = problem.trainable

    def task(support: Tensor, target: Tensor, query: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
        fast = initial
        for _ in range(problem.case.steps):
            value = loss(functional_call(model, fast, (support,)), target)
            grads = torch.autograd.grad(
                value, list(fast.values()), create_graph=problem.case.second_order
            )
            fast = {n: p - rate * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        value = loss(functional_call(model, fast, (query,)), truth)
        return torch.autograd.grad(value, list(initial.values()))

    return lambda: _mean(problem, task)


def plain_vmap(problem: Problem) -> Run:
    """Written by hand: `torch.func.vmap` over the tasks of `torch.func.grad` of the inner loop."""
    model, loss, rate = problem.model, problem.loss, problem.case.rate
    initial = {name: p.detach() for name, p in problem.trainable.items()}

    def mistake(params: Gradients, inputs: Tensor, target: Tensor) -> Tensor:
        return loss(functional_call(model, params, (inputs,)), target)

    def adapted(params: Gradients, *task: Tensor) -> Tensor:
        support, target, query, truth = task
        for _ in range(problem.case.steps):
            grads = torch.func.grad(mistake)(params, support, target)
            if not problem.case.second_order:
                grads = {name: g.detach() for name, g in grads.items()}
            params = {name: p - rate * grads[name] for name, p in params.items()}
        return mistake(params, query, truth)

    def run() -> Gradients:
        each = torch.func.vmap(torch.func.grad(adapted), in_dims=(None, 0, 0, 0, 0))
        grads = each(initial, *problem.tasks.support, *problem.tasks.query)
        return {name: g.mean(0) for name, g in grads.items()}

    return run


def higher(problem: Problem) -> Run:
    """`higher.innerloop_ctx`, a task at a time; first order without tracking higher gradients."""
    import higher as library

    model, loss = problem.model, problem.loss
    optimizer = torch.optim.SGD(problem.trainable.values(), lr=problem.case.rate)

    def task(support: Tensor, target: Tensor, query: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
        with library.innerloop_ctx(
            model,
            optimizer,
            copy_initial_weights=False,
            track_higher_grads=problem.case.second_order,
        ) as (fast, inner):
            for _ in range(problem.case.steps):
                inner.step(loss(fast(support), target))
            value = loss(fast(query), truth)
            wanted = (model if problem.case.second_order else fast).parameters()
            return torch.autograd.grad(value, [p for p in wanted if p.requires_grad])

    return lambda: _mean(problem, task)


def torchopt(problem: Problem) -> Run:
    """TorchOpt's `MetaSGD`, the network put back after each task; first order by its functional SGD.

    (`MetaSGD` builds the graph of the gradient in every step, which first order has no use for.)
    """
    import torchopt as library

    model, loss = problem.model, problem.loss
    initial = problem.trainable

    def first_order(
        support: Tensor, target: Tensor, query: Tensor, truth: Tensor
    ) -> tuple[Tensor, ...]:
        fast = initial
        state = sgd.init(fast)
        for _ in range(problem.case.steps):
            value = loss(functional_call(model, fast, (support,)), target)
            grads = torch.autograd.grad(value, list(fast.values()))
            updates, state = sgd.update(dict(zip(fast, grads, strict=True)), state, inplace=False)
            fast = library.apply_updates(fast, updates, inplace=False)
        value = loss(functional_call(model, fast, (query,)), truth)
        return torch.autograd.grad(value, list(initial.values()))

    def second_order() -> Gradients:
        network = library.extract_state_dict(model, by="reference", detach_buffers=True)
        optimizer = library.extract_state_dict(inner, by="reference")

        def task(
            support: Tensor, target: Tensor, query: Tensor, truth: Tensor
        ) -> tuple[Tensor, ...]:
            for _ in range(problem.case.steps):
                inner.step(loss(model(support), target))
            value = loss(model(query), truth)
            grads = torch.autograd.grad(value, list(initial.values()))
            library.recover_state_dict(model, network)
            library.recover_state_dict(inner, optimizer)
            return grads

        return _mean(problem, task)

    if problem.case.second_order:
        inner = library.MetaSGD(model, lr=problem.case.rate)
        return second_order
    sgd = library.sgd(lr=problem.case.rate)
    return lambda: _mean(problem, first_order)


def fine_tuning(problem: Problem) -> Run:
    """One step of SGD on the first task's support set, of what adapts; no meta-gradient.

    Its rate is 0, which costs the same and leaves the model as it was for the next run.
    """
    model, trainable = problem.model, problem.trainable
    support, target, _, _ = next(iter(problem))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.0)

    def run() -> Gradients:
        problem.loss(model(support), target).backward()
        optimizer.step()
        grads = {name: p.grad for name, p in trainable.items()}
        optimizer.zero_grad()
        return grads

    return run


def metablocks(contender: Contender, problem: Problem) -> Run:
    """A `MetaLearner` with the estimator and the executor of the line-up's entry."""
    import metablocks as mb

    settings: dict[str, Any] = {"compile": contender.compile}
    if contender.chunk is not None:
        settings["chunk"] = contender.chunk
    if contender.wide:
        layout = "query" if problem.case.second_order else True  # as README advises
        workers = 1 if contender.processes else torch.get_num_threads()
        settings |= {"workers": workers, "channels_last": layout}
    device = next(problem.model.parameters()).device.type
    learner = mb.MetaLearner(
        problem.model,
        loss=problem.loss,
        steps=problem.case.steps,
        rule=mb.LearningRate(problem.case.rate),
        order=mb.SecondOrder() if problem.case.second_order else mb.FirstOrder(),
        estimator=getattr(mb, contender.estimator)(),
        executor=getattr(mb, contender.executor)(**settings),
    )

    def run(tasks: Any = None) -> Gradients:
        tasks = problem.tasks if tasks is None else tasks
        with torch.autocast(device, torch.bfloat16, enabled=contender.bfloat16):
            grads = learner.meta_gradient(tasks).grads
        return {name.removeprefix("model."): g for name, g in grads.items()}

    if not contender.processes:
        return run
    learner.executor = mb.Distributed(learner.executor)
    return _in_processes(learner.executor.part, run, problem)


def _in_processes(
    part: Callable[[range], range], run: Callable[[Any], Any], problem: Problem
) -> Run:
    """`run` on a part of the tasks in each of as many processes as torch has threads, of one thread.

    They are forked from this one, repeat what it does, and end with it.
    """
    count, place = torch.get_num_threads(), f"file://{tempfile.mkdtemp()}/meet"
    if dist.is_initialized():  # those of the problem before end here
        dist.destroy_process_group()
    rank = next((rank for rank in range(1, count) if not os.fork()), 0)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
    indices = part(range(len(problem.tasks)))
    own = problem.tasks[indices.start : indices.stop] if indices else []

    def alone() -> Gradients:
        torch.set_num_threads(1)
        try:
            return run(own)
        finally:
            torch.set_num_threads(count)

    if rank:
        try:
            while True:
                alone()
        finally:
            os._exit(0)
    return alone


def _mean(problem: Problem, gradient: Callable[..., tuple[Tensor, ...]]) -> Gradients:
    """The mean over tasks of a gradient by what adapts; one task's graph is freed before the next."""
    total: Any = 0
    for task in problem:
        grads = gradient(*task)
        total = [have + more for have, more in zip(total, grads, strict=True)] if total else grads
    return {n: t / len(problem.tasks) for n, t in zip(problem.trainable, total, strict=True)}
