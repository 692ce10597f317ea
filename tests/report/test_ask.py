"""How a trained model is found."""

import json
from pathlib import Path

import pytest

from report.conftest import Run
from selfalign.core.errors import UsageError
from selfalign.report.ask import find


def adapter(base: str) -> str:
    return json.dumps({"base_model_name_or_path": base})


def test_a_folder_of_weights_and_a_hub_name_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in (str(tmp_path), "org/name"):
        config, found = find(name)
        assert (config.path, found) == (name, None)


def test_an_adapter_brings_its_base_and_its_template(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(adapter("org/base"))
    config, found = find(str(tmp_path))
    assert (config.path, config.chat_template, found) == ("org/base", None, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert find(str(tmp_path))[0].chat_template == str(tmp_path / "chat_template.jinja")


@pytest.mark.parametrize("text", ["{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": ""}'])
def test_an_adapter_without_a_base_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match="does not say which base its adapter belongs to"):
        find(str(tmp_path))


def test_a_run_is_asked_by_its_last_main_forward_model(run: Run) -> None:
    folders = {
        k: run.add(f"forward.train@{k}", files={"adapter_config.json": adapter(f"org/base{k}")}) for k in (2, 9, 10)
    }
    run.add("forward.train@11", state="waiting")
    run.add("forward.train@12", arm="other", files={"adapter_config.json": adapter("org/other")})
    config, found = find(str(run.store.root))
    assert config.path == "org/base10"
    assert found == folders[10] / "files"


def test_a_run_trained_in_full_is_asked_by_its_folder(run: Run) -> None:
    folder = run.add("forward.train@1", files={"config.json": "{}"})
    config, found = find(str(run.store.root))
    assert (config.path, found) == (str(folder / "files"), None)


def test_a_run_without_a_model_says_so(run: Run) -> None:
    run.add("forward.train@1", state="waiting")
    with pytest.raises(UsageError, match="has no trained forward model yet"):
        find(str(run.store.root))
