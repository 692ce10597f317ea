"""The formats of source rows: how a row becomes conversations, and a conversation seed pairs or a document.

A format is one function from the row's values to its conversations, found by name in FORMATS. A further one is a
function, a line in that table and its name in FormatName.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from selfalign.core.errors import MismatchError
from selfalign.core.records import Document, Dropped, SeedPair, SourcePart, quarantined, rejected
from selfalign.core.tables import is_further
from selfalign.data.readers import RawRow, Unusable, read_rows
from selfalign.data.rows import changed, spelt

Values = Mapping[str, object]
T = TypeVar("T")

_END_OF_TEXT = "<|endoftext|>"
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_GUANACO_ROLE = re.compile(r"(?<!#)### ?(Human|Assistant):")
# What keeps a message of a tree from being used; its project takes one that failed its review for spam.
_LEFT_OUT = {"deleted": (True, "deleted"), "review_result": (False, "spam")}
_MAX_RANK = 1 << 31
# A conversation has a few hundred messages at most; two bytes of JSON can stand for a unit.
_MOST_UNITS = 4096


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, with what its source says of it; SeedPair explains the labels."""

    role: str
    content: str
    language: str | None = None
    rank: int | None = None
    quality: float | None = None


class Unwanted(Unusable):
    """A row, or a unit of one, that was understood and is left out."""

    def row(self, id: str, where: str) -> Dropped:
        """The rejected row that stands for it."""
        return rejected(id, self.reason, detail=f"{where}: {self.note}")


Conversation = tuple[Turn, ...]
Unit = Conversation | Unusable


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one shape are read. A row that `fits` has its fields; others than `fields` are not looked at.

    `read` raises Unusable for a row, and gives it in place of a unit. Where a row may have several, `splits`.
    """

    read: Callable[[Values], Iterable[Unit]]
    shape: str
    fits: Callable[[Values], bool]
    fields: tuple[str, ...]
    splits: bool = False


# Formats


def _messages(values: Values) -> list[Unit]:
    """A list of role and content."""
    return [_turns(_list(_field(values, "messages"), "messages"), "messages")]


def _prompt_completion(values: Values) -> list[Unit]:
    """Each a text, or a list of messages."""
    return [_side(values, "prompt", "user") + _side(values, "completion", "assistant")]


def _sharegpt(values: Values) -> list[Unit]:
    """A list of `from` and `value`."""
    items = _list(_field(values, "conversations"), "conversations")
    return [_turns(items, "conversations", "from", "value", _SHAREGPT_ROLES)]


def _lima(values: Values) -> list[Unit]:
    """A list of texts, human and assistant in turn."""
    texts = _list(_field(values, "conversations"), "conversations")
    roles = ("user", "assistant")
    return [tuple(Turn(roles[n % 2], _text(text, f"conversations[{n}]")) for n, text in enumerate(texts))]


def _guanaco(values: Values) -> list[Unit]:
    """A text with role markers; where it ends in an empty answer, that answer stands in `output`.

    Only the markers divide it: `###` is also a Markdown heading inside answers. `rank` is the last answer's.
    """
    before, *parts = _GUANACO_ROLE.split(_text(_field(values, "text"), "text"))
    if not parts:
        raise Unusable("no_role_marker", "text has no '### Human:' and no '### Assistant:'")
    turns = [Turn("system", before)] if before.strip() else []
    for marker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Turn("user" if marker == "Human" else "assistant", content, _label(values.get("lang"))))
    if (last := turns[-1]).role == "assistant":
        answer = values.get("output")
        content = last.content if last.content.strip() or answer is None else _text(answer, "output")
        turns[-1] = Turn("assistant", content, last.language, _rank(values.get("rank")))
    return [tuple(turns)]


def _oasst(values: Values) -> Iterator[Unit]:
    """A tree, or its root message: one conversation for each reply to the root, the best-ranked first.

    Each goes on along the best-ranked replies. What its project gave up, deleted or took for spam is left out.
    """
    state = values.get("tree_state")
    if state not in (None, "ready_for_export"):
        raise Unwanted("not_ready_for_export", f"tree_state is {state!a:.40}")
    root, place = (values["prompt"], "prompt.") if "prompt" in values else (values, "")
    question = _tree_turn(root, place)
    _field(_object(root, "prompt", "a message"), "replies", place)
    for reply, its_place in _replies(root, place):
        try:
            yield (question, *_thread(reply, its_place))
        except Unusable as error:
            yield error


def _alpaca(values: Values) -> list[Unit]:
    """An instruction with its input, which may be absent or empty, and the output."""
    return [_task(_text(_field(values, "instruction"), "instruction"), values)]


def _self_instruct(values: Values) -> Iterator[Unit]:
    """A task: one conversation for each instance. A machine-made instruction has none before they are generated."""
    instruction = _text(_field(values, "instruction"), "instruction")
    instances = values.get("instances")
    for n, instance in enumerate([] if instances is None else _list(instances, "instances")):
        try:
            yield _task(instruction, _object(instance, f"instances[{n}]", "an instance"), f"instances[{n}].")
        except Unusable as error:
            yield error


def _document(values: Values) -> list[Unit]:
    """A response that nobody has asked for yet."""
    return [(Turn("assistant", _text(_field(values, "text"), "text")),)]


def _has(*fields: str) -> Callable[[Values], bool]:
    return lambda values: all(field in values for field in fields)


def _fits_sharegpt(values: Values) -> bool:
    first = _first(values.get("conversations"))
    return isinstance(first, dict) and "from" in first


def _fits_oasst(values: Values) -> bool:
    root = values.get("prompt", values)
    return isinstance(root, Mapping) and _has("role", "text", "replies")(root)


def _is_text(values: Values) -> bool:
    # A text with a role is a message of some tree: taken for a document, its question would pass for a response.
    return isinstance(values.get("text"), str) and "role" not in values


# In the order in which they are tried on a row of a file whose format is not named.
FORMATS: Mapping[str, Format] = {
    "messages": Format(_messages, "messages: role and content", _has("messages"), ("messages",)),
    "oasst": Format(
        _oasst,
        "role, text and replies, in prompt or at the top",
        _fits_oasst,
        ("prompt", "tree_state", "replies", "message_id", "role", "text", "lang", "rank", "labels", *_LEFT_OUT),
        splits=True,
    ),
    "prompt_completion": Format(
        _prompt_completion, "prompt, completion", _has("prompt", "completion"), ("prompt", "completion")
    ),
    "sharegpt": Format(_sharegpt, "conversations: from and value", _fits_sharegpt, ("conversations",)),
    "lima": Format(
        _lima,
        "conversations: texts",
        lambda values: isinstance(_first(values.get("conversations")), str),
        ("conversations",),
    ),
    "self_instruct": Format(
        _self_instruct,
        "instruction, instances",
        _has("instruction", "instances"),
        ("instruction", "instances"),
        splits=True,
    ),
    "alpaca": Format(_alpaca, "instruction, output", _has("instruction", "output"), ("instruction", "input", "output")),
    "guanaco": Format(
        _guanaco,
        "text with ### Human:",
        lambda values: _is_text(values) and bool(_GUANACO_ROLE.match(str(values["text"]).lstrip())),
        ("text", "output", "lang", "rank"),
    ),
    "document": Format(_document, "text", _is_text, ("text",)),
}


def detect(part: SourcePart) -> str | None:
    """The format of the first row that fits one; None where there is no well-formed row.

    Raises MismatchError, naming the fields seen, where no row fits any.
    """
    seen: Values | None = None
    for row in read_rows(part):
        if isinstance(row, RawRow):
            for name in FORMATS:
                if FORMATS[name].fits(row.values):
                    return name
            seen = row.values if seen is None else seen
    if seen is None:
        return None
    if {"message_id", "parent_id"} <= seen.keys():
        raise MismatchError(
            f"{spelt(part.path)}: its rows are single messages, which only their trees put together; "
            "name the dataset's file of trees in its place"
        )
    fields = ", ".join(sorted(seen))[:300] or "(none)"
    known = "; ".join(f"{name} ({how.shape})" for name, how in FORMATS.items())
    raise MismatchError(f"{spelt(part.path)}: no format reads the fields {fields}; known are {known}")


# Reading


def read_pairs(part: SourcePart, turns: Literal["first", "all"] = "first") -> Iterator[SeedPair | Dropped]:
    """The seed pairs of a part: the first question of each conversation with its answer, or `all` of them.

    A later question lacks what was said before it. Units of a row that may have several are called `row/0`, `row/1`
    …; a row that cannot be read at all keeps its own id. The rows have the part's format. Raises StorageError where the
    file has changed since it was listed.
    """
    every = turns == "all"
    return _read(part, to_pair, lambda unit, _: _exchanges(unit) if every else [unit], splits=every)


def read_documents(part: SourcePart) -> Iterator[Document | Dropped]:
    """The documents of a part, named as in `read_pairs`, with the same errors."""
    # That a tree goes on after a reply is its project's doing: each reply to its root is a response like the others.
    return _read(part, to_document, lambda unit, how: _exchanges(unit)[:1] if how.splits else [unit])


def _read(
    part: SourcePart,
    convert: Callable[[str, RawRow, Conversation], T | Dropped],
    cut: Callable[[Unit, Format], list[Unit]],
    splits: bool = False,
) -> Iterator[T | Dropped]:
    how = FORMATS[part.format] if part.format else None
    for row in read_rows(part, {*how.fields, "license", "header", "within"} if how else None):
        if isinstance(row, Dropped):
            yield row
            continue
        if how is None:
            # There was no well-formed row in all the file.
            raise changed(part)
        try:
            units = _units(cut(unit, how) for unit in how.read(row.values))
        except Unusable as error:
            yield error.row(row.id, row.where)
            continue
        for n, unit in enumerate(units or [()]):
            id = _unit_id(row.id, n, how.splits or splits)
            yield unit.row(id, row.where) if isinstance(unit, Unusable) else convert(id, row, unit)


def _units(pieces: Iterable[list[Unit]]) -> list[Unit]:
    """All of them; those beyond what a row may have are counted and not held. Raises Unusable where there are any."""
    units: list[Unit] = []
    beyond = 0
    for more in pieces:
        if len(units) + len(more) > _MOST_UNITS or beyond:
            beyond += len(more)
        else:
            units += more
    if beyond:
        raise Unusable("too_many_units", f"the row has {len(units) + beyond} units, more than {_MOST_UNITS}")
    return units


def _unit_id(row: str, n: int, splits: bool) -> str:
    # A segment of a page is a unit of its page already.
    already = row.endswith("/0") or is_further(row)
    return f"{row}/{n}" if splits and not (n == 0 and already) else row


def _exchanges(unit: Unit) -> list[Unit]:
    """A conversation cut before each question; system messages are left out, and an unreadable one stays whole."""
    if isinstance(unit, Unusable):
        return [unit]
    spoken = _spoken(unit)
    cuts = [0, *(n for n, turn in enumerate(spoken) if n and turn.role == "user"), len(spoken)]
    return [spoken[start:end] for start, end in pairwise(cuts)]


def to_pair(id: str, row: RawRow, turns: Conversation) -> SeedPair | Dropped:
    """The first turn: the first user message and the answer to it. System messages are left out.

    What follows the first answer does not matter, so a conversation that ends with a question still has a pair.
    """
    spoken = _spoken(turns)
    if "assistant" not in (turn.role for turn in spoken):
        return rejected(id, "no_response", detail=row.where)
    if [turn.role for turn in spoken[:2]] != ["user", "assistant"]:
        return rejected(id, "roles_out_of_order" if len(spoken) > 1 else "no_prompt", detail=row.where)
    question, answer = spoken[:2]
    prompt, completion = clean(question.content), clean(answer.content)
    if not prompt or not completion:
        return quarantined(id, "empty_response" if prompt else "empty_prompt", row.where)
    return SeedPair(
        id=id,
        source=row.source,
        license=_license(row),
        prompt=prompt,
        completion=completion,
        language=answer.language or question.language,
        rank=answer.rank,
        quality=answer.quality,
    )


def to_document(id: str, row: RawRow, turns: Conversation) -> Document | Dropped:
    """The response of a single-turn conversation. Its prompt, if any, does not matter: a new one is generated.

    A conversation that ends with a question is `odd_turns`, whatever its length; another of several turns `multi_turn`.
    """
    spoken = _spoken(turns)
    roles = [turn.role for turn in spoken]
    if "assistant" not in roles:
        return rejected(id, "no_response", detail=row.where)
    if roles not in (["assistant"], ["user", "assistant"]):
        alternating = roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
        if not alternating:
            return rejected(id, "roles_out_of_order", detail=row.where)
        if len(roles) % 2:
            return quarantined(id, "odd_turns", row.where)
        return rejected(id, "multi_turn", detail=row.where)
    text = clean(spoken[-1].content)
    if not text:
        return quarantined(id, "empty_response", row.where)
    header, within = row.values.get("header"), row.values.get("within")
    return Document(
        id=id,
        source=row.source,
        license=_license(row),
        text=text,
        header=header if isinstance(header, str) else None,
        within=tuple(item for item in within if isinstance(item, str)) if isinstance(within, list | tuple) else (),
    )


def clean(text: str) -> str:
    """`text` without edge white space and with line feeds alone as line ends. Nothing else of it changes.

    HTML entities stay, though most of those in LIMA were left over from a page: nothing tells them from the ones
    that a text about HTML means. A corpus that needs it has its `hook`.
    """
    return text.replace("\r\n", "\n").strip()


def _spoken(turns: Conversation) -> Conversation:
    return tuple(turn for turn in turns if turn.role != "system")


# Values


def _license(row: RawRow) -> str | None:
    return _label(row.values.get("license"))


def _label(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _number(value: object, top: float) -> float | None:
    """A label on a scale from 0 to `top`. What is no such number counts as a label that is not there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= top else None


def _rank(value: object) -> int | None:
    # pandas makes a column of ranks with gaps one of floats.
    number = _number(value, _MAX_RANK)
    return int(number) if number is not None and number.is_integer() else None


def _quality(labels: object) -> float | None:
    """The quality among a message's labels: `{"quality": {"value": …}}`, or in Parquet lists of `name` and `value`."""
    if not isinstance(labels, dict):
        return None
    names, values, quality = labels.get("name"), labels.get("value"), labels.get("quality")
    if isinstance(names, list) and isinstance(values, list):
        return _number(next((value for name, value in zip(names, values, strict=False) if name == "quality"), None), 1)
    return _number(quality.get("value"), 1) if isinstance(quality, dict) else None


def _field(values: Values, name: str, place: str = "") -> object:
    if name not in values:
        raise Unusable("missing_field", f"no field {place}{name}")
    return values[name]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(place, "a text", value)
    return value


def _list(value: object, place: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong_type(place, "a list", value)
    return value


def _object(value: object, place: str, wanted: str) -> Values:
    if not isinstance(value, Mapping):
        raise _wrong_type(place, wanted, value)
    return value


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _wrong_type(place: str, wanted: str, value: object) -> Unusable:
    return Unusable("wrong_type", f"{place} is {'null' if value is None else type(value).__name__}, not {wanted}")


# Messages


def _side(values: Values, name: str, role: str) -> Conversation:
    value = _field(values, name)
    if isinstance(value, list):
        return _turns(value, name)
    # GPT-3's fine-tuning files, Self-Instruct's among them, say so where a completion ends.
    return (Turn(role, _text(value, name).rstrip().removesuffix(_END_OF_TEXT)),)


def _turns(
    items: list[object], place: str, role: str = "role", content: str = "content", roles: Mapping[str, str] = _ROLES
) -> Conversation:
    return tuple(_turn(item, f"{place}[{n}]", role, content, roles) for n, item in enumerate(items))


def _turn(item: object, place: str, role: str, content: str, roles: Mapping[str, str]) -> Turn:
    values = _object(item, place, f"a message with {role} and {content}")
    texts = [_text(_field(values, key, f"{place}."), f"{place}.{key}") for key in (role, content)]
    return Turn(_role(texts[0], f"{place}.{role}", roles), texts[1])


def _role(name: str, place: str, roles: Mapping[str, str]) -> str:
    if name not in roles:
        raise Unusable("unknown_role", f"{place} is {name[:40]!a}; known are {', '.join(roles)}")
    return roles[name]


def _task(instruction: str, values: Values, place: str = "") -> Conversation:
    given = values.get("input")
    parts = clean(instruction), "" if given is None else clean(_text(given, f"{place}input"))
    output = _text(_field(values, "output", place), f"{place}output")
    return Turn("user", "\n\n".join(filter(None, parts))), Turn("assistant", output)


# Trees of messages


def _tree_turn(message: object, place: str) -> Turn:
    values = _object(message, place.rstrip("."), "a message with role and text")
    if reason := _left_out(values):
        raise Unwanted(reason, f"{place}message_id is {values.get('message_id')!a:.60}")
    role, text = (_text(_field(values, key, place), f"{place}{key}") for key in ("role", "text"))
    return Turn(
        _role(role, f"{place}role", _OASST_ROLES),
        text,
        _label(values.get("lang")),
        _rank(values.get("rank")),
        _quality(values.get("labels")),
    )


def _left_out(message: object) -> str | None:
    if isinstance(message, Mapping):
        for field, (value, reason) in _LEFT_OUT.items():
            if message.get(field) is value:
                return reason
    return None


def _replies(message: object, place: str) -> list[tuple[object, str]]:
    """The replies with their places, by rank; those without one come last, as they stand."""
    replies = message.get("replies") if isinstance(message, Mapping) else None
    items = [] if replies is None else _list(replies, f"{place}replies")

    def rank(reply: tuple[object, str]) -> float:
        found = _rank(reply[0].get("rank")) if isinstance(reply[0], Mapping) else None
        return _MAX_RANK + 1 if found is None else found

    return sorted(((item, f"{place}replies[{n}].") for n, item in enumerate(items)), key=rank)


def _thread(message: object, place: str) -> Iterator[Turn]:
    """A message and what follows it along the best-ranked replies that are not left out."""
    yield _tree_turn(message, place)
    for reply, its_place in _replies(message, place):
        if not _left_out(reply):
            yield from _thread(reply, its_place)
            return
