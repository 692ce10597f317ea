"""The transformers engine, on a tiny random Llama."""

import gc
import math
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines.tiny import (
    ENDINGS,
    GREEDY,
    LIMIT,
    RUBRIC,
    SCALE,
    SPECIAL,
    WORDS,
    ask,
    full_logs,
    numbers,
    opened,
    prompt_ids,
    save_model,
    save_tokenizer,
    sentence,
    varied,
)
from selfalign.core.errors import MismatchError, UsageError
from selfalign.core.protocols import STOP, Reply, Request, Sampling
from selfalign.core.records import Message
from selfalign.engines import decoding
from selfalign.engines import transformers as engine_module
from selfalign.engines.chat import common_prefix
from selfalign.engines.transformers import TransformersEngine

# Generation


def test_greedy_replies_equal_transformers_own_generate_one_by_one(engine: TransformersEngine, reference: Any) -> None:
    requests = varied(20)
    replies = engine.generate(requests, GREEDY)
    assert {reply.finish for reply in replies} == {"stop", "length"}
    for request, reply in zip(requests, replies, strict=True):
        ids = torch.tensor([prompt_ids(engine, request)])
        mask = torch.ones_like(ids)
        out = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
        new = out[0, ids.shape[1] :].tolist()
        assert reply.tokens == len(new)
        assert reply.finish == ("stop" if new[-1] in ENDINGS else "length")
        text = engine._chat.tokenizer.decode([t for t in new if t not in ENDINGS], skip_special_tokens=True)
        assert reply.text == text.lstrip()


@pytest.mark.parametrize("slots", [1, 4, 7])
@pytest.mark.parametrize("head", ["", RUBRIC])
def test_replies_do_not_depend_on_the_number_of_slots(
    engine: TransformersEngine, base: Path, slots: int, head: str
) -> None:
    requests = varied(18, head)
    fewer = opened(base, slots=slots)
    for sampling in (GREEDY, Sampling(temperature=1.0, top_p=0.9, max_new_tokens=24)):
        assert fewer.generate(requests, sampling) == engine.generate(requests, sampling)


def test_a_prompt_without_room_for_its_reply_is_too_long_and_the_others_go_on(engine: TransformersEngine) -> None:
    before = engine.tokens
    fits, bursts = ask("hello"), ask("hello " * LIMIT)
    replies = engine.generate([bursts, fits], GREEDY)
    assert replies[0] == Reply("", 0, "too_long")
    assert replies[1] == engine.generate([fits], GREEDY)[0]
    assert engine.tokens - before == 2 * (len(prompt_ids(engine, fits)) + replies[1].tokens)
    exact = Sampling(temperature=0, max_new_tokens=LIMIT - len(prompt_ids(engine, fits)))
    assert engine.generate([fits], exact)[0].finish != "too_long"
    assert engine.generate([fits], exact.model_copy(update={"max_new_tokens": exact.max_new_tokens + 1}))[0].tokens == 0


def test_a_reply_ends_before_a_stop_string(engine: TransformersEngine) -> None:
    requests = varied(12)
    plain = engine.generate(requests, GREEDY)
    at, free = max(enumerate(plain), key=lambda pair: len(pair[1].text))
    stop = free.text[7:10]
    sampling = Sampling(temperature=0, max_new_tokens=24, stop=(stop, "never written"))
    replies = engine.generate(requests, sampling)
    assert replies[at].finish == "stop"
    assert replies[at].text == free.text[: free.text.index(stop)]
    assert replies[at].tokens < free.tokens
    assert all(stop not in reply.text for reply in replies)


# The shared prefix


def test_replies_and_scores_behind_a_shared_prefix_equal_those_without_one(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = varied(12, RUBRIC)
    openings = [Request(r.id, (*r.messages, Message(role="assistant", content="Score:"))) for r in requests]
    ways = [SCALE] * 12
    engine._prefixes.clear()
    replies, scores = engine.generate(requests, GREEDY), engine.score(openings, ways)
    assert len(engine._prefixes) == 1, "both calls share one prefix"
    assert len(next(iter(engine._prefixes))[1]) >= 64
    monkeypatch.setattr(engine_module, "SHORTEST_PREFIX", 10**9)
    assert engine.generate(requests, GREEDY) == replies
    assert numbers(engine.score(openings, ways)) == pytest.approx(numbers(scores), abs=1e-4)


def test_a_call_gives_the_same_bits_whatever_ran_before(engine: TransformersEngine, base: Path) -> None:
    requests = [ask(RUBRIC + text, opening="Score:") for text in ("one", "two", "three")]
    fresh = opened(base).score(requests, [SCALE] * 3)
    engine.score([ask(RUBRIC + text, opening="Score:") for text in ("two a", "two b")], [SCALE] * 2)
    assert engine.score(requests, [SCALE] * 3) == fresh


def test_only_the_last_few_prefixes_are_kept(engine: TransformersEngine) -> None:
    for number in range(7):
        engine.score([ask(f"{number} {RUBRIC}{end}") for end in "ab"], [SCALE] * 2)
    assert len(engine._prefixes) == engine_module.KEPT_PREFIXES


# Few passes


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the rows of each forward pass from now on."""
    seen: list[list[int]] = []
    run = decoding.prefill

    def counted(model: Any, rows: Any, wanted: Any, prefix: Any) -> Any:
        seen.append([len(row) for row in rows])
        return run(model, rows, wanted, prefix)

    monkeypatch.setattr(decoding, "prefill", counted)
    return seen


def spent(passes: list[list[int]]) -> int:
    return sum(map(sum, passes))


def about(document: str, count: int, head: str = "") -> list[Request]:
    """Candidates of one document, which stands before them."""
    rng = random.Random(3)
    texts = [f"{head}Response: {document}\nInstruction: {sentence(rng, 4)}" for _ in range(count)]
    return [ask(text, str(at), opening="Score:") for at, text in enumerate(texts)]


def test_a_text_and_its_end_are_read_from_one_pass(base: Path, passes: list[list[int]]) -> None:
    engine = opened(base)
    requests, said = varied(5), sentence(random.Random(1), 12)
    ways = [[said, said + STOP]] * 5
    scores = engine.score(requests, ways)
    joints = [engine._chat.encode([engine._chat.prompt(request.messages, said)])[0] for request in requests]
    assert sorted(length for rows in passes for length in rows) == sorted(map(len, joints))
    apart = [engine.score([request], [[way]])[0] for request in requests for way in ways[0]]
    assert numbers(scores) == pytest.approx(numbers(apart), abs=1e-4)


def test_calls_with_one_rubric_compute_one_prefix(base: Path, passes: list[list[int]]) -> None:
    engine = opened(base)
    rubric = RUBRIC + "\n\n"
    for word in WORDS[:10]:
        # The pairs of each call begin with another word, which all of the call share.
        engine.score([ask(f"{rubric}{word} {word} {end}", opening="Score:") for end in "abc"], [SCALE] * 3)
    assert len(engine._prefixes) == 1
    ((_, prefix),) = engine._prefixes
    assert engine._chat.decode(prefix).endswith("\n\n")
    assert [rows for rows in passes if max(rows) >= len(prefix)] == [[len(prefix)]]


def test_a_prefix_without_a_line_end_is_used_whole(base: Path) -> None:
    engine = opened(base)
    engine.score([ask(f"{RUBRIC}{end}", opening="Score:") for end in "ab"], [SCALE] * 2)
    ((_, prefix),) = engine._prefixes
    assert engine._chat.decode(prefix).endswith("nothing else.")


@pytest.mark.parametrize("head", ["", RUBRIC + "\n\n"], ids=["no rubric", "rubric"])
def test_candidates_cost_their_document_once_and_score_as_they_do_alone(
    base: Path, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    engine = opened(base)
    rng = random.Random(8)
    documents = [sentence(rng, 80), sentence(rng, 90)]
    requests = [request for document in documents for request in about(document, 6, head)]
    rng.shuffle(requests)
    ways = [[*SCALE, " 5" + STOP]] * len(requests)
    together = engine.score(requests, ways)
    grouped = spent(passes)
    cost = 0
    for document in documents:
        prompts = [prompt_ids(engine, request) for request in requests if document in request.messages[0]["content"]]
        shared = common_prefix(prompts)
        # A candidate adds its own tokens, and the grade whose end is scored.
        cost += shared + sum(len(prompt) - shared + 1 for prompt in prompts)
    assert grouped <= cost
    passes.clear()
    monkeypatch.setattr(engine_module, "PASS_TOKENS", {"cpu": 10**9})
    apart = engine.score(requests, ways)
    assert spent(passes) > 1.5 * grouped
    assert numbers(together) == pytest.approx(numbers(apart), abs=1e-4)
    assert numbers(together) == pytest.approx(
        [score.log_prob for request in requests for score in engine.score([request], ways[:1])[0] or []], abs=1e-4
    )


def test_long_continuations_of_one_request_share_it(base: Path, passes: list[list[int]]) -> None:
    engine = opened(base)
    rng = random.Random(9)
    request, ways = ask(sentence(rng, 80)), [sentence(rng, 6) for _ in range(5)]
    (together,) = engine.score([request], [ways])
    assert spent(passes) < 1.5 * len(prompt_ids(engine, request))
    apart = [engine.score([request], [[way]])[0] for way in ways]
    assert numbers([together]) == pytest.approx(numbers(apart), abs=1e-4)


def test_candidates_of_one_prompt_read_it_once_and_are_drawn_each_by_its_seed(
    base: Path, passes: list[list[int]]
) -> None:
    engine = opened(base, slots=4)
    prompts = varied(5)
    requests = [Request(f"{r.id}/{n}", r.messages, r.seed + n) for n in range(3) for r in prompts]
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    replies = engine.generate(requests, sampling)
    assert spent(passes) == sum(len(prompt_ids(engine, request)) for request in prompts)
    assert [engine.generate([request], sampling)[0] for request in requests] == replies
    assert len({reply.text for reply in replies}) > 10


def test_a_documents_keys_and_values_are_freed_after_its_candidates(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(base)
    living: list[weakref.ref[Any]] = []
    most = 0
    run = decoding.prefill

    def watched(model: Any, rows: Any, wanted: Any, prefix: Any) -> Any:
        nonlocal most
        logits, cache = run(model, rows, wanted, prefix)
        living.append(weakref.ref(cache))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in living))
        return logits, cache

    monkeypatch.setattr(decoding, "prefill", watched)
    rng = random.Random(8)
    requests = [request for _ in range(8) for request in about(sentence(rng, 60), 4)]
    engine.score(requests, [SCALE] * len(requests))
    assert len(living) > 8
    assert most <= 3


# Scores


def test_a_score_is_the_log_probability_of_the_joint_texts_last_tokens(
    engine: TransformersEngine, reference: Any
) -> None:
    requests = [Request(r.id, (*r.messages, Message(role="assistant", content="Score:"))) for r in varied(6)]
    for request, scores in zip(requests, engine.score(requests, [SCALE] * 6), strict=True):
        ids = prompt_ids(engine, request)
        logs = full_logs(reference, ids)[-1]
        assert scores is not None
        for way, score in zip(SCALE, scores, strict=True):
            (token,) = engine._chat.encode([way])[0]
            assert score.tokens == 1
            assert score.log_prob == pytest.approx(logs[token].item(), abs=1e-4)
        assert 0 < sum(math.exp(score.log_prob) for score in scores) < 1


def test_a_space_belongs_to_the_token_it_merges_with_wherever_the_text_is_cut(engine: TransformersEngine) -> None:
    cut_before = engine.score([ask("rate", opening="Score:")], [SCALE])
    cut_after = engine.score([ask("rate", opening="Score: ")], [[way.strip() for way in SCALE]])
    assert cut_before == cut_after


def test_long_continuations_are_summed_over_all_their_tokens(engine: TransformersEngine, reference: Any) -> None:
    rng = random.Random(5)
    requests = varied(7)
    replies = [[sentence(rng, rng.randint(1, 30))] for _ in requests]
    replies[3] = ["one thing", "quite another thing", "one"]
    for request, ways, scores in zip(requests, replies, engine.score(requests, replies), strict=True):
        prompt = prompt_ids(engine, request)
        assert scores is not None
        for way, score in zip(ways, scores, strict=True):
            joint = engine._chat.encode([engine._chat.prompt(request.messages, way)])[0]
            assert joint[: len(prompt)] == prompt, "the template's cue is a token boundary"
            logs = full_logs(reference, joint)
            start = len(joint) - score.tokens
            total = sum(logs[at - 1, joint[at]].item() for at in range(start, len(joint)))
            assert score.log_prob == pytest.approx(total, abs=1e-3)
            assert start == len(prompt) or len(ways) > 1


def test_a_score_does_not_depend_on_what_else_was_asked(engine: TransformersEngine) -> None:
    request, ways = ask("say", opening="I think"), [" the ships", " the bread", " the", " the" + STOP, STOP]
    (together,) = engine.score([request], [ways])
    apart = [engine.score([request], [[way]])[0] for way in ways]
    assert numbers([together]) == pytest.approx(numbers(apart), abs=1e-4)
    assert [score.tokens for score in together or []] == [scores[0].tokens for scores in apart if scores]


def test_the_end_of_a_turn_is_scored_by_the_token_that_the_template_writes(
    engine: TransformersEngine, reference: Any
) -> None:
    ((without, ended),) = engine.score([ask("say")], [["bread and ships", "bread and ships" + STOP]])
    joint = engine._chat.encode(["<s>User: say\n\nAssistant: bread and ships</s>"])[0]
    assert joint[-1] == 1
    logs = full_logs(reference, joint)
    assert ended.log_prob - without.log_prob == pytest.approx(logs[-2, 1].item(), abs=1e-3)
    assert ended.tokens == without.tokens + 1


def test_an_empty_continuation_is_certain_and_a_repeated_one_scores_the_same(engine: TransformersEngine) -> None:
    (empty,) = engine.score([ask("say", opening="Score:")], [[""]])
    assert [(score.log_prob, score.tokens) for score in empty or []] == [(0.0, 0)]
    (twice,) = engine.score([ask("say", opening="Score:")], [[" 1", " 1"]])
    assert twice is not None
    assert twice[0] == twice[1]


def test_a_reply_can_be_scored_without_any_instruction(engine: TransformersEngine, reference: Any) -> None:
    ((score,),) = engine.score([Request("a", ())], [["bread and ships"]])
    joint = engine._chat.encode(["<s>Assistant: bread and ships"])[0]
    start = len(engine._chat.encode(["<s>Assistant:"])[0])
    logs = full_logs(reference, joint)
    total = sum(logs[at - 1, joint[at]].item() for at in range(start, len(joint)))
    assert score.log_prob == pytest.approx(total, abs=1e-3)


def test_a_stop_token_in_the_text_of_a_continuation_is_text(engine: TransformersEngine, reference: Any) -> None:
    request = ask("say", opening="bread")
    ((written, stop),) = engine.score([request], [["</s>", STOP]])
    logs = full_logs(reference, prompt_ids(engine, request))
    assert stop.log_prob == pytest.approx(logs[-1, 1].item(), abs=1e-4)
    assert written.tokens > 1


def test_a_text_without_room_scores_none_and_the_others_go_on(engine: TransformersEngine) -> None:
    scores = engine.score([ask("x " * LIMIT, opening="Score:"), ask("x", opening="Score:")], [SCALE, SCALE])
    assert scores[0] is None
    assert scores[1] == engine.score([ask("x", opening="Score:")], [SCALE])[0]


@pytest.mark.parametrize("opening", ["The answer", "Line\n\n- item:", "Score:", "  indented é", "Score: "])
def test_a_reply_continues_an_opening_exactly(engine: TransformersEngine, reference: Any, opening: str) -> None:
    request = ask("say", opening=opening)
    assert engine._chat.prompt(request.messages) == "<s>User: say\n\nAssistant: " + opening
    ids = torch.tensor([prompt_ids(engine, request)])
    mask = torch.ones_like(ids)
    out = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)[0].tolist()
    whole = engine._chat.tokenizer.decode(out[:-1] if out[-1] in ENDINGS else out, skip_special_tokens=True)
    (reply,) = engine.generate([request], GREEDY)
    assert "User: say\n\nAssistant: " + opening + reply.text == whole


def test_a_template_that_refuses_a_conversation_says_so(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusal + SPECIAL)
    engine = opened(base, chat_template=str(template))
    with pytest.raises(MismatchError, match=r"refuses.*system, user.*no system role"):
        engine.generate(
            [Request("a", (Message(role="system", content="s"), Message(role="user", content="u")))], GREEDY
        )


# Adapters


def save_adapter(base: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """An adapter with weights large enough to matter; its merged model goes to folder/merged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **changes}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    peft.save_pretrained(folder)
    peft.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_adapter(base, tmp_path_factory.mktemp("adapter"), seed) for seed in (1, 2)]


def test_an_adapter_gives_the_merged_models_scores_and_leaves_the_base_as_it_was(
    base: Path, adapters: list[Path]
) -> None:
    engine = opened(base)
    requests = [ask(RUBRIC + text, opening="Score:") for text in ("bread", "ships", "lights")]
    ways = [SCALE] * 3
    plain = engine.score(requests, ways)
    seen = []
    for folder in (*adapters, adapters[0]):
        scores = engine.score(requests, ways, folder)
        merged = opened(folder / "merged")
        assert numbers(scores) == pytest.approx(numbers(merged.score(requests, ways)), abs=1e-4)
        assert engine.generate(requests, GREEDY, folder) == merged.generate(requests, GREEDY)
        assert engine.score(requests, ways) == plain
        seen.append(scores)
    assert seen[0] == seen[2]
    assert max(abs(a - b) for a, b in zip(numbers(seen[0]), numbers(seen[1]), strict=True)) > 0.1


def test_an_adapter_of_another_model_is_refused_and_the_engine_goes_on(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    wider, deeper = tmp_path / "wider", tmp_path / "deeper"
    save_tokenizer(wider)
    save_model(wider, hidden_size=96)
    save_tokenizer(deeper)
    save_model(deeper, num_hidden_layers=3)
    named = save_adapter(base, tmp_path / "named", 3)
    config = named / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "query").replace("v_proj", "w").replace("down_proj", "z"))
    engine = opened(base)
    requests, ways = [ask("bread", opening="Score:")], [SCALE]
    plain = engine.score(requests, ways)
    for other in (wider, deeper):
        stranger = save_adapter(other, tmp_path / f"{other.name}-adapter", 1)
        with pytest.raises(MismatchError, match=r"does not fit the model .* was trained on"):
            engine.score(requests, ways, stranger)
        assert engine.score(requests, ways) == plain
    with pytest.raises(MismatchError, match="does not fit"):
        engine.score(requests, ways, named)
    assert engine.score(requests, ways) == plain
    with pytest.raises(UsageError, match="no adapter_config"):
        engine.score(requests, ways, base)
    assert engine.score(requests, ways, adapters[0]) == opened(base).score(requests, ways, adapters[0])


# Loading and closing


def test_a_base_quantised_to_four_bits_generates_and_scores_with_an_adapter(base: Path, adapters: list[Path]) -> None:
    pytest.importorskip("bitsandbytes")
    engine = opened(base, quantisation="nf4")
    requests = [ask(RUBRIC + text, opening="Score:") for text in ("bread", "ships")]
    assert all(reply.tokens for reply in engine.generate(requests, GREEDY))
    scores = engine.score(requests, [SCALE] * 2)
    assert all(0 < sum(math.exp(score.log_prob) for score in row or []) < 1 for row in scores)
    assert engine.score(requests, [SCALE] * 2, adapters[0]) != scores
    assert engine.score(requests, [SCALE] * 2) == scores


def test_tokens_count_prompts_and_what_was_written(base: Path) -> None:
    engine = opened(base)
    requests = varied(3)
    replies = engine.generate(requests, GREEDY)
    prompts = sum(len(prompt_ids(engine, request)) for request in requests)
    assert engine.tokens == prompts + sum(reply.tokens for reply in replies)
    engine.tokens = 0
    engine.score([ask("say", opening="Score:")], [SCALE])
    assert engine.tokens == len(prompt_ids(engine, ask("say", opening="Score:"))) + 5


def test_a_model_whose_layers_keep_no_cache_is_refused() -> None:
    text = SimpleNamespace(layer_types=["full_attention", "linear_attention"], max_position_embeddings=8)
    config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(MismatchError, match="linear_attention"):
        engine_module._positions("a model", SimpleNamespace(config=config))  # type: ignore[arg-type]
