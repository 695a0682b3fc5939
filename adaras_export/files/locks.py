"""A file that one process at a time works on. Knows nothing of what is in it; needs `flock`."""

import fcntl
import os
from pathlib import Path


def locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, made if there is none; None where another process holds it.

    Whoever holds it may remove the file. Closing the descriptor frees the lock. An OSError is the caller's to word.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        if _is_there(lock, path):
            return lock
        os.close(lock)  # the lock of a file that its last holder has removed keeps nobody out


def _is_there(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
