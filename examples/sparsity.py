"""Sparsity from decay: PNormDecay with several p on a small image model.

Each run trains a small convolutional net on scikit-learn's handwritten digits (1797 images of 8 x 8 that come with
the package: nothing to download) with PNormDecay(AdamW), for each p and each strength lam, from the same seeds. For
p below 2 small weights lose a larger share of themselves than large ones. The table shows accuracy on held-out digits,
the share of weights under a threshold and under 1e-3, and the accuracy with the weights under 1e-3 set to 0.

    python examples/sparsity.py                                      # under three minutes, two cores
    python examples/sparsity.py --p 0.8 --lam 0.001 0.003 0.01 0.03 --seeds 5
    python examples/sparsity.py --smoke                              # a few seconds

It prints a table with the spread between seeds, and writes into --out: summary.txt (the table), results.csv (one row
per run) and sparsity.svg. It needs scikit-learn (pip install scikit-learn) in addition to what the other examples need.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import language_model as lm
import pictures
import torch
import torch.nn.functional as F
from mask_ablation import spread
from torch import Tensor, nn
from toy_landscapes import machine_and_versions, parse

from cwd_wrap import PNormDecay

SMALL = 1e-3  # the weights that are set to 0 for the second accuracy
BATCH = 100
SMOKE = {"epochs": 2, "seeds": 2, "p": [0.8, 2.0], "lam": [1e-2]}
OUTPUTS = ["summary.txt", "results.csv", "sparsity.svg"]


# ------------------------------------------------------------------------------------------------
# Data and model
# ------------------------------------------------------------------------------------------------


@functools.cache
def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then a held-out third: the same split in every run."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = (
            "this example trains on scikit-learn's digits, and scikit-learn is not installed: pip install scikit-learn"
        )
        raise SystemExit(message) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(order) // 3], order[len(order) // 3 :]
    return images[train], labels[train], images[held_out], labels[held_out]


def make_model() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    lr: float
    epochs: int
    threshold: float

    @property
    def steps(self) -> int:
        """The steps of one run."""
        return self.epochs * math.ceil(len(load_images()[0]) / BATCH)


@dataclass(frozen=True)
class Run:
    """What differs between runs; p and lam are 0 without decay."""

    p: float
    lam: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of one run. Shares are of the weights that decay: all but the biases."""

    run: Run
    accuracy: float
    sparsity: float  # share under the threshold
    small: float  # share under SMALL
    pruned_accuracy: float  # with those set to 0


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Accuracy on the held-out images."""
    _, _, images, labels = load_images()
    return (model(images).argmax(1) == labels).double().mean().item()


def train(run: Run, settings: Settings) -> Outcome:
    """Train one model and measure it."""
    torch.set_num_threads(1)
    images, labels, _, _ = load_images()
    torch.manual_seed(run.seed)
    model = make_model()
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": run.lam}, {"params": biases, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=settings.lr)
    optimizer = PNormDecay(base, p=run.p) if run.lam else base
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lm.schedule(step, settings.steps))
    batches = torch.Generator().manual_seed(run.seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(images), generator=batches).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
            lm.report_progress()

    # Runs without decay have no wrapper; here a PNormDecay measures their sparsity() and never steps.
    counter = optimizer if isinstance(optimizer, PNormDecay) else PNormDecay(base, lam=1.0)
    reached, sparse, small = accuracy(model), counter.sparsity(settings.threshold)[0], counter.sparsity(SMALL)[0]
    with torch.no_grad():
        for w in weights:
            w[w.abs() < SMALL] = 0
    return Outcome(run, reached, sparse, small, accuracy(model))


# ------------------------------------------------------------------------------------------------
# Results: table and picture
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[float, float], list[Outcome]]  # by p and lam, each in the order of seeds


def cells(outcomes: Sequence[Outcome]) -> Cells:
    """Outcomes by (p, lam)."""
    return lm.grouped(outcomes, lambda o: (o.run.p, o.run.lam))


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """In per cent."""
    shares = [100 * value for value in values]
    return f"{statistics.fmean(shares):>9.{digits}f} ±{spread(shares):<5.{digits}f}"


def table(grouped: Cells, threshold: float) -> str:
    """One line for each p and lam; everything in per cent."""
    head = f"{'p':>5}{'lam':>8}{'accuracy %':>14}{f'% < {threshold:g}':>17}{f'% < {SMALL:g}':>16}{'acc. pruned %':>17}"
    lines = [head, "-" * len(head)]
    for (p, lam), group in grouped.items():
        name = f"{p:>5g}{lam:>8g}" if lam else f"{'no decay':>13}"
        columns = ("accuracy", 2), ("sparsity", 1), ("small", 1), ("pruned_accuracy", 2)
        lines.append(name + "".join(mean_and_spread([getattr(o, c) for o in group], digits) for c, digits in columns))
    return "\n".join(lines)


def legend(threshold: float) -> str:
    """What the columns are."""
    return (
        "mean over seeds ± standard deviation; accuracy: on held-out digits, of which one is "
        f"{100 / len(load_images()[3]):.2f} %\n"
        f"% < {threshold:g}, % < {SMALL:g}: share of the weights (biases not counted) below it in size\n"
        f"acc. pruned: accuracy with the weights below {SMALL:g} set to 0\n"
        "lam is that of PNormDecay: at p = 2, lam decays as AdamW's weight_decay of 2*lam"
    )


def draw(path: Path, grouped: Cells, threshold: float) -> None:
    """Accuracy against sparsity, with one line per p through its lams, and sparsity against lam."""
    ps = sorted({p for p, lam in grouped if lam})
    figure, (trade, shares) = pictures.panels(2, 1, 8)
    none = [100 * o.accuracy for o in grouped[0.0, 0.0]]
    pictures.no_decay(trade, statistics.fmean(none))
    for colour, p, marker in zip(itertools.cycle(pictures.OTHERS), ps, "osD^vPX*<>" * len(ps), strict=False):
        lams = sorted(lam for q, lam in grouped if q == p)
        groups = [grouped[p, lam] for lam in lams]
        x = [100 * statistics.fmean(o.sparsity for o in group) for group in groups]
        y = [100 * statistics.fmean(o.accuracy for o in group) for group in groups]
        trade.plot(x, y, color=colour, marker=marker, ms=8, lw=1.5)
        points = [(100 * o.sparsity, 100 * o.accuracy) for group in groups for o in group]
        trade.plot(*zip(*points, strict=True), marker, color=colour, ms=4, alpha=0.5)
        shares.plot(lams, x, color=colour, marker=marker, ms=8, lw=1.5, label=f"p = {p:g}")
    under = f"weights under {threshold:g} (%)"
    trade.set(xlabel=under, ylabel="accuracy (%)", xlim=(-4, 104))
    shares.set(xscale="log", xlabel="lam", ylabel=under, ylim=(-4, 104))
    trade.legend(loc="lower left")
    shares.legend(loc="upper left")
    trade.set_title(f"large marks: means of {len(none)} seeds; small ones: the seeds")
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def power(text: str) -> float:
    """An argparse type: a number above 0, up to 2."""
    value = lm.positive(text)
    if value > 2:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number above 0, up to 2")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small image model with PNormDecay and count the weights it leaves near 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--p", type=power, nargs="+", default=[0.5, 0.8, 1.0, 1.5, 2.0], help="powers, above 0 and up to 2")
    add("--lam", type=lm.positive, nargs="+", default=[1e-3, 1e-2, 1e-1], help="decay strengths")
    add("--seeds", type=lm.count(2), default=3, help="runs of each kind, with seeds 0, 1, ...")
    add("--lr", type=lm.positive, default=3e-3, help="the schedule's peak learning rate")
    add("--epochs", type=lm.count(1), default=30, help="passes over the training images in each run")
    add("--threshold", type=lm.positive, default=1e-13, help="a weight smaller than this counts as 0")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, a process of one thread each")
    add("--out", type=Path, default=Path("demo/sparsity"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    options.p, options.lam = sorted(set(options.p)), sorted(set(options.lam))
    return options


def say(outcome: Outcome) -> str:
    """One line when a run is done."""
    run = outcome.run
    return (
        f"p {run.p:<4g} lam {run.lam:<6g} seed {run.seed}  accuracy {100 * outcome.accuracy:.2f} %, "
        f"sparsity {100 * outcome.sparsity:.1f} %"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    settings = Settings(options.lr, options.epochs, options.threshold)
    kinds = [(0.0, 0.0), *((p, lam) for p in options.p for lam in options.lam)]
    runs = [Run(p, lam, seed) for p, lam in kinds for seed in range(options.seeds)]
    images = [len(part) for part in load_images()]  # fails before any process starts if scikit-learn is missing
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = lm.in_processes(train, runs, settings, min(options.jobs, len(runs)), settings.steps, say)

    grouped = cells(outcomes)
    header = ["p", "lam", "seed", "accuracy", "sparsity", "below_1e-3", "pruned_accuracy"]
    rows = [[o.run.p, o.run.lam, o.run.seed, o.accuracy, o.sparsity, o.small, o.pruned_accuracy] for o in outcomes]
    lm.write_csv(options.out / "results.csv", header, rows)
    draw(options.out / "sparsity.svg", grouped, settings.threshold)
    weights = sum(p.numel() for p in make_model().parameters() if p.ndim > 1)
    setting = (
        f"setting  {weights:,} weights in 4 layers; {images[0]} digits to train, {images[2]} held out; "
        f"{options.epochs} epochs = {settings.steps} steps of {BATCH}, AdamW, peak lr {settings.lr:g}; "
        f"{options.seeds} seeds"
    )
    seconds = time.perf_counter() - began
    summary = "\n\n".join(
        [f"{setting}\n{machine_and_versions(seconds)}", table(grouped, settings.threshold), legend(settings.threshold)]
    )
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
