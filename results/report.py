"""Makes docs/results.md, its pictures and that of the README from runs.csv, chosen.csv and the text in page.md.

python results/report.py
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
sys.path.insert(0, str(HERE.parent / "examples"))

import lambda_sweep as ls  # noqa: E402
import pictures  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESAMPLES = 10_000


# ------------------------------------------------------------------------------------------------
# Statistics, as in docs/protocol.md
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One arm of a setting, with one row per lam (the first without decay) and one column per seed."""

    lams: list[float]
    cells: list[list[ls.Outcome]]

    def of(self, name: str) -> Tensor:
        """A measured number, (lams, seeds)."""
        return torch.tensor([[getattr(outcome, name) for outcome in cell] for cell in self.cells], dtype=torch.float64)

    @property
    def best(self) -> int:
        """The row of the lowest mean validation loss."""
        return int(chosen(self.of("validation")))

    def __add__(self, other: Arm) -> Arm:
        """The rows of both."""
        return Arm(self.lams + other.lams[1:], self.cells + other.cells[1:])


def chosen(validation: Tensor) -> Tensor:
    """The row of the lowest mean over the last dimension; NaN counts as infinite."""
    return validation.mean(-1).nan_to_num(nan=math.inf).argmin(0)


@dataclass(frozen=True)
class Difference:
    """Test losses of one choice minus those of another, paired by seed."""

    mean: float
    low: float
    high: float
    lower: int
    seeds: int

    def __str__(self) -> str:
        text = f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {self.lower}/{self.seeds}"
        return f"**{text}**" if self.verdict else text

    @property
    def verdict(self) -> str:
        """Which side of 0 the interval is on, if it is on one."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else ""


def difference(first: Arm, second: Arm, *, same_row: bool = False) -> Difference:
    """``first`` minus ``second``, each at its best lam, or both at the best of the first.

    The interval holds the middle 95 % of resamples of the seeds. Each resample chooses the lams anew.
    """
    validation, test = zip(*((arm.of("validation"), arm.of("test")) for arm in (first, second)), strict=True)
    seeds = test[0].shape[1]

    def means(columns: Tensor) -> Tensor:
        rows = [chosen(losses[:, columns]) for losses in validation]
        rows[1] = rows[0] if same_row else rows[1]
        one, other = (losses[row.unsqueeze(-1), columns] for losses, row in zip(test, rows, strict=True))
        return (one - other).mean(-1)

    resamples = torch.randint(seeds, (RESAMPLES, seeds), generator=torch.Generator().manual_seed(0))
    low, high = means(resamples).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    here = test[0][first.best] - test[1][first.best if same_row else second.best]
    return Difference(here.mean().item(), low, high, int((here < 0).sum()), seeds)


def flat(arm: Arm) -> tuple[float, float]:
    """The smallest and the largest lam of the range around the best one with test losses within one standard error."""
    test = arm.of("test")
    best = int(test.mean(-1).nan_to_num(nan=math.inf).argmin())
    behind = test - test[best]
    within = behind.mean(-1) <= behind.std(-1) / behind.shape[1] ** 0.5
    first = last = best
    while first > 0 and within[first - 1]:
        first -= 1
    while last + 1 < len(within) and within[last + 1]:
        last += 1
    return arm.lams[first], arm.lams[last]


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

Settings = dict[tuple[str, str], dict[str, Arm]]


def load(folder: Path) -> tuple[Settings, dict[tuple[str, str], float]]:
    """The arms of each setting at the learning rate that was chosen, and that rate."""
    with (folder / "chosen.csv").open(newline="") as file:
        rates = {(row["task"], row["optimizer"]): float(row["lr"]) for row in csv.DictReader(file)}
    outcomes = ls.read(folder / "runs.csv")
    settings: Settings = {}
    for (task, optimizer), lr in rates.items():
        of_setting = [o for o in outcomes if (o.task, o.optimizer, o.lr) == (task, optimizer, lr)]
        grouped = ls.cells(of_setting)
        without = grouped[ls.NONE, 0.0]
        arms = {}
        for arm in ls.ARMS:
            cells = [without, *(cell for (name, _), cell in grouped.items() if name == arm)]
            arms[arm] = Arm([ls.mean(cell, "lam") for cell in cells], cells)
        settings[task, optimizer] = arms
    return settings, rates


def markdown(header: list[str], rows: list[list[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def lam_text(lam: float) -> str:
    return f"{lam:.3g}" if lam else "none"


def comparisons(settings: Settings) -> list[list[Difference]]:
    """For each setting, CWD against plain, against the control of the same lam, and against plain on the finer grid."""
    return [
        [
            difference(arms["cautious"], arms["plain"]),
            difference(arms["cautious"], arms["control"], same_row=True),
            difference(arms["cautious"], arms["plain"] + arms["control"]),
        ]
        for arms in settings.values()
    ]


def comparison_table(settings: Settings) -> str:
    header = ["task", "optimizer", "best plain", "best CWD", "CWD - plain", "CWD - control", "CWD - finer plain"]
    rows: list[list[object]] = []
    for ((task, optimizer), arms), differences in zip(settings.items(), comparisons(settings), strict=True):
        bests = [f"{arms[arm].of('test').mean(-1)[arms[arm].best]:.4f}" for arm in ("plain", "cautious")]
        rows.append([task, optimizer, *bests, *differences])
    return markdown(header, rows)


def verdicts(settings: Settings) -> str:
    """One sentence for each comparison, with the number of settings."""
    sentences = []
    texts = ("plain decay, each at its best lam", "the control of the same lam", "plain decay on the finer grid")
    for column, text in zip(zip(*comparisons(settings), strict=True), texts, strict=True):
        counts = {verdict: [d.verdict for d in column].count(verdict) for verdict in ("better", "worse", "")}
        sentences.append(
            f"- Against {text}: better in {counts['better']} of {len(column)} settings, worse in {counts['worse']}, "
            f"no difference seen in {counts['']}."
        )
    return "\n".join(sentences)


def beside(arm: Arm, rows: int) -> str:
    """How much higher the mean test loss is at the lam ``rows`` rows after the best one."""
    row = arm.best + rows
    test = arm.of("test").mean(-1)
    return f"{test[row] - test[arm.best]:+.4f}" if 0 < arm.best and 0 < row < len(test) else "-"


def lam_table(settings: Settings) -> str:
    header = ["task", "optimizer", "best lam: plain", "CWD", "ratio", "flat range: plain", "CWD"]
    header += ["at half the lam: plain", "CWD", "at twice: plain", "CWD", "CWD - plain, lam kept"]
    rows: list[list[object]] = []
    for (task, optimizer), arms in settings.items():
        plain, cautious = arms["plain"], arms["cautious"]
        best = [arm.lams[arm.best] for arm in (plain, cautious)]
        ratio = f"{best[1] / best[0]:.3g}" if best[0] and best[1] else "-"
        ranges = [f"{lam_text(low)} to {lam_text(high)}" for low, high in (flat(plain), flat(cautious))]
        at_end = ["*" if arm.best in (1, len(arm.lams) - 1) else "" for arm in (plain, cautious)]
        texts = [lam_text(lam) + star for lam, star in zip(best, at_end, strict=True)]
        kept = difference(plain, cautious, same_row=True)
        interval = f"{-kept.mean:+.4f} [{-kept.high:+.4f}, {-kept.low:+.4f}]"
        others = [beside(arm, step) for step in (-1, 1) for arm in (plain, cautious)]
        rows.append([task, optimizer, *texts, ratio, *ranges, *others, interval])
    return markdown(header, rows)


def detail_table(arms: dict[str, Arm]) -> str:
    header = ["arm", "best lam", "train", "validation", "test", "right", "mask", "norm"]
    rows: list[list[object]] = []
    without = arms["plain"].cells[0]
    picked = [("no decay", without), *((arm, arms[arm].cells[arms[arm].best]) for arm in ls.ARMS)]
    for name, cell in picked:
        numbers = [f"{ls.mean(cell, of):.4f}" for of in ("train", "validation", "test")]
        right, mask, norm = (ls.mean(cell, of) for of in ("test_accuracy", "mask_ratio", "norm"))
        ratio = f"{mask:.3f}" if cell[0].arm == "cautious" else "-"
        rows.append([name, lam_text(ls.mean(cell, "lam")), *numbers, f"{right:.1%}", ratio, f"{norm:.1f}"])
    return markdown(header, rows)


def details(settings: Settings, rates: dict[tuple[str, str], float]) -> str:
    """For each task a picture, and a table for each optimizer."""
    parts = []
    for task in dict.fromkeys(task for task, _ in settings):
        parts.append(f"### {task}\n\n![Test loss over lam on {task}](results_{task}.svg)")
        for (name, optimizer), arms in settings.items():
            if name == task:
                parts.append(f"{optimizer}, learning rate {rates[name, optimizer]:g}:\n\n{detail_table(arms)}")
    return "\n\n".join(parts)


def hours(settings: Settings) -> str:
    outcomes = {id(o): o for arms in settings.values() for arm in arms.values() for cell in arm.cells for o in cell}
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return f"{len(outcomes):,} runs, {seconds / 3600:.1f} hours of one core"


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def fill(template: str, parts: dict[str, Callable[[], str]]) -> str:
    """The template with each ``{{name}}`` replaced by the result of the part of that name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]](), template)


def page(folder: Path) -> str:
    """The page as Markdown."""
    settings, rates = load(folder)
    parts = {
        "verdicts": lambda: verdicts(settings),
        "comparisons": lambda: comparison_table(settings),
        "lams": lambda: lam_table(settings),
        "details": lambda: details(settings, rates),
        "runs": lambda: hours(settings),
    }
    return fill((HERE / "page.md").read_text(), parts)


def draw(folder: Path, to: Path) -> None:
    """For each task the test loss over lam, with one panel per optimizer; and one such panel for the README."""
    settings, rates = load(folder)
    for task in dict.fromkeys(task for task, _ in settings):
        panels = [(optimizer, arms) for (name, optimizer), arms in settings.items() if name == task]
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = pictures.panels(rows, columns, 0.6 + 3.2 * rows)
        for i, (ax, (optimizer, arms)) in enumerate(zip(axes, panels, strict=True)):
            draw_arms(ax, arms)
            ax.set_title(f"{optimizer}, lr {rates[task, optimizer]:g}")
            ax.set_ylabel("test loss (nats)" if i % columns == 0 else "")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.2)
        pictures.save(figure, to / f"results_{task}.svg")
    figure, (ax,) = pictures.panels(1, 1, 3.4)
    draw_arms(ax, settings["mnist1d", "AdamW"])
    ax.set_title("mnist1d with AdamW: mean of 8 seeds")
    ax.legend(loc="lower left")
    pictures.save(figure, to / "does_it_help.svg")


def draw_arms(ax: Axes, arms: dict[str, Arm]) -> None:
    """The test loss over lam of one setting."""
    ls.draw(
        ax, list({outcome.key: outcome for arm in arms.values() for cell in arm.cells for outcome in cell}.values())
    )


def main() -> None:
    (DOCS / "results.md").write_text(page(HERE))
    draw(HERE, DOCS)
    print(f"wrote {DOCS / 'results.md'}")


if __name__ == "__main__":
    main()
