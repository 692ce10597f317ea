"""Every recipe: it parses and plans, and runs on its real files, training both directions in its own precision and
with its own batches, epochs and schedule on tiny models of its own architectures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfalign.cli import main
from selfalign.demo.base import base_folder
from selfalign.recipe import load
from selfalign.training.config import refuse_contradictions
from selfalign.training.schedules import humpback, scheduled
from shapes import SHAPES, tiny

RECIPES = Path(__file__).parents[1] / "recipes"
# Random weights cannot rate; that the gates notice it has a test of its own.
OPEN_GATES = ("curate.threshold=1", "curate.max_off_scale=1", "curate.min_auc=0", "curate.min_rated=0")
# Few rows, so that the recipe's own epochs are a few steps.
FEW = ("prepare.seed.held_out=4", "prepare.corpus.sample=6")
# And they never end a reply, which makes each of them over_long.
SHORT = (
    "augment.max_new_tokens=16",
    "augment.filters=[empty]",
    "evaluate.max_new_tokens=8",
    "evaluate.samples=2",
    "curate.reasoning_tokens=8",
)


@dataclass(frozen=True)
class Real:
    """The files that stand for a recipe's data, and what its `prepare` steps must count: (in, kept, dropped)."""

    seed: str
    corpus: str
    counts: dict[str, tuple[int, int, dict[str, int]]]
    overrides: tuple[str, ...] = ()


GUANACO = {
    "read_seed": (953, 953, {}),
    "filter_seed": (953, 953, {}),
    "pick_seed": (953, 16, {"not_sampled": 937}),
}
OASST = {"read_seed": (333, 333, {}), "filter_seed": (333, 95, {"rank": 231, "too_short": 7})}
LIMA = {
    "read_corpus": (1030, 1000, {"multi_turn": 29, "odd_turns": 1}),
    "filter_corpus": (1000, 1000, {}),
}
# Short ones, for the suite's time.
SHORT_LIMA = {
    **LIMA,
    "filter_corpus": (1000, 469, {"too_long": 531}),
    "pick_corpus": (469, 6, {"not_sampled": 463}),
}
SHORT_DOCUMENTS = "prepare.corpus.max_chars=1500"
HTML = {
    "read_corpus": (594, 593, {"no_text": 1}),
    "filter_corpus": (593, 169, {"header_all_caps": 1, "repetitive": 19, "too_long": 63, "too_short": 341}),
    "pick_corpus": (169, 6, {"nested": 9, "not_sampled": 154}),
}
REAL = {
    "lima150-llama3.1-8b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        {**GUANACO, **SHORT_LIMA},
        ("prepare.seed.sample=16", SHORT_DOCUMENTS),
    ),
    "lima150-llama2-7b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        # A quarter of the responses is between the first quartile and the median.
        {**GUANACO, **LIMA, "pick_corpus": (1000, 6, {"length_quantiles": 750, "not_sampled": 244})},
        ("prepare.seed.sample=16",),
    ),
    "lima150-smollm2-135m": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        {
            "read_seed": (953, 953, {}),
            # In tokens of the tiny model; of the true one, 323 pairs and 459 responses are short enough.
            "filter_seed": (953, 185, {"language": 534, "too_many_tokens": 234}),
            "pick_seed": (185, 40, {"duplicate": 30, "not_sampled": 115}),
            **LIMA,
            "filter_corpus": (1000, 171, {"too_many_tokens": 829}),
            "pick_corpus": (171, 6, {"not_sampled": 165}),
        },
        # A calibrated rater is fitted on as many held-out pairs at least, and its threshold is a probability.
        # Two threads of a tiny model wait for each other, most of all where other tests run beside this one.
        (
            *("prepare.seed.sample=40", "prepare.seed.held_out=20", "curate.threshold=0", "curate.injections=4"),
            "model.threads=1",
        ),
    ),
    "assignment-llama2-7b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        {**GUANACO, **SHORT_LIMA},
        # Random weights write no score, so nothing that they write could be parsed.
        ("prepare.seed.sample=16", SHORT_DOCUMENTS, "curate.readout=expected"),
    ),
    "oasst-tinyllama-1.1b": Real(
        "oasst/en_100_tree.jsonl",
        "lima/train.jsonl",
        {**OASST, "pick_seed": (95, 16, {"not_top": 79}), **SHORT_LIMA},
        ("prepare.seed.top=16", SHORT_DOCUMENTS),
    ),
    "html-qwen2.5-0.5b": Real(
        "guanaco/oa_questions.jsonl",
        "html/nodejs/*.html",
        {
            "read_seed": (953, 953, {}),
            "filter_seed": (953, 419, {"language": 534}),
            "pick_seed": (419, 16, {"duplicate": 81, "not_top": 322}),
            **HTML,
        },
        ("prepare.seed.top=16", "rounds=1"),
    ),
    "humpback-llama-7b": Real(
        "oasst/en_100_tree.jsonl",
        "html/nodejs/*.html",
        {
            "read_seed": (333, 333, {}),
            "filter_seed": (333, 102, {"rank": 231}),
            "pick_seed": (102, 16, {"not_top": 86}),
            **HTML,
        },
        # Two processes on this machine; the second iteration and the arms do no other work than these.
        ("prepare.seed.top=16", "rounds=1", "arms=null", "backward.num_processes=2", "forward.num_processes=2"),
    ),
}
# These launch processes.
LAUNCHED = {"humpback-llama-7b"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models are, all made: what the libraries say when they are first imported is said here."""
    folder = tmp_path_factory.mktemp("models")
    for published in SHAPES:
        tiny(published, folder)
    return folder


def overrides(name: str, data: Path, models: Path) -> list[str]:
    """The recipe's real files, and tiny models in the place of its own."""
    recipe, real = load(RECIPES / f"{name}.yaml").recipe, REAL[name]
    found = [f"prepare.seed.path={data / real.seed}", f"prepare.corpus.path={data / real.corpus}"]
    found.append(f"model.path={tiny(recipe.model.path, models)}")
    rater = recipe.curate.rater.model
    return found if rater in ("previous", "base") else [*found, f"curate.rater.model={tiny(rater, models)}"]


def command(name: str, settings: Sequence[str], root: Path) -> list[str]:
    return ["run", str(RECIPES / f"{name}.yaml"), *settings, "--run", str(root)]


def steps(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    main(["status", str(root), "--json"])
    return {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


def test_every_shipped_recipe_is_tried_on_real_files() -> None:
    # The demo is, by its own tests.
    assert {path.stem for path in RECIPES.glob("*.yaml")} - {"demo"} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_parses_under_its_own_name_and_plans_with_its_real_files(
    real_data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert load(RECIPES / f"{name}.yaml").recipe.name == name
    path = str(RECIPES / f"{name}.yaml")
    assert main(["plan", path, *overrides(name, real_data, models), "--run", str(tmp_path / "run"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    assert {"prepare.read_seed", "backward.train", "augment.filter", "forward.train@1"} <= {s["name"] for s in planned}
    assert {step["state"] for step in planned} == {"to run"}


def _launched(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.train) if name in LAUNCHED else name


@pytest.mark.slow
@pytest.mark.parametrize("name", [_launched(name) for name in REAL])
def test_a_recipe_runs_on_its_real_files_and_explains_every_dropped_row(
    real_data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings = (*overrides(name, real_data, models), *FEW, *OPEN_GATES, *SHORT, *REAL[name].overrides)
    recipe = load(RECIPES / f"{name}.yaml", settings).recipe
    assert main(command(name, settings, tmp_path / "run")) == 0
    found = steps(tmp_path / "run", capsys)
    for step in found.values():
        assert step["state"] == "done"
        assert step["in"] == step["kept"] + sum(step["rejected"].values()) + sum(step["quarantined"].values())
    for verb, (in_, kept, dropped) in REAL[name].counts.items():
        step = found[f"prepare.{verb}"]
        assert (step["in"], step["kept"], {**step["rejected"], **step["quarantined"]}) == (in_, kept, dropped), verb
    assert found["augment.generate"]["in"] == 6
    assert found["forward.train@1"]["kept"] > 0
    trained = {json.loads(p.read_text())["r"] for p in (tmp_path / "run").rglob("adapter_config.json")}
    assert trained == {recipe.backward.lora_r, recipe.forward.lora_r} - {None}


def test_with_its_gates_a_run_ends_before_time_is_spent_on_training(
    real_data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The demo's base rates, but not such text.
    base = (f"model.path={base_folder()}", f"curate.rater.model={base_folder()}")
    settings = (*overrides("lima150-llama3.1-8b", real_data, models), *base)
    assert main(command("lima150-llama3.1-8b", settings, tmp_path / "run")) == 3
    assert "and curate.min_auc wants 0.65" in capsys.readouterr().err
    found = steps(tmp_path / "run", capsys)
    assert found["curate.calibrate@1"]["state"] == "failed"
    assert found["backward.train"]["state"] == "waiting"


@pytest.mark.parametrize(
    "settings",
    [
        ("model.quantisation=nf4", "backward.lora_r=64", "forward.lora_r=64"),
        (
            "model.quantisation=nf4",
            "backward={lora_r: 64, num_processes: 1, deepspeed: null, learning_rate: 2.0e-4}",
            "forward={lora_r: 64, num_processes: 1, deepspeed: null, learning_rate: 2.0e-4}",
        ),
    ],
)
def test_the_papers_recipe_becomes_qlora_by_the_settings_in_its_comment(settings: tuple[str, ...]) -> None:
    loaded = load(RECIPES / "humpback-llama-7b.yaml", settings)
    for recipe in (loaded.recipe, *loaded.arms.values()):
        for config in (recipe.backward, recipe.forward.training(1)):
            refuse_contradictions(config, recipe.model)
            assert (config.lora_r, config.lora_dropout) == (64, 0.1)
            for rows in (100, 3200, 195_043):
                assert scheduled(config, rows).max_steps == humpback(rows)[1]
