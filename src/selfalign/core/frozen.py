"""The base class of everything that configures a step."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, hashable by content, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RecipePath:
    """Marks text that may be a path: `path: Annotated[str, RecipePath]`.

    A recipe's loader makes it absolute, from the recipe's folder or, in an override, from the working directory:
    always when it starts with `./` or `../`, otherwise when such a file exists, since it may be a Hub name too.
    `RecipePath("previous", "base")` names words with a meaning of their own, which no file of that name changes.
    """

    def __init__(self, *words: str) -> None:
        self.words = frozenset(words)
