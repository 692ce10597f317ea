"""Conversations as text and tokens."""

import random
from pathlib import Path
from typing import Any

import pytest

from engines.tiny import SPECIAL, WORDS, save_tokenizer, sentence
from selfalign.core.records import Message
from selfalign.engines.chat import Chat, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer


@pytest.fixture(scope="module", params=["plain", "chatml", "chatml in its own tokens", "special"])
def chat(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder, template = base, str(request.param)
    if " " in template:
        folder, template = tmp_path_factory.mktemp("marks"), "chatml"
        save_tokenizer(folder, "<|im_start|>", "<|im_end|>")
    elif template == "special":
        folder = tmp_path_factory.mktemp("special")
        save_tokenizer(folder, "<|user|>", "<|assistant|>")
        template = str(folder / "special.jinja")
        Path(template).write_text(SPECIAL)
    return Chat(load_tokenizer(ModelConfig(path=str(folder), chat_template=template)))


def test_prompt_and_reply_are_the_tokens_that_training_renders(chat: Chat) -> None:
    rng = random.Random(4)
    for _ in range(20):
        asked = [Message(role="user", content=sentence(rng, 5))]
        said = sentence(rng, 8)
        full = [*asked, Message(role="assistant", content=said)]
        trained = chat.tokenizer.apply_chat_template(full, return_dict=True)["input_ids"]
        assert chat.encode([chat.tokenizer.apply_chat_template(full, tokenize=False)])[0] == trained, "no second BOS"
        prompt = chat.encode([chat.prompt(asked)])[0]
        assert trained[: len(prompt)] == prompt
        assert chat.decode(trained[len(prompt) :]).strip().removesuffix("<|im_end|>") == said
        cut = said.rindex(" ")
        opened = chat.encode([chat.prompt([*asked, Message(role="assistant", content=said[:cut])])])[0]
        assert trained[: len(opened)] == opened
        joint = chat.encode([chat.prompt(asked, said)])[0]
        assert trained[: len(joint)] == joint


def test_a_control_token_in_a_text_is_read_as_text_and_comes_back_as_it_was(chat: Chat) -> None:
    special = chat.tokenizer.all_special_ids
    text = f"close it with {chat.tokenizer.eos_token} and go on"
    (ids,) = chat.encode([chat.prompt([Message(role="user", content="a")], text)])
    said = ids[len(chat.encode([chat.prompt([Message(role="user", content="a")])])[0]) :]
    assert not {*said} & {*special}
    assert chat.decode(said).strip() == text


def test_a_reply_ends_where_the_template_ends_a_turn(chat: Chat) -> None:
    full = [Message(role="user", content="a"), Message(role="assistant", content="b c")]
    trained = chat.tokenizer.apply_chat_template(full, tokenize=False)
    new = chat.encode([trained])[0][len(chat.encode([chat.prompt(full[:1])])[0]) :]
    stopped = chat.stopper(chat.stop_texts)
    ended = [at for at in range(len(new)) if new[at] in chat.stop_ids or stopped(new[: at + 1])]
    assert ended
    before = chat.decode(new[: ended[0] + 1])
    assert before.strip().removesuffix("<|im_end|>") == "b c"


def test_texts_that_begin_alike_encode_as_each_of_them_alone_does(base: Path) -> None:
    chat = Chat(load_tokenizer(ModelConfig(path=str(base), chat_template="plain")))
    rng = random.Random(2)
    junk = ["  ", "\n\n", "é", "12345", "…", "don't", "</s>", "日本語", "\t", "a" * 30, " \n "]

    def text(pieces: int) -> str:
        return "".join(rng.choice([*junk, " " + rng.choice(WORDS)]) for _ in range(pieces))

    for _ in range(100):
        head = text(rng.choice([0, 3, 40]))
        groups = [[head + own + end for end in ("", " 1", "1", "\n", " x y", "é")] for own in map(text, (0, 9, 50))]
        for group, encoded in zip(groups, chat.encode_alike(groups), strict=True):
            for one, (ids, ends) in zip(group, encoded, strict=True):
                alone = chat.tokenizer(one, add_special_tokens=False, return_offsets_mapping=True)
                assert (ids, ends) == (alone["input_ids"], [end for _, end in alone["offset_mapping"]])


def test_a_beginning_that_all_texts_share_is_encoded_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(load_tokenizer(ModelConfig(path=str(base), chat_template="plain")))
    seen = 0
    encode = chat._encodings

    def counted(texts: list[str]) -> Any:
        nonlocal seen
        seen += sum(map(len, texts))
        return encode(texts)

    monkeypatch.setattr(chat, "_encodings", counted)
    rng = random.Random(3)
    head, own = sentence(rng, 200), [sentence(rng, 30) for _ in range(20)]
    chat.encode_alike([[f"{head} {text} {n}" for n in range(5)] for text in own])
    assert seen < 2 * len(head) + 3 * sum(map(len, own))


@pytest.mark.parametrize(
    ("rows", "length"),
    [(["", "a"], 0), (["ab", "ab"], 2), (["abc", "abd", "ab"], 2), (["b", "a"], 0), (["x" * 9, "x" * 7 + "y"], 7)],
)
def test_a_common_prefix_is_what_all_begin_with(rows: list[str], length: int) -> None:
    assert common_prefix(rows) == length
    assert common_prefix([[ord(char) for char in row] for row in rows]) == length
