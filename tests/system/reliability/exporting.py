"""Runs the command line in processes that have its libraries loaded, and its jobs one after the other in one of them.

    python tests/system/reliability/exporting.py HOME OUT [JOB ...]

HOME is what `jobs.make` has written; each artifact becomes a folder of OUT. Prints a line of JSON for each.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warn of forks otherwise
HERE = Path(__file__).resolve()
sys.path[:0] = map(str, (HERE.parent, HERE.parents[1], HERE.parents[2] / "support", HERE.parents[3]))

import jobs  # noqa: E402


def load_libraries():
    """What jobs import, so that their forks need not."""
    import torch
    import transformers

    from adaras_export import exporters
    from adaras_export.delivery import writer

    assert writer
    for target in exporters.TARGETS:
        exporters.load(target)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def command(arguments):
    """The exit status of the command line, and what it prints on both streams."""
    from adaras_export import cli

    told, before, sys.argv = io.StringIO(), sys.argv, ["adaras-export", *arguments]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0, told.getvalue()
        finally:
            sys.argv = before


def fork(arguments, log, first=None):
    """Start a process of its own group that runs the command line with what is loaded here; it writes into ``log``.

    ``first`` is called there before.
    """
    child = os.fork()
    os.setpgid(child, child)  # on both sides, since either may be first
    if child:
        return child
    status, text = 70, ""
    try:
        if first is not None:
            first()
        status, text = command(arguments)
    except BaseException:
        text = traceback.format_exc()
        raise
    finally:
        log.write_text(text)
        os._exit(status)


def spawn(arguments, log):
    """The same from the start, imports included."""
    found = {**os.environ, "PYTHONPATH": str(HERE.parents[3])}
    call = [sys.executable, "-c", "from adaras_export.cli import main; main()", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(call, stdout=file, stderr=file, env=found, start_new_session=True).pid


def finished(start, arguments, log):
    """The exit status of a run that nobody disturbs, what it prints, and the seconds that it takes."""
    log.write_text("")
    began = time.perf_counter()
    _, status = os.waitpid(start(arguments, log), 0)
    return os.waitstatus_to_exitcode(status), log.read_text(), time.perf_counter() - began


def main():
    home, out = (Path(word) for word in sys.argv[1:3])
    load_libraries()
    for name in sys.argv[3:] or [*jobs.JOBS]:
        status, text = command(jobs.JOBS[name].command(home, out / jobs.folder_name(name)))
        print(json.dumps({"job": name, "status": status, "text": text if status else ""}), flush=True)


if __name__ == "__main__":
    main()
