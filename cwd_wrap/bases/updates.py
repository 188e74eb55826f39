"""The whole update of some optimizers, for the kernels that decay and step in one pass over the weights.

A class is in the table, by its exact name, only if a test shows that one pass equals the optimizer's own step on its
own state. `rules` has the formula of each update.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases import known, schedule_free

Group = Mapping[str, Any]
Numbers: TypeAlias = tuple[float, ...]


def _one_more(t: float, *_: float) -> Numbers:
    return (t + 1,)


@dataclass(frozen=True)
class Update:
    """What a kernel needs to know about an optimizer's update of a param group."""

    formula: str
    """The name of its function in `rules`."""
    state_keys: tuple[str, ...]
    """The tensors of a parameter's state that it reads and writes, in the formula's order."""
    options: Numbers
    """The group's options, in the order in which the functions below take them."""
    of_step: Callable[..., Numbers]
    """The formula's numbers, from the learning rate, the counters after the step, and the options."""
    counters: tuple[str, ...] = ()
    """The numbers in a parameter's state, each in a tensor of one element, that change with each step."""
    of_counters: Callable[..., Numbers] = _one_more
    """The counters after a step, from those before it and the options."""
    maximize: bool = False
    corrects_bias: bool = False
    """True if the first two options are beta1 and beta2, the formula's first two numbers are lr / (1 - beta1**t) and
    sqrt(1 - beta2**t), and nothing else depends on ``t``: then a kernel can read ``t`` on a device. Other counters must
    be on the CPU."""
    averages: bool = False
    """True for schedule-free updates, one of `rules.AVERAGING`."""

    @property
    def of_what(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What updates must have in common for one call of a kernel."""
        return self.formula, self.state_keys, self.counters

    def numbers(self, lr: float, *counters: float) -> Numbers:
        """The formula's numbers in the step after which the counters have these values. The first is lr times some."""
        return self.of_step(lr, *counters, *self.options)

    def steps(self, lr: float, counters: Sequence[Numbers]) -> tuple[list[tuple[Numbers, Numbers]], list[int]]:
        """The distinct steps of tensors whose counters have these values before it, and which one each tensor takes.

        A step is the formula's numbers and the counters after it.
        """
        if len(counters) == 1:
            after = self.of_counters(*counters[0], *self.options) if self.counters else ()
            return [(self.numbers(lr, *after), after)], [0]
        known: dict[Numbers, int] = {before: i for i, before in enumerate(dict.fromkeys(counters))}
        made = []
        for before in known:
            after = self.of_counters(*before, *self.options) if self.counters else ()
            made.append((self.numbers(lr, *after), after))
        return made, [0] * len(counters) if len(made) == 1 else [known[before] for before in counters]


def find(optimizer: Optimizer, group: Group) -> Update | str:
    """The update of ``optimizer`` on ``group``, or the reason why no kernel computes it."""
    cls = type(optimizer)
    make = TABLE.get(known.name(cls) or "")
    if make is None or schedule_free.is_of_another_version(optimizer):
        return f"no kernel for {cls.__name__}"
    if (obstacle := _obstacle(optimizer, group)) is not None:
        return obstacle
    update = make(group)
    if isinstance(update, str):
        return update
    if any(isinstance(option, Tensor) for option in update.options):
        return "its coefficients (momentum, betas, eps) are tensors: pass numbers"
    return replace(update, options=tuple(map(float, update.options)), maximize=bool(group.get("maximize")))


def is_scaled(optimizer: Optimizer) -> bool:
    """True in a step of GradScaler that leaves it to the fused optimizer to unscale the gradients."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def _obstacle(optimizer: Optimizer, group: Group) -> str | None:
    """What in the options of a group rules out every kernel; None if nothing does."""
    name = type(optimizer).__name__
    if is_scaled(optimizer):
        return "GradScaler has not unscaled its gradients yet"
    if schedule_free.is_known(optimizer):  # it has no other path, and foreach=True by default: that asks for nothing
        return f"the lr of {name} is a tensor: pass a number" if isinstance(group["lr"], Tensor) else None
    if (asked := _asked_for(group)) is not None:
        return f"{asked} was passed, so {name}'s own step runs"
    if group.get("caution"):
        return f"{name} masks its own update in a group with caution=True"
    return None


def _asked_for(group: Group) -> str | None:
    """The option by which the user asked for an implementation of the optimizer's own; None if there is none.

    ``fused=True`` asks for one pass over the weights, which a kernel of ours is too.
    """
    options = {key: group.get(key) for key in ("fused", "foreach")}
    if options["fused"] is True:
        return None
    return next((f"{key}={value}" for key, value in options.items() if value is not None), None)


def _adam(group: Group) -> Update | str:
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
    return Update("adam", keys, (*group["betas"], group["eps"]), _of_adam, ("step",), corrects_bias=True)


def _of_adam(lr: float, t: float, beta1: float, beta2: float, eps: float) -> Numbers:
    return lr / (1 - beta1**t), math.sqrt(1 - beta2**t), 1 - beta1, beta2, 1 - beta2, eps


def _sgd(group: Group) -> Update | str:
    options = (group["momentum"], group["dampening"], group["nesterov"])
    return Update("sgd", ("momentum_buffer",) if group["momentum"] else (), options, _of_sgd)


def _of_sgd(lr: float, momentum: float, dampening: float, nesterov: float) -> Numbers:
    return lr, momentum, 1 - dampening, nesterov


def _nadam(group: Group) -> Update | str:
    options = (*group["betas"], group["eps"], group["momentum_decay"])
    counters = ("step", "mu_product")
    return _unless_capturable(
        group, Update("nadam", ("exp_avg", "exp_avg_sq"), options, _of_nadam, counters, _counters_of_nadam)
    )


def _of_nadam(lr: float, t: float, product: float, beta1: float, beta2: float, eps: float, psi: float) -> Numbers:
    mu, mu_next = _mu(t, beta1, psi), _mu(t + 1, beta1, psi)
    of_g, of_m = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    return lr * of_g, math.sqrt(1 - beta2**t), of_m / of_g, 1 - beta1, beta2, 1 - beta2, eps


def _counters_of_nadam(t: float, product: float, beta1: float, _beta2: float, _eps: float, psi: float) -> Numbers:
    return t + 1, _single(product * _single(_mu(t + 1, beta1, psi)))  # torch multiplies float32 numbers


def _mu(t: float, beta1: float, psi: float) -> float:
    return float(beta1 * (1 - 0.5 * 0.96 ** (t * psi)))


def _single(number: float) -> float:
    """``number``, rounded to float32."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def _nadamw(group: Group) -> Update | str:
    if group.get("clipping_threshold") is not None:
        return "NAdamW with clipping_threshold scales its update by a mean over each tensor"
    options = (*group["betas"], group["eps"])
    return Update("nadamw", ("exp_avg", "exp_avg_sq"), options, _of_adam, ("step",), corrects_bias=True)


def _adamw_legacy(group: Group) -> Update | str:
    if group.get("clipping_threshold") is not None:
        return "AdamWLegacy with clipping_threshold scales its update by a mean over each tensor"
    return _adam(group)


def _radam(group: Group) -> Update | str:
    options = (*group["betas"], group["eps"])
    return _unless_capturable(group, Update("radam", ("exp_avg", "exp_avg_sq"), options, _of_radam, ("step",)))


def _of_radam(lr: float, t: float, beta1: float, beta2: float, eps: float) -> Numbers:
    rest, longest = 1 - beta2**t, 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / rest
    eta = lr / (1 - beta1**t)
    if length > 5:
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        eta *= math.sqrt(ratio) * math.sqrt(rest)
    return eta, float(length > 5), 1 - beta1, beta2, 1 - beta2, eps


def _adamax(group: Group) -> Update | str:
    options = (*group["betas"], group["eps"])
    return _unless_capturable(group, Update("adamax", ("exp_avg", "exp_inf"), options, _of_adamax, ("step",)))


def _of_adamax(lr: float, t: float, beta1: float, beta2: float, eps: float) -> Numbers:
    return lr / (1 - beta1**t), 1 - beta1, beta2, eps


def _adagrad(group: Group) -> Update | str:
    if group.get("fused") and any(p.device.type != "cpu" for p in group["params"]):
        return "Adagrad with fused=True keeps its counters on the device"
    return Update("adagrad", ("sum",), (group["lr_decay"], group["eps"]), _of_adagrad, ("step",))


def _of_adagrad(lr: float, t: float, lr_decay: float, eps: float) -> Numbers:
    return lr / (1 + (t - 1) * lr_decay), eps


def _adadelta(group: Group) -> Update | str:
    options = (group["rho"], group["eps"])
    return _unless_capturable(group, Update("adadelta", ("square_avg", "acc_delta"), options, _of_adadelta, ("step",)))


def _of_adadelta(lr: float, _t: float, rho: float, eps: float) -> Numbers:
    return lr, rho, 1 - rho, eps


def _rmsprop(group: Group) -> Update | str:
    options = (group["alpha"], group["eps"], group["momentum"])
    formula = "rmsprop_centered" if group["centered"] else "rmsprop"
    return _unless_capturable(group, Update(formula, _keys_of_rmsprop(group), options, _of_rmsprop, ("step",)))


def _of_rmsprop(lr: float, _t: float, alpha: float, eps: float, momentum: float) -> Numbers:
    return lr, alpha, 1 - alpha, eps, momentum


def _keys_of_rmsprop(group: Group) -> tuple[str, ...]:
    optional = {"grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
    return ("square_avg", *(key for key, there in optional.items() if there))


def _rmsprop_tf(group: Group) -> Update | str:
    if any(map(Tensor.is_complex, group["params"])):
        return "RMSpropTF squares complex gradients as complex numbers"
    formula = "rmsprop_tf_centered" if group["centered"] else "rmsprop_tf"
    inside = group["lr_in_momentum"] and group["momentum"] > 0
    options = (group["alpha"], group["eps"], group["momentum"], inside)
    counters = ("step",) if "foreach" in group else ()  # timm before 1.0.23 does not count
    return Update(formula, _keys_of_rmsprop(group), options, _of_rmsprop_tf, counters)


def _of_rmsprop_tf(lr: float, *others: float) -> Numbers:
    alpha, eps, momentum, inside = others[-4:]  # after the counter, if there is one
    return lr, 1 - alpha, eps, momentum, inside


def _unless_capturable(group: Group, update: Update) -> Update | str:
    """``update``, unless the group keeps its counters on a device, where only biases can be corrected."""
    if group.get("capturable"):
        return "capturable=True keeps the numbers of its update on the device"
    return update


def _lion(group: Group) -> Update | str:
    if any(map(Tensor.is_complex, group["params"])):
        return "Lion's update of a complex weight is u/|u|, not the signs of two real ones"
    return Update("lion", ("exp_avg",), tuple(group["betas"]), _of_lion)


def _of_lion(lr: float, beta1: float, beta2: float) -> Numbers:
    return lr, 1 - beta1, 1 - beta2


def _free_sgd(group: Group) -> Update | str:
    options = (group["warmup_steps"], group["momentum"], *_schedule(group))
    return Update("free_sgd", ("z",), options, _of_free_sgd, averages=True)


def _of_free_sgd(lr: float, warmup_steps: float, beta1: float, k: float, *schedule: float) -> Numbers:
    eta = lr * schedule_free.warmed_up(k, warmup_steps)
    return eta, *schedule_free.averaging(eta, beta1, k, *schedule)


def _free_adamw(group: Group) -> Update | str:
    return _free_adam(group, group["warmup_steps"], _of_free_adamw)


def _of_free_adamw(
    lr: float, warmup_steps: float, beta1: float, beta2: float, eps: float, k: float, *schedule: float
) -> Numbers:
    eta = lr * schedule_free.warmed_up(k, warmup_steps)
    average = schedule_free.averaging(eta, beta1, k, *schedule)
    return eta, *average, 1 - beta2 ** (k + 1), beta2, 1 - beta2, eps


def _free_radam(group: Group) -> Update | str:
    return _free_adam(group, group["silent_sgd_phase"], _of_free_radam)


def _of_free_radam(
    lr: float, silent: float, beta1: float, beta2: float, eps: float, k: float, *schedule: float
) -> Numbers:
    eta = lr * schedule_free.rectified(k, beta2, silent)
    average = schedule_free.averaging(eta, beta1, k, *schedule)
    rest = 1 - beta2 ** (k + 1) if schedule_free.length(k, beta2) > 4 else -1.0
    return eta, *average, rest, beta2, 1 - beta2, eps


def _free_adam(group: Group, own: float, of_step: Callable[..., Numbers]) -> Update | str:
    if any(map(Tensor.is_complex, group["params"])):
        return "it squares complex gradients as complex numbers"
    options = (own, *group["betas"], group["eps"], *_schedule(group))
    return Update("free_adam", ("z", "exp_avg_sq"), options, of_step, averages=True)


def _schedule(group: Group) -> tuple[Any, ...]:
    return tuple(group[key] for key in ("k", "r", "weight_sum", "lr_max", "weight_lr_power"))


TABLE: Mapping[str, Callable[[Group], Update | str]] = {
    "torch.optim.adadelta.Adadelta": _adadelta,
    "torch.optim.adagrad.Adagrad": _adagrad,
    "torch.optim.adam.Adam": _adam,
    "torch.optim.adamax.Adamax": _adamax,
    "torch.optim.adamw.AdamW": _adam,
    "torch.optim.nadam.NAdam": _nadam,
    "torch.optim.radam.RAdam": _radam,
    "torch.optim.rmsprop.RMSprop": _rmsprop,
    "torch.optim.sgd.SGD": _sgd,
    "timm.optim.adamw.AdamWLegacy": _adamw_legacy,
    "timm.optim.lion.Lion": _lion,
    "timm.optim.nadamw.NAdamW": _nadamw,
    "timm.optim.rmsprop_tf.RMSpropTF": _rmsprop_tf,
    "timm.optim.sgdw.SGDW": _sgd,
    "lion_pytorch.lion_pytorch.Lion": _lion,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _free_adamw,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": _free_radam,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _free_sgd,
}
