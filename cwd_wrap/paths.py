"""Four ways to carry a rule out around the base's own step.

A path is a context manager, and its ``yield`` is the base's own step. What the base is handed is what it steps: for
the time of its own code ``group["params"]`` holds the parameters that are left to it, and afterwards the list that it
held before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
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
    """Bytes of the copies that the paths snapshot and pieces make of these parameters, on this rank."""

    def sizes(parameters: Sequence[Tensor]) -> list[int]:
        copied = {id(p): p for p in parameters if p.requires_grad and (p.grad is None or not p.grad.is_sparse)}
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
    """May the state be that of another model? Then shapes are compared; sizes always are, which is quicker."""
    count: bool
    """Is the step reported to an observer?"""
    groups: Sequence[dict[str, Any]]
    """All param groups: engines step with one of them at a time."""
    parts: list[Part] = field(default_factory=list)
    """What was done, if counted."""

    def index(self, i: int, group: dict[str, Any]) -> int:
        """The index among all groups of the one that now has index ``i``."""
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
        """Call ``act`` once for all buckets of a kind; return the sums of those that decay, if they are counted."""
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
        """The kernels follow addresses: a tensor of another size or on another device would end the process."""
        w, *others = bucket.columns
        sizes = list(map(Tensor.numel, w))
        for column in others:
            if column[0].device != w[0].device:  # all of a column are on one
                msg = (
                    f"{type(self.base).__name__} has weights of shape {tuple(w[0].shape)} on {w[0].device}, but their "
                    f"gradient or state on {column[0].device}: move them to one device"
                )
                raise ValueError(msg)
            if list(map(Tensor.numel, column)) != sizes or self.unchecked:
                for weight, other in zip(w, column, strict=True):
                    _check_shapes(self.base, weight, other)

    def note(self, members: Sequence[Members]) -> None:
        """Note the gradients as they are now: who takes part in the step, and along which gradient."""
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
    """Decay the members and make the base's update of them, on the base's own state; the base steps what is left."""
    if work.rule.whole is not None:
        buckets = [bucket for of_group in members for bucket in whole(work.base, of_group)]
        work.report("one_pass", work.carry_out(work.rule.whole, buckets))
        for bucket in buckets:
            if isinstance(bucket.update, Lion):  # as its own step does, and torch's fused ones do not
                for w in bucket.w:  # so that autograd notices weights that changed between forward and backward
                    torch.autograd.graph.increment_version(w)
    with _lent_all_but(work.base, members):
        yield


@contextmanager
def direction(work: Work, members: Sequence[Members]) -> Iterator[None]:
    """Decay the members before the base steps them, along the sign of its coming update.

    How large the update is, is known only to who keeps a copy: those who count do.
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
    """For members with sparse gradients: copy the rows that those touch, have the base step, and compare."""
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
"""In which paths are entered. What lends the base fewer parameters comes last."""


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
        # torch steps a parameter that is listed twice twice: the second time is left to the base.
        return [p for i, p in enumerate(parameters) if ids[i] not in taken or (twice and ids[i] in ids[:i])]

    return _lent(base, [left(group["params"]) for group in base.param_groups])


def _unhooked_step(base: Optimizer) -> Callable[[], object]:
    """The base's own step without its hooks: those belong to the whole step."""
    own = type(base).step
    while getattr(own, "hooked", False):  # by torch, and once more where dynamo has put a mark around that
        own = own.__wrapped__  # type: ignore[attr-defined]
    return lambda: own(base)


def _cut(members: Sequence[Members]) -> Iterator[list[Members]]:
    """The members in pieces of at most `PIECE` bytes, or of one larger tensor, across groups.

    The same pieces on all ranks, whatever shards they hold: rules and optimizers communicate in a piece.
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
    """Rows are numbered as they come: the first place of the first is 0."""
    draws = members.draws([i])
    numel = local_real_view(members.parameters[i])[indices].numel()
    return None if draws is None else draws._replace(shards=[Shard(0, numel, numel, numel)])


def _finish_rows(work: Work, of: Of, indices: tuple[Tensor, ...], before: Tensor, draws: Draws | None) -> None:
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
