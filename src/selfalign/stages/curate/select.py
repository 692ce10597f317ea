"""Keep the pairs that are rated well enough: at most one a document, and no more of a kind than the recipe wants."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from selfalign.core.errors import GateError
from selfalign.core.identity import seed_for
from selfalign.core.records import Candidate, Outcome, Rated, Record, rejected
from selfalign.core.stage import Context, Rows, Settings, WholeStage
from selfalign.core.store import Manifest
from selfalign.stages.curate.calibrate import Calibration
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import signals_of
from selfalign.stages.curate.verdict import UNRATED, verdict


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
        best: dict[tuple[str, ...], tuple[float, str]] = {}
        for row, score, _ in self._judged(rows, calibration):
            if score is not None:
                worth = (-score, row.id)
                best[row.parents] = min(worth, best.get(row.parents, worth))
        reasons = self._passed_over(rows, {id: -worth for worth, id in best.values()}, threshold, context)
        for row, score, unrated in self._judged(rows, calibration):
            if calibration.fit is not None:
                row = replace(row, probability=score)
            reason = unrated
            if score is not None and best[row.parents][1] != row.id:
                reason = "below_threshold" if score < threshold else "not_best"
            elif score is not None:
                reason = reasons.get(row.id)
            yield rejected(row.id, reason, row) if reason else row

    def _judged(self, rows: Rows[Rated], found: Calibration) -> Iterator[tuple[Rated, float | None, str | None]]:
        """Each row with its verdict, and the reason where it has none."""
        for row in rows:
            rubric = (row.rating, row.unrated, row.off_scale)
            yield row, *verdict(*rubric, signals_of(row), self.config, found.fit)

    def _passed_over(
        self, rows: Rows[Rated], scores: dict[str, float], threshold: float, context: Context
    ) -> dict[str, str]:
        """Of the documents' best pairs, those that are not kept, with the reason."""
        reasons = {id: "below_threshold" for id, score in scores.items() if score < threshold}
        if self.config.quantile is not None and scores:
            # So many are below it, however many are alike at it.
            last = sorted(scores.values())[int(round(self.config.quantile * len(scores), 9))]
            reasons |= {id: "below_quantile" for id, score in scores.items() if score < last and id not in reasons}
        for most, name, key in (
            (self.config.max_per_source, "source_full", self._source),
            (self.config.max_per_cluster, "cluster_full", self._cluster),
        ):
            if most is not None:
                ranked = sorted((id for id in scores if id not in reasons), key=lambda id: (-scores[id], id))
                reasons |= dict.fromkeys(_beyond(ranked, key(rows, ranked), most), name)
        left = [id for id in scores if id not in reasons]
        return reasons | dict.fromkeys(set(left) - _matched(left, context), "match_size")

    @staticmethod
    def _source(rows: Rows[Rated], ranked: Sequence[str]) -> Callable[[str], Hashable]:
        wanted = set(ranked)
        return {row.id: row.source for row in rows if row.id in wanted}.__getitem__

    def _cluster(self, rows: Rows[Rated], ranked: Sequence[str]) -> Callable[[str], Hashable]:
        """The best pair that a pair's texts are a near-duplicate of, or itself."""
        from tempfile import gettempdir

        from selfalign.text.near_duplicates import near_duplicates

        wanted = set(ranked)
        texts = {row.id: f"{row.prompt}\n{row.completion}" for row in rows if row.id in wanted}
        first = near_duplicates((texts[id] for id in ranked), self.config.cluster_similarity, Path(gettempdir()))
        return {id: n if at < 0 else at for n, (id, at) in enumerate(zip(ranked, first.tolist(), strict=True))}.get

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


def _beyond(ranked: Sequence[str], key: Callable[[str], Hashable], most: int) -> Iterator[str]:
    """Those of `ranked`, the best first, that find `most` of the same key before them."""
    seen: Counter[Hashable] = Counter()
    for id in ranked:
        seen[key(id)] += 1
        if seen[key(id)] > most:
            yield id


def _matched(ids: Sequence[str], context: Context) -> set[str]:
    """All ids, or as many as the input `match` holds, drawn by seed."""
    if "match" not in context.inputs:
        return set(ids)
    kept = context.manifest("match").ledger["kept"]
    assert isinstance(kept, int)
    return set(sorted(ids, key=lambda id: seed_for(context.seed, id, "match_size"))[:kept])
