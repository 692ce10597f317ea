"""What holds wherever a run folder lies: one commit a name, whole or not at all."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from s3 import S3, Fault
from selfalign.core import locations, preemption
from selfalign.core.errors import StorageError, StoreAwayError, UsageError
from selfalign.core.identity import file_digest
from selfalign.core.locations import (
    Location,
    check_commits,
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


# What the function named does with the path that it is given by pickle.
WORKER = """
import pickle, sys
from selfalign.core import locations
name, given = pickle.load(sys.stdin.buffer)
try:
    print(getattr(locations, name)(*given))
except locations.SelfalignError as error:
    print(error)
"""


def worked(name: str, *given: object) -> str:
    """What a process says that is new."""
    command = [sys.executable, "-c", WORKER]
    return subprocess.run(command, input=pickle.dumps((name, given)), capture_output=True, check=True).stdout.decode()


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


def test_a_copy_is_compared_once_a_process_and_made_anew_where_it_is_damaged(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = s3.folder() / "files"
    commit_folder(draft_of(scratch(folder) / "draft"), folder)
    wanted = digests(folder)
    copy = fetched(folder, wanted)
    (copy / "file-0").write_text("X 0")
    with monkeypatch.context() as patch:
        patch.delattr(locations, "file_digest")
        assert fetched(folder, wanted) == copy
    assert worked("fetched", folder, wanted) == f"{copy}\n"
    assert digests(copy) == wanted
    before = s3.asked
    assert worked("fetched", folder, wanted) == f"{copy}\n"
    assert s3.asked == before


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


@pytest.mark.parametrize("scheme", ["nosuch", "memory", "hf", "https", "gs"])
def test_where_no_name_can_be_committed_once_no_run_is_taken(scheme: str) -> None:
    with pytest.raises(UsageError, match=f"{scheme}://x/y: name a folder, or s3://BUCKET/FOLDER; .* {scheme}://"):
        located(f"{scheme}://x/y")


def test_a_client_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules, "selfalign.core.objects", raising=False)
    with pytest.raises(UsageError, match=r"s3://runs/x needs the extra `s3`: .*pip install -e '\.\[s3\]'"):
        located("s3://runs/x")


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
        lambda: check_commits(folder),
    ):
        with pytest.raises(StoreAwayError, match=r"the object store cannot be reached: .*; run again"):
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


def test_what_a_store_did_not_get_whole_is_sent_again(s3: S3) -> None:
    folder = s3.folder()
    s3.fail("cut", lasts=1)
    assert commit(folder / "shard", b"mine") is True


@pytest.mark.parametrize("fault", ["closed", "unavailable"])
def test_a_store_that_is_away_is_asked_as_often_as_botocore_is_told_in_workers_too(
    s3: S3, impatient: None, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    path = s3.folder() / "there"
    commit(path, b"x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    assert worked("read", path) == "b'x'\n"
    s3.fail(fault)
    before = s3.asked
    assert "s3://runs" in worked("read", path)
    # Where no answer comes, the client's own client may ask at once a second time.
    assert 3 <= s3.asked - before <= (6 if fault == "closed" else 3)


def test_every_outage_is_waited_for_as_long_as_the_first_by_all_requests_at_once(
    s3: S3, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfalign.core import objects

    async def at_once(seconds: float) -> None: ...

    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setattr(objects, "_pause", at_once)
    folder = s3.folder()
    commit(folder / "there", b"x")
    for _ in range(4):
        with ThreadPoolExecutor(4) as pool:
            s3.fail("unavailable", lasts=60)
            # Each of four may meet 19 of them.
            assert [*pool.map(read, [folder / "there"] * 4)] == [b"x"] * 4


def test_a_process_that_was_asked_to_end_waits_for_no_store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    path = s3.folder() / "there"
    s3.fail("unavailable")
    reading = ThreadPoolExecutor(1).submit(read, path)
    time.sleep(1)
    assert not reading.done()
    monkeypatch.setattr(preemption, "_ending", True)
    with pytest.raises(StoreAwayError):
        reading.result(timeout=5)


@pytest.mark.parametrize("name", ["s3://", "s3:///run"])
def test_no_bucket_is_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} names no bucket"):
        located(name)


@pytest.mark.parametrize(("fault", "why"), [("forbidden", "(Access Denied|Forbidden)"), ("none", ".*credentials")])
def test_what_a_store_refuses_is_the_users_to_set_whatever_one_wants_of_it(
    s3: S3, impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, why: str
) -> None:
    if fault == "none":
        # No keys, wherever a client looks for them.
        for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    folder = s3.folder()
    draft = draft_of(tmp_path / "draft")
    s3.fail(fault)
    for act in (
        lambda: commit(folder / "new", b"y"),
        lambda: commit_folder(draft, folder / "files"),
        lambda: replace(folder / "there", b"y"),
        lambda: remove(folder),
        lambda: read(folder / "there"),
        lambda: entries(folder, "*"),
        lambda: files_in(folder),
        lambda: fetched(folder, {"there": "0" * 64}),
    ):
        with pytest.raises(UsageError, match=f"the object store refuses: s3://runs/.*: {why}.*AWS_ACCESS_KEY_ID"):
            act()
    assert draft.exists()


SETTINGS = {
    "AWS_PROFILE": ("nobody", r"profile \(nobody\) could not be found"),
    "AWS_SECRET_ACCESS_KEY": ("", "Partial credentials found"),
    "AWS_ENDPOINT_URL": ("here", "Invalid endpoint: here"),
}


@pytest.mark.parametrize("variable", SETTINGS)
def test_settings_that_no_client_can_be_made_of_are_told_at_once(
    s3: S3, impatient: None, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    value, why = SETTINGS[variable]
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"{why}.*{variable}"):
        located("s3://runs/x")


def test_a_bucket_that_is_not_there_is_no_outage(s3: S3) -> None:
    for act in (lambda path: commit(path, b"x"), lambda path: replace(path, b"x")):
        with pytest.raises(UsageError, match="s3://nobodys/run/shard: The specified bucket does not exist"):
            act(located("s3://nobodys/run/shard"))


def test_a_write_that_meets_another_is_tried_again(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = s3.folder()
    s3.fail("conflict", lasts=2)
    assert commit(folder / "shard", b"mine") is True
    s3.fail("conflict", lasts=1)
    assert commit_folder(draft_of(scratch(folder) / "draft"), folder / "files") is True
    monkeypatch.setattr(locations, "_CONFLICTS", 2)
    s3.fail("conflict", lasts=2)
    with pytest.raises(StoreAwayError, match="conflicting operation"):
        commit(folder / "other", b"mine")


def test_a_name_that_is_taken_is_known_in_the_words_of_any_store(s3: S3) -> None:
    path = s3.folder() / "shard"
    commit(path, b"first")
    s3.fail("taken", lasts=1)
    assert commit(path, b"second") is False
    assert read(path) == b"first"


def test_a_name_that_was_taken_and_is_gone_was_somebody_elses(s3: S3) -> None:
    folder = s3.folder()
    s3.fail("taken", lasts=1)
    assert commit(folder / "shard", b"mine") is False
    s3.fail("taken", lasts=1)
    assert commit_folder(draft_of(scratch(folder) / "draft"), folder / "files") is False
    assert files_in(folder) == []


def test_a_link_that_was_made_though_its_answer_was_lost_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def asked_twice(draft: Path, path: Path) -> None:
        link(draft, path)
        link(draft, path)

    monkeypatch.setattr(os, "link", asked_twice)
    assert commit(tmp_path / "shard", b"mine") is True
    assert commit(tmp_path / "shard", b"theirs") is False
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_store_that_writes_over_what_is_there_is_refused(s3: S3, tmp_path: Path) -> None:
    for folder in (tmp_path, s3.folder()):
        check_commits(folder)
        assert files_in(folder) == []
    s3.fail("forgetful")
    with pytest.raises(UsageError, match=f"the object store of {folder} ignores the condition of a write"):
        check_commits(folder)
    assert files_in(folder) == []
