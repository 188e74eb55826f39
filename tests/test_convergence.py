"""examples/lambda_sweep.py and examples/convergence.py, run at a small size."""

import csv
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
pytest.importorskip("tqdm")

import convergence  # noqa: E402
import lambda_sweep as ls  # noqa: E402
import scripts  # noqa: E402

Row = dict[str, str]


def needs_digits() -> None:
    for name in ("sklearn", "timm", "matplotlib"):
        pytest.importorskip(name)


def run(script: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = scripts.run(script, *words)
    assert done.returncode == code, done.stderr
    return done


def rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------
# The sweep over lam
# ------------------------------------------------------------------------------------------------

SWEEP = ["--task", "digits", "--steps", 3, "--seeds", 2, "--doses", 0.1, 0.8, "--jobs", 1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a small sweep."""
    needs_digits()
    folder = tmp_path_factory.mktemp("sweep")
    run("lambda_sweep", *SWEEP, "--out", folder)
    return folder


def test_sweep_runs_each_arm(swept: Path) -> None:
    """The sweep runs three arms at two doses, and no decay, each with two seeds, and draws a picture."""
    cells = [(row["arm"], float(row["dose"]), int(row["seed"])) for row in rows(swept / "runs_steps3.csv")]
    arms = {(arm, dose, seed) for arm in ls.ARMS for dose in (0.1, 0.8) for seed in (0, 1)}

    assert len(cells) == 14
    assert set(cells) == arms | {("none", 0.0, seed) for seed in (0, 1)}
    assert (swept / "digits_AdamW_steps3.svg").stat().st_size > 10_000


def test_control_decays_as_much_in_total(swept: Path) -> None:
    """The control's lam is that of the cautious run of the same dose and seed, times that run's mask ratio."""
    of = {(row["arm"], row["dose"], row["seed"]): row for row in rows(swept / "runs_steps3.csv")}
    pairs = [(row, of["cautious", dose, seed]) for (arm, dose, seed), row in of.items() if arm == "control"]

    assert len(pairs) == 4
    for control, cautious in pairs:
        assert 0 < float(cautious["mask_ratio"]) < 1
        assert float(control["lam"]) == pytest.approx(float(cautious["lam"]) * float(cautious["mask_ratio"]), rel=1e-4)


def test_sweep_repeats_nothing(swept: Path) -> None:
    """A second call does not change the file, and still prints the table."""
    before = (swept / "runs_steps3.csv").read_bytes()
    done = run("lambda_sweep", *SWEEP, "--out", swept)

    assert (swept / "runs_steps3.csv").read_bytes() == before
    assert "control" in done.stdout


@pytest.mark.parametrize(("task", "package"), [("digits", "sklearn"), ("mnist1d", "torch"), ("bytes-once", "torch")])
def test_runs_of_a_seed_share_all_but_the_decay(task: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial weights and batches are the same, bit for bit, in all arms; those of another seed are not."""
    pytest.importorskip(package)
    pytest.importorskip("timm")
    seen: list[torch.Tensor] = []

    def note(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if model.training:
            first = [] if len(seen) else [p.detach() for p in model.parameters()]
            seen.append(torch.cat([t.flatten().double() for t in (*first, x, y)]))
        return scores_loss(model, x, y)

    scores_loss = ls.scores_loss
    monkeypatch.setattr(ls, "scores_loss", note)
    monkeypatch.setattr(ls, "evaluate", lambda *_: (0.0, 0.0))  # which takes longer than the steps
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    numbers = torch.arange(28_000 * 40.0).view(-1, 40), torch.arange(28_000) % 10  # the package takes seconds
    monkeypatch.setattr(ls, "made", lambda samples: numbers)
    monkeypatch.setattr(ls, "mnist1d", ls.mnist1d.__wrapped__)

    def noted(arm: str, dose: float, seed: int) -> torch.Tensor:
        seen.clear()
        ls.train(ls.Run(task, "AdamW", 1e-3, arm, dose, seed, share=0.5), ls.Place(steps=3))
        return torch.cat(seen)

    none = noted("none", 0.0, seed=0)
    assert all(torch.equal(noted(arm, 0.5, seed=0), none) for arm in ls.ARMS)
    assert not torch.equal(noted("plain", 0.5, seed=1), none)


# ------------------------------------------------------------------------------------------------
# Steps to a loss
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "step"), [(4.0, 10), (3.0, 15), (2.0, 20), (1.5, 35), (1.0, 40), (0.9, None), (5.0, 10)]
)
def test_crossing(loss: float, step: float | None) -> None:
    """`crossing` interpolates between the points; a curve that begins at or below the loss gives its first step."""
    assert convergence.crossing({10: 4.0, 20: 2.0, 30: 2.0, 40: 1.0}, loss) == step


def test_crossing_is_the_first() -> None:
    """If the curve comes down to the loss twice, `crossing` gives the first time."""
    assert convergence.crossing({10: 4.0, 20: 2.0, 30: 4.0, 40: 0.0}, 3.0) == 15


def test_crossing_of_a_run_that_diverged() -> None:
    """A curve that turns NaN does not reach a loss."""
    assert convergence.crossing({10: 4.0, 20: math.nan}, 3.0) is None


def test_speed_table() -> None:
    """Cautious needs 15 steps and plain 30, so the ratio is 0.5; no decay does not reach the loss and has no ratio."""
    by_arm = {"none": [{10: 4.0, 40: 3.5}], "plain": [{10: 4.0, 40: 1.0}], "cautious": [{10: 4.0, 20: 0.0}]}
    lines = convergence.speed_table("steps", by_arm, [2.0, 5.0]).splitlines()[2:]
    found = [re.split(r"\s{2,}", line.strip()) for line in lines]

    assert found[:3] == [
        ["2.0000", "none", "not reached", "-", "not reached"],
        ["2.0000", "plain", "30", "1.00", "30"],
        ["2.0000", "cautious", "15", "0.50", "15"],
    ]
    assert found[3] == ["5.0000", "none", "<= 10", "-", "<= 10"]


# ------------------------------------------------------------------------------------------------
# Convergence from the command line
# ------------------------------------------------------------------------------------------------

SMALL = ["--task", "digits", "--seeds", 2, "--every", 2, "--plain-dose", 0.1, "--cautious-dose", 0.2, "--jobs", 1]
LENGTHS = ["--lengths", 3, 5, "--losses", 9, 1.5, 0.01]
Cells = list[tuple[str, str, str, str]]


def cells(path: Path) -> Cells:
    return [(row["steps"], row["seed"], row["arm"], row["step"]) for row in rows(path)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of a small comparison, and what it printed."""
    needs_digits()
    folder = tmp_path_factory.mktemp("convergence")
    return folder / "curves.csv", run("convergence", *SMALL, *LENGTHS, "--out", folder).stdout


def results(text: str) -> str:
    """The printed text from the first table on, without the run time above it."""
    return text[text.index(" steps arm") :]


def test_a_row_for_each_step(trained: tuple[Path, str]) -> None:
    """The file has a row at every second step and after the last one, for each length, seed and arm."""
    path, _ = trained
    points = [("3", "2"), ("3", "3"), ("5", "2"), ("5", "4"), ("5", "5")]
    wanted = {(steps, seed, arm, step) for steps, step in points for seed in "01" for arm in convergence.ARMS}

    assert len(cells(path)) == len(wanted)
    assert set(cells(path)) == wanted


def test_tables(trained: tuple[Path, str]) -> None:
    """It prints a table of the final losses, one within the longest runs, and one over the lengths.

    A loss that no run reaches is "not reached".
    """
    _, text = trained
    inside, over = text.split("Inside the runs of 5 steps")[1].split("Over runs of 3, 5 steps")

    assert re.search(r"^ +3 plain +0\.1 ", text, flags=re.MULTILINE)
    assert re.search(r"^ +5 cautious +0\.2 .* of 2$", text, flags=re.MULTILINE)
    assert len(re.findall(r"^ +0\.0100 .* not reached ", inside, flags=re.MULTILINE)) == 3
    assert len(re.findall(r"^ +9\.0000 .* <= 2 ", inside, flags=re.MULTILINE)) == 3
    assert len(re.findall(r"^ +9\.0000 .* <= 3 ", over, flags=re.MULTILINE)) == 3


def test_nothing_is_repeated(trained: tuple[Path, str]) -> None:
    """A second call does not change the file, and prints the same numbers."""
    path, first = trained
    before = path.read_bytes()
    again = run("convergence", *SMALL, *LENGTHS, "--out", path.parent)

    assert path.read_bytes() == before
    assert results(again.stdout) == results(first)
    assert "step/s" not in again.stderr


def cut_off(path: Path, to: Path, kept: int) -> str:
    """Copy a file, of its last line only the first ``kept`` characters; return the whole text."""
    text = path.read_text()
    last = text.splitlines(keepends=True)[-1]
    to.write_text(text[: len(text) - len(last) + kept])
    return text


def test_a_file_that_was_cut_off_is_mended(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Only the run that lacks its last line is repeated, and the file is the same as before."""
    path, first = trained
    text = cut_off(path, tmp_path / "curves.csv", kept=0)
    again, last = run("convergence", *SMALL, *LENGTHS, "--out", tmp_path), rows(path)[-1]
    repeated = re.findall(r"(\d) steps +(\w+) +seed (\d) +loss", again.stdout)

    assert (tmp_path / "curves.csv").read_text() == text
    assert repeated == [(last["steps"], last["arm"], last["seed"])]
    assert results(again.stdout).split("written")[0] == results(first).split("written")[0]


@pytest.mark.parametrize("kept", [0, 9, -2], ids=["between lines", "within a key", "within a number"])
def test_reading_a_file_that_was_cut_off(trained: tuple[Path, str], tmp_path: Path, kept: int) -> None:
    """Wherever the file is cut off in its last run, `read` leaves that run out and removes its lines from the file."""
    path, _ = trained
    whole = convergence.read(path)
    short = tmp_path / "curves.csv"
    text = cut_off(path, short, kept % len(path.read_text().splitlines(keepends=True)[-1]))

    assert list(convergence.read(short).items()) == list(whole.items())[:-1]
    assert short.read_text() == "".join(text.splitlines(keepends=True)[:-3])


def test_a_file_with_other_columns_is_not_changed(tmp_path: Path) -> None:
    """For a curves.csv with other columns, the error names it and says what to do; the file does not change."""
    (tmp_path / "curves.csv").write_text("method,lam\nAdamW,0.1\n")
    done = run("convergence", *SMALL, "--out", tmp_path, code=1)

    assert "begins with 'method,lam', not with 'task,optimizer," in done.stderr
    assert "give another --out" in done.stderr
    assert (tmp_path / "curves.csv").read_text() == "method,lam\nAdamW,0.1\n"


@pytest.mark.parametrize(("arm", "dose"), [("none", 0.0), ("plain", 0.3), ("cautious", 0.3)])
def test_it_trains_as_the_sweep_does(arm: str, dose: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last loss of a curve is the validation loss that lambda_sweep.py finds for the same run, bit for bit."""
    needs_digits()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    one = convergence.Run("digits", "AdamW", 1e-3, arm, dose, seed=3, steps=5, every=2, scale=1)
    _, curve = convergence.train(one, "cpu")
    swept = ls.train(ls.Run("digits", "AdamW", 1e-3, arm, dose, seed=3), ls.Place(steps=5))
    _, sparse = convergence.train(replace(one, every=9), "cpu")

    assert list(curve) == [2, 4, 5]
    assert curve[5] == swept.validation == sparse[5]
