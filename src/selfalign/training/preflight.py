"""Which tokens are trained: decided once, and checked before any weights are loaded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.core.errors import MismatchError
from selfalign.core.records import Example
from selfalign.engines.chat import chat_of, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Tokenised:
    """An example as the model will see it. `completion_mask` is 1 on the tokens that carry loss.

    `stops`: the loss span ends in a stop token. `straddles`: prompt and completion share a token, which counts
    as completion, so that this prompt is one token longer at inference than in training.
    """

    id: str
    input_ids: tuple[int, ...]
    completion_mask: tuple[int, ...]
    stops: bool
    straddles: bool = False
    truncated: bool = False

    @property
    def labels(self) -> list[int]:
        """The input ids where there is loss, -100 elsewhere. Same length as `input_ids`, not shifted."""
        pairs = zip(self.input_ids, self.completion_mask, strict=True)
        return [token if trained else IGNORED for token, trained in pairs]

    def cut(self, max_length: int) -> "Tokenised | None":
        """The first `max_length` tokens; None when they would hold no token of the completion."""
        if len(self.input_ids) <= max_length:
            return self
        mask = self.completion_mask[:max_length]
        if not any(mask):
            return None
        ids = self.input_ids[:max_length]
        return replace(self, input_ids=ids, completion_mask=mask, stops=False, truncated=True)


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a training run is about to do. `rows` are trained; `too_long` were dropped before.

    `sequences`: what the rows were packed into, of which `fill` (0..1) is tokens; 0 without packing. `memory`: what is
    to be said about the card.
    """

    rows: int
    too_long: int
    truncated: int
    straddling: int
    tokens: int
    trained_tokens: int
    steps: int
    sample: str
    sequences: int = 0
    fill: float = 0.0
    memory: str = ""

    @property
    def truncated_share(self) -> float:
        """The part of the trained rows that lost its end, and with it its stop token. 0..1."""
        return self.truncated / self.rows

    def text(self) -> str:
        """The report for people: the figures, then one example with its loss span in ⟦ ⟧."""
        lines = [
            f"{self.rows} rows, {self.tokens} tokens, {self.trained_tokens} of them with loss, {self.steps} steps",
            f"{self.truncated} rows ({self.truncated_share:.1%}) cut at max_length, their stop token with them",
            f"{self.too_long} rows dropped: the prompt alone fills max_length",
        ]
        if self.straddling:
            lines.append(
                f"{self.straddling} rows share a token between prompt and completion; it is trained as completion"
            )
        if self.sequences:
            lines.append(f"packed into {self.sequences} sequences, {self.fill:.1%} of which are tokens")
        if self.memory:
            lines.append(self.memory)
        return "\n".join([*lines, "an example, its loss span in ⟦ ⟧:", self.sample])


def stop_ids(tokenizer: "PreTrainedTokenizerFast", model: ModelConfig) -> frozenset[int]:
    """The tokens that end a reply for the engine: the tokenizer's, the template's, the generation config's."""
    from transformers import GenerationConfig

    local = Path(model.path).is_dir()
    try:
        declared = GenerationConfig.from_pretrained(
            model.path, revision=None if local else model.revision, local_files_only=local
        ).eos_token_id
    except OSError:
        # A base model need not come with a generation config.
        declared = None
    more = declared if isinstance(declared, list) else [declared]
    return chat_of(tokenizer).stop_ids | {i for i in more if i is not None}


def render(example: Example, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, str]:
    """The text of the prompt as inference will send it, and of prompt and completion together.

    Raises MismatchError when the template refuses the messages, or when the first text does not begin the second.
    """
    try:
        chat = chat_of(tokenizer)
        prompt = chat.render(example.prompt, add_generation_prompt=True)
        full = chat.render([*example.prompt, *example.completion])
    except MismatchError as error:
        raise MismatchError(f"{example.id}: {error}") from error
    if not full.startswith(prompt):
        raise MismatchError(
            f"{example.id}: the chat template writes the prompt differently at inference ({prompt[-60:]!r}) than "
            f"before a completion ({full[: len(prompt)][-60:]!r}); use a template whose generation prompt is what "
            "stands before a reply, as plain and chatml do"
        )
    return prompt, full


def tokenise(example: Example, tokenizer: "PreTrainedTokenizerFast", stops: frozenset[int] | None = None) -> Tokenised:
    """`example` through the chat template, with the loss on its completion up to and with the last stop token.

    What the template writes after that (ChatML's line end) is left out. `stops`: the ids of stop tokens, by
    default the tokenizer's end of sequence.
    """
    prompt, full = render(example, tokenizer)
    encoding = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    ends = [end for _, end in encoding["offset_mapping"]]
    first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    known = {tokenizer.eos_token_id} if stops is None else stops
    last = next((i for i in range(len(ids) - 1, first - 1, -1) if ids[i] in known), None)
    # A stop token inside the response, with text after it, is not the one that ends it.
    stopped = last is not None and not full[ends[last] :].strip()
    if stopped and last is not None:
        ids = ids[: last + 1]
    alone: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Tokenised(
        id=example.id,
        input_ids=tuple(ids),
        completion_mask=(0,) * first + (1,) * (len(ids) - first),
        stops=stopped,
        straddles=alone != ids[:first],
    )


def fit(rows: Iterable[Tokenised], max_length: int) -> tuple[list[Tokenised], int]:
    """`rows` cut to `max_length` tokens, and how many were dropped because their prompt alone fills it."""
    kept: list[Tokenised] = []
    too_long = 0
    for row in rows:
        short = row.cut(max_length)
        if short is None:
            too_long += 1
        else:
            kept.append(short)
    return kept, too_long


def check(
    rows: Sequence[Tokenised],
    tokenizer: "PreTrainedTokenizerFast",
    too_long: int = 0,
    steps: int = 0,
    sequences: int = 0,
    max_length: int = 0,
) -> Preflight:
    """The report on `rows`, which `fit` returned, and which are packed into so many `sequences` of `max_length`.

    Raises MismatchError for what would train the wrong thing without any sign of it: nothing to train, a doubled
    first token, a reply that never learns to end.
    """
    if not rows:
        raise MismatchError(f"no example is left to train on; {too_long} have a prompt that fills max_length")
    bos = tokenizer.bos_token_id
    for row in rows:
        if not any(row.completion_mask):
            raise MismatchError(f"{row.id}: no token carries loss; its completion is empty after the chat template")
        if bos is not None and row.input_ids[:2] == (bos, bos):
            raise MismatchError(f"{row.id}: the chat template writes {tokenizer.bos_token!r} twice; drop one of them")
        if not (row.stops or row.truncated):
            end = tokenizer.decode(list(row.input_ids[-8:]))
            raise MismatchError(
                f"{row.id}: its reply ends in {end!r}, which is no stop token ({tokenizer.eos_token!r} is one), so "
                "the model would never learn to stop; use a chat template that ends a reply with the stop token"
            )
    tokens = sum(len(row.input_ids) for row in rows)
    return Preflight(
        rows=len(rows),
        too_long=too_long,
        truncated=sum(row.truncated for row in rows),
        straddling=sum(row.straddles for row in rows),
        tokens=tokens,
        trained_tokens=sum(sum(row.completion_mask) for row in rows),
        steps=steps,
        sample="".join(_marked(rows[0], tokenizer)),
        sequences=sequences,
        fill=tokens / (sequences * max_length) if sequences else 0.0,
    )


def check_saved(
    folder: Path, examples: Iterable[Example], tokenizer: "PreTrainedTokenizerFast", stops: frozenset[int]
) -> None:
    """Raise MismatchError where the tokenizer and template in `folder` do not read `examples` as they were trained."""
    saved = load_tokenizer(ModelConfig(path=str(folder)))
    for example in examples:
        trained, read = tokenise(example, tokenizer, stops), tokenise(example, saved, stops)
        if trained == read:
            continue
        at = common_prefix([list(trained.input_ids), list(read.input_ids)])
        was, now = (tokenizer.decode(list(row.input_ids[max(at - 4, 0) : at + 4])) for row in (trained, read))
        raise MismatchError(
            f"{example.id}: tokenizer and chat template, once saved, read token {at} on as {now!r}, and trained was "
            f"{was!r}; use a tokenizer and a template that can be saved whole"
        )


def _marked(row: Tokenised, tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    pairs = zip(row.input_ids, row.completion_mask, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        text = str(tokenizer.decode([token for token, _ in run]))
        yield f"⟦{text}⟧" if trained else text
