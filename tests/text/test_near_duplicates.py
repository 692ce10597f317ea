"""Near-duplicates are what comparing all pairs finds, in whatever blocks and files the texts come."""

import os
import resource
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from selfalign.core.errors import StorageError
from selfalign.text import near_duplicates as module
from selfalign.text.near_duplicates import SHINGLE_WORDS, near_duplicates
from selfalign.text.overlap import ngrams, words

FOX = "the quick brown fox jumps over the lazy dog and then it goes home to sleep until the next morning comes"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def compared(texts: Sequence[str], threshold: float) -> list[int]:
    """Every text with every kept one before it, by the definition."""
    kept: dict[int, set[tuple[str, ...]]] = {}
    found = []
    for number, text in enumerate(texts):
        own = set(ngrams(words(text), SHINGLE_WORDS))
        alike = (k for k, other in kept.items() if own and len(own & other) / len(own | other) >= threshold)
        found.append(next(alike, -1))
        if found[-1] < 0:
            kept[number] = own
    return found


def edited(random: Random, text: str, vocabulary: Sequence[str], edits: int) -> str:
    tokens = text.split(" ")
    for _ in range(edits):
        place = random.randrange(len(tokens))
        tokens[place : place + random.randrange(2)] = [random.choice(vocabulary)] * random.randrange(3)
        tokens = tokens or [""]
    return " ".join(tokens)


def families(random: Random, count: int, vocabulary: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """Texts of which most are others with a few edits."""
    texts: list[str] = []
    while len(texts) < count:
        if texts and random.random() < 0.7:
            texts.append(edited(random, random.choice(texts), vocabulary, random.randrange(4)))
        else:
            texts.append(" ".join(random.choices(vocabulary, k=random.choice(lengths))))
    return texts


VOCABULARIES = (
    ["a", "b"],
    ["Fox", "fox,", "dog", "(the)", "—", "it's", "3.5", "x_y"],
    ["é", "e\u0301", "É", "ﬁ", "fi", "ß", "SS", "Ünï", "½", "İ", "“q”"],
    ["東京", "へ行く", "カ", "ｶﾞ", "한국", "\u1112\u1161\u11ab", "हिन्दी", "ไทย", "🙂", "a東b"],
    [f"word{number}" for number in range(60)],
)


@settings(deadline=None, max_examples=100)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from(VOCABULARIES),
    st.sampled_from([(0, 1, 2), (3, 4, 5, 6, 7), (20, 40), (0, 5, 60)]),
    st.sampled_from([0.5, 0.55, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0]),
)
def test_what_is_found_is_what_comparing_all_pairs_finds(
    scratch: Path, random: Random, vocabulary: Sequence[str], lengths: Sequence[int], threshold: float
) -> None:
    texts = families(random, random.choice([2, 10, 60]), vocabulary, lengths)
    assert near_duplicates(texts, threshold, scratch).tolist() == compared(texts, threshold)


@settings(deadline=None)
@given(st.lists(st.text() | st.sampled_from(["", " ", "?!", "a", "A a a a a a a"]), max_size=8), st.floats(0.01, 1.0))
def test_any_text_is_compared_by_its_words(scratch: Path, texts: list[str], threshold: float) -> None:
    assert near_duplicates(texts, threshold, scratch).tolist() == compared(texts, threshold)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_where_blocks_runs_and_parts_end_changes_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threshold: float
) -> None:
    random = Random(seed)
    texts = families(random, 300, VOCABULARIES[seed], (3, 8, 40, 400))
    for name, size in {"CHARACTERS": 500, "SHINGLES": 64, "TEXTS": 3, "PAIRS": 5}.items():
        monkeypatch.setattr(module, f"_BLOCK_{name}", size)
    monkeypatch.setattr(module, "_RUN_SHINGLES", 100)
    monkeypatch.setattr(module, "_MOST_RANK_BITS", 8)
    assert near_duplicates(texts, threshold, scratch).tolist() == compared(texts, threshold)


def test_a_text_of_many_blocks_is_one_text(scratch: Path) -> None:
    random = Random(0)
    long = " ".join(random.choices(VOCABULARIES[3] + VOCABULARIES[4], k=60_000))
    texts = [
        FOX,
        long,
        FOX,
        edited(random, long, VOCABULARIES[4], 500),
        long.upper(),
        "\n".join(long.split(" ")),
        "x" * 200_000,
    ]
    assert near_duplicates(texts, 0.8, scratch).tolist() == [-1, -1, 0, 1, 1, 1, -1]


def test_every_character_is_read_as_words_reads_it(scratch: Path) -> None:
    codes = [*range(0x3400), *range(0x3400, 0x110000, 61)]
    texts = [f"{code} a{chr(code)}b {chr(code)} {chr(code)}{chr(code)}x" for code in codes]
    spelled = [" ".join(words(text)) for text in texts]
    assert near_duplicates([*texts, *spelled], 1.0, scratch).tolist() == [-1] * len(texts) + list(range(len(texts)))


def test_a_character_and_its_composition_are_one(scratch: Path) -> None:
    composed = [c for c in map(chr, range(0x110000)) if unicodedata.normalize("NFD", c) != c]
    texts = [" ".join(composed), unicodedata.normalize("NFD", " ".join(composed))]
    assert near_duplicates(texts, 1.0, scratch).tolist() == [-1, 0]


def test_a_near_duplicate_names_the_first_text_that_stays(scratch: Path) -> None:
    almost = FOX.replace("sleep", "rest")
    texts = ["something else altogether", FOX, FOX.upper() + "!", almost, almost.replace("morning", "day"), ""]
    assert near_duplicates(texts, 0.5, scratch).tolist() == [-1, -1, 1, 1, -1, -1]


def test_a_text_like_a_dropped_one_only_stays(scratch: Path) -> None:
    tokens = [str(number) for number in range(104)]
    middle = [*tokens[:50], "x", *tokens[51:]]
    far = [*middle[:20], "y", *middle[21:]]
    texts = [" ".join(each) for each in (tokens, middle, far)]
    assert near_duplicates(texts, 0.9, scratch).tolist() == [-1, 0, -1]
    assert near_duplicates(texts[1:], 0.9, scratch).tolist() == [-1, 0]


@pytest.mark.parametrize(("threshold", "expected"), [(0.6, 0), (0.6000001, -1)])
def test_a_similarity_of_exactly_the_threshold_is_enough(scratch: Path, threshold: float, expected: int) -> None:
    # 8 shingles each, 6 of them shared: 6 / 10.
    texts = ["a b c d e f g h i j k l", "x y c d e f g h i j k l"]
    assert near_duplicates(texts, threshold, scratch).tolist() == [-1, expected]


def test_order_of_words_counts_and_repetition_does_not(scratch: Path) -> None:
    texts = ["a b", "b a", "a b a b a b a b", "a b a b a b a b a b a b a b", "ab"]
    assert near_duplicates(texts, 1.0, scratch).tolist() == [-1, -1, -1, 2, -1]


def test_texts_without_words_are_like_no_other(scratch: Path) -> None:
    assert near_duplicates(["", "", "?!", "…"], 0.5, scratch).tolist() == [-1] * 4
    assert near_duplicates([], 0.5, scratch).tolist() == []


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The similarities that were computed."""
    computed: list[float] = []
    similarity = module._similarity

    def watched(one: module.Hashes, other: module.Hashes) -> float:
        computed.append(similarity(one, other))
        return computed[-1]

    monkeypatch.setattr(module, "_similarity", watched)
    return computed


def test_copies_are_compared_with_the_first_alone_and_leave_nothing_in_memory(
    scratch: Path, comparisons: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(0)
    texts = [" ".join(random.choices(VOCABULARIES[4], k=60)) for _ in range(10)]
    noisy = [edited(random, random.choice(texts), VOCABULARIES[4], 1) for _ in range(990)]
    indexed = set()
    insert = module._insert

    def watched(index: list[module._Run], keys: module.Hashes, numbers: NDArray[np.uint32]) -> None:
        indexed.update(numbers.tolist())
        insert(index, keys, numbers)

    monkeypatch.setattr(module, "_insert", watched)
    found = near_duplicates([*texts, *noisy], 0.5, scratch).tolist()
    assert found[:10] == [-1] * 10
    assert set(found[10:]) == set(range(10)) == indexed
    assert len(comparisons) == 990


def test_text_that_is_not_repeated_is_compared_with_nothing(scratch: Path, comparisons: list[float]) -> None:
    random = Random(0)
    notice = " ".join(random.choices(VOCABULARIES[4], k=200))
    texts = [" ".join([*(f"{number} {place}" for place in range(25)), notice]) for number in range(500)]
    assert near_duplicates(texts, 0.7, scratch).tolist() == [-1] * 500
    assert comparisons == []


def test_what_few_texts_share_decides_what_is_compared(scratch: Path, comparisons: list[float]) -> None:
    random = Random(0)
    notice, *passages = (" ".join(random.choices(VOCABULARIES[4], k=60)) for _ in range(301))
    texts = [" ".join([notice, *pair]) for pair in pairwise(passages)]
    assert near_duplicates(texts, 0.8, scratch).tolist() == [-1] * 299
    assert len(comparisons) < 2 * 300


def test_the_result_does_not_depend_on_the_process(scratch: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from selfalign.text.near_duplicates import near_duplicates, _Shingler\n"
        "texts = sys.stdin.read().split('\\n'); print(_Shingler()(texts)[0].sum())\n"
        "print(near_duplicates(texts, 0.6, Path(sys.argv[1])).tolist())"
    )
    texts = "\n".join(families(Random(1), 80, VOCABULARIES[4], (10, 60)))
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(scratch)],
            input=texts,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert printed[0].endswith(f"{compared(texts.split(chr(10)), 0.6)}\n")


def test_texts_are_read_once_and_no_file_stays(tmp_path: Path) -> None:
    def once() -> Iterator[str]:
        yield from [FOX, FOX]

    scratch = tmp_path / "made" / "here"
    assert near_duplicates(once(), 0.8, scratch).tolist() == [-1, 0]
    assert list(scratch.iterdir()) == []


def test_a_failing_source_is_not_blamed_on_the_scratch_folder(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield FOX
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        near_duplicates(broken(), 0.8, tmp_path)


def test_a_folder_that_cannot_hold_the_files_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StorageError, match=r"cannot keep the shingles .* in .*file: .*exists.*12 bytes"):
        near_duplicates([FOX], 0.8, blocked)


@pytest.mark.parametrize("count", [20, 20_000])
def test_a_disk_that_is_full_is_an_error_of_the_scratch_folder(tmp_path: Path, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match="cannot keep the shingles"):
            near_duplicates((f"{number} {FOX}" for number in range(count)), 0.8, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_a_similarity_that_is_none_is_refused(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        near_duplicates([FOX], threshold, tmp_path)
