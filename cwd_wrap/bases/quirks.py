"""Special cases of particular optimizers, by name or option, all in one place.

A name is ``library.Class``, and holds for subclasses too. Classes of the same name in other libraries are not meant.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from cwd_wrap.bases import known, schedule_free

Group = Mapping[str, Any]
Eta = float | Tensor | str | None  # a factor, or the reason why there is no single one; None: no special case

_OWN_COPY = (
    "each step computes the weights from a copy that the optimizer keeps, so the decay is lost. "
    "Use the optimizer without a wrapper"
)
_SCHEDULE_FREE = (
    f"{_OWN_COPY}. Of schedule-free optimizers, CautiousDecay with mask='update' wraps AdamWScheduleFree, "
    "SGDScheduleFree and RAdamScheduleFree of schedulefree 1.3 and 1.4, as they are shipped"
)
_IN_BACKWARD = "it updates the weights during backward, before its step is called. Use it without a wrapper"
_SKIPS = "it may skip a step"
_BEFORE_LIGHTNING = f"{_SKIPS}. Wrap the optimizer before Lightning gets it: return it from configure_optimizers"
_BEFORE_FABRIC = f"{_SKIPS}. Wrap the optimizer first, then call fabric.setup"

Row = TypeVar("Row")


def _of(libraries: str, name: str, row: Row) -> dict[str, Row]:
    """The same row for a class of this name in each of the libraries."""
    return {f"{library}.{name}": row for library in libraries.split()}


_REFUSED: Mapping[str, str] = {
    "pytorch_optimizer.TRAC": _OWN_COPY,
    "pytorch_optimizer.FTRL": _OWN_COPY,
    "pytorch_optimizer.Nero": _OWN_COPY,
    "pytorch_optimizer.DAdaptAdaGrad": _OWN_COPY,
    "dadaptation.DAdaptAdaGrad": _OWN_COPY,
    "dadaptation.DAdaptSGD": _OWN_COPY,
    "heavyball.MSAMLaProp": _OWN_COPY,
    "pytorch_optimizer.BSAM": "its weight_decay is the precision of a prior and multiplies the gradient: at 0 it does "
    "not train",
    "pytorch_optimizer.SafeFP16Optimizer": "it keeps the weights in a flat float32 copy. Wrap the optimizer inside it",
    "pytorch_optimizer.LOMO": _IN_BACKWARD,
    "pytorch_optimizer.AdaLOMO": _IN_BACKWARD,
    "lomo_optim.Lomo": _IN_BACKWARD,
    "lomo_optim.AdaLomo": _IN_BACKWARD,
    "pytorch_optimizer.PCGrad": "it edits gradients and is not an optimizer. Wrap the optimizer inside it",
    "accelerate.AcceleratedOptimizer": f"{_SKIPS}. Wrap the optimizer first, then call accelerator.prepare",
    **_of("lightning pytorch_lightning", "LightningOptimizer", _BEFORE_LIGHTNING),
    **_of("lightning lightning_fabric", "_FabricOptimizer", _BEFORE_FABRIC),
    "opacus.DPOptimizer": f"{_SKIPS} (virtual steps). Wrap the optimizer first, then call privacy_engine.make_private",
    "torchft.OptimizerWrapper": f"{_SKIPS} (when the quorum does not commit). Wrap the optimizer inside it",
    "hivemind.Optimizer": f"{_SKIPS} (until the peers have a whole batch). Wrap the optimizer inside it",
    "pytorch_optimizer.SaRA": "it trains only the weights below its threshold, and a decay would change those that it "
    "freezes",
    "pytorch_optimizer.GSAM": "it computes the gradients inside its own step, where a wrapper cannot read them. "
    "Wrap the optimizer inside it",
    "torchao.CPUOffloadOptimizer": "it steps copies of the weights, with one optimizer for each, and copies them back. "
    "Have those optimizers wrapped: optimizer_class=CautiousDecay.over(AdamW)",
    "torch.PostLocalSGDOptimizer": "its step also averages the weights over the ranks, which is not an update. "
    "Wrap the optimizer inside it",
}

_PULLED_BACK = (
    "each step pulls the weights back towards a copy that does not decay, so they decay less than weight_decay says"
)

_WARNED: Mapping[str, str] = {
    **_of("madgrad pytorch_optimizer timm torch_optimizer", "MADGRAD", _PULLED_BACK),
    "madgrad.MirrorMADGRAD": _PULLED_BACK,
    "pytorch_optimizer.A2Grad": _PULLED_BACK,
    "torch_optimizer.A2GradExp": _PULLED_BACK,
    "torch_optimizer.A2GradInc": _PULLED_BACK,
    "torch_optimizer.A2GradUni": _PULLED_BACK,
    "pytorch_optimizer.DAdaptSGD": _PULLED_BACK,
}

ALMOST_ZERO = 1e-300  # 0 in every float32 product, but not equal to 0


def refusal(optimizer: Optimizer, rounding: str = "nearest", *, averages: bool = False) -> str | None:
    """Why ``optimizer`` cannot be wrapped by something that writes with ``rounding``; None if it can.

    ``averages``: it makes the whole step of the schedule-free optimizers that are known.
    """
    by_class = refusal_of(type(optimizer))
    if by_class is not None and not (averages and schedule_free.is_known(optimizer)):
        return by_class
    if (overridden := _overridden(optimizer)) is not None:
        return overridden
    if (passes := getattr(optimizer, "backward_passes_per_step", 1)) != 1 or hasattr(optimizer, "_starting_models"):
        of_horovod = any(name.startswith("horovod.") for name in _names(optimizer))
        if of_horovod:
            how = "Adasum steps during backward" if passes == 1 else f"backward_passes_per_step={passes} accumulates"
            return f"{how}. Wrap inside: hvd.DistributedOptimizer(CautiousDecay.over(SGD)(params, ...), ...)"
    if rounding != "stochastic" and any(map(_has_master_bits, getattr(optimizer, "param_groups", ()))):
        return (
            "it keeps the low bits of its 16-bit weights in other tensors. The wrapper writes the weights alone, so a "
            "small decay is rounded away. Pass rounding='stochastic', or keep float32 weights"
        )
    return None


def refusal_of(cls: type[Optimizer]) -> str | None:
    """Why no optimizer of class ``cls`` can be wrapped; None if they can. `refusal` makes an exception."""
    names = _names_of(cls)
    if any("ScheduleFree" in name for name in names):  # in any library: the name says what it is
        return _SCHEDULE_FREE
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
    climbs = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")  # SAM and its like, of any library
    found = climbs or {"pytorch_optimizer.LBFGS", "torch.LBFGS"} & {*_names(optimizer)}
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


def has_d(group: Group) -> bool:
    """True if the options are those of Prodigy and D-Adaptation: a factor ``d`` of lr, and a counter."""
    return "d" in group and ("k" in group or "step" in group)  # not Adafactor, whose "d" differs


def d_lr(group: Group) -> float | Tensor:
    """The step size of these."""
    size: float | Tensor = group["d"] * group["lr"]
    if not group.get("use_bias_correction"):
        return size
    beta1, beta2 = group["betas"][:2]
    t = group["k"] + 1
    return size * float((1 - beta2**t) ** 0.5 / (1 - beta1**t))


def constraint(group: Group) -> str | None:
    """Why parameters on a manifold (geoopt) cannot decay; None if the group has none."""
    for p in group["params"]:
        manifold = getattr(p, "manifold", None)
        if manifold is not None and type(manifold).__name__ != "Euclidean":
            return (
                f"its parameters lie on the manifold {type(manifold).__name__}, and a decay after its step would take "
                "them off it: give them a group of their own with weight_decay=0"
            )
    return None


_BY_TORCH = ("Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
_COUPLED = {f"torch.{name}" for name in _BY_TORCH}


def says_coupled(group: Group) -> bool:
    """True if an option says that the decay is added to the gradient."""
    return any(group.get(key) is False for key in ("weight_decouple", "decoupled_decay", "decoupled"))


def coupling(optimizer: Optimizer, group: Group, *, measured: bool) -> str | None:
    """What makes of a coupled decay another one than ``lr * weight_decay``; None if it is the same, or not coupled."""
    by_torch = known.library(type(optimizer)) == "torch" and not _COUPLED.isdisjoint(_names(optimizer))
    if not (measured or says_coupled(group) or (by_torch and not group.get("decoupled_weight_decay"))):
        return None
    if not {"dampening", "momentum"} <= group.keys():
        return "it adds the decay to the gradient, and scales it with the gradient"
    momentum, rest = float(group["momentum"]), 1 - float(group["dampening"])
    if momentum >= 1:
        return "its momentum sums the decay up"
    factor = rest / (1 - momentum)
    return None if factor == 1 else f"its momentum makes the decay {factor:.3g} times as strong"


def exempt(optimizer: Optimizer) -> Callable[[Tensor], bool] | None:
    """A test for parameters that the optimizer's own decay skips; None if it decays them all."""
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
    return group["lr"] / group["max_lr" if "optimi.OptimiOptimizer" in _names(optimizer) else "initial_lr"]


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
    (beta1, beta2), t = group["betas"][:2], group.get("step", 0) + ("pytorch_optimizer.DAdaptAdam" in _names(optimizer))
    return group["d"] * group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)


def _heavyball(optimizer: Any, group: Group) -> Any:
    lr = group["lr"]
    if group.get("warmup_steps"):
        done = group.get("step_count")
        t = torch.tensor(1) if done is None else done + 1
        lr = lr * t / t.clamp(min=group["warmup_steps"] + 1)
    return lr * lr / group["max_lr"] if "heavyball.AdamC" in _names(optimizer) else lr


def _adabelief(optimizer: Any, _: Group) -> Any:
    return 1.0 if getattr(optimizer, "_weight_decouple", False) and getattr(optimizer, "_fixed_decay", False) else None


def _lion(optimizer: Any, group: Group) -> Any:
    return group["lr"] / vars(optimizer)["_init_lr"] if optimizer.decoupled_wd else None


_ETA: Mapping[str, Callable[[Any, Group], Any]] = {
    **_of("adamp pytorch_optimizer timm torch_optimizer", "AdamP", _projected),
    **_of("adamp pytorch_optimizer timm torch_optimizer", "SGDP", _sgdp),
    "bitsandbytes.Optimizer8bit": lambda optimizer, _: _overridden(optimizer),
    "timm.Adafactor": _timm_adafactor,
    "timm.Kron": _kron,
    "timm.Muon": _timm_muon,
    "pytorch_optimizer.ROSE": _rose,
    "rose_opt.Rose": _rose,
    **_of("optimi pytorch_optimizer", "StableAdamW", _differs("it divides lr by a size of each tensor's update")),
    "optimi.OptimiOptimizer": _decoupled_lr,
    "flashoptim.FlashOptimizer": _decoupled_lr,
    "pytorch_optimizer.FlashAdamW": _decoupled_lr,
    "pytorch_optimizer.APOLLO": _apollo,
    "pytorch_optimizer.ApolloDQN": _apollo_dqn,
    "pytorch_optimizer.Prodigy": _prodigy,
    "pytorch_optimizer.DAdaptAdam": _prodigy,
    "heavyball.ChainOpt": _heavyball,
    "torch_optimizer.AdaBelief": _adabelief,
    "lion_pytorch.Lion": _lion,
    "schedulefree.AdamWScheduleFree": lambda _, group: schedule_free.eta(group),
    "schedulefree.RAdamScheduleFree": lambda _, group: schedule_free.eta(group),
    "schedulefree.SGDScheduleFree": lambda _, group: schedule_free.eta(group),
    "pytorch_optimizer.SPlus": _differs("it scales the learning rate by the shape of each tensor"),
    "pytorch_optimizer.AdamS": _never("it divides the decay by the mean of its second moments"),
    **_of(
        "pytorch_optimizer ranger21",
        "Ranger21",
        _never("it divides the decay by the size of its second moments, and sets its own learning rate"),
    ),
    "pytorch_optimizer.Magma": _never(
        "it scales each tensor's whole step by a random factor", "wrap the optimizer inside it"
    ),
    "pytorch_optimizer.ASGD": _differs("it changes its learning rate during the step"),
    "pytorch_optimizer.DAdaptSGD": _differs("it divides the learning rate by the norm of its first gradient"),
}


def _overridden(optimizer: Any) -> str | None:
    """Why a decay that bitsandbytes' GlobalOptimManager gives to single parameters cannot be replaced."""
    if "bitsandbytes.Optimizer8bit" not in _names(optimizer):
        return None
    manager, own = optimizer.mng, {id(p) for group in optimizer.param_groups for p in group["params"]}
    configs = [config for key, config in manager.pid2config.items() if key in own]
    configs += [*manager.index2config.values(), *(config for _, _, config in manager.module_weight_config_triple)]
    if any("weight_decay" in config or "lr" in config for config in configs):
        return (
            "GlobalOptimManager overrides weight_decay or lr of single parameters, where the wrapper cannot read it. "
            "Give these parameters a group of their own"
        )
    return None


def layers(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer and those inside it, found under the usual attribute names."""
    seen: set[int] = set()
    while isinstance(optimizer, Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        names = ("base_optimizer", "_base_optimizer", "optimizer")
        optimizer = next((inner for name in names if (inner := getattr(optimizer, name, None)) is not None), None)


def all_layers(optimizer: Optimizer) -> list[Optimizer]:
    """The same, and all in attributes of any name, and in lists, tuples and dicts there. It takes longer."""
    found = list(layers(optimizer))
    for layer in found:  # the list grows meanwhile
        found += [inner for inner in _held(layer) if not any(inner is each for each in found)]
    return found


def _held(optimizer: Optimizer) -> Iterator[Optimizer]:
    for name, value in vars(optimizer).items():
        if name in {"param_groups", "state", "defaults"}:
            continue
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (each for each in inside if isinstance(each, Optimizer))


def holders(optimizer: Optimizer, group: Group) -> list[Optimizer]:
    """The optimizers inside ``optimizer`` that have parameters of ``group``, the outermost first."""
    of_group = {id(p) for p in group["params"]}
    return [
        layer
        for layer in all_layers(optimizer)[1:]
        if any(id(p) in of_group for own in layer.param_groups for p in own["params"])
    ]


def stepper(optimizer: Optimizer, group: Group) -> Optimizer:
    """The innermost layer that has the parameters of ``group``: the one that decays them."""
    return [optimizer, *holders(optimizer, group)][-1]


def shards(optimizer: Optimizer) -> bool:
    """True if it has the optimizer inside step this rank's share of the weights, and does no more to them."""
    return bool({"torch.ZeroRedundancyOptimizer", "fairscale.OSS"} & {*_names(optimizer)})


def apart(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers inside ``optimizer`` that step its parameters with groups of their own, which it does not see."""
    if shards(optimizer):
        return []  # they copy the values of their groups into those of the optimizer inside, before each step
    own = {id(group) for group in optimizer.param_groups}
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def is_apart(inner: Optimizer) -> bool:
        others = [p for group in inner.param_groups if id(group) not in own for p in group["params"]]
        return bool(others) and (not parameters or any(id(p) in parameters for p in others))

    return [inner for inner in _held(optimizer) if is_apart(inner)]


def _names(optimizer: Optimizer) -> tuple[str, ...]:
    return _names_of(type(optimizer))


_names_found: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _names_of(cls: type) -> tuple[str, ...]:
    """The names of the class and its parents."""
    names = _names_found.get(cls)
    if names is None:
        names = tuple(f"{c.__module__.split('.')[0]}.{c.__name__}" for c in cls.__mro__)
        _names_found[cls] = names
    return names
