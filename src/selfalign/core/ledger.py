"""The row ledger: at every step, in = kept + rejected + quarantined."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import JsonValue

from selfalign.core.errors import InternalError


@dataclass
class Ledger:
    """Counts of units. `sources` counts the rows they were split from, `in_` what they must add up to.

    `noted` counts kept units that something is said about; they are among `kept`.
    """

    sources: int = 0
    in_: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def count(self, outcome: str, reason: str | None, units: int) -> None:
        """Enter one unit, or `units` lost at once."""
        if outcome == "kept":
            self.kept += units
            if reason is not None:
                self.noted[reason] += units
        else:
            (self.rejected if outcome == "rejected" else self.quarantined)[reason or "unknown"] += units

    def check(self, where: str) -> "Ledger":
        """Itself when balanced; InternalError otherwise."""
        out = self.kept + self.rejected.total() + self.quarantined.total()
        if out != self.in_:
            raise InternalError(f"{where}: the ledger does not balance: {self.in_} units in, {out} out: {self}")
        return self

    def to_json(self) -> dict[str, JsonValue]:
        """The ledger as manifests and `status --json` hold it."""
        return {
            "sources": self.sources,
            "in": self.in_,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "quarantined": dict(sorted(self.quarantined.items())),
            "noted": dict(sorted(self.noted.items())),
        }


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """The sum of the shards' ledgers."""
    result = Ledger()
    for ledger in ledgers:
        result.sources += ledger.sources
        result.in_ += ledger.in_
        result.kept += ledger.kept
        result.rejected += ledger.rejected
        result.quarantined += ledger.quarantined
        result.noted += ledger.noted
    return result
