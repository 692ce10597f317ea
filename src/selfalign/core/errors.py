"""What can go wrong, as one picklable family whose members know their exit code."""

import re

_OUT = re.compile(r"out of memory|can.?t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.I)


class SelfalignError(Exception):
    """Root of every error that selfalign raises on purpose. `exit_code` is what the process ends with."""

    exit_code = 70


class UsageError(SelfalignError):
    """A recipe, an argument, or something named in them that is not there."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read or does not validate."""


class MismatchError(SelfalignError):
    """A model, template, checkpoint, artifact or data that do not fit each other."""

    exit_code = 3


class GateError(SelfalignError):
    """A quality gate that was not met. The message says which figure fell short of which setting."""

    exit_code = 3


class LeaseHeldError(SelfalignError):
    """Another living process is building the same artifact."""

    exit_code = 4


class ServiceError(SelfalignError):
    """A service (Ray, the Hub, an object store) that cannot be reached."""

    exit_code = 69


class StoreAwayError(ServiceError):
    """The object store of the run cannot be reached: whoever tidies up need not ask it again, and wait as long."""


class PreemptedError(SelfalignError):
    """The process was asked to end; what is committed stays, and the same command goes on."""

    exit_code = 75


class InternalError(SelfalignError):
    """A broken invariant: a bug in selfalign, never the user's fault."""

    exit_code = 70


class StorageError(SelfalignError):
    """Reading or writing the run folder failed (disk full, permission, damaged bytes)."""

    exit_code = 74


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it, or what it came from, is CUDA's, the CPU allocator's or Python's way to say that memory ran out."""
    cause: BaseException | None = error
    while cause is not None:
        # By its name, since torch is not imported for this.
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, (RuntimeError, OSError)) and _OUT.search(str(cause)):
            return True
        cause = cause.__cause__
    return False
