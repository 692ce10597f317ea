"""How much of one text stands in another: echoes of a prompt, copies of a response, exact duplicates."""

import re
import unicodedata
from collections.abc import Iterable

ECHO_NGRAM = 3
ECHO_SHARE = 0.5
# So many of the template's words in a row are an echo, whatever else the instruction says.
ECHO_RUN = 8
COPY_NGRAM = 5
COPY_SHARE = 0.8
# Below this an instruction is a copy only when it is the whole response: titles, names, "What is entropy?" occur
# by chance.
COPY_WORDS = 8
# Below this it is one only when it begins in the response's words too. A response often restates its task ("Here is
# a rap battle between …"), and then the request's own first words ("Write a") are not in it.
COPY_LONG = 40

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ENDINGS = " \t\r\n.!?…。！？"


class _Spacing(dict[int, str]):
    """Per character: itself, set apart, or a space. Filled as characters come up."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)[0]
        if _UNSPACED.match(letter) and kind == "L":
            self[code] = f" {letter}"
        else:
            self[code] = letter if kind in "LNM" else " "
        return self[code]


_SPACING = _Spacing()


def folded(text: str) -> str:
    """`text` with compatibility forms unified (NFKC), without case, with single spaces."""
    return " ".join(_unified(text).split())


def words(text: str) -> list[str]:
    """Words without case and punctuation; one a character in scripts that put no spaces between words."""
    return _unified(text).translate(_SPACING).split()


def _unified(text: str) -> str:
    # Folding can undo the normal form, so it comes in the middle.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def normalised(text: str) -> str:
    """The key under which two texts are exact duplicates: case, spacing and final punctuation do not count.

    Other punctuation does: "What is C?" is not "What is C++?".
    """
    key = folded(text)
    return key.rstrip(_ENDINGS) or key


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """The runs of `n` words; a shorter text is one run of all its words."""
    size = min(n, len(tokens))
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)] if size else []


def ngram_overlap(text: str, other: str, n: int) -> float:
    """Share of the word `n`-grams of `text` that stand in `other` too, 0.0..1.0; 0.0 for a text without words."""
    return _share(words(text), words(other), n)


def is_echo(instruction: str, prompt_template: str) -> bool:
    """Whether an instruction repeats the template that asked for it, rather than follow it.

    So it is when half of its 3-grams are the template's, or when 8 of the template's words stand in a row in it.
    """
    own, template = words(instruction), words(prompt_template)
    runs = set(ngrams(template, ECHO_RUN)) if len(template) >= ECHO_RUN else set()
    return _share(own, template, ECHO_NGRAM) >= ECHO_SHARE or not runs.isdisjoint(ngrams(own, ECHO_RUN))


def is_copy(instruction: str, response: str) -> bool:
    """Whether an instruction is lifted from the response it should have asked for.

    So it is when four fifths of its 5-grams are in the response, the first among them below 40 words; below
    8 words, when it is the whole response. A question that quotes a line of the response is none.
    """
    own, theirs = words(instruction), words(response)
    if len(own) < COPY_WORDS:
        return bool(own) and own == theirs
    opens_alike = len(own) >= COPY_LONG or _share(own[:COPY_NGRAM], theirs, COPY_NGRAM) == 1
    return opens_alike and _share(own, theirs, COPY_NGRAM) >= COPY_SHARE


def _share(own: list[str], other: list[str], n: int) -> float:
    mine = ngrams(own, n)
    known = set(ngrams(other, len(mine[0]))) if mine else set()
    return _mean(each in known for each in mine)


def _mean(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0
