"""Lists, commits and downloads files of Hub repositories, and turns the Hub's errors into one line.

The only module that handles huggingface_hub's errors. Token, cache, endpoint and offline mode come from that library's
settings (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
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
    """A file on disk with the SHA-256 that it had when it was checked; changed files are not sent."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Stored":
        """The file as it is now."""
        return cls(path, atomic.sha256_file(path))

    def to_bytes(self) -> bytes:
        """The bytes that were checked.

        Raises:
            HubError: the file has changed since.
        """
        content = self.path.read_bytes()
        self.require(atomic.sha256(content))
        return content

    def require(self, sha256: str) -> None:
        """Refuse a SHA-256 that differs from the checked one.

        Raises:
            HubError: the two differ.
        """
        if sha256 != self.sha256:
            raise HubError(
                f"{self.path}: has changed since it was checked; expected SHA-256 {self.sha256}; nothing was "
                "committed; verify the folder and push again"
            )


Content = Stored | bytes
"""A file to send: a checked file on disk, or its bytes."""

_SMALL = 1 << 25
"""Files up to this size are held in memory while they are sent."""


def size_of(content: Content) -> int:
    """The size of a file to send, in bytes."""
    return len(content) if isinstance(content, bytes) else content.path.stat().st_size


def sha256_of(content: Content) -> str:
    """The SHA-256 of a file to send, hexadecimal."""
    return atomic.sha256(content) if isinstance(content, bytes) else content.sha256


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repository: its size, and its digest (SHA-256 in large-file storage, else git's SHA-1)."""

    size: int
    digest: str

    def holds(self, content: Content) -> bool:
        """Whether a local file has the same content."""
        if size_of(content) != self.size:
            return False
        if len(self.digest) == 40:
            return self.digest == _git_name(content if isinstance(content, bytes) else content.to_bytes())
        return self.digest == sha256_of(content)


@dataclass(frozen=True)
class Remote:
    """The state of a branch when `look` read it.

    Attributes:
        name: USER/NAME.
        url: the page of the repository.
        branch: name of the branch; a missing branch will start at ``head``.
        private: whether the repository is private; None where it does not exist yet.
        head: commit that has ``files``; None where the repository does not exist yet.
        new_branch: whether the repository exists, but lacks the branch.
        files: the files of ``head``, by path.
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
    """The state of a branch; repository and branch may be missing.

    Raises:
        HubError: there is no valid token, the Hub cannot be reached, or the name is invalid.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    require_token(name, token)
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise HubError(f"{name}: {branch} is a commit, which cannot get new commits; expected a branch")
    api = _api(token)
    url = without_password(f"{api.endpoint}/{name}")
    with translated(name):
        try:
            info = api.model_info(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote(name, url, branch)
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(name).branches}
        head = heads.get(branch, info.sha)
        listed = api.list_repo_tree(name, revision=head, recursive=True)
        files = {
            item.path: RemoteFile(item.size, item.lfs.sha256 if item.lfs else item.blob_id)
            for item in listed
            if isinstance(item, RepoFile)
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
    """Add and remove files in one commit; creates a missing repository or branch.

    Without files to add or remove, no commit is made. Large files are sent first, so that a repeated push sends only
    the missing ones.

    Raises:
        HubError: the Hub refuses, the branch has a newer commit than ``remote``, or a file has changed since it was
            checked; nothing was committed.
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
        created = api.create_commit(
            remote.name,
            [*additions, *deletions],
            commit_message=message,
            revision=remote.branch,
            parent_commit=head,
        )
    return Commit(created.oid, without_password(created.commit_url))


def _additions(files: Mapping[str, Content]) -> "list[CommitOperationAdd]":
    """The files that the commit adds: small ones as checked bytes, large ones by path."""
    from huggingface_hub import CommitOperationAdd

    held = {
        name: file.to_bytes() if isinstance(file, Stored) and size_of(file) <= _SMALL else file
        for name, file in sorted(files.items())
    }
    for file in held.values():
        if isinstance(file, Stored):
            file.require(atomic.sha256_file(file.path))
    return [CommitOperationAdd(name, file.path if isinstance(file, Stored) else file) for name, file in held.items()]


def _send_large(
    api: "HfApi", remote: Remote, additions: "Sequence[CommitOperationAdd]", files: Mapping[str, Content]
) -> None:
    """Send the large files, and stop if the sent bytes are not the checked ones."""
    large = [addition for addition in additions if not isinstance(addition.path_or_fileobj, bytes)]
    if not large:
        return
    api.preupload_lfs_files(remote.name, large, revision=remote.branch, free_memory=False)
    for addition in large:
        stored = files[addition.path_in_repo]
        assert isinstance(stored, Stored)
        stored.require(addition.upload_info.sha256.hex())


def visibility(remote: Remote, requested: bool | None) -> bool:  # noqa: FBT001 - three values
    """Whether the repository is or will be private; None keeps its visibility and makes a new one private.

    Raises:
        HubError: the repository has another visibility than ``requested``.
    """
    if remote.private is None:
        return True if requested is None else requested
    if requested is not None and requested != remote.private:
        now, flag = ("private", "--private") if remote.private else ("public", "--public")
        other = "private" if requested else "public"
        raise HubError(
            f"{remote.name}: is {now}; expected {other}; push with {flag}, or make it {other} at {remote.url}/settings"
        )
    return remote.private


def download(name: str, file: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download a file of a repository into the local cache.

    Raises:
        HubError: the file cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    with translated(name):
        return Path(hf_hub_download(name, file, revision=revision, token=token))


def require_token(name: str, token: str | None = None) -> None:
    """Refuse to continue without a token.

    Raises:
        HubError: there is no token: neither ``token`` nor HF_TOKEN nor a stored login.
    """
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise HubError(f"{name}: {_NO_TOKEN}")


@contextmanager
def translated(subject: str) -> Iterator[None]:
    """Turn every error of huggingface_hub into one line about ``subject``.

    Raises:
        HubError: huggingface_hub raised an error.
    """
    from huggingface_hub.errors import EntryNotFoundError

    # Besides HTTP errors it raises these for invalid names, missing files and a failed upload thread.
    try:
        yield
    except (http_error(), EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise HubError(without_password(f"{subject}: {_reason(error)}")) from error


def without_password(text: str) -> str:
    """Remove user names and passwords from URLs in a text; HF_ENDPOINT may contain them."""
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
    """The base class of HTTP errors in the client that huggingface_hub uses: requests, httpx or httpx2."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of its own errors

    base: type[Exception] = HTTPError
    return base


def _reason(error: BaseException) -> str:
    """What went wrong, and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError | FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the error in the upload thread, or the reason why a download used only the cache
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, errors.HFValidationError):
        return f"is not a repository name ({first_line(error)}); expected USER/NAME"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; expected a cache (HF_HOME) that can be written, with room"
    if constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return "HF_HUB_OFFLINE is set, and the local cache does not have it; unset HF_HUB_OFFLINE"
    return _failure(error)


def _failure(error: BaseException) -> str:
    """The meaning of an error without an HTTP response from the Hub."""
    from huggingface_hub import constants

    if answer := re.search(r"\((\d{3}) .*/xet-\w+-token/", str(error)):  # Xet's client speaks HTTP by itself
        return _meaning(int(answer[1]), first_line(error), "no Xet storage there ({}); set HF_HUB_DISABLE_XET=1")
    if isinstance(error, http_error() | OSError):
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)}); check the network, and HF_ENDPOINT"
    return " ".join(str(error).split())


def _refusal(error: "HfHubHTTPError") -> str:
    """The meaning of an HTTP error response from the Hub."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    message = f": {first_line(Exception(error.server_message))}" if error.server_message else ""
    reply = f"the Hub says {status}{message}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no such revision ({reply}); expected a branch, tag or commit of it"
    if isinstance(error, EntryNotFoundError):
        return f"has no such file ({reply})"
    if status == 401 and "authorization" not in error.response.request.headers:
        return _NO_TOKEN
    return _meaning(status, reply, _REFUSALS[404])


def _meaning(status: int, reply: str, missing: str) -> str:
    """The meaning of an HTTP error status; ``missing`` is the meaning of 404."""
    if status >= 500:
        return f"the Hub has a problem ({reply}); repeat later: files that were sent are not sent again"
    return {**_REFUSALS, 404: missing}.get(status, "the Hub refuses ({})").format(reply)


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="adaras-export")


def _git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def fetch(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the given one, or a snapshot that is downloaded from the Hub into the cache.

    Raises:
        HubError: there is no such folder and no such repository, or the download failed.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if not is_hub_id(str(path_or_id)):
        raise HubError(f"{path_or_id}: no such folder; expected a model folder, or a repository of the Hub: USER/NAME")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
    with translated(f"{path_or_id}: neither a folder nor a model that the Hub gave"):
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))


def cached(hub_id: str, revision: str) -> Path | None:
    """The snapshot of a commit in the local cache, or None. Downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not is_hub_id(hub_id) or not is_commit(revision):  # a branch moves
        return None
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text is a valid repository name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
