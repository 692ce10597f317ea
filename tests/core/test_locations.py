"""What holds wherever a run folder lies: one commit a name, whole or not at all."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from s3 import S3, Fault
from selfalign.core import locations
from selfalign.core.errors import ServiceError, StorageError, UsageError
from selfalign.core.identity import file_digest
from selfalign.core.locations import (
    Location,
    commit,
    commit_folder,
    entries,
    fetched,
    files_in,
    located,
    read,
    remove,
    replace,
    scratch,
    touch,
)

COMMITTER = """
import sys
from selfalign.core.locations import commit, located
folder = located(sys.argv[1])
print(*(int(commit(folder / f"shard-{n}", sys.argv[2].encode() * 5000)) for n in range(10)))
"""


def caused(answer: dict[str, dict[str, str]]) -> OSError:
    """What the client makes of an answer that it has no word for."""
    error = OSError(22, "Invalid argument")
    error.__cause__ = ClientError(answer, "PutObject")  # type: ignore[arg-type]
    return error


def draft_of(folder: Path, *, files: int = 3, text: str = "x") -> Path:
    for n in range(files):
        path = folder / ("deep" if n % 2 else "") / f"file-{n}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} {n}")
    return folder


def test_the_first_commit_of_a_name_wins_and_is_never_replaced(place: Location) -> None:
    path = place / "new" / "shard"
    assert commit(path, b"first") is True
    assert commit(path, b"second, and longer") is False
    assert read(path) == b"first"
    assert files_in(place) == ["new/shard"]


def test_of_threads_that_commit_at_once_one_wins(place: Location) -> None:
    won: list[list[bool]] = []
    start = threading.Barrier(4)

    def bring(n: int) -> None:
        start.wait()
        won.append([commit(place / f"shard-{turn}", bytes([n]) * 5000) for turn in range(10)])

    threads = [threading.Thread(target=bring, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * 10
    assert [len(set(read(path))) for path in entries(place, "*")] == [1] * 10


def test_of_processes_that_commit_at_once_one_wins(place: Location) -> None:
    commands = [[sys.executable, "-c", COMMITTER, str(place), letter] for letter in "ab"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    won = [process.communicate()[0].split() for process in processes]
    assert [sorted(each) for each in zip(*won, strict=True)] == [["0", "1"]] * 10
    assert [len(set(read(path))) for path in entries(place, "*")] == [1] * 10


def test_a_file_that_may_change_is_the_old_or_the_new_one(place: Location) -> None:
    path, odd = place / "run.json", []
    replace(path, b"a" * 9000)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            data = read(path)
            if len(data) != 9000 or len(set(data)) != 1:
                odd.append(data)

    thread = threading.Thread(target=look)
    thread.start()
    for n in range(30):
        replace(path, bytes([97 + n % 26]) * 9000)
    ended.set()
    thread.join()
    assert odd == []
    assert files_in(place) == ["run.json"]


def test_the_first_folder_of_a_name_wins_and_drafts_go(place: Location, tmp_path: Path) -> None:
    assert commit_folder(draft_of(scratch(place) / "one", text="one"), place / "final") is True
    assert commit_folder(draft_of(scratch(place) / "two", text="two"), place / "final") is False
    assert read(place / "final" / "deep" / "file-1") == b"one 1"
    assert files_in(place) == [f"final/{name}" for name in ("deep/file-1", "file-0", "file-2")]
    assert [path.name for path in scratch(place).iterdir()] == (["final"] if isinstance(place, Path) else [])


@pytest.fixture
def made(place: Location) -> Location:
    """A folder, one in it, and one with a longer name."""
    for name in ("step-2/a", "step-2/deep/b", "step-10/a", "other"):
        commit(place / "kept" / name, name.encode())
    commit(place / "kept-not/step-2/a", b"")
    return place / "kept"


def test_what_lies_in_a_folder_is_found_by_name(made: Location) -> None:
    assert [path.name for path in entries(made, "*")] == ["other", "step-10", "step-2"]
    assert [path.name for path in entries(made, "step-?")] == ["step-2"]
    assert [read(path / "a") for path in entries(made, "step-*")] == [b"step-10/a", b"step-2/a"]
    assert files_in(made / "step-2") == ["a", "deep/b"]


def test_a_folder_that_is_not_there_holds_nothing_and_can_be_removed(made: Location) -> None:
    for missing in (made / "none", made / "step"):
        assert (entries(missing, "*"), files_in(missing)) == ([], [])
        remove(missing)
        with pytest.raises(FileNotFoundError):
            read(missing)
    assert len(files_in(made)) == 4


def test_what_is_removed_is_gone_with_all_it_holds_and_nothing_else(made: Location) -> None:
    remove(made / "step-2")
    assert files_in(made) == ["other", "step-10/a"]
    remove(made)
    assert files_in(made.parent) == ["kept-not/step-2/a"]


def test_a_file_that_is_touched_keeps_its_bytes(made: Location) -> None:
    touch(made / "other")
    assert read(made / "other") == b"other"
    with pytest.raises(FileNotFoundError):
        touch(made / "none")
    assert entries(made, "none") == []


def digests(folder: Location) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in files_in(folder)}


def test_a_folder_is_had_on_this_machine_with_the_bytes_it_was_committed_with(made: Location) -> None:
    folder = made / "step-2"
    found = fetched(folder, digests(folder))
    assert {name: (found / name).read_text() for name in files_in(found)} == {
        "a": "step-2/a",
        "deep/b": "step-2/deep/b",
    }


def test_a_copy_is_used_again_and_one_of_other_bytes_is_refused(s3: S3) -> None:
    folder = s3.folder() / "files"
    commit_folder(draft_of(scratch(folder) / "draft"), folder)
    wanted = digests(folder)
    copy = fetched(folder, wanted)
    replace(folder / "file-0", b"other")
    # What was asked for lies here.
    assert fetched(folder, wanted) == copy
    remove(copy)
    with pytest.raises(StorageError, match=r"file-0 is not what was committed"):
        fetched(folder, wanted)
    assert list(scratch(folder).iterdir()) == []
    assert (fetched(folder, digests(folder)) / "file-0").read_text() == "other"


def test_of_many_who_want_a_copy_at_once_all_have_it(s3: S3) -> None:
    folder = s3.folder() / "files"
    commit_folder(draft_of(scratch(folder) / "draft"), folder)
    wanted, found = digests(folder), []
    threads = [threading.Thread(target=lambda: found.append(fetched(folder, wanted))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert [path.name for path in scratch(folder).iterdir()] == [found[0].name]


def test_scratch_that_belongs_to_somebody_else_is_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(UsageError, match="belongs to somebody else; name another folder by SELFALIGN_SCRATCH"):
        scratch(s3.folder())


def test_a_scheme_that_is_unknown_is_told() -> None:
    with pytest.raises(UsageError, match="nosuch://x/y: nosuch:// cannot be used here"):
        located("nosuch://x/y")


def test_a_plain_name_is_a_path() -> None:
    assert located("runs/demo") == Path("runs/demo")
    assert located("file:///runs/demo") == Path("/runs/demo")


def test_what_was_written_though_its_answer_was_lost_is_ones_own(s3: S3) -> None:
    folder = s3.folder()
    s3.fail("broken", lasts=1)
    assert commit(folder / "shard", b"mine") is True
    s3.fail("broken", after=1, lasts=1)
    assert commit_folder(draft_of(scratch(folder) / "draft"), folder / "files") is True
    assert len(files_in(folder / "files")) == 3


@pytest.mark.parametrize("fault", ["closed", "unavailable", "broken"])
def test_a_store_that_cannot_be_reached_is_told_whatever_one_wants_of_it(s3: S3, impatient: None, fault: Fault) -> None:
    folder = s3.folder()
    commit(folder / "there", b"x")
    draft = draft_of(scratch(folder) / "draft")
    s3.fail(fault)
    for act in (
        lambda: commit(folder / "new", b"y"),
        lambda: commit_folder(draft, folder / "files"),
        lambda: replace(folder / "there", b"y"),
        lambda: touch(folder / "there"),
        lambda: remove(folder),
        lambda: read(folder / "there"),
        lambda: entries(folder, "*"),
        lambda: files_in(folder),
        lambda: fetched(folder, {"there": "0" * 64}),
    ):
        with pytest.raises(ServiceError, match=r"the object store cannot be reached: .*; run again"):
            act()
    assert draft.exists()


@pytest.mark.parametrize("fault", ["closed", "unavailable", "broken"])
def test_a_store_that_is_back_soon_is_waited_for(s3: S3, fault: Fault) -> None:
    folder = s3.folder()
    commit(folder / "there", b"x")
    for n in range(2):
        s3.fail(fault, lasts=2)
        assert commit(folder / f"shard-{n}", b"mine") is True
        s3.fail(fault, lasts=2)
        assert read(folder / "there") == b"x"


def test_a_bucket_that_is_not_there_is_no_outage(s3: S3) -> None:
    with pytest.raises(StorageError, match="cannot write s3://nobodys/run/shard"):
        commit(located("s3://nobodys/run/shard"), b"x")


@pytest.mark.parametrize(
    "error",
    [
        FileExistsError("At least one of the pre-conditions you specified did not hold"),
        caused({"Error": {"Code": "PreconditionFailed"}}),
        caused({"Error": {"Code": "412", "Message": "Precondition Failed"}}),
    ],
    ids=["AWS", "with a code", "with a number"],
)
def test_a_name_that_is_taken_is_known_in_the_words_of_any_store(error: OSError) -> None:
    assert locations._is_taken(error)
    assert not locations._is_taken(caused({"Error": {"Code": "SlowDown"}}))
    assert not locations._is_taken(OSError(28, "full"))
