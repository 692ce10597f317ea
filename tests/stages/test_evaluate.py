"""What is measured of a model: losses, answers, their intervals, and against whom."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import UsageError
from selfalign.core.protocols import Reply, Score
from selfalign.core.records import SeedPair
from selfalign.core.stage import Built, Context, External
from selfalign.core.store import Artifact
from selfalign.engines.config import ModelConfig
from selfalign.stages.evaluate import Evaluate, EvaluateConfig, Question, read_questions
from stages.conftest import FakeEngine, Stored, place_in

Seen = Callable[..., Context]
PAIRS = [
    SeedPair(id=f"s/{n}", source="s", prompt=f"prompt {n}", completion=f"completion {n}", split=split)
    for n, split in enumerate(["held_out", "train", "held_out", "held_out"])
]
# Log-probability and tokens by pair: 2, 0.5 and 1.25 nats a token.
LOSSES = {"s/0": Score(-8.0, 4), "s/2": Score(-1.0, 2), "s/3": Score(-5.0, 4)}
QUESTIONS = [
    {"prompt": "Capital?", "answers": ["Vage", "Vage City"]},
    {"prompt": "Lakes?", "contains": ["Loke", "Kage"], "excludes": ["Zogi"]},
    {"prompt": "Colour?", "contains": ["red"]},
    {"prompt": "Number?", "answers": ["3"]},
]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


class Measuring:
    """Builds the stage with an engine; keeps what was written as an input for the next."""

    def __init__(self, folder: Path, engine: FakeEngine, seen: Seen, seed: Artifact) -> None:
        self.folder, self.engine, self.seen, self.seed = folder, engine, seen, seed

    def __call__(
        self, name: str = "m", config: EvaluateConfig | None = None, direction: Any = "forward", **more: Any
    ) -> tuple[Built, Artifact]:
        artifact = Artifact(self.folder / name, name)
        artifact.files.mkdir(parents=True)
        settings = {key: more.pop(key) for key in ("template", "may_stop", "epoch") if key in more}
        stage = Evaluate(config or EvaluateConfig(), ModelConfig(path="x"), direction, **settings)
        built = stage.build(self.seen(seed=self.seed, **more), place_in(artifact.files), lambda line: None)
        text = (artifact.files / "metrics.json").read_text()
        assert json.loads(text, parse_constant=_refuse) == built.metrics
        assert {artifact.files / name for name in built.content} == set(artifact.files.iterdir())
        return built, artifact

    def questions(self, *rows: object) -> External:
        path = self.folder / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return External(str(path), "digest")


@pytest.fixture
def measured(tmp_path: Path, engine: FakeEngine, seen: Seen, stored: Stored) -> Measuring:
    engine.scores = lambda request, options: [LOSSES.get(request.id, Score(-1.0, 1))]
    return Measuring(tmp_path, engine, seen, stored("seed", PAIRS, SeedPair))


def test_the_held_out_loss_is_the_mean_of_nats_a_token(measured: Measuring) -> None:
    built, artifact = measured()
    held_out = built.metrics["held_out"]
    assert held_out["nats_per_token"] == 1.25
    assert (held_out["n"], held_out["unmeasured"]) == (3, {})
    low, high = held_out["ci"]
    assert low < 1.25 < high
    rows = [json.loads(line) for line in (artifact.files / "held_out.jsonl").read_text().splitlines()]
    assert rows == [{"id": id, "nats_per_token": loss} for id, loss in (("s/0", 2.0), ("s/2", 0.5), ("s/3", 1.25))]


def test_forward_the_response_is_scored_and_backward_the_instruction(measured: Measuring) -> None:
    measured("a", EvaluateConfig(system="Sa"))
    measured("b", EvaluateConfig(system="Sa"), "backward", template="Ask for {response}")
    (forward, answers, _), (backward, instructions, _) = measured.engine.scored
    assert [m["content"] for m in forward[0].messages] == ["Sa", "prompt 0"]
    assert answers[0] == ["completion 0"]
    assert [m["content"] for m in backward[0].messages] == ["Ask for completion 0"]
    assert instructions[0] == ["prompt 0"]


def test_pairs_that_do_not_fit_are_counted_and_left_out_of_the_mean(measured: Measuring) -> None:
    measured.engine.scores = lambda request, options: None if request.id == "s/0" else [LOSSES[request.id]]
    built, _ = measured()
    assert built.metrics["held_out"] | {"ci": None} == {
        "nats_per_token": 0.875,
        "ci": None,
        "n": 2,
        "unmeasured": {"too_long": 1},
    }
    assert built.ledger.check("evaluate").to_json()["rejected"] == {"too_long": 1}


def test_one_held_out_pair_has_no_interval_and_the_file_no_infinity(measured: Measuring, stored: Stored) -> None:
    measured.seed = stored("one", PAIRS[:2], SeedPair)
    base, base_files = measured("base")
    assert base.metrics["held_out"] == {"nats_per_token": 2.0, "ci": None, "n": 1, "unmeasured": {}}
    built, _ = measured("m", base=base_files)
    assert built.metrics["against_base"] == {"held_out": {"difference": 0.0, "ci": None, "n": 1}}


def test_without_held_out_pairs_there_is_no_loss(measured: Measuring, stored: Stored) -> None:
    measured.seed = stored("none", PAIRS[1:2], SeedPair)
    built, _ = measured()
    assert built.metrics["held_out"] == {"nats_per_token": None, "ci": None, "n": 0, "unmeasured": {}}
    assert built.metrics["exact_match"] is None


ANSWERS = {"Capital?": " vage city.", "Lakes?": "Kage and Loke.", "Colour?": "It is reddish.", "Number?": "3"}


def answer(measured: Measuring, **changed: str) -> None:
    answers = {**ANSWERS, **changed}
    measured.engine.reply = lambda request: answers.get(request.messages[-1]["content"], "some reply")


def test_answers_are_right_when_they_match_exactly_or_contain_all_and_nothing_excluded(measured: Measuring) -> None:
    answer(measured)
    built, artifact = measured(questions=measured.questions(*QUESTIONS))
    exact = built.metrics["exact_match"]
    assert (exact["share"], exact["n"]) == (0.75, 4)
    low, high = exact["ci"]
    assert 0 < low < 0.75 < high < 1
    rows = [json.loads(line) for line in (artifact.files / "replies.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows] == [1.0, 1.0, 0.0, 1.0, None, None, None]
    assert (rows[2]["prompt"], rows[2]["reply"], rows[2]["finish"]) == ("Colour?", "It is reddish.", "stop")


@pytest.mark.parametrize(
    ("reply", "right"), [("Loke, Kage", True), ("Loke", False), ("Loke, Kage and Zogi", False), ("", False)]
)
def test_what_a_question_excludes_makes_a_reply_wrong(reply: str, right: bool) -> None:
    assert Question.model_validate(QUESTIONS[1]).is_right(reply) is right


def test_questions_are_asked_greedily_as_training_asked(measured: Measuring) -> None:
    measured("m", EvaluateConfig(system="Sa", max_new_tokens=7, samples=2), questions=measured.questions(QUESTIONS[0]))
    ((requests, sampling, _),) = measured.engine.generated
    assert (sampling.temperature, sampling.max_new_tokens) == (0, 7)
    assert [[m["content"] for m in r.messages] for r in requests] == [
        ["Sa", "Capital?"],
        ["Sa", "prompt 0"],
        ["Sa", "prompt 2"],
    ]


def test_the_difference_to_the_base_is_paired_by_row(measured: Measuring) -> None:
    answer(measured, **{"Capital?": "Loke", "Number?": "4"})
    _, base = measured("base", questions=measured.questions(*QUESTIONS))
    answer(measured)
    # Every row gains half a nat, but for one that no longer fits and so takes part on neither side.
    measured.engine.scores = lambda request, options: (
        None
        if request.id == "s/0"
        else [Score(LOSSES[request.id].log_prob + 0.5 * LOSSES[request.id].tokens, LOSSES[request.id].tokens)]
    )
    built, _ = measured("m", questions=measured.questions(*QUESTIONS), base=base)
    found = built.metrics["against_base"]
    assert found["held_out"] == {"difference": -0.5, "ci": [-0.5, -0.5], "n": 2}
    assert (found["exact_match"]["difference"], found["exact_match"]["n"]) == (0.5, 4)
    low, high = found["exact_match"]["ci"]
    assert low < 0.5 < high


def test_held_out_replies_are_compared_with_what_people_wrote(measured: Measuring) -> None:
    # Of two words each, the held-out completions share one with these replies, or both, or none.
    replies = {"prompt 0": "completion", "prompt 2": "Completion, 2!", "prompt 3": "none"}
    answer(measured, **replies)
    config = EvaluateConfig(samples=1, replies=3)
    built, artifact = measured("m", config, questions=measured.questions(QUESTIONS[0]))
    assert built.metrics["rouge_l"] | {"ci": None} == {"mean": 0.5556, "ci": None, "n": 3}
    low, high = built.metrics["rouge_l"]["ci"]
    assert low < 0.5556 < high
    rows = [json.loads(line) for line in (artifact.files / "replies.jsonl").read_text().splitlines()]
    assert [row.get("rouge_l") for row in rows] == [None, 0.66667, 1.0, 0.0]
    assert len(measured.engine.generated) == 1


def test_backward_replies_are_compared_with_the_instruction(measured: Measuring) -> None:
    measured.engine.reply = lambda request: "prompt 0"
    built, _ = measured("m", EvaluateConfig(replies=3), "backward")
    assert built.metrics["rouge_l"]["mean"] == round((1 + 0.5 + 0.5) / 3, 4)
    assert measured.engine.generated[0][0][0].messages[-1]["content"] == "completion 0"


def test_the_likeness_is_held_against_the_bases_pair_by_pair(measured: Measuring) -> None:
    config = EvaluateConfig(replies=3)
    measured.engine.reply = lambda request: "completion"
    _, base = measured("base", config)
    measured.engine.reply = lambda request: "completion 0"
    built, _ = measured("m", config, base=base)
    found = built.metrics["against_base"]["rouge_l"]
    # By hand: 1 - 2/3 once, 1/2 - 2/3 twice.
    assert (found["difference"], found["n"]) == (0.0, 3)
    assert found["ci"][0] < 0 < found["ci"][1]
    plain, _ = measured("plain", base=base)
    assert "rouge_l" not in plain.metrics["against_base"]


def test_a_reply_that_did_not_fit_is_like_nothing(measured: Measuring) -> None:
    measured.engine.reply = lambda request: Reply("", 0, "too_long") if "0" in str(request.messages) else "completion"
    built, _ = measured("m", EvaluateConfig(replies=3))
    assert (built.metrics["rouge_l"]["mean"], built.metrics["rouge_l"]["n"]) == (0.4444, 3)


def test_as_many_pairs_get_a_reply_as_samples_or_replies_ask_for(measured: Measuring) -> None:
    for name, config in (
        ("a", EvaluateConfig(samples=1)),
        ("b", EvaluateConfig(samples=2, replies=1)),
        ("c", EvaluateConfig(samples=1, replies=2)),
    ):
        measured(name, config)
    assert [len(requests) for requests, *_ in measured.engine.generated] == [1, 2, 2]


def test_replies_count_only_where_they_change_what_is_measured() -> None:
    def settings(**config: int) -> Any:
        return Evaluate(EvaluateConfig(**config), ModelConfig(path="x"), "forward").settings()

    assert "rouge_l" not in settings()
    assert settings(replies=3) != settings()
    assert settings(replies=9) != settings(replies=8)
    assert settings(replies=9, samples=9) == settings(replies=9) == settings(replies=1, samples=9)


def test_nothing_is_compared_without_a_base(measured: Measuring) -> None:
    built, _ = measured()
    assert built.metrics["against_base"] is None


def test_of_an_earlier_epoch_the_adapter_is_the_one_that_was_kept(measured: Measuring) -> None:
    adapter = Artifact(measured.folder / "train", "t")
    measured("last", adapter=adapter)
    measured("first", adapter=adapter, epoch=1)
    assert [used for *_, used in measured.engine.scored] == [adapter.files, adapter.files / "epoch-1"]
    assert [used for *_, used in measured.engine.generated] == [adapter.files, adapter.files / "epoch-1"]


def test_of_an_earlier_epoch_the_weights_are_those_that_were_kept(
    measured: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ModelConfig] = []
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: opened.append(config) or measured.engine)
    model = Artifact(measured.folder / "train", "t")
    measured("last", model=model)
    measured("second", model=model, epoch=2)
    assert [config.path for config in opened] == [str(model.files), str(model.files / "epoch-2")]
    assert all(used is None for *_, used in measured.engine.scored)


def test_the_epoch_is_part_of_what_is_measured() -> None:
    settings = [
        Evaluate(EvaluateConfig(), ModelConfig(path="x"), "forward", epoch=epoch).settings() for epoch in (None, 1, 2)
    ]
    assert "epoch" not in settings[0]
    assert [s.get("epoch") for s in settings[1:]] == [1, 2]


@pytest.mark.parametrize(
    ("min_gain", "stop"),
    [
        (None, None),
        (0.25, None),
        (0.26, "exact match gained +0.2500 on the round before, evaluate.min_gain is 0.26"),
    ],
)
def test_a_round_that_gains_too_little_in_answers_stops_the_rounds(
    measured: Measuring, min_gain: float | None, stop: str | None
) -> None:
    answer(measured, **{"Capital?": "Loke"})
    _, before = measured("before", questions=measured.questions(*QUESTIONS))
    answer(measured)
    config = EvaluateConfig(min_gain=min_gain)
    built, _ = measured("m", config, may_stop=True, before=before, questions=measured.questions(*QUESTIONS))
    assert built.stop == stop
    silent, _ = measured("n", config, before=before, questions=measured.questions(*QUESTIONS))
    assert silent.stop is None


def test_without_questions_the_loss_decides_and_lower_is_better(measured: Measuring) -> None:
    _, before = measured("before")
    measured.engine.scores = lambda request, options: [
        Score(LOSSES[request.id].log_prob * 2, LOSSES[request.id].tokens)
    ]
    worse, _ = measured("worse", EvaluateConfig(min_gain=0), may_stop=True, before=before)
    assert worse.stop == "held-out loss gained -1.2500 on the round before, evaluate.min_gain is 0.0"
    measured.engine.scores = lambda request, options: [
        Score(LOSSES[request.id].log_prob / 2, LOSSES[request.id].tokens)
    ]
    better, _ = measured("better", EvaluateConfig(min_gain=0.6), may_stop=True, before=before)
    assert better.stop is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "Invalid JSON"),
        ("", "this line is empty"),
        ('{"answers": ["x"]}', "prompt Field required"),
        ('{"prompt": "p", "answer": ["x"]}', "answer Extra inputs"),
        ('{"prompt": "p", "answers": "x"}', "answers"),
        ('{"prompt": "p"}', "a question needs answers, contains or excludes"),
        ('{"prompt": "p", "answers": [], "contains": []}', "a question needs answers, contains or excludes"),
        ('{"prompt": "p", "contains": ["x", " "]}', "none of them empty"),
        ('{"prompt": "p", "answers": [""]}', "none of them empty"),
    ],
)
def test_a_broken_question_is_told_with_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n" + json.dumps(QUESTIONS[1]))
    with pytest.raises(UsageError, match=rf"questions\.jsonl:2: .*{told}") as caught:
        read_questions(path)
    assert caught.value.exit_code == 2


def test_questions_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"questions in .* cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_line_ends_within_a_reply_or_a_question_part_no_rows(measured: Measuring) -> None:
    measured.engine.reply = lambda request: "one\u2028two\x85three\x0c\r\n"
    path = measured.folder / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "answers": ["x"]}, ensure_ascii=False) + "\n", encoding="utf-8")
    questions = External(str(path), "digest")
    _, base = measured("base", questions=questions)
    built, _ = measured("m", questions=questions, base=base)
    assert built.metrics["against_base"]["exact_match"]["n"] == 1
    assert measured.engine.generated[0][0][0].messages[-1]["content"] == "a\u2028b"


def test_a_reply_that_did_not_fit_is_wrong_not_missing(measured: Measuring) -> None:
    measured.engine.reply = lambda request: Reply("", 0, "too_long")
    built, _ = measured(questions=measured.questions(*QUESTIONS))
    assert (built.metrics["exact_match"]["share"], built.metrics["exact_match"]["n"]) == (0.0, 4)


def test_tokens_are_those_of_this_measurement_alone(measured: Measuring) -> None:
    measured.engine.tokens = 1000
    built, _ = measured()
    assert built.tokens == 3 + 3


def test_a_question_cannot_ask_for_both_kinds_of_match() -> None:
    with pytest.raises(ValueError, match="matched exactly"):
        Question(prompt="a", answers=("b",), contains=("c",))
