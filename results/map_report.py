"""Makes docs/map.md and its pictures from the runs of map_study.py and the text in map_page.md.

python results/map_report.py
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import lambda_sweep as ls  # noqa: E402
import map_study  # noqa: E402
import pictures  # noqa: E402
import report  # noqa: E402
from map_study import Cell  # noqa: E402
from report import Arm, Difference, difference, lam_text, markdown  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"plain": "plain", "cautious": "CWD", "leak 0.1": "leak 0.1", "leak 0.25": "leak 0.25"}
OTHERS = ("cautious", "leak 0.1", "leak 0.25")
MULTIPLES = (1, 2, 4, 8)
SMALLEST_GAP = 0.01
NEAREST = 3


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A finished cell: its learning rate and its arms."""

    cell: Cell
    lr: float
    arms: dict[str, Arm]

    def test(self, arm: str) -> float:
        """The mean test loss at the best lam."""
        return self.at(arm, self.arms[arm].best)

    def at(self, arm: str, row: int) -> float:
        """The mean test loss at a lam."""
        return ls.mean(self.arms[arm].cells[row], "test")

    def lam(self, arm: str) -> float:
        return self.arms[arm].lams[self.arms[arm].best]

    @property
    def base(self) -> float:
        """Plain decay's best lam on the grid of factor 2: CWD has run its multiples."""
        rows = zip(self.arms["plain"].lams[1:], self.arms["plain"].cells[1:], strict=True)
        coarse = [(ls.mean(some, "validation"), lam) for lam, some in rows if math.log2(some[0].dose).is_integer()]
        return min(coarse)[1]

    @property
    def without(self) -> Arm:
        """No decay."""
        plain = self.arms["plain"]
        return Arm(plain.lams[:1], plain.cells[:1])

    @property
    def train(self) -> float:
        """The training loss of the tuned plain run."""
        plain = self.arms["plain"]
        return ls.mean(plain.cells[plain.best], "train")

    @property
    def gap(self) -> float:
        """The test loss of the tuned plain run minus its training loss."""
        return self.test("plain") - self.train

    @property
    def percent(self) -> float:
        """CWD minus plain, in percent."""
        return 100 * (self.test("cautious") / self.test("plain") - 1)

    @property
    def line(self) -> str:
        return line_of(self.cell)

    @property
    def label(self) -> list[str]:
        """The first columns of its row in a table."""
        return [self.line, f"{self.cell.samples:,}", f"{self.cell.passes:g}"]


def line_of(cell: Cell) -> str:
    """All but the number of samples."""
    return f"{cell.task}, {cell.optimizer}, width {cell.width}"


COLUMNS = ["cells", "samples", "passes"]


def load(folder: Path) -> list[Place]:
    """All finished cells, in order of line and samples."""
    places = []
    for cell in map_study.CELLS:
        runs = map_study.Runs(cell, folder)
        try:
            lr = map_study.explore(runs)
        except LookupError:
            continue
        at_rate = [o for o in runs.finished.values() if o.lr == lr and o.seed in map_study.SEEDS]
        grouped = ls.cells(at_rate)
        arms = {}
        for arm in map_study.LEAKS:
            cells = [grouped[ls.NONE, 0.0], *(some for (name, _), some in grouped.items() if name == arm)]
            arms[arm] = Arm([ls.mean(some, "lam") for some in cells], cells)
        places.append(Place(cell, lr, arms))
    return sorted(places, key=lambda place: (map_study.CELLS.index(first_of(place)), place.cell.samples))


def first_of(place: Place) -> Cell:
    """The first cell of the same line."""
    return next(cell for cell in map_study.CELLS if cell[:3] == place.cell[:3])


# ------------------------------------------------------------------------------------------------
# Each cell, and the regret of each arm
# ------------------------------------------------------------------------------------------------


def best_text(place: Place, arm: str) -> str:
    """The test loss and, in brackets, the best lam; a star if a larger one was not allowed."""
    of_arm = place.arms[arm]
    dose = of_arm.cells[of_arm.best][0].dose
    _, largest = map_study.limits(map_study.TASKS[place.cell.task].steps)
    star = "*" if dose == map_study.dose(largest) else ""
    return f"{place.test(arm):.4f} ({lam_text(place.lam(arm))}{star})"


def loss_table(places: list[Place]) -> str:
    header = [*COLUMNS, "lr", "train", "gap", "no decay", *NAMES.values()]
    rows = [
        [
            *p.label,
            f"{p.lr:g}",
            f"{p.train:.3f}",
            f"{p.gap:.3f}",
            f"{p.at('plain', 0):.4f}",
            *(best_text(p, arm) for arm in NAMES),
        ]
        for p in places
    ]
    return markdown(header, rows)


def differences(place: Place) -> list[Difference]:
    """Each arm minus plain decay."""
    return [difference(place.arms[arm], place.arms["plain"]) for arm in OTHERS]


def difference_table(places: list[Place]) -> str:
    rows = [[*p.label, *differences(p), f"{p.percent:+.1f} %"] for p in places]
    return markdown([*COLUMNS, *(f"{NAMES[arm]} - plain" for arm in OTHERS), "CWD - plain"], rows)


def verdicts(places: list[Place]) -> str:
    """How often each arm is better or worse than plain decay."""
    lines = []
    for arm, column in zip(OTHERS, zip(*map(differences, places), strict=True), strict=True):
        counts = {verdict: [d.verdict for d in column].count(verdict) for verdict in ("better", "worse", "")}
        lines.append(
            f"- {NAMES[arm]} against plain decay: better in {counts['better']} of {len(column)} cells, worse in "
            f"{counts['worse']}, no difference seen in {counts['']}."
        )
    return "\n".join(lines)


def regrets(place: Place) -> dict[str, float]:
    """The mean test loss of each arm minus that of the best arm."""
    losses = {arm: place.test(arm) for arm in NAMES}
    return {arm: loss - min(losses.values()) for arm, loss in losses.items()}


def regret_table(places: list[Place]) -> str:
    rows: list[list[object]] = []
    for place in places:
        of_arms = regrets(place)
        rows.append([*place.label, *(f"{of_arms[arm]:.4f}" if of_arms[arm] else "best" for arm in NAMES)])
    every = [regrets(place) for place in places]
    relative = [
        {arm: 100 * r[arm] / min(map(p.test, NAMES)) for arm in NAMES} for p, r in zip(places, every, strict=True)
    ]
    summaries = (("largest", max, every, ".4f"), ("largest, in %", max, relative, ".1f"))
    summaries += (("mean, in %", statistics.fmean, relative, ".1f"),)
    for name, summary, of_all, form in summaries:
        rows.append([f"**{name}**", "", "", *(f"**{summary([r[arm] for r in of_all]):{form}}**" for arm in NAMES)])
    return markdown([*COLUMNS, *NAMES.values()], rows)


# ------------------------------------------------------------------------------------------------
# Which axis predicts
# ------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A cell on an axis, and what is to be predicted there; ``group`` is left out together with it."""

    x: float
    y: float
    group: str


def predictions(points: Sequence[Point], nearest: int) -> list[float]:
    """For each point the mean of the nearest points of other groups."""
    found = []
    for point in points:
        others = sorted((p for p in points if p.group != point.group), key=lambda p: abs(p.x - point.x))
        found.append(statistics.fmean(p.y for p in others[:nearest]))
    return found


AXES: dict[str, Callable[[Place], float]] = {
    "passes": lambda place: math.log10(place.cell.passes),
    "gap": lambda place: math.log10(max(place.gap, SMALLEST_GAP)),
    "norm ratio": lambda place: math.log10(measured(place, "norm_ratio")),
}


def axis_table(places: list[Place]) -> str:
    rows: list[list[object]] = []
    for left_out, group in (("task", lambda place: place.cell.task), ("line", lambda place: place.line)):
        for name, axis, nearest in (
            *((name, axis, NEAREST) for name, axis in AXES.items()),
            ("none (the mean)", lambda _: 0.0, len(places)),
        ):
            points = [Point(axis(place), place.percent, group(place)) for place in places]
            found = predictions(points, nearest)
            error = statistics.fmean(abs(f - p.y) for f, p in zip(found, points, strict=True))
            signs = sum((f < 0) == (p.y < 0) for f, p in zip(found, points, strict=True))
            rows.append([left_out, name, f"{error:.1f}", f"{signs} of {len(points)}"])
    return markdown(["left out", "axis", "mean error (percentage points)", "sign right"], rows)


# ------------------------------------------------------------------------------------------------
# The rule for lam
# ------------------------------------------------------------------------------------------------


def decay_helps(place: Place) -> bool:
    """Is plain decay better than no decay?"""
    return difference(place.arms["plain"], place.without).verdict == "better"


def nearest_row(arm: Arm, lam: float) -> int:
    """The row whose lam is nearest, by its factor."""
    return min(range(1, len(arm.lams)), key=lambda row: abs(math.log(arm.lams[row] / lam)))


def measured(place: Place, of: str) -> float:
    """A number of the CWD run at plain decay's best lam."""
    arm = place.arms["cautious"]
    return ls.mean(arm.cells[nearest_row(arm, place.base)], of)


RULES: dict[str, Callable[[Place], float]] = {
    "1 / mask ratio": lambda place: 1 / measured(place, "mask_ratio"),
    "norm ratio": lambda place: measured(place, "norm_ratio"),
}


def multiple_table(places: list[Place]) -> str:
    header = [*COLUMNS, "decay helps", "1 / mask ratio", "norm ratio", "CWD's best", "within one standard error"]
    header += ["leak 0.1's best", "leak 0.25's best"]
    rows: list[list[object]] = []
    for place in places:
        low, high = report.flat(place.arms["cautious"])
        bests = [f"{place.lam(arm) / place.base:.3g}" if place.lam(arm) else "none" for arm in OTHERS]
        bests.insert(1, f"{low / place.base:.3g} to {high / place.base:.3g}")
        ratios = [f"{1 / measured(place, 'mask_ratio'):.2g}", f"{measured(place, 'norm_ratio'):.2g}"]
        rows.append([*place.label, "yes" if decay_helps(place) else "no", *ratios, *bests])
    return markdown(header, rows)


def times(multiple: float) -> Callable[[Place], float]:
    return lambda _: multiple


BLIND = {
    "cautious": {f"{m} x": times(m) for m in MULTIPLES} | RULES,
    "leak 0.1": {f"{m} x": times(m) for m in (2, 4, 8)},
    "leak 0.25": {f"{m} x": times(m) for m in (1, 2, 4)},
}


def rule_table(places: list[Place]) -> str:
    """For each optimizer and arm, the multiples that are tried blindly and the predicted ones."""
    header = ["optimizer", "arm", "multiple", "within one standard error", "mean regret", "largest regret"]
    header += ["mean difference to plain", "largest"]
    rows: list[list[object]] = []
    helped = [place for place in places if decay_helps(place)]
    for optimizer in dict.fromkeys(place.cell.optimizer for place in helped):
        of_optimizer = [place for place in helped if place.cell.optimizer == optimizer]
        for name, rules in BLIND.items():
            for multiple, rule in rules.items():
                within, regret, to_plain = zip(
                    *(blind(place, name, rule(place)) for place in of_optimizer), strict=True
                )
                numbers = [statistics.fmean(regret), max(regret), statistics.fmean(to_plain), max(to_plain)]
                texts = [f"{sum(within)} of {len(within)}", *(f"{number:+.4f}" for number in numbers)]
                rows.append([optimizer, NAMES[name], multiple, *texts])
    return markdown(header, rows)


def blind(place: Place, name: str, multiple: float) -> tuple[bool, float, float]:
    """Of an arm at a multiple of plain decay's best lam: is it in the flat range? Behind its best? Behind plain?"""
    arm = place.arms[name]
    row = nearest_row(arm, multiple * place.base)
    low, high = report.flat(arm)
    loss = place.at(name, row)
    return low <= arm.lams[row] <= high, loss - place.test(name), loss - place.test("plain")


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def left_out(places: list[Place]) -> str:
    """The cells of the protocol that are not finished, by line."""
    missing: dict[str, list[str]] = {}
    for cell in map_study.CELLS:
        if cell not in {place.cell for place in places}:
            missing.setdefault(line_of(cell), []).append(f"{cell.samples:,}")
    return "; ".join(f"{line}: {', '.join(samples)}" for line, samples in missing.items()) or "none"


def cost(folder: Path) -> str:
    outcomes = [o for path in folder.glob("*.csv") for o in ls.read(path, map_study.Outcome)]
    return f"{len(outcomes):,} runs, {sum(outcome.seconds for outcome in outcomes) / 3600:.1f} hours of one core"


def page(folder: Path) -> str:
    """The page as Markdown."""
    places = load(folder)
    parts = {
        "verdicts": lambda: verdicts(places),
        "losses": lambda: loss_table(places),
        "differences": lambda: difference_table(places),
        "regrets": lambda: regret_table(places),
        "axes": lambda: axis_table(places),
        "multiples": lambda: multiple_table(places),
        "rules": lambda: rule_table(places),
        "left_out": lambda: left_out(places),
        "runs": lambda: cost(folder),
    }
    return report.fill((HERE / "map_page.md").read_text(), parts)


COLOURS = (pictures.CAUTIOUS, pictures.CONTROL, pictures.PLAIN, *pictures.OTHERS)
MARKERS = "osD^vPX*"


def draw_lines(
    ax: Axes, places: list[Place], arm: str, x: Callable[[Place], float], ticks: Sequence[float], style: str
) -> None:
    """An arm minus plain decay in percent of plain decay's loss, with its interval: a line for each task and width."""
    for i, line in enumerate(dict.fromkeys(place.line for place in places)):
        of_line = sorted((place for place in places if place.line == line), key=x)
        at = [x(place) for place in of_line]
        found = [difference(place.arms[arm], place.arms["plain"]) for place in of_line]
        scale = [100 / place.test("plain") for place in of_line]
        low, mean, high = (
            [factor * getattr(d, name) for factor, d in zip(scale, found, strict=True)]
            for name in ("low", "mean", "high")
        )
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(at, mean, linestyle=style, markersize=6, label=line, **look)
        ax.vlines(at, low, high, color=COLOURS[i % len(COLOURS)], lw=1.5)
    ax.axhline(0, color=pictures.INK, lw=1)
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_yscale("symlog", linthresh=10)
    ax.set_yticks([-20, -10, -5, 0, 5, 10, 20, 50, 100], ["-20", "-10", "-5", "0", "5", "10", "20", "50", "100"])
    ax.set_title(f"{NAMES[arm]} minus plain decay, in % of the test loss")


def draw(folder: Path, to: Path) -> None:
    """The difference over the passes, for CWD and a leak, and over the gap."""
    places = load(folder)
    figure, axes = pictures.panels(2, 1, 8.4, sharex=True)
    for ax, arm in zip(axes, ("cautious", "leak 0.1"), strict=True):
        draw_lines(ax, places, arm, lambda place: place.cell.passes, (1, 4, 15, 60, 240), "-")
    axes[-1].set_xlabel("passes over the data")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    pictures.save(figure, to / "map_passes.svg")
    figure, axes = pictures.panels(2, 1, 8.4)
    draw_lines(axes[0], places, "cautious", lambda place: max(place.gap, SMALLEST_GAP), (0.05, 0.1, 0.2, 0.4, 0.8), "")
    draw_lines(axes[1], places, "cautious", lambda place: measured(place, "norm_ratio"), (2, 4, 8, 16, 32), "")
    axes[0].set_xlabel("test loss minus training loss of tuned plain decay (nats)")
    axes[1].set(xlabel="norm ratio of CWD at plain decay's best lam", title="")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    pictures.save(figure, to / "map_gap.svg")


def main() -> None:
    (report.DOCS / "map.md").write_text(page(map_study.FOLDER))
    draw(map_study.FOLDER, report.DOCS)
    print(f"wrote {report.DOCS / 'map.md'}")


if __name__ == "__main__":
    main()
