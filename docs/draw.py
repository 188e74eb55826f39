"""Draws landscape.svg, step.svg and mask.svg, the pictures of the README and of how_it_works.md.

python docs/draw.py            (needs the examples extra; half a minute)
"""

import sys
from dataclasses import replace
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

# The colours follow the page's scheme, light or dark: a browser hands it on to a picture.
STYLE = """
<style>
  text { font: 18px -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; text-anchor: middle; }
  text { fill: #222; } .ground { fill: #fff; }
  .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 16px; }
  .soft { fill: #666; font-size: 16px; } .green { fill: #00805d; } .pink { fill: #b0306b; }
  .box, .own { fill: #f2f2f2; stroke: #999; } .own { stroke: #00805d; stroke-width: 2; }
  .wire { fill: none; stroke: #999; stroke-width: 1.5; } .head { fill: #999; }
  .go { stroke-width: 3; } .go.green { stroke: #00805d; } .go.pink { stroke: #b0306b; }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee; } .ground { fill: #1b1e27; }
    .soft { fill: #aaa; } .green { fill: #3ecf9f; } .pink { fill: #f58bb6; }
    .box, .own { fill: #2a2d3a; stroke: #888; } .own { stroke: #3ecf9f; }
    .wire { stroke: #888; } .head { fill: #888; } .go.green { stroke: #3ecf9f; } .go.pink { stroke: #f58bb6; }
  }
</style>
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f'<title>{title}</title>{STYLE}<rect width="{width}" height="{height}" class="ground"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
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
        kind = "green" if abs(end) < abs(start) else "pink"
        parts += [arrow(a, y, b, y, f"go {kind}", kind), f'<circle cx="{a}" cy="{y}" r="6" class="{kind}"/>']
    for side in (-1, 1):
        parts += [
            text(zero + side * scale * 0.8, y - 44, "towards zero", "green"),
            text(zero + side * scale * 0.8, y - 22, "mask 1: decays", "green"),
            text(zero + side * scale * 2.1, y - 44, "away from zero", "pink"),
            text(zero + side * scale * 2.1, y - 22, "mask 0: no decay", "pink"),
        ]
    parts.append(text(zero, y + 64, "dot: x before the step; arrow: the step -eta*u of your optimizer", "soft"))
    return svg(750, 150, "A weight decays if the step moves it towards zero, not if the step moves it away", parts)


def landscape(path: Path) -> None:
    """The ring and the line of examples/toy_landscapes.py, fewer starts."""
    import pictures
    import toy_landscapes as toy

    lam, steps = 0.5, 20_000
    results = {method: toy.run(method, lr=0.001, lam=lam, steps=steps) for method in toy.METHODS}
    figure, (ring, line) = pictures.panels(1, 2, 4.4)
    toy.draw_plane(ring, replace(toy.LANDSCAPES[0], starts=((4.5, 3.2),)), results, lam, front=False)
    ring.text(1 / lam - 0.15, 1 / lam, "1/lam", ha="right", va="center")
    toy.draw_line(line, results, lam, steps)
    ring.set_title("two weights, minima on a ring")
    line.set_title("one weight, minimum at 5")
    texts = {
        "Adam": "no decay: stops at the first minimum that it meets",
        "CautiousDecay(Adam)": "CWD: stays on minima, and slides on to smaller weights",
        "AdamW": "AdamW: leaves the minima, for 1/lam",
    }
    handles = [pictures.line(text, **toy.STYLES[method]) for method, text in texts.items()]
    figure.legend(handles=handles, loc="outside upper left")
    pictures.save(figure, path)


if __name__ == "__main__":
    (DOCS / "step.svg").write_text(step())
    (DOCS / "mask.svg").write_text(mask())
    landscape(DOCS / "landscape.svg")
