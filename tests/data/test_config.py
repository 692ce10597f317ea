"""The recipe's `prepare.seed` and `prepare.corpus`."""

import pytest
from pydantic import ValidationError

from selfalign.data.config import CorpusConfig, SeedConfig


def test_only_the_path_must_be_given_and_no_filter_is_on() -> None:
    assert SeedConfig(path="seed.jsonl").held_out == 64
    corpus = CorpusConfig(path="corpus")
    assert (corpus.format, corpus.sample, corpus.sample_seed, corpus.min_chars, corpus.max_chars) == (None,) * 5


@pytest.mark.parametrize(
    "change",
    [{"path": ""}, {"format": "csv"}, {"sample": 0}, {"held_out": -1}, {"colour": "red"}],
    ids=["no path", "unknown format", "empty sample", "negative held_out", "unknown key"],
)
def test_a_setting_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SeedConfig.model_validate({"path": "seed.jsonl", **change})


def test_a_length_range_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_chars 9 is above max_chars 8"):
        CorpusConfig(path="corpus", min_chars=9, max_chars=8)
