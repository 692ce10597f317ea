"""The contract that programs read, and what people see."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from report.conftest import Run
from report.whole import change, log, whole
from selfalign.core.errors import StorageError, UsageError
from selfalign.core.lease import presence
from selfalign.report.run import RunView
from selfalign.report.status import figures, metrics, results_table, status, steps_table

Measured = Callable[..., dict[str, Any]]
STEP = {"name", "arm", "state", "sources", "in", "kept", "rejected", "quarantined", "seconds", "tokens"}


def test_the_document_has_the_keys_of_the_contract(run: Run) -> None:
    run.add("augment.filter", ledger={"kept": 1, "rejected": {"empty": 2}})
    run.add("curate.rate@1", state="waiting")
    document = json.loads(json.dumps(status(run.view()), allow_nan=False))
    assert set(document) == {"run", "complete", "steps", "artifacts", "metrics"}
    done, waiting = document["steps"]
    assert set(done) >= STEP
    assert set(waiting) == set(done)
    assert (done["name"], done["arm"], done["state"], done["tokens"]) == ("augment.filter", None, "done", 7)
    assert (done["in"], done["kept"], done["rejected"], done["quarantined"]) == (3, 1, {"empty": 2}, {})
    assert (waiting["state"], waiting["in"], waiting["seconds"]) == ("waiting", None, None)
    (artifact,) = document["artifacts"]
    assert artifact == {"name": f"augment.filter-{0:016x}", "identity": f"{0:016x}", "sha256": "f" * 64}
    assert document["complete"] is False


@pytest.mark.parametrize(
    ("states", "complete"),
    [(["done", "done"], True), (["done", "skipped"], True), (["done", "waiting"], False), (["done", "failed"], False)],
)
def test_a_run_is_complete_when_every_step_is_done_or_skipped(run: Run, states: list[str], complete: bool) -> None:
    for n, state in enumerate(states):
        run.add(f"curate.rate@{n}", state=state)
    assert status(run.view())["complete"] is complete


def state_of(run: Run) -> object:
    (step,) = run.view().steps
    return step.state


def test_a_running_step_is_running_while_its_driver_lives(run: Run) -> None:
    run.add("forward.train@1", state="running")
    with presence(run.store.root / "drivers", lambda text: None):
        assert state_of(run) == "running"
    assert state_of(run) == "waiting"


def test_a_killed_drivers_running_step_is_shown_as_waiting(run: Run) -> None:
    run.add("forward.train@1", state="running")
    code = "import sys; from pathlib import Path; from selfalign.core.lease import presence\n"
    code += "with presence(Path(sys.argv[1]), print): print('here', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run.store.root / "drivers")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "here\n"
        assert state_of(run) == "running"
        driver.kill()
        driver.wait()
        assert state_of(run) == "waiting"
    assert len(list((run.store.root / "drivers").iterdir())) == 1


def test_a_driver_of_another_host_counts_for_a_minute(run: Run) -> None:
    run.add("forward.train@1", state="running")
    path = run.store.root / "drivers" / "elsewhere-1.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "t"}))
    assert state_of(run) == "running"
    os.utime(path, (time.time() - 61,) * 2)
    assert state_of(run) == "waiting"


def test_looking_changes_nothing_in_the_folder(run: Run, measured: Measured) -> None:
    run.add("evaluate.forward@1", metrics=measured(0.5))
    run.add("forward.train@2", state="running")
    root = run.store.root
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    view = run.view()
    status(view), steps_table(view), results_table(view), figures(view)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_models_are_named_by_round_and_arm(run: Run, measured: Measured) -> None:
    run.add("evaluate.base", metrics=measured(0.1))
    for k, share in ((0, 0.2), (1, 0.4), (2, 0.5)):
        run.add(f"evaluate.forward@{k}", metrics=measured(share, loss=2 - k / 2))
    run.add("evaluate.forward@1", arm="uncurated", metrics=measured(0.3))
    run.add("evaluate.forward@2", arm="uncurated", metrics=measured(0.35))
    found = metrics(run.view())
    assert found["accuracy"] == {
        "base": 0.1,
        "M0": 0.2,
        "M1": 0.4,
        "M2": 0.5,
        "uncurated": 0.3,
        "uncurated M2": 0.35,
    }
    assert found["accuracy_ci"]["M0"] == [pytest.approx(0.1), pytest.approx(0.3)]
    assert found["held_out_loss"]["M2"] == 1.0


def test_what_the_backward_model_and_the_rater_measured_is_told(run: Run, measured: Measured) -> None:
    run.add("evaluate.base_backward", metrics=measured(None, loss=3.5))
    run.add("evaluate.backward", metrics=measured(0.6, loss=1.5))
    run.add("curate.calibrate@1", metrics={"auc": 0.8, "auc_ci": [0.7, 0.9], "auc_by_kind": {"swapped": 0.9}})
    run.add("curate.calibrate@2", metrics={"auc": 0.1, "auc_ci": [0.0, 0.2]})
    found = metrics(run.view())
    assert found["backward_exact_match"] == 0.6
    assert found["backward_held_out_loss"] == 1.5
    assert found["backward_base_held_out_loss"] == 3.5
    assert (found["rater_auc"], found["rater_auc_ci"]) == (0.8, [0.7, 0.9])
    lines = figures(run.view())
    assert len(lines) == 4
    assert any("AUC" in line and "0.800 (95%: 0.700 to 0.900)" in line for line in lines)


def test_what_training_changed_of_the_backward_model_is_told_as_a_paired_difference(
    run: Run, measured: Measured
) -> None:
    gaps = {
        "held_out": {"difference": -0.4, "ci": [-0.5, -0.3], "n": 9},
        "rouge_l": {"difference": 0.04, "ci": [0.01, 0.07], "n": 9},
    }
    run.add("evaluate.base_backward", metrics=measured(None, loss=3.0, rouge_l={"mean": 0.1, "ci": [0, 0.2], "n": 9}))
    after = {"mean": 0.14, "ci": [0, 0.2], "n": 9}
    run.add("evaluate.backward", metrics=measured(None, loss=2.6, rouge_l=after, against_base=gaps))
    found = metrics(run.view())
    assert found["backward_nll"] == {"before": 3.0, "after": 2.6, "difference": -0.4, "difference_ci": [-0.5, -0.3]}
    assert found["backward_rouge_l"] == {
        "before": 0.1,
        "after": 0.14,
        "difference": 0.04,
        "difference_ci": [0.01, 0.07],
    }
    lines = figures(run.view())
    assert "backward model and the base, held-out loss: 2.600 and 3.000, -0.400 (95%: -0.500 to -0.300)" in lines
    assert (
        "backward model and the base, ROUGE-L of held-out instructions: 0.140 and 0.100, +0.040 (95%: 0.010 to 0.070)"
    ) in lines


def test_without_the_bases_measurement_there_is_no_gain(run: Run, measured: Measured) -> None:
    run.add("evaluate.base_backward", state="waiting")
    run.add("evaluate.backward", metrics=measured(None, loss=2.6))
    assert "backward_nll" not in metrics(run.view())


JUDGED = {
    "win_rate": 0.61,
    "ci": [0.52, 0.7],
    "wins": 5,
    "ties": 3,
    "losses": 2,
    "alike": 1,
    "consistent": 0.75,
    "first_position": 0.58,
    "n": 10,
    "unjudged": {"off_scale": 2},
}


def test_likeness_and_the_judges_verdicts_are_told_by_model(run: Run, measured: Measured) -> None:
    run.add("evaluate.base", metrics=measured(None, rouge_l={"mean": 0.1, "ci": [0.05, 0.15], "n": 9}))
    run.add("evaluate.forward@1", metrics=measured(None, rouge_l={"mean": 0.2, "ci": None, "n": 1}))
    run.add("evaluate.forward@2", metrics=measured(None))
    run.add("evaluate.judge@1", metrics=JUDGED)
    run.add("evaluate.judge@2", state="waiting")
    nothing = {**JUDGED, "n": 0, "win_rate": None, "ci": None, "consistent": None, "first_position": None}
    run.add("evaluate.judge@1", arm="uncurated", metrics=nothing)
    found = json.loads(json.dumps(metrics(run.view())))
    assert found["rouge_l"] == {"base": 0.1, "M1": 0.2}
    assert found["rouge_l_ci"] == {"base": [0.05, 0.15], "M1": None}
    assert found["judge"] == {"M1": JUDGED, "uncurated": nothing}
    assert figures(run.view()) == [
        "M1 and the base, judged: win rate 0.610 (95%: 0.520 to 0.700); 5 won, 3 tied (1 alike), 2 lost; the same in "
        "both orders 0.750; for what stands first 0.580; 2 off_scale",
        "uncurated and the base, judged: 2 off_scale",
    ]
    text = shown(results_table(run.view()))
    assert "ROUGE-L" in text
    assert re.search(r"base.*0\.100.*0\.050 to 0\.150", text)
    assert re.search(r"M1.*0\.200", text)


def test_without_replies_to_compare_the_table_has_no_column_for_them(run: Run, measured: Measured) -> None:
    run.add("evaluate.forward@1", metrics=measured(0.5))
    assert "ROUGE" not in shown(results_table(run.view()))


def test_areas_are_told_by_signal_and_kind_as_the_first_calibration_measured_them(run: Run) -> None:
    rubric = {"all": 0.65, "by_kind": {"swapped": 0.65, "echo": 1.0}, "ci": {"all": [0.5, 0.8], "by_kind": {}}}
    rubric["ci"]["by_kind"] = {"swapped": [0.5, 0.8], "echo": [0.9, 1.0]}
    likeness = {
        **rubric,
        "all": 0.5,
        "swapped_truncated": 0.75,
        "ci": {**rubric["ci"], "swapped_truncated": [0.6, 0.9]},
    }  # type: ignore[dict-item]
    run.add("curate.calibrate@1", metrics={"auc": 0.65, "planted_auc": {"entropy": likeness, "rubric": rubric}})
    run.add("curate.calibrate@2", metrics={"auc": 0.9, "planted_auc": {"rubric": likeness}})
    assert metrics(run.view())["planted_auc"] == {"entropy": likeness, "rubric": rubric}
    text = shown(results_table(run.view()))
    assert re.search(r"planted AUC \(95%\).*all.*swapped, truncated.*swapped.*echo", text)
    row = r"rubric\W+\.65 \(\.50–\.80\)\W+\.65 \(\.50–\.80\)\W+1\.00 \(\.90–1\.00\)"
    assert re.search(rf"{row}.*\n.*entropy\W+\.50 \(\.50–\.80\)\W+\.75 \(\.60–\.90\)", text)


def test_a_calibration_whose_gate_failed_is_told_too(run: Run) -> None:
    whole(run, "x")
    change(run, "curate.calibrate@1", state="failed")
    found = metrics(run.view())
    assert found["rater_auc"] == 1.0
    assert "rubric" in found["planted_auc"]


def test_injection_and_agreement_are_told_of_the_first_round_and_by_round_where_there_are_several(run: Run) -> None:
    whole(run, "x")
    found = metrics(run.view())
    assert found["injection"]["above_threshold"] == {"payload": 2, "twin": 1}
    assert found["agreement"]["spearman"] == 1.0
    assert "injection_by_round" not in found
    lines = figures(run.view())
    assert any(
        "+0.125 (95%: -0.250 to 0.500; n = 4); at the threshold or above: 2 and 1 of 4" in line for line in lines
    )
    assert any("Spearman +1.000 (95%: 0.250 to 1.000; n = 4); kept by both 1, by the first" in line for line in lines)
    other = {**found["agreement"], "spearman": None, "spearman_ci": None}
    run.add("curate.agree@2", metrics=other)
    found = metrics(run.view())
    assert found["agreement"]["spearman"] == 1.0
    assert found["agreement_by_round"]["2"] == other


def test_an_injection_without_a_pair_is_told_without_a_figure(run: Run) -> None:
    nothing = {
        "payloads": 0,
        "by_signal": {"verdict": None},
        "by_kind": {},
        "above_threshold": {"payload": 0, "twin": 0},
    }
    run.add("curate.inject@1", metrics=nothing)
    assert figures(run.view()) == []
    assert metrics(run.view())["injection"] == nothing


def test_what_was_not_measured_is_not_there(run: Run, measured: Measured) -> None:
    run.add("evaluate.forward@1", metrics=measured(None))
    found = metrics(run.view())
    assert "accuracy" not in found
    assert "rater_auc" not in found
    assert found["held_out_loss"] == {"M1": 2.0}


def test_a_calibration_without_an_area_is_told_without_a_figure(run: Run) -> None:
    run.add("curate.calibrate@1", metrics={"auc": None, "rated": 0.0})
    assert metrics(run.view())["rater_auc"] is None
    assert figures(run.view()) == []


def test_an_artifact_that_arms_share_is_listed_once(run: Run) -> None:
    run.add("forward.compose@1")
    run.steps.append({**run.steps[0], "arm": "other"})
    (run.store.root / "run.json").write_text(json.dumps({"steps": run.steps}))
    document = status(run.view())
    assert len(document["artifacts"]) == 1
    assert [step["arm"] for step in document["steps"]] == [None, "other"]


def shown(table: object) -> str:
    console = Console(width=200, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def test_people_see_steps_with_counts_reasons_and_arms(run: Run, measured: Measured) -> None:
    run.add("augment.filter", ledger={"kept": 1, "rejected": {"echo": 1}, "quarantined": {"crashed_worker": 1}})
    run.add("evaluate.forward@1", arm="uncurated", metrics=measured(0.5))
    text = shown(steps_table(run.view()))
    assert re.search(r"augment\.filter\s.*done\s.*3\s.*1\s.*1 echo, 1 crashed_worker \(quarantined\)", text)
    assert "evaluate.forward@1 [uncurated]" in text


def test_people_see_the_models_side_by_side_and_the_gap_to_the_base(run: Run, measured: Measured) -> None:
    assert results_table(run.view()) is None
    gap = {"held_out": {"difference": -0.25, "ci": [-0.3, -0.2], "n": 9}}
    run.add("evaluate.forward@1", metrics=measured(0.5, against_base=gap))
    one = {"difference": 0.1, "ci": None, "n": 1}
    run.add("evaluate.forward@2", metrics=measured(None, against_base={"held_out": one}))
    text = shown(results_table(run.view()))
    assert re.search(r"M1.*0\.500.*0\.400 to 0\.600.*2\.000.*-0\.250 \(-0\.300 to -0\.200\)", text)
    assert re.search(r"M2.*\+0\.100", text)


def test_the_epochs_that_a_training_kept_are_told_by_model_with_the_last_behind_them(
    run: Run, measured: Measured
) -> None:
    for name, share, loss in (
        ("evaluate.backward_epoch_1", None, 3.0),
        ("evaluate.backward", None, 2.5),
        ("evaluate.forward@0", 0.1, 2.2),
        ("evaluate.forward_epoch_1@1", 0.2, 2.0),
        ("evaluate.forward_epoch_2@1", 0.4, 1.5),
        ("evaluate.forward@1", 0.3, 1.75),
    ):
        run.add(name, metrics=measured(share, loss))
    run.add("evaluate.forward_epoch_1@1", arm="other", metrics=measured(0.5, 1.0))
    found = metrics(run.view())
    assert found["accuracy_by_epoch"] == {"M1": {"1": 0.2, "2": 0.4, "last": 0.3}, "other": {"1": 0.5}}
    assert found["held_out_loss_by_epoch"] == {
        "backward": {"1": 3.0, "last": 2.5},
        "M1": {"1": 2.0, "2": 1.5, "last": 1.75},
        "other": {"1": 1.0},
    }
    assert found["held_out_loss_by_epoch_ci"]["backward"]["last"] == [2.4, 2.6]
    # The keys of the contract are the last epoch's.
    assert (found["accuracy"], found["backward_held_out_loss"]) == ({"M0": 0.1, "M1": 0.3}, 2.5)
    assert "M1, held-out loss by epoch: 2.000 (1), 1.500 (2), 1.750 (last)" in figures(run.view())


def test_people_see_how_far_a_training_is_while_it_runs(run: Run) -> None:
    log(run.add("forward.train@1", state="running"), [2.0, 1.25], tokens_per_second=1234.5)
    log(run.add("forward.train@2", state="running"), [0.5])
    log(run.add("forward.train@3"), [0.75])
    with presence(run.store.root / "drivers", lambda text: None):
        text = shown(steps_table(run.view()))
    assert "step 20 of 400, loss 1.25, 1,234 tokens/s" in text
    assert re.search(r"step 10 of 400, loss 0\.5\s", text)
    assert "0.75" not in text
    assert "of 400" not in shown(steps_table(run.view()))


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_folder_without_a_run_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match="holds no run"):
        RunView.open(tmp_path)


def test_a_damaged_manifest_is_a_storage_error(run: Run) -> None:
    folder = run.add("augment.filter")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        status(run.view())


def test_an_artifact_that_was_deleted_is_not_listed(run: Run) -> None:
    shutil.rmtree(run.add("augment.filter"))
    assert status(run.view())["artifacts"] == []
