"""Every recipe: it parses and plans, and runs on its real files. With the tiny base counts mean something, quality
nothing."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfalign.cli import main
from selfalign.demo.base import base_folder
from selfalign.recipe import load

RECIPES = Path(__file__).parents[1] / "recipes"
# The tiny base cannot rate real text; that the gates notice it has a test of its own.
OPEN_GATES = ("curate.threshold=1", "curate.max_off_scale=1", "curate.min_auc=0", "curate.min_rated=0")
SMALL = (
    "prepare.seed.held_out=8",
    *(
        f"{direction}.{key}"
        for direction in ("backward", "forward")
        for key in ("max_steps=5", "per_device_train_batch_size=2", "gradient_accumulation_steps=1")
    ),
)
SHORT = ("augment.max_new_tokens=16", "evaluate.max_new_tokens=8", "evaluate.samples=2", "curate.reasoning_tokens=8")


@dataclass(frozen=True)
class Real:
    """The files that stand for a recipe's data, and what its `prepare` steps must count: (in, kept, dropped)."""

    seed: str
    corpus: str
    counts: dict[str, tuple[int, int, dict[str, int]]]
    overrides: tuple[str, ...] = ()


GUANACO = {"read_seed": (953, 953, {}), "filter_seed": (953, 953, {}), "pick_seed": (953, 953, {})}
LIMA = {
    "read_corpus": (1030, 1000, {"multi_turn": 29, "odd_turns": 1}),
    "filter_corpus": (1000, 1000, {}),
}
REAL = {
    "lima150-llama3.1-8b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        {**GUANACO, **LIMA, "pick_corpus": (1000, 12, {"not_sampled": 988})},
        ("prepare.corpus.sample=12",),
    ),
    "lima150-llama2-7b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        # A quarter of the responses is between the first quartile and the median.
        {**GUANACO, **LIMA, "pick_corpus": (1000, 12, {"length_quantiles": 750, "not_sampled": 238})},
        ("prepare.corpus.sample=12",),
    ),
    "assignment-llama2-7b": Real(
        "guanaco/oa_questions.jsonl",
        "lima/train.jsonl",
        {**GUANACO, **LIMA, "pick_corpus": (1000, 12, {"not_sampled": 988})},
        # The tiny base writes no score, so nothing that it writes could be parsed.
        ("prepare.corpus.sample=12", "curate.readout=expected"),
    ),
    "oasst-tinyllama-1.1b": Real(
        "oasst/en_100_tree.jsonl",
        "lima/train.jsonl",
        {
            "read_seed": (333, 333, {}),
            "filter_seed": (333, 95, {"rank": 231, "too_short": 7}),
            **LIMA,
            "pick_corpus": (1000, 12, {"not_sampled": 988}),
        },
        ("prepare.corpus.sample=12",),
    ),
    "html-qwen2.5-0.5b": Real(
        "guanaco/oa_questions.jsonl",
        "html/nodejs/*.html",
        {
            "read_seed": (953, 953, {}),
            "filter_seed": (953, 419, {"language": 534}),
            "pick_seed": (419, 338, {"duplicate": 81}),
            "read_corpus": (594, 593, {"no_text": 1}),
            "filter_corpus": (593, 169, {"header_all_caps": 1, "repetitive": 19, "too_long": 63, "too_short": 341}),
            "pick_corpus": (169, 12, {"nested": 9, "not_sampled": 148}),
        },
        ("prepare.corpus.sample=12", "rounds=1"),
    ),
}


def overrides(name: str, data: Path) -> list[str]:
    """The recipe's real files, and the tiny base in the place of its models."""
    base, real = base_folder(), REAL[name]
    found = [f"model.path={base}", f"prepare.seed.path={data / real.seed}", f"prepare.corpus.path={data / real.corpus}"]
    rater = load(RECIPES / f"{name}.yaml").recipe.curate.rater.model
    return found if rater in ("previous", "base") else [*found, f"curate.rater.model={base}"]


def command(name: str, data: Path, root: Path, *more: str) -> list[str]:
    return ["run", str(RECIPES / f"{name}.yaml"), *overrides(name, data), *more, "--run", str(root)]


def steps(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    main(["status", str(root), "--json"])
    return {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


def test_every_shipped_recipe_is_tried_on_real_files() -> None:
    # The demo is, by its own tests.
    assert {path.stem for path in RECIPES.glob("*.yaml")} - {"demo"} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_parses_under_its_own_name_and_plans_with_its_real_files(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert load(RECIPES / f"{name}.yaml").recipe.name == name
    path = str(RECIPES / f"{name}.yaml")
    assert main(["plan", path, *overrides(name, real_data), "--run", str(tmp_path / "run"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    assert {"prepare.read_seed", "backward.train", "augment.filter", "forward.train@1"} <= {s["name"] for s in planned}
    assert {step["state"] for step in planned} == {"to run"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_recipe_runs_on_its_real_files_and_explains_every_dropped_row(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    more = (*REAL[name].overrides, *OPEN_GATES, *SMALL, *SHORT)
    assert main(command(name, real_data, tmp_path / "run", *more)) == 0
    found = steps(tmp_path / "run", capsys)
    for step in found.values():
        assert step["state"] == "done"
        assert step["in"] == step["kept"] + sum(step["rejected"].values()) + sum(step["quarantined"].values())
    for verb, (in_, kept, dropped) in REAL[name].counts.items():
        step = found[f"prepare.{verb}"]
        assert (step["in"], step["kept"], {**step["rejected"], **step["quarantined"]}) == (in_, kept, dropped), verb
    assert found["augment.generate"]["in"] == 12
    assert found["forward.train@1"]["kept"] > 0


def test_with_its_gates_a_run_ends_before_time_is_spent_on_training(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("lima150-llama3.1-8b", real_data, tmp_path / "run")) == 3
    assert "and curate.min_auc wants 0.65" in capsys.readouterr().err
    found = steps(tmp_path / "run", capsys)
    assert found["curate.calibrate@1"]["state"] == "failed"
    assert found["backward.train"]["state"] == "waiting"
