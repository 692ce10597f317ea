"""Pairs of known quality: how they are spoilt, and what people's labels do to them."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.core.errors import GateError, UsageError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Dropped, Noted, Outcome, Planted, SeedPair
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.core.tables import ledger_of, to_parquet
from selfalign.stages.curate.config import CurateConfig, Plant
from selfalign.stages.curate.plant import (
    BOILERPLATE,
    ECHO_CHARS,
    Label,
    PlantPairs,
    echoed,
    plant,
    read_labels,
    truncated,
)
from selfalign.text.language import primary
from stages.curate.conftest import CALIBRATED, seed_pairs

Seen = Callable[..., Context]
KINDS: tuple[Plant, ...] = ("swapped", "truncated", "echo", "boilerplate", "language")

words = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12), min_size=1, max_size=30)
gap = st.sampled_from([" ", "\n", "  ", "\n\n", "\t", "\u3000"])


@st.composite
def responses(draw: st.DrawFn) -> str:
    parts = draw(words)
    return draw(st.sampled_from(["", " ", "\n"])) + "".join(w + draw(gap) for w in parts[:-1]) + parts[-1]


def rows_of(outcomes: Sequence[Outcome]) -> list[Planted]:
    """The planted pairs among the outcomes."""
    rows = [each.row if isinstance(each, Noted) else each for each in outcomes]
    return [row for row in rows if isinstance(row, Planted)]


def dropped(outcomes: Sequence[Outcome]) -> dict[str, tuple[str, str | None]]:
    return {each.id: (each.reason, each.detail) for each in outcomes if isinstance(each, Dropped)}


@given(responses(), st.sampled_from(["", " ", "\n"]), st.randoms(use_true_random=False))
def test_a_cut_response_ends_at_a_word_between_30_and_70_per_cent(text: str, end: str, chance: random.Random) -> None:
    whole = text.strip()
    boundaries = [n for n in range(1, len(whole)) if whole[n].isspace() and not whole[n - 1].isspace()]
    cut = truncated(text + end, chance)
    if not boundaries:
        assert cut == ""
        return
    assert whole.startswith(cut)
    assert len(cut) in boundaries
    inside = [n for n in boundaries if 0.3 * len(whole) <= n <= 0.7 * len(whole)]
    if inside:
        assert len(cut) in inside


@given(responses(), st.randoms(use_true_random=False))
def test_a_cut_response_is_never_the_whole_one(text: str, chance: random.Random) -> None:
    cut = truncated(text + "\n", chance)
    assert len(cut.split()) < len(text.split())
    assert cut == "" or cut.split() == text.split()[: len(cut.split())]


def test_cuts_vary() -> None:
    text = "word " * 100
    assert len({truncated(text, random.Random(n)) for n in range(20)}) > 5


@given(responses())
def test_an_echo_is_the_beginning_of_the_response_no_longer_than_an_instruction(text: str) -> None:
    echo, whole = echoed(text), " ".join(text.split())
    assert whole.startswith(echo)
    assert len(echo) <= ECHO_CHARS
    if len(whole) <= ECHO_CHARS:
        assert echo == whole


def test_an_echo_ends_with_a_sentence_where_one_ends_there_and_else_with_a_word() -> None:
    sentence = "This is the opening of the page. "
    assert echoed(sentence * 20) == (sentence * (ECHO_CHARS // len(sentence))).strip()
    cut = echoed("word " * 100)
    assert set(cut.split()) == {"word"}
    assert ECHO_CHARS - 5 < len(cut) <= ECHO_CHARS
    # Nowhere to cut: no echo, and not a word in the middle.
    assert echoed("x" * 500) == ""


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Q?", "Why?", "yes"]),
            st.sampled_from(["yes", "no", "two words", "three words here", "x" * 300]),
            st.sampled_from([None, "en", "de", "pt-BR"]),
        ),
        max_size=8,
    ),
    st.lists(st.sampled_from(KINDS), unique=True),
    st.integers(),
)
def test_a_planted_pair_is_spoilt_as_its_kind_says_or_is_accounted_for(
    texts: list[tuple[str, str, str | None]], kinds: list[Plant], seed: int
) -> None:
    pairs = [
        SeedPair(id=f"p{n}", source="s", license="CC0", prompt=prompt, completion=text, language=language)
        for n, (prompt, text, language) in enumerate(texts)
    ]
    outcomes = list(plant(pairs, kinds, random.Random(seed)))
    assert sorted(each.id for each in outcomes) == sorted(
        id for pair in pairs for id in (pair.id, *(f"{pair.id}/{kind}" for kind in kinds))
    )
    assert set(dropped(outcomes).values()) <= {("cannot_be_spoilt", None)}
    own = {pair.id: pair for pair in pairs}
    for row in rows_of(outcomes):
        origin = own[row.origin]
        assert (row.parents, row.source, row.license) == ((origin.id,), "s", "CC0")
        assert row.good is (row.kind == "seed")
        changed = (row.prompt != origin.prompt, row.completion != origin.completion)
        match row.kind:
            case "seed":
                assert changed == (False, False)
            case "echo":
                assert changed == (True, False)
                assert origin.completion.startswith(row.prompt)
            case "truncated":
                assert changed == (False, True)
                assert origin.completion.startswith(row.completion)
            case "boilerplate":
                assert changed == (False, True)
                assert set(row.completion.split("\n")) <= {*BOILERPLATE}
            case "swapped" | "language":
                assert changed == (False, True)
                # Another pair's answer, and to another question.
                others = [pair for pair in pairs if pair.completion == row.completion and pair.prompt != origin.prompt]
                assert others
                if row.kind == "language" and origin.language and all(pair.language for pair in others):
                    assert {primary(pair.language or "") for pair in others} - {primary(origin.language)}


def test_a_response_in_another_language_is_planted_only_where_the_seed_has_several() -> None:
    def planted(*languages: str | None) -> dict[str, str]:
        pairs = [
            SeedPair(id=f"{n}", source="s", prompt=f"Q{n}", completion=f"answer {n} in {each}", language=each)
            for n, each in enumerate(languages)
        ]
        return {
            row.origin: row.completion
            for row in rows_of([*plant(pairs, ["language"], random.Random(0))])
            if not row.good
        }

    assert planted("en", "en", "en-US") == {}
    found = planted("en", "en", "fr")
    assert found.keys() == {"0", "1", "2"}
    assert found["0"] == found["1"] == "answer 2 in fr"
    assert found["2"] in ("answer 0 in en", "answer 1 in en")


def test_a_language_that_the_source_does_not_name_is_told_from_the_response() -> None:
    german = "Der Hund schläft heute den ganzen Tag im Garten, weil es draußen warm und sonnig ist."
    english = "The dog is asleep in the garden all day long today, because it is warm and sunny outside."
    pairs = [
        SeedPair(id=id, source="s", prompt=f"Q {id}", completion=text)
        for id, text in (("de", german), ("en", english), ("none", "12 + 34 = 46"))
    ]
    outcomes = [*plant(pairs, ["language"], random.Random(0))]
    assert {row.origin: row.completion for row in rows_of(outcomes) if not row.good} == {"de": english, "en": german}
    assert dropped(outcomes) == {"none/language": ("cannot_be_spoilt", None)}


def test_boilerplate_varies_and_says_nothing_of_the_question() -> None:
    found = [row for row in rows_of([*plant(seed_pairs(20), ["boilerplate"], random.Random(0))]) if not row.good]
    assert len({row.completion for row in found}) > 10
    assert all(len(set(row.completion.split("\n"))) == 3 for row in found)


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., str]:
    """A file of labels, one a line."""

    def write(*lines: object) -> str:
        path = tmp_path / "labels.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(path)

    return write


Ran = tuple[list[Outcome], Ledger]


@pytest.fixture
def ran(seen: Seen, tmp_path: Path) -> Callable[..., Ran]:
    """What the step makes of seed pairs; everything that it announces comes out, once."""

    def run(rows: Sequence[SeedPair], seed: int = 0, **config: object) -> Ran:
        stage = PlantPairs(config=CurateConfig(**config))
        found = list(stage.run(rows, seen(seed)))
        assert len({each.id for each in found}) == len(found) == stage.units(rows, seen(seed))
        (tmp_path / "shard").write_bytes(to_parquet(found, Planted))
        return found, ledger_of(tmp_path / "shard")

    return run


def test_only_held_out_pairs_are_planted(ran: Callable[..., Ran]) -> None:
    rows = [*seed_pairs(4), *seed_pairs(20, "train"), *seed_pairs(2, "like_held_out")]
    found, ledger = ran(rows, plants=["swapped", "truncated"])
    planted = rows_of(found)
    assert Counter(row.kind for row in planted) == {"seed": 4, "swapped": 4, "truncated": 4}
    assert all(row.origin.startswith("held_out/") for row in planted)
    # Responses of training pairs would come in as swaps.
    held_out = {row.completion for row in rows[:4]}
    assert {row.completion for row in planted if row.kind == "swapped"} <= held_out
    assert ledger.rejected == {"train": 20, "like_held_out": 2}
    assert (ledger.kept, ledger.noted) == (12, {"good": 4})


def test_each_pair_stands_beside_every_way_to_spoil_it_that_there_is(ran: Callable[..., Ran]) -> None:
    found, ledger = ran(seed_pairs(5))
    assert Counter(row.kind for row in rows_of(found)) == dict.fromkeys(("seed", *KINDS[:4]), 5)
    assert ledger.rejected == {"cannot_be_spoilt": 5}


def test_the_same_run_plants_the_same_and_another_seed_does_not(ran: Callable[..., Ran]) -> None:
    found = [ran(seed_pairs(12), seed)[0] for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_people_may_call_a_held_out_pair_bad_and_none_is_made_of_it(
    ran: Callable[..., Ran], labels: Callable[..., str]
) -> None:
    path = labels({"id": "held_out/01", "good": False}, {"id": "held_out/02", "rating": 5})
    found, ledger = ran(seed_pairs(4), labels=path, plants=["swapped", "truncated"])
    by_id = {row.id: (row.kind, row.good) for row in rows_of(found)}
    assert by_id["held_out/01"] == ("labelled", False)
    assert by_id["held_out/02"] == ("seed", True)
    assert all(row.origin != "held_out/01" or row.id == "held_out/01" for row in rows_of(found))
    # Nor of its response.
    bad = seed_pairs(4)[1].completion
    assert [row.id for row in rows_of(found) if row.completion == bad] == ["held_out/01"]
    assert ledger.rejected == {"labelled_bad": 2}
    assert ledger.noted == {"good": 3}


def test_people_may_bring_pairs_of_their_own(ran: Callable[..., Ran], labels: Callable[..., str]) -> None:
    path = labels(
        {"prompt": "P", "completion": "C", "good": True},
        {"prompt": "P", "completion": "D", "rating": 3.9},
        {"prompt": "P", "completion": "E\u2028F", "rating": 4},
    )
    found, ledger = ran(seed_pairs(2), labels=path, plants=["swapped"])
    own = [row for row in rows_of(found) if row.kind == "labelled"]
    assert [(row.prompt, row.completion, row.good) for row in own] == [
        ("P", "C", True),
        ("P", "D", False),
        ("P", "E\u2028F", True),
    ]
    assert all(row.origin == row.id for row in own)
    assert ledger.noted == {"good": 4}


@pytest.mark.parametrize("split", ["train", "like_held_out"])
def test_a_label_on_a_pair_that_is_not_held_out_counts_for_nothing_and_is_told(
    ran: Callable[..., Ran], labels: Callable[..., str], split: str
) -> None:
    found, _ = ran([*seed_pairs(2), *seed_pairs(2, split)], labels=labels({"id": f"{split}/01", "good": True}))
    told = dropped(found)
    assert told[f"{split}/01"] == ("labelled_not_held_out", None)
    assert told[f"{split}/00"] == (split, None)


def test_a_label_of_a_pair_that_is_nowhere_is_told_with_its_id(
    ran: Callable[..., Ran], labels: Callable[..., str]
) -> None:
    path = labels({"id": "held_out/00", "good": True}, {"id": "oasst/77", "good": True}, {"id": "b", "rating": 1})
    told = r"labels\.jsonl:2: no seed pair of this run is called 'oasst/77'"
    with pytest.raises(UsageError, match=told) as caught:
        ran(seed_pairs(2), labels=path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ({"id": "a", "rating": 6}, "rating .*less than or equal to 5"),
        ({"id": "a", "rating": 0.5}, "rating .*greater than or equal to 1"),
        ({"id": "a"}, r"either good \(true or false\) or a rating from 1 to 5"),
        ({"id": "a", "good": True, "rating": 4}, r"either good \(true or false\) or a rating from 1 to 5"),
        ({"good": True}, "names the id of a seed pair, or has a prompt and a completion"),
        ({"prompt": "p", "good": True}, "names the id of a seed pair, or has a prompt and a completion"),
        ({"id": "a", "completion": "c", "good": True}, "names the id of a seed pair, or has a prompt and a completion"),
        ({"id": "a", "godo": True}, "godo Extra inputs"),
        ("not json", "Invalid JSON"),
        ("", "this line is empty"),
        ({"id": "a", "good": "yes"}, "good Input should be a valid boolean"),
    ],
)
def test_a_label_that_cannot_count_is_told_with_its_line(labels: Callable[..., str], label: object, told: str) -> None:
    path = labels({"id": "first", "good": True}, label)
    with pytest.raises(UsageError, match=rf"labels\.jsonl:2: .*{told}") as caught:
        PlantPairs(config=CurateConfig(labels=path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"id": "a", "good": True}, {"id": "a", "good": False}),
        ({"id": "a", "good": True}, {"id": "a", "rating": 3}),
        ({"prompt": "p", "completion": "c", "rating": 5}, {"prompt": "p", "completion": "c", "good": False}),
    ],
)
def test_a_pair_that_is_called_good_and_bad_is_told_with_both_lines(
    labels: Callable[..., str], one: object, other: object
) -> None:
    path = labels({"id": "b", "good": False}, one, {"id": "c", "good": True}, other)
    with pytest.raises(UsageError, match=r"labels\.jsonl:4: this pair is called bad, and good on line 2; keep one"):
        read_labels(Path(path))


def test_the_same_verdict_twice_counts_once(labels: Callable[..., str]) -> None:
    path = labels({"id": "a", "good": True}, {"id": "a", "rating": 4}, {"id": "b", "rating": 1})
    assert read_labels(Path(path)) == [(1, Label(id="a", good=True)), (3, Label(id="b", rating=1))]


def test_labels_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curate\.labels: .*nowhere\.jsonl cannot be read"):
        PlantPairs(config=CurateConfig(labels=str(tmp_path / "nowhere.jsonl")))


def test_labels_count_by_what_they_say_and_as_they_were_when_the_run_began(labels: Callable[..., str]) -> None:
    one = {"id": "a", "good": True}
    stage = PlantPairs(config=CurateConfig(labels=labels(one)))
    spaced = PlantPairs(config=CurateConfig(labels=labels('{"good":true,   "id":"a"}')))
    more = PlantPairs(config=CurateConfig(labels=labels(one, {"id": "b", "good": False})))
    assert stage.settings() == spaced.settings()
    assert stage.settings() != more.settings() != PlantPairs(config=CurateConfig()).settings()


def manifest(ledger: Ledger) -> Manifest:
    return Manifest("s", "i", "c", {}, {}, ledger.to_json())


def test_a_label_by_texts_that_are_a_seed_pairs_is_one_of_that_pair(
    ran: Callable[..., Ran], labels: Callable[..., str]
) -> None:
    rows = seed_pairs(3)
    texts = {"prompt": rows[1].prompt, "completion": rows[1].completion}
    by_text, ledger = ran(rows, labels=labels({**texts, "good": False}))
    by_id, _ = ran(rows, labels=labels({"id": rows[1].id, "good": False}))
    assert by_text == by_id
    assert (ledger.kept, ledger.rejected) == (11, {"labelled_bad": 5, "cannot_be_spoilt": 2})
    with pytest.raises(UsageError, match=rf"labels\.jsonl:2: this pair, {rows[1].id}, has the other verdict on line 1"):
        ran(rows, labels=labels({"id": rows[1].id, "good": True}, {**texts, "good": False}))


def test_a_label_by_texts_reaches_the_held_out_pair_though_its_double_comes_first(
    ran: Callable[..., Ran], labels: Callable[..., str]
) -> None:
    (row,) = seed_pairs(1)
    double = replace(row, id="a/first", split="like_held_out")
    found, _ = ran([double, row], labels=labels({"prompt": row.prompt, "completion": row.completion, "good": False}))
    assert dropped(found)["a/first"] == ("labelled_not_held_out", None)
    assert [(each.id, each.kind, each.good) for each in rows_of(found)] == [(row.id, "labelled", False)]


def test_a_label_is_of_an_id_or_of_texts_and_never_both(labels: Callable[..., str]) -> None:
    path = labels({"id": "a", "prompt": "p", "completion": "c", "good": True})
    with pytest.raises(UsageError, match=r"labels\.jsonl:1: .*either names the id of a seed pair, or has a prompt"):
        read_labels(Path(path))


def test_a_seed_too_small_to_fit_on_is_told_with_how_many_are_missing(ran: Callable[..., Ran]) -> None:
    _, ledger = ran(seed_pairs(7), **CALIBRATED)
    told = r"7 good pairs are held out or labelled .*min_pairs wants 20: 13 are missing; raise prepare\.seed\.held_out"
    with pytest.raises(GateError, match=told) as caught:
        PlantPairs(config=CurateConfig(**CALIBRATED)).check(manifest(ledger))
    assert caught.value.exit_code == 3
    PlantPairs(config=CurateConfig(**CALIBRATED, min_pairs=7)).check(manifest(ledger))
    # A rubric needs no fit.
    PlantPairs(config=CurateConfig()).check(manifest(ledger))
    PlantPairs(config=CurateConfig()).check(manifest(Ledger()))


def test_good_labels_count_among_the_pairs_to_fit_on_and_bad_ones_do_not(
    ran: Callable[..., Ran], labels: Callable[..., str]
) -> None:
    own: list[dict[str, Any]] = [{"prompt": f"P{n}", "completion": "C", "good": n < 3} for n in range(9)]
    _, ledger = ran(seed_pairs(4), **CALIBRATED, labels=labels(*own))
    PlantPairs(config=CurateConfig(**CALIBRATED, min_pairs=7)).check(manifest(ledger))
    with pytest.raises(GateError, match="wants 8: 1 are missing"):
        PlantPairs(config=CurateConfig(**CALIBRATED, min_pairs=8)).check(manifest(ledger))
