"""Segments of pages: their text, their borders, what is left out, and whatever the bytes."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.data.html import PAGE_BYTES, Segment, segments
from selfalign.data.rows import ROW_BYTES, Unusable

GOLDEN = Path(__file__).parent / "golden" / "nodejs_segments.json"
# Read side by side with the page in a browser.
READ = ("console", "path", "readline", "timers", "webcrypto")
PAGES = ("async_hooks", "console", "events", "path", "process", "readline", "timers", "url", "webcrypto", "zlib")


def of(page: str | bytes) -> list[Segment]:
    return segments(page.encode() if isinstance(page, str) else page)


def text_of(body: str) -> str:
    """The text of a page's only header."""
    (segment,) = of(f"<meta charset=utf-8><h1>Header</h1>{body}")
    assert segment.header == "Header"
    return segment.text


def outline(found: Iterable[Segment]) -> list[tuple[int, str, int | None]]:
    return [(segment.level, segment.header, segment.within) for segment in found]


def check(found: list[Segment]) -> None:
    """What holds of the segments of any page."""
    for n, segment in enumerate(found):
        assert 1 <= segment.level <= 6
        assert segment.text == segment.text.strip()
        if segment.too_large:
            assert not segment.text
        if segment.within is not None:
            around = found[segment.within]
            assert segment.within < n
            assert around.level < segment.level
            assert around.too_large or segment.text in around.text


# Segments


def test_a_segment_runs_to_the_next_header_of_its_level_or_a_higher_one() -> None:
    found = of("before<h1>A</h1>a<h3>B</h3>b<h2>C</h2>c<h3>D</h3>d<h2>E</h2>e<h1>F</h1>f")

    assert outline(found) == [(1, "A", None), (3, "B", 0), (2, "C", 0), (3, "D", 2), (2, "E", 0), (1, "F", None)]
    assert [segment.text for segment in found] == [
        "a\n\nB\n\nb\n\nC\n\nc\n\nD\n\nd\n\nE\n\ne",
        "b",
        "c\n\nD\n\nd",
        "d",
        "e",
        "f",
    ]


def test_every_header_is_a_segment_also_an_empty_one_and_one_without_text() -> None:
    found = of("<h1></h1>a<h2><img alt=x></h2><h2>Two</h2><h3> </h3>b")
    assert outline(found) == [(1, "", None), (2, "", 0), (2, "Two", 0), (3, "", 2)]
    assert [segment.text for segment in found] == ["a\n\nTwo\n\nb", "", "b", "b"]


def test_a_header_in_navigation_has_no_text_and_ends_no_segment() -> None:
    found = of(
        "<nav><h2>Menu</h2><ul><li><a href=/>Home</a></ul></nav><h1>Title</h1><h3>Part</h3><p>one</p>"
        "<aside><h2>Related</h2><p>ad</p></aside><p>two</p><h2 hidden>Gone</h2><p>three</p>"
        "<footer><h4>About</h4><p>us</p></footer>"
    )
    assert outline(found) == [
        (2, "Menu", None),
        (1, "Title", None),
        (3, "Part", 1),
        (2, "Related", 1),
        (2, "Gone", 1),
        (4, "About", 2),
    ]
    assert [segment.text for segment in found] == [
        "",
        "Part\n\none\n\ntwo\n\nthree",
        "one\n\ntwo\n\nthree",
        "",
        "",
        "",
    ]


def test_the_title_in_a_page_header_heads_what_follows_it() -> None:
    found = of("<article><header><p>By Ann</p><h1>Bread</h1><p>3 May</p></header><p>Flour.</p></article>")
    assert outline(found) == [(1, "Bread", None)]
    assert found[0].text == "Flour."


def test_a_header_of_navigation_alone_is_no_line_of_the_text_around_it() -> None:
    links = "".join(f"<li><a href=/{n}>Page number {n}</a></li>" for n in range(5))
    found = of(f"<h1>A</h1><p>text</p><h2>Signature</h2><h2>f(x)</h2><p>more</p><h2>See also</h2><ul>{links}</ul>")
    assert found[0].text == "text\n\nSignature\n\nf(x)\n\nmore"
    assert outline(found)[-1] == (2, "See also", 0)


@pytest.mark.parametrize(
    ("header", "cleaned"),
    [
        ("Title<a class=mark href=#t>#</a>", "Title"),
        ("Title <a href=x>¶</a>", "Title"),
        ("§ Title ¶", "§ Title"),
        ("<a aria-hidden=true href=#t>link</a>Title", "Title"),
        ("Title<span class=mw-editsection>[<a href=x>edit</a>]</span>", "Title"),
        ("<code>a.b()</code>\n  and\t&lt;c&gt;", "a.b() and <c>"),
        ("One<br>two", "One two"),
        ("<a href=x>C#</a>", "C#"),
        ("<button>x</button><svg><text>y</text></svg>T", "T"),
    ],
)
def test_a_header_is_cleaned(header: str, cleaned: str) -> None:
    (segment,) = of(f"<meta charset=utf-8><h2>{header}</h2>text")
    assert (segment.header, segment.text) == (cleaned, "text")


def test_the_blocks_of_an_unclosed_header_are_its_text() -> None:
    found = of("<h2>Title<p>one<p>two<h3><div>Sub</div><div>three</div>")
    assert outline(found) == [(2, "Title", None), (3, "Sub", 0)]
    assert found[0].text == "one\n\ntwo\n\nSub\n\nthree"


def test_headers_in_links_tables_and_lists_are_headers() -> None:
    found = of(
        "<a href=x><h2>Card</h2><p>a</p></a><table><tr><td><h2>Cell</h2>b<td>c</table><ul><li><h2>Item</h2>d</ul>"
    )
    assert outline(found) == [(2, "Card", None), (2, "Cell", None), (2, "Item", None)]
    assert [segment.text for segment in found] == ["a", "b\n\nc", "d"]


# Text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<p>one\n  two</p>three<div>four</div>", "one two\n\nthree\n\nfour"),
        ("<p>a<b>b</b><i> c</i>,<a href=x>d</a>.", "ab c,d."),
        ("<p>a<br>b<br><br>c", "a\nb\n\nc"),
        ("<p>a&amp;b &lt;c&gt; &eacute; &#x2603; &bogus; &#0;", "a&b <c> é ☃ &bogus; \ufffd"),
        ("<p>no&nbsp;break, so&shy;ft, e\u0301", "no break, soft, e\u0301"),
        ("<ul><li>a<li>b<ul><li>c</ul><li>d</ul><ul><li>e</ul>", "- a\n- b\n  - c\n- d\n\n- e"),
        ("<ol start=9><li>a<li><p>b<p>c<li>d</ol>", "9. a\n10. b\n\nc\n\n11. d"),
        (
            "<pre><code class='hljs language-py'>def f():\n    return 1\n</code></pre>",
            "```py\ndef f():\n    return 1\n```",
        ),
        ("<div class='highlight-c notranslate'><div><pre><span></span>  x;\n</pre>", "```c\n  x;\n```"),
        ("<pre>\n\n a\n\n\tb  \n\n</pre>", "```\n a\n\n\tb\n```"),
        ("<pre>```\nx</pre>", "````\n```\nx\n````"),
        ("<pre><div>a</div><div>b<br>c</div></pre>", "```\na\nb\nc\n```"),
        (
            "<pre><code class='lang-js m'>a</code><code class='lang-js c'>b</code></pre>",
            "```js\na\n```\n\n```js\nb\n```",
        ),
        ("<p>from <code>from</code> to <tt>a`b</tt>", "from `from` to ``a`b``"),
        ("<table><caption>T</caption><tr><th>a<th>b<tr><td>1<td><p>2</p></table>", "T\n\na | b\n1 | 2"),
        ("<table><tr><td><td>b<td><tr><td>c</table><table><tr><td>d</table>", "| b\nc\n\nd"),
        ("<table><tr><td>a<td><p>b<p>c</table>", "a\n\nb\n\nc"),
        ("<table><tr><td><table><tr><td>a<td>b</table><td>c</table>", "a | b\n\nc"),
        ("<dl><dt>a<dd>b<dt>c<dt>d<dd><p>e<p>f</dl>", "a\nb\n\nc\nd\ne\n\nf"),
        ("<p>10<sup>6</sup> m<sup>2</sup>, 1<sup>st</sup>, H<sub>2</sub>O", "10^6 m^2, 1st, H2O"),
        ("<p>so<sup><a href=#n1>1</a></sup>.<sup>[<a href=#n2>2</a>]</sup>", "so."),
        ("<p>is <math alttext='x^2'><mi>x</mi></math> and <img class='latex' alt='y'>", "is $x^2$ and $y$"),
        ("<blockquote><p>a</p></blockquote><figure><img alt=no><figcaption>b</figcaption></figure>", "a\n\nb"),
        ("<details><summary>Tip</summary>a</details><details><summary>History</summary>b</details>", "Tip\n\na"),
        ("<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>", "漢"),
    ],
)
def test_text_is_what_a_person_reads(body: str, text: str) -> None:
    assert text_of(body) == text


@pytest.mark.parametrize(
    "noise",
    [
        "<script>x</script><style>x</style><template><p>x</p></template><noscript>x</noscript><svg><title>x</title></svg>",
        "<!-- x --><iframe>x</iframe><object>x</object><video>x</video><canvas>x</canvas><dialog open>x</dialog>",
        "<nav>x</nav><header>x</header><footer>x</footer><aside>x</aside><menu><li>x</menu><search>x</search>",
        "<button>x</button><label>x</label><select><option>x<option>y</select><textarea>x</textarea><input value=x>",
        "<p hidden>x</p><p aria-hidden=true>x</p><p style='a:b; DISPLAY: none'>x</p><p style=visibility:hidden>x</p>",
        "<div role=navigation>x</div><div role=menu>x</div><div role=search>x</div><div role=banner>x</div>",
        "<div class=toc>x</div><div id=toc>x</div><ul class='a breadcrumb'><li>x</ul><div class=left-sidebar>x</div>",
        "<div class=sphinxsidebar>x</div><table class=navbox><tr><td>x</table><div class='wp-pagination'>x</div>",
        "<a href=#main>Skip to content</a><a href=#top>Back to top</a><a href=#r>\u21a92</a><a href=#x>\u00b6</a>",
        "<p><a href=1>Home</a> | <a href=2>News</a> | <a href=3>Mail</a></p>",
        "<div><a href=1>Home</a><div><a href=2>News</a></div><div><a href=3>Mail</a></div></div>",
        "<ul><li><a href=1>One</a><li><a href=2>Two</a><ul><li><a href=3>Three</a></ul></ul>",
        "<table><tr><td><a href=1>Home</a><tr><td><a href=2>News</a><tr><td><a href=3>Mail</a></table>",
    ],
)
def test_what_is_not_the_text_is_left_out(noise: str) -> None:
    assert text_of(f"<p>before</p>{noise}<p>after</p>") == "before\n\nafter"


@pytest.mark.parametrize(
    "kept",
    [
        "<ul><li><code>a</code> <a href=s>Buffer</a> | <a href=t>Array</a> | <a href=u>View</a></ul>",
        "<ul><li><a href=s>string</a></ul>",
        "<p>See <a href=1>one</a>, <a href=2>two</a> and <a href=3>three</a>.",
        "<ul><li><a href=1>One</a>: the first<li><a href=2>Two</a>: the next<li><a href=3>Three</a>: a last</ul>",
        "<div class='page has-sidebar no-menu'>text</div>",
        "<div class='sidebar'><main>text</main></div>",
        "<form><p>text</form>",
        "<p id=tocopherol class='advent stock'>text</p>",
    ],
)
def test_what_resembles_navigation_is_kept(kept: str) -> None:
    assert re.search("text|string|Three|three|View", text_of(kept))


def test_of_a_page_of_unique_words_nothing_is_lost_or_repeated() -> None:
    names = iter(f"w{n}" for n in range(10_000))

    def word() -> str:
        return next(names)

    def blocks() -> str:
        return (
            f"<p>{word()} <b>{word()}</b> <code>{word()}</code></p>{word()}<ul><li>{word()}<li><p>{word()}<p>{word()}"
            f"<ol><li>{word()}</ol></ul><table><caption>{word()}</caption><tr><td>{word()}<td>{word()}<tr><td><p>{word()}"
            f"<p>{word()}</table><pre>{word()}\n{word()}</pre><dl><dt>{word()}<dd>{word()}</dl><blockquote>{word()}"
            f"<br>{word()}</blockquote><div><span>{word()}</span><div>{word()}</div>{word()}</div><hr>{word()}"
        )

    page = "".join(f"<h{level}>{word()}</h{level}><div>{blocks()}</div>" for level in (1, 2, 4, 3, 3, 1, 5, 2, 6))
    found = of(page)
    check(found)
    read = [word for top in found if top.within is None for word in re.findall(r"w\d+", f"{top.header} {top.text}")]
    assert read == re.findall(r"w\d+", page)
    assert len(read) == len(set(read)) > 100


# Kinds of pages


def test_an_encyclopedia_article_is_read_without_its_frame() -> None:
    found = of("""<!DOCTYPE html><html class="vector-toc-pinned"><head><meta charset=UTF-8><title>Otters</title></head>
<body class="mediawiki has-sidebar"><a class="mw-jump-link" href="#bodyContent">Jump to content</a>
<header class="vector-header"><nav><a href="/">Main page</a></nav></header>
<div id="mw-panel-toc" class="vector-toc"><h2>Contents</h2><ul><li><a href="#Diet">1 Diet</a></ul></div>
<main id=content><header class="mw-body-header"><h1 id=firstHeading><span>Otters</span></h1><a href=x>Talk</a></header>
<div class="noprint">From the wiki</div><div class="hatnote">For the game, see <a href=g>Otter</a>.</div>
<p>Otters are <b>mammals</b>.<sup class="reference"><a href="#cite_note-1"><span>[</span>1<span>]</span></a></sup></p>
<div class="mw-heading"><h2 id="Diet">Diet</h2><span class="mw-editsection">[<a href="e">edit</a>]</span></div>
<p>Fish, where <span style="display: none;"><math alttext="x"><mi>x</mi></math></span>
<img class="mwe-math-fallback-image" alt="x"> is large.</p>
<h2>See also</h2><ul><li><a href=a>Beaver</a></li><li><a href=b>Mink</a></li><li><a href=c>Seal</a></li></ul>
<h2>References</h2><ol class=references><li id=cite_note-1><a href="#cite_ref-1">^</a> Smith (1999).</li></ol>
<div role=navigation class=navbox><h3>Mammals</h3><a href=m>Bear</a></div>
<div id=catlinks><a href=c>Otters</a></div></main><footer><h2>About</h2></footer>""")
    assert [(segment.header, segment.text) for segment in found] == [
        ("Contents", ""),
        ("Otters", "Otters are mammals.\n\nDiet\n\nFish, where $x$ is large.\n\nReferences\n\n1. Smith (1999)."),
        ("Diet", "Fish, where $x$ is large."),
        ("See also", ""),
        ("References", "1. Smith (1999)."),
        ("Mammals", ""),
        ("About", ""),
    ]


def test_a_manual_is_read_without_its_frame() -> None:
    found = of("""<body class="wy-body-for-nav"><nav class="wy-nav-side"><ul><li><a href=i>Install</a></ul></nav>
<div class="related" role="navigation"><h3>Navigation</h3><ul><li><a href=n>next</a></ul></div>
<div role=main class=document><section id="s"><h1>Store<a class="headerlink" href="#s">&para;</a></h1>
<p>Use <code class="docutils"><span class="pre">put()</span></code> first.</p>
<div class="admonition note"><p class="admonition-title">Note</p><p>Twice.</p></div>
<dl class="py"><dt class="sig" id="put"><span class="sig-name">put</span><span>(</span><em>key</em><span>)</span>
<a class="reference" href="_m.html"><span class="viewcode-link">[source]</span></a>
<a class="headerlink" href="#put">&para;</a></dt><dd><p>Store a key.</p></dd></dl>
<div class="toctree-wrapper"><ul><li><a href=t>Tutorial</a></ul></div></section></div>
<div class="sphinxsidebar" role="navigation"><h3>Quick search</h3></div><footer><a href=p>Previous</a></footer>""")
    assert [(segment.header, segment.text) for segment in found if segment.text] == [
        ("Store", "Use `put()` first.\n\nNote\n\nTwice.\n\nput(key)\nStore a key.")
    ]
    assert [segment.header for segment in found if not segment.text] == ["Navigation", "Quick search"]


def test_a_page_laid_out_by_tables_is_read_without_its_menu() -> None:
    found = of("""<html><body bgcolor=white><table width="100%"><tr><td><a href=1>Home</a><br><a href=2>Links</a><br>
<a href=3>Mail</a><td><font size=5><h2>My page</h2></font><p>One.<p>Two.<table border><tr><td>1<td>2</table>tail
</table><center><a href=1>Home</a> - <a href=2>Links</a> - <a href=3>Mail</a></center>""")
    assert [(segment.header, segment.text) for segment in found] == [("My page", "One.\n\nTwo.\n\n1 | 2\n\ntail")]


# Bytes

SAID = "naïve café – “ok”"


@pytest.mark.parametrize(
    ("page", "codec"),
    [
        ("{}", "utf-8"),
        ("{}", "utf-8-sig"),
        ("{}", "cp1252"),
        ("{}", "utf-16"),
        ("{}", "utf-16-le"),
        ("<!doctype html>{}", "utf-16-be"),
        ("<meta charset=utf-8>{}", "utf-8"),
        ("<meta charset='ISO-8859-1'>{}", "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1252">{}', "cp1252"),
        ('<?xml version="1.0" encoding="macintosh"?>{}', "mac_roman"),
        ("<meta charset=utf-16>{}", "utf-8"),
        ("<meta charset=no-such-charset>{}", "cp1252"),
        ("<meta charset=rot13>{}", "cp1252"),
        ("<meta charset=windows-1251>{}", "utf-8"),
    ],
)
def test_the_charset_is_found(page: str, codec: str) -> None:
    (segment,) = of(page.format(f"<h1>{SAID}</h1><p>{SAID}</p>").encode(codec))
    assert (segment.header, segment.text, segment.damaged) == (SAID, SAID, False)


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("gb2312", "gb18030", "你好,世界"),
        ("big5", "big5hkscs", "你好世界"),
        ("Shift_JIS", "cp932", "こんにちは①"),
        ("euc-jp", "euc_jp", "こんにちは"),
        ("iso-2022-jp", "iso2022_jp", "こんにちは"),
        ("euc-kr", "cp949", "안녕하세요"),
        ("windows-1251", "cp1251", "Здравствуй, мир"),
        ("koi8-r", "koi8_r", "Здравствуй, мир"),
        ("iso-8859-2", "iso8859_2", "Żółw łąka"),
        ("iso-8859-9", "cp1254", "ığdır"),
    ],
)
def test_a_declared_charset_is_used(label: str, codec: str, text: str) -> None:
    (segment,) = of(f"<meta charset={label}><h1>a</h1>".encode() + text.encode(codec))
    assert (segment.text, segment.damaged) == (text, False)


def test_damage_costs_only_the_segments_that_hold_it() -> None:
    page = "<h2>One</h2><p>Ein schöner Tag, größer.</p><h2>Two</h2><p>für</p><h2>Three</h2><p>ä</p>".encode()
    found = of(page.replace("für".encode(), b"f\xc3r"))
    assert [segment.damaged for segment in found] == [False, True, False]
    assert found[1].text == "f\ufffdr"
    assert found[2].text == "ä"
    assert of(b"<meta charset=utf-8><h1>\xff</h1>text")[0].damaged


@pytest.mark.parametrize(
    ("data", "reason", "note"),
    [
        (b"", "not_html", "no tag"),
        (b"Just a text, where 1 < 2.", "not_html", "no tag"),
        (b"\0" * 1000, "not_html", "control characters"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8 + b"<h1>x</h1>", "not_html", "control characters"),
        (b"\x1f\x8b\x08" + hashlib.sha512(b"x").digest() * 9 + b"<h1>x</h1>", "not_html", "control characters"),
        (b"<p>text</p>", "no_headers", "no header element"),
        (b"<script><h1>x</h1></script>", "no_headers", "no header element"),
        (b"<h1>x</h1>".ljust(PAGE_BYTES + 1), "too_large", f"exceeds {PAGE_BYTES} bytes"),
        (b"<h1>x</h1>" + b"<div>" * 200_000, "too_deep", "31623 deep at byte 158120"),
        (b"<h1>x</h1>" + b"<b>" * 200_000, "too_deep", "deep"),
        (b"<h1>x</h1>" + b"<li><dd>" * 100_000, "too_deep", "deep"),
        (b"<h1>x</h1>" + b"<span><div></span></div>" * 100_000, "too_deep", "deep"),
        (b"<h1>x</h1>" + b"<option>x" * 100_000, "too_deep", "deep"),
        (b"<h1>x</h1>" + b"<a href=x><h1>" * 100_000, "too_deep", "deep"),
        (b"<h1>x</h1><a " + b" ".join(b"w%d" % n for n in range(100_000)), "too_many_attributes", "at byte 10"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else value[:20],
)
def test_a_page_that_cannot_be_used_says_why(data: bytes, reason: str, note: str) -> None:
    with pytest.raises(Unusable) as caught:
        segments(data)
    assert caught.value.reason == reason
    assert note in caught.value.note


def test_a_page_of_the_largest_size_is_read() -> None:
    (segment,) = of(b"<h1>x</h1>text".ljust(PAGE_BYTES))
    assert segment.text == "text"


@pytest.mark.parametrize(
    ("page", "read"),
    [
        ("<div>" * 10_000 + "<h1>x</h1>deep", [("x", "deep")]),
        ("<ul><li>" * 3_000 + "<h1>x</h1>deep", [("x", "deep")]),
        ("<table><tr><td>" * 3_000 + "<h1>x</h1>deep", [("x", "deep")]),
        ("<b><i><font color=red>" * 1_000 + "<h1>x</h1>deep", [("x", "deep")]),
        ("".join(f"<font size={n}>" for n in range(3000)) + "<h1>x</h1>" + "<p>y" * 9, [("x", "y\n\n" * 8 + "y")]),
        ("<h1>x</h1><p class='a>b</p><p title='c'>d</p>", [("x", "d")]),
        ("<h1>x</h2></h1></p></div><p>a</b></i></body></html><p>b</html>c", [("x", "a\n\nbc")]),
        ("<html><body><h1>x</h1>a</body></html><html class=y><body><h1>z</h1>b</body>", [("x", "a"), ("z", "b")]),
        ("<table><h1>x</h1><tr>y<td>z</table>", [("x", "y\n\nz")]),
        ("<h1>x<h2>y<h3>z", [("x", "y\n\nz"), ("y", "z"), ("z", "")]),
        ("<h1>x</h1>a<!-- <h1>y</h1>", [("x", "a")]),
        ("<h1>x</h1>a<script>b", [("x", "a")]),
        ("<h1>x</h1>a&amp&#x110000;&lt", [("x", "a&\ufffd<")]),
        ("<h1>x</h1><pre>a\n<p>b\n<h2>y</h2>c", [("x", "```\na\nb\n```\n\ny\n\n```\nc\n```"), ("y", "```\nc\n```")]),
    ],
    ids=range(14),
)
def test_a_broken_page_is_read_as_a_browser_would(page: str, read: list[tuple[str, str]]) -> None:
    found = of(page)
    assert [(segment.header, segment.text) for segment in found] == read
    check(found)


def test_a_hundred_thousand_headers_are_read() -> None:
    found = of("".join(f"<h{n % 6 + 1}>a{n}</h2><p>word" for n in range(100_000)))
    assert len(found) == 100_000
    assert found[99_998].header == "a99998"
    assert sum(len(segment.text) for segment in found) < 6 * 100_000 * len("a99999\n\nword\n\n")


def test_a_segment_above_the_limit_of_a_row_keeps_no_text_and_its_parts_are_kept() -> None:
    half = "é" * (ROW_BYTES // 4) + " "
    found = of(f"<meta charset=utf-8><h1>all</h1><h2>a</h2>{half}<h2>b</h2>{half}")
    assert [(segment.header, segment.too_large, len(segment.text)) for segment in found] == [
        ("all", True, 0),
        ("a", False, ROW_BYTES // 4),
        ("b", False, ROW_BYTES // 4),
    ]


# Whatever the page

TAGS = re.findall(
    r"\w+",
    "h1 h2 h3 h4 h5 h6 p div span a b i code pre ul ol li table tr td th dl dt dd br hr img sup nav header footer "
    "aside main article section details summary script style template svg math select option button form body html tt",
)
ATTRIBUTES = (
    " href=#x", " href=/y", " class=toc", " class='language-py'", " hidden", " role=navigation", " aria-hidden=true",
    " style=display:none", " id=sidebar", " start=7", " alttext=x", " class='", ' title="', " /",
)  # fmt: skip
PIECES = st.one_of(
    st.builds("<{}{}>".format, st.sampled_from(TAGS), st.sampled_from(("", "", *ATTRIBUTES))),
    st.builds("</{}>".format, st.sampled_from(TAGS)),
    st.sampled_from(
        ["word ", " \n", "&lt;h1&gt;", "&#0;", "&", "<", "<!--", "-->", "]]>", "\u00ad", "¶", "é", "`", "\0"]
    ),
)


def reason_of(data: bytes) -> str | None:
    """Why a page cannot be used; None where it can, and what holds of any segments holds of its own."""
    try:
        found = segments(data)
    except Unusable as error:
        return error.reason
    check(found)
    assert found == segments(data)
    return None


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_soup_of_tags_gives_segments_that_hold_together(soup: str) -> None:
    assert reason_of(f"<h1>x{soup}".encode()) in (None, "not_html")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_give_segments_or_a_reason(head: bytes, tail: bytes) -> None:
    assert reason_of(head) in (None, "not_html", "no_headers")
    assert reason_of(head + b"<h1>x</h1>" + tail) in (None, "not_html", "no_headers")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_real_page_that_is_cut_and_damaged_gives_segments(real_data: Path, data: st.DataObject) -> None:
    page = bytearray((real_data / "html" / "nodejs" / "path.html").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(page) - 1), max_size=20)):
        page[at] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(page) // 2))
    end = data.draw(st.integers(start + 2000, len(page)))
    assert reason_of(b"<h1>x</h1>" + page[start:end]) is None


# Real pages


def described(segment: Segment) -> dict[str, object]:
    words = segment.text.split()
    return {
        "level": segment.level,
        "header": segment.header,
        "within": segment.within,
        "characters": len(segment.text),
        "sha256": hashlib.sha256(segment.text.encode()).hexdigest(),
        "first": " ".join(words[:6]),
        "last": " ".join(words[-6:]),
    }


@pytest.mark.parametrize("name", READ)
def test_the_segments_that_were_read_beside_the_page_are_the_same(real_data: Path, name: str) -> None:
    found = segments((real_data / "html" / "nodejs" / f"{name}.html").read_bytes())
    assert [described(segment) for segment in found] == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", PAGES)
def test_a_real_page_has_a_segment_for_every_header_and_no_navigation(real_data: Path, name: str) -> None:
    page = (real_data / "html" / "nodejs" / f"{name}.html").read_bytes()
    found = segments(page)
    check(found)
    assert len(found) == len(re.findall(rb"<h[1-6]\b", page))
    assert not any(segment.damaged or segment.too_large for segment in found)
    whole = found[0].text
    for noise in ("Skip to content", "Table of contents", "About this documentation", "Other versions", "History\n"):
        assert noise not in whole
    assert not re.search(r"\bcopy\b *(?:\n|$)", whole)
    assert all(not segment.header.endswith("#") and segment.header for segment in found)
