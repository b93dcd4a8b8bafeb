"""Modules tried one by one: those that write in place are right, and faults are still theirs."""

import functools

import pytest
import torch
from outside_gradients import Custom, Rewriting, _OldTanh, _Tanh, _WrongTanh
from torch import nn

from metablocks.diagnose import without_second_derivative
from metablocks.gradcheck.modules import refused_by_transforms, with_wrong_derivative

pytestmark = pytest.mark.usefixtures("float64")

TESTS = [without_second_derivative, refused_by_transforms, with_wrong_derivative]
all_tests = pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
IN_PLACE = {
    name: functools.partial(getattr(nn, name), inplace=True)
    for name in [
        *("ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "SiLU", "Mish", "RReLU", "Hardtanh"),
        *("Hardswish", "Dropout", "AlphaDropout", "FeatureAlphaDropout"),
    ]
} | {"Threshold": lambda: nn.Threshold(0.1, 0.5, inplace=True), "Rewriting": Rewriting}


class Added(nn.Module):
    """Writes into one of two inputs, and marks another one, of whole numbers, as done."""

    def forward(self, x, *, other, count):
        count += 1
        x += other
        return x.sin()


class Branches(nn.Module):
    """Modules that write in place in the middle, with other arguments than one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.added = nn.Linear(3, 4), nn.Linear(4, 4), Added()

    def forward(self, x):
        hidden = self.first(x).tanh()
        count = torch.zeros(2, dtype=torch.long)
        return self.second(self.added(hidden * 1, other=hidden, count=count)) + count.sum()


class Writing(nn.Module):
    """A function of one's own behind an activation in place."""

    def __init__(self, function):
        super().__init__()
        self.own = nn.Sequential(nn.ELU(inplace=True), Custom(function))

    def forward(self, x):
        return self.own(x)


def net(middle):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), middle, nn.Linear(4, 2))


@all_tests
@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_a_module_that_writes_its_input_in_place_is_not_called_wrong(make, test):
    model, x = net(make()), torch.randn(5, 3)
    before = [t.clone() for t in (x, *model.state_dict().values())]
    assert test(model, x) == []
    assert all(map(torch.equal, before, (x, *model.state_dict().values())))


@all_tests
def test_nor_one_that_writes_into_one_of_several_inputs(test):
    assert test(Branches(), torch.randn(5, 3)) == []


@pytest.mark.parametrize(
    ("test", "function", "reason"),
    [
        (without_second_derivative, _Tanh, "once_differentiable"),
        (refused_by_transforms, _OldTanh, "setup_context"),
        (with_wrong_derivative, _WrongTanh, "its second derivative is off"),
    ],
)
def test_a_fault_behind_what_writes_in_place_is_still_named(test, function, reason):
    (finding,) = test(net(Writing(function)), torch.randn(5, 3))
    assert (finding.name, finding.kind) == ("model.2.own.1", "Custom")
    assert reason in finding.reason


@pytest.mark.parametrize("view", [nn.Identity(), nn.Flatten()], ids=repr)
def test_what_writes_into_the_batch_itself_is_refused_by_name_and_the_batch_is_kept(view):
    model, x = nn.Sequential(view, nn.ReLU(inplace=True), nn.Linear(3, 2)), torch.randn(5, 3)
    before = x.clone()
    (finding,) = refused_by_transforms(model, x)
    assert (finding.name, finding.kind) == ("model.1", "ReLU")
    assert "in-place operation" in finding.reason
    assert without_second_derivative(model, x) == []
    assert torch.equal(x, before)
