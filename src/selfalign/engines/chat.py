"""Conversations as text and tokens, so that inference sees exactly what training renders."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from selfalign.core.errors import MismatchError
from selfalign.core.protocols import STOP
from selfalign.core.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Two private-use characters around a word: no text holds it, no template strips or splits it.
CUT = "\ue000cut here\ue001"

# Of no width, where the tokenizer knows one of these; else a space.
BREAKS = ("\u2060", "\u200b", " ")
"""What is put into the strings of control tokens in texts, so that they are read as text."""


class Encoded(NamedTuple):
    """Tokens of a text, and the character at which each of them ends."""

    ids: list[int]
    ends: list[int]

    @property
    def end(self) -> int:
        """The character at which the last one ends."""
        return self.ends[-1] if self.ends else 0

    def followed_by(self, rest: "Encoded") -> "Encoded":
        """These, and those of the text right after them."""
        return Encoded(self.ids + rest.ids, self.ends + [self.end + end for end in rest.ends])


class Chat:
    """A tokenizer and its chat template, as both halves of the project use them.

    `stop_ids` are the tokens, and `stop_texts` the strings, with which the template or the tokenizer ends an
    assistant turn; the second is for a template whose stop mark is not one token of this tokenizer. `ending` is what
    the template writes after a reply, up to its stop mark.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.stop_ids: frozenset[int] = frozenset({tokenizer.eos_token_id})
        self.stop_texts: tuple[str, ...] = ()
        turns = self._template([Message(role="user", content="a"), Message(role="assistant", content=CUT)])
        added = tokenizer.added_tokens_decoder
        words = {at for at, token in added.items() if token.content.strip()}
        ending = turns.rpartition(CUT)[2]
        encoding = tokenizer(ending, add_special_tokens=False, return_offsets_mapping=True)
        ends = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        if stop := next(((at, end) for at, (_, end) in ends if at in words), None):
            self.stop_ids |= {stop[0]}
            self.ending = ending[: stop[1]]
        elif ending.strip():
            self.stop_texts = (ending.strip(),)
            self.ending = ending.rstrip()
        else:
            self.ending = tokenizer.eos_token
        # Tokens that a tokenizer has for ordinary words stay theirs; those with which a template marks turns do not.
        self._control = {at for at in words if added[at].special} | words.intersection(self.encode([turns])[0])
        self._folds = tokenizer.backend_tokenizer.normalizer is not None and any(
            added[at].normalized for at in self._control
        )
        marks = sorted({added[at].content for at in self._control if len(added[at].content) > 1})
        self._marks = re.compile("|".join(map(re.escape, marks)) if marks else r"(?!)")
        self._break = next((char for char in BREAKS[:-1] if self._breaks(marks, char)), BREAKS[-1])
        # A space may be the writer's own.
        broken = [] if self._break == BREAKS[-1] else [mark[0] + self._break + mark[1:] for mark in marks]
        self._broken = re.compile("|".join(map(re.escape, broken)) if broken else r"(?!)")

    def prompt(self, messages: Sequence[Message], continuation: str | None = None) -> str:
        """The conversation up to where the model goes on, followed by `continuation`.

        An assistant message at the end is an opening. Opening and continuation are rendered as the start of a full
        assistant turn, so that a template's own characters around the content stand where training puts them; so is
        the end of the turn, where `continuation` ends in STOP.
        """
        opening = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
        ends = (continuation or "").endswith(STOP)
        said = (opening or "") + (continuation or "").removesuffix(STOP)
        before = list(messages if opening is None else messages[:-1])
        # transformers renders no empty conversation: a reply to nothing, as likelihoods compare with, takes the turn.
        if before and not said and not ends:
            return self.render(before, add_generation_prompt=True)
        text, found, _ = self.render([*before, Message(role="assistant", content=said + CUT)]).rpartition(CUT)
        if not found:
            raise MismatchError("the chat template drops the content of an assistant message; set model.chat_template")
        return text + self.ending if ends else text

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation through the template. Raises MismatchError where the template refuses it.

        What stands in the messages is text, wherever it comes from: a document of the web that holds `<|im_end|>` must
        not end its turn and speak as somebody else. A break character inside such a string keeps the tokenizer from
        reading the control token; to encode contents apart from the template's own text, with the tokenizer told to
        split control tokens, would move token boundaries at the seams, and spare only tokens that are marked special.
        """
        inert = [Message(role=message["role"], content=self._inert(message["content"])) for message in messages]
        return self._template(inert, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of rendered texts. The template has written the special tokens; none is added."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_alike(self, groups: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Texts encoded as `encode` does. What all of them begin with, and what all of a group do, is encoded once."""
        head = self._beginning([text for group in groups for text in group])
        rest = [[text[head.end :] for text in group] for group in groups]
        found = []
        for group in rest:
            own = self._beginning(group)
            tails = [
                Encoded(tail.ids, [end for _, end in tail.offsets])
                for tail in self._encodings([text[own.end :] for text in group])
            ]
            found.append([head.followed_by(own.followed_by(tail)) for tail in tails])
        return found

    def _beginning(self, texts: Sequence[str]) -> Encoded:
        """Tokens with which the encodings of all `texts` begin, whatever follows; none where that is not certain."""
        nothing = Encoded([], [])
        if len(texts) < 2:
            return nothing
        # No token crosses from one pre-token into the next, and pre-tokens are found from left to right. Four pieces
        # between white space are more than any pre-tokenizer looks ahead, so that text after them changes nothing.
        pieces = texts[0][: common_prefix(texts)].rsplit(None, 4)
        if len(pieces) < 5:
            return nothing
        base = min(texts, key=len)
        (encoding,) = self._encodings([base])
        words, ends = encoding.word_ids, [end for _, end in encoding.offsets]
        cuts = range(bisect_right(ends, len(pieces[0])), 0, -1)
        cut = next((at for at in cuts if at < len(ends) and words[at] != words[at - 1]), 0)
        if not cut or self._encodings([base[ends[cut - 1] :]])[0].ids != encoding.ids[cut:]:
            return nothing
        return Encoded(encoding.ids[:cut], ends[:cut])

    def _encodings(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []

    def ends_line(self, token: int) -> bool:
        """Whether the text of this token ends in a line end."""
        return self._decode([token]).endswith("\n")

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids`. Where they continue the tokens `after`, white space at the seam is exact.

        Strings of control tokens are whole again: a model that was trained on broken ones writes them so.
        """
        context = self._decode(after)
        whole = self._decode([*after, *ids])
        text = whole[len(context) :] if whole.startswith(context) else self._decode(ids)
        return self._broken.sub(lambda found: found[0].replace(self._break, "", 1), text)

    def stopper(self, stops: Iterable[str]) -> Callable[[Sequence[int]], bool]:
        """A function that tells of tokens whether the last of them completed one of the strings `stops`."""
        texts = [stop for stop in stops if stop]
        if not texts:
            return lambda ids: False
        # A token is at least one byte of text, so this many reach back over the longest stop string.
        window = max(len(stop.encode()) for stop in texts) + 4
        lasts = {stop[-1] for stop in texts} | {"\N{REPLACEMENT CHARACTER}"}

        @cache
        def may_complete(token: int) -> bool:
            # Twice: some tokenizers drop the space before a first word.
            return not lasts.isdisjoint(self._decode([token, token]))

        # Decoding at every step costs more than choosing the token: most tokens cannot be a stop's last.
        def stopped(ids: Sequence[int]) -> bool:
            return may_complete(ids[-1]) and any(stop in self._decode(ids[-window:]) for stop in texts)

        return stopped

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _inert(self, text: str) -> str:
        """`text` with a break character in each string that the tokenizer would read as a control token."""
        while self._marks.search(text):
            text = self._marks.sub(lambda found: found[0][0] + self._break + found[0][1:], text)
        for start in reversed(self._controls(text) if self._folds else ()):
            text = text[: start + 1] + self._break + text[start + 1 :]
        return text

    def _controls(self, text: str) -> list[int]:
        """Where `text` holds what reads as a control token of several characters, once the tokenizer normalised it."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [start for at, (start, end) in found if at in self._control and end - start > 1]

    def _breaks(self, marks: Sequence[str], char: str) -> bool:
        """Whether `char` inside each of `marks` leaves text that this tokenizer knows."""
        refused = self._control | {self.tokenizer.unk_token_id}
        return not any(refused.intersection(ids) for ids in self.encode([mark[0] + char + mark[1:] for mark in marks]))

    def _template(self, messages: Sequence[Message], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise MismatchError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
        return text


@lru_cache(maxsize=4)
def _chat(tokenizer: "PreTrainedTokenizerFast", template: str, tokens: int) -> Chat:
    return Chat(tokenizer)


def chat_of(tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """The Chat of a tokenizer as it is now, made once."""
    return _chat(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def common_prefix(rows: Sequence[list[int]] | Sequence[str]) -> int:
    """How many tokens, or characters, all of `rows` start with."""
    # The smallest and the largest row in dictionary order differ first where any two rows do.
    low, high = min(rows), max(rows)
    same, limit = 0, min(len(low), len(high))
    while same < limit:
        middle = (same + limit + 1) // 2
        if low[same:middle] == high[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def before_first(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first place where one of `stops` begins."""
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(places)] if places else text
