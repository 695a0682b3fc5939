"""Make docs/modes.md from what test runs wrote with --modes. A script:

python tests/support/modes.py [--check] RUN.json...   # --check: say whether the page is what these runs found
"""

import json
import sys
from pathlib import Path

from places import DOCS

PAGE = DOCS / "modes.md"
CLEAN = "a process without the library"  # every family; the others are for three of them
HEAD = """\
# Ways to run a steered repository

Made by `make test-matrix` from the outcomes of `tests/exporters/test_modes.py` and `tests/exporters/test_hf.py`, not by
hand. *Exact*: the tokens are those of an independent oracle (`tests/support/oracle.py`: plain loops, no cache, no
batch), and where a mode gives logits, p(correct) or scores, these too, to 64 float32 roundings of the largest. There
are five rules: no gate and a causal gate with both `start` values, and a gate that reads steered layers, with
`first_generated_token`. A cell of qwen3 stands for every rule that the mode can run; a cell of another family for one
or more of them, chosen such that each family meets each rule. *Base fails too*: the unsteered base model fails, or
gives other tokens, in that mode as well.

"""
TAIL = """\

What a cell cannot say:

* **Continuous batching** (`generate_batch`) is exact without a gate. With
  one it is refused when it is set up: packed requests carry no verdict. Requests do not share KV blocks, which would
  hand steered tokens to another prompt. Two limits: with `first_generated_token`, a prompt that the scheduler splits so
  that its last piece is a single token is steered from that token on instead of from the next; and a request that is
  evicted when the KV memory is full is read again as a prompt, its own answer included.
* **A gate that reads steered layers** looks at the prompt in an extra forward pass, so no single graph holds it:
  `torch.compile(fullgraph=True)` and `torch.export` want a causal gate, which is the default.
* **A second turn on a re-used cache**: earlier tokens stay as they were computed, steered answers included, and the
  gate judges anew by all prompt tokens so far. Sending the whole conversation as a fresh prompt gives another result.
* **Bare calls**: several tokens are a prompt that ends there, a single token behind a KV cache is a generated one.
  `steering_start=` (a column, or one per row) says otherwise: for teacher forcing, losses and prefixes.
* **A KV cache that was changed by hand**: the gate's state follows `crop()`, `reorder_cache()`,
  `batch_select_indices()` and `batch_repeat_interleave()`, and deep copies. Cropped into the prompt, it judges by the
  tokens that are left. Columns that go any other way are an error where the gate reads on. A forward pass that you
  compile yourself must have met the cache in `generate()`, or in a call that is not compiled, before you crop it.
* **`guidance_scale`**: the unconditional branch is a prompt of its own, the last token of the real one unless you give
  `negative_prompt_ids`, with a decision of its own. It needs a KV cache; without one it is refused.
* **`assistant_early_exit`** must lie above the gate's layers, or is refused: the gate would not see what it reads.
* **What Transformers does not show is an error**, never an unsteered answer: a call behind tokens that no known KV
  cache holds, a cache of an unknown class, parameters of other names. Version 5.24 renamed the cache, which is found by
  its type.
"""


def rendered(runs: list[dict]) -> str:
    """The page."""
    runs = sorted(runs, key=lambda run: [int(part) for part in run["transformers"].split(".")])
    versions = [run["transformers"] for run in runs]
    modes = sorted(mode for mode in runs[-1]["modes"] if mode != CLEAN)  # tests run in parallel, in any order
    families = sorted({family for mode in modes for family in runs[-1]["modes"][mode]})
    columns = [(family, run) for family in families for run in runs]
    table = [["mode", *(f"{family}, {run['transformers']}" for family, run in columns)]]
    table += [[mode, *(run["modes"].get(mode, {}).get(family, "not run") for family, run in columns)] for mode in modes]
    names, every = sorted(runs[-1]["modes"][CLEAN]), [["family", *versions]]
    every += [[name, *(run["modes"][CLEAN].get(name, "not run") for run in runs)] for name in names]
    return (
        f"{HEAD}Transformers {' and '.join(versions)}.\n\n{_table(table)}\n"
        "Every family of text, in a process where importing the library fails (a greedy batch, an empty loading\n"
        f"report; for some no KV cache, one prompt, sampling, for others copies):\n\n{_table(every)}{TAIL}"
    )


def _table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    runs = [json.loads(Path(name).read_text()) for name in arguments if name != "--check"]
    bad = [mode for run in runs for mode, cells in run["modes"].items() if "FAILED" in cells.values()]
    page = rendered(runs)
    if not check:
        PAGE.write_text(page)
    elif bad or PAGE.read_text() != page:
        print(f"{PAGE.name}: is not what these runs found{': ' if bad else ''}{', '.join(bad)}; make it again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
