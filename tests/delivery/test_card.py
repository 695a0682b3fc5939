"""The model card: pure text, everything in it from the values; complete ones are in tests/golden/cards."""

import ast
import re
import shlex
from dataclasses import replace
from typing import get_args

import cards
import pytest
import snippets
from cards import RULE, text
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from numpy import ones, zeros
from places import TESTS

from adaras_export.core.base_model import BaseModel
from adaras_export.core.markdown import Example
from adaras_export.core.neurons import Ranking
from adaras_export.core.rule import _card
from adaras_export.evaluation.record import evaluation_from_record
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.files.safe_read import UnreadableError

GOLDEN = TESTS / "golden" / "cards"
PARSER = MarkdownIt("commonmark").enable("table")
each_case = pytest.mark.parametrize("name", cards.parameters(cards.CASES))
each_target = pytest.mark.parametrize("name", cards.parameters(cards.TARGETS))


@pytest.mark.parametrize("name", cards.parameters(cards.GOLDEN))
def test_a_card_is_the_golden_one(name, pytestconfig):
    """`pytest tests/delivery/test_card.py --update-golden` writes them anew; read the difference."""
    found, path = text(**cards.CASES[name]), GOLDEN / f"{name}.md"
    if pytestconfig.option.update_golden:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


def test_every_golden_card_is_of_a_case():
    assert {path.stem for path in GOLDEN.iterdir()} == {*cards.GOLDEN}


@each_case
def test_the_tables_of_a_card_have_as_many_cells_in_every_line(name):
    for block in text(**cards.CASES[name]).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def fences(card):
    return [token for token in PARSER.parse(ModelCard(card).text) if token.type == "fence"]


WORDS = ("text", "text_special", "code_inline")  # a name with a bar is no span of code


def structure(card):
    """What a card consists of besides its words: blocks, cells, links, and code without its strings."""
    for token in PARSER.parse(ModelCard(card).text):
        if token.type == "fence" and token.info == "bash":
            yield len(shlex.split(re.sub(r"\$'(?:[^'\\]|\\.)*'", "x", token.content), comments=True))
        elif token.type == "fence":
            yield re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', token.content)
        else:
            yield token.type, [span.type for span in token.children or () if span.type not in WORDS]


def named(target, name, *, chat):
    """The card of a target where everything that a stranger can name is called ``name``."""
    base = replace(cards.BASE, id=name, revision=name)
    into = {"into": {"file": name}}
    options = {"gguf-into": into, "gguf-switchable": into, "peft-start-at": {"start_at": name}}
    changes = {"options": options[target]} if target in options else {}
    card = cards.card(
        target,
        replace(RULE, base=base),
        replace(evaluation_from_record(cards.FEW), example=Example(name, chat)),
        repository=name,
        base=base,
        tensors=(replace(cards.vector(1), name=name, file=name, dtype=name),),
        parity=ParityReport((Check(name, 1.0, 2.0),)),
        **changes,
    )
    return card.text()


HOSTILE = (
    "a'b\"c`d\\e\n---\n```\n# g <b> $x$ é 🙂\u2028: [x](y) \u202e {{ 7*7 }} {% raw %} {# x #} $(b) \\n \x00",
    '"""\n```\n\n## x\n\n* <!-- & | _a_ ``` `` \\"; \' x',
)


@pytest.mark.parametrize("chat", [True, False])
@each_target
def test_no_name_changes_what_a_card_consists_of(name, chat):
    """A value without its filter, in words or in code of any language, changes the blocks, or the words of a shell."""
    harmless = list(structure(named(name, "x", chat=chat)))
    for hostile in HOSTILE:
        assert list(structure(named(name, hostile, chat=chat))) == harmless


@each_target
def test_the_code_of_every_target_is_of_its_language(name, tmp_path):
    for chat in (True, False):
        card = named(name, HOSTILE[0], chat=chat)
        assert all(snippets.parses(code, tmp_path) for code in snippets.of(card, "bash"))
        for language in ("python", "python vllm"):
            ast.parse("".join(snippets.of(card, language)))


@each_target
def test_where_the_base_has_a_chat_template_the_code_uses_it(name):
    """Symptom: the card of a chat model asked without its template: garbage, and a gate that read another prompt."""
    blocks = (fences(text(name, chat_template=chat)) for chat in (True, False))
    asking = [(one.content, other.content) for one, other in zip(*blocks, strict=True) if "12 times 7" in one.content]
    ways = (
        "apply_chat_template",
        'prompt = [{"role"',
        "engine.chat(",
        "generate([{ role",
        "steered 'What",
        " -st ",
        '{"messages":',
    )
    assert asking
    for chat, plain in asking:
        assert any(way in chat for way in ways)
        assert not any(way in plain.replace("--raw", "") for way in ways if way != "steered 'What")
        assert chat != plain


def test_the_code_asks_a_question_of_the_evaluation_as_it_was_asked_there():
    assert 'messages = [{"role": "user", "content": "785+963"}]' in text(evaluation=cards.GAIN)
    assert 'tokenizer("785 + 963 =\\n", return' in text(evaluation=cards.NULL, chat_template=True)


USER = {"role": "user", "content": "x"}
NO_QUESTIONS = [
    *(7, "", "x" * 601, "\u202ex", [], [7], ["x"], [USER, USER], [{"role": "user"}]),
    *([{**USER, "role": "system"}], [{**USER, "content": 7}], [{**USER, "name": "x"}]),
]


@pytest.mark.parametrize("prompt", NO_QUESTIONS)
def test_what_is_no_short_question_is_no_example_and_refused_in_a_file(prompt):
    assert Example.of(prompt) is None
    with pytest.raises(UnreadableError, match="for example, where there should be a short question"):
        text(evaluation={**cards.GAIN, "example": prompt})


@pytest.mark.parametrize("ranking", get_args(Ranking))
def test_every_ranking_has_words(ranking):
    assert "ranked by " in text(rule=replace(RULE, neurons=replace(RULE.neurons, ranking=ranking)))


def test_layers_are_told_one_by_one_and_tensors_by_their_ranges():
    names = {1: "a.{}.b", 3: "a.{}.b", 4: "a.{}.b", 5: "a.{}.b", 7: "c", 12: "a.{}.b"}
    found = text(tensors=tuple(cards.vector(layer, name) for layer, name in names.items()))
    assert "| `a.{1,3..5,12}.b` |" in found
    assert "| `c` |" in found
    assert "Added or changed: 6. " in found


def test_tensors_of_one_kind_stand_apart_where_anything_but_the_layer_differs():
    entries = (
        cards.vector(1),
        cards.vector(2, what="changed"),
        cards.vector(3, values=zeros((4, 8), "float32")),
        cards.vector(4, values=ones((4, 8), "float32")),
    )
    rows = [line for line in text(tensors=entries).splitlines() if "steering_vector" in line]
    assert [row.rpartition("F32")[2] for row in rows] == [
        " | 32 | added |", " | 32 | changed |", " | 4 x 8 | added, zeros only |", " | 4 x 8 | added |"
    ]  # fmt: skip


def test_a_name_with_a_strange_number_is_told_as_it_stands():
    strange = ("a.007.b", "a.²", "a.99999999999", "3")
    found = text(tensors=tuple(cards.vector(0, name) for name in strange))
    assert all(f"| `{name}` |" in found for name in strange)


def test_a_rule_without_neurons_has_a_card():
    assert "0 of its 384 MLP neurons" in text(rule=replace(RULE, neurons=RULE.neurons.top(0)))


def test_a_base_is_told_with_the_commit_that_the_rule_or_the_export_knows():
    local = replace(RULE, base=BaseModel("clone", "llama", 8, 48, 32))
    assert "`somebody/tiny` at revision `c0ffee`" in text()
    assert "`somebody/tiny` at revision `c0ffee`" in text(rule=local)
    assert "`clone`, steered" in text(rule=local, base=local.base)


def test_the_card_of_a_rule_alone_shows_any_name_as_it_is():
    def rule_card(name, rule=RULE):
        return _card(replace(rule, base=replace(cards.BASE, id=name)), name)

    for hostile in HOSTILE:
        assert list(structure(rule_card(hostile))) == list(structure(rule_card("x")))
        assert ModelCard(rule_card(hostile)).data.to_dict().keys() == {"library_name", "tags"}
    assert ModelCard(rule_card("a/b")).data.base_model == "a/b"
    assert "of no layer," in rule_card("a/b", replace(RULE, neurons=RULE.neurons.top(0)))
