"""The parameter shapes of GPT-2 small, interleaved timing, and the line that says where a figure was measured."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024


def gpt2_small(scale: int = 1) -> list[torch.nn.Parameter]:
    """The 148 tensors, 124 M weights, of GPT-2 small, with gradients; ``scale`` divides the widths for a quick look."""
    c = WIDTH // scale
    block = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    shapes = [(VOCABULARY // scale, c), (CONTEXT, c), *(block * LAYERS), (c,), (c,)]
    return [_parameter(shape) for shape in shapes]


def many_small(tensors: int = 1000, elements: int = 64) -> list[torch.nn.Parameter]:
    return [_parameter((elements,)) for _ in range(tensors)]


def _parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(shape) * 0.02)
    p.grad = torch.randn(shape)
    return p


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call. The calls take turns, so that a slow moment of the machine hits all; two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved_steps(optimizers: Mapping[str, torch.optim.Optimizer], rounds: int) -> dict[str, list[float]]:
    """`interleaved` for the steps of optimizers. Exits unless each optimizer has moved its weights."""
    before = {name: _sample(optimizer) for name, optimizer in optimizers.items()}
    seconds = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, rounds)
    for name, optimizer in optimizers.items():
        if not (_sample(optimizer) != before[name]).float().mean() > 0.9:
            raise SystemExit(f"{name} has not moved its weights: its times mean nothing")
    return seconds


def _sample(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The first weights of each tensor, copied."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([p.detach().flatten()[:16] for p in parameters]).clone()


def print_ratios(seconds: Mapping[str, list[float]], baseline: str) -> None:
    """Median milliseconds, and the median over the rounds of the ratio to the baseline's time in the same round."""
    print(f"{'':48}{'ms':>9}{'ratio':>8}{'quartiles':>16}")
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:48}{statistics.median(times) * 1e3:9.2f}{middle:8.2f}{low:8.2f} -{high:5.2f}")


def where() -> str:
    """Machine, versions and date, to be given with every figure."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    machine = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{machine}; torch {torch.__version__}, {_version('numba')}; {date.today()}"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"
