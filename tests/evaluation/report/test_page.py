"""The page: nothing that runs or is fetched, every name escaped, and fit to be read aloud."""

import re
import sys
from html.parser import HTMLParser

import evaluations
import pytest

from adaras_export.errors import MissingExtraError
from adaras_export.evaluation.record import evaluation_from_record
from adaras_export.evaluation.report.figures import result_of, transfer_of
from adaras_export.evaluation.report.render import Report, html

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
VOID = {"meta"}
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul", "li", "code", "strong"),
    *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "blockquote", "figure"),
    *("svg", "g", "text", "defs", "use", "path", "clippath", "rect"),
}


class Reader(HTMLParser):
    """Elements, their attributes and their nesting."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module", params=["HOSTILE", "SAMPLED", "transfer"])
def text(request):
    names = ["SAMPLED", "HOSTILE"] if request.param == "transfer" else [request.param]
    results = [result_of(f"{name}.json", evaluation_from_record(getattr(evaluations, name))) for name in names]
    return Report(tuple(results), transfer_of(results) if len(results) > 1 else None, ()).page()


def test_the_elements_are_nested_and_none_runs_or_fetches_anything(text):
    reader = parsed(text)
    assert {*reader.tags} <= KNOWN
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("href", "src")]
    assert all(value.startswith("#") for name, value in reader.attributes if name == "xlink:href")
    assert not re.search(r"url\((?!#)|@import|https?:", text.replace("http://x", ""))
    assert "default-src 'none'" in text


def test_a_name_is_shown_and_is_no_markup(text):
    assert "<script" not in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_drawings_are_told_in_words_and_stand_beside_a_table(text):
    reader = parsed(text)
    images = [value for name, value in reader.attributes if name == "aria-label"]
    assert all(images)
    assert reader.tags.count("svg") <= reader.tags.count("table")
    assert reader.tags.count("table") == reader.tags.count("caption")


def test_every_class_of_the_page_has_a_style(text):
    reader = parsed(text)
    used = {one for name, value in reader.attributes if name == "class" for one in value.split()}
    assert {one for one in used if f".{one} " not in text} <= {"quiet"}  # like other quoted sentences


def test_colours_are_named_for_light_dark_and_print(text):
    roots = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"--[\w-]+(?=:)", root)) for root in roots]
    assert len(names) == 3
    assert names[0] == names[1] == names[2] >= set(re.findall(r"var\((--[\w-]+)\)", text))


TABLE = """## Heading `x`

| what | value |
|---|---:|
| a | 1 |
| b | ▲ +2 |
"""


def test_a_table_has_a_caption_heads_and_a_region_that_scrolls():
    made = html(TABLE, {})
    assert '<div class="table" tabindex="0" role="region" aria-label="Heading x">\n<table>\n<caption>Heading x<' in made
    assert '<th scope="col">what</th>\n<th scope="col" class="number">value</th>' in made
    assert '<th scope="row">a</th>\n<td class="number">1</td>' in made
    assert '<td class="number good">▲ +2</td>' in made


@pytest.mark.parametrize(("label", "tone"), [("Gain shown", "good"), ("Harm shown", "bad"), ("No test", "quiet")])
def test_what_is_shown_has_a_tone(label, tone):
    assert html(f"> **{label}.** words", {}).startswith(f'<blockquote class="{tone}">\n<p><strong>{label}.')


def test_a_chart_is_a_figure_where_the_text_refers_to_it():
    assert html("![](chart:0)\n\n![](chart:1)", {"chart:0": "<svg/>"}) == "<figure><svg/></figure>\n<figure></figure>\n"


# What somebody else's name could hold if an escape were forgotten.
ATTACKS = {
    "html": "<script>alert(1)</script>",
    "html in a line": "a <img src=x onerror=alert(1)> b",
    "a comment": "<!-- x",
    "a link": "[x](javascript:alert(1))",
    "a link by reference": "[x][y]\n\n[y]: http://x",
    "an address": "<http://x>",
    "an image": "![x](http://x/y.png)",
    "an image of data": "![x](data:image/svg+xml;base64,AAAA)",
    "a fence": "```html\n<script>\n```",
    "a block": "    <script>",
    "an entity": "&lt;script&gt; &#60;b&#62;",
    "a title": '![x](chart:0 "><script>")',
    "a class": '| a |\n|---|\n| x" onclick="alert(1) |',
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_markdown_becomes_a_link_an_image_or_html_of_its_own(attack):
    reader = parsed(html(ATTACKS[attack], {"chart:0": "<svg></svg>"}))
    assert {*reader.tags} <= KNOWN
    assert not [
        name for name, _ in reader.attributes if name not in ("class", "scope", "tabindex", "role", "aria-label")
    ]


@pytest.mark.parametrize("library", ["matplotlib", "markdown_it"])
def test_a_missing_library_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    report = Report((result_of("e.json", evaluation_from_record(evaluations.BARE)),), None, ())
    assert report.markdown().startswith("# Evaluation of a steering rule")
    with pytest.raises(MissingExtraError, match=rf"needs {library}, which is not installed; run: pip install"):
        report.page()
