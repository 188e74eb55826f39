"""What particular optimizers need, or cannot be given, by name: the one place that knows them.

A name is ``library.Class``; a bare class name holds for every library.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

_ANEW = "it computes the weights anew at each step from a copy of its own, so a decay of the parameter is lost"

_REFUSED: Mapping[str, str] = {
    "TRAC": _ANEW,
    "FTRL": _ANEW,
    "Nero": _ANEW,
    "DAdaptAdaGrad": _ANEW,
    "dadaptation.DAdaptSGD": _ANEW,
    "BSAM": "its weight_decay is the precision of a prior and multiplies the gradient: at 0 it does not train",
    "SafeFP16Optimizer": "it keeps the weights in a flat float32 copy. Wrap the optimizer inside it",
    "LOMO": "it steps inside backward, where a wrapper's step cannot see it",
    "AdaLOMO": "it steps inside backward, where a wrapper's step cannot see it",
    "PCGrad": "it edits gradients and is not an optimizer. Wrap the optimizer inside it",
    "accelerate.AcceleratedOptimizer": "it decides whether to step. Wrap first, then call accelerator.prepare",
}

_PULLED_BACK = (
    "later steps pull each weight back towards a copy of its own that knows no decay, so the decay acts weaker"
)

_WARNED: Mapping[str, str] = {
    "MADGRAD": _PULLED_BACK,
    "MirrorMADGRAD": _PULLED_BACK,
    "A2Grad": _PULLED_BACK,
    "A2GradExp": _PULLED_BACK,
    "A2GradInc": _PULLED_BACK,
    "A2GradUni": _PULLED_BACK,
    "pytorch_optimizer.DAdaptSGD": _PULLED_BACK,
}

_ALMOST_ZERO = 1e-300  # 0 in every float32 product, but not equal to 0


def refusal(optimizer: Optimizer) -> str | None:
    """Why ``optimizer`` cannot be wrapped; None if it can."""
    if any("ScheduleFree" in name for name in _names(optimizer)):
        return _ANEW
    return next((_REFUSED[name] for name in _names(optimizer) if name in _REFUSED), None)


def warning(optimizer: Optimizer) -> str | None:
    """What the user of a wrapped ``optimizer`` must know; None if nothing."""
    return next((_WARNED[name] for name in _names(optimizer) if name in _WARNED), None)


def kept_while_off(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, object]:
    """Group entries that keep the rest of the algorithm as it is while the decay of ``group`` is off."""
    entries: dict[str, object] = {}
    if group.get("always_adapt") is False:  # timm's LAMB and LARS adapt their step only in groups that decay
        entries["always_adapt"] = True
    if any("torch_optimizer.LARS" in _names(layer) for layer in layers(optimizer)):  # the same, without such a switch
        entries["weight_decay"] = _ALMOST_ZERO
    if "weight_decay_1d" in group:  # MARS decays vectors by this instead
        entries["weight_decay_1d"] = 0.0
    return entries


def many_gradients(optimizer: Optimizer) -> str | None:
    """Why the gradient after its step says nothing about the weights before it; None if it does."""
    known = {"LBFGS", "SAM", "LookSAM", "FriendlySAM", "GSAM", "WSAM"}
    found = known.intersection(_names(optimizer))
    return "it evaluates gradients at several places in one step, and leaves the last" if found else None


def maximizes(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Does the step climb the gradient? torch keeps the option in the group, pytorch_optimizer in the optimizer."""
    return bool(group.get("maximize")) or any(getattr(layer, "maximize", False) for layer in layers(optimizer))


def step_size(optimizer: Optimizer) -> Callable[[Mapping[str, Any]], Any] | None:
    """eta, of optimizers that keep what it depends on in themselves and not in the group; None for all others."""
    if "torch_optimizer.AdaBelief" in _names(optimizer) and getattr(optimizer, "_fixed_decay", False):
        return lambda _: 1.0
    if "lion_pytorch.Lion" in _names(optimizer) and getattr(optimizer, "decoupled_wd", False):
        initial: float = getattr(optimizer, "_init_lr")  # noqa: B009 - not an attribute that Optimizer has
        return lambda group: group["lr"] / initial
    return None


def layers(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer, and those inside it under the names in use for that."""
    seen: set[int] = set()
    while isinstance(optimizer, Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        names = ("base_optimizer", "_base_optimizer", "optimizer")
        optimizer = next((inner for name in names if (inner := getattr(optimizer, name, None)) is not None), None)


def _names(optimizer: Optimizer) -> Iterator[str]:
    for cls in type(optimizer).__mro__:
        yield f"{cls.__module__.split('.')[0]}.{cls.__name__}"
        yield cls.__name__
