"""What a header tells of the text under it."""

import re
from typing import Literal

HeaderKind = Literal["empty", "all_caps", "navigation"]

_NAVIGATION = re.compile(
    r"advert\w*|sponsored|forums?|quick links?|(free )?newsletters?|related (posts|articles|links|stories)|see also|"
    r"share this.*|follow us.*|(main )?(menu|navigation)|sitemap|(table of )?contents|comments?|"
    r"leave a (reply|comment)|(recent|popular|latest) (posts|comments|articles)|categories|archives?|tags|search|"
    r"log ?in|sign (in|up).*|contact( us)?|about us|cookies?( policy)?|privacy policy|subscribe.*|breadcrumbs?"
)


def header_kinds(header: str) -> frozenset[HeaderKind]:
    """What makes a header, and the segment under it, suspect (arXiv 2308.06259, section 3.1); none for most."""
    kinds: set[HeaderKind] = set()
    letters = [letter for letter in header if letter.isalpha()]
    if not any(letter.isalnum() for letter in header):
        kinds.add("empty")
    # A few capitals are an abbreviation.
    if len(letters) > 6 and all(letter.isupper() for letter in letters):
        kinds.add("all_caps")
    if _NAVIGATION.fullmatch(" ".join(header.casefold().split()).strip(" :.!?»>…-")):
        kinds.add("navigation")
    return frozenset(kinds)
