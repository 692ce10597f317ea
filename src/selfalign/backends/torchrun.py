"""A build in several processes of this machine, launched by torchrun: `python -m selfalign.backends.torchrun JOB`."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from selfalign.core import preemption
from selfalign.core.builds import Line, as_ours, hand_on, run_for_driver
from selfalign.core.errors import (
    InternalError,
    LeaseHeldError,
    PreemptedError,
    SelfalignError,
)
from selfalign.core.lease import Lease
from selfalign.core.locations import scratch
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Log

JOB, LINES, BUILT = "job", "lines.jsonl", "built"


def launch(job: BuildJob, processes: int, log: Log) -> Committed:
    """Run `job` in `processes` ranks, and return what rank 0 built. Raises what a rank raised.

    A request to end is handed on to the ranks, which save themselves. What they write to their standard output and
    error goes to `ranks.log` beside the checkpoints, or in the scratch folder.
    """
    kept = scratch(job.artifact.kept)
    kept.mkdir(parents=True, exist_ok=True)
    output = kept / "ranks.log"
    # Elsewhere: of an object store's artifact, what is kept on this machine goes when its files are committed.
    with tempfile.TemporaryDirectory(prefix="selfalign-launch-") as name, output.open("ab") as file:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        (folder / LINES).touch()
        # Slurm sends SIGUSR1 to every process of a step, and whatever does not handle it dies of it.
        signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        # Those have it, too, that hang because a peer failed.
        patience = f"--shutdown-timeout={preemption.SAVE_S}"
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", signals, patience]
        command = [sys.executable, "-m", *torchrun, "--module", __name__, str(folder / JOB)]
        # torchrun warns of what it then sets itself, and takes its other settings from PET_*, which pods of training
        # operators have: it would wait for nodes that never come.
        given = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
        environment = {"OMP_NUM_THREADS": "1", **given}
        preemption.defer()
        process = subprocess.Popen(
            # A session of its own: what the keyboard interrupts is this process, which lets the ranks save.
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            with (folder / LINES).open() as lines:
                _follow(process, lines, log)
        finally:
            process.terminate()
            process.wait()
        if (folder / BUILT).exists():
            committed: Committed = pickle.loads((folder / BUILT).read_bytes())
            return committed
        # The first that failed. What was ended because of it saved itself, and is no news; unless all did.
        paths = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        errors: list[SelfalignError] = [pickle.loads(path.read_bytes()) for path in paths]
        failed = [error for error in errors if not isinstance(error, PreemptedError)]
        if failed:
            raise failed[0]
        preemption.deliver()
        if len(errors) == processes:
            raise errors[0]
    job.lease.check()
    raise InternalError(
        f"the ranks ended with {process.returncode} without saying why: one was killed (too little memory?), or this "
        f"is a bug; {output} has their last words"
    )


def _follow(process: "subprocess.Popen[bytes]", lines: IO[str], log: Log) -> None:
    """Hand on what rank 0 logs, and to the ranks a request to end, until they have ended."""
    told, running, unfinished = False, True, ""
    while running:
        running = process.poll() is None
        if preemption.asked() and not told:
            told = True
            process.terminate()
        while line := lines.readline():
            unfinished += line
            if not line.endswith("\n"):
                continue
            hand_on(json.loads(unfinished), log)
            unfinished = ""
        if running:
            time.sleep(preemption.LOOK_S)


def main(path: Path) -> int:
    """One rank. Returns the exit code; the result, or the error, lies beside the job."""
    preemption.handle()
    job: BuildJob = pickle.loads(path.read_bytes())
    threading.Thread(target=_end_without, args=(job.lease,), daemon=True).start()
    mine = int(os.environ["RANK"])
    with (path.parent / LINES).open("a", buffering=1) as lines:

        def say(line: Line) -> None:
            if mine == 0:
                lines.write(json.dumps(line) + "\n")

        try:
            committed = run_for_driver(job, say, mine)
            if mine == 0:
                _write(path.parent / BUILT, committed)
        except (SelfalignError, OSError) as error:
            told = as_ours(error)
            _write(path.parent / f"error-{mine}", told)
            return told.exit_code
    return 0


def _write(path: Path, value: object) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(pickle.dumps(value))
    draft.rename(path)


def _end_without(lease: Lease) -> None:
    """End this process when its driver is dead, or somebody else builds: nobody would use what it makes."""
    held = True
    while held:
        time.sleep(2)
        # A store that is away, or refuses, says nothing about it.
        with suppress(SelfalignError, OSError):
            held = lease.is_held()
    os._exit(LeaseHeldError.exit_code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
