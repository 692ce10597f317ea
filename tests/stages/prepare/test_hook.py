"""The recipe's own function on documents."""

from pathlib import Path

import pytest

from selfalign.core.errors import UsageError
from selfalign.core.records import Document, Dropped, Outcome
from selfalign.core.stage import Context
from selfalign.data.config import CorpusConfig
from selfalign.engines.config import ModelConfig
from selfalign.stages.prepare.filter import FilterCorpus

HOOK = """
import re

MAIL = re.compile(r"[\\w.]+@[\\w.]+")

def clean(text):
    if "secret" in text:
        return None
    if "number" in text:
        return 7
    if "crash" in text:
        raise ValueError("no such thing")
    if "leave" in text:
        raise SystemExit(0)
    if "blank" in text:
        return "  "
    if "half" in text:
        return chr(0xD800)
    return MAIL.sub("(mail)", text)
"""


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    path = tmp_path / "clean.py"
    path.write_text(HOOK)
    return path


def stage(path: Path) -> FilterCorpus:
    return FilterCorpus(CorpusConfig(path="x", hook=str(path), max_chars=99), ModelConfig(path="none"))


def run(filters: FilterCorpus, *texts: str) -> list[Outcome]:
    rows = [Document(id=str(n), source="s", text=text) for n, text in enumerate(texts)]
    return list(filters.open(Context("s", 0, {})).run(rows))


def test_a_hook_rewrites_documents_or_drops_them_and_what_it_does_wrong_costs_one_row(hook: Path) -> None:
    found = run(
        stage(hook), "ask me@home.org", "a secret", "a number", "a crash", "leave", "blank", "half", " plain", "x" * 100
    )
    assert [row.text if isinstance(row, Document) else row.reason for row in found] == [
        "ask (mail)",
        "hook",
        "hook_failed",
        "hook_failed",
        "hook_failed",
        "hook",
        "hook_failed",
        "plain",
        "too_long",
    ]
    broken = [row for row in found if isinstance(row, Dropped) and row.outcome == "quarantined"]
    assert "surrogates not allowed" in str(broken.pop().detail)
    assert [row.detail for row in broken] == [
        "clean(text): TypeError: int is neither a text nor None",
        "clean(text): ValueError: no such thing",
        "clean(text): SystemExit: 0",
    ]


def test_the_hook_is_known_by_its_text_and_runs_where_its_file_is_not(hook: Path) -> None:
    before = stage(hook)
    hook.write_text(HOOK.replace("(mail)", "<mail>"))
    assert stage(hook).settings() != before.settings()
    hook.unlink()
    (row,) = run(before, "me@home.org")
    assert isinstance(row, Document)
    assert row.text == "(mail)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def clean(text:", r"does not run: SyntaxError"),
        ("import no_such_module", r"does not run: ModuleNotFoundError"),
        ("raise SystemExit(0)", r"does not run: SystemExit"),
        ("def scrub(text): return text", r"defines no function clean\(text\)"),
        ("clean = 7", r"defines no function clean\(text\)"),
    ],
)
def test_a_hook_that_cannot_work_is_refused_before_anything_runs(hook: Path, text: str, message: str) -> None:
    hook.write_text(text)
    with pytest.raises(UsageError, match=rf"prepare\.corpus\.hook: .*clean\.py {message}"):
        stage(hook)


def test_a_hook_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prepare\.corpus\.hook: .*none\.py cannot be read"):
        stage(tmp_path / "none.py")
