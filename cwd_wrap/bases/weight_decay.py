"""eta * lam of one param group, and the base's own decay: off for its step and back on.

lam is the group's own ``weight_decay``; eta is the step size by which the optimizer itself multiplies its decay.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import notices
from cwd_wrap.bases import known, measured, probe, quirks
from cwd_wrap.bases.journal import Journal

Group = Mapping[str, Any]
WAY_OUT = ", or pass step_size=, a function of the group that returns it"
StepSize = Callable[[dict[str, Any]], float | Tensor]
_OFF = float("0")  # An object of its own: `is` tells this 0.0 from one that a hook wrote.
_NO_STEP = 1e-12  # Learning rates up to this size, of either sign, count as 0: schedules miss 0 by a rounding.


def check(value: object, what: str, where: str) -> None:
    """Raise unless ``value`` is a finite number >= 0. Tensors on an accelerator are not checked: that would sync."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if value.numel() != 1 or value.is_complex():
            shape = tuple(value.shape)
            msg = f"{what} of {where} is a tensor of shape {shape}: pass a number, or a tensor with one element"
            raise ValueError(msg)
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        msg = f"{what} of {where} is {value!r} ({type(value).__name__}): pass a number, zero or above"
        raise TypeError(msg)
    try:
        fits = math.isfinite(value) and float(value) >= 0
    except OverflowError:
        fits = False
    if not fits:
        msg = f"{what} of {where} is {value!r:.80}: pass a finite number, zero or above"
        raise ValueError(msg)


def check_step_size(step_size: object) -> None:
    """Raise TypeError unless ``step_size`` is None or can be called."""
    if step_size is not None and not callable(step_size):
        msg = f"step_size={step_size!r} is not callable: pass a function of a param group that returns its step size"
        raise TypeError(msg)


def check_group(
    group: Group,
    index: int,
    fallback: float | None,
    step_size: StepSize | None,
    base: Optimizer,
    way_out: str = WAY_OUT,
    acts: bool = True,
) -> None:
    """Raise if `eta_lam` of the group would, and for ``differentiable=True``: autograd does not record the decay.

    If the method ``acts`` on the group, what was measured of it must not rule that out.
    """
    where = _where(index, base)
    if group.get("differentiable"):
        msg = f"{where} has differentiable=True, but autograd does not record the decay: leave differentiable off"
        raise ValueError(msg)
    check(lam(group, fallback), "weight_decay", where)
    found = _measured(group, where, base) if acts else None
    if decays(group, fallback):
        if step_size is None:
            eta(group, where, base, way_out)
        if found is not None:
            _warn_if_beside(found, base)


def _warn_if_beside(found: probe.Found, base: Optimizer) -> None:
    if found.beside:
        notices.warn_once(
            base,
            "beside",
            -1,
            f"{type(base).__name__} shrinks weights whose gradients are 0, even at weight_decay=0: its own decay is on "
            "beside that of the wrapper. If an option sets it, pass 0 for it when you build the optimizer",
        )


def _where(index: int, base: Optimizer) -> str:
    return f"param group {index} of {type(base).__name__}"


def lam(group: Group, fallback: float | None) -> float | Tensor:
    """The group's decay strength: its ``weight_decay``, or ``fallback`` where the optimizer has no such option."""
    value: float | Tensor | None = group.get("weight_decay", fallback)
    return 0.0 if value is None else value


def decays(group: Group, fallback: float | None) -> bool:
    """True if the group decays. A tensor on an accelerator counts as not 0, since reading it would force a sync."""
    value = lam(group, fallback)
    return value.device.type != "cpu" or bool(value != 0) if isinstance(value, Tensor) else value != 0


def take_lam(groups: Sequence[Group], lam: float | None, took: Collection[int]) -> list[bool]:
    """Which groups ``lam`` is written into: those that decay; if none does, those that ``took`` one before, or all."""
    chosen = [decays(group, None) or "weight_decay" not in group for group in groups]
    if not any(chosen):
        chosen = [i in took or not took for i in range(len(groups))]
    return [lam is not None and each for each in chosen]


def eta_lam(
    group: Group,
    index: int,
    fallback: float | None,
    step_size: StepSize | None,
    base: Optimizer,
    way_out: str = WAY_OUT,
) -> float | Tensor:
    """eta * lam for the coming step of group ``index`` of ``base``.

    A tensor learning rate gives a 0-d tensor on the same device. Raises ValueError if lam or eta is negative, NaN or
    infinite, or if eta is unknown. Warns once for a group whose product is a number (no tensor) above 1.
    """
    where = _where(index, base)
    strength = lam(group, fallback)
    check(strength, "weight_decay", where)
    if not decays(group, fallback) or stands_still(group):
        return 0.0
    if step_size is None:
        size = eta(group, where, base, way_out)
    else:
        size = step_size(cast("dict[str, Any]", group))
        check(size, "the result of step_size=", where)
    product = size * strength
    if not isinstance(product, Tensor) and product > 1:
        notices.warn_once(
            base,
            "above 1",
            index,
            f"eta*lam of {where} is {product:g} (eta {size:g}, weight_decay {strength:g}): above 1, a step decays "
            "a weight past zero and flips its sign. Choose a smaller weight_decay",
        )
    return _scalar(product)


@dataclass(frozen=True)
class Strength:
    """eta*lam of the groups of ``base``; the other fields are arguments of `eta_lam`."""

    base: Optimizer
    fallback: float | None
    step_size: StepSize | None
    way_out: str = WAY_OUT

    def eta_lam(self, index: int) -> float | Tensor:
        """eta*lam of the group with this index, for the coming step."""
        group = self.base.param_groups[index]
        return eta_lam(group, index, self.fallback, self.step_size, self.base, self.way_out)

    def is_settled(self, group: Group) -> bool:
        """True if eta*lam is the same as long as the group holds the same objects."""
        tensors = any(isinstance(group.get(key), Tensor) for key in ("lr", "weight_decay"))
        return self.step_size is None and not tensors and known.library(type(self.base)) == "torch"


def _scalar(value: float | Tensor) -> float | Tensor:
    """Make a one-element tensor 0-d: torch accepts any shape, but only a 0-d one broadcasts with a 0-d weight."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def stands_still(group: Group) -> bool:
    """True if the learning rate is 0: nothing decays then, whatever eta is. Distributed checkpoints make such steps.

    Schedules miss 0 by a rounding in either direction (torch's LinearLR ends at -1.85e-20), so up to 1e-12 counts as 0.
    A tensor on an accelerator counts as not 0.
    """
    lr = group.get("lr")
    if not isinstance(lr, Real | Tensor) or (isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1)):
        return False
    try:
        return abs(float(lr)) <= _NO_STEP
    except OverflowError:  # an int above all floats: `check` refuses it
        return False


def eta(group: Group, where: str, base: Optimizer, way_out: str = WAY_OUT) -> float | Tensor:
    """The factor of the optimizer's own decoupled decay, read at each step.

    It is what the group's options say. For an optimizer that no table vouches for, it is also measured once (`probe`).
    """
    by_options = _by_options(group, where, base, way_out)
    found = _measured(group, where, base)
    if found is None:
        return by_options
    if found.no_eta is not None:
        msg = f"{where} has no single step size for its decay: {found.no_eta}{way_out}"
        raise ValueError(msg)
    _warn_if_beside(found, base)
    if found.idle:
        notices.warn_once(
            base,
            "idle",
            -1,
            f"{type(base).__name__} itself does not decay the weights of {where.partition(' of ')[0]}, whatever its "
            "weight_decay is. The wrapper does. If it should not, give the group weight_decay=0",
        )
    if found.unmeasured is not None:
        has_decay = any("weight_decay" in each for each in base.param_groups)
        other = "" if has_decay else ". If it has a decay under another name, that stays on: pass 0 for it"
        how = '. Pass step_size=lambda group: group["lr"] if that is right, else another step_size=' if way_out else ""
        notices.warn_once(
            base,
            "unmeasured",
            -1,
            f"the decay of {type(base).__name__} could not be measured ({found.unmeasured}). It is taken to be "
            f"lr * weight_decay, as in AdamW{other}{how}",
        )
    return by_options if found.eta is None else found.eta(base, group)


def _measured(group: Group, where: str, base: Optimizer) -> probe.Found | None:
    return measured.find(base, group, where, lambda own, group: _by_options(group, where, own, ""))


def look_anew(base: Optimizer, first: int = 0) -> None:
    """Forget what was found out about the groups from index ``first`` on: their parameters may be others."""
    measured.forget(base, [_where(i, base) for i in range(first, len(base.param_groups))])


def coupling(group: Group, index: int, base: Optimizer) -> str | None:
    """Why the group's ``weight_decay`` is another strength in the base's own, coupled decay; None if it is not."""
    if not decays(group, None):
        return None
    found = _measured(group, _where(index, base), base)
    return quirks.coupling(quirks.stepper(base, group), group, measured=found is not None and found.coupled)


def _by_options(group: Group, where: str, base: Optimizer, way_out: str) -> float | Tensor:
    """The step size by which an optimizer with these options multiplies its decay.

    =====================================================  ==========================================
    group                                                  eta
    =====================================================  ==========================================
    coupled decay (``weight_decouple=False``, ...)         lr; d * lr (Prodigy, D-Adaptation)
    a class in `cwd_wrap.bases.quirks.eta`                 its number, or an error with the way out
    ``fixed_decay`` (AdaBelief, ...)                       1
    ``corrected_weight_decay`` (timm)                      lr**2 / max_lr
    ``unscaled_wd`` (timm's AdafactorBigVision)            1; lr / max_lr if corrected
    ``decouple_lr`` (optimi, FlashAdamW)                   lr / max_lr; lr / initial_lr
    ``d`` of a known class (Prodigy, D-Adaptation)         d * lr [* bias correction]
    ``scale_parameter``, ``relative_step`` (Adafactor)     an error: it differs from tensor to tensor
    otherwise                                              lr
    =====================================================  ==========================================
    """
    lr: float | Tensor | None = group.get("lr")
    if lr is not None and not stands_still(group):
        check(lr, "lr", where)
    special = None if quirks.says_coupled(group) else quirks.eta(base, group)
    if isinstance(special, str):
        msg = f"{where} has no single step size for its decay: {special}{way_out}"
        raise ValueError(msg)
    if special is not None:
        return special
    if lr is None or group.get("relative_step"):
        had = "relative_step=True" if group.get("relative_step") else "lr=None" if "lr" in group else "no lr"
        msg = (
            f"{where} has {had}, so the step size that multiplies weight_decay is unknown: "
            f"give the group a learning rate{way_out}"
        )
        raise ValueError(msg)
    if quirks.has_d(group) and ("growth_rate" in group or probe.is_vouched_stepper(base, group)):
        return quirks.d_lr(group)
    return lr


def own_decay(base: Optimizer) -> list[tuple[dict[str, Any], str, object]]:
    """The entries of the groups that turn the base's own decay off: a group, a key and the value for it."""
    entries: list[tuple[dict[str, Any], str, object]] = []
    for i, group in enumerate(base.param_groups):
        decay = group.get("weight_decay")
        if decay is not None and (isinstance(decay, Tensor) or decay != 0):
            found = _measured(group, _where(i, base), base)
            off = {"weight_decay": quirks.ALMOST_ZERO if found is not None and found.switches else _OFF}
            entries += [(group, key, value) for key, value in (off | quirks.kept_while_off(base, group)).items()]
    return entries


def on(base: Optimizer, journal: Journal, groups: list[dict[str, Any]]) -> None:
    """Undo the journal, also in copies that the base has made of the ``groups`` that it had; these are then its own.

    Warn where a value that was written during the step is lost, see `Journal.undo`, and of groups that are new.
    """
    now = base.param_groups
    if len(now) != len(groups) or not all(map(is_, now, groups)):
        before = set(map(id, groups))
        new = [
            group
            for i, group in enumerate(now)
            if id(group) not in before and not (i < len(groups) and journal.follow(groups[i], group))
        ]
        groups[:] = now
        if any(group.get("weight_decay") for group in new):
            name = type(base).__name__
            notices.warn_once(
                base,
                "new groups",
                -1,
                f"{name} replaced or added param groups during its step. What they hold took the decay of {name} in "
                "this step, and takes the wrapper's from the next step on. Change param groups between steps",
            )
    for group, key, value, written in journal.undo():
        index = next((i for i, g in enumerate(base.param_groups) if g is group), 0)
        notices.warn_once(
            base,
            key,
            index,
            f"{key} of {_where(index, base)} was set to {written!r} during the step, while the wrapper had the decay "
            f"off. It is {value!r} again. To change it, set it between steps, or in a hook of the wrapper",
        )
