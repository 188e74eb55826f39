"""Four ways to carry a rule out around the base's own step, and the choice between them for each param group.

A path is a context manager, and its ``yield`` is the base's own step. What the base is handed is what it steps: for
the time of its own code ``group["params"]`` holds the parameters that are left to it, and afterwards the list that it
held before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import directions, kernels, notices, pieces, quirks, updates
from cwd_wrap.buckets import Bucket, Coming, Count, Stepped, Whole, kind
from cwd_wrap.kernels import Backend
from cwd_wrap.snapshot import Buffers, Copy, Gradients, Kept
from cwd_wrap.tensors import companion, companions, local_real_view, local_real_views, sparse_indices

PATHS = ("one_pass", "direction", "pieces", "snapshot")
PIECE = 64 << 20  # bytes

_NO_STATE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rule:
    """What a method is, for the paths that carry it out. The bool of each function asks for a count."""

    name: str
    """The method's, for the texts of errors."""
    after: Callable[[Backend, Sequence[Stepped], bool], Count]
    """The rule on weights that have been stepped."""
    needs_copy: str | None = None
    """Why it needs the weights from before the step; None if the sign of the update is enough."""
    before: Callable[[Backend, Sequence[Coming], bool], Count] | None = None
    """The rule on weights that are about to be stepped."""
    whole: Callable[[Backend, Sequence[Whole], bool], Count] | None = None
    """The rule and the base's update at once."""
    reads_gradient: bool = False
    """Does ``after`` need the gradients?"""
    every_group: bool = False
    """Does it act on groups that do not decay too?"""

    def has_work(self, eta_lam: float | Tensor) -> bool:
        """Does a group that decays by ``eta_lam`` have anything to do?"""
        return self.every_group or isinstance(eta_lam, Tensor) or eta_lam != 0


class Choice(NamedTuple):
    """The path of a param group, and why it is not another."""

    path: str
    reason: str


def choose(rule: Rule, base: Optimizer, group: Mapping[str, Any], backend: str | None, forced: str | None) -> Choice:
    """The first of `PATHS` that ``group`` can take, or the ``forced`` one: ValueError if it cannot be taken."""
    if forced is not None:
        reason = _why_not(forced, rule, base, group, None)
        if reason is not None:
            msg = (
                f"path={forced!r} cannot be taken by {type(base).__name__}: {reason}. "
                "Pass path=None, and the library chooses one that can"
            )
            raise ValueError(msg)
        return Choice(forced, f"path={forced!r} was passed")
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    reasons: list[str] = []
    for path in PATHS[:-1]:
        reason = _why_not(path, rule, base, group, (backend, device))
        if reason is None:
            return Choice(path, "; ".join(reasons) or "a compiled kernel makes the whole step")
        if reason not in reasons:
            reasons.append(reason)
    return Choice("snapshot", "; ".join(reasons))


def steps_without_closure(base: Optimizer) -> bool:
    """Is ``base`` known to evaluate its closure once, before anything else?"""
    name = f"{type(base).__module__}.{type(base).__qualname__}"
    return name in directions.TABLE or name in pieces.TABLE


def _why_not(
    path: str,
    rule: Rule,
    base: Optimizer,
    group: Mapping[str, Any],
    compiled_on: tuple[str | None, torch.device] | None,
) -> str | None:
    """Why ``group`` cannot take ``path``; None if it can. One pass needs a compiled kernel ``compiled_on`` a device."""
    if path == "snapshot":
        return None
    if path == "pieces":
        compiled = hasattr(base.step, "_torchdynamo_orig_callable")  # the groups are set up for compiled code only
        return f"the step of {type(base).__name__} is compiled" if compiled else pieces.why_not(base, group)
    if rule.needs_copy is not None:
        return rule.needs_copy
    found = directions.find(base, group) if path == "direction" else updates.find(base, group)
    if isinstance(found, str):
        return found
    if path == "one_pass" and compiled_on is not None and kernels.name(*compiled_on) == "eager":
        backend, device = compiled_on
        why = (
            f"backend={backend!r}"
            if backend
            else kernels.obstacle("numba" if device.type == "cpu" else "triton", device)
        )
        return f"no compiled kernel runs on {device}: {why}"
    return None


@dataclass
class Members:
    """Parameters of one param group that take the same path in this step."""

    group: dict[str, Any]
    eta_lam: float | Tensor
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    """As they are just before the step."""
    kept: list[Kept | None] = field(default_factory=list)
    """The gradients for a rule that reads them after the step."""

    def only(self, rows: Sequence[int]) -> "Members":
        """The members at ``rows``."""
        return replace(
            self,
            parameters=[self.parameters[i] for i in rows],
            gradients=[self.gradients[i] for i in rows],
        )


@dataclass
class Work:
    """What the paths of one step share."""

    base: Optimizer
    rule: Rule
    backend: str | None
    buffers: Buffers
    gradients: Gradients
    count: bool
    active: Count = 0
    """How many weights were decayed, if counted."""
    total: int = 0
    """How many could have been."""

    def on(self, device: torch.device) -> Backend:
        """The backend that carries the rule out on ``device``."""
        return kernels.choose(self.backend, device)

    def copy_on(self, device: torch.device) -> Copy:
        """The function that copies weights on ``device``."""
        return self.on(device).copy

    def carry_out(self, act: Callable[[Backend, Any, bool], Count], buckets: Sequence[Bucket]) -> None:
        """Call ``act`` once for all buckets of a kind."""
        alike: dict[Any, list[Bucket]] = {}
        for bucket in buckets:
            alike.setdefault(kind(bucket), []).append(bucket)
        for some in alike.values():
            self.active = self.active + act(self.on(some[0].w[0].device), some, self.count)
            if self.count:
                self.total += sum(sum(map(Tensor.numel, bucket.w)) for bucket in some)

    def note(self, members: Sequence[Members]) -> None:
        """Note the gradients as they are now: who takes part in the step, and along which gradient."""
        for of_group in members:
            of_group.gradients = [p.grad for p in of_group.parameters]
            if self.rule.reads_gradient:
                of_group.kept = self.gradients.keep(of_group.gradients)


# ---- the paths


@contextmanager
def one_pass(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Decay the members and make the base's update of them, on the base's own state; the base steps what is left."""
    if work.rule.whole is not None:
        work.carry_out(work.rule.whole, [bucket for of_group in members for bucket in _whole(work.base, of_group)])
    with _lent_all_but(work.base, members):
        yield


@contextmanager
def direction(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Decay the members before the base steps them, along the sign of its coming update."""
    if work.rule.before is not None:
        work.carry_out(work.rule.before, [bucket for of_group in members for bucket in _coming(work.base, of_group)])
    yield


@contextmanager
def in_pieces(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Have the base step the members piece by piece, each compared with a copy of the piece; then what is left."""
    step = _unhooked_step(work.base)
    for piece in _cut(members):
        with _lent_only(work.base, piece), snapshot(work, piece, work.buffers.take_piece):
            step()
    with _lent_all_but(work.base, members):
        yield


@contextmanager
def snapshot(work: Work, members: Sequence[Members], take: Callable[..., list[Tensor]] | None = None) -> Iterator[None]:
    """Copy the members, have the base step them, and compare."""
    parameters = [p for of_group in members for p in of_group.parameters]
    views = local_real_views(parameters)
    if take is None:
        copies = iter(work.buffers.take(parameters, views, work.copy_on))
    else:
        copies = iter(take(views, work.copy_on))
    before = [[next(copies) for _ in of_group.parameters] for of_group in members]
    work.note(members)
    yield
    buckets: list[Stepped] = []
    for of_group, x in zip(members, before, strict=True):
        if work.rule.has_work(of_group.eta_lam):
            buckets += _stepped(work, of_group, x)
    if work.rule.reads_gradient:
        _check_gradients(work, members)
    work.carry_out(work.rule.after, buckets)
    for of_group, x in zip(members, before, strict=True):
        for p, copy, g in zip(of_group.parameters, x, of_group.gradients, strict=True):
            if g is not None and g.is_sparse and work.rule.has_work(of_group.eta_lam):
                indices = sparse_indices(g)
                _finish_rows(work, p, indices, copy[indices], of_group.eta_lam)


@contextmanager
def rows(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """For members with sparse gradients: copy the rows that those touch, have the base step, and compare."""
    before = []
    for of_group in members:
        for p, g in zip(of_group.parameters, of_group.gradients, strict=True):
            indices = sparse_indices(cast("Tensor", g))
            before.append((p, indices, local_real_view(p)[indices], of_group.eta_lam))
    yield
    for row in before:
        _finish_rows(work, *row)


# ---- what the base steps


@contextmanager
def _lent(base: Optimizer, lists: Sequence[list[Tensor]]) -> Iterator[None]:
    """For the time of the base's own code, its groups hold ``lists``; afterwards the lists that they held before."""
    groups = list(base.param_groups)
    whole = [group["params"] for group in groups]
    try:
        for group, parameters in zip(groups, lists, strict=True):
            group["params"] = parameters
        yield
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters


def _lent_only(base: Optimizer, members: Sequence[Members]) -> Any:
    of_group = {id(some.group): some.parameters for some in members}
    return _lent(base, [of_group.get(id(group), []) for group in base.param_groups])


def _lent_all_but(base: Optimizer, members: Sequence[Members]) -> Any:
    taken = {id(p) for some in members for p in some.parameters}

    def left(p: Tensor) -> bool:
        if id(p) not in taken:
            return True
        taken.remove(id(p))  # torch steps a parameter that is listed twice twice: the second time is left to the base
        return False

    return _lent(base, [list(filter(left, group["params"])) for group in base.param_groups])


def _unhooked_step(base: Optimizer) -> Callable[[], object]:
    """The base's own step without its hooks: those belong to the whole step."""
    step = type(base).step
    own = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return lambda: own(base)


def _cut(members: Sequence[Members]) -> Iterator[list[Members]]:
    """The members in pieces of at most `PIECE` bytes, or of one larger tensor, across groups."""
    piece: list[Members] = []
    filled = 0
    for of_group in members:
        start = 0
        for i, p in enumerate(of_group.parameters):
            local = local_real_view(p)
            size = local.numel() * local.element_size()
            if filled and filled + size > PIECE:
                piece.append(of_group.only(range(start, i)))
                yield [some for some in piece if some.parameters]
                piece, filled, start = [], 0, i
            filled += size
        piece.append(of_group.only(range(start, len(of_group.parameters))))
    if piece := [some for some in piece if some.parameters]:
        yield piece


# ---- buckets


def _split(columns: Sequence[Sequence[Tensor] | None], numbers: Sequence[object] | None = None) -> list[list[int]]:
    """Rows whose entries have the same device and types, and the same of ``numbers``."""
    present = [column for column in columns if column is not None]
    parts: list[Sequence[object]] = [[t.dtype for t in column] for column in present]
    parts.append([t.device for t in present[0]])
    if numbers is not None:
        parts.append(numbers)
    if all(part.count(part[0]) == len(part) for part in parts):
        return [list(range(len(present[0])))]
    keys = list(zip(*parts, strict=True))
    kinds = dict.fromkeys(keys)
    return [[i for i, key in enumerate(keys) if key == one] for one in kinds]


def _coming(base: Optimizer, members: Members) -> Iterator[Coming]:
    found = cast("directions.Direction", directions.find(base, members.group))
    states = [base.state.get(p, _NO_STATE) for p in members.parameters]
    momenta = [None] * len(states) if found.state_key is None else [state.get(found.state_key) for state in states]
    for with_momentum in (True, False):
        chosen = [i for i, m in enumerate(momenta) if (m is not None) == with_momentum]
        if not chosen:
            continue
        every = len(chosen) == len(states)
        p = members.parameters if every else [members.parameters[i] for i in chosen]
        g = cast("list[Tensor]", members.gradients if every else [members.gradients[i] for i in chosen])
        m = cast("list[Tensor]", momenta if every else [momenta[i] for i in chosen]) if with_momentum else None
        w = local_real_views(p)
        along = companions(g, p, w)
        average = None if m is None else companions(m, p, w)
        numbers = [found.numbers(states[i]) for i in chosen] if with_momentum and found.varying else None
        for some in _split((w, along, average), numbers):
            a, b = numbers[some[0]] if numbers else found.pair if with_momentum else (0.0, found.first)
            yield Coming(
                _at(w, some), _at(along, some), None if average is None else _at(average, some), a, b, members.eta_lam
            )


def _whole(base: Optimizer, members: Members) -> Iterator[Whole]:
    update = cast("updates.Update", updates.find(base, members.group))
    p = members.parameters
    states = [base.state[each] for each in p] if update.state_keys else []
    w = local_real_views(p)
    g = companions(cast("list[Tensor]", members.gradients), p, w)
    state = [companions([of_one[key] for of_one in states], p, w) for key in update.state_keys]
    steps = [of_one["step"] for of_one in states] if update.counts else []
    lr = members.group["lr"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    for some in _split((w, g, *state)):
        columns = tuple(_at(column, some) for column in state)
        counters = _at(steps, some) if update.counts else []
        yield Whole(_at(w, some), _at(g, some), columns, counters, update, lr, members.eta_lam)


def have_state(base: Optimizer, members: Members) -> tuple[Members, Members]:
    """The members that one pass can step, and the others: whose state the base has yet to make."""
    update = cast("updates.Update", updates.find(base, members.group))
    keys = (*update.state_keys, "step") if update.counts else update.state_keys
    states = [base.state.get(p, _NO_STATE) for p in members.parameters] if keys else []
    columns = [[state.get(key) for state in states] for key in keys]
    if all(isinstance(t, Tensor) for column in columns for t in column):
        return members, members.only([])
    ready = [i for i, row in enumerate(zip(*columns, strict=True)) if all(isinstance(t, Tensor) for t in row)]
    chosen = set(ready)
    return members.only(ready), members.only([i for i in range(len(states)) if i not in chosen])


def _stepped(work: Work, members: Members, x: Sequence[Tensor]) -> Iterator[Stepped]:
    took = [i for i, g in enumerate(members.gradients) if g is not None and not g.is_sparse]
    if not took:
        return
    p, x = _at(members.parameters, took), _at(x, took)
    w = local_real_views(p)
    g = None
    if work.rule.reads_gradient:
        climbs = quirks.maximizes(work.base, members.group)
        kept = [companion(cast("Kept", members.kept[i]).gradient, members.parameters[i]) for i in took]
        g = [-each for each in kept] if climbs else kept
    for some in _split((w, x, g)):
        yield Stepped(_at(p, some), _at(w, some), _at(x, some), None if g is None else _at(g, some), members.eta_lam)


def _at(column: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor]:
    return column if len(chosen) == len(column) else [column[i] for i in chosen]


def _finish_rows(
    work: Work, parameter: Tensor, indices: tuple[Tensor, ...], before: Tensor, eta_lam: float | Tensor
) -> None:
    w = local_real_view(parameter)
    touched = w[indices]
    work.carry_out(work.rule.after, [Stepped([parameter], [touched], [before], None, eta_lam)])
    w[indices] = touched


def _check_gradients(work: Work, members: Sequence[Members]) -> None:
    kept = [k for some in members for k in some.kept if k is not None]
    now = [p.grad for some in members for p, k in zip(some.parameters, some.kept, strict=True) if k is not None]
    if work.gradients.check(kept, now):
        notices.warn(
            f"{type(work.base).__name__} modified gradients in place, so this step used modified ones. "
            "They will be copied from the next step on"
        )
