"""Remove a process's rights before it runs untrusted code; standard library and libseccomp only.

The filter lists the allowed system calls by name. Any other call, including one that a later kernel adds, fails with
ENOSYS, on which libc falls back to older calls. libseccomp knows each machine's numbers.
"""

import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import termios
from typing import Any

# Computing, reading files, waiting, using open descriptors. None of these calls reaches another process.
_ALLOWED = (
    "read readv pread64 preadv write writev close lseek dup dup2 dup3 pipe pipe2 "
    "stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 "
    "readlink readlinkat getcwd getdents64 "
    "mmap munmap mremap mprotect madvise brk "
    "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall alarm setitimer getitimer "
    "futex set_robust_list rseq sched_yield sched_getaffinity getcpu exit exit_group "
    "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait recvfrom "
    "gettid getpid getppid getuid geteuid getgid getegid getrlimit getrusage uname sysinfo "
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrandom "
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x10000
_INT, _LONG = (1 << 32) - 1, (1 << 64) - 1
# Calls that depend on their arguments: for each argument's position, a mask and the required value under it.
_DEPENDS: list[tuple[str, dict[int, tuple[int, int]]]] = [
    ("open", {1: (_WRITING, 0)}),
    ("openat", {2: (_WRITING, 0)}),
    ("clone", {0: (_CLONE_THREAD, _CLONE_THREAD)}),
    ("prlimit64", {0: (_INT, 0)}),  # the process's own limits, which it cannot raise
    # asyncio wakes itself over a pair of sockets. A datagram socket, or one with an address, would lead outside.
    ("socketpair", {0: (_INT, socket.AF_UNIX), 1: (0xF, socket.SOCK_STREAM)}),
    ("sendto", {4: (_LONG, 0)}),
    # Not allowed: the receiver of a file's signals, leases, locks, change notifications, a file's attributes.
    *(("fcntl", {1: (_INT, each)}) for each in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD)),
    ("fcntl", {1: (_INT, fcntl.F_GETFL)}),
    ("fcntl", {1: (_INT, fcntl.F_SETFL), 2: (os.O_ASYNC, 0)}),  # type: ignore[attr-defined, unused-ignore]
    *(("ioctl", {1: (_INT, each)}) for each in (termios.FIONBIO, termios.FIONREAD, termios.FIOCLEX, termios.FIONCLEX)),
    *(("ioctl", {1: (_INT, each)}) for each in (termios.TCGETS, termios.TIOCGWINSZ)),
]
_KILL, _ASK, _ALLOW, _ABSENT = 0x80000000, 0x7FC00000, 0x7FFF0000, 0x00050000 | 38
_BAD_MACHINE, _MASKED_EQUAL = 2, 7
_NO_SUCH_CALL = -1


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


class _Filter:
    """A filter of libseccomp. A call in another machine's form (32 bits, x32) ends the process."""

    def __init__(self, otherwise: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(otherwise)))
        self._done(self._library.seccomp_attr_set(self._context, _BAD_MACHINE, ctypes.c_uint32(_KILL)))

    def add(self, action: int, name: str, conditions: dict[int, tuple[int, int]]) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == _NO_SUCH_CALL:
            return  # an older libseccomp does not know the call, so the filter does not allow it
        comparisons = [_Comparison(place, _MASKED_EQUAL, *required) for place, required in conditions.items()]
        array = (_Comparison * len(comparisons))(*comparisons)
        add = self._library.seccomp_rule_add_array
        self._done(add(self._context, ctypes.c_uint32(action), number, ctypes.c_uint(len(comparisons)), array))

    def load(self) -> None:
        self._done(self._library.seccomp_load(self._context))

    def listener(self) -> int:
        """The file descriptor on which the kernel asks about calls."""
        descriptor: int = self._library.seccomp_notify_fd(self._context)
        self._done(min(descriptor, 0))
        return descriptor

    def _done(self, status: int) -> None:
        if status:
            raise OSError(-status, os.strerror(-status))


def confine(limits: dict[str, Any], parent: int, supervisor: socket.socket) -> None:
    """Set limits, drop capabilities, load the filter: the process can only compute and read, and dies with its parent.

    The supervisor gets the file descriptor on which the kernel asks whether one more thread is allowed.

    Raises:
        OSError: the kernel refuses a step, or libseccomp is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _control(libc, 1, signal.SIGKILL)  # sent when the parent ends
    if os.getppid() != parent:
        os._exit(1)  # the parent has already ended
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (most, most))
    asking = _Filter(_ALLOW)
    asking.add(_ASK, "clone", {})
    asking.load()
    socket.send_fds(supervisor, [b"."], [asking.listener()])
    os.close(asking.listener())
    _drop_capabilities(libc)
    _separate(libc)
    allowing = _Filter(_ABSENT)
    for name in _ALLOWED.split():
        allowing.add(_ALLOW, name, {})
    for name, conditions in _DEPENDS:
        allowing.add(_ALLOW, name, conditions)
    allowing.load()


def hide() -> None:
    """Close the memory of this process and of its forks to other processes."""
    _control(ctypes.CDLL(None, use_errno=True), 4, 0)


def _separate(libc: ctypes.CDLL) -> None:
    """Enter a Landlock domain, if the kernel has Landlock: no file changes, no access to other processes' memory.

    Without it, a plain user's processes can read each other's memory, unless Yama forbids it.
    """
    changes = ctypes.create_string_buffer(struct.pack("=Q", 0x1FF3), 8)  # all rights of version 1 except reading
    domain = libc.syscall(ctypes.c_long(444), changes, ctypes.c_size_t(8), ctypes.c_uint(0))
    if domain < 0:
        return  # the kernel is older than 5.13 or forbids Landlock
    if libc.syscall(ctypes.c_long(446), ctypes.c_int(domain), ctypes.c_uint(0)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(domain)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _control(libc: ctypes.CDLL, option: int, value: int) -> None:
    no = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), no, no, no):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
