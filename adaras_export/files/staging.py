"""A folder that gets its name when it is complete, or never, and one some of whose files are replaced. Knows no format.

It grows in a workshop, a hidden folder beside the destination, whose lock is held by the process that works there. The
lock of a process that died is free, so the next one to come takes the workshop over and clears it.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaras_export.errors import AdarasError, ExportError
from adaras_export.files.atomic import link_or_copy
from adaras_export.files.locks import locked

_SUFFIX, _LOCK, _STAGE, _DONE = ".adaras-export", "lock", "stage-", "done"
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
        _refuse_existing(out)  # not earlier: only who holds the lock can bring it into being, and tidies up
        _clear(workshop / _DONE)
        with _stage(out, workshop) as stage:
            yield stage
            _settle(stage)
            stage.rename(out)
    _sync_folder(out.parent)


@contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """A copy of ``folder`` whose files take the place of its own when the context ends well; for a few of many files.

    The copy shares its bytes with the folder: files are to be replaced in it, never written into. A run that dies while
    they take their places is finished by the next one.

    Raises:
        ExportError: another process writes the folder, or it cannot be written.
    """
    folder = folder.resolve()
    with _workshop(folder) as workshop:
        _finish(workshop / _DONE, folder)
        with _stage(folder, workshop) as stage:
            shutil.copytree(folder, stage, copy_function=_link, dirs_exist_ok=True)
            yield stage
            _settle(stage)
            stage.rename(workshop / _DONE)
        _sync_folder(workshop)
        _finish(workshop / _DONE, folder)
    _sync_folder(folder)


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
        _clear(*workshop.glob(f"{_STAGE}*"))  # of a dead process
        yield workshop
    finally:
        try:
            _clear(*workshop.glob(f"{_STAGE}*"))
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
            return locked(workshop / _LOCK)
        except FileNotFoundError:  # who held it has just left, and the workshop went with it
            continue
        except OSError:
            _remove_empty(workshop)
            raise


def _clear(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


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


@contextmanager
def _stage(out: Path, workshop: Path) -> Iterator[Path]:
    """A folder in the workshop; what goes wrong while it is written is told of ``out``."""
    try:
        yield Path(tempfile.mkdtemp(dir=workshop, prefix=_STAGE))
    except Exception as error:
        if reason := _reason(error, workshop):
            raise ExportError(f"{out}: cannot be written ({reason}); nothing was left behind") from error
        raise


def _finish(done: Path, folder: Path) -> None:
    """Move the files of a revision to their places."""
    if not done.exists():
        return
    try:
        for path in sorted(done.rglob("*")):
            place = folder / path.relative_to(done)
            if path.is_file() and not (place.exists() and place.samefile(path)):
                place.parent.mkdir(exist_ok=True)
                path.replace(place)
        shutil.rmtree(done)
    except OSError as error:
        raise ExportError(f"{folder}: not all files could be replaced ({_words(error)}); do the same again") from error


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


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


def _reason(error: BaseException, workshop: Path) -> str | None:
    """Why something could not be written, if that is what an error says, in whatever library's words."""
    chain = list(_chain(error))
    for code, words in _FULL.items():
        if any(_says(one, code) for one in chain):
            return f"{words}: {_room(workshop)}"
    # NumPy says how many of how many elements it wrote, PyTorch that its writer failed, and neither says why.
    if not isinstance(error, AdarasError) and shutil.disk_usage(_fullest(workshop)).free < _LITTLE:
        return f"{_FULL[errno.ENOSPC]}: {_room(workshop)}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # NumPy again, and whoever called it has removed its file meanwhile
        return f"{error}; is the disk full? {_room(workshop)}"
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


def _room(workshop: Path) -> str:
    full = _fullest(workshop)
    usage = shutil.disk_usage(full)
    sizes = (path.lstat() for path in workshop.rglob("*"))
    written = sum(status.st_size for status in sizes if status.st_nlink == 1)
    return (
        f"{_size(usage.free)} of {_size(usage.total)} are free in {_mount(full)}, "
        f"{_size(written)} of the artifact were written"
    )


def _fullest(workshop: Path) -> Path:
    """Of the disks that an export writes to, that of the artifact and that of temporary files, the one with less."""
    return min((workshop, Path(tempfile.gettempdir())), key=lambda place: shutil.disk_usage(place).free)


def _mount(path: Path) -> Path:
    return next(place for place in (path.resolve(), *path.resolve().parents) if place.is_mount())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
