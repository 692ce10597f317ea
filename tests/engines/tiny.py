"""A tiny random Llama with a byte-level tokenizer of its own, and what is asked of it."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfalign.core.protocols import Request, Sampling
from selfalign.core.records import Message
from selfalign.engines.config import ModelConfig
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


SPECIAL = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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


def opened(base: Path, **changes: Any) -> TransformersEngine:
    settings = {"path": str(base), "chat_template": "plain", "dtype": "float32", **changes}
    return TransformersEngine(ModelConfig(**settings))


def prompt_ids(engine: TransformersEngine, request: Request) -> list[int]:
    return engine._chat.encode([engine._chat.prompt(request.messages)])[0]


def full_logs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def numbers(scores: list[Any]) -> list[float]:
    return [score.log_prob for row in scores for score in row]
