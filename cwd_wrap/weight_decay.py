"""eta * lam of one param group, and the base's own decay: off for its step and back on.

lam is the group's own ``weight_decay``; eta is the step size by which the optimizer itself multiplies its decay.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import notices, quirks

Group = Mapping[str, Any]
WAY_OUT = ", or pass step_size=, a function of the group that returns it"
StepSize = Callable[[dict[str, Any]], float | Tensor]
_OFF = float("0")  # An object of its own: `is` tells this 0.0 from one that a hook wrote.
_NO_STEP = 1e-12  # Learning rates up to this size, of either sign, count as 0: schedules miss 0 by a rounding.
_warned: WeakKeyDictionary[Optimizer, set[tuple[str, int]]] = WeakKeyDictionary()


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
) -> None:
    """Raise if `eta_lam` of the group would, and for ``differentiable=True``: autograd does not record the decay."""
    where = _where(index, base)
    if group.get("differentiable"):
        msg = f"{where} has differentiable=True, but autograd does not record the decay: leave differentiable off"
        raise ValueError(msg)
    check(lam(group, fallback), "weight_decay", where)
    if step_size is None and decays(group, fallback):
        eta(group, where, base, way_out)


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
        _warn_once(
            base,
            "above 1",
            index,
            f"eta*lam of {where} is {product:g} (eta {size:g}, weight_decay {strength:g}): above 1, a step decays "
            "a weight past zero and flips its sign. Choose a smaller weight_decay",
        )
    return _scalar(product)


def _warn_once(base: Optimizer, what: str, index: int, message: str) -> None:
    """Warn once for each optimizer, kind of warning and group."""
    said = _warned.setdefault(base, set())
    if (what, index) not in said:
        said.add((what, index))
        notices.warn(message)


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
    return abs(float(lr)) <= _NO_STEP


def eta(group: Group, where: str, base: Optimizer, way_out: str = WAY_OUT) -> float | Tensor:
    """The factor of the optimizer's own decoupled decay, read at each step.

    =====================================================  ==========================================
    group                                                  eta
    =====================================================  ==========================================
    coupled decay (``weight_decouple=False``, ...)         lr; d * lr (Prodigy, D-Adaptation)
    a class in `cwd_wrap.quirks.eta`                       its number, or an error with the way out
    ``fixed_decay`` (AdaBelief, ...)                       1
    ``corrected_weight_decay`` (timm)                      lr**2 / max_lr
    ``unscaled_wd`` (timm's AdafactorBigVision)            1; lr / max_lr if corrected
    ``decouple_lr`` (optimi, FlashAdamW)                   lr / max_lr; lr / initial_lr
    ``d`` (Prodigy, D-Adaptation)                          d * lr [* bias correction]
    ``scale_parameter``, ``relative_step`` (Adafactor)     an error: it differs from tensor to tensor
    otherwise                                              lr
    =====================================================  ==========================================
    """
    lr: float | Tensor | None = group.get("lr")
    if lr is not None and not stands_still(group):
        check(lr, "lr", where)
    coupled = any(group.get(key) is False for key in ("weight_decouple", "decoupled_decay", "decoupled"))
    known = None if coupled else quirks.eta(base, group)
    if isinstance(known, str):
        msg = f"{where} has no single step size for its decay: {known}{way_out}"
        raise ValueError(msg)
    if known is not None:
        return known
    if lr is None or group.get("relative_step"):
        had = "relative_step=True" if group.get("relative_step") else "lr=None" if "lr" in group else "no lr"
        msg = (
            f"{where} has {had}, so the step size that multiplies weight_decay is unknown: "
            f"give the group a learning rate{way_out}"
        )
        raise ValueError(msg)
    if "d" in group and ("k" in group or "step" in group):  # not Adafactor, whose "d" differs
        d: float | Tensor = group["d"]
        return d * lr * _bias_correction(group)
    return lr


def _bias_correction(group: Group) -> float:
    if not group.get("use_bias_correction"):
        return 1.0
    beta1, beta2 = group["betas"][:2]
    t = group["k"] + 1
    return float((1 - beta2**t) ** 0.5 / (1 - beta1**t))


class DecayOff:
    """Sets every ``weight_decay`` to 0 (`off`) and restores what was there (`on`)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._changed: list[tuple[dict[str, Any], str, object, object]] = []

    def off(self) -> None:
        """Set the decay to 0 in each group that has one."""
        for group in self._optimizer.param_groups:
            decay = group.get("weight_decay")
            if decay is None or (not isinstance(decay, Tensor) and decay == 0):
                continue
            for key, value in ({"weight_decay": _OFF} | quirks.kept_while_off(self._optimizer, group)).items():
                self._changed.append((group, key, group[key], value))
                group[key] = value

    def before(self) -> list[tuple[dict[str, Any], str, object]]:
        """The groups and keys that are off now, and the values that `on` will restore."""
        return [(group, key, value) for group, key, value, off in self._changed if group.get(key) is off]

    def on(self) -> None:
        """Restore the decay, except where a hook or a closure wrote a new value during the step (a schedule).

        A 0 other than `_OFF` counts as computed from it (``group["weight_decay"] *= 0.99``): it is replaced too, with
        a warning.
        """
        for group, key, before, meanwhile in self._changed:
            now = group.get(key)
            if now is not meanwhile and isinstance(now, Real) and abs(float(now)) <= quirks.ALMOST_ZERO:
                index = next((i for i, g in enumerate(self._optimizer.param_groups) if g is group), 0)
                _warn_once(
                    self._optimizer,
                    key,
                    index,
                    f"{key} of {_where(index, self._optimizer)} was set to {now!r} during the step, while the wrapper "
                    f"had the decay off. It is {before!r} again. To change it, set it between steps, or in a hook of "
                    "the wrapper",
                )
                group[key] = before
            elif now is meanwhile:
                group[key] = before
        self._changed = []
