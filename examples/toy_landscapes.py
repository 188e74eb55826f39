"""Adam, AdamW and CautiousDecay(Adam) on functions with a curve of minimisers.

Two functions, those of the paper's Figure 3 (arXiv 2510.12402), are 0 on a curve. A third, of one variable, is 0 at 5:

    ring       f = ((x-3)^2 + (y-3)^2 - 1)^2
    parabola   f = (y - 3 - (x-3)^2)^2
    line       f = (x-5)^2

All three optimizers share lr, betas, eps and the starts; AdamW and CautiousDecay(Adam) share lam too. Decay makes
|x| and |y| smaller; the loss is 0 on the curve. The part of the curve where no small move along it makes both |x| and
|y| smaller is its local Pareto front.

    python examples/toy_landscapes.py                     # a minute and a half, one core
    python examples/toy_landscapes.py --lam 0.2 --lr 3e-3
    python examples/toy_landscapes.py --smoke             # a few seconds

It prints where each run ends, and writes into --out: summary.txt (the table) and trajectories.svg.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pictures
import torch
from language_model import count, positive, processor
from torch import Tensor
from tqdm import tqdm

from cwd_wrap import CautiousDecay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

READINGS = 500  # points of a trajectory that are kept
LATE = 200  # f in the table is the mean over this many last steps: each step moves by about lr
NEAR = 0.05  # how far from the curve still counts as on it
SMOKE = {"steps": 200, "lr": 0.02}
OUTPUTS = ["summary.txt", "trajectories.svg"]

Point = tuple[float, float]
Results = dict[str, dict[str, tuple[Tensor, Tensor]]]  # by method, then by function


# ------------------------------------------------------------------------------------------------
# The functions: each is a square c(x, y)^2, so its minimisers are where c = 0
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Landscape:
    """f = c^2, and where to start on it."""

    name: str
    formula: str
    c: Callable[[Tensor, Tensor], Tensor]
    starts: tuple[Point, ...]


LANDSCAPES = (
    Landscape(
        "ring",
        "((x-3)² + (y-3)² - 1)²",
        lambda x, y: (x - 3).square() + (y - 3).square() - 1,
        ((4.5, 3.2), (3.2, 5.0), (4.5, 4.5)),
    ),
    Landscape("parabola", "(y - 3 - (x-3)²)²", lambda x, y: y - 3 - (x - 3).square(), ((5.0, 5.0), (1.0, 5.0))),
    Landscape("line", "(x-5)²", lambda x, y: x - 5, ((8.0, 0.0), (0.5, 0.0))),
)


def value(landscape: Landscape, points: Tensor) -> Tensor:
    """f at each row of points."""
    return landscape.c(points[..., 0], points[..., 1]).square()


def slope(landscape: Landscape, points: Tensor) -> Tensor:
    """The gradient of c, the direction across the curve, at each row of points."""
    points = points.detach().requires_grad_()
    return torch.autograd.grad(landscape.c(points[..., 0], points[..., 1]).sum(), points)[0]


def distance(landscape: Landscape, points: Tensor) -> Tensor:
    """The distance from the curve, to first order: |c| / |grad c|."""
    return value(landscape, points).sqrt() / slope(landscape, points).norm(dim=-1)


def is_pareto(landscape: Landscape, points: Tensor) -> Tensor:
    """On the curve, is there no small move along it that makes both |x| and |y| smaller?

    A move (-s1*x, -s2*y) with s1, s2 >= 0 stays on the curve if s1*x*dc/dx + s2*y*dc/dy = 0, which takes terms of
    opposite signs, unless both are 0.
    """
    terms = points * slope(landscape, points)
    return terms[..., 0] * terms[..., 1] > 0


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


METHODS = {
    "Adam": lambda points, lr, lam: torch.optim.Adam(points, lr=lr),
    "AdamW": lambda points, lr, lam: torch.optim.AdamW(points, lr=lr, weight_decay=lam),
    "CautiousDecay(Adam)": lambda points, lr, lam: CautiousDecay(torch.optim.Adam(points, lr=lr), lam=lam),
}


def run(method: str, *, lr: float, lam: float, steps: int, bar: tqdm | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Run all starts on all functions at once, as rows of one tensor, since the optimizers are elementwise.

    Returns for each function the trajectories, (readings, starts, 2) with the end last, and for each start the mean of
    f over the last steps.
    """
    sizes = [len(landscape.starts) for landscape in LANDSCAPES]
    starts = [start for landscape in LANDSCAPES for start in landscape.starts]
    points = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    optimizer = METHODS[method]([points], lr, lam)
    trajectory, late = [points.detach().clone()], []
    every = max(1, steps // READINGS)
    for step in range(1, steps + 1):
        f = torch.cat([value(landscape, part) for landscape, part in zip(LANDSCAPES, points.split(sizes), strict=True)])
        if step > steps - LATE:
            late.append(f.detach())
        optimizer.zero_grad()
        f.sum().backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            trajectory.append(points.detach().clone())
        if bar is not None:
            bar.update()
    trajectories = torch.stack(trajectory).split(sizes, dim=1)
    means = torch.stack(late).mean(0).split(sizes)
    return {landscape.name: pair for landscape, *pair in zip(LANDSCAPES, trajectories, means, strict=True)}


# ------------------------------------------------------------------------------------------------
# Results: table and picture
# ------------------------------------------------------------------------------------------------


def machine_and_versions(seconds: float) -> str:
    """Two lines with the machine, the versions, the date and the run time. The other experiments print them too."""
    try:
        library = version("cwd-wrap")
    except PackageNotFoundError:
        library = "(a checkout, not installed)"
    return (
        f"machine  {processor()}, {os.cpu_count()} CPUs, {platform.system()}\n"
        f"versions Python {platform.python_version()}, torch {torch.__version__}, cwd_wrap {library}; "
        f"{datetime.date.today()}; {seconds:.0f} s in all"
    )


def verdict(landscape: Landscape, point: Tensor) -> str:
    """Where a run ended."""
    if distance(landscape, point).item() > NEAR:
        return "off the curve"
    if landscape.name == "line":
        return "at the minimiser"
    return "on it, Pareto" if is_pareto(landscape, point) else "on it"


def table(results: Results) -> str:
    """One line per run."""
    head = f"{'function':<10}{'start':<12}{'method':<21}{'end':<17}{'f, late mean':>13}   the end is"
    lines = [head, "-" * (len(head) + 6)]
    for landscape in LANDSCAPES:
        one = landscape.name == "line"
        for i, start in enumerate(landscape.starts):
            for method in METHODS:
                trajectory, late = results[method][landscape.name]
                x, y = trajectory[-1, i].tolist()
                lines.append(
                    f"{landscape.name:<10}{f'{start[0]:g}' if one else f'({start[0]:g}, {start[1]:g})':<12}"
                    f"{method:<21}{f'{x:.3f}' if one else f'({x:.3f}, {y:.3f})':<17}{late[i].item():>13.1e}   "
                    + verdict(landscape, trajectory[-1, i])
                )
    return "\n".join(lines)


# Adam has no decay here. It is drawn first, wide, so that it can be seen where another method takes the same way.
STYLES = {
    "Adam": {"color": pictures.NO_DECAY, "lw": 5, "alpha": 0.6},
    "AdamW": {"color": pictures.PLAIN, "lw": 2},
    "CautiousDecay(Adam)": {"color": pictures.CAUTIOUS, "lw": 2},
}


def draw(path: Path, results: Results, *, lam: float, steps: int) -> None:
    """The ring, the parabola and the line, with one colour per method."""
    figure, panels = pictures.panels(2, 2, 7.2)
    for axes, landscape in zip(panels, LANDSCAPES, strict=False):
        axes.set_title(f"f = {landscape.formula}")
        if landscape.name == "line":
            draw_line(axes, results, lam, steps)
        else:
            draw_plane(axes, landscape, results, lam)
    legend = panels[-1]
    legend.axis("off")
    handles = [
        *(pictures.line(method, **style) for method, style in STYLES.items()),
        pictures.line("minimisers of f", color=pictures.INK, lw=1),
        pictures.line("of these: neither |x|\nnor |y| can fall", color=pictures.GOLD, lw=7),
        pictures.line("start", color=pictures.INK, marker="o", lw=0, ms=6),
        pictures.line("end", color=pictures.INK, marker="*", lw=0, ms=11),
        pictures.line("x = y = 1/lam", color=pictures.INK, marker="s", lw=0, ms=8, fillstyle="none"),
    ]
    legend.legend(handles=handles, loc="center left", labelspacing=0.7)
    pictures.save(figure, path)


def draw_plane(axes: Axes, landscape: Landscape, results: Results, lam: float, *, front: bool = True) -> None:
    """Paths over the contours of f, with the curve of its minimisers and its Pareto front."""
    ends = torch.cat([results[method][landscape.name][0].flatten(0, 1) for method in METHODS])
    low, high = min(1.0, ends.min().item() - 0.5, 1 / lam - 0.4), max(5.2, ends.max().item() + 0.3)
    ticks = torch.linspace(low, high, 120, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    f = value(landscape, grid)
    axes.contourf(ticks, ticks, f, levels=[0, 0.1, 1, 5, 20, 1e9], colors=pictures.STEPS)
    c = landscape.c(grid[..., 0], grid[..., 1])
    if front:
        on_front = torch.where(is_pareto(landscape, grid), c, torch.nan)
        axes.contour(ticks, ticks, on_front, levels=[0], colors=pictures.GOLD, linewidths=7)
    axes.contour(ticks, ticks, c, levels=[0], colors=pictures.INK, linewidths=1)
    axes.plot(1 / lam, 1 / lam, "s", color=pictures.INK, fillstyle="none", ms=9, zorder=6)
    for method, style in STYLES.items():
        trajectory, _ = results[method][landscape.name]
        for i in range(len(landscape.starts)):
            x, y = trajectory[:, i].T
            axes.plot(x, y, **style)
            axes.plot(x[-1], y[-1], "*", color=style["color"], ms=12, mec=pictures.GROUND, mew=0.6, zorder=5)
    axes.plot(*zip(*landscape.starts, strict=True), "o", color=pictures.INK, ms=6, zorder=4)
    axes.grid(visible=False)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="x", ylabel="y", aspect="equal")
    axes.set(xticks=range(1, 6), yticks=range(1, 6))


def draw_line(axes: Axes, results: Results, lam: float, steps: int) -> None:
    """x against the step."""
    axes.axhline(5, color=pictures.INK, lw=1)
    for method, style in STYLES.items():
        trajectory, _ = results[method]["line"]
        for i in range(trajectory.shape[1]):
            axes.plot(trajectory[:, i, 0], **style)
    axes.axhline(1 / lam, color=pictures.INK, lw=1, linestyle=(0, (1, 3)))
    last = len(trajectory) - 1
    axes.text(last, 1 / lam + 0.15, "1/lam", ha="right")
    axes.set(ylabel="x", ylim=(0, 8.6), yticks=[0, 2, 5, 8], xlabel="step")
    axes.set(xlim=(0, last), xticks=[0, last / 2, last], xticklabels=[0, f"{steps // 2:,}", f"{steps:,}"])


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse(parser: argparse.ArgumentParser, smoke: dict, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; with --smoke, the values of `smoke` replace the defaults."""
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to check that it runs; no real results")
    if parser.parse_known_args(arguments)[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args(arguments)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Adam, AdamW and CautiousDecay(Adam) on functions with a curve of minimisers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=positive, default=0.5, help="decay strength; AdamW's box ends at 1/lam")
    add("--lr", type=positive, default=1e-3, help="learning rate, constant")
    add("--steps", type=count(1), default=40_000, help="steps of each run; lr * steps is how far it can go")
    add("--out", type=Path, default=Path("demo/toy_landscapes"), help="folder for the results")
    return parse(parser, SMOKE, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    with tqdm(total=len(METHODS) * options.steps, unit="step") as bar:
        for method in METHODS:
            bar.set_description(method)
            results[method] = run(method, lr=options.lr, lam=options.lam, steps=options.steps, bar=bar)
    draw(options.out / "trajectories.svg", results, lam=options.lam, steps=options.steps)
    seconds = time.perf_counter() - began
    setting = f"setting  lam {options.lam:g}, lr {options.lr:g}, betas (0.9, 0.999), {options.steps} steps, float64"
    legend = (
        f"f, late mean: over the last {min(LATE, options.steps)} steps; on it: within {NEAR} of the curve\n"
        "Pareto: no small move along the curve makes both |x| and |y| smaller"
    )
    summary = "\n\n".join([f"{setting}\n{machine_and_versions(seconds)}", table(results), legend])
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
