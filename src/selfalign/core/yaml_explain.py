"""What a validation error means, in plain words, with the nearest key that exists."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from selfalign.core.yaml_document import MAX_SHOWN, Document, Key, Problem, dotted
from selfalign.core.yaml_schema import Keys, View, all_keys, item_views, key_views, names, views

# A nearer name than this is taken for a slip of the pen, a farther one is only the nearest there is.
CLOSE = 0.6
# What a name in another section is worth against one in this section.
ELSEWHERE = 0.9
# Nobody reads more, and to look for the nearest key takes a moment each.
MAX_TOLD = 100

_EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "none_required": "null",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
}


def problems_of(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """One problem for each key path in `error`. The members of a union speak with one voice."""
    grouped: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_data_key(detail, document.data), []).append(detail)
    # Where one member of a union fits well enough to fail deeper inside, the others have nothing to add.
    inner = {key[:end] for key in grouped for end in range(len(key))}
    kept = [key for key, each in grouped.items() if key not in inner or not all(_of_union(one, key) for one in each)]
    kept.sort(key=lambda key: document.origin(key).order)
    problems = [
        Problem(document.origin(key), dotted(key), _text(key, grouped[key], document, model)) for key in kept[:MAX_TOLD]
    ]
    if left := kept[MAX_TOLD:]:
        problems.append(Problem(document.origin(left[0]), "", f"{len(left)} more mistakes from here on"))
    return problems


def _data_key(detail: ErrorDetails, data: Any) -> Key:
    """The error's path in the data: pydantic's own also names union members, and says `[key]` for a bad key."""
    key: Key = ()
    for part in detail["loc"]:
        in_mapping = isinstance(data, dict) and part in data
        if in_mapping or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            key, data = (*key, part), data[part]
    return (*key, detail["loc"][-1]) if detail["type"] == "missing" else key


def _of_union(detail: ErrorDetails, key: Key) -> bool:
    return len(detail["loc"]) > len(key)


def _text(key: Key, details: Sequence[ErrorDetails], document: Document, model: type[BaseModel]) -> str:
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return f"unknown key; {_hint(key, model)}"
    if "missing" in kinds:
        return "required, and not given"
    found = _at(document.data, key)
    expected = dict.fromkeys(_expected(detail) for detail in details)
    if own := [each for each in details if each["type"] in ("value_error", "assertion_error")]:
        return "; ".join(dict.fromkeys(str(each["ctx"]["error"]) for each in own))
    return f"expected {' or '.join(expected)}, found {_shown(found)}{_advice(found, kinds, details)}"


def _expected(detail: ErrorDetails) -> str:
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return detail["msg"].removeprefix("Input should be ").removesuffix(".")
    return template.format_map(detail.get("ctx", {}))


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:MAX_SHOWN]!r}{'…' * (len(value) > MAX_SHOWN)}"
        case dict():
            return "a mapping"
        case list():
            return f"a list of {len(value)}"
    return str(value)[:MAX_SHOWN]


def _advice(found: Any, kinds: set[str], details: Sequence[ErrorDetails]) -> str:
    """How to put it right, where that can be told."""
    if isinstance(found, int | float) and kinds == {"string_type"}:
        return " (put it in quotes)"
    if isinstance(found, str) and kinds & {"int_type", "float_type", "bool_type"} and found[:1].isdigit():
        return " (a number without quotes?)"
    choices = [c for d in details if d["type"] == "literal_error" for c in d["ctx"]["expected"].split("'")[1::2]]
    if isinstance(found, str) and choices:
        best = max(choices, key=lambda choice: _alike(found, choice))
        return f"; did you mean {best!r}?" if _alike(found, best) >= CLOSE else ""
    return ""


def _hint(key: Key, model: type[BaseModel]) -> str:
    """Names the nearest valid key for `key`, whose last part is unknown."""
    name, section = str(key[-1]), key[:-1]
    if tuple(name.split(".")) in all_keys(model) and "." in name:
        return f"write it nested: {': {'.join(name.split('.'))}: …{'}' * name.count('.')}"
    scored = list(_candidates(name, section, model))
    close = [(score, path) for score, path in scored if score >= CLOSE * ELSEWHERE]
    here = [(score, path) for score, path in scored if path[:-1] == section]
    nearest = _best(close or here or scored)
    if close or not nearest:
        return f"did you mean {' or '.join(nearest)}?" if close else "no key is known here"
    known = f" (known here: {', '.join(str(path[-1]) for _, path in here)})" if here else ""
    return f"the nearest is {nearest[0]}{known}"


def _best(scored: Sequence[tuple[float, Key]]) -> list[str]:
    """The paths that share the highest score, three at most."""
    best = max((score for score, _ in scored), default=0.0)
    return [dotted(path) for score, path in scored if score == best][:3]


def _candidates(name: str, section: Key, model: type[BaseModel]) -> Iterator[tuple[float, Key]]:
    for known in names(_views_at(section, model)):
        yield _alike(name, known), (*section, known)
    for path in all_keys(model):
        if path[:-1] != section:
            yield ELSEWHERE * _alike(name, path[-1]), path


def _views_at(section: Key, model: type[BaseModel]) -> tuple[View, ...]:
    kinds = views(model)
    for part in section:
        kinds = item_views(kinds) if isinstance(part, int) else key_views(kinds, part)
    return kinds


def _alike(name: str, known: str) -> float:
    return SequenceMatcher(None, _folded(name), _folded(known)).ratio()


def _folded(name: str) -> str:
    return name[:MAX_SHOWN].casefold().replace("-", "_").replace(" ", "_")


def _at(data: Any, key: Keys | Key) -> Any:
    for part in key:
        data = data[part]
    return data
