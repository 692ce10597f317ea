"""Run a pickled toy in a process of its own, so that a test can kill it."""

import pickle
import sys
from pathlib import Path

from selfalign.backends.local import LocalBackend
from selfalign.core.locations import located
from selfalign.core.store import Store
from selfalign.pipelines.runner import Runner, Silent

if __name__ == "__main__":
    toy = pickle.loads(Path(sys.argv[1]).read_bytes())
    print("started", flush=True)
    Runner(toy.steps(), Store(located(sys.argv[2])), LocalBackend(), Silent()).run()
