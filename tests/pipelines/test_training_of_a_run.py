"""Trainings as people start them: ended by a signal in the middle, and gone on with by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import small
from selfalign.cli import main

pytestmark = pytest.mark.train

SETTINGS = {
    "one process": ["backward.max_steps=300"],
    "two ranks under ZeRO-2": ["backward.max_steps=60", "backward.num_processes=2", "backward.deepspeed=zero2"],
}
LORA = ["backward.lora_r=4", "backward.save_steps=5", "backward.logging_steps=1"]


def trained(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    main(["status", str(root), "--json"])
    status = json.loads(capsys.readouterr().out)
    state = next(s["state"] for s in status["steps"] if s["name"] == "backward.train")
    return {"state": state, "sha256": [a["sha256"] for a in status["artifacts"] if a["name"].startswith("train-")]}


def reaches(process: "subprocess.Popen[bytes]", root: Path, step: int) -> None:
    end = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < end:
        for path in root.glob("artifacts/train-*/metrics.jsonl"):
            if f'"step": {step}.0' in path.read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"ended with {process.returncode}, or did not come so far")


@pytest.mark.parametrize("how", SETTINGS)
def test_a_run_ended_by_a_signal_says_so_and_the_same_command_ends_with_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    recipe = small.write(tmp_path / "recipe")
    command = ["run", str(recipe), *LORA, *SETTINGS[how]]
    for name in ("ended", "undisturbed"):
        assert main([*command, "--run", str(tmp_path / name), "--only", "prepare"]) == 0
    root = tmp_path / "ended"
    only = [*command, "--run", str(root), "--only", "backward"]
    process = subprocess.Popen([sys.executable, "-m", "selfalign", *only, "--json"], stderr=subprocess.PIPE)
    reaches(process, root, 12)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGUSR1)
    _, said = process.communicate()
    assert time.monotonic() - asked < 20
    assert process.returncode == 75
    assert "stopped by SIGUSR1; the same command goes on from here" in said.decode()
    assert trained(root, capsys)["state"] != "done"
    assert main(only) == 0
    assert main([*command, "--run", str(tmp_path / "undisturbed"), "--only", "backward"]) == 0
    assert trained(root, capsys) == trained(tmp_path / "undisturbed", capsys)
    assert trained(root, capsys)["state"] == "done"
    lines = [json.loads(x) for p in root.glob("artifacts/train-*/metrics.jsonl") for x in p.read_text().splitlines()]
    assert any(line.get("resumed_at", 0) >= 12 for line in lines)
    assert not list(root.glob("artifacts/train-*/kept"))
