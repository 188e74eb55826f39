"""How much is eta * lam? One row for each kind of optimizer, with numbers that can be checked by eye."""

from typing import Any

import pytest
import torch
from support import both_paths, weight
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam

from cwd_wrap import CautiousDecay, weight_decay

BASE = SGD([weight(1.0)], lr=1.0)  # gives its name, and options by name that it has none of

LR_AND_LAM: dict[str, tuple[dict[str, Any], float]] = {
    "lr": ({"lr": 0.25, "weight_decay": 0.5}, 0.125),
    "lr = 0": ({"lr": 0.0, "weight_decay": 0.5}, 0.0),
    "weight_decay = 0": ({"lr": 0.25, "weight_decay": 0.0}, 0.0),
    "lr is not needed where nothing decays": ({"lr": None, "weight_decay": 0.0}, 0.0),
    "fixed_decay": ({"lr": 0.25, "weight_decay": 0.5, "fixed_decay": True}, 0.5),
    "fixed_decay off": ({"lr": 0.25, "weight_decay": 0.5, "fixed_decay": False}, 0.125),
    "corrected_weight_decay": (
        {"lr": 0.25, "weight_decay": 0.5, "corrected_weight_decay": True, "max_lr_snapshot": 0.5},
        0.0625,
    ),
    "corrected_weight_decay off": (
        {"lr": 0.25, "weight_decay": 0.5, "corrected_weight_decay": False, "max_lr_snapshot": 0.5},
        0.125,
    ),
    "d of Prodigy": ({"lr": 1.0, "weight_decay": 0.5, "d": 0.25, "growth_rate": 2.0, "k": 0}, 0.125),
    "d of Prodigy, bias correction, step 1": (
        {
            "lr": 1.0,
            "weight_decay": 0.5,
            "d": 0.25,
            "growth_rate": 2.0,
            "use_bias_correction": True,
            "betas": (0.5, 0.75),
            "k": 0,
        },
        0.125,  # sqrt(1 - 0.75) / (1 - 0.5) = 1
    ),
    "d of Prodigy, bias correction, step 2": (
        {
            "lr": 1.0,
            "weight_decay": 0.5,
            "d": 0.25,
            "growth_rate": 2.0,
            "use_bias_correction": True,
            "betas": (0.5, 0.75),
            "k": 1,
        },
        0.125 * (1 - 0.75**2) ** 0.5 / (1 - 0.5**2),
    ),
    "d of Adafactor": ({"lr": 0.25, "weight_decay": 0.5, "d": 1.0}, 0.125),
}


@pytest.mark.parametrize(("group", "expected"), LR_AND_LAM.values(), ids=list(LR_AND_LAM))
def test_the_table_of_eta(group: dict[str, Any], expected: float) -> None:
    """eta * lam, for each kind of group."""
    assert pytest.approx(expected) == weight_decay.eta_lam(group, 0, None, None, BASE)


@both_paths
@pytest.mark.parametrize(("group", "expected"), LR_AND_LAM.values(), ids=list(LR_AND_LAM))
def test_a_step_decays_by_the_table(group: dict[str, Any], expected: float, snapshot: bool) -> None:
    """A step with a zero gradient takes the share eta * lam off the weight 1.0, whatever the base is called."""
    p = weight(1.0, 1.0, grad=[0.0, 0.0])
    base = SGD([{"params": [p], **group}, {"params": [weight(1.0)]}], lr=1.0, weight_decay=0.1)
    opt = CautiousDecay(base, snapshot=snapshot)
    if group["lr"] is None:
        base.param_groups[0]["params"] = []  # SGD itself has no step without a learning rate
    opt.step()

    torch.testing.assert_close(torch.full((2,), 1 - expected), p.detach())


def test_a_tensor_learning_rate_stays_a_tensor() -> None:
    """A tensor lr gives a tensor on its own device, unread: reading one on "meta" would raise."""
    group = {"lr": torch.tensor(0.25, device="meta"), "weight_decay": 0.5}
    eta_lam = weight_decay.eta_lam(group, 0, None, None, BASE)

    assert isinstance(eta_lam, Tensor)
    assert "meta" == eta_lam.device.type
    assert 0.125 == weight_decay.eta_lam({"lr": torch.tensor(0.25), "weight_decay": 0.5}, 0, None, None, BASE).item()


def test_a_tensor_weight_decay_stays_a_tensor() -> None:
    """So does a tensor weight_decay."""
    group = {"lr": 0.25, "weight_decay": torch.tensor(0.5, device="meta")}

    assert "meta" == weight_decay.eta_lam(group, 0, None, None, BASE).device.type
    assert 0.125 == weight_decay.eta_lam({"lr": 0.25, "weight_decay": torch.tensor(0.5)}, 0, None, None, BASE).item()


@both_paths
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=["default", "fused", "forloop"])
def test_a_step_with_a_tensor_learning_rate(options: dict[str, Any], snapshot: bool) -> None:
    """AdamW with a tensor lr: 1 - 0.25*0.5, and the lr is still the same tensor."""
    p, lr = weight(1.0, grad=[0.0]), torch.tensor(0.25)
    opt = CautiousDecay(AdamW([p], lr=lr, weight_decay=0.5, **options), snapshot=snapshot)
    opt.step()

    assert 0.875 == p.item()
    assert opt.param_groups[0]["lr"] is lr


class OnAnyDevice(Optimizer):
    """Plain gradient descent that never reads a tensor's value."""

    def __init__(self, params: Any, lr: Any) -> None:
        """Like SGD's."""
        super().__init__(params, {"lr": lr, "weight_decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Like SGD's."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])


@both_paths
@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
def test_a_step_never_reads_a_tensor_of_a_device(
    observed: bool, snapshot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parameters and lr on "meta", where reading a value raises, the step runs: so nothing waits on a device."""
    from cwd_wrap import directions

    monkeypatch.setitem(directions._TABLE, f"{__name__}.OnAnyDevice", directions._gradient)
    p = torch.nn.Parameter(torch.ones(3, 2, device="meta"))
    p.grad = torch.ones_like(p)
    opt = CautiousDecay(OnAnyDevice([p], torch.tensor(0.1, device="meta")), snapshot=snapshot)
    opt.observer = (lambda report: None) if observed else None
    opt.step()

    assert "meta" == opt.param_groups[0]["lr"].device.type
    with pytest.raises(RuntimeError):
        opt.param_groups[0]["lr"].item()


@both_paths
def test_step_size_takes_the_place_of_the_learning_rate(snapshot: bool) -> None:
    """step_size= is called with each group at each step: 1 - 2*0.25, whatever lr is."""
    p, seen = weight(1.0, grad=[0.0]), []
    base = SGD([{"params": [p], "name": "the one"}], lr=0.1, weight_decay=0.25)
    opt = CautiousDecay(base, step_size=lambda group: seen.append(group["name"]) or 2.0, snapshot=snapshot)
    opt.step()

    assert 0.5 == p.item()
    assert {"the one"} == set(seen)


def test_step_size_may_return_a_tensor() -> None:
    """step_size= may give a tensor."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(SGD([p], lr=0.1, weight_decay=0.25), step_size=lambda _: torch.tensor(2.0)).step()

    assert 0.5 == p.item()


def test_step_size_answers_for_a_missing_learning_rate() -> None:
    """Where lr is None, or there is none, step_size= is the way out, and it works."""
    p = weight(1.0, grad=[0.0])

    class WithoutLr(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"weight_decay": 0.5})

        def step(self, closure: Any = None) -> None: ...

    with pytest.raises(ValueError, match=r"no lr.*step_size="):
        CautiousDecay(WithoutLr([p]))
    CautiousDecay(WithoutLr([p]), step_size=lambda _: 0.5).step()

    assert 0.75 == p.item()


@pytest.mark.parametrize("key", ["lr", "relative_step"])
def test_relative_step_adafactor_is_refused(key: str) -> None:
    """Adafactor with a relative step has no learning rate: the error names step_size=."""
    adafactor = getattr(torch.optim, "Adafactor", None)
    if adafactor is None:
        pytest.skip("this torch has no Adafactor (it came with 2.5)")
    base = adafactor([weight(1.0, 1.0)], lr=0.1, weight_decay=0.5)
    base.param_groups[0][key] = {"lr": None, "relative_step": True}[key]
    with pytest.raises(ValueError, match="step_size="):
        CautiousDecay(base)


# ------------------------------------------------------------------------------------ real libraries


@pytest.mark.parametrize(("corrected", "expected"), [(False, 1 - 0.25 * 0.5), (True, 1 - 0.25**2 / 0.5 * 0.5)])
def test_corrected_weight_decay_of_timm(corrected: bool, expected: float) -> None:
    """timm's AdamW, made with lr 0.5 and run with 0.25: corrected decay is lr^2 / max_lr, as in timm's own step."""
    timm = pytest.importorskip("timm.optim")
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    build = lambda w: timm.AdamWLegacy([w], lr=0.5, weight_decay=0.5, corrected_weight_decay=corrected)
    opt, plain = CautiousDecay(build(p)), build(q)
    for each in (opt, plain):
        each.param_groups[0]["lr"] = 0.25
        each.step()

    assert pytest.approx(expected) == p.item() == pytest.approx(q.item())


@pytest.mark.parametrize("options", [{}, {"use_bias_correction": True}, {"safeguard_warmup": True}])
def test_prodigy_decays_as_much_as_by_itself(options: dict[str, Any]) -> None:
    """Prodigy decays by its own d * lr * lam with the d from before the step, at each of 6 steps in which d grows."""
    prodigyopt = pytest.importorskip("prodigyopt")
    build = lambda w: prodigyopt.Prodigy([w], lr=1.0, weight_decay=0.5, **options)
    # Weights on their way to zero, in double precision: all decay, so the wrapped and the plain run are the same.
    p, q = (torch.nn.Parameter(torch.linspace(50, 60, 4, dtype=torch.float64)) for _ in range(2))
    opt, plain = CautiousDecay(build(p)), build(q)
    ds = []
    for _ in range(6):
        for each, w in ((opt, p), (plain, q)):
            w.grad = torch.ones_like(w)
            each.step()
        ds.append(opt.param_groups[0]["d"])

    assert 100 * ds[0] < ds[-1]
    torch.testing.assert_close(q, p, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------ where lam goes

GROUPS: dict[str, tuple[list[float], float | None, list[float]]] = {
    "None keeps each": ([0.5, 0.25, 0.0], None, [0.5, 0.25, 0.0]),
    "a number replaces what is not 0": ([0.5, 0.25, 0.0], 0.125, [0.125, 0.125, 0.0]),
    "a number goes everywhere if nothing decays": ([0.0, 0.0, 0.0], 0.125, [0.125, 0.125, 0.125]),
    "0 switches it off": ([0.5, 0.25, 0.0], 0.0, [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("given", "lam", "expected"), GROUPS.values(), ids=list(GROUPS))
def test_where_lam_goes(given: list[float], lam: float | None, expected: list[float]) -> None:
    """The groups say where, lam says how much; and a step decays just so."""
    p = [weight(1.0, grad=[0.0]) for _ in given]
    groups = [{"params": [w], "weight_decay": wd} for w, wd in zip(p, given, strict=True)]
    opt = CautiousDecay(SGD(groups, lr=0.1), lam)
    opt.step()

    assert expected == [group["weight_decay"] for group in opt.param_groups]
    assert [pytest.approx(1 - 0.1 * wd) for wd in expected] == [w.item() for w in p]


@pytest.mark.parametrize(
    ("lam", "group", "expected"),
    [
        (0.25, {}, 0.25),
        (0.25, {"weight_decay": 0.0}, 0.0),
        (0.25, {"weight_decay": 1.0}, 1.0),
        (None, {}, 0.5),
        (None, {"weight_decay": 0.0}, 0.0),
    ],
)
def test_a_later_group(lam: float | None, group: dict[str, Any], expected: float) -> None:
    """A group added later gets lam, or the base's default where lam is None, unless it names its own decay."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5), lam)
    opt.add_param_group({"params": [p], **group})
    opt.step()

    assert expected == opt.param_groups[1]["weight_decay"]
    assert pytest.approx(1 - 0.1 * expected) == p.item()


def test_lam_may_be_a_plain_number_of_any_kind() -> None:
    """An int is a number: lam=1 is lam=1.0."""
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5), lam=1)

    assert 1 == opt.param_groups[0]["weight_decay"]


def without_decay(p: torch.nn.Parameter) -> dict[str, Optimizer]:
    """Bases whose groups have no weight_decay."""
    return {"LBFGS": LBFGS([p], lr=0.1), "SparseAdam": SparseAdam([p], lr=0.1)}


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_a_base_without_weight_decay_keeps_lam_in_the_wrapper(name: str) -> None:
    """Where groups have no weight_decay, none is put there: the state dict stays the base's own."""
    base = without_decay(weight(1.0))[name]
    keys = set(base.param_groups[0])
    opt = CautiousDecay(base, lam=0.5)

    assert 0.5 == opt.lam
    assert keys == set(opt.param_groups[0])


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_a_base_without_weight_decay_needs_lam(name: str) -> None:
    """Without lam there is nothing to decay, and that is said."""
    with pytest.warns(UserWarning, match="nothing to decay"):
        CautiousDecay(without_decay(weight(1.0))[name])


def test_a_later_group_of_a_base_without_weight_decay() -> None:
    """It decays by lam too: 1 - 0.1*0.5, and 1 of the row that has no gradient."""
    opt = CautiousDecay(SparseAdam([torch.nn.Parameter(torch.ones(2, 1))], lr=0.1), lam=0.5)
    p = torch.nn.Parameter(torch.ones(2, 1))
    opt.add_param_group({"params": [p]})
    p.grad = torch.sparse_coo_tensor([[0]], [[0.0]], (2, 1), check_invariants=True)
    opt.step()

    assert "weight_decay" not in opt.param_groups[1]
    torch.testing.assert_close(torch.tensor([[0.95], [1.0]]), p.detach())


def test_lam_x_and_a_schedule() -> None:
    """lam=x is written once: a schedule that writes weight_decay later has the last word."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5), lam=0.25)
    opt.param_groups[0]["weight_decay"] = 1.0
    opt.step()

    assert pytest.approx(0.9) == p.item()
