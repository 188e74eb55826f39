"""The examples run at a small size from the command line."""

import csv
from pathlib import Path

import pytest
from processes import ROOT, python

SMALL = ["--steps=6", "--seeds=1", "--lam=0.1", "--width=32", "--layers=1", "--context=16", "--batch=2"]


def test_language_model(tmp_path: Path) -> None:
    """The demo prints its table and writes a row for each run, the curves and the picture."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    done = python(ROOT / "examples" / "language_model.py", *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))

    assert "CautiousDecay(AdamW)" in done.stdout
    assert len(rows) == 2
    assert (tmp_path / "loss_and_mask.svg").stat().st_size > 10_000
    assert (tmp_path / "curves.csv").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [(["--seeds", 0], "0"), (["--lam", -1], "-1"), (["--optimizer", "Adamm"], "Adamm")],
)
def test_language_model_says_what_is_wrong(words: list[object], text: str) -> None:
    """A bad argument is named in one line, without a traceback."""
    pytest.importorskip("tqdm")
    done = pytest.importorskip("scripts").run("language_model", *words)

    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr
