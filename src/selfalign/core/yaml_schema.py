"""What keys a configuration model has at each level, read off its annotations."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from selfalign.core.frozen import Frozen

Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class View:
    """One thing that a value may be: a bare type with its annotations, unions taken apart."""

    type: Any
    marks: tuple[Any, ...] = ()


def views(annotation: Any, marks: tuple[Any, ...] = ()) -> tuple[View, ...]:
    """`annotation` as the list of what it allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return views(arguments[0], (*marks, *arguments[1:]))
    if origin in (Union, types.UnionType):
        return tuple(view for argument in arguments for view in views(argument, marks))
    return (View(annotation, marks),)


def key_views(kinds: Sequence[View], name: str) -> tuple[View, ...]:
    """What may stand under the key `name` of a value of these kinds."""
    found: list[View] = []
    for kind in kinds:
        if model := _model(kind):
            field = model.model_fields.get(name)
            found += views(field.annotation, tuple(field.metadata)) if field else ()
        elif get_origin(kind.type) in (dict, Mapping):
            found += views(get_args(kind.type)[1])
    return tuple(found)


def item_views(kinds: Sequence[View]) -> tuple[View, ...]:
    """What may stand in a list of these kinds."""
    found: list[View] = []
    for kind in kinds:
        if get_origin(kind.type) in (list, tuple, set, frozenset, Sequence):
            found += (view for each in get_args(kind.type) if each is not Ellipsis for view in views(each))
    return tuple(found)


def names(kinds: Sequence[View]) -> tuple[str, ...]:
    """The keys that these kinds declare themselves."""
    return tuple(dict.fromkeys(name for kind in kinds if (model := _model(kind)) for name in model.model_fields))


def all_keys(model: type[BaseModel]) -> tuple[Keys, ...]:
    """Every key path that `model` declares, sections before what they hold."""
    return tuple(dict.fromkeys(_below(views(model), (), ())))


def _below(kinds: Sequence[View], path: Keys, above: tuple[type[BaseModel], ...]) -> Iterator[Keys]:
    for kind in kinds:
        model = _model(kind)
        # A model that holds itself would go on for ever.
        if model is None or model in above:
            continue
        for name in model.model_fields:
            yield (*path, name)
            yield from _below(key_views((kind,), name), (*path, name), (*above, model))


def _model(kind: View) -> type[BaseModel] | None:
    return kind.type if isinstance(kind.type, type) and issubclass(kind.type, Frozen) else None
