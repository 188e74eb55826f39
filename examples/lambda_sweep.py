"""The loss as a function of lam, for plain decay, cautious decay, and the control: is CWD just a smaller lam?

    plain      decoupled decay of every weight, x <- x - eta*(u + lam*x)
    cautious   CautiousDecay, x <- x - eta*(u + lam*1[u*x >= 0]*x)
    control    plain decay with lam times the mean mask ratio of the cautious run of the same lam and seed:
               the same decay on average, spread over all weights

All runs of one seed share the training set, the initial weights and the batches. A lam is given as its *dose*
lam * lr * steps, so that one grid fits every optimizer. With a dose of 1, plain decay at the peak learning rate would
shrink a weight without updates to 1/e of its size within the run.

    mnist1d      40 numbers to 10 classes, 4,000 samples, 60 passes: an MLP, which overfits (package mnist1d)
    digits       8 x 8 images to 10 classes, 600 images, 40 passes: a small vision transformer of timm
    bytes-many   the next byte of 100 KB of Python sources, about six passes: a small GPT
    bytes-once   the same model and number of steps on text that it reads at most once

    python examples/lambda_sweep.py                                 # mnist1d with AdamW, two minutes, two cores
    python examples/lambda_sweep.py --task bytes-many --optimizer Muon --seeds 3
    python examples/lambda_sweep.py --task bytes-once --device cuda --scale 4 --jobs 1    # a larger model on a card

It can be stopped at any time: finished runs are in --out/runs.csv and are not repeated. It prints a table and draws
--out/<task>_<optimizer>.svg. Needs: pip install cwd-wrap[results]
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import language_model as lm
import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from cwd_wrap import CautiousDecay, MaskMonitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("plain", "cautious", "control")
NONE = "none"  # the arm without decay
OPTIMIZERS = {"AdamW": 3e-3, "Lion": 3e-4, "SGD": 0.1, "Muon": 3e-3}  # and a learning rate to start from
DOSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------
# Tasks: each seed draws its own training data; validation and test are the same for all
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task. A larger ``scale`` makes the model wider and the batch larger, for a card."""

    steps: int
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int, int, int], Iterator[Batch]]  # from a seed, a number of steps and a scale
    held_out: Callable[[str], list[Batch]]  # "validation" or "test"


def in_passes(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end; each pass takes every sample once, in a new order."""
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            yield x[rows], y[rows]


def drawn(pool: Batch, samples: int, size: int, seed: int) -> Iterator[Batch]:
    """Batches from a training set of ``samples`` samples that the seed draws from the pool."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(pool[0]), generator=generator)[:samples]
    return in_passes(pool[0][rows], pool[1][rows], size, generator)


@functools.cache
def made(samples: int, seed: int | None = None) -> Batch:
    """Samples of mnist1d, from the package's own generator; its own seed if that is None."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split = samples, 1.0
    arguments.seed = arguments.seed if seed is None else seed
    data = make_dataset(arguments)
    return torch.tensor(data["x"], dtype=torch.float32), torch.tensor(data["y"])


@functools.cache
def mnist1d() -> dict[str, Batch]:
    """16,000 samples to draw from, 4,000 for validation and 8,000 for the test."""
    x, y = made(28_000)
    sizes = [16_000, 4_000, 8_000]
    parts = zip(("train", "validation", "test"), x.split(sizes), y.split(sizes), strict=True)
    return {name: (some, labels) for name, some, labels in parts}


def perceptron(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


@functools.cache
def digits() -> dict[str, Batch]:
    """scikit-learn's 1,797 digits: 900 to draw from, 397 for validation, 500 for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    sizes = [900, 397, 500]
    parts = zip(("train", "validation", "test"), x.split(sizes), y.split(sizes), strict=True)
    return {name: (some, of_them) for name, some, of_them in parts}


def vision_transformer(scale: int) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32 * scale, depth=2, num_heads=2
    )


CONTEXT, WINDOWS, LITTLE = 32, 16, 100_000


@functools.cache
def text(name: str) -> Tensor:
    """Python sources to train on: the standard ``"library"``, as in the demo, or the installed ``"packages"``."""
    if name == "library":
        return lm.load_text().train
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def windows_of(name: str) -> list[Batch]:
    """Windows of the files that the demo holds out: of 1,024, spread evenly, every second one is for the test."""
    held_out = lm.load_text().validation
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, 1024).long()[name == "test" :: 2]
    return [lm.windows(held_out, some, CONTEXT) for some in starts.split(64)]


def many_passes(seed: int, steps: int, scale: int) -> Iterator[Batch]:
    """Random windows of 100 KB of text, which begin at a place that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(text("library")) - LITTLE, (1,), generator=generator))
    little = text("library")[first : first + LITTLE]
    while True:
        starts = torch.randint(len(little) - CONTEXT, (WINDOWS * scale,), generator=generator)
        yield lm.windows(little, starts, CONTEXT)


def one_pass(seed: int, steps: int, scale: int) -> Iterator[Batch]:
    """Windows from all parts of the text, no two of which predict the same byte."""
    generator = torch.Generator().manual_seed(seed)
    much = text("library" if scale == 1 else "packages")
    places = torch.randperm((len(much) - 1) // CONTEXT, generator=generator)
    if len(places) < steps * WINDOWS * scale:
        msg = (
            f"one pass takes {steps * WINDOWS * scale * CONTEXT:,} bytes, and there are {len(much):,}: take fewer steps"
        )
        raise SystemExit(msg)
    for some in places.split(WINDOWS * scale):
        yield lm.windows(much, some * CONTEXT, CONTEXT)


TASKS = {
    "mnist1d": Task(
        2400,
        lambda scale: perceptron(40, 128 * scale),
        lambda seed, steps, scale: drawn(mnist1d()["train"], 4000, 100, seed),
        lambda name: [mnist1d()[name]],
    ),
    "digits": Task(
        400,
        vision_transformer,
        lambda seed, steps, scale: drawn(digits()["train"], 600, 60, seed),
        lambda name: [digits()[name]],
    ),
    "bytes-many": Task(1200, lambda scale: lm.GPT(64 * scale, scale, CONTEXT), many_passes, windows_of),
    "bytes-once": Task(1200, lambda scale: lm.GPT(64 * scale, scale, CONTEXT), one_pass, windows_of),
}


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What identifies a run in the file."""

    task: str
    optimizer: str
    lr: float
    arm: str
    dose: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """The values in the file."""
        return tuple(str(getattr(self, field.name)) for field in fields(Cell))


@dataclass(frozen=True)
class Run(Cell):
    """What differs between runs. ``share``: the control's factor on lam, otherwise 1; it follows from the rest."""

    share: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where runs happen, and how large they are."""

    device: str = "cpu"
    scale: int = 1
    steps: int | None = None


@dataclass(frozen=True)
class Outcome(Cell):
    """The result of one run: one row of the file."""

    lam: float
    train: float
    validation: float
    test: float
    test_accuracy: float
    mask_ratio: float
    norm: float
    seconds: float


def decayed_weights(model: nn.Module) -> list[Tensor]:
    """The weights of linear and convolutional layers: embeddings, norms and biases usually go without decay."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def make_optimizers(run: Cell, model: nn.Module, lam: float, monitor: MaskMonitor | None) -> list[Optimizer]:
    """The base optimizer with its own decay, or the same in CautiousDecay. With Muon, AdamW takes the other tensors.

    The decay of torch's SGD is not decoupled, so plain decay of SGD is CautiousDecay with mask="all".
    """
    decayed = decayed_weights(model)
    chosen = set(map(id, decayed))
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": lam}, {"params": others, "weight_decay": 0.0}]
    bases: list[Optimizer]
    if run.optimizer == "AdamW":
        bases = [AdamW(groups, lr=run.lr, fused=True)]
    elif run.optimizer == "Lion":
        from timm.optim import Lion

        bases = [Lion(groups, lr=run.lr)]
    elif run.optimizer == "SGD":
        bases = [SGD(groups, lr=run.lr, momentum=0.9)]
    else:
        hidden = [p for p in decayed[:-1] if p.dim() == 2]  # the last layer gives the scores
        groups[0]["params"] = [p for p in decayed if not any(p is matrix for matrix in hidden)]
        muon = torch.optim.Muon(hidden, lr=run.lr, weight_decay=lam, adjust_lr_fn="match_rms_adamw")
        bases = [muon, AdamW(groups, lr=run.lr, fused=True)]
    if run.arm != "cautious":
        return [CautiousDecay(base, mask="all") if isinstance(base, SGD) and lam else base for base in bases]
    wrapped = [CautiousDecay(base) for base in bases]
    for each in wrapped:
        each.observer = monitor
    return list(wrapped)


def scores_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    scores = model(x)
    return scores, F.cross_entropy(scores.flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], device: str) -> tuple[float, float]:
    """Cross entropy in nats, and the share of right answers."""
    model.eval()
    loss = right = count = 0.0
    for x, y in batches:
        scores, mean = scores_loss(model, x.to(device), y.to(device))
        loss += mean.item() * y.numel()
        right += (scores.argmax(-1) == y.to(device)).sum().item()
        count += y.numel()
    model.train()
    return loss / count, right / count


def start(
    run: Cell, lam: float, steps: int, scale: int, device: str, monitor: MaskMonitor | None
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model, and a function that takes its next training step and returns the loss."""
    torch.set_num_threads(1)
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.make_model(scale).to(device)
    optimizers = make_optimizers(run, model, lam, monitor)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: lm.schedule(step, steps)) for each in optimizers]
    batches = task.batches(run.seed, steps, scale)

    def step() -> Tensor:
        x, y = next(batches)
        _, loss = scores_loss(model, x.to(device), y.to(device))
        model.zero_grad()
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        return loss.detach()

    return model, step


def train(run: Run, place: Place) -> Outcome:
    """Train one model and measure it."""
    task = TASKS[run.task]
    steps = place.steps or task.steps
    lam = run.dose / (run.lr * steps) * run.share
    monitor = MaskMonitor()
    model, step = start(run, lam, steps, place.scale, place.device, monitor)
    began = time.process_time()
    late = [step() for _ in range(steps)][-max(1, steps // 10) :]
    seconds = time.process_time() - began
    validation, _ = evaluate(model, task.held_out("validation"), place.device)
    test, accuracy = evaluate(model, task.held_out("test"), place.device)
    norm = math.hypot(*(w.norm().item() for w in decayed_weights(model)))
    ratio = round(monitor.read(), 4) if run.arm == "cautious" else 1.0  # rounded as in the file
    return Outcome(
        run.task, run.optimizer, run.lr, run.arm, run.dose, run.seed, lam, torch.stack(late).mean().item(), validation,
        test, accuracy, ratio, norm, seconds,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Many runs: finished ones are in a file
# ------------------------------------------------------------------------------------------------


AnOutcome = TypeVar("AnOutcome", bound=Outcome)


def read(path: Path, kind: type[AnOutcome] = Outcome) -> list[AnOutcome]:
    """The finished runs; ``kind`` is a subclass if the file has more columns."""
    if not path.exists():
        return []
    convert = {field.name: {"str": str, "int": int, "float": float}[field.type] for field in fields(kind)}
    with path.open(newline="") as file:
        # A row that was cut off when the machine stopped lacks its last fields.
        rows = [row for row in csv.DictReader(file) if all(row[name] for name in convert)]
    return [kind(**{name: to(row[name]) for name, to in convert.items()}) for row in rows]


def append(path: Path, outcome: Outcome) -> None:
    """Add one row; the first one makes the file. A last line that was cut off stays a separate line."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = not new and not path.read_bytes().endswith(b"\n")
    with path.open("a", newline="") as file:
        file.write("\n" * cut_off)
        writer = csv.DictWriter(file, [field.name for field in fields(outcome)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(outcome).items()})


def sweep(task: str, optimizer: str, lr: float, doses: Iterable[float], seeds: Iterable[int]) -> list[Run]:
    """The runs of a sweep without the controls, which need the mask ratio of a cautious run."""
    seeds = list(seeds)
    runs = [
        Run(task, optimizer, lr, arm, dose, seed) for dose in doses for seed in seeds for arm in ("cautious", "plain")
    ]
    return [*runs, *(Run(task, optimizer, lr, NONE, 0.0, seed) for seed in seeds)]


def control_of(outcome: Outcome) -> Run:
    """The control of a cautious run."""
    return Run(
        outcome.task, outcome.optimizer, outcome.lr, "control", outcome.dose, outcome.seed, outcome.mask_ratio
    )  # fmt: skip


def carry_out(runs: Sequence[Run], path: Path, place: Place, jobs: int, controls: bool = True) -> list[Outcome]:
    """Make the runs that are not in the file yet, ``jobs`` at a time, and their controls; return all outcomes."""
    finished = {outcome.key: outcome for outcome in read(path)}
    wanted = {run.key: run for run in runs}
    cautious = [run for run in runs if run.arm == "cautious"] if controls else []
    todo = [run for key, run in wanted.items() if key not in finished]
    done = [finished[run.key] for run in cautious if run.key in finished]
    todo += [run for run in map(control_of, done) if run.key not in finished]
    total = len(wanted) + len(cautious)
    bar = tqdm(total=total, initial=total - len(todo) - (len(cautious) - len(done)), unit="run", smoothing=0.05)
    with bar, lm.processes(jobs) as executor:
        waiting = {executor.submit(train, run, place) for run in todo}
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in ready):
                append(path, outcome)
                finished[outcome.key] = outcome
                bar.update()
                if controls and outcome.arm == "cautious":
                    waiting.add(executor.submit(train, control_of(outcome), place))
    keys = {*wanted, *(replace(run, arm="control").key for run in cautious)}
    return [outcome for outcome in read(path) if outcome.key in keys]


# ------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, float], list[Outcome]]


def cells(outcomes: Iterable[Outcome]) -> Cells:
    """Outcomes by (arm, dose), each list in the order of seeds."""
    return lm.grouped(sorted(outcomes, key=lambda o: (o.arm, o.dose, o.seed)), lambda o: (o.arm, o.dose))


def mean(outcomes: Sequence[Outcome], of: str) -> float:
    """The mean over seeds; infinite where one diverged."""
    values = [getattr(outcome, of) for outcome in outcomes]
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each arm and lam."""
    head = f"{'arm':<10}{'dose':>6}{'lam':>10}{'validation':>12}{'test':>9}{'sd':>8}{'right':>8}{'mask':>7}{'norm':>8}"
    lines = [head, "-" * len(head)]
    for (arm, dose), some in cells(outcomes).items():
        tests = [outcome.test for outcome in some]
        spread = statistics.stdev(tests) if len(tests) > 1 else math.nan
        ratio, norm = mean(some, "mask_ratio"), mean(some, "norm")
        lines.append(
            f"{arm:<10}{dose:>6g}{mean(some, 'lam'):>10.4g}{mean(some, 'validation'):>12.4f}{mean(some, 'test'):>9.4f}"
            f"{spread:>8.4f}{mean(some, 'test_accuracy'):>8.1%}{ratio:>7.3f}{norm:>8.2f}"
        )
    return "\n".join(lines)


COLOURS = {
    "plain": pictures.PLAIN,
    "cautious": pictures.CAUTIOUS,
    "control": pictures.CONTROL,
    NONE: pictures.NO_DECAY,
}
LABELS = {"plain": "plain", "cautious": "cautious", "control": "control", NONE: "no decay"}
TICKS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 2.5, 3, 4, 5)  # of a loss


def draw(axes: Axes, outcomes: Sequence[Outcome], of: str = "test") -> None:
    """The loss over lam: one line per arm, with a band of one standard error over the seeds."""
    grouped = cells(outcomes)
    lowest = math.inf
    for arm in ARMS:
        rows = [(mean(some, "lam"), some) for (name, _), some in grouped.items() if name == arm]
        rows = sorted((row for row in rows if math.isfinite(mean(row[1], of))), key=lambda row: row[0])
        lams, means = [lam for lam, _ in rows], [mean(some, of) for _, some in rows]
        errors = [
            statistics.stdev([getattr(o, of) for o in some]) / len(some) ** 0.5 if len(some) > 1 else 0.0
            for _, some in rows
        ]
        axes.plot(lams, means, color=COLOURS[arm], marker="o", markersize=5, label=LABELS[arm])
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(lams, low, high, color=COLOURS[arm], alpha=0.15, lw=0)
        lowest = min([lowest, *means])
    without = mean(grouped[NONE, 0.0], of) if (NONE, 0.0) in grouped else lowest
    if without > lowest:
        pictures.no_decay(axes, without, LABELS[NONE])
    axes.set(xscale="log", yscale="log", xlabel="lam", ylabel=f"{of} loss (nats)")
    # From below the lowest loss to above that without decay; where decay is far too strong, lines leave the picture.
    bottom, top = 0.95 * lowest, max(1.08 * without, 1.3 * lowest)
    shown = [tick for tick in TICKS if bottom < tick < top]
    axes.set(ylim=(bottom, top), yticks=shown, yticklabels=[f"{tick:g}" for tick in shown])
    axes.minorticks_off()


def six_digits(text: str) -> float:
    """A number with six digits, as in the file."""
    return float(f"{float(text):.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="mnist1d")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument("--lr", type=six_digits, help="peak learning rate; by default one that suits small models")
    parser.add_argument("--doses", type=six_digits, nargs="+", default=DOSES, help="lam * lr * steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="by default the task's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="factor on the model's width, for a card")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("demo/lambda_sweep"))
    args = parser.parse_args()
    lr = args.lr or OPTIMIZERS[args.optimizer]
    runs = sweep(args.task, args.optimizer, lr, args.doses, range(args.seeds))
    # Runs of other lengths and sizes go into other files.
    other = f"_steps{args.steps}" * (args.steps is not None) + f"_scale{args.scale}" * (args.scale > 1)
    path = args.out / f"runs{other}.csv"
    outcomes = carry_out(runs, path, Place(args.device, args.scale, args.steps), args.jobs)

    print(table(outcomes))
    figure, (axes,) = pictures.panels(1, 1, 4.5)
    draw(axes, outcomes)
    axes.set_title(f"{args.task}, {args.optimizer}, lr {lr:g}, {args.seeds} seed(s)")
    axes.legend()
    picture = args.out / f"{args.task}_{args.optimizer}{other}.svg"
    pictures.save(figure, picture)
    print(f"runs: {path}; picture: {picture}")


if __name__ == "__main__":
    main()
