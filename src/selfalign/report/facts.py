"""What a report shows of a run, as numbers: from manifests, and from shards a batch at a time.

Steps are found by name and columns by theirs, so that a run which stands still, failed, or was made by an older version
gives what it has. A step that a gate failed counts: what it measured is why.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from selfalign.core.errors import StorageError
from selfalign.core.store import Manifest
from selfalign.report.charts import Level, Scale
from selfalign.report.columns import batches, rows_by_id
from selfalign.report.logs import TrainingLog, read_log
from selfalign.report.run import RunView, StepView
from selfalign.report.show import extremes, generated, replies, signals_of, told_signals
from selfalign.report.status import measurements
from selfalign.stages.curate.verdict import UNRATED

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

RATINGS = Scale("rating", 1, 5, (1, 2, 3, 4, 5))
PROBABILITIES = Scale("probability", 0, 1, (0, 0.25, 0.5, 0.75, 1))
LENGTH_BINS = 40
KINDS = {"augmented": "curated", "seed": "seed", "rating": "rating replay"}


@dataclass(frozen=True)
class Ratings:
    """The verdicts of a round: counts by bin of the scale on both sides of the threshold, and who has none."""

    step: StepView
    below: Sequence[int]
    above: Sequence[int]
    unrated: Mapping[str, int]

    @property
    def n(self) -> int:
        """Pairs with a verdict."""
        return sum(self.below) + sum(self.above)


@dataclass(frozen=True)
class Planted:
    """One kind of planted pairs: how many have a verdict, and those by bin of the scale."""

    kind: str
    good: bool
    n: int
    counts: Sequence[int]


@dataclass(frozen=True)
class Lengths:
    """How long the texts of one group are, in characters: counts by bin, and quantiles."""

    group: str
    n: int
    counts: Sequence[int]
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Training:
    """What one training has logged, as far as it got."""

    step: StepView
    log: TrainingLog


@dataclass(frozen=True)
class Measured:
    """What was measured of one forward model."""

    model: str
    main: bool
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A row to read: texts by name, a verdict, and where it came from."""

    id: str
    texts: Sequence[tuple[str, str]]
    verdict: str
    lineage: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """A run, and the round that its report is about: that of the final model, or the last that was begun."""

    run: RunView

    @cached_property
    def recipe(self) -> Mapping[str, JsonValue]:
        """The resolved recipe; empty where the run folder holds none."""
        found = read_json(self.run, "recipe.json")
        return found if isinstance(found, dict) else {}

    def setting(self, *keys: str) -> JsonValue:
        """A value of the recipe, or None."""
        found: JsonValue = dict(self.recipe)
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *keys: str) -> float | None:
        """A number of the recipe, or None."""
        found = self.setting(*keys)
        return float(found) if isinstance(found, int | float) else None

    @cached_property
    def arms(self) -> list[str | None]:
        """The main arm (None), then the others as the recipe orders them."""
        named = self.recipe.get("arms")
        stepped = (step.arm for step in self.run.steps)
        return [*dict.fromkeys([None, *(named if isinstance(named, dict) else ()), *stepped])]

    @cached_property
    def round(self) -> int:
        """The round that the report is about, from 1."""
        begun = [k for name in ("curate.rate", "curate.select", "forward.compose") for k, _ in self.rounds(name)]
        return self.run.final_round or max(begun, default=0) or 1

    def finished(self, name: str, arm: str | None = None) -> StepView | None:
        """The step, if it has a result. One whose gate failed has."""
        step = self.run.step(name, arm)
        return step if step is not None and step.finished else None

    def rounds(self, name: str) -> list[tuple[int, StepView]]:
        """The main arm's finished steps `name@k`, by k."""
        return [(int(step.name.rpartition("@")[2]), step) for step in self.run.rounds(name, failed=True)]

    # From documents to training rows

    def levels(self) -> list[Level]:
        """The main arm from the corpus's records to the rows that were trained on."""
        k, found = self.round, []
        read = self.finished("prepare.read_corpus")
        if read and drops(read):
            found.append(Level("Records in the corpus", count(read, "in")))
        for name, label in (
            ("prepare.read_corpus", "Documents read"),
            ("prepare.filter_corpus", "Documents after the filters"),
            ("prepare.pick_corpus", "Documents drawn"),
            ("augment.generate", "Instructions written"),
            ("augment.filter", "Usable instructions"),
            ("augment.deduplicate", "Different instructions"),
        ):
            if step := self.finished(name):
                found.append(Level(label, count(step, "kept"), dropped=drops(step)))
        return [*found, *self._curated(k), *self._composed(k)]

    def _curated(self, k: int) -> list[Level]:
        rate, select = self.finished(f"curate.rate@{k}"), self.finished(f"curate.select@{k}")
        found = []
        lost = [*drops(rate)] if rate else []
        chosen = list(drops(select)) if select else []
        unrated = [(reason, n) for reason, n in chosen if reason in UNRATED]
        if rate:
            rated = count(rate, "kept") - sum(n for _, n in unrated)
            found.append(Level(f"Rated in round {k}", rated, dropped=(*lost, *unrated)))
        if select:
            rest = chosen if rate is None else [pair for pair in chosen if pair not in unrated]
            found.append(Level("Selected", count(select, "kept"), dropped=tuple(rest)))
        return found

    def _composed(self, k: int) -> list[Level]:
        composed, trained = self.finished(f"forward.compose@{k}"), self.finished(f"forward.train@{k}")
        if composed is None:
            return []
        kinds: Counter[str] = Counter()
        for batch in batches(composed, ["kind"]):
            kinds.update(map(str, batch.column("kind").to_pylist()))
        ordered = sorted(kinds.items(), key=lambda pair: [*KINDS, pair[0]].index(pair[0]))
        parts = tuple((KINDS.get(kind, kind), n) for kind, n in ordered)
        left_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in drops(composed))
        aside = f"left out of the seed and the replay: {left_out}" if left_out else ""
        found = [Level(f"Training rows of M{k}", count(composed, "kept"), parts, aside=aside)]
        if trained and drops(trained):
            found.append(Level("Trained on", count(trained, "kept"), dropped=drops(trained)))
        return found

    # Verdicts

    @cached_property
    def scale(self) -> Scale:
        """What verdicts are counted in: ratings, or a calibrated rater's probabilities."""
        return PROBABILITIES if self.setting("curate", "rater", "kind") == "calibrated" else RATINGS

    def threshold(self, k: int) -> float | None:
        """From where on round `k` keeps a pair: what its calibration chose, or the recipe's."""
        step = self.finished(f"curate.calibrate@{k}")
        chosen = manifest_of(step).metrics.get("threshold") if step else None
        return float(chosen) if isinstance(chosen, int | float) else self.number("curate", "threshold")

    def ratings(self) -> list[Ratings]:
        """Each round's verdicts on the candidates."""
        if self.scale is PROBABILITIES:
            # Selection weighs the signals: before it nothing has a probability.
            return [self._ratings(k, step, self._probabilities(step)) for k, step in self.rounds("curate.select")]
        return [self._ratings(k, step, self._rated(step)) for k, step in self.rounds("curate.rate")]

    def _ratings(self, k: int, step: StepView, found: "Iterator[tuple[NDArray[np.float64], Counter[str]]]") -> Ratings:
        import numpy as np

        threshold = self.threshold(k)
        below, above = np.zeros(len(self.scale.edges) - 1, int), np.zeros(len(self.scale.edges) - 1, int)
        unrated: Counter[str] = Counter()
        for verdicts, without in found:
            high = verdicts >= (-math.inf if threshold is None else threshold)
            below += np.histogram(verdicts[~high], self.scale.edges)[0]
            above += np.histogram(verdicts[high], self.scale.edges)[0]
            unrated += without
        return Ratings(step, below.tolist(), above.tolist(), dict(sorted(unrated.items())))

    def _rated(self, step: StepView) -> "Iterator[tuple[NDArray[np.float64], Counter[str]]]":
        """Ratings that count, a batch at a time, and the reasons of the others."""
        import numpy as np

        most = self.number("curate", "max_off_scale")
        for batch in batches(step, ["rating", "unrated", "off_scale"]):
            rating = floats(batch.column("rating"))
            off = floats(batch.column("off_scale"))
            unrated = Counter(str(reason) for reason in batch.column("unrated").to_pylist() if reason is not None)
            known = ~np.isnan(rating)
            # Comparisons with NaN are false: what has no such mass is on the scale.
            away = known & (off > (1.0 if most is None else most))
            unrated["off_scale"] += int(away.sum())
            yield rating[known & ~away], unrated

    def _probabilities(self, step: StepView) -> "Iterator[tuple[NDArray[np.float64], Counter[str]]]":
        """Probabilities, a batch at a time, and the reasons of rows that have none."""
        import numpy as np

        for batch in batches(step, ["probability", "reason"], dropped=True):
            if "probability" in batch.schema.names:
                found = floats(batch.column("probability"))
                yield found[~np.isnan(found)], Counter(r for r in batch.column("reason").to_pylist() if r in UNRATED)

    def calibrations(self) -> list[tuple[int, StepView, list[Planted]]]:
        """Each round's planted pairs: as they were, then each way of spoiling them."""
        return [(k, step, _planted(step, self.scale)) for k, step in self.rounds("curate.calibrate")]

    # Texts

    def lengths(self, column: str) -> tuple[list[float], list[Lengths]]:
        """Bins, and how the lengths of prompts or completions lie in them: the seed's, all candidates', the curated's.

        Bins grow with the length, as on a logarithmic axis, and each holds a whole number of lengths.
        """
        groups = (
            ("Seed", self.finished("prepare.pick_seed")),
            ("Candidates", self.finished("augment.deduplicate")),
            ("Curated", self.finished(f"curate.select@{self.round}")),
        )
        found = {name: _lengths_in(step, column) for name, step in groups if step}
        found = {name: lengths for name, lengths in found.items() if lengths.size}
        if not found:
            return [], []
        edges = _length_edges(min(x.min() for x in found.values()), max(x.max() for x in found.values()))
        return edges, [_lengths(name, lengths, edges) for name, lengths in found.items()]

    def sources(self) -> list[tuple[str, int, int]]:
        """Each source's candidates and how many of them were kept, the largest first."""
        before, after = self.finished("augment.deduplicate"), self.finished(f"curate.select@{self.round}")
        if before is None or after is None:
            return []
        had, has = _by_source(before), _by_source(after)
        return [(name, n, has[name]) for name, n in sorted(had.items(), key=lambda pair: (-pair[1], pair[0]))]

    # Models

    def trainings(self) -> list[Training]:
        """Every training that has logged a loss, arm by arm."""
        steps = [step for step in self.run.steps if ".train" in step.name]
        steps.sort(key=lambda step: self.arms.index(step.arm))
        found = [Training(step, read_log(step.artifact.folder)) for step in steps]
        return [training for training in found if "loss" in training.log.curves]

    def measured(self) -> list[Measured]:
        """The forward models: the base, the main arm's, then the other arms one by one."""

        def arm(model: str) -> str | None:
            # Of two arms, one may be called as the other begins.
            own = (a for a in self.arms if a and (model == a or model.startswith(f"{a} ")))
            return max(own, key=len, default=None)

        found = [Measured(model, arm(model) is None, metrics) for model, metrics in measurements(self.run)]
        return sorted(found, key=lambda row: (self.arms.index(arm(row.model)), not row.model.endswith("base")))

    # Rows to read

    def samples(self, n: int) -> Mapping[str, list[Sample]]:
        """The rows that `selfalign show` shows, with where they came from."""
        last = next(reversed(self.run.rounds("curate.rate")), None)
        high, low = extremes(self.run, n, n)
        return {
            "pairs": self._told(generated(self.run, n), None),
            "high": self._told(high, last),
            "low": self._told(low, last),
            "responses": self._replies(n),
        }

    def _told(self, rows: Sequence[Mapping[str, Any]], rated: StepView | None) -> list[Sample]:
        makers = {step.artifact.identity: step for step in self.run.steps}
        corpus = self.finished("prepare.pick_corpus")
        parents = {row["id"]: next(iter(row.get("parents") or ()), row["id"]) for row in rows}
        documents = rows_by_id(corpus, [*parents.values()], ["license", "header", "within"]) if corpus else {}
        verdicts = self._verdicts(rated, [row["id"] for row in rows]) if rated else {}
        found = []
        for row in rows:
            document = documents.get(parents[row["id"]], {})
            maker = makers.get(row.get("model") or "")
            lineage = [
                ("document", parents[row["id"]]),
                ("header", document.get("header")),
                ("within", next(reversed(document.get("within") or ()), None)),
                ("source", row.get("source")),
                ("license", row.get("license") or document.get("license")),
                ("instruction by", f"{maker.title} ({maker.artifact.name})" if maker else row.get("model")),
                ("rated by", f"{rated.title} ({rated.artifact.name})" if rated else None),
                ("signals", told_signals(signals_of(row)) if rated else None),
            ]
            texts = [
                ("Instruction", row.get("prompt")),
                ("Response", row.get("completion")),
                ("Rater", row.get("reply")),
            ]
            known = ((name, row.get(name)) for name in ("probability", "rating")) if rated else ()
            told = [f"{name} {value:.2f}" for name, value in known if value is not None]
            verdict = ", ".join(filter(None, [*told, verdicts.get(row["id"], "")]))
            found.append(Sample(row["id"], _said(texts), verdict, _said(lineage)))
        return found

    def _verdicts(self, rated: StepView, ids: Sequence[str]) -> Mapping[str, str]:
        """What the selection of the same round made of rated rows."""
        step = self.finished(rated.name.replace(".rate@", ".select@"))
        rows = rows_by_id(step, ids, ["outcome", "reason"]) if step else {}
        # A kept row's reason is a note.
        reasons = {id: "selected" if row["outcome"] == "kept" else str(row["reason"]) for id, row in rows.items()}
        return {id: reason.replace("_", " ") for id, reason in reasons.items()}

    def _replies(self, n: int) -> list[Sample]:
        model = self.run.step(f"forward.train@{self.run.final_round}")
        by = f"M{self.run.final_round} ({model.artifact.name})" if model else None
        found = []
        for row in replies(self.run)[:n]:
            texts = [("Prompt", row["prompt"]), ("Reply", row["reply"])]
            lineage = [("prompt", row["id"]), ("reply by", by), ("ended by", row.get("finish"))]
            right = "" if row.get("right") is None else "right" if row["right"] else "wrong"
            found.append(Sample(row["id"], _said(texts), right, _said(lineage)))
        return found


def manifest_of(step: StepView) -> Manifest:
    """The manifest of a finished step."""
    assert step.manifest is not None
    return step.manifest


def count(step: StepView, key: str) -> int:
    """A whole number of its ledger."""
    found = manifest_of(step).ledger.get(key)
    return found if isinstance(found, int) else 0


def counts(step: StepView, key: str) -> dict[str, int]:
    """Counts by reason of its ledger."""
    found = manifest_of(step).ledger.get(key)
    return {k: n for k, n in found.items() if isinstance(n, int)} if isinstance(found, dict) else {}


def drops(step: StepView) -> tuple[tuple[str, int], ...]:
    """What it dropped, by reason, the most frequent first."""
    found = Counter(counts(step, "rejected"))
    found.update({f"{reason} (quarantined)": n for reason, n in counts(step, "quarantined").items()})
    return tuple(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def read_json(run: RunView, name: str) -> JsonValue:
    """A document of the run folder, or None where there is none."""
    path = run.root / name
    try:
        found: JsonValue = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    return found


def floats(column: "pa.Array[Any]") -> "NDArray[np.float64]":
    """A column with NaN for null."""
    import numpy as np

    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _by_source(step: StepView) -> Counter[str]:
    found: Counter[str] = Counter()
    for batch in batches(step, ["source"]):
        found.update(map(str, batch.column("source").to_pylist()))
    return found


def _planted(step: StepView, scale: Scale) -> list[Planted]:
    import numpy as np

    verdicts: dict[tuple[str, bool], list[float]] = {("seed", True): []}
    for row in step.lines("planted.jsonl"):
        values = verdicts.setdefault((row["kind"], row.get("good", row["kind"] == "seed")), [])
        # Runs of an older version know ratings alone.
        verdict = row["verdict"] if "verdict" in row else row["rating"]
        if verdict is not None and row["unrated"] is None:
            values.append(verdict)
    return [
        Planted(kind, good, len(values), np.histogram(values, scale.edges)[0].tolist())
        for (kind, good), values in verdicts.items()
    ]


def _lengths_in(step: StepView, column: str) -> "NDArray[np.int64]":
    import numpy as np
    import pyarrow.compute as pc

    texts = (cast("pa.StringArray", batch.column(column)) for batch in batches(step, [column]))
    lengths = map(pc.utf8_length, texts)
    return np.concatenate([np.zeros(0, np.int64), *(floats(each).astype(np.int64) for each in lengths)])


def _length_edges(least: int, most: int) -> list[float]:
    """Between whole numbers, from below `least` to above `most`."""
    import numpy as np

    inner = np.geomspace(max(least, 1), max(most, 1) + 1, LENGTH_BINS + 1)
    return [float(edge) for edge in np.unique(np.concatenate([[least, most + 1], np.rint(inner)])) - 0.5]


def _lengths(group: str, lengths: "NDArray[np.int64]", edges: Sequence[float]) -> Lengths:
    import numpy as np

    low, median, high = np.quantile(lengths, [0.05, 0.5, 0.95]).tolist()
    return Lengths(group, lengths.size, np.histogram(lengths, edges)[0].tolist(), low, median, high)


def _said(pairs: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in pairs if isinstance(value, str) and value.strip()]
