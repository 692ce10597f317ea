"""Trainings in processes of their own that can be killed: forked from one that has imported the libraries already."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from selfalign.core import preemption
from selfalign.core.errors import SelfalignError
from selfalign.core.lease import Lease, Owner
from selfalign.core.locations import Location, replace
from selfalign.core.records import Example, Message
from selfalign.demo.base import base_folder
from selfalign.engines.config import ModelConfig
from selfalign.training.checkpoints import Checkpoints
from selfalign.training.config import TrainConfig

WITHIN_S = 180
SIDES = ("north", "south", "east, behind the hills and the river", "west")


def examples(rows: int) -> list[Example]:
    return [
        Example(
            id=f"row-{n}",
            kind="seed",
            prompt=(Message(role="user", content=f"Where is tower {n}?" + " Say it." * (n % 5)),),
            completion=(Message(role="assistant", content=f"Tower {n} is in the {SIDES[n % 4]}."),),
        )
        for n in range(rows)
    ]


@dataclass(frozen=True)
class Case:
    """What is trained: more than one epoch, two batches a step, a checkpoint every few steps."""

    config: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 37

    def training(self) -> TrainConfig:
        common = {"learning_rate": 5e-3, "warmup_ratio": 0.1, "max_length": 64, "num_train_epochs": 3}
        steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
        return TrainConfig(**{**common, **steps, "save_steps": 4, **self.config})

    def base(self) -> ModelConfig:
        return ModelConfig(path=str(base_folder()), dtype="float32", **self.model)


def _train(case: Case, folder: Path, kept: Checkpoints) -> int:
    """In the child: train to the end, or as far as it gets."""
    from selfalign.training import ranks
    from selfalign.training.sft import train

    preemption.handle()
    config = case.training()
    with (folder / "metrics.jsonl").open("a", buffering=1) as file:
        try:
            with preemption.delivered():
                trained = train(
                    examples(case.rows),
                    case.base(),
                    config,
                    folder / "model",
                    7,
                    lambda line: print(json.dumps(dict(line)), file=file),
                    kept,
                )
        except SelfalignError as error:
            (folder / "error.txt").write_text(str(error))
            return error.exit_code
    if ranks.rank() == 0:
        done = {name: hashlib.sha256((folder / "model" / name).read_bytes()).hexdigest() for name in trained.content}
        (folder / "done.json").write_text(json.dumps({"hashes": done, "metrics": dict(trained.metrics)}))
    return 0


def _child(case: Case, folder: Path, kept: Checkpoints, environment: Mapping[str, str], largest_file: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    os.environ.update(environment)
    # What the libraries say belongs into the log of the child.
    for number in (1, 2):
        os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os._exit(_train(case, folder, kept))


class Attempt:
    """One attempt to train to the end in `folder`, in as many processes as the case wants.

    `run` is where lease and checkpoints lie, if not there; `environment`, what it takes to get at it.
    """

    def __init__(
        self,
        case: Case,
        folder: Path,
        largest_file: int = -1,
        run: Location | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.case = folder, case
        folder.mkdir(parents=True, exist_ok=True)
        # As the runner does it with what a dead builder left.
        shutil.rmtree(folder / "model", ignore_errors=True)
        run = run or folder
        lease = Lease(run / "lease-000001.json", Owner.this_process())
        replace(lease.path, json.dumps(asdict(lease.owner)).encode())
        kept = Checkpoints(run / "kept", "this", lease)
        # What earlier attempts logged says nothing about this one.
        log = folder / "metrics.jsonl"
        self._begins = log.stat().st_size if log.exists() else 0
        size = case.training().num_processes
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
        self.ranks: list[BaseProcess] = []
        for rank in range(size):
            mine = {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            mine |= environment or {}
            self.ranks.append(_context().Process(target=_child, args=(case, folder, kept, mine, largest_file)))
        for process in self.ranks:
            process.start()

    def step(self) -> int:
        """The last step that this attempt logged."""
        path = self.folder / "metrics.jsonl"
        text = path.read_bytes()[self._begins :].decode() if path.exists() else ""
        # The last line may be under way.
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return int(max((line["step"] for line in lines if "step" in line), default=0))

    def reaches(self, step: int) -> bool:
        """Wait until it has logged that step; False where it ended before."""
        end = time.monotonic() + WITHIN_S
        while self.step() < step:
            if not any(process.is_alive() for process in self.ranks):
                return False
            assert time.monotonic() < end, (self.folder / "output.txt").read_text()
            time.sleep(0.005)
        return True

    def signal(self, number: signal.Signals) -> None:
        for process in self.ranks:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def ended(self) -> int:
        """Wait for the end. Returns the first exit code that is not 0, negative for a signal."""
        for process in self.ranks:
            process.join(WITHIN_S)
            assert process.exitcode is not None, (self.folder / "output.txt").read_text()
        return next((code for p in self.ranks if (code := p.exitcode)), 0)

    def result(self) -> dict[str, Any]:
        """Hashes of the trained files, and metrics."""
        assert self.ended() == 0, (self.folder / "output.txt").read_text()
        result: dict[str, Any] = json.loads((self.folder / "done.json").read_bytes())
        return result

    def losses(self) -> dict[int, float]:
        """The last loss that was logged for each step."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {int(line["step"]): line["loss"] for line in lines if "step" in line}

    def resumed_at(self) -> list[int]:
        """Where attempts in this folder went on."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [int(line["resumed_at"]) for line in lines if "resumed_at" in line]


def killed(case: Case, folder: Path, kills: int, last_step: int, chance: random.Random) -> Attempt:
    """The attempt that trained to the end after `kills` earlier ones were killed at random moments."""
    for step in sorted(chance.choices(range(1, last_step), k=kills)):
        attempt = Attempt(case, folder)
        # Somewhere in what follows the step: a batch, the optimiser, a checkpoint half written.
        if attempt.reaches(step):
            time.sleep(chance.uniform(0, 0.15))
        attempt.signal(signal.SIGKILL)
        attempt.ended()
        (folder / "done.json").unlink(missing_ok=True)
    return Attempt(case, folder)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Takes seconds in each process otherwise.
    context.set_forkserver_preload(["training.preloaded"])
    return context


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
