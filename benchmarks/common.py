"""What the benchmarks share: shapes, gradients, calls timed in turn, Markdown tables, and where they were measured."""

import argparse
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "memory_and_speed.md"
WARM_UP = 2
Shapes = Sequence[tuple[int, ...]]


# ---- models


def gpt(width: int, layers: int, vocabulary: int, context: int = 1024) -> Shapes:
    """The shapes of a GPT's tensors; the head is the embedding of the tokens."""
    c = width
    block = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    return [(vocabulary, c), (context, c), *(block * layers), (c,), (c,)]


def parameters(shapes: Shapes) -> list[torch.nn.Parameter]:
    """Random weights with gradients."""
    made = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def gpt2_small(scale: int = 1) -> list[torch.nn.Parameter]:
    """The 148 tensors, 124 M weights, of GPT-2 small; ``scale`` divides the widths for a quick look."""
    return parameters(gpt(768 // scale, 12, 50257 // scale))


SIX: Shapes = [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)]
GPT_42_M = gpt(768, 4, 16384)


def many_small(tensors: int = 1000, elements: int = 64) -> list[torch.nn.Parameter]:
    return parameters([(elements,)] * tensors)


def renewing_gradients(stepped: Sequence[torch.nn.Parameter]) -> Callable[[], None]:
    """A function that gives the parameters new gradients, as a backward pass does: other tensors with other values."""
    drawn = [torch.randn_like(p) for p in stepped]

    def renew() -> None:
        scale = random.uniform(-1, 1)
        for p, g in zip(stepped, drawn, strict=True):
            p.grad = g * scale

    return renew


# ---- times


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call. ``before`` is called before each of them and is not timed; two rounds warm up.

    The calls take turns, so that a slow moment of the machine hits all, and every other round is in reverse order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + WARM_UP):
        for name in list(candidates)[:: -1 if round_ % 2 else 1]:
            before()
            start = time.perf_counter()
            candidates[name]()
            if round_ >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved_steps(
    optimizers: Mapping[str, torch.optim.Optimizer], rounds: int, before: Callable[[], object]
) -> dict[str, list[float]]:
    """`interleaved` for the steps of optimizers. Before and after, each is seen to change its weights and state."""

    def check() -> None:
        for optimizer in optimizers.values():
            before()
            moved(optimizer, optimizer.step)

    check()
    seconds = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, before)
    check()
    return seconds


def moved(optimizer: torch.optim.Optimizer, call: Callable[[], object]) -> None:
    """Raise unless ``call`` changes weights and state, since the time of a step that does nothing means nothing."""
    before = _sample(optimizer)
    call()
    share = (_sample(optimizer)[: len(before)] != before).float().mean().item()
    if not share > 0.9:
        msg = f"a step changed {share:.0%} of the weights and the state only, so its time means nothing"
        raise RuntimeError(msg)


def _sample(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The first numbers of each weight and then of each tensor of the state (not the counters), copied."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for p in weights for value in optimizer.state.get(p, {}).values()]
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
    return torch.cat([tensor.detach().flatten()[:16].float() for tensor in [*weights, *tensors]])


# ---- what is printed


class Table:
    """A Markdown table, printed row by row. ``write`` puts it into the page, where the page has its name."""

    def __init__(self, name: str, *head: str) -> None:
        self.name = name
        self.lines: list[str] = []
        print(f"\n{name}: {where()}\n")
        self.row(*head)
        self.row(*["---"] * len(head))

    def row(self, *cells: str) -> None:
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    def write(self) -> None:
        place = re.compile(f"(?<=<!-- bench: {self.name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text = "\n".join(["", *self.lines, "", where(), "", ""])
        page, places = place.subn(lambda _: text, PAGE.read_text())
        assert places == 1, f"{PAGE.name} has {places} places for {self.name}"
        PAGE.write_text(page)


def duration(seconds: Sequence[float]) -> str:
    """The median, with a unit."""
    median = statistics.median(seconds)
    size, unit = next(((size, unit) for size, unit in ((1, "s"), (1e-3, "ms")) if abs(median) >= size), (1e-6, "us"))
    return f"{median / size:.3g} {unit}"


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> str:
    """The median, over the rounds, of the ratio to the baseline in the same round, with its quartiles."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(seconds, baseline, strict=True)), n=4)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds of every row, in place of its own number")
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{PAGE.name}")
    return parser


def where() -> str:
    """Machine, versions and date, to be given with every figure."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    machine = f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{machine}; torch {torch.__version__}, {_version('numba')}; {date.today()}"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"
