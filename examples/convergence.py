"""Loss against steps without decay, with plain and with cautious decay, as in Figure 4 of arXiv 2510.12402.

    none        no decay
    plain       decoupled decay of every weight, x <- x - eta*(u + lam*x)
    cautious    CautiousDecay, x <- x - eta*(u + lam*1[u*x >= 0]*x)

Task, model, schedule and dose (lam * lr * steps) are those of lambda_sweep.py. All runs of one seed share the training
set, the initial weights and the batches. Tune the two doses first, each for its own arm, with lambda_sweep.py and on
other seeds: arms at untuned doses cannot be compared.

"Steps to a loss" within one run means little. The schedule lowers the learning rate towards the end of the run, where
the loss falls fastest, and a shorter run would have its own schedule. Compare the losses at the end of runs of several
lengths, each with its own full schedule: --lengths trains those. The dose is the same at each length, so lam is smaller
in a longer run.

    python examples/convergence.py                                   # one length, a minute, two cores
    python examples/convergence.py --lengths 600 1200 2400           # the fair comparison
    python examples/convergence.py --plain-dose 1 --cautious-dose 2 --losses 2 1.9
    python examples/convergence.py --device cuda --scale 8 --lengths 2000 4000 8000 --jobs 1    # a larger model
    python examples/convergence.py --smoke                           # a few seconds

With --scale above 1 the text is that of all Python files in site-packages, hundreds of MB beside torch and
transformers. It can be stopped at any time: finished runs are in --out/curves.csv, one row per (run, step), and are not
repeated. It prints its tables and also writes summary.txt and loss.svg. Needs: pip install cwd-wrap[results]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import lambda_sweep as ls
import language_model as lm
import pictures
from mask_ablation import spread
from toy_landscapes import machine_and_versions, parse

ARMS = (ls.NONE, "plain", "cautious")
MARGINS = (0.0, 0.02, 0.1)  # above the mean final loss of the plain arm, in nats
SMOKE = {"seeds": 2, "lengths": [3, 6], "every": 2, "plain_dose": 0.1, "cautious_dose": 0.1}
OUTPUTS = ["curves.csv", "summary.txt", "loss.svg"]
Curve = dict[int, float]  # validation loss by step, or by length


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run(ls.Cell):
    """What identifies a run: the first columns of the file. ``steps`` is the run's length."""

    steps: int
    every: int
    scale: int

    @property
    def lam(self) -> float:
        return self.dose / (self.lr * self.steps)

    @property
    def key(self) -> tuple[str, ...]:
        """The values in the file."""
        return tuple(map(str, astuple(self)))


def train(run: Run, device: str) -> tuple[Run, Curve]:
    """Train one model, and measure it every ``run.every`` steps and after the last one."""
    model, make_step = ls.start(run, run.lam, run.steps, run.scale, device, None)
    held_out = ls.TASKS[run.task].held_out("validation")
    curve = {}
    for step in range(1, run.steps + 1):
        make_step()
        if step % run.every == 0 or step == run.steps:
            curve[step], _ = ls.evaluate(model, held_out, device)
        lm.report_progress()
    return run, curve


# ------------------------------------------------------------------------------------------------
# Many runs: finished ones are in a file
# ------------------------------------------------------------------------------------------------

COLUMNS = [field.name for field in fields(Run)]
HEADER = ",".join([*COLUMNS, "step", "validation"]) + "\n"


def read(path: Path) -> dict[tuple[str, ...], Curve]:
    """The curves of finished runs. Rows of a run that was cut off are removed from the end of the file."""
    if not path.exists():
        return {}
    header, *lines = path.read_bytes().decode().splitlines(keepends=True) or [""]
    if header != HEADER:
        raise SystemExit(f"{path} begins with {header.strip()!r}, not with {HEADER.strip()!r}; give another --out")
    curves: dict[tuple[str, ...], Curve] = {}
    finished = {}
    at = size = len(header)
    for line in lines:
        at += len(line)
        if line.endswith("\n"):
            *key, step, loss = line.strip().split(",")
            curve = curves.setdefault(tuple(key), {})
            curve[int(step)] = float(loss)
            if step == key[COLUMNS.index("steps")]:
                finished[tuple(key)], size = curve, at
    os.truncate(path, size)
    return finished


def append(path: Path, run: Run, curve: Curve) -> None:
    """Add the rows of one run at once; the first run makes the file."""
    rows = [",".join([*run.key, str(step), f"{loss:.6g}"]) + "\n" for step, loss in curve.items()]
    with path.open("a", newline="") as file:
        file.write("".join(rows) if file.tell() else HEADER + "".join(rows))


def carry_out(runs: Sequence[Run], path: Path, device: str, jobs: int) -> dict[Run, Curve]:
    """Train the runs that are not in the file yet, one length after the other; return the curves of all runs."""
    finished = read(path)

    def record(outcome: tuple[Run, Curve]) -> str:
        run, curve = outcome
        append(path, run, curve)
        return f"{run.steps:>6} steps  {run.arm:<9} seed {run.seed}  loss {curve[run.steps]:.4f}"

    for length in sorted({run.steps for run in runs}):
        todo = [run for run in runs if run.steps == length and run.key not in finished]
        if todo:
            lm.in_processes(train, todo, device, min(jobs, len(todo)), length, record)
    finished = read(path)
    return {run: finished[run.key] for run in runs}


# ------------------------------------------------------------------------------------------------
# Results: tables and a picture
# ------------------------------------------------------------------------------------------------

ByArm = dict[str, list[Curve]]  # each list in the order of seeds


def inside(curves: dict[Run, Curve], length: int) -> ByArm:
    """The curves of the runs of one length."""
    return {arm: [c for run, c in curves.items() if (run.arm, run.steps) == (arm, length)] for arm in ARMS}


def ends(curves: dict[Run, Curve], lengths: Sequence[int]) -> ByArm:
    """Each run's final loss by length, as curves in which the lengths are the steps."""
    by_length = [inside(curves, length) for length in lengths]
    last = {arm: [[curve[max(curve)] for curve in arms[arm]] for arms in by_length] for arm in ARMS}
    return {arm: [dict(zip(lengths, losses, strict=True)) for losses in zip(*last[arm], strict=True)] for arm in ARMS}


def mean_curve(some: Sequence[Curve]) -> Curve:
    """The mean over seeds at each step."""
    return dict(zip(*lm.mean_curve(some), strict=True))


def crossing(curve: Curve, loss: float) -> float | None:
    """The step at which the curve first reaches ``loss``, on a straight line between its points; None if never.

    A curve that begins at or below ``loss`` gives its first step: it reached the loss there or before.
    """
    before = None
    for step, value in curve.items():
        if value <= loss:
            if before is None:
                return float(step)
            earlier, above = before
            return earlier + (step - earlier) * (above - loss) / (above - value)
        before = step, value
    return None


def in_words(curve: Curve, at: float | None) -> str:
    """A crossing as text."""
    if at is None:
        return "not reached"
    return f"<= {at:.0f}" if at == min(curve) else f"{at:.0f}"


def final_table(curves: dict[Run, Curve], lengths: Sequence[int]) -> str:
    """A line for each length and arm: the loss at the end, and its difference to plain decay at the same seed."""
    head = f"{'steps':>6} {'arm':<9}{'dose':>5}{'lam':>9}{'val loss':>10}{'sd':>8}"
    head += f"{'minus plain':>13}{'sd':>8}{'lower at':>10}"
    lines = [head, "-" * len(head)]
    by_arm = ends(curves, lengths)
    for length in lengths:
        plain = [curve[length] for curve in by_arm["plain"]]
        for arm in ARMS:
            run = next(run for run in curves if (run.arm, run.steps) == (arm, length))
            losses = [curve[length] for curve in by_arm[arm]]
            line = f"{length:>6} {arm:<9}{run.dose:>5g}{run.lam:>9.3g}{statistics.fmean(losses):>10.4f}"
            line += f"{spread(losses):>8.4f}"
            if arm != "plain":
                gaps = [a - b for a, b in zip(losses, plain, strict=True)]
                lower = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
                line += f"{statistics.fmean(gaps):>+13.4f}{spread(gaps):>8.4f}{lower:>10}"
            lines.append(line)
    return "\n".join(lines)


def speed_table(title: str, by_arm: ByArm, losses: Sequence[float]) -> str:
    """A line for each loss and arm: when the mean over seeds reaches the loss, and when each seed does."""
    head = f"{'val loss':>8}  {'arm':<9}{title:>12}{'of plain':>10}  by seed"
    lines = [head, "-" * (len(head) + 16)]
    means = {arm: mean_curve(some) for arm, some in by_arm.items()}
    for loss in losses:
        at = {arm: crossing(mean, loss) for arm, mean in means.items()}
        known = {arm for arm in ARMS if at[arm] not in {None, min(means[arm])}}
        for arm in ARMS:
            ratio = f"{at[arm] / at['plain']:.2f}" if {arm, "plain"} <= known else "-"
            seeds = ", ".join(in_words(curve, crossing(curve, loss)) for curve in by_arm[arm])
            lines.append(f"{loss:>8.4f}  {arm:<9}{in_words(means[arm], at[arm]):>12}{ratio:>10}  {seeds}")
    return "\n".join(lines)


LEGEND = """\
val loss: nats at the end of a run, mean over seeds; sd: standard deviation between seeds
minus plain: the loss minus that of plain decay at the same seed, mean and sd; lower at: at how many seeds
steps, length: where the mean over seeds comes down to the loss, on straight lines between what was measured
of plain: that, as a share of what plain decay needs"""


def draw(path: Path, curves: dict[Run, Curve], lengths: Sequence[int], loss: float) -> None:
    """The curves of the longest runs with their crossings of ``loss``; with several lengths, where all runs end."""
    by_label = {"step": inside(curves, lengths[-1])}
    if len(lengths) > 1:
        by_label["length of the run"] = ends(curves, lengths)
    figure, panels = pictures.panels(len(by_label), 1, 0.8 + 3.4 * len(by_label))
    for axes, (label, by_arm) in zip(panels, by_label.items(), strict=True):
        for arm, some in by_arm.items():
            mean, colour = mean_curve(some), ls.COLOURS[arm]
            axes.plot(list(mean), list(mean.values()), color=colour, marker=".", label=ls.LABELS[arm])
            low, high = ([pick(curve[step] for curve in some) for step in mean] for pick in (min, max))
            axes.fill_between(list(mean), low, high, color=colour, alpha=0.15, lw=0)
            at = crossing(mean, loss)
            if at is not None:
                axes.plot([at], [loss], color=colour, marker="D", ms=9, mec=pictures.GROUND)
        axes.axhline(loss, color=pictures.INK, lw=1, ls=":")
        axes.set(xlabel=label, ylabel="validation loss (nats)")
    # The loss falls far in the first steps: show the part where the arms differ.
    late = [
        loss for some in by_label["step"].values() for curve in some for loss in [*curve.values()][len(curve) // 4 :]
    ]
    late = [loss for loss in late if math.isfinite(loss)]
    if late:
        panels[0].set_ylim(min(late) - 0.03, max(late) + 0.1)
    if len(panels) > 1:
        panels[1].set_xscale("log")
        panels[1].set_xticks(lengths, map(str, lengths))
        panels[1].minorticks_off()
    panels[0].legend()
    panels[0].set_title(f"bands: lowest to highest seed; diamonds: mean at {loss:.4f}")
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=ls.TASKS, default="bytes-once")
    add("--optimizer", choices=ls.OPTIMIZERS, default="AdamW")
    add("--lr", type=lm.positive, help="peak learning rate; by default one that suits small models")
    add("--plain-dose", type=lm.positive, default=1.0, help="lam * lr * steps of the plain arm")
    add("--cautious-dose", type=lm.positive, default=1.0, help="lam * lr * steps of the cautious arm")
    add("--lengths", type=lm.count(1), nargs="+", help="steps of the runs; by default one length, the task's own")
    add(
        "--losses",
        type=lm.positive,
        nargs="+",
        help="losses for the steps to a loss; by default plain decay's final one and two above it",
    )
    add("--seeds", type=lm.count(1), default=3)
    add("--every", type=lm.count(1), default=50, help="steps between two validations")
    add("--device", default="cpu")
    add("--scale", type=lm.count(1), default=1, help="factor on the model's width, for a card")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, one thread each")
    add("--out", type=Path, default=Path("demo/convergence"))
    options = parse(parser, SMOKE, arguments)
    options.lr = options.lr or ls.OPTIMIZERS[options.optimizer]
    options.lengths = sorted(set(options.lengths or [ls.TASKS[options.task].steps]))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    o = parse_arguments(arguments)
    began = time.perf_counter()
    doses = {ls.NONE: 0.0, "plain": o.plain_dose, "cautious": o.cautious_dose}
    runs = [
        Run(o.task, o.optimizer, o.lr, arm, doses[arm], seed, length, o.every, o.scale)
        for length in o.lengths
        for seed in range(o.seeds)
        for arm in ARMS
    ]
    o.out.mkdir(parents=True, exist_ok=True)
    curves = carry_out(runs, o.out / "curves.csv", o.device, o.jobs)

    by_length = ends(curves, o.lengths)
    last = mean_curve(by_length["plain"])[o.lengths[-1]]
    losses = sorted(o.losses or [last + margin for margin in MARGINS], reverse=True)
    title = f"{o.task}, {o.optimizer}, peak lr {o.lr:g}, scale {o.scale}; {o.seeds} seed(s)"
    parts = [
        f"setting  {title}; {o.device}\n{machine_and_versions(time.perf_counter() - began)}",
        final_table(curves, o.lengths),
        f"Inside the runs of {o.lengths[-1]} steps (one schedule: says little):",
        speed_table("steps", inside(curves, o.lengths[-1]), losses),
    ]
    if len(o.lengths) > 1:
        parts += [
            f"Over runs of {', '.join(map(str, o.lengths))} steps, each at its end:",
            speed_table("length", by_length, losses),
        ]
    summary = "\n\n".join([*parts, LEGEND])
    draw(o.out / "loss.svg", curves, o.lengths, losses[len(losses) // 2])
    (o.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {o.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
