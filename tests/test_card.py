"""The model card: pure text, everything in it from the values; complete ones are in tests/golden/cards."""

import ast
import subprocess
from dataclasses import replace
from pathlib import Path

import cards
import pytest
import snippets
from cards import RULE, text
from hypothesis import example, given
from hypothesis import strategies as st

from adaras_export import card_text
from adaras_export.card import card
from adaras_export.foreign import UnreadableError
from adaras_export.models import BaseModel

GOLDEN = Path(__file__).parent / "golden" / "cards"
each_case = pytest.mark.parametrize("name", cards.parameters(cards.CASES))
each_target = pytest.mark.parametrize("name", cards.parameters(cards.TARGETS))


@each_case
def test_a_card_is_the_golden_one(name, pytestconfig):
    """`pytest tests/test_card.py --update-golden` writes them anew; read the difference before it is committed."""
    found, path = text(**cards.CASES[name]), GOLDEN / f"{name}.md"
    if pytestconfig.option.update_golden:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


def test_every_golden_card_is_of_a_case():
    assert {path.stem for path in GOLDEN.iterdir()} == cards.CASES.keys()


@each_case
def test_the_tables_of_a_card_have_as_many_cells_in_every_line(name):
    for block in text(**cards.CASES[name]).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


@each_target
def test_the_sections_are_there_for_every_target(name):
    headings = [line[3:] for line in text(name).splitlines() if line.startswith("## ")]
    first = ["What was changed", "Every tensor that is not the base's", "Load it", "Switch it off"]
    assert headings == [*first, "Effect", "Limits", "Verify it"]


@pytest.mark.parametrize("chat", [True, False])
@each_target
def test_nothing_of_a_template_is_left(name, chat):
    found = text(name, chat_template=chat)
    assert not [one for one in ("repo", "strength", "question", "chat", "plain") if f"{{{one}}}" in found]


@each_target
def test_where_the_base_has_a_chat_template_the_code_uses_it(name):
    """Symptom: the card of a chat model asked without its template: garbage, and a gate that read another prompt."""
    asked = [code for _, code in card_text.blocks(text(name, chat_template=True)) if "What is 12 times 7?" in code]
    plain = [code for _, code in card_text.blocks(text(name)) if "What is 12 times 7?" in code]
    assert len(asked) == len(plain) > 0
    ways = ("apply_chat_template", 'prompt = [{"role"', "engine.chat(", "generate([{ role", "onnx_runner", " -st ")
    assert all(any(way in code for way in ways) for code in asked)
    assert not any(way in code for code in plain for way in ways if way != "onnx_runner")


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
    assert card_text.Example.of(prompt) is None
    with pytest.raises(UnreadableError, match="has an example that is no short question"):
        text(evaluation={**cards.GAIN, "example": prompt})


@pytest.mark.parametrize("ranking", ["given", "paper", "attribution"])
def test_every_ranking_has_words(ranking):
    assert "ranked by: " in text(rule=replace(RULE, neurons=replace(RULE.neurons, ranking=ranking)))


def test_layers_are_told_one_by_one_and_tensors_by_their_ranges():
    names = {1: "a.{}.b", 3: "a.{}.b", 4: "a.{}.b", 5: "a.{}.b", 7: "c", 12: "a.{}.b"}
    found = text(tensors=tuple(cards.vector(layer, name) for layer, name in names.items()))
    assert "| `a.{1,3..5,12}.b` |" in found
    assert "| `c` |" in found
    assert "Added or changed: 6," in found


def test_tensors_of_one_kind_stand_apart_where_anything_but_the_layer_differs():
    from numpy import ones, zeros

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


NAMES = st.text(min_size=1, max_size=30) | st.text("`'\"|\\#$<>[]{}:-\n\r\t @🙂é", min_size=1)
hostile = example("a'b\"c`d|e\\f\n---\n```\n# g <b> $x$ {repo} é 🙂\u2028: [x](y)")


@hostile
@given(NAMES)
def test_code_names_a_repository_and_a_question_of_any_text_and_still_runs(name):
    """Python, JavaScript's JSON and a shell read any text in a snippet back unchanged."""
    both, words = '["{repo}", "{question}"]', "printf %s {repo}/x {question}"
    markdown = f"```python\n{both}\n```\n\n```js\n{both}\n```\n\n```bash\n{words}\n```\n"
    asked = card_text.Example(name, chat=True)
    [python, script, shell] = card_text.blocks(card_text.filled(markdown, name, 1.0, asked))
    assert ast.literal_eval(python[1].strip()) == [name, name]
    assert ast.literal_eval(script[1].strip()) == [name, name]
    assert [language for language, _ in (python, script, shell)] == ["python", "js", "bash"]


@pytest.mark.parametrize(
    "name", ["plain", "a'b c", "two\nlines", '$(touch x) `y` \\ "q"', "tab\t' \x07 é 🙂", "~/x", "-n"]
)
def test_a_shell_takes_a_repository_of_any_name_for_one_word(name):
    word = card_text.shell_word(name)
    done = subprocess.run(["bash", "-c", f"printf %s {word}/x"], capture_output=True, check=True)
    assert done.stdout.decode() == f"{name}/x"
    assert "\n" not in word


@hostile
@given(NAMES)
def test_a_name_is_one_line_of_markdown_that_opens_nothing(name):
    for shown in (card_text.plain(name), card_text.code(name), card_text.cell(name)):
        assert len(f"x{shown}x".splitlines()) == 1
    assert card_text.code(name).count("`" * (len(card_text.code(name)) + 1)) == 0


@each_target
def test_the_shell_commands_and_python_snippets_of_every_target_parse(name, tmp_path):
    for chat in (True, False):
        card = text(name, chat_template=chat)
        assert all(snippets.parses(code, tmp_path) for code in snippets.of(card, "bash"))
        for language in ("python", "python vllm"):
            ast.parse("".join(snippets.of(card, language)))


def test_a_card_does_not_depend_on_the_order_of_its_calls():
    first = card(RULE, cards.PARITY, cards.context())
    assert first == card(RULE, cards.PARITY, cards.context())
