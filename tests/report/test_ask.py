"""How a trained model is found."""

import json
from pathlib import Path

import pytest

from report.conftest import Run
from selfalign.core.errors import UsageError
from selfalign.recipe import Recipe
from selfalign.report.ask import find


def recipe(run: Run) -> None:
    source = {"path": "x.jsonl"}
    model = {"path": "org/base", "quantisation": "nf4", "chat_template": "plain"}
    document = {"name": "a", "model": model, "prepare": {"seed": source, "corpus": source}}
    made = Recipe.model_validate({**document, "evaluate": {"system": "Be brief."}})
    (run.store.root / "recipe.json").write_text(made.model_dump_json())


def adapter(base: str) -> str:
    return json.dumps({"base_model_name_or_path": base})


def test_a_folder_of_weights_and_a_hub_name_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in (str(tmp_path), "org/name"):
        found = find(name)
        assert (found.config.path, found.adapter, found.system) == (name, None, None)


def test_an_adapter_brings_its_base_and_its_template(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(adapter("org/base"))
    found = find(str(tmp_path))
    assert (found.config.path, found.config.chat_template, found.adapter) == ("org/base", None, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert find(str(tmp_path)).config.chat_template == str(tmp_path / "chat_template.jinja")


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
    recipe(run)
    found = find(str(run.store.root))
    assert found.config.path == "org/base10"
    assert found.adapter == folders[10] / "files"
    # As it was evaluated: quantised, and under the recipe's system prompt.
    assert (found.config.quantisation, found.system) == ("nf4", "Be brief.")


def test_a_run_whose_recipe_holds_what_this_version_does_not_know_can_be_asked(run: Run) -> None:
    run.add("forward.train@1", files={"adapter_config.json": adapter("org/base")})
    recipe(run)
    path = run.store.root / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "curate": {"a key of another version": 1}}))
    assert find(str(run.store.root)).system == "Be brief."


def test_a_run_trained_in_full_is_asked_by_its_folder(run: Run) -> None:
    folder = run.add("forward.train@1", files={"config.json": "{}"})
    recipe(run)
    found = find(str(run.store.root))
    assert (found.config.path, found.config.chat_template, found.adapter) == (str(folder / "files"), None, None)


def test_where_a_guard_stopped_the_rounds_the_model_before_is_the_final_one(run: Run) -> None:
    for k in (1, 2):
        run.add(f"forward.train@{k}", files={"config.json": "{}"})
        run.add(f"evaluate.forward@{k}", stop="no better" if k == 2 else None)
    assert run.view().final_round == 1


def test_a_run_without_a_model_says_so(run: Run) -> None:
    run.add("forward.train@1", state="waiting")
    with pytest.raises(UsageError, match="has no trained forward model yet"):
        find(str(run.store.root))


def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no folder runs/demo"):
        find("runs/demo")


@pytest.mark.parametrize("name", ["demo-2", "gpt2", "./demo-2", "/demo-2", "../demo-2", "a/b/c", "notes.txt"])
def test_a_name_that_has_not_the_form_of_the_hubs_is_told_without_asking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no folder {name}; .* org/name"):
        find(name)
