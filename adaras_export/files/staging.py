"""Create a folder, or replace some of its files, all at once or not at all.

The new files are written in a hidden folder beside the destination, the workshop. The process that works there holds
its lock. When a process dies, its lock is released; the next process takes the workshop over and clears it.
"""

import errno
import json
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
_REMOVED = ".removed.json"  # in a finished revision: the files that it removes
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_LITTLE = 1 << 16  # bytes; a disk with less free space counts as full


@contextmanager
def staged(out: Path, base: Path) -> Iterator[Path]:
    """A folder that is renamed to ``out`` when the context succeeds, and removed when it fails.

    Its files get fixed permissions, independent of the umask, and are synced to disk before the rename. Hard links are
    left as they are.

    Args:
        out: the new folder.
        base: the folder of the base model; ``out`` may not be inside it.

    Raises:
        ExportError: ``out`` exists, another process writes it, or it cannot be written.
    """
    _refuse(out, base)
    with _workshop(out) as workshop:
        _refuse_existing(out)  # under the lock: no other process can create it from here on
        _clear(workshop / _DONE)
        with _stage(out, workshop) as stage:
            yield stage
            _settle(stage)
            stage.rename(out)
    _sync_folder(out.parent)


@contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """A copy of ``folder``; when the context succeeds, its changed files replace those of the folder.

    Files that were removed from the copy are removed from the folder. The copy consists of hard links: replace files in
    it, never write into them. If a run dies while files are being replaced, the next run finishes the job.

    Raises:
        ExportError: another process writes the folder, or it cannot be written.
    """
    folder = folder.resolve()
    with _workshop(folder) as workshop:
        _finish(workshop / _DONE, folder)
        with _stage(folder, workshop) as stage:
            shutil.copytree(folder, stage, copy_function=_link, dirs_exist_ok=True)
            before = _names(stage)
            yield stage
            (stage / _REMOVED).write_text(json.dumps(sorted(before - _names(stage))))
            _settle(stage)
            stage.rename(workshop / _DONE)
        _sync_folder(workshop)
        _finish(workshop / _DONE, folder)
    _sync_folder(folder)


def _refuse(out: Path, base: Path) -> None:
    if not out.name.isprintable():
        raise ExportError(f"{str(out)!r}: has an unprintable character in its name; expected a printable name")
    if out.parent.resolve().is_relative_to(base.resolve()):
        raise ExportError(f"{out}: is in the folder of the base model; choose another place")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):  # lexists: also a broken link
        raise ExportError(f"{out}: exists already; choose another folder, or remove it first")


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """The hidden folder beside ``out``, locked for this process; removed in the end."""
    workshop = out.parent / f".{out.name}{_SUFFIX}"
    try:
        lock = _claim(workshop)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({_words(error)})") from error
    if lock is None:
        raise ExportError(f"{out}: another export is writing it now; wait until it ends, or choose another folder")
    try:
        _clear(*workshop.glob(f"{_STAGE}*"))  # left by a process that died
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
    """A descriptor that holds the lock of the workshop; None where another process holds it."""
    while True:
        workshop.mkdir(mode=0o700, parents=True, exist_ok=True)
        if workshop.is_symlink():  # clearing it would delete files in the folder that it points to
            raise OSError(errno.ELOOP, f"{workshop} is a symbolic link")
        try:
            return locked(workshop / _LOCK)
        except FileNotFoundError:  # the previous holder has just removed the workshop
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
        # Meanwhile another process can have claimed or removed the workshop.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


@contextmanager
def _stage(out: Path, workshop: Path) -> Iterator[Path]:
    """A temporary folder in the workshop; write errors become an `ExportError` about ``out``."""
    try:
        yield Path(tempfile.mkdtemp(dir=workshop, prefix=_STAGE))
    except Exception as error:
        if reason := _reason(error, workshop):
            raise ExportError(f"{out}: cannot be written ({reason}); nothing was left behind") from error
        raise


def _finish(done: Path, folder: Path) -> None:
    """Move the files of a finished revision into the folder."""
    if not done.exists():
        return
    try:
        removed = json.loads((done / _REMOVED).read_text())
        for path in sorted({*done.rglob("*")} - {done / _REMOVED}):
            place = folder / path.relative_to(done)
            if path.is_file() and not (place.exists() and place.samefile(path)):
                place.parent.mkdir(exist_ok=True)
                path.replace(place)
        for name in removed:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(done.rename(done.parent / f"{_STAGE}{_DONE}"))  # under a name that the next run clears
    except OSError as error:
        raise ExportError(f"{folder}: not all files could be replaced ({_words(error)}); repeat the command") from error


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _settle(stage: Path) -> None:
    """Set the permissions of all files and folders of a stage, and sync them to disk."""
    for path in (*stage.rglob("*"), stage):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            path.chmod(0o755)
            _sync_folder(path)
        elif status.st_nlink == 1:  # more links: a file that is shared with the base
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
    except OSError:  # some network file systems cannot sync a folder, and an unreadable folder cannot be opened
        return


def _reason(error: BaseException, workshop: Path) -> str | None:
    """Why a write failed; None where the error, of any library, is about something else."""
    chain = list(_chain(error))
    for code, words in _FULL.items():
        if any(_says(cause, code) for cause in chain):
            return f"{words}: {_room(workshop)}"
    # NumPy and PyTorch report a failed write without the reason.
    if not isinstance(error, AdarasError) and shutil.disk_usage(_fullest(workshop)).free < _LITTLE:
        return f"{_FULL[errno.ENOSPC]}: {_room(workshop)}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # NumPy again, after the failed file was removed
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
    """The place with less free space: the workshop, or the folder of temporary files."""
    return min((workshop, Path(tempfile.gettempdir())), key=lambda place: shutil.disk_usage(place).free)


def _mount(path: Path) -> Path:
    return next(place for place in (path.resolve(), *path.resolve().parents) if place.is_mount())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
