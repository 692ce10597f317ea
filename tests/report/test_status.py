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
from report.whole import log
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
