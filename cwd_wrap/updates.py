"""The whole update of some optimizers, for the kernels that decay and step in one pass over the weights.

A class is in the table, by its exact name, only if a test shows that one pass equals the optimizer's own step on its
own state. `rules` has each update in readable form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import known

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Adam:
    """Adam and AdamW (their own decay is off), with amsgrad or without: `rules.adam`."""

    beta1: float
    beta2: float
    eps: float
    amsgrad: bool
    maximize: bool
    counts: ClassVar[bool] = True  # the update reads and increases the base's step counter

    @property
    def kernel(self) -> str:
        """The kernel that makes this update."""
        return "amsgrad" if self.amsgrad else "adam"

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The tensors of a parameter's state that it reads and writes."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SGD:
    """SGD, with momentum or without: `rules.sgd`."""

    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    counts: ClassVar[bool] = False

    @property
    def kernel(self) -> str:
        """The kernel that makes this update."""
        return "sgd_momentum" if self.momentum else "sgd"

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The tensors of a parameter's state that it reads and writes."""
        return ("momentum_buffer",) if self.momentum else ()


@dataclass(frozen=True)
class Lion:
    """Lion: `rules.lion`."""

    beta1: float
    beta2: float
    maximize: bool
    kernel: ClassVar[str] = "lion"
    counts: ClassVar[bool] = False
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg",)


Update: TypeAlias = Adam | SGD | Lion


def find(optimizer: Optimizer, group: Group) -> Update | str:
    """The update of ``optimizer`` on ``group``, or the reason why no kernel computes it."""
    cls = type(optimizer)
    make = TABLE.get(known.name(cls) or "")
    if make is None:
        return f"no kernel for {cls.__name__}"
    if (asked := _asked_for(group)) is not None:
        return f"{asked} was passed, so {cls.__name__}'s own step runs"
    if group.get("caution"):
        return f"{cls.__name__} masks its own update in a group with caution=True"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "GradScaler has not unscaled its gradients yet"
    update = make(group)
    if not isinstance(update, str) and any(isinstance(value, Tensor) for value in vars(update).values()):
        return "its coefficients (momentum, betas, eps) are tensors: pass numbers"
    return update


def _asked_for(group: Group) -> str | None:
    """The option by which the user asked for an implementation of the optimizer's own; None if there is none.

    ``fused=True`` asks for one pass over the weights, which a kernel of ours is too.
    """
    options = {key: group.get(key) for key in ("fused", "foreach")}
    if options["fused"] is True:
        return None
    return next((f"{key}={value}" for key, value in options.items() if value is not None), None)


def _adam(group: Group) -> Update | str:
    beta1, beta2 = group["betas"]
    return Adam(beta1, beta2, group["eps"], bool(group["amsgrad"]), bool(group["maximize"]))


def _sgd(group: Group) -> Update | str:
    return SGD(group["momentum"], group["dampening"], bool(group["nesterov"]), bool(group["maximize"]))


def _lion(group: Group) -> Update | str:
    if any(map(Tensor.is_complex, group["params"])):
        return "Lion's update of a complex weight is u/|u|, not the signs of two real ones"
    beta1, beta2 = group["betas"]
    return Lion(beta1, beta2, bool(group.get("maximize")))


TABLE: Mapping[str, Callable[[Group], Update | str]] = {
    "torch.optim.adam.Adam": _adam,
    "torch.optim.adamw.AdamW": _adam,
    "torch.optim.sgd.SGD": _sgd,
    "timm.optim.lion.Lion": _lion,
    "lion_pytorch.lion_pytorch.Lion": _lion,
}
