"""Tokenizers of the main families, small, and templates of the main kinds."""

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engines.tiny import RUBRIC, TEXT

CORPUS = [
    TEXT,
    RUBRIC,
    "Score: 1\nScore: 2\nScore: 3\nScore: 4\nScore: 5",
    "system user assistant \n\n 12345 3 of 5, x3",
] * 4
NAMES = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# As Qwen's and Llama 3's: a digit is a word of its own, and takes no space with it.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrapped(tokenizer: Tokenizer, unk: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unk,
        additional_special_tokens=NAMES[3:],
    )


def spaces_join() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level, and " 3" is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=NAMES, initial_alphabet=ALPHABET)
    )
    return wrapped(tokenizer)


def digits_apart() -> PreTrainedTokenizerFast:
    """Qwen's and Llama 3's kind: byte-level, and " 3" is a space and a digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=NAMES, initial_alphabet=ALPHABET)
    )
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Mistral's kind: "▁" stands for a space and "▁3" is a token, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*NAMES, *BYTES])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(_bytes_as_text(tokenizer), "<unk>")


def prepended() -> PreTrainedTokenizerFast:
    """Llama 2's kind: the normalizer writes "▁", nothing splits words, unknown characters are bytes."""
    base = metaspace().backend_tokenizer
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base.pre_tokenizer = None
    return wrapped(base, "<unk>")


def no_bytes() -> PreTrainedTokenizerFast:
    """A sentencepiece unigram model that knows no bytes: what it has not seen is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    marks = ["<|/>_ im_start im_end header_id eot_id"] * 4
    trainer = trainers.UnigramTrainer(vocab_size=320, special_tokens=NAMES, unk_token="<unk>")
    tokenizer.train_from_iterator([*CORPUS, *marks], trainer)
    return wrapped(tokenizer, "<unk>")


def _bytes_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with its byte tokens as ordinary words of the vocabulary: a text `<0x41>` is not a byte."""
    import json

    config: dict[str, Any] = json.loads(tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(config))


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "spaces join": spaces_join,
    "digits apart": digits_apart,
    "metaspace": metaspace,
    "prepended": prepended,
    "no bytes": no_bytes,
}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"plain": "plain", "chatml": "chatml", "llama 3": LLAMA3, "llama 2": LLAMA2}
