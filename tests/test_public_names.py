"""Every public name says what it is: its tensors' shapes, and an example that runs as it stands."""

import ast
import doctest
import inspect
import re
import textwrap

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


TENSORS = re.compile(r"\b(Tensors?|Batch|Tasks?|TaskBatch|TaskList)\b")
SHAPE = re.compile(r"\[[A-Za-z*][^\[\]]*\]|\bscalar|\bshapes?\b")  # such as `[tasks, steps + 1]`


def is_public(name):
    return name in ("__init__", "__call__") or not name.startswith("_")


def signature(part):
    """What an attribute or a public function is, takes and returns, as it is written."""
    if isinstance(part, ast.AnnAssign):
        return ast.unparse(part.annotation)
    if isinstance(part, ast.FunctionDef) and is_public(part.name):
        return " → ".join(ast.unparse(each) for each in (part.args, part.returns) if each)
    return ""


def prose(value, parts):
    """Docstrings without their examples: of a class and its members, inherited ones too, and fields."""
    own = vars(value).items() if inspect.isclass(value) else ()
    members = [getattr(member, "fget", member) for name, member in own if is_public(name)]
    texts = [inspect.getdoc(each) or "" for each in (value, *members)]
    texts += [part.value.value for part in parts if isinstance(part, ast.Expr)]
    pieces = [piece for text in texts for piece in doctest.DocTestParser().parse(text)]
    return "\n".join(piece for piece in pieces if isinstance(piece, str))


@pytest.mark.parametrize(("name", "value"), NAMES, ids=[name for name, _ in NAMES])
def test_a_public_name_of_tensors_states_their_shapes(name, value):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    parts = node.body if isinstance(node, ast.ClassDef) else [node]
    if any(TENSORS.search(signature(part)) for part in parts):
        assert SHAPE.search(prose(value, parts))


def test_what_is_neither_class_nor_function_is_a_type_a_table_or_a_module():
    values = [getattr(module, name) for module in SPACES.values() for name in module.__all__]
    others = [v for v in values if not inspect.isclass(v) and not inspect.isfunction(v)]
    assert mb.laws in others
    assert all(inspect.ismodule(v) or v is mb.rules.RULES or hasattr(v, "__args__") for v in others)
