"""A build is committed once, by whoever holds its lease."""

import json
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


@dataclass(frozen=True)
class Writes(BuildStage):
    """Two files; `meanwhile` happens before they are committed."""

    name: ClassVar[str] = "toy.writes"
    meanwhile: Callable[[], None] = field(default=lambda: None)

    def build(self, context: Context, place: Place, log: Log) -> Built:
        for name in ("config.json", "deep/weights"):
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


def test_a_rank_besides_the_first_commits_nothing(
    artifact: Artifact, job: Callable[..., BuildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_build(job(), print).files == {}
    assert files_in(artifact.files) == []


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
