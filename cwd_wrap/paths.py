"""Four ways to carry a rule out around the base's own step.

A path is a context manager; the base's own step runs at its ``yield``. The paths one_pass and pieces take parameters
away from that step: until it ends, ``group["params"]`` is a list of those that are left, and then the former list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from cwd_wrap import kernels, notices, quirks
from cwd_wrap.buckets import Bucket, Members, Of, Part, Stepped, Sums, coming, kind, stepped, whole
from cwd_wrap.choice import PATHS, Rule
from cwd_wrap.draws import Draws, Stream
from cwd_wrap.kernels import Backend
from cwd_wrap.snapshot import Buffers, Copy, Gradients
from cwd_wrap.tensors import Shard, largest_shard, local_real_view, local_real_views, sparse_indices
from cwd_wrap.updates import Lion

PIECE = 64 << 20  # bytes
Counted: TypeAlias = tuple[Bucket, Tensor]
"""A bucket, and a row of `rules.sums` for each of its tensors."""


def copied_bytes(whole: Sequence[Tensor], in_pieces: Sequence[Tensor]) -> int:
    """Bytes of the copies that the paths snapshot (``whole``) and pieces (``in_pieces``) make, on this rank."""

    def sizes(parameters: Sequence[Tensor]) -> list[int]:
        dense = [
            p for p in parameters if p.requires_grad and not is_lazy(p) and (p.grad is None or not p.grad.is_sparse)
        ]
        copied = {id(p): p for p in dense}
        return [view.numel() * view.element_size() for view in map(local_real_view, copied.values())]

    pieces_of = sizes(in_pieces)
    return sum(sizes(whole)) + min(sum(pieces_of), max([PIECE, *pieces_of]))


@dataclass
class Work:
    """What the paths of one step share."""

    base: Optimizer
    rule: Rule
    backend: str | None
    buffers: Buffers
    gradients: Gradients
    stream: Stream
    unchecked: bool
    """True at the first step of a new or loaded optimizer: the state may be another model's, so shapes are compared. At
    other steps only sizes are, which is quicker."""
    count: bool
    """True if the step is reported to an observer."""
    groups: Sequence[dict[str, Any]]
    """All param groups. The base may have only one of them at a time (DeepSpeed steps so)."""
    parts: list[Part] = field(default_factory=list)
    """What each path did, if ``count``."""

    def index(self, i: int, group: dict[str, Any]) -> int:
        """The index among all groups of ``group``, which has index ``i`` in the base now."""
        if i < len(self.groups) and self.groups[i] is group:
            return i
        return next((k for k, each in enumerate(self.groups) if each is group), i)

    def on(self, device: torch.device) -> Backend:
        """The backend that carries the rule out on ``device``."""
        return kernels.choose(self.backend, device)

    def copy_on(self, device: torch.device) -> Copy:
        """The function that copies weights on ``device``."""
        return self.on(device).copy

    def carry_out(self, act: Callable[[Backend, Any, bool], Sums], buckets: Sequence[Bucket]) -> list[Counted]:
        """Call ``act`` once for all buckets of one kind. Returns the sums of those that decay, if ``count``."""
        counted: list[Counted] = []
        alike: dict[Any, list[Bucket]] = {}
        for bucket in buckets:
            self._check(bucket)
        for bucket in buckets:
            alike.setdefault((kind(bucket), self.rule.has_work(bucket.eta_lam)), []).append(bucket)
        for (_, decays), some in alike.items():
            count = self.count and decays
            sums = act(self.on(some[0].w[0].device), some, count)
            if sums is not None:
                counted += zip(some, torch.split(sums, [len(bucket.w) for bucket in some]), strict=True)
        return counted

    def report(self, path: str, counted: Sequence[Counted]) -> None:
        """Note what was done on a path."""
        for bucket, sums in counted:
            if bucket.of is not None:
                self.parts += bucket.of.parts(path, list(map(Tensor.numel, bucket.w)), sums)

    def _check(self, bucket: Bucket) -> None:
        """Raise where sizes or devices differ: the kernels read by address, and the process would crash."""
        w, *others = bucket.columns
        sizes = list(map(Tensor.numel, w))
        for column in others:
            if column[0].device != w[0].device:  # a column is on one device
                msg = (
                    f"{type(self.base).__name__} has weights of shape {tuple(w[0].shape)} on {w[0].device}, but their "
                    f"gradient or state on {column[0].device}: move them to one device"
                )
                raise ValueError(msg)
            if list(map(Tensor.numel, column)) != sizes or self.unchecked:
                for weight, other in zip(w, column, strict=True):
                    _check_shapes(self.base, weight, other)

    def note(self, members: Sequence[Members]) -> None:
        """Store the current gradients. A member without one does not step; `Gradients` keeps what the rule reads."""
        for of_group in members:
            of_group.gradients = [p.grad for p in of_group.parameters]
            if self.rule.reads_gradient:
                of_group.kept = self.gradients.keep(of_group.gradients)


def _check_shapes(base: Optimizer, weight: Tensor, other: Tensor) -> None:
    if weight.shape != other.shape:
        msg = (
            f"{type(base).__name__} has a weight of shape {tuple(weight.shape)} whose gradient or state has shape "
            f"{tuple(other.shape)}: load a checkpoint of this model, and make a new optimizer when a weight is replaced"
        )
        raise ValueError(msg)


# ---- the paths

Path = Callable[[Work, Sequence[Members]], AbstractContextManager[None]]


@contextmanager
def one_pass(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Decay and step the members in one kernel, on the base's own state; the base steps the other parameters."""
    if work.rule.whole is not None:
        buckets = [bucket for of_group in members for bucket in whole(work.base, of_group)]
        work.report("one_pass", work.carry_out(work.rule.whole, buckets))
        for bucket in buckets:
            if isinstance(bucket.update, Lion):  # Lion's own step increments versions, torch's fused steps do not.
                for w in bucket.w:  # Autograd reads them to notice a change between forward and backward.
                    torch.autograd.graph.increment_version(w)
    with _lent_all_but(work.base, members):
        yield


@contextmanager
def direction(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Decay the members before the base steps them, along the sign of its coming update.

    Only a monitor needs the size of the update. So a copy is kept during the step if the step is counted.
    """
    counted: list[Counted] = []
    if work.rule.before is not None:
        buckets = [bucket for of_group in members for bucket in coming(work.base, of_group)]
        counted = work.carry_out(work.rule.before, buckets)
    before = [[w.clone() for w in bucket.w] for bucket, _ in counted]
    yield
    for (bucket, sums), x in zip(counted, before, strict=True):
        sums.add_(work.on(x[0].device).sums_of_step([Stepped(bucket.w, bucket.w, x, None, 0.0)]))
    work.report("direction", counted)


@contextmanager
def in_pieces(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Have the base step the members piece by piece, comparing each with a copy; then the parameters that are left."""
    step = _unhooked_step(work.base)
    for piece in _cut(members):
        with _lent_only(work.base, piece), snapshot(work, piece, work.buffers.take_piece):
            step()
    with _lent_all_but(work.base, members):
        yield


@contextmanager
def snapshot(work: Work, members: Sequence[Members], take: Callable[..., list[Tensor]] | None = None) -> Iterator[None]:
    """Copy the members, have the base step them, and compare. ``take`` makes the copies of a piece."""
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
            maximizes = quirks.maximizes(work.base, of_group.group)
            buckets += stepped(of_group, x, maximizes)
    if work.rule.reads_gradient:
        _check_gradients(work, members)
    work.report("snapshot" if take is None else "pieces", work.carry_out(work.rule.after, buckets))
    for of_group, x in zip(members, before, strict=True):
        for i, (copy, g) in enumerate(zip(x, of_group.gradients, strict=True)):
            if g is not None and g.is_sparse and work.rule.has_work(of_group.eta_lam):
                indices = sparse_indices(g)
                _finish_rows(work, Of(of_group, [i]), indices, copy[indices], _draws_of_rows(of_group, i, indices))


@contextmanager
def rows(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Copy only the rows that the members' sparse gradients touch, have the base step, and compare."""
    before = []
    for of_group in members:
        for i, (p, g) in enumerate(zip(of_group.parameters, of_group.gradients, strict=True)):
            indices = sparse_indices(cast("Tensor", g))
            draws = _draws_of_rows(of_group, i, indices)
            before.append((Of(of_group, [i]), indices, local_real_view(p)[indices], draws))
    yield
    for row in before:
        _finish_rows(work, *row)


NAMED: Mapping[str, Path] = dict(zip(PATHS, (one_pass, direction, in_pieces, snapshot), strict=True))
ORDER = (rows, snapshot, direction, one_pass, in_pieces)
"""The order in which paths are entered. Those that shorten the base's lists of parameters come last."""


# ---- what the base steps


@contextmanager
def _lent(base: Optimizer, lists: Sequence[list[Tensor]]) -> Iterator[None]:
    """Inside this context the base's groups hold ``lists`` as their parameters; afterwards their former lists."""
    groups = list(base.param_groups)
    whole = [group["params"] for group in groups]
    try:
        for group, parameters in zip(groups, lists, strict=True):
            group["params"] = parameters
        yield
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters


def _lent_only(base: Optimizer, members: Sequence[Members]) -> AbstractContextManager[None]:
    of_group = {id(some.group): some.parameters for some in members}
    return _lent(base, [of_group.get(id(group), []) for group in base.param_groups])


def _lent_all_but(base: Optimizer, members: Sequence[Members]) -> AbstractContextManager[None]:
    taken = {id(p) for some in members for p in some.parameters}

    def left(parameters: list[Tensor]) -> list[Tensor]:
        ids = list(map(id, parameters))
        twice = len(set(ids)) != len(ids)
        if not twice and taken.issuperset(ids):
            return []
        # If a parameter is listed twice, torch steps it twice: the second time is left to the base.
        return [p for i, p in enumerate(parameters) if ids[i] not in taken or (twice and ids[i] in ids[:i])]

    return _lent(base, [left(group["params"]) for group in base.param_groups])


def _unhooked_step(base: Optimizer) -> Callable[[], object]:
    """The base's own step without its hooks, which fire once around all pieces."""
    own = type(base).step
    while getattr(own, "hooked", False):  # torch wraps a step once, and dynamo may wrap that again
        own = own.__wrapped__  # type: ignore[attr-defined]
    return lambda: own(base)


def _cut(members: Sequence[Members]) -> Iterator[list[Members]]:
    """The members in pieces of at most `PIECE` bytes, or of one larger tensor, across groups.

    All ranks make the same pieces, whatever shards they hold, because rules and optimizers communicate in a piece.
    """
    piece: list[Members] = []
    filled = 0
    for of_group in members:
        start = 0
        for i, p in enumerate(of_group.parameters):
            size = largest_shard(p)
            if filled and filled + size > PIECE:
                piece.append(of_group.only(range(start, i)))
                yield [some for some in piece if some.parameters]
                piece, filled, start = [], 0, i
            filled += size
        piece.append(of_group.only(range(start, len(of_group.parameters))))
    if piece := [some for some in piece if some.parameters]:
        yield piece


# ---- the ends of paths


def _draws_of_rows(members: Members, i: int, indices: tuple[Tensor, ...]) -> Draws | None:
    """The random numbers for the rows ``indices`` of member ``i``, whose places are counted from 0 at the first row."""
    draws = members.draws([i])
    numel = local_real_view(members.parameters[i])[indices].numel()
    return None if draws is None else draws._replace(shards=[Shard(0, numel, numel, numel)])


def _finish_rows(work: Work, of: Of, indices: tuple[Tensor, ...], before: Tensor, draws: Draws | None) -> None:
    """Apply the rule to the rows ``indices`` of one parameter after the step."""
    p = of.members.parameters[of.rows[0]]
    w = local_real_view(p)
    touched = w[indices]
    bucket = Stepped([p], [touched], [before], None, of.members.eta_lam, draws, of)
    work.report("rows", work.carry_out(work.rule.after, [bucket]))
    w[indices] = touched


def _check_gradients(work: Work, members: Sequence[Members]) -> None:
    kept = [k for some in members for k in some.kept if k is not None]
    now = [p.grad for some in members for p, k in zip(some.parameters, some.kept, strict=True) if k is not None]
    if work.gradients.check(kept, now):
        notices.warn(
            f"{type(work.base).__name__} modified gradients in place, so this step used modified ones. "
            "They will be copied from the next step on"
        )
