"""Prompt files and what is put into them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import UsageError
from selfalign.stages.prompting import chat, fill, prompt_text

awkward = st.lists(st.sampled_from(["{", "}", "{response}", "{instruction}", "\\1", "%s", "{0}", "é", "\n"])).map(
    "".join
)


@given(awkward, awkward)
def test_braces_in_a_value_are_text(one: str, other: str) -> None:
    template = "Q: {instruction} A: {response} again {response}"
    assert fill(template, instruction=one, response=other) == f"Q: {one} A: {other} again {other}"


def test_braces_in_a_template_that_name_nothing_are_text() -> None:
    assert fill('{"json": {response}, {other} {}}', response="x") == '{"json": x, {other} {}}'


@pytest.mark.parametrize("text", ["{response}", "{instruction} {Response}", "no placeholder", ""])
def test_a_placeholder_that_a_prompt_file_lacks_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.txt").write_text(text)
    lacking = "response" if "{instruction}" in text else "instruction"
    with pytest.raises(UsageError, match=rf"rate\.txt lacks the placeholder {{{lacking}}}") as caught:
        prompt_text(str(tmp_path / "rate.txt"), "rate", ("instruction", "response"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("data", [None, b"\xff\xfe{response}"])
def test_a_prompt_file_that_cannot_be_read_is_told(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "prompt.txt").write_bytes(data)
    with pytest.raises(UsageError, match=r"prompt\.txt cannot be read"):
        prompt_text(str(tmp_path / "prompt.txt"), "instruct", ("response",))


def test_our_own_prompts_have_their_placeholders_and_a_file_takes_their_place(tmp_path: Path) -> None:
    ours = prompt_text(None, "rate", ("instruction", "response"))
    assert "Score:" in ours
    assert prompt_text(None, "instruct", ("response",)) != ours
    (tmp_path / "mine.txt").write_text("Mine: {response}\n\n")
    assert prompt_text(str(tmp_path / "mine.txt"), "instruct", ("response",)) == "Mine: {response}"


def test_a_system_prompt_comes_first_and_only_where_there_is_one() -> None:
    user = {"role": "user", "content": "hello"}
    assert chat("hello") == (user,)
    assert chat("hello", "") == (user,)
    assert chat("hello", "be brief") == ({"role": "system", "content": "be brief"}, user)
