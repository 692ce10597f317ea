"""A build is committed once, by whoever holds its lease."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from s3 import S3
from selfalign.core.builds import run_build
from selfalign.core.errors import LeaseHeldError, ServiceError
from selfalign.core.lease import lease
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, commit, files_in, read, replace, scratch
from selfalign.core.protocols import BuildJob
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Resources
from selfalign.core.store import Artifact
from selfalign.training import ranks


@dataclass(frozen=True)
class Writes(BuildStage):
    """Two files, or others; `meanwhile` happens before they are committed."""

    name: ClassVar[str] = "toy.writes"
    meanwhile: Callable[[], object] = field(default=lambda: None)
    names: tuple[str, ...] = ("config.json", "deep/weights")

    def build(self, context: Context, place: Place, log: Log) -> Built:
        for name in self.names:
            (place.draft / name).parent.mkdir(exist_ok=True)
            (place.draft / name).write_text(name)
        log({"step": 1})
        self.meanwhile()
        return Built(("deep/weights",), Ledger())


@pytest.fixture
def artifact(place: Location) -> Artifact:
    return Artifact(place / "train-01", "01")


@pytest.fixture
def job(artifact: Artifact) -> Iterator[Callable[..., BuildJob]]:
    with lease(artifact.folder, False, print) as held:
        yield lambda **how: BuildJob(Writes(**how), Context("toy", 0, {}), artifact, held, Resources())


def test_what_is_written_becomes_the_artifacts_files_with_their_digests(
    artifact: Artifact, job: Callable[..., BuildJob]
) -> None:
    logged: list[object] = []
    done = run_build(job(), logged.append)
    assert logged == [{"step": 1}]
    assert done.built.content == ("deep/weights",)
    assert files_in(artifact.files) == sorted(done.files) == ["config.json", "deep/weights"]
    assert read(artifact.files / "deep/weights") == b"deep/weights"
    assert list(scratch(artifact.folder).glob("draft-*")) == []


def test_what_a_dead_builder_left_without_a_manifest_goes(artifact: Artifact, job: Callable[..., BuildJob]) -> None:
    commit(artifact.files / "half", b"x")
    commit(artifact.files / "deep/weights", b"other")
    run_build(job(), print)
    assert files_in(artifact.files) == ["config.json", "deep/weights"]
    assert read(artifact.files / "deep/weights") == b"deep/weights"


def test_whoever_was_passed_over_commits_nothing(artifact: Artifact, job: Callable[..., BuildJob]) -> None:
    def pass_over() -> None:
        replace(artifact.folder / "lease-000002.json", json.dumps({}).encode())

    with pytest.raises(LeaseHeldError, match="train-01 was taken over by somebody"):
        run_build(job(meanwhile=pass_over), print)
    assert files_in(artifact.files) == []


def test_files_of_a_complete_artifact_stay(artifact: Artifact, job: Callable[..., BuildJob]) -> None:
    def another_completes() -> None:
        commit(artifact.files / "config.json", b"theirs")
        manifest = {"stage": "toy", "identity": "01", "sha256": "", "inputs": {}, "files": {}, "ledger": {}}
        commit(artifact.folder / "manifest.json", json.dumps(manifest).encode())

    with pytest.raises(LeaseHeldError, match="somebody else took over and committed it"):
        run_build(job(meanwhile=another_completes), print)
    assert read(artifact.files / "config.json") == b"theirs"


def test_what_a_builder_that_was_lost_under_the_same_lease_left_is_not_committed(
    artifact: Artifact, job: Callable[..., BuildJob]
) -> None:
    def dies() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(job(meanwhile=dies, names=("config.json", ".weights.half")), print)
    done = run_build(job(), print)
    assert files_in(artifact.files) == sorted(done.files) == ["config.json", "deep/weights"]
    assert list(scratch(artifact.folder).glob("draft-*")) == []


def test_of_two_ranks_that_build_at_the_same_time_the_first_commits_what_it_wrote(
    artifact: Artifact, job: Callable[..., BuildJob]
) -> None:
    seconds = []

    def second_builds() -> None:
        seconds.append(run_build(job(names=("other",)), print, rank=1).files)

    done = run_build(job(meanwhile=second_builds), print, rank=0)
    assert seconds == [{}]
    assert files_in(artifact.files) == sorted(done.files) == ["config.json", "deep/weights"]
    assert list(scratch(artifact.folder).glob("draft-*")) == []


def test_a_process_that_builds_alone_is_no_rank_whatever_its_environment_says(
    artifact: Artifact, job: Callable[..., BuildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = []
    done = run_build(
        job(meanwhile=lambda: found.append((ranks.rank(), ranks.size(), "LOCAL_RANK" in os.environ))), print
    )
    assert found == [(0, 1, False)]
    assert files_in(artifact.files) == sorted(done.files) == ["config.json", "deep/weights"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_store_that_goes_away_while_files_are_sent_is_told_and_the_next_attempt_completes(
    artifact: Artifact, job: Callable[..., BuildJob], s3: S3
) -> None:
    def sends_one() -> None:
        # The lease, the manifest that is not there, the leftovers that are not, and one file.
        s3.fail("closed", after=7)

    with pytest.raises(ServiceError, match="the object store cannot be reached"):
        run_build(job(meanwhile=sends_one), print)
    s3.mend()
    assert artifact.manifest() is None
    done = run_build(job(), print)
    assert files_in(artifact.files) == sorted(done.files)
