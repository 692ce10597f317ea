"""Prompt files: text with {placeholders}, ours beside the stages or the recipe's own."""

import re
from pathlib import Path

from selfalign.core.errors import UsageError
from selfalign.core.records import Message

OURS = Path(__file__).parent / "prompts"


def prompt_text(file: str | None, ours: str, needs: tuple[str, ...]) -> str:
    """The prompt in `file`, or our own called `ours`. Raises UsageError where a placeholder it needs is missing."""
    path = Path(file) if file else OURS / f"{ours}.txt"
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompt file {path} cannot be read: {error}") from error
    missing = [name for name in needs if f"{{{name}}}" not in text]
    if missing:
        raise UsageError(f"the prompt file {path} lacks the placeholder {{{missing[0]}}}")
    return text


def fill(template: str, **values: str) -> str:
    """Put values in their places, in one pass: braces in a value are text, never another placeholder."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda found: values[found.group()[1:-1]], template)


def chat(user: str, system: str | None = None) -> tuple[Message, ...]:
    """A prompt as messages."""
    opening = (Message(role="system", content=system),) if system else ()
    return (*opening, Message(role="user", content=user))
