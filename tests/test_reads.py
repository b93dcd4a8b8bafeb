"""What the code of losses, modules and rules reads is seen: a change of it is another fingerprint."""

import dataclasses
import functools
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import metablocks as mb
from metablocks.fingerprint import fingerprint
from metablocks.reads import reading

FACTOR = 1.0
OPTIONS = Namespace(factor=1.0, other=1.0)
KEY = "factor"
NUMBERS = np.ones(3)


class Settings:
    factor = 1.0

    @classmethod
    def scale(cls, x):
        return x * cls.factor


@dataclasses.dataclass
class Deep:
    inner: types.SimpleNamespace


DEEP = Deep(types.SimpleNamespace(factor=[1.0]))


def by_global(x):
    return x * FACTOR


def by_helper(x):
    return [by_global(item) for item in x]


def by_argument(options, x):
    return x * options.factor


class Net(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.layer, self.options, self._own = nn.Linear(1, 1), OPTIONS, 1.0

    @property
    def own(self):
        return self._own

    def scaled(self, x):
        return by_helper(self.layer(x) * self.factor * self.options.factor * self.own)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.scaled(x)


class Trainer:
    weight = 1.0

    def __init__(self):
        self.factor, self.calls = 1.0, 0

    def loss(self, x):
        return x * self.factor * self.weight

    def __call__(self, x):
        return self.loss(x)


class Rule(mb.UpdateRule):
    def init(self, params):
        return {"factor": FACTOR}

    def forward(self, updates, state, step):
        return updates, state


def with_attribute(x):
    return x * with_attribute.factor


def hooked():
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(lambda module, inputs, output: by_global(output))
    return layer


TRAINER, NET, TEACHER = Trainer(), Net(), nn.BatchNorm1d(1)


def put(owner, name="factor", value=3.0):
    def change(patch):
        patch.setattr(owner, name, value)

    return change


def put_global(patch):
    patch.setitem(globals(), "FACTOR", 3.0)


def put_number(patch):
    NUMBERS[0] = 3.0


SEEN = {
    "a global": (by_global, put_global),
    "a global of a helper": (by_helper, put_global),
    "a global of a wrapped function": (
        functools.wraps(by_global)(lambda x: by_global(x)),
        put_global,
    ),
    "a class attribute": (lambda x: x * Settings.factor, put(Settings)),
    "a class attribute of a class method": (lambda x: Settings.scale(x), put(Settings)),
    "an option": (lambda x: x * OPTIONS.factor, put(OPTIONS)),
    "an option by an argument": (lambda x: by_argument(OPTIONS, x), put(OPTIONS)),
    "an option by getattr": (lambda x: x * getattr(OPTIONS, KEY), put(OPTIONS)),
    "an attribute inside others": (
        lambda x: x * DEEP.inner.factor[0],
        lambda patch: patch.setitem(vars(DEEP.inner), "factor", [3.0]),
    ),
    "numbers of NumPy in place": (lambda x: x * torch.tensor(NUMBERS), put_number),
    "an attribute of a function": (with_attribute, put(with_attribute)),
    "an attribute of a method's object": (TRAINER.loss, put(TRAINER)),
    "an attribute of a method's class": (TRAINER.loss, put(Trainer, "weight")),
    "an attribute of a class of a callable": (TRAINER, put(Trainer, "weight")),
    "an attribute of a module's class": (NET, put(Net)),
    "a method of a module": (NET, put(Net, "scaled", lambda self, x: x)),
    "an option of a module": (NET, put(OPTIONS)),
    "a global of a module": (NET, put_global),
    "what a property gives": (NET, put(NET, "_own")),
    "a global of a rule": (Rule(), put_global),
    "a global of a hook": (hooked(), put_global),
    "the mode of a teacher": (lambda x: TEACHER(x), put(TEACHER, "training", False)),
    "a buffer of a teacher": (lambda x: TEACHER(x), put(TEACHER, "running_var", torch.ones(1))),
    "a hook of all modules": (
        NET,
        lambda patch: patch.setitem(
            nn.modules.module._global_forward_hooks, 0, lambda module, inputs, output: output
        ),
    ),
}


def seen(thing):
    if isinstance(thing, nn.Module):
        return fingerprint(thing), reading(known=[thing])
    return reading(thing)


@pytest.mark.parametrize(("thing", "change"), SEEN.values(), ids=SEEN.keys())
def test_a_change_of_what_code_reads_is_seen_and_so_is_going_back(thing, change, monkeypatch):
    with_attribute.factor = 1.0
    before = seen(thing)
    assert seen(thing) == before
    with monkeypatch.context() as patch:
        change(patch)
        assert seen(thing) != before
    NUMBERS[0] = 1.0
    assert seen(thing) == before


@pytest.mark.parametrize(
    ("thing", "owner", "name"), [(TRAINER.loss, TRAINER, "calls"), (NET, OPTIONS, "other")]
)
def test_what_no_code_names_may_change(thing, owner, name, monkeypatch):
    before = seen(thing)
    put(owner, name)(monkeypatch)
    assert seen(thing) == before


def test_a_function_that_reaches_itself_has_a_fingerprint():
    def again(x):
        return again(x - 1) if x > 0 else x

    module = nn.Linear(1, 1)
    module.act = again
    assert fingerprint(module) == fingerprint(module)
    assert reading(again) == reading(again)
