"""A run folder is opened for reading, wherever it lies."""

import json
from pathlib import Path

import pytest

from s3 import S3
from selfalign.core.errors import UsageError
from selfalign.core.locations import Location, commit
from selfalign.report.run import RunView


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_folder_without_a_run_is_told(place: Location, text: str | None) -> None:
    if text is not None:
        commit(place / "run.json", text.encode())
    with pytest.raises(UsageError, match="holds no run"):
        RunView.open(place)


def test_what_is_no_folder_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: demo")
    with pytest.raises(UsageError, match="holds no run"):
        RunView.open(tmp_path / "recipe.yaml")


def test_a_run_that_may_not_be_read_is_not_said_to_be_none(s3: S3, impatient: None, tmp_path: Path) -> None:
    root = s3.folder()
    commit(root / "run.json", json.dumps({"steps": []}).encode())
    s3.fail("forbidden")
    with pytest.raises(UsageError, match=r"refuses: s3://.*/run\.json: Forbidden"):
        RunView.open(root)
    # A folder where a file should be cannot be read by anybody, root included.
    (tmp_path / "run.json").mkdir()
    with pytest.raises(IsADirectoryError):
        RunView.open(tmp_path)
