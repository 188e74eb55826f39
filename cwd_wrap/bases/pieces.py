"""Optimizers that take the same step when their parameters are stepped in pieces, one subset after another.

During the step of a piece, each ``group["params"]`` holds only the piece's parameters (an empty list where a group has
none), and the optimizer's own ``step`` is called without its hooks. A class is in the table, as its library ships it
(`known`), only if its step on a parameter reads and writes only the parameter's weight, gradient and state, and reads
its group's options. A test compares each row with the whole step, weights and state, bit for bit on a CPU, in pieces of
several sizes and also in reverse order. These optimizers are left out, because they do not pass:

- a counter in the group or in the optimizer, counted up at each call: all of pytorch_optimizer, Adan and Lamb of timm,
  MADGRAD of torch_optimizer, Lookahead, schedule-free ones;
- a norm, an average, a step size or a product with the Hessian over all parameters: Prodigy, D-Adaptation, LBFGS, SAM,
  Adahessian;
- step sizes that all parameters share in a cache: RAdam and Ranger of torch_optimizer;
- an lr that the step sets halfway: SWATS of torch_optimizer;
- random numbers drawn for one parameter after the other: Kron;
- an optimizer that wraps another: OrthoGrad.

One case may round differently: if a group has parameters on two kinds of devices, ``foreach=None`` chooses the form of
the update by all parameters of the call, and a piece may hold those on one kind only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from cwd_wrap.bases import known

Group = Mapping[str, Any]


def why_not(optimizer: Optimizer, group: Group) -> str | None:
    """The reason why ``group`` of ``optimizer`` may not be stepped in pieces, or None if it may."""
    cls = type(optimizer)
    row = TABLE.get(known.name(cls) or "")
    if row is None:
        return f"{cls.__name__} is not known to take the same step in pieces"
    return row(group)


def _always(_: Group) -> None:
    """Pieces work with all options."""


def _one_dtype(group: Group) -> str | None:
    if group["foreach"] and group["eps"][0] is None and len({p.dtype for p in group["params"]}) > 1:
        return "Adafactor with foreach=True takes one eps for parameters of several dtypes: pass eps=(number, number)"
    return None


def _given_lr(group: Group) -> str | None:
    if group["relative_step"]:
        return "Adafactor with relative_step sets a new lr in its group for each parameter: pass an lr"
    return None


def _uncached(group: Group) -> str | None:
    if "buffer" in group:
        return "timm before 1.0.31 caches step sizes for all parameters of a group: upgrade timm"
    return None


def _rectified(group: Group) -> str | None:
    if group["rectify"] and group["degenerated_to_sgd"] and _foreach(group):
        return "AdaBelief with rectify and foreach rounds differently where parameters have different step counts"
    return _uncached(group)


def _one_by_one(group: Group) -> str | None:
    if _foreach(group):
        return "LaProp with foreach rounds differently where parameters have different step counts"
    return None


def _own_first_step(group: Group) -> str | None:
    if _foreach(group) and "max_lr_snapshot" not in group:
        return "Adopt of timm before 1.0.31 with foreach gives all parameters of a group the step count of the first"
    return None


def _foreach(group: Group) -> bool:
    """True if this group steps all its parameters at once. By default (None), on all devices but the CPU."""
    foreach = group.get("foreach", False)
    return any(p.device.type != "cpu" for p in group["params"]) if foreach is None else bool(foreach)


TABLE: Mapping[str, Callable[[Group], str | None]] = {
    "torch.optim.Adafactor": _one_dtype,
    "torch.optim.Muon": _always,
    "torch.optim.adadelta.Adadelta": _always,
    "torch.optim.adagrad.Adagrad": _always,
    "torch.optim.adam.Adam": _always,
    "torch.optim.adamax.Adamax": _always,
    "torch.optim.adamw.AdamW": _always,
    "torch.optim.asgd.ASGD": _always,
    "torch.optim.nadam.NAdam": _always,
    "torch.optim.radam.RAdam": _always,
    "torch.optim.rmsprop.RMSprop": _always,
    "torch.optim.rprop.Rprop": _always,
    "torch.optim.sgd.SGD": _always,
    "torch.optim.sparse_adam.SparseAdam": _always,
    "timm.optim.adabelief.AdaBelief": _rectified,
    "timm.optim.adafactor.Adafactor": _given_lr,
    "timm.optim.adafactor_bv.AdafactorBigVision": _always,
    "timm.optim.adamp.AdamP": _always,
    "timm.optim.adamw.AdamWLegacy": _always,
    "timm.optim.adopt.Adopt": _own_first_step,
    "timm.optim.laprop.LaProp": _one_by_one,
    "timm.optim.lars.Lars": _always,
    "timm.optim.lion.Lion": _always,
    "timm.optim.madgrad.MADGRAD": _always,
    "timm.optim.mars.Mars": _always,
    "timm.optim.muon.Muon": _always,
    "timm.optim.nadam.NAdamLegacy": _always,
    "timm.optim.nadamw.NAdamW": _always,
    "timm.optim.nvnovograd.NvNovoGrad": _always,
    "timm.optim.radam.RAdamLegacy": _uncached,
    "timm.optim.rmsprop_tf.RMSpropTF": _always,
    "timm.optim.sgdp.SGDP": _always,
    "timm.optim.sgdw.SGDW": _always,
    "lion_pytorch.lion_pytorch.Lion": _always,
    "rose_opt.Rose": _always,
    "pytorch_ranger.ranger913A.RangerVA": _always,
    "pytorch_ranger.rangerqh.RangerQH": _always,
    "torch_optimizer.a2grad.A2GradExp": _always,
    "torch_optimizer.a2grad.A2GradInc": _always,
    "torch_optimizer.a2grad.A2GradUni": _always,
    "torch_optimizer.accsgd.AccSGD": _always,
    "torch_optimizer.adabelief.AdaBelief": _always,
    "torch_optimizer.adabound.AdaBound": _always,
    "torch_optimizer.adafactor.Adafactor": _always,
    "torch_optimizer.adamod.AdaMod": _always,
    "torch_optimizer.adamp.AdamP": _always,
    "torch_optimizer.aggmo.AggMo": _always,
    "torch_optimizer.apollo.Apollo": _always,
    "torch_optimizer.diffgrad.DiffGrad": _always,
    "torch_optimizer.lamb.Lamb": _always,
    "torch_optimizer.lars.LARS": _always,
    "torch_optimizer.novograd.NovoGrad": _always,
    "torch_optimizer.pid.PID": _always,
    "torch_optimizer.qhadam.QHAdam": _always,
    "torch_optimizer.qhm.QHM": _always,
    "torch_optimizer.sgdp.SGDP": _always,
    "torch_optimizer.sgdw.SGDW": _always,
    "torch_optimizer.shampoo.Shampoo": _always,
    "torch_optimizer.yogi.Yogi": _always,
}
