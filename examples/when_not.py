"""When not to use cautious decay: what becomes of the weights where plain decay bounds their length.

Small classifiers are trained for long, at a constant learning rate, without decay, with plain and with cautious decay:

    separable      logistic regression on as many points as dimensions: the loss falls for ever as the weights grow
    memorised      an MLP that learns random labels by heart
    norm layers    an MLP with a norm layer behind each matrix, so that the length of the matrix does not matter, on new
                   points at every step: a longer matrix turns less in a step, so its length sets how fast it learns
    no norms       the same MLP without norm layers

    python examples/when_not.py                      # about six minutes, two cores
    python examples/when_not.py --takes 1e-4 1e-3 --steps 50000
    python examples/when_not.py --smoke              # a few seconds

It prints two tables, and writes into --out: summary.txt (the tables), results.csv (one row per run), norms.svg (of the
first two tasks) and turns.svg (of the other two).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import language_model as lm
import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy_landscapes import machine_and_versions, parse

from cwd_wrap import CautiousDecay

NONE, PLAIN, CAUTIOUS = "no decay", "plain", "cautious"
MASKS = {PLAIN: "all", CAUTIOUS: "update"}
OPTIMIZERS = {"SGD": (SGD, 0.1), "AdamW": (AdamW, 1e-2)}  # and the learning rate
INPUTS, WIDTH, CLASSES = 20, 64, 10
BATCH, NOISE = 64, 0.2  # of the tasks with new points: points in a step, and the share with a random label
MARKS = 50  # places of a curve
LOOK = 10  # steps between two measurements of the turn
SMOKE = {"steps": 60, "seeds": 2, "takes": [1e-2]}
Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------
# Tasks. Linear layers without a bias decay and are measured
# ------------------------------------------------------------------------------------------------


def net(norm: bool, head: nn.Module) -> nn.Sequential:
    """Two hidden layers."""
    layers: list[nn.Module] = []
    for inputs in (INPUTS, WIDTH):
        layers.append(nn.Linear(inputs, WIDTH, bias=False))
        layers += [nn.LayerNorm(WIDTH, elementwise_affine=False)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, head)


def random_labels(points: int, classes: int, random: torch.Generator) -> Iterator[Batch]:
    """The same points and labels for ever."""
    return itertools.repeat((torch.randn(points, INPUTS, generator=random), draw_labels(points, classes, random)))


def new_points(random: torch.Generator) -> Iterator[Batch]:
    """Points that never come again, with labels that a linear teacher gives to most of them."""
    teacher = torch.randn(INPUTS, CLASSES, generator=random)
    while True:
        x = torch.randn(BATCH, INPUTS, generator=random)
        at_random = torch.rand(BATCH, generator=random) < NOISE
        yield x, torch.where(at_random, draw_labels(BATCH, CLASSES, random), (x @ teacher).argmax(1))


def draw_labels(points: int, classes: int, random: torch.Generator) -> Tensor:
    return torch.randint(classes, (points,), generator=random)


@dataclass(frozen=True)
class Task:
    """A model and its data."""

    make: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Iterator[Batch]]


BOUND = {
    "separable": Task(lambda: nn.Linear(INPUTS, 2, bias=False), lambda random: random_labels(INPUTS, 2, random)),
    "memorised": Task(
        lambda: net(norm=False, head=nn.Linear(WIDTH, CLASSES, bias=False)),
        lambda random: random_labels(10 * INPUTS, CLASSES, random),
    ),
}
SCALE = {
    "norm layers": Task(lambda: net(norm=True, head=nn.Linear(WIDTH, CLASSES)), new_points),
    "no norms": Task(lambda: net(norm=False, head=nn.Linear(WIDTH, CLASSES)), new_points),
}
TASKS = BOUND | SCALE


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What differs between runs. ``takes`` is eta*lam, the share that a step of decay takes off a weight."""

    task: str
    optimizer: str
    decay: str
    takes: float
    seed: int

    @property
    def lam(self) -> float:
        return self.takes / OPTIMIZERS[self.optimizer][1]


@dataclass(frozen=True)
class Mark:
    """One place of a curve: the length of the weights, and means over steps since the place before."""

    norm: float
    turn: float  # by how much of its length a matrix turns in a step
    loss: float


@dataclass(frozen=True)
class Outcome:
    """The result of one run: {step: mark}."""

    run: Run
    curve: dict[int, Mark] = field(default_factory=dict)

    @property
    def early(self) -> Mark:
        """At a tenth of the steps."""
        return self.curve[min(self.curve, key=lambda step: abs(step - max(self.curve) / 10))]

    @property
    def last(self) -> Mark:
        return self.curve[max(self.curve)]


def marks(steps: int) -> set[int]:
    """The steps at which a curve has a place: evenly spread on a logarithmic axis."""
    return {round(steps ** (i / MARKS)) for i in range(MARKS + 1)}


def make_optimizer(run: Run, model: nn.Module, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Without decay the plain optimizer."""
    others = [p for p in model.parameters() if all(p is not w for w in weights)]
    groups = [{"params": weights, "weight_decay": run.lam}, {"params": others, "weight_decay": 0.0}]
    kind, lr = OPTIMIZERS[run.optimizer]
    if run.decay == NONE:
        return kind([*weights, *others], lr=lr, weight_decay=0.0, fused=True)
    return CautiousDecay(kind([g for g in groups if g["params"]], lr=lr, fused=True), mask=MASKS[run.decay])


def direction(weight: Tensor) -> Tensor:
    return F.normalize(weight.detach(), dim=None)


def train(run: Run, steps: int) -> Outcome:
    """Train one model and measure its weights at each step."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task = TASKS[run.task]
    model = task.make()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None]
    optimizer = make_optimizer(run, model, weights)
    data = task.data(torch.Generator().manual_seed(run.seed))
    places, outcome = marks(steps), Outcome(run)
    turns, losses = [], []
    for step in range(1, steps + 1):
        x, y = next(data)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        before = [direction(w) for w in weights] if step % LOOK == 0 or step in places else []
        optimizer.step()
        turns += [(direction(w) - d).norm().item() for w, d in zip(weights, before, strict=False)]
        losses.append(loss.item())
        if step in places:
            norm = math.hypot(*(w.norm().item() for w in weights))
            outcome.curve[step] = Mark(norm, statistics.fmean(turns), statistics.fmean(losses))
            turns, losses = [], []
        lm.report_progress()
    return outcome


# ------------------------------------------------------------------------------------------------
# Results: tables and pictures
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, str, str, float], list[Outcome]]  # by task, optimizer, decay and takes, in the order of seeds


def cells(outcomes: Sequence[Outcome]) -> Cells:
    return lm.grouped(outcomes, lambda o: (o.run.task, o.run.optimizer, o.run.decay, o.run.takes))


def mean(group: Sequence[Outcome], place: str, of: str) -> float:
    """Over the seeds, at the place ``early`` or ``last``."""
    return statistics.fmean(getattr(getattr(outcome, place), of) for outcome in group)


def name(key: tuple[str, str, str, float]) -> str:
    """The first columns of a line of both tables."""
    task, optimizer, decay, takes = key
    lam = f"{takes:>10.0e}{Run(task, optimizer, decay, takes, 0).lam:>8g}" if takes else f"{'-':>10}{'-':>8}"
    return f"{task:<13}{optimizer:<11}{decay:<10}{lam}"


HEAD = f"{'task':<13}{'optimizer':<11}{'decay':<10}{'eta*lam':>10}{'lam':>8}"


def table_of_norms(grouped: Cells) -> str:
    """One line for each task, optimizer, decay and lam."""
    head = f"{HEAD}{'norm early':>12}{'last':>10}{'growth':>9}{'loss':>11}"
    lines = [head, "-" * len(head)]
    for key, group in grouped.items():
        if key[0] in BOUND:
            early, last = (mean(group, place, "norm") for place in ("early", "last"))
            lines.append(
                f"{name(key)}{early:>12.3f}{last:>10.3f}{last / early:>9.3f}{mean(group, 'last', 'loss'):>11.1e}"
            )
    return "\n".join(lines)


def table_of_turns(grouped: Cells) -> str:
    """One line for each task, optimizer, decay and lam."""
    head = f"{HEAD}{'norm':>9}{'turn early':>12}{'last':>9}{'balance':>9}{'as plain':>10}{'loss':>9}"
    lines = [head, "-" * len(head)]
    for key, group in grouped.items():
        if key[0] in SCALE:
            early, last = (mean(group, place, "turn") for place in ("early", "last"))
            balance = as_plain = "-"
            if key[0] == "norm layers" and key[1] == "SGD" and key[2] != NONE:
                balance = f"{math.sqrt(2 * key[3]):.4f}"
            if key[0] == "norm layers" and key[2] == CAUTIOUS:
                of_plain = mean(grouped[key[0], key[1], PLAIN, key[3]], "last", "turn")
                as_plain = f"{(last / of_plain) ** 2:.2f}"
            lines.append(
                f"{name(key)}{mean(group, 'last', 'norm'):>9.2f}{early:>12.4f}{last:>9.4f}{balance:>9}"
                f"{as_plain:>10}{mean(group, 'last', 'loss'):>9.4f}"
            )
    return "\n".join(lines)


def legend(steps: int) -> str:
    """What the columns are."""
    return (
        f"means over seeds; early: at a tenth of the {steps:,} steps; norm: length of all decayed weights\n"
        "growth: the last norm divided by the early one; loss: of the last steps, on the points trained on\n"
        "turn: by how much of its length a matrix turns in one step (mean of the last steps)\n"
        "balance: sqrt(2*eta*lam), where plain decay takes off what steps of SGD, at a right angle, add\n"
        "as plain: (the last turn / that of plain decay)^2: at this share of lam plain decay would turn as much"
    )


STYLES = ["-", (0, (4, 2)), (0, (1, 1.5)), "-."]
COLOURS = {PLAIN: pictures.PLAIN, CAUTIOUS: pictures.CAUTIOUS}
SHOWN = {"norm": (0.3, 40), "turn": (4e-3, 0.8)}  # lines leave a picture where plain decay takes all weights to 0


def draw(path: Path, grouped: Cells, tasks: Sequence[str], of: str, label: str) -> None:
    """Lines over steps, on logarithmic axes: a panel for each task and optimizer."""
    takes = sorted({key[3] for key in grouped if key[3]})
    styles = dict(zip(takes, STYLES, strict=False))
    figure, panels = pictures.panels(len(tasks), len(OPTIMIZERS), 0.9 + 3.2 * len(tasks), sharex=True)
    for axes, (task, optimizer) in zip(panels, itertools.product(tasks, OPTIMIZERS), strict=True):
        for decay, share in [(NONE, 0.0), *itertools.product((PLAIN, CAUTIOUS), takes)]:
            group = grouped[task, optimizer, decay, share]
            steps = [step for step in group[0].curve if of == "norm" or step >= 10]
            values = [statistics.fmean(getattr(o.curve[step], of) for o in group) for step in steps]
            look = {"color": COLOURS[decay], "linestyle": styles[share]} if share else {"color": pictures.NO_DECAY}
            axes.plot(steps, values, lw=2 if share else 4, **look)
        low, high = SHOWN[of]
        ticks = [tick for tick in (0.01, 0.1, 1, 10) if low < tick < high]
        axes.set(xscale="log", yscale="log", ylim=(low, high), title=f"{task}, {optimizer}")
        axes.set(yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for axes in panels[:: len(OPTIMIZERS)]:
        axes.set_ylabel(label)
    for axes in panels[-len(OPTIMIZERS) :]:
        axes.set_xlabel("step")
    lines = [
        pictures.line(NONE, color=pictures.NO_DECAY, lw=4),
        *(pictures.line(f"{decay} decay", color=colour) for decay, colour in COLOURS.items()),
        *(pictures.line(f"eta*lam {share:g}", color=pictures.INK, linestyle=styles[share]) for share in takes),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=3, columnspacing=1, handlelength=1.6)
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the length of weights, and how far they turn in a step, without decay and with two kinds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--takes",
        type=lm.positive,
        nargs="+",
        default=[1e-3, 1e-2, 1e-1],
        help="eta*lam: what a step of decay takes off, at most four",
    )
    add("--seeds", type=lm.count(1), default=3, help="runs of each kind, with seeds 0, 1, ...")
    add("--steps", type=lm.count(20), default=3_000, help="training steps of each run")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, a process of one thread each")
    add("--out", type=Path, default=Path("demo/when_not"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    options.takes = sorted(set(options.takes))
    if len(options.takes) > len(STYLES):
        parser.error(
            f"--takes {' '.join(f'{each:g}' for each in options.takes)}: the pictures have {len(STYLES)} kinds of lines"
        )
    return options


def say(outcome: Outcome) -> str:
    """One line when a run is done."""
    run = outcome.run
    what = f"{run.task:<13}{run.optimizer:<7}{run.decay:<10}eta*lam {run.takes:<7g}seed {run.seed}"
    return f"{what}  norm {outcome.last.norm:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = [(NONE, 0.0), *itertools.product((PLAIN, CAUTIOUS), options.takes)]
    runs = [
        Run(task, optimizer, *kind, seed)
        for task, optimizer, kind, seed in itertools.product(TASKS, OPTIMIZERS, kinds, range(options.seeds))
    ]
    outcomes = lm.in_processes(train, runs, options.steps, min(options.jobs, len(runs)), options.steps, say)

    grouped = cells(outcomes)
    header = ["task", "optimizer", "decay", "lam", "seed", "norm_early", "norm_last", "turn_early", "turn_last", "loss"]
    rows = [
        [getattr(o.run, each) for each in header[:5]]
        + [getattr(place, of) for of in ("norm", "turn") for place in (o.early, o.last)]
        + [o.last.loss]
        for o in outcomes
    ]
    lm.write_csv(options.out / "results.csv", header, rows)
    draw(options.out / "norms.svg", grouped, list(BOUND), "norm", "norm of the weights")
    draw(options.out / "turns.svg", grouped, list(SCALE), "turn", "turn in a step")
    rates = ", ".join(f"{optimizer} lr {lr:g}" for optimizer, (_, lr) in OPTIMIZERS.items())
    setting = f"setting  {options.steps:,} steps, {rates}, constant; {options.seeds} seed(s)"
    seconds = time.perf_counter() - began
    parts = [f"{setting}\n{machine_and_versions(seconds)}", table_of_norms(grouped), table_of_turns(grouped)]
    summary = "\n\n".join([*parts, legend(options.steps)])
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: summary.txt, results.csv, norms.svg, turns.svg")


if __name__ == "__main__":
    main()
