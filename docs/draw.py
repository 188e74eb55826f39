"""Draws landscape.png, step.svg and mask.svg, the pictures of the README and of how_it_works.md.

python docs/draw.py            (needs the examples extra; ten seconds)
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

ORANGE, GREEN, GREY = "#d55e00", "#009e73", "#777777"

# The colours follow the page's scheme, light or dark: a browser hands it on to a picture.
STYLE = """
<style>
  svg { --ink: #222; --soft: #666; --line: #999; --box: #f2f2f2; --green: #00805d; --red: #c24e00; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #eee; --soft: #aaa; --line: #888; --box: #2a2d3a; --green: #3ecf9f; --red: #ff9a57; }
  }
  text { font: 18px -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink);
    text-anchor: middle; }
  .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 16px; }
  .soft { fill: var(--soft); font-size: 16px; }
  .green { fill: var(--green); } .red { fill: var(--red); }
  .box { fill: var(--box); stroke: var(--line); }
  .own { fill: var(--box); stroke: var(--green); stroke-width: 2; }
  .wire { fill: none; stroke: var(--line); stroke-width: 1.5; }
  .head { fill: var(--line); }
  .go { stroke-width: 3; } .go.green { stroke: var(--green); } .go.red { stroke: var(--red); }
</style>
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{title}</title>{STYLE}" + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[tuple[str, str]], kind: str = "box") -> str:
    first = y + height / 2 + 6 - 11 * (len(lines) - 1)
    words = [text(x + width / 2, first + 22 * i, line, style) for i, (line, style) in enumerate(lines)]
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>' + "".join(words)


def arrow(x0: float, y0: float, x1: float, y1: float, kind: str = "wire", head: str = "head") -> str:
    """A straight arrow, level or upright."""
    length = abs(x1 - x0) + abs(y1 - y0)
    dx, dy = (x1 - x0) / length, (y1 - y0) / length
    x, y = x1 - 9 * dx, y1 - 9 * dy
    tip = f"{x1},{y1} {x - 5 * dy},{y - 5 * dx} {x + 5 * dy},{y + 5 * dx}"
    return f'<line x1="{x0}" y1="{y0}" x2="{x}" y2="{y}" class="{kind}"/><polygon points="{tip}" class="{head}"/>'


def step() -> str:
    """A step as data flow: from weights and gradients on the left to the weights of the next step on the right."""
    return svg(
        700,
        310,
        "One step: the optimizer computes u with its own decay off; the mask compares u and x; x loses u and the decay",
        [
            box(5, 40, 105, 50, [("gradient g", "")]),
            box(5, 225, 105, 50, [("weight x", "")]),
            arrow(110, 65, 150, 65),
            box(150, 30, 170, 70, [("your optimizer", ""), ("weight_decay = 0", "mono")]),
            arrow(320, 65, 440, 65),
            text(360, 52, "eta*u", "mono"),
            arrow(400, 65, 400, 128),
            '<path d="M110 250 H235 M235 250 H340 M315 250 V157" class="wire"/>',
            arrow(235, 250, 235, 100),
            arrow(315, 157, 340, 157),
            arrow(315, 250, 340, 250),
            box(340, 128, 120, 58, [("mask", ""), ("u*x &gt;= 0", "mono")], "own"),
            arrow(400, 186, 400, 225),
            box(340, 225, 120, 50, [("eta*lam*x", "mono")], "own"),
            text(400, 298, "added by CautiousDecay", "green"),
            '<path d="M460 250 H535" class="wire"/>',
            arrow(535, 250, 535, 100),
            text(570, 180, "decay", "green"),
            box(440, 30, 185, 70, [("x - eta*u - decay", "mono")]),
            arrow(625, 65, 695, 65),
            text(660, 52, "new x"),
        ],
    )


def mask() -> str:
    """The mask on the real line: four weights, and where the step takes them."""
    scale, zero, y = 135, 375, 75
    ticks = (-2, -1, 0, 1, 2)
    parts = [
        f'<line x1="15" y1="{y}" x2="735" y2="{y}" class="wire"/>',
        *(text(zero + scale * n, y + 32, f"{n:+d}" if n else "0") for n in ticks),
        *(f'<path d="M{zero + scale * n} {y - 6} v12" class="wire"/>' for n in ticks),
    ]
    for start, end in ((-1.9, -2.4), (-1.15, -0.45), (1.15, 0.45), (1.9, 2.4)):
        a, b = zero + scale * start, zero + scale * end
        kind = "green" if abs(end) < abs(start) else "red"
        parts += [arrow(a, y, b, y, f"go {kind}", kind), f'<circle cx="{a}" cy="{y}" r="6" class="{kind}"/>']
    for side in (-1, 1):
        parts += [
            text(zero + side * scale * 0.8, y - 44, "towards zero", "green"),
            text(zero + side * scale * 0.8, y - 22, "mask 1: decays", "green"),
            text(zero + side * scale * 2.1, y - 44, "away from zero", "red"),
            text(zero + side * scale * 2.1, y - 22, "mask 0: no decay", "red"),
        ]
    parts.append(text(zero, y + 64, "dot: x before the step; arrow: the step -eta*u of your optimizer", "soft"))
    return svg(750, 150, "A weight decays if the step moves it towards zero, not if the step moves it away", parts)


def landscape(path: Path) -> None:
    """The line of examples/toy_landscapes.py, with larger steps: f = (x-5)^2."""
    import matplotlib
    import toy_landscapes as toy

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lam, steps = 0.5, 3000
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.axhline(5, color=GREY, lw=1)
    axes.axhline(1 / lam, color=GREY, lw=1, linestyle=(0, (2, 3)))
    labels = {
        "AdamW": (ORANGE, "AdamW stops at 1/lam", 1.2),
        "CautiousDecay(Adam)": (GREEN, "CWD reaches the minimiser", 5.3),
    }
    for method, (colour, label, height) in labels.items():
        trajectories, _ = toy.run(method, lr=0.01, lam=lam, steps=steps)["line"]
        ticks = [steps * i / (len(trajectories) - 1) for i in range(len(trajectories))]
        for start in range(trajectories.shape[1]):
            axes.plot(ticks, trajectories[:, start, 0], color=colour, lw=2.4)
        axes.text(steps, height, label, color=colour, ha="right", fontsize=13, weight="bold")
    axes.text(steps, 8, "f(x) = (x - 5)²,  lam = 0.5,  same lr, same starts", ha="right", va="center", fontsize=11)
    axes.set(xlabel="step", ylabel="weight x", xlim=(0, steps), ylim=(0, 8.6), yticks=[0, 2, 5, 8])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    (DOCS / "step.svg").write_text(step())
    (DOCS / "mask.svg").write_text(mask())
    landscape(DOCS / "landscape.png")
