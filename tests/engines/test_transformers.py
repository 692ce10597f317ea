"""The transformers engine, on a tiny random Llama with a byte-level tokenizer of its own."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfalign.core.errors import InternalError, MismatchError, UsageError
from selfalign.core.protocols import Reply, Request, Sampling
from selfalign.core.records import Message
from selfalign.engines import transformers as engine_module
from selfalign.engines.chat import Chat
from selfalign.engines.config import ModelConfig
from selfalign.engines.decoding import Row, Slots, cached, choose, prefill
from selfalign.engines.loading import load_tokenizer
from selfalign.engines.transformers import TransformersEngine

TEXT = (
    "write a short letter to the mayor about lights in our street explain why seven ships left harbour before winter "
    "list three ways of keeping bread fresh and say which one is best Score: 1 2 3 4 5 what does this program print"
)
WORDS = TEXT.split()
RUBRIC = "Rate how well the answer fits the question, from 1 to 5, and say nothing else. " * 4
SCALE = [" 1", " 2", " 3", " 4", " 5"]
GREEDY = Sampling(temperature=0, max_new_tokens=24)
LIMIT = 512
# Several ending tokens, so that random replies end at different lengths.
ENDINGS = [1, *range(300, 312)]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def ask(text: str, id: str = "a", seed: int = 0, opening: str | None = None) -> Request:
    messages = (Message(role="user", content=text),)
    if opening is not None:
        messages = (*messages, Message(role="assistant", content=opening))
    return Request(id, messages, seed)


def varied(count: int, head: str = "") -> list[Request]:
    rng = random.Random(7)
    return [ask(head + sentence(rng, rng.randint(2, 60)), str(at), seed=at * 1_000_003) for at in range(count)]


def save_tokenizer(folder: Path, *special: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<s>", "</s>", *special]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS), RUBRIC, "User: hello\n\nAssistant: hi"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_model(folder: Path, **changes: Any) -> None:
    shape = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LIMIT,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    model.generation_config.eos_token_id = ENDINGS
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder)
    save_model(folder)
    return folder


def opened(base: Path, **changes: Any) -> TransformersEngine:
    settings = {"path": str(base), "chat_template": "plain", "dtype": "float32", **changes}
    return TransformersEngine(ModelConfig(**settings))


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[TransformersEngine]:
    engine = opened(base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def prompt_ids(engine: TransformersEngine, request: Request) -> list[int]:
    return engine._chat.encode([engine._chat.prompt(request.messages)])[0]


def full_logs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def numbers(scores: list[Any]) -> list[float]:
    return [score.log_prob for row in scores for score in row]


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


def test_sampled_replies_follow_the_rows_seed_and_not_its_place(engine: TransformersEngine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
    requests = varied(10)
    together = engine.generate(requests, sampling)
    assert engine.generate(requests[::-1], sampling)[::-1] == together
    assert [engine.generate([request], sampling)[0] for request in requests] == together
    others = [Request(r.id, r.messages, r.seed + 1) for r in requests]
    differing = sum(a != b for a, b in zip(engine.generate(others, sampling), together, strict=True))
    assert differing >= 8


def test_a_shorter_limit_gives_the_beginning_of_the_same_reply(engine: TransformersEngine) -> None:
    long, short = (Sampling(temperature=0.8, max_new_tokens=limit) for limit in (24, 6))
    for a, b in zip(engine.generate(varied(6), long), engine.generate(varied(6), short), strict=True):
        assert a.text.startswith(b.text.rstrip("�"))


def drawn(logits: list[float], sampling: Sampling, draws: int = 4000) -> Counter[int]:
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(1)).tolist()
    return Counter(choose(torch.tensor([logits]).expand(draws, -1), sampling, noise))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_temperature_says(temperature: float) -> None:
    logits = [1.0, 0.0, -1.0, 2.0]
    counts = drawn(logits, Sampling(temperature=temperature, top_p=1))
    wanted = torch.tensor([x / temperature for x in logits]).softmax(-1).tolist()
    assert all(abs(counts[token] / 4000 - p) < 0.03 for token, p in enumerate(wanted))


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_top_k_the_first_k() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.45))) == {1}
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.6))) == {1, 3}
    assert set(drawn(logits, Sampling(temperature=1, top_p=1, top_k=3))) == {1, 2, 3}
    # Of the first two, renormalised, the first alone holds two thirds.
    assert set(drawn(logits, Sampling(temperature=1, top_p=0.6, top_k=2))) == {1}


def test_a_nucleus_wider_than_the_first_look_is_still_exact() -> None:
    counts = drawn([-at / 10_000 for at in range(2000)], Sampling(temperature=1, top_p=0.9), draws=1000)
    weights = torch.tensor([-at / 10_000 for at in range(2000)]).double().softmax(-1).cumsum(-1)
    last = int((weights < 0.9).sum())
    assert 1024 < last - 50 < max(counts) <= last


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


def test_no_requests_give_no_replies(engine: TransformersEngine) -> None:
    assert engine.generate([], GREEDY) == []
    assert engine.score([], []) == []


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


def test_logits_of_every_decoding_step_equal_a_full_forward_pass(reference: Any) -> None:
    rng = random.Random(1)
    shared = [rng.randrange(2, 400) for _ in range(40)]
    tails = [[rng.randrange(2, 400) for _ in range(length)] for length in (3, 17, 9)]
    written = [[rng.randrange(2, 400) for _ in range(70)] for _ in tails]
    with torch.inference_mode():
        _, prefix = prefill(reference, [shared], [[39]], None)
        first, cache = prefill(reference, tails, [[len(tail) - 1] for tail in tails], cached(prefix))
        parts = [[(k[row], v[row]) for k, v in cached(cache)] for row in range(3)]
        rows = [Row(tail) for tail in tails]
        slots = Slots(reference)
        # The third row joins late, when the others have written ten tokens; the first leaves after twenty.
        slots.repack(rows[:2], [43, 57], parts[:2])
        for step in range(70):
            if step == 10:
                slots.repack(rows[2:], [49], parts[2:])
            if step == 20:
                rows[0].done = True
                slots.repack([], [], [])
            for row, tokens in zip(rows, written, strict=True):
                if row in slots.rows:
                    row.new.append(tokens[len(row.new)])
            logits = slots.step()
            for row, got in zip(slots.rows, logits, strict=True):
                want = reference(torch.tensor([[*shared, *row.prompt, *row.new]]), use_cache=False).logits[0, -1]
                assert (got - want).abs().max() < 1e-4
        for row, got in zip(rows, first, strict=True):
            want = reference(torch.tensor([[*shared, *row.prompt]]), use_cache=False).logits[0, -1]
            assert (got[0] - want).abs().max() < 1e-4


def test_a_call_gives_the_same_bits_whatever_ran_before(engine: TransformersEngine, base: Path) -> None:
    requests = [ask(RUBRIC + text, opening="Score:") for text in ("one", "two", "three")]
    fresh = opened(base).score(requests, [SCALE] * 3)
    engine.score([ask(RUBRIC + text, opening="Score:") for text in ("two a", "two b")], [SCALE] * 2)
    assert engine.score(requests, [SCALE] * 3) == fresh


def test_only_the_last_few_prefixes_are_kept(engine: TransformersEngine) -> None:
    for number in range(7):
        engine.score([ask(f"{number} {RUBRIC}{end}") for end in "ab"], [SCALE] * 2)
    assert len(engine._prefixes) == engine_module.KEPT_PREFIXES


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


def test_continuations_that_begin_alike_are_scored_where_they_part(engine: TransformersEngine) -> None:
    (scores,) = engine.score([ask("say", opening="I think")], [[" the ships", " the bread"]])
    (whole,) = engine.score([ask("say", opening="I think the")], [[" ships", " bread"]])
    assert scores == whole


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


def test_the_stop_token_is_scored_only_where_the_text_holds_it(engine: TransformersEngine, reference: Any) -> None:
    request = ask("say", opening="bread")
    ((score,),) = engine.score([request], [["</s>"]])
    logs = full_logs(reference, prompt_ids(engine, request))
    assert score.log_prob == pytest.approx(logs[-1, 1].item(), abs=1e-4)


def test_a_text_without_room_scores_none_and_the_others_go_on(engine: TransformersEngine) -> None:
    scores = engine.score([ask("x " * LIMIT, opening="Score:"), ask("x", opening="Score:")], [SCALE, SCALE])
    assert scores[0] is None
    assert scores[1] == engine.score([ask("x", opening="Score:")], [SCALE])[0]


def test_variants_encode_as_whole_texts_do(base: Path) -> None:
    chat = Chat(load_tokenizer(ModelConfig(path=str(base), chat_template="plain")))
    rng = random.Random(2)
    junk = ["  ", "\n\n", "é", "12345", "…", "don't", "</s>", "日本語", "\t", "a" * 30, " \n "]
    for _ in range(150):
        text = "".join(rng.choice([*junk, " " + rng.choice(WORDS)]) for _ in range(rng.randint(0, 60)))
        texts = [text + end for end in ("", " 1", "1", "\n", " x y", "é")]
        assert chat.encode_variants(texts) == chat.encode(texts)


# Rendering

SPECIAL = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module", params=["plain", "chatml", "chatml in its own tokens", "special"])
def chat(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder, template = base, str(request.param)
    if " " in template:
        folder, template = tmp_path_factory.mktemp("marks"), "chatml"
        save_tokenizer(folder, "<|im_start|>", "<|im_end|>")
    elif template == "special":
        folder = tmp_path_factory.mktemp("special")
        save_tokenizer(folder, "<|user|>", "<|assistant|>")
        template = str(folder / "special.jinja")
        Path(template).write_text(SPECIAL)
    return Chat(load_tokenizer(ModelConfig(path=str(folder), chat_template=template)))


def test_prompt_and_reply_are_the_tokens_that_training_renders(chat: Chat) -> None:
    rng = random.Random(4)
    for _ in range(20):
        asked = [Message(role="user", content=sentence(rng, 5))]
        said = sentence(rng, 8)
        full = [*asked, Message(role="assistant", content=said)]
        trained = chat.tokenizer.apply_chat_template(full, return_dict=True)["input_ids"]
        assert chat.encode([chat.tokenizer.apply_chat_template(full, tokenize=False)])[0] == trained, "no second BOS"
        prompt = chat.encode([chat.prompt(asked)])[0]
        assert trained[: len(prompt)] == prompt
        assert chat.decode(trained[len(prompt) :]).strip().removesuffix("<|im_end|>") == said
        cut = said.rindex(" ")
        opened = chat.encode([chat.prompt([*asked, Message(role="assistant", content=said[:cut])])])[0]
        assert trained[: len(opened)] == opened
        joint = chat.encode([chat.prompt(asked, said)])[0]
        assert trained[: len(joint)] == joint


def test_a_reply_ends_where_the_template_ends_a_turn(chat: Chat) -> None:
    full = [Message(role="user", content="a"), Message(role="assistant", content="b c")]
    trained = chat.tokenizer.apply_chat_template(full, tokenize=False)
    new = chat.encode([trained])[0][len(chat.encode([chat.prompt(full[:1])])[0]) :]
    ended = [at for at in range(len(new)) if new[at] in chat.stop_ids or chat.stopped(new[: at + 1], chat.stop_texts)]
    assert ended
    before = chat.decode(new[: ended[0] + 1])
    assert before.strip().removesuffix("<|im_end|>") == "b c"


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


def test_a_closed_engine_cannot_be_used(base: Path) -> None:
    engine = opened(base)
    engine.close()
    with pytest.raises(InternalError, match="closed"):
        engine.generate([ask("hello")], GREEDY)


def test_a_model_whose_layers_keep_no_cache_is_refused() -> None:
    text = SimpleNamespace(layer_types=["full_attention", "linear_attention"], max_position_embeddings=8)
    config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(MismatchError, match="linear_attention"):
        engine_module._positions("a model", SimpleNamespace(config=config))  # type: ignore[arg-type]
