"""From a recipe's YAML to a frozen configuration, with every mistake told by file, line and key.

`load` does it in one call. In pieces: `read` the file, `override` from the command line, `apply` an arm's
settings, `validate` against a model. Faults collect on the document, and `validate` raises them all at once.

Types are taken as written: `"3"` in quotes is no number and `3` is no text. Three kindnesses: a whole float
(`1e3`) serves where an integer is wanted, an integer where a float is, and `yes|no|on|off` where only a bool is.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from selfalign.core.errors import RecipeError
from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.yaml_document import MAX_DEPTH, Document, Key, Origin, Problem, dotted, parse_value, read
from selfalign.core.yaml_explain import problems_of
from selfalign.core.yaml_schema import View, item_views, key_views, views

__all__ = ["Document", "apply", "load", "override", "read", "validate"]

T = TypeVar("T", bound=Frozen)

_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


def load(path: Path, model: type[T], overrides: Sequence[str] = ()) -> T:
    """The configuration in the YAML file at `path`, with `key.sub=value` overrides on top.

    Raises RecipeError with one line for each mistake.
    """
    return validate(override(read(path), overrides), model)


def validate(document: Document, model: type[T]) -> T:
    """`document` as a `model`. Relative `RecipePath` values become absolute. Raises RecipeError for all its faults."""
    settled = _settled(document.data, views(model), (), document)
    try:
        config = model.model_validate_json(json.dumps(settled), strict=True)
    except ValidationError as error:
        found = problems_of(error, replace(document, data=settled), model)
        raise RecipeError(_listed([*document.problems, *found])) from error
    if document.problems:
        raise RecipeError(_listed(document.problems))
    return config


def override(document: Document, overrides: Sequence[str]) -> Document:
    """`document` after `key.sub=value` settings, in order. A value is YAML; a mapping merges, all else replaces."""
    for number, text in enumerate(overrides):
        # The command line comes after every line of the file.
        origin = Origin((1, number), f"override {text!r}", Path.cwd())
        name, equals, value_text = text.partition("=")
        key = _split(name)
        if not equals or key is None:
            document = document.with_problem(Problem(origin, "", "an override has the form key.sub=value"))
            continue
        try:
            value = parse_value(value_text)
        except ValueError as error:
            document = document.with_problem(Problem(origin, dotted(key), str(error)))
            continue
        for leaf, leaf_value in _leaves(value):
            document = _set(document, key + leaf, leaf_value, origin)
    return document


def apply(document: Document, settings: Mapping[str, Any], at: Key = ()) -> Document:
    """`document` after `settings` such as `{"curate.keep": "all"}`; nested mappings do the same.

    `at` is where the settings stand in the document (`("arms", "uncurated")`): errors name it and its line.
    """
    for leaf, value in _leaves(settings):
        written = document.origin((*at, *leaf))
        origin = replace(written, text=f"{written.text}: {dotted(at)}") if at else written
        key = _split(".".join(leaf))
        if key is None:
            document = document.with_problem(Problem(origin, dotted(leaf), "a key has the form key.sub"))
        else:
            document = _set(document, key, value, origin)
    return document


def _split(name: str) -> tuple[str, ...] | None:
    key = tuple(part.strip() for part in name.split("."))
    return key if len(key) <= MAX_DEPTH and all(part and part.isprintable() for part in key) else None


def _leaves(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in `value` that is not a mapping with keys in it, with the path to it."""
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from _leaves(child, (*key, name))
    else:
        yield key, value


def _set(document: Document, key: tuple[str, ...], value: Any, origin: Origin) -> Document:
    """`document` with `value` at `key`; sections on the way come into being. An empty mapping changes no section."""
    replaced = key[: _sections(document.data, key) + 1]
    if value == {} and replaced == key and isinstance(_parent(document.data, key).get(key[-1]), dict):
        return document
    origins = {k: o for k, o in document.origins.items() if k[: len(replaced)] != replaced}
    lines = {k: line for k, line in document.lines.items() if k[: len(replaced)] != replaced}
    origins |= {key[:length]: origin for length in range(len(replaced), len(key) + 1)}
    return replace(document, data=_with(document.data, key, value), lines=lines, origins=origins)


def _sections(data: dict[str, Any], key: tuple[str, ...]) -> int:
    """How many parts of `key`, its last apart, lead through sections that are there."""
    for count, name in enumerate(key[:-1]):
        child = data.get(name)
        if not isinstance(child, dict):
            return count
        data = child
    return len(key) - 1


def _parent(data: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    for name in key[:-1]:
        data = data[name]
    return data


def _with(data: Any, key: tuple[str, ...], value: Any) -> dict[str, Any]:
    section = data if isinstance(data, dict) else {}
    new = value if len(key) == 1 else _with(section.get(key[0]), key[1:], value)
    return {**section, key[0]: new}


def _settled(value: Any, kinds: Sequence[View], key: Key, document: Document) -> Any:
    """`value` with paths made absolute and with the kindnesses of this module, where a field's type asks for them."""
    match value:
        case dict():
            return {k: _settled(v, key_views(kinds, k), (*key, k), document) for k, v in value.items()}
        case list():
            return [_settled(v, item_views(kinds), (*key, i), document) for i, v in enumerate(value)]
        case str():
            return _settled_text(value, kinds, document.origin(key).folder)
        case float() if value.is_integer() and any(k.type is int for k in kinds):
            return value if any(k.type is float for k in kinds) else int(value)
    return value


def _settled_text(value: str, kinds: Sequence[View], folder: Path) -> str | bool:
    marks = [mark for kind in kinds for mark in kind.marks if mark is RecipePath or isinstance(mark, RecipePath)]
    if marks:
        words = {word for mark in marks if isinstance(mark, RecipePath) for word in mark.words}
        return value if value in words else _from(folder, value)
    types = {kind.type for kind in kinds}
    if bool in types and str not in types:
        return _SWITCHES.get(value.lower(), value)
    return value


def _from(folder: Path, value: str) -> str:
    beside = os.path.abspath(folder / value)
    explicit = value in (".", "..") or value.startswith(("./", "../"))
    return beside if value and (explicit or os.path.exists(beside)) else value


def _listed(problems: Sequence[Problem]) -> str:
    return "\n".join(dict.fromkeys(str(problem) for problem in sorted(problems)))
