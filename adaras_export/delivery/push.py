"""An exported folder as a repository of the Hub: say what would change there, then change it with one commit.

What is pushed is exactly what the receipt describes; the folder stays as it is. Knows no format and nothing of the
network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export.delivery import documents, verifier
from adaras_export.delivery.receipt import Receipt, read_whole
from adaras_export.errors import ExportError
from adaras_export.exporters import manifest
from adaras_export.exporters.manifest import RECEIPT_FILE, SIGNATURE_FILE
from adaras_export.files import hub
from adaras_export.files.hub import MAIN, Content, Remote, Stored

_OF_THE_HUB = {".gitattributes"}  # says which files are large; the Hub writes it


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        remote: the branch as it is now.
        private: whether the repository is, or would be made, private.
        files: of the artifact, by path; card and receipt, where they have to name another repository, as they will be.
        added: those that the branch does not have.
        replaced: those that it has otherwise.
        unchanged: those that it has.
        removed: files of the branch that are not the artifact's.
        message: of the commit.
        warnings: what others could not do with it.
    """

    remote: Remote
    private: bool
    files: Mapping[str, Content]
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    message: str
    warnings: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not (self.added or self.replaced or self.removed)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of some of the files."""
        return {name: hub.size_of(self.files[name]) for name in names}

    def as_record(self) -> dict[str, Any]:
        """The plan as JSON values."""
        listed = ("added", "replaced", "unchanged", "removed", "warnings")
        about: dict[str, Any] = {"repository": self.remote.name, "url": self.remote.url, "branch": self.remote.branch}
        about |= {"new": self.remote.head is None, "private": self.private, "message": self.message}
        return {**about, **{name: list(getattr(self, name)) for name in listed}, "sizes": self.sizes(tuple(self.files))}

    def text(self) -> str:
        """The plan as a table for people."""
        remote, sizes = self.remote, self.sizes(tuple(self.files))
        kinds = {"add": self.added, "replace": self.replaced, "keep": self.unchanged}
        rows = [(kind, sizes[path], path) for kind, paths in kinds.items() for path in paths]
        rows += [("remove", (remote.files or {})[path].size, path) for path in self.removed]
        sent = sum(sizes[path] for path in (*self.added, *self.replaced))
        age, seen = "a new" if remote.head is None else "an existing", "private" if self.private else "PUBLIC"
        branch = f"branch {remote.branch}{' (new)' if remote.new_branch else ''}"
        about = {
            "bytes": f"{sent:,} to send at most",
            "to": f"{remote.url}, {age} {seen} repository, {branch}",
            "commit": self.message,
        }
        lines = [f"{kind:<7} {size:>15,} {path}" for kind, size, path in rows]
        return "\n".join(lines + [f"{name:<7} {text}" for name, text in about.items()])


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repository: USER/NAME.
        commit: the commit, which holds the artifact and nothing else.
        url: its page.
        receipt: SHA-256 of the receipt there, for `adaras-export verify --receipt`.
        private: whether the repository is private.
        uploaded: bytes of the files that went there, by path.
        unchanged: files that were there already.
        removed: files that were there and are not the artifact's.
    """

    repository: str
    commit: str
    url: str
    receipt: str
    private: bool
    uploaded: Mapping[str, int]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**vars(self), "unchanged": list(self.unchanged), "removed": list(self.removed)}


def plan(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> PushPlan:
    """Hold an exported folder against its receipt and against a repository; changes nothing.

    Args:
        folder: what `export` wrote.
        repository: USER/NAME.
        private: None keeps an existing repository as it is, and makes a new one private.
        revision: a branch; it may be new, and begins at the main branch then.
        message: of the commit.
        token: another one than HF_TOKEN or that of `hf auth login`.

    Raises:
        ArtifactError: the folder is no export, or its files are not those of its receipt.
        ExportError: the folder is signed, and its card names another repository.
        HubError: the Hub refuses, or the repository is not private or public as ``private`` says.
    """
    path = Path(folder)
    receipt = read_whole(path)
    files: dict[str, Content] = {
        name: Stored(place, receipt.files[name]) if name in receipt.files else Stored.of(place)
        for name, place in manifest.files_of(path).items()
    }
    if receipt.repository != repository:
        _refuse_signed(path, receipt, repository)
        files |= documents.readdressed(path, receipt, verifier.exporter_of(receipt), repository)
    remote = hub.look(repository, revision or MAIN, token)
    there = remote.files or {}
    same = {name for name in files.keys() & there.keys() if there[name].holds(files[name])}
    return PushPlan(
        remote=remote,
        private=hub.visibility(remote, private),
        files=files,
        added=tuple(sorted(files.keys() - there.keys())),
        replaced=tuple(sorted((files.keys() & there.keys()) - same)),
        unchanged=tuple(sorted(same)),
        removed=tuple(sorted(there.keys() - files.keys() - _OF_THE_HUB)),
        message=message or f"Steered model, target {receipt.target}, rule {receipt.rule[:12]}",
        warnings=_warnings(receipt),
    )


def carry_out(planned: PushPlan, token: str | None = None) -> Pushed:
    """Do what was planned, in one commit. Repeated after it was cut off, it sends only what is not there yet.

    Raises:
        HubError: the Hub refuses, or somebody else committed, or a file was changed, since the plan was made; nothing
            was committed.
    """
    remote, sent = planned.remote, tuple(sorted({*planned.added, *planned.replaced}))
    made = hub.commit(
        remote,
        {name: planned.files[name] for name in sent},
        planned.message,
        removed=planned.removed,
        private=planned.private,
        token=token,
    )
    return Pushed(
        repository=remote.name,
        commit=made.oid,
        url=made.url,
        receipt=hub.sha256_of(planned.files[RECEIPT_FILE]),
        private=planned.private,
        uploaded=planned.sizes(sent),
        unchanged=planned.unchanged,
        removed=planned.removed,
    )


def push(  # noqa: PLR0913 - what the Hub asks for
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    confirm: Callable[[PushPlan], None] | None = None,
) -> Pushed:
    """Put an exported folder on the Hub, with one commit. Repeated after it was cut off, it sends only what is missing.

    Args:
        folder: what `export` wrote.
        repository: USER/NAME; a new repository, or one that exists.
        private: None keeps an existing repository as it is, and makes a new one private.
        revision: a branch, new or not; default: main.
        message: of the commit.
        token: another one than HF_TOKEN or that of `hf auth login`.
        confirm: called with the plan before anything is sent; what it raises ends the push.

    Returns:
        the commit, its address, and the SHA-256 of the receipt there.

    Raises:
        ArtifactError: the folder is no export, or its files are not those of its receipt.
        ExportError: the folder is signed, and its card names another repository.
        HubError: the Hub refuses, the repository is not private or public as ``private`` says, or somebody else
            committed meanwhile; nothing was committed.

    Example:
        report = export(rule, base="Qwen/Qwen3-1.7B", to="hf", out="steered")
        pushed = push(report.path, "user/steered", private=True)
        print(pushed.url, pushed.receipt)
    """
    planned = plan(folder, repository, private=private, revision=revision, message=message, token=token)
    if confirm is not None:
        confirm(planned)
    return carry_out(planned, token)


def _warnings(receipt: Receipt) -> tuple[str, ...]:
    if receipt.base.revision is not None:
        return ()
    return (
        f"its base is a folder of this machine ({receipt.source}), which its receipt and card name; who downloads it "
        "has to have that model; better export it with the base's Hub id",
    )


def _refuse_signed(folder: Path, receipt: Receipt, repository: str) -> None:
    if (folder / SIGNATURE_FILE).exists():
        raise ExportError(
            f"{folder}: is signed as {receipt.repository}; expected {repository}; remove {SIGNATURE_FILE}, run: "
            f"adaras-export card {folder} --repository {repository}, and sign again"
        )
