"""Which weights should decay? The masks of CautiousDecay, side by side, on the demo's language model.

    update      where the step makes the weight smaller: cautious weight decay
    gradient    where a step along the gradient alone would make it smaller, 1[g*x >= 0]
    random      as many weights of each tensor as "update" picks, but drawn at random
    all         every weight: AdamW's own decay
    no decay    none

Model, data, schedule and optimizer (AdamW) are those of language_model.py. All runs of one seed share the initial
weights and the batches; they differ in which weights decay. lam is the same for all masks, so a mask that picks half of
the weights decays half as much: compare "update" with "random", and give several values of --lam for the others.

    python examples/mask_ablation.py                                 # under three minutes, two cores
    python examples/mask_ablation.py --lam 0.3 1 3 --seeds 10        # a longer look
    python examples/mask_ablation.py --smoke                         # a few seconds

It prints a table with the spread between seeds, and writes into --out: summary.txt (the table), results.csv (one row
per run) and losses.svg.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import language_model as lm
import pictures
import torch
from toy_landscapes import machine_and_versions, parse

from cwd_wrap import CautiousDecay

MASKS = ("update", "gradient", "random", "all")
NONE = "no decay"
SMOKE = {"steps": 6, "seeds": 2, "width": 32, "layers": 1, "context": 16, "batch": 2, "lam": [1.0]}
OUTPUTS = ["summary.txt", "results.csv", "losses.svg"]


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What differs between runs; lam is 0 without decay."""

    mask: str
    lam: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    run: Run
    loss: float
    weight_norm: float


def train(run: Run, settings: lm.Settings) -> Outcome:
    """Train one model; the result holds the validation loss after the last step."""
    torch.set_num_threads(settings.threads)
    text = lm.load_text()
    torch.manual_seed(run.seed)
    model = lm.GPT(settings.width, settings.layers, settings.context)
    batches = torch.Generator().manual_seed(run.seed)
    optimizer = lm.make_optimizer(model, settings, run.lam, cautious=False)
    if run.mask != NONE:
        optimizer = CautiousDecay(optimizer, mask=run.mask)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lm.schedule(step, settings.steps))
    for _ in range(settings.steps):
        starts = torch.randint(len(text.train) - settings.context, (settings.batch,), generator=batches)
        loss = model.loss(*lm.windows(text.train, starts, settings.context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        lm.report_progress()
    weight_norm = math.hypot(*(w.norm().item() for w in lm.decayed_weights(model)))
    return Outcome(run, lm.validate(model, text.validation, settings), weight_norm)


# ------------------------------------------------------------------------------------------------
# Results: table, sentences, picture
# ------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, float], list[Outcome]]  # by mask and lam, each in the order of seeds


def cells(outcomes: Sequence[Outcome]) -> Cells:
    """Outcomes by (mask, lam)."""
    return lm.grouped(outcomes, lambda o: (o.run.mask, o.run.lam))


def spread(values: Sequence[float]) -> float:
    """The standard deviation, n-1 in the denominator; nan for one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def against(mine: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[float]:
    """The differences in loss, seed by seed."""
    return [a.loss - b.loss for a, b in zip(mine, theirs, strict=True)]


def table(grouped: Cells) -> str:
    """One line for each mask and lam."""
    head = f"{'mask':<10}{'lam':>6}{'val loss':>10}{'sd':>8}{'minus none':>12}{'sd':>8}{'norm':>8}  val loss by seed"
    lines = [head, "-" * (len(head) + 8)]
    none = grouped[NONE, 0.0]
    for (mask, lam), group in sorted(grouped.items(), key=lambda item: (item[0][1], [NONE, *MASKS].index(item[0][0]))):
        losses, gains = [o.loss for o in group], against(group, none)
        of_gains = f"{statistics.fmean(gains):>+12.4f}{spread(gains):>8.4f}" if mask != NONE else f"{'-':>12}{'-':>8}"
        lines.append(
            f"{mask:<10}{f'{lam:g}' if lam else '-':>6}{statistics.fmean(losses):>10.4f}{spread(losses):>8.4f}"
            f"{of_gains}{statistics.fmean(o.weight_norm for o in group):>8.2f}  "
            + " ".join(f"{loss:.4f}" for loss in losses)
        )
    return "\n".join(lines)


LEGEND = """\
val loss: nats per byte on held-out files, mean over seeds; sd: standard deviation between seeds
minus none: the loss minus that without decay at the same seed, mean and sd; norm: length of all decayed weights"""


def findings(grouped: Cells) -> list[str]:
    """At each lam, the cautious mask against each of the others, seed by seed."""
    sentences = []
    for lam in sorted({lam for _, lam in grouped if lam}):
        parts = []
        for other in ("gradient", "random", "all", NONE):
            differences = against(grouped["update", lam], grouped[other, lam if other != NONE else 0.0])
            lower = sum(d < 0 for d in differences)
            parts.append(
                f"{other} {statistics.fmean(differences):+.4f} (sd {spread(differences):.4f}, "
                f"lower at {lower} of {len(differences)} seeds)"
            )
        sentences.append("\n  ".join([f"lam {lam:g}: loss with update minus that with", *parts]))
    return sentences


COLOURS = {
    "update": pictures.CAUTIOUS,
    "all": pictures.PLAIN,
    "gradient": pictures.OTHERS[1],
    "random": pictures.OTHERS[2],
}


def draw(path: Path, grouped: Cells) -> None:
    """The loss minus that without decay: one point per seed, and a bar at the mean."""
    lams = sorted({lam for _, lam in grouped if lam})
    none = grouped[NONE, 0.0]
    figure, panels = pictures.panels(len(lams), 1, 0.6 + 2.9 * len(lams))
    for axes, lam in zip(panels, lams, strict=True):
        pictures.no_decay(axes, 0)
        for i, mask in enumerate(MASKS):
            differences = against(grouped[mask, lam], none)
            at = [i + 0.07 * (j - (len(differences) - 1) / 2) for j in range(len(differences))]
            axes.plot(at, differences, "o", color=COLOURS[mask], ms=6, alpha=0.75)
            mean = statistics.fmean(differences)
            axes.plot([i - 0.3, i + 0.3], [mean, mean], color=COLOURS[mask], lw=3)
        names = [{"update": "update (CWD)", "all": "all (plain)"}.get(mask, mask) for mask in MASKS]
        axes.set(xticks=range(len(MASKS)), xticklabels=names, xlim=(-0.6, len(MASKS) - 0.4))
        axes.set_title(f"lam {lam:g}: validation loss minus that without decay")
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
    panels[0].legend(loc="upper left")
    pictures.save(figure, path)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Compare the masks of CautiousDecay on a small language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lam", type=lm.positive, nargs="+", default=[0.3, 2.0], help="decay strengths, the same for all masks")
    add("--seeds", type=lm.count(2), default=5, help="runs of each kind, with seeds 0, 1, ...")
    add("--lr", type=lm.positive, default=4e-3, help="the schedule's peak learning rate")
    add("--steps", type=lm.count(2), default=400, help="training steps of each run")
    add("--batch", type=lm.count(1), default=16, help="windows in a batch")
    add("--context", type=lm.count(1), default=32, help="bytes in a window")
    add("--width", type=lm.count(lm.HEAD_WIDTH, lm.HEAD_WIDTH), default=64, help="features in the model")
    add("--layers", type=lm.count(1), default=1, help="blocks in the model")
    add("--jobs", type=lm.count(1), default=lm.usable_cpus(), help="runs at a time, each in its own process")
    add("--threads", type=lm.count(1), default=1, help="threads of each run")
    add("--out", type=Path, default=Path("demo/mask_ablation"), help="folder for the results")
    options = parse(parser, SMOKE, arguments)
    options.lam = sorted(set(options.lam))
    return options


def say(outcome: Outcome) -> str:
    """One line when a run is done."""
    run = outcome.run
    return f"{run.mask:<10} lam {run.lam:<5g} seed {run.seed}  loss {outcome.loss:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    began = time.perf_counter()
    same = {"optimizer": "AdamW"} | vars(options)
    settings = lm.Settings(**{name: same[name] for name in lm.Settings.__annotations__})
    # The runs of a seed are neighbours in the list, so they run at about the same time.
    runs = [
        run
        for seed in range(options.seeds)
        for run in [Run(NONE, 0.0, seed), *(Run(mask, lam, seed) for lam in options.lam for mask in MASKS)]
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = lm.in_processes(train, runs, settings, min(options.jobs, len(runs)), settings.steps, say)

    grouped = cells(outcomes)
    header = ["mask", "lam", "seed", "val_loss", "weight_norm"]
    rows = [[o.run.mask, o.run.lam, o.run.seed, o.loss, o.weight_norm] for o in outcomes]
    lm.write_csv(options.out / "results.csv", header, rows)
    draw(options.out / "losses.svg", grouped)
    size = sum(p.numel() for p in lm.GPT(settings.width, settings.layers, settings.context).parameters())
    setting = (
        f"setting  {size:,} parameters: {settings.layers} layer(s), width {settings.width}, "
        f"context {settings.context} bytes; "
        f"{settings.steps} steps of {settings.batch} windows, AdamW, peak lr {settings.lr:g}; {options.seeds} seeds"
    )
    seconds = time.perf_counter() - began
    parts = [f"{setting}\n{machine_and_versions(seconds)}", table(grouped), LEGEND, "\n".join(findings(grouped))]
    summary = "\n\n".join(parts)
    (options.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nwritten to {options.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
