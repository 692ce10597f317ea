"""Each format becomes conversations; conversations become pairs or documents, or say why not."""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfalign.core.errors import MismatchError, StorageError
from selfalign.core.records import Document, Dropped, SeedPair, SourcePart
from selfalign.data.config import FormatName
from selfalign.data.formats import FORMATS, Values, detect, read_documents, read_pairs
from selfalign.data.readers import RawRow, extents

Pairs = list[SeedPair | Dropped]
Documents = list[Document | Dropped]
Written = Callable[..., SourcePart]
# Of a second or a later unit of a record, as the ledger tells them.
FURTHER = re.compile(r"/[1-9]\d{0,5}$")


def part_of(path: Path, format: FormatName | None = None) -> SourcePart:
    """A file that is a single part, in the format named or told."""
    digest, (extent,) = extents(path)
    part = SourcePart(id=f"{path.stem}/0000000", path=str(path), sha256=digest, **asdict(extent))
    return replace(part, format=format or detect(part))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write rows, or the bytes themselves, into a JSONL file that is one part."""

    def write(*rows: Values | bytes, format: FormatName | None = None) -> SourcePart:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        return part_of(tmp_path / "rows.jsonl", format)

    return write


@pytest.fixture
def pair_of(written: Written) -> Callable[..., SeedPair | Dropped]:
    def read(values: Values, format: FormatName | None = None) -> SeedPair | Dropped:
        (item,) = read_pairs(written(values, format=format))
        return item

    return read


@pytest.fixture
def document_of(written: Written) -> Callable[..., Document | Dropped]:
    def read(values: Values, format: FormatName | None = None) -> Document | Dropped:
        (item,) = read_documents(written(values, format=format))
        return item

    return read


def said(items: Iterable[SeedPair | Document | Dropped]) -> list[object]:
    """Of each item what matters to its reader: texts, or the reason."""
    return [
        item.reason
        if isinstance(item, Dropped)
        else (item.prompt, item.completion)
        if isinstance(item, SeedPair)
        else item.text
        for item in items
    ]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def message(role: str, text: str, *replies: object, **more: object) -> dict[str, object]:
    """A message of a tree."""
    return {"message_id": text, "role": role, "text": text, "replies": list(replies), **more}


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = message("assistant", "Because.")
ROOT = message("prompter", "Why?", ANSWER, parent_id=None)
TREE = {"message_tree_id": "Why?", "tree_state": "ready_for_export", "prompt": ROOT}
INSTANCE = {"input": "", "output": "Because."}

ONE_TURN: dict[str, tuple[FormatName, Values]] = {
    "messages": ("messages", {"messages": [user("Why?"), assistant("Because.")]}),
    "messages with a system turn": ("messages", {"messages": [SYSTEM, user("Why?"), assistant("Because.")]}),
    "texts": ("prompt_completion", {"prompt": "Why?", "completion": "Because."}),
    "texts for GPT-3": ("prompt_completion", {"prompt": "Why?\n\n", "completion": " Because.<|endoftext|>"}),
    "lists of messages": (
        "prompt_completion",
        {"prompt": [SYSTEM, user("Why?")], "completion": [assistant("Because.")]},
    ),
    "lima": ("lima", {"conversations": ["Why?", "Because."], "source": "stackexchange"}),
    "sharegpt": (
        "sharegpt",
        {"id": "x", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    ),
    "guanaco": ("guanaco", {"text": "### Human: Why?### Assistant: Because."}),
    "guanaco with its answer apart": (
        "guanaco",
        {"text": "### Human: Why? ### Assistant:", "output": "Because.", "input": "…", "prompt": "…"},
    ),
    "guanaco on lines": ("guanaco", {"text": "\r\n### Human: Why?\r\n### Assistant:\r\n Because.\r\n"}),
    "a tree": ("oasst", TREE),
    "a root message": ("oasst", ROOT),
    "alpaca": (
        "alpaca",
        {"instruction": "Why?", "input": "", "output": "Because.", "text": "Below is an instruction …"},
    ),
    "alpaca without input": ("alpaca", {"instruction": " Why?\n", "output": "\nBecause."}),
    "alpaca with null input": ("alpaca", {"instruction": "Why?", "input": None, "output": "Because."}),
    "a task": (
        "self_instruct",
        {"id": "x", "instruction": "Why?", "instances": [INSTANCE], "is_classification": False},
    ),
}


@pytest.mark.parametrize(("format", "values"), ONE_TURN.values(), ids=ONE_TURN.keys())
def test_every_format_is_told_from_its_fields_and_gives_its_pair_and_its_document(
    written: Written,
    pair_of: Callable[..., SeedPair],
    document_of: Callable[..., Document],
    format: FormatName,
    values: Values,
) -> None:
    id = "rows/0000000/0" if format in ("oasst", "self_instruct") else "rows/0000000"
    pair = SeedPair(id=id, source="rows", license="MIT", prompt="Why?", completion="Because.")
    licensed = {**values, "license": "MIT"}
    assert detect(written(values)) == format
    for name in (None, format):
        assert pair_of(licensed, name) == pair
        assert document_of(licensed, name) == Document(id=id, source="rows", license="MIT", text="Because.")


def test_every_name_has_a_format() -> None:
    assert set(FORMATS) == set(get_args(FormatName))


class Watched(dict[str, object]):
    """Notes which fields are asked for."""

    def __init__(self, values: Values) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize(("format", "values"), ONE_TURN.values(), ids=ONE_TURN.keys())
def test_a_format_asks_for_no_other_columns_than_those_that_it_names(format: FormatName, values: Values) -> None:
    watched = Watched(values)
    list(FORMATS[format].read(watched))
    assert watched.asked <= set(FORMATS[format].fields)


def test_a_plain_document_is_a_document_and_no_pair(
    pair_of: Callable[..., Dropped], document_of: Callable[..., Document]
) -> None:
    assert document_of({"text": " A text.\r\nIts second line. "}).text == "A text.\nIts second line."
    assert pair_of({"text": "A text."}).reason == "no_prompt"


def test_a_segment_keeps_its_header_even_an_empty_one_and_what_it_lies_within(
    document_of: Callable[..., Document],
) -> None:
    for header in ("Usage", ""):
        document = document_of({"text": "A text.", "header": header, "within": ["page/0000000/0", "page/0000000/1"]})
        assert (document.header, document.within) == (header, ("page/0000000/0", "page/0000000/1"))
    document = document_of({"text": "A text.", "header": 1, "within": "page"})
    assert (document.header, document.within) == (None, ())


def test_only_edge_white_space_and_line_ends_of_a_text_change(pair_of: Callable[..., SeedPair]) -> None:
    pair = pair_of({"prompt": " \n{x} &amp; {y}\r\nz\t", "completion": "\u3000a\r\n\r\n  b &lt;c&gt; \0 d\r\n"})
    assert (pair.prompt, pair.completion) == ("{x} &amp; {y}\nz", "a\n\n  b &lt;c&gt; \0 d")


def test_a_license_that_is_no_text_is_left_out(pair_of: Callable[..., SeedPair]) -> None:
    for license in (None, 1, " ", ["MIT"]):
        assert pair_of({"prompt": "a", "completion": "b", "license": license}).license is None


# What is dropped

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
    "an empty instruction": ({"instruction": " ", "input": "\n", "output": "b"}, "empty_prompt", None),
    "an empty output": ({"instruction": "a", "output": ""}, "empty_response", "empty_response"),
    "an answer first": ({"messages": [assistant("a"), user("b")]}, "roles_out_of_order", "roles_out_of_order"),
    "two questions": (
        {"messages": [user("a"), user("b"), assistant("c")]},
        "roles_out_of_order",
        "roles_out_of_order",
    ),
    "no question": ({"messages": [assistant("a")]}, "no_prompt", None),
    "no reply": (message("prompter", "a"), "no_response", "no_response"),
    "null replies": ({"prompt": {**message("prompter", "a"), "replies": None}}, "no_response", "no_response"),
    "no instances": ({"instruction": "a", "instances": []}, "no_response", "no_response"),
    "a deleted question": (message("prompter", "a", ANSWER, deleted=True), "deleted", "deleted"),
    "a deleted reply": (message("prompter", "a", {**ANSWER, "deleted": True}), "deleted", "deleted"),
    "a reply that failed its review": (
        message("prompter", "a", {**ANSWER, "review_result": False}),
        "spam",
        "spam",
    ),
    "a tree given up": (
        {**TREE, "tree_state": "aborted_low_grade"},
        "not_ready_for_export",
        "not_ready_for_export",
    ),
}


# What no reading of the row could use, against what this one does not want.
BROKEN = ("empty_response", "empty_prompt", "odd_turns")


@pytest.mark.parametrize(("values", "as_pair", "as_document"), REJECTED.values(), ids=REJECTED.keys())
def test_a_conversation_that_does_not_serve_is_dropped_with_its_reason_and_place(
    pair_of: Callable[..., SeedPair | Dropped],
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
    "a function's result": (
        "sharegpt",
        {"conversations": [{"from": "observation", "value": "x"}]},
        "unknown_role",
        "conversations[0].from is 'observation'; known are system, human, user, gpt,",
    ),
    "no value": ("sharegpt", {"conversations": [{"from": "gpt"}]}, "missing_field", "no field conversations[0].value"),
    "no markers": ("guanaco", {"text": "hello"}, "no_role_marker", "'### Human:'"),
    "an answer apart that is none": (
        "guanaco",
        {"text": "### Human: a### Assistant:", "output": 1},
        "wrong_type",
        "output is int",
    ),
    "no output": ("alpaca", {"instruction": "a", "input": ""}, "missing_field", "no field output"),
    "an input that is none": ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "wrong_type", "input is int"),
    "a flat message": ("oasst", {"role": "prompter", "text": "a"}, "missing_field", "no field replies"),
    "a tree without a prompt": ("oasst", {"prompt": None}, "wrong_type", "prompt is null, not a message"),
    "a reply without a text": (
        "oasst",
        {"prompt": message("prompter", "a", {"role": "assistant"})},
        "missing_field",
        "no field prompt.replies[0].text",
    ),
    "a reply by nobody known": (
        "oasst",
        message("prompter", "a", message("bot", "b")),
        "unknown_role",
        "replies[0].role",
    ),
    "replies that are none": ("oasst", {**ROOT, "replies": "a"}, "wrong_type", "replies is str, not a list"),
    "instances that are none": (
        "self_instruct",
        {"instruction": "a", "instances": {}},
        "wrong_type",
        "instances is dict",
    ),
    "an instance that is none": (
        "self_instruct",
        {"instruction": "a", "instances": ["b"]},
        "wrong_type",
        "instances[0] is str, not an instance",
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


# Telling the format


def test_an_odd_first_row_does_not_hide_the_format(written: Written) -> None:
    part = written(b"broken", {"version": 2}, {"prompt": "a", "completion": "b"})
    assert said(read_pairs(part)) == ["invalid_json", "missing_field", ("a", "b")]


def test_conversations_are_told_apart_by_the_first_that_is_not_empty(written: Written) -> None:
    empty: Values = {"conversations": []}
    texts: Values = {"conversations": ["a", "b"]}
    turns: Values = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert said(read_pairs(written(empty, texts))) == ["no_response", ("a", "b")]
    assert said(read_pairs(written(empty, turns))) == ["no_response", ("a", "b")]


def test_fields_that_fit_no_format_are_named_in_the_error_beside_the_known_formats(written: Written) -> None:
    with pytest.raises(MismatchError, match=r"rows.jsonl: .* fields body, title; known are messages \(messages: role"):
        written({"title": "a", "body": "b"})


def test_a_file_of_single_messages_is_refused_with_what_to_take_instead(written: Written) -> None:
    row = {"message_id": "x", "parent_id": None, "role": "prompter", "text": "### Human: Why?", "rank": None}
    with pytest.raises(MismatchError, match=r"rows.jsonl: its rows are single messages, .* file of trees"):
        written(row)


def test_a_file_of_broken_rows_is_quarantined_whole(written: Written) -> None:
    part = written(b"x", b"y")
    assert detect(part) is None
    assert [item.id for item in read_pairs(part)] == ["rows/0000000", "rows/0000001"]


def test_a_file_of_broken_rows_that_has_others_by_now_is_told_to_have_changed(written: Written) -> None:
    part = written(b"x" * 14)
    Path(part.path).write_bytes(b'{"text": "ab"}')
    with pytest.raises(StorageError, match="has changed since it was listed"):
        list(read_pairs(part))


# Guanaco


def test_a_markdown_heading_in_an_answer_is_not_a_role_marker(pair_of: Callable[..., SeedPair]) -> None:
    answer = "### First\nthen\n#### Human: anatomy\n### Assistants: a list"
    assert pair_of({"text": f"### Human: Why?### Assistant: {answer}### Human: And?"}).completion == answer


def test_a_guanaco_text_may_open_with_a_preamble_when_its_format_is_named(pair_of: Callable[..., SeedPair]) -> None:
    pair = pair_of({"text": "A chat. ### Human: Why?### Assistant: Because."}, "guanaco")
    assert (pair.prompt, pair.completion) == ("Why?", "Because.")


def test_an_answer_that_is_there_is_not_replaced_by_output(pair_of: Callable[..., SeedPair]) -> None:
    assert pair_of({"text": "### Human: Why?### Assistant: Because.", "output": "other"}).completion == "Because."


def test_the_rank_of_a_guanaco_row_is_its_last_answers_and_its_language_every_answers(written: Written) -> None:
    text = "### Human: a### Assistant: b### Human: c### Assistant:"
    pairs = read_pairs(written({"text": text, "output": "d", "rank": 0, "lang": "en"}), turns="all")
    assert [(p.completion, p.rank, p.language) for p in pairs if isinstance(p, SeedPair)] == [
        ("b", None, "en"),
        ("d", 0, "en"),
    ]


# Alpaca, ShareGPT, Self-Instruct


def test_an_input_follows_its_instruction_after_a_blank_line(pair_of: Callable[..., SeedPair]) -> None:
    assert pair_of({"instruction": "Sum. \n", "input": " 1 2\n", "output": "3"}).prompt == "Sum.\n\n1 2"
    assert pair_of({"instruction": "", "input": "1 + 2?", "output": "3"}).prompt == "1 + 2?"


def test_sharegpt_has_many_names_for_the_assistant(pair_of: Callable[..., SeedPair]) -> None:
    for human, machine in [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("user", "bing")]:
        turns = [{"from": "system", "value": "s"}, {"from": human, "value": "a"}, {"from": machine, "value": "b"}]
        assert said([pair_of({"conversations": turns})]) == [("a", "b")]


def test_a_task_gives_a_unit_for_each_instance_and_a_broken_one_costs_only_itself(written: Written) -> None:
    instances = [{"input": "1 2", "output": "3"}, {"input": "4"}, {"input": "5 6", "output": "11"}]
    units = list(read_pairs(written({"instruction": "Sum.", "instances": instances})))
    assert [unit.id for unit in units] == ["rows/0000000/0", "rows/0000000/1", "rows/0000000/2"]
    assert said(units) == [("Sum.\n\n1 2", "3"), "missing_field", ("Sum.\n\n5 6", "11")]


def test_a_row_of_more_units_than_can_be_meant_is_one_that_is_quarantined(written: Written) -> None:
    task = {"instruction": "a", "instances": [0] * 4096}
    assert len(list(read_pairs(written(task)))) == 4096
    (dropped,) = read_pairs(written({**task, "instances": [0] * 300_000}))
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.outcome) == ("rows/0000000", "too_many_units", "quarantined")
    assert str(dropped.detail).endswith("the row has 300000 units, more than 4096")
    turns = {"messages": [user("a"), assistant("b")] * 4097}
    assert said(read_pairs(written(turns), turns="all")) == ["too_many_units"]
    assert said(read_pairs(written(turns))) == [("a", "b")]


def test_a_generated_instruction_without_instances_has_no_response(written: Written) -> None:
    part = written({"instruction": "a", "instances": [INSTANCE]}, {"instruction": "b", "most_similar": {}})
    assert said(read_pairs(part)) == [("a", "Because."), "no_response"]


# Trees

LABELS: dict[str, tuple[object, float | None]] = {
    "as in the trees": ({"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 3}}, 0.75),
    "as in the rows": ({"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]}, 0.75),
    "a whole number": ({"quality": {"value": 1, "count": 3}}, 1.0),
    "none": (None, None),
    "others": ({"spam": {"value": 0.0, "count": 3}}, None),
    "other rows": ({"name": ["spam"], "value": [0.0], "count": [3]}, None),
    "fewer values than names": ({"name": ["quality"], "value": [], "count": []}, None),
    "null": ({"quality": {"value": None, "count": 0}}, None),
    "off the scale": ({"quality": {"value": 75, "count": 3}}, None),
    "no number": ({"quality": {"value": True}}, None),
    "a text": ("quality", None),
}


@pytest.mark.parametrize(("labels", "quality"), LABELS.values(), ids=LABELS.keys())
def test_the_quality_of_a_reply_is_read_from_both_forms_of_its_labels(
    pair_of: Callable[..., SeedPair], labels: object, quality: float | None
) -> None:
    assert pair_of(message("prompter", "a", {**ANSWER, "labels": labels})).quality == quality


def test_a_rank_is_a_whole_number_and_a_language_a_text_or_they_are_absent(pair_of: Callable[..., SeedPair]) -> None:
    for given_, rank in [(2, 2), (2.0, 2), (0.5, None), (-1, None), (True, None), ("0", None), (10**30, None)]:
        assert pair_of(message("prompter", "a", {**ANSWER, "rank": given_})).rank == rank
    for lang, language in [("pt-BR", "pt-BR"), (" ", "de"), (1, "de")]:
        assert pair_of(message("prompter", "a", {**ANSWER, "lang": lang}, lang="de")).language == language


def test_each_reply_to_the_root_is_a_unit_the_best_ranked_first_and_the_unranked_last(written: Written) -> None:
    replies = [message("assistant", text, rank=rank) for text, rank in [("x", None), ("c", 2), ("a", 0), ("y", None)]]
    part = written({**TREE, "prompt": message("prompter", "q", *replies)})
    units = list(read_pairs(part))
    assert said(units) == [("q", "a"), ("q", "c"), ("q", "x"), ("q", "y")]
    assert [unit.id for unit in units] == [f"rows/0000000/{n}" for n in range(4)]
    assert [unit.rank for unit in units if isinstance(unit, SeedPair)] == [0, 2, None, None]
    assert said(read_documents(part)) == ["a", "c", "x", "y"]


def test_a_deleted_or_broken_reply_costs_only_itself(written: Written) -> None:
    replies = [message("assistant", "a", deleted=True), {"role": "assistant", "replies": []}, message("assistant", "c")]
    units = list(read_pairs(written(message("prompter", "q", *replies))))
    assert said(units) == ["deleted", "missing_field", ("q", "c")]
    assert [unit.id for unit in units] == [f"rows/0000000/{n}" for n in range(3)]


def test_with_all_turns_a_reply_goes_on_along_the_best_ranked_replies_that_are_kept(written: Written) -> None:
    last = [message("assistant", "worse", rank=1), message("assistant", "best", rank=0, lang="en")]
    follow_ups = [message("prompter", "spam", rank=0, review_result=False), message("prompter", "and?", *last, rank=1)]
    part = written(message("prompter", "q", message("assistant", "a", *follow_ups), message("assistant", "b")))
    units = list(read_pairs(part, turns="all"))
    assert said(units) == [("q", "a"), ("and?", "best"), ("q", "b")]
    assert [unit.rank for unit in units if isinstance(unit, SeedPair)] == [None, 0, None]
    assert said(read_pairs(part)) == [("q", "a"), ("q", "b")]


def test_what_follows_a_reply_in_its_tree_does_not_make_it_less_of_a_document(written: Written) -> None:
    assert said(read_documents(written(message("prompter", "q", message("assistant", "a", ROOT))))) == ["a"]


# All turns


def test_with_all_turns_every_question_makes_a_unit_of_its_own(written: Written) -> None:
    turns = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), assistant("e"), user("f")]
    units = list(read_pairs(written({"messages": turns}), turns="all"))
    assert said(units) == [("a", "b"), ("c", "d"), "no_response"]
    assert [unit.id for unit in units] == ["rows/0000000/0", "rows/0000000/1", "rows/0000000/2"]


def test_with_all_turns_an_answer_before_any_question_is_a_unit_too(written: Written) -> None:
    part = written({"conversations": [{"from": "gpt", "value": "z"}, *ONE_TURN["sharegpt"][1]["conversations"]]})
    assert said(read_pairs(part, turns="all")) == ["no_prompt", ("Why?", "Because.")]
    assert said(read_pairs(part)) == ["roles_out_of_order"]


def test_with_all_turns_a_row_of_one_turn_or_none_has_a_unit_number_too(written: Written) -> None:
    part = written({"conversations": ["a", "b"]}, {"conversations": []}, {"conversations": 1})
    units = list(read_pairs(part, turns="all"))
    assert [unit.id for unit in units] == ["rows/0000000/0", "rows/0000001/0", "rows/0000002"]
    assert said(units) == [("a", "b"), "no_response", "wrong_type"]


def test_a_segment_of_a_page_is_a_unit_already(monkeypatch: pytest.MonkeyPatch, written: Written) -> None:
    texts = "### Human: a### Assistant: b### Human: c### Assistant: d"
    segments = [RawRow(f"page/0000000/{n}", "page", "page.html", {"text": texts}) for n in (0, 3)]
    monkeypatch.setattr("selfalign.data.formats.read_rows", lambda part, fields=None: iter(segments))
    ids = [unit.id for unit in read_pairs(written(b"", format="guanaco"), "all")]
    assert ids == ["page/0000000/0", "page/0000000/0/1", "page/0000000/3", "page/0000000/3/1"]
    assert sum(not FURTHER.search(id) for id in ids) == 1


# Whatever the rows

GROVE = message(
    "prompter",
    "a",
    message("assistant", "b", message("prompter", "c", message("assistant", "d", rank=1)), rank=1, lang="en"),
    message("assistant", "e", rank=0, labels={"quality": {"value": 0.5, "count": 3}}, deleted=False),
)
MODELS: list[Values] = [
    *(values for _, values in ONE_TURN.values()),
    {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]},
    {"conversations": ["a", "b", "c", "d", "e"]},
    {"conversations": [{"from": who, "value": "a"} for who in ("human", "gpt", "human", "bard")]},
    {"text": "### Human: a### Assistant: b### Human: c### Assistant:", "output": "d", "rank": 0, "lang": "en"},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"input": "d", "output": "e"}]},
    {"message_tree_id": "a", "tree_state": "ready_for_export", "prompt": GROVE},
    {**GROVE, "license": "MIT"},
    {"text": "a", "header": "b", "within": ["c"]},
]
values_of_any_kind = st.recursive(
    st.sampled_from([None, True, False, -1, 0, 1, 0.5, 10**30, "", " \n", "user", "gpt", "assistant", "prompter"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
changes = st.lists(
    st.tuples(st.sampled_from(["replace", "delete", "repeat"]), st.integers(0, 1 << 20), values_of_any_kind), max_size=3
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Each container in `value` with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in items for place in ((value, key), *places(child))]


def altered(model: Values, other: Values, changes: Sequence[tuple[str, int, object]]) -> Values:
    row = copy.deepcopy({**other, **model})
    for what, at, value in changes:
        if found := places(row):
            container, key = found[at % len(found)]
            if what == "delete":
                del container[key]
            elif what == "repeat" and isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[key] = value
    return row


models = st.sampled_from(MODELS)
rows_of_any_kind = st.lists(st.builds(altered, models, st.just({}) | models, changes), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(rows=rows_of_any_kind)
def test_whatever_a_row_holds_it_has_one_first_unit_under_every_format(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[Values]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for format in get_args(FormatName):
        part = part_of(path, format)
        for items in (list(read_pairs(part)), list(read_pairs(part, "all")), list(read_documents(part))):
            check(items, len(rows))
    with suppress(MismatchError):
        check(list(read_documents(part_of(path))), len(rows))


def check(items: Sequence[SeedPair | Document | Dropped], rows: int) -> None:
    ids = [item.id for item in items]
    assert len(set(ids)) == len(ids)
    firsts = [id.removesuffix("/0") for id in ids if not FURTHER.search(id)]
    assert firsts == [f"any/{n:07d}" for n in range(rows)]
    for item in items:
        assert not isinstance(item, Dropped) or (item.units == 1 and item.detail)
        if isinstance(item, SeedPair):
            assert item.prompt == item.prompt.strip() != ""
            assert item.completion == item.completion.strip() != ""
            assert item.rank is None or 0 <= item.rank < 1 << 63
            assert item.quality is None or 0 <= item.quality <= 1
        elif isinstance(item, Document):
            assert item.text == item.text.strip() != ""


# Real data


def counted(items: Iterable[SeedPair | Document | Dropped]) -> dict[str, int]:
    return dict(Counter(item.reason if isinstance(item, Dropped) else "kept" for item in items))


def kept(part: SourcePart, turns: Literal["first", "all"] = "first") -> list[SeedPair]:
    return [item for item in read_pairs(part, turns=turns) if isinstance(item, SeedPair)]


def test_lima_has_1000_single_turn_documents_of_1030(real_data: Path) -> None:
    part = part_of(real_data / "lima" / "train.jsonl")
    assert detect(part) == "lima"
    assert counted(read_documents(part)) == {"kept": 1000, "multi_turn": 29, "odd_turns": 1}
    assert counted(read_pairs(part)) == {"kept": 1030}
    assert counted(read_pairs(part, turns="all")) == {"kept": 1084, "no_response": 1}


def test_limas_texts_lose_their_edge_white_space_and_nothing_else(real_data: Path) -> None:
    part = part_of(real_data / "lima" / "train.jsonl")
    rows = [json.loads(line) for line in Path(part.path).read_text(encoding="utf-8").split("\n") if line]
    assert [[pair.prompt, pair.completion] for pair in kept(part)] == [
        [text.strip() for text in row["conversations"][:2]] for row in rows
    ]


def test_all_300_rows_of_limas_test_set_lack_a_response(real_data: Path) -> None:
    part = part_of(real_data / "lima" / "test.jsonl")
    assert counted(read_pairs(part)) == counted(read_documents(part)) == {"no_response": 300}


def test_every_guanaco_row_has_a_first_turn(real_data: Path) -> None:
    part = part_of(real_data / "guanaco" / "oa_questions.jsonl")
    assert detect(part) == "guanaco"
    pairs = kept(part)
    assert len(pairs) == part.rows == 953
    assert len({(pair.prompt, pair.completion) for pair in pairs}) == 778
    assert len({pair.prompt for pair in pairs}) == 517
    assert Counter(pair.language for pair in pairs)["en"] == 419
    assert not any("### Human:" in pair.prompt + pair.completion for pair in pairs)


def test_all_turns_of_guanaco_are_517_and_twice_414_and_thrice_22(real_data: Path) -> None:
    part = part_of(real_data / "guanaco" / "oa_questions.jsonl")
    pairs = kept(part, "all")
    assert Counter(int(pair.id.rsplit("/", 1)[1]) for pair in pairs) == {0: 953, 1: 436, 2: 22}
    assert len(pairs) == 517 + 2 * 414 + 3 * 22
    assert sum(pair.rank is not None for pair in pairs) == 953


def test_crlf_line_ends_change_nothing_but_places(real_data: Path, written: Written) -> None:
    data = (real_data / "guanaco" / "oa_questions.jsonl").read_bytes()
    assert list(read_pairs(written(data))) == list(read_pairs(written(data.replace(b"\n", b"\r\n"))))


def test_trees_and_their_root_messages_give_the_same_333_pairs(real_data: Path) -> None:
    trees = part_of(real_data / "oasst" / "en_100_tree.jsonl")
    messages = part_of(real_data / "oasst" / "en_100_message.jsonl")
    assert detect(trees) == detect(messages) == "oasst"
    for turns, counts in (("first", {"kept": 333}), ("all", {"kept": 462, "no_response": 128})):
        assert counted(read_pairs(trees, turns=turns)) == counts
        both = [[(p.prompt, p.completion, p.language, p.rank) for p in kept(part, turns)] for part in (trees, messages)]
        assert both[0] == both[1]
    assert counted(read_documents(trees)) == {"kept": 333}
    pairs = kept(trees)
    assert Counter(pair.rank for pair in pairs) == {0: 99, 1: 99, 2: 91, 3: 25, 4: 7, 5: 4, 6: 2, 7: 2, 8: 1, None: 3}
    assert {(pair.language, pair.quality) for pair in pairs} == {("en", None)}


@pytest.mark.parametrize(
    ("file", "format", "counts"),
    [
        ("self-instruct/seed_tasks.jsonl", "self_instruct", {"kept": 175}),
        ("self-instruct/user_oriented_instructions.jsonl", "self_instruct", {"kept": 252}),
        ("self-instruct-qwen/all_merged_generations.jsonl", "self_instruct", {"kept": 175, "no_response": 668}),
        ("self-instruct-qwen/final_finetune_dataset.jsonl", "alpaca", {"kept": 2275}),
    ],
)
def test_every_self_instruct_file_gives_its_instances(
    real_data: Path, file: str, format: str, counts: dict[str, int]
) -> None:
    part = part_of(real_data / file)
    assert detect(part) == format
    assert counted(read_pairs(part)) == counted(read_documents(part)) == counts


def test_predictions_are_no_seed(real_data: Path) -> None:
    with pytest.raises(MismatchError, match="fields input, instruction, prompt, response, target"):
        detect(part_of(real_data / "self-instruct" / "davinci_predictions.jsonl"))
