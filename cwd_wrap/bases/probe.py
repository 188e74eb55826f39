"""Measures the weight decay of an optimizer that no table vouches for, on small copies of it.

The copies step with decay and without, at two learning rates. What the decay takes off a weight is its step size times
``weight_decay`` times the weight, unless the decay is coupled.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases import known, quirks
from cwd_wrap.bases.copies import Copies, Taken, kinds, narrow, tells_apart, unnoticed

Group = Mapping[str, Any]
Eta = Callable[[Optimizer, Group], float | Tensor]

VOUCHED = {
    "cwd_wrap", "dadaptation", "flashoptim", "heavyball", "lion_pytorch", "optimi", "prodigyopt", "pytorch_optimizer",
    "rose_opt", "schedulefree", "timm", "torch", "torch_optimizer",
}  # fmt: skip
"""The libraries whose optimizers are measured in tests, with all their options."""

_LOST = (
    "its step takes the weights from a copy of its own, or forces them onto a constraint. The decay would be lost, or "
    "break the constraint"
)
_STAYS_ON = (
    "its own decay stays on while the group's weight_decay is 0, so the weights would decay twice. Build it with "
    "weight_decay=0, and pass lam="
)
_ANOTHER_AT_0 = (
    "its step is another one at weight_decay=0, and infinite at a tiny weight_decay, so its own decay cannot be "
    "switched off. Use it without a wrapper"
)
_EXACT = 5e-3  # relative: a decay by division, w / (1 + eta*lam), differs by 1e-3


def _none(_: Optimizer, group: Group) -> float:
    del group
    return 0.0


def _one(_: Optimizer, group: Group) -> float:
    del group
    return 1.0


# How optimizers multiply their own decay, if not as their options say.
_FORMS: tuple[Eta, ...] = (
    _one,
    lambda _, group: group["lr"],
    lambda _, group: quirks.d_lr(group),
    lambda _, group: group["lr"] / group.get("initial_lr", group["lr"]),
    lambda _, group: group["lr"] / group.get("max_lr", group["lr"]),
    lambda _, group: group["lr"] ** 2 / group.get("initial_lr", group["lr"]),
    lambda _, group: group["lr"] ** 2 / max(group["lr"], group.get("max_lr", 0)),
    lambda own, group: group["lr"] / getattr(quirks.stepper(own, group), "_init_lr", group["lr"]),
)


class Found(NamedTuple):
    """What was found out about one param group."""

    eta: Eta | None = None
    """The step size of its decay, if it is not what the options say."""
    no_eta: str | None = None
    """Why it has no single step size."""
    fault: str | None = None
    """Why it cannot be wrapped."""
    coupled: bool = False
    """True if the decay is no multiple of the weights."""
    beside: bool = False
    """True if it decays the weights although its ``weight_decay`` is 0, or it has none."""
    switches: bool = False
    """True if its step without a decay is another one than with an infinitely small one."""
    idle: bool = False
    """True if it does not decay these weights whatever ``weight_decay`` is, but perhaps others."""
    unmeasured: str | None = None
    """Why nothing was measured."""
    counts: frozenset[str] = frozenset()
    """The options of the group that its steps write."""


def is_vouched(base: Optimizer) -> bool:
    """True if tables vouch for ``base`` and all optimizers inside it."""
    return all(map(_is_vouched, quirks.all_layers(base)))


def is_vouched_stepper(base: Optimizer, group: Group) -> bool:
    """True if tables vouch for the innermost optimizer that steps ``group``."""
    return _is_vouched(quirks.stepper(base, group))


def _is_vouched(layer: Optimizer) -> bool:
    return known.library(type(layer)) in VOUCHED


def alike(base: Optimizer, group: Group) -> str:
    """The same text for groups that are measured together: same options but lr and decay, same kinds of parameters.

    If ``base`` can tell parameters apart, only a group with the same ones has the same text.
    """
    own = {"params", "param_names", "lr", "weight_decay"}
    which = [*map(id, group["params"]), *group.get("param_names", ())] if tells_apart(base, group) else None
    return repr((which, kinds(group), narrow(group), {key: value for key, value in group.items() if key not in own}))


def measure(base: Optimizer, group: Group, by_options: Eta) -> Found:
    """Measure the decay of ``group``. ``by_options`` is its step size as the options say."""
    layers = [base, *quirks.holders(base, group)]
    own = next((layer for layer in layers if not _is_vouched(layer) and not quirks.shards(layer)), None)
    if own is None:
        return Found()
    try:
        copies = Copies(own, group)
        with unnoticed(copies):
            off = copies.run(copies.lam, off=True)
            copies.off = quirks.ALMOST_ZERO
            tiny = copies.run(copies.lam, off=True) if "weight_decay" in copies.options else off
            switches = _differ(off, tiny)
            if not switches:
                copies.off = 0.0
            elif all(w.isfinite().all() for step in tiny for w in step.after):
                off = tiny
            else:
                return Found(fault=_ANOTHER_AT_0)
            found = _measure(copies, off, (by_options, *_FORMS))
            return found._replace(counts=_written(off), switches=switches)
    except Exception as error:  # noqa: BLE001  # whatever the optimizer's code raises
        return Found(unmeasured=f"{type(error).__name__}: {error!s:.100}")


def _written(steps: list[Taken]) -> frozenset[str]:
    before, after = steps[0].group, steps[-1].own.param_groups[0]
    plain = {key: value for key, value in after.items() if isinstance(value, int | float | str)}
    return frozenset(key for key, value in plain.items() if key not in before or before[key] != value)


def _differ(off: list[Taken], tiny: list[Taken]) -> bool:
    """True if steps are others with a ``tiny`` decay than with none: a trust ratio only in groups that decay."""
    return any(
        bool((w - v).abs().max() > _noise(x, v))
        for a, b in zip(off, tiny, strict=True)
        for x, v, w in zip(a.before, a.after, b.after, strict=True)
    )


def _measure(copies: Copies, off: list[Taken], etas: tuple[Eta, ...]) -> Found:
    in_16_bit = (copies.run(copies.lam, off=True, dtype=dtype) for dtype in copies.narrow)  # some copy only these
    if any(_is_lost(copies, steps) for steps in (off, *in_16_bit)):
        return Found(
            fault=f"{_LOST}. {'Wrap the optimizer inside it' if copies.inside else 'Use it without a wrapper'}"
        )
    before, after = off[-1].lr
    if before != after:
        return Found(no_eta=f"its step changes lr, from {before:g} to {after:g}")
    at_rest = copies.run(0.0, off=True, slope=0.0)[0]
    moved = [(x, w) for x, w in zip(at_rest.before, at_rest.after, strict=True) if not torch.equal(x, w)]
    beside = bool(moved) and all(bool(((x - w) * x.sign() > _noise(x, w)).all()) for x, w in moved)
    if "weight_decay" not in copies.options:
        return Found(beside=beside)
    built_with_decay = copies.run(copies.lam, off=True, slope=0.0)[0]
    if any((w - v).abs().max() > _noise(w, v) for w, v in zip(built_with_decay.after, at_rest.after, strict=True)):
        return Found(fault=_STAYS_ON)
    found = _step_size(copies, copies.lam, off, etas)
    if found.coupled and copies.inside:
        inner = Copies(copies.inside[0], copies.group)
        if not _step_size(inner, inner.lam, inner.run(inner.lam, off=True), etas).coupled:
            return Found(no_eta="it takes back a part of earlier decays: wrap the optimizer inside it")
    return found._replace(beside=beside)


def _is_lost(copies: Copies, steps: list[Taken]) -> bool:
    """True if a step undoes much of a change that was made to the weights before it."""
    smaller = copies.run(copies.lam, off=True, size=7 / 8, dtype=steps[0].before[0].dtype)
    return any(
        bool(((w - smaller_w) / (x - smaller_x)).median() < 0.75)
        for a, b in zip(steps[1:], smaller[1:], strict=True)
        for x, w, smaller_x, smaller_w in zip(a.before, a.after, b.before, b.after, strict=True)
    )


class _Factor(NamedTuple):
    """What the decay of a parameter was multiplied by in a step."""

    parameter: int
    value: float
    error: float
    step: Taken

    def fits(self, eta: Eta) -> bool:
        return abs(self.value - _tried(eta, self.step)) <= _EXACT * self.value + self.error


def _step_size(copies: Copies, lam: float, off: list[Taken], etas: tuple[Eta, ...]) -> Found:
    on = copies.run(lam)
    if on[-1].own.param_groups[0]["weight_decay"] != lam:
        return Found()  # it rewrites its weight_decay in its step: no factor of what it was before
    found = list(_factors(on, off, lam))
    factors = [each for _, each in found if each is not None]
    coupled = {i for i, each in found if each is None}
    if coupled:
        why = _why_not_coupled(copies, [each for each in factors if each.parameter not in coupled], etas[0])
        again = why is not None and lam == copies.lam  # it may be too small to flip a sign
        return _step_size(copies, 512 * lam, off, etas) if again else Found(coupled=why is None, no_eta=why)
    if not factors:
        return Found(unmeasured="its first steps do not move the weights")
    if not any(each.value for each in factors):
        # No decay, or one that is too small to see.
        again = lam == copies.lam
        return _step_size(copies, 512 * lam, off, etas) if again else _of_none(copies, lam)
    for i, eta in enumerate(etas):
        if all(each.fits(eta) for each in factors):
            return _later(copies, lam, eta) or Found(eta=eta if i else None)
    return Found(no_eta=_by_factors(copies, factors))


def _by_factors(copies: Copies, factors: list[_Factor]) -> str:
    measured = [*dict.fromkeys(f"{each.value:.3g} at lr={each.step.lr[0]:.3g}" for each in factors)]
    why = f"measured, it multiplies weight_decay by {', '.join(measured[:4])}{_differing(copies)}"
    return f"{why}: {'wrap the optimizer inside it, ' if copies.inside else ''}give the group weight_decay=0"


def _of_none(copies: Copies, lam: float) -> Found:
    return _later(copies, lam, _none) or Found(idle=_is_idle(copies, lam))


def _later(copies: Copies, lam: float, eta: Eta) -> Found | None:
    """What was found if ``eta`` is not the step size after many steps (a schedule in the optimizer); None if it is."""
    if copies.inside:
        return None  # what it has counted may be the steps until it pulls back
    try:
        on, off = copies.run(lam, late=True), copies.run(lam, off=True, late=True)
    except Exception:  # noqa: BLE001  # a table may have fewer rows
        return None
    for _, each in _factors(on[2:], off[2:], lam):
        if each is not None and not each.fits(eta):
            return Found(
                no_eta=f"measured, it multiplies weight_decay by {_tried(eta, each.step):.3g} in its first steps, but "
                f"by {each.value:.3g} at the same lr after a thousand: give the group weight_decay=0"
            )
    return None


def _why_not_coupled(copies: Copies, others: list[_Factor], eta: Eta) -> str | None:
    """Why the decay of a group is not coupled although that of all parameters but ``others`` is; None if it is."""
    if all(each.fits(eta) or each.step.before[each.parameter].numel() == 1 for each in others):
        return None  # of one number any change is a multiple
    return (
        "measured, it decays some of its parameters through their gradients, and others in another way or not at all"
        f"{_differing(copies)}: give these a group of their own, with weight_decay=0 if it does not decay them"
    )


def _is_idle(copies: Copies, lam: float) -> bool:
    """Of an optimizer that does not decay the group's weights: could it decay others, by their place or as matrices?"""
    if not any("weight_decay" in group for group in copies.own.param_groups):
        return False
    if copies.tells_apart:
        return True
    copies.kinds, copies.originals = [((2, False), {})], copies.originals[:1]
    of_matrix = _side_by_side(copies.run(lam), copies.run(lam, off=True))
    return any(bool((w - v).abs().max() > _noise(x, v)) for _, x, w, v, _ in of_matrix)


def _factors(on: list[Taken], off: list[Taken], lam: float) -> Iterator[tuple[int, _Factor | None]]:
    """For each parameter that a step moved its place and the factor of its decay, or None if it has none."""
    for i, x, w, v, step in _side_by_side(on, off):
        value = _factor(x, w, v, lam)
        yield i, None if value is None else _Factor(i, value, _noise(x, v) / lam, step)


def _side_by_side(on: list[Taken], off: list[Taken]) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Taken]]:
    """Each parameter's place, its weights before the step, after it with decay and without, and the step.

    Only where a step was made.
    """
    for with_decay, without in zip(on, off, strict=True):
        for i, (x, w, v) in enumerate(zip(without.before, with_decay.after, without.after, strict=True)):
            if not torch.equal(v, x):
                yield i, x, w, v, without


def _factor(x: Tensor, w: Tensor, v: Tensor, lam: float) -> float | None:
    """The step size of a decay that made ``w`` of ``v``, before or after the step from ``x``; None if it has none."""
    taken, noise = v - w, _noise(x, v)
    if taken.abs().max() <= noise:
        return 0.0
    for decayed in (lam * x, lam * v):
        factor = (taken / decayed).median()
        if (taken - factor * decayed).abs().max() <= noise + _EXACT * (factor * decayed).abs().max():
            return float(factor)
    return None


def _noise(*weights: Tensor) -> float:
    return 4 * torch.finfo(torch.float32).eps * max(float(w.abs().max()) for w in weights)


def _tried(eta: Eta, step: Taken) -> float:
    try:
        return float(eta(step.own, step.group))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return float("nan")


def _differing(copies: Copies) -> str:
    """The attributes in which the group's parameters differ, in brackets."""
    attributes = [attributes for _, attributes in copies.kinds]
    names = dict.fromkeys(name for each in attributes for name in each)
    differing = [
        name for name in names if any(name not in each or each[name] != attributes[0].get(name) for each in attributes)
    ]
    if differing:
        return f" (its parameters differ in {', '.join(differing)})"
    return " (it tells its parameters apart)" if copies.tells_apart else ""
