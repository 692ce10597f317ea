"""What can go wrong, as one picklable family whose members know their exit code."""


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


class PreemptedError(SelfalignError):
    """The process was asked to end; what is committed stays, and the same command goes on."""

    exit_code = 75


class InternalError(SelfalignError):
    """A broken invariant: a bug in selfalign, never the user's fault."""

    exit_code = 70


class StorageError(SelfalignError):
    """Reading or writing the run folder failed (disk full, permission, damaged bytes)."""

    exit_code = 74
