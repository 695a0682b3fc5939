"""Huge files, and what is no file: read with 200 MB of memory and some seconds, in processes of their own.

``python bounded.py FOLDER`` prints a line of JSON for each case: its name, and the error, "taken", or how the process
ended. Imports all that readers import first, so that a case costs milliseconds.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (0, 1, 3)] + [
    str(Path(__file__).resolve().parents[2] / "support")
]

from fuzz import readers  # noqa: E402

from adaras_export.errors import AdarasError  # noqa: E402

MIB = 1 << 20
LIMIT = 200 * MIB
SECONDS = 120


def _sparse(path, size, start=b""):
    """A file that says it is large, and takes no room on the disk."""
    path.write_bytes(start)
    os.truncate(path, size)


def _many(text, size=4 * MIB - 100):
    return b"[" + b",".join([text] * (size // (len(text) + 1))) + b"]"


def _keys(count):
    return b"{" + b",".join(b'"%d":0' % number for number in range(count)) + b"}"


def _header_of(text):
    return len(text).to_bytes(8, "little") + text


def _entries(count):
    entry = '"x%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % number for number in range(count)) + "}").encode()


HUGE = {
    "rule: 8 GiB of zeros": ("rule", lambda path: _sparse(path, 8 << 30)),
    "rule: 8 GiB behind a header": ("rule", lambda path: _sparse(path, 8 << 30, readers.READERS["rule"].seeds()[0])),
    "rule: a header of 2 GiB": ("rule", lambda path: _sparse(path, 4 << 30, (2 << 30).to_bytes(8, "little"))),
    "rule: a header of 50,000 tensors": ("rule", lambda path: path.write_bytes(_header_of(_entries(50_000)))),
    "stats: 8 GiB behind a header": ("stats", lambda path: _sparse(path, 8 << 30, readers.READERS["stats"].seeds()[0])),
    "csv: 8 GiB of zeros": ("csv", lambda path: _sparse(path, 8 << 30)),
    "csv: four MiB of short rows": (
        "csv",
        lambda path: path.write_bytes(
            b"overall_neuron_index,layer,neuron_index_in_layer,weight\n" + b"5,1,0,1\n" * (MIB // 2 - 10)
        ),
    ),
    "traces: a line of 8 GiB": ("traces", lambda path: _sparse(path, 8 << 30, b"{")),
    "json: 8 GiB of zeros": ("json", lambda path: _sparse(path, 8 << 30)),
    "json: lists of nothing": ("json", lambda path: path.write_bytes(_many(b"[]"))),
    "json: objects of nothing": ("json", lambda path: path.write_bytes(_many(b"{}"))),
    "json: 400,000 keys": ("config", lambda path: path.write_bytes(_keys(380_000))),
    "weights: a header of 2 GiB": ("weights", lambda path: _sparse(path, 8 << 30, (2 << 30).to_bytes(8, "little"))),
    "weights: 50,000 tensors": ("weights", lambda path: path.write_bytes(_header_of(_entries(50_000)))),
    "gguf: 8 GiB of zeros": ("gguf", lambda path: _sparse(path, 8 << 30, b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)),
    "graph: 8 GiB of zeros": ("graph", lambda path: _sparse(path, 8 << 30)),
    "config: 10**9 layers": (
        "config",
        lambda path: path.write_text(json.dumps({**readers.CONFIG, "num_hidden_layers": 10**9})),
    ),
    "config: 10**9 neurons": (
        "config",
        lambda path: path.write_text(json.dumps({**readers.CONFIG, "intermediate_size": 10**9})),
    ),
}


SPECIAL = {
    "a pipe": os.mkfifo,
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("gone"),
}
ODD = {f"{name}: {kind}": (name, make) for name in readers.READERS for kind, make in SPECIAL.items()}


def _outcome(folder, name, write):
    """What a reader says of the file that ``write`` makes."""
    reader = readers.READERS[name]
    readers.prepared(reader, folder)
    (folder / reader.name).unlink(missing_ok=True)
    write(folder / reader.name)
    try:
        reader.read(folder)
    except AdarasError as error:
        readers.require_line(str(error), folder)
        return f"{type(error).__name__} {error}"
    return "taken"


def _limit():
    """Of memory that is written to: files that are only read do not count."""
    status = Path("/proc/self/status").read_text()
    kilobytes = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (kilobytes * 1024 + LIMIT, resource.RLIM_INFINITY))


def _in_a_fork(root, cases):
    """Print what becomes of some cases in a process of its own; of those behind one that ends it, nothing."""
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            _limit()
            signal.alarm(SECONDS)
            for case, made in cases.items():
                print(json.dumps([case, _outcome(root / case.replace(" ", "-").replace("/", "-"), *made)]), flush=True)
            os._exit(0)
        finally:
            os._exit(1)  # the exception, MemoryError for one, goes no further
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([f"one of: {', '.join(cases)}", f"ended with status {status}"]))


def main(root):
    """Each huge file in a fork of this process, which has imported all that it takes; all odd ones in another."""
    for reader in readers.READERS.values():
        reader.seeds()
    for case, made in HUGE.items():
        _in_a_fork(root, {case: made})
    _in_a_fork(root, ODD)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
