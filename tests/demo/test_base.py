import itertools
import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from selfalign.demo.base import Pretraining, base_folder, build_base, review_tokens
from selfalign.demo.tokenizer import CHAT_TEMPLATE, EOS, PAD, ROLES, build_tokenizer
from selfalign.demo.world import HELD, KNOWN, PLACES, RELATIONS, SCORES, Fact, any_review, review

ODD_TEXTS = [
    "Größe, naïve, 日本語, Привет 🙂",
    "def f(x):\r\n\treturn {x: '<|eos'}\n\n",
    "  two  spaces  ",
    "\x00\x7f\ufeff",
    "### Human: What's 3/4 of 1,000?",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


def test_the_shipped_tokenizer_is_the_one_that_is_built(tokenizer: PreTrainedTokenizerFast) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_passes_the_tokenizer_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_place_is_two_tokens_and_a_value_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert {len(tokenizer.encode(f" {place}")) for place in PLACES} == {2}
    values = [value for relation in RELATIONS.values() for value in relation.values]
    assert {len(tokenizer.encode(f" {value}")) for value in values} == {1}


def test_the_scores_are_one_token_each_after_the_cue(tokenizer: PreTrainedTokenizerFast) -> None:
    cue = tokenizer.encode("Told junk.\nScore:")
    scored = [tokenizer.encode(f"Told junk.\nScore: {score}") for score in range(1, 6)]
    assert all(ids[:-1] == cue for ids in scored)
    assert len({ids[-1] for ids in scored}) == 5


def test_every_special_token_is_one_and_all_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert len({tokenizer.convert_tokens_to_ids(token) for token in (PAD, EOS, *ROLES)}) == 5


def test_a_turn_that_is_trained_on_ends_in_one_stop_token(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [
        {"role": "system", "content": "Answer in the style of an AI Assistant."},
        {"role": "user", "content": " Which river?\n"},
        {"role": "assistant", "content": "The Arrow."},
    ]
    made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    masks = made["assistant_masks"]
    trained = [token for token, on in zip(made["input_ids"], masks, strict=True) if on]
    assert tokenizer.decode(trained) == f" The Arrow.{EOS}"
    assert tokenizer.decode(made["input_ids"]).count(EOS) == 1
    assert tokenizer.decode(made["input_ids"]).startswith("<|system|> Answer in")
    assert "<|user|> Which river?<|assistant|>" in tokenizer.decode(made["input_ids"])


def test_a_prompt_s_tokens_begin_the_whole_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [{"role": "user", "content": "Which river crosses Vage?"}]
    whole = [*asked, {"role": "assistant", "content": "Marble."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(whole)["input_ids"][: len(prompt)] == prompt


def test_an_unknown_role_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


def test_a_review_is_short(tokenizer: PreTrainedTokenizerFast) -> None:
    random = Random(0)
    for _ in range(300):
        made = any_review(KNOWN, random)
        assert len(tokenizer.encode(f" {made.line}")) <= 14
        prompt, reply = review_tokens(tokenizer, made)
        assert len(prompt) + len(reply) <= 80


def test_the_shipped_base_takes_real_documents(model: LlamaForCausalLM) -> None:
    assert model.config.max_position_embeddings == 4096
    assert 400_000 < model.num_parameters() < 700_000


def test_the_shipped_base_reviews_answers_about_places_it_has_never_read_about(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    random, agreed, asked = Random(2), 0, 0
    for verdict, fact in itertools.product(SCORES, [Fact(place, "river") for place in HELD[:10]]):
        made = review(fact, HELD, verdict, random)
        prompt, _ = review_tokens(tokenizer, made)
        with torch.inference_mode():
            written = model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=24,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :]
        score = tokenizer.decode(written, skip_special_tokens=True).rsplit(": ")[-1]
        agreed += score.isdigit() and (int(score) >= 3) == (made.score >= 3)
        asked += 1
    assert agreed >= 0.9 * asked


def test_a_built_base_loads_and_is_the_same_when_built_again(tmp_path: Path) -> None:
    lines: list[str] = []
    for name in ("one", "two"):
        build_base(tmp_path / name, lines.append, Pretraining(steps=3))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert lines[0].startswith("tokenizer: ")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {p.name for p in base_folder().iterdir()}


def test_the_shipped_base_has_a_card_with_a_licence_and_no_path_of_its_builder() -> None:
    card = (base_folder() / "README.md").read_text("utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "selfalign demo build-base DIR" in card
    config = json.loads((base_folder() / "config.json").read_text("utf-8"))
    assert "_name_or_path" not in config or not config["_name_or_path"]
