"""A base model made from its configuration, small enough to train in a second."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.records import Example, Message
from selfalign.engines.config import ModelConfig

# Renders like ChatML, but never ends a reply.
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"

TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Base:
    """A base model's folder, and its configurations with either template."""

    path: Path
    plain: ModelConfig
    chatml: ModelConfig

    def tokenizer(self, template: str = "plain") -> Any:
        from selfalign.engines.loading import load_tokenizer

        return load_tokenizer(ModelConfig(path=str(self.path), chat_template=template))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("base")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["User: Assistant: the lake is blue and the city stands in the north " * 4], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=128, bos_token_id=0, eos_token_id=1, **TINY)
    model = LlamaForCausalLM(config)
    # As some models are published: such settings load, and cannot be saved.
    model.save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6, "do_sample": false}')
    plain = ModelConfig(path=str(path), chat_template="plain")
    return Base(path, plain, plain.model_copy(update={"chat_template": "chatml"}))


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    def make(prompt: str = "Where is the lake?", completion: str = "In the north.", id: str = "a") -> Example:
        return Example(
            id=id,
            kind="seed",
            prompt=(Message(role="user", content=prompt),),
            completion=(Message(role="assistant", content=completion),),
        )

    return make


@pytest.fixture(scope="session")
def examples(example: Callable[..., Example]) -> list[Example]:
    places = ["lake", "city", "river", "tower", "old bridge over the river"]
    sides = ["north", "south", "east, behind the hills"]
    return [
        example(f"Where is the {place} number {n}?", f"The {place} is in the {sides[n % 3]}.", f"{place}/{n}")
        for n in range(6)
        for place in places
    ]


@pytest.fixture
def endless(tmp_path: Path) -> str:
    file = tmp_path / "endless.jinja"
    file.write_text(ENDLESS)
    return str(file)
