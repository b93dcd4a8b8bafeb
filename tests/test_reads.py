"""What the code of losses, modules and rules reads is seen: a change of it is another fingerprint."""

import array
import collections
import contextvars
import dataclasses
import functools
import operator
import threading
import types
from argparse import Namespace

import numpy as np
import pytest
import small_problems
import torch
from torch import nn

import metablocks as mb
from metablocks.fingerprint import fingerprint
from metablocks.reads import Unbounded, reading

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


class Implicit:
    """Read by what Python calls by itself."""

    zero = 0.0

    def __init__(self):
        self.inner = 1.0

    def __rmul__(self, x):
        return x * self.inner

    def __float__(self):
        return self.inner

    def __iter__(self):
        return iter([self.inner])

    def __enter__(self):
        return self.inner

    def __exit__(self, *_):
        pass


class Forwarding:
    """A descriptor."""

    def __get__(self, owner, kind=None):
        return owner.inner


class Forwarded(Implicit):
    outer = Forwarding()


class OfClasses(type):
    @property
    def outer(cls):
        return cls.factor


class OfClass(metaclass=OfClasses):
    factor = 1.0


class Defaulting(dict):
    def __init__(self):
        self.inner = 1.0

    def __missing__(self, key):
        return self.inner


class Made:
    def __init__(self):
        self.number = FACTOR


def by_with(x):
    with IMPLICIT as number:
        return x * number


def by_import(x):
    from small_problems import regression

    return regression(x)


@functools.lru_cache
def cached(number):
    return number * FACTOR


def deep(levels):
    if not levels:
        return by_global
    below = deep(levels - 1)
    return lambda x: below(x)


def first_from_far(x):
    return deeper(FAR(x))


def deeper(x):
    return [by_helper(item) for item in x]


IMPLICIT, FORWARDED, DEFAULTING, DATA = Implicit(), Forwarded(), Defaulting(), Deep(1.0)
USER_DICT, CHAIN = collections.UserDict(factor=1.0), collections.ChainMap({"factor": 1.0})
BELOW = {"factor": 1.0}
PROXY, ARRAY = types.MappingProxyType(BELOW), array.array("d", [1.0])
LOCAL, GET = threading.local(), operator.attrgetter("inner")
LOCAL.factor, FAR = 1.0, deep(6)
CONTEXT = contextvars.ContextVar("context", default=1.0)


def put(owner, name="factor", value=3.0):
    def change(patch):
        patch.setattr(owner, name, value)

    return change


def put_global(patch):
    patch.setitem(globals(), "FACTOR", 3.0)


def put_item(patch):
    ARRAY[0] = 3.0


def put_context(patch):
    CONTEXT.set(3.0)


def put_number(patch):
    NUMBERS[0] = 3.0


SEEN = {
    "a global": (by_global, put_global),
    "a global of a helper": (by_helper, put_global),
    "the sign of a zero": (lambda x: x * Implicit.zero, put(Implicit, "zero", -0.0)),
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
    "what an operator reads": (lambda x: x * IMPLICIT, put(IMPLICIT, "inner")),
    "what a conversion reads": (lambda x: x * float(IMPLICIT), put(IMPLICIT, "inner")),
    "what an iteration reads": (lambda x: [x * y for y in IMPLICIT], put(IMPLICIT, "inner")),
    "what a context manager reads": (by_with, put(IMPLICIT, "inner")),
    "what a descriptor reads": (lambda x: x * FORWARDED.outer, put(FORWARDED, "inner")),
    "what a class of a class reads": (lambda x: x * OfClass.outer, put(OfClass)),
    "what a dict reads for a missing key": (
        lambda x: x * DEFAULTING["y"],
        put(DEFAULTING, "inner"),
    ),
    "what an object reads that is made": (lambda x: x * Made().number, put_global),
    "what is imported where code runs": (
        by_import,
        lambda patch: patch.setattr(small_problems, "regression", by_global),
    ),
    "what a cached function reads": (lambda x: x * cached(1), put_global),
    "an attribute that C names": (lambda x: x * GET(IMPLICIT), put(IMPLICIT, "inner")),
    "a field as a tuple": (lambda x: x * dataclasses.astuple(DATA)[0], put(DATA, "inner")),
    "an item of a dict of collections": (
        lambda x: x * USER_DICT["factor"],
        lambda patch: patch.setitem(USER_DICT, "factor", 3.0),
    ),
    "an item of a chain of dicts": (
        lambda x: x * CHAIN["factor"],
        lambda patch: patch.setitem(CHAIN, "factor", 3.0),
    ),
    "an item of a dict behind a view": (
        lambda x: x * PROXY["factor"],
        lambda patch: patch.setitem(BELOW, "factor", 3.0),
    ),
    "an item of an array": (lambda x: x * ARRAY[0], put_item),
    "an attribute of a thread": (lambda x: x * LOCAL.factor, put(LOCAL)),
    "a variable of a context": (lambda x: x * CONTEXT.get(), put_context),
    "a global behind many calls": (deep(20), put_global),
    "a global that is near, and was met far away": (first_from_far, put_global),
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
    ARRAY[0] = 1.0
    CONTEXT.set(1.0)
    assert seen(thing) == before


@pytest.mark.parametrize(
    ("thing", "owner", "name"), [(TRAINER.loss, TRAINER, "calls"), (NET, OPTIONS, "other")]
)
def test_what_no_code_names_may_change(thing, owner, name, monkeypatch):
    before = seen(thing)
    put(owner, name)(monkeypatch)
    assert seen(thing) == before


def test_what_code_writes_but_does_not_read_may_change(monkeypatch):
    def count(x):
        TRAINER.calls = 1
        return x

    before = seen(count)
    put(TRAINER, "calls")(monkeypatch)
    assert seen(count) == before


def test_what_reaches_too_much_has_no_fingerprint():
    holds = [[0.0] * 100 for _ in range(100)]
    with pytest.raises(Unbounded, match="more than 10000 values"):
        reading(lambda x: x * holds[0][0])


def test_the_layout_of_a_tensor_is_seen():
    """`data` puts other numbers into a tensor without a word."""
    held = torch.ones(1)
    module = nn.Linear(1, 1)
    module.held = held
    before = fingerprint(module)
    held.data = torch.ones(2)
    assert fingerprint(module) != before
    held.data = torch.ones(1)
    assert fingerprint(module) == before


def test_a_function_that_reaches_itself_has_a_fingerprint():
    def again(x):
        return again(x - 1) if x > 0 else x

    module = nn.Linear(1, 1)
    module.act = again
    assert fingerprint(module) == fingerprint(module)
    assert reading(again) == reading(again)
