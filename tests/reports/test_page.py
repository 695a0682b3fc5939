"""The page: nothing that runs or is fetched, every name escaped, and fit to be read aloud."""

import re
from html.parser import HTMLParser

import evaluations
import pytest
from adaras_export.reports.blocks import Cell, Code, Paragraph, Report, Table, Verdict
from adaras_export.reports.page import page

from adaras_export.reports.reading import _evaluation
from adaras_export.reports.results import result_of, transfer_of
from adaras_export.reports.text import report

pytest.importorskip("scipy")
VOID = {"meta", "br"}
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul", "li", "code", "strong"),
    *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "br", "figure"),
    *("svg", "line", "text", "circle", "path", "polyline"),
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
    results = [result_of(_evaluation(f"{name}.json", getattr(evaluations, name))) for name in names]
    return page(report(results, transfer_of(results) if len(results) > 1 else None, []))


def test_the_elements_are_nested_and_none_runs_or_fetches_anything(text):
    reader = parsed(text)
    assert {*reader.tags} <= KNOWN
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert not re.search(r"url\(|@import|https?:", text.replace("http://x", ""))
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


def test_numbers_of_drawings_lie_within_them(text):
    for width, height, drawing in re.findall(r'viewBox="0 0 (\d+) ([\d.]+)"(.*?)</svg>', text, re.DOTALL):
        across = re.findall(r' (?:cx|x|x1|x2)="(-?[\d.]+)"', drawing)
        down = re.findall(r' (?:cy|y|y1|y2)="(-?[\d.]+)"', drawing)
        assert all(0 <= float(one) <= float(width) for one in across)
        assert all(0 <= float(one) <= float(height) for one in down)


def test_every_class_of_the_page_has_a_style(text):
    reader = parsed(text)
    used = {one for name, value in reader.attributes if name == "class" for one in value.split()}
    assert {one for one in used if f".{one}" not in text} <= {"tick"}  # like other text


def test_colours_are_named_for_light_dark_and_print():
    text = page(Report("t", [Verdict("good", "l", ("s",)), Paragraph((Code("c"),))]))
    roots = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"--[\w-]+(?=:)", root)) for root in roots]
    assert len(names) == 3
    assert names[0] == names[1] == names[2] >= set(re.findall(r"var\((--[\w-]+)\)", text))


def test_the_first_cell_of_a_row_names_it():
    table = Table("c", ("a", "b"), ((Cell.of("x"), Cell.of("1", tone="good-1")),))
    assert '<th scope="row">x</th><td class="good-1">1</td>' in page(Report("t", [table]))
