"""The pictures have one palette, follow a light and a dark page, and can be read at the width of a phone."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import pictures  # noqa: E402

DRAWN = [path for path in sorted((ROOT / "docs").glob("*.svg")) if path.stem not in {"step", "mask"}]
PHONE = 350  # pixels that a page leaves for a picture


def colours(svg: str) -> set[str]:
    """The colours of lines and areas; those in the rules for dark pages are not among them."""
    return set(re.findall(r"#[0-9a-f]{6}", " ".join(re.findall(r'style="([^"]*)"', svg))))


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_a_picture_has_the_colours_of_the_palette(path: Path) -> None:
    """Every colour is of the palette, and has a rule that replaces it on a dark page."""
    svg = path.read_text(encoding="utf-8")
    replaced = set(re.findall(r'\[style\*="\w+: (#\w+)"\]', svg))

    assert "prefers-color-scheme:dark" in svg
    assert colours(svg) <= replaced & set(pictures.DARK)


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_letters_are_large_enough_for_a_phone(path: Path) -> None:
    """Where a picture is 350 pixels wide, its letters are at least 8.5 pixels high, subscripts not counted."""
    svg = path.read_text(encoding="utf-8")
    width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1])
    smallest = min(float(size) for size in re.findall(r"scale\((0\.1\d*) -0\.1\d*\)", svg))  # of 100 units a letter

    assert 100 * smallest * PHONE / width > 8.5


def test_the_four_arms_have_four_colours() -> None:
    """Plain, cautious, control and no decay differ from each other, in both schemes."""
    light = [pictures.PLAIN, pictures.CAUTIOUS, pictures.CONTROL, pictures.NO_DECAY]

    assert len(set(light)) == len({pictures.DARK[colour] for colour in light}) == 4


def test_a_saved_picture_changes_colours_on_a_dark_page(tmp_path: Path) -> None:
    """A green line is light green on a dark page; a colour outside the palette is found by the check above."""
    pytest.importorskip("matplotlib")
    figure, (axes,) = pictures.panels(1, 1, 2)
    axes.plot([0, 1], color=pictures.CAUTIOUS)
    axes.plot([1, 0], color="#123456")
    pictures.save(figure, tmp_path / "line.svg")
    svg = (tmp_path / "line.svg").read_text(encoding="utf-8")

    assert '[style*="stroke: #009e73"]{stroke:#3ecf9f!important}' in svg
    assert colours(svg) - set(pictures.DARK) == {"#123456"}
