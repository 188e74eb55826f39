"""The look of all pictures: one colour for each decay, letters that can be read on a phone, light and dark.

A picture is an SVG file with the colours for a light page. `save` adds rules with which a browser that shows it on a
dark page takes the dark colours instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where a picture is drawn: a run on a machine without matplotlib keeps its numbers
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CAUTIOUS, PLAIN, CONTROL, NO_DECAY = "#009e73", "#d55e00", "#0072b2", "#767676"
INK, LINE, GROUND = "#222222", "#dddddd", "#ffffff"
OTHERS = ("#8e44ad", "#c2417c", "#a67c00", "#3f7f93", "#8c5a3c")  # for what is none of the four above
GOLD = "#f2c200"
STEPS = ("#fcfcfc", "#f4f4f4", "#ebebeb", "#dedede", "#cfcfcf")  # of a contour plot, from low to high

DARK = {
    CAUTIOUS: "#3ecf9f",
    PLAIN: "#ff9a57",
    CONTROL: "#6cb6ff",
    NO_DECAY: "#b8b8b8",
    INK: "#e8e8e8",
    LINE: "#414653",
    GROUND: "#1b1e27",
    **dict(zip(OTHERS, ("#cf9be8", "#f58bb6", "#e2b94a", "#86c5d8", "#d2a184"), strict=True)),
    GOLD: "#8a7000",
    **dict(zip(STEPS, ("#1e212b", "#242833", "#2b303c", "#343a47", "#3f4655"), strict=True)),
}

WIDTH = 6.5  # inches; at 12 points, letters are 9 pixels high where a picture is 350 pixels wide
LOOK = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 12,
    "figure.titlesize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "lines.linewidth": 2,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "svg.hashsalt": "cwd_wrap",  # the same names in each file that is drawn anew
}


def panels(rows: int, columns: int, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    """A figure of the usual width with a row or a grid of panels; ``height`` is that of the figure, in inches."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no display
    from matplotlib import pyplot as plt

    plt.rcParams.update(LOOK)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options)
    return figure, list(grid.flat)


def no_decay(axes: Axes, value: float, label: str | None = "no decay") -> None:
    """A level line at what training without decay gives."""
    axes.axhline(value, color=NO_DECAY, lw=2, linestyle=(0, (3, 2)), label=label, zorder=1)


def line(label: str, **look: object) -> Line2D:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file that follows the page's scheme, light or dark."""
    from matplotlib import pyplot as plt

    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = path.read_text(encoding="utf-8")
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in text
    )
    text = text.replace("<defs>", f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>\n <defs>", 1)
    # Places to a tenth of a point: less than half the size of the file.
    text = re.sub(r'(?<= d=")[^"]*', lambda d: re.sub(r"(\.\d)\d+", r"\1", d[0]), text)
    path.write_text(re.sub(" +$", "", text, flags=re.MULTILINE), encoding="utf-8")
