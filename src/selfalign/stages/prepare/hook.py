"""The recipe's own function on documents (`prepare.corpus.hook`): personal data, say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from selfalign.core.errors import UsageError
from selfalign.core.records import Document, Outcome, quarantined, rejected


def read_hook(path: str) -> str:
    """The text of a hook. Raises UsageError where it cannot be read, does not run, or defines no `clean`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prepare.corpus.hook: {path} cannot be read: {error}") from error
    open_hook(text, path)
    return text


def open_hook(text: str, path: str) -> Callable[[str], object]:
    """The function `clean` of a hook's text. It travels as text, so that workers need no such file."""
    names: dict[str, object] = {"__name__": "selfalign_hook", "__file__": path}
    try:
        exec(compile(text, path, "exec"), names)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"prepare.corpus.hook: {path} does not run: {type(error).__name__}: {error}") from error
    clean = names.get("clean")
    if not callable(clean):
        raise UsageError(f"prepare.corpus.hook: {path} defines no function clean(text)")
    return clean


def hooked(row: Document, clean: Callable[[str], object]) -> Outcome:
    """The document with the text that the hook gives; rejected for None, quarantined where the hook fails."""
    try:
        text = clean(row.text)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{type(text).__name__} is neither a text nor None")
        # Half a character cannot be stored.
        whole = (text or "").encode().decode().strip()
    # The user's code may raise anything, and it costs only this row.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return quarantined(row.id, "hook_failed", f"clean(text): {type(error).__name__}: {error}")
    return replace(row, text=whole) if whole else rejected(row.id, "hook", row)
