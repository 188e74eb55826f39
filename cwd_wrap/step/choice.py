"""Which of the four paths a param group takes, and why.

The choice depends on the method (`Method`), on the base (`directions`, `updates`, `pieces`) and on the backends of the
device (`kernels`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import kernels
from cwd_wrap.bases import directions, known, pieces, quirks, schedule_free, updates
from cwd_wrap.bases.weight_decay import Strength
from cwd_wrap.kernels import Backend
from cwd_wrap.kernels.buckets import Coming, Stepped, Sums, Whole

PATHS = ("one_pass", "direction", "pieces", "snapshot")
Act = TypeVar("Act", bound=Callable[..., Sums] | None)


@dataclass(frozen=True)
class Method:
    """A method, as the paths need it. The bool argument of each function asks it to return `rules.sums`."""

    name: str
    """The method's name, for error texts."""
    after: Callable[[Backend, Sequence[Stepped], bool], Sums]
    """Applies the method to weights after the base's step."""
    needs_copy: str | None = None
    """Why it needs a copy of the weights where it has no ``before`` or ``whole``."""
    before: Callable[[Backend, Sequence[Coming], bool], Sums] | None = None
    """Applies the method to weights before the base's step."""
    whole: Callable[[Backend, Sequence[Whole], bool], Sums] | None = None
    """Applies the method and the base's update together."""
    reads_gradient: bool = False
    """True if ``after`` needs the gradients."""
    every_group: bool = False
    """True if the method also acts on groups that do not decay."""
    draws: bool = False
    """True if the method draws random numbers."""
    whole_tensors: str | None = None
    """For a method that counts over each whole tensor: what the error for flat pieces advises. Else None."""
    rounds: bool = False
    """True if ``whole`` rounds 16-bit weights stochastically: then it also steps groups that do not decay."""
    averages: bool = False
    """True if ``whole`` also makes the steps of schedule-free optimizers."""

    def has_work(self, eta_lam: float | Tensor) -> bool:
        """True if the method acts on a group with this eta*lam (or lam). A tensor counts as not 0: it is not read."""
        return self.every_group or isinstance(eta_lam, Tensor) or eta_lam != 0

    def apart_from(self, owner: object) -> "Method":
        """The same method, without references to ``owner``, for a plan that the owner keeps.

        With them a deleted optimizer would hold its weights and state until Python collects cycles.
        """
        return replace(
            self,
            after=_weakly(self.after, owner),
            before=_weakly(self.before, owner),
            whole=_weakly(self.whole, owner),
        )


def _weakly(act: Act, owner: object) -> Act:
    """``act``; if it is a method of ``owner``, without keeping that alive."""
    if not isinstance(act, MethodType) or act.__self__ is not owner:
        return act
    function, alive = act.__func__, ref(owner)
    return cast("Act", lambda *arguments: function(alive(), *arguments))


class Choice(NamedTuple):
    """The path of a param group, and why it is not another."""

    path: str
    reason: str


class PathOfGroup(NamedTuple):
    """Which path a param group takes, and why it is not an earlier one of one_pass, direction, pieces, snapshot."""

    group: int
    path: str
    """One of `PATHS`, or "plain" for a group that the base steps alone."""
    reason: str


def choose(
    method: Method, base: Optimizer, group: Mapping[str, Any], backend: str | None, forced: str | None
) -> Choice:
    """The first of `PATHS` that ``group`` can take, or the ``forced`` one. Raises ValueError if that is impossible."""
    if forced is not None:
        check_path(forced)
        reason = _why_not(forced, method, base, group, None)
        if reason is not None:
            msg = (
                f"path={forced!r} does not work for {_where(base, group)}: {reason}. "
                "Pass path=None to let the library choose one that works"
            )
            raise ValueError(msg)
        return Choice(forced, f"path={forced!r} was passed")
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    ruled_out: dict[str, list[str]] = {}  # for each reason, the paths
    for path in PATHS:
        reason = _why_not(path, method, base, group, (backend, device))
        if reason is None:
            break
        ruled_out.setdefault(reason, []).append(path)
    if reason is not None:
        why = next(iter(ruled_out))
        msg = f"{method.name} cannot step {_where(base, group)}: {why}. Without a kernel {reason}"
        raise ValueError(msg)
    because = ". Not ".join(f"{' or '.join(paths)}: {reason}" for reason, paths in ruled_out.items())
    return Choice(path, f"not {because}" if because else "a compiled kernel makes the whole step")


def _where(base: Optimizer, group: Mapping[str, Any]) -> str:
    groups = base.param_groups
    # A group that is about to be added has the next index.
    index = next((i for i, g in enumerate(groups) if g["params"] is group["params"]), len(groups))
    return f"param group {index} of {type(base).__name__}"


def paths_of(
    method: Method, base: Optimizer, lams: Sequence[float | Tensor], backend: str | None, forced: str | None
) -> list[PathOfGroup]:
    """The path of each param group of ``base``, whose decay strengths are ``lams``."""
    of_groups = []
    for i, (group, lam) in enumerate(zip(base.param_groups, lams, strict=True)):
        choice = Choice("plain", "weight_decay is 0: a plain step, without decay")
        decays = method.has_work(lam)
        if decays or (method.rounds and any(p.element_size() == 2 for p in group["params"])):
            taken = choose(method, base, group, backend, forced)
            choice = taken if decays or taken.path == "one_pass" else choice
        of_groups.append(PathOfGroup(i, *choice))
    return of_groups


def check_path(path: str | None) -> None:
    """Raise ValueError unless ``path`` is None (the library chooses) or the name of one."""
    if path is not None and path not in PATHS:
        msg = f"unknown path {path!r}: pass one of {', '.join(map(repr, PATHS))}, or None to let the library choose"
        raise ValueError(msg)


def check_pieces(method: Method, strength: Strength, built_with: Collection[tuple[torch.Size, ...]]) -> None:
    """Raise ValueError if ``method`` counts over each whole tensor and a group has flat pieces of tensors."""
    if method.whole_tensors is None:
        return
    base = strength.base
    for i, group in enumerate(base.param_groups):
        piece = quirks.flat_pieces(group, built_with) if method.has_work(strength.eta_lam(i)) else None
        if piece is not None:
            msg = (
                f"{method.name} needs a count over each whole tensor, but param group {i} of {type(base).__name__} has "
                f"flat pieces of tensors, such as one of shape {tuple(piece.shape)}, as FSDP1, DeepSpeed and Megatron "
                f"make them: {method.whole_tensors}"
            )
            raise ValueError(msg)


def copying(base: Optimizer, group: Mapping[str, Any]) -> str:
    """The cheaper of the paths with a copy: pieces if ``group`` can take it, else snapshot."""
    return "pieces" if _why_not_pieces(base, group) is None else "snapshot"


def steps_without_closure(base: Optimizer) -> bool:
    """True if ``base`` is known to call its closure once, before anything else: it can as well be called earlier."""
    if schedule_free.is_known(base):
        return not schedule_free.is_in_eval_mode(base)
    name = known.name(type(base))
    return name in directions.TABLE or name in pieces.TABLE


def _why_not(
    path: str,
    method: Method,
    base: Optimizer,
    group: Mapping[str, Any],
    compiled_on: tuple[str | None, torch.device] | None,
) -> str | None:
    """Why ``group`` cannot take ``path``; None if it can.

    ``compiled_on``: the backend and device for which one_pass needs a compiled kernel; None does not check that.
    """
    if path == "snapshot":
        return quirks.refusal_of(type(base))
    if path == "pieces":
        return _why_not_pieces(base, group)
    if (method.whole if path == "one_pass" else method.before) is None:
        return method.needs_copy
    found = directions.find(base, group) if path == "direction" else updates.find(base, group)
    if isinstance(found, str):
        return found
    averages = isinstance(found, updates.Update) and found.averages  # no other path is left: even eager is better
    if path == "one_pass" and compiled_on is not None and not averages and kernels.name(*compiled_on) == "eager":
        backend, device = compiled_on
        why = (
            f"backend={backend!r}"
            if backend
            else kernels.obstacle("numba" if device.type == "cpu" else "triton", device)
        )
        return f"no compiled kernel runs on {device}: {why}"
    return None


def _why_not_pieces(base: Optimizer, group: Mapping[str, Any]) -> str | None:
    if _is_compiled(base.step):  # the groups are then set up for the compiled step, and pieces call the plain one
        return f"the step of {type(base).__name__} is compiled by torch.compile"
    return pieces.why_not(base, group)


def _is_compiled(step: object) -> bool:
    """True if torch.compile compiled ``step``. Functions that it must not compile (RAdam.step) have both marks."""
    return hasattr(step, "_torchdynamo_orig_callable") and not getattr(step, "_torchdynamo_disable", False)
