"""A folder that gets its final name when it is complete, or never. Knows nothing of what is in it.

It grows in a workshop, a hidden folder beside the destination, whose lock is held by the process that works there. The
lock of a process that died is free, so the next one to come takes the workshop over and clears it.
"""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaras_export.errors import AdarasError, ExportError

_SUFFIX, _LOCK, _STAGE = ".adaras-export", "lock", "stage-"
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_LITTLE = 1 << 16  # bytes: a disk with less is full for whatever could not be written to it


@contextmanager
def staged(out: Path, base: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the context ends well, and vanishes otherwise.

    Files in it get the same permissions whatever the umask is, and are on the disk before they get their name, except
    those that share their bytes with another folder by a hard link.

    Args:
        out: where nothing is yet.
        base: a folder that ``out`` may not lie in.

    Raises:
        ExportError: ``out`` is there, is being written by another process, or cannot be written.
    """
    _refuse(out, base)
    with _workshop(out) as workshop:
        stage = workshop
        try:
            stage = Path(tempfile.mkdtemp(dir=workshop, prefix=_STAGE))
            yield stage
            _settle(stage)
            stage.rename(out)
        except Exception as error:
            if reason := _reason(error, stage):
                raise ExportError(f"{out}: cannot be written ({reason}); nothing was left behind") from error
            raise
    _sync_folder(out.parent)


def _refuse(out: Path, base: Path) -> None:
    if not out.name.isprintable():
        raise ExportError(f"{str(out)!r}: a line end or the like in its name; expected one that a card can print")
    if out.parent.resolve().is_relative_to(base.resolve()):
        raise ExportError(f"{out}: is in the folder of the base model, which stays as it is; choose another place")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):  # a link to nothing is something, too
        raise ExportError(f"{out}: exists already; choose another folder, or remove it first")


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """The folder beside ``out`` in which only this process works; it is gone in the end."""
    workshop = out.parent / f".{out.name}{_SUFFIX}"
    try:
        lock = _claim(workshop)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({_words(error)})") from error
    if lock is None:
        raise ExportError(f"{out}: another export is writing it now; wait for its end, or choose another folder")
    try:
        _refuse_existing(out)  # not earlier: only who holds the lock can bring it into being, and tidies up
        _clear(workshop)
        yield workshop
    finally:
        try:
            _clear(workshop)
            _leave(workshop)
        except OSError as error:
            raise ExportError(f"{workshop}: cannot be removed ({_words(error)}); remove it") from error
        finally:
            os.close(lock)


def _claim(workshop: Path) -> int | None:
    """A descriptor that holds the lock of the workshop; none where somebody else does."""
    while True:
        workshop.mkdir(mode=0o700, parents=True, exist_ok=True)
        if workshop.is_symlink():  # or what lies where it points to would be cleared
            raise OSError(errno.ELOOP, f"{workshop} is a symbolic link")
        try:
            lock = os.open(workshop / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who held it has just left, and the workshop went with it
            continue
        except OSError:
            _remove_empty(workshop)
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        if _is_there(lock, workshop / _LOCK):
            return lock
        os.close(lock)  # the lock of a file that its last holder has removed keeps nobody out


def _is_there(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _clear(workshop: Path) -> None:
    """Remove the stages: that of a dead process, or the one that did not become an artifact."""
    for stage in workshop.glob(f"{_STAGE}*"):
        shutil.rmtree(stage)


def _leave(workshop: Path) -> None:
    """Remove the workshop while the lock is still held."""
    (workshop / _LOCK).unlink()
    _remove_empty(workshop)


def _remove_empty(workshop: Path) -> None:
    try:
        workshop.rmdir()
    except OSError as error:
        if error.errno not in (
            errno.ENOTEMPTY,
            errno.EEXIST,
            errno.ENOENT,
        ):  # another one has moved in, or left, meanwhile
            raise


def _settle(stage: Path) -> None:
    """Give all that is in a stage its permissions, and wait until it is on the disk."""
    for path in (*stage.rglob("*"), stage):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            path.chmod(0o755)
            _sync_folder(path)
        elif status.st_nlink == 1:  # else it is a file of the base as well, which stays as it is
            path.chmod(0o644)
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError:  # a file system that has no such thing, as of some networks, or a folder that may not be read
        return


def _reason(error: BaseException, stage: Path) -> str | None:
    """Why something could not be written, if that is what an error says, in whatever library's words."""
    chain = list(_chain(error))
    for code, words in _FULL.items():
        if any(_says(one, code) for one in chain):
            return f"{words}: {_room(stage)}"
    # NumPy says how many of how many elements it wrote, PyTorch that its writer failed, and neither says why.
    if not isinstance(error, AdarasError) and shutil.disk_usage(_fullest(stage)).free < _LITTLE:
        return f"{_FULL[errno.ENOSPC]}: {_room(stage)}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # NumPy again, and whoever called it has removed its file meanwhile
        return f"{error}; is the disk full? {_room(stage)}"
    return _words(error)


def _words(error: OSError) -> str:
    named = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror or error}{named}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says(error: BaseException, code: int) -> bool:
    return (isinstance(error, OSError) and error.errno == code) or os.strerror(code) in str(error)


def _room(stage: Path) -> str:
    full = _fullest(stage)
    usage = shutil.disk_usage(full)
    sizes = (path.lstat() for path in stage.rglob("*"))
    written = sum(status.st_size for status in sizes if status.st_nlink == 1)
    return (
        f"{_size(usage.free)} of {_size(usage.total)} are free in {_mount(full)}, "
        f"{_size(written)} of the artifact were written"
    )


def _fullest(stage: Path) -> Path:
    """Of the disks that an export writes to, that of the artifact and that of temporary files, the one with less."""
    return min((stage, Path(tempfile.gettempdir())), key=lambda place: shutil.disk_usage(place).free)


def _mount(path: Path) -> Path:
    return next(place for place in (path.resolve(), *path.resolve().parents) if place.is_mount())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
