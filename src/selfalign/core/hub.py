"""What the Hub says, in sentences that tell people what to do."""

import errno
import os
from collections.abc import Iterator

from selfalign.core.errors import SelfalignError, ServiceError, StorageError, UsageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's calls raise when the Hub, the network or the cache says no."""
    # Its HTTP client has changed with its major versions; the base of its errors is found here in each.
    from huggingface_hub.errors import HTTPError, RevisionResolutionError  # type: ignore[attr-defined]

    # ValueError: a name of a form that no repository has, or an answer that is not the Hub's.
    return (OSError, HTTPError, RevisionResolutionError, ValueError)


def explained(name: str, error: Exception, setting: str) -> SelfalignError:
    """The error to raise for `error`, met while fetching `name` because the recipe's `setting` says so."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    causes = list(_causes(error))

    def any_is(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if any_is(GatedRepoError):
        how = "accept its licence on the Hub" if os.environ.get("HF_TOKEN") else "set HF_TOKEN"
        return UsageError(f"{name} is gated on the Hub: {how}, or point {setting} at a local copy")
    if any_is(RevisionNotFoundError):
        return UsageError(f"{name} has no such revision on the Hub; name one of its branches, tags or commits")
    if any_is(RepositoryNotFoundError):
        return UsageError(f"{name} is neither here nor on the Hub (or it is private: set HF_TOKEN); check {setting}")
    if any(isinstance(cause, OSError) and cause.errno in _NO_ROOM for cause in causes):
        return StorageError(f"{name} cannot be stored in the Hub's cache (see HF_HOME): {error}")
    if any(_is_outage(cause) for cause in causes):
        return ServiceError(
            f"{name} is not in the local cache and the Hub cannot be reached; check the network and "
            f"HF_HUB_OFFLINE, or point {setting} at a local copy"
        )
    return UsageError(f"{name} cannot be loaded: {' '.join(str(error).split())}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_outage(cause: BaseException) -> bool:
    """Whether the Hub, or the way to it, is what failed: no answer, or one that says try again."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError

    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code == 429 or cause.response.status_code >= 500
    if isinstance(cause, (OSError, ValueError)):
        return isinstance(cause, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
    return isinstance(cause, (RevisionResolutionError, *hub_errors()))
