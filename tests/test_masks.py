"""The masks of CautiousDecay: "update" is the paper's; "gradient", "random" and "all" are the paper's ablations."""

import copy
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ruled
from support import PathOptions, net, train, values, weight
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cwd_wrap import CautiousDecay

F64 = torch.float64
LR, LAM = 0.125, 0.5
MASKS = ["update", "gradient", "random", "all"]
ABLATIONS = MASKS[1:]
ablations = pytest.mark.parametrize("mask", ABLATIONS)


def sgd(*params: nn.Parameter, **options: Any) -> SGD:
    return SGD(params, **{"lr": LR, "weight_decay": LAM, **options})


# ------------------------------------------------------------------------------------ by eye

# Two steps with momentum: in the last two places, the second gradient is opposed to the momentum.
BY_EYE = {
    # mask: which of the weights 8, -8, 8, -8 decay in the second step
    "update": [True, False, True, False],
    "gradient": [True, False, False, True],
    "all": [True, True, True, True],
}


@pytest.mark.parametrize("mask", BY_EYE)
def test_four_weights(mask: str) -> None:
    """With momentum 4 and a gradient of 1 or -1, update and gradient disagree on the last two weights."""
    p = weight(8, -8, 8, -8, grad=[4, 4, 4, 4], dtype=F64)
    base = sgd(p, momentum=1.0, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to decay yet
        opt = CautiousDecay(base, mask=mask)
    opt.step()
    opt.param_groups[0]["weight_decay"] = LAM
    x = p.detach().clone()
    p.grad = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    opt.step()
    u = 4 + p.grad

    assert torch.equal(x - LR * u - LR * LAM * torch.tensor(BY_EYE[mask]) * x, p.detach())


AT_ZERO = [
    # mask, strict, what is left of weights 1, -1 under gradients and updates of 0
    ("update", False, [0.9375, -0.9375]),
    ("update", True, [1.0, -1.0]),
    ("gradient", False, [0.9375, -0.9375]),
    ("gradient", True, [1.0, -1.0]),
    ("random", False, [0.9375, -0.9375]),
    ("random", True, [1.0, -1.0]),
    ("all", False, [0.9375, -0.9375]),
    ("all", True, [0.9375, -0.9375]),
]


@pytest.mark.parametrize(("mask", "strict", "expected"), AT_ZERO)
def test_at_zero(mask: str, strict: bool, expected: list[float]) -> None:
    """A weight with gradient and update 0 decays, unless strict=True; mask="all" always decays it."""
    p = weight(1, -1, grad=[0, 0])
    CautiousDecay(sgd(p), mask=mask, strict=strict).step()

    assert expected == p.tolist()


# ------------------------------------------------------------------------------------ a leak


@pytest.mark.parametrize("leak", [-0.1, 1.5, math.nan, math.inf, "0.1", None, True])
def test_a_leak_is_a_number_from_0_to_1(leak: Any) -> None:
    """Any other is an error, which names it; the old one stays."""
    number = isinstance(leak, float)
    text = re.escape(f"leak={leak!r}: pass a number from 0 (the paper's rule) to 1 (every weight decays)")
    opt = CautiousDecay(sgd(weight(1.0)), leak=0.5)
    with pytest.raises(ValueError if number else TypeError, match=f"^{text}$"):
        opt.leak = leak
    with pytest.raises(ValueError if number else TypeError, match=f"^{text}$"):
        CautiousDecay(sgd(weight(1.0)), leak=leak)

    assert opt.leak == 0.5


@pytest.mark.parametrize("mask", MASKS)
def test_a_leak_of_1_is_the_mask_all(mask: str) -> None:
    """Whatever the mask, all weights then decay, bit for bit as with mask="all"."""
    weights = []
    for options in ({"mask": mask, "leak": 1.0}, {"mask": "all"}):
        model = net()
        train(model, CautiousDecay(sgd(*model.parameters(), momentum=0.9), **options, path="snapshot"), range(5))
        weights.append(values(model))

    assert torch.equal(*weights)


def test_a_leak_may_change_between_steps(every_path: PathOptions) -> None:
    """A new leak holds from the next step on, and before the step from a hook. Copies and pickles keep it."""
    p = weight(1.0, grad=[-1.0])
    opt = CautiousDecay(sgd(p, momentum=0.5, **every_path.base), **every_path)
    sizes = []
    for leak in (0.0, 0.0, 0.5, 1.0, 0.0):
        opt.leak = leak
        before, step = p.item(), opt.state[p].get("momentum_buffer", torch.zeros(1)).item() * 0.5 - 1.0
        opt.step()
        sizes.append((before - LR * step - p.item()) / (LR * LAM * before))
    opt.register_step_pre_hook(lambda opt, *_: setattr(opt, "leak", 0.25))
    before, step = p.item(), opt.state[p]["momentum_buffer"].item() * 0.5 - 1.0
    opt.step()
    sizes.append((before - LR * step - p.item()) / (LR * LAM * before))

    bare = CautiousDecay(sgd(weight(1.0)), leak=0.25)

    assert sizes == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.0, 0.25], abs=1e-5)
    assert copy.deepcopy(bare).leak == pickle.loads(pickle.dumps(bare)).leak == 0.25


def test_a_wrapper_pickled_before_there_was_a_leak() -> None:
    """It has none."""
    opt = CautiousDecay(sgd(weight(1.0)))
    state = opt.__getstate__()
    del state["_leak"]
    old = CautiousDecay.__new__(CautiousDecay)
    old.__setstate__(state)

    assert old.leak == 0.0


# ------------------------------------------------------------------------------------ all

AS_THEIRS: dict[str, Any] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.5),
    "AdamW-amsgrad": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, amsgrad=True),
    "AdamW-maximize": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, maximize=True),
    "AdamW-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "AdamW-tensor-lr": lambda p: AdamW(p, lr=torch.tensor(0.01, dtype=F64), weight_decay=0.5, foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("build", AS_THEIRS.values(), ids=list(AS_THEIRS))
def test_all_is_the_optimizers_own_decoupled_decay(build: Any) -> None:
    """mask="all" around AdamW and similar equals their own decay after a hundred float64 steps, to roundings."""
    start = torch.randn(30, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, plain = CautiousDecay(build([ours]), mask="all"), build([theirs])
    for _ in range(100):
        theirs.grad = torch.randn(30, dtype=F64)
        ours.grad = theirs.grad.clone()
        opt.step()
        plain.step()

    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgdw", "nadamw"])
def test_all_is_timms_own_decoupled_decay(name: str) -> None:
    """The same holds for timm's decoupled optimizers with an update that does not read the decayed weight."""
    timm = pytest.importorskip("timm.optim")
    start = torch.randn(6, 5, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    build = lambda p: timm.create_optimizer_v2([p], name, lr=0.01, weight_decay=0.5)
    opt, plain = CautiousDecay(build(ours), mask="all"), build(theirs)
    for _ in range(50):
        theirs.grad = torch.randn(6, 5, dtype=F64)
        ours.grad = theirs.grad.clone()
        opt.step()
        plain.step()

    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_all_is_muons_own_decay() -> None:
    """mask="all" around torch's Muon equals Muon's own decay."""
    start = torch.randn(6, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, plain = (torch.optim.Muon([p], lr=0.02, weight_decay=0.1) for p in (ours, theirs))
    opt = CautiousDecay(opt, mask="all")
    for _ in range(20):
        theirs.grad = torch.randn(6, 5)
        ours.grad = theirs.grad.clone()
        opt.step()
        plain.step()

    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=1e-5, atol=1e-6)


def test_all_decouples_a_coupled_decay() -> None:
    """mask="all" around Adam, which has a coupled decay of its own, equals AdamW."""
    a, b = net().double(), net().double()
    x = torch.randn(20, 17, dtype=F64)
    opts = (
        CautiousDecay(Adam(a.parameters(), lr=0.01, weight_decay=0.5), mask="all"),
        AdamW(b.parameters(), lr=0.01, weight_decay=0.5),
    )
    for step in range(20):
        for model, opt in zip((a, b), opts, strict=True):
            opt.zero_grad()
            model(x[step, :3]).sum().backward()
            opt.step()

    torch.testing.assert_close(values(b), values(a), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------ gradient


def test_gradient_and_update_agree_where_the_update_is_the_gradient() -> None:
    """Around plain SGD, mask="gradient" and mask="update" are equal."""
    out = []
    for mask in ("update", "gradient"):
        model = net()
        train(model, CautiousDecay(SGD(model.parameters(), lr=0.1, weight_decay=0.5), mask=mask), range(5))
        out.append(values(model))

    torch.testing.assert_close(out[0], out[1], rtol=1e-6, atol=1e-7)


def test_gradients_that_the_base_changes_are_copied() -> None:
    """If the base changes gradients in place, mask="gradient" still uses those from before the step."""

    class Spoils(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
                    p.grad.neg_()

    p = weight(1, -1, grad=[1, 1], dtype=F64)
    opt = CautiousDecay(Spoils([p], {"lr": LR, "weight_decay": LAM}), mask="gradient")
    opt.step()
    x, p.grad = p.detach().clone(), torch.ones(2, dtype=F64)
    opt.step()

    assert torch.equal(ruled(x, x - LR, LR * LAM), p.detach())


# ------------------------------------------------------------------------------------ random


def decayed(p: nn.Parameter, opt: Optimizer, g: Tensor) -> Tensor:
    """Which weights decay in a step of SGD."""
    x, p.grad = p.detach().clone(), g
    opt.step()
    return (p.detach() - (x - LR * g)).abs() > LR * LAM * x.abs() / 2


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_random_has_the_ratio_of_the_papers_mask(ratio: float) -> None:
    """As many weights of a tensor decay as under the paper's mask, within five standard errors, but drawn at random."""
    n = 20_000
    x = torch.randn(n, dtype=F64).abs() + 1
    g = torch.where(torch.rand(n) < ratio, 1.0, -1.0).double()
    p = nn.Parameter(x.clone())
    mask = decayed(p, CautiousDecay(sgd(p), mask="random"), g)
    exact = (g > 0).double().mean().item()
    error = math.sqrt(exact * (1 - exact) / n)

    assert pytest.approx(exact, abs=5 * error) == mask.double().mean().item()
    assert pytest.approx(exact, abs=0.02) == mask[g > 0].double().mean().item()
    assert pytest.approx(exact, abs=0.05) == mask[g < 0].double().mean().item()


def test_random_has_a_ratio_for_each_tensor() -> None:
    """A tensor decays as a whole if the paper's mask is 1 everywhere, and not at all if it is 0 everywhere."""
    p, q = nn.Parameter(torch.ones(500, dtype=F64)), nn.Parameter(torch.ones(500, dtype=F64))
    p.grad, q.grad = torch.ones(500, dtype=F64), -torch.ones(500, dtype=F64)
    CautiousDecay(sgd(p, q), mask="random").step()

    assert [1 - LR - LR * LAM] == p.unique().tolist()
    assert [1 + LR] == q.unique().tolist()


def test_random_is_drawn_anew_each_step() -> None:
    """Two steps with the same gradient decay different weights."""
    p = nn.Parameter(torch.ones(500, dtype=F64))
    g = torch.where(torch.arange(500) % 2 == 0, 0.01, -0.01).double()
    opt = CautiousDecay(sgd(p), mask="random")

    assert not torch.equal(decayed(p, opt, g), decayed(p, opt, g))


def run_random(steps: range, model: nn.Module, opt: Optimizer) -> Tensor:
    train(model, opt, steps)
    return values(model)


def fresh(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    model = net()
    return model, CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5), mask="random", seed=seed)


def test_random_is_splitmix_at_a_counter() -> None:
    """A weight decays if its 16 bits, computed here with Python's integers, are below the share of the mask."""

    def mixed(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def nth(stream: int, n: int) -> int:
        return mixed((stream + n * 0x9E3779B97F4A7C15) % 2**64)

    seed, weights = 3, 40
    params = [nn.Parameter(torch.ones(weights, dtype=F64)) for _ in range(2)]
    g = torch.where(torch.arange(weights) % 4 == 0, -0.5, 0.5).double()
    opt = CautiousDecay(sgd(*params), mask="random", seed=seed)
    for step in range(3):
        for number, p in enumerate(params):
            key = nth(nth(seed, step), number)
            bits = [nth(key, place) >> 16 & 0xFFFF for place in range(weights)]
            torch.nn.init.ones_(p)
            p.grad = g.clone()
            p.expected = [b / 2**16 < 0.75 for b in bits]
        opt.step()
        for p in params:
            assert p.expected == (p.detach() != 1 - LR * g).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 3), (2, 3, 4, 5)], ids=str)
def test_random_in_every_type_and_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each number decays by eta*lam times itself or not at all, for every type, shape and layout."""
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    p.grad = torch.zeros_like(p)
    x = p.detach().clone()
    CautiousDecay(SGD([p], lr=0.5), lam=0.5, mask="random").step()
    one, other = (torch.view_as_real(t) if t.is_complex() else t for t in (p.detach(), x))

    assert torch.where(one == other, other * 0.75, one).equal(other * 0.75)


def test_random_is_reproducible() -> None:
    """The same ``seed`` gives the same run, and another seed gives another run."""
    out = []
    for seed in (1, 1, 2):
        model, opt = fresh(seed)
        out.append(run_random(range(6), model, opt))

    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_random_resumes() -> None:
    """A run that is resumed, in a new wrapper or in its own, equals the uninterrupted one: the state has the steps."""
    model, opt = fresh()
    train(model, opt, range(3))
    checkpoint = copy.deepcopy((model.state_dict(), opt.state_dict()))
    expected = run_random(range(3, 6), model, opt)
    for again, resumed in (fresh(), (model, opt)):
        again.load_state_dict(checkpoint[0])
        resumed.load_state_dict(copy.deepcopy(checkpoint[1]))

        assert torch.equal(expected, run_random(range(3, 6), again, resumed))


@pytest.mark.parametrize("mask", ["update", "gradient", "all", "random"])
def test_no_mask_uses_a_generator(mask: str) -> None:
    """No mask draws from torch's generator, so dropout and data do not change."""
    p = weight(1, -1, grad=[1, 1])
    before = torch.get_rng_state()
    CautiousDecay(sgd(p), mask=mask).step()

    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------ all masks


COUNTS = [
    # mask, strict -> decayed, of weights 1, 1, -1, -2 with gradients 1, -1, 0, -1
    ("update", False, 3),
    ("update", True, 2),
    ("gradient", False, 3),
    ("gradient", True, 2),
    ("all", False, 4),
    ("all", True, 4),
]


@pytest.mark.parametrize("path", [None, "snapshot"])
@pytest.mark.parametrize(("mask", "strict", "expected"), COUNTS)
def test_the_observer_counts(mask: str, strict: bool, expected: int, path: str | None) -> None:
    """The report counts the weights that decayed, out of those that took part."""
    p, q = weight(1, 1, -1, -2, grad=[1, -1, 0, -1]), weight(1)
    opt, reports = CautiousDecay(sgd(p, q), mask=mask, strict=strict, path=path), []
    opt.observer = reports.append
    opt.step()

    assert [(expected, 4)] == [(int(r.active), r.total) for r in reports]


def test_the_observer_counts_what_was_drawn() -> None:
    """With mask="random" the report has the number of weights that decayed, not the expected number."""
    p = nn.Parameter(torch.ones(1000, dtype=F64))
    opt, reports = CautiousDecay(sgd(p), mask="random"), []
    opt.observer = reports.append
    mask = decayed(p, opt, torch.where(torch.arange(1000) % 2 == 0, 0.01, -0.01).double())

    assert [(int(mask.sum()), 1000)] == [(int(r.active), r.total) for r in reports]


@pytest.mark.parametrize("mask", ["sign", "", None, True, "Update", ["update"]])
def test_unknown_masks(mask: object) -> None:
    """The error for an unknown mask lists the known ones, and the base does not change."""
    base = sgd(weight(1.0))
    with pytest.raises(ValueError, match=r"unknown mask .*'update', 'gradient', 'random', 'all'"):
        CautiousDecay(base, lam=0.25, mask=mask)  # type: ignore[arg-type]

    assert LAM == base.param_groups[0]["weight_decay"]


@ablations
def test_another_path_is_refused(mask: str) -> None:
    """An ablation needs a copy, so path="direction" raises an error that names the mask."""
    with pytest.raises(ValueError, match="path='direction'") as caught:
        CautiousDecay(sgd(weight(1.0)), mask=mask, path="direction")

    assert f"mask={mask!r}" in str(caught.value)


@ablations
def test_a_copy_of_the_weights_is_what_an_ablation_costs(mask: str) -> None:
    """snapshot_bytes and repr show the copy that an ablation makes."""
    opt = CautiousDecay(sgd(weight(1, 2, 3)), mask=mask)

    # Gradients are copied too, until a step shows that the base does not change them.
    assert (24 if mask == "gradient" else 12) == opt.snapshot_bytes
    assert "path='pieces'" in repr(opt)


@ablations
@given(
    weights=st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=8)
)
@settings(max_examples=40, deadline=None)
def test_every_weight_decays_or_not(mask: str, weights: list[tuple[float, float]]) -> None:
    """Every weight takes the base's step, or that minus eta*lam*x, up to roundings."""
    x, g = (torch.tensor(column) for column in zip(*weights, strict=True))
    p = nn.Parameter(x.clone())
    p.grad = g
    CautiousDecay(sgd(p), mask=mask).step()
    w = x - LR * g
    less = (w.double() - LR * LAM * x.double()).float()
    close = torch.isclose(p.detach(), w, rtol=1e-6, atol=1e-5) | torch.isclose(p.detach(), less, rtol=1e-6, atol=1e-5)

    assert bool(close.all())
