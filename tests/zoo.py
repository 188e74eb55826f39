"""Every optimizer of eleven libraries, and the facts about each on which a wrapper depends.

`cases()` discovers them. `NOTES` holds only what discovery cannot find. Nothing is left out: an optimizer that cannot
be run is a `Case` with a reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

Groups = list[dict[str, Any]]
Eta = Literal[
    "lr",
    "lr * lr / max_lr_snapshot",
    "d * lr",
    "lr * sqrt(1 - betas[1]**t) / (1 - betas[0]**t)",
    "scheduled_lr",
    "given",
]

# Their optimizers are the classes of their top-level module. torch and timm: see `cases`.
LIBRARIES = (
    "torch_optimizer",
    "pytorch_optimizer",
    "lion_pytorch",
    "prodigyopt",
    "dadaptation",
    "schedulefree",
    "optimi",
    "rose_opt",
    "heavyball",
)


@dataclass(frozen=True)
class Case:
    """One base optimizer. `name` is "library.name"."""

    name: str
    build: Callable[..., Optimizer]
    """Builds the base from parameter groups with their decay, and options. Read the groups back from the base."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its constructor takes, with the default values."""
    kind: str = ""
    """Its class: timm has several names for one, with different defaults."""
    dims: tuple[int, ...] = (1, 2, 4)
    """Numbers of dimensions its parameters may have."""
    use_muon: bool = False
    """Its groups say with `use_muon` whether they hold matrices for it, or tensors for an AdamW of its own."""
    decay_key: bool = True
    """Its groups have a `weight_decay` of their own."""
    eta: Eta = "lr"
    """What `lam` is multiplied by, before the step. "given": it has no `lr`; pass `step_size=`.

    "scheduled_lr": the number of this name that the step leaves in the group."""
    decays: str | None = None
    """Another decay of its own, on by default and not switched off with `weight_decay`."""
    adapts: str | None = None
    """It scales its step only where a group decays. The group key that keeps it on; "" if none."""
    closure: bool = False
    """`step` needs a closure, and gradients before it."""
    create_graph: bool = False
    """It differentiates the gradients, so they need a graph."""
    sparse: bool = False
    """It takes sparse gradients only."""
    one_group: bool = False
    """It takes one group only: `build` puts all parameters in it, and the groups' keys are lost."""
    fades: str | None = None
    """Every step obeys the rule, but later steps pull the weight towards this copy."""
    averages: bool = False
    """Schedule-free: the decay enters its step at y, so the rule is that of test_schedule_free.py."""
    leaves_vectors: bool = False
    """Its own decay skips vectors, so ours does too."""
    refused: str | None = None
    """Why the rule cannot hold, or why it cannot be run."""

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------------- builders


def _one_group(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    return cls([p for group in groups for p in group["params"]], **flags)


def _muon(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """Mark the groups of matrices, which Muon and similar optimizers of pytorch_optimizer require."""
    return cls([{**group, "use_muon": True} for group in groups], **flags)


def _over(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """Build a wrapper that takes an optimizer instance."""
    return cls(torch.optim.AdamW(groups, lr=1e-3), **flags)


def _train(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """Switch to train mode, without which schedule-free optimizers do not step."""
    optimizer = cls(groups, **flags)
    getattr(optimizer, "train", lambda: None)()
    return optimizer


def _from_model(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """AdamMini makes a group for each parameter of a model; the decays are put back afterwards."""
    model = nn.ParameterList([p for group in groups for p in group["params"]])
    optimizer = cls(model, **flags)
    decay = {id(p): group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["weight_decay"] = decay[id(group["params"][0])]
    return optimizer


def _heavyball(cls: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """Keep heavyball from compiling its steps, which takes minutes on a CPU. It reads this at each step."""
    importlib.import_module("heavyball.utils").compile_mode = None
    return cls(groups, **flags)


def _uncompiled(build: Callable[..., Optimizer], groups: Groups, **flags: Any) -> Optimizer:
    """Keep timm's Kron from compiling its kernels, which takes half a minute on a CPU."""
    with mock.patch("timm.optim.kron.has_dynamo", False):
        return build(groups, **flags)


# ---------------------------------------------------------------------------------------- notes

_SCHEDULE_FREE = "schedule-free: recomputes the weights from its own copy z"
_SCHEDULE_FREE_NOTE: dict[str, Any] = {"refused": _SCHEDULE_FREE, "how": _train}
_AVERAGES: dict[str, Any] = {"averages": True, "eta": "scheduled_lr", "how": _train}
_APEX = {"refused": "needs apex and a GPU"}
_BNB = {"refused": "needs bitsandbytes and a GPU"}
_LOOKAHEAD = "slow weights"
_MADGRAD = "the starting point x0 less the dual average"
_SAM: dict[str, Any] = {"closure": True, "flags": {"base_optimizer": torch.optim.AdamW}}
_MUON: dict[str, Any] = {"how": _muon, "dims": (2,), "use_muon": True}
_NO_LR: dict[str, Any] = {"eta": "given"}
_ADAPTS: dict[str, Any] = {"adapts": "always_adapt"}
_CORRECTED: dict[str, Any] = {"eta": "lr * lr / max_lr_snapshot"}
_D: dict[str, Any] = {"eta": "d * lr"}
_NO_DECAY: dict[str, Any] = {"decay_key": False}

# Fields of `Case`; and for the builder "how", a function above, and "flags", for the constructor.
NOTES: dict[str, dict[str, Any]] = {
    # torch
    "torch.ASGD": {"decays": "lambd"},
    "torch.LBFGS": {"closure": True, "how": _one_group, "one_group": True, **_NO_DECAY},
    "torch.Muon": {"dims": (2,)},
    "torch.Rprop": _NO_DECAY,
    "torch.SparseAdam": {"sparse": True, "dims": (1, 2), **_NO_DECAY},
    # timm
    "timm.adafactor": _NO_LR,
    "timm.adafactorbvc": _CORRECTED,
    "timm.adahessian": {"create_graph": True},
    "timm.adamc": _CORRECTED,
    "timm.adamp": _NO_LR,
    "timm.adoptc": _CORRECTED,
    "timm.cadafactor": _NO_LR,
    "timm.cadafactorbvc": _CORRECTED,
    "timm.cadamc": _CORRECTED,
    "timm.cadamp": _NO_LR,
    "timm.cadoptc": _CORRECTED,
    "timm.clamb": _ADAPTS,
    "timm.clambw": _ADAPTS,
    "timm.clionc": _CORRECTED,
    "timm.cnadamc": _CORRECTED,
    "timm.csgdc": _CORRECTED,
    "timm.csgdp": {"flags": {"lr": 1e-3}, **_NO_LR},
    "timm.kron": {"how": _uncompiled},
    "timm.kronc": {"how": _uncompiled, **_CORRECTED},
    "timm.kronw": {"how": _uncompiled},
    "timm.lamb": _ADAPTS,
    "timm.lambc": _ADAPTS,
    "timm.lambcd": {**_ADAPTS, **_CORRECTED},
    "timm.lambcw": _ADAPTS,
    "timm.lambw": _ADAPTS,
    "timm.lapropc": _CORRECTED,
    "timm.larc": _ADAPTS,
    "timm.lars": _ADAPTS,
    "timm.lionc": _CORRECTED,
    "timm.lookahead_adamw": {"fades": _LOOKAHEAD},
    "timm.madgrad": {"fades": _MADGRAD},
    "timm.madgradw": {"fades": _MADGRAD},
    "timm.nadamc": _CORRECTED,
    "timm.nlarc": _ADAPTS,
    "timm.nlars": _ADAPTS,
    "timm.novogradc": _CORRECTED,
    "timm.rmsproptfc": _CORRECTED,
    "timm.sgdc": _CORRECTED,
    "timm.sgdp": {"flags": {"lr": 1e-3}, **_NO_LR},
    # torch_optimizer
    "torch_optimizer.A2GradExp": {**_NO_DECAY, **_NO_LR, "fades": "the averaged iterate x_k"},
    "torch_optimizer.A2GradInc": {**_NO_DECAY, **_NO_LR, "fades": "the averaged iterate x_k"},
    "torch_optimizer.A2GradUni": {**_NO_DECAY, **_NO_LR, "fades": "the averaged iterate x_k"},
    "torch_optimizer.AccSGD": {"fades": "the short-step iterate"},
    "torch_optimizer.Adafactor": {"dims": (1, 2), **_NO_LR},
    "torch_optimizer.AdamP": _NO_LR,
    "torch_optimizer.Adahessian": {"create_graph": True},
    "torch_optimizer.LARS": {"adapts": ""},
    "torch_optimizer.Lookahead": {"how": _over, "fades": _LOOKAHEAD},
    "torch_optimizer.MADGRAD": {"fades": _MADGRAD},
    "torch_optimizer.Ranger": {"fades": _LOOKAHEAD},
    "torch_optimizer.RangerQH": {"fades": _LOOKAHEAD},
    "torch_optimizer.RangerVA": {"fades": _LOOKAHEAD},
    "torch_optimizer.SGDP": _NO_LR,
    # pytorch_optimizer
    "pytorch_optimizer.A2Grad": {**_NO_DECAY, **_NO_LR, "fades": "the averaged iterate x_k"},
    "pytorch_optimizer.APOLLO": {"eta": "lr * sqrt(1 - betas[1]**t) / (1 - betas[0]**t)"},
    "pytorch_optimizer.ASGD": _NO_LR,
    "pytorch_optimizer.AccSGD": {"fades": "the short-step iterate"},
    "pytorch_optimizer.AdaFactor": _NO_LR,
    "pytorch_optimizer.AdaGO": _MUON,
    "pytorch_optimizer.AdaHessian": {"create_graph": True},
    "pytorch_optimizer.AdaLOMO": {"refused": "steps inside backward, through hooks on a model"},
    "pytorch_optimizer.AdaMuon": _MUON,
    "pytorch_optimizer.AdaShift": {"flags": {"keep_num": 2}, **_NO_DECAY},
    "pytorch_optimizer.AdamMini": {"how": _from_model},
    "pytorch_optimizer.AliG": {"closure": True, **_NO_DECAY, **_NO_LR},
    "pytorch_optimizer.AdamP": _NO_LR,
    "pytorch_optimizer.AdamS": _NO_LR,
    "pytorch_optimizer.Amos": _NO_DECAY,
    "pytorch_optimizer.BSAM": {
        "refused": "weight_decay is the prior's precision and multiplies the gradient",
        "flags": {"num_data": 8},
        "closure": True,
    },
    "pytorch_optimizer.DAdaptAdaGrad": {"refused": "recomputes p as x0 less the dual average"},
    "pytorch_optimizer.DAdaptAdam": _D,
    "pytorch_optimizer.DAdaptAdan": _D,
    "pytorch_optimizer.DAdaptLion": _D,
    "pytorch_optimizer.DAdaptSGD": {**_D, "fades": "the averaged dual iterate z"},
    "pytorch_optimizer.DeMo": {"refused": "needs einops and a process group"},
    "pytorch_optimizer.DistributedMuon": {"refused": "needs a process group"},
    "pytorch_optimizer.FTRL": {"refused": "recomputes p from its dual state", **_NO_DECAY},
    "pytorch_optimizer.FriendlySAM": _SAM,
    "pytorch_optimizer.Fromage": {**_NO_DECAY, "decays": "p / sqrt(1 + lr * lr)"},
    "pytorch_optimizer.GSAM": {"refused": "needs a model and its loss, two passes"},
    "pytorch_optimizer.Gravity": _NO_DECAY,
    "pytorch_optimizer.LBFGS": {
        "closure": True,
        "how": _one_group,
        "one_group": True,
        **_NO_DECAY,
    },
    "pytorch_optimizer.LOMO": {"refused": "steps inside backward, through hooks on a model"},
    "pytorch_optimizer.LookSAM": _SAM,
    "pytorch_optimizer.LoRARite": {"refused": "needs pairs of low-rank factors"},
    "pytorch_optimizer.Lookahead": {"how": _over, "fades": _LOOKAHEAD},
    "pytorch_optimizer.Kron": {"leaves_vectors": True},
    "pytorch_optimizer.LARS": {"leaves_vectors": True},
    "pytorch_optimizer.MADGRAD": {"fades": _MADGRAD},
    "pytorch_optimizer.MARS": {"decays": "weight_decay_1d"},
    "pytorch_optimizer.MSVAG": _NO_DECAY,
    "pytorch_optimizer.Magma": _NO_LR,
    "pytorch_optimizer.Muon": _MUON,
    "pytorch_optimizer.MuonClip": _MUON,
    "pytorch_optimizer.Nero": {"refused": "rescales every neuron to its first norm", **_NO_DECAY},
    "pytorch_optimizer.NorMuon": _MUON,
    "pytorch_optimizer.OrthoGrad": {"how": _over},
    "pytorch_optimizer.PCGrad": {"refused": "not an optimizer: edits the gradients of many losses"},
    "pytorch_optimizer.Prodigy": _D,
    "pytorch_optimizer.Ranger": {"fades": _LOOKAHEAD},
    "pytorch_optimizer.Ranger21": {
        "flags": {"num_iterations": 100},
        "decays": "norm_loss_factor",
        **_NO_LR,
        "fades": _LOOKAHEAD,
    },
    "pytorch_optimizer.SAM": _SAM,
    "pytorch_optimizer.SM3": _NO_DECAY,
    "pytorch_optimizer.SGDP": _NO_LR,
    "pytorch_optimizer.SPlus": _NO_LR,
    "pytorch_optimizer.SRMM": {"fades": "a mean over its memory of weights", **_NO_DECAY},
    "pytorch_optimizer.SafeFP16Optimizer": {"refused": "keeps the weights in a flat fp32 copy"},
    "pytorch_optimizer.SaRA": {"refused": "trains only the weights below its threshold"},
    "pytorch_optimizer.ScheduleFreeAdamW": _SCHEDULE_FREE_NOTE,
    "pytorch_optimizer.ScheduleFreeRAdam": _SCHEDULE_FREE_NOTE,
    "pytorch_optimizer.ScheduleFreeSGD": _SCHEDULE_FREE_NOTE,
    "pytorch_optimizer.ScheduleFreeWrapper": {"refused": _SCHEDULE_FREE, "how": _over},
    "pytorch_optimizer.SophiaH": {"create_graph": True},
    "pytorch_optimizer.SpectralSphere": {"dims": (2,)},
    "pytorch_optimizer.StableAdamW": _NO_LR,
    "pytorch_optimizer.TRAC": {
        "refused": "recomputes p from the weights of its first step",
        "how": _over,
    },
    "pytorch_optimizer.WSAM": {"refused": "needs a model, two passes"},
    # optimi and heavyball; all others of them need no note
    "optimi.Ranger": {"fades": _LOOKAHEAD},
    "optimi.StableAdamW": {"flags": {"lr": 1e-3, "triton": False}, **_NO_LR},
    "heavyball.MSAMLaProp": {"refused": "recomputes p from its own copy z"},
    "heavyball.PSGDBase": {"refused": "a base class"},
    "heavyball.PSGDLRA": {"refused": "takes parameters, but no groups"},
    "heavyball.SAMWrapper": {"refused": "needs an optimizer and a closure, two passes"},
    "heavyball.SFAdamW": {"refused": _SCHEDULE_FREE},
    "heavyball.SOAPBase": {"refused": "a base class"},
    "heavyball.SplitOpt": {"refused": "not an optimizer: steps several on parts of the parameters"},
    # the small libraries
    "dadaptation.DAdaptAdaGrad": {"refused": "recomputes p as x0 less the dual average"},
    "dadaptation.DAdaptAdam": _D,
    "dadaptation.DAdaptAdan": _D,
    "dadaptation.DAdaptLion": _D,
    "dadaptation.DAdaptSGD": {"refused": "recomputes p from x0 and the dual iterate z"},
    "prodigyopt.Prodigy": _D,
    "schedulefree.AdamWScheduleFree": _AVERAGES,
    "schedulefree.RAdamScheduleFree": _AVERAGES,
    "schedulefree.SGDScheduleFree": _AVERAGES,
}


def _note(name: str) -> dict[str, Any]:
    library, short = name.split(".")
    if library == "schedulefree":
        return NOTES.get(name, _SCHEDULE_FREE_NOTE)
    if library == "timm" and short.startswith("fused"):
        return _APEX
    if library == "timm" and short.startswith("bnb"):
        return _BNB
    note = NOTES.get(name, {})
    if library == "heavyball":
        return {"how": _heavyball, **note}
    if library in {"optimi", "rose_opt"}:
        return {"flags": {"lr": 1e-3}, **note}
    return note


# ------------------------------------------------------------------------------------ discovery


def _quiet(build: Callable[..., Optimizer], groups: Groups, **options: Any) -> Optimizer:
    with redirect_stdout(StringIO()):
        return build(groups, **options)


def _case(name: str, cls: Callable[..., Optimizer], options: Mapping[str, Any], kind: str = "") -> Case:
    note = dict(_note(name))
    how, flags = note.pop("how", None), note.pop("flags", {})
    build = partial(how, cls, **flags) if how else partial(cls, **flags)
    return Case(name, partial(_quiet, build), options={**options, **flags}, kind=kind or name, **note)


def _defaults(cls: Callable[..., Optimizer]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(cls).parameters.values()}


def _classes(library: str, module: Any) -> Iterator[Case]:
    for name, cls in sorted(vars(module).items()):
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            yield _case(f"{library}.{name}", cls, _defaults(cls))


def _timm() -> Iterator[Case]:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    for name in [*list_optimizers(exclude_filters=["cautious_*"]), "lookahead_adamw"]:
        info = get_optimizer_info(str(name).removeprefix("lookahead_"))
        options = {} if isinstance(info.opt_class, str) else _defaults(info.opt_class) | (info.defaults or {})
        kind = name if isinstance(info.opt_class, str) or "_" in name else f"timm.{info.opt_class.__name__}"
        yield _case(f"timm.{name}", partial(create_optimizer_v2, opt=str(name)), options, kind)


def cases(libraries: tuple[str, ...] = LIBRARIES) -> list[Case]:
    """All optimizers of torch, and of timm and ``libraries`` as far as they are installed."""
    found = list(_classes("torch", torch.optim))
    if importlib.util.find_spec("timm"):
        found += _timm()
    for library in libraries:
        if importlib.util.find_spec(library):
            found += _classes(library, importlib.import_module(library))
    return found
