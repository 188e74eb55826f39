"""The energy H that falls under CautiousDecay, for each optimizer along its path.

In the limit of small steps an optimizer follows a differential equation, and cautious decay has an energy H that can
only fall (arXiv 2510.12402, Table 1): the loss f itself for SGD, f and terms of the momentum for the others. Here the
real optimizers, in CautiousDecay, minimise a function of six variables from several starts, twice, with step h and with
h/10, and H is computed at every step. A step of finite size can raise H a little where a mask changes; if the theorem
and the code are right, the total rise goes to 0 with h. In two controls, outside the theorem, H should rise:

    plain      decay of all weights, mask="all"
    inverted   decay where the step makes the weight larger: the rule with its sign wrong

    python examples/lyapunov.py                           # under a minute, one core
    python examples/lyapunov.py --lam 2 --step 0.005
    python examples/lyapunov.py --smoke                   # a few seconds

It prints how much H rose and fell, and writes into --out: summary.txt (the table) and energies.svg.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pictures
import torch
from language_model import count, positive
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from toy_landscapes import machine_and_versions, parse
from tqdm import tqdm

from cwd_wrap import CautiousDecay, rules

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 6  # variables of f
DECAYS = ("cautious", "plain", "inverted")
FINER = 10  # the second walk's step is the first's divided by this
BETA = 2.0  # rate of SGDM's momentum
ALPHA, GAMMA = 1.0, 0.5  # rates of Adam's and Lion's averages; the theorem needs 0 < GAMMA <= 4*ALPHA of Adam
SOFT = 0.1  # where the smooth K of Lion-K turns from a parabola into |m|
SMOKE = {"time": 0.4, "starts": 2}
OUTPUTS = ["summary.txt", "energies.svg"]


# ------------------------------------------------------------------------------------------------
# The function, and one optimizer that torch does not have
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valley:
    """A bowl around `centre` with ripples, f = (x-c)'A(x-c)/2 + sum(sin(2x)^2)/2: not convex, never below 0."""

    matrix: Tensor
    centre: Tensor

    def f(self, x: Tensor) -> Tensor:
        """One value for each row of x."""
        away = x - self.centre
        return 0.5 * ((away @ self.matrix) * away).sum(-1) + 0.5 * (2 * x).sin().square().sum(-1)


def make_valley(seed: int) -> Valley:
    """A bowl in a random direction, with curvatures from 0.3 to 3, and a centre off zero."""
    random = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=random, dtype=torch.float64))
    curvatures = torch.logspace(math.log10(0.3), math.log10(3), SIZE, dtype=torch.float64)
    return Valley(turn @ curvatures.diag() @ turn.T, torch.randn(SIZE, generator=random, dtype=torch.float64))


class LionK(Optimizer):
    """x <- x - lr * gradK(m) after m <- m + rate*(g - m): Lion with one average, for K = |m| or a smooth K."""

    def __init__(self, params, lr: float, rate: float, soft: float) -> None:
        super().__init__(params, {"lr": lr, "rate": rate, "soft": soft})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, group["rate"])
                p.sub_(group["lr"] * slope_of_k(m, group["soft"]))


def k(m: Tensor, soft: float) -> Tensor:
    """|m|, or sqrt(m^2 + soft^2)."""
    return (m.square() + soft**2).sqrt()


def slope_of_k(m: Tensor, soft: float) -> Tensor:
    """Its derivative, which has the sign of m."""
    return m / k(m, soft) if soft else m.sign()


# ------------------------------------------------------------------------------------------------
# The energies: each takes f, x, the optimizer's state and lam, and returns one H for each row
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """An optimizer that takes steps of size h along a differential equation, and its energy."""

    name: str
    formula: str
    make: Callable[[Tensor, float], Optimizer]
    energy: Callable[[Tensor, Tensor, dict, float], Tensor]  # f, x, state, lam


def rising_part(m: Tensor, x: Tensor) -> Tensor:
    """|(m*x)+|_1."""
    return (m * x).clamp(min=0).sum(-1)


def energy_of_sgdm(f: Tensor, x: Tensor, state: dict, lam: float) -> Tensor:
    m = state["momentum_buffer"]
    return BETA * f + 0.5 * m.square().sum(-1) + lam * rising_part(m, x)


def energy_of_lion(soft: float) -> Callable[[Tensor, Tensor, dict, float], Tensor]:
    def energy(f: Tensor, x: Tensor, state: dict, lam: float) -> Tensor:
        m = state["m"]  # minus the paper's m, which is added to x
        return ALPHA * f + k(m, soft).sum(-1) + lam * rising_part(m, x)

    return energy


def energy_of_adam(f: Tensor, x: Tensor, state: dict, lam: float) -> Tensor:
    m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
    beta1, beta2, eps = state["constants"]
    alpha_t, gamma_t = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
    preconditioner = (gamma_t * v).sqrt() + eps
    return ALPHA * f + (alpha_t * m.square() / (2 * preconditioner)).sum(-1) + lam * rising_part(m, x)


SYSTEMS = (
    System("SGD", "f", lambda x, h: SGD([x], lr=h), lambda f, x, state, lam: f),
    System(
        "SGDM",
        "β f + |m|²/2 + λ|(mx)₊|₁",
        # m <- (1 - h*BETA)*m + h*BETA*g, and x <- x - h*m
        lambda x, h: SGD([x], lr=h, momentum=1 - h * BETA, dampening=1 - h * BETA),
        energy_of_sgdm,
    ),
    System("Lion", "α f + |m|₁ + λ|(mx)₊|₁", lambda x, h: LionK([x], h, h * ALPHA, 0.0), energy_of_lion(0.0)),
    System("Lion-K", "α f + K(m) + λ|(mx)₊|₁", lambda x, h: LionK([x], h, h * ALPHA, SOFT), energy_of_lion(SOFT)),
    System(
        "Adam",
        "α f + |αₜm²/(2h)|₁ + λ|(mx)₊|₁",
        lambda x, h: Adam([x], lr=h, betas=(1 - h * ALPHA, 1 - h * GAMMA)),
        energy_of_adam,
    ),
)


# ------------------------------------------------------------------------------------------------
# The walks
# ------------------------------------------------------------------------------------------------


def walk(
    system: System, decay: str, *, h: float, lam: float, time: float, starts: int, seed: int, bar: tqdm | None = None
) -> Tensor:
    """H after each step, (steps, starts). All starts are rows of one tensor, since the optimizers are elementwise."""
    valley = make_valley(seed)
    random = torch.Generator().manual_seed(seed + 1)
    x = (3 * torch.randn(starts, SIZE, generator=random, dtype=torch.float64)).requires_grad_()
    base = optimizer = system.make(x, h)
    if decay != "inverted":
        optimizer = CautiousDecay(base, lam=lam, mask="update" if decay == "cautious" else "all")
    energies = []
    gradient_of_f = gradient(valley, x)
    for _ in range(max(2, round(time / h))):
        x.grad = gradient_of_f[1]
        before = x.detach().clone()
        optimizer.step()
        if decay == "inverted":
            grew = ~rules.moved_towards_zero(before, x.detach(), strict=False)
            x.data = rules.decay(x.detach(), before, grew, h * lam)
        gradient_of_f = gradient(valley, x)
        state = dict(base.state[x])
        if isinstance(base, Adam):
            state["constants"] = (*base.defaults["betas"], base.defaults["eps"])
        energies.append(system.energy(gradient_of_f[0], x.detach(), state, lam))
        if bar is not None:
            bar.update()
    return torch.stack(energies)


def gradient(valley: Valley, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and its gradient, at each row."""
    f = valley.f(x)
    return f.detach(), torch.autograd.grad(f.sum(), x)[0]


@dataclass(frozen=True)
class Change:
    """How H changed along one walk."""

    rise: float  # all steps upwards divided by all downwards, of the start where that is largest
    steps: float  # share of all steps, over all starts, that went upwards


def change(energies: Tensor) -> Change:
    """Sum up the ups and downs. Differences that rounding can make (1e-14 of H) count as none."""
    steps = energies.diff(dim=0)
    ups = torch.where(steps > 1e-14 * energies[1:].abs(), steps, 0.0)
    falls = (ups - steps).sum(0).clamp(min=0)
    return Change((ups.sum(0) / falls).max().item(), (ups > 0).double().mean().item())


# ------------------------------------------------------------------------------------------------
# Results: table and picture
# ------------------------------------------------------------------------------------------------

Results = dict[tuple[str, str, float], Tensor]


def table(results: Results, steps: Sequence[float]) -> str:
    """One line for each optimizer and decay."""
    columns = "".join(f"{f'rise h={h:g}':>14}{'steps up':>10}" for h in steps)
    head = f"{'optimizer':<11}{'decay':<10}{'H, first':>9}{'last':>9}{columns}"
    lines = [head, "-" * len(head)]
    for system in SYSTEMS:
        for decay in DECAYS:
            energies = results[system.name, decay, steps[-1]].mean(1)
            line = f"{system.name:<11}{decay:<10}{energies[0].item():>9.3f}{energies[-1].item():>9.3f}"
            for h in steps:
                c = change(results[system.name, decay, h])
                line += f"{c.rise:>14.1e}{c.steps:>10.2%}"
            lines.append(line)
    return "\n".join(lines)


LEGEND = """\
H, first and last: mean over the starts, on the walk with the small step
rise: all upward steps of H together, divided by all downward ones, of the start where that is largest
steps up: share of steps, over all starts, on which H rose"""

COLOURS = {"cautious": pictures.CAUTIOUS, "plain": pictures.PLAIN, "inverted": pictures.OTHERS[1]}
MARKERS = {"SGD": "o", "SGDM": "s", "Lion": "^", "Lion-K": "v", "Adam": "D"}


def draw(path: Path, results: Results, steps: Sequence[float], time: float) -> None:
    """H against time for each optimizer, and how much it rises against h."""
    figure, panels = pictures.panels(3, 2, 9.5)
    for axes, system in zip(panels, SYSTEMS, strict=False):
        for decay in DECAYS:
            energies = results[system.name, decay, steps[-1]]
            every = max(1, len(energies) // 200)
            times = torch.linspace(0, time, len(energies))[::every]
            shares = (energies / energies[0])[::every]
            axes.plot(times, shares[:, :4], color=COLOURS[decay], lw=1.5)
        axes.set_title(system.name)
        axes.set(xlabel="time", yscale="log")
        axes.axhline(1, color=pictures.INK, lw=1, linestyle=":")
    for axes in panels[0], panels[2], panels[4]:
        axes.set_ylabel("H / H at the start")
    draw_rises(panels[-1], results, steps)
    lines = [pictures.line(f"{decay} decay", color=COLOURS[decay]) for decay in DECAYS]
    figure.legend(handles=lines, loc="outside upper center", ncols=3, columnspacing=1, handlelength=1.2)
    pictures.save(figure, path)


def draw_rises(axes: Axes, results: Results, steps: Sequence[float]) -> None:
    """All upward steps of H divided by all downward ones, against h."""
    rises_of = {
        (system.name, decay): [change(results[system.name, decay, h]).rise for h in steps]
        for system in SYSTEMS
        for decay in DECAYS
    }
    seen = [rise for rises in rises_of.values() for rise in rises if 0 < rise < math.inf]
    floor, ceiling = min(seen, default=1e-6) / 3, max(seen, default=1.0) * 3  # where 0 and inf are drawn
    for (name, decay), rises in rises_of.items():
        drawn = [min(max(rise, floor), ceiling) for rise in rises]
        axes.plot(steps, drawn, color=COLOURS[decay], marker=MARKERS[name], lw=1.2, ms=6)
    axes.set(xscale="log", yscale="log", xlabel="step size h", ylim=(floor / 1.5, ceiling * 1.5))
    axes.set(xticks=sorted(steps), xticklabels=[f"{h:g}" for h in sorted(steps)], title="rises of H / falls of H")
    axes.minorticks_off()
    axes.margins(x=0.3)
    marks = [pictures.line(name, color=pictures.INK, marker=m, lw=0, ms=6) for name, m in MARKERS.items()]
    axes.legend(handles=marks, loc="lower right", handletextpad=0, labelspacing=0.2, borderaxespad=0)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the energies that fall under cautious decay, along the optimizers' own steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=positive, default=1.0, help="decay strength")
    add("--step", type=positive, default=0.02, help=f"h, the learning rate; the second walk's is h/{FINER}")
    add("--time", type=positive, default=10.0, help="where a walk ends: steps times h")
    add("--starts", type=count(1), default=16, help="walks of each kind, from random starts")
    add("--seed", type=count(0), default=0, help="decides the function and the starts")
    add("--out", type=Path, default=Path("demo/lyapunov"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    if options.step * max(ALPHA, BETA, GAMMA) >= 1:
        parser.error(f"--step {options.step:g}: the averages need one below {1 / max(ALPHA, BETA, GAMMA):g}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk, print, write."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = [options.step, options.step / FINER]
    same = {"lam": options.lam, "time": options.time, "starts": options.starts, "seed": options.seed}
    results: Results = {}
    total = len(SYSTEMS) * len(DECAYS) * sum(max(2, round(options.time / h)) for h in steps)
    with tqdm(total=total, unit="step") as bar:
        for system in SYSTEMS:
            for decay in DECAYS:
                bar.set_description(f"{system.name}, {decay}")
                for h in steps:
                    results[system.name, decay, h] = walk(system, decay, h=h, bar=bar, **same)
    draw(options.out / "energies.svg", results, steps, options.time)
    seconds = time.perf_counter() - began
    setting = (
        f"setting  lam {options.lam:g}, h {' and '.join(f'{h:g}' for h in steps)}, time {options.time:g}, "
        f"{options.starts} starts, seed {options.seed}, float64"
    )
    summary = "\n\n".join([f"{setting}\n{machine_and_versions(seconds)}", table(results, steps), LEGEND])
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
