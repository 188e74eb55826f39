"""Names for timm: every `cautious_<name>` is the wrapper around that optimizer, and scripts run with it unchanged."""

import argparse
import copy
import importlib
import inspect
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from ranks import launch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from zoo import NOTES

from cwd_wrap import CautiousDecay, rules

pytest.importorskip("timm")

import timm
from timm.optim import (
    Lookahead,
    OptimInfo,
    create_optimizer,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
)
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler

import cwd_wrap.timm
from cwd_wrap.timm import run_script

HERE = Path(__file__).parent
SCRIPT = HERE / "train_like_timm.py"
LAM = 0.1
LR = 1e-3

PLAIN = list_optimizers(exclude_filters=["cautious_*"])
# The others have a string in place of a class: they need apex or bitsandbytes, and a GPU.
ON_CPU = [name for name in PLAIN if not isinstance(get_optimizer_info(name).opt_class, str)]


def model() -> nn.Module:
    """The same small net at each call, with weights of one, two and four dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def make(net: nn.Module, name: str, weight_decay: float = LAM, **kwargs: Any) -> Optimizer:
    """An optimizer from timm's factory. Kron is left uncompiled: compiling takes half a minute on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if "kron" in name:
            patch.setattr("timm.optim.kron.has_dynamo", False)
        if name.endswith(("adamp", "sgdp")):
            kwargs |= {"wd_ratio": 1.0}  # otherwise their decay has no single step size, and the wrapper refuses them
        return create_optimizer_v2(net, name, lr=LR, weight_decay=weight_decay, **kwargs)


def backward(net: nn.Module, create_graph: bool = False) -> None:
    """Compute gradients that depend only on the weights."""
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(6) % 5
    nn.functional.cross_entropy(net(images), targets).backward(create_graph=create_graph)


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's registry; entries that the test adds are removed afterwards."""
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    return default_registry


# ---------------------------------------------------------------------------------- every name


@pytest.mark.parametrize("name", ON_CPU)
def test_every_name_is_the_wrapper_around_what_timm_makes(name: str) -> None:
    """`cautious_<name>` has the base, the defaults and the groups that timm gives `<name>`."""
    wrapped, plain = make(model(), f"cautious_{name}"), make(model(), name)

    assert isinstance(wrapped, CautiousDecay)
    assert type(wrapped).__name__ == f"CautiousDecay{type(plain).__name__}"
    assert type(wrapped.base_optimizer) is type(plain)
    assert wrapped.defaults == wrapped.base_optimizer.defaults == plain.defaults
    assert groups_of(wrapped) == groups_of(plain)
    assert sorted(group["weight_decay"] for group in wrapped.param_groups) == [0.0, LAM]


# test_conformance.py steps all of timm's optimizers in the wrapper.
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adahessian", "lamb", "adafactorbvc", "csgdp", "kron"])
def test_one_step_of_a_name_obeys_the_rule(name: str) -> None:
    """A step is the plain one without decay, minus eta * lam * 1[u*x >= 0] * x; biases and norms do not decay."""
    note = NOTES.get(f"timm.{name}", {})
    nets = model(), model()
    wrapped, plain = make(nets[0], f"cautious_{name}"), make(nets[1], name)
    eta_lam = {
        id(p): eta(note, group) * group["weight_decay"] for group in wrapped.param_groups for p in group["params"]
    }
    for group in plain.param_groups:
        if note.get("adapts") and group["weight_decay"]:  # LAMB and LARS adapt their step only in groups that decay
            group["always_adapt"] = True
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in nets[0].parameters()]
    for optimizer, net in zip((wrapped, plain), nets, strict=True):
        backward(net, create_graph=note.get("create_graph", False))
        torch.manual_seed(0)
        optimizer.step()

    decayed = 0
    for x, p, q in zip(before, nets[0].parameters(), nets[1].parameters(), strict=True):
        expected = follow(x, q.detach(), eta_lam[id(p)])
        off = (p.detach().double() - expected).abs()
        in_place = (q == x) & (p == x)  # the step is lost in rounding, but a direction has its sign

        assert ((off <= rounding(x, q)) | in_place).all(), (tuple(p.shape), off.max())
        assert (eta_lam[id(p)] > 0) == (p.dim() > 1)
        decayed += int((p != q).sum())
    assert decayed > 0


def eta(note: dict[str, Any], group: dict[str, Any]) -> float:
    """eta by the zoo's formula, or, if the zoo has none, by the options used here."""
    formula = note.get("eta", "lr")
    if formula == "given":
        return LR / (1 - group["momentum"]) if "wd_ratio" in group and "momentum" in group else LR
    return float(eval(formula, {}, group))


def follow(x: Tensor, w: Tensor, eta_lam: float) -> Tensor:
    """The rule, in float64."""
    return w.double() - eta_lam * rules.moved_towards_zero(x.double(), w.double(), strict=False) * x.double()


def rounding(x: Tensor, w: Tensor) -> Tensor:
    return 4 * torch.finfo(torch.float32).eps * torch.maximum(x.abs(), w.detach().abs()).double()


def test_the_names_are_all_of_timm() -> None:
    """The names above are those of all of timm's optimizers, except those of apex and bitsandbytes."""
    assert len(ON_CPU) >= {"1.0.31": 85}.get(timm.__version__, 50)
    assert all(name.startswith(("fused", "bnb")) for name in set(PLAIN) - set(ON_CPU))


def test_the_check_of_the_step_can_fail() -> None:
    """Plain AdamW with its own decay does not pass."""
    net, free = model(), model()
    before = [p.detach().clone() for p in net.parameters()]
    for optimizer, of in ((make(net, "adamw"), net), (make(free, "adamw", weight_decay=0.0), free)):
        backward(of)
        optimizer.step()
    off = [
        ((p.detach().double() - follow(x, q.detach(), LR * LAM)).abs() - rounding(x, q)).max()
        for x, p, q in zip(before, net.parameters(), free.parameters(), strict=True)
    ]

    assert max(off) > 0


# ------------------------------------------------------------------------------ timm's functions


def test_all_names_are_listed_twice() -> None:
    """`list_optimizers` has each name with and without the prefix, and filters both alike."""
    assert list_optimizers("cautious_*") == sorted(f"cautious_{name}" for name in PLAIN)
    assert list_optimizers() == sorted([*PLAIN, *list_optimizers("cautious_*")])
    assert list_optimizers(["cautious_adam", "lion"]) == ["cautious_adam", "lion"]


def test_descriptions_name_the_paper() -> None:
    """Cautious decay and timm's cautious update are different papers, and the descriptions say which."""
    described = dict(list_optimizers("cautious_*", with_description=True))
    adamw, cadamw = get_optimizer_info("adamw").description, get_optimizer_info("cadamw").description

    assert described["cautious_adamw"] == f"Cautious weight decay (arXiv 2510.12402) over adamw: {adamw}"
    assert described["cautious_cadamw"] == (
        f"Cautious weight decay (arXiv 2510.12402) over cadamw with cautious update (arXiv 2411.16085): {cadamw}"
    )


def test_the_entry_has_the_bases_values() -> None:
    """The entry of a cautious name has the base's values for all that timm's factory reads."""
    info, base = get_optimizer_info("cautious_adahessian"), get_optimizer_info("adahessian")

    assert (info.name, info.opt_class) == ("cautious_adahessian", CautiousDecay.over(base.opt_class))
    assert (info.has_betas, info.second_order, info.defaults) == (base.has_betas, base.second_order, base.defaults)


@pytest.mark.parametrize("bind_defaults", [True, False])
def test_get_optimizer_class(bind_defaults: bool) -> None:
    """The class takes parameters first, with timm's defaults bound or not."""
    cls = get_optimizer_class("cautious_sgd", bind_defaults=bind_defaults)
    opt = cls(model().parameters(), lr=LR, momentum=0.9, weight_decay=LAM)

    assert type(opt) is CautiousDecay.over(torch.optim.SGD)
    assert opt.param_groups[0]["weight_decay"] == LAM
    assert opt.param_groups[0]["nesterov"] is bind_defaults


def test_the_older_factory() -> None:
    """timm's older factory, which takes parsed arguments, makes the same optimizer."""
    args = argparse.Namespace(opt="cautious_momentum", lr=LR, weight_decay=LAM, momentum=0.8, opt_eps=None)
    opt = create_optimizer(args, model())

    assert isinstance(opt, CautiousDecay)
    assert {(g["momentum"], g["nesterov"]) for g in opt.param_groups} == {(0.8, False)}
    assert sorted(g["weight_decay"] for g in opt.param_groups) == [0.0, LAM]


def test_lookahead_goes_around_the_wrapper() -> None:
    """`lookahead_cautious_adamw` is Lookahead around CautiousDecay around AdamW."""
    opt = make(model(), "lookahead_cautious_adamw")

    assert type(opt) is Lookahead
    assert isinstance(opt._base_optimizer, CautiousDecay)
    assert type(opt._base_optimizer.base_optimizer) is AdamW
    backward(opt_net := model())
    opt = make(opt_net, "Lookahead_Cautious_AdamW")
    opt.step()
    opt.sync_lookahead()


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("cautious_nope", "nope"),
        ("cautious_cautious_adamw", "cautious_adamw"),
        ("my_cautious_adamw", "my_cautious_adamw"),
        ("lookahead_cautious_nope", "nope"),
    ],
)
def test_an_unknown_name_raises_timms_own_error(name: str, unknown: str) -> None:
    """An unknown name with `cautious_` in it raises an error and does not give an optimizer that is not cautious."""
    with pytest.raises(ValueError, match=f"^Optimizer {unknown} not found in registry$"):
        create_optimizer_v2(model(), name, lr=LR)


@pytest.mark.parametrize(
    "ask", [make, lambda _, name: get_optimizer_class(name), lambda _, name: get_optimizer_info(name)]
)
@pytest.mark.parametrize("name", ["cautious_lookahead_adamw", "Cautious_Lookahead_AdamW"])
def test_lookahead_inside_is_refused_with_the_name_to_use(ask: Callable[[Any, str], object], name: str) -> None:
    """Prefixes in the wrong order raise an error with the right name."""
    with pytest.raises(ValueError, match=f"^{name.lower()}: Lookahead goes around .*: use lookahead_cautious_adamw$"):
        ask(model(), name)


def test_names_without_the_prefix_are_as_before() -> None:
    """Names without the prefix have timm's own entries, classes, errors and parsing of prefixes."""
    assert get_optimizer_info("AdamW") is default_registry._optimizers["adamw"]
    assert get_optimizer_class("adamw") is AdamW
    assert type(make(model(), "adamw")) is type(make(model(), "foo_adamw")) is AdamW
    assert type(make(model(), "lookahead_adamw")._base_optimizer) is AdamW
    with pytest.raises(ValueError, match="Optimizer cautious not found"):
        make(model(), "cautious")


@pytest.mark.parametrize("again", [cwd_wrap.timm.register, lambda: importlib.reload(cwd_wrap.timm)])
def test_registering_twice_is_harmless(again: Callable[[], object]) -> None:
    """Registering twice adds each name once."""
    before = list_optimizers()
    again()

    assert list_optimizers() == before
    assert type(make(model(), "cautious_adamw")) is CautiousDecay.over(AdamW)


def test_entries_registered_later_have_a_cautious_name(registry: Any) -> None:
    """A class, a function and a dotted name, registered after the import, are wrapped too."""

    def factory(params: Any, **kwargs: Any) -> Optimizer:
        return AdamW(params, amsgrad=True, **kwargs)

    for name, opt_class in {"mine": AdamW, "made": factory, "dotted": "torch.optim.adamw.AdamW"}.items():
        registry.register(OptimInfo(name, opt_class, defaults={"eps": 1e-5}))
        opt = make(model(), f"cautious_{name}")

        assert f"cautious_{name}" in list_optimizers("cautious_*")
        assert isinstance(opt, CautiousDecay)
        assert type(opt.base_optimizer) is AdamW
        assert opt.defaults["eps"] == 1e-5
        assert isinstance(
            get_optimizer_class(f"cautious_{name}")(model().parameters(), weight_decay=LAM), CautiousDecay
        )


def test_options_of_the_wrapper_are_keyword_arguments() -> None:
    """`create_optimizer_v2`, and so `--opt-kwargs`, takes CautiousDecay's keyword arguments."""
    opt = make(model(), "cautious_adamw", strict=True, path="snapshot", betas=(0.8, 0.9))

    assert isinstance(opt, CautiousDecay)
    assert (opt.strict, opt.path, opt.lam, opt.defaults["betas"]) == (True, "snapshot", LAM, (0.8, 0.9))


LAM_OF_TIMM = ["cautious_adamw", "cautious_lion", "cautious_sgd", "lookahead_cautious_adamw"]


@pytest.mark.parametrize("name", LAM_OF_TIMM)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"layer_decay": 0.5}], ids=str)
def test_lam_takes_the_place_of_timms_weight_decay(name: str, options: dict[str, Any]) -> None:
    """With lam= the groups and weights are those of the same weight_decay=: biases stay out, also without any."""
    opt = create_optimizer_v2(model(), name, lr=0.1, lam=0.25, **options)
    twin = create_optimizer_v2(model(), name, lr=0.1, **{**options, "weight_decay": 0.25})

    assert [g["weight_decay"] for g in opt.param_groups] == [g["weight_decay"] for g in twin.param_groups]
    assert {0.0, 0.25} == {g["weight_decay"] for g in opt.param_groups}


def test_lam_as_a_positional_weight_decay() -> None:
    """A weight_decay that is passed by position to timm's registry gives way to lam, too."""
    opt = default_registry.create_optimizer(model(), "cautious_adamw", 0.1, 0.01, lam=0.25)

    assert {0.0, 0.25} == {group["weight_decay"] for group in opt.param_groups}


def test_lam_of_parameters_without_a_model() -> None:
    """timm makes no groups from parameters; lam goes to all of them, and 0 turns their decay off without a warning."""
    opt = create_optimizer_v2(model().parameters(), "cautious_adamw", lr=0.1, lam=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off = create_optimizer_v2(model(), "cautious_adamw", lr=0.1, weight_decay=0.1, lam=0)

    assert [0.25] == [group["weight_decay"] for group in opt.param_groups]
    assert {0} == {group["weight_decay"] for group in off.param_groups}


@pytest.mark.parametrize("lam", ["abc", -1.0, math.nan, [0.1]], ids=str)
def test_a_wrong_lam_names_lam(lam: Any) -> None:
    """A lam that is no number from 0 up raises with its name, not with that of weight_decay."""
    with pytest.raises((TypeError, ValueError), match=r"lam of CautiousDecay\w* is "):
        create_optimizer_v2(model(), "cautious_adamw", lr=0.1, lam=lam)


def test_opt_kwargs_carry_lam() -> None:
    """`--opt-kwargs lam=0.25` beside `--weight-decay 0.01`, as timm's train.py parses them."""
    from timm.utils import ParseKwargs

    parser = argparse.ArgumentParser()
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    options = parser.parse_args(["--opt-kwargs", "lam=0.25", "strict=True"]).opt_kwargs
    opt = create_optimizer_v2(model(), "cautious_adamw", lr=0.1, weight_decay=0.01, **options)

    assert (True, 0.25) == (opt.strict, opt.lam)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", ["cautious_adamw", "lookahead_cautious_adamw"])
def test_lam_takes_the_place_of_weight_decay(name: str, layer_decay: float | None, weight_decay: float) -> None:
    """With lam the groups are those of weight_decay=lam: biases and norms do not decay, whatever weight_decay says."""
    opt = make(net := model(), name, weight_decay=weight_decay, lam=LAM, layer_decay=layer_decay)
    inner = getattr(opt, "_base_optimizer", opt)
    matrices = {id(p) for p in net.parameters() if p.ndim > 1}
    decays = {id(p): group["weight_decay"] for group in opt.param_groups for p in group["params"]}

    assert inner.lam == LAM
    assert decays == {id(p): LAM if id(p) in matrices else 0.0 for p in net.parameters()}


def test_every_option_of_the_wrapper_is_taken() -> None:
    """Each keyword argument of CautiousDecay reaches it through the factory."""
    options = {
        "lam": 0.5, "mask": "all", "strict": True, "leak": 0.25, "step_size": one_thousandth, "path": "snapshot",
        "rounding": "stochastic", "seed": 3, "backend": "eager",
    }  # fmt: skip
    opt = make(model(), "cautious_adamw", **options)

    assert [*options] == [name for name in inspect.signature(CautiousDecay).parameters if name != "base_optimizer"]
    assert options == {name: getattr(opt, name) for name in options}


def test_foreach_reaches_the_base() -> None:
    """`foreach` is passed on to the base."""
    assert make(model(), "cautious_adamw", foreach=True).defaults["foreach"] is True


def test_train_py_finds_second_order() -> None:
    """The wrapper has is_second_order, which timm's train.py reads, if the base has it."""
    assert make(model(), "cautious_adahessian").is_second_order is True
    for lookahead in make(model(), "lookahead_adahessian"), make(model(), "lookahead_cautious_adahessian"):
        assert getattr(lookahead, "is_second_order", None) in {True, None}  # in the oldest timm it raises
    assert not hasattr(make(model(), "cautious_adamw"), "is_second_order")


# -------------------------------------------------------------------------------------- groups


def test_layer_decay_and_timms_scheduler() -> None:
    """Groups keep `lr_scale`; timm's scheduler sets each group's lr, and the decay follows it."""
    net = timm.create_model("test_vit", num_classes=5, img_size=32)
    opt = make(net, "cautious_adamw", layer_decay=0.5)
    scheduler = CosineLRScheduler(opt, t_initial=10, warmup_t=2, warmup_lr_init=1e-5, t_in_epochs=False)
    plain_net = copy.deepcopy(net)
    plain = make(plain_net, "adamw", layer_decay=0.5)
    plain_scheduler = CosineLRScheduler(plain, t_initial=10, warmup_t=2, warmup_lr_init=1e-5, t_in_epochs=False)
    for update in range(4):
        scheduler.step_update(update)
        plain_scheduler.step_update(update)

    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in plain.param_groups]
    assert len({g["lr_scale"] for g in opt.param_groups}) > 2
    assert groups_of(opt) == groups_of(plain)


# ----------------------------------------------------------------------------------- bad input


def test_adafactor_without_lr_says_what_to_give() -> None:
    """Adafactor without lr raises an error that names `step_size=`, and works with it."""
    with pytest.raises(
        ValueError, match=r"^cautious_adafactor: .*is unknown: give the group a learning rate, or pass "
    ):
        create_optimizer_v2(model(), "cautious_adafactor", weight_decay=LAM)

    opt = create_optimizer_v2(model(), "cautious_adafactor", weight_decay=LAM, step_size=one_thousandth)

    assert isinstance(opt, CautiousDecay)
    assert opt.step_size is one_thousandth


def one_thousandth(group: Any) -> float:
    return 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the text is for a machine without a GPU")
@pytest.mark.parametrize("name", sorted(set(PLAIN) - set(ON_CPU)))
def test_apex_and_bitsandbytes_need_a_gpu(name: str) -> None:
    """Without a GPU, apex and bitsandbytes names raise timm's own error, with the name in front."""
    library = "APEX" if name.startswith("fused") else "bitsandbytes"

    with pytest.raises(ValueError, match=f"^cautious_{name}: CUDA required for {library} optimizers$"):
        make(model(), f"cautious_{name}")


def test_an_optimizer_that_cannot_be_wrapped_raises_the_reason(registry: Any) -> None:
    """The error for an optimizer that keeps its own copy of the weights has the name and the reason."""

    class ScheduleFreeAdamW(AdamW): ...

    registry.register(OptimInfo("schedulefree", ScheduleFreeAdamW))

    with pytest.raises(ValueError, match=r"^cautious_schedulefree: .* cannot wrap ScheduleFreeAdamW: "):
        make(model(), "cautious_schedulefree")


def test_timm_without_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing or older timm names the version that is needed."""
    monkeypatch.setitem(sys.modules, "timm.optim._optim_factory", None)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0.11")

    with pytest.raises(
        ImportError, match=r"needs timm 1\.0\.12 or newer.* but found timm 1\.0\.11 .*pip install 'timm>"
    ):
        cwd_wrap.timm.register()


def test_the_module_does_not_shadow_timm() -> None:
    """`cwd_wrap.timm` and timm are two modules."""
    assert timm is not cwd_wrap.timm
    assert timm.optim.create_optimizer_v2 is create_optimizer_v2


# -------------------------------------------------------------------------- an unchanged script


class Runner:
    """Runs the script in this process through the launcher, and returns its log lines."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object) -> list[str]:
        run_script([str(SCRIPT), *(str(a) for a in argv)])
        return self.capsys.readouterr().out.splitlines()


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    for name in ("argv", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return Runner(capsys)


def unnamed(lines: list[str]) -> list[str]:
    return [line.replace("CautiousDecay", "").replace("cautious_", "") for line in lines]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw"])
def test_an_unchanged_script_logs_the_same_lines(train: Runner, opt: str) -> None:
    """With weight_decay 0 only the optimizer's name differs in the log; with decay the numbers differ as well."""
    cautious = f"cautious_{opt}".replace("cautious_lookahead_", "lookahead_cautious_")

    with pytest.warns(UserWarning, match="will not decay anything"):
        without = train("--opt", cautious, "--weight-decay", 0)
    assert unnamed(without) == train("--opt", opt, "--weight-decay", 0)

    decaying = train("--opt", cautious, "--weight-decay", 10)
    plain = train("--opt", opt, "--weight-decay", 10)
    assert [re.sub(r"\d", "0", line) for line in unnamed(decaying)] == [re.sub(r"\d", "0", line) for line in plain]
    assert unnamed(decaying)[1:] != plain[1:]


def test_all_flags_of_the_script(train: Runner) -> None:
    """Layer decay, mixed precision, clipping, --opt-kwargs, betas and warmup run together."""
    flags = ["--layer-decay", 0.7, "--amp", "--clip-grad", 1.0, "--opt-betas", 0.8, 0.9, "--warmup-epochs", 1]
    lines = train("--opt", "cautious_nadamw", "--weight-decay", 0.1, *flags, "--opt-kwargs", "strict=True", "eps=1e-6")

    assert "betas: [0.8, 0.9], eps: 1e-06" in lines[0]
    assert len(lines) == 3


def test_opt_kwargs_take_lam(train: Runner) -> None:
    """`--opt-kwargs lam=10` logs the losses of `--weight-decay 10`, up to the line with the arguments."""
    given = train("--opt", "cautious_adamw", "--weight-decay", 10)

    assert given[1:] == train("--opt", "cautious_adamw", "--opt-kwargs", "lam=10")[1:]
    assert given[1:] != train("--opt", "cautious_adamw", "--opt-kwargs", "lam=1")[1:]


@pytest.mark.parametrize(("first", "then"), [("adamw", "cautious_adamw"), ("cautious_adamw", "adamw")])
def test_checkpoints_resume_in_both_directions(train: Runner, tmp_path: Path, first: str, then: str) -> None:
    """With weight_decay 0, a run that changes the optimizer after one epoch logs the lines of the uninterrupted run."""
    flags = ["--weight-decay", 0, "--sched", "constant", "--epochs"]
    (tmp_path / "first").mkdir()
    (tmp_path / "then").mkdir()
    with pytest.warns(UserWarning, match="will not decay anything"):
        train("--opt", first, *flags, 1, "--output", tmp_path / "first")
        checkpoint = tmp_path / "first" / "last.pth.tar"
        resumed = train("--opt", then, *flags, 2, "--output", tmp_path / "then", "--resume", checkpoint)
        uninterrupted = train("--opt", first, *flags, 2)

    assert [line for line in resumed if line.startswith("Train: 1")] == uninterrupted[-2:]
    one, two = (torch.load(tmp_path / f / "last.pth.tar", weights_only=False)["optimizer"] for f in ("first", "then"))
    assert one["param_groups"][0].keys() == two["param_groups"][0].keys()
    assert [*one["state"][0]] == [*two["state"][0]]


def test_resume_keeps_the_decay(train: Runner, tmp_path: Path) -> None:
    """With decay, two epochs in one run and in two runs give the same log lines."""
    flags = ["--opt", "cautious_adamw", "--weight-decay", 10, "--sched", "constant", "--epochs"]
    train(*flags, 1, "--output", tmp_path)
    resumed = train(*flags, 2, "--resume", tmp_path / "last.pth.tar")

    assert resumed[-2:] == train(*flags, 2)[-2:]


# ------------------------------------------------------------------------------------ launcher

PROBE = """
import sys
print(__name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals(), __package__)
print(__spec__ and __spec__.name)

def fail():
    raise KeyError("lost")

if "--exit" in sys.argv:
    sys.exit(3)
try:
    fail()
except KeyError as error:
    raise RuntimeError("at last") from error
"""


@pytest.fixture
def ends_alike(
    tmp_path: Path, train: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """A function that compares python with the launcher: a process with an error, or sys.exit in this process."""
    launcher = ["-m", "cwd_wrap.timm"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(HERE.parent)}
        )

    def compare(*words: str, exits: bool) -> None:
        if not exits:
            direct, launched = run(*words), run(*launcher, *words)
            ends = [(1, each.stdout, without_runpy(each.stderr)) for each in (direct, launched)]
            assert [1, 1] == [direct.returncode, launched.returncode]
            assert launched.stderr == without_runpy(launched.stderr)
        else:
            direct = run(*words, "--exit")
            assert direct.returncode == 3
            monkeypatch.chdir(tmp_path)
            monkeypatch.syspath_prepend(tmp_path)
            with pytest.raises(SystemExit) as stopped:
                run_script([*words, "--exit"])
            ends = [(direct.returncode, direct.stdout, direct.stderr), (stopped.value.code, *capsys.readouterr())]
        assert ends[0] == ends[1]

    yield compare
    for name in [name for name in sys.modules if name.split(".")[0] == "package"]:
        del sys.modules[name]


@pytest.mark.parametrize("exits", [False, True])
def test_a_script_is_run_as_python_runs_it(tmp_path: Path, exits: bool, ends_alike: Any) -> None:
    """Arguments, names, sys.path[0], traceback and exit code are those of `python script.py`."""
    script = tmp_path / "folder" / "probe.py"
    script.parent.mkdir()
    script.write_text(PROBE)
    ends_alike("folder/probe.py", "--lr", "1", exits=exits)


@pytest.mark.parametrize(("module", "exits"), [("package.probe", True), ("package", True), ("package", False)])
def test_a_module_is_run_as_python_runs_it(tmp_path: Path, module: str, exits: bool, ends_alike: Any) -> None:
    """The same holds for `-m` and a module, or a package with a `__main__`."""
    (tmp_path / "package").mkdir()
    for name in ("probe", "__main__"):
        (tmp_path / f"package/{name}.py").write_text(f"from package import VALUE\nprint(VALUE)\n{PROBE}")
    (tmp_path / "package/__init__.py").write_text("VALUE = 1")
    ends_alike("-m", module, "--lr", "1", exits=exits)


def without_runpy(traceback: str) -> str:
    """A traceback without python's own frames of ``-m``, each two or three lines."""
    return re.sub(r'  File "<frozen runpy>".*\n(    .*\n)*', "", traceback)


def test_the_scripts_own_timm_comes_first(tmp_path: Path) -> None:
    """If the script's folder has its own timm, the launcher uses that one, because the script imports it."""
    (tmp_path / "clone" / "timm").mkdir(parents=True)
    (tmp_path / "clone" / "timm" / "__init__.py").write_text("")
    (tmp_path / "clone" / "train.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "cwd_wrap.timm", "clone/train.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(HERE.parent)},
    )

    assert done.returncode == 2
    assert done.stderr.startswith("python -m cwd_wrap.timm: cwd_wrap.timm needs timm 1.0.12 or newer")


CHILDREN = """
import sys

import torch
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Dataset

def made():
    return type(create_optimizer_v2([torch.ones(1, requires_grad=True)], "cautious_adamw", weight_decay=0.1)).__name__

class Made(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return made()

def work(rank, start_method, loads):
    options = {"batch_size": None, "num_workers": 1, "multiprocessing_context": start_method}
    print(made(), *(DataLoader(Made(), **options) if loads else ()), __name__, flush=True)

if __name__ == "__main__":
    if "import" in sys.argv:
        import cwd_wrap.timm
    for start_method in sys.argv[1].split(","):
        loads = "loads" in sys.argv
        torch.multiprocessing.start_processes(work, (start_method, loads), start_method=start_method)
"""


@pytest.mark.parametrize(
    ("launcher", "argv", "expected"),
    [
        (["-m", "cwd_wrap.timm", "-m"], ["forkserver"], ["CautiousDecayAdamW __mp_main__"]),
        (
            ["-m", "cwd_wrap.timm"],
            ["fork,spawn", "loads"],
            [
                "CautiousDecayAdamW CautiousDecayAdamW __main__",
                "CautiousDecayAdamW CautiousDecayAdamW __mp_main__",
            ],
        ),
        ([], ["spawn", "import"], ["CautiousDecayAdamW __mp_main__"]),
    ],
    ids=["module", "script", "import"],
)
def test_child_processes_have_the_names(
    tmp_path: Path, launcher: list[str], argv: list[str], expected: list[str]
) -> None:
    """Child processes of every start method have the names, and so do the workers of their data loaders."""
    (tmp_path / "script.py").write_text(CHILDREN)
    script = "script" if launcher[-1:] == ["-m"] else tmp_path / "script.py"
    done = python(*launcher, script, *argv, cwd=tmp_path)

    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "no script given\nusage: python -m cwd_wrap.timm SCRIPT"),
        (["nope.py", "--opt", "x"], "there is no script 'nope.py' in "),
        (["--opt", "x", "train.py"], "there is no script '--opt' in "),
        (["."], "there is no script '.' in "),
        (["-m"], "no module given\nusage: python -m cwd_wrap.timm SCRIPT"),
        (["-m", "no_such_module"], "there is no module 'no_such_module' that can be run"),
        (["-m", "no_such_package.main"], "cannot import module 'no_such_package.main' (No module named"),
        (["-m", "cwd_wrap.kernels"], "there is no module 'cwd_wrap.kernels' that can be run"),
    ],
)
def test_the_launcher_without_a_script(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing script or module gives one line or the usage, and python's exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_script(argv)

    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"python -m cwd_wrap.timm: {text}")


def test_the_launcher_prints_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """--help without a script prints the launcher's usage."""
    run_script(["--help"])

    assert capsys.readouterr().out.startswith("usage: python -m cwd_wrap.timm SCRIPT")


def test_on_two_ranks() -> None:
    """`torchrun -m cwd_wrap.timm train.py` trains in two processes and logs from one."""
    one, two = launch("-m", "cwd_wrap.timm", SCRIPT, "--opt", "cautious_adamw", "--weight-decay", "0.1")

    assert (0, 0) == (one.returncode, two.returncode), one.stderr + two.stderr
    assert one.stdout.splitlines()[0].startswith("Created CautiousDecayAdamW (cautious_adamw) optimizer: ")
    assert len(one.stdout.splitlines()) == 3
    assert two.stdout == ""
