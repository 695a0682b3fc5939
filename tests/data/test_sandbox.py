"""What hostile code can and cannot do. Limits of the clock are generous: machines that test are busy."""

import ast
import ctypes
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

from adaras_export.data.sandbox import client
from adaras_export.data.sandbox.client import (
    Limits,
    SandboxFailure,
    agrees,
    output_of,
    passes,
    require_sandbox,
    scorer,
    solution,
)
from adaras_export.data.sandbox.inputs import Handle, decoded, encoded
from adaras_export.errors import BrokenInstallationError

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the sandbox is of Linux on x86-64"
)
SHORT = Limits(cpu_seconds=1, wall_seconds=60, memory=256 << 20, output=1 << 16)

# A system call by its number, and a word about its failure.
CALL = """
import ctypes
def call(*arguments):
    done = ctypes.CDLL(None, use_errno=True).syscall(*arguments)
    assert done >= 0, ctypes.get_errno()
    return done
"""

REFUSED = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a subprocess": "import subprocess; subprocess.run(['true'])",
    "a socket": "import socket; socket.socket()",
    "a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "a signal to its group": "import os; os.killpg(0, 9)",
    "a signal by way of a file": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "a signal by way of a pair of sockets": "import fcntl, os, socket, struct\n"
    "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', os.getppid()))",
    "a signal of its choice": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)",
    "a signal at all": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_ASYNC)",
    "a signal to itself from a timer of another": f"{CALL}call(222, 0, 0, ctypes.create_string_buffer(8))",
    "a pair of sockets that reaches others": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a message with an address": "import socket; socket.socketpair()[0].sendto(b'x', '/dev/log')",
    "a connection": "import socket; socket.socketpair()[0].connect('/dev/log')",
    "an attribute of a file": f"{CALL}call(463, -100, b'/', 0, b'user.x', ctypes.create_string_buffer(16), 16)",
    "flags of a file": "import fcntl, os; fcntl.ioctl(os.open('/', os.O_RDONLY), 0x80086601, bytearray(8))",
    "a lock on a file": "import fcntl; fcntl.flock(open('/etc/passwd'), fcntl.LOCK_SH)",
    "a lease on a file": "import fcntl; fcntl.fcntl(open('/etc/passwd'), 1024, 0)",
    "shared memory": f"{CALL}call(29, 0, 4096, 0o1600)",
    "a call of a later kernel": f"{CALL}call(462, 0, 0, 0)",
    "a call by the number of x32": f"{CALL}call(0x40000000 | 39)",
    "a call as of 32 bits": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
    "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
    "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    "to outlive its parent": f"{CALL}call(157, 1, 0, 0, 0, 0)",
    "to be read": f"{CALL}call(157, 4, 1, 0, 0, 0)",
    "another process's limits": "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "its parent's memory": "open('/proc/%d/mem' % __import__('os').getppid(), 'r+b')",
    "a new session": "import os; os.setsid()",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a file": "open('/tmp/mine', 'w')",
    "a file of before": "import os; os.remove('/etc/passwd')",
    "a folder": "import os; os.mkdir('/tmp/mine')",
    "a mode": "import os; os.chmod('/etc/passwd', 0o644)",
    "a file in memory": "import os; os.memfd_create('mine')",
    "endless memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "endless recursion": "def f(): return f()\nf()",
    "an endless loop": "while True: pass",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_sandbox_refuses(name):
    with pytest.raises(SandboxFailure, match=r"^failed$"):
        output_of(f"{REFUSED[name]}\nprint('did it')", "", SHORT)


def test_a_flood_of_output_is_cut():
    with pytest.raises(SandboxFailure, match="printed too much"):
        output_of("while True: print('x' * 9999)", "", SHORT)


def test_a_sleeper_is_killed_by_the_clock():
    begun = time.monotonic()
    with pytest.raises(SandboxFailure):
        output_of("import time; time.sleep(500)", "", Limits(wall_seconds=0.3))
    assert time.monotonic() - begun < 100


def test_a_program_reads_its_input_and_computes_with_threads_and_numpy():
    source = (
        "import threading, numpy\nt = threading.Thread(target=lambda: print(numpy.arange(int(input()))))\nt.start()"
    )
    assert output_of(source, "3\n") == "[0 1 2]\n"


def test_nothing_of_our_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    assert (
        output_of("import os; print('SECRET' in os.environ, os.environ['HOME'] == os.getcwd())", "") == "False True\n"
    )


def test_a_program_may_use_what_programs_use():
    source = """
import asyncio, resource, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
async def later(x):
    await asyncio.sleep(0.01)
    return x + 1
def deep(n): return n and 1 + deep(n - 1)
signal.alarm(60)
resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))
threading.stack_size(256 << 20)
t = threading.Thread(target=lambda: print(deep(15_000)))
t.start(); t.join()
threading.stack_size(1 << 20)
with ThreadPoolExecutor(20) as pool: print(sum(pool.map(abs, range(-50, 0))))
print(asyncio.run(later(int(sys.stdin.readline()))), len(sys.stdin.read()))
exit()
"""
    assert output_of(source, "41\n" + "x" * 200_000) == "15000\n1275\n42 200000\n"


def test_threads_are_counted():
    """Memory alone allows for a quarter of a million of them, and the kernel's own limit exempts root."""
    source = """
import threading, time
threading.stack_size(32 << 10)
begun = 0
try:
    while begun < 1000:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        begun += 1
except RuntimeError: pass
print(begun, flush=True)
__import__("os")._exit(0)
"""
    assert 100 < int(output_of(source, "", Limits(wall_seconds=25))) <= 256


def test_a_message_does_not_reach_a_queue_of_others():
    """One of System V: whoever knows its number may write to it, and messages stay."""
    libc = ctypes.CDLL(None)
    queue = libc.msgget(0, 0o1666)
    try:
        source = f"{CALL}call(69, {queue}, ctypes.create_string_buffer(b'\\1' + bytes(15)), 8, 0)"
        with pytest.raises(SandboxFailure, match=r"^failed$"):
            output_of(source, "", SHORT)
    finally:
        libc.msgctl(queue, 0, None)


def test_a_test_is_in_no_file():
    """A solution without any knowledge passed by reading what the test's process had been given."""
    search = """
import re, tempfile
from pathlib import Path
def f():
    for path in [*Path(tempfile.gettempdir()).glob("adaras-*/*"), *Path("/proc").glob("[0-9]*/cmdline")]:
        try:
            if found := re.search(rb"f\\(\\) == (\\d+)", path.read_bytes()): return int(found[1])
        except OSError: pass
"""
    with solution(search) as solved:
        assert not passes(solved, "assert f() == 785301946", "", ["f"])


def test_no_process_stays_behind():
    with solution("import os\ndef f(): return os.getpid()") as solved:
        process = number(solved.reply("f", encoded([], [])))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


JUDGE = """
import sys
from adaras_export.data.sandbox.client import solution
with solution("import os, time\\ndef f(): return os.getpid()\\ndef g(): time.sleep(100)") as solved:
    print(solved.reply("f", ["list", []]), flush=True)
    solved.reply("g", ["list", []])
"""


def test_a_sleeper_dies_with_whoever_asked():
    """A killed command, by the system's want of memory for example, must not leave a process without a clock."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{JUDGE}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as judge:
        process = number(ast.literal_eval(judge.stdout.readline().decode()))
        os.kill(process, 0)
        judge.send_signal(signal.SIGKILL)
    assert ended(process)


def test_memory_and_environment_of_a_plain_users_processes_cannot_be_read():
    """The kernel refuses root without capabilities by itself, but a plain user only by Yama or Landlock."""
    if ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 1:
        pytest.skip("this kernel has no Landlock")
    root = os.geteuid() == 0
    command = ["/usr/bin/python3" if root else sys.executable, "-B", "-c"]
    plain = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"} if root else {}
    root_folder = str(ROOT)
    found = f"import sys, os; sys.path.append({root_folder!r})\nimport adaras_export.data.sandbox.client\n"
    if subprocess.run([*command, found], capture_output=True, check=False, **plain).returncode:
        pytest.skip("a plain user cannot read this checkout, or has no Python from 3.10 on")
    script = """
from adaras_export.data.sandbox.client import SandboxFailure, output_of
assert output_of("print('ran')", "") == "ran\\n"
for process in (os.getpid(), "' + str(__import__('os').getppid()) + '"):
    for what in ("mem", "environ"):
        try: print(process, what, output_of(f"open('/proc/{process}/{what}', 'rb')", ""))
        except SandboxFailure: pass
"""
    done = subprocess.run([*command, found + script], capture_output=True, text=True, check=False, **plain)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_an_interrupted_scoring_leaves_no_reply_to_the_next_one(monkeypatch):
    """Ctrl-C in a notebook: the reply to the first completion would be the second one's verdict."""
    first = scorer("regex")
    monkeypatch.setattr(first, "_process", Interrupted(first._process))
    with pytest.raises(KeyboardInterrupt):
        first.score("a", "a")
    assert scorer("regex").score("b", "a") == (["read", None], False)


class Interrupted:
    """A process whose output is waited for in vain."""

    def __init__(self, process):
        self._process = process
        self.stdout = self

    def read(self, length):
        raise KeyboardInterrupt

    def close(self):
        self._process.stdout.close()

    def __getattr__(self, name):
        return getattr(self._process, name)


def number(reply):
    return int(reply[1][1], 16)


def ended(process):
    """Within the time of a busy machine."""
    for _ in range(500):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


JOBS = "sys.modules['adaras_export.data.sandbox.jobs']"
FORGERIES = {
    "an object that equals all": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "a number that equals all": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(7)",
    "a word of success": "import os\nos.write(1, b'[\"passed\"]\\n')\nprint('[\"passed\"]')\ndef f(x): return 0",
    "a word on every file": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[\"passed\"]\\n')\n"
    "    except OSError: pass\ndef f(x): return 0",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "exit at once": "raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "other builtins": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return 0",
    "another encoder": f"import sys\n{JOBS}.encoded = lambda *a: ['bool', True]\ndef f(x): return 0",
    "nonsense": f"import sys\n{JOBS}.encoded = lambda *a: 17\ndef f(x): return 0",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged_by(name):
    with solution(FORGERIES[name], SHORT) as solved:
        assert not passes(solved, "assert abs(f(1) - 2) < 1 and f(1) == 2", "", ["f"], SHORT)


def test_an_exception_does_not_end_a_loop_of_the_test():
    with solution("def f(x): raise StopIteration", SHORT) as solved:
        assert not passes(
            solved, "assert all(y == 2 for y in map(f, [1])), 1\nfor y in map(f, [1]): pass", "", ["f"], SHORT
        )


def test_the_right_solution_passes_and_its_exceptions_are_those_of_the_test():
    test = "assert f(1) == 2\ntry: f('a')\nexcept TypeError: pass\nelse: raise AssertionError"
    with solution("def f(x): return x + 1") as solved:
        assert passes(solved, test, "", ["f"])


def test_objects_stay_with_the_solution_and_come_back_to_it():
    with solution("class P:\n    def __init__(self, a): self.a = a\ndef f(p): return p.a") as solved:
        assert passes(solved, "assert f(P(3)) == 3", "", ["f", "P"])


def test_plain_data_travels_unchanged():
    data = [None, True, -(10**5000), 0.1, float("inf"), "ü\ud800", b"\0", 1j, (1, [2]), {3}, frozenset({4}), {(5,): 6}]
    again = decoded(encoded(data, []), Handle)
    assert again == data
    assert [type(one) for one in again] == [type(one) for one in data]


COLLIDING = """
import sys
equal_hashes = [["int", hex(n * (2**61 - 1))] for n in range(8000)]
sys.modules["adaras_export.data.sandbox.jobs"].encoded = lambda *_: ["set", equal_hashes]
def f(): return 0
"""


def test_values_that_take_long_to_compare_cost_their_own_process_its_time():
    begun = time.process_time()
    with solution(COLLIDING) as solved:
        assert not agrees(solved, "f", [(["list", []], ["set", []])], 0.0)
    assert time.process_time() - begun < 0.3


def test_a_pattern_that_takes_for_ever_is_not_found():
    assert scorer("regex").score("aab", "a+b") == (["read", None], True)
    assert scorer("regex").score("a" * 50 + "b", "(a+)+$", SHORT) == (["read", None], False)


def test_another_machine_is_refused(monkeypatch):
    require_sandbox()
    monkeypatch.setattr(client.platform, "machine", lambda: "riscv64")
    with pytest.raises(
        BrokenInstallationError, match=r"this is Linux riscv64; such answers are checked on Linux x86_64 or aarch64"
    ):
        require_sandbox()
