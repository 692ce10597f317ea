"""What a recipe's path means: files here."""

import hashlib
from pathlib import Path, PurePath

import pytest

from selfalign.core.errors import UsageError
from selfalign.data.sources import ids_of, pin_key, resolve

ROW = b'{"text": "x"}\n'


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("a/train.jsonl", "b/train.jsonl", "b/more.parquet", "b/notes.txt", "b/.cache/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(ROW * 2)
    return tmp_path


def test_a_file_is_listed_with_its_rows_and_digest(base: Path) -> None:
    resolved = resolve("a/train.jsonl", base)
    (file,) = resolved.files
    assert (file.id, file.path, file.rows) == ("train", str(base / "a" / "train.jsonl"), 2)
    assert file.sha256 == hashlib.sha256(ROW * 2).hexdigest()
    assert resolved.commit is None
    assert resolve(str(base / "a" / "train.jsonl"), Path("/elsewhere")) == resolved


def test_a_folder_is_searched_throughout_and_ids_are_as_long_as_needed(base: Path) -> None:
    assert [file.id for file in resolve(".", base).files] == ["a/train", "more", "b/train"]


def test_a_glob_lists_what_matches(base: Path) -> None:
    assert [file.id for file in resolve("*/train.jsonl", base).files] == ["a/train", "b/train"]
    assert [file.id for file in resolve("b/*", base).files] == ["more", "train"]
    assert [file.id for file in resolve("**/*.parquet", base).files] == ["more"]


def test_two_endings_of_one_name_tell_files_apart() -> None:
    paths = [PurePath("x/a.jsonl"), PurePath("x/a.parquet"), PurePath("y/a.jsonl"), PurePath("b.jsonl")]
    assert ids_of(paths) == ["x/a.jsonl", "a.parquet", "y/a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing.jsonl", "there is no file or folder missing.jsonl"),
        ("a/missing.jsonl", "there is no file or folder a/missing.jsonl"),
        ("./a/missing", "there is no file or folder"),
        ("x/y/z", "there is no file or folder x/y/z"),
        ("missing", "there is no file or folder missing"),
        ("b/*.csv", "matches b/"),
        ("b/notes.txt", "is not a .jsonl or .parquet file"),
        ("b/.cache", None),
    ],
)
def test_what_is_not_there_is_one_sentence_that_names_the_setting(base: Path, path: str, says: str | None) -> None:
    if says is None:
        assert len(resolve(path, base).files) == 1
        return
    with pytest.raises(UsageError, match=says) as caught:
        resolve(path, base, setting="prepare.seed.path")
    assert str(caught.value).startswith("prepare.seed.path: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_says_so(base: Path) -> None:
    (base / "empty").mkdir()
    with pytest.raises(UsageError, match=r"the folder empty holds no .jsonl or .parquet file"):
        resolve("empty", base)


def test_a_revision_of_something_here_is_refused(base: Path) -> None:
    with pytest.raises(UsageError, match="has no revision"):
        resolve("a", base, revision="main")


def test_each_revision_of_a_dataset_has_its_own_pin() -> None:
    assert pin_key("org/name", None) == pin_key("hf://datasets/org/name/train.jsonl", None) == "org/name"
    assert pin_key("org/name", "v1") == "org/name@v1"
    with pytest.raises(UsageError, match="not a dataset's name"):
        pin_key("hf://datasets/name", None)
