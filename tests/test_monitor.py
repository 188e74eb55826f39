"""MaskMonitor: its rows on every path, that it changes no weight, what it keeps and writes, and its warnings."""

import contextlib
import csv
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Method, PathOptions, net, train, values, weight
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay, plot_ratio_by_layer, plot_weight_norms
from cwd_wrap.buckets import Report
from cwd_wrap.monitor import COLUMNS

NAN = float("nan")


def watched(opt: Any, **options: Any) -> MaskMonitor:
    opt.observer = monitor = MaskMonitor(**options)
    return monitor


def norm(*numbers: float) -> Any:
    return pytest.approx(math.hypot(*numbers))


# ---- what a row holds


def test_a_row_with_a_leak(every_path: PathOptions) -> None:
    """The decay's size counts what leaks; the share of weights that decayed is the mask's."""
    p = weight(1, 1, -1, -2, grad=[1, -1, 1, -1])
    opt = CautiousDecay(SGD([p], lr=0.1, **every_path.base), lam=0.5, leak=0.2, **every_path)
    monitor = watched(opt)
    opt.step()
    (row,) = monitor.rows()

    assert row["share_decayed"] == 0.5
    assert row["decay_norm"] == norm(0.05, 0.01, 0.01, 0.1)


@pytest.mark.parametrize("strict", [False, True])
def test_a_row(strict: bool, every_path: PathOptions) -> None:
    """A whole row by hand: with gradients 1, -1, 0, -1 the second weight grows, and the third stays in place."""
    p = weight(1, 1, -1, -2, grad=[1, -1, 0, -1])
    opt = CautiousDecay(SGD([p], lr=0.1, **every_path.base), lam=0.5, strict=strict, **every_path)
    monitor = watched(opt)
    opt.step()
    (row,) = monitor.rows()

    assert row == {
        "step": 1,
        "group": 0,
        "name": "group 0",
        "path": every_path["path"],
        "weights": 4,
        "eta_lam": pytest.approx(0.05),
        "share_decayed": 0.5 if strict else 0.75,
        "share_towards": 0.5,
        "decay_norm": norm(0.05, 0 if strict else 0.05, 0.1),
        "update_norm": norm(0.1, 0.1, 0.1),
        "weight_norm": norm(*p.tolist()),
    }
    assert tuple(row) == COLUMNS
    assert {type(value) for value in row.values()} == {int, float, str}


def test_rows_are_the_norms_of_what_happened(every_path: PathOptions) -> None:
    """Over steps of AdamW, the norms of each group or parameter equal those computed from a copy and a plain twin."""
    for per_parameter in (False, True):
        model = net().double()
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.1}]
        opt = CautiousDecay(AdamW(groups, lr=0.01, weight_decay=0.5, **every_path.base), **every_path)
        monitor = watched(opt, per_parameter=per_parameter)
        twin = net().double()
        plain = AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
        for k in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            twin.load_state_dict(model.state_dict())
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).double()
            opt.step()
            plain.step()
            stepped = list(zip(before, twin.parameters(), model.parameters(), strict=True))
            parts = [[each] for each in stepped] if per_parameter else [stepped[:2], stepped[2:]]
            for row, part in zip(monitor.rows()[-len(parts) :], parts, strict=True):
                update, decay, after = (
                    math.hypot(*(float(t.detach().norm()) for t in column))
                    for column in ([x - w for x, w, _ in part], [w - p for _, w, p in part], [p for _, _, p in part])
                )

                assert row["update_norm"] == pytest.approx(update, rel=1e-6)
                assert row["decay_norm"] == pytest.approx(decay, rel=1e-6)
                assert row["weight_norm"] == pytest.approx(after, rel=1e-6)
                assert row["step"] == k + 1


def test_a_monitor_changes_nothing(every_method: Method) -> None:
    """For every method on every path, weights trained with a monitor equal those trained without it, bit for bit."""
    trained = []
    for look in (False, True):
        model = net()
        opt = every_method.wrap(AdamW(model.parameters(), lr=0.01, weight_decay=0.5, **every_method.base))
        if look:
            monitor = watched(opt, per_parameter=True)
        train(model, opt, range(4))
        trained.append(values(model))

    assert torch.equal(*trained)
    path = every_method.path["path"]
    first = (
        {"direction", "direction+one_pass", "pieces"} if path == "one_pass" else set()
    )  # a step that makes the state
    assert {row["path"] for row in monitor.rows()} <= {path} | first
    assert len(monitor.rows()) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_monitor_changes_no_16_bit_weight(dtype: torch.dtype, rounding: str, every_path: PathOptions) -> None:
    """The same holds in 16 bits with either rounding, and the weight norm is right up to their rounding."""
    trained = []
    for look in (False, True):
        p = nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype))
        base = SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5, **every_path.base)
        opt = CautiousDecay(base, rounding=rounding, **every_path)
        if look:
            monitor = watched(opt)
        for k in range(3):
            p.grad = torch.randn(3000, generator=torch.Generator().manual_seed(k)).to(dtype)
            opt.step()
        trained.append(p.detach().clone())

    assert torch.equal(*trained)
    row = monitor.rows()[-1]
    assert row["weight_norm"] == pytest.approx(float(p.detach().float().norm()), rel=2e-3)
    assert 0.3 < row["share_decayed"] < 0.7


def test_rows_of_the_other_methods() -> None:
    """CautiousUpdate and PNormDecay report the share kept and the norms of update and weights; the rest is NaN."""
    for cls, share in ((CautiousUpdate, 0.5), (PNormDecay, 1.0)):
        p = weight(1, 1, -1, -2, grad=[1, -1, 1, -1])
        opt = cls(SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5))
        opt.step()
        p.grad = torch.tensor([0.5, 0.5, -0.5, -0.5])  # the momentum is larger, so u*g > 0 in two places only
        before, monitor = p.detach().clone(), watched(opt)
        opt.step()
        (row,) = monitor.rows()
        update = [0.1 * (0.9 * old + new) for old, new in zip((1, -1, 1, -1), (0.5, 0.5, -0.5, -0.5), strict=True)]

        assert [math.isnan(row[key]) for key in ("share_towards", "decay_norm")] == [True, True]
        assert row["update_norm"] == norm(*update)
        assert row["weight_norm"] == norm(*p.tolist())
        assert row["share_decayed"] == share
        assert not torch.equal(before, p)


@pytest.mark.parametrize("mask", ["gradient", "random", "all"])
def test_rows_of_the_ablations(mask: str) -> None:
    """The paper's ablations report every number, and with mask="all" all weights decay."""
    p = weight(1, 1, -1, -2, grad=[1, -1, 1, -1])
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5, mask=mask)
    monitor = watched(opt)
    opt.step()
    (row,) = monitor.rows()

    assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())
    assert row["share_towards"] == 0.5
    if mask == "all":
        assert (row["share_decayed"], row["decay_norm"]) == (1.0, norm(*[0.05] * 3, 0.1))


def test_names() -> None:
    """A group's row has its key "name" or else its index; a parameter's row, without given names, group and place."""
    p, q, r = weight(1, grad=[1]), weight(2, grad=[1]), weight(3, grad=[1])
    opt = CautiousDecay(SGD([{"params": [p], "name": "head"}, {"params": [q, r]}], lr=0.1), lam=0.5)
    for per_parameter, expected in ((False, ["head", "group 1"]), (True, ["0.0", "1.0", "1.1"])):
        monitor = watched(opt, per_parameter=per_parameter)
        opt.step()

        assert [row["name"] for row in monitor.rows()] == expected


def test_names_of_parameters(every_path: PathOptions) -> None:
    """With named parameters (torch 2.6), rows have their names on every path; one without a gradient has no row."""
    model = net()
    try:
        base = AdamW(model.named_parameters(), lr=0.01, weight_decay=0.5, **every_path.base)
    except TypeError:
        pytest.skip("this torch takes no named parameters")
    opt = CautiousDecay(base, **every_path)
    train(model, opt, range(1))
    monitor = watched(opt, per_parameter=True)
    model[0].weight.grad = None
    opt.step()

    assert [(row["name"], row["weights"]) for row in monitor.rows()] == [("0.bias", 4), ("2.weight", 4), ("2.bias", 1)]


def test_rows_of_a_sparse_gradient() -> None:
    """With a sparse gradient, only the rows in it count."""
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), (4, 2), check_invariants=True)
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5)
    monitor = watched(opt)
    opt.step()
    (row,) = monitor.rows()

    assert (row["path"], row["weights"], row["share_decayed"]) == ("rows", 4, 0.5)
    assert row["update_norm"] == norm(*[0.1] * 4)


# ---- steps, groups and looks


def test_every_nth_step(every_path: PathOptions) -> None:
    """With every=3 the first of each three steps has a row; for the others no report is made."""
    p = weight(1, 2, grad=[1, -1])
    opt = CautiousDecay(SGD([p], lr=0.1, **every_path.base), lam=0.5, **every_path)
    monitor, reports = watched(opt, every=3), []
    real = MaskMonitor.__call__
    monitor_class = type("Recording", (MaskMonitor,), {"__call__": lambda self, r: (reports.append(r), real(self, r))})
    monitor.__class__ = monitor_class
    for _ in range(7):
        opt.step()

    assert [row["step"] for row in monitor.rows()] == [1, 4, 7]
    assert len(monitor.ratios) == len(reports) == 3


def test_only_the_last_rows_are_kept() -> None:
    """With keep=5 and two rows per step, the last two steps are kept, and the memory of 300 steps is bounded."""
    p, q = weight(1, grad=[1]), weight(2, grad=[1])
    opt = CautiousDecay(SGD([{"params": [p]}, {"params": [q]}], lr=1e-6), lam=0.5)
    monitor = watched(opt, keep=5)
    for _ in range(300):
        opt.step()

    assert [(row["step"], row["group"]) for row in monitor.rows()] == [(299, 0), (299, 1), (300, 0), (300, 1)]
    assert len(monitor.ratios) == len(monitor._looks) == 2
    assert len(monitor._apart) < 256


def test_an_engine_that_steps_one_group_at_a_time() -> None:
    """If step is called for one group at a time, as in DeepSpeed, rows have the group's index, name and step."""
    p, q = weight(1, grad=[1]), weight(2, grad=[-1])
    opt = CautiousDecay(SGD([{"params": [p], "name": "a"}, {"params": [q], "name": "b"}], lr=0.1), lam=0.5)
    monitor, groups = watched(opt, every=2), opt.param_groups
    for _ in range(3):
        for group in groups:
            opt.param_groups = [group]
            opt.step()
        opt.param_groups = groups
    rows = [(row["step"], row["group"], row["name"], row["share_decayed"]) for row in monitor.rows()]

    assert rows == [(1, 0, "a", 1.0), (1, 1, "b", 0.0), (3, 0, "a", 1.0), (3, 1, "b", 0.0)]


def test_groups_and_parameters_that_come_later() -> None:
    """The rows of an added group have the step of the others; a replaced parameter keeps the name of its place."""
    p, q = weight(1, grad=[1]), weight(2, grad=[1])
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5)
    monitor = watched(opt, per_parameter=True)
    opt.step()
    opt.add_param_group({"params": [q]})
    opt.param_groups[0]["params"] = [weight(1, 2, 3, grad=[1, 1, 1])]
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    rows = [(row["step"], row["name"], row["weights"]) for row in monitor.rows()]

    assert rows == [(1, "0.0", 1), (2, "0.0", 3), (2, "1.0", 1), (3, "0.0", 3), (3, "1.0", 1)]


def test_a_monitor_called_from_an_observer() -> None:
    """Called from the user's own observer, a monitor counts the steps itself, and `every` applies."""
    p = weight(1, 2, grad=[1, -1])
    opt, monitor = CautiousDecay(SGD([p], lr=0.1), lam=0.5), MaskMonitor(every=2)
    opt.observer = lambda report: monitor(report)
    for _ in range(3):
        opt.step()

    assert [row["step"] for row in monitor.rows()] == [1, 3]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_eta_lam_is_that_of_the_step(lr: Any) -> None:
    """The rows have the learning rates of a schedule, also those of a tensor that is changed in place."""
    p = weight(1, 2, grad=[1, -1])
    opt = CautiousDecay(SGD([p], lr=lr), lam=0.5)
    monitor = watched(opt)
    for factor in (1.0, 0.5, 0.5):
        if isinstance(lr, Tensor):
            lr.mul_(factor)
        else:
            opt.param_groups[0]["lr"] *= factor
        opt.step()

    assert [row["eta_lam"] for row in monitor.rows()] == pytest.approx([0.05, 0.025, 0.0125])


def test_eta_lam_stays_on_its_device() -> None:
    """eta*lam on an accelerator (here "meta") is not read, but stored in a column beside the sums."""
    p = weight(1, 2, grad=[1, -1])
    opt, reports = CautiousDecay(SGD([p], lr=0.1), lam=0.5), []
    opt.observer = reports.append
    opt.step()
    part = reports[0].parts[0]
    part.sums, part.eta_lam = part.sums.to("meta"), torch.tensor(0.05, device="meta")
    monitor = MaskMonitor()
    monitor(Report([part]))
    kept = monitor._looks[0].parts[0]
    kept.sums = torch.tensor([[1.0, 1.0, 4.0, 1.0, 1.0, 0.25]])

    assert (monitor.rows()[0]["eta_lam"], monitor.rows()[0]["decay_norm"]) == (0.25, 0.5)


def test_a_step_that_moves_nothing_has_no_row() -> None:
    """A step without a gradient has no row, and its share is NaN; a step with learning rate 0 is not counted."""
    p = weight(1, 2)
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5)
    monitor = watched(opt)
    opt.step()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()

    assert monitor.rows() == []
    assert len(monitor.ratios) == 1
    assert math.isnan(monitor.ratios[0])
    assert math.isnan(monitor.read())


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"keep": 0}, {"keep": None}], ids=str)
def test_unfit_options(options: dict[str, Any]) -> None:
    """The error for an option that is no whole number above 0 names the option."""
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}={options[name]!r}: pass a whole number above 0$"):
        MaskMonitor(**options)


@pytest.mark.parametrize("start", [-1, 1.5, True, None, "7"], ids=str)
def test_an_unfit_start(start: Any) -> None:
    """The error for a start that is no whole number from 0 up."""
    with pytest.raises(ValueError, match=f"^start={start!r}: pass a whole number from 0 up$"):
        MaskMonitor(start=start)


# ---- where rows go


def test_each_row_is_written_once(tmp_path: Path) -> None:
    """`write` passes on new rows only; `rows` and the CSV file hold all; none of them changes the result of `read`."""
    p = weight(1, 2, grad=[1, -1])
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5)
    monitor, written, batches = watched(opt), [], []
    for steps in (2, 0, 1):
        for _ in range(steps):
            opt.step()
        before = len(written)
        monitor.write(written.append)
        batches.append(len(written) - before)
    monitor.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    assert batches == [2, 0, 1]
    assert written == monitor.rows()
    assert [
        {key: type(row[key])(line[key]) for key in row} for row, line in zip(written, lines, strict=True)
    ] == written
    assert monitor.read() == 0.5


# ---- warnings


def growing_group(**options: Any) -> tuple[CautiousDecay, MaskMonitor]:
    """An optimizer with a first group in which every weight grows, and its monitor."""
    p, q = weight(*[1] * 200, grad=[-1] * 200), weight(1, -1, grad=[1, 1])
    groups = [{"params": [p], "name": "grows"}, {"params": [q]}]
    opt = CautiousDecay(SGD(groups, lr=1e-4), lam=0.5)
    return opt, watched(opt, **options)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_share_that_stays_near_zero_is_warned_of(per_parameter: bool) -> None:
    """When rows are read after 100 such looks, one warning names the group, says what it means and what to do."""
    opt, monitor = growing_group(per_parameter=per_parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            opt.step()
        monitor.rows()
        opt.step()
    with pytest.warns(UserWarning) as caught:
        monitor.write(dict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.rows()

    assert [str(each.message) for each in caught] == [
        "share_decayed of param group 0 (grows) was below 0.01 at each of the last 100 looks: the mask is 0 almost "
        "everywhere, so the method does next to nothing there. See whether its weight_norm grows; if it should not, "
        "use plain decay there, or a smaller lr"
    ]
    assert caught[0].filename == __file__


def test_read_counts_looks_that_are_not_kept() -> None:
    """With one of ten rows kept, the share since the last reading is still that of all ten steps."""
    p = torch.nn.Parameter(torch.ones(2))
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.1)
    opt.observer = monitor = MaskMonitor(keep=1)
    for step in range(10):
        p.grad = torch.tensor([1.0, 1.0 if step < 5 else -1.0])
        opt.step()

    assert len(monitor.rows()) == 1
    assert monitor.read() == 0.75
    assert math.isnan(monitor.read())


def test_a_writer_that_raises_gets_the_row_again() -> None:
    """If the writer raises at the second of three rows, the next call begins with that row."""
    p = torch.nn.Parameter(torch.ones(2))
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.1)
    opt.observer = monitor = MaskMonitor()
    for _ in range(3):
        p.grad = torch.ones(2)
        opt.step()

    def full(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise OSError

    with pytest.raises(OSError):
        monitor.write(full)
    again: list[int] = []
    monitor.write(lambda row: again.append(row["step"]))
    assert again == [2, 3]


def test_one_look_in_a_hundred_is_enough() -> None:
    """There is no warning if weights decayed at one of the last 100 looks."""
    opt, monitor = growing_group()
    for k in range(100):
        opt.param_groups[0]["params"][0].grad.fill_(1.0 if k == 50 else -1.0)
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.rows()


def test_a_decay_lost_in_16_bits_is_warned_of_by_group() -> None:
    """Each group with an eta*lam too small for bfloat16 gives one warning with its index, its name and a way out."""
    groups = [
        {"params": [weight(1, grad=[1], dtype=torch.bfloat16)], **more} for more in ({}, {"name": "head"}, {"lr": 1})
    ]
    opt = CautiousDecay(SGD(groups, lr=1e-4), lam=0.1)
    with pytest.warns(UserWarning) as caught:
        opt.step()
        opt.step()

    assert [str(each.message) for each in caught] == [
        f"lr * weight_decay = 1e-05 is too small for bfloat16 weights (needs 0.002), so nothing decays in {group}. "
        'Pass rounding="stochastic", or keep float32 weights'
        for group in ("param group 0", "param group 1 (head)")
    ]


# ---- which steps count


def failing(p: nn.Parameter, at: set[int]) -> Any:
    """A wrapper whose base raises in the calls of those numbers, and a function that steps it so often."""

    class Failing(SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls in at:
                raise RuntimeError
            return super().step(closure)

    opt = CautiousDecay(Failing([p], lr=0.1, weight_decay=0.5))

    def steps(n: int) -> None:
        for _ in range(n):
            with contextlib.suppress(RuntimeError):
                opt.step()

    return opt, steps


@pytest.mark.parametrize(
    ("every", "at", "steps"),
    [
        (1, {1}, [1, 2, 3, 4]),
        (1, {2, 3}, [1, 2, 3]),
        (2, {2}, [1, 3]),
        (2, {3}, [1, 3]),
        (2, {1, 4}, [1, 3]),
        (3, {2, 3}, [1]),
    ],
    ids=str,
)
def test_a_step_that_raises_does_not_count(every: int, at: set[int], steps: list[int]) -> None:
    """Of five calls some raise: the others are numbered as if these had not been, whether or not they were due."""
    opt, step = failing(weight(1, grad=[1]), at)
    monitor = watched(opt, every=every)
    step(5)

    assert steps == [row["step"] for row in monitor.rows()]


def test_an_error_before_the_first_weight_does_not_count() -> None:
    """A wrong learning rate, and a hook that raises, count as no step either."""
    opt = CautiousDecay(SGD([weight(1, grad=[1])], lr=0.1, weight_decay=0.5))
    monitor = watched(opt)
    opt.step()
    opt.param_groups[0]["lr"] = NAN
    with pytest.raises(ValueError, match="lr"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    with opt_hook(opt, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.step()

    assert [1, 2] == [row["step"] for row in monitor.rows()]


@contextlib.contextmanager
def opt_hook(opt: Any, error: type[BaseException]) -> Iterator[None]:
    def raises(*_: object) -> None:
        raise error

    handle = opt.base_optimizer.register_step_post_hook(raises)
    yield
    handle.remove()


def test_a_failure_between_two_groups_leaves_the_others_count() -> None:
    """Where each call steps one group (DeepSpeed), a failed call of one group does not change the count of another."""
    p, q = weight(1, grad=[1]), weight(1, grad=[1])
    opt = CautiousDecay(SGD([{"params": [p]}, {"params": [q]}], lr=0.1, weight_decay=0.5))
    monitor, groups = watched(opt), opt.param_groups
    for chosen, lr in ((0, 0.1), (1, 0.1), (0, NAN), (1, 0.1), (0, 0.1)):
        groups[chosen]["lr"] = lr
        opt.param_groups = [groups[chosen]]
        with contextlib.suppress(ValueError):
            opt.step()

    assert [(0, 1), (1, 1), (1, 2), (0, 2)] == [(row["group"], row["step"]) for row in monitor.rows()]


def test_a_failed_step_with_a_learning_rate_of_0_takes_no_count_back() -> None:
    """A call with lr 0 is no step: if it raises, the steps before it still count."""
    opt, step = failing(weight(1, grad=[1]), {2})
    monitor = watched(opt)
    step(1)
    opt.param_groups[0]["lr"] = 0.0
    step(1)
    opt.param_groups[0]["lr"] = 0.1
    step(1)

    assert [1, 2] == [row["step"] for row in monitor.rows()]


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_goes_on_counting(every: int) -> None:
    """Rows of four steps and of six more with start=4 have the step numbers of ten steps in one run."""
    opt = CautiousDecay(SGD([weight(1, grad=[1])], lr=0.1, weight_decay=0.5))

    def numbers(steps: int, **options: Any) -> list[int]:
        monitor = watched(opt, every=every, **options)
        for _ in range(steps):
            opt.step()
        return [row["step"] for row in monitor.rows()]

    assert numbers(10) == numbers(4) + numbers(6, start=4)


def test_a_group_that_is_added_later_has_the_number_of_the_others() -> None:
    """A group that is added after two steps takes part in step start + 3."""
    opt = CautiousDecay(SGD([weight(1, grad=[1])], lr=0.1, weight_decay=0.5))
    monitor = watched(opt, start=100)
    opt.step()
    opt.step()
    opt.add_param_group({"params": [weight(1, grad=[1])]})
    opt.step()

    assert [(0, 101), (0, 102), (0, 103), (1, 103)] == [(row["group"], row["step"]) for row in monitor.rows()]


# ---- pictures


def trained(**options: Any) -> list[dict[str, Any]]:
    model = net()
    opt = CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5), **options)
    monitor = watched(opt, per_parameter=True)
    train(model, opt, range(5))
    return monitor.rows()


def test_the_picture_of_layers() -> None:
    """The picture has a bar for each parameter, the first on top, as long as its mean share, in the given axes."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    rows = trained()
    _, axes = pyplot.subplots()
    ax = plot_ratio_by_layer(rows, ax=axes)
    means = [sum(row["share_decayed"] for row in rows if row["name"] == f"0.{i}") / 5 for i in range(4)]

    assert ax is axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(means)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.0", "0.1", "0.2", "0.3"]
    assert ax.yaxis_inverted()
    pyplot.close("all")


def test_the_picture_of_norms() -> None:
    """The picture has a line for each run; its points are the norm of all decaying weights of the run together."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    runs = {"plain": trained(mask="all"), "cautious": trained()}
    ax = plot_weight_norms(runs)

    assert [line.get_label() for line in ax.lines] == ["plain", "cautious"]
    for line, rows in zip(ax.lines, runs.values(), strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        assert line.get_ydata()[-1] == norm(*(row["weight_norm"] for row in rows[-4:]))
    plain, cautious = (line.get_ydata()[-1] for line in ax.lines)
    assert plain < cautious
    pyplot.close("all")
