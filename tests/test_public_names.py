"""Every public name says what it is, with an example that runs as it stands, without other imports."""

import doctest
import inspect

import pytest

import metablocks as mb

SPACES = {"mb": mb, "mb.rules": mb.rules, "mb.tasks": mb.tasks, "mb.laws": mb.laws}
NAMES = {
    id(value): (f"{space}.{name}", value)
    for space, module in SPACES.items()
    for name in reversed(module.__all__)
    if inspect.isclass(value := getattr(module, name)) or inspect.isfunction(value)
}.values()


@pytest.mark.parametrize(("name", "value"), NAMES, ids=[name for name, _ in NAMES])
def test_a_public_name_has_an_example_that_runs_by_itself(name, value):
    text = inspect.getdoc(value)
    assert text is not None
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    printed = []
    doctest.DocTestRunner(optionflags=flags).run(example, out=printed.append)
    assert not printed, "".join(printed)


def test_what_is_neither_class_nor_function_is_a_type_a_table_or_a_module():
    values = [getattr(module, name) for module in SPACES.values() for name in module.__all__]
    others = [v for v in values if not inspect.isclass(v) and not inspect.isfunction(v)]
    assert mb.laws in others
    assert all(inspect.ismodule(v) or v is mb.rules.RULES or hasattr(v, "__args__") for v in others)
