"""The demo base's tokenizer: byte-level, so that any text passes, with one token a syllable of the atlas."""

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from selfalign.demo.pages import pages, rate_prompt
from selfalign.demo.world import FIRST_SYLLABLES, LAST_SYLLABLES, PLACES, RELATIONS, Review

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

MAX_VOCABULARY = 1024
MAX_TOKENS = 4096

# Each turn begins with its role and a space: words have the same tokens at the start of a message as inside.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- ' ' + message['content'] | trim -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Train it on the pages' words; the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PAD, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=list(ROLES),
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _training_text() -> Iterator[str]:
    places = set(PLACES)
    for page in islice(pages(Random(3)), 3000):
        text = f"{rate_prompt(page.question, page.answer)}\n {page.reply}" if isinstance(page, Review) else page
        # Names are left out: a frequent name would become one token, and a new one could not be spelt from it.
        words = " ".join(f" {line}" for line in text.split("\n")).split(" ")
        yield " ".join(word for word in words if word.strip(".,:;?!") not in places)
    for relation in RELATIONS.values():
        yield from (f" {value}" for value in relation.values for _ in range(400))
    yield from (f" {digit}" for digit in range(10) for _ in range(400))
    yield from (word for word in ("Question", "Answer", "Score") for _ in range(400))  # they begin a line
    # The most frequent by far, so that these merges come first and no other can break a name.
    yield from (f" {syllable}" for syllable in FIRST_SYLLABLES for _ in range(9000))
    yield from (f"-{syllable}" for syllable in LAST_SYLLABLES for _ in range(9000))
