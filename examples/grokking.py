"""Does cautious decay grok? An MLP learns addition modulo p from 60 % of all pairs, and is tested on the others.

Soon all training answers are right and the test answers are not. With enough weight decay the net finds the rule much
later ("grokking", arXiv 2201.02177). Counted are the steps to 95 % right test answers, for plain and for cautious decay
over lam and without decay: full batches, AdamW, a constant learning rate.

    python examples/grokking.py                      # about three minutes, two cores
    python examples/grokking.py --modulus 97 --steps 40000
    python examples/grokking.py --smoke              # a few seconds

It prints a table, and writes into --out: summary.txt (the table), results.csv (one row per run) and grokking.svg. A run
ends when it has 95 %; one that has less after --steps is printed as "not reached".
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import language_model as lm
import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_landscapes import machine_and_versions, parse

from cwd_wrap import CautiousDecay

NONE, PLAIN, CAUTIOUS = "no decay", "plain", "cautious"
REACHED = 0.95
EVERY = 20  # steps between two looks at the accuracies
SMOKE = {"modulus": 7, "width": 16, "steps": 60, "seeds": 2, "plain": [1.0], "cautious": [1.0]}
OUTPUTS = ["summary.txt", "results.csv", "grokking.svg"]


# ------------------------------------------------------------------------------------------------
# Data and model
# ------------------------------------------------------------------------------------------------


class Adder(nn.Module):
    """Takes a and b as one-hot vectors, and gives a score for every possible sum."""

    def __init__(self, modulus: int, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(modulus, width) / math.sqrt(2 * modulus)) for _ in range(2))
        self.out = nn.Parameter(torch.randn(width, modulus) / math.sqrt(width))

    def forward(self, pairs: Tensor) -> Tensor:
        return F.relu(self.a[pairs[:, 0]] + self.b[pairs[:, 1]]) @ self.out


def split(modulus: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """All pairs, in an order that the seed draws: those to train on and those for the test."""
    numbers = torch.arange(modulus)
    pairs = torch.cartesian_prod(numbers, numbers)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    return pairs[: round(share * len(pairs))], pairs[round(share * len(pairs)) :]


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    modulus: int
    share: float
    width: int
    lr: float
    steps: int


@dataclass(frozen=True)
class Run:
    """What differs between runs; lam is 0 without decay."""

    decay: str
    lam: float
    seed: int


@dataclass
class Outcome:
    """The result of one run: accuracies as {step: share right}."""

    run: Run
    train: dict[int, float] = field(default_factory=dict)
    test: dict[int, float] = field(default_factory=dict)
    norm: float = math.nan

    @property
    def reached(self) -> int | None:
        """The first look with enough right test answers."""
        return first(self.test)

    @property
    def last(self) -> float:
        """The share of right test answers at the end."""
        return self.test[max(self.test)]


def first(accuracies: dict[int, float]) -> int | None:
    """The first step at which the accuracy is high enough."""
    return next((step for step, accuracy in accuracies.items() if accuracy >= REACHED), None)


def right(scores: Tensor, sums: Tensor) -> float:
    return (scores.argmax(1) == sums).double().mean().item()


def train(run: Run, settings: Settings) -> Outcome:
    """Train one net until it answers 95 % of the test pairs, or for all steps."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model = Adder(settings.modulus, settings.width)
    pairs, test_pairs = split(settings.modulus, settings.share, run.seed)
    sums, test_sums = (some.sum(1) % settings.modulus for some in (pairs, test_pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=run.lam)
    if run.decay == CAUTIOUS:
        optimizer = CautiousDecay(optimizer)
    outcome = Outcome(run)
    for step in range(1, settings.steps + 1):
        lm.report_progress()
        scores = model(pairs)
        optimizer.zero_grad()
        F.cross_entropy(scores, sums).backward()
        if step % EVERY == 0:
            with torch.no_grad():
                outcome.test[step] = right(model(test_pairs), test_sums)
            outcome.train[step] = right(scores, sums)
            if outcome.reached:
                break
        optimizer.step()
    for _ in range(step, settings.steps):  # those that it did not need, for the progress bar
        lm.report_progress()
    outcome.norm = math.hypot(*(p.norm().item() for p in model.parameters()))
    return outcome


# ------------------------------------------------------------------------------------------------
# Results: table and picture
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, float], list[Outcome]]  # by decay and lam, each in the order of seeds


def cells(outcomes: Sequence[Outcome]) -> Cells:
    return lm.grouped(outcomes, lambda o: (o.run.decay, o.run.lam))


def steps_or_none(steps: Sequence[int | None]) -> str:
    """The steps of each seed."""
    return ", ".join("not reached" if step is None else f"{step:,}" for step in steps)


def table(grouped: Cells) -> str:
    """One line for each decay and lam."""
    head = f"{'decay':<10}{'lam':>6}{'test %':>9}{'norm':>9}  {'train 95 %':<26}{'test 95 %'}"
    lines = [head, "-" * (len(head) + 20)]
    for (decay, lam), group in grouped.items():
        last, norm = (statistics.fmean(getattr(o, of) for o in group) for of in ("last", "norm"))
        trained, tested = (
            steps_or_none(steps) for steps in ([first(o.train) for o in group], [o.reached for o in group])
        )
        lines.append(f"{decay:<10}{f'{lam:g}' if lam else '-':>6}{100 * last:>9.1f}{norm:>9.2f}  {trained:<26}{tested}")
    return "\n".join(lines)


LEGEND = """\
train 95 %, test 95 %: steps to 95 % right answers, by seed
test %: right test answers at the end of a run (which ends at 95 %), norm: length of all weights there; means"""

COLOURS = {NONE: pictures.NO_DECAY, PLAIN: pictures.PLAIN, CAUTIOUS: pictures.CAUTIOUS}
BESIDE = {PLAIN: 0.93, CAUTIOUS: 1.07}  # factors, so that marks of one lam do not hide each other


def slowness(group: Sequence[Outcome]) -> tuple[int, float]:
    """For the order of lams: how many seeds fail, then the mean steps of the others; among failures the accuracy."""
    reached = [o.reached for o in group if o.reached]
    return len(group) - len(reached), statistics.fmean(reached) if reached else -sum(o.last for o in group)


def draw(path: Path, grouped: Cells, settings: Settings) -> None:
    """Test accuracy over steps at each decay's best lam, and the steps that each lam needs."""
    figure, (curves, needed) = pictures.panels(2, 1, 8)
    for decay, colour in COLOURS.items():
        lams = sorted(lam for name, lam in grouped if name == decay)
        best = min(lams, key=lambda lam: slowness(grouped[decay, lam]))
        for i, outcome in enumerate(grouped[decay, best]):
            label = f"{decay}, lam {best:g}" if best else decay
            curves.plot(*lines_of(outcome.test), color=colour, label=None if i else label)
            curves.plot(*lines_of(outcome.train), color=colour, lw=1, linestyle=":")
        for outcome in [outcome for lam in lams if lam for outcome in grouped[decay, lam]]:
            look = {"fillstyle": "full" if outcome.reached else "none", "color": colour, "ms": 8, "alpha": 0.8}
            needed.plot(outcome.run.lam * BESIDE[decay], outcome.reached or 1.3 * settings.steps, "o", **look)
    curves.set(xscale="log", xlabel="step", ylabel="right answers (%)", ylim=(-3, 103))
    curves.set_title("solid: test; dotted: training; a line for each seed")
    curves.legend(loc="center left")
    needed.axhline(settings.steps, color=pictures.INK, lw=1, linestyle=":")
    ticks = [settings.steps // 2**i for i in range(4)]
    needed.set(xscale="log", yscale="log", xlabel="lam", ylabel="steps to 95 % of the test")
    needed.set(yticks=ticks, yticklabels=[f"{tick:,}" for tick in ticks])
    needed.minorticks_off()
    needed.set_title(f"a mark for each seed; hollow: not in {settings.steps:,} steps")
    pictures.save(figure, path)


def lines_of(accuracies: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(accuracies), [100 * accuracy for accuracy in accuracies.values()]


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def share(text: str) -> float:
    """An argparse type: a number between 0 and 1."""
    value = lm.positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number between 0 and 1")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Count the steps to grokking with plain and with cautious decay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--plain", type=lm.positive, nargs="+", default=[0.0625, 0.25, 1.0, 4.0], help="decay strengths of plain decay")
    add("--cautious", type=lm.positive, nargs="+", default=[1.0, 4.0, 16.0, 64.0], help="and of cautious decay")
    add("--seeds", type=lm.count(1), default=3, help="runs of each kind, with seeds 0, 1, ...")
    add("--modulus", type=lm.count(3), default=47, help="p")
    add("--share", type=share, default=0.6, help="of all pairs, those to train on")
    add("--width", type=lm.count(1), default=128, help="hidden units")
    add("--lr", type=lm.positive, default=1e-2, help="learning rate, constant")
    add("--steps", type=lm.count(EVERY), default=4_000, help="after so many a run is given up")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, a process of one thread each")
    add("--out", type=Path, default=Path("demo/grokking"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    options.plain, options.cautious = sorted(set(options.plain)), sorted(set(options.cautious))
    return options


def say(outcome: Outcome) -> str:
    """One line when a run is done."""
    run = outcome.run
    what = f"{run.decay:<10} lam {run.lam:<6g} seed {run.seed}"
    return f"{what}  {steps_or_none([outcome.reached])}, {100 * outcome.last:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    settings = Settings(**{name: getattr(options, name) for name in Settings.__annotations__})
    kinds = [(NONE, 0.0), *((PLAIN, lam) for lam in options.plain), *((CAUTIOUS, lam) for lam in options.cautious)]
    runs = [Run(*kind, seed) for kind, seed in itertools.product(kinds, range(options.seeds))]
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = lm.in_processes(train, runs, settings, min(options.jobs, len(runs)), settings.steps, say)

    grouped = cells(outcomes)
    rows = [[o.run.decay, o.run.lam, o.run.seed, first(o.train), o.reached, o.last, o.norm] for o in outcomes]
    lm.write_csv(options.out / "results.csv", ["decay", "lam", "seed", "train_95", "test_95", "test", "norm"], rows)
    draw(options.out / "grokking.svg", grouped, settings)
    setting = (
        f"setting  modulo {settings.modulus}, {settings.share:.0%} of the pairs to train on, {settings.width} hidden "
        f"units, AdamW, lr {settings.lr:g}, full batches, at most {settings.steps:,} steps; {options.seeds} seed(s)"
    )
    seconds = time.perf_counter() - began
    summary = "\n\n".join([f"{setting}\n{machine_and_versions(seconds)}", table(grouped), LEGEND])
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
