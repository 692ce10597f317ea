"""What is dropped for what it is on its own, and what passes with a note."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import small
from selfalign.core.errors import UsageError
from selfalign.core.records import Document, Dropped, Noted, Outcome, SeedPair
from selfalign.core.stage import Context, External
from selfalign.data.config import CorpusConfig, SeedConfig
from selfalign.data.sources import resolve
from selfalign.demo.base import base_folder
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.recipe import load
from selfalign.stages.prepare.filter import FilterCorpus, FilterSeed

Seen = Callable[..., Context]
# Asked for its tokenizer, and only where tokens are limited.
MODEL, NO_MODEL = ModelConfig(path=str(base_folder())), ModelConfig(path="./none")
ENGLISH = "The harbour is quiet in the morning, and most of the boats are still out at sea with their crews."
GERMAN = "Der Hafen ist am Morgen still, und die meisten Boote sind mit ihrer Mannschaft noch draußen auf See."


def told(outcome: Outcome) -> str | None:
    """The reason, the note, or None for a row that simply goes on."""
    return outcome.reason if isinstance(outcome, Dropped) else outcome.note if isinstance(outcome, Noted) else None


def pair(prompt: str = "What is it?", completion: str = "A thing.", **labels: object) -> SeedPair:
    return SeedPair(id="s/0", source="s", prompt=prompt, completion=completion, **labels)


def seed(row: SeedPair, context: Context | None = None, **config: object) -> str | None:
    stage = FilterSeed(SeedConfig(path="x", **config), MODEL if "max_tokens" in config else NO_MODEL)
    (outcome,) = stage.open(context or Context("s", 0, {})).run([row])
    return told(outcome)


def corpus(text: str, context: Context | None = None, header: str | None = None, **config: object) -> str | None:
    stage = FilterCorpus(CorpusConfig(path="x", **config), MODEL if "max_tokens" in config else NO_MODEL)
    (outcome,) = stage.open(context or Context("s", 0, {})).run(
        [Document(id="d", source="s", text=text, header=header)]
    )
    return told(outcome)


@given(st.text(max_size=40), st.none() | st.text(max_size=8))
def test_nothing_is_dropped_by_a_filter_that_the_recipe_does_not_name(text: str, header: str | None) -> None:
    assert corpus(text, header=header) is None
    assert seed(pair(text, text, language="xx", rank=9, quality=0.0)) is None


@pytest.mark.parametrize(
    ("config", "row", "reason"),
    [
        ({"max_rank": 0}, pair(rank=0), None),
        ({"max_rank": 0}, pair(rank=1), "rank"),
        ({"min_quality": 0.6}, pair(quality=0.6), None),
        ({"min_quality": 0.6}, pair(quality=0.59), "quality"),
        ({"min_words": 3}, pair("one two three", "one two three"), None),
        ({"min_words": 3}, pair("one two", "one two three"), "too_short"),
        ({"min_words": 3}, pair("one two three", "one two"), "too_short"),
        ({"languages": ["en"]}, pair(GERMAN, GERMAN, language="en"), None),
        ({"languages": ["en"]}, pair(ENGLISH, ENGLISH, language="de"), "language"),
        ({"languages": ["pt"]}, pair(ENGLISH, ENGLISH, language="pt-BR"), None),
        # A label that is no code tells nothing, so the text does.
        ({"languages": ["en"]}, pair(ENGLISH, ENGLISH, language="English"), None),
        ({"languages": ["en"]}, pair(GERMAN, GERMAN, language="unknown"), "language"),
    ],
)
def test_seed_pairs_are_judged_by_their_labels(config: dict[str, object], row: SeedPair, reason: str | None) -> None:
    assert seed(row, **config) == reason


@pytest.mark.parametrize("config", [{"max_rank": 0}, {"min_quality": 0.6}])
def test_a_pair_without_the_label_passes_and_is_counted(config: dict[str, object]) -> None:
    assert seed(pair(), **config) == "unlabelled"


def test_a_text_without_a_language_label_is_told_by_itself_and_passes_where_it_cannot_be() -> None:
    for text, reason in ((ENGLISH, None), (GERMAN, "language"), ("7 + 5 = 12", "unlabelled")):
        assert seed(pair(text, text), languages=["en"]) == reason
        assert corpus(text, languages=["en"]) == reason


def test_documents_are_filtered_by_length_inclusively() -> None:
    reasons = [corpus("é" * n, min_chars=2, max_chars=4) for n in range(6)]
    assert reasons == ["too_short", "too_short", None, None, None, "too_long"]


def test_a_header_is_suspect_only_where_there_is_one_and_its_kind_is_named() -> None:
    kinds = ["empty", "all_caps", "navigation"]
    assert corpus("t", header="", drop_headers=kinds) == "header_empty"
    assert corpus("t", header="SUBSCRIBE NOW", drop_headers=["all_caps"]) == "header_all_caps"
    assert corpus("t", header="Quick links", drop_headers=kinds) == "header_navigation"
    assert corpus("t", header="Quick links", drop_headers=["empty"]) is None
    # A text that stands under no header has none to be judged by.
    assert corpus("t", header=None, drop_headers=kinds) is None


def test_repetitive_text_is_dropped_above_the_named_share() -> None:
    assert corpus("buy it now while it lasts " * 30, max_repetition=0.5) == "repetitive"
    assert corpus(ENGLISH, max_repetition=0.5) is None


def test_tokens_are_counted_inclusively_and_a_pair_s_together_with_a_line_break() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokens = {text: len(tokenizer.encode(text)) for text in (ENGLISH, f"{ENGLISH}\n{GERMAN}")}
    for text, n in tokens.items():
        assert [corpus(text, max_tokens=limit) for limit in (n - 1, n)] == ["too_many_tokens", None]
    limits = [tokens[f"{ENGLISH}\n{GERMAN}"] + more for more in (-1, 0)]
    assert [seed(pair(ENGLISH, GERMAN), max_tokens=limit) for limit in limits] == ["too_many_tokens", None]


def test_of_a_batch_the_long_rows_that_nothing_else_drops_are_dropped_in_their_places() -> None:
    stage = FilterCorpus(CorpusConfig(path="x", languages=("en",), max_tokens=20), MODEL)
    texts = [ENGLISH, GERMAN, "All of the boats are out at sea.", "7 " * 30, "7 + 5"]
    found = stage.open(Context("s", 0, {})).run([Document(id=t, source="s", text=t) for t in texts])
    assert [(row.id, told(row)) for row in found] == [
        (ENGLISH, "too_many_tokens"),
        (GERMAN, "language"),
        ("All of the boats are out at sea.", None),
        ("7 " * 30, "too_many_tokens"),
        ("7 + 5", "unlabelled"),
    ]


def test_what_a_hook_makes_of_a_document_is_counted_and_how_many_tokens_it_had_is_kept(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text("def clean(text):\n    return text * 9\n")
    stage = FilterCorpus(CorpusConfig(path="x", hook=str(tmp_path / "twice.py"), max_tokens=8), MODEL)
    (outcome,) = stage.open(Context("s", 0, {})).run([Document(id="d", source="s", text="One.")])
    assert isinstance(outcome, Dropped)
    assert (outcome.reason, outcome.row.text) == ("too_many_tokens", "One." * 9)
    assert re.fullmatch(r"\d+ tokens", outcome.detail)


def test_the_model_counts_for_identity_where_tokens_are_limited_and_nowhere_else(tmp_path: Path) -> None:
    recipe = small.write(tmp_path)

    def identities(*overrides: str) -> dict[str, str]:
        found = {step.name: step for step in steps(load(recipe, overrides), Externals())}
        return {name: found[f"prepare.filter_{name}"].identity for name in ("seed", "corpus")}

    (tmp_path / "other").mkdir()
    for file in base_folder().iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    other = f"model.path={tmp_path / 'other'}"
    plain, limited = identities(), identities("prepare.corpus.max_tokens=99")
    assert identities(other) == plain
    assert limited["seed"] == plain["seed"]
    found = {plain["corpus"], limited["corpus"], identities("prepare.corpus.max_tokens=98")["corpus"]}
    assert len({*found, identities("prepare.corpus.max_tokens=99", other)["corpus"]}) == 4


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., Context]:
    def write(text: str, name: str = "evaluation.jsonl") -> Context:
        (tmp_path / name).write_text(text)
        found = resolve(name, tmp_path, format="document")
        return Context("s", 0, {"evaluation0": External(name, "digest", found.shards)})

    return write


def test_what_shares_thirteen_words_with_an_evaluation_set_is_dropped_whatever_its_fields_are(
    evaluation: Callable[..., Context],
) -> None:
    context = evaluation(json.dumps({"id": 7, "nested": [{"question": ENGLISH}]}) + "\n")
    quote = " ".join(ENGLISH.split()[:13])
    assert corpus(f"He wrote: {quote}, and more.", context) == "contaminated"
    assert corpus(f"He wrote: {' '.join(ENGLISH.split()[:12])}, and more.", context) is None
    assert seed(pair(completion=quote), context) == seed(pair(prompt=quote), context) == "contaminated"
    assert seed(pair(), context) is None


def test_a_row_of_an_evaluation_set_that_cannot_be_read_is_told_and_not_passed_over(
    evaluation: Callable[..., Context],
) -> None:
    with pytest.raises(UsageError, match=r"evaluation\.jsonl has a row that cannot be read: evaluation\.jsonl:2"):
        corpus("t", evaluation('{"text": "x"}\nbroken\n'))


def test_an_evaluation_set_that_could_drop_nothing_is_refused(evaluation: Callable[..., Context]) -> None:
    with pytest.raises(UsageError, match=r"labels\.jsonl has no text of 5 words or more, so it would drop nothing"):
        corpus("t", evaluation('{"label": "yes"}\n{"label": "the great gatsby"}\n', "labels.jsonl"))


def test_evaluation_texts_in_a_map_of_a_parquet_file_are_found(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([[("question", ENGLISH)]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"fields": column}), tmp_path / "set.parquet")
    shards = resolve("set.parquet", tmp_path, format="document").shards
    assert corpus(ENGLISH, Context("s", 0, {"evaluation0": External("set", "digest", shards)})) == "contaminated"
