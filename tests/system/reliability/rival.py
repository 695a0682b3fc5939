"""Stages folders without any model: python rival.py PARENT WORD ROUNDS, or with ROUNDS 0 one that never ends.

In each round it writes ``WORD`` into forty files of PARENT/out-ROUND, in the same moment as its rivals do, and prints
"won" or the error. A stage that never ends prints "staged".
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3])]

from adaras_export.errors import ExportError  # noqa: E402
from adaras_export.files.staging import staged  # noqa: E402


def stage(parent, word, number):
    with staged(parent / f"out-{number}", parent / "base") as folder:
        for n in range(40):
            (folder / f"{n}").write_text(word)
        while not number:
            print("staged", flush=True)
            time.sleep(60)


def main():
    parent, word, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for number in range(1, rounds + 1) or [0]:
        time.sleep(-time.time() % 0.02)
        try:
            stage(parent, word, number)
            print("won", flush=True)
        except ExportError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
