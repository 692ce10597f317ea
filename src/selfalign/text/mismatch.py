"""Whether an instruction is in another language than its response, where nothing in it explains that."""

import re

from selfalign.text.language import LANGUAGE_NAMES, language

# In bytes of UTF-8, which weigh a Chinese character like three letters. Of 2,200 English prompts cut to 30 letters
# three were told as another language, of 2,000 cut to 40 one was.
_TOLD_BYTES = 40
# Most pairs agree by their beginnings, which take half the time of 2,000 characters; those that do not are looked at
# sentence by sentence.
_BEGINNING_CHARS = 500
_LOOKED_AT_CHARS = 2_000

# A short text in one is easily taken for another.
_FAMILIES = (
    {"da", "no", "nn", "sv"},
    {"es", "pt", "gl", "ca", "an", "oc", "la"},
    {"bs", "hr", "sr", "sl"},
    {"cs", "sk"},
    {"ru", "uk", "be", "bg", "mk"},
    {"id", "ms", "jv"},
    {"nl", "af", "fy"},
    {"de", "lb"},
    {"hi", "mr", "ne", "sa"},
    {"fa", "ar", "ur", "ps", "ku", "ug"},
    {"kk", "ky", "tt", "ba", "mn"},
    {"tr", "az", "tk"},
)

# How the names of often wanted languages begin in others.
_NAMED = {
    "ar": "arab árab араб عرب 阿拉伯 アラビア",
    "de": "german deutsch allemand aleman alemán alemão tedesc немец німец 德语 德文 德語 ドイツ 독일",
    "en": "engl ingl inglé inglê anglai англи англі angiel 英语 英文 英語 영어 إنجليز الإنجليز",
    "es": "españ espan espagn spani spagn castell испан іспан 西班牙 スペイン 스페인",
    "fr": "franc franç franz fran француз 法语 法文 法語 フランス 프랑스",
    "it": "itali итал італ 意大利 イタリア 이탈리아",
    "ja": "japan japon giappon japon япон 日语 日文 日語 日本 일본",
    "ko": "korean corean coréen koreanisch корей 韩语 韓 한국",
    "pt": "portu португал 葡萄牙 ポルトガル",
    "ru": "russ rus ruso русск російськ 俄语 俄文 ロシア 러시아",
    "zh": "chines chinois chino cinese китай 中文 汉语 漢語 中国 mandarin 중국",
}
_TRANSLATES = re.compile(
    r"\b(?:translat|translit|traduc|tradui|tradu[zçt]|traduz|tradurr|übersetz|перевед|перевод|переклад|vertaal|tłumacz|"
    r"terjemah|çevir)|翻[译譯訳]|번역|ترجم"
)
_QUOTED = re.compile(r"«[^»]*»|“[^”]*”|„[^“”]*[“”]|\"[^\"\n]*\"|「[^」]*」|```.*?(?:```|\Z)", re.DOTALL)
_ENDS = re.compile(r"[.:!?…]\s|[\n。！？]")


def is_mismatch(instruction: str, response: str) -> bool:
    """Whether an instruction is in another language than its response, and a user who asked so is unlikely.

    Both must be told with certainty, as a whole and sentence by sentence. No mismatch is

    - an instruction that names the response's language or asks for a translation;
    - one of which any sentence is in the response's language, or the reverse: a text to work on, an example, a gloss;
    - a pair of related languages, which short texts do not tell apart;
    - a text without a sentence of some 40 letters outside quotation marks: titles, names, commands.
    """
    # Such a one has no sentence that could be told.
    if len(instruction.encode("utf-8", "replace")) < _TOLD_BYTES:
        return False
    asked, given = language(instruction[:_LOOKED_AT_CHARS]), language(response[:_BEGINNING_CHARS])
    if asked is None or given is None or _related(asked, given) or _is_asked_for(instruction, given):
        return False
    asked_parts, given_parts = _languages(instruction), _languages(response)
    return bool(asked_parts and given_parts) and not any(_related(a, g) for a in asked_parts for g in given_parts)


def _related(one: str, other: str) -> bool:
    return one == other or any({one, other} <= family for family in _FAMILIES)


def _is_asked_for(instruction: str, code: str) -> bool:
    text = instruction.casefold()
    names = [LANGUAGE_NAMES[code].casefold(), *_NAMED.get(code, "").split()]
    # A name in letters begins a word; in scripts without spaces it may stand anywhere.
    return bool(_TRANSLATES.search(text)) or any(
        re.search(rf"\b{name}" if name < "\u0600" else name, text) is not None for name in names
    )


def _languages(text: str) -> set[str]:
    """The languages of those sentences at the beginning of `text` that are long enough to be told."""
    parts = _ENDS.split(_QUOTED.sub(" ", text[:_LOOKED_AT_CHARS]))
    told = {language(part) for part in parts if len(part.strip().encode("utf-8", "replace")) >= _TOLD_BYTES}
    return {code for code in told if code is not None}
