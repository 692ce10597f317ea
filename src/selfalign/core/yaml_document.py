"""A YAML file as plain data that still knows on which line every key was written.

YAML as people mean it in a recipe (the 1.2 core schema): `1e-4` is a number, `yes`, `on` and `2024-01-01` are
text, keys are text as written. Anchors, aliases and `<<` work; tags beyond the core schema are refused.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from selfalign.core.errors import RecipeError

Key = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
# Counted after aliases are expanded: what bounds a "billion laughs" file, and the seconds that reading takes.
MAX_VALUES = 10_000
MAX_SHOWN = 60

_TAG = "tag:yaml.org,2002:"
_PLAIN_KEY = re.compile(r"[\w-]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEY_LINE = re.compile(r"^(\s*)(?:- +)?(\w[\w.-]*|\"[^\"]*\"|'[^']*')\s*:(?:\s|$)")


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a setting was written, and the folder that relative paths there start from.

    `order` sorts as read: (0, line) in the file, (1, number) on the command line after it.
    """

    order: tuple[int, int]
    text: str
    folder: Path


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, as one line for people."""

    origin: Origin
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin.text, self.key, self.text) if part)


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a YAML mapping. `lines` holds the line (from 1) of each key and list item.

    `origins` names the settings that were not written at their own place in the file: overrides and arms.
    `problems` are already known faults, such as a key given twice; validation reports them with its own.
    """

    path: Path
    data: dict[str, Any]
    lines: Mapping[Key, int]
    origins: Mapping[Key, Origin] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def origin(self, key: Key) -> Origin:
        """Where `key` was written; for a key that is not there, where its section was."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.origins:
                return self.origins[key[:end]]
            if key[:end] in self.lines:
                return in_file(self.path, self.lines[key[:end]])
        return in_file(self.path, 1)

    def with_problem(self, problem: Problem) -> "Document":
        """The same document with one more known fault."""
        return replace(self, problems=(*self.problems, problem))


def in_file(path: Path, line: int) -> Origin:
    """A line of the recipe's own file."""
    return Origin((0, line), f"{path}:{line}", path.parent)


def dotted(key: Key) -> str:
    """`("curate", "few_shot", 0)` as people read it: `curate.few_shot[0]`. One line, whatever the keys hold."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{_quoted(part)}"
    return text.removeprefix(".")


def _quoted(name: str) -> str:
    if len(name) <= MAX_SHOWN and _PLAIN_KEY.fullmatch(name):
        return name
    return json.dumps(name[:MAX_SHOWN] + "…" * (len(name) > MAX_SHOWN), ensure_ascii=False)


def read(path: Path) -> Document:
    """The document in the file at `path`. Raises RecipeError where it is no YAML mapping at all."""
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{ord(error.character):04X}" if isinstance(error.character, str) else f"{error.character:#x}"
        raise RecipeError(f"{path}:{line}: {_near(text, line)}the character {code} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        line = _line_of(error)
        raise RecipeError(f"{path}:{line}: {_near(text, line)}{_said(error)}") from error
    if node is None:
        raise RecipeError(f"{path}:1: the recipe is empty; it needs a mapping of keys")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:{_line(node)}: a recipe is a mapping of keys, and this is {_kind(node)}")
    return _document(path, node)


def parse_value(text: str) -> Any:
    """The value of one override, read as YAML. Raises ValueError that says what is wrong."""
    builder = _Builder(Path())
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else builder.value(node, ())
    except yaml.reader.ReaderError as error:
        raise ValueError("it holds a character that is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(_said(error)) from error
    if builder.problems:
        raise ValueError(builder.problems[0].text)
    return value


def _text(path: Path) -> str:
    try:
        # One byte more than allowed tells a file that is too large without reading it all.
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such recipe") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: this is a folder; name the recipe's file") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so it is no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: byte {error.start} is not UTF-8; save the recipe as UTF-8") from error


def _document(path: Path, root: yaml.MappingNode) -> Document:
    builder = _Builder(path)
    try:
        data = builder.value(root, ())
    except _Limit as error:
        raise RecipeError(f"{path}:{_line_of(error)}: {error.problem}") from error
    return Document(path, data, {(): _line(root), **builder.lines}, problems=tuple(builder.problems))


class _Limit(yaml.MarkedYAMLError):
    """A file beyond the bounds of what a recipe may be."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """Composes nodes by the 1.2 core schema, within bounds. It constructs nothing."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH + 1:
            raise self._limit(f"nested deeper than {MAX_DEPTH} levels")
        if self.count > 2 * MAX_VALUES:  # keys are nodes too
            raise self._limit(f"more than {MAX_VALUES} values, so it is no recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _limit(self, problem: str) -> _Limit:
        return _Limit(problem, self.peek_event().start_mark)  # type: ignore[no-untyped-call]


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Builder:
    """Turns nodes into data, noting lines and problems on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        self.count = 0
        self.depth = 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.count += 1
        if self.depth > MAX_DEPTH:
            raise _Limit(f"nested deeper than {MAX_DEPTH} levels (an alias within its own anchor?)", node.start_mark)
        if self.count > MAX_VALUES:
            raise _Limit(
                f"more than {MAX_VALUES} values once aliases are filled in, so it is no recipe", node.start_mark
            )
        self.depth += 1
        value = self._built(node, key)
        self.depth -= 1
        return value

    def _built(self, node: yaml.Node, key: Key) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return self._sequence(node, key)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, key)
        return self._problem(node, key, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; write a plain value")

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name_node, child in node.value:
            if name_node.tag == _TAG + "merge":
                data = self._merged(child, key) | data
        own: dict[str, int] = {}
        for name_node, child in node.value:
            name = self._name(name_node, key)
            if name is None:
                continue
            if name in own:
                self._problem(name_node, (*key, name), f"the key is given twice, first on line {own[name]}")
                continue
            own[name] = self.lines[(*key, name)] = _line(name_node)
            data[name] = self.value(child, (*key, name))
        return data

    def _merged(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        """What `<<` brings: a mapping, or a list of them of which the first wins."""
        data: dict[str, Any] = {}
        for source in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                data |= self.value(source, key) or {}
            else:
                self._problem(source, key, f"`<<` takes a mapping, and this is {_kind(source)}")
        return data

    def _name(self, node: yaml.Node, key: Key) -> str | None:
        """The key's text as written; None for `<<`, and for what cannot be a key."""
        if node.tag == _TAG + "merge":
            return None
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS or _SURROGATE.search(node.value):
            self._problem(node, key, "a key must be plain text")
            return None
        return str(node.value)

    def _sequence(self, node: yaml.SequenceNode, key: Key) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self.lines[(*key, index)] = _line(child)
            items.append(self.value(child, (*key, index)))
        return items

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if _SURROGATE.search(node.value):
            return self._problem(node, key, "half of a surrogate pair is not valid Unicode")
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            return self._problem(node, key, f"{node.value[:MAX_SHOWN]!r} cannot be read as !!{kind}")

    def _problem(self, node: yaml.Node, key: Key, text: str) -> None:
        self.problems.append(Problem(in_file(self.path, _line(node)), dotted(key), text))


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    number = float(text.replace(".inf", "inf").replace(".nan", "nan")) if text[-1:].isalpha() else float(text)
    if math.isinf(number) and not text[-1:].isalpha():
        raise ValueError(text)
    return number


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    _TAG + "str": str,
    _TAG + "int": _integer,
    _TAG + "float": lambda text: _float(text.lower()),
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "null": lambda text: None,
}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
    return "a single value"


def _line_of(error: yaml.MarkedYAMLError) -> int:
    """The line to look at: where an unclosed quote or bracket opens, otherwise where reading stopped."""
    opened = error.context is not None and re.search("scanning|flow|anchor", error.context)
    mark = (opened and error.context_mark) or error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


_PLAIN_WORDS = (
    ("could not find expected ':'", "a colon is missing after the key"),
    (
        "mapping values are not allowed",
        "a colon where none can be; quote the text it belongs to, or check the indentation",
    ),
    ("'\\t'", "a tab; indent with spaces"),
    ("unexpected end of stream", "a quote that is never closed"),
    ("expected ',' or", "a bracket that is never closed, or a comma that is missing"),
    ("expected <block end>", "the indentation does not fit the lines above"),
    ("expected a single document", "a second document begins; a recipe is one"),
)


def _said(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, _Limit):
        return str(error.problem)
    problem = f"{error.context or ''} {error.problem or ''}"
    for sign, words in _PLAIN_WORDS:
        if sign in problem:
            return f"not valid YAML: {words}"
    return f"not valid YAML: {' '.join(problem.split())}"


def _near(text: str, line: int) -> str:
    """The key path that an unreadable line seems to stand under, told by indentation alone."""
    names: list[str] = []
    limit = math.inf
    rows = text.split("\n")[:line]
    # The unreadable line itself may be a key that lacks its colon.
    rows[-1] += "" if ":" in rows[-1] else ":"
    for row in reversed(rows):
        if (match := _KEY_LINE.match(row)) and len(match[1]) < limit:
            limit = len(match[1])
            names.insert(0, match[2].strip("\"'"))
    return f"{dotted(tuple(names))}: " if names else ""
