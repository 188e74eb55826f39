"""The study of docs/protocol.md: makes all runs that are not in runs.csv yet.

    python results/study.py                 # about 70 minutes on two cores; stop and start it as you like
    python results/study.py --smoke DIR     # a few seconds: one short run of each kind, into DIR

report.py makes the page of the results from runs.csv and chosen.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import lambda_sweep as ls  # noqa: E402

SETTINGS = (
    ("mnist1d", "AdamW"), ("mnist1d", "Lion"), ("mnist1d", "SGD"), ("mnist1d", "Muon"),
    ("digits", "AdamW"), ("digits", "Lion"),
    ("bytes-many", "AdamW"), ("bytes-many", "Muon"),
    ("bytes-once", "AdamW"),
)  # fmt: skip
RATES = {
    "AdamW": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "Muon": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "Lion": (5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    "SGD": (0.0125, 0.025, 0.05, 0.1, 0.2),
}
TUNING_DOSES, TUNING_SEEDS = (2.0, 8.0), (900, 901)
DOSES, SEEDS = ls.DOSES, tuple(range(1000, 1008))


class Plan(NamedTuple):
    """The first doses, the limits to which they may be extended, the seeds, and the most learning rates to try."""

    doses: tuple[float, ...] = DOSES
    ends: tuple[float, float] = (0.125, 256.0)
    seeds: tuple[int, ...] = SEEDS
    most_rates: int = 9


def best_rate(outcomes: list[ls.Outcome]) -> float:
    """The learning rate of the lowest mean validation loss, whatever the dose."""
    means = {}
    for lr, dose in {(o.lr, o.dose) for o in outcomes}:
        means[lr, dose] = ls.mean([o for o in outcomes if (o.lr, o.dose) == (lr, dose)], "validation")
    return min(means, key=lambda cell: means[cell])[0]


def tune(task: str, optimizer: str, folder: Path, place: ls.Place, jobs: int, plan: Plan) -> float:
    """The learning rate, chosen once on the plain arm. Rates are added until the best one is not at an end."""
    rates = list(RATES[optimizer])
    while True:
        cells = product(rates, TUNING_DOSES, TUNING_SEEDS)
        runs = [ls.Run(task, optimizer, lr, "plain", dose, seed) for lr, dose, seed in cells]
        best = best_rate(ls.carry_out(runs, folder / "tuning.csv", place, jobs, controls=False))
        if len(rates) == plan.most_rates or best not in (min(rates), max(rates)):
            return best
        rates.append(best * 2 if best == max(rates) else best / 2)


def compare(task: str, optimizer: str, lr: float, folder: Path, place: ls.Place, jobs: int, plan: Plan) -> None:
    """Run all arms. Doses are added until neither the smallest nor the largest is best for an arm."""
    doses = list(plan.doses)
    while True:
        outcomes = ls.carry_out(ls.sweep(task, optimizer, lr, doses, plan.seeds), folder / "runs.csv", place, jobs)
        of_setting = [o for o in outcomes if (o.task, o.optimizer, o.lr) == (task, optimizer, lr)]
        means = {cell: ls.mean(some, "validation") for cell, some in ls.cells(of_setting).items()}
        bests = [min((cell for cell in means if cell[0] == arm), key=lambda cell: means[cell])[1] for arm in ls.ARMS]
        if max(bests) == max(doses) < plan.ends[1]:
            doses.append(max(doses) * 2)
        elif min(bests) == min(doses) > plan.ends[0]:
            doses.append(min(doses) / 2)
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--smoke", type=Path, metavar="DIR")
    args = parser.parse_args()
    folder, place, settings, plan = HERE, ls.Place(), SETTINGS, Plan()
    if args.smoke:
        folder, place, settings, plan = (
            args.smoke,
            ls.Place(steps=3),
            SETTINGS[4:5],
            Plan((1.0, 8.0), (1.0, 8.0), (1, 2), 5),
        )
    rates = {}
    for task, optimizer in settings:
        print(f"{task}, {optimizer}: learning rate", file=sys.stderr)
        rates[task, optimizer] = tune(task, optimizer, folder, place, args.jobs, plan)
    for (task, optimizer), lr in rates.items():
        print(f"{task}, {optimizer}: lr {lr:g}", file=sys.stderr)
        compare(task, optimizer, lr, folder, place, args.jobs, plan)
    with (folder / "chosen.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "optimizer", "lr"])
        writer.writerows([task, optimizer, lr] for (task, optimizer), lr in rates.items())


if __name__ == "__main__":
    main()
