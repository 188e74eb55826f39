"""Every row of the table of pieces: steps of one subset of the parameters after another equal the whole step's bits.

Each optimizer is built twice. One is stepped as usual; the other's own step is called once for each piece, while every
`group["params"]` holds the piece's parameters only. After each step everything is compared: weights, gradients, state,
group values, the optimizer's attributes, and the state of the random generator. After the first and the last step, one
with empty lists must change nothing.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.optim as o
import zoo
from support import same
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from cwd_wrap.bases import pieces

F32, BF16 = torch.float32, torch.bfloat16
STEPS = 7
SHAPES = {1: [(5,), (3,), (1,)], 2: [(4, 3), (8, 6), (2, 6)], 4: [(3, 2, 3, 3), (8, 4, 2, 2), (2, 3, 1, 1)]}
# How a step is cut: parameters per piece, whether in reverse order, whether with parameters without a gradient.
CUTS = [(1, False, True), (3, True, False)]


@dataclass(frozen=True)
class Trial:
    """An optimizer, and what kind of parameters and gradients it gets."""

    build: Callable[[zoo.Groups], Optimizer]
    dims: tuple[int, ...] = (1, 2, 4)
    dtypes: tuple[torch.dtype, ...] = (F32,)
    options: tuple[str, ...] = ("lr", "weight_decay")
    spread: bool = True
    """The groups differ in lr, and in betas if these are two."""
    late: bool = True
    """Some parameters get their first gradient at a later step than others."""
    size: float = 1.0
    """About how large the gradients are."""
    sparse: bool = False
    create_graph: bool = False
    device: str = "cpu"

    def optimizer(self) -> Optimizer:
        """Three groups: the second does not decay; in each, one parameter is frozen."""
        torch.manual_seed(0)
        groups: zoo.Groups = []
        for lr, weight_decay in [(1e-2, 0.1), (3e-3, 0.0), (1e-3, 0.2)]:
            shapes = [shape for dim in self.dims for shape in SHAPES[dim]][: None if not groups else -1]
            params = [self.parameter(shape, k) for k, shape in enumerate(shapes)]
            params[1].requires_grad_(False)
            options = {"lr": lr if self.spread else 1e-2, "weight_decay": weight_decay}
            groups.append({"params": params, **{key: options[key] for key in self.options}})
        optimizer = self.build(groups)
        last = optimizer.param_groups[-1]
        if self.spread and len(last.get("betas") or ()) == 2:
            last["betas"] = (0.8, last["betas"][1])
        return optimizer

    def parameter(self, shape: tuple[int, ...], k: int) -> Parameter:
        return Parameter(torch.randn(shape).to(self.device, self.dtypes[k % len(self.dtypes)]))

    def backward(self, optimizer: Optimizer, step: int) -> None:
        """Set the gradients of a step. One parameter of five has a gradient only at every third step."""
        generator = torch.Generator().manual_seed(step)
        losses = []
        for k, p in enumerate(members(optimizer)):
            g = (self.size * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
            p.grad = None
            starts = 2 if self.late and k % 7 == 4 else 0
            if p.requires_grad and step >= starts and (k % 5 or step % 3 == 0):
                losses.append((p * g).sum())
                p.grad = g.to_sparse(1) if self.sparse else g
        if self.create_graph:
            optimizer.zero_grad()
            sum(losses, torch.zeros(())).pow(3).backward(create_graph=True)


def members(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def own_step(optimizer: Optimizer) -> None:
    """The optimizer's step without the hooks that torch puts around it."""
    step = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def step_in_pieces(optimizer: Optimizer, cut: list[list[Parameter]]) -> None:
    lists = [group["params"] for group in optimizer.param_groups]
    full = [list(params) for params in lists]
    try:
        for piece in cut:
            wanted = {id(p) for p in piece}
            for params, all_of_them in zip(lists, full, strict=True):
                params[:] = [p for p in all_of_them if id(p) in wanted]
            own_step(optimizer)
    finally:
        for params, all_of_them in zip(lists, full, strict=True):
            params[:] = all_of_them


def cut(optimizer: Optimizer, size: int, backwards: bool, all_of_them: bool) -> list[list[Parameter]]:
    params = [p for p in members(optimizer) if all_of_them or p.grad is not None]
    cut = [params[k : k + size] for k in range(0, len(params), size)]
    return cut[::-1] if backwards else cut


def record(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of all that a step may change, with places in place of parameters and class names for other objects."""
    names = {id(p): f"parameter {k}" for k, p in enumerate(members(optimizer))}
    seen = set()

    def copy(value: Any) -> Any:
        if id(value) in names:
            return names[id(value)]
        if isinstance(value, Tensor):
            return value.detach().to_dense().clone() if value.layout == torch.sparse_coo else value.detach().clone()
        if isinstance(value, Optimizer):
            return "seen" if id(value) in seen else everything(value)
        if isinstance(value, dict):
            return {copy(key): copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item) for item in value]
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, random.Random):
            return value.getstate()
        plain = value is None or isinstance(value, int | float | complex | str | torch.dtype)
        return value if plain else type(value).__name__

    def everything(optimizer: Optimizer) -> dict[str, Any]:
        seen.add(id(optimizer))
        inside = {key: value for key, value in vars(optimizer).items() if "hook" not in key}
        groups = inside.pop("param_groups", optimizer.param_groups)
        return {
            "groups": [{key: copy(value) for key, value in group.items() if key != "params"} for group in groups],
            "state": copy(dict(inside.pop("state", optimizer.state))),
            **{key: copy(value) for key, value in inside.items()},
        }

    tensors = {names[id(p)]: (p.detach().clone(), copy(p.grad)) for p in members(optimizer)}
    return {"tensors": tensors, **everything(optimizer)}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in a.keys() | b.keys() if not same(a.get(key), b.get(key))]


def first_difference(trial: Trial, cuts: list[tuple[int, bool, bool]] = CUTS) -> str | None:
    """The first difference between steps in pieces and whole steps, or their error; None if they agree."""
    for size, backwards, all_of_them in cuts:
        whole, pieced = trial.optimizer(), trial.optimizer()
        assert not differing(record(whole), record(pieced))
        for step in range(STEPS):
            for optimizer in (whole, pieced):
                trial.backward(optimizer, step)
            torch.manual_seed(step)
            try:
                whole.step()
                drawn = torch.get_rng_state()
                torch.manual_seed(step)
                step_in_pieces(pieced, cut(pieced, size, backwards, all_of_them))
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            after = record(pieced)
            where = differing(record(whole), after)
            if where or not torch.equal(drawn, torch.get_rng_state()):
                return f"pieces of {size}, step {step}: {where or 'random numbers'}"
            if step in (0, STEPS - 1):
                step_in_pieces(pieced, [[]])
                where = differing(after, record(pieced))
                if where:
                    return f"empty lists, step {step}: {where}"
            schedule(whole, pieced)
    return None


def schedule(*optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                group["lr"] = group["lr"] * 0.9


# --------------------------------------------------------------------------------------- each row

PLAIN, FOREACH, FUSED, MAXIMIZE, CAUTION = {}, {"foreach": True}, {"fused": True}, {"maximize": True}, {"caution": True}
AMSGRAD, NESTEROV = {"amsgrad": True}, {"momentum": 0.9, "nesterov": True}
CORRECTED = {"corrected_weight_decay": True}
FORMS = (PLAIN, FOREACH, MAXIMIZE, {**FOREACH, **MAXIMIZE})
FUSED_TOO = (*FORMS, FUSED, {**FUSED, **MAXIMIZE})
CAUTIOUS = (PLAIN, CAUTION)
RMSPROP = ({"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True})

# Class -> its options, each set one trial.
ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "torch.optim.adadelta.Adadelta": FORMS,
    "torch.optim.adagrad.Adagrad": (*FUSED_TOO, {"lr_decay": 0.1}),
    "torch.optim.adam.Adam": (*FUSED_TOO, AMSGRAD, {**AMSGRAD, **FOREACH}, {**AMSGRAD, **FUSED}),
    "torch.optim.adamw.AdamW": (*FUSED_TOO, AMSGRAD, {**AMSGRAD, **FOREACH}, {**AMSGRAD, **FUSED}),
    "torch.optim.adamax.Adamax": FORMS,
    "torch.optim.asgd.ASGD": (*FORMS, {"t0": 2.0, "lambd": 0.1}, {"t0": 2.0, "lambd": 0.1, **FOREACH}),
    "torch.optim.nadam.NAdam": (*FORMS, {"decoupled_weight_decay": True}),
    "torch.optim.radam.RAdam": (*FORMS, {"decoupled_weight_decay": True}),
    "torch.optim.rmsprop.RMSprop": (*FORMS, *({**a, **b} for a in RMSPROP for b in (PLAIN, FOREACH))),
    "torch.optim.rprop.Rprop": FORMS,
    "torch.optim.sgd.SGD": (
        *FUSED_TOO,
        *(
            {**a, **b}
            for a in ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, NESTEROV)
            for b in FUSED_TOO[:5]
        ),
    ),
    "torch.optim.Adafactor": (*FORMS, {"eps": (1e-30, 1e-3), **FOREACH}),
    "torch.optim.Muon": (PLAIN, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}),
    "torch.optim.sparse_adam.SparseAdam": (PLAIN, MAXIMIZE),
    "timm.optim.adabelief.AdaBelief": (
        PLAIN,
        AMSGRAD,
        {"rectify": False, **FOREACH},
        {"degenerated_to_sgd": False, **FOREACH},
        {"fixed_decay": True},
        {"decoupled_decay": False},
    ),
    "timm.optim.adafactor.Adafactor": (
        {"lr": 0.01},
        *({"lr": 0.01, "min_dim_size_to_factor": 2, "betas": (0.9, 0.99), **a} for a in CAUTIOUS),
    ),
    "timm.optim.adafactor_bv.AdafactorBigVision": (
        *CAUTIOUS,
        CORRECTED,
        {"min_dim_size_to_factor": 2, "clipping_threshold": 1.0},
        {"momentum": None},
        {"unscaled_wd": True},
    ),
    "timm.optim.adamp.AdamP": (*CAUTIOUS, {"nesterov": True}),
    "timm.optim.adamw.AdamWLegacy": (
        *FORMS,
        *({**a, **b} for a in (AMSGRAD, CAUTION, CORRECTED, {"clipping_threshold": 0.5}) for b in (PLAIN, FOREACH)),
    ),
    "timm.optim.adopt.Adopt": (
        *FORMS,
        *(
            {**a, **b}
            for a in (CAUTION, {"decoupled": True, **CORRECTED}, {"clip_exp": None})
            for b in (PLAIN, FOREACH)
        ),
    ),
    "timm.optim.laprop.LaProp": (PLAIN, CAUTION, CORRECTED),
    "timm.optim.lars.Lars": (
        *({**a, **b} for a in (PLAIN, NESTEROV, {"always_adapt": True, "trust_clip": True}) for b in (PLAIN, FOREACH)),
        {"momentum": 0.9, "dampening": 0.5, **FOREACH},
    ),
    "timm.optim.lion.Lion": (*FORMS, *({**a, **b} for a in (CAUTION, CORRECTED) for b in (PLAIN, FOREACH))),
    "timm.optim.madgrad.MADGRAD": (PLAIN, {"momentum": 0}, {"decoupled_decay": True}),
    "timm.optim.mars.Mars": (*CAUTIOUS, {"mars_type": "lion"}, {"optimize_1d": True}),
    "timm.optim.muon.Muon": (
        PLAIN,
        {"nesterov": True},
        {"algo": "adamuon"},
        {"algo": "adamuon", "adjust_lr_fn": "rms_to_rms", "scale_eps": True, "nesterov": True},
        {"conv_mode": "batched", "fallback_lr_scale": 0.1},
    ),
    "timm.optim.nadam.NAdamLegacy": (PLAIN,),
    "timm.optim.nadamw.NAdamW": (
        *FORMS,
        *({**a, **b} for a in (CAUTION, CORRECTED, {"clipping_threshold": 0.5}) for b in (PLAIN, FOREACH)),
    ),
    "timm.optim.nvnovograd.NvNovoGrad": (
        PLAIN,
        AMSGRAD,
        {"decoupled_decay": True, **CORRECTED},
        {"grad_averaging": True},
    ),
    "timm.optim.radam.RAdamLegacy": (PLAIN,),
    "timm.optim.rmsprop_tf.RMSpropTF": (
        *({**a, **b} for a in (PLAIN, *RMSPROP, {"decoupled_decay": True, **CORRECTED}) for b in (PLAIN, FOREACH)),
        *({"momentum": 0.9, **CAUTION, **a} for a in (PLAIN, FOREACH)),
        {"momentum": 0.9, "lr_in_momentum": False},
    ),
    "timm.optim.sgdp.SGDP": ({"lr": 0.1}, {"lr": 0.1, **NESTEROV}, {"lr": 0.1, "momentum": 0.9, **CAUTION}),
    "timm.optim.sgdw.SGDW": (
        *FORMS,
        *(
            {**a, **b}
            for a in (NESTEROV, {**NESTEROV, **CAUTION}, {"momentum": 0.9, **CORRECTED})
            for b in (PLAIN, FOREACH)
        ),
    ),
    "lion_pytorch.lion_pytorch.Lion": (PLAIN, {"decoupled_weight_decay": True}),
    "rose_opt.Rose": ({"lr": 0.01},),
    "pytorch_ranger.ranger913A.RangerVA": (
        {"k": 2},
        {"k": 2, "amsgrad": False, "transformer": "none", "grad_transformer": "abs"},
    ),
    "pytorch_ranger.rangerqh.RangerQH": ({"k": 2}, {"k": 2, "decouple_weight_decay": True}),
    "torch_optimizer.a2grad.A2GradExp": (PLAIN,),
    "torch_optimizer.a2grad.A2GradInc": (PLAIN,),
    "torch_optimizer.a2grad.A2GradUni": (PLAIN,),
    "torch_optimizer.accsgd.AccSGD": (PLAIN,),
    "torch_optimizer.adabelief.AdaBelief": (PLAIN, AMSGRAD, {"weight_decouple": True, "fixed_decay": True}),
    "torch_optimizer.adabound.AdaBound": (PLAIN, {"amsbound": True}),
    "torch_optimizer.adafactor.Adafactor": (PLAIN, {"beta1": 0.9, "warmup_init": True}),
    "torch_optimizer.adamod.AdaMod": (PLAIN,),
    "torch_optimizer.adamp.AdamP": (PLAIN, {"nesterov": True}),
    "torch_optimizer.aggmo.AggMo": (PLAIN,),
    "torch_optimizer.apollo.Apollo": (PLAIN, {"warmup": 3}),
    "torch_optimizer.diffgrad.DiffGrad": (PLAIN,),
    "torch_optimizer.lamb.Lamb": (PLAIN, {"adam": True}, {"debias": True}),
    "torch_optimizer.lars.LARS": (PLAIN, NESTEROV, {"momentum": 0.9, "dampening": 0.5}),
    "torch_optimizer.novograd.NovoGrad": (PLAIN, AMSGRAD, {"grad_averaging": True}),
    "torch_optimizer.pid.PID": (PLAIN, {"momentum": 0.9}),
    "torch_optimizer.qhadam.QHAdam": (PLAIN, {"decouple_weight_decay": True, "nus": (0.7, 0.9)}),
    "torch_optimizer.qhm.QHM": ({"momentum": 0.9}, {"momentum": 0.9, "weight_decay_type": "direct"}),
    "torch_optimizer.sgdp.SGDP": (PLAIN, NESTEROV),
    "torch_optimizer.sgdw.SGDW": (PLAIN, {"momentum": 0.9}),
    "torch_optimizer.shampoo.Shampoo": (PLAIN, {"momentum": 0.9, "update_freq": 2}),
    "torch_optimizer.yogi.Yogi": (PLAIN,),
}
# The parameters and gradients that a class needs.
DIMS = {
    "torch.optim.Muon": (2,),
    "torch.optim.sparse_adam.SparseAdam": (1, 2),
    "torch_optimizer.adafactor.Adafactor": (1, 2),
}


def named(path: str) -> type[Optimizer]:
    module, name = path.rsplit(".", 1)
    pytest.importorskip(module.split(".")[0])
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"no {path} in this version")


def trial(path: str, flags: dict[str, Any], **more: Any) -> Trial:
    cls = named(path)
    # Fused SGD itself raises where only some of the parameters have a momentum buffer.
    late = not (path.endswith(".SGD") and flags.get("fused") and flags.get("momentum"))
    settings = {"dims": DIMS.get(path, (1, 2, 4)), "late": late, "sparse": "sparse" in path, **more}
    return Trial(lambda groups: cls(groups, **flags), **settings)


@pytest.mark.parametrize(
    ("path", "flags", "cuts"),
    [
        pytest.param(path, flags, cuts, id="-".join([path, *(f"{key}={value}" for key, value in flags.items())]))
        for path, options in ROWS.items()
        for flags, cuts in zip(options, [CUTS, *([cut] for cut in CUTS * len(options))], strict=False)
    ],
)
def test_steps_in_pieces_are_the_whole_step(
    path: str, flags: dict[str, Any], cuts: list[tuple[int, bool, bool]]
) -> None:
    """Steps in pieces equal whole steps, bit for bit, over seven steps with a scheduled lr.

    The first options of a class in both cuts, the others in one.
    """
    this = trial(path, flags)
    optimizer = this.optimizer()

    assert [pieces.why_not(optimizer, group) for group in optimizer.param_groups] == [None] * 3
    assert first_difference(this, cuts) is None


def test_each_row_is_tested() -> None:
    """The test above covers every row of the table."""
    assert set(ROWS) == set(pieces.TABLE)


@pytest.mark.parametrize("dtypes", [(BF16,), (F32, BF16)], ids=["bf16", "both"])
@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("torch.optim.adamw.AdamW", PLAIN),
        ("torch.optim.adamw.AdamW", FOREACH),
        ("torch.optim.adamw.AdamW", FUSED),
        ("torch.optim.Muon", PLAIN),
        ("torch.optim.Adafactor", PLAIN),
        ("torch.optim.Adafactor", {"eps": (1e-30, 1e-3), **FOREACH}),
        ("torch.optim.rmsprop.RMSprop", {"momentum": 0.9}),
        ("timm.optim.adafactor.Adafactor", {"lr": 0.01}),
        ("timm.optim.lion.Lion", CAUTION),
    ],
)
def test_low_precision(path: str, flags: dict[str, Any], dtypes: tuple[torch.dtype, ...]) -> None:
    """The same holds in bfloat16, and in groups of bfloat16 and float32 parameters."""
    this = trial(path, flags, dtypes=dtypes)
    optimizer = this.optimizer()

    assert pieces.why_not(optimizer, optimizer.param_groups[0]) is None
    assert first_difference(this) is None


@pytest.mark.parametrize("flags", [PLAIN, FUSED], ids=["plain", "fused"])
def test_a_tensor_lr(flags: dict[str, Any]) -> None:
    """The same holds with a tensor lr."""

    def build(groups: zoo.Groups) -> Optimizer:
        return o.AdamW([{**group, "lr": torch.tensor(group["lr"])} for group in groups], **flags)

    assert first_difference(Trial(build)) is None


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_gradient_scaler_reaches_every_piece(found_inf: float) -> None:
    """The same holds for a fused optimizer that unscales its gradients and skips the step on overflow."""

    def build(groups: zoo.Groups) -> Optimizer:
        optimizer = o.AdamW(groups, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        return optimizer

    assert first_difference(Trial(build)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
@pytest.mark.parametrize("path", [path for path in ROWS if path.startswith("torch.")])
def test_on_a_card(path: str) -> None:
    """The same holds on a CUDA device, where foreach is the default, and with capturable."""
    capturable = "capturable" in named(path)([Parameter(torch.ones(1, 1))]).defaults
    for flags in (*ROWS[path], *([{"capturable": True}, {"capturable": True, **FOREACH}] if capturable else [])):
        assert first_difference(trial(path, flags, device="cuda")) is None, flags


# -------------------------------------------------------------------------------- what stays out

# Options under which a class of the table stays out, and how the check shows that they do not hold.
REASONS = [
    (
        "torch.optim.Adafactor",
        FOREACH,
        {"dtypes": (F32, BF16), "size": 1e-3},
        "one eps for parameters of several dtypes",
    ),
    ("timm.optim.adafactor.Adafactor", PLAIN, {}, "Adafactor with relative_step sets a new lr"),
    ("timm.optim.laprop.LaProp", FOREACH, {}, "LaProp with foreach rounds differently"),
    ("timm.optim.adabelief.AdaBelief", FOREACH, {}, "AdaBelief with rectify and foreach rounds differently"),
]


@pytest.mark.parametrize(("path", "flags", "more", "reason"), REASONS)
def test_options_that_do_not_hold_return_a_reason(
    path: str, flags: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    """Options that rule out pieces give a reason, and the check does fail with them."""
    this = trial(path, flags, **more)
    optimizer = this.optimizer()

    assert reason in str(pieces.why_not(optimizer, optimizer.param_groups[0]))
    assert first_difference(this) is not None


def test_foreach_by_default_is_refused_off_the_cpu() -> None:
    """foreach=None is refused off the CPU, where timm then steps all parameters at once."""
    cls = named("timm.optim.laprop.LaProp")
    here, away = (cls([Parameter(torch.ones(2, device=device))]) for device in ("cpu", "meta"))

    assert pieces.why_not(here, here.param_groups[0]) is None
    assert "foreach" in str(pieces.why_not(away, away.param_groups[0]))


@pytest.mark.parametrize("path", ["timm.optim.adabelief.AdaBelief", "timm.optim.radam.RAdamLegacy"])
def test_a_cache_of_older_versions_is_refused(path: str) -> None:
    """timm before 1.0.31 is refused where it caches step sizes in the group."""
    optimizer = named(path)([Parameter(torch.ones(2))])
    optimizer.param_groups[0]["buffer"] = [[None, None, None] for _ in range(10)]

    assert "caches step sizes" in str(pieces.why_not(optimizer, optimizer.param_groups[0]))


def test_the_first_step_of_older_versions_is_refused() -> None:
    """timm's Adopt with foreach is refused before 1.0.31 (no max_lr_snapshot): it reads one step count for all."""
    optimizer = named("timm.optim.adopt.Adopt")([Parameter(torch.ones(2))], foreach=True)
    optimizer.param_groups[0].pop("max_lr_snapshot", None)

    assert "the step count of the first" in str(pieces.why_not(optimizer, optimizer.param_groups[0]))


# These pass the check, but their step on one parameter may depend on others.
LEFT_OUT = {
    "torch_optimizer.swats.SWATS": "its step may set lr and phase of the group halfway, and they hold for the rest",
    "pytorch_optimizer.optimizer.orthograd.OrthoGrad": "it steps another optimizer, which may be any",
}


def from_zoo(case: zoo.Case) -> Trial:
    options = ("lr",) * (case.eta == "lr") + ("weight_decay",) * case.decay_key
    # Prodigy and similar optimizers take one lr only.
    spread = case.eta != "d * lr"
    return Trial(
        case.build, case.dims, options=options, spread=spread, sparse=case.sparse, create_graph=case.create_graph
    )


# heavyball counts the steps of a group, not of a parameter, so none of its optimizers may be stepped in pieces.
@pytest.mark.parametrize("case", [c for c in zoo.cases() if not c.name.startswith("heavyball.")], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_table_holds_what_passes(case: zoo.Case) -> None:
    """The table holds exactly the optimizers of the zoo that pass the check, except those in `LEFT_OUT`."""
    this = from_zoo(case)
    try:
        optimizer = this.optimizer()
    except Exception:
        assert case.refused
        return
    reasons = [pieces.why_not(optimizer, group) for group in optimizer.param_groups]
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name in pieces.TABLE and not any(reasons):
        return  # compared above, as a row
    difference = first_difference(this)

    assert all(reasons)
    assert (difference is None) == (name in LEFT_OUT)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("prodigyopt.Prodigy", "groups"),
        ("timm.adan", "groups"),
        ("timm.lookahead_adamw", "groups"),
        ("torch_optimizer.Ranger", "radam_buffer"),
        ("pytorch_optimizer.Ranger", "groups"),
        ("timm.kron", "tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_check_can_fail(name: str, where: str) -> None:
    """The check finds counters, averages and caches in groups and optimizers, and a changed order of random numbers."""
    case = next((case for case in zoo.cases() if case.name == name), None) or pytest.skip(f"no {name}")

    assert f"'{where}'" in str(first_difference(from_zoo(case)))


def test_the_check_finds_a_norm_over_all_gradients() -> None:
    """If the step clips by the norm of all gradients, the check finds different weights."""

    class Clipped(o.SGD):
        def step(self, closure: None = None) -> None:
            torch.nn.utils.clip_grad_norm_(members(self), 1.0)
            super().step()

    assert "'tensors'" in str(first_difference(Trial(Clipped)))


def test_a_subclass_is_not_its_parent() -> None:
    """The table is matched by exact class: a subclass may do anything in its step."""

    class Mine(o.AdamW):
        pass

    optimizer = Mine([Parameter(torch.ones(3))])
    reason = pieces.why_not(optimizer, optimizer.param_groups[0])

    assert reason == "Mine is not known to take the same step in pieces"
