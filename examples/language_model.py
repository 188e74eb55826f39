"""Plain weight decay and cautious weight decay, side by side, on a small language model.

Each run trains a byte-level GPT on the source files of Python's own standard library: real text,
nothing to download. For every decay strength lam and every seed there are two runs that share the
initial weights, the batches, the schedule and the optimizer; only the decay differs:

    AdamW                  torch.optim.AdamW(groups, weight_decay=lam)
    CautiousDecay(AdamW)   CautiousDecay(torch.optim.AdamW(groups, weight_decay=lam))

    python examples/language_model.py                                # about two minutes, two cores
    python examples/language_model.py --lam 0.1 0.5 2 --seeds 5      # a longer look
    python examples/language_model.py --optimizer NAdam --lr 1e-3    # another base optimizer
    python examples/language_model.py --steps 5 --seeds 1 --width 32 --layers 1   # a smoke test

It prints a table with the spread between seeds, and writes into --out: summary.txt (the table),
results.csv (one row per run), curves.csv (losses and mask ratios) and loss_and_mask.svg.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import inspect
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeVar

import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cwd_wrap
from cwd_wrap import CautiousDecay, MaskMonitor

AKey = TypeVar("AKey")
AnOutcome = TypeVar("AnOutcome")

VOCABULARY = 256  # one token per byte
HEAD_WIDTH = 32
EVALUATIONS = 10  # validations in one run, the last one after the last step
VALIDATION_WINDOWS = 256
MASK_READINGS = 100  # times in one run that the mask is counted
DECOUPLED = ("AdamW", "Adafactor", "Muon")  # in torch.optim: decay is not part of the gradient
OUTPUTS = ["summary.txt", "results.csv", "curves.csv", "loss_and_mask.svg"]


# ------------------------------------------------------------------------------------------------
# The text: the standard library's sources
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Two byte strings that share no file."""

    train: Tensor
    validation: Tensor
    files: int


@functools.cache
def load_text() -> Text:
    """Read the standard library's .py files; one in ten, picked by its name, is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    names = sorted(
        path.relative_to(root) for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
    )
    if len(names) < 100:
        raise SystemExit(
            f"found {len(names)} .py files of the standard library under {root}, and this example "
            "trains on them; run it with a Python that ships its sources (python.org, pyenv, conda)"
        )
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name in names:
        held_out = zlib.crc32(name.as_posix().encode()) % 10 == 0
        parts[held_out].append((root / name).read_bytes())
    train, validation = (
        torch.frombuffer(bytearray(b"\n".join(parts[held_out])), dtype=torch.uint8) for held_out in (False, True)
    )
    return Text(train, validation, files=len(names))


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return the `context` bytes from each start, and the same shifted by one: what to predict."""
    tokens = text[starts[:, None] + torch.arange(context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


# ------------------------------------------------------------------------------------------------
# The model: a GPT of the usual shape (pre-norm, GELU, learned positions)
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention, then a two-layer MLP, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, -1, HEAD_WIDTH))
        q, k, v = heads.transpose(1, 3).unbind(dim=2)  # each: batch, head, position, HEAD_WIDTH
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Takes bytes and gives a score for every possible next byte."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats per byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    optimizer: str
    lr: float
    steps: int
    width: int
    layers: int
    context: int
    batch: int
    threads: int


@dataclass(frozen=True)
class Run:
    """What differs between runs."""

    cautious: bool
    lam: float
    seed: int


@dataclass
class Outcome:
    """The result of one run; curves are {step: value}."""

    run: Run
    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    mask: dict[int, float] = field(default_factory=dict)
    weight_norm: float = math.nan
    step_ms: float = math.nan
    optimizer_ms: float = math.nan
    snapshot_bytes: int = 0

    @property
    def loss(self) -> float:
        """Validation loss after the last step."""
        return self.validation[max(self.validation)]

    @property
    def late_mask(self) -> float:
        """Mean mask ratio over the last quarter of the run; nan where there is no mask."""
        late = [ratio for step, ratio in self.mask.items() if step >= 0.75 * max(self.mask)]
        return statistics.fmean(late) if late else math.nan


def decayed_weights(model: nn.Module) -> list[Tensor]:
    """The matrices of the linear layers: embeddings, norms and biases usually go without decay."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def make_optimizer(model: nn.Module, settings: Settings, lam: float, cautious: bool) -> torch.optim.Optimizer:
    """The base optimizer with its own decay, or the same one inside CautiousDecay."""
    decayed = decayed_weights(model)
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": lam},
        {"params": others, "weight_decay": 0.0},
    ]
    base = getattr(torch.optim, settings.optimizer)(groups, lr=settings.lr)
    return CautiousDecay(base) if cautious else base


def schedule(step: int, steps: int) -> float:
    """The factor on lr: a linear rise over the first tenth of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def validate(model: GPT, text: Tensor, settings: Settings) -> float:
    """Mean loss over windows spread evenly over the text: the same ones in every run."""
    starts = torch.linspace(0, len(text) - settings.context - 1, VALIDATION_WINDOWS).long()
    batches = starts.split(64)
    return statistics.fmean(model.loss(*windows(text, batch, settings.context)).item() for batch in batches)


def train(run: Run, settings: Settings) -> Outcome:
    """Train one model and measure it."""
    torch.set_num_threads(settings.threads)
    text = load_text()
    torch.manual_seed(run.seed)
    model = GPT(settings.width, settings.layers, settings.context)
    batches = torch.Generator().manual_seed(run.seed)
    optimizer = make_optimizer(model, settings, run.lam, run.cautious)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, settings.steps))
    monitor = MaskMonitor()
    outcome = Outcome(run)
    step_seconds, optimizer_seconds, looks = [], [], []
    validate_every = max(1, settings.steps // EVALUATIONS)
    look_every = max(2, settings.steps // MASK_READINGS)

    for step in range(1, settings.steps + 1):
        # Counting the mask costs time: attach the monitor at some steps only, and leave these
        # out of the timings (for both methods).
        look = step % look_every == 0
        if isinstance(optimizer, CautiousDecay):
            optimizer.observer = monitor if look else None
        starts = torch.randint(len(text.train) - settings.context, (settings.batch,), generator=batches)

        began = time.perf_counter()
        loss = model.loss(*windows(text.train, starts, settings.context))
        optimizer.zero_grad()
        loss.backward()
        stepped = time.perf_counter()
        optimizer.step()
        ended = time.perf_counter()
        scheduler.step()

        outcome.train[step] = loss.item()
        if not look:
            step_seconds.append(ended - began)
            optimizer_seconds.append(ended - stepped)
        else:
            looks.append(step)
        if step == settings.steps or step % validate_every == 0:
            outcome.validation[step] = validate(model, text.validation, settings)
        report_progress()

    if isinstance(optimizer, CautiousDecay):
        outcome.mask = dict(zip(looks, monitor.ratios, strict=True))
        outcome.snapshot_bytes = optimizer.snapshot_bytes
    outcome.weight_norm = math.hypot(*(w.norm().item() for w in decayed_weights(model)))
    outcome.step_ms = 1000 * statistics.median(step_seconds)
    outcome.optimizer_ms = 1000 * statistics.median(optimizer_seconds)
    return outcome


# ------------------------------------------------------------------------------------------------
# All runs: some at a time, each in its own process with its own thread(s)
# ------------------------------------------------------------------------------------------------

# In a worker: the count of steps of all workers, for the progress bar.
_steps_done: Synchronized[int] | None = None


def start_worker(counter: Synchronized[int]) -> None:
    """Keep the shared counter; called once in each new process."""
    global _steps_done
    _steps_done = counter


def report_progress() -> None:
    """Count one step for the progress bar, if there is one."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += 1


@contextmanager
def processes(
    jobs: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, each of which calls ``initializer`` first. They end at once on Ctrl-C or an error."""
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer, arguments)
    try:
        yield executor
    except BaseException:
        # After Ctrl-C or an error the pool would still finish the runs it has handed out.
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def in_processes(
    task: Callable[[Any, Any], Any],
    runs: Sequence[Any],
    settings: Any,
    jobs: int,
    ticks: int,
    say: Callable[[Any], str],
) -> list[Any]:
    """Call task(run, settings) for every run, `jobs` at a time; return the results in the order of runs.

    A task calls report_progress `ticks` times, for the progress bar; say(outcome) is printed when it is done.
    """
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    bar = tqdm(total=len(runs) * ticks, unit="step", smoothing=0.05)
    with bar, processes(jobs, start_worker, counter) as executor:
        futures = [executor.submit(task, run, settings) for run in runs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in done:
                bar.write(say(future.result()))
        return [future.result() for future in futures]


def train_all(runs: Sequence[Run], settings: Settings, jobs: int) -> list[Outcome]:
    """Train every run, `jobs` at a time, under one progress bar; outcomes in the order of runs."""
    # A model this small cannot use a second thread: two runs in two processes
    # finish sooner than one after the other with two threads each.

    def say(outcome: Outcome) -> str:
        run = outcome.run
        name = method_name(run.cautious, settings)
        return f"{name:<24} lam {run.lam:<5g} seed {run.seed}  loss {outcome.loss:.4f}"

    return in_processes(train, runs, settings, jobs, settings.steps, say)


# ------------------------------------------------------------------------------------------------
# Results: table, sentences, files, picture
# ------------------------------------------------------------------------------------------------


def method_name(cautious: bool, settings: Settings) -> str:
    """AdamW, or CautiousDecay(AdamW)."""
    return f"CautiousDecay({settings.optimizer})" if cautious else settings.optimizer


def grouped(outcomes: Iterable[AnOutcome], key: Callable[[AnOutcome], AKey]) -> dict[AKey, list[AnOutcome]]:
    """Outcomes by a key, each list in their order."""
    found: dict[AKey, list[AnOutcome]] = {}
    for outcome in outcomes:
        found.setdefault(key(outcome), []).append(outcome)
    return found


def cells(outcomes: Sequence[Outcome]) -> dict[tuple[float, bool], list[Outcome]]:
    """Outcomes by (lam, cautious), each list in the order of seeds."""
    return grouped(outcomes, lambda o: (o.run.lam, o.run.cautious))


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


def table(outcomes: Sequence[Outcome], settings: Settings) -> str:
    """One line per (lam, method)."""
    head = (
        f"{'method':<24}{'lam':>6}{'val loss':>10}{'spread':>8}{'norm':>8}{'mask':>7}"
        f"{'step ms':>9}{'opt ms':>8}{'extra B':>9}  val loss by seed"
    )
    lines = [head, "-" * len(head)]
    for (lam, cautious), group in cells(outcomes).items():
        losses = [o.loss for o in group]
        varied = f"{spread(losses):.4f}" if len(losses) > 1 else "-"
        mask = f"{statistics.fmean(o.late_mask for o in group):.3f}" if cautious else "-"
        lines.append(
            f"{method_name(cautious, settings):<24}{lam:>6g}{statistics.fmean(losses):>10.4f}"
            f"{varied:>8}{statistics.fmean(o.weight_norm for o in group):>8.2f}"
            f"{mask:>7}{statistics.median(o.step_ms for o in group):>9.2f}"
            f"{statistics.median(o.optimizer_ms for o in group):>8.2f}"
            f"{max(o.snapshot_bytes for o in group):>9}  " + " ".join(f"{x:.4f}" for x in losses)
        )
    return "\n".join(lines)


def compare(plain: Sequence[Outcome], cautious: Sequence[Outcome], noise: float, settings: Settings) -> str:
    """One sentence: the difference in loss, beside the difference between seeds."""
    differences = [c.loss - p.loss for p, c in zip(plain, cautious, strict=True)]
    difference = statistics.fmean(differences)
    names = method_name(False, settings), method_name(True, settings)
    text = f"{names[1]} minus {names[0]} is {difference:+.4f} nats per byte"
    if not math.isfinite(difference):
        return f"{text}: a run diverged; try a smaller --lr."
    if len(differences) == 1:
        return f"{text} with one seed, which says nothing about chance; give --seeds 2 or more."
    text += f" (by seed: {', '.join(f'{d:+.4f}' for d in differences)}), "
    if abs(difference) <= noise:
        return text + f"within the largest spread between seeds, {noise:.4f}: too small to tell."
    lower = names[difference < 0]
    return text + (f"more than the largest spread between seeds, {noise:.4f}: {lower} has the lower loss.")


def findings(outcomes: Sequence[Outcome], settings: Settings) -> list[str]:
    """A sentence for each lam, and one that compares the methods at their best lam."""
    grouped = cells(outcomes)
    lams = sorted({lam for lam, _ in grouped})
    losses = {cell: [o.loss for o in group] for cell, group in grouped.items()}
    # The largest spread of all rows: with few seeds, the spread of one row can be small by chance.
    noise = max((spread(x) for x in losses.values() if math.isfinite(sum(x))), default=math.nan)
    sentences = [f"lam {lam:g}: {compare(grouped[lam, False], grouped[lam, True], noise, settings)}" for lam in lams]
    if len(lams) > 1:
        plain, cautious = (min(lams, key=lambda lam: statistics.fmean(losses[lam, method])) for method in (False, True))
        sentences.append(
            f"The best lam of those tried is {plain:g} for both: see there."
            if plain == cautious
            else f"Each at its own best lam ({plain:g} and {cautious:g}): "
            + compare(grouped[plain, False], grouped[cautious, True], noise, settings)
        )
    if settings.optimizer not in DECOUPLED:
        sentences.append(
            f"{settings.optimizer} adds its own decay to the gradient, and CautiousDecay does not, so "
            "the two differ in more than the mask."
        )
    return sentences


def processor() -> str:
    """The processor's name, if the system gives one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(settings: Settings, seeds: int, jobs: int, seconds: float) -> str:
    """Where and how the numbers were measured."""
    text = load_text()
    model = GPT(settings.width, settings.layers, settings.context)
    size = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"model    {size:,} parameters: {settings.layers} layer(s), width {settings.width}, "
            f"context {settings.context} bytes",
            f"text     the standard library of Python {platform.python_version()}, {text.files} "
            f"files: {len(text.train):,} bytes to train, {len(text.validation):,} held out",
            f"training {settings.steps} steps of {settings.batch} windows, {settings.optimizer}, "
            f"peak lr {settings.lr:g}; {seeds} seed(s), counted from 0",
            f"machine  {processor()}, {os.cpu_count()} CPUs, {platform.system()}; "
            f"{jobs} run(s) at a time, {settings.threads} thread(s) each",
            f"versions torch {torch.__version__}, cwd_wrap {cwd_wrap.__version__}; "
            f"{datetime.date.today()}; {seconds:.0f} s in all",
        ]
    )


LEGEND = """\
val loss: nats per byte on held-out files, mean over seeds; spread: largest minus smallest seed
norm: length of all decayed weights together; mask: share of them that decays, last quarter
step ms, opt ms: median of a whole step and of optimizer.step(), with the other runs beside it
extra B: bytes the wrapper needs beyond its base optimizer"""


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table; None becomes an empty field."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_results(path: Path, outcomes: Sequence[Outcome], settings: Settings) -> None:
    """One row per run."""
    header = ["method", "lam", "seed", "val_loss", "weight_norm", "mask_ratio"]
    header += ["step_ms", "optimizer_ms", "snapshot_bytes"]
    rows = [
        [
            method_name(o.run.cautious, settings),
            o.run.lam,
            o.run.seed,
            o.loss,
            o.weight_norm,
            o.late_mask if o.run.cautious else None,
            o.step_ms,
            o.optimizer_ms,
            o.snapshot_bytes,
        ]
        for o in outcomes
    ]
    write_csv(path, header, rows)


def write_curves(path: Path, outcomes: Sequence[Outcome], settings: Settings) -> None:
    """One row per step."""
    rows = [
        [
            method_name(o.run.cautious, settings),
            o.run.lam,
            o.run.seed,
            step,
            loss,
            o.validation.get(step),
            o.mask.get(step),
        ]
        for o in outcomes
        for step, loss in o.train.items()
    ]
    header = ["method", "lam", "seed", "step", "train_loss", "val_loss", "mask_ratio"]
    write_csv(path, header, rows)


def mean_curve(curves: Sequence[dict[int, float]]) -> tuple[list[int], list[float]]:
    """The mean over seeds at each step."""
    steps = list(curves[0])
    return steps, [statistics.fmean(curve[step] for curve in curves) for step in steps]


def draw(path: Path, outcomes: Sequence[Outcome], settings: Settings) -> None:
    """Loss curves above, mask ratio below; one colour per method, one line style per lam."""
    grouped = cells(outcomes)
    lams = sorted({lam for lam, _ in grouped})
    styles = dict(zip(lams, itertools.cycle(["-", "--", ":", "-."]), strict=False))
    figure, (losses, masks) = pictures.panels(2, 1, 8, sharex=True, height_ratios=(3, 2))
    for (lam, cautious), group in grouped.items():
        style = {"color": pictures.CAUTIOUS if cautious else pictures.PLAIN, "linestyle": styles[lam]}
        steps, values = mean_curve([o.validation for o in group])
        losses.plot(steps, values, **style, marker="o", label=f"{method_name(cautious, settings)}, lam {lam:g}")
        by_seed = [list(o.validation.values()) for o in group]
        lowest, highest = ([pick(at) for at in zip(*by_seed, strict=True)] for pick in (min, max))
        losses.fill_between(steps, lowest, highest, color=style["color"], alpha=0.15, lw=0)
        if cautious:
            steps, values = mean_curve([o.mask for o in group])
            masks.plot(steps, values, **style, label=f"lam {lam:g}")
    # The loss falls from 5.5 in the first steps: show the part where the runs differ.
    late = [loss for o in outcomes for loss in list(o.validation.values())[1:] or [o.loss]]
    late = [loss for loss in late if math.isfinite(loss)]
    if late:
        losses.set_ylim(min(late) - 0.05, max(late) + 0.25)
    seeds = len(next(iter(grouped.values())))
    losses.set(ylabel="validation loss (nats per byte)", title=f"mean of {seeds} seed(s); bands: lowest to highest")
    masks.set(xlabel="step", ylabel="share that decays")
    masks.axhline(0.5, color=pictures.INK, linestyle=":", lw=1)
    masks.margins(y=0.2)
    for axes in (losses, masks):
        axes.legend(loc="upper right")
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def count(least: int, multiple_of: int = 1) -> Callable[[str], int]:
    """An argparse type: a whole number, at least `least`."""

    def parse(text: str) -> int:
        wanted = f"a whole number, {least} or more"
        if multiple_of > 1:
            wanted = f"a multiple of {multiple_of}"
        if not text.isdecimal() or int(text) < least or int(text) % multiple_of:
            raise argparse.ArgumentTypeError(f"got {text!r}; wanted {wanted}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number above 0, such as 0.1")
    return value


def optimizers() -> list[str]:
    """Names in torch.optim that have an lr and a decay to compare with."""
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    return [
        name
        for name, member in classes
        if issubclass(member, torch.optim.Optimizer)
        and {"lr", "weight_decay"} <= set(inspect.signature(member).parameters)
    ]


def usable_cpus() -> int:
    """The CPUs that this process may use; in containers these are often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


OPTIMIZER_HELP = "a class of torch.optim, run with its own weight decay and in CautiousDecay"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Train small language models with plain and with cautious weight decay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=positive, nargs="+", default=[0.1, 2.0], help="decay strengths to compare")
    add("--seeds", type=count(1), default=2, help="runs of each kind, with seeds 0, 1, ...")
    add("--optimizer", default="AdamW", metavar="NAME", help=OPTIMIZER_HELP)
    add("--lr", type=positive, default=4e-3, help="the schedule's peak learning rate")
    add("--steps", type=count(2), default=1000, help="training steps of each run")
    add("--batch", type=count(1), default=16, help="windows in a batch")
    add("--context", type=count(1), default=64, help="bytes in a window")
    add("--width", type=count(HEAD_WIDTH, HEAD_WIDTH), default=64, help="features in the model")
    add("--layers", type=count(1), default=2, help="blocks in the model")
    add("--jobs", type=count(1), default=usable_cpus(), help="runs at a time, each in its own process")
    add("--threads", type=count(1), default=1, help="threads of each run")
    add("--out", type=Path, default=Path("demo"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.optimizer not in optimizers():
        parser.error(
            f"--optimizer {options.optimizer}: not a torch.optim class with lr and weight_decay; "
            f"there are {', '.join(optimizers())}"
        )
    options.lam = sorted(set(options.lam))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    settings = Settings(**{name: getattr(options, name) for name in Settings.__annotations__})
    # The two runs of a pair are neighbours in the list, so they run at the same time, and other
    # work on the machine slows both.
    runs = [
        Run(cautious, lam, seed) for lam in options.lam for seed in range(options.seeds) for cautious in (False, True)
    ]
    jobs = min(options.jobs, len(runs))
    try:  # some optimizers do not take the model's parameters: fail before any process starts
        make_optimizer(GPT(settings.width, 1, 1), settings, options.lam[0], cautious=False)
    except ValueError as error:
        message = f"torch.optim.{settings.optimizer} does not take this model: {error}"
        raise SystemExit(message) from error
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = train_all(runs, settings, jobs)

    write_results(options.out / "results.csv", outcomes, settings)
    write_curves(options.out / "curves.csv", outcomes, settings)
    draw(options.out / "loss_and_mask.svg", outcomes, settings)
    seconds = time.perf_counter() - began
    summary = "\n\n".join(
        [
            conditions(settings, options.seeds, jobs, seconds),
            table(outcomes, settings),
            LEGEND,
            "\n".join(findings(outcomes, settings)),
        ]
    )
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
