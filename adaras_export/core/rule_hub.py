"""A rule's file to a repository of the Hub, and out of any repository that carries one.

Knows nothing of artifacts: those have a card of their own, and `adaras_export.delivery.push` pushes them.
"""

from pathlib import Path

from adaras_export.errors import HubError
from adaras_export.files import hub
from adaras_export.files.hub import MAIN, Commit

RULE_FILE = "rule.safetensors"  # in every artifact, too
_CARD_FILE = "README.md"
_OF_AN_ARTIFACT = "receipt.json"


def push(  # noqa: PLR0913 - as the method that users call
    name: str,
    rule: bytes,
    card: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Commit:
    """Put the bytes of a rule's file into a repository of its own; see `SteeringRule.push_to_hub`."""
    remote = hub.look(name, revision or MAIN, token)
    if _OF_AN_ARTIFACT in (remote.files or {}):
        raise HubError(f"{name}: holds an exported model; expected a repository of the rule's own, or none")
    seen = hub.visibility(remote, private)
    files = {RULE_FILE: rule, _CARD_FILE: card.encode()}
    return hub.commit(remote, files, message, private=seen, token=token)


def pull(path_or_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The rule's file: of a folder, of a repository, or the given one itself."""
    path = Path(path_or_id)
    if path.is_dir():
        return path / RULE_FILE
    return path if path.is_file() else hub.download(str(path_or_id), RULE_FILE, revision, token)
