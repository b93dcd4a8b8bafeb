"""`adapt` is its hand-written loop, under every transform."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import metablocks as mb

RATE, STEPS = 0.3, 3


def loss_fn(params, batch):
    inputs, target = batch
    predicted = torch.tanh(inputs @ params["w"] + params["b"])
    return (predicted - target).square().mean() + params["w"].sin().sum() * params["b"].sum()


def by_adapt(w, b, inputs, target):
    params = {"w": w, "b": b}
    rule = mb.LearningRate(RATE).setup(params, steps=STEPS)
    batch = (inputs, target)
    adapted = mb.adapt(loss_fn, params, batch, rule=rule, steps=STEPS).params[-1]
    return loss_fn(adapted, (inputs.flip(0), target))


def by_hand(w, b, inputs, target):
    params = {"w": w, "b": b}
    for _ in range(STEPS):
        slopes = grad(loss_fn)(params, (inputs, target))
        params = {name: value - RATE * slopes[name] for name, value in params.items()}
    return loss_fn(params, (inputs.flip(0), target))


def autograd(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


TRANSFORMS = {
    "none": lambda f, w, b, x, y: f(w, b, x, y),
    "autograd": lambda f, w, b, x, y: autograd(lambda w, b: f(w, b, x, y), w, b),
    "grad": lambda f, w, b, x, y: grad(f, (0, 1))(w, b, x, y),
    "grad by the data": lambda f, w, b, x, y: grad(f, 2)(w, b, x, y),
    "autograd of grad by the data": lambda f, w, b, x, y: autograd(
        lambda w, b: grad(f, 2)(w, b, x, y), w, b
    ),
    "vmap of grad": lambda f, w, b, x, y: vmap(grad(f, (0, 1)), (None, None, 0, None))(
        w, b, torch.stack([x, x + 1]), y
    ),
    "grad of vmap": lambda f, w, b, x, y: grad(
        lambda w, b: vmap(f, (None, None, 0, None))(w, b, torch.stack([x, x + 1]), y).sum(), (0, 1)
    )(w, b),
    "autograd of vmap": lambda f, w, b, x, y: autograd(
        lambda w, b: vmap(f, (None, None, 0, None))(w, b, torch.stack([x, x + 1]), y), w, b
    ),
    "jvp": lambda f, w, b, x, y: jvp(lambda w: f(w, b, x, y), (w,), (w + 1,)),
    "jvp of grad": lambda f, w, b, x, y: jvp(lambda w: grad(f)(w, b, x, y), (w,), (w + 1,)),
    "grad of jvp": lambda f, w, b, x, y: grad(
        lambda w: jvp(lambda b: f(w, b, x, y), (b,), (b + 1,))[1]
    )(w),
    "jacfwd": lambda f, w, b, x, y: jacfwd(f, (0, 1))(w, b, x, y),
    "jacrev of jacrev": lambda f, w, b, x, y: jacrev(jacrev(f))(w, b, x, y),
    "hessian": lambda f, w, b, x, y: hessian(f)(w, b, x, y),
    "parameters that hang together": lambda f, w, b, x, y: grad(lambda w: f(w, w[0] * 2, x, y))(w),
}


# PyTorch's forward mode compiles its own decompositions by torch.jit at first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_adapt_is_its_hand_written_loop(transform, device, dtype, within):
    place = {
        "dtype": dtype,
        "device": "cpu" if device.type == "pretend" else device,
    }  # no dual numbers
    w, b, inputs, target = (torch.randn(n, **place) for n in ((3, 2), (2,), (4, 3), (4, 2)))
    got, due = (transform(f, w, b, inputs, target) for f in (by_adapt, by_hand))
    torch.testing.assert_close(got, due, rtol=within(1e-11), atol=within(1e-13))


def test_no_steps_leave_the_parameters_and_no_losses(placed):
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    batch = torch.ones(4, 3), torch.ones(4, 2)
    result = mb.adapt(loss_fn, params, batch, rule=mb.LearningRate(RATE).setup(params, 0), steps=0)
    assert len(result.params) == 1
    assert result.params[0]["w"] is params["w"]
    assert result.losses.shape == (0,)
    assert result.losses.dtype == params["w"].dtype
    assert result.losses.device == params["w"].device


RULES = {
    "rates of each step": lambda: mb.lslr(RATE),
    "Adam": lambda: mb.Chain(mb.Adam(), mb.lslr(RATE)),
    "momentum": lambda: mb.Chain(mb.Momentum(0.9), mb.LearningRate(RATE, learn=True)),
    "MT-net's masks, drawn once": lambda: mb.Chain(mb.MTMask(), mb.LearningRate(RATE)),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_two_calls_are_one_derivatives_and_states_included(make):
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 2).double(), "b": torch.randn(2).double()}
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    rule = make().setup(params, steps=5).double()
    leaves = [*params.values(), *(p for p in rule.parameters() if p.requires_grad)]

    def slopes(adapted):
        return torch.autograd.grad(loss_fn(adapted, batch), leaves, allow_unused=True)

    torch.manual_seed(1)
    once = mb.adapt(loss_fn, params, batch, rule=rule, steps=5)
    torch.manual_seed(1)
    first = mb.adapt(loss_fn, params, batch, rule=rule, steps=2)
    rest = mb.adapt(loss_fn, first.params[-1], batch, rule=rule, steps=3, state=first.state)
    assert rest.state.steps == once.state.steps == 5
    torch.testing.assert_close(rest.params, once.params[2:], rtol=0, atol=0)
    torch.testing.assert_close(slopes(rest.params[-1]), slopes(once.params[-1]), rtol=1e-12, atol=0)
