"""A rule alone as a repository, and the rule out of whatever carries one."""

import pytest
from hub.conftest import KEY
from huggingface_hub import ModelCard, constants

from adaras_export.core.rule import SteeringRule
from adaras_export.delivery import push as pushing
from adaras_export.errors import ArtifactError, HubError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "user/rule"
slow = pytest.mark.slow  # dozens that are together


def test_a_rule_survives_the_round_trip(online, rules):
    rule = rules[KEY]
    commit = rule.push_to_hub(NAME, commit_message="why")
    assert SteeringRule.from_pretrained(NAME, revision=commit) == rule
    found = online.repositories[NAME]
    assert (found.private, found.commits[commit]["summary"]) == (True, "why")
    assert found.files().keys() == {".gitattributes", "README.md", "rule.safetensors"}
    card = ModelCard(online.content(NAME, "README.md").decode())
    assert (card.data.library_name, card.data.tags) == ("adaras-export", ["activation-steering", "adaras"])
    assert rule.fingerprint in card.text


@slow
def test_a_commit_pins_a_rule_and_a_branch_holds_another(online, rules):
    rule, other = rules[KEY], rules[KEY].with_strength(-1)
    first = rule.push_to_hub(NAME, private=False)
    other.push_to_hub(NAME, token="hf_writer")
    other.with_strength(0.5).push_to_hub(NAME, revision="half")
    assert SteeringRule.from_pretrained(NAME, revision=first) == rule
    assert SteeringRule.from_pretrained(NAME) == other
    assert SteeringRule.from_pretrained(NAME, revision="half").strength == 0.5
    assert not online.repositories[NAME].private


@slow
def test_a_folder_and_a_file_are_read_without_the_hub(online, rules, artifact):
    assert SteeringRule.from_pretrained(artifact) == rules[KEY]
    assert SteeringRule.from_pretrained(str(artifact / "rule.safetensors")) == rules[KEY]
    assert online.log == []


@slow
def test_the_repository_of_a_model_is_not_overwritten_by_a_rule(online, rules, artifact):
    pushing.push(artifact, NAME)
    with pytest.raises(HubError, match=rf"{NAME}: holds an exported model; expected a repository of the rule's own"):
        rules[KEY].push_to_hub(NAME)
    assert SteeringRule.from_pretrained(NAME) == rules[KEY]


@slow
@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (NAME, {"token": "hf_wrong"}, r"the token is not accepted \(the Hub says 401: Invalid credentials"),
        (NAME, {"token": "hf_other"}, r"no such repository, or a private one that the token may not read \(the Hub"),
        ("user/none", {}, "no such repository, or a private one"),
        (
            NAME,
            {"revision": "v9"},
            r"has no such revision \(the Hub says 404: Invalid rev id: v9\); expected a",
        ),
        ("user/empty", {}, r"has no such file \(the Hub says 404: rule.safetensors does not exist on main\)"),
        ("a b", {}, "is not a repository name"),
    ],
)
def test_what_cannot_be_had_is_one_line(name, how, message, online, rules):
    rules[KEY].push_to_hub(NAME)
    online.create("user/empty", private=True)
    with pytest.raises(HubError, match=f"{name}: {message}") as raised:
        SteeringRule.from_pretrained(name, **how)
    assert "\n" not in str(raised.value)


@slow
def test_without_a_token_a_private_rule_is_not_read(online, rules, monkeypatch):
    rules[KEY].push_to_hub(NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HubError, match=f"{NAME}: no token was found; expected one: run `hf auth login`, or set HF_TOKEN"
    ):
        SteeringRule.from_pretrained(NAME)


@slow
def test_offline_it_comes_from_the_cache_or_not_at_all(online, rules, monkeypatch):
    rules[KEY].push_to_hub(NAME)
    SteeringRule.from_pretrained(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(online.log)
    assert SteeringRule.from_pretrained(NAME) == rules[KEY]
    with pytest.raises(HubError, match="user/none: HF_HUB_OFFLINE is set, and the local cache does not have it"):
        SteeringRule.from_pretrained("user/none")
    assert len(online.log) == before


@slow
def test_a_cache_that_cannot_be_written_is_named(online, rules, tmp_path, monkeypatch):
    rules[KEY].push_to_hub(NAME)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match=rf"{NAME}: {tmp_path}/file.*: Not a directory; expected a cache \(HF_HOME\)"):
        SteeringRule.from_pretrained(NAME)


@slow
def test_a_file_that_is_no_rule_is_refused(online, rules, artifact):
    (artifact / "rule.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="expected a rule file"):
        SteeringRule.from_pretrained(artifact)
