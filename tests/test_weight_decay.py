"""eta * lam: one row for each kind of optimizer, with numbers to check by eye."""

import copy
import warnings
from typing import Any

import pytest
import torch
from support import both_paths, weight
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam

from cwd_wrap import CautiousDecay
from cwd_wrap.bases import weight_decay

BASE = SGD([weight(1.0)], lr=1.0)  # only its class counts: the rows have options that SGD does not have

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
    "fixed_decay of a coupled decay": (
        {"lr": 0.25, "weight_decay": 0.5, "fixed_decay": True, "weight_decouple": False},
        0.125,
    ),
    "corrected_weight_decay of a coupled decay": (
        {
            "lr": 0.25,
            "weight_decay": 0.5,
            "corrected_weight_decay": True,
            "max_lr_snapshot": 0.5,
            "decoupled_decay": False,
        },
        0.125,
    ),
    "corrected_weight_decay before timm 1.0.23": (
        {"lr": 0.25, "weight_decay": 0.5, "corrected_weight_decay": True},
        0.03125,  # the default lr of the base is 1
    ),
    "unscaled_wd": ({"lr": 0.25, "weight_decay": 0.5, "unscaled_wd": True}, 0.5),
    "unscaled_wd, corrected": (
        {
            "lr": 0.25,
            "weight_decay": 0.5,
            "unscaled_wd": True,
            "corrected_weight_decay": True,
            "max_lr_snapshot": 0.5,
        },
        0.25,
    ),
    "lr that a schedule's rounding left of 0": ({"lr": -1.85e-20, "weight_decay": 0.5}, 0.0),
    "the same on the other side": ({"lr": 1.85e-20, "weight_decay": 0.5, "fixed_decay": True}, 0.0),
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
def test_a_step_decays_by_the_table(group: dict[str, Any], expected: float, path: str) -> None:
    """A step with a zero gradient takes eta * lam off the weight 1.0, for every base."""
    p = weight(1.0, 1.0, grad=[0.0, 0.0])
    base = SGD([{"params": [p], **group}, {"params": [weight(1.0)]}], lr=1.0, weight_decay=0.1)
    opt = CautiousDecay(base, path=path)
    if group["lr"] is None:
        base.param_groups[0]["params"] = []  # SGD itself cannot step without a learning rate
    opt.step()

    torch.testing.assert_close(torch.full((2,), 1 - expected), p.detach())


def named(name: str, **attributes: Any) -> Optimizer:
    """An optimizer with the name "library.Class"."""
    library, _, cls = name.rpartition(".")
    optimizer = type(cls, (SGD,), {"__module__": f"{library}.of_that"})([weight(1.0)], lr=1.0)
    vars(optimizer).update(attributes)
    return optimizer


BY_NAME: dict[str, tuple[Optimizer, dict[str, Any], float]] = {
    "SGDP": (named("timm.SGDP"), {"lr": 0.25, "wd_ratio": 1.0, "momentum": 0.75}, 1.0),
    "SGDP with fixed_decay": (
        named("adamp.SGDP"),
        {"lr": 0.25, "wd_ratio": 1, "momentum": 0.75, "fixed_decay": True},
        4.0,
    ),
    "AdamP": (named("timm.AdamP"), {"lr": 0.25, "wd_ratio": 1.0}, 0.25),
    "Muon's fallback": (named("timm.Muon"), {"lr": 0.25, "fallback_lr_scale": 0.5, "use_fallback": True}, 0.125),
    "optimi, decouple_lr": (
        named("optimi.OptimiOptimizer"),
        {"lr": 0.25, "decouple_lr": True, "max_lr": 0.5, "initial_lr": 0.125},  # initial_lr is a scheduler's
        0.5,
    ),
    "optimi": (named("optimi.OptimiOptimizer"), {"lr": 0.25, "decouple_lr": False, "max_lr": 0.5}, 0.25),
    "FlashAdamW, decouple_lr": (
        named("pytorch_optimizer.FlashAdamW"),
        {"lr": 0.25, "decouple_lr": True, "initial_lr": 0.5, "max_lr": 0.125},  # max_lr is OneCycleLR's
        0.5,
    ),
    "flashoptim, decouple_lr": (
        named("flashoptim.FlashOptimizer", _decouple_lr=True),
        {"lr": 0.25, "initial_lr": 0.5},
        0.5,
    ),
    "flashoptim": (named("flashoptim.FlashOptimizer", _decouple_lr=False), {"lr": 0.25, "initial_lr": 0.5}, 0.25),
    "ROSE, reference given": (named("rose_opt.Rose"), {"lr": 0.25, "wd_schedule": 0.5}, 0.5),
    "ROSE, from a schedule": (named("rose_opt.Rose"), {"lr": 0.25, "wd_schedule": True, "initial_lr": 0.5}, 0.5),
    "ROSE, no schedule yet": (named("rose_opt.Rose"), {"lr": 0.25, "wd_schedule": True}, 1.0),
    "ROSE without": (named("rose_opt.Rose"), {"lr": 0.25, "wd_schedule": False}, 0.25),
    "heavyball": (named("heavyball.ChainOpt"), {"lr": 0.25, "warmup_steps": 0}, 0.25),
    "heavyball, first step of warm-up": (named("heavyball.ChainOpt"), {"lr": 0.25, "warmup_steps": 1}, 0.125),
    "heavyball, after warm-up": (
        named("heavyball.ChainOpt"),
        {"lr": 0.25, "warmup_steps": 1, "step_count": torch.tensor(1)},
        0.25,
    ),
}


@pytest.mark.parametrize(("base", "group", "expected"), BY_NAME.values(), ids=list(BY_NAME))
def test_the_table_of_eta_by_name(base: Optimizer, group: dict[str, Any], expected: float) -> None:
    """If the group alone does not give eta, the optimizer's name does. (test_own_decay.py measures it.)"""
    assert pytest.approx(expected) == float(weight_decay.eta(group, "here", base))


def test_adamc_of_heavyball_divides_by_the_largest_learning_rate() -> None:
    """AdamC decays by lr**2 / max_lr, with the lr of the warm-up."""
    adamc = type("AdamC", (type(named("heavyball.ChainOpt")),), {"__module__": "heavyball"})([weight(1.0)], lr=1.0)
    group = {"lr": 0.5, "max_lr": 0.5, "warmup_steps": 1}

    assert 0.125 == float(weight_decay.eta(group, "here", adamc))


NO_ONE_ETA: dict[str, tuple[Optimizer, dict[str, Any], str]] = {
    "AdamP": (named("timm.AdamP"), {"wd_ratio": 0.1}, "wd_ratio=0.1: pass wd_ratio=1"),
    "Kron": (named("timm.Kron"), {"stochastic_weight_decay": True}, "pass stochastic_weight_decay=False"),
    "Muon": (named("timm.Muon"), {"fallback_lr_scale": 0.5}, "fallback_lr_scale=0.5: pass fallback_lr_scale=1"),
    "Adafactor": (named("transformers.Adafactor"), {"scale_parameter": True}, "pass scale_parameter=False"),
    "Apollo": (
        named("pytorch_optimizer.ApolloDQN"),
        {"weight_decay_type": "stable"},
        "pass another weight_decay_type",
    ),
    "SPlus": (named("pytorch_optimizer.SPlus"), {}, "the shape of each tensor: give the group weight_decay=0"),
    "Magma": (named("pytorch_optimizer.Magma"), {}, "wrap the optimizer inside it"),
}


@pytest.mark.filterwarnings("ignore:.*will not decay anything")
@pytest.mark.parametrize(("base", "options", "text"), NO_ONE_ETA.values(), ids=list(NO_ONE_ETA))
def test_an_optimizer_without_a_single_eta_is_refused(base: Optimizer, options: dict[str, Any], text: str) -> None:
    """The error names the group and the optimizer, the reason and the way out, also for a group added later."""
    name = type(base).__name__
    base.param_groups[0] |= options
    with pytest.raises(ValueError, match=rf"^param group 1 of {name} has no single step size for its decay: .*{text}"):
        CautiousDecay(base).add_param_group({"params": [weight(1.0)], "weight_decay": 0.5, **options})
    base.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=rf"param group 0 of {name} .*{text}, or pass step_size=, a function"):
        CautiousDecay(base)


def test_a_tensor_learning_rate_stays_a_tensor() -> None:
    """A tensor lr gives a tensor on its own device, unread: reading one on "meta" would raise."""
    group = {"lr": torch.tensor(0.25, device="meta"), "weight_decay": 0.5}
    eta_lam = weight_decay.eta_lam(group, 0, None, None, BASE)

    assert isinstance(eta_lam, Tensor)
    assert "meta" == eta_lam.device.type
    assert 0.125 == weight_decay.eta_lam({"lr": torch.tensor(0.25), "weight_decay": 0.5}, 0, None, None, BASE).item()


def test_a_tensor_weight_decay_stays_a_tensor() -> None:
    """A tensor weight_decay gives a tensor on its own device, unread."""
    group = {"lr": 0.25, "weight_decay": torch.tensor(0.5, device="meta")}

    assert "meta" == weight_decay.eta_lam(group, 0, None, None, BASE).device.type
    assert 0.125 == weight_decay.eta_lam({"lr": 0.25, "weight_decay": torch.tensor(0.5)}, 0, None, None, BASE).item()


@both_paths
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=["default", "fused", "forloop"])
def test_a_step_with_a_tensor_learning_rate(options: dict[str, Any], path: str) -> None:
    """AdamW with a tensor lr gives 1 - 0.25*0.5, and the lr is still the same tensor."""
    p, lr = weight(1.0, grad=[0.0]), torch.tensor(0.25)
    opt = CautiousDecay(AdamW([p], lr=lr, weight_decay=0.5, **options), path=path)
    opt.step()

    assert 0.875 == p.item()
    assert opt.param_groups[0]["lr"] is lr


class OnAnyDevice(Optimizer):
    """Plain gradient descent that never reads a tensor's value."""

    def __init__(self, params: Any, lr: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])


@both_paths
@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
def test_a_step_never_reads_a_tensor_of_a_device(observed: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs with parameters and lr on "meta", where reading a value raises, so no step waits for a device."""
    from cwd_wrap.bases import directions

    monkeypatch.setitem(directions.TABLE, f"{__name__}.OnAnyDevice", directions._gradient)
    p = torch.nn.Parameter(torch.ones(3, 2, device="meta"))
    p.grad = torch.ones_like(p)
    opt = CautiousDecay(OnAnyDevice([p], torch.tensor(0.1, device="meta")), path=path)
    opt.observer = (lambda report: None) if observed else None
    opt.step()

    assert "meta" == opt.param_groups[0]["lr"].device.type
    with pytest.raises(RuntimeError):
        opt.param_groups[0]["lr"].item()


@both_paths
def test_step_size_replaces_the_learning_rate(path: str) -> None:
    """step_size= is called with each group and gives eta, whatever lr is: 1 - 2*0.25."""
    p, seen = weight(1.0, grad=[0.0]), []
    base = SGD([{"params": [p], "name": "the one"}], lr=0.1, weight_decay=0.25)
    opt = CautiousDecay(base, step_size=lambda group: seen.append(group["name"]) or 2.0, path=path)
    opt.step()

    assert 0.5 == p.item()
    assert {"the one"} == set(seen)


def test_step_size_may_return_a_tensor() -> None:
    """A tensor returned by step_size= is used like a number."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(SGD([p], lr=0.1, weight_decay=0.25), step_size=lambda _: torch.tensor(2.0)).step()

    assert 0.5 == p.item()


def test_step_size_replaces_a_missing_learning_rate() -> None:
    """Without an lr, the error names step_size=, and step_size= works."""
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
    """Prodigy decays by its own d * lr * lam with the d from before the step, in 6 steps over which d grows."""
    prodigyopt = pytest.importorskip("prodigyopt")
    build = lambda w: prodigyopt.Prodigy([w], lr=1.0, weight_decay=0.5, **options)
    # All weights move towards zero, so all decay and the wrapped run equals the plain one, in double precision.
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


def test_a_linear_schedule_to_zero_ends_without_an_error() -> None:
    """torch's LinearLR ends a rounding below 0; the step then changes nothing and raises nothing, as in plain AdamW."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(AdamW([p], lr=1e-3, weight_decay=0.5))
    schedule = torch.optim.lr_scheduler.LinearLR(opt, end_factor=0.0, total_iters=4)
    for _ in range(4):
        opt.step()
        schedule.step()
    before = p.item()
    opt.step()

    assert -1e-12 < opt.param_groups[0]["lr"] < 0
    assert before == p.item() < 1


def test_a_negative_learning_rate_is_still_an_error() -> None:
    """A negative learning rate larger than a rounding is refused."""
    opt = CautiousDecay(SGD([weight(1.0, grad=[0.0])], lr=0.1, weight_decay=0.5))
    opt.param_groups[0]["lr"] = -1e-11
    with pytest.raises(ValueError, match=r"lr of param group 0 of SGD is -1e-11: pass a finite number, zero or above"):
        opt.step()


def test_a_decay_of_more_than_the_whole_weight_warns_once() -> None:
    """eta*lam above 1 warns once for each group, with the numbers; tensors are not read."""
    groups = [{"params": [weight(1.0, grad=[0.0])], "lr": lr} for lr in (0.5, 1.5, torch.tensor(1.5), 2.0)]
    opt = CautiousDecay(SGD(groups, lr=1.0, weight_decay=1.0, foreach=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
        opt.step()

    assert [
        f"eta*lam of param group {i} of SGD is {lr:g} (eta {lr:g}, weight_decay 1): above 1, a step decays a "
        "weight past zero and flips its sign. Choose a smaller weight_decay"
        for i, lr in ((1, 1.5), (3, 2.0))
    ] == [str(w.message) for w in caught]


class Fading(SGD):
    """Rewrites its own weight_decay during its step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = self.fade(group["weight_decay"])
        return super().step(closure)


def test_a_decay_scaled_while_it_is_off_is_restored_with_one_warning() -> None:
    """A weight_decay computed from the temporary 0 is dropped: the old value stays, with one warning."""
    p = weight(1.0, grad=[0.0])
    base = Fading([p], lr=0.5, weight_decay=0.5)
    base.fade = lambda decay: decay * 0.99
    opt = CautiousDecay(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
        opt.step()

    assert 0.5 == opt.param_groups[0]["weight_decay"]
    assert 0.75**2 == p.item()
    assert [
        "weight_decay of param group 0 of Fading was set to 0.0 during the step, while the wrapper had the decay "
        "off. It is 0.5 again. To change it, set it between steps, or in a hook of the wrapper"
    ] == [str(w.message) for w in caught]


def test_a_decay_scaled_inside_lookahead_is_restored() -> None:
    """The same holds for a hook of the optimizer inside Lookahead, because the decay is off for Lookahead's step."""
    library = pytest.importorskip("pytorch_optimizer")
    base = SGD([weight(1.0, grad=[0.0])], lr=0.5, weight_decay=0.5)
    base.register_step_post_hook(
        lambda opt, *_: opt.param_groups[0].update(weight_decay=opt.param_groups[0]["weight_decay"] * 0.99)
    )
    opt = CautiousDecay(library.Lookahead(base))
    with pytest.warns(
        UserWarning, match="weight_decay of param group 0 of Lookahead was set to 0.0 .* It is 0.5 again"
    ):
        opt.step()

    assert 0.5 == opt.param_groups[0]["weight_decay"]


def test_a_decay_set_while_it_is_off_stays() -> None:
    """A weight_decay other than 0 that is set during the step stays."""
    base = Fading([weight(1.0, grad=[0.0])], lr=0.5, weight_decay=0.5)
    base.fade = lambda _: 0.25
    opt = CautiousDecay(base)
    opt.step()

    assert 0.25 == opt.param_groups[0]["weight_decay"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pytorch_optimizer.SaRA", "it trains only the weights below its threshold"),
        ("pytorch_optimizer.GSAM", "it computes the gradients inside its own step.* Wrap the optimizer inside it"),
        ("torchao.CPUOffloadOptimizer", r"optimizer_class=CautiousDecay.over\(AdamW\)"),
        ("torch.PostLocalSGDOptimizer", "Wrap the optimizer inside it"),
        ("heavyball.MSAMLaProp", "computes the weights from a copy that the optimizer keeps"),
    ],
)
def test_optimizers_that_cannot_be_wrapped_are_refused_by_name(name: str, text: str) -> None:
    """An optimizer refused by name raises an error with the reason and the way out."""
    with pytest.raises(ValueError, match=f"CautiousDecay cannot wrap {name.split('.')[1]}: .*{text}"):
        CautiousDecay(named(name), lam=0.5)


def test_the_optimizer_inside_gsam_can_be_wrapped() -> None:
    """Five steps of GSAM around AdamW in mask="all" equal those around plain AdamW, so the error's way out works."""
    library = pytest.importorskip("pytorch_optimizer")
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        inner = AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        inner = CautiousDecay(inner, mask="all") if wrapped else inner
        rho = library.ProportionScheduler(torch.optim.lr_scheduler.StepLR(inner, 100), max_lr=1e-2)
        opt = library.GSAM(model.parameters(), base_optimizer=inner, model=model, rho_scheduler=rho)
        opt.set_closure(torch.nn.functional.mse_loss, torch.randn(8, 4), torch.randn(8, 2))
        for _ in range(5):
            opt.step()
        ends.append(model.weight.detach())

    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flashoptim.FlashAdamW", {"master_bytewidth": 3}),
        ("pytorch_optimizer.FlashAdamW", {"master_byte_width": 3}),
        ("heavyball.ChainOpt", {"param_ecc": "bf16+8"}),
    ],
)
def test_low_bits_kept_elsewhere_need_stochastic_rounding(name: str, options: dict[str, Any]) -> None:
    """An optimizer that keeps the low bits of 16-bit weights elsewhere is refused without stochastic rounding."""
    base = named(name)
    base.param_groups[0] |= options
    base.param_groups[0]["params"] = [weight(1.0, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"low bits of its 16-bit weights .*rounding='stochastic'"):
        CautiousDecay(base, lam=0.5)
    CautiousDecay(base, lam=0.5, rounding="stochastic")
    base.param_groups[0] |= {"params": [weight(1.0)], "param_ecc": None}
    CautiousDecay(base, lam=0.5)


def test_stochastic_rounding_decays_weights_with_low_bits_kept_elsewhere() -> None:
    """With 24 master bits, 100 steps of FlashAdamW leave 0.999**100 to half a percent, with its own decay or ours."""
    library = pytest.importorskip("pytorch_optimizer")
    means = []
    for wrapped in (False, True):
        p = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        opt = library.FlashAdamW([p], lr=1e-3, weight_decay=1.0, master_weight_bits=24)
        opt = CautiousDecay(opt, rounding="stochastic") if wrapped else opt
        for _ in range(100):
            p.grad = torch.zeros_like(p)
            opt.step()
        means.append(p.detach().float().mean().item())

    assert [pytest.approx(0.999**100, rel=5e-3)] * 2 == means


# ------------------------------------------------------------------------------------ lam in the groups

GROUPS: dict[str, tuple[list[float], float | None, list[float]]] = {
    "None keeps each": ([0.5, 0.25, 0.0], None, [0.5, 0.25, 0.0]),
    "a number replaces what is not 0": ([0.5, 0.25, 0.0], 0.125, [0.125, 0.125, 0.0]),
    "a number goes everywhere if nothing decays": ([0.0, 0.0, 0.0], 0.125, [0.125, 0.125, 0.125]),
    "0 switches it off": ([0.5, 0.25, 0.0], 0.0, [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("given", "lam", "expected"), GROUPS.values(), ids=list(GROUPS))
def test_where_lam_goes(given: list[float], lam: float | None, expected: list[float]) -> None:
    """lam is written into the groups that decay, and a step decays by it."""
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


def test_lam_may_rise_from_0() -> None:
    """If lam was set to 0, the next lam goes to the groups that decayed before, also in a copy of the wrapper."""
    groups = [{"params": [weight(1.0)]}, {"params": [weight(1.0)], "weight_decay": 0.0}]
    opt = CautiousDecay(AdamW(groups, lr=0.1, weight_decay=0.1))
    opt.lam = 0.0
    opt = copy.deepcopy(opt)
    opt.lam = 0.2

    assert [group["weight_decay"] for group in opt.param_groups] == [0.2, 0.0]


def test_lam_may_be_a_plain_number_of_any_kind() -> None:
    """An int is a number: lam=1 is lam=1.0."""
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5), lam=1)

    assert 1 == opt.param_groups[0]["weight_decay"]


def without_decay(p: torch.nn.Parameter) -> dict[str, Optimizer]:
    """Bases without a weight_decay in their groups."""
    return {"LBFGS": LBFGS([p], lr=0.1), "SparseAdam": SparseAdam([p], lr=0.1)}


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_a_base_without_weight_decay_keeps_lam_in_the_wrapper(name: str) -> None:
    """If groups have no weight_decay, lam stays in the wrapper and the state dict is unchanged."""
    base = without_decay(weight(1.0))[name]
    keys = set(base.param_groups[0])
    opt = CautiousDecay(base, lam=0.5)

    assert 0.5 == opt.lam
    assert keys == set(opt.param_groups[0])


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_a_base_without_weight_decay_needs_lam(name: str) -> None:
    """A base without weight_decay and without lam= gives a warning that nothing decays."""
    with pytest.warns(UserWarning, match="will not decay anything"):
        CautiousDecay(without_decay(weight(1.0))[name])


def test_a_later_group_of_a_base_without_weight_decay() -> None:
    """A later group of a base without weight_decay decays by lam: 1 - 0.1*0.5. A row without a gradient stays 1."""
    opt = CautiousDecay(SparseAdam([torch.nn.Parameter(torch.ones(2, 1))], lr=0.1), lam=0.5)
    p = torch.nn.Parameter(torch.ones(2, 1))
    opt.add_param_group({"params": [p]})
    p.grad = torch.sparse_coo_tensor([[0]], [[0.0]], (2, 1), check_invariants=True)
    opt.step()

    assert "weight_decay" not in opt.param_groups[1]
    torch.testing.assert_close(torch.tensor([[0.95], [1.0]]), p.detach())


def test_lam_and_a_schedule() -> None:
    """lam= is written once, so a weight_decay that a schedule writes later applies."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5), lam=0.25)
    opt.param_groups[0]["weight_decay"] = 1.0
    opt.step()

    assert pytest.approx(0.9) == p.item()
