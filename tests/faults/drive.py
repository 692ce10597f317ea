"""Run a toy as the command line runs a recipe, in a process that a test may kill.

python -m faults.drive TOY.pickle ROOT local|ray. On Ray, each line on standard input kills an actor.
"""

import os
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from faults.saboteur import Saboteur
from selfalign.backends.local import LocalBackend
from selfalign.core.errors import SelfalignError
from selfalign.core.locations import located
from selfalign.core.protocols import Backend
from selfalign.core.store import Store
from selfalign.engines.open import release
from selfalign.pipelines.runner import Runner, Silent
from skeleton.toy import Toy


class Told(Silent):
    """Says what it is told."""

    def note(self, text: str) -> None:
        print("note:", text, flush=True)


def drive(toy: Toy, root: str, backend: Callable[[], Backend] = LocalBackend) -> int:
    """Run to the end; the exit code that the command line would have."""
    try:
        chosen = backend()
        try:
            Runner(toy.steps(), Store(located(root)), chosen, Told()).run()
        finally:
            release()
            chosen.close()
    except SelfalignError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    except OSError as error:
        print(f"OSError: {error}", flush=True)
        return 74
    return 0


def trial(toy: Toy, root: str, log: Path, environment: Mapping[str, str], saboteur: Saboteur | None) -> None:
    """`drive`, as what a forked process does; what it says is added to `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for handle in (1, 2):
        os.dup2(out, handle)
    os.environ.update(environment)
    if saboteur is not None:
        saboteur.begin()
    try:
        code = drive(toy, root)
    except BaseException:  # noqa: BLE001  a bug is told as one
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)


def on_ray() -> Backend:
    """The Ray backend, whose actors die by ray.kill at the word of standard input."""
    import ray

    from selfalign.backends.ray import RayBackend

    backend = RayBackend()
    chance = random.Random(0)

    def listen() -> None:
        for _ in sys.stdin:
            # Three deaths in a row before the step is opened may end it, and should.
            if members := [member for member in backend._pool._members if member.starting is None]:
                ray.kill(chance.choice(members).actor)

    threading.Thread(target=listen, daemon=True).start()
    return backend


if __name__ == "__main__":
    toy = pickle.loads(Path(sys.argv[1]).read_bytes())
    print("started", flush=True)
    sys.exit(drive(toy, sys.argv[2], on_ray if sys.argv[3] == "ray" else LocalBackend))
