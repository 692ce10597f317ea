"""What export writes: read back by `datasets` in every format, and trained on by TRL."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from report.conftest import Run
from s3 import S3
from selfalign.cli import main
from selfalign.core.errors import StorageError, UsageError
from selfalign.core.locations import commit, files_in
from selfalign.core.records import Candidate, Document, Rated, SeedPair, Signal, quarantined, rejected
from selfalign.demo.base import base_folder
from selfalign.report.export import Columns, Format, StageName, export

STAGES: tuple[StageName, ...] = get_args(StageName)
FORMATS: tuple[Format, ...] = get_args(Format)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `datasets` keeps what it has read."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def pair(n: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"d/{n:07}",
        "source": "atlas",
        "prompt": f"Who lives in place {n}?",
        "completion": f"Gnome {n}.",
        **more,
    }


def candidate(n: int) -> dict[str, Any]:
    return {**pair(n), "model": "m", "prompt_hash": "h", "finish": "stop", "parents": (f"d/{n}",)}


def rated(n: int, rating: float | None) -> Rated:
    dist = () if rating is None else (0.1, 0.1, 0.1, 0.1, 0.5)
    return Rated(**candidate(n), rating=rating, unrated=None if rating else "unparsed", rating_dist=dist)


AUGMENTED = ("augment.generate", "augment.filter", "augment.deduplicate")


@pytest.fixture
def full(run: Run) -> Run:
    """A run with rows that stayed and rows that were dropped at every step."""
    broken = quarantined("s/0000003", "bad_json", "seed.jsonl line 4, byte 310, sha256 ab12")
    seed = [SeedPair(**pair(n), language="en", split=None) for n in range(4)]
    run.add("prepare.read_seed", record=SeedPair, rows=[*seed, broken])
    run.add("prepare.filter_seed", record=SeedPair, rows=[*seed[:3], rejected(seed[3].id, "too_short", seed[3])])
    splits = zip(seed[:3], ("train", "held_out", "train"), strict=True)
    run.add(
        "prepare.pick_seed", record=SeedPair, rows=[SeedPair(**pair(n), split=s) for n, (_, s) in enumerate(splits)]
    )
    documents = [Document(id=f"c/{n}", source="atlas", license="CC0-1.0", text=f"Gnome {n}.") for n in range(5)]
    run.add("prepare.read_corpus", record=Document, rows=documents)
    run.add("prepare.filter_corpus", record=Document, rows=documents)
    run.add("prepare.pick_corpus", record=Document, rows=[*documents[:4], rejected("c/4", "duplicate", documents[4])])
    made = [Candidate(**candidate(n)) for n in range(4)]
    run.add("augment.generate", record=Candidate, rows=[*made, rejected("d/9", "too_long", Candidate(**candidate(9)))])
    run.add("augment.filter", record=Candidate, rows=[*made[:3], rejected(made[3].id, "echo", made[3])])
    run.add("augment.deduplicate", record=Candidate, rows=made[:3])
    crashed = quarantined("d/0000008", "crashed_worker", "its worker died 3 times while processing it")
    for k in (1, 2):
        run.add(f"curate.rate@{k}", record=Rated, rows=[rated(0, 4.5), rated(1, 2.0), rated(2, None), crashed])
        low, unrated = (
            rejected("d/0000001", "below_threshold", rated(1, 2.0)),
            rejected("d/0000002", "unparsed", rated(2, None)),
        )
        run.add(f"curate.select@{k}", record=Rated, rows=[rated(0, 4.0 + k / 4), low, unrated])
        run.add(f"forward.train@{k}", files={"config.json": "{}"})
    for what in ("seed", "corpus"):
        link(run, f"prepare.read_{what}", f"prepare.filter_{what}", f"prepare.pick_{what}")
    for k in (1, 2):
        link(run, *AUGMENTED, f"curate.rate@{k}", f"curate.select@{k}")
    return run


def link(run: Run, *names: str, arm: str | None = None) -> None:
    """Let each step's manifest say that it was made from the rows of the one before; `arm` has the last one."""
    rows = ""
    for name in names:
        step = run.view().step(name, arm if name == names[-1] else None)
        path = step.artifact.folder / "manifest.json"
        manifest = json.loads(path.read_text()) | {"inputs": {"rows": rows}, "sha256": f"{step.title} content"}
        path.write_text(json.dumps(manifest))
        rows = manifest["sha256"]


def write(run: Run, to: Path, stage: StageName, format: Format = "jsonl", **more: Any) -> list[dict[str, Any]]:
    """The rows as `datasets` finds them."""
    return list(loaded(export(run.view(), stage, to / f"{stage}.{format}", format, **more).path))


def loaded(path: Path) -> Any:
    from datasets import load_dataset

    kind = "parquet" if path.suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=str(path), split="train")


@pytest.mark.parametrize("columns", get_args(Columns))
@pytest.mark.parametrize("dropped", [False, True])
def test_every_stage_reads_the_same_in_every_format(full: Run, tmp_path: Path, columns: Columns, dropped: bool) -> None:
    for stage in STAGES:
        shape: Columns = "messages" if stage == "corpus" else columns
        parquet, *others = (
            write(full, tmp_path, stage, f, columns=shape, dropped=dropped) for f in ("parquet", "json", "jsonl")
        )
        assert parquet
        for rows in others:
            assert rows == parquet
            assert list(rows[0]) == list(parquet[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_an_object_store_is_exported_like_one_on_disk(
    full: Run, s3: S3, tmp_path: Path, stage: StageName
) -> None:
    root = s3.folder()
    for name in files_in(full.store.root):
        commit(root / name, (full.store.root / name).read_bytes())
    to = tmp_path / "rows.jsonl"
    assert main(["export", str(root), "--stage", stage, "--to", str(to)]) == 0
    assert to.read_bytes() == export(full.view(), stage, tmp_path / "disk.jsonl").path.read_bytes() != b""


@pytest.mark.parametrize(
    ("stage", "kept"), [("corpus", 4), ("prepared", 3), ("candidates", 3), ("rated", 1), ("curated", 1)]
)
def test_a_stage_holds_what_its_last_step_kept_and_with_dropped_all_that_went_in(
    full: Run, tmp_path: Path, stage: StageName, kept: int
) -> None:
    rows = write(full, tmp_path, stage, dropped=True)
    assert sum(row["outcome"] == "kept" for row in rows) == kept
    assert len({row["id"] for row in rows}) == len(rows) == {"corpus": 5, "rated": 4, "curated": 4}.get(stage, 5)
    if stage != "rated":
        (tmp_path / "only").mkdir()
        assert len(write(full, tmp_path / "only", stage)) == kept


def test_signals_and_probability_read_the_same_in_every_format_though_none_was_measured_at_first(
    full: Run, tmp_path: Path
) -> None:
    def signal(value: float | None) -> tuple[Signal, ...]:
        return (Signal(name="stop_token", value=value), Signal(name="entropy", value=None))

    rows: list[Any] = [Rated(**candidate(n), signals=signal(-0.5 if n == 7 else None)) for n in range(8)]
    rows[7] = replace(rows[7], probability=0.75)
    full.add("curate.rate@3", record=Rated, rows=rows)
    full.add("curate.select@3", record=Rated, rows=[rejected(row.id, "unmeasured", row) for row in rows[:7]] + rows[7:])
    link(full, "augment.deduplicate", "curate.rate@3", "curate.select@3")
    found = [write(full, tmp_path, "rated", format, round=3) for format in FORMATS]
    for each in found:
        by_id = {row["id"]: (row["signals"], row["probability"]) for row in each}
        none = [{"name": name, "value": None} for name in ("stop_token", "entropy")]
        assert by_id["d/0000007"] == ([{"name": "stop_token", "value": -0.5}, none[1]], 0.75)
        assert by_id["d/0000000"] == (none, None)
    # A reader that takes types from the beginning finds a signal that has a value there.
    ids = [json.loads(line)["id"] for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert ids[:3] == ["d/0000000", "d/0000007", "d/0000001"]


def test_a_pair_is_a_conversation_or_a_prompt_and_its_completion(full: Run, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who lives in place 0?"}, {"role": "assistant", "content": "Gnome 0."}]
    assert write(full, tmp_path, "curated")[0]["messages"] == turns
    row = write(full, tmp_path, "curated", "json", columns="prompt_completion")[0]
    assert (row["prompt"], row["completion"]) == (turns[:1], turns[1:])


def test_the_rejected_are_rated_rows_with_their_reasons(full: Run, tmp_path: Path) -> None:
    rows = {row["id"]: row for row in write(full, tmp_path, "rated")}
    told = {id: (row["outcome"], row["reason"], row["rating"]) for id, row in rows.items()}
    assert told == {
        "d/0000000": ("kept", None, 4.5),
        "d/0000001": ("rejected", "below_threshold", 2.0),
        "d/0000002": ("rejected", "unparsed", None),
        "d/0000008": ("quarantined", "crashed_worker", None),
    }
    assert rows["d/0000001"]["messages"][1]["content"] == "Gnome 1."
    assert rows["d/0000008"]["messages"] is None


def test_a_quarantined_seed_row_is_found_with_its_file_line_and_hash(full: Run, tmp_path: Path) -> None:
    assert "s/0000003" not in {row["id"] for row in write(full, tmp_path, "prepared")}
    (tmp_path / "all").mkdir()
    row = next(
        row for row in write(full, tmp_path / "all", "prepared", dropped=True) if row["outcome"] == "quarantined"
    )
    assert (row["id"], row["reason"]) == ("s/0000003", "bad_json")
    assert row["detail"] == "seed.jsonl line 4, byte 310, sha256 ab12"


def test_of_a_stage_that_a_gate_ended_early_the_dropped_rows_can_be_had(run: Run, tmp_path: Path) -> None:
    broken = quarantined("s/0000003", "not_html", "page.html: it is a picture")
    kept = Document(id="s/0000004", source="s", text="t")
    run.add("prepare.read_corpus", rows=[broken, kept], record=Document)
    run.add("prepare.filter_corpus", state="waiting")
    run.add("prepare.pick_corpus", state="waiting")
    to = tmp_path / "dropped.jsonl"
    assert export(run.view(), "corpus", to, dropped=True).rows == 1
    (row,) = map(json.loads, to.read_text().splitlines())
    assert (row["reason"], row["detail"]) == ("not_html", "page.html: it is a picture")
    with pytest.raises(UsageError, match=r"prepare\.pick_corpus is not done"):
        export(run.view(), "corpus", tmp_path / "all.jsonl")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz", "rows"])
def test_a_name_that_tells_no_format_is_refused(full: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="its name tells no format; end it in"):
        export(full.view(), "curated", tmp_path / name)
    assert export(full.view(), "curated", tmp_path / name, "parquet").rows


def test_curated_is_what_the_final_model_was_trained_on_unless_a_round_is_named(full: Run, tmp_path: Path) -> None:
    assert write(full, tmp_path, "curated")[0]["rating"] == 4.5
    assert write(full, tmp_path, "curated", "json", round=1)[0]["rating"] == 4.25
    full.add("evaluate.forward@2", stop="no better")
    assert write(full, tmp_path, "curated", "parquet")[0]["rating"] == 4.25


def test_an_arm_exports_its_own_steps_and_those_that_it_shares(full: Run, tmp_path: Path) -> None:
    full.add("curate.select@1", arm="loose", record=Rated, rows=[rated(0, 4.5), rated(1, 2.0)])
    full.add("evaluate.forward@1", arm="loose")
    link(
        full,
        "augment.generate",
        "augment.filter",
        "augment.deduplicate",
        "curate.rate@1",
        "curate.select@1",
        arm="loose",
    )
    assert len(write(full, tmp_path, "curated", arm="loose")) == 2
    # run.json names these under the main arm alone.
    assert {row["id"] for row in write(full, tmp_path, "rated", arm="loose")} >= {"d/0000000", "d/0000008"}
    assert len(write(full, tmp_path, "candidates", arm="loose")) == 3
    with pytest.raises(UsageError, match="it has loose"):
        write(full, tmp_path, "curated", "json", arm="tight")


def test_an_arm_that_keeps_all_has_curated_rows_and_no_rated_ones(full: Run, tmp_path: Path) -> None:
    full.add("curate.select@1", arm="all", record=Rated, rows=[rated(n, None) for n in range(3)])
    link(full, *AUGMENTED, "curate.select@1", arm="all")
    assert len(write(full, tmp_path, "curated", arm="all")) == 3
    with pytest.raises(UsageError, match="rates none"):
        write(full, tmp_path, "rated", arm="all")


def test_a_step_that_one_of_several_arms_has_is_not_guessed(full: Run, tmp_path: Path) -> None:
    full.add("augment.deduplicate", arm="one", record=Candidate, rows=[Candidate(**candidate(7))])
    # It shares the candidates with the main arm or with the other one, and nothing in it says with which.
    full.add("forward.train@1", arm="two")
    with pytest.raises(UsageError, match=r"shares augment\.deduplicate with another one.*no --arm, --arm one"):
        write(full, tmp_path, "candidates", arm="two")
    full.add("curate.select@1", arm="two", record=Rated)
    link(full, "augment.deduplicate", "curate.select@1", arm="two")
    assert len(write(full, tmp_path, "candidates", arm="two")) == 3


def test_a_column_that_is_null_for_the_first_megabytes_still_loads(run: Run, tmp_path: Path) -> None:
    # `datasets` takes a JSONL file's types from its first ten.
    documents = [Document(id=f"{n:04}", source="a", text="x" * 20_000) for n in range(600)]
    late = Document(id="9999", source="a", license="MIT", text="y", within=("p",))
    run.add(
        "prepare.pick_corpus", record=Document, rows=[*documents, late, rejected("99999", "duplicate", late, "of 0001")]
    )
    rows = write(run, tmp_path, "corpus", dropped=True)
    assert (tmp_path / "corpus.jsonl").stat().st_size > 11_000_000
    assert len(rows) == len({row["id"] for row in rows}) == 602
    assert {row["license"] for row in rows} == {None, "MIT"}


def test_an_existing_file_is_kept_unless_it_is_to_be_replaced(full: Run, tmp_path: Path) -> None:
    mine = tmp_path / "curated.jsonl"
    mine.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        write(full, tmp_path, "curated")
    assert mine.read_text() == "mine"
    assert len(write(full, tmp_path, "curated", replace=True)) == 1


def test_what_fails_half_way_leaves_nothing(full: Run, tmp_path: Path) -> None:
    shard = full.view().step("augment.deduplicate").artifact.shard(0)
    shard.write_bytes(shard.read_bytes()[:-20])
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="is not what"):
        write(full, tmp_path / "out", "candidates")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stage": "prepared", "round": 1}, "--round"),
        ({"stage": "curated", "round": 3}, "curate.select@3 is not done"),
        ({"stage": "corpus", "columns": "prompt_completion"}, "documents are no pairs"),
        ({"stage": "curated", "to": "missing/file.jsonl"}, "no folder"),
        ({"stage": "curated", "to": "."}, "is a folder"),
    ],
)
def test_what_cannot_be_exported_is_told(full: Run, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    settings = {"to": "x.jsonl", "format": "jsonl", **more}
    settings["to"] = tmp_path / settings["to"]
    with pytest.raises(UsageError, match=message):
        export(full.view(), **settings)


@pytest.mark.parametrize(
    ("stage", "columns", "loss"),
    [
        ("curated", "messages", "assistant_only_loss"),
        ("prepared", "messages", "assistant_only_loss"),
        ("rated", "prompt_completion", "completion_only_loss"),
    ],
)
def test_trl_trains_on_it(full: Run, tmp_path: Path, stage: StageName, columns: Columns, loss: str) -> None:
    from trl import SFTConfig, SFTTrainer

    to = tmp_path / f"{stage}.jsonl"
    rows = loaded(export(full.view(), stage, to, "jsonl", columns=columns).path)
    if stage == "prepared":
        rows = rows.filter(lambda row: row["split"] == "train")
    elif stage == "rated":
        rows = rows.filter(lambda row: row["outcome"] == "kept")
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=1, save_strategy="no", **settings, **{loss: True})
    trainer = SFTTrainer(model=str(base_folder()), args=arguments, train_dataset=rows)
    trained = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
    # The prompt carries no loss, the reply and its stop token do.
    replied = trainer.processing_class.decode(trained[trained != -100])
    assert replied.strip() == f"Gnome 0.{trainer.processing_class.eos_token}"
    assert trainer.train().training_loss > 0
