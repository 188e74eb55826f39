"""Facts that the experiments in examples/ show. Each experiment also runs at a small size from the command line."""

import csv
import functools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
pytest.importorskip("tqdm")

import anchor  # noqa: E402
import grokking  # noqa: E402
import lyapunov  # noqa: E402
import scripts  # noqa: E402
import sparsity  # noqa: E402
import toy_landscapes as toy  # noqa: E402
import when_not  # noqa: E402

from cwd_wrap import CautiousDecay  # noqa: E402

RING, PARABOLA, LINE = toy.LANDSCAPES
LR, LAM, STEPS = 4e-3, 0.5, 6_000


# ------------------------------------------------------------------------------------------------
# Functions with a curve of minimisers
# ------------------------------------------------------------------------------------------------


@functools.cache
def ends(method: str) -> dict[tuple[str, toy.Point], tuple[Tensor, float]]:
    """Where each run of ``method`` ends, and its mean f over the last steps."""
    results = toy.run(method, lr=LR, lam=LAM, steps=STEPS)
    return {
        (landscape.name, start): (results[landscape.name][0][-1, i], results[landscape.name][1][i].item())
        for landscape in toy.LANDSCAPES
        for i, start in enumerate(landscape.starts)
    }


@pytest.mark.parametrize("start", LINE.starts)
@pytest.mark.parametrize(("method", "x"), [("Adam", 5.0), ("AdamW", 2.0), ("CautiousDecay(Adam)", 5.0)])
def test_one_variable(method: str, x: float, start: toy.Point) -> None:
    """For f = (x-5)^2 with lam = 0.5, AdamW stops at 1/lam, and Adam and CautiousDecay(Adam) stop where f is 0."""
    end, _ = ends(method)["line", start]
    assert end[0].item() == pytest.approx(x, abs=0.1)


PLACES = [(landscape, start) for landscape in (RING, PARABOLA) for start in landscape.starts]
on_curves = pytest.mark.parametrize(("landscape", "start"), PLACES, ids=lambda v: getattr(v, "name", str(v)))


@on_curves
def test_adamw_leaves_the_curve_for_the_corner_of_its_box(landscape: toy.Landscape, start: toy.Point) -> None:
    """AdamW ends near (1/lam, 1/lam), where f is far from 0."""
    end, f = ends("AdamW")[landscape.name, start]
    assert (end - 1 / LAM).abs().max().item() < 0.3
    assert f > 0.1


@on_curves
def test_cautious_decay_ends_on_the_curve_and_inside_the_pareto_front(
    landscape: toy.Landscape, start: toy.Point
) -> None:
    """CautiousDecay(Adam) ends where f is almost 0, on the arc where |x| and |y| cannot both decrease."""
    end, f = ends("CautiousDecay(Adam)")[landscape.name, start]
    assert f < 1e-3
    assert toy.distance(landscape, end).item() < 0.01
    assert toy.is_pareto(landscape, end)


@pytest.mark.parametrize(("landscape", "start"), [(RING, (4.5, 3.2)), (RING, (3.2, 5.0)), (PARABOLA, (5.0, 5.0))])
def test_cautious_decay_slides(landscape: toy.Landscape, start: toy.Point) -> None:
    """Adam stops where it meets the curve; CautiousDecay moves on to smaller |x| and |y|, one by more than 1."""
    stopped, f = ends("Adam")[landscape.name, start]
    slid, _ = ends("CautiousDecay(Adam)")[landscape.name, start]
    assert f < 1e-3
    assert (slid < stopped).all()
    assert (slid < stopped - 1).any()


def test_cautious_decay_stays_on_the_front() -> None:
    """On the diagonal Adam reaches the ring on its Pareto front, and CautiousDecay stays there."""
    stopped, stayed = (ends(method)["ring", (4.5, 4.5)][0] for method in ("Adam", "CautiousDecay(Adam)"))
    assert toy.is_pareto(RING, stopped)
    assert (stayed - stopped).abs().max().item() < 0.05


def test_pareto_front_by_search() -> None:
    """`is_pareto` agrees with a search along the ring."""
    angles = torch.arange(0.5, 360, 1, dtype=torch.float64).deg2rad()
    on_ring = lambda a: 3 + torch.stack([a.cos(), a.sin()], dim=-1)
    better = [(on_ring(angles + turn).abs() < on_ring(angles).abs()).all(-1) for turn in (-1e-3, 1e-3)]
    assert torch.equal(toy.is_pareto(RING, on_ring(angles)), ~(better[0] | better[1]))


# ------------------------------------------------------------------------------------------------
# The energies that fall under cautious decay
# ------------------------------------------------------------------------------------------------

STEP_SIZES = (0.02, 0.004)
systems = pytest.mark.parametrize("system", lyapunov.SYSTEMS, ids=lambda s: s.name)


@functools.cache
def rise(name: str, decay: str, h: float, time: float = 3.0) -> float:
    """The sum of all upward steps of H, divided by the sum of all downward ones, of the start where it is largest."""
    system = next(s for s in lyapunov.SYSTEMS if s.name == name)
    return lyapunov.change(lyapunov.walk(system, decay, h=h, lam=1.0, time=time, starts=16, seed=0)).rise


@pytest.mark.parametrize(
    "system", [s for s in lyapunov.SYSTEMS if s.name != "Lion"], ids=lambda s: s.name
)  # Lion's energy has a kink where m changes its sign; Lion-K is the same with a smooth K
def test_energy_falls_at_each_of_the_first_steps(system: lyapunov.System) -> None:
    """H never rises over the first hundred steps from each of 16 starts."""
    assert rise(system.name, "cautious", h=2e-3, time=0.2) == 0


@systems
def test_energy_falls_in_the_limit_of_small_steps(system: lyapunov.System) -> None:
    """Over the whole run H rises a little where masks change, and this goes to 0 with the step size."""
    coarse, fine = (rise(system.name, "cautious", h) for h in STEP_SIZES)
    assert fine < 0.01
    assert fine < 0.5 * coarse


@systems
@pytest.mark.parametrize("decay", ["plain", "inverted"])
def test_energy_rises_under_another_decay(system: lyapunov.System, decay: str) -> None:
    """The tests above can fail: if all weights decay, or the wrong ones, H rises at both step sizes."""
    coarse, fine = (rise(system.name, decay, h) for h in STEP_SIZES)
    assert fine > 0.01
    assert fine > 0.5 * coarse


def test_change_counts_ups_and_downs() -> None:
    """Of two runs, one that only falls and one that rises by 1 and falls by 4, the second is reported."""
    energies = torch.tensor([[9.0, 5.0], [6.0, 6.0], [3.0, 2.0]])
    assert lyapunov.change(energies) == lyapunov.Change(rise=0.25, steps=0.25)


# ------------------------------------------------------------------------------------------------
# When not to use it
# ------------------------------------------------------------------------------------------------


def descend(decay: str, steps: int = 1000) -> list[float]:
    """SGD on exp(-x) from 0, with lam = 1/e: x after each step."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    if decay != when_not.NONE:
        optimizer = CautiousDecay(optimizer, lam=1 / math.e, mask=when_not.MASKS[decay])
    walk = []
    for _ in range(steps):
        x.grad = -(-x.detach()).exp()
        optimizer.step()
        walk.append(x.item())
    return walk


def test_only_plain_decay_bounds_a_weight_whose_minimum_is_at_infinity() -> None:
    """On exp(-x) plain decay with lam = 1/e stops at 1. Cautious decay takes the steps of no decay."""
    assert descend("plain")[-1] == pytest.approx(1)
    assert descend("cautious") == pytest.approx(descend("no decay"))
    assert descend("cautious")[-1] > 4


@functools.cache
def turn(decay: str, task: str = "norm layers", takes: float = 1e-2) -> float:
    """By how much of its length a matrix turns in a step, at the end of 1,000 steps of SGD."""
    return when_not.train(when_not.Run(task, "SGD", decay, takes, seed=0), 1000).last.turn


def test_both_decays_keep_layers_behind_a_norm_turning() -> None:
    """Plain decay balances at a turn of sqrt(2*eta*lam), cautious decay at one between half of it and all of it."""
    balance = math.sqrt(2 * 1e-2)

    assert turn("plain") == pytest.approx(balance, rel=0.1)
    assert balance / 2 < turn("cautious") < turn("plain")
    assert turn("no decay") < balance / 2


def test_plain_decay_groks_where_cautious_decay_of_the_same_lam_does_not() -> None:
    """Modulo 29, all learn the training pairs by heart; the test pairs only plain decay learns within 1,000 steps."""
    settings = grokking.Settings(modulus=29, share=0.7, width=128, lr=1e-2, steps=1000)
    decays = {"plain": 1.0, "cautious": 1.0, "no decay": 0.0}
    outcomes = {decay: grokking.train(grokking.Run(decay, lam, 0), settings) for decay, lam in decays.items()}

    assert all(max(outcome.train.values()) == 1 for outcome in outcomes.values())
    assert [decay for decay, outcome in outcomes.items() if outcome.reached] == ["plain"]


# ------------------------------------------------------------------------------------------------
# From the command line
# ------------------------------------------------------------------------------------------------

EXPERIMENTS = {
    "toy_landscapes": ["CautiousDecay(Adam)", "AdamW"],
    "lyapunov": ["SGDM", "inverted"],
    "mask_ablation": ["update", "gradient", "random", "all", "no decay"],
    "sparsity": ["0.8", "no decay"],
    "convergence": ["none", "plain", "cautious"],
    "anchor": ["no decay", "to 0", "to the start"],
    "when_not": ["no decay", "plain", "cautious"],
    "grokking": ["no decay", "plain", "cautious"],
}
PICTURES = {"when_not": 2}
ROWS = {"mask_ablation": 2 * 5, "sparsity": 2 * 3, "anchor": 2 * 3, "when_not": 8 * 2 * 3, "grokking": 2 * 3}
NEEDS = {"sparsity": "sklearn", "anchor": "sklearn"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[subprocess.CompletedProcess[str], Path]]:
    """A function that runs an experiment at a small size, once, and returns what it printed and its folder."""

    @functools.cache
    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        pytest.importorskip("matplotlib")
        pytest.importorskip(NEEDS.get(name, "torch"))
        folder = tmp_path_factory.mktemp(name)
        return scripts.run(name, "--smoke", "--out", folder), folder

    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name: str, smoke: Any) -> None:
    """Each experiment prints its table with machine, versions and date, shows progress, and writes a picture."""
    done, folder = smoke(name)
    assert done.returncode == 0, done.stderr

    assert "Warning" not in done.stderr
    assert "100%" in done.stderr
    assert re.search(r"^machine  .+\nversions .*torch .+; \d{4}-\d\d-\d\d; ", done.stdout, flags=re.MULTILINE)
    assert all(f"\n{word} " in done.stdout or f" {word} " in done.stdout for word in EXPERIMENTS[name])
    assert (folder / "summary.txt").read_text().strip() in done.stdout
    assert all(picture.stat().st_size > 10_000 for picture in folder.glob("*.svg"))
    assert len(list(folder.glob("*.svg"))) == PICTURES.get(name, 1)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, smoke: Any) -> None:
    """There is a row for each run, and no two runs of the mask ablation have the same loss."""
    _, folder = smoke(name)
    found = list(csv.DictReader((folder / "results.csv").open()))

    assert len(found) == ROWS[name]
    if name == "mask_ablation":
        assert len({row["val_loss"] for row in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toy_landscapes", ["--lam", -1]),
        ("toy_landscapes", ["--steps", 0]),
        ("lyapunov", ["--step", 0.7]),
        ("lyapunov", ["--starts", "many"]),
        ("mask_ablation", ["--seeds", 1]),
        ("mask_ablation", ["--width", 33]),
        ("sparsity", ["--p", 2.5]),
        ("sparsity", ["--lam", "nan"]),
        ("anchor", ["--images", 401]),
        ("when_not", ["--takes", 0.25, 0.5, 1, 2, 4]),
        ("grokking", ["--share", 1]),
    ],
)
def test_a_wrong_argument_is_named(name: str, words: list[object]) -> None:
    """The error names a wrong argument and its value, without a traceback."""
    done = scripts.run(name, *words)

    assert done.returncode != 0
    assert str(words[0]) in done.stderr
    assert str(words[1]) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NEEDS)
def test_scripts_say_that_scikit_learn_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn, the script prints one line that says what to install."""
    for module in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for cached in (sparsity.load_images, anchor.load_digits, anchor.moved):
        cached.cache_clear()
    done = scripts.run(name, "--smoke", "--out", tmp_path)

    assert done.returncode != 0
    assert "pip install scikit-learn" in done.stderr
    assert "Traceback" not in done.stderr
