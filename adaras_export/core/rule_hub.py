"""Push a rule's file to a Hub repository, and pull it from any repository that has one.

`adaras_export.delivery.push` pushes whole artifacts.
"""

from pathlib import Path

from adaras_export.errors import HubError
from adaras_export.files import hub
from adaras_export.files.hub import MAIN, Commit

RULE_FILE = "rule.safetensors"  # also in every artifact
_CARD_FILE = "README.md"
_OF_AN_ARTIFACT = "receipt.json"


def push(  # noqa: PLR0913 - the arguments of the public method
    name: str,
    rule: bytes,
    card: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Commit:
    """Push the bytes of a rule's file to a repository without an exported model; see `SteeringRule.push_to_hub`."""
    remote = hub.look(name, revision or MAIN, token)
    if _OF_AN_ARTIFACT in (remote.files or {}):
        raise HubError(f"{name}: holds an exported model; expected a repository of the rule's own, or none")
    is_private = hub.visibility(remote, private)
    files = {RULE_FILE: rule, _CARD_FILE: card.encode()}
    return hub.commit(remote, files, message, private=is_private, token=token)


def pull(path_or_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The path of a rule's file: the given file, the one in a folder, or a download from a repository."""
    path = Path(path_or_id)
    if path.is_dir():
        return path / RULE_FILE
    return path if path.is_file() else hub.download(str(path_or_id), RULE_FILE, revision, token)
