"""The demo's job on planted-modes models of several training seeds: does the method depend on the seed?

python benchmarks/planted_seeds.py --out DIR [--seeds 0 1 2 3 4]

Trains a model per seed into DIR/seedN (about two minutes each) unless it is there, runs the job on it, and prints one
Markdown table. The recipe is frozen in train_planted.py.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from adaras_export.cli import demo_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    print("| seed | ranking | setting (validation) | off | always | gated | flipped | random neurons | gate AUC |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        for row in rows(seed, arguments.out):
            print(row, flush=True)


def rows(seed: int, out: Path) -> list[str]:
    model, folder = out / f"seed{seed}", out / f"job{seed}"
    if not model.exists():
        command = [
            sys.executable,
            Path(__file__).with_name("train_planted.py"),
            "--seed",
            str(seed),
            "--out",
            str(model),
        ]
        subprocess.run(command, check=True)
    folder.mkdir(parents=True)
    task = replace(demo_job.planted_task(folder), base=model)
    summary = demo_job.job(task, folder, lambda _name: lambda _done, _total: None)
    return [row(seed, ranking, candidate, summary.gate.auc) for ranking, candidate in summary.candidates.items()]


def row(seed: int, ranking: str, candidate: demo_job.Candidate, auc: float) -> str:
    arms = {arm.name: arm for arm in candidate.evaluation.arms}
    random = [arm.accuracy for name, arm in arms.items() if name.startswith("random")]
    cells = [f"{arms[name].accuracy:.1%}" for name in ("off", "always", "gated", "flipped")]
    gated = f"{cells[2]} ({arms['gated'].fixed}/{arms['gated'].broken}, p {arms['gated'].p_value:.1g})"
    mean = sum(random) / len(random)
    spread = f"{mean:.1%} ({min(random):.1%} to {max(random):.1%})"
    chosen = candidate.tuned.chosen
    setting = f"{chosen.count} at {chosen.strength:g}"
    return f"| {seed} | {ranking} | {setting} | {cells[0]} | {cells[1]} | {gated} | {cells[3]} | {spread} | {auc:.3f} |"


if __name__ == "__main__":
    main()
