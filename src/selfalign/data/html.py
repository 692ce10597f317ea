"""Segment an HTML page under its headers: the text that a person would read beneath each, without any navigation.

One pass over lexbor's tree gives a flat list of blocks (paragraphs, list items, table rows, code). A segment is a run
of whole blocks, so that it neither begins nor ends within a paragraph, and a nested one is a part of the text of those
around it. Nothing recurses, and what a page can cost is bounded before it is parsed. docs/html.md says what is dropped.
"""

import codecs
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from selfalign.data.rows import ROW_BYTES, Unusable

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

PAGE_BYTES = 8 << 20

_LEVELS = {f"h{level}": level for level in range(1, 7)}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = _words(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li listing main menu nav ol p plaintext pre "
    "search section summary table tbody td tfoot th thead title tr ul xmp"
)
# One of these, nearly all of whose text is links, is navigation.
_CONTAINERS = _words("center div dl ol p section table td ul")
_LINKS, _LINK_SHARE = 3, 0.8
_PREFORMATTED = _words("listing plaintext pre xmp")
_DROPPED = _words(
    "annotation annotation-xml applet area aside audio button canvas datalist dialog embed footer frameset head iframe "
    "input label legend map menu meter nav noembed noframes noscript object output progress rp rt script search style "
    "svg template textarea title video x-option x-select"
)
_ROLES = _words(
    "alertdialog button complementary contentinfo dialog directory doc-pagelist doc-toc menu menubar navigation search "
    "tablist toolbar tooltip"
)
# Pages mark their body or content as having a sidebar, or hide it until a script has run.
_PROTECTED = _words("html body main article")
_NAMES = re.compile(
    r"(?:^|[-_])(?:toc|tableofcontents|table-of-contents|breadcrumbs?|\w*sidebar|sidenav|navbar|navbox|nav|navigation"
    r"|navlinks|menu|submenu|pagination|paginator|pager|footer|jump-link|skip-?links?|skip-to-(?:main-)?content"
    r"|editsection|related-posts|cookie-(?:banner|notice|consent)|share-buttons|social-(?:links|share|media))$"
    r"|^(?:toctree-wrapper|headerlink|viewcode-link|catlinks|printfooter|hatnote|noprint|sharedaddy|ads?"
    r"|advertisement|sr-only|visually-?hidden|screen-reader-text|linenos|lineno|linenodiv|gutter|line-numbers-rows)$"
)
_NOT_NAMES = re.compile(r"(?:^|[-_])(?:has|with|without|no|is|show|hide|open|close)[-_]")
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_FOLDED_AWAY = re.compile(
    r"(?:change ?log|(?:(?:change|version|revision) )?history|(?:table of )?contents|toc|on this page|in this article)",
    re.IGNORECASE,
)
_SKIP = re.compile(
    r"(?:skip to|skip nav|jump to (?:navigation|search|content)|back to top|(?:return|go) to (?:the )?top)\b",
    re.IGNORECASE,
)
_ARROWS = tuple("\u21a9\u2191^")
_LANGUAGE = re.compile(r"(?:^|\s)(?:language-|lang-|highlight-source-|highlight-|brush:\s*|sourceCode\s+)([\w+#-]+)")
_NO_LANGUAGE = frozenset(("default", "none", "notranslate", "plain", "plaintext", "text"))
_FORMULA_IMAGE = re.compile(r"(?:^|[\s-])(?:math|latex|tex)(?:$|[\s-])")
_EXPONENT = re.compile(r"[-+\u2212]?\d+")
# A line end of the page. NUL is the one character that the parser lets into no text.
_BREAK = "\0"
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\ufeff"))
_LIST_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """The text under one header element, down to the next header of the same or a higher level.

    `text` holds the lower-level headers within it as lines of their own, and no line for its own `header`. `within` is
    the index, in the page's list, of the nearest segment of a higher level around it. A segment above ROW_BYTES of
    UTF-8 is `too_large` and keeps no text.
    """

    header: str
    text: str
    within: int | None
    level: int
    too_large: bool = False

    @property
    def damaged(self) -> bool:
        """Whether bytes of it could not be decoded: U+FFFD stands in their place."""
        return "\ufffd" in self.text or "\ufffd" in self.header


def segments(data: bytes) -> list[Segment]:
    """One segment for every header element h1..h6 of the page, in document order.

    A header within navigation or a hidden part has no text and ends no other segment. Text before the first header
    belongs to none. Raises Unusable for `too_large`, `not_html`, `too_deep` and `too_many_attributes` (it would take
    minutes to parse), and `no_headers`.
    """
    if len(data) > PAGE_BYTES:
        raise Unusable("too_large", f"the page exceeds {PAGE_BYTES} bytes")
    page = _utf8(data)
    _check_text(page)
    _check_nesting(page)

    from selectolax.lexbor import LexborHTMLParser

    root = LexborHTMLParser(_END_TAG.sub(b"</x-", _START_TAG.sub(b"<x-", page))).root
    reader = _Reader()
    if root is not None:
        reader.read(root)
    if not reader.spans:
        raise Unusable("no_headers", "the page has no header element (h1 to h6)")
    return reader.segments()


# Bytes

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_UTF16 = (
    (re.compile(rb"(?:\s\0)*<\0[!?a-zA-Z]\0"), "utf-16-le"),
    (re.compile(rb"(?:\0\s)*\0<\0[!?a-zA-Z]"), "utf-16-be"),
)
_HEAD_BYTES = 4096
_CHARSET = (
    re.compile(rb"<meta\b[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE),
    re.compile(rb"^\s*<\?xml\b[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE),
)
# Python's name of a charset to the codec that browsers take for it (encoding.spec.whatwg.org); others are not believed.
_CODECS = {
    **{name: name for name in ("utf-8", "euc_jp", "iso2022_jp", "koi8-r", "koi8-u", "gb18030", "cp866", "cp949")},
    **{f"cp{page}": f"cp{page}" for page in (874, 932, *range(1250, 1259))},
    **{f"iso8859-{part}": f"iso8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    **{"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874"},
    **{"gb2312": "gb18030", "gbk": "gb18030", "hz": "gb18030", "euc_kr": "cp949", "shift_jis": "cp932"},
    **{"big5": "big5hkscs", "big5hkscs": "big5hkscs", "mac-roman": "mac-roman", "mac-cyrillic": "mac-cyrillic"},
    # A declaration that could be read as ASCII was not in UTF-16.
    **dict.fromkeys(("utf-16", "utf-16-le", "utf-16-be"), "utf-8"),
}


def _utf8(data: bytes) -> bytes:
    """The page in UTF-8, U+FFFD where bytes do not decode: by its byte order mark, else by what it declares.

    Text that is UTF-8 is read as such whatever the page declares, since the server's word, which is not in the file,
    outranked the page's; where nothing is declared, the rest is windows-1252.
    """
    for mark, codec in _BOMS:
        if data.startswith(mark):
            return _recoded(data[len(mark) :], codec)
    for start, codec in _UTF16:
        if start.match(data):
            return _recoded(data, codec)
    declared = _declared(data[:_HEAD_BYTES])
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        broken = text.count("\ufffd")
        # Other charsets hardly ever form UTF-8, so that with more right than wrong this is UTF-8 with some damage.
        sound = len(text) - len(text.encode("ascii", "ignore")) - broken
        return text.encode("utf-8") if sound > broken else _recoded(data, declared or "cp1252")
    return _recoded(data, declared) if declared == "iso2022_jp" and data.isascii() else data


def _recoded(data: bytes, codec: str) -> bytes:
    return data.decode(codec, "replace").encode("utf-8")


def _declared(head: bytes) -> str | None:
    for pattern in _CHARSET:
        if match := pattern.search(head):
            label = match[1].decode("ascii", "ignore").lower()
            try:
                return _CODECS.get(codecs.lookup(label.removeprefix("x-")).name)
            except LookupError:
                return None
    return None


# A page with more of these than one in fifty bytes is not text.
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\f\r") + b"\x7f"


def _check_text(page: bytes) -> None:
    controls = len(page) - len(page.translate(None, _CONTROLS))
    if controls * 50 > len(page):
        raise Unusable("not_html", f"{controls} of its {len(page)} bytes are control characters")
    if not re.search(rb"<[a-zA-Z!?]", page):
        raise Unusable("not_html", "there is no tag in it")


# What the parser may spend on walking up its stack of open elements, in steps of about 2 ns.
_STEPS = 500_000_000
# Of one tag: the parser compares each with all before it.
_ATTRIBUTES = 2000
# Tags renamed before parsing, to elements that the parser treats like any other. The formatting elements would be
# opened anew in every later block where they are left open, which squares the size of the page, and options take time
# with the square of their number.
_RENAMED = rb"(?=(?:b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u|optgroup|option|select)[\s/>])"
_START_TAG, _END_TAG = (re.compile(sign + _RENAMED, re.IGNORECASE) for sign in (rb"<", rb"</"))
_TAG = re.compile(
    rb"<!--.*?(?:-->|\Z)|<(script|style|textarea|title)\b.*?(?:</\1|\Z)|<(?P<end>/?)(?P<name>[a-z][^\s/>]*)(?P<rest>[^>]*)",
    re.IGNORECASE | re.DOTALL,
)
# Void elements; those whose place in a table, or whose implied end, keeps them from nesting by themselves; and form, of
# which one at a time is open.
_FLAT = _words(
    "area base basefont bgsound body br caption col colgroup embed form frame hr html img image input keygen link meta "
    "p param source tbody td tfoot th thead tr track wbr"
)
# Elements that end one of their own group, where that is the innermost open one.
_GROUPS = {"li": "li", "dt": "dl item", "dd": "dl item", **dict.fromkeys(_LEVELS, "header")}
_SPECIAL = _BLOCKS | set(_GROUPS.values())
_SCOPES = _words("applet marquee object table template")


def _check_nesting(page: bytes) -> None:
    """Raise Unusable where parsing would take minutes: every tag costs the parser a step for each open element.

    The count is of a simplified parser, that leaves open what it is not sure is closed.
    """
    long_tag = any(len(part) > 2 * _ATTRIBUTES and len(part.split()) > _ATTRIBUTES for part in page.split(b">"))
    if page.count(b"<") ** 2 < 2 * _STEPS and not long_tag:
        return
    steps, opened = 0, list[str]()
    for tag in _TAG.finditer(page):
        if tag["name"] is None:
            continue
        if len(tag["rest"]) > 2 * _ATTRIBUTES and len(tag["rest"].split()) > _ATTRIBUTES:
            note = f"the tag at byte {tag.start()} of the page has more than {_ATTRIBUTES} attributes"
            raise Unusable("too_many_attributes", note)
        name = tag["name"].decode("ascii", "replace").lower()
        if name not in _FLAT:
            group = _GROUPS.get(name, name)
            alone = (group != name and opened[-1:] == [group]) or (tag["rest"].endswith(b"/") and "svg" in opened[-8:])
            if tag["end"]:
                _close(opened, group)
            elif not alone:
                opened.append(group)
        steps += len(opened)
        if steps > _STEPS:
            raise Unusable("too_deep", f"its elements nest {len(opened)} deep at byte {tag.start()} of the page")


def _close(opened: list[str], name: str) -> None:
    """End the nearest of the innermost elements with this name, if an HTML parser would."""
    for n in range(1, min(len(opened), 16) + 1):
        if opened[-n] == name:
            del opened[-n:]
            return
        if opened[-n] in _SCOPES or (opened[-n] in _SPECIAL and name not in _SPECIAL):
            return


# Tree

_Kind = Literal["text", "header", "item", "term", "definition", "row", "code"]
# How much of a part of the page is left out: nothing; its text, though not what its headers head; all of it.
_SHOWN, _UNREAD, _MUTED = range(3)


@dataclass(slots=True)
class _Block:
    """A paragraph or its like, and the line ends that part it from the one before."""

    text: str
    kind: _Kind
    span: int = -1


@dataclass(slots=True)
class _Span:
    """A segment as a range of blocks; empty where the header heads nothing."""

    level: int
    within: int | None
    start: int
    end: int
    header: str = ""
    # Whether navigation under it was left out.
    pruned: bool = False


@dataclass(slots=True)
class _Row:
    """A table row being read: the ranges of its cells' blocks. One that is not `flat` lays out a page."""

    cells: list[tuple[int, int]] = field(default_factory=list)
    flat: bool = True


@dataclass(slots=True)
class _Frame:
    """What to restore when the walk leaves an element, and how far it was when it entered."""

    tag: str
    mute: int
    region: int
    in_link: bool
    language: str | None
    blocks: int
    headers: int
    tally: tuple[int, int, int]


class _Reader:
    """One walk over a page's tree, by the house's rules of what a person reads."""

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self.blocks: list[_Block] = []
        # The segments that the walk is in, by index, and how many there have been that head something.
        self.open: list[int] = []
        self.headers = 0
        self.titling: int | None = None
        # The inline text of the block being read, the links in it, and whether it has a word outside of them.
        self.parts: list[str] = []
        self.links = 0
        self.in_link = self.plain = False
        # `region` is how much the part around an unfinished header is muted.
        self.mute = self.region = _SHOWN
        # Where in `parts` inline code began.
        self.quoted: int | None = None
        # The language of preformatted text, "" where unknown; None outside of it.
        self.language: str | None = None
        self.code_class: str | None = None
        # What the next paragraph is, how it is marked, and which kind it follows tightly.
        self.lead: tuple[_Kind, str, _Kind | None] | None = None
        # The next number of each open list, None where its items have bullets; and whether one is yet without items.
        self.lists: list[int | None] = []
        self.first_item = False
        self.rows: list[_Row] = []
        self.table = 0
        # Characters of text so far, those in blocks of links alone, and the links in these.
        self.tally = (0, 0, 0)

    def read(self, root: "LexborNode") -> None:
        todo: list[LexborNode | _Frame] = [root]
        while todo:
            item = todo.pop()
            if isinstance(item, _Frame):
                self._leave(item)
                continue
            if (after := item.next) is not None:
                todo.append(after)
            tag = item.tag or ""
            if tag == "-text":
                if self.mute == _SHOWN:
                    self._text(item.text_content or "")
                continue
            if (self.mute != _MUTED or tag in _LEVELS) and (frame := self._enter(item, tag)):
                todo.append(frame)
            if (child := item.first_child) is not None:
                todo.append(child)
        self._close(0)

    def segments(self) -> list[Segment]:
        """What was read. A header of navigation alone is no line of the segments around it."""
        for block in self.blocks:
            if block.kind == "header" and self._is_bare(self.spans[block.span]):
                block.text = ""
        sizes = array("q", accumulate((_size(block.text) for block in self.blocks), initial=0))
        found = []
        for span in self.spans:
            header, text = span.header, ""
            too_large = sizes[span.end] - sizes[span.start] + _size(header) > ROW_BYTES
            if too_large:
                header = header[:200]
            else:
                text = "".join(block.text for block in self.blocks[span.start : span.end]).strip()
            found.append(Segment(header, text, span.within, span.level, too_large))
        return found

    def _is_bare(self, span: _Span) -> bool:
        return span.pruned and all(self.blocks[n].kind == "header" for n in range(span.start, span.end))

    def _enter(self, node: "LexborNode", tag: str) -> _Frame | None:
        attributes = node.attributes
        mute = max(self.mute, self._muting(node, tag, attributes))
        if tag == "math" and mute == _SHOWN and (formula := attributes.get("alttext") or _annotation(node)):
            self._text(f"${formula}$")
            mute = _MUTED
        block = tag in _BLOCKS
        if block:
            self._edge(tag, self.language)
        elif mute == self.mute and tag != "a" and (mute != _SHOWN or not self._inline(node, tag, attributes)):
            return None
        frame = _Frame(
            tag, self.mute, self.region, self.in_link, self.language, len(self.blocks), self.headers, self.tally
        )
        self.mute = mute
        if tag in _LEVELS:
            self._header(_LEVELS[tag])
        elif block and mute == _SHOWN:
            self._block(node, tag, attributes)
        elif block:
            self._prune()
        elif tag == "a" and mute == _SHOWN and "href" in attributes and self.titling is None:
            self.in_link = True
            self.links += 1
        return frame

    def _leave(self, frame: _Frame) -> None:
        tag = frame.tag
        if tag in _BLOCKS:
            self._edge(tag, frame.language)
        if tag in _LEVELS:
            self.titling = None
        elif tag in ("x-code", "x-tt"):
            self._quote()
        elif self.mute == _SHOWN:
            if tag in ("ul", "ol"):
                self.lists.pop()
            elif tag in ("li", "dt", "dd"):
                self.lead = None
            elif tag in ("td", "th") and self.rows:
                self.rows[-1].cells.append((frame.blocks, len(self.blocks)))
            elif tag == "tr":
                self._row(self.rows.pop(), frame)
            if tag in _CONTAINERS and self.headers == frame.headers and self._is_navigation(frame.tally):
                del self.blocks[frame.blocks :]
                self.tally = frame.tally
                self._prune()
        self.mute, self.region, self.in_link, self.language = frame.mute, frame.region, frame.in_link, frame.language

    def _prune(self) -> None:
        if self.open:
            self.spans[self.open[-1]].pruned = True

    def _muting(self, node: "LexborNode", tag: str, attributes: Mapping[str, str | None]) -> int:
        """How much of an element is to be left out."""
        if tag in _DROPPED or (tag == "a" and self._is_mark(node, attributes.get("href") or "")):
            return _MUTED
        if tag == "details" and _FOLDED_AWAY.fullmatch(_summary(node)):
            return _MUTED
        # Footnote and citation marks.
        if tag == "sup" and any(_href(child).startswith("#") for child in node.iter() if child.tag == "a"):
            return _MUTED
        if attributes and tag not in _PROTECTED:
            if "hidden" in attributes or attributes.get("aria-hidden") == "true":
                return _MUTED
            if _HIDDEN_STYLE.search(attributes.get("style") or ""):
                return _MUTED
            if tag not in _LEVELS and (attributes.get("role") in _ROLES or _is_named(node, attributes)):
                return _MUTED
        return _UNREAD if tag == "header" or attributes.get("role") == "banner" else _SHOWN

    def _is_mark(self, node: "LexborNode", href: str) -> bool:
        """Whether a link marks its own place (¶, #), or leads past or back to a part of the page."""
        if self.titling is None and not href.startswith("#"):
            return False
        text = node.text().strip()
        return text.startswith(_ARROWS) or not any(map(str.isalnum, text)) or bool(_SKIP.match(text))

    def _is_navigation(self, before: tuple[int, int, int]) -> bool:
        text, linked, links = (now - then for now, then in zip(self.tally, before, strict=True))
        return links >= _LINKS and linked >= _LINK_SHARE * text

    def _text(self, text: str) -> None:
        if self.parts or self.language is not None or not text.isspace():
            self.parts.append(text)
            if not (self.plain or self.in_link):
                self.plain = any(map(str.isalnum, text))

    def _inline(self, node: "LexborNode", tag: str, attributes: Mapping[str, str | None]) -> bool:
        """Whether its end matters."""
        if tag == "br":
            self.parts.append(_BREAK)
        elif tag == "sup":
            # Without its mark, ten to the sixth would read 106.
            child = node.first_child
            power = "" if child is None or child.next is not None else (child.text_content or "").strip()
            if _EXPONENT.fullmatch(power) and self.parts and self.parts[-1][-1:].isalnum():
                self.parts.append("^")
        elif tag == "img" and _FORMULA_IMAGE.search(attributes.get("class") or ""):
            self._text(f"${attributes.get('alt') or ''}$")
        elif tag == "x-code" and self.language is not None:
            # Several codes in one preformatted block are versions of it, each in its language.
            code_class = attributes.get("class") or ""
            if self.code_class not in (None, code_class):
                self._flush()
            self.code_class, self.language = code_class, _language(code_class) or self.language
        elif tag in ("x-code", "x-tt") and self.titling is None and self.quoted is None:
            self.quoted = len(self.parts)
            return True
        return False

    def _quote(self) -> None:
        """Mark inline code, without which 'from `from` to `to`' reads like a mistake."""
        if self.quoted is None:
            return
        text = "".join(self.parts[self.quoted :])
        if code := text.strip():
            mark = "``" if "`" in code else "`"
            self.parts[self.quoted :] = [text.replace(code, mark + code + mark, 1)]
        self.quoted = None

    def _header(self, level: int) -> None:
        index, here = len(self.spans), len(self.blocks)
        if max(self.region, self.mute) == _MUTED:
            within = next((n for n in reversed(self.open) if self.spans[n].level < level), None)
        else:
            self._close(level)
            within = self.open[-1] if self.open else None
            self.open.append(index)
            self.headers += 1
        self.spans.append(_Span(level, within, here, here))
        self.region, self.mute, self.titling, self.lead = max(self.region, self.mute), _SHOWN, index, None
        if self.rows:
            self.rows[-1].flat = False

    def _close(self, level: int) -> None:
        """End the segments that a header of `level` ends."""
        while self.open and self.spans[self.open[-1]].level >= level:
            self.spans[self.open.pop()].end = len(self.blocks)

    def _block(self, node: "LexborNode", tag: str, attributes: Mapping[str, str | None]) -> None:
        if tag in ("ul", "ol"):
            self.first_item = not self.lists
            self.lists.append(_first_number(attributes) if tag == "ol" else None)
        elif tag == "li":
            self._item()
        elif tag == "dt":
            self.lead = ("term", "", "term")
        elif tag == "dd":
            self.lead = ("definition", "", "term")
        elif tag == "table":
            self.table = len(self.blocks)
        elif tag == "tr":
            self.rows.append(_Row())
        elif tag in _PREFORMATTED:
            self.language, self.code_class = _language_around(node), None

    def _item(self) -> None:
        number = self.lists[-1] if self.lists else None
        marker = "- "
        if number is not None:
            marker, self.lists[-1] = f"{number}. ", number + 1
        indent = "  " * (min(len(self.lists), _LIST_DEPTH) - 1)
        self.lead = ("item", indent + marker, None if self.first_item else "item")
        self.first_item = False

    def _row(self, row: _Row, frame: _Frame) -> None:
        """Make one line of a table row, where each of its cells is one paragraph at most."""
        if row.flat and all(end - start <= 1 for start, end in row.cells) and len(self.blocks) > frame.blocks:
            texts = [" ".join(self.blocks[start].text.split()) if end > start else "" for start, end in row.cells]
            while not texts[-1]:
                texts.pop()
            del self.blocks[frame.blocks :]
            self._add(" | ".join(texts).strip(), "row", "row" if frame.blocks > self.table else None)
        if self.rows:
            self.rows[-1].flat = False

    def _edge(self, tag: str, language: str | None) -> None:
        """An element begins or ends, and with it the block being read; its line, in preformatted text."""
        if language is None or self.titling is not None or tag in _LEVELS:
            self._flush()
        elif self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")

    def _flush(self) -> None:
        """End the block being read."""
        if not self.parts:
            return
        raw, self.parts = "".join(self.parts), []
        linked, links = not self.plain and (self.in_link or self.links > 0), max(self.links, 1)
        self.links, self.plain, self.quoted = 0, False, None
        code = self.language if self.titling is None else None
        text = _lines(raw) if code is None else _fenced(raw, code)
        if not text:
            return
        if self.titling is not None:
            self._title(text)
        elif self.region == _SHOWN:
            total, in_links, count = self.tally
            self.tally = (total + len(text), in_links + len(text) * linked, count + links * linked)
            kind, marker, follows = self.lead or ("text", "", None)
            self.lead = None
            if code is not None:
                kind, marker, follows = "code", "", None
                if self.rows:
                    self.rows[-1].flat = False
            self._add(marker + text, kind, follows)

    def _add(self, text: str, kind: _Kind, follows: _Kind | None, span: int = -1) -> None:
        """Add a block; on the next line, without a blank one, if the block before is of the kind that it `follows`."""
        tight = bool(self.blocks) and self.blocks[-1].kind == follows
        self.blocks.append(_Block(("\n" if tight else "\n\n") + text, kind, span))

    def _title(self, text: str) -> None:
        index, self.titling = self.titling, None
        assert index is not None
        span = self.spans[index]
        span.header = " ".join(text.split()).rstrip("¶ ")
        if span.header and index in self.open[-1:]:
            self._add(span.header, "header", None, index)
            span.start = span.end = len(self.blocks)


def _is_named(node: "LexborNode", attributes: Mapping[str, str | None]) -> bool:
    """Whether its class or id says that an element is navigation; not one that holds the page's main part."""
    names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}"
    return _names_navigation(names) and node.css_first("main, h1") is None


@lru_cache(maxsize=4096)
def _names_navigation(names: str) -> bool:
    return any(_NAMES.search(name) and not _NOT_NAMES.search(name) for name in names.lower().split())


def _summary(details: "LexborNode") -> str:
    child = details.first_child
    while child is not None and child.tag != "summary":
        child = child.next
    # Summaries within summaries would be read once for each level.
    return "" if child is None or child.css_first("details") else child.text().strip()


def _language(names: str) -> str:
    match = _LANGUAGE.search(names)
    return match[1] if match and match[1] not in _NO_LANGUAGE else ""


def _language_around(node: "LexborNode") -> str:
    """The language that the class of a preformatted element names, or that of the elements around it."""
    around: LexborNode | None = node
    for _ in range(3):
        if around is not None:
            if language := _language(around.attributes.get("class") or ""):
                return language
            around = around.parent
    return ""


def _href(link: "LexborNode") -> str:
    return link.attributes.get("href") or ""


def _annotation(math: "LexborNode") -> str:
    found = math.css_first('annotation[encoding="application/x-tex"]')
    return "" if found is None else found.text().strip()


def _first_number(attributes: Mapping[str, str | None]) -> int:
    start = attributes.get("start") or ""
    return int(start) if re.fullmatch(r"\d{1,6}", start, re.ASCII) else 1


def _lines(raw: str) -> str:
    """Inline text with its white space collapsed; two line ends or more are a blank line."""
    if not raw.isascii():
        raw = raw.translate(_INVISIBLE)
    text = "\n".join(" ".join(line.split()) for line in raw.split(_BREAK)).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text) if "\n\n\n" in text else text


def _fenced(raw: str, language: str) -> str:
    code = raw.replace(_BREAK, "\n").rstrip()
    code = code[code.rfind("\n", 0, len(code) - len(code.lstrip())) + 1 :]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}" if code else ""


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
