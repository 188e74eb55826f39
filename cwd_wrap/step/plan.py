"""What a step does with which parameter: found out once (`compile_plan`), and kept as long as it `holds`."""

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import replace
from itertools import repeat
from numbers import Real
from operator import attrgetter, is_
from typing import Any, cast

import torch
from torch import Tensor

from cwd_wrap.bases import directions, quirks, schedule_free, weight_decay
from cwd_wrap.bases.updates import is_scaled
from cwd_wrap.bases.weight_decay import Strength
from cwd_wrap.graphs import capturing
from cwd_wrap.kernels.buckets import Members, have_state
from cwd_wrap.step import paths
from cwd_wrap.step.choice import choose, copying
from cwd_wrap.step.paths import Path, Work
from cwd_wrap.tensors import are_plain, laid_out_otherwise

Taken = tuple[type[Path], Members]
"""A path, and members that take it."""

_GRAD = attrgetter("grad")
_NO_COEFFICIENT = frozenset(("lr", "weight_decay"))


class Plan:
    """The paths of a step with their members, in the order in which they begin.

    It is kept for the next step if all that it was made from can be checked quickly. It holds no addresses.
    """

    def __init__(self, work: Work, strength: Strength, forced: str | None) -> None:
        self.work = work
        self.strength = strength
        self.forced = forced
        self.own_decay = weight_decay.own_decay(work.base)
        """The entries that turn the base's own decay off."""
        self.members: list[tuple[Members, int | None]] = []
        """All members, with the index of the group that gives their decay; None if nothing decays them."""
        self.paths: list[Path] = []
        self.lasts = True
        """False if it takes facts from the state that a step changes: is there any, how many steps were made."""
        self.alone: paths.OnePass | None = None
        """The path that does the whole step, if it does and the plan is kept: the base's own step finds nothing."""
        self._groups: list[_Group] | None = None

    def begin(self) -> None:
        """What comes before the base's own step."""
        _without_grad([path.begin for path in self.paths])

    def end(self) -> None:
        """What comes after it."""
        try:
            _without_grad([path.end for path in reversed(self.paths)])
            if self.work.method.draws:
                self.work.stream.count()
        finally:
            self._let_go()

    def act_alone(self) -> None:
        """The whole step, of a plan with a path that does it `alone`."""
        try:
            _without_grad([cast("paths.OnePass", self.alone).act])
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Let go of the gradients: the next backward pass needs their memory."""
        for path in self.paths:
            for call in path.calls:
                for bucket in call.buckets:
                    bucket.let_go()
        for members, _ in self.members:
            members.gradients.clear()
            members.kept.clear()

    # ---- does it still hold?

    @property
    def is_kept(self) -> bool:
        """True if `holds` can tell whether the plan is that of the next step."""
        return self._groups is not None

    def keep(self, arguments: Sequence[object]) -> None:
        """Note what the plan was made from, if it can be checked. ``arguments``: those of the wrapper."""
        base = self.work.base
        of_this_step = (
            any(isinstance(path, paths.Rows) for path in self.paths)
            or self.work.method.draws
            or self.work.count
            or capturing()
            or is_scaled(base)
        )
        if of_this_step or not self.lasts or not isinstance(base.state, dict):
            return
        groups = [_Group(self, i, group) for i, group in enumerate(base.param_groups)]
        if not all(group.is_plain for group in groups):
            return
        self._arguments = list(arguments)
        self._class = _class_of(base)
        self.copies = any(isinstance(path, paths.Snapshot | paths.Pieces) for path in self.paths)
        self._state = list(base.state), list(base.state.values())
        self._groups = groups
        match self.paths:
            case [paths.OnePass() as only] if only.leaves_nothing and not schedule_free.is_known(base):  # it counts
                self.alone = only

    def holds(self, arguments: Sequence[object]) -> bool:
        """True if the coming step is the same, but for the values of tensors and of the groups' numbers.

        The plan takes over the current gradients and numbers.
        """
        base, groups = self.work.base, self._groups
        if groups is None or capturing() or is_scaled(base):
            return False
        if not (
            _same(arguments, self._arguments)
            and _same(_class_of(base), self._class)
            and _same(base.state, self._state[0])
            and all(map(is_, base.state.values(), self._state[1]))
            and len(base.param_groups) == len(groups)
            and all(map(_Group.holds, groups, repeat(self), base.param_groups))
        ):
            return False
        for path in self.paths:
            for call in path.calls:
                if not call.holds():
                    return False
        return True


class _Group:
    """What a plan was made from in one param group. It does not hold the plan: both would stay until a collection."""

    def __init__(self, plan: Plan, index: int, group: dict[str, Any]) -> None:
        work = plan.work
        self._index = index
        self._group = group
        self._parameters = list(group["params"])
        self._keys = tuple(group)
        self._values = list(group.values())
        self._lists = [
            (value, list(value))
            for key, value in group.items()
            if isinstance(value, MutableSequence) and key not in {"params", "param_names"}
        ]
        self._types = list(map(type, map(_GRAD, self._parameters)))
        self._members = [(some, i) for some, i in plan.members if some.group is group]
        self._worked = work.method.has_work(plan.strength.eta_lam(index))
        self._settled = plan.strength.is_settled(group)
        self._path = self._chosen(plan)
        self.is_plain = are_plain(self._parameters) and {Tensor, type(None)}.issuperset(self._types)

    def holds(self, plan: Plan, group: dict[str, Any]) -> bool:
        """True if the group is the same but for numbers, and each parameter has a gradient if it had one."""
        gradients = list(map(_GRAD, self._parameters))
        if not (
            group is self._group
            and _same(group["params"], self._parameters)
            and list(map(type, gradients)) == self._types
            and tuple(group) == self._keys
            and all(_same(now, before) for now, before in self._lists)
        ):
            return False
        values = list(group.values())
        same = all(map(is_, values, self._values))
        if not (same and self._settled) and not self._takes(plan, values):
            return False
        if plan.copies and any(g is not None and g.is_sparse for g in gradients):
            return False
        for members, _ in self._members:
            whole = len(members.parameters) == len(gradients)
            members.gradients = gradients if whole else [gradients[n - members.first] for n in members.numbers]
        return True

    def _takes(self, plan: Plan, values: list[object]) -> bool:
        """Take over new numbers. Returns False if more than numbers changed."""
        work = plan.work
        changed = {
            key: was
            for key, was, now in zip(self._keys, self._values, values, strict=True)
            if was is not now and key != "params"
        }
        if not all(_is_number(was) and _is_number(self._group[key]) for key, was in changed.items()):
            return False
        eta_lam = plan.strength.eta_lam(self._index)
        if work.method.has_work(eta_lam) != self._worked:
            return False
        self._values = values
        for members, i in self._members:
            members.eta_lam = members.eta_lam if i is None else eta_lam
        if "weight_decay" in changed:
            plan.own_decay = weight_decay.own_decay(work.base)
        if _NO_COEFFICIENT.issuperset(changed):
            return True
        return self._chosen(plan) == self._path and all(
            bucket.take_coefficients(work.base) for path in plan.paths for call in path.calls for bucket in call.buckets
        )

    def _chosen(self, plan: Plan) -> str | None:
        """The path of the group's members; None if nothing acts on them, or the forced path cannot.

        In a step with members to act on the latter is an error, which a new plan raises.
        """
        work = plan.work
        if not self._worked:
            return None
        try:
            return choose(work.method, work.base, self._group, work.backend, plan.forced).path
        except ValueError:
            return None


def _without_grad(acts: Sequence[Callable[[], None]]) -> None:
    """Call each of the ``acts`` with gradients disabled."""
    grad = torch.is_grad_enabled()
    try:  # an interrupt can land in a `finally` too, but only once
        try:
            torch._C._set_grad_enabled(False)  # torch.no_grad, at a tenth of the time
            for act in acts:
                act()
        finally:
            torch._C._set_grad_enabled(grad)
    finally:
        torch._C._set_grad_enabled(grad)


def _class_of(base: Any) -> tuple[object, ...]:
    return type(base), type(base).step, vars(base).get("step")


def _same(now: Any, before: Sequence[object]) -> bool:
    """Are these the same objects in the same order?"""
    return len(now) == len(before) and all(map(is_, now, before))


def _is_number(value: object) -> bool:
    """True for a number, but no flag, and for a tuple of numbers."""
    if isinstance(value, tuple):
        return all(map(_is_number, value))
    return isinstance(value, Real) and not isinstance(value, bool)


# ---- how a plan is made


def compile_plan(work: Work, strength: Strength, forced: str | None, *, closure: bool) -> Plan:
    """The plan of the coming step. ``forced``: the path that the user forces, or None.

    ``closure``: the base calls one, so gradients and decays are known only after it.
    """
    plan = Plan(work, strength, forced)
    averages = schedule_free.is_known(work.base)
    if averages and schedule_free.is_in_eval_mode(work.base):
        plan.lasts = False
        return plan  # the base's own step raises
    if closure:
        if (reason := quirks.refusal_of(type(work.base))) is not None:  # it was patched after it had been wrapped
            _refuse(work, reason)
        plan.members = list(_walk(plan, _could_step))
        plan.paths = [paths.Snapshot(work, [members for members, _ in plan.members])]
        return plan
    plan.members = list(_walk(plan, _steps))
    if averages and any(g is not None and g.is_sparse for members, _ in plan.members for g in members.gradients):
        _refuse(work, "gradients are sparse. Pass sparse=False to the embedding, or give its group weight_decay=0")
    taken: dict[type[Path], list[Members]] = {path: [] for path in paths.ORDER}
    for members, _ in plan.members:
        for path, some in _paths_of(plan, members):
            if some.parameters:
                taken[path].append(some)
    if not taken[paths.Snapshot]:
        work.buffers.drop_whole()
    plan.paths = [path(work, members) for path, members in taken.items() if members]
    return plan


def _refuse(work: Work, why: str) -> None:
    msg = f"{work.method.name} cannot step {type(work.base).__name__}: {why}"
    raise ValueError(msg)


def check_layouts(work: Work, gradients: Sequence[Tensor | None]) -> None:
    """Raise ValueError for a sparse gradient if the method reads gradients."""
    if work.method.reads_gradient and any(g is not None and g.is_sparse for g in gradients):
        msg = (
            f"{work.method.name} needs dense gradients, but {type(work.base).__name__} has sparse ones: pass "
            "sparse=False to the embedding, or use CautiousDecay with mask='update'"
        )
        raise ValueError(msg)


def _paths_of(plan: Plan, members: Members) -> Iterator[Taken]:
    """The path that a group takes, and the paths of members that cannot take it in this step."""
    work = plan.work
    path = choose(work.method, work.base, members.group, work.backend, plan.forced).path
    decays = work.method.has_work(members.eta_lam)
    if not decays and path != "one_pass":
        return
    gradients = cast("list[Tensor]", members.gradients)
    sparse = [i for i, g in enumerate(gradients) if g.is_sparse]
    if sparse:
        check_layouts(work, gradients)
        yield paths.Rows, members.only(sparse)
        members = members.only([i for i, g in enumerate(gradients) if not g.is_sparse])
    if path == "one_pass":
        averages = schedule_free.is_known(work.base)
        if averages:
            schedule_free.give_state(work.base, members.group, members.parameters)
        members, others = have_state(work.base, members)
        if averages and others.parameters:
            _refuse(work, "a state has other tensors than its weight or lacks some, so no kernel can step it")
        plan.lasts = plan.lasts and not others.parameters
        if decays:
            yield from _along(plan, others)
        yield paths.OnePass, members
    elif path == "direction":
        yield from _along(plan, members)
    else:
        yield paths.NAMED[path], members


def _along(plan: Plan, members: Members) -> Iterator[Taken]:
    """The path direction, and one with a copy where the direction is not known or not enough, or needs a collective.

    That is so for gradients in another layout than their weights (partial sums): the base itself needs a collective for
    them, a comparison needs no gradient. If the user forces the path, all members with a known direction keep it.
    """
    if plan.work.method.before is None or isinstance(directions.find(plan.work.base, members.group), str):
        yield paths.NAMED[copying(plan.work.base, members.group)], members
        return
    otherwise = laid_out_otherwise(cast("list[Tensor]", members.gradients), members.parameters)
    if otherwise and plan.forced is None:
        yield paths.NAMED[copying(plan.work.base, members.group)], members.only(sorted(otherwise))
        members = members.only([i for i in range(len(members.parameters)) if i not in otherwise])
    yield paths.Direction, members


def _walk(plan: Plan, takes_part: Callable[[Tensor, Tensor | None], bool]) -> Iterator[tuple[Members, int | None]]:
    """The members of each group, each parameter once, and the index of the group that gives their decay.

    ``takes_part``: is a parameter with this gradient a member? Parameters that the base's own decay skips are left out;
    if the method acts on every group, they are yielded with eta*lam 0 and the index None.
    """
    work = plan.work
    seen: set[int] = set()
    first = 0
    for i, group in enumerate(work.base.param_groups):
        eta_lam = plan.strength.eta_lam(i)
        if _acts_on(work, group, eta_lam):
            members = _members_of(work, i, eta_lam, first, seen, takes_part)
            yield from _exempt_apart(work, members, i)
        first += len(group["params"])


def _acts_on(work: Work, group: dict[str, Any], eta_lam: float | Tensor) -> bool:
    method = work.method
    return method.has_work(eta_lam) or (method.rounds and any(p.element_size() == 2 for p in group["params"]))


def _members_of(
    work: Work,
    i: int,
    eta_lam: float | Tensor,
    first: int,
    seen: set[int],
    takes_part: Callable[[Tensor, Tensor | None], bool],
) -> Members:
    """The members of group ``i``, if no earlier group has them; ``first`` is the number of its first parameter.

    ``seen`` holds the ids of the parameters of earlier groups; those of this group are added.
    """
    group = work.base.param_groups[i]
    parameters = list(group["params"])
    gradients = [p.grad for p in parameters]
    numbers = range(first, first + len(parameters))
    names = group.get("param_names", ())
    names = names if len(names) == len(parameters) else ()
    stream = work.stream if work.method.draws else None
    index = paths.index_of(work.groups, i, group)
    members = Members(group, eta_lam, parameters, gradients, numbers, stream, index, first, names)
    ids = list(map(id, parameters))
    once = len(set(ids)) == len(ids) and seen.isdisjoint(ids)
    if not once or any(g is None for g in gradients):
        rows: dict[int, int] = {}
        for row, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            if ids[row] not in seen and takes_part(p, g):
                rows.setdefault(ids[row], row)
        members = members.only(list(rows.values()))
    seen.update(ids)
    return members


def _exempt_apart(work: Work, members: Members, i: int) -> Iterator[tuple[Members, int | None]]:
    """The members with the index ``i`` of their decay; those that the base's own decay skips apart, or left out."""
    skips = quirks.exempt(work.base)
    if skips is not None:
        exempt = {j for j, p in enumerate(members.parameters) if skips(p)}
        if exempt and work.method.every_group:
            yield replace(members.only(sorted(exempt)), eta_lam=0.0), None
        members = members.only([j for j in range(len(members.parameters)) if j not in exempt])
    if members.parameters:
        yield members, i


def _steps(_: Tensor, gradient: Tensor | None) -> bool:
    return gradient is not None


def _could_step(p: Tensor, gradient: Tensor | None) -> bool:
    return gradient is not None or p.requires_grad
