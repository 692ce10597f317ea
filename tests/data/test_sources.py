"""What a recipe's path means: files here, in parts and shards, and the format of each."""

import errno
import gzip
import hashlib
import json
import os
import pickle
import time
from pathlib import Path, PurePath

import pytest

from selfalign.core.errors import MismatchError, StorageError, UsageError
from selfalign.core.records import Document, SourcePart
from selfalign.core.tables import to_parquet
from selfalign.data import json_files, sources
from selfalign.data.formats import read_documents
from selfalign.data.readers import read_rows
from selfalign.data.sources import ids_of, pin_key, resolve

ROW = b'{"text": "x"}\n'


def sources_of(path: str, base: Path) -> list[str]:
    """The ids of the files that are found."""
    parts = resolve(path, base, format="document").parts
    return [part.id.removesuffix("/0000000") for part in parts]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("a/train.jsonl", "b/train.jsonl", "b/more.txt.gz", "b/notes.csv", "b/.cache/train.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(ROW) if name.endswith(".gz") else ROW * 2)
    return tmp_path


def test_a_file_is_listed_with_its_rows_and_digest(base: Path) -> None:
    resolved = resolve("a/train.jsonl", base)
    assert resolved.shards == (
        (
            SourcePart(
                id="train/0000000",
                path=str(base / "a" / "train.jsonl"),
                sha256=hashlib.sha256(ROW * 2).hexdigest(),
                rows=2,
                size=len(ROW * 2),
                line=1,
                format="document",
            ),
        ),
    )
    assert resolved.commit is None
    assert resolve(str(base / "a" / "train.jsonl"), Path("/elsewhere")) == resolved


def test_a_folder_is_searched_throughout_and_ids_are_as_long_as_needed(base: Path) -> None:
    assert sources_of(".", base) == ["a/train", "more", "b/train"]


def test_what_is_called_readme_or_license_is_about_the_files_of_its_folder_and_is_read_where_it_is_named(
    base: Path,
) -> None:
    for name in ("LICENSE.txt", "readme.MD", "dataset_infos.json", "reader.md"):
        (base / "b" / name).write_bytes(ROW)
    assert sources_of("b", base) == ["more", "reader", "train"]
    assert sources_of("README.md", base) == ["README"]
    assert sources_of("*.md", base) == ["README"]


def test_a_page_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("README.html", "notice.html.gz", "Contents.HTML", "changelog.htm", "License.jsonl"):
        (tmp_path / name).write_bytes(ROW)
    assert sources_of(".", tmp_path) == ["Contents", "License", "README", "changelog", "notice"]


def test_how_many_files_of_a_folder_are_left_out_is_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    (base / "b" / "page.xhtml").write_bytes(b"")
    with caplog.at_level("INFO"):
        resolve("a", base)
        resolve("b", base)
        resolve(".", base, format="document")
    assert caplog.messages == [
        "b: 2 of its 4 files are left out, notes.csv among them",
        ".: 3 of its 6 files are left out, README.md among them",
    ]


def test_a_name_that_is_no_text_is_told_from_one_that_spells_it(tmp_path: Path) -> None:
    for name in (b"caf\xe9.html", b"caf\\xe9.html", b"d\xff/a.jsonl", "caf\xe9.jsonl".encode()):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"<h1>a</h1>b" if path.suffix == ".html" else ROW + b"broken\n")
    listed: dict[str, str] = {}
    found = resolve(".", tmp_path, listed=listed)
    assert resolve(".", tmp_path, listed=json.loads(json.dumps(listed).encode())) == found
    assert pickle.loads(pickle.dumps(found)) == found
    rows = [row for part in found.parts for row in read_documents(part)]
    assert [row.id for row in rows] == [
        "caf\\\\xe9/0000000/0",
        "caf\xe9/0000000",
        "caf\xe9/0000001",
        "caf\\xe9/0000000/0",
        "a/0000000",
        "a/0000001",
    ]
    to_parquet(rows, Document)
    for part in found.parts:
        Path(part.path).write_bytes(b"")
        with pytest.raises(StorageError) as caught:
            list(read_documents(part))
        assert str(caught.value).encode()
        Path(part.path).unlink()
        with pytest.raises(StorageError) as caught:
            list(read_documents(part))
        assert str(caught.value).encode()


def test_a_glob_lists_what_matches(base: Path) -> None:
    assert sources_of("*/train.jsonl", base) == ["a/train", "b/train"]
    assert sources_of("b/*", base) == ["more", "train"]
    assert sources_of("**/*.gz", base) == ["more"]


def test_two_endings_of_one_name_tell_files_apart() -> None:
    paths = [PurePath("x/a.jsonl"), PurePath("x/a.parquet"), PurePath("y/a.jsonl"), PurePath("b.jsonl")]
    assert ids_of(paths) == ["x/a.jsonl", "a.parquet", "y/a.jsonl", "b.jsonl"]
    assert ids_of([PurePath("a.b.jsonl.gz"), PurePath("c.html.zst"), PurePath("d.gz.txt")]) == ["a.b", "c", "d.gz"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing.jsonl", "there is no file or folder missing.jsonl"),
        ("a/missing.jsonl", "there is no file or folder a/missing.jsonl"),
        ("./a/missing", "there is no file or folder"),
        ("x/y/z", "there is no file or folder x/y/z"),
        ("missing", "there is no file or folder missing"),
        ("b/*.csv", "matches b/"),
        ("b/notes.csv", r"is not a \.jsonl, \.json, \.parquet, \.html, \.htm, \.txt or \.md file; convert it"),
        ("b/.cache", None),
    ],
)
def test_what_is_not_there_is_one_sentence_that_names_the_setting(base: Path, path: str, says: str | None) -> None:
    if says is None:
        assert len(resolve(path, base).parts) == 1
        return
    with pytest.raises(UsageError, match=says) as caught:
        resolve(path, base, setting="prepare.seed.path")
    assert str(caught.value).startswith("prepare.seed.path: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_says_so(base: Path) -> None:
    (base / "empty").mkdir()
    with pytest.raises(
        UsageError, match=r"the folder empty holds no .jsonl, .* or .md file; point it at one that does"
    ):
        resolve("empty", base)


def test_a_revision_of_something_here_is_refused(base: Path) -> None:
    with pytest.raises(UsageError, match="has no revision"):
        resolve("a", base, revision="main")


def test_each_revision_of_a_dataset_has_its_own_pin() -> None:
    assert pin_key("org/name", None) == pin_key("hf://datasets/org/name/train.jsonl", None) == "org/name"
    assert pin_key("org/name", "v1") == "org/name@v1"
    with pytest.raises(UsageError, match="not a dataset's name"):
        pin_key("hf://datasets/name", None)


# Formats


def test_each_file_has_the_format_that_its_rows_have_and_every_part_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "PART_ROWS", 2)
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 5)
    (tmp_path / "b.json").write_bytes(b'[{"instruction": "a", "output": "b"}]')
    (tmp_path / "c.html").write_bytes(b"<h1>a</h1>")
    (tmp_path / "d.md").write_bytes(b"### Human: a### Assistant: b")
    (tmp_path / "e.jsonl").write_bytes(b"broken")
    (tmp_path / "f.jsonl").write_bytes(b"")
    formats = {(Path(part.path).name, part.format) for part in resolve(".", tmp_path).parts}
    assert formats == {
        ("a.jsonl", "prompt_completion"),
        ("b.json", "alpaca"),
        ("c.html", "document"),
        ("d.md", "document"),
        ("e.jsonl", None),
        ("f.jsonl", None),
    }
    formats = {(Path(part.path).name, part.format) for part in resolve(".", tmp_path, format="lima").parts}
    assert {format for name, format in formats if name in ("c.html", "d.md")} == {"document"}
    assert {format for name, format in formats if name not in ("c.html", "d.md")} == {"lima"}


@pytest.mark.parametrize("first", [b"broken\n" * 9, b'{"title": "x"}\n' * 9], ids=["broken", "of no format"])
def test_a_first_part_without_a_row_that_fits_does_not_hide_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(json_files, "PART_ROWS", 4)
    (tmp_path / "a.jsonl").write_bytes(first + b'{"prompt": "a", "completion": "b"}\n')
    parts = resolve("a.jsonl", tmp_path).parts
    assert len(parts) == 3
    assert {part.format for part in parts} == {"prompt_completion"}


def test_a_file_whose_format_cannot_be_told_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"title": "x", "body": "y"}\n')
    with pytest.raises(MismatchError, match=r"a.jsonl: no format reads the fields body, title; known are ") as caught:
        resolve("a.jsonl", tmp_path)
    assert "\n" not in str(caught.value)


# Shards


def test_small_files_share_shards_up_to_the_size_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(50):
        (tmp_path / f"{n:02d}.html").write_bytes(b"<h1>a</h1>" + b"x" * 90)
    monkeypatch.setattr(sources, "PART_ROWS", 20)
    by_rows = resolve(".", tmp_path)
    assert [len(shard) for shard in by_rows.shards] == [20, 20, 10]
    assert [part.id for part in by_rows.parts] == [f"{n:02d}/0000000" for n in range(50)]
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    assert [len(shard) for shard in resolve(".", tmp_path).shards] == [10] * 5
    (tmp_path / "25.html").write_bytes(b"<h1>a</h1>" + b"x" * 9000)
    assert [len(shard) for shard in resolve(".", tmp_path).shards] == [10, 10, 5, 1, 10, 10, 4]


def test_parts_of_a_large_file_are_shards_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_files, sources):
        monkeypatch.setattr(module, "PART_ROWS", 10)
    (tmp_path / "a.jsonl").write_bytes(ROW * 35)
    (tmp_path / "b.jsonl").write_bytes(ROW * 3)
    shards = resolve(".", tmp_path).shards
    assert [[part.rows for part in shard] for shard in shards] == [[10], [10], [10], [5, 3]]


# What is known already


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough at once."""
    monkeypatch.setattr(sources, "_SETTLED_NS", 0)


@pytest.mark.usefixtures("settled")
def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW * 5)
    (tmp_path / "b.html").write_bytes(b"<h1>a</h1>")
    listed: dict[str, str] = {}
    first = resolve(".", tmp_path, listed=listed)
    assert len(listed) == 2
    listed = json.loads(json.dumps(listed))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "extents", None)
        patch.setattr(sources, "detect", None)
        assert resolve(".", tmp_path, listed=listed) == first
        named = resolve(".", tmp_path, listed=listed, format="lima")
        assert [part.format for part in named.parts] == ["lima", "document"]
    (tmp_path / "a.jsonl").write_bytes(ROW * 6)
    assert resolve(".", tmp_path, listed=listed).parts[0].rows == 6


def test_a_file_that_changes_while_it_is_listed_is_listed_anew_though_size_and_time_are_the_same(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    listed: dict[str, str] = {}
    for data in (ROW * 2, b"\n" * len(ROW) + ROW):
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        (part,) = resolve("a.jsonl", tmp_path, listed=listed).parts
        assert part.sha256 == hashlib.sha256(data).hexdigest()
    assert listed == {}


@pytest.mark.usefixtures("settled")
def test_a_change_that_leaves_size_and_time_as_they_were_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    listed: dict[str, str] = {}
    for data in (ROW * 2, b"\n" * len(ROW) + ROW):
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        assert list(read_rows(*resolve("a.jsonl", tmp_path, listed=listed).parts))
        # Longer than the file system's clock stands still.
        time.sleep(0.05)
    assert len(listed) == 2


@pytest.mark.usefixtures("settled")
def test_what_an_older_reader_listed_is_listed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW * 5)
    listed: dict[str, str] = {}
    resolve(".", tmp_path, listed=listed)
    monkeypatch.setattr(sources, "LISTING", sources.LISTING + 1)
    monkeypatch.setattr(json_files, "PART_ROWS", 2)
    assert [part.rows for part in resolve(".", tmp_path, listed=listed).parts] == [2, 2, 1]


@pytest.mark.usefixtures("settled")
def test_a_format_is_told_of_a_file_that_was_listed_with_one_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW)
    listed: dict[str, str] = {}
    assert resolve("a.jsonl", tmp_path, format="lima", listed=listed).parts[0].format == "lima"
    assert resolve("a.jsonl", tmp_path, listed=listed).parts[0].format == "document"


def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.jsonl").write_bytes(ROW)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"a.jsonl cannot be read: Permission denied$"):
        resolve("a.jsonl", tmp_path)
