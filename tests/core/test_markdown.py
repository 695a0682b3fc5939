"""Untrusted text in Markdown, as a CommonMark parser with tables reads it, and in code, as its language reads it."""

import ast
import json
import re
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import DictLoader, UndefinedError
from markdown_it import MarkdownIt

from adaras_export.core import markdown
from adaras_export.core.markdown import Markdown, code, javascript, plain, python, shell
from adaras_export.errors import visible

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NAMES = st.text(max_size=30) | st.text("`'\"|\\#$<>[]{}()*_~:-+=.!&;1ax\n\r\t @/🙂é\u202e\u200b\u2028\x00", max_size=20)
ATTACKS = (
    "a'b\"c`d|e\\f\n---\n```\n# g <b> $x$ é 🙂\u2028: [x](y)",
    *("---", "===", "- a", "+ a", "* a", "1. a", "12) a", "> a", "# a", "a\n---", "```", "~~~", "    a", "\ta"),
    *("a\\|b", "|", "\\", "a|`b", "`|`", "``", "` `", "a`", "\\`", "_a_", "__a__", "a_b", "*a*", "~~a~~", "a~"),
    *("<b>", "<!-- ", "<a@b.c>", "<http://a.b>", "&amp;", "&#42;", "&lt", "[a](b)", "![a](b)", "[a]: b", "[^1]"),
    *(":::", "$$", "$a$", ":smile:", "http://a.b", "www.a.b", "{{ 7*7 }}", "{% raw %}", "{# a #}", "${a}", " a ", ""),
    *("\u202egnp.exe", "a\u200bb", "\ufeff", "\U000e0041", "\udc80", "a\x00b", "a\r\nb", "a\x85b"),
)


def attacked(test):
    for attack in ATTACKS:
        test = example(attack)(test)
    return given(NAMES)(test)


def one_line(text):
    return visible(" ".join(text.split()))


def read(tokens):
    """The kinds of tokens within a line, those of words aside, and the text of all."""
    kinds = [token.type for token in tokens if not token.type.startswith("text")]
    return kinds, "".join(token.content for token in tokens)


@attacked
def test_text_is_a_paragraph_that_reads_as_the_text(text):
    tokens = PARSER.parse(plain(text))
    assert [token.type for token in tokens] in ([], ["paragraph_open", "inline", "paragraph_close"])
    kinds, shown = read(tokens[1].children if tokens else [])
    assert (kinds, shown.strip()) == ([], one_line(text))


@attacked
def test_text_stays_text_behind_and_before_other_text(text):
    [_, line, _] = PARSER.parse(f"x {plain(text)}[a](b)")
    assert read(line.children) == (["link_open", "link_close"], "x " + visible(re.sub(r"\s+", " ", text)) + "a")


@attacked
def test_a_cell_of_a_table_ends_where_it_should_and_reads_as_the_text(text):
    tokens = PARSER.parse(f"| a | b | c |\n|---|---|---|\n| {plain(text)} | {code(text)} | z |\n")
    *_, words, name, last = [token for token in tokens if token.type == "inline"]
    assert read(words.children) == ([], one_line(text))
    kinds, shown = read(name.children)
    assert (kinds, shown.strip()) == ([] if "|" in text else ["code_inline"], one_line(text))
    assert last.content == "z"


@attacked
def test_code_is_one_span_of_code(text):
    [_, line, _] = PARSER.parse(f"x {code(text)} x")
    assert [token.type for token in line.children if token.type != "text"] == ["code_inline"] * ("|" not in text)


@pytest.mark.parametrize("mark", [*"\\`*[]<>|#&~$", "_a", "a_", ":a", "!"])
def test_every_mark_is_escaped_also_those_of_viewers_with_extensions(mark):
    """Mathematics, directives and emoji are no CommonMark, so that the parser above does not know them."""
    assert "\\" in plain(mark)


EXTENSIONS = {"http://a.b": r"http\://a.b", "www.a.b": r"www\.a.b", ":::note": r"\:\:\:note", ":smile:": r"\:smile:"}


@pytest.mark.parametrize("text", EXTENSIONS)
def test_no_address_becomes_a_link_and_no_directive_is_opened(text):
    assert plain(text) == EXTENSIONS[text]


@pytest.mark.parametrize("text", ["someone/tiny-steered", "a_b 1.5", "p(correct) = 0.5: -1.0 to +2.0!?", "Don't."])
def test_common_names_and_figures_stay_readable_as_they_are(text):
    assert plain(text) == text


@attacked
def test_languages_read_a_string_back_as_it_was_and_nothing_in_it_is_hidden(text):
    assert ast.literal_eval(python(text)) == text
    assert json.loads(javascript(text).replace("\\x", "\\u00")) == text  # JSON is JavaScript without \x
    for quoted in (python(text), javascript(text), shell(text)):
        assert quoted.isprintable()


@pytest.mark.parametrize("name", ["", "a'b c", "two\nlines", '$(touch x) `y` \\ "q"', "tab\t' \x07 é 🙂", "~/x", "-n"])
def test_a_shell_takes_any_text_for_one_word(name):
    done = subprocess.run(["bash", "-c", f"printf %s {shell(name)}/x"], capture_output=True, check=True)
    assert done.stdout.decode() == f"{name}/x"


@pytest.fixture
def rendered(monkeypatch):
    """A template that is a text, filled."""

    def render(source, **values):
        monkeypatch.setattr(markdown._templates(), "loader", DictLoader({source: source}))
        return markdown.render(source, values)

    return render


@attacked
def test_a_value_without_a_filter_is_escaped_and_never_read_as_a_template(text):
    environment = markdown._templates()
    assert environment.from_string("{{ value }}").render(value=text) == plain(text)
    assert environment.from_string("{{ value | python }}").render(value=text) == python(text)


def test_only_markdown_passes_as_it_is(rendered):
    assert rendered("{{ a }} {{ b }} {{ a ~ b }}", a=Markdown("*a*"), b="*b*") == r"*a* \*b\* \*a\*\*b\*"
    assert rendered("{{ x | upper }} {{ x | safe }}", x=Markdown("*x*")) == r"\*X\* \*x\*", "others make text of it"


@pytest.mark.parametrize("source", ["{{ absent }}", "{{ x.absent }}", "{% if absent %}{% endif %}"])
def test_what_a_template_lacks_is_an_error(source, rendered):
    with pytest.raises(UndefinedError):
        rendered(source, x=1)


def test_none_is_shown_nowhere(rendered):
    with pytest.raises(TypeError, match="shows None"):
        rendered("{{ x }}", x=None)
