"""Keep the pairs that are rated well enough: at most one a document, and no more of a kind than the recipe wants."""

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import GateError
from selfalign.core.identity import seed_for
from selfalign.core.keys import key_of
from selfalign.core.records import Candidate, Outcome, Rated, Record, rejected
from selfalign.core.stage import Context, Rows, Settings, WholeStage
from selfalign.core.store import Manifest
from selfalign.stages.curate.calibrate import Calibration
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import signals_of
from selfalign.stages.curate.verdict import UNRATED, verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Place = int


@dataclass(frozen=True)
class Select(WholeStage):
    """Rated pairs → the best of each document, where it reaches the threshold and the quantile and finds room.

    The input `calibration` brings the fit of a calibrated rater, and the threshold of a target precision.
    """

    name: ClassVar[str] = "curate.select"
    version: ClassVar[int] = 2
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Rated
    output: ClassVar[type[Record]] = Rated
    config: CurateConfig

    @property
    def needs_calibration(self) -> bool:
        """Whether a calibration decides."""
        return self.config.rater.kind == "calibrated" or self.config.target_precision is not None

    def settings(self) -> Settings:
        keys = {"threshold", "max_off_scale", "quantile", "max_per_source", "max_per_cluster", "cluster_similarity"}
        return self.config.model_dump(include=keys)

    def gates(self) -> Settings:
        return {"min_rated": self.config.min_rated}

    def run(self, rows: Rows[Rated], context: Context) -> Iterable[Outcome]:
        calibration = Calibration.of(context.path("calibration")) if self.needs_calibration else Calibration()
        threshold = calibration.cut(self.config)
        documents, scores = array("q"), array("d")
        for row, score, _ in self._judged(rows, calibration):
            documents.append(key_of(*row.parents))
            scores.append(nan if score is None else score)
        reasons = self._passed_over(rows, documents, scores, threshold, context)
        for (row, score, unrated), passed_over in zip(self._judged(rows, calibration), reasons, strict=True):
            if calibration.fit is not None:
                row = replace(row, probability=score)
            reason = unrated or passed_over
            yield rejected(row.id, reason, row) if reason else row

    def _judged(self, rows: Rows[Rated], found: Calibration) -> Iterator[tuple[Rated, float | None, str | None]]:
        """Each row with its verdict, and the reason where it has none."""
        for row in rows:
            rubric = (row.rating, row.unrated, row.off_scale)
            yield row, *verdict(*rubric, signals_of(row), self.config, found.fit)

    def _passed_over(
        self, rows: Rows[Rated], documents: "array[int]", scores: "array[float]", threshold: float, context: Context
    ) -> "NDArray[np.object_]":
        """Why each row with a score (NaN is none) is not kept, None where it is."""
        import numpy as np

        worth = np.asarray(scores)
        reasons, left = np.full(len(worth), "not_best", object), _best(documents, worth)

        def drop(reason: str, which: "NDArray[np.bool_] | list[int]") -> None:
            reasons[which] = reason
            left[which] = False

        best = np.sort(worth[left])
        reasons[left] = None
        drop("below_threshold", worth < threshold)
        if self.config.quantile is not None and best.size:
            # So many are below it, however many are alike at it.
            last = best[int(round(self.config.quantile * len(best), 9))]
            drop("below_quantile", left & (worth < last))
        for most, name, key in (
            (self.config.max_per_source, "source_full", self._source),
            (self.config.max_per_cluster, "cluster_full", self._cluster),
        ):
            if most is not None:
                by_worth = sorted((-scores[place], row.id, place) for place, row in compress(enumerate(rows), left))
                ranked = [place for *_, place in by_worth]
                drop(name, [*_beyond(ranked, key(rows, ranked), most)])
        drop("match_size", _unmatched(rows, left, context))
        return reasons

    @staticmethod
    def _source(rows: Rows[Rated], ranked: Sequence[Place]) -> Callable[[Place], Hashable]:
        wanted = set(ranked)
        return {place: row.source for place, row in enumerate(rows) if place in wanted}.__getitem__

    def _cluster(self, rows: Rows[Rated], ranked: Sequence[Place]) -> Callable[[Place], Hashable]:
        """The best pair that a pair's texts are a near-duplicate of, or itself."""
        from tempfile import gettempdir

        from selfalign.text.near_duplicates import near_duplicates

        wanted = set(ranked)
        texts = {place: f"{row.prompt}\n{row.completion}" for place, row in enumerate(rows) if place in wanted}
        first = near_duplicates((texts[place] for place in ranked), self.config.cluster_similarity, Path(gettempdir()))
        firsts = zip(ranked, first.tolist(), strict=True)
        return {place: n if at < 0 else at for n, (place, at) in enumerate(firsts)}.get

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


@dataclass(frozen=True)
class KeepAll(WholeStage):
    """No curation, to compare with: the first candidate of every document, or as many as another arm keeps."""

    name: ClassVar[str] = "curate.keep_all"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Rated

    def run(self, rows: Rows[Candidate], context: Context) -> Iterable[Outcome]:
        import numpy as np

        left = _best(array("q", (key_of(*row.parents) for row in rows)), np.zeros(len(rows)))
        reasons = np.full(len(left), "not_first", object)
        reasons[left] = None
        reasons[_unmatched(rows, left, context)] = "match_size"
        for row, reason in zip(rows, reasons, strict=True):
            unrated = Rated(**{f.name: getattr(row, f.name) for f in fields(row)})
            yield rejected(row.id, reason, unrated) if reason else unrated

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            raise GateError("no pair is left after augmentation; `selfalign status` says what was filtered, and why")


def _best(documents: "array[int]", worth: "NDArray[np.float64]") -> "NDArray[np.bool_]":
    """Whether a row is the best of its document, of equals the first; one whose worth is NaN is not."""
    import numpy as np

    places = np.argsort(-worth, kind="stable")[: len(worth) - np.isnan(worth).sum()]
    best = np.zeros(len(worth), np.bool_)
    best[places[np.unique(np.asarray(documents)[places], return_index=True)[1]]] = True
    return best


def _beyond(ranked: Sequence[Place], key: Callable[[Place], Hashable], most: int) -> Iterator[Place]:
    """Those of `ranked`, the best first, that find `most` of the same key before them."""
    seen: Counter[Hashable] = Counter()
    for place in ranked:
        seen[key(place)] += 1
        if seen[key(place)] > most:
            yield place


def _unmatched(rows: Rows[Candidate], left: "NDArray[np.bool_]", context: Context) -> list[Place]:
    """Of those that are left, all but as many as the input `match` holds, drawn by seed."""
    if "match" not in context.inputs:
        return []
    kept = context.manifest("match").ledger["kept"]
    assert isinstance(kept, int)
    drawn = sorted(
        (seed_for(context.seed, row.id, "match_size"), place) for place, row in compress(enumerate(rows), left)
    )
    return [place for _, place in drawn[kept:]]
