"""Four ways to carry a method out around the base's own step.

A path is made for some members and may be used for many steps, as long as a plan holds: `begin` is called before the
base's own step, `end` after it. The paths one_pass and pieces take parameters away from that step: until it ends,
``group["params"]`` is a list of those that are left, and then the former list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from cwd_wrap import kernels, notices
from cwd_wrap.bases import probe, quirks
from cwd_wrap.bases.journal import Journal
from cwd_wrap.draws import Draws, Stream
from cwd_wrap.kernels import Backend
from cwd_wrap.kernels.buckets import Bucket, Members, Of, Stepped, Sums, coming, kind, stepped, whole
from cwd_wrap.report import Part
from cwd_wrap.step.choice import PATHS, Method
from cwd_wrap.step.snapshot import Buffers, Copy, Gradients, copying
from cwd_wrap.tensors import (
    Shard,
    has_numbers,
    is_distributed,
    largest_shard,
    local_real_view,
    local_real_views,
    sparse_indices,
    totals,
)

PIECE = 64 << 20  # bytes
Counted: TypeAlias = tuple[Bucket, Tensor]
"""A bucket, and a row of `rules.sums` for each of its tensors."""
_SHAPE = attrgetter("shape")


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


def index_of(groups: Sequence[dict[str, Any]], i: int, group: dict[str, Any]) -> int:
    """The index of ``group`` among all ``groups``; it has index ``i`` in the base now."""
    if i < len(groups) and groups[i] is group:
        return i
    return next((k for k, each in enumerate(groups) if each is group), i)


@dataclass(eq=False)
class Call:
    """A call of the method for buckets of one kind."""

    act: Callable[[Backend, Any, bool], Sums]
    backend: Backend
    buckets: list[Bucket]
    decays: bool
    unchanged: Callable[[], bool] | None
    """Says whether the tensors have the types and sizes that they had when the call was made; None if it must be made
    anew."""

    def holds(self) -> bool:
        """True if the call can be made again, with the current gradients and numbers."""
        if self.unchanged is None:
            return False
        for bucket in self.buckets:
            if not bucket.renew():
                return False
        return self.unchanged()


@dataclass(eq=False)
class Work:
    """What the paths of a plan share."""

    base: Optimizer
    method: Method
    backend: str | None
    buffers: Buffers
    gradients: Gradients
    stream: Stream
    journal: Journal
    count: bool
    """True if the step is reported to an observer."""
    groups: Sequence[dict[str, Any]]
    """All param groups. The base may have only one of them at a time (DeepSpeed steps so)."""
    parts: list[Part] = field(default_factory=list)
    """What each path did, if ``count``."""

    def on(self, device: torch.device) -> Backend:
        """The backend that carries the method out on ``device``."""
        return kernels.choose(self.backend, device)

    def copy_on(self, device: torch.device) -> Copy:
        """The function that copies weights on ``device``."""
        return self.on(device).copy

    def calls(self, act: Callable[[Backend, Any, bool], Sums], buckets: Sequence[Bucket]) -> list[Call]:
        """One call of ``act`` for all buckets of one kind."""
        alike: dict[Any, list[Bucket]] = {}
        for bucket in buckets:
            _check(self.base, bucket)
            alike.setdefault((kind(bucket), self.method.has_work(bucket.eta_lam)), []).append(bucket)
        calls = []
        for (_, decays), some in alike.items():
            backend = self.on(some[0].w[0].device)
            keeps = not self.count and all(bucket.draws is None for bucket in some)
            calls.append(Call(act, backend, some, decays, backend.watch(some) if keeps else None))
        return calls

    def carry_out(self, calls: Sequence[Call]) -> list[Counted]:
        """Make the calls. Returns the sums of the buckets that decay, if ``count``."""
        counted: list[Counted] = []
        for call in calls:
            sums = call.act(call.backend, call.buckets, self.count and call.decays)
            if sums is not None:
                of_buckets = torch.split(sums, [len(bucket.w) for bucket in call.buckets])
                counted += zip(call.buckets, of_buckets, strict=True)
        return counted

    def report(self, path: str, counted: Sequence[Counted]) -> None:
        """Note what was done on a path."""
        for bucket, sums in counted:
            if bucket.of is not None:
                self.parts += bucket.of.parts(path, list(map(Tensor.numel, bucket.w)), sums)

    def note(self, members: Sequence[Members]) -> None:
        """Store the current gradients. A member without one does not step; `Gradients` keeps what the method reads."""
        for of_group in members:
            of_group.gradients = [p.grad for p in of_group.parameters]
            if self.method.reads_gradient:
                of_group.kept = self.gradients.keep(of_group.gradients)


def _check(base: Optimizer, bucket: Bucket) -> None:
    """Raise where shapes or devices differ: the kernels read by address, and the process would crash."""
    w, *others = bucket.columns
    shapes = list(map(_SHAPE, w))
    for column in others:
        if column[0].device != w[0].device:  # a column is on one device
            msg = (
                f"{type(base).__name__} has weights of shape {tuple(w[0].shape)} on {w[0].device}, but their "
                f"gradient or state on {column[0].device}: move them to one device"
            )
            raise ValueError(msg)
        if list(map(_SHAPE, column)) == shapes:
            continue
        for weight, other in zip(w, column, strict=True):
            if weight.shape != other.shape:
                msg = (
                    f"{type(base).__name__} has a weight of shape {tuple(weight.shape)} whose gradient or state has "
                    f"shape {tuple(other.shape)}: load a checkpoint of this model, and make a new optimizer when a "
                    "weight is replaced"
                )
                raise ValueError(msg)


# ---- the paths


class Path(Protocol):
    """A way to carry the method out on some members."""

    def __init__(self, work: Work, members: Sequence[Members]) -> None: ...

    @property
    def calls(self) -> list[Call]:
        """The calls that each step of a plan makes again."""

    def begin(self) -> None:
        """What comes before the base's own step."""

    def end(self) -> None:
        """What comes after it. The groups are as they were before `begin`."""


class OnePass:
    """Decay and step the members in one kernel, on the base's own state; the base steps the other parameters."""

    def __init__(self, work: Work, members: Sequence[Members]) -> None:
        self._work = work
        buckets = [bucket for of_group in members for bucket in whole(work.base, of_group)]
        self.calls = [] if work.method.whole is None else work.calls(work.method.whole, buckets)
        # All steps but torch's fused ones increment versions. Autograd reads them to notice a change between forward
        # and backward.
        own = [bucket for bucket in buckets if bucket.of is not None and not bucket.of.members.group.get("fused")]
        self._versioned = [w for bucket in own for w in bucket.w]
        self._left = _all_but(work.base, members)

    @property
    def leaves_nothing(self) -> bool:
        """True if the base's own step would find nothing to step."""
        return all(p.grad is None for left in self._left for p in left)

    def begin(self) -> None:
        """Decay and step."""
        self.act()
        _lend(self._work, self._left)

    def act(self) -> None:
        """Decay and step, and keep the base's groups as they are."""
        work = self._work
        counted = work.carry_out(self.calls)
        if work.count:
            work.report("one_pass", counted)
        for w in self._versioned:
            torch.autograd.graph.increment_version(w)

    def end(self) -> None:
        """Nothing is left to do."""


class Direction:
    """Decay the members before the base steps them, along the sign of its coming update.

    Only a monitor needs the size of the update. So a copy is kept during the step if the step is counted.
    """

    def __init__(self, work: Work, members: Sequence[Members]) -> None:
        self._work = work
        buckets = [bucket for of_group in members for bucket in coming(work.base, of_group)]
        self.calls = [] if work.method.before is None else work.calls(work.method.before, buckets)
        self._counted: list[tuple[Counted, list[Tensor]]] = []

    def begin(self) -> None:
        """Decay."""
        counted = self._work.carry_out(self.calls)
        self._counted = [(one, [w.clone() for w in one[0].w]) for one in counted]

    def end(self) -> None:
        """Add the size of the update to what is reported."""
        for (bucket, sums), x in self._counted:
            sums.add_(self._work.on(x[0].device).sums_of_step([Stepped(bucket.w, bucket.w, x, None, 0.0)]))
        self._work.report("direction", [one for one, _ in self._counted])
        self._counted = []


class Snapshot:
    """Copy the members, have the base step them, and compare.

    ``path``: "snapshot", or "pieces" for a piece, whose copies share a buffer with those of other pieces.
    """

    def __init__(self, work: Work, members: Sequence[Members], path: str = "snapshot") -> None:
        self._work = work
        self._members = members
        self._path = path
        parameters = [p for of_group in members for p in of_group.parameters]
        views = local_real_views(parameters)
        copies = work.buffers.piece(views) if path == "pieces" else work.buffers.whole(parameters, views)
        self._fill = copying(copies, views, work.copy_on)
        each = iter(copies)
        self._x = [[next(each) for _ in of_group.parameters] for of_group in members]
        self._asks = path == "snapshot" and _may_skip(work)
        self._can_ask = self._asks and all(_can_ask(p) for of_group in members for p in of_group.parameters)
        self._pushed = False  # is a gradient not 0?
        self._pushed_each: list[Tensor] = []  # the same of each dense gradient, where asking takes long
        self.calls: list[Call] = []

    def begin(self) -> None:
        """Copy the weights, and note the gradients."""
        for copy, to, source in self._fill:
            copy(to, source)
        self.note()

    def note(self) -> None:
        """Note the gradients. A base that skips the step may set them to 0."""
        self._work.note(self._members)
        if not self._asks:
            return
        gradients = [g for members in self._members for g in members.gradients if g is not None]
        if self._can_ask:
            self._pushed = _any_pushed(gradients)
        else:
            self._pushed_each = [local_real_view(g).any() for g in gradients if not g.is_sparse]

    def end(self) -> None:
        """Compare, and apply the method."""
        work = self._work
        if self._asks and self._was_skipped():
            return
        if not self.calls or not all(call.holds() for call in self.calls):  # the base may have replaced tensors
            self.calls = self._compare()
        if self._asks and not self._can_ask:
            self._mask_where_skipped()
        if work.method.reads_gradient:
            _check_gradients(work, self._members)
        work.report(self._path, work.carry_out(self.calls))
        for of_group, x in zip(self._members, self._x, strict=True):
            for i, g in enumerate(of_group.gradients):
                if g is not None and g.is_sparse and work.method.has_work(of_group.eta_lam):
                    indices = sparse_indices(g)
                    draws = _draws_of_rows(of_group, i, indices)
                    _finish_rows(work, Of(of_group, [i]), indices, x[i][indices], draws)

    def _was_skipped(self) -> bool:
        """True if no weight moved although a gradient is not 0. Then the base did not step: nothing decays.

        `_mask_where_skipped` does without an answer, where one takes long or differs between ranks.
        """
        if not self._can_ask:
            return False
        of_groups = list(zip(self._members, self._x, strict=True))
        for members, x in reversed(of_groups):  # a head moves in nearly every step, an embedding may not
            rows = zip(members.parameters, members.gradients, x, strict=True)
            for p, g, before in reversed(list(rows)):
                if g is not None and not torch.equal(local_real_view(p), before):
                    return False
        return _skipped(self._work, self._pushed)

    def _mask_where_skipped(self) -> None:
        """Make eta*lam 0 on a device where no weight moved although a gradient is not 0, without waiting to know.

        Ranks that share a weight find the same, and make the same calls, in which the method may count over them.
        """
        rows = [
            (p, before)
            for members, x in zip(self._members, self._x, strict=True)
            for p, g, before in zip(members.parameters, members.gradients, x, strict=True)
            if g is not None and not g.is_sparse
        ]
        steps = {}
        for device in dict.fromkeys(p.device for p, *_ in rows):  # in one order on all ranks: `totals` communicates
            here = [row for row in rows if row[0].device == device]
            moved = torch.stack([(local_real_view(p) != before).any() for p, before in here])
            pushed = torch.stack([g for (p, _), g in zip(rows, self._pushed_each, strict=True) if p.device == device])
            found = totals([p for p, *_ in here], torch.stack([moved, pushed], dim=1).float()).any(0)
            steps[device] = found[0] | ~found[1]
        for bucket in [bucket for call in self.calls for bucket in call.buckets]:
            bucket.eta_lam = steps[bucket.w[0].device] * bucket.eta_lam

    def _compare(self) -> list[Call]:
        work = self._work
        buckets = [
            bucket
            for of_group, x in zip(self._members, self._x, strict=True)
            if work.method.has_work(of_group.eta_lam)
            for bucket in stepped(of_group, x, quirks.maximizes(work.base, of_group.group))
        ]
        return work.calls(work.method.after, buckets)


class Pieces:
    """Have the base step the members piece by piece, comparing each with a copy; then the parameters that are left.

    One piece for all is stepped by the base's own step, as on the path snapshot.
    """

    def __init__(self, work: Work, members: Sequence[Members]) -> None:
        self._work = work
        self._members = members
        self._only = Snapshot(work, members, "pieces") if len(list(_cut(members))) == 1 else None

    @property
    def calls(self) -> list[Call]:
        """Those of the only piece."""
        return [] if self._only is None else self._only.calls

    def begin(self) -> None:
        """Step the pieces, or copy the only one."""
        if self._only is not None:
            self._only.begin()
            return
        work = self._work
        step = unhooked_step(work.base)
        for members in _cut(self._members):
            piece = Snapshot(work, members, "pieces")
            before = len(work.journal)
            _lend(work, _only(work.base, members))
            piece.begin()
            step()
            work.journal.undo(before)
            piece.end()
        _lend(work, _all_but(work.base, self._members))

    def end(self) -> None:
        """Compare the only piece."""
        if self._only is not None:
            self._only.end()


class Rows:
    """Copy only the rows that the members' sparse gradients touch, have the base step, and compare."""

    def __init__(self, work: Work, members: Sequence[Members]) -> None:
        self._work = work
        self._members = members
        self.calls: list[Call] = []
        self._before: list[tuple[Of, tuple[Tensor, ...], Tensor, Draws | None]] = []
        parameters = [p for of_group in members for p in of_group.parameters]
        self._asks = _may_skip(work) and all(map(_can_ask, parameters))
        self._pushed = False

    def begin(self) -> None:
        """Copy the rows."""
        self._pushed = self._asks and _any_pushed([cast("Tensor", g) for some in self._members for g in some.gradients])
        for of_group in self._members:
            for i, (p, g) in enumerate(zip(of_group.parameters, of_group.gradients, strict=True)):
                indices = sparse_indices(cast("Tensor", g))
                draws = _draws_of_rows(of_group, i, indices)
                self._before.append((Of(of_group, [i]), indices, local_real_view(p)[indices], draws))

    def end(self) -> None:
        """Compare the rows."""
        parameters = [of.members.parameters[of.rows[0]] for of, *_ in self._before]
        moved = zip(parameters, self._before, strict=True)
        if (
            self._asks
            and all(torch.equal(local_real_view(p)[at], x) for p, (_, at, x, _) in moved)
            and _skipped(self._work, self._pushed)
        ):
            return
        for row in self._before:
            _finish_rows(self._work, *row)


NAMED: Mapping[str, type[OnePass | Direction | Pieces | Snapshot]] = dict(
    zip(PATHS, (OnePass, Direction, Pieces, Snapshot), strict=True)
)
ORDER = (Rows, Snapshot, Direction, OnePass, Pieces)
"""The order in which paths begin. Those that shorten the base's lists of parameters come last."""


# ---- what the base steps


def _lend(work: Work, lists: Sequence[list[Tensor]]) -> None:
    """Have the base's groups hold ``lists`` as their parameters, until the journal is undone."""
    for group, parameters in zip(work.base.param_groups, lists, strict=True):
        work.journal.put(group, "params", list(parameters))


def _only(base: Optimizer, members: Sequence[Members]) -> list[list[Tensor]]:
    of_group = {id(some.group): some.parameters for some in members}
    return [of_group.get(id(group), []) for group in base.param_groups]


def _all_but(base: Optimizer, members: Sequence[Members]) -> list[list[Tensor]]:
    taken: dict[int, set[int]] = {}
    for some in members:
        taken.setdefault(id(some.group), set()).update(map(id, some.parameters))

    def left(group: Mapping[str, Any]) -> list[Tensor]:
        parameters, of_group = group["params"], taken.get(id(group), set())
        ids = list(map(id, parameters))
        twice = len(set(ids)) != len(ids)
        if not twice and of_group.issuperset(ids):
            return []
        # torch steps a parameter as often as it is listed, in one group or in several: the base makes the other steps.
        return [p for i, p in enumerate(parameters) if ids[i] not in of_group or (twice and ids[i] in ids[:i])]

    return [left(group) for group in base.param_groups]


def unhooked_step(base: Optimizer) -> Callable[..., Any]:
    """The base's own step without its hooks. Around pieces they fire once."""
    own = type(base).step
    while getattr(own, "hooked", False):  # torch wraps a step once, and dynamo may wrap that again
        own = own.__wrapped__  # type: ignore[attr-defined]
    return partial(own, base)


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
    """Apply the method to the rows ``indices`` of one parameter after the step."""
    p = of.members.parameters[of.rows[0]]
    w = local_real_view(p)
    touched = w[indices]
    bucket = Stepped([p], [touched], [before], None, of.members.eta_lam, draws, of)
    work.report("rows", work.carry_out(work.calls(work.method.after, [bucket])))
    w[indices] = touched


def _may_skip(work: Work) -> bool:
    """True if the base may skip steps by itself: no table vouches for it."""
    return not probe.is_vouched(work.base)


def _can_ask(p: Tensor) -> bool:
    """True if reading the tensor waits for no device, and every rank reads the same.

    A tensor of a mode that computes no values cannot be read.
    """
    return p.device.type == "cpu" and has_numbers(p) and not is_distributed(p)


def _any_pushed(gradients: Sequence[Tensor]) -> bool:
    """True if a gradient is not 0. Mostly the first few numbers of one show it."""
    values = [g.coalesce().values() if g.is_sparse else local_real_view(g) for g in reversed(gradients)]
    corners = (value[(slice(4),) * value.ndim] for value in values)
    return any(bool(value.any()) for some in (corners, values) for value in some)


def _skipped(work: Work, pushed: bool) -> bool:
    """True if a gradient of a step that moved no weight was not 0 (``pushed``). Says so once."""
    if not pushed:
        return False
    name = type(work.base).__name__
    notices.warn_once(
        work.base,
        "skipped",
        -1,
        f"a step of {name} moved no weight although its gradients are not 0. It was taken for one that {name} skips, "
        f"so {work.method.name} did not decay. If {name} skips steps or accumulates gradients, wrap the optimizer "
        "inside it. bfloat16 and float16 weights whose every update is rounded away look the same: keep float32",
    )
    return True


def _check_gradients(work: Work, members: Sequence[Members]) -> None:
    kept = [k for some in members for k in some.kept if k is not None]
    now = [p.grad for some in members for p, k in zip(some.parameters, some.kept, strict=True) if k is not None]
    if work.gradients.check(kept, now):
        notices.warn(
            f"{type(work.base).__name__} modified gradients in place, so this step used modified ones. "
            "They will be copied from the next step on"
        )
