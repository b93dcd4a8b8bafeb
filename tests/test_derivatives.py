"""Derivatives by either engine: the same numbers, and no graph that outlives its use."""

from types import SimpleNamespace

import pytest
import small_problems as problem
import torch

import metablocks as mb
from metablocks import derivatives
from metablocks.derivatives import gradient, vjp


def cube(x):
    return x**3, x.detach() + 1


def by_transform(function, *args):
    """The function inside a `vmap` of one row, where derivatives are `torch.func`'s."""
    rows = torch.func.vmap(function)(*(x[None] for x in args))
    return torch.utils._pytree.tree_map(lambda row: row[0], rows)


def plainly(function, *args):
    return function(*args)


engines = pytest.mark.parametrize("run", [plainly, by_transform])


@engines
def test_it_is_vjp_with_what_comes_beside(run, placed):
    def product(x):
        outputs, pull, aux = vjp(cube, x)
        return outputs, aux, *pull(torch.ones_like(outputs))

    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(run(product, x), (*cube(x), 3 * x**2))


@engines
def test_a_gradient_is_differentiable_where_that_is_asked(run, placed):
    def second(x):
        def slope(x):
            grads, _, _ = gradient(
                lambda point: ((point["x"] ** 3).sum(), ()), {"x": x}, differentiable=True
            )
            return grads["x"].sum(), ()

        outputs, pull, _ = vjp(slope, x)
        return outputs, *pull(torch.ones_like(outputs))

    torch.testing.assert_close(
        run(second, torch.tensor([2.0])), (torch.tensor(12.0), torch.tensor([12.0]))
    )


@engines
def test_a_gradient_that_is_not_differentiable_is_a_constant(run, placed):
    def slope(x):
        grads, value, _ = gradient(
            lambda point: ((point["x"] ** 3).sum(), ()), {"x": x}, differentiable=False
        )
        assert not grads["x"].requires_grad
        assert not value.requires_grad
        return grads["x"]

    torch.testing.assert_close(run(slope, torch.tensor([2.0])), torch.tensor([12.0]))


def test_by_plain_autograd_no_dependence_is_none_and_the_graph_is_gone_after_one_pull(placed):
    _, pull, _ = vjp(lambda x, y: (x**3, ()), torch.tensor(2.0), torch.tensor(1.0))
    slope, nothing = pull(torch.tensor(1.0))
    assert nothing is None
    assert slope.grad_fn is None
    with pytest.raises(RuntimeError, match="second time"):
        pull(torch.tensor(1.0))


@engines
def test_products_add_up_in_totals(run, placed):
    def sums(x):
        totals = {}
        for _ in range(2):
            outputs, pull, _ = vjp(lambda named, y: (named["x"] * y, ()), {"x": x}, x + 1)
            (other,) = pull(torch.ones_like(outputs), totals)
        return totals["x"], other

    x = torch.tensor([3.0])
    torch.testing.assert_close(run(sums, x), (2 * (x + 1), x))


def test_a_user_may_differentiate_adapt_by_either_way(placed):
    """`torch.func.grad` and `torch.autograd.grad` of the last fast weights give one derivative."""
    rule = mb.LearningRate(0.25).setup({"w": torch.zeros(1)}, steps=2)

    def end(w):
        path = mb.adapt(lambda p, _: (p["w"] ** 3).sum(), {"w": w}, (), rule=rule, steps=2)
        return path.params[-1]["w"].sum()

    w = torch.tensor([0.5])
    leaf = w.clone().requires_grad_()
    (plain,) = torch.autograd.grad(end(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(end)(w), plain)


@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Adjoint()], ids=repr)
def test_a_meta_gradient_makes_no_graph_of_itself(estimator, place, monkeypatch):
    """The last derivative of all is taken with no graph of its own: at most two orders are recorded."""
    made = []
    engine = derivatives._engine

    def watched(heads, seeds, keep_graph, create_graph, *rest):
        made.append(create_graph)
        return engine.run_backward(heads, seeds, keep_graph, create_graph, *rest)

    small = problem.classification(**place)
    learner = small.learner(estimator=estimator, steps=3)
    learner.meta_gradient(small.tasks)  # whether all is connected is asked once
    monkeypatch.setattr(derivatives, "_engine", SimpleNamespace(run_backward=watched))
    learner.meta_gradient(small.tasks)
    tasks = len(small.tasks)
    assert made.count(True) == 3 * tasks, made
