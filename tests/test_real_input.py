"""The LIMA recipe on the real LIMA and Guanaco files: quality means nothing on the tiny base, counts do."""

import json
from pathlib import Path

import pytest

from selfalign.cli import main
from selfalign.demo.base import base_folder

RECIPE = Path(__file__).parents[1] / "recipes" / "lima150-llama3.1-8b.yaml"
OPEN_GATES = ["curate.threshold=1", "curate.max_off_scale=1", "curate.min_auc=0", "curate.min_rated=0"]


def command(data: Path, root: Path, *more: str) -> list[str]:
    base = base_folder()
    return [
        "run",
        str(RECIPE),
        f"model.path={base}",
        f"curate.rater.model={base}",
        f"prepare.seed.path={data / 'guanaco' / 'oa_questions.jsonl'}",
        f"prepare.corpus.path={data / 'lima' / 'train.jsonl'}",
        "backward.max_steps=5",
        "forward.max_steps=5",
        *more,
        "--run",
        str(root),
    ]


def steps(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    main(["status", str(root), "--json"])
    return {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


@pytest.mark.slow
def test_every_step_runs_on_the_real_files_and_explains_every_dropped_row(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(real_data, tmp_path / "run", *OPEN_GATES)) == 0
    found = steps(tmp_path / "run", capsys)
    assert (found["prepare.read_seed"]["in"], found["prepare.read_seed"]["kept"]) == (953, 953)
    corpus = found["prepare.read_corpus"]
    assert (corpus["in"], corpus["kept"]) == (1030, 1000)
    assert (corpus["rejected"], corpus["quarantined"]) == ({"multi_turn": 29}, {"odd_turns": 1})
    assert found["prepare.pick_corpus"]["kept"] == 150
    assert found["augment.generate"]["in"] == 150
    for step in found.values():
        assert step["state"] == "done"
        assert step["in"] == step["kept"] + sum(step["rejected"].values()) + sum(step["quarantined"].values())


def test_with_its_gates_it_ends_before_time_is_spent_on_training(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(real_data, tmp_path / "run")) == 3
    assert "and curate.min_auc wants 0.65" in capsys.readouterr().err
    found = steps(tmp_path / "run", capsys)
    assert found["curate.calibrate@1"]["state"] == "failed"
    assert found["backward.train"]["state"] == "waiting"
