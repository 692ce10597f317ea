"""The seed formats: how a source row becomes a conversation, and a conversation a pair or a document.

A format is one function from the row's values to its turns, found by name in FORMATS. A further one is a
function, a line in the table and its name in FormatName.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from selfalign.core.errors import MismatchError
from selfalign.core.records import Document, Dropped, Message, Pair, SourceFile, quarantined, rejected
from selfalign.data.readers import RawRow, Unusable, read_rows

FormatName = Literal["messages", "prompt_completion", "lima", "guanaco", "document"]
Values = Mapping[str, object]
Turns = tuple[Message, ...]
T = TypeVar("T")

_ROLES = ("system", "user", "assistant")
_GUANACO_ROLE = re.compile(r"(?<!#)### ?(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one shape are read. A row fits that has the fields it `needs` and, if given, passes `fits`."""

    turns: Callable[[Values], Turns]
    needs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    fits: Callable[[Values], bool] = lambda values: True


def _messages(values: Values) -> Turns:
    """`messages`: a list of role and content."""
    return _turns(_list(_field(values, "messages"), "messages"), "messages")


def _prompt_completion(values: Values) -> Turns:
    """`prompt` and `completion`: each a text, or a list of messages."""
    return _side(values, "prompt", "user") + _side(values, "completion", "assistant")


def _lima(values: Values) -> Turns:
    """`conversations`: a list of texts, human and assistant in turn."""
    texts = _list(_field(values, "conversations"), "conversations")
    roles = ("user", "assistant")
    return tuple(Message(role=roles[n % 2], content=_text(text, f"conversations[{n}]")) for n, text in enumerate(texts))


def _guanaco(values: Values) -> Turns:
    """`text` with role markers; where it ends in an empty answer, that answer stands in `output`.

    Only the markers divide it: `###` is also a Markdown heading inside answers.
    """
    before, *parts = _GUANACO_ROLE.split(_text(_field(values, "text"), "text"))
    if not parts:
        raise Unusable("no_role_marker", "text has no '### Human:' and no '### Assistant:'")
    turns = [Message(role="system", content=before)] if before.strip() else []
    for marker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Message(role="user" if marker == "Human" else "assistant", content=content))
    answer = values.get("output")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() and answer is not None:
        turns[-1] = Message(role="assistant", content=_text(answer, "output"))
    return tuple(turns)


def _document(values: Values) -> Turns:
    """`text`: a response that nobody has asked for yet."""
    return (Message(role="assistant", content=_text(_field(values, "text"), "text")),)


# In the order in which they are tried on a file whose format is not named.
FORMATS: Mapping[FormatName, Format] = {
    "messages": Format(_messages, needs=("messages",)),
    "prompt_completion": Format(_prompt_completion, needs=("prompt", "completion")),
    "lima": Format(_lima, needs=("conversations",)),
    "guanaco": Format(
        _guanaco,
        needs=("text",),
        reads=("output",),
        fits=lambda values: bool(_GUANACO_ROLE.match(str(values["text"]).lstrip())),
    ),
    # A text with a role is a message of some tree: taken for a document, its question would pass for a response.
    "document": Format(
        _document, needs=("text",), fits=lambda values: isinstance(values["text"], str) and "role" not in values
    ),
}


def detect(file: SourceFile) -> FormatName | None:
    """The format of the first row that fits one; None where the file has no well-formed row.

    Raises MismatchError, naming the fields seen, where no row fits any.
    """
    seen: list[str] | None = None
    for row in read_rows(file):
        if isinstance(row, RawRow):
            if (format := _fitting(row.values)) is not None:
                return format
            seen = seen or sorted(row.values)
    if seen is None:
        return None
    known = "; ".join(f"{format} ({', '.join(how.needs)})" for format, how in FORMATS.items())
    raise MismatchError(f"{file.path}: no format reads the fields {', '.join(seen) or '(none)'}; known are {known}")


def _fitting(values: Values) -> FormatName | None:
    for format, how in FORMATS.items():
        if all(field in values for field in how.needs) and how.fits(values):
            return format
    return None


def conversation(row: RawRow, format: FormatName) -> Turns | Dropped:
    """The turns of a row; quarantined where it does not have the format's fields and types."""
    try:
        return FORMATS[format].turns(row.values)
    except Unusable as error:
        return error.row(row.id, row.where)


def to_pair(row: RawRow, turns: Turns) -> Pair | Dropped:
    """The first turn: the first user message and the answer to it. System messages are left out.

    What follows the first answer does not matter, so a conversation that ends with a question still has a pair.
    """
    spoken = [turn for turn in turns if turn["role"] != "system"]
    roles = [turn["role"] for turn in spoken[:2]]
    if "assistant" not in (turn["role"] for turn in spoken):
        return rejected(row.id, "no_response", detail=row.where)
    if roles != ["user", "assistant"]:
        return rejected(row.id, "roles_out_of_order" if len(spoken) > 1 else "no_prompt", detail=row.where)
    prompt, completion = (clean(turn["content"]) for turn in spoken[:2])
    if not prompt or not completion:
        return quarantined(row.id, "empty_response" if prompt else "empty_prompt", row.where)
    return Pair(id=row.id, source=row.source, license=_license(row), prompt=prompt, completion=completion)


def to_document(row: RawRow, turns: Turns) -> Document | Dropped:
    """The response of a single-turn conversation. Its prompt, if any, does not matter: a new one is generated.

    A conversation that ends with a question is `odd_turns`, whatever its length; another of several turns `multi_turn`.
    """
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    if "assistant" not in roles:
        return rejected(row.id, "no_response", detail=row.where)
    if roles not in (["assistant"], ["user", "assistant"]):
        alternating = roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
        if not alternating:
            return rejected(row.id, "roles_out_of_order", detail=row.where)
        if len(roles) % 2:
            return quarantined(row.id, "odd_turns", row.where)
        return rejected(row.id, "multi_turn", detail=row.where)
    text = clean(next(turn["content"] for turn in turns if turn["role"] == "assistant"))
    if not text:
        return quarantined(row.id, "empty_response", row.where)
    return Document(id=row.id, source=row.source, license=_license(row), text=text)


def read_pairs(file: SourceFile, format: FormatName | None = None) -> Iterator[Pair | Dropped]:
    """The seed pairs of a file: `file.rows` units in all. Raises MismatchError where no format fits."""
    return _read(file, format, to_pair)


def read_documents(file: SourceFile, format: FormatName | None = None) -> Iterator[Document | Dropped]:
    """The corpus documents of a file: `file.rows` units in all. Raises MismatchError where no format fits."""
    return _read(file, format, to_document)


def _read(
    file: SourceFile, format: FormatName | None, convert: Callable[[RawRow, Turns], T | Dropped]
) -> Iterator[T | Dropped]:
    name = format or detect(file)
    fields = {*FORMATS[name].needs, *FORMATS[name].reads, "license"} if name else None
    for row in read_rows(file, fields):
        if isinstance(row, Dropped):
            yield row
            continue
        # Without a format there was no well-formed row, so there is none here.
        assert name is not None
        turns = conversation(row, name)
        yield turns if isinstance(turns, Dropped) else convert(row, turns)


def clean(text: str) -> str:
    """`text` without edge white space and with line feeds alone as line ends. Nothing else of it changes."""
    return text.replace("\r\n", "\n").strip()


def _license(row: RawRow) -> str | None:
    license = row.values.get("license")
    return license.strip() or None if isinstance(license, str) else None


def _field(values: Values, name: str) -> object:
    if name not in values:
        raise Unusable("missing_field", f"no field {name}")
    return values[name]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(place, "a text", value)
    return value


def _list(value: object, place: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong_type(place, "a list", value)
    return value


def _wrong_type(place: str, wanted: str, value: object) -> Unusable:
    return Unusable("wrong_type", f"{place} is {'null' if value is None else type(value).__name__}, not {wanted}")


def _side(values: Values, name: str, role: str) -> Turns:
    value = _field(values, name)
    if isinstance(value, list):
        return _turns(value, name)
    return (Message(role=role, content=_text(value, name)),)


def _turns(items: list[object], place: str) -> Turns:
    return tuple(_message(item, f"{place}[{n}]") for n, item in enumerate(items))


def _message(item: object, place: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong_type(place, "a message with role and content", item)
    for key in ("role", "content"):
        if key not in item:
            raise Unusable("missing_field", f"no field {place}.{key}")
    role = _text(item["role"], f"{place}.role")
    if role not in _ROLES:
        raise Unusable("unknown_role", f"{place}.role is {role[:40]!a}; known are {', '.join(_ROLES)}")
    return Message(role=role, content=_text(item["content"], f"{place}.content"))
