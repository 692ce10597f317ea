"""Each format becomes turns; turns become a pair or a document, or say why not."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from selfalign.core.errors import MismatchError
from selfalign.core.records import Document, Dropped, Pair, SourceFile
from selfalign.data.formats import FORMATS, FormatName, Values, detect, read_documents, read_pairs
from selfalign.data.sources import resolve

Listed = Callable[..., SourceFile]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def pair_of(listed: Listed) -> Callable[..., Pair | Dropped]:
    def read(values: Values, format: FormatName | None = None) -> Pair | Dropped:
        (item,) = read_pairs(listed(json.dumps(values).encode()), format)
        return item

    return read


@pytest.fixture
def document_of(listed: Listed) -> Callable[..., Document | Dropped]:
    def read(values: Values, format: FormatName | None = None) -> Document | Dropped:
        (item,) = read_documents(listed(json.dumps(values).encode()), format)
        return item

    return read


ONE_TURN: dict[str, tuple[FormatName, Values]] = {
    "messages": ("messages", {"messages": [user("Why?"), assistant("Because.")]}),
    "messages with a system turn": ("messages", {"messages": [SYSTEM, user("Why?"), assistant("Because.")]}),
    "texts": ("prompt_completion", {"prompt": "Why?", "completion": "Because."}),
    "lists of messages": (
        "prompt_completion",
        {"prompt": [SYSTEM, user("Why?")], "completion": [assistant("Because.")]},
    ),
    "lima": ("lima", {"conversations": ["Why?", "Because."], "source": "stackexchange"}),
    "guanaco": ("guanaco", {"text": "### Human: Why?### Assistant: Because."}),
    "guanaco with its answer apart": (
        "guanaco",
        {"text": "### Human: Why? ### Assistant:", "output": "Because.", "input": "…", "prompt": "…"},
    ),
    "guanaco on lines": ("guanaco", {"text": "\r\n### Human: Why?\r\n### Assistant:\r\n Because.\r\n"}),
}


@pytest.mark.parametrize(("format", "values"), ONE_TURN.values(), ids=ONE_TURN.keys())
def test_every_format_is_told_from_its_fields_and_gives_its_pair_and_its_document(
    listed: Listed,
    pair_of: Callable[..., Pair],
    document_of: Callable[..., Document],
    format: FormatName,
    values: Values,
) -> None:
    pair = Pair(id="rows/0000000", source="rows", license="MIT", prompt="Why?", completion="Because.")
    licensed = {**values, "license": "MIT"}
    assert detect(listed(json.dumps(values).encode())) == format
    for name in (None, format):
        assert pair_of(licensed, name) == pair
        assert document_of(licensed, name) == Document(id="rows/0000000", source="rows", license="MIT", text="Because.")


def test_every_name_has_a_format() -> None:
    assert set(FORMATS) == set(get_args(FormatName))


def test_a_plain_document_is_a_document_and_no_pair(
    pair_of: Callable[..., Dropped], document_of: Callable[..., Document]
) -> None:
    assert document_of({"text": " A text.\r\nIts second line. "}).text == "A text.\nIts second line."
    assert pair_of({"text": "A text."}).reason == "no_prompt"


def test_a_markdown_heading_in_an_answer_is_not_a_role_marker(pair_of: Callable[..., Pair]) -> None:
    answer = "### First\nthen\n#### Human: anatomy\n### Assistants: a list"
    assert pair_of({"text": f"### Human: Why?### Assistant: {answer}### Human: And?"}).completion == answer


def test_a_guanaco_text_may_open_with_a_preamble_when_its_format_is_named(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of({"text": "A chat. ### Human: Why?### Assistant: Because."}, "guanaco")
    assert (pair.prompt, pair.completion) == ("Why?", "Because.")


def test_an_answer_that_is_there_is_not_replaced_by_output(pair_of: Callable[..., Pair]) -> None:
    assert pair_of({"text": "### Human: Why?### Assistant: Because.", "output": "other"}).completion == "Because."


def test_only_edge_white_space_and_line_ends_of_a_text_change(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of({"prompt": " \n{x} &amp; {y}\r\nz\t", "completion": "\u3000a\r\n\r\n  b &lt;c&gt; \0 d\r\n"})
    assert (pair.prompt, pair.completion) == ("{x} &amp; {y}\nz", "a\n\n  b &lt;c&gt; \0 d")


REJECTED: dict[str, tuple[Values, str | None, str | None]] = {
    "two turns": ({"conversations": ["a", "b", "c", "d"]}, None, "multi_turn"),
    "a trailing question": ({"conversations": ["a", "b", "c"]}, None, "odd_turns"),
    "only a prompt": ({"conversations": ["a"]}, "no_response", "no_response"),
    "only prompts": ({"messages": [user("a"), user("b")]}, "no_response", "no_response"),
    "only a system turn": ({"messages": [SYSTEM]}, "no_response", "no_response"),
    "no turns": ({"messages": []}, "no_response", "no_response"),
    "an empty response": ({"prompt": "a", "completion": " \n"}, "empty_response", "empty_response"),
    "an empty last response": ({"text": "### Human: a### Assistant: "}, "empty_response", "empty_response"),
    "an empty prompt": ({"prompt": " ", "completion": "b"}, "empty_prompt", None),
    "an answer first": ({"messages": [assistant("a"), user("b")]}, "roles_out_of_order", "roles_out_of_order"),
    "two questions": (
        {"messages": [user("a"), user("b"), assistant("c")]},
        "roles_out_of_order",
        "roles_out_of_order",
    ),
    "no question": ({"messages": [assistant("a")]}, "no_prompt", None),
}


# What no reading of the row could use, against what this one does not want.
BROKEN = ("empty_response", "empty_prompt", "odd_turns")


@pytest.mark.parametrize(("values", "as_pair", "as_document"), REJECTED.values(), ids=REJECTED.keys())
def test_a_conversation_that_does_not_serve_is_dropped_with_its_reason_and_place(
    pair_of: Callable[..., Pair | Dropped],
    document_of: Callable[..., Document | Dropped],
    values: Values,
    as_pair: str | None,
    as_document: str | None,
) -> None:
    for item, reason in ((pair_of(values), as_pair), (document_of(values), as_document)):
        if reason is None:
            assert not isinstance(item, Dropped)
        else:
            assert isinstance(item, Dropped)
            assert (item.reason, item.outcome) == (reason, "quarantined" if reason in BROKEN else "rejected")
            assert str(item.detail).startswith("rows.jsonl:1, byte offset 0, sha256 ")


QUARANTINED: dict[str, tuple[FormatName, Values, str, str]] = {
    "no messages": ("messages", {"text": "a"}, "missing_field", "no field messages"),
    "messages not a list": ("messages", {"messages": "a"}, "wrong_type", "messages is str, not a list"),
    "a message not an object": ("messages", {"messages": ["a"]}, "wrong_type", "messages[0] is str"),
    "no content": ("messages", {"messages": [{"role": "user"}]}, "missing_field", "no field messages[0].content"),
    "null content": (
        "messages",
        {"messages": [{"role": "user", "content": None}]},
        "wrong_type",
        "messages[0].content is null",
    ),
    "a tool": ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown_role", "'tool'"),
    "no completion": ("prompt_completion", {"prompt": "a"}, "missing_field", "no field completion"),
    "a number": ("prompt_completion", {"prompt": 1, "completion": "b"}, "wrong_type", "prompt is int, not a text"),
    "null": ("document", {"text": None}, "wrong_type", "text is null, not a text"),
    "conversations of numbers": ("lima", {"conversations": [1]}, "wrong_type", "conversations[0] is int"),
    "no markers": ("guanaco", {"text": "hello"}, "no_role_marker", "'### Human:'"),
    "an answer apart that is none": (
        "guanaco",
        {"text": "### Human: a### Assistant:", "output": 1},
        "wrong_type",
        "output is int",
    ),
}


@pytest.mark.parametrize(("format", "values", "reason", "note"), QUARANTINED.values(), ids=QUARANTINED.keys())
def test_a_row_without_its_formats_fields_and_types_is_quarantined_and_says_what_is_wrong(
    pair_of: Callable[..., Dropped], format: FormatName, values: Values, reason: str, note: str
) -> None:
    item = pair_of(values, format)
    assert isinstance(item, Dropped)
    assert (item.reason, item.outcome) == (reason, "quarantined")
    assert note in str(item.detail).split(": ", 1)[1]


def test_an_odd_first_row_does_not_hide_the_format(listed: Listed) -> None:
    rows = b'broken\n{"version": 2}\n{"prompt": "a", "completion": "b"}\n'
    outcome = [i.reason if isinstance(i, Dropped) else "pair" for i in read_pairs(listed(rows))]
    assert outcome == ["invalid_json", "missing_field", "pair"]


def test_fields_that_fit_no_format_are_named_in_the_error(listed: Listed) -> None:
    with pytest.raises(MismatchError, match=r"rows.jsonl: .* fields body, title; known are messages \(messages\)"):
        list(read_pairs(listed(b'{"title": "a", "body": "b"}')))


def test_a_message_of_a_tree_is_not_taken_for_a_document(listed: Listed) -> None:
    with pytest.raises(MismatchError, match="replies, role, text"):
        list(read_documents(listed(b'{"text": "A question?", "role": "prompter", "replies": []}')))


def test_a_file_of_broken_rows_is_quarantined_whole(listed: Listed) -> None:
    assert [item.id for item in read_pairs(listed(b"x\ny\n"))] == ["rows/0000000", "rows/0000001"]


def test_a_license_that_is_no_text_is_left_out(pair_of: Callable[..., Pair]) -> None:
    for license in (None, 1, " ", ["MIT"]):
        assert pair_of({"prompt": "a", "completion": "b", "license": license}).license is None


# Real data


def counted(items: "list[Pair | Dropped] | list[Document | Dropped]") -> Counter[str]:
    return Counter(item.reason if isinstance(item, Dropped) else "kept" for item in items)


def test_lima_has_1000_single_turn_documents_of_1030(real_data: Path) -> None:
    (file,) = resolve("lima/train.jsonl", real_data).files
    assert detect(file) == "lima"
    assert counted(list(read_documents(file))) == {"kept": 1000, "multi_turn": 29, "odd_turns": 1}
    assert counted(list(read_pairs(file))) == {"kept": 1030}


def test_limas_texts_lose_their_edge_white_space_and_nothing_else(real_data: Path) -> None:
    (file,) = resolve("lima/train.jsonl", real_data).files
    rows = [json.loads(line) for line in Path(file.path).read_text(encoding="utf-8").split("\n") if line]
    pairs = [item for item in read_pairs(file) if isinstance(item, Pair)]
    assert [[pair.prompt, pair.completion] for pair in pairs] == [
        [text.strip() for text in row["conversations"][:2]] for row in rows
    ]


def test_all_300_rows_of_limas_test_set_lack_a_response(real_data: Path) -> None:
    (file,) = resolve("lima/test.jsonl", real_data).files
    assert counted(list(read_pairs(file))) == counted(list(read_documents(file))) == {"no_response": 300}


def test_every_guanaco_row_has_a_first_turn(real_data: Path) -> None:
    (file,) = resolve("guanaco/oa_questions.jsonl", real_data).files
    assert detect(file) == "guanaco"
    pairs = [item for item in read_pairs(file) if isinstance(item, Pair)]
    assert len(pairs) == file.rows == 953
    assert len({(pair.prompt, pair.completion) for pair in pairs}) == 778
    assert len({pair.prompt for pair in pairs}) == 517
    assert not any("### Human:" in pair.prompt + pair.completion for pair in pairs)


def test_crlf_line_ends_change_nothing_but_places(real_data: Path, listed: Listed) -> None:
    data = (real_data / "guanaco" / "oa_questions.jsonl").read_bytes()
    assert list(read_pairs(listed(data))) == list(read_pairs(listed(data.replace(b"\n", b"\r\n"))))
