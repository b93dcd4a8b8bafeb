"""YAML text to a tree of values that know their line and column.

The accepted language is small on purpose: mappings with text keys, lists, and scalars as YAML 1.2
reads them (`1e-3` is a number; `yes`, `0o17` and `1:30` are text). A recipe is a complete
statement, so anchors, aliases, merge keys and tags are refused, as are duplicate keys. What is
wrong but leaves the tree readable is collected as a `Problem`; text that is no YAML at all raises
`RecipeError` at once.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import yaml
from yaml import events

from metablocks.errors import RecipeError, one_line

Scalar: TypeAlias = bool | int | float | str | None

MAX_DEPTH = 20
LARGEST = 2**63 - 1
"""The largest integer that sizes and counts of tensors are held in; longer ones are read as floats."""
_UNWRITTEN = ("Cc", "Cs", "Zl", "Zp")  # categories of characters that garble what is printed
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class Place:
    """The place a value was written at: a file with line and column from 1, or a source without lines.

    >>> str(Place("recipes/x.yaml", 7, 5)), str(Place("--set inner.steps=3"))
    ('recipes/x.yaml:7:5', '--set inner.steps=3')
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it stands, which field, and what would work.

    >>> print(Problem(Place("x.yaml", 7, 5), "inner.steps", "takes a whole number, given 1.5"))
    x.yaml:7:5 inner.steps: takes a whole number, given 1.5
    """

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        between = " " if self.place.line else ": "
        path = between + self.path if self.path else ""
        return one_line(f"{self.place}{path}: {self.message}")


@dataclass(frozen=True)
class Node:
    """A value with its place. `value` is a scalar, a list of nodes, or a dict of nodes.

    `key` is the place of the key that it stands under, if there is one.
    """

    value: Any
    place: Place
    key: Place | None = None

    @property
    def at(self) -> Place:
        """The place of the key, or of the value if it has none."""
        return self.key or self.place


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one `RecipeError` that lists all problems in file order, if there are any."""
    unique = list(dict.fromkeys(problems))
    if unique:
        unique.sort(key=lambda p: (not p.place.line, p.place.line, p.place.column))
        raise RecipeError("\n".join(str(problem) for problem in unique))


def join(path: str, key: str | int) -> str:
    """The path of an entry below `path`.

    >>> join("inner.rule", 1), join("inner", "steps"), join("groups", "rule.*")
    ('inner.rule[1]', 'inner.steps', 'groups["rule.*"]')
    """
    if isinstance(key, int):
        return f"{path}[{key}]"
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{json.dumps(key, ensure_ascii=False)}]"
    return f"{path}.{key}" if path else key


def scalar(text: str) -> Scalar:
    """The meaning of an unquoted word: null, a boolean, a number, or the text itself.

    >>> [scalar(word) for word in ("1e-3", "5", "true", "yes", "0o17", "1:30", "~")]
    [0.001, 5, True, 'yes', '0o17', '1:30', None]
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and abs(int(text)) <= LARGEST:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def nodes(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """The node and all below it, each with its path.

    >>> [path for path, _ in nodes(to_node({"inner": {"rule": [1]}}, Place("x.yaml")))]
    ['', 'inner', 'inner.rule', 'inner.rule[0]']
    """
    yield path, node
    pairs = node.value.items() if isinstance(node.value, dict) else ()
    for key, child in enumerate(node.value) if isinstance(node.value, list) else pairs:
        yield from nodes(child, join(path, key))


def plain(node: Node) -> Any:
    """The node's value without places: scalars, lists and dicts."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def to_node(value: Any, place: Place) -> Node:
    """The inverse of `plain`, every node at one place."""
    if isinstance(value, dict):
        return Node({key: to_node(child, place) for key, child in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([to_node(child, place) for child in value], place)
    return Node(value, place)


def parse(text: str, source: str, problems: list[Problem]) -> Node:
    """The tree of one YAML document; `source` names it in messages.

    Appends to `problems` what is refused but readable. Raises `RecipeError` for text that is not
    YAML, is empty, or holds several documents.

    >>> node = parse("inner: {steps: 5}", "x.yaml", [])
    >>> plain(node), str(node.value["inner"].value["steps"].place)
    ({'inner': {'steps': 5}}, 'x.yaml:1:16')
    """
    try:
        loader = yaml.BaseLoader(text)
        return _compose(iter(loader.get_event, None), source, problems)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        _raise_syntax(error, source)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(source, before.count("\n") + 1, error.position - before.rfind("\n"))
        code = error.character if isinstance(error.character, int) else ord(error.character)
        _refuse(place, f"the character U+{code:04X} is not allowed in YAML")
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = loader.get_mark()  # type: ignore[no-untyped-call]
        _refuse(_at(mark, source), f"not valid YAML: {error}")


def _compose(stream: Iterator[Any], source: str, problems: list[Problem]) -> Node:
    next(stream)  # the start of the stream
    start = next(stream)
    if not isinstance(start, events.DocumentStartEvent):
        _refuse(Place(source, 1, 1), "empty; a recipe is a mapping (name, seed, tasks, model, …)")
    if start.version or start.tags:
        _refuse(_at(start.start_mark, source), "YAML directives are not part of a recipe")
    root = _Composer(stream, source, problems).node("", 0)
    next(stream)  # the end of the document
    after = next(stream)
    if isinstance(after, events.DocumentStartEvent):
        _refuse(_at(after.start_mark, source), "a second document; a recipe is one document")
    return root


def parse_value(text: str, source: str, problems: list[Problem]) -> Node:
    """One value as an override writes it; its nodes have no line, only `source`."""
    collected: list[Problem] = []
    place = Place(source)
    try:
        node = parse(text, source, collected)
    except RecipeError as error:
        message = str(error).removeprefix(source).lstrip(":0123456789 ")
        message = "no value after =" if message.startswith("empty;") else message
        raise RecipeError(f"{source}: {message}") from None
    problems.extend(replace(problem, place=place) for problem in collected)
    return to_node(plain(node), place)


class _Composer:
    """Events to nodes. (PyYAML's own composer keeps no anchors, and recurses without a bound.)"""

    def __init__(self, stream: Iterator[Any], source: str, problems: list[Problem]) -> None:
        self.stream = stream
        self.source = source
        self.problems = problems

    def node(self, path: str, depth: int, event: Any = None) -> Node:
        event = event or next(self.stream)
        place = _at(event.start_mark, self.source)
        if depth > MAX_DEPTH:
            _refuse(place, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, events.AliasEvent):
            self.problem(place, path, f"an alias (*{event.anchor}); write the value out")
            return Node(None, place)
        if event.anchor is not None:
            self.problem(place, path, f"an anchor (&{event.anchor}); a recipe has no references")
        if event.tag is not None:
            self.problem(place, path, f"a tag ({event.tag}); a recipe holds plain values only")
        if isinstance(event, events.SequenceStartEvent):
            return Node(self.sequence(path, depth), place)
        if isinstance(event, events.MappingStartEvent):
            return Node(self.mapping(path, depth), place)
        return Node(self.scalar(event, place, path), place)

    def sequence(self, path: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.stream), events.SequenceEndEvent):
            items.append(self.node(join(path, len(items)), depth + 1, event))
        return items

    def mapping(self, path: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.stream), events.MappingEndEvent):
            key = self.node(path, depth + 1, event)
            name = key.value if isinstance(key.value, str) else f"<key {len(entries)}>"
            child = replace(self.node(join(path, name), depth + 1), key=key.place)
            if name == "<<" and event.style is None:
                self.problem(key.place, path, "a merge key (<<); write the fields out")
            elif not isinstance(key.value, str):
                self.problem(key.place, path, f"a key is a word, given {show(key)}")
            elif name in entries:
                first = entries[name].at.line
                self.problem(key.place, join(path, name), f"given twice, first on line {first}")
            else:
                entries[name] = child
        return entries

    def scalar(self, event: Any, place: Place, path: str) -> Scalar:
        value: str = event.value
        if any(unicodedata.category(c) in _UNWRITTEN and c != "\n" for c in value):
            self.problem(place, path, "text with control characters or line separators")
            return ""
        return scalar(value) if event.style is None else value

    def problem(self, place: Place, path: str, message: str) -> None:
        self.problems.append(Problem(place, path, message))


def show(value: Any) -> str:
    """A value as messages repeat it, short: `"fast"`, `0.5`, `true`, `null`, `a list`.

    >>> show("fast"), show(True), show(None), show([1, 2]), show({})
    ('"fast"', 'true', 'null', 'a list of 2', 'a mapping')
    """
    value = value.value if isinstance(value, Node) else value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "…"
        return json.dumps(shown, ensure_ascii=False)
    return "null" if value is None else str(value).lower()


def _at(mark: Any, source: str) -> Place:
    return Place(source, mark.line + 1, mark.column + 1)


def _refuse(place: Place, message: str) -> NoReturn:
    raise RecipeError(str(Problem(place, "", message)))


def _raise_syntax(error: yaml.MarkedYAMLError, source: str) -> NoReturn:
    mark = error.problem_mark or error.context_mark
    place = _at(mark, source) if mark else Place(source)
    problem = error.problem or error.context or "unreadable"
    if "'\\t'" in problem:
        _refuse(place, "a tab; YAML takes spaces only")
    context = f" ({error.context})" if error.context and error.problem else ""
    _refuse(place, f"not valid YAML: {problem}{context}")
