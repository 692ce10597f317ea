"""The benchmark of rating and generation on a GPU: all of it that can run without one, on a tiny shape."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from selfalign.engines.chat import Chat, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer
from selfalign.stages.prompting import chat

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu_inference")


@pytest.fixture(scope="module")
def tiny(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    gpu = importlib.import_module("gpu")
    shape = gpu.shape_of(gpu.LLAMA, 1024, 64, 128, 2, 4, 2)
    model: ModelConfig = bench.write_model(shape, tmp_path_factory.mktemp("tiny") / "model")
    return model.model_copy(update={"dtype": "float32"})


@pytest.fixture(scope="module")
def load(bench: ModuleType) -> Any:
    return bench.Load(shared=90, own=40, pairs=6, document=60, new=8, documents=10, slots=4)


def test_the_line_is_the_one_of_the_goals(bench: ModuleType) -> None:
    # PERFORMANCE: 8B in bfloat16 on A800 and on H100.
    lines = [bench.line(bench.SHAPES["llama3.1-8b"], bench.Load(), bench.peak_of(card)) for card in ("A800", "H100")]
    assert [line.pairs_s for line in lines] == pytest.approx([26.8, 85], rel=0.01)
    assert [line.documents_s for line in lines] == pytest.approx([16.5, 49], rel=0.03)


def test_prompts_have_as_many_tokens_as_the_load_says(bench: ModuleType, tiny: ModelConfig, load: Any) -> None:
    texts = bench.texts_of(tiny, load)
    encode = Chat(load_tokenizer(tiny))
    pairs = encode.encode([encode.prompt(texts.prompt.messages(x, y)) for _, x, y in texts.pairs])
    # A word at the start of a line may be two tokens.
    assert all(130 <= len(ids) <= 134 for ids in pairs)
    assert 80 <= common_prefix(pairs) <= 90
    documents = encode.encode([encode.prompt(chat(text)) for text in texts.documents])
    assert all(60 <= len(ids) <= 62 for ids in documents)
    told = bench.prompts_of(tiny, texts)
    assert told["generate"] == documents
    assert all(longer[:120] == ids[:120] for longer, ids in zip(told["rate"], pairs, strict=True))


def test_both_are_measured_and_shares_of_the_line_follow(
    bench: ModuleType, tiny: ModelConfig, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    sides = bench.by_turns(tiny, load, tmp_path)
    assert set(sides) == ({"ours", "bare vLLM"} if importlib.util.find_spec("vllm") else {"ours"})
    assert sides["ours"].pairs_s > 0
    assert sides["ours"].documents_s > 0
    assert sides["ours"].right > 0.6
    assert bench.table_of(sides, None).row_count == len(sides)
    assert bench.table_of(sides, sides["ours"]).row_count == len(sides)


def test_vllm_is_given_the_same_tokens(
    bench: ModuleType, tiny: ModelConfig, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    class LLM:
        def __init__(self, **settings: Any) -> None:
            assert settings["enable_prefix_caching"]
            assert settings["max_num_seqs"] == 4

        def generate(self, prompts: list[dict[str, list[int]]], how: Any, use_tqdm: bool) -> list[Any]:
            seen.append((len(prompts), how.max_tokens))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * how.max_tokens)])] * len(prompts)

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    tokens = tmp_path / "prompts.json"
    told = {**bench.prompts_of(tiny, bench.texts_of(tiny, load)), "load": bench.asdict(load)}
    tokens.write_text(bench.json.dumps(told))
    speed = bench.Speed(**bench.vllm(tiny.path, str(tokens))())
    assert seen[1:] == [(6, 1), (10, 8)]
    assert speed.right == 1


@pytest.mark.parametrize(
    ("ours", "vllm", "met"),
    [
        ((7.0, 7.0, 1.0), None, (True, True)),
        ((7.0, 5.0, 1.0), None, (True, False)),
        ((7.0, 7.0, 1.0), (7.5, 9.0, 1.0), (True, False)),
        ((7.0, 7.0, 0.9), None, (False, False)),
    ],
)
def test_a_goal_is_met_near_the_line_and_near_vllm(
    bench: ModuleType, ours: tuple[float, ...], vllm: tuple[float, ...] | None, met: tuple[bool, bool]
) -> None:
    sides = {"ours": bench.Speed(*ours)} | ({"bare vLLM": bench.Speed(*vllm)} if vllm else {})
    made = bench.results(sides, bench.Speed(10.0, 10.0, 1.0), "a card")
    assert tuple(result.is_met for result in made) == met
    assert [result.row for result in made] == ["gpu_rating", "gpu_generation"]
    assert ("not compared" in made[0].check) == (vllm is None)


def test_without_a_gpu_it_says_so_and_measures_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main([]) == 0
    assert capsys.readouterr().out == "there is no GPU here: nothing was measured\n"
    with pytest.raises(SystemExit):
        bench.main(["gpt-5"])
