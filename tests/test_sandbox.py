"""What hostile code can and cannot do. Limits of the clock are generous: machines that test are busy."""

import os
import platform
import tempfile
import time
from pathlib import Path

import pytest

from adaras_export import sandbox
from adaras_export.errors import BrokenInstallationError
from adaras_export.sandbox import Limits, SandboxFailure, found_in, output_of, passes, require_sandbox, solution
from adaras_export.sandbox_worker import Handle, decoded, encoded

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the sandbox is of Linux on x86-64"
)
SHORT = Limits(cpu_seconds=1, wall_seconds=60, memory=256 << 20, output=1 << 16)

REFUSED = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a subprocess": "import subprocess; subprocess.run(['true'])",
    "a socket": "import socket; socket.socket()",
    "a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "a signal to its group": "import os; os.killpg(0, 9)",
    "a signal by way of a file": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "another process's limits": "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "its parent's memory": "open('/proc/%d/mem' % __import__('os').getppid(), 'r+b')",
    "a new session": "import os; os.setsid()",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a file": "open('mine', 'w')",
    "a file of before": "import os; os.remove('job.json')",
    "a folder": "import os; os.mkdir('mine')",
    "a mode": "import os; os.chmod('job.json', 0)",
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
        output_of("import time; time.sleep(500)", "", Limits(wall_seconds=1))
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


def test_no_folder_and_no_process_stays_behind():
    before = set(Path(tempfile.gettempdir()).glob("adaras-sandbox-*"))
    with solution("import os\ndef f(): return os.getpid()") as solved:
        process = solved("f", [])
    assert set(Path(tempfile.gettempdir()).glob("adaras-sandbox-*")) <= before
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


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
    "another encoder": "import sys\nsys.modules['__main__'].encoded = lambda *a: ['bool', True]\ndef f(x): return 0",
    "nonsense": "import sys\nsys.modules['__main__'].encoded = lambda *a: 17\ndef f(x): return 0",
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


def test_a_pattern_that_takes_for_ever_is_not_found():
    assert found_in("a+b", "aab")
    assert not found_in("(a+)+$", "a" * 50 + "b", SHORT)


def test_another_machine_is_refused(monkeypatch):
    require_sandbox()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(BrokenInstallationError, match=r"this is Linux riscv64; code is run on Linux x86_64 only"):
        require_sandbox()
