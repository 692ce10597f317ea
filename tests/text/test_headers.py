"""What a header tells of the text under it."""

import pytest

from selfalign.text.headers import header_kinds


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("", "empty"),
        (" — ", "empty"),
        ("ABOUT THE AUTHOR", "all_caps"),
        ("Advertisement", "navigation"),
        ("Quick  Links:", "navigation"),
        ("Forum", "navigation"),
        ("Share this on your wall", "navigation"),
        ("Free newsletter", "navigation"),
        ("How to search a list", None),
        ("HTTPS", None),
        ("IP", None),
        ("`fs.open()` and TCP", None),
        ("2024", None),
        ("Über uns", None),
        ("日本", None),
    ],
)
def test_empty_shouted_and_navigation_headers_are_told_from_ordinary_ones(header: str, kind: str | None) -> None:
    assert header_kinds(header) == {kind} - {None}


def test_a_header_may_be_suspect_twice() -> None:
    assert header_kinds("FREE NEWSLETTER") == {"all_caps", "navigation"}
