"""Conversations as text and tokens, so that inference sees exactly what training renders."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import MismatchError
from selfalign.core.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Two private-use characters around a word: no text holds it, no template strips or splits it.
CUT = "\ue000cut here\ue001"


class Chat:
    """A tokenizer and its chat template, as both halves of the project use them.

    `stop_ids` are the tokens, and `stop_texts` the strings, with which the template or the tokenizer ends an
    assistant turn; the second is for a template whose stop mark is not one token of this tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.stop_ids: frozenset[int] = frozenset({tokenizer.eos_token_id})
        self.stop_texts: tuple[str, ...] = ()
        ending = self._render([Message(role="user", content="a"), Message(role="assistant", content=CUT)])
        ending = ending.rpartition(CUT)[2]
        ids = self.encode([ending])[0]
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            self.stop_ids |= {ids[0]}
        elif ending.strip():
            self.stop_texts = (ending.strip(),)

    def prompt(self, messages: Sequence[Message], continuation: str | None = None) -> str:
        """The conversation up to where the model goes on, followed by `continuation`.

        An assistant message at the end is an opening. Opening and continuation are rendered as the start of a full
        assistant turn, so that a template's own characters around the content stand where training puts them.
        """
        opening = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
        said = (opening or "") + (continuation or "")
        before = list(messages if opening is None else messages[:-1])
        # transformers renders no empty conversation: a reply to nothing, as likelihoods compare with, takes the turn.
        if before and not said:
            return self._render(before, add_generation_prompt=True)
        text, found, _ = self._render([*before, Message(role="assistant", content=said + CUT)]).rpartition(CUT)
        if not found:
            raise MismatchError("the chat template drops the content of an assistant message; set model.chat_template")
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of rendered texts. The template has written the special tokens; none is added."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_variants(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that begin alike, as `encode` gives them, without encoding the beginning again and again."""
        base = min(texts, key=len)
        encoding = self.tokenizer([base], add_special_tokens=False, verbose=False).encodings[0]
        words, ends = encoding.word_ids, [end for _, end in encoding.offsets]
        # No token crosses from one pre-token into the next, and pre-tokens are found from left to right. Four pieces
        # between white space are more than any pre-tokenizer looks ahead, so that text after them changes nothing.
        pieces = base[: common_prefix(texts)].rsplit(None, 4)
        limit = len(pieces[0]) if len(pieces) == 5 else 0
        cut = next(
            (at for at in range(len(ends) - 1, 0, -1) if ends[at - 1] <= limit and words[at] != words[at - 1]), 0
        )
        if cut:
            tails = self.encode([text[ends[cut - 1] :] for text in texts])
            if tails[texts.index(base)] == encoding.ids[cut:]:
                return [encoding.ids[:cut] + tail for tail in tails]
        return self.encode(texts)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids`. Where they continue the tokens `after`, white space at the seam is exact."""
        context = self._decode(after)
        whole = self._decode([*after, *ids])
        return whole[len(context) :] if whole.startswith(context) else self._decode(ids)

    def stopped(self, ids: Sequence[int], stops: Iterable[str]) -> bool:
        """Whether the last of `ids` completed one of the strings `stops`."""
        # A token is at least one byte of text, so this many reach back over the longest stop string.
        return any(stop in self._decode(ids[-(len(stop.encode()) + 4) :]) for stop in stops)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise MismatchError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
        return text


def common_prefix(rows: Sequence[list[int]] | Sequence[str]) -> int:
    """How many tokens, or characters, all of `rows` start with."""
    # The smallest and the largest row in dictionary order differ first where any two rows do.
    low, high = min(rows), max(rows)
    for at, (one, other) in enumerate(zip(low, high, strict=False)):
        if one != other:
            return at
    return min(len(low), len(high))


def before_first(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first place where one of `stops` begins."""
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(places)] if places else text
