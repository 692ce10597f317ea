"""Keep the pairs that are rated well enough: at most one a document."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from selfalign.core.errors import GateError
from selfalign.core.identity import seed_for
from selfalign.core.records import Candidate, Outcome, Rated, Record, rejected
from selfalign.core.stage import Context, Rows, Settings, WholeStage
from selfalign.core.store import Manifest
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import why_unrated

UNRATED = ("too_long", "unparsed", "off_scale")


@dataclass(frozen=True)
class Select(WholeStage):
    """Rated pairs → those at or above the threshold; of a document's candidates, the best."""

    name: ClassVar[str] = "curate.select"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Rated
    output: ClassVar[type[Record]] = Rated
    config: CurateConfig

    def settings(self) -> Settings:
        return {"threshold": self.config.threshold, "max_off_scale": self.config.max_off_scale}

    def gates(self) -> Settings:
        return {"min_rated": self.config.min_rated}

    def run(self, rows: Rows[Rated], context: Context) -> Iterable[Outcome]:
        best: dict[tuple[str, ...], tuple[float, str]] = {}
        for row in rows:
            if self._reason(row) is None:
                worth = (-(row.rating or 0), row.id)
                best[row.parents] = min(worth, best.get(row.parents, worth))
        chosen = _matched([id for _, id in best.values()], context)
        for row in rows:
            reason = self._reason(row)
            if reason is None and best[row.parents][1] != row.id:
                reason = "not_best"
            if reason is None and row.id not in chosen:
                reason = "match_size"
            yield rejected(row.id, reason, row) if reason else row

    def check(self, manifest: Manifest) -> None:
        rejections = manifest.ledger["rejected"]
        assert isinstance(rejections, dict)
        counts = {key: value for key, value in rejections.items() if isinstance(value, int)}
        total = manifest.ledger["in"]
        unrated = sum(counts.get(reason, 0) for reason in UNRATED)
        share = 1 - unrated / total if isinstance(total, int) and total else 0.0
        told = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        if share < self.config.min_rated:
            raise GateError(
                f"curation: {share:.1%} of the pairs got a usable rating, and curate.min_rated wants "
                f"{self.config.min_rated:.0%} ({told})"
            )
        if not manifest.ledger["kept"]:
            advice = (
                "lower curate.threshold"
                if counts.get("below_threshold")
                else "no pair has a rating: `selfalign export --stage rated` has what the rater wrote, and "
                "curate.readout=expected needs no written score"
            )
            raise GateError(f"curation kept none of {total} pairs ({told}); {advice}")

    def _reason(self, row: Rated) -> str | None:
        unrated = why_unrated(row.rating, row.unrated, row.off_scale, self.config)
        if unrated or row.rating is None:
            return unrated or "unparsed"
        return "below_threshold" if row.rating < self.config.threshold else None


@dataclass(frozen=True)
class KeepAll(WholeStage):
    """No curation, to compare with: the first candidate of every document, or as many as another arm keeps."""

    name: ClassVar[str] = "curate.keep_all"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Rated

    def run(self, rows: Rows[Candidate], context: Context) -> Iterable[Outcome]:
        first: dict[tuple[str, ...], str] = {}
        for row in rows:
            first.setdefault(row.parents, row.id)
        chosen = _matched(list(first.values()), context)
        for row in rows:
            reason = "not_first" if first[row.parents] != row.id else "match_size" if row.id not in chosen else None
            unrated = Rated(**{f.name: getattr(row, f.name) for f in fields(row)})
            yield rejected(row.id, reason, unrated) if reason else unrated

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            raise GateError("no pair is left after augmentation; `selfalign status` says what was filtered, and why")


def _matched(ids: Sequence[str], context: Context) -> set[str]:
    """All ids, or as many as the input `match` holds, drawn by seed."""
    if "match" not in context.inputs:
        return set(ids)
    kept = context.manifest("match").ledger["kept"]
    assert isinstance(kept, int)
    return set(sorted(ids, key=lambda id: seed_for(context.seed, id, "match_size"))[:kept])
