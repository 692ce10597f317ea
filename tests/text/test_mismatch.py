import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.text.mismatch import is_mismatch

ENGLISH = (
    "The kettle has to boil before the tea is made, and the cups should be warm. Pour slowly and wait four minutes."
)
GERMAN = (
    "Das Wasser muss kochen, bevor der Tee aufgegossen wird, und die Tassen sollten warm sein. Danach vier Minuten."
)
SPANISH = (
    "El agua tiene que hervir antes de preparar el té, y las tazas deben estar calientes. Luego espera cuatro minutos."
)
RUSSIAN = "Воду нужно вскипятить, прежде чем заваривать чай, а чашки согреть. Затем подождите четыре минуты."
CHINESE = "泡茶之前要先把水烧开，还要把杯子温热。倒水的时候要慢一点，然后等四分钟再喝。"
ASK = "How should I make a good pot of tea for four of my guests?"


@pytest.mark.parametrize("response", [GERMAN, SPANISH, RUSSIAN, CHINESE])
def test_an_english_instruction_for_another_languages_text_is_a_mismatch(response: str) -> None:
    assert is_mismatch(ASK, response)
    assert not is_mismatch(ASK, ENGLISH)


@pytest.mark.parametrize(
    "instruction",
    [
        "Wie bereite ich für vier Gäste eine gute Kanne Tee zu?",
        "¿Cómo debo preparar una buena tetera para cuatro invitados?",
        "Как правильно заварить хороший чай для четырёх гостей?",
        "请问我应该怎样为四位客人泡一壶好喝的茶呢？",
    ],
)
def test_another_languages_instruction_for_an_english_text_is_a_mismatch(instruction: str) -> None:
    assert is_mismatch(instruction, ENGLISH)


@pytest.mark.parametrize(
    ("instruction", "response"),
    [
        ("Write in German how to make a good pot of tea for my guests.", GERMAN),
        ("Schreibe auf Englisch, wie man für vier Gäste Tee zubereitet.", ENGLISH),
        ("Explica en inglés cómo se prepara una buena tetera para cuatro.", ENGLISH),
        ("Объясни на английском, как заварить чай для четырёх гостей.", ENGLISH),
        ("请用英文说明应该怎样为四位客人泡一壶好喝的茶。", ENGLISH),
        ("Erkläre auf Chinesisch, wie man für vier Gäste Tee zubereitet.", CHINESE),
        ("Describe the making of tea in Russian, for a cookery book.", RUSSIAN),
        (f"Translate this for my guests, please: {ENGLISH}", GERMAN),
        (f"Traduce este texto para mis invitados: {SPANISH}", ENGLISH),
    ],
)
def test_an_instruction_that_names_the_language_or_a_translation_is_none(instruction: str, response: str) -> None:
    assert not is_mismatch(instruction, response)


def test_naming_a_language_other_than_the_responses_is_no_excuse() -> None:
    assert is_mismatch("Write in French how to make a good pot of tea for my guests.", GERMAN)


@pytest.mark.parametrize(
    ("instruction", "response"),
    [
        (f"Fasse den folgenden Text für meine Gäste zusammen.\n{ENGLISH * 3}", GERMAN),
        (f"Carry on in the words of my grandmother, who was born there.\n{GERMAN}", GERMAN + GERMAN),
        (ASK, f"My grandmother used to say it in her own words, which I still know by heart.\n{GERMAN * 3}"),
    ],
)
def test_a_sentence_in_the_others_language_on_either_side_explains_it(instruction: str, response: str) -> None:
    assert not is_mismatch(instruction, response)


@pytest.mark.parametrize(
    ("instruction", "response"),
    [
        ("Why?", GERMAN),
        ("Tea for four", GERMAN),
        (ASK, "Ja."),
        ("", GERMAN),
        (ASK, ""),
        (ASK, "1 2 3\n4 5 6"),
        (
            "escribe una lista de las mejores canciones de las que se oyen hoy",
            "1. «The Sound of Silence»\n2. «Let It Be»",
        ),
        (
            "Zeige mir, was die Shell nach diesen beiden Befehlen ausgibt.",
            "~# mkdir the_new_folder\n~# cd the_new_folder",
        ),
    ],
)
def test_what_is_too_short_to_be_told_is_none(instruction: str, response: str) -> None:
    assert not is_mismatch(instruction, response)


def test_languages_that_short_texts_do_not_tell_apart_are_one() -> None:
    danish = (
        "Vandet skal koge, før teen bliver lavet, og kopperne skal være varme. Hæld langsomt og vent fire minutter."
    )
    norwegian = "Hvordan lager jeg en god kanne te til fire gjester hjemme hos meg?"
    assert not is_mismatch(norwegian, danish)
    assert is_mismatch(ASK, danish)


@settings(deadline=None)
@given(st.text() | st.text(st.characters(exclude_categories=[])), st.sampled_from(["", ENGLISH, GERMAN, CHINESE]))
def test_a_text_never_mismatches_itself(text: str, around: str) -> None:
    assert not is_mismatch(text + around, text + around)


def pairs(data: Path) -> set[tuple[str, str]]:
    """Distinct real first turns: LIMA's, Guanaco's, and the 150 instructions that a model wrote for LIMA."""
    found = set()
    for line in (data / "lima" / "train.jsonl").read_text("utf-8").splitlines():
        asked, answer, *_ = json.loads(line)["conversations"]
        found.add((asked.strip(), answer.strip()))
    for line in (data / "guanaco" / "oa_questions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        asked, answer, *_ = [*re.split(r"(?<!#)### ?(?:Human|Assistant):", row["text"])[1:], ""]
        found.add((asked.strip(), answer.strip() or row["output"].strip()))
    rated = json.loads((data / "lima" / "rated_150.json").read_text("utf-8"))
    return found | {(row["generated_instruction"].strip(), row["response"].strip()) for row in rated}


def test_of_1956_real_pairs_in_many_languages_one_is_dropped_and_is_a_mismatch(real_data: Path) -> None:
    found = pairs(real_data)
    assert len(found) == 1956
    dropped = [asked for asked, answer in found if is_mismatch(asked, answer)]
    # Answered in German, which nothing but the title says.
    assert [asked.split(".")[0] for asked in dropped] == ['Hitler writes a second book called "mein hobby"']


def test_of_real_pairs_put_together_across_languages_most_are_found(real_data: Path) -> None:
    from selfalign.text.language import language

    told = [(asked, answer) for asked, answer in sorted(pairs(real_data)) if language(asked) == language(answer)]
    english = [pair for pair in told if language(pair[0]) == "en"]
    others = [pair for pair in told if language(pair[0]) in ("de", "es", "fr", "ru")]
    mixed = [((e[0], o[1]), (o[0], e[1])) for e, o in zip(english, others, strict=False)]
    found = [is_mismatch(*pair) for both in mixed for pair in both]
    assert (len(found), sum(found)) == (630, 539)
