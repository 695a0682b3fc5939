"""Repositories of the Hub: what is in one, one commit to it, one file out of it; and what went wrong, in one line.

The only place that knows huggingface_hub's errors. Knows nothing of rules and artifacts. Token, cache, endpoint and
offline mode are the library's own (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaras_export.errors import HubError, first_line
from adaras_export.files import atomic

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

MAIN = "main"


@dataclass(frozen=True)
class Stored:
    """A file on the disk, and the SHA-256 that it had when it was checked: other bytes are not sent."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Stored":
        """The file as it is now."""
        return cls(path, atomic.sha256_file(path))

    def to_bytes(self) -> bytes:
        """The bytes that were checked.

        Raises:
            HubError: the file has others by now.
        """
        content = self.path.read_bytes()
        self.require(atomic.sha256(content))
        return content

    def require(self, sha256: str) -> None:
        """Refuse bytes with another SHA-256 than that of the file when it was checked.

        Raises:
            HubError: it is another one.
        """
        if sha256 != self.sha256:
            raise HubError(
                f"{self.path}: has changed since it was checked; expected SHA-256 {self.sha256}; nothing was "
                "committed; verify the folder and push again"
            )


Content = Stored | bytes
"""A file to be sent: where it is, or what is in it."""

_SMALL = 1 << 25
"""Bytes of a file that is held in memory while it is sent."""


def size_of(content: Content) -> int:
    """How many bytes it has."""
    return len(content) if isinstance(content, bytes) else content.path.stat().st_size


def sha256_of(content: Content) -> str:
    """Its SHA-256, hexadecimal."""
    return atomic.sha256(content) if isinstance(content, bytes) else content.sha256


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repository: bytes, and SHA-256 of what is in large storage, git's own SHA-1 of all else."""

    size: int
    digest: str

    def holds(self, content: Content) -> bool:
        """Whether it is the same as a local file."""
        if size_of(content) != self.size:
            return False
        if len(self.digest) == 40:
            return self.digest == _git_name(content if isinstance(content, bytes) else content.to_bytes())
        return self.digest == sha256_of(content)


@dataclass(frozen=True)
class Remote:
    """A branch of a repository as it was when it was looked at.

    Attributes:
        name: USER/NAME.
        url: its page.
        branch: the branch; where it does not exist yet it will begin at ``head``.
        private: None where there is no repository yet.
        head: commit whose files these are; None where there is no repository yet.
        new_branch: whether there is a repository without this branch.
        files: what ``head`` has, by path.
    """

    name: str
    url: str
    branch: str
    private: bool | None = None
    head: str | None = None
    new_branch: bool = False
    files: Mapping[str, RemoteFile] | None = None


@dataclass(frozen=True)
class Commit:
    """A commit of a repository and its page."""

    oid: str
    url: str


def look(name: str, branch: str = MAIN, token: str | None = None) -> Remote:
    """What a repository has on a branch; there may be none yet.

    Raises:
        HubError: no token, or one that the Hub does not accept; no Hub; no such name.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    require_token(name, token)
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise HubError(f"{name}: {branch} is a commit, which nothing can be added to; expected a branch")
    api = _api(token)
    url = without_password(f"{api.endpoint}/{name}")
    with translated(name):
        try:
            info = api.model_info(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote(name, url, branch)
        heads = {one.name: one.target_commit for one in api.list_repo_refs(name).branches}
        head = heads.get(branch, info.sha)
        listed = api.list_repo_tree(name, revision=head, recursive=True)
        files = {
            one.path: RemoteFile(one.size, one.lfs.sha256 if one.lfs else one.blob_id)
            for one in listed
            if isinstance(one, RepoFile)
        }
    return Remote(name, url, branch, info.private, head, branch not in heads, files)


def commit(
    remote: Remote,
    files: Mapping[str, Content],
    message: str,
    *,
    removed: Collection[str] = (),
    private: bool,
    token: str | None = None,
) -> Commit:
    """Put files into a repository, and take others out, with one commit; creates repository and branch where missing.

    Where there is nothing to put or take, the branch stays where it is.

    Large files are sent first, so that a push which is cut off and repeated sends only what is not there yet.

    Raises:
        HubError: the Hub refuses, somebody else committed since ``remote`` was looked at, or a file has changed since
            it was checked; nothing was committed.
    """
    from huggingface_hub import CommitOperationDelete

    api = _api(token)
    with translated(remote.name):
        additions, head = _additions(files), remote.head
        if head is None:
            api.create_repo(remote.name, private=private)
            head = api.model_info(remote.name).sha
        if remote.branch != MAIN and (remote.head is None or remote.new_branch):
            api.create_branch(remote.name, branch=remote.branch, revision=head)
        if not files and not removed:
            return Commit(str(head), f"{remote.url}/commit/{head}")
        _send_large(api, remote, additions, files)
        deletions = [CommitOperationDelete(path) for path in sorted(removed)]
        made = api.create_commit(
            remote.name,
            [*additions, *deletions],
            commit_message=message,
            revision=remote.branch,
            parent_commit=head,
        )
    return Commit(made.oid, without_password(made.commit_url))


def _additions(files: Mapping[str, Content]) -> "list[CommitOperationAdd]":
    """What the commit is to add: of small files the checked bytes themselves, of large ones the path."""
    from huggingface_hub import CommitOperationAdd

    held = {
        name: one.to_bytes() if isinstance(one, Stored) and size_of(one) <= _SMALL else one
        for name, one in sorted(files.items())
    }
    for one in held.values():
        if isinstance(one, Stored):
            one.require(atomic.sha256_file(one.path))
    return [CommitOperationAdd(name, one.path if isinstance(one, Stored) else one) for name, one in held.items()]


def _send_large(
    api: "HfApi", remote: Remote, additions: "Sequence[CommitOperationAdd]", files: Mapping[str, Content]
) -> None:
    """Send what is read from the disk, and refuse to go on if the bytes that were read are not the checked ones."""
    large = [one for one in additions if not isinstance(one.path_or_fileobj, bytes)]
    if not large:
        return
    api.preupload_lfs_files(remote.name, large, revision=remote.branch, free_memory=False)
    for one in large:
        stored = files[one.path_in_repo]
        assert isinstance(stored, Stored)
        stored.require(one.upload_info.sha256.hex())


def visibility(remote: Remote, wanted: bool | None) -> bool:  # noqa: FBT001 - True, False, or as it is
    """Whether a repository is private, or is to be made so; ``wanted`` None: as it is, and a new one private.

    Raises:
        HubError: it is not as it is wanted.
    """
    if remote.private is None:
        return True if wanted is None else wanted
    if wanted is not None and wanted != remote.private:
        now, flag = ("private", "--private") if remote.private else ("public", "--public")
        other = "private" if wanted else "public"
        raise HubError(
            f"{remote.name}: is {now}; expected {other}; push with {flag}, or make it {other} at {remote.url}/settings"
        )
    return remote.private


def download(name: str, file: str, revision: str | None = None, token: str | None = None) -> Path:
    """One file of a repository, through the local cache.

    Raises:
        HubError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    with translated(name):
        return Path(hf_hub_download(name, file, revision=revision, token=token))


def require_token(name: str, token: str | None = None) -> None:
    """Refuse to go on as nobody.

    Raises:
        HubError: no token was given, and none is in HF_TOKEN or stored by a login.
    """
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise HubError(f"{name}: {_NO_TOKEN}")


@contextmanager
def translated(subject: str) -> Iterator[None]:
    """Turn every error of huggingface_hub into one line about ``subject``.

    Raises:
        HubError: what went wrong.
    """
    from huggingface_hub.errors import EntryNotFoundError

    # What it raises besides errors of HTTP: names that are none, files that are not there, an upload's failed thread.
    try:
        yield
    except (http_error(), EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise HubError(without_password(f"{subject}: {_reason(error)}")) from error


def without_password(text: str) -> str:
    """A text whose addresses name no user and no password: HF_ENDPOINT may have them."""
    return re.sub(r"(\w://)[^\s/?#]*@", r"\1", text)


_NO_TOKEN = "no token was found; expected one: run `hf auth login`, or set HF_TOKEN"
_REFUSALS = {
    401: "the token is not accepted ({}); expected a valid one: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not do this ({}); expected one with write access, and room in the account",
    404: "no such repository, or a private one that the token may not read ({}); check the name and the token",
    409: "somebody else changed it in the meantime ({}); nothing was committed; push again",
    412: "somebody else committed in the meantime ({}); nothing was committed; look at it and push again",
    429: "too many requests ({}); wait some minutes and repeat",
}


def http_error() -> type[Exception]:
    """The base of all errors of huggingface_hub's HTTP client, whichever it is: requests, httpx or httpx2."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # what its own errors derive from

    found: type[Exception] = HTTPError
    return found


def _reason(error: BaseException) -> str:
    """What went wrong and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError | FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # what failed in a thread that uploads, or why a download looked into the cache only
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, errors.HFValidationError):
        return f"is no name of a repository ({first_line(error)}); expected USER/NAME"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; expected a cache (HF_HOME) that can be written, with room"
    if constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return "HF_HUB_OFFLINE is set, and the local cache does not have it; unset HF_HUB_OFFLINE"
    return _failure(error)


def _failure(error: BaseException) -> str:
    """What an error without an answer of the Hub means."""
    from huggingface_hub import constants

    if answer := re.search(r"\((\d{3}) .*/xet-\w+-token/", str(error)):  # Xet's client speaks HTTP by itself
        return _meaning(int(answer[1]), first_line(error), "no Xet storage there ({}); set HF_HUB_DISABLE_XET=1")
    if isinstance(error, http_error() | OSError):
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)}); check the network, and HF_ENDPOINT"
    return " ".join(str(error).split())


def _refusal(error: "HfHubHTTPError") -> str:
    """What an answer of the Hub other than success means."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    said = f"the Hub says {status}" + (
        f": {first_line(Exception(error.server_message))}" if error.server_message else ""
    )
    if isinstance(error, RevisionNotFoundError):
        return f"has no such revision ({said}); expected a branch, tag or commit of it"
    if isinstance(error, EntryNotFoundError):
        return f"has no such file ({said})"
    if status == 401 and "authorization" not in error.response.request.headers:
        return _NO_TOKEN
    return _meaning(status, said, _REFUSALS[404])


def _meaning(status: int, said: str, missing: str) -> str:
    """What a status other than success means; ``missing`` is the meaning of 404."""
    if status >= 500:
        return f"the Hub has a problem ({said}); repeat later: what was sent is not sent again"
    return {**_REFUSALS, 404: missing}.get(status, "the Hub refuses ({})").format(said)


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="adaras-export")


def _git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def fetch(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the given one, or the Hub's snapshot in the local cache.

    Raises:
        HubError: there is neither.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if not is_hub_id(str(path_or_id)):
        raise HubError(f"{path_or_id}: no such folder; expected that of a model, or a name of the Hub: USER/NAME")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
    with translated(f"{path_or_id}: neither a folder nor a model that the Hub gave"):
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))


def cached(hub_id: str, revision: str) -> Path | None:
    """The snapshot of a commit in the Hub's cache; None where it is not there. Fetches nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not is_hub_id(hub_id) or not is_commit(revision):  # a branch is another commit tomorrow
        return None
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_commit(revision: str) -> bool:
    """Whether a revision is one for ever."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def is_hub_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
