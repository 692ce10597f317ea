"""Submit jobs of this checkout to a cluster, as a user would from a shell."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from clusters import RAY, Cluster

CHECKOUT = Path(__file__).parents[2]
# The demo in seconds: every kind of step, nothing learned.
CUT = (
    *("rounds=1", "arms=null", "prepare.corpus.sample=24", "prepare.seed.held_out=8"),
    *("backward.max_steps=2", "forward.max_steps=2", "forward.seed_max_steps=2"),
    *("augment.max_new_tokens=8", "augment.filters=[empty]", "curate.reasoning_tokens=4", "curate.threshold=1"),
    *("curate.max_off_scale=1", "curate.min_auc=0", "curate.min_rated=0", "curate.injections=0"),
    *("curate.agreement=null", "evaluate.max_new_tokens=4"),
    *("evaluate.backward_questions=null", "evaluate.forward_questions=null"),
)


@dataclass(frozen=True)
class Job:
    """A job that has ended."""

    id: str
    ended: str
    printed: str
    log: str


def ray(cluster: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of `ray`, as somebody who may use the cluster."""
    environment = {**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    command = [RAY, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)


def submit(cluster: Cluster, *command: str, runtime: Sequence[str] = ("--working-dir", ".")) -> Job:
    """Submit a command, wait until it ends, and fetch its log."""
    done = ray(cluster, "job", "submit", *runtime, "--", *command)
    printed = done.stdout + done.stderr
    found = re.search(r"Job '(raysubmit_\w+)' submitted", printed)
    assert found, printed
    return Job(found[1], state(cluster, found[1]), printed, ray(cluster, "job", "logs", found[1]).stdout)


def start(cluster: Cluster, *command: str) -> str:
    """Submit a command, and leave it to itself. Its identifier."""
    done = ray(cluster, "job", "submit", "--no-wait", "--working-dir", ".", "--", *command)
    found = re.search(r"Job '(raysubmit_\w+)' submitted", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1]


def state(cluster: Cluster, job: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    return str(json.loads(asked(cluster, f"/api/jobs/{job}"))["status"])


def asked(cluster: Cluster, path: str) -> str:
    """What the dashboard answers to somebody who has the token."""
    bearer = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
    with urlopen(Request(cluster.dashboard + path, headers=bearer), timeout=60) as answer:
        return str(answer.read().decode())
