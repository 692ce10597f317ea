"""Whatever kills a training, wherever: it ends with the bytes that it would have ended with anyway."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from s3 import S3
from selfalign.core.lease import Lease, Owner
from selfalign.core.locations import Location, entries, files_in
from selfalign.training.checkpoints import MARKER, Checkpoints
from training.resumable import Attempt, Case, killed

pytestmark = pytest.mark.train

KILLS = int(os.environ.get("TRAIN_KILLS", "3"))
LORA = {"lora_r": 8, "lora_dropout": 0.1}
CASES = {
    "lora-packed": Case({**LORA, "packing": True, "num_train_epochs": 6}),
    "qlora-grouped-checkpointed": Case(
        {**LORA, "group_by_length": True, "gradient_checkpointing": True, "optim": "adamw_8bit"},
        {"quantisation": "nf4"},
    ),
    "full-packed-epochs": Case(
        {"packing": True, "num_train_epochs": 6, "save_strategy": "epoch", "save_steps": 100, "keep_epochs": True}
    ),
    "zero2-lora": Case({**LORA, "num_processes": 2, "deepspeed": "zero2", "per_device_train_batch_size": 2}),
}
if KILLS > 3:
    # By night, the rest of the matrix.
    CASES |= {
        "lora": Case(LORA),
        "full-cosine": Case({"lr_scheduler_type": "cosine", "weight_decay": 0.1}),
        "full-adafactor": Case({"optim": "adafactor"}),
        "int8-packed": Case({**LORA, "packing": True, "num_train_epochs": 6}, {"quantisation": "int8"}),
        "nf4-packed": Case({**LORA, "packing": True, "num_train_epochs": 6}, {"quantisation": "nf4"}),
        "lora-paged": Case({**LORA, "optim": "paged_adamw_32bit"}),
        "two-ranks-packed": Case({**LORA, "num_processes": 2, "packing": True, "num_train_epochs": 8}),
        "zero3-qlora": Case(
            {**LORA, "num_processes": 2, "deepspeed": "zero3", "per_device_train_batch_size": 2},
            {"quantisation": "nf4"},
        ),
        "zero3-full-packed": Case({"num_processes": 2, "deepspeed": "zero3", "packing": True, "num_train_epochs": 8}),
        "zero2-full": Case({"num_processes": 2, "deepspeed": "zero2", "per_device_train_batch_size": 2}),
    }


@pytest.fixture(scope="module", params=CASES)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Attempt]:
    case = CASES[request.param]
    return case, Attempt(case, tmp_path_factory.mktemp(request.param) / "undisturbed")


def test_a_training_killed_at_random_moments_ends_with_the_same_bytes(
    undisturbed: tuple[Case, Attempt], tmp_path: Path
) -> None:
    case, whole = undisturbed
    expected = whole.result()
    steps = int(expected["metrics"]["steps"])
    assert expected["metrics"]["tokens"] > 2 * 37
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    last = killed(case, tmp_path / "killed", KILLS, steps, random.Random(seed))
    assert last.result() == expected
    assert last.losses() == pytest.approx(whole.losses(), abs=1e-6)
    assert list(last.losses()) == list(range(1, steps + 1))


def test_a_training_that_is_asked_to_end_saves_itself_and_goes_on_from_there(
    undisturbed: tuple[Case, Attempt], tmp_path: Path
) -> None:
    case, whole = undisturbed
    expected = whole.result()
    first = Attempt(case, tmp_path / "asked")
    # Beyond the first epoch, and not at a checkpoint.
    stop = int(expected["metrics"]["steps"]) // 2 + 1
    assert first.reaches(stop)
    asked = time.monotonic()
    first.signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
    assert first.ended() == 75
    assert time.monotonic() - asked < 20
    assert not (first.folder / "done.json").exists()
    second = Attempt(case, first.folder)
    assert second.result() == expected
    assert second.resumed_at()[-1] >= stop


def test_a_checkpoint_of_a_real_training_with_any_file_damaged_is_passed_over(tmp_path: Path) -> None:
    case = Case({**LORA, "save_steps": 2})
    expected = Attempt(case, tmp_path / "undisturbed").result()
    first = Attempt(case, tmp_path / "torn")
    assert first.reaches(7)
    first.signal(signal.SIGKILL)
    first.ended()
    kept = first.folder / "kept"
    before, newest = sorted(kept.glob("step-*"))[-2:]
    names = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(map(str, names))
    spare = tmp_path / "spare"
    for name in names:
        for damage in (unlink, cut, flip):
            shutil.copytree(kept, spare / "kept")
            damage(spare / "kept" / newest.name / name)
            found = Checkpoints(spare / "kept", "this", Lease(tmp_path, Owner.this_process())).newest()
            assert found == spare / "kept" / before.name, (name, damage)
            shutil.rmtree(spare)
    flip(newest / "optimizer.pt")
    second = Attempt(case, first.folder)
    assert second.result() == expected
    assert second.resumed_at() == [int(before.name.removeprefix("step-"))]
    assert f"{newest} is skipped: optimizer.pt is not what was written" in (first.folder / "output.txt").read_text()


def test_a_training_whose_checkpoints_are_in_an_object_store_goes_on_from_them_on_other_machines(
    s3: S3, tmp_path: Path
) -> None:
    case, run = Case({**LORA, "save_steps": 2, "num_train_epochs": 4}), s3.folder()
    expected = Attempt(case, tmp_path / "undisturbed").result()

    def attempt(machine: str) -> Attempt:
        scratch = {"SELFALIGN_SCRATCH": str(tmp_path / machine / "scratch")}
        return Attempt(case, tmp_path / machine, run=run, environment={**s3.environment, **scratch})

    def kill(attempt: Attempt, step: int) -> list[Location]:
        assert attempt.reaches(step)
        attempt.signal(signal.SIGKILL)
        assert attempt.ended() == -signal.SIGKILL
        return [path for path in entries(run / "kept", "step-*") if MARKER in files_in(path)]

    *_, newest = kill(attempt("first"), 7)
    second = attempt("second")
    *_, before, torn = kill(second, 13)
    assert second.resumed_at() == [int(newest.name.removeprefix("step-"))]
    # Whoever sent it did not come to its end.
    (torn / MARKER).unlink()
    third = attempt("third")
    assert third.result() == expected
    assert third.resumed_at() == [int(before.name.removeprefix("step-"))]
    assert f"{torn} is skipped: it has no {MARKER}" in (third.folder / "output.txt").read_text()


@pytest.mark.parametrize("largest_file", [100_000, 200_000], ids=["weights", "optimiser"])
def test_a_disk_that_is_full_ends_a_training_whose_checkpoints_stay(tmp_path: Path, largest_file: int) -> None:
    case = Case({**LORA, "num_train_epochs": 2, "save_steps": 2})
    expected = Attempt(case, tmp_path / "undisturbed").result()
    first = Attempt(case, tmp_path / "full")
    assert first.reaches(3)
    first.signal(signal.SIGTERM)
    assert first.ended() == 75
    before = sorted((first.folder / "kept").glob("step-*"))
    full = Attempt(case, first.folder, largest_file)
    assert full.ended() == 74
    assert "what was committed so far stays" in (first.folder / "error.txt").read_text().lower()
    assert sorted((first.folder / "kept").glob("step-*")) == before
    assert Attempt(case, first.folder).result() == expected


def unlink(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
