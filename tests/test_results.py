"""The study's statistics, on numbers that can be checked by eye; its page; and a small study on the command line."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "results")]
pytest.importorskip("tqdm")

import lambda_sweep as ls  # noqa: E402
import report  # noqa: E402
import scripts  # noqa: E402
import study  # noqa: E402

BLANK = ls.Outcome(
    "task", "AdamW", 0.1, "plain", 1.0, 0, lam=1.0, train=0.0, validation=0.0, test=0.0, test_accuracy=0.0,
    mask_ratio=1.0, norm=1.0, seconds=1.0,
)  # fmt: skip


def arm(validation: Sequence[Sequence[float]], test: Sequence[Sequence[float]], lams: Sequence[float]) -> report.Arm:
    """An arm from losses with one row per lam and one column per seed."""
    cells = [
        [replace(BLANK, seed=seed, validation=v, test=t) for seed, (v, t) in enumerate(zip(*rows, strict=True))]
        for rows in zip(validation, test, strict=True)
    ]
    return report.Arm(list(lams), cells)


def test_lam_is_chosen_on_validation() -> None:
    """The lam with the lowest validation loss is chosen, although its test loss is the highest."""
    made = arm([[3, 3], [1, 1], [2, 2]], [[1, 1], [9, 9], [1, 1]], [0, 1, 2])
    assert made.best == 1


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_lam_with_a_diverged_run_is_not_chosen(loss: float) -> None:
    """A lam with one run that diverged is not chosen, however low its other losses are."""
    assert report.chosen(torch.tensor([[0.0, loss], [5.0, 5.0]])) == 1


def test_a_constant_difference_has_no_width() -> None:
    """If the first is lower by 0.5 at each seed, the mean and both ends of the interval are -0.5."""
    first = arm([[1, 2, 3]], [[1.5, 2.5, 3.5]], [0])
    second = arm([[1, 2, 3]], [[2, 3, 4]], [0])
    found = report.difference(first, second)

    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert (found.lower, found.seeds, found.verdict) == (3, 3, "better")
    assert report.difference(second, first).verdict == "worse"


def test_differences_are_paired_by_seed() -> None:
    """Losses that vary by 100 between seeds, and by 1 between arms at the same seed, differ by 1."""
    first = arm([[0, 100, 200, 300]], [[0, 100, 200, 300]], [0])
    second = arm([[0, 100, 200, 300]], [[1, 101, 201, 301]], [0])

    assert report.difference(first, second).high == pytest.approx(-1)


def test_interval_of_the_mean_of_two_seeds() -> None:
    """With differences of -1 and 3, resamples have the means -1, 1 and 3, the outer ones with probability 1/4 each."""
    found = report.difference(arm([[0, 0]], [[0, 0]], [0]), arm([[0, 0]], [[1, -3]], [0]))
    assert (found.mean, found.low, found.high, found.lower) == pytest.approx((1, -1, 3, 1))
    assert found.verdict == ""


def test_the_interval_contains_the_choice_of_lam() -> None:
    """If two lams with equal mean validation loss differ by 10 in the test loss, the interval is from 0 to 10."""
    unsure = arm([[0, 1], [1, 0]], [[0, 0], [10, 10]], [0, 1])
    found = report.difference(unsure, arm([[0, 0]], [[0, 0]], [0]))
    assert (found.low, found.high) == pytest.approx((0, 10))


def test_the_control_is_compared_at_the_lam_of_the_first() -> None:
    """With ``same_row`` both arms use the best row of the first, although the control's own best row is another."""
    cautious = arm([[2, 2], [1, 1]], [[5, 5], [4, 4]], [0, 1])
    control = arm([[0, 0], [9, 9]], [[0, 0], [7, 7]], [0, 1])
    assert report.difference(cautious, control, same_row=True).mean == pytest.approx(-3)


def test_flat_range() -> None:
    """A mean 0.25 behind the best, with standard error 0.63, is in the range; 1 behind with 0.82, or 3, is not."""
    best = [0.0, 0.0, 0.0, 0.0]
    near = [3.0, 1.0, 1.0, -1.0]  # mean 1, standard deviation 1.63, standard error 0.82
    nearer = [2.0, 0.0, 0.0, -1.0]  # mean 0.25, standard error 0.63
    far = [3.0, 3.0, 3.0, 3.0]
    rows = [far, near, best, nearer, far]
    assert report.flat(arm(rows, rows, [0, 1, 2, 4, 8])) == (2, 4)


def test_learning_rate_is_that_of_the_lowest_mean_validation_loss() -> None:
    """The mean over seeds is lowest at 0.1, which is chosen, although one seed is lowest at 0.2."""
    losses = {(0.1, 0): 2.0, (0.1, 1): 2.0, (0.2, 0): 1.0, (0.2, 1): 4.0}
    outcomes = [replace(BLANK, lr=lr, seed=seed, validation=loss) for (lr, seed), loss in losses.items()]
    assert study.best_rate(outcomes) == 0.1


def test_a_sweep_returns_its_own_controls(tmp_path: Path) -> None:
    """If two optimizers share a file, the sweep of one returns no run or control of the other."""
    path = tmp_path / "runs.csv"
    for optimizer in ("AdamW", "SGD"):
        for run in ls.sweep("digits", optimizer, 0.1, [1.0], [0]):
            made = replace(BLANK, task="digits", optimizer=optimizer, arm=run.arm, dose=run.dose)
            ls.append(path, made)
            if run.arm == "cautious":
                ls.append(path, replace(made, arm="control"))
    found = ls.carry_out(ls.sweep("digits", "SGD", 0.1, [1.0], [0]), path, ls.Place(), jobs=1)

    assert {outcome.optimizer for outcome in found} == {"SGD"}
    assert sorted(outcome.arm for outcome in found) == ["cautious", "control", "none", "plain"]


def test_protocol_says_what_the_study_does() -> None:
    """Doses, seeds, tuning and the number of runs on the page are those of the code."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "protocol.md").read_text())

    assert f"lam * lr * steps = {', '.join(f'{dose:g}' for dose in study.DOSES)}," in text
    assert f"Seeds {study.SEEDS[0]} to {study.SEEDS[-1]}, eight for each cell" in text
    assert f"at the doses {' and '.join(f'{dose:g}' for dose in study.TUNING_DOSES)}, seeds 900 and 901" in text
    runs = len(study.SEEDS) * (len(ls.ARMS) * len(study.DOSES) + 1)
    assert f"{runs} runs for each setting, {runs * len(study.SETTINGS):,} in all" in text


def test_page_is_made_from_the_committed_runs() -> None:
    """docs/results.md is the output of report.py for results/*.csv and page.md, and its pictures exist."""
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == report.page(ROOT / "results")
    pictures = re.findall(r"\]\(([\w-]+\.svg)\)", text)
    assert pictures
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)


def test_every_run_of_the_study_is_in_the_file_once() -> None:
    """At least 176 runs for each setting, none twice, at the learning rate that the tuning runs choose."""
    outcomes = ls.read(ROOT / "results" / "runs.csv")
    tuning = ls.read(ROOT / "results" / "tuning.csv")
    _, rates = report.load(ROOT / "results")

    assert len({outcome.key for outcome in outcomes}) == len(outcomes)
    assert tuple(rates) == study.SETTINGS
    for (task, optimizer), lr in rates.items():
        of_setting = [o for o in outcomes if (o.task, o.optimizer, o.lr) == (task, optimizer, lr)]
        assert {o.seed for o in of_setting} == set(study.SEEDS)
        assert {o.dose for o in of_setting} >= {0.0, *study.DOSES}
        assert len(of_setting) >= 176
        assert study.best_rate([o for o in tuning if (o.task, o.optimizer) == (task, optimizer)]) == lr


def test_a_small_study_resumes(tmp_path: Path) -> None:
    """If the last line of the file was cut off, a second call gives the same runs with the same numbers."""
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")

    def carry_out() -> list[ls.Outcome]:
        assert scripts.run("study", "--jobs", 1, "--smoke", tmp_path).returncode == 0
        return ls.read(tmp_path / "runs.csv")

    first = carry_out()
    lines = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:-1]) + lines[-1][:20])
    again = carry_out()

    assert len(first) == 2 * (3 * 2 + 1)
    assert [replace(each, seconds=0) for each in sorted(again, key=str)] == [
        replace(each, seconds=0) for each in sorted(first, key=str)
    ]
