"""Containers that the paths pass to the kernels: tensors of one param group on one device, in columns of one type each.

The columns of a bucket run in parallel, one entry for each tensor. ``eta_lam`` is the share that a step takes off a
weight where the mask is 1. ``draws`` are the random numbers of rules that draw some; a kernel that gets them rounds
16-bit tensors stochastically. ``of`` says which parameters the tensors belong to, ``held`` which columns are the base's
state. `coming`, `whole` and `stepped` fill the buckets from the `Members` of a param group.

A plan uses its buckets for many steps: `renew` takes over the gradients and numbers of the next one.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases import directions, updates
from cwd_wrap.bases.updates import Update
from cwd_wrap.draws import Draws, Stream
from cwd_wrap.graphs import capturing
from cwd_wrap.report import Part
from cwd_wrap.tensors import companion, companions, held_by, laid_out_otherwise, local_real_views, shard

_NO_STATE: Mapping[str, Any] = {}

Sums: TypeAlias = Tensor | None
"""`rules.sums` of each tensor, of shape (tensors, 5); None unless they were asked for."""


class Kept(NamedTuple):
    """A gradient from just before the step, or a copy of it, and the version of that tensor then."""

    gradient: Tensor
    version: int


class Held(NamedTuple):
    """Columns that are entries of the base's state."""

    states: Sequence[Mapping[str, Any]] = ()
    """The state of each parameter."""
    columns: Sequence[tuple[str, Sequence[Tensor | None]]] = ()
    """A key of the state, and the entries under it; None where there is none."""

    def is_same(self) -> bool:
        """True if the state still has these very tensors."""
        same = True
        for key, column in self.columns:
            same = same and all(map(is_, [state.get(key) for state in self.states], column))
        return same


_NOT_HELD = Held()


@dataclass(eq=False)
class Coming:
    """Weights ``w`` before a step whose update has the sign of a*m + b*g; ``m`` is None without momentum."""

    w: Sequence[Tensor]
    g: Sequence[Tensor]
    m: Sequence[Tensor] | None
    a: float
    b: float
    eta_lam: float | Tensor
    draws: Draws | None = None
    of: "Of | None" = None
    held: Held = _NOT_HELD
    varies: bool = False
    """True if ``a`` and ``b`` are others in each step."""
    kept: object = None
    """What the backend keeps for a call that begins with this bucket."""

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.g) if self.m is None else (self.w, self.m, self.g)

    def renew(self) -> bool:
        """Take over the members' gradients and decay. Returns False if the state has other tensors."""
        of = cast("Of", self.of)
        self.eta_lam, self.g = of.members.eta_lam, of.gradients(self.w)
        return not self.varies and self.held.is_same()

    def let_go(self) -> None:
        """Let go of the gradients."""
        cast("list[Tensor]", self.g).clear()

    def take_coefficients(self, base: Optimizer) -> bool:
        """Take over the group's coefficients. Returns False if they make another direction."""
        of = cast("Of", self.of)
        found = directions.find(base, of.members.group)
        if isinstance(found, str) or found.varying is not None:
            return False
        self.a, self.b = (0.0, found.first) if self.m is None else found.pair
        return [key for key, _ in self.held.columns] == ([] if found.state_key is None else [found.state_key])


@dataclass(eq=False)
class Stepped:
    """Weights ``w`` after the base's step, and ``x``, the same weights before it.

    ``p``: the parameters that ``w`` are views or shards of. ``g``: the gradients (negated where the step goes up the
    gradient), for rules that read them.
    """

    p: Sequence[Tensor]
    w: Sequence[Tensor]
    x: Sequence[Tensor]
    g: Sequence[Tensor] | None
    eta_lam: float | Tensor
    draws: Draws | None = None
    of: "Of | None" = None
    uphill: bool = False
    """True if the step goes up the gradient."""
    kept: object = None

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.x) if self.g is None else (self.w, self.x, self.g)

    def renew(self) -> bool:
        """Take over the members' decay and gradients."""
        of = cast("Of", self.of)
        self.eta_lam = of.members.eta_lam
        if self.g is not None:
            self.g = of.kept(self.uphill) if of.members.kept else of.gradients(self.w)
        return True

    def let_go(self) -> None:
        """Let go of the gradients."""
        if self.g is not None:
            cast("list[Tensor]", self.g).clear()

    def take_coefficients(self, base: Optimizer) -> bool:
        """A comparison of weights has no coefficients."""
        del base
        return True


@dataclass(eq=False)
class Whole:
    """Weights ``w`` to be decayed and stepped at once, by ``update``, on the base's own state.

    ``state``: a column for each of the update's state keys. ``counters``: one for each of its counters, as they are
    before the step: tensors of one element, on the CPU or on the weights' device.
    """

    w: Sequence[Tensor]
    g: Sequence[Tensor]
    state: tuple[Sequence[Tensor], ...]
    counters: tuple[Sequence[Tensor], ...]
    update: Update
    lr: float | Tensor
    eta_lam: float | Tensor
    draws: Draws | None = None
    of: "Of | None" = None
    held: Held = _NOT_HELD
    kept: object = None
    """What the backend keeps for a call that begins with this bucket."""

    @property
    def p(self) -> Sequence[Tensor]:
        """The parameters that ``w`` are views or shards of."""
        of = cast("Of", self.of)
        return _at(of.members.parameters, of.rows)

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.g, *self.state)

    def renew(self) -> bool:
        """Take over the members' gradients, decay and learning rate. Returns False if the state has other tensors."""
        of = cast("Of", self.of)
        self.eta_lam, self.g, self.lr = of.members.eta_lam, of.gradients(self.w), _lr(of.members.group)
        return self.held.is_same()

    def let_go(self) -> None:
        """Let go of the gradients."""
        cast("list[Tensor]", self.g).clear()

    def take_coefficients(self, base: Optimizer) -> bool:
        """Take over the group's coefficients. Returns False if they make another update."""
        found = updates.find(base, cast("Of", self.of).members.group)
        if isinstance(found, str) or found.of_what != self.update.of_what:
            return False
        self.update = found
        return True


Bucket: TypeAlias = Coming | Stepped | Whole


def kind(bucket: Bucket) -> Hashable:
    """What buckets must have in common for one call of a kernel: device, types, and the formula of a whole update."""
    update: Hashable = None
    if isinstance(bucket, Whole):
        update = (*bucket.update.of_what, *(column[0].device for column in bucket.counters))
    return (update, bucket.w[0].device, *(column[0].dtype for column in bucket.columns))


@dataclass
class Members:
    """Parameters of one param group that take the same path in this step."""

    group: dict[str, Any]
    eta_lam: float | Tensor
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    """Those from just before the step; None for a parameter without one."""
    numbers: Sequence[int] = ()
    """Each parameter's number among all of the optimizer's."""
    stream: Stream | None = None
    """The random numbers of the step, for rules that draw some."""
    index: int = 0
    """The group's index."""
    first: int = 0
    """The number of the group's first parameter."""
    names: Sequence[str] = ()
    """Those of all the group's parameters, if the optimizer was given names."""
    kept: list[Kept | None] = field(default_factory=list)
    """The gradients for a method that reads them after the step."""

    def only(self, rows: Sequence[int]) -> "Members":
        """The members at ``rows``."""
        return replace(
            self,
            parameters=[self.parameters[i] for i in rows],
            gradients=[self.gradients[i] for i in rows],
            numbers=[self.numbers[i] for i in rows],
        )

    def draws(self, rows: Sequence[int]) -> Draws | None:
        """Where the random numbers for the members at ``rows`` come from, on the device of the first."""
        if self.stream is None or not rows:
            return None
        shards = [shard(self.parameters[i]) for i in rows]
        on_device = self.stream.on(self.parameters[rows[0]].device)
        return Draws(on_device, [self.numbers[i] for i in rows], shards)


class Of(NamedTuple):
    """The parameters at ``rows`` of the members."""

    members: Members
    rows: Sequence[int]

    @property
    def name(self) -> str:
        """The group's ``name``, or ``group 0``."""
        return str(self.members.group.get("name", f"group {self.members.index}"))

    def gradients(self, w: Sequence[Tensor]) -> Sequence[Tensor]:
        """The members' gradients, for the weights ``w`` of a bucket."""
        gradients = cast("list[Tensor]", _at(cast("list[Tensor]", self.members.gradients), self.rows))
        return companions(gradients, w, w)

    def kept(self, uphill: bool) -> list[Tensor]:
        """The members' gradients from before the step, negated if it goes ``uphill``."""
        members = self.members
        g = [companion(cast("Kept", members.kept[i]).gradient, members.parameters[i]) for i in self.rows]
        return [-each for each in g] if uphill else g

    def parts(self, path: str, weights: Sequence[int], sums: Tensor) -> Iterator[Part]:
        """The reports on the parameters: one `Part` for all parameters that the same number of ranks hold."""
        members = self.members
        places = [members.numbers[i] - members.first for i in self.rows]
        labels = [members.names[i] if members.names else f"{members.index}.{i}" for i in places]
        copies = [held_by(members.parameters[i]) for i in self.rows]
        for each in dict.fromkeys(copies):
            at = [i for i, of_one in enumerate(copies) if of_one == each]
            rows = sums if len(at) == len(copies) else torch.stack([sums[i] for i in at])
            some = [labels[i] for i in at], [weights[i] for i in at]
            yield Part(members.index, self.name, *some, each, path, members.eta_lam, rows)


def have_state(base: Optimizer, members: Members) -> tuple[Members, Members]:
    """The members that one pass can step, and the others.

    The others have no state yet, or one that the kernels cannot use: in another layout over the ranks than the weight,
    or with a counter that `_counts` rejects.
    """
    update = cast("updates.Update", updates.find(base, members.group))
    keys = (*update.state_keys, *update.counters)
    states = [base.state.get(p, _NO_STATE) for p in members.parameters] if keys else []
    columns = [[state.get(key) for state in states] for key in keys]
    left = {i for i, row in enumerate(zip(*columns, strict=True)) if not all(isinstance(t, Tensor) for t in row)}
    for column in columns[: len(update.state_keys)]:
        left |= laid_out_otherwise(column, members.parameters)  # the kernel would write to a copy of it
    for column in columns[len(update.state_keys) :]:
        rows = enumerate(zip(column, members.parameters, strict=True))
        left |= {i for i, (counter, p) in rows if i not in left and not _counts(update, counter, p)}
    if not left:
        return members, members.only([])
    return members.only([i for i in range(len(states)) if i not in left]), members.only(sorted(left))


def _counts(update: Update, counter: Tensor, p: Tensor) -> bool:
    """Can a kernel count with this? It reads a float32 number, on the CPU or on the weight's device.

    A counter on a device is read there, if the update allows it. A graph's replay would not read one on the CPU.
    """
    if counter.numel() != 1 or counter.dtype != torch.float32:
        return False
    if counter.device.type == "cpu":
        return p.device.type == "cpu" or not capturing()
    return counter.device == p.device and update.corrects_bias


def coming(base: Optimizer, members: Members) -> Iterator[Coming]:
    """Buckets of members with a direction in `directions`."""
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
            m_of = None if average is None else _at(average, some)
            rows = [chosen[i] for i in some]
            of = Of(members, rows)
            entries = [None] * len(rows) if m_of is None else m_of
            held = Held() if found.state_key is None else Held([states[i] for i in rows], [(found.state_key, entries)])
            of_step = members.eta_lam, members.draws(rows)
            yield Coming(_at(w, some), _at(along, some), m_of, a, b, *of_step, of, held, varies=bool(numbers))


def whole(base: Optimizer, members: Members) -> Iterator[Whole]:
    """Buckets of members with an update in `updates`, all with state."""
    update = cast("updates.Update", updates.find(base, members.group))
    p = members.parameters
    states = [base.state[each] for each in p] if update.state_keys or update.counters else []
    w = local_real_views(p)
    g = companions(cast("list[Tensor]", members.gradients), p, w)
    state = [companions([of_one[key] for of_one in states], p, w) for key in update.state_keys]
    counters = [[of_one[key] for of_one in states] for key in update.counters]
    lr = _lr(members.group)
    for some in _split((w, g, *state, *counters)):
        columns, counts = (tuple(_at(column, some) for column in several) for several in (state, counters))
        draws = members.draws(some)
        of = Of(members, some)
        held = zip((*update.state_keys, *update.counters), (*columns, *counts), strict=True)
        in_state = Held([states[i] for i in some] if states else [], list(held))
        yield Whole(_at(w, some), _at(g, some), columns, counts, update, lr, members.eta_lam, draws, of, in_state)


def _lr(group: Mapping[str, Any]) -> float | Tensor:
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr  # torch accepts any shape, but a 0-d weight needs 0-d


def stepped(members: Members, x: Sequence[Tensor], maximizes: bool) -> Iterator[Stepped]:
    """Buckets of the members with a dense gradient; ``x``: copies of all members from before the step."""
    took = [i for i, g in enumerate(members.gradients) if g is not None and not g.is_sparse]
    if not took:
        return
    p, x = _at(members.parameters, took), _at(x, took)
    w = local_real_views(p)
    g = Of(members, took).kept(maximizes) if members.kept else None
    for some in _split((w, x, g)):
        g_of = None if g is None else _at(g, some)
        rows = [took[i] for i in some]
        columns = _at(p, some), _at(w, some), _at(x, some), g_of
        yield Stepped(*columns, members.eta_lam, members.draws(rows), Of(members, rows), maximizes)


def _split(columns: Sequence[Sequence[Tensor] | None], numbers: Sequence[object] | None = None) -> list[list[int]]:
    """Rows whose entries have the same device and types, and the same of ``numbers``."""
    present = [column for column in columns if column is not None]
    parts: list[Sequence[object]] = [[t.dtype for t in column] for column in present]
    parts.append([t.device for t in present[0]])
    parts += [list(map(Tensor.get_device, column)) for column in present[1:]]
    if numbers is not None:
        parts.append(numbers)
    if all(part.count(part[0]) == len(part) for part in parts):
        return [list(range(len(present[0])))]
    keys = list(zip(*parts, strict=True))
    kinds = dict.fromkeys(keys)
    return [[i for i, key in enumerate(keys) if key == one] for one in kinds]


def joined(columns: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The columns one after the other; a single one is returned itself."""
    return columns[0] if len(columns) == 1 else list(chain.from_iterable(columns))


def _at(column: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor]:
    return column if len(chosen) == len(column) else [column[i] for i in chosen]
