"""What particular optimizers need, or cannot be given, by name: the one place that knows them.

A name is ``library.Class``; a bare class name holds for every library.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

_ANEW = "it computes the weights anew at each step from a copy of its own, so a decay of the parameter is lost"

_REFUSED: Mapping[str, str] = {
    "ScheduleFreeAdamW": _ANEW,
    "ScheduleFreeRAdam": _ANEW,
    "ScheduleFreeSGD": _ANEW,
    "ScheduleFreeWrapper": _ANEW,
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


def layers(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer, and those inside it under the names in use for that."""
    while isinstance(optimizer, Optimizer):
        yield optimizer
        names = ("base_optimizer", "_base_optimizer", "optimizer")
        optimizer = next((inner for name in names if (inner := getattr(optimizer, name, None)) is not None), None)


def _names(optimizer: Optimizer) -> Iterator[str]:
    for cls in type(optimizer).__mro__:
        yield f"{cls.__module__.split('.')[0]}.{cls.__name__}"
        yield cls.__name__
