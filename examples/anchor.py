"""Cautious decay towards pre-trained weights, beside cautious decay towards 0 and no decay, in a small fine-tuning.

An MLP is pre-trained on scikit-learn's handwritten digits (1797 images of 8 x 8 that come with the package: nothing to
download). Then it is fine-tuned on a few other digits, each moved to the right by one or two pixels. All arms start
from the same pre-trained weights and train on the same batches. Accuracy on moved digits for validation chooses lam;
the table shows accuracy on a third set, moved and not moved.

    python examples/anchor.py                                  # under a minute, two cores
    python examples/anchor.py --images 50 --seeds 10           # fewer images to fine-tune on
    python examples/anchor.py --smoke                          # a few seconds

It prints a table with the spread between seeds, and writes into --out: summary.txt (the table), results.csv (one row
per run) and anchor.svg. It needs scikit-learn (pip install scikit-learn) in addition to what the other examples need.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import language_model as lm
import pictures
import sparsity
import torch
import torch.nn.functional as F
from mask_ablation import spread
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy_landscapes import machine_and_versions, parse

from cwd_wrap import CautiousDecay

NONE, ZERO, START = "no decay", "to 0", "to the start"
VALIDATION = 300  # images
BATCH = 50
SMOKE = {"epochs": 2, "pretraining": 2, "seeds": 2, "lam": [1.0]}
OUTPUTS = ["summary.txt", "results.csv", "anchor.svg"]


# ------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------


class Anchored(nn.Module):
    """weight = start + difference. The difference is the parameter: it is trained, and decays."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, difference: Tensor) -> Tensor:
        return self.start + difference


def decay_towards_start(model: nn.Module) -> None:
    """Make the weights as they are now the place that decay pulls to. Biases and norms stay as they are."""
    starts: dict[nn.Parameter, Anchored] = {}  # one for all modules that share a weight
    if any(map(parametrize.is_parametrized, model.modules())):
        raise ValueError("the model has a start or another parametrization already: fold it first")
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim > 1:
                parametrize.register_parametrization(module, name, starts.setdefault(p, Anchored(p)))
    for p in starts:
        nn.init.zeros_(p)


def fold(model: nn.Module) -> None:
    """Add the differences to the starts, and give the model its plain weights back."""
    starts: dict[nn.Parameter, Tensor] = {}
    for module in list(model.modules()):
        for name, of_weight in list(getattr(module, "parametrizations", {}).items()):
            starts[of_weight.original] = of_weight[0].start
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for p, start in starts.items():
        p.data += start


# ------------------------------------------------------------------------------------------------
# Data and model
# ------------------------------------------------------------------------------------------------


@functools.cache
def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for pre-training, fine-tuning and validation, then those for the test."""
    images, labels, held_out, of_held_out = sparsity.load_images()
    return images.squeeze(1), labels, held_out.squeeze(1), of_held_out


@functools.cache
def moved(test: bool) -> Tensor:
    """The images, each moved to the right by one or two pixels, the same in every run."""
    images = load_digits()[2 if test else 0]
    draws = torch.Generator().manual_seed(1 + test)
    by_one = torch.rand(len(images), 1, 1, generator=draws) < 0.5
    return torch.where(by_one, F.pad(images, (1, 0))[..., :8], F.pad(images, (2, 0))[..., :8])


def make_model() -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    images: int
    lr: float
    pretraining: int
    epochs: int

    @property
    def first_of_validation(self) -> int:
        """The index of the first validation image. Before it come those for fine-tuning, and first pre-training."""
        return len(load_digits()[0]) - VALIDATION

    @property
    def steps(self) -> int:
        """Of one run, pre-training included."""
        before = self.first_of_validation - self.images
        return self.pretraining * math.ceil(before / BATCH) + self.epochs * math.ceil(self.images / BATCH)


@dataclass(frozen=True)
class Run:
    """What differs between runs; lam is 0 without decay."""

    towards: str
    lam: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    run: Run
    validation: float  # accuracy, on moved digits
    test: float  # accuracy, on moved digits
    unmoved: float  # accuracy, on the same digits, not moved
    distance: float  # of the weights from their start
    norm: float  # of the weights
    test_before: float  # the accuracies before the fine-tuning
    unmoved_before: float


def fit(model: nn.Module, images: Tensor, labels: Tensor, lam: float, epochs: int, lr: float, seed: int) -> None:
    """Train with CautiousDecay(AdamW), or with AdamW without decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": lam}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    if lam:
        optimizer = CautiousDecay(optimizer)
    steps = epochs * math.ceil(len(images) / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lm.schedule(step, steps))
    batches = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=batches).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
            lm.report_progress()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model classifies correctly."""
    return (model(images).argmax(1) == labels).double().mean().item()


def train(run: Run, settings: Settings) -> Outcome:
    """Pre-train, fine-tune, measure. Runs of one seed have the same pre-training."""
    torch.set_num_threads(1)
    images, labels, test, of_test = load_digits()
    torch.manual_seed(run.seed)
    model = make_model()
    last = settings.first_of_validation
    first = last - settings.images
    fit(model, images[:first], labels[:first], 0.0, settings.pretraining, 3e-3, run.seed)

    before = accuracy(model, moved(test=True), of_test), accuracy(model, test, of_test)
    start = [p.detach().clone() for p in model.parameters() if p.ndim > 1]
    if run.towards == START:
        decay_towards_start(model)
    fit(model, moved(test=False)[first:last], labels[first:last], run.lam, settings.epochs, settings.lr, run.seed)
    fold(model)

    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return Outcome(
        run,
        accuracy(model, moved(test=False)[last:], labels[last:]),
        accuracy(model, moved(test=True), of_test),
        accuracy(model, test, of_test),
        math.hypot(*((w - a).norm().item() for w, a in zip(weights, start, strict=True))),
        math.hypot(*(w.norm().item() for w in weights)),
        *before,
    )


# ------------------------------------------------------------------------------------------------
# Results: table, sentences, picture
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, float], list[Outcome]]  # by arm and lam, each in the order of seeds


def cells(outcomes: Sequence[Outcome]) -> Cells:
    """Outcomes by (towards, lam)."""
    return lm.grouped(outcomes, lambda o: (o.run.towards, o.run.lam))


def mean(group: Sequence[Outcome], name: str) -> float:
    """Over the seeds."""
    return statistics.fmean(getattr(outcome, name) for outcome in group)


def best(grouped: Cells, towards: str) -> float:
    """The lam with the highest mean validation accuracy; of several the smallest."""
    lams = sorted(lam for arm, lam in grouped if arm == towards)
    return max(lams, key=lambda lam: mean(grouped[towards, lam], "validation"))


def table(grouped: Cells) -> str:
    """One line for each arm and lam."""
    head = f"{'decay':<13}{'lam':>6}{'validation %':>16}{'test %':>16}{'unmoved %':>16}{'from start':>12}{'norm':>8}"
    lines = [head, "-" * len(head)]
    for (towards, lam), group in grouped.items():
        shares = "".join(
            "  " + sparsity.mean_and_spread([getattr(o, name) for o in group], 2)
            for name in ("validation", "test", "unmoved")
        )
        chosen = "  <- chosen" if lam and lam == best(grouped, towards) else ""
        lines.append(
            f"{towards:<13}{f'{lam:g}' if lam else '-':>6}{shares}{mean(group, 'distance'):>11.2f}"
            f"{mean(group, 'norm'):>8.2f}{chosen}"
        )
    return "\n".join(lines)


def legend(grouped: Cells) -> str:
    """What the columns are, and the accuracies before the fine-tuning."""
    of_start = (
        f"{name} {sparsity.mean_and_spread([getattr(o, f'{name}_before') for o in grouped[NONE, 0.0]], 2).strip()} %"
        for name in ("test", "unmoved")
    )
    return (
        f"mean over seeds ± standard deviation; validation: {VALIDATION} moved digits, by which lam is chosen\n"
        f"test: {len(load_digits()[2])} moved digits, one is {100 / len(load_digits()[2]):.2f} %; "
        "unmoved: the same ones, not moved\n"
        "from start: length of all weights minus the pre-trained ones; norm: length of all weights\n"
        f"before the fine-tuning: {', '.join(of_start)}"
    )


def findings(grouped: Cells) -> str:
    """Each pair of arms at its chosen lam, seed by seed."""
    lines = ["at the chosen lam, the first minus the second:"]
    for one, other in ((START, NONE), (START, ZERO), (ZERO, NONE)):
        groups = [grouped[arm, best(grouped, arm)] for arm in (one, other)]
        for name, what in (("test", "test"), ("unmoved", "unmoved")):
            gains = [100 * (getattr(a, name) - getattr(b, name)) for a, b in zip(*groups, strict=True)]
            lines.append(
                f"  {f'{one} - {other}':<24}{what:<8}{statistics.fmean(gains):>+7.2f} points (sd {spread(gains):.2f}, "
                f"higher at {sum(gain > 0 for gain in gains)} of {len(gains)} seeds)"
            )
    return "\n".join(lines)


COLOURS = {ZERO: pictures.CAUTIOUS, START: pictures.OTHERS[0]}


def draw(path: Path, grouped: Cells) -> None:
    """Accuracy against lam on moved and unmoved digits: a line through the means and one point per seed."""
    figure, panels = pictures.panels(2, 1, 7.6)
    titles = {"test": "moved digits", "unmoved": "the same digits, not moved"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        pictures.no_decay(axes, 100 * mean(grouped[NONE, 0.0], name), NONE)
        for arm in (ZERO, START):
            lams = sorted(lam for towards, lam in grouped if towards == arm)
            means = [100 * mean(grouped[arm, lam], name) for lam in lams]
            axes.plot(lams, means, "o-", color=COLOURS[arm], ms=8, label=f"decay {arm}")
            points = [(lam, 100 * getattr(o, name)) for lam in lams for o in grouped[arm, lam]]
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[arm], ms=4, alpha=0.5)
        axes.set(xscale="log", xlabel="lam", ylabel="accuracy (%)", title=title)
    panels[1].legend(loc="lower left")
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def images_to_tune(text: str) -> int:
    """An argparse type: a number of images, at most 400, so that enough are left for pre-training."""
    number = lm.count(1)(text)
    if number > 400:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number from 1 to 400")
    return number


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a small image model with cautious decay towards its pre-trained weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--lam",
        type=lm.positive,
        nargs="+",
        default=[0.1, 1.0, 10.0, 100.0, 1000.0],
        help="decay strengths to choose from",
    )
    add("--seeds", type=lm.count(2), default=5, help="runs of each kind, with seeds 0, 1, ...")
    add("--images", type=images_to_tune, default=200, help="moved digits to fine-tune on, up to 400")
    add("--lr", type=lm.positive, default=1e-3, help="peak learning rate of the fine-tuning")
    add("--pretraining", type=lm.count(1), default=30, help="passes over the digits in pre-training")
    add("--epochs", type=lm.count(1), default=100, help="passes over the moved digits")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, a process of one thread each")
    add("--out", type=Path, default=Path("demo/anchor"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    options.lam = sorted(set(options.lam))
    return options


def say(outcome: Outcome) -> str:
    """One line when a run is done."""
    run = outcome.run
    return f"{run.towards:<13} lam {run.lam:<5g} seed {run.seed}  validation {100 * outcome.validation:.2f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    settings = Settings(options.images, options.lr, options.pretraining, options.epochs)
    kinds = [(NONE, 0.0), *((towards, lam) for towards in (ZERO, START) for lam in options.lam)]
    runs = [Run(towards, lam, seed) for towards, lam in kinds for seed in range(options.seeds)]
    steps = settings.steps  # reads the digits, and so fails before any process starts if scikit-learn is missing
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = lm.in_processes(train, runs, settings, min(options.jobs, len(runs)), steps, say)

    grouped = cells(outcomes)
    names = ["validation", "test", "unmoved", "distance", "norm", "test_before", "unmoved_before"]
    header = ["towards", "lam", "seed", *names]
    rows = [[o.run.towards, o.run.lam, o.run.seed, *(getattr(o, name) for name in names)] for o in outcomes]
    lm.write_csv(options.out / "results.csv", header, rows)
    draw(options.out / "anchor.svg", grouped)
    weights = sum(p.numel() for p in make_model().parameters() if p.ndim > 1)
    setting = (
        f"setting  {weights:,} weights in 3 layers; pre-trained on {settings.first_of_validation - settings.images} "
        f"digits, fine-tuned on {settings.images} moved ones: {settings.epochs} epochs of {BATCH} a step, AdamW, "
        f"peak lr {settings.lr:g}; {options.seeds} seeds"
    )
    seconds = time.perf_counter() - began
    parts = [f"{setting}\n{machine_and_versions(seconds)}", table(grouped), legend(grouped), findings(grouped)]
    summary = "\n\n".join(parts)
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
