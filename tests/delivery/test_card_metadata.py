"""The header of a card, as the Hub's own tools read it."""

import json
from dataclasses import replace

import cards
import evaluations
import pytest
import yaml
from cards import RULE, text
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.base_model import BaseModel
from adaras_export.delivery.card_metadata import inherited
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.record import evaluation_from_record


def data(**how):
    return ModelCard(text(**how)).data


@pytest.mark.parametrize("name", cards.parameters(cards.CASES))
def test_the_hub_reads_every_header_and_writes_it_again_as_it_was(name, tmp_path):
    """Nothing gets lost on the way through the library's own card."""
    path = tmp_path / "README.md"
    path.write_text(text(**cards.CASES[name]))
    loaded = ModelCard.load(path)
    assert loaded.content == path.read_text()
    assert metadata_load(path) == loaded.data.to_dict()


def test_license_languages_and_base_are_told():
    found = data()
    assert (found.license, found["license_name"], found.language) == ("other", "tiny", ["en", "no"])
    assert found["license_link"] == "https://huggingface.co/somebody/tiny/blob/c0ffee/LICENSE"
    assert (found.base_model, found["base_model_relation"]) == ("somebody/tiny", "finetune")
    assert (found.pipeline_tag, found.library_name) == ("text-generation", "transformers")
    assert found.tags == ["activation-steering", "adaras", "custom_code"]


def test_the_paper_is_a_link_in_the_text_of_which_the_hub_makes_its_tag():
    assert "](https://arxiv.org/abs/2601.19847)" in text()


RELATIONS = {"hf": "finetune", "hf-thin": "adapter", "onnx": "finetune", "peft": "adapter", "peft-adaptive": "adapter",
             "peft-start-at": "adapter",
             "peft-merge": "finetune", "stock": "finetune", "stock-switchable": "finetune", "gguf": "adapter",
             "gguf-into": "finetune", "gguf-switchable": "finetune"}  # fmt: skip


@pytest.mark.parametrize("name", cards.parameters(RELATIONS))
def test_what_a_target_is_to_its_base_is_a_word_of_the_hub(name):
    assert data(name=name)["base_model_relation"] == RELATIONS[name]


@pytest.mark.parametrize("id", ["clone", "a b/c", "a/b/c", "-x"])
def test_a_base_that_the_hub_cannot_know_is_not_claimed(id):
    revision = None if id == "clone" else "c0ffee"
    base = BaseModel(id, "llama", 8, 48, 32, revision=revision)
    found = data(rule=replace(RULE, base=base), base=base)
    assert found.base_model is None
    assert "base_model_relation" not in found
    assert found["license_link"] == "LICENSE"


def test_a_link_that_leads_somewhere_stays():
    card = {"license": "other", "license_link": "https://example.org/x"}
    assert data(base_card=card)["license_link"] == "https://example.org/x"


def test_a_base_without_a_card_gives_no_license_and_no_language():
    found = data(base_card={})
    assert (found.license, found.language) == (None, None)


def test_the_datasets_are_those_that_were_named():
    assert data().datasets is None
    assert data(datasets=("someone/traces",)).datasets == ["someone/traces"]
    assert data(evaluation=cards.GAIN).datasets is None, "the test set is nothing that it was made with"


def test_the_hub_reads_the_result_of_the_arm_that_the_artifact_computes():
    [result] = data(evaluation=cards.GAIN).eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.578)
    assert (result.task_type, result.dataset_type) == ("text-generation", "someone/sums")
    assert result.metric_name == "Accuracy, greedy (n = 500, 95 % Wilson interval 0.548 to 0.608)"
    assert result.verified is None
    [static] = data(name="stock", evaluation=cards.COMPARED).eval_results
    assert static.metric_value == 0.568
    assert static.dataset_type == "unknown"


UNCLAIMED = {
    "none": ("hf", None),
    "seen questions": ("hf", cards.SEEN),
    "another arm": ("peft", cards.GAIN),
    "rounded onnx weights": ("onnx-int4-page", cards.GAIN),
}


@pytest.mark.parametrize("case", cards.parameters(UNCLAIMED))
def test_no_result_is_claimed_that_was_not_measured_on_this_artifact(case):
    name, evaluation = UNCLAIMED[case]
    found = data(name=name, evaluation=evaluation)
    assert found.eval_results is None
    assert "metrics" not in found.to_dict()


def told_results(evaluation, name="hf", **more):
    return cards.card(name, measured=evaluation_from_record(evaluation), **more).results()


def test_a_task_of_a_benchmark_gets_the_file_that_its_leaderboard_reads():
    from huggingface_hub import parse_eval_result_entries

    [entry] = parse_eval_result_entries(yaml.safe_load(told_results(cards.GAIN)))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/sums", "two_digits", 0.578)
    assert "arm gated, greedy, n = 500, 95 % Wilson interval" in entry.notes
    assert entry.verify_token is None


def test_machines_are_not_told_that_sampled_answers_are_greedy():
    record = {**evaluations.SAMPLED, "dataset": "a/b", "task": "c"}
    notes = yaml.safe_load(told_results(record, rule=RULE.ungated()))[0]["notes"]
    assert "arm always, 8 answers each at temperature 0.7, n = 60, 95 % bootstrap interval" in notes


def test_where_no_task_is_named_there_is_no_such_file():
    assert told_results(cards.NULL) is None
    assert told_results(cards.GAIN | {"task": None}) is None
    assert told_results(cards.SEEN) is None


@pytest.mark.onnx
def test_an_artifact_with_rounded_weights_enters_no_leaderboard():
    assert told_results(cards.GAIN, "onnx-int4-page") is None


@pytest.mark.parametrize("language", ["no", False, ["en", False], ["no"]])
def test_norwegian_is_a_language(language):
    assert "no" in inherited({"language": language}, "README.md")["language"]


@pytest.mark.parametrize("entry", [{"license": {"a": 1}}, {"language": [1]}, {"license_name": 3}])
def test_a_header_of_a_base_that_is_no_text_is_refused_in_one_line(entry):
    with pytest.raises(ArtifactError, match=r"README.md: \w+ is .*; expected text"):
        inherited(entry, "README.md")


WORDS = st.text(min_size=1, max_size=20) | st.text("'\"\n\r:-#{}[]&*!|>%@` \t\x85\u2028🙂", min_size=1, max_size=12)


@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_names_of_any_letters_come_back_from_the_header_as_they_were(repository, license, languages):
    """Colons, quotes, line ends and what YAML takes for numbers or truth values: as text they stay text."""
    card = {"license": license, "language": languages}
    found = data(repository=repository, base_card=card, evaluation=cards.FEW)
    assert found.license == license
    assert found.language == languages
    assert found.model_name == repository


@given(WORDS)
def test_the_body_follows_the_header_whatever_is_in_it(word):
    card = ModelCard(text(base_card={"license": word}))
    assert card.text.startswith("\n# someone/tiny-steered\n")


def test_the_results_come_back_from_the_model_index():
    entries = ModelCard(text(evaluation=cards.GAIN)).data.to_dict()
    name, [result] = model_index_to_eval_results(json.loads(json.dumps(entries["model-index"])))
    assert (name, result.metric_value) == ("someone/tiny-steered", 0.578)
