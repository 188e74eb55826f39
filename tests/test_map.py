"""The map of results/: a stack is its separate runs, the search finds the lowest place, the tables, and a small map."""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "results")]
pytest.importorskip("tqdm")

import lambda_sweep as ls  # noqa: E402
import language_model as lm  # noqa: E402
import map_report  # noqa: E402
import map_study  # noqa: E402
import scripts  # noqa: E402
from map_study import Cell, Stack  # noqa: E402

STEPS = 12
TINY = {
    "perceptron": (lambda width: map_study.ls.perceptron(4, width), lambda g: torch.randn(24, 4, generator=g)),
    "transformer": (lambda width: lm.GPT(width, 1, 3), lambda g: torch.randint(256, (24, 3), generator=g)),
}


def batches(kind: str, seed: int) -> Iterator[ls.Batch]:
    """Batches of 8 from 24 samples of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = TINY[kind][1](generator)
    y = torch.randint(10, x.shape if kind == "transformer" else (24,), generator=generator)
    return ls.in_passes(x, y, 8, generator)


@pytest.fixture(params=TINY)
def cell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    """A cell of a task with tiny models in float64, where rounding does not change a sign."""
    kind = request.param
    held_out = lambda seed: dict.fromkeys(("validation", "test"), next(batches(kind, 99)))
    task = map_study.Task(STEPS, 8, TINY[kind][0], lambda _, seed: batches(kind, seed), held_out, {})
    monkeypatch.setitem(map_study.TASKS, kind, task)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield Cell(kind, "AdamW", 32, 24)
    torch.set_default_dtype(before)


def numbers(outcomes: list[map_study.Outcome]) -> list[float]:
    return [getattr(o, name) for o in outcomes for name in ("train", "validation", "test", "test_accuracy", "norm")]


@pytest.mark.parametrize("arm", map_study.LEAKS)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_stack_is_its_separate_runs(cell: Cell, optimizer: str, arm: str) -> None:
    """Three seeds in one stack give the numbers that each gives alone."""
    stack = Stack(cell._replace(optimizer=optimizer), 0.01, arm, 4.0, (5, 6, 7))
    alone = [outcome for seed in stack.seeds for outcome in map_study.train(stack._replace(seeds=(seed,)))]

    assert numbers(map_study.train(stack)) == pytest.approx(numbers(alone))
    assert len({o.test for o in alone}) == 3


@pytest.mark.parametrize("arm", ["plain", ls.NONE])
def test_a_stack_of_one_is_a_loop_over_steps(cell: Cell, arm: str) -> None:
    """With plain decay or none, it ends where torch's AdamW with that decay ends in an ordinary loop."""
    lr, dose = 0.01, 4.0 * (arm == "plain")
    torch.manual_seed(5)
    model = TINY[cell.task][0](cell.width)
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not w for w in decayed)]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=dose / (lr * STEPS))
    given = batches(cell.task, 5)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * lm.schedule(step, STEPS)
        x, y = next(given)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    x, y = map_study.TASKS[cell.task].held_out(5)["test"]
    (outcome,) = map_study.train(Stack(cell, lr, arm, dose, (5,)))

    assert outcome.test == pytest.approx(F.cross_entropy(model(x).flatten(0, -2), y.flatten()).item(), rel=1e-5)
    assert outcome.norm == pytest.approx(math.hypot(*(w.norm().item() for w in decayed)))


def test_the_ratios_of_a_monitor() -> None:
    """With weights 1 and 3, of which the first decays, the mask ratio is 1/2 and the norm ratio 10 to 1."""
    w = nn.Parameter(torch.tensor([[1.0], [3.0]]))
    opt = map_study.CautiousDecay(torch.optim.SGD([w], lr=1e-9), lam=1e-3)
    monitor = map_study.MaskMonitor(every=map_study.LOOK_EVERY).watch(opt)
    w.grad = torch.tensor([[1.0], [-1.0]])
    opt.step()

    assert map_study.ratios(monitor) == pytest.approx((0.5, 10.0))


# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lowest", "found"),
    [(0, {-2, 0, 2}), (6, {-2, 0, 2, 4, 6, 8}), (-99, {-6, -4, -2, 0, 2}), (99, set(range(-2, 11, 2)))],
)
def test_a_search_goes_on_until_the_best_place_is_not_at_an_end(lowest: int, found: set[int]) -> None:
    """From 0 in steps of 2 between -6 and 10, it tries the neighbours of each best place, up to the limits."""
    assert set(map_study.search(lambda at: abs(at - lowest), [0], 2, (-6, 10))) == found


def test_a_start_outside_of_the_limits_is_moved_to_them() -> None:
    """If the first place is above the largest, the search begins with the largest."""
    assert set(map_study.search(lambda at: -at, [14, 20], 2, (0, 11))) == {9, 11}


@pytest.mark.parametrize(("steps", "largest"), [(1200, 1024), (640, 512), (600, 512)])
def test_no_step_flips_a_sign(steps: int, largest: float) -> None:
    """The largest dose, lam*lr*steps, is the largest power of 2 with eta*lam below 1."""
    assert map_study.dose(map_study.limits(steps)[1]) == largest
    assert largest < steps


class Valley:
    """Losses without training: lowest at a given lr and, for each arm, at a given dose in octaves."""

    def __init__(self, lr: float, at: dict[str, int]) -> None:
        self.lr, self.at, self.stacks = lr, at, []

    def __call__(self, stack: Stack) -> list[map_study.Outcome]:
        self.stacks.append(stack)
        distance = abs(math.log2(stack.dose) - self.at[stack.arm]) if stack.dose else 50
        loss = 1 + distance / 100 + abs(math.log2(stack.lr / self.lr)) / 10
        return [
            map_study.Outcome(
                stack.cell.task, stack.cell.optimizer, stack.lr, stack.arm, stack.dose, seed, stack.dose, 0.0, loss,
                loss, 1.0, 0.5, 1.0, 1.0, stack.cell.width, stack.cell.samples, 2.0,
            )
            for seed in stack.seeds
        ]  # fmt: skip


AT = {"plain": 3, "cautious": 8, "leak 0.1": 9, "leak 0.25": 1}


def explored(folder: Path) -> tuple[Valley, map_study.Runs]:
    """A cell whose lowest losses are at 0.032 and AT."""
    valley = Valley(0.032, AT)
    runs = map_study.Runs(Cell("mnist1d", "AdamW", 128, 2000), folder, valley)
    assert map_study.explore(runs) == 0.032
    return valley, runs


def test_a_cell_is_explored_up_to_the_best_lam_of_each_arm(tmp_path: Path) -> None:
    """The rate is found two octaves from the start; each arm has its lowest dose, both neighbours and one between."""
    valley, _ = explored(tmp_path)
    reported = [stack for stack in valley.stacks if stack.seeds == map_study.SEEDS]

    assert all(stack.lr == 0.032 for stack in reported)
    for arm, at in AT.items():
        doses = {stack.dose for stack in reported if stack.arm == arm}
        assert {map_study.dose(k) for k in (at - 1, at - 0.5, at, at + 1)} <= doses
    multiples = {stack.dose for stack in reported if stack.arm == "cautious"}
    assert {map_study.dose(AT["plain"] + k) for k in range(4)} <= multiples


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    """A second call trains nothing, and one whose last line was cut off trains that seed alone."""
    valley, runs = explored(tmp_path)
    again, _ = explored(tmp_path)
    lines = runs.path.read_text().splitlines(keepends=True)
    runs.path.write_text("".join(lines[:-1]) + lines[-1][:20])
    cut, _ = explored(tmp_path)

    assert len(valley.stacks) == len({stack[1:] for stack in valley.stacks})
    assert again.stacks == []
    assert cut.stacks == [valley.stacks[-1]._replace(seeds=valley.stacks[-1].seeds[-1:])]


# ------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------


def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> map_report.Place:
    """The cell above, as the report reads it."""
    _, runs = explored(tmp_path)
    monkeypatch.setattr(map_study, "CELLS", (runs.cell,))
    (found,) = map_report.load(tmp_path)
    return found


def test_a_place_has_the_best_lam_of_each_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report finds the four doses, the passes, and the gap between test and training loss."""
    found = place(tmp_path, monkeypatch)

    assert {arm: found.lam(arm) for arm in AT} == {arm: map_study.dose(at) for arm, at in AT.items()}
    assert found.cell.passes == 60
    assert found.gap == pytest.approx(1.0)
    assert found.test("plain") == pytest.approx(1.0)


def test_an_unfinished_cell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that lacks one run is not on the page, which names it."""
    _, runs = explored(tmp_path)
    monkeypatch.setattr(map_study, "CELLS", (runs.cell,))
    lines = runs.path.read_text().splitlines(keepends=True)
    runs.path.write_text("".join(lines[:-1]))

    assert map_report.load(tmp_path) == []
    assert map_report.left_out([]) == "mnist1d, AdamW, width 128: 2,000"


def test_regret_is_the_distance_to_the_best_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of 3, 2, 2.5 and 4 have regrets of 1, 0, 0.5 and 2."""
    losses = dict(zip(map_report.NAMES, (3.0, 2.0, 2.5, 4.0), strict=True))
    monkeypatch.setattr(map_report.Place, "test", lambda self, arm: losses[arm])

    assert list(map_report.regrets(place(tmp_path, monkeypatch)).values()) == [1.0, 0.0, 0.5, 2.0]


def test_a_prediction_is_the_mean_of_the_nearest_points_of_other_groups() -> None:
    """The point at 1 is predicted by those at 2 and 3, not by that of its own group at 1.1."""
    made = [map_report.Point(*of) for of in ((1, 5, "a"), (1.1, 7, "a"), (2, 10, "b"), (3, 20, "b"), (9, 90, "c"))]

    assert map_report.predictions(made, 2)[0] == 15
    assert map_report.predictions(made, 9)[0] == 40


def test_the_nearest_lam_is_nearest_by_its_factor() -> None:
    """Of 1 and 4, 1.9 is nearer to 1 and 2.1 nearer to 4; no decay is never nearest."""
    arm = map_report.Arm([0, 1, 4], [[], [], []])

    assert [map_report.nearest_row(arm, lam) for lam in (0.01, 1.9, 2.1)] == [1, 1, 2]


# ------------------------------------------------------------------------------------------------
# The protocol, the page, and the command line
# ------------------------------------------------------------------------------------------------


def test_the_protocol_says_what_the_map_does() -> None:
    """Seeds, cells, steps and limits on the page are those of the code."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "map_protocol.md").read_text())

    assert f"Seeds {map_study.SEEDS[0]} to {map_study.SEEDS[-1]}, eight for each cell" in text
    assert f"seeds {map_study.TUNING_SEEDS[0]} and {map_study.TUNING_SEEDS[1]}" in text
    first, amended = text.split("## Amendments")
    listed = [
        [
            (task, optimizer, int(width), int(samples.replace(",", "")))
            for task, optimizer, width, sizes in re.findall(r"\| (\w+) \| (\w+) \| (\d+) \| ([\d, ]+) \|", part)
            for samples in sizes.split(", ")
        ]
        for part in (first, amended)
    ]
    assert listed[1] == list(map_study.CELLS)
    assert set(listed[0]) <= set(listed[1])
    planned = len(listed[0])
    assert f"These are {planned} cells" in text
    assert f"in {planned} cells make {3 * planned} intervals" in text
    for task, made in map_study.TASKS.items():
        assert re.search(rf"\| {task} \|[^|]+\|[^|]+\| {made.steps:,} steps", text)


@pytest.mark.parametrize("cell", map_study.CELLS, ids=str)
def test_a_pass_ends_with_a_full_batch(cell: Cell) -> None:
    """The samples of each cell are a multiple of those of a step, so that the number of passes is exact."""
    assert cell.samples % map_study.TASKS[cell.task].per_step == 0


def test_the_page_is_made_from_the_committed_runs() -> None:
    """docs/map.md is the output of map_report.py for results/map and map_page.md, and its pictures exist."""
    text = (ROOT / "docs" / "map.md").read_text()
    assert text == map_report.page(map_study.FOLDER)
    pictures = re.findall(r"\]\(([\w-]+\.svg)\)", text)
    assert pictures
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)


@pytest.mark.slow
def test_a_small_map(tmp_path: Path) -> None:
    """The command makes a cell of short runs; a second call adds nothing."""
    words = ["--jobs", "1", "--smoke", str(tmp_path)]
    assert scripts.run("map_study", *words).returncode == 0

    first = made(tmp_path)
    assert {outcome.arm for outcome in first} == {*map_study.LEAKS, ls.NONE}
    assert all(math.isfinite(outcome.test) for outcome in first)
    assert len({replace(outcome, seconds=0) for outcome in first}) == len(first)
    assert scripts.run("map_study", *words).returncode == 0
    assert made(tmp_path) == first


def made(folder: Path) -> list[Any]:
    return ls.read(folder / "bytes_AdamW_32_512.csv", map_study.Outcome)
