"""The functional wrapper: a pure function of its state, whatever the module does inside."""

import copy
import threading

import pytest
import torch
from torch import nn

from metablocks import FunctionalModule, ModuleState, StepAware
from metablocks.errors import ModuleError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Counter(nn.Module):
    """Writes its buffers in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean(0)
        return x * self.weight


class PerStep(StepAware):
    """Step-aware: adds the bias of the current inner step."""

    def __init__(self, steps=3):
        super().__init__()
        self.bias = nn.Parameter(torch.arange(float(steps)))

    def forward(self, x):
        return x + self.bias[self.inner_step]


class Nested(nn.Module):
    """Calls a functional module of its own class inside its forward pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.again = None

    def forward(self, x, depth=0):
        if depth == 0:
            return x * self.weight
        inner, _ = self.again(ModuleState({"weight": self.weight + 1}, {}), x, depth - 1)
        return inner * self.weight


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), (torch.randn(5, 3),)),
        (nn.LSTM(3, 4, batch_first=True), (torch.randn(5, 2, 3),)),
        (nn.Bilinear(3, 2, 4), (torch.randn(5, 3), torch.randn(5, 2))),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (torch.randn(5, 3),)),
        (Tied(), (torch.randn(5, 3),)),
    ],
    ids=["batch_norm", "lstm", "two inputs", "parametrized", "tied"],
)
def test_it_computes_what_the_module_computes(module, args):
    fmodule = FunctionalModule(module)
    got, _ = fmodule(fmodule.state(), *args)
    torch.testing.assert_close(got, copy.deepcopy(module)(*args))


def test_new_buffers_come_back_and_nothing_else_moves():
    module = Counter()
    fmodule = FunctionalModule(module)
    state = fmodule.state()
    x = torch.tensor([[1.0, 3.0]])
    _, once = fmodule(state, x)
    _, twice = fmodule(once, x)
    assert [float(s.buffers["calls"]) for s in (state, once, twice)] == [0, 1, 2]
    assert twice.buffers["last"].tolist() == [1, 3]
    assert module.calls == 0
    assert module.last.tolist() == [0, 0]


def test_running_statistics_come_back_as_the_module_would_have_written_them():
    module, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    fmodule = FunctionalModule(module)
    _, state = fmodule(fmodule.state(), x)
    written = copy.deepcopy(module)
    written(x)
    torch.testing.assert_close(state.buffers, dict(written.named_buffers()))
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_a_norm_that_tracks_leaves_its_statistics_in_the_new_state_at_every_call(norm):
    """Its kernel writes running statistics, though its schema says that it writes nothing."""
    fmodule, by_hand = FunctionalModule(norm), copy.deepcopy(norm)
    state = fmodule.state()
    for _ in range(3):
        x, before = torch.randn(5, 3, 4), {name: b.clone() for name, b in state.buffers.items()}
        _, after = fmodule(state, x)
        assert all(torch.equal(b, before[name]) for name, b in state.buffers.items())
        by_hand(x)
        torch.testing.assert_close(after.buffers, dict(by_hand.named_buffers()))
        state = after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_batch_statistics_are_used_in_training_and_evaluation_alike(norm, training):
    x = torch.randn(6, 3, 4)
    fmodule = FunctionalModule(norm.train(training), norm_statistics="batch")
    assert not fmodule.state().buffers
    got, _ = fmodule(fmodule.state(), x)
    torch.testing.assert_close(got, copy.deepcopy(norm).train()(x))


def test_it_follows_the_training_flags_of_the_module():
    module = nn.Dropout(0.5)
    fmodule = FunctionalModule(module)
    module.eval()
    assert torch.equal(fmodule(fmodule.state(), torch.ones(99))[0], torch.ones(99))
    module.train()
    assert not torch.equal(fmodule(fmodule.state(), torch.ones(99))[0], torch.ones(99))
    output, _ = fmodule.apply(fmodule.state(), torch.ones(99), training=False)
    assert torch.equal(output, torch.ones(99))


def test_autograd_reaches_the_module_through_its_state():
    module = nn.Linear(3, 1)
    fmodule = FunctionalModule(module)
    fmodule(fmodule.state(), torch.ones(2, 3))[0].sum().backward()
    assert module.weight.grad.tolist() == [[2, 2, 2]]


def test_a_tied_tensor_stands_once_and_serves_all_its_names():
    fmodule = FunctionalModule(Tied())
    assert list(fmodule.state().params) == ["encoder.weight"]
    doubled = ModuleState({"encoder.weight": 2 * torch.eye(3)}, {})
    assert torch.equal(fmodule(doubled, torch.eye(3))[0], 4 * torch.eye(3))


def test_step_aware_modules_see_the_inner_step():
    fmodule = FunctionalModule(nn.Sequential(nn.Identity(), PerStep()))
    outputs = [fmodule.apply(fmodule.state(), torch.zeros(1), step=k)[0] for k in range(3)]
    assert [output.item() for output in outputs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(torch.ones(1), 2.0), ((torch.ones(1), 1), 6.0), ({"x": torch.ones(1), "depth": 1}, 6.0)],
    ids=["tensor", "tuple", "dict"],
)
def test_calls_nest_and_inputs_unpack(inputs, expected):
    module = Nested()
    fmodule = FunctionalModule(module)
    module.again = fmodule
    output, _ = fmodule.apply(fmodule.state(), inputs)
    assert output.item() == expected


def test_threads_do_not_see_each_others_tensors():
    fmodule = FunctionalModule(nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)]))
    states = [
        ModuleState({n: torch.full_like(p, 0.1 * k) for n, p in fmodule.state().params.items()}, {})
        for k in range(4)
    ]
    x = torch.ones(2, 8)
    expected = [fmodule(state, x)[0] for state in states]
    wrong = []

    def work(k):
        for _ in range(50):
            if not torch.equal(fmodule(states[k], x)[0], expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exception_in_the_module_leaves_no_trace():
    class Moody(nn.Linear):
        def forward(self, x):
            if x.sum() < 0:
                raise RuntimeError("no")
            return super().forward(x)

    fmodule = FunctionalModule(Moody(2, 2))
    before, _ = fmodule(fmodule.state(), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="no"):
        fmodule(fmodule.state(), -torch.ones(1, 2))
    assert torch.equal(fmodule(fmodule.state(), torch.ones(1, 2))[0], before)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: FunctionalModule(nn.LazyLinear(2)), "weight of LazyLinear is lazy"),
        (lambda: _call(nn.Linear(2, 2), {}, {}), "parameters of the state given to Linear lacks"),
        (
            lambda: _call(nn.ReLU(), {"extra": torch.ones(1)}, {}),
            "has unknown names ['extra']",
        ),
        (
            lambda: _call(nn.BatchNorm1d(2, affine=False), {}, {"running_mean": torch.ones(2)}),
            "buffers of the state given to BatchNorm1d lacks ['running_var'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(act, message):
    with pytest.raises(ModuleError) as caught:
        act()
    assert message in str(caught.value)


def _call(module, params, buffers):
    return FunctionalModule(module)(ModuleState(params, buffers), torch.ones(3, 2))
