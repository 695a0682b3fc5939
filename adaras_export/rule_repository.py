"""A rule alone as a repository of the Hub, with a short card; and the rule out of any repository that carries one.

Knows nothing of artifacts: those have a card of their own, and `adaras_export.hub` pushes them.
"""

from pathlib import Path

from adaras_export import repositories
from adaras_export.card_text import front_matter, render
from adaras_export.errors import HubError
from adaras_export.models import is_hub_id
from adaras_export.repositories import MAIN, Commit
from adaras_export.rule import SteeringRule

RULE_FILE = "rule.safetensors"  # in every artifact, too
_CARD_FILE = "README.md"
_OF_AN_ARTIFACT = "receipt.json"


def push(
    rule: SteeringRule,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> Commit:
    """Put a rule into a repository of its own; see `SteeringRule.push_to_hub`."""
    remote = repositories.look(name, revision or MAIN, token)
    if _OF_AN_ARTIFACT in (remote.files or {}):
        raise HubError(f"{name}: holds an exported model; expected a repository of the rule's own, or none")
    seen = repositories.visibility(remote, private)
    files = {RULE_FILE: rule.to_bytes(), _CARD_FILE: card(rule, name).encode()}
    text = message or f"Steering rule {rule.fingerprint[:12]}"
    return repositories.commit(remote, files, text, private=seen, token=token)


def pull(path_or_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The rule's file: of a folder, of a repository, or the given one itself."""
    path = Path(path_or_id)
    if path.is_dir():
        return path / RULE_FILE
    return path if path.is_file() else repositories.download(str(path_or_id), RULE_FILE, revision, token)


def card(rule: SteeringRule, name: str) -> str:
    """The README.md of a repository that holds only the rule."""
    base, is_known = rule.base, rule.base.revision is not None and is_hub_id(rule.base.id)
    entries = {
        "library_name": "adaras-export",
        **({"base_model": base.id} if is_known else {}),
        "tags": ["activation-steering", "adaras"],
    }
    values = {"header": front_matter(entries), "name": name, "base": base, "rule": rule, "layers": rule.layers()}
    return render("rule_card.md", values)
