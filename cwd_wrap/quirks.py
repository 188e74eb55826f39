"""Special cases of particular optimizers, by name or option, all in one place.

A name is ``library.Class``; a bare class name holds for every library. Each name holds for subclasses too.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

Group = Mapping[str, Any]
Eta = float | Tensor | str | None  # a factor, or the reason why there is no single one; None: no special case

_OWN_COPY = (
    "each step computes the weights from a copy that the optimizer keeps, so the decay is lost. "
    "Use the optimizer without a wrapper"
)
_IN_BACKWARD = "it updates the weights during backward, before its step is called. Use it without a wrapper"

_REFUSED: Mapping[str, str] = {
    "TRAC": _OWN_COPY,
    "FTRL": _OWN_COPY,
    "Nero": _OWN_COPY,
    "DAdaptAdaGrad": _OWN_COPY,
    "dadaptation.DAdaptSGD": _OWN_COPY,
    "MSAMLaProp": _OWN_COPY,
    "BSAM": "its weight_decay is the precision of a prior and multiplies the gradient: at 0 it does not train",
    "SafeFP16Optimizer": "it keeps the weights in a flat float32 copy. Wrap the optimizer inside it",
    "LOMO": _IN_BACKWARD,
    "AdaLOMO": _IN_BACKWARD,
    "PCGrad": "it edits gradients and is not an optimizer. Wrap the optimizer inside it",
    "accelerate.AcceleratedOptimizer": "it may skip a step. Wrap the optimizer first, then call accelerator.prepare",
    "SaRA": "it trains only the weights below its threshold, and a decay would change those that it freezes",
    "GSAM": "it computes the gradients inside its own step, where a wrapper cannot read them. "
    "Wrap the optimizer inside it",
    "CPUOffloadOptimizer": "it steps copies of the weights, with one optimizer for each, and copies them back. Have "
    "those optimizers wrapped: optimizer_class=CautiousDecay.over(AdamW)",
    "PostLocalSGDOptimizer": "its step also averages the weights over the ranks, which is not an update. "
    "Wrap the optimizer inside it",
}

_PULLED_BACK = (
    "each step pulls the weights back towards a copy that does not decay, so they decay less than weight_decay says"
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

ALMOST_ZERO = 1e-300  # 0 in every float32 product, but not equal to 0


def refusal(optimizer: Optimizer, rounding: str = "nearest") -> str | None:
    """Why ``optimizer`` cannot be wrapped by something that writes with ``rounding``; None if it can."""
    if (by_class := refusal_of(type(optimizer))) is not None:
        return by_class
    if rounding != "stochastic" and any(map(_has_master_bits, getattr(optimizer, "param_groups", ()))):
        return (
            "it keeps the low bits of its 16-bit weights in other tensors. The wrapper writes the weights alone, so a "
            "small decay is rounded away. Pass rounding='stochastic', or keep float32 weights"
        )
    return None


def refusal_of(cls: type[Optimizer]) -> str | None:
    """Why no optimizer of class ``cls`` can be wrapped; None if they can."""
    names = _names_of(cast("Hashable", cls))
    if any("ScheduleFree" in name for name in names):
        return _OWN_COPY
    return next((_REFUSED[name] for name in names if name in _REFUSED), None)


def _has_master_bits(group: Group) -> bool:
    """True if other tensors hold low bits of the group's weights."""
    if group.get("param_ecc"):  # heavyball; the widths are of flashoptim and pytorch_optimizer's FlashAdamW
        return True
    width = group.get("master_bytewidth", group.get("master_byte_width")) or 0
    return width > 0 and any(width > p.element_size() for p in group["params"])


def warning(optimizer: Optimizer) -> str | None:
    """The text of the warning for a user who wraps ``optimizer``; None if there is none."""
    return next((_WARNED[name] for name in _names(optimizer) if name in _WARNED), None)


def kept_while_off(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, object]:
    """Group entries that keep the rest of the algorithm as it is while the decay of ``group`` is off."""
    entries: dict[str, object] = {}
    if group.get("always_adapt") is False:  # timm's LAMB and LARS adapt their step only in groups that decay
        entries["always_adapt"] = True
    if any("torch_optimizer.LARS" in _names(layer) for layer in layers(optimizer)):  # as timm's, but without a switch
        entries["weight_decay"] = ALMOST_ZERO
    if "weight_decay_1d" in group:  # MARS decays vectors by this in place of weight_decay
        entries["weight_decay_1d"] = 0.0
    return entries


def shapes(group: Group) -> tuple[torch.Size, ...]:
    """The shapes of a group's parameters, for `flat_pieces` to compare with later. Lazy modules have none yet."""
    return tuple(torch.Size() if is_lazy(p) else p.shape for p in group["params"])


def flat_pieces(group: Group, built_with: Collection[tuple[torch.Size, ...]]) -> Tensor | None:
    """A flat piece of parameters of unknown shapes that an engine put into ``group``; None if there is none.

    FSDP1 marks such pieces. DeepSpeed (ZeRO) and Megatron replace the optimizer's parameters by tensors of one
    dimension that are not of type Parameter. ``built_with`` holds the shapes of all groups at construction, since
    engines with master weights also replace parameters, but in the same shapes.
    """
    foreign = None
    for p in group["params"]:
        if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
            return cast("Tensor", p)
        if p.dim() == 1 and not isinstance(p, torch.nn.Parameter):
            foreign = p
    return None if foreign is None or shapes(group) in built_with else foreign


def many_gradients(optimizer: Optimizer) -> str | None:
    """Why the gradients after a step of ``optimizer`` are not those at the weights before it; None if they are."""
    known = {"LBFGS", "SAM", "LookSAM", "FriendlySAM", "GSAM", "WSAM"}
    found = known.intersection(_names(optimizer))
    return "it evaluates several gradients in one step, and only the last is left after it" if found else None


def maximizes(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """True if the step goes up the gradient. torch has the option in the group, pytorch_optimizer in the optimizer."""
    return bool(group.get("maximize")) or any(getattr(layer, "maximize", False) for layer in layers(optimizer))


def eta(optimizer: Optimizer, group: Group) -> Eta:
    """The factor of decoupled decay where it is not ``lr``; a string with the reason if there is none; else None."""
    for layer in layers(optimizer):
        for name in _names(layer):
            if name in _ETA and (found := _ETA[name](layer, group)) is not None:
                return cast("Eta", found)
    if group.get("fixed_decay"):
        return 1.0
    if group.get("scale_parameter") and not group.get("relative_step"):
        return "scale_parameter=True multiplies lr by the size of each tensor: pass scale_parameter=False"
    size = 1.0 if group.get("unscaled_wd") else group.get("lr")
    if group.get("corrected_weight_decay"):  # timm before 1.0.23 keeps no maximum, and divides by the default lr
        return cast("Eta", size * group["lr"] / group.get("max_lr_snapshot", optimizer.defaults.get("lr")))
    return size if group.get("unscaled_wd") else None


def exempt(optimizer: Optimizer, group: Group) -> Callable[[Tensor], bool] | None:
    """A test for parameters that the optimizer's own decay skips; None if it decays them all."""
    del group
    vectors_are = any(
        {"pytorch_optimizer.Kron", "pytorch_optimizer.LARS"} & {*_names(each)} for each in layers(optimizer)
    )
    return (lambda p: p.ndim < 2) if vectors_are else None


def _differs(why: str, way_out: str = "give the group weight_decay=0") -> Callable[[Any, Group], Any]:
    """No single learning rate multiplies the decay, unless ``fixed_decay`` is set."""
    return lambda _, group: None if group.get("fixed_decay") else f"{why}: {way_out}"


def _never(why: str, way_out: str = "give the group weight_decay=0") -> Callable[[Any, Group], Any]:
    """No single learning rate multiplies the decay, even with ``fixed_decay``."""
    return lambda *_: f"{why}: {way_out}"


def _projected(_: Any, group: Group) -> Any:
    if group["wd_ratio"] == 1:
        return None
    return f"where it projects the update it multiplies the decay by wd_ratio={group['wd_ratio']:g}: pass wd_ratio=1"


def _sgdp(optimizer: Any, group: Group) -> Any:
    return _projected(optimizer, group) or (1.0 if group.get("fixed_decay") else group["lr"]) / (1 - group["momentum"])


def _kron(_: Any, group: Group) -> Any:
    drawn = group.get("stochastic_weight_decay")
    return "it draws a random factor for each tensor: pass stochastic_weight_decay=False" if drawn else None


def _timm_muon(_: Any, group: Group) -> Any:
    """It steps vectors, and groups with ``use_fallback``, by AdamW."""
    scale = group.get("fallback_lr_scale", 1.0)
    if scale != 1 and not group.get("use_fallback"):
        return f"it steps some tensors by AdamW, with lr times fallback_lr_scale={scale:g}: pass fallback_lr_scale=1"
    return group["lr"] * scale


def _timm_adafactor(_: Any, group: Group) -> Any:
    """timm's ``scale_parameter`` acts only with a relative step."""
    return None if group["relative_step"] else group["lr"]


def _rose(_: Any, group: Group) -> Any:
    if not group["wd_schedule"] or group.get("fixed_decay"):
        return None
    by = group["wd_schedule"]
    return group["lr"] / (by if isinstance(by, float) else group.get("max_lr", group.get("initial_lr", group["lr"])))


def _decoupled_lr(optimizer: Any, group: Group) -> Any:
    if not (group.get("decouple_lr") or getattr(optimizer, "_decouple_lr", False)):
        return None
    return group["lr"] / group["max_lr" if "OptimiOptimizer" in _names(optimizer) else "initial_lr"]


def _apollo(_: Any, group: Group) -> Any:
    if not group["correct_bias"] or group.get("fixed_decay"):
        return None
    (beta1, beta2), t = group["betas"], group.get("step", 0) + 1
    return group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)


def _apollo_dqn(optimizer: Any, group: Group) -> Any:
    if group["weight_decay_type"] == "l2":
        return None
    if group["weight_decay_type"] == "stable":
        return "it divides the decay by a mean of each tensor's second moments: pass another weight_decay_type"
    done, peak = group.get("step", 0) + 1, optimizer.warmup_steps
    if done >= peak:
        return group["lr"]
    return (optimizer.lr - group["init_lr"]) * done / peak + group["init_lr"]


def _prodigy(optimizer: Any, group: Group) -> Any:
    """pytorch_optimizer's Prodigy counts its steps from 1, its DAdaptAdam from 0."""
    if not group["bias_correction"] or group.get("fixed_decay"):
        return None
    (beta1, beta2), t = group["betas"][:2], group.get("step", 0) + ("DAdaptAdam" in _names(optimizer))
    return group["d"] * group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)


def _heavyball(optimizer: Any, group: Group) -> Any:
    lr = group["lr"]
    if group.get("warmup_steps"):
        done = group.get("step_count")
        t = torch.tensor(1) if done is None else done + 1
        lr = lr * t / t.clamp(min=group["warmup_steps"] + 1)
    return lr * lr / group["max_lr"] if "AdamC" in _names(optimizer) else lr


def _adabelief(optimizer: Any, _: Group) -> Any:
    return 1.0 if getattr(optimizer, "_weight_decouple", False) and getattr(optimizer, "_fixed_decay", False) else None


def _lion(optimizer: Any, group: Group) -> Any:
    return group["lr"] / vars(optimizer)["_init_lr"] if optimizer.decoupled_wd else None


_ETA: Mapping[str, Callable[[Any, Group], Any]] = {
    "AdamP": _projected,
    "SGDP": _sgdp,
    "timm.Adafactor": _timm_adafactor,
    "timm.Kron": _kron,
    "timm.Muon": _timm_muon,
    "ROSE": _rose,
    "rose_opt.Rose": _rose,
    "StableAdamW": _differs("it divides the learning rate by a size of each tensor's update"),
    "OptimiOptimizer": _decoupled_lr,
    "flashoptim.FlashOptimizer": _decoupled_lr,
    "pytorch_optimizer.FlashAdamW": _decoupled_lr,
    "pytorch_optimizer.APOLLO": _apollo,
    "pytorch_optimizer.ApolloDQN": _apollo_dqn,
    "pytorch_optimizer.Prodigy": _prodigy,
    "pytorch_optimizer.DAdaptAdam": _prodigy,
    "heavyball.ChainOpt": _heavyball,
    "torch_optimizer.AdaBelief": _adabelief,
    "lion_pytorch.Lion": _lion,
    "SPlus": _differs("it scales the learning rate by the shape of each tensor"),
    "AdamS": _never("it divides the decay by the mean of its second moments"),
    "Ranger21": _never("it divides the decay by the size of its second moments, and sets its own learning rate"),
    "Magma": _never("it scales each tensor's whole step by a random factor", "wrap the optimizer inside it"),
    "pytorch_optimizer.ASGD": _differs("it changes its learning rate during the step"),
    "pytorch_optimizer.DAdaptSGD": _differs("it divides the learning rate by the norm of its first gradient"),
}


def layers(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer and those inside it, found under the usual attribute names."""
    seen: set[int] = set()
    while isinstance(optimizer, Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        names = ("base_optimizer", "_base_optimizer", "optimizer")
        optimizer = next((inner for name in names if (inner := getattr(optimizer, name, None)) is not None), None)


def _names(optimizer: Optimizer) -> tuple[str, ...]:
    return _names_of(cast("Hashable", type(optimizer)))


@cache
def _names_of(cls: Any) -> tuple[str, ...]:
    return tuple(name for c in cls.__mro__ for name in (f"{c.__module__.split('.')[0]}.{c.__name__}", c.__name__))
