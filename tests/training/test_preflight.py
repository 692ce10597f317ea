from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import MismatchError
from selfalign.core.protocols import STOP
from selfalign.core.records import Example, Message
from selfalign.engines.chat import Chat
from selfalign.engines.config import ModelConfig
from selfalign.training.preflight import IGNORED, Tokenised, check, check_saved, fit, stop_ids, tokenise

Make = Callable[..., Example]


def trained_text(row: Tokenised, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize("completion", ["In the north.", "Zürich, 東京 🙂", "  two spaces", "a\n\nb "])
def test_the_loss_is_on_the_completion_and_its_stop_token(base: Any, example: Make, completion: str) -> None:
    tokenizer = base.tokenizer()
    row = tokenise(example(completion=completion), tokenizer)
    assert trained_text(row, tokenizer) == f" {completion}</s>"
    assert row.stops
    assert not row.straddles


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_the_untrained_tokens_are_those_the_engine_sends_as_prompt(base: Any, example: Make, template: str) -> None:
    chat = Chat(base.tokenizer(template))
    one = example()
    row = tokenise(one, chat.tokenizer, chat.stop_ids)
    untrained = list(row.input_ids[: row.completion_mask.index(1)])
    assert chat.encode([chat.prompt(one.prompt)]) == [untrained]


def test_what_a_template_writes_after_the_stop_token_is_left_out(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer("chatml")
    row = tokenise(example(), tokenizer, stop_ids(tokenizer, base.chatml))
    assert tokenizer.decode(list(row.input_ids)).endswith("In the north.<|im_end|>")
    assert trained_text(row, tokenizer) == "In the north.<|im_end|>"


def test_every_turn_of_a_completion_counts_up_to_the_last_stop_token(base: Any) -> None:
    tokenizer = base.tokenizer()
    turns = (
        Message(role="assistant", content="a"),
        Message(role="user", content="b"),
        Message(role="assistant", content="c"),
    )
    row = tokenise(
        Example(id="m", kind="seed", prompt=(Message(role="user", content="q"),), completion=turns), tokenizer
    )
    assert trained_text(row, tokenizer) == " a</s>\n\nUser: b\n\nAssistant: c</s>"


def test_a_template_without_a_stop_token_is_refused(base: Any, example: Make, endless: str) -> None:
    tokenizer = base.tokenizer(endless)
    row = tokenise(example(), tokenizer)
    with pytest.raises(MismatchError, match="never learn to stop"):
        check([row], tokenizer)


def test_a_stop_token_written_in_a_response_is_text_and_does_not_end_it(base: Any, example: Make, endless: str) -> None:
    tokenizer = base.tokenizer(endless)
    row = tokenise(example(completion="one</s>two"), tokenizer)
    assert not row.stops
    assert tokenizer.eos_token_id not in row.input_ids
    ended = tokenise(example(completion="one</s>two"), base.tokenizer())
    assert ended.stops
    assert ended.input_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_response_that_writes_control_tokens_is_trained_as_inference_reads_it(
    base: Any, example: Make, template: str
) -> None:
    chat = Chat(base.tokenizer(template))
    one = example(prompt="a<|im_end|>\n<|im_start|>system", completion="Say </s> or <|im_end|> at the end.")
    row = tokenise(one, chat.tokenizer, chat.stop_ids)
    scored = chat.prompt(one.prompt, one.completion[0]["content"] + STOP)
    assert [list(row.input_ids)] == chat.encode([scored])


def test_a_doubled_first_token_is_refused(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    with pytest.raises(MismatchError, match="twice"):
        check([tokenise(example(), tokenizer)], tokenizer)


def test_a_prompt_that_differs_between_training_and_inference_is_refused(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %} think:{% endif %}"
    with pytest.raises(MismatchError, match="differently at inference"):
        tokenise(example(), tokenizer)


def test_a_template_that_refuses_the_messages_says_which_example(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(MismatchError, match=r"row-7.*roles must alternate"):
        tokenise(example(id="row-7"), tokenizer)


def test_a_token_across_the_boundary_is_trained_and_reported(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    # The space belongs to the prompt, and the tokenizer joins it with the word that follows.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} A: "
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    row = tokenise(example(completion="the lake"), tokenizer)
    assert row.straddles
    assert trained_text(row, tokenizer) == " the lake</s>"
    assert "1 rows share a token" in check([row], tokenizer).text()


def test_an_example_without_room_for_its_completion_is_dropped_and_a_cut_one_counted(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    short, long_prompt, long_reply = (
        tokenise(one, tokenizer)
        for one in (example(), example(prompt="the lake " * 60), example(completion="the lake " * 60))
    )
    kept, too_long = fit([short, long_prompt, long_reply], len(short.input_ids))
    assert too_long == 1
    assert [(row.truncated, row.stops) for row in kept] == [(False, True), (True, False)]
    assert {len(row.input_ids) for row in kept} == {len(short.input_ids)}
    report = check(kept, tokenizer, too_long)
    assert (report.rows, report.truncated_share, report.too_long) == (2, 0.5, 1)
    assert "1 rows (50.0%) cut" in report.text()
    assert "1 rows dropped" in report.text()


def test_room_for_one_token_of_the_completion_is_room(base: Any, example: Make) -> None:
    row = tokenise(example(), base.tokenizer())
    first = row.completion_mask.index(1)
    assert row.cut(first) is None
    cut = row.cut(first + 1)
    assert cut is not None
    assert sum(cut.completion_mask) == 1


def test_nothing_left_to_train_on_is_refused(base: Any) -> None:
    tokenizer = base.tokenizer()
    with pytest.raises(MismatchError, match=r"no example is left.*3"):
        check([], tokenizer, too_long=3)
    with pytest.raises(MismatchError, match="no token carries loss"):
        check([Tokenised("e", (5, 6), (0, 0), stops=True)], tokenizer)


def test_the_report_shows_one_example_with_its_loss_span_marked(base: Any, example: Make) -> None:
    tokenizer = base.tokenizer()
    report = check([tokenise(example(), tokenizer)], tokenizer, steps=7)
    assert report.sample == "<s>User: Where is the lake?\n\nAssistant:⟦ In the north.</s>⟧"
    assert report.sample in report.text()
    assert "7 steps" in report.text()


def test_a_reply_ends_where_the_template_or_the_generation_config_says(base: Any) -> None:
    assert stop_ids(base.tokenizer(), base.plain) == {1}
    assert stop_ids(base.tokenizer("chatml"), base.chatml) == {1, 3}


@pytest.mark.parametrize("ending", ["</s>", "<|im_end|>", "<|im_start|>"])
def test_any_of_several_stop_tokens_ends_a_reply(
    base: Any, example: Make, tmp_path: Path, endless: str, ending: str
) -> None:
    # As Llama 3's, whose replies end in a token that is not the tokenizer's own.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2, 3]}')
    tokenizer = base.tokenizer(endless)
    tokenizer.chat_template += f"{{% if not add_generation_prompt %}}{ending}{{% endif %}}"
    stops = stop_ids(tokenizer, ModelConfig(path=str(tmp_path)))
    assert stops == {1, 2, 3}
    row = tokenise(example(), tokenizer, stops)
    assert trained_text(row, tokenizer).endswith(ending)
    assert check([row], tokenizer).truncated == 0


def test_the_loss_span_is_the_same_with_generation_markers_in_the_template_and_without(
    base: Any, example: Make
) -> None:
    tokenizer = base.tokenizer("chatml")
    stops = stop_ids(tokenizer, base.chatml)
    marked = tokenise(example(), tokenizer, stops)
    for marker in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert marker in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(marker, "")
    assert tokenise(example(), tokenizer, stops) == marked
    assert trained_text(marked, tokenizer) == "In the north.<|im_end|>"


def test_the_report_tells_how_full_packed_sequences_are_and_what_the_card_has_room_for(
    base: Any, example: Make
) -> None:
    tokenizer = base.tokenizer()
    row = tokenise(example(), tokenizer)
    length = len(row.input_ids)
    report = check([row] * 6, tokenizer, sequences=2, max_length=4 * length)
    assert "packed into 2 sequences, 75.0% of which are tokens" in report.text()
    assert "packed" not in check([row], tokenizer).text()
    assert "memory a device: 1 GiB" in replace(report, memory="memory a device: 1 GiB").text()


def test_what_was_saved_reads_the_rows_as_they_were_trained(base: Any, example: Make, tmp_path: Path) -> None:
    tokenizer = base.tokenizer("chatml")
    stops = stop_ids(tokenizer, base.chatml)
    rows = [example(), example(completion="Zürich, 東京 🙂", id="b")]
    tokenizer.save_pretrained(tmp_path)
    check_saved(tmp_path, rows, tokenizer, stops)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(MismatchError, match=r"a: .*once saved, read token 1 on as .*<\|im_start\|> "):
        check_saved(tmp_path, rows, tokenizer, stops)


def test_a_saved_tokenizer_that_splits_otherwise_is_refused(base: Any, example: Make, tmp_path: Path) -> None:
    tokenizer = base.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    changed = base.tokenizer()
    changed.add_tokens(["north"])
    with pytest.raises(MismatchError, match="once saved"):
        check_saved(tmp_path, [example()], changed, frozenset({1}))
