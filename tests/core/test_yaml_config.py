import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from selfalign.core.errors import RecipeError
from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.yaml_config import apply, load, override, read, validate

N = int(os.environ.get("N", "250"))


class Model(Frozen):
    path: Annotated[str, RecipePath]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Filters(Frozen):
    min_words: NonNegativeInt = 3
    languages: tuple[str, ...] | Literal["any"] = "any"
    drop_echo: bool = True


class Training(Frozen):
    lora_r: PositiveInt | None = None
    learning_rate: PositiveFloat = 1e-5
    lora_dropout: float = Field(0.0, ge=0, lt=1)


class Curate(Frozen):
    threshold: float = Field(4.0, ge=1, le=5)
    keep: Literal["all"] | PositiveInt | None = None
    model: Annotated[str, RecipePath("previous", "base")] = "previous"
    few_shot_files: tuple[Annotated[str, RecipePath], ...] = ()

    @field_validator("few_shot_files")
    @classmethod
    def _few(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > 3:
            raise ValueError("three few-shot files are enough")
        return value


class Recipe(Frozen):
    name: str = Field(min_length=1)
    seed: NonNegativeInt = 0
    rounds: PositiveInt = 1
    model: Model
    filters: Filters = Filters()
    backward: Training = Training()
    forward: Training | None = None
    curate: Curate = Curate()
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sane(self) -> "Recipe":
        if self.name == "contradictory":
            raise ValueError("name: contradictory contradicts itself")
        return self


GOOD = """\
# A comment first.
name: atlas
seed: 7
rounds: 2
model:
  path: org/base-model
  dtype: float32
filters:
  min_words: 4
  languages: [en, de]
  drop_echo: true
backward:
  lora_r: 16
  learning_rate: 1e-4
  lora_dropout: 0.1
curate:
  threshold: 4
  keep: all
arms:
  uncurated: {curate.keep: all}
  strict:
    curate.threshold: 4.5
    curate: {keep: 100}
"""
LINES = {
    "name": 2, "seed": 3, "rounds": 4, "model": 5, "model.path": 6, "model.dtype": 7, "filters": 8,
    "filters.min_words": 9, "filters.languages": 10, "filters.drop_echo": 11, "backward": 12,
    "backward.lora_r": 13, "backward.learning_rate": 14, "backward.lora_dropout": 15, "curate": 16,
    "curate.threshold": 17, "curate.keep": 18,
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def _write(content: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, Recipe, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


Write = Callable[[str | bytes], Path]


def test_a_good_recipe_loads(write: Write) -> None:
    recipe = load(write(GOOD), Recipe)
    assert recipe.backward.learning_rate == 1e-4
    assert recipe.filters.languages == ("en", "de")
    assert recipe.curate.threshold == 4.0
    assert recipe.arms["uncurated"] == {"curate.keep": "all"}


def test_the_document_knows_every_line(write: Write) -> None:
    document = read(write(GOOD))
    assert {key: document.lines[tuple(key.split("."))] for key in LINES} == LINES
    assert document.lines[("filters", "languages", 1)] == 10
    assert document.lines[("arms", "strict", "curate", "keep")] == 23


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("3", 3.0), ("1.", 1.0), ("2e+3", 2000.0), ("0010", 10.0)],
)
def test_numbers_are_read_as_people_mean_them(write: Write, text: str, value: float) -> None:
    assert load(write(GOOD), Recipe, [f"backward.learning_rate={text}"]).backward.learning_rate == value


@pytest.mark.parametrize("word", ["yes", "No", "on", "off", "y", "2024-01-31", "1_000", "12:30:45", "~x", "=", "0b1"])
def test_words_that_yaml_once_changed_stay_text(write: Write, word: str) -> None:
    assert load(write(GOOD.replace("atlas", word)), Recipe).name == word


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("On", True), ("no", False), ("OFF", False), ("false", False)]
)
def test_a_switch_takes_yes_and_no(write: Write, word: str, value: bool) -> None:
    assert load(write(GOOD), Recipe, [f"filters.drop_echo={word}"]).filters.drop_echo is value


def test_a_whole_float_serves_as_an_integer_and_nothing_else_does(write: Write) -> None:
    path = write(GOOD)
    assert load(path, Recipe, ["seed=1e3"]).seed == 1000
    assert "expected a whole number, found 1.5" in message_of(path, "seed=1.5")
    assert "expected a whole number, found true" in message_of(path, "seed=true")
    assert "found the text '3' (a number without quotes?)" in message_of(path, "seed='3'")
    assert "expected text, found 3 (put it in quotes)" in message_of(path, "name=3")


def test_all_errors_come_in_one_message_by_line(write: Write) -> None:
    path = write(
        GOOD.replace("seed: 7", "sead: 7")
        .replace("dtype: float32", "dtype: float23")
        .replace("lora_r: 16", "lora_r: many")
        .replace("lora_dropout: 0.1", "lora_dropout: 1.5")
        .replace("keep: all", "keep: some\n  threshold: 3", 1)
    )
    assert message_of(path).splitlines() == [
        f"{path}:3: sead: unknown key; did you mean seed?",
        f"{path}:7: model.dtype: expected 'float32', 'bfloat16' or 'float16', found the text 'float23'; "
        "did you mean 'float32'?",
        f"{path}:13: backward.lora_r: expected a whole number, found the text 'many'",
        f"{path}:15: backward.lora_dropout: expected a number below 1, found 1.5",
        f"{path}:18: curate.keep: expected 'all' or a whole number, found the text 'some'",
        f"{path}:19: curate.threshold: the key is given twice, first on line 17",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("curate.treshold", "did you mean curate.threshold?"),
        ("treshold", "did you mean curate.threshold?"),
        ("curate.min_words", "did you mean filters.min_words?"),
        ("curate.learning-rate", "did you mean backward.learning_rate or forward.learning_rate?"),
        ("backwards.lora_r", "did you mean backward?"),
        ("Model.path", "did you mean model?"),
        ("zzz", "the nearest is "),
        ("curate.zzz", "the nearest is curate."),
    ],
)
def test_an_unknown_key_names_the_nearest_at_any_level(write: Write, key: str, hint: str) -> None:
    message = message_of(write(GOOD), f"{key}=1")
    assert message.startswith(f"override '{key}=1': ")
    assert hint in message


def test_a_dotted_key_in_the_file_is_told_to_nest(write: Write) -> None:
    assert "curate: {threshold: …}" in message_of(write(GOOD + "curate.threshold: 3\n"))


def test_a_missing_key_is_told_with_its_section(write: Write) -> None:
    path = write("name: x\nmodel:\n  dtype: float32\n")
    assert message_of(path) == f"{path}:2: model.path: required, and not given"


def test_validators_speak_their_own_words(write: Write) -> None:
    path = write(GOOD)
    message = message_of(path, "curate.few_shot_files=[a, b, c, d]")
    assert message.endswith("curate.few_shot_files: three few-shot files are enough")
    assert "contradicts itself" in message_of(path, "name=contradictory")


BROKEN = {
    "a tab": ("name: a\nmodel:\n\tpath: x\n", ":3: model.path: not valid YAML: a tab; indent with spaces"),
    "an open bracket": ("name: a\nmodel: {path: x\nrounds: 3\n", ":2: model: not valid YAML: a bracket"),
    "an open quote": ("name: 'a\nrounds: 3\n", ":1: name: not valid YAML: a quote that is never closed"),
    "a second colon": ("name: a: b\n", ":1: name: not valid YAML: a colon"),
    "no colon": ("name: a\nmodel\nrounds: 3\n", ":2: model: not valid YAML: a colon is missing"),
    "bad indentation": ("model:\n  path: x\n dtype: y\n", ":3: model.dtype: not valid YAML: the indentation"),
    "two documents": ("name: a\n---\nname: b\n", ":2: name: not valid YAML: a second document"),
    "nothing": ("", ":1: the recipe is empty"),
    "a comment only": ("# nothing here\n", ":1: the recipe is empty"),
    "a list": ("- name: a\n", ":1: a recipe is a mapping of keys, and this is a list"),
    "a word": ("atlas\n", ":1: a recipe is a mapping of keys, and this is a single value"),
    "not UTF-8": (b"name: x\nseed: \xff\n", ":2: byte 14 is not UTF-8"),
    "UTF-16": ("name: x\n".encode("utf-16"), "is not UTF-8"),
    "a control character": ("name: \x07\n", ":1: name: the character 0x7 is not allowed"),
    "half a surrogate pair": ('name: "\\ud800"\n', ":1: name: half of a surrogate pair"),
    "a Python object": ("name: !!python/object/apply:os.getcwd []\n", ":1: name: the tag !!python/object/apply:os"),
    "an own tag": ("name: !env HOME\n", ":1: name: the tag !env is not allowed"),
    "a false tag": ("seed: !!int seven\n", ":1: seed: 'seven' cannot be read as !!int"),
    "a number beyond reason": (f"seed: {'9' * 5000}\n", ":1: seed: '99999"),
    "a float beyond range": ("seed: 1e999\n", ":1: seed: '1e999' cannot be read as !!float"),
    "not finite": (GOOD.replace("1e-4", ".inf"), ":14: backward.learning_rate: expected a finite number, found inf"),
    "a list as a key": ("? [a]\n: 3\n", ":1: a key must be plain text"),
    "an unknown alias": ("name: *who\n", ":1: name: not valid YAML: found undefined alias 'who'"),
    "an alias within itself": ("name: &a [*a]\n", ":1: nested deeper than 32 levels"),
    "a merge with itself": ("model: &a {<<: *a}\n", ":1: nested deeper than 32 levels"),
    "a merge with a word": ("model: {<<: word}\n", ":1: model: `<<` takes a mapping"),
    "deep nesting": ("name: " + "[" * 40 + "]" * 40, ":1: name: nested deeper than 32 levels"),
    "bottomless nesting": ("[" * 500_000, ":1: nested deeper than 32 levels"),
    "too many values": ("name: [" + "1, " * 30_000 + "]", "more than 10000 values"),
    "too large": ("name: x\n#" + "x" * (1 << 20), "larger than 1 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_sentence(write: Write, case: str) -> None:
    content, sentence = BROKEN[case]
    begun = time.thread_time()
    path = write(content)
    message = message_of(path)
    first = next(line for line in message.splitlines() if sentence in line)
    assert first.startswith(str(path))
    assert time.thread_time() - begun < 10


def test_thousands_of_mistakes_are_told_in_time(write: Write) -> None:
    begun = time.thread_time()
    lines = message_of(write(GOOD + "".join(f"k{i}: 1\n" for i in range(9000)))).splitlines()
    assert lines[-1].endswith(":124: 8900 more mistakes from here on")
    assert len(lines) == 101
    assert time.thread_time() - begun < 10


def test_a_billion_laughs_are_bounded(write: Write) -> None:
    rows = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "values once aliases are filled in" in message_of(write("\n".join(rows)))


def test_aliases_and_merges_work(write: Write) -> None:
    recipe = load(
        write(
            "name: x\nmodel: {path: m}\nbackward: &b\n  lora_r: 8\n  learning_rate: 1e-3\n"
            "forward:\n  <<: *b\n  lora_r: 4\n"
        ),
        Recipe,
    )
    assert recipe.forward == Training(lora_r=4, learning_rate=1e-3)


def test_what_is_not_a_readable_file_is_told(tmp_path: Path) -> None:
    assert "there is no such recipe" in message_of(tmp_path / "none.yaml")
    assert "this is a folder" in message_of(tmp_path)
    assert "cannot be read" in message_of(tmp_path / ("x" * 5000))


def test_a_byte_order_mark_and_crlf_do_not_matter(write: Write) -> None:
    crlf = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert load(write(crlf), Recipe) == load(write(GOOD), Recipe)
    assert ":3: sead" in message_of(write(crlf.replace(b"seed", b"sead")))


def test_overrides_come_after_the_file_in_order(write: Write) -> None:
    recipe = load(write(GOOD), Recipe, ["seed=8", "curate.threshold=3", "seed=9", "curate.keep=null"])
    assert (recipe.seed, recipe.curate.threshold, recipe.curate.keep) == (9, 3.0, None)


def test_an_override_reaches_into_an_absent_section(write: Write) -> None:
    path = write("name: x\nmodel: {path: m}\nforward:\n")
    assert load(path, Recipe, ["forward.lora_r=4"]).forward == Training(lora_r=4)
    assert load(path, Recipe, ["backward.lora_r=4"]).backward == Training(lora_r=4)


def test_a_mapping_merges_and_everything_else_replaces(write: Write) -> None:
    recipe = load(write(GOOD), Recipe, ["backward={lora_r: 2}", "filters.languages=[fr]", "curate={}"])
    assert (recipe.backward.lora_r, recipe.backward.learning_rate) == (2, 1e-4)
    assert recipe.filters.languages == ("fr",)
    assert recipe.curate.threshold == 4.0
    assert load(write(GOOD), Recipe, ["forward={}"]).forward == Training()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed", "an override has the form key.sub=value"),
        ("=3", "an override has the form key.sub=value"),
        ("a..b=3", "an override has the form key.sub=value"),
        (".".join("a" * 5000) + "=3", "an override has the form key.sub=value"),
        ("seed=[1", "seed: not valid YAML: a bracket that is never closed"),
        ("seed=!!python/name:os.x", "seed: the tag !!python/name:os.x is not allowed"),
        ("seed={a: 1, a: 2}", "the key is given twice"),
        ("seed=\x00", "a character that is not allowed"),
        ("seed=\udc80", "a character that is not allowed"),
        ("seed=-1", "seed: expected a number of at least 0, found -1"),
        ("name.x=3", "name: expected text, found a mapping"),
        ("filters.languages=[en, 3]", "filters.languages[1]: expected text, found 3"),
        ("filters.languages=3", "filters.languages: expected a list or 'any', found 3"),
        ("model.path=null", "model.path: expected text, found nothing (null)"),
        ("backward=3", "backward: expected a section with keys, found 3"),
        ("curate.keep=0", "curate.keep: expected 'all' or a number above 0, found 0"),
    ],
)
def test_a_bad_override_is_named(write: Write, text: str, sentence: str) -> None:
    message = message_of(write(GOOD), text)
    assert message.startswith(f"override {text!r}: ")
    assert sentence in message


def test_a_replaced_list_is_no_longer_told_by_its_old_line(write: Write) -> None:
    assert "recipe.yaml" not in message_of(write(GOOD), "filters.languages=[3, 4]")


def test_an_arm_applies_and_its_errors_carry_its_line(write: Write) -> None:
    document = read(write(GOOD))
    assert validate(apply(document, {"curate.keep": 5}), Recipe).curate.keep == 5
    strict = validate(apply(document, document.data["arms"]["strict"], ("arms", "strict")), Recipe)
    assert (strict.curate.threshold, strict.curate.keep) == (4.5, 100)
    path = write(GOOD.replace("curate.threshold: 4.5", "curate.treshold: 4.5").replace("keep: 100", "keep: none"))
    document = read(path)
    with pytest.raises(RecipeError) as caught:
        validate(apply(document, document.data["arms"]["strict"], ("arms", "strict")), Recipe)
    assert str(caught.value).splitlines() == [
        f"{path}:22: arms.strict: curate.treshold: unknown key; did you mean curate.threshold?",
        f"{path}:23: arms.strict: curate.keep: expected 'all' or a whole number, found the text 'none'",
    ]


def test_an_arm_set_on_the_command_line_is_told_by_its_override(write: Write) -> None:
    document = override(read(write(GOOD)), ["arms.mine.curate.keep=few"])
    with pytest.raises(RecipeError, match=r"^override 'arms.mine.curate.keep=few': arms.mine: curate.keep: "):
        validate(apply(document, document.data["arms"]["mine"], ("arms", "mine")), Recipe)


def test_paths_start_from_the_recipe_and_on_the_command_line_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    (recipes / "base").mkdir(parents=True)
    (here / "other").mkdir(parents=True)
    (recipes / "few.jsonl").touch()
    monkeypatch.chdir(here)
    path = recipes / "r.yaml"
    path.write_text("name: base\nmodel: {path: base}\ncurate: {few_shot_files: [few.jsonl, ../gone, org/name]}\n")
    recipe = load(Path("../recipes/r.yaml"), Recipe)
    assert recipe.model.path == str(recipes / "base")
    assert recipe.name == "base"
    assert recipe.curate.few_shot_files == (str(recipes / "few.jsonl"), str(tmp_path / "gone"), "org/name")
    assert load(path, Recipe, ["model.path=other"]).model.path == str(here / "other")
    assert load(path, Recipe, ["model.path=base"]).model.path == "base"
    assert load(path, Recipe, ["model.path=./base"]).model.path == str(here / "base")
    assert load(path, Recipe, ["model.path=/x/y"]).model.path == "/x/y"
    assert load(recipes / "r.yaml", Recipe).curate.model == "previous"
    rater = validate(apply(read(path), {"curate.model": "base"}), Recipe)
    assert rater.curate.model == "base"
    arm = validate(apply(read(path), {"model.path": "./z"}), Recipe)
    assert arm.model.path == str(recipes / "z")


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = "import sys, selfalign.core.yaml_config; print(sorted({'torch', 'numpy', 'ray', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Mutations: each gives the text, the key path and line its error must name, and the nearest key where one is due.
Mutant = tuple[str, str, int, str | None]


def _row(key: str) -> int:
    return LINES[key] - 1


def _typo(name: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(name))
    return rng.choice([name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name[:at] + name[at - 1] + name[at:]])


def _misspell(rng: random.Random) -> Mutant:
    key = rng.choice([key for key in LINES if len(key.split(".")[-1]) > 3])
    *section, name = key.split(".")
    wrong = name
    while wrong == name:
        wrong = _typo(name, rng)
    rows = GOOD.splitlines()
    rows[_row(key)] = rows[_row(key)].replace(f"{name}:", f"{wrong}:", 1)
    return "\n".join(rows), ".".join([*section, wrong]), LINES[key], key


def _misplace(rng: random.Random) -> Mutant:
    key = rng.choice([key for key in LINES if "." in key and not key.startswith("backward")])
    other = rng.choice([name for name in ("model", "filters", "backward", "curate") if name != key.split(".")[0]])
    rows = GOOD.splitlines()
    moved = rows.pop(_row(key))
    at = next(i for i, row in enumerate(rows) if row == f"{other}:") + 1
    rows.insert(at, moved)
    return "\n".join(rows), f"{other}.{key.split('.')[-1]}", at + 1, key


_BAD_VALUES = {
    "name": ["3", "true", "[a]", "{a: b}", "null", '""'],
    "seed": ["x", "1.5", "-1", "'7'", "null", "[7]", "false"],
    "rounds": ["0", "-3", "two", "{}"],
    "model": ["3", "[a]", "base", "null"],
    "model.path": ["3", "null", "[a, b]", "{a: b}"],
    "model.dtype": ["float23", "bf16", "16", "null"],
    "filters.min_words": ["few", "-1", ".nan", "2.5"],
    "filters.languages": ["some", "3", "{a: 1}"],
    "filters.drop_echo": ["3", "maybe", "null", "[]"],
    "backward.lora_r": ["0", "x", "1.5", "[1]"],
    "backward.learning_rate": ["0", "-1e-4", "fast", ".inf", "'1e-4'", "1_0"],
    "backward.lora_dropout": ["1", "-0.1", "yes", "10%"],
    "curate": ["[]", "all", "4"],
    "curate.threshold": ["0.5", "5.1", "high", "null", "[4]"],
    "curate.keep": ["some", "0", "[all]", "1.5"],
}


def _bad_value(rng: random.Random) -> Mutant:
    key = rng.choice(list(_BAD_VALUES))
    rows = GOOD.splitlines()
    row = rows[_row(key)]
    rows[_row(key)] = row[: row.index(":") + 1] + " " + rng.choice(_BAD_VALUES[key])
    if key in ("model", "curate"):
        rows = [r for i, r in enumerate(rows) if not any(k.startswith(f"{key}.") and i == _row(k) for k in LINES)]
    return "\n".join(rows), key, LINES[key], None


def _twice(rng: random.Random) -> Mutant:
    key = rng.choice([key for key in LINES if key not in ("model", "filters", "backward", "curate")])
    rows = GOOD.splitlines()
    rows.insert(LINES[key], rows[_row(key)])
    return "\n".join(rows), key, LINES[key] + 1, None


def _unreadable(rng: random.Random) -> Mutant:
    key = rng.choice([key for key in LINES if key not in ("model", "filters", "backward", "curate")])
    rows = GOOD.splitlines()
    name, _, value = rows[_row(key)].partition(":")
    broken = [f"{name}: '{value}", f"{name}: [{value}", f"{name}: a: {value}", f"{name}: @{value.strip()}"]
    rows[_row(key)] = rng.choice([*broken, f"{name}: %{value.strip()}", f"{name}: *{value.strip(' []')[:2]}"])
    return "\n".join(rows), key, LINES[key], None


MUTATIONS: tuple[Callable[[random.Random], Mutant], ...] = (_misspell, _misplace, _bad_value, _twice, _unreadable)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutated_recipe_names_file_key_line_and_nearest(
    write: Write, mutation: Callable[[random.Random], Mutant]
) -> None:
    rng = random.Random(mutation.__name__)
    for _ in range(-(-N // len(MUTATIONS))):
        text, key, line, nearest = mutation(rng)
        begun = time.thread_time()
        path = write(text)
        message = message_of(path)
        assert time.thread_time() - begun < 10
        told = [row for row in message.splitlines() if row.startswith(f"{path}:{line}: {key}: ")]
        assert told, f"{text}\n{message}"
        assert nearest is None or re.search(rf"\b{re.escape(nearest)}\b", told[0].partition(";")[2]), message


def test_random_damage_is_a_recipe_error_or_a_valid_recipe(write: Write) -> None:
    rng = random.Random(5)
    content = GOOD.encode()
    for _ in range(N):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(damaged))
            piece = rng.choice(
                [b"", b"\n", b":", b"- ", b"{", b"}", b"'", b"*", b"&a ", b"!!", b"\t", b"\xff", b"<<: ", b"  "]
            )
            damaged[at : at + rng.randint(0, 3)] = piece
        path = write(bytes(damaged))
        told = f"{path}:"
        try:
            load(path, Recipe)
        except RecipeError as error:
            told = str(error)
        assert all(row.startswith(f"{path}:") for row in told.splitlines())
