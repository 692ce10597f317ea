"""Chat replies that stand where an instruction should: a model refuses, or talks about its task.

Precision comes first: both look at how a text opens, and let pass what a user could have typed. Known are English,
German, French, Spanish, Russian and Chinese; talk about the task beyond "Sure! Here is" in English alone.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from selfalign.text.overlap import folded

# A reply shows itself at once; what an instruction quotes further down is its own affair.
_LOOKED_AT_CHARS = 600
_MARKS = " \t\"'“”„«»‘*_#>`~-–—:,.¡¿!?()[]"


class _Phrases(NamedTuple):
    """How assistants speak in one language: patterns over folded text."""

    sorry: str
    as_a_model: str
    """Of assistants alone: flight attendants, scientific assistants and AI researchers have instructions to give."""
    i_cannot: str
    deeds: str
    """What assistants are asked for, after `sorry` and `i_cannot`: "I'm sorry, but I can't log in" is a user."""
    sure: str
    here_is: str


_LANGUAGES = (
    _Phrases(
        r"(?:(?:i'm|i am|we are) (?:\w+ )?sorry,?(?: but)?|sorry,? but|"
        r"(?:i |my )(?:\w+ )?apolog(?:i[sz]e|ies),?(?: but)?)(?: that)?",
        r"as an? (?:large |mere |helpful |responsible |open[ -]source |text-based )*"
        r"(?:(?:ai|artificial intelligence)(?: (?:language )?(?:model|assistant|chatbot|system))?|language model)"
        r"(?: (?:trained|developed|created|designed|made)\b[^.?!,]{0,40})?,? ",
        r"i(?:'m| am)? ?(?:\w+ ){0,2}?(?:can't|cannot|can not|unable|not able|haven't|have no|have not|don't have|"
        r"do not have|not programmed|won't|will not|must decline)\b",
        r"access to (?:real|current|external|personal)|(?<!an )answer|assist|comply|complete|compose|continue|creat|"
        r"determine|discuss|engage|fulfil|generat|give|help (?:you|with)|identify|infer|offer|produce|provid|respond|"
        r"shar|suggest|support|tell you|translat|write",
        r"sure(?: thing)?|certainly|of course|absolutely|gladly",
        # "Here is my draft" is a user's.
        r"here(?:'s| is| are)(?! my| our)\b",
    ),
    _Phrases(
        r"(?:es )?tut mir (?:\w+ )?leid,?(?: aber)?|leider|entschuldigung,? aber",
        r"als (?:eine? )?(?:reine[sr]? |grosse[sr]? )?"
        r"(?:ki|künstliche intelligenz|(?:ki-?)?sprachmodell|ki-assistent\w*)(?: von [^.?!,]{0,20})?,? ",
        r"(?:\w+ )?(?:ich (?:kann|darf|habe|bin)|(?:kann|darf|habe|bin) ich)\b[^.?!]{0,60}\b(?:nicht|kein\w*)\b",
        # The verb comes last.
        r"[^.?!]{0,40}?(?:beantwort|bereitstell|erfüll|erstell|generier|helfen|schreib|übersetz|unterstütz)",
        r"natürlich|gerne?|klar|selbstverständlich|sicher",
        r"hier (?:ist|sind|kommt|hast du|haben sie)",
    ),
    _Phrases(
        r"(?:je suis |nous sommes )?(?:\w+ )?désolée?s?,?(?: mais)?|je m'excuse,?(?: mais)?",
        r"en tant qu(?:e |')(?:grand )?(?:ia\b|intelligence artificielle|assistant (?:ia|virtuel)|"
        r"modèle (?:de langage|linguistique|d'ia))[^.?!,]{0,30},? ",
        r"[^.?!]{0,40}?\bje (?:ne |n')(?:\w+ ){0,2}?(?:pas|suis|ai)\b",
        r"aide|crée|donne|écri|fourni|génér|rédige|répond|satisfai|tradui",
        r"bien sûr|certainement|avec plaisir|volontiers",
        r"voici|voilà",
    ),
    _Phrases(
        r"lo (?:siento|lamento)(?: mucho)?,?(?: pero)?|me disculpo,?(?: pero)?",
        r"como (?:soy )?(?:una? )?(?:gran )?(?:ia\b|inteligencia artificial|asistente (?:de ia|virtual)|"
        r"modelo de lenguaje)[^.?!,¿]{0,40},? ",
        r"(?:yo )?no (?:puedo|tengo|soy|poseo|considero|es apropiado)\b",
        r"ayuda|cumpli|crear|escribi|generar|ofrec|proporciona|responde|revisar|traduc",
        r"claro(?: que sí)?|por supuesto|con (?:mucho )?gusto|desde luego",
        r"aquí (?:te|le|tienes?|está|va)",
    ),
    _Phrases(
        r"(?:к сожалению|извините|простите|прошу прощения|мне (?:очень )?жаль),?(?: но)?",
        r"(?:как|я) (?:большая )?(?:ии(?:-ассистент)?|искусственный интеллект|языковая модель)(?: ии)?,?(?: и)? ",
        r"(?:я )?не (?:могу|способ\w+|имею|умею|в состоянии|обладаю)\b",
        r"выполн|напис|ответ|перевести|помо[чг]|предостав|созда|сгенер",
        r"конечно|разумеется|с удовольствием",
        r"вот",
    ),
    _Phrases(
        r"(?:非常|很)?(?:抱歉|对不起|對不起|不好意思),?(?:但是?)?",
        r"(?:作为|作為|我是)一?[个個名种種]? ?(?:大型?)?"
        r"(?:(?:ai|人工智[能慧]) ?(?:助手|语言模型|語言模型|(?=,))|语言模型|語言模型),?",
        r"[^。.?!]{0,8}?(?:无法|無法|不能|没有|沒有)",
        r"回答|提供|生成|满足|滿足|帮|幫|协助|協助|创建|創建|完成|翻译|翻譯|写|寫",
        r"当然(?:可以)?|當然(?:可以)?|好的|没问题|沒問題",
        r"(?:以下|下面|这|這)(?:就)?是",
    ),
)

_CANNOT = r"(?:unfortunately,? )?i(?:'m| am)? ?(?:\w+ )?(?:can't|cannot|can not|unable to|not able to|won't|will not)"
_INSTRUCTION = (
    r"(?:an?|any|the|what)(?: \w+){0,2}? (?:instruction\b|(?:user's?|original) (?:\w+ )?(?:request|prompt)\b)"
)
_REFUSED_FLATLY = (
    # Without an apology it may be a user's trouble: "I can't write a good prompt", "I cannot create a pull request".
    rf"{_CANNOT} (?:\w+ )?(?:assist|help)(?: you)? with (?:that|this|your)\b",
    rf"{_CANNOT} (?:\w+ )?(?:fulfil\w*|comply with|complete) (?:that|your) (?:request|instruction|prompt)",
    rf"{_CANNOT} (?:\w+ )?provide(?: you with)? (?:\w+ )?(?:advice|assistance|guidance|information|ways of) ",
    rf"{_CANNOT} (?:\w+ )?(?:generate|create|write|produce) (?:explicit|harmful|illegal|such) ",
    rf"{_CANNOT} (?:\w+ )?(?:generate|create|write|determine|infer|identify|reconstruct|tell) {_INSTRUCTION}",
    rf"it(?:'s| is) (?:not possible|impossible) to (?:determine|infer|identify|reconstruct|tell) {_INSTRUCTION}",
    rf"th(?:e|is) (?:\w+ )?(?:text|response|passage)(?: \w+)? (?:does not|doesn't) (?:\w+ ){{1,3}}?{_INSTRUCTION}",
    r"i(?:'m| am) (?:just |only )?an? (?:\w+ )?(?:ai )?language model\b[^.?!]{0,40}\bi(?:'m| am)? ?(?:\w+ )?"
    r"(?:can't|cannot|don't|do not|unable|not able)\b",
    r"i (?:don't|do not) have (?:any|enough|sufficient) (?:information|context|details)\b[^.?!]{0,80}"
    r"\bso,? i (?:can't|cannot|am unable)\b",
)

_LIKELY = r"(?:most |very )?(?:likely|probably|possibly)"
_REQUEST = r"(?:instruction|request|prompt)\b"
_ASKED = r"(?:ask|want|request|sa[iy]|g[ai]ve|typ|wr[io]t|ma[dk]e|need|prompt|look)"
_HELP = r"(?:assist|complete|help|provide)"
_TALKING = (
    r"here(?:'s| is| are) (?:the (?:answers|responses) to )?(?:each|the|your)(?: \w+)? tasks?\b"
    r"(?! (?:that )?(?:i|we)\b)[^.?!]{0,80}:",
    rf"here(?:'s| is) (?:an?|one|the) (?:\w+ )?(?:user(?:'s)?|possible|likely|suitable|plausible) (?:\w+ )?{_REQUEST}",
    rf"here(?:'s| is) (?:an?|the) (?:\w+ )?{_REQUEST} (?:based on|for|from|that|to) (?:an?|the|this) "
    r"(?:\w+ )?(?:assistant|passage|response|text|user)\b",
    # What the user did, told with doubt: "The user wants to log in" may open a story that a user brings.
    rf"(?:it (?:is likely|seems|appears) that )?the user (?:has |had )?"
    rf"(?:{_LIKELY}|(?:may|might|must|could) have) {_ASKED}",
    rf"the user(?:'s)? (?:\w+ ){{0,2}}?(?:{_REQUEST}|question|query)[^.?!:]{{0,60}}? (?:(?:is|was) {_LIKELY}|"
    r"(?:could|might|may|would) (?:have been|be))\b",
    rf"(?:the|an?|one) (?:most )?(?:likely|probable|possible|plausible|suitable) (?:user )?{_REQUEST} "
    r"(?:could|for (?:the|this)|is|might|that|was|would)\b",
    rf"the (?:user )?{_REQUEST} (?:for|behind|that led to) (?:the|this) (?:\w+ )?(?:passage|response|text)\b",
    # A user's own goes on with what to do: "Based on the text, name …".
    r"based on (?:the|this|your)(?: \w+){0,3}? (?:answer|content|context|information|passage|response|text)"
    r"[^.?!,:]{0,40}, "
    rf"(?:the (?:{_LIKELY} )?(?:user\b|original|{_REQUEST})|it (?:is likely|seems|appears)\b|here(?:'s| is| are)\b|"
    r"i (?:can|would|will) (?:infer|assume|guess|say|generate)\b)",
    rf"i(?:'d| would|'ll| will|'m| am) (?:be )?(?:more than )?(?:happy|glad|delighted) to {_HELP}(?: with)? "
    r"(?:you|that|this|these|those|each|your|the tasks?)\b",
    rf"i(?:'m| am) (?:happy|glad|ready|here|excited) to (?:{_HELP}[.!:]|work with you\b)",
    r"i(?:'ll| will| can) (?:complete|go through|help|assist|respond to)(?: you)?(?: with)? "
    r"(?:all|each|the|these|your)(?: of)?(?: \w+)? tasks?\b",
    r"it (?:seems|looks|appears) (?:like |that |as if )?you(?:'ve| have|'re| are)? (?:already |not )?"
    r"(?:provided|listed|pasted|asking for|looking for)\b",
)


def _any(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


_REFUSAL = _any(
    (
        *(rf"(?:(?:{each.sorry})\W*)?(?:{each.as_a_model})(?:{each.i_cannot})" for each in _LANGUAGES),
        *(rf"(?:{each.sorry})\W*(?:{each.i_cannot})[^.?!。]{{0,20}}?(?:{each.deeds})" for each in _LANGUAGES),
        *_REFUSED_FLATLY,
    )
)
_PREAMBLE = _any((*(rf"(?:{each.sure})\W+(?:{each.here_is})" for each in _LANGUAGES), *_TALKING))


def is_refusal(text: str) -> bool:
    """Whether a text opens as a model that declines: "I'm sorry, but I can't …", "As a language model, I cannot …".

    An apology counts with something that assistants are asked for, "as a language model" with a denial, and a bare
    "I cannot" only in words that no user's trouble is told in.
    """
    return bool(_REFUSAL.match(_opening(text)))


def is_preamble(text: str) -> bool:
    """Whether a text opens as a chat reply about an instruction: "Sure! Here is …", "The user most likely asked …".

    "Here is a draft:" and "Based on the text, …" are users' own openings, and count only with what a model says next.
    """
    return bool(_PREAMBLE.match(_opening(text)))


def _opening(text: str) -> str:
    return folded(text[:_LOOKED_AT_CHARS]).replace("’", "'").lstrip(_MARKS)
