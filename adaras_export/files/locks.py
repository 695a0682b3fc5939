"""Lock files: one process at a time holds a lock. Uses `flock`."""

import fcntl
import os
from pathlib import Path


def locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file; None where another process holds it. Creates a missing file.

    The holder may remove the file. Closing the descriptor releases the lock. The caller handles an OSError.
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
        os.close(lock)  # the last holder removed this file, so a new file can be locked beside ours


def _is_there(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
