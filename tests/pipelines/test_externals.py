"""What lies outside a run is pinned: by its bytes here, by its commit on the Hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import NEW, OLD, Hub, serving
from selfalign.core.errors import ServiceError, UsageError
from selfalign.data.config import SourceConfig
from selfalign.engines.config import ModelConfig
from selfalign.pipelines import externals
from selfalign.pipelines.externals import Externals


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    files = {"config.json": b"{}", "model.safetensors": bytes(range(64)), "tokenizer.json": b"[]", "README.md": b"#"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def digest_of(path: Path) -> str:
    return Externals().model(ModelConfig(path=str(path)), "model.path")[1].digest


def test_any_byte_of_the_weights_changes_a_models_digest(model: Path) -> None:
    weights = model / "model.safetensors"
    data, seen = weights.read_bytes(), {digest_of(model)}
    for n in range(len(data)):
        weights.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        seen.add(digest_of(model))
    assert len(seen) == len(data) + 1
    weights.write_bytes(data)
    assert digest_of(model) in seen


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "more.safetensors"])
def test_every_file_that_loading_reads_counts(model: Path, name: str) -> None:
    before = digest_of(model)
    (model / name).write_bytes(b"changed")
    assert digest_of(model) != before


def test_a_renamed_file_counts(model: Path) -> None:
    before = digest_of(model)
    (model / "tokenizer.json").rename(model / "other.json")
    assert digest_of(model) != before


def test_what_loading_never_reads_does_not_count(model: Path) -> None:
    before = digest_of(model)
    (model / "README.md").write_text("changed")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "logs").mkdir()
    assert digest_of(model) == before


def test_a_copy_elsewhere_has_the_same_digest(model: Path) -> None:
    before = digest_of(model)
    assert digest_of(model.rename(model.with_name("moved"))) == before


def test_a_file_that_did_not_change_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = externals.file_digest
    monkeypatch.setattr(externals, "file_digest", lambda path: read.append(path.name) or real(path))
    first = Externals()
    config = ModelConfig(path=str(model))
    found = first.model(config, "model.path")
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]
    # As the run keeps them.
    again = Externals(digests=json.loads(json.dumps(first.digests)))
    assert again.model(config, "model.path") == found
    assert len(read) == 3
    os.utime(model / "config.json", ns=(1, 1))
    assert again.model(config, "model.path") == found
    assert read[3:] == ["config.json"]


def test_a_model_here_is_loaded_from_its_absolute_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(externals, "on_this_machine", lambda config, has_gpus: config)
    config, source = Externals().model(ModelConfig(path="base", revision="main", slots=3), "model.path")
    assert (config.path, config.revision, config.slots) == (str(model), None, 3)
    assert source.digest == digest_of(model)


def test_a_gpu_without_bfloat16_is_told_as_such(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("selfalign.engines.config.has_accelerator", lambda: True)
    monkeypatch.setattr("selfalign.engines.config.has_bfloat16", lambda: False)
    monkeypatch.setattr(externals, "has_accelerator", lambda: True)
    with caplog.at_level("INFO"):
        Externals().model(ModelConfig(path=str(model), dtype="bfloat16"), "model.path")
    assert f"this GPU has no bfloat16: {model} is loaded in float16, not bfloat16" in caplog.text


@pytest.mark.parametrize("path", ["./missing", "/missing/at/all", "~/missing", "missing", "a/b/c", "../org/name"])
def test_a_path_that_is_nowhere_is_told_without_asking_the_hub(hub: Hub, tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match=r"curate\.rater\.model: no model at .*; name a folder, or a model on the Hub"):
        Externals().model(ModelConfig(path=path), "curate.rater.model")
    assert hub.requests == []


def test_a_name_on_the_hub_is_pinned_to_its_commit_of_now(hub: Hub) -> None:
    outside = Externals()
    config, source = outside.model(ModelConfig(path="org/name"), "model.path")
    assert config.revision == NEW
    assert source.digest == f"org/name@{NEW}"
    assert outside.pinned == {"model:org/name": NEW}


def test_a_pinned_name_stays_where_it_was_and_the_hub_is_not_asked(hub: Hub) -> None:
    outside = Externals(pinned={"model:org/name": OLD})
    config, source = outside.model(ModelConfig(path="org/name"), "model.path")
    assert (config.revision, source.digest) == (OLD, f"org/name@{OLD}")
    assert hub.requests == []


def test_each_revision_of_a_name_has_a_pin_of_its_own(hub: Hub) -> None:
    outside = Externals()
    revisions = {
        name: outside.model(ModelConfig(path="org/name", revision=name), "m")[0].revision for name in ("v1", OLD)
    }
    assert revisions == {"v1": OLD, OLD: OLD}
    assert outside.model(ModelConfig(path="org/name"), "m")[0].revision == NEW
    assert outside.pinned["model:org/name@v1"] == OLD


def test_a_dataset_and_a_model_of_one_name_are_pinned_apart(hub: Hub) -> None:
    outside = Externals(pinned={"model:org/name": OLD})
    source = outside.source(SourceConfig(path="org/name"), "prepare.corpus")
    assert outside.pinned == {"model:org/name": OLD, "org/name": NEW}
    assert [row.rows for row in source.rows] == [1, 2]


def test_a_gated_model_says_that_it_takes_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    told = r"org/hidden is gated on the Hub: set HF_TOKEN, or point model\.path"
    with pytest.raises(UsageError, match=told) as caught:
        Externals().model(ModelConfig(path="org/hidden"), "model.path")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(UsageError, match="accept its licence on the Hub") as caught:
        Externals().model(ModelConfig(path="org/hidden"), "model.path")
    assert "hf_canary" not in str(caught.value)


def test_a_model_whose_files_alone_are_gated_is_told_when_it_is_fetched(hub: Hub) -> None:
    from selfalign.engines.loading import load_tokenizer

    # As the Hub does it: everybody may see which commit there is.
    config, _ = Externals().model(ModelConfig(path="org/gated"), "model.path")
    assert config.revision == NEW
    with pytest.raises(UsageError, match="org/gated is gated on the Hub: set HF_TOKEN") as caught:
        load_tokenizer(config)
    assert caught.value.exit_code == 2


def test_a_model_that_is_nowhere_and_a_revision_that_is_not_are_told_apart(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"org/missing is neither here nor on the Hub .*check curate\.rater\.model"):
        Externals().model(ModelConfig(path="org/missing"), "curate.rater.model")
    with pytest.raises(UsageError, match="org/name has no such revision"):
        Externals().model(ModelConfig(path="org/name", revision="v9"), "model.path")


def test_a_hub_that_cannot_be_reached_is_a_service_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    # huggingface_hub has some patience of its own.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    outside = Externals()
    with pytest.raises(ServiceError, match="the Hub cannot be reached") as caught:
        outside.model(ModelConfig(path="org/name"), "model.path")
    assert caught.value.exit_code == 69
    assert outside.pinned == {}


def test_a_source_is_known_by_its_files_contents_and_names(tmp_path: Path) -> None:
    def digest() -> str:
        return Externals().source(SourceConfig(path=str(tmp_path / "data")), "prepare.seed").digest

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "x"}\n')
    seen = [digest()]
    (tmp_path / "data" / "README.md").write_text("no data")
    assert digest() == seen[0]
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "y"}\n')
    seen.append(digest())
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "data" / "b.jsonl")
    seen.append(digest())
    (tmp_path / "data" / "c.jsonl").write_text("")
    seen.append(digest())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("before", "after"), [("x.txt", "x.html"), ("x.jsonl", "x.json"), ("x.txt", "x.txt.gz"), ("x.jsonl.gz", "x.jsonl")]
)
def test_a_file_that_is_renamed_to_another_kind_counts(tmp_path: Path, before: str, after: str) -> None:
    def digest() -> str:
        return Externals().source(SourceConfig(path=str(tmp_path), format="document"), "prepare.corpus").digest

    (tmp_path / before).write_text('{"text": "x"}\n')
    seen = digest()
    (tmp_path / before).rename(tmp_path / after)
    assert digest() != seen


def test_a_source_that_every_arm_asks_for_is_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.csv").write_text("x")
    outside = Externals()
    with caplog.at_level("INFO"):
        first, again = (outside.source(SourceConfig(path=str(tmp_path)), "prepare.corpus") for _ in range(2))
    assert first is again
    assert caplog.messages == [f"{tmp_path}: 1 of its 2 files are left out, b.csv among them"]


def test_a_setting_that_wants_one_file_takes_no_folder_of_more(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    found = Externals().file(str(tmp_path / "a.jsonl"), "evaluate.forward_questions")
    assert found.path == str(tmp_path / "a.jsonl")
    assert found.digest == Externals().file(str(tmp_path / "b.jsonl"), "x").digest
    with pytest.raises(UsageError, match=r"evaluate\.forward_questions: .* holds 2 files; name one"):
        Externals().file(str(tmp_path), "evaluate.forward_questions")
    with pytest.raises(UsageError, match=r"forward\.rating_replay\.path: there is no file"):
        Externals().file(str(tmp_path / "c.jsonl"), "forward.rating_replay.path")


@pytest.mark.parametrize(("has_gpus", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_models_that_others_load_are_planned_for_what_those_have(model: Path, has_gpus: bool, dtype: str) -> None:
    asked = ModelConfig(path=str(model), dtype="bfloat16")
    assert Externals(has_gpus=has_gpus).model(asked, "model.path")[0].dtype == dtype
