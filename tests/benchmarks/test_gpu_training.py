"""The benchmark of training on a GPU: all of it that can run without one, on a tiny shape."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from selfalign.engines.adapters import skeleton
from selfalign.engines.config import ModelConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu_training")


@pytest.fixture(scope="module")
def tiny(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    shapes = importlib.import_module("gpu")
    shape = shapes.shape_of(shapes.LLAMA, 1024, 64, 128, 2, 4, 2)
    model: ModelConfig = bench.write_model(shape, tmp_path_factory.mktemp("tiny") / "model")
    return model.model_copy(update={"quantisation": "nf4"})


def test_the_written_shapes_have_the_published_numbers_of_parameters(bench: ModuleType, tmp_path: Path) -> None:
    published = {
        "llama3.1-8b": 8.03e9,
        "llama2-7b": 6.74e9,
        "tinyllama-1.1b": 1.10e9,
        "qwen2.5-0.5b": 0.494e9,
        "smollm2-135m": 0.1345e9,
    }
    assert set(published) == set(bench.SHAPES)
    for name, number in published.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(bench.json.dumps(bench.SHAPES[name]))
        shape = skeleton(ModelConfig(path=str(folder)))
        assert sum(p.numel() for p in shape.parameters()) == pytest.approx(number, rel=0.003)


def test_the_line_is_the_one_of_the_goals(bench: ModuleType) -> None:
    # PERFORMANCE: 8B in bfloat16 on A800 and on H100, with full checkpointing and without.
    shape = bench.SHAPES["llama3.1-8b"]
    free = bench.QLORA.model_copy(update={"gradient_checkpointing": False})
    found = [bench.line(shape, config, peak) for config in (bench.QLORA, free) for peak in (312e12, 989e12)]
    assert found == pytest.approx([3.3e3, 10.5e3, 5.0e3, 15.8e3], rel=0.02)


def test_both_sides_train_the_same_rows_and_count_their_tokens(
    bench: ModuleType, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench.QLORA.model_copy(update={"max_steps": 4, "max_length": 128, "per_device_train_batch_size": 2})
    examples = bench.made_up(24, 40)
    for side in (bench.ours, bench.plain_trl):
        measured = side(tiny, config, examples)
        assert measured.tokens_s > 0
        assert measured.peak_bytes == 0
    monkeypatch.setattr(bench, "QLORA", config)
    monkeypatch.setattr(bench, "ROWS", 24)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    assert set(bench.by_turns(tiny, bench.monotonic() + 600)) == {"ours", "plain TRL"}
    assert bench.by_turns(tiny, bench.monotonic()) == {}


def test_every_recipe_with_a_model_of_the_hub_belongs_to_a_shape(bench: ModuleType) -> None:
    found = {recipe for shape in bench.SHAPES for recipe in bench.recipes_of(shape)}
    assert found == {path.stem for path in bench.RECIPES.glob("*.yaml")} - {"demo"}


def test_each_recipe_is_expected_to_fit_the_card_that_it_is_for(bench: ModuleType, tmp_path: Path) -> None:
    for shape in bench.SHAPES:
        folder = tmp_path / shape
        folder.mkdir()
        (folder / "config.json").write_text(bench.json.dumps(bench.SHAPES[shape]))
        bare = skeleton(ModelConfig(path=str(folder)))
        for recipe in bench.recipes_of(shape):
            whole = bench.load(bench.RECIPES / f"{recipe}.yaml", []).recipe
            for config in (whole.backward, whole.forward):
                rows = config.per_device_train_batch_size
                batch = bench.Batch(
                    rows, config.max_length, rows * config.max_length, config.packing, not config.packing
                )
                expected = bench.estimate(whole.model, config, batch, bare)
                assert expected.peak < bench.CARDS_GIB.get(recipe, 80) * bench.GIB, (recipe, expected)


def test_a_recipe_runs_at_its_own_settings_on_rows_of_full_length(
    bench: ModuleType, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = bench._few_steps
    short = {"max_length": 64, "gradient_accumulation_steps": 1}
    monkeypatch.setattr(bench, "_few_steps", lambda config, steps: few(config, steps).model_copy(update=short))
    fit = bench.fits("lima150-llama2-7b", tiny, steps=2)
    assert (fit.peak_bytes, fit.outcome) == (0, "fits")
    assert fit.expected.peak > 0
    table = bench._memory_table()
    bench._add(table, fit)
    assert table.row_count == 1


def test_without_a_gpu_it_says_so_and_measures_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main([]) == 0
    assert capsys.readouterr().out == "there is no GPU here: nothing was measured\n"
    with pytest.raises(SystemExit):
        bench.main(["gpt-5"])
    assert "no shape gpt-5; there are llama3.1-8b" in capsys.readouterr().err
