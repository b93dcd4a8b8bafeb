"""The block in the docstring of a protocol, which users copy, obeys the laws of the protocol."""

import doctest
import inspect
import re

import pytest

import metablocks as mb
from metablocks.laws.blocks import as_block
from metablocks.verify import verify

FIELDS = {"LearnedRate": {"init": 0.1}}


def blocks_of(protocol):
    """The classes and functions that the example of a docstring defines, by their names."""
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(protocol), {"__name__": "example"}, protocol.__name__, None, None
    )
    doctest.DocTestRunner().run(example, clear_globs=False)
    sources = "".join(each.source for each in example.examples)
    names = re.findall(r"^(?:class|def) (\w+)", sources, re.MULTILINE)
    return {name: example.globs[name] for name in names}


PROTOCOLS = [mb.Start, mb.Batches, mb.UpdateRule, mb.Order, mb.StepLoss, mb.Estimator, mb.Executor]


@pytest.mark.parametrize(
    ("name", "block"),
    [each for protocol in PROTOCOLS for each in blocks_of(protocol).items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_obeys_its_laws(name, block):
    report = verify(as_block(block, FIELDS.get(name, {})), examples=1)
    assert report.ok, str(report)


def test_every_protocol_has_one():
    assert all(map(blocks_of, PROTOCOLS))
