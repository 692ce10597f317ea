"""Which language a text is in, and which languages a recipe can ask for."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# ISO 639-1. A recipe is checked before anything heavy is imported, so they stand here.
LANGUAGE_NAMES: Mapping[str, str] = dict(
    re.findall(
        "([a-z]{2}) ([^,]+)",
        "af Afrikaans,am Amharic,an Aragonese,ar Arabic,as Assamese,az Azerbaijani,ba Bashkir,be Belarusian,"
        "bg Bulgarian,bn Bengali,br Breton,bs Bosnian,ca Catalan,cs Czech,cy Welsh,da Danish,de German,dz Dzongkha,"
        "el Greek,en English,eo Esperanto,es Spanish,et Estonian,eu Basque,fa Persian,fi Finnish,fo Faroese,fr French,"
        "fy Frisian,ga Irish,gd Scottish Gaelic,gl Galician,gu Gujarati,ha Hausa,he Hebrew,hi Hindi,hr Croatian,"
        "ht Haitian,hu Hungarian,hy Armenian,id Indonesian,ig Igbo,is Icelandic,it Italian,ja Japanese,jv Javanese,"
        "ka Georgian,kk Kazakh,km Khmer,kn Kannada,ko Korean,ku Kurdish,ky Kyrgyz,la Latin,lb Luxembourgish,lg Ganda,"
        "ln Lingala,lo Lao,lt Lithuanian,lv Latvian,mg Malagasy,mk Macedonian,ml Malayalam,mn Mongolian,mr Marathi,"
        "ms Malay,mt Maltese,my Burmese,ne Nepali,nl Dutch,nn Nynorsk,no Norwegian,oc Occitan,om Oromo,or Odia,"
        "pa Punjabi,pl Polish,ps Pashto,pt Portuguese,qu Quechua,ro Romanian,ru Russian,rw Kinyarwanda,sa Sanskrit,"
        "se Northern Sami,si Sinhala,sk Slovak,sl Slovenian,sn Shona,so Somali,sq Albanian,sr Serbian,st Sotho,"
        "sv Swedish,sw Swahili,ta Tamil,te Telugu,tg Tajik,th Thai,tk Turkmen,tl Tagalog,tr Turkish,tt Tatar,"
        "ug Uyghur,uk Ukrainian,ur Urdu,uz Uzbek,vi Vietnamese,vo Volapük,wa Walloon,xh Xhosa,yo Yoruba,zh Chinese,"
        "zu Zulu",
    )
)
LANGUAGES = frozenset(LANGUAGE_NAMES)

# Of 778 Guanaco pairs one goes to a wrong language above it (a shell session, told in German), and 4 fall below it:
# text of a few words, or names.
_CERTAIN = 0.5
# At 1,000, a pair whose prompt quotes a page to translate goes to the language of the page.
_LOOKED_AT_CHARS = 2_000
# So that a page of code before the prose costs no more than this.
_SEARCHED_CHARS = 20_000
_NO_LANGUAGE = "zxx"
# OASST labels Norwegian by its written form.
_SAME = {"nb": "no"}
_ALIKE = 0.85

# Code, addresses and tags are mostly English words whatever the language of the text is; figures and marks are none.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`+[^`\n]*`+"
    r"|(?:https?://|www\.)\S+|</?[A-Za-z][^<>]{0,300}>"
    r"|[\d`|#*_=+~^<>{}\[\]()/\\@$%&\"]+",
    re.DOTALL,
)


def language(text: str) -> str | None:
    """The ISO 639-1 code of the language of `text`, by its first 2,000 characters of prose; None if it cannot be told.

    Close varieties count as the language with a code: Cantonese and Wu as Chinese, Egyptian as Arabic. The first call
    of a process loads the model, most of a second.
    """
    prose = " ".join(_NOT_PROSE.sub(" ", text[:_SEARCHED_CHARS]).split())
    code, probability = _identifier().classify(prose[:_LOOKED_AT_CHARS])
    return code if probability >= _CERTAIN and code != _NO_LANGUAGE else None


def primary(label: str) -> str:
    """The language of a label that may name a region too: "pt" of "pt-BR"."""
    subtag = re.split("[-_]", label.strip().lower())[0]
    return _SAME.get(subtag, subtag)


def nearest_language(code: str) -> str:
    """What to say to someone who asked for `code`, which is none of LANGUAGES: the one probably meant, or examples."""
    meant = _meant(code)
    return f"did you mean {meant!r} ({LANGUAGE_NAMES[meant]})?" if meant else "such codes are 'en', 'de' and 'zh'"


def _meant(code: str) -> str | None:
    if primary(code) in LANGUAGES:
        return primary(code)
    wanted = code.strip().casefold()
    codes = {name.casefold(): code for code, name in LANGUAGE_NAMES.items()}
    begun = [name for name in codes if len(wanted) > 2 and name.startswith(wanted)]
    if names := begun or get_close_matches(wanted, codes, n=1, cutoff=_ALIKE):
        return codes[min(names, key=len)]
    return wanted[:2] if len(wanted) == 3 and wanted[:2] in LANGUAGES else None


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES | {_NO_LANGUAGE})
    return identifier
