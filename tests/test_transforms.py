"""Derivatives that leave no graph behind."""

import pytest
import torch
from metablocks.transforms import vjp_once

import metablocks as mb
from metablocks.laws import problem


def cube(x):
    return x**3, x.detach() + 1


def test_it_is_vjp_with_what_comes_beside(placed):
    x = torch.tensor([1.0, 2.0])
    outputs, pull, aux = vjp_once(cube, x)
    torch.testing.assert_close((outputs, aux), cube(x))
    torch.testing.assert_close(pull(torch.ones(2)), (3 * x**2,))


def test_its_pull_is_differentiable_where_gradients_are_enabled(placed):
    def slope(x):
        value, pull, _ = vjp_once(cube, x)
        return pull(torch.ones_like(value))[0]

    torch.testing.assert_close(torch.func.grad(slope)(torch.tensor(2.0)), torch.tensor(12.0))


def test_without_gradients_the_graph_is_gone_after_one_pull(placed):
    _, pull, _ = vjp_once(cube, torch.tensor(2.0))
    with torch.no_grad():
        (slope,) = pull(torch.tensor(1.0))
        assert slope.grad_fn is None
        with pytest.raises(RuntimeError, match="second time"):
            pull(torch.tensor(1.0))


@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Adjoint()], ids=repr)
def test_a_meta_gradient_makes_no_graph_of_itself(estimator, place, monkeypatch):
    """The last derivative of all is taken with no graph of its own: at most two orders are recorded."""
    made = []
    grad = torch.autograd.grad

    def watched(*args, create_graph=False, **kwargs):
        made.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    small = problem.classification(**place)
    learner = small.learner(estimator=estimator, steps=3)
    learner.meta_gradient(small.tasks)  # whether all is connected is asked once
    monkeypatch.setattr(torch.autograd, "grad", watched)
    learner.meta_gradient(small.tasks)
    tasks = len(small.tasks)
    assert made.count(True) == 3 * tasks, made
