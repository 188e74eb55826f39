"""One step: the base's own step with its decay off, and the method's rule around it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cwd_wrap import paths, quirks
from cwd_wrap.buckets import Members, have_state
from cwd_wrap.choice import choose, copying, steps_without_closure
from cwd_wrap.paths import Work
from cwd_wrap.tensors import laid_out_otherwise
from cwd_wrap.weight_decay import DecayOff

if TYPE_CHECKING:
    from collections import OrderedDict

Closure = Callable[[], float]


class Step:
    """One step of ``work.base``.

    The rule is applied in the last pre-hook and the first post-hook of the base's step. So it uses gradients and decays
    as other hooks (clipping, a schedule) leave them, these hooks see the real ``weight_decay`` and the decayed weights,
    and nothing decays if the base's step is skipped. ``eta_lams`` returns eta*lam of each group for the coming step;
    ``path`` is the path that the user forces, or None.
    """

    def __init__(self, work: Work, eta_lams: Callable[[], list[float | Tensor]], path: str | None) -> None:
        self.begun = False
        """True once the rule has begun. Still False after the step if the base did not fire its hooks."""
        self._work = work
        self._eta_lams = eta_lams
        self._path = path
        self._decay_off = DecayOff(work.base)
        self._around = ExitStack()
        self._closure: Closure | None = None  # if the base is to call it, else None
        self._lists: list[tuple[dict[str, Any], list[Tensor]]] = []  # of all groups, while the base has shorter ones
        self._depth = 0  # of nested base steps: a step that calls its parent class's step fires the hooks twice
        self._members: list[tuple[Members, int | None]] = []  # as in `_walk`, if the base is to call the closure

    def run(self, closure: Closure | None) -> float | None:
        """Step once. Returns the closure's loss if it is called here, else what the base returns."""
        base = self._work.base
        loss = None
        if closure is not None and steps_without_closure(base):
            with torch.enable_grad():
                loss = closure()
        else:
            self._closure = closure
        with ExitStack() as hooks, self._around:
            if self._base_fires_hooks():
                self._hook_in(hooks)
            else:
                self._begin()
            stepped = base.step() if self._closure is None else base.step(self._call_closure)
            self._finish()
        return stepped if loss is None else loss

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context the groups are as they are between steps, for whoever reads them during one."""
        lists = [(group, "params", parameters) for group, parameters in self._lists]
        between = [*lists, *self._decay_off.before()]
        now = [(group, key, group[key]) for group, key, _ in between]
        try:
            for group, key, value in between:
                group[key] = value
            yield
        finally:
            for group, key, value in now:
                group[key] = value

    def _base_fires_hooks(self) -> bool:
        """False for optimizers that skip Optimizer.__init__, and with it the hooks."""
        base = self._work.base
        return getattr(type(base).step, "hooked", False) and hasattr(base, "_optimizer_step_pre_hooks")

    def _hook_in(self, hooks: ExitStack) -> None:
        base = self._work.base
        before = base.register_step_pre_hook(self._before_base)
        hooks.callback(before.remove)
        after = base.register_step_post_hook(self._after_base)
        hooks.callback(after.remove)
        cast("OrderedDict[int, object]", base._optimizer_step_post_hooks).move_to_end(after.id, last=False)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # a base whose step is compiled traces its hooks
    def _before_base(self, *_: object) -> None:
        self._depth += 1
        if not self.begun:
            self._begin()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _after_base(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._finish()

    @torch.no_grad()
    def _begin(self) -> None:
        self.begun = True
        plan = self._plan()
        if self._work.rule.draws:
            self._work.stream.advance(self._work.base)
        self._lists = [(group, group["params"]) for group in self._work.base.param_groups]
        self._around.callback(self._decay_off.on)
        self._decay_off.off()
        for path, members in plan:
            self._around.enter_context(path(self._work, members))

    @torch.no_grad()
    def _finish(self) -> None:
        self._around.close()
        self._lists = []

    def _call_closure(self) -> float:
        """The closure, for the base to call. The decay is restored meanwhile: the closure can read and set it."""
        self._decay_off.on()
        with torch.enable_grad():
            loss = cast("Closure", self._closure)()
        eta_lams = self._eta_lams()
        for members, i in self._members:
            members.eta_lam = 0.0 if i is None else eta_lams[i]
        of_step = [members for members, _ in self._members]
        self._work.note(of_step)
        for members in of_step:
            self._check_layouts(members.gradients)
        self._decay_off.off()
        return loss

    # ---- which parameters take which path

    def _plan(self) -> list[tuple[paths.Path, list[Members]]]:
        """The paths of this step with their members, in the order in which they are entered."""
        if self._closure is not None:
            self._members = list(self._walk(self._could_step))
            return [(paths.snapshot, [members for members, _ in self._members])]
        taken: dict[paths.Path, list[Members]] = {path: [] for path in paths.ORDER}
        for members, _ in self._walk(self._steps):
            for path, some in self._paths_of(members):
                if some.parameters:
                    taken[path].append(some)
        if not taken[paths.snapshot]:
            self._work.buffers.drop_whole()
        return [(path, members) for path, members in taken.items() if members]

    def _paths_of(self, members: Members) -> Iterator[tuple[paths.Path, Members]]:
        """The path that a group takes, and the paths of members that cannot take it in this step."""
        work = self._work
        path = choose(work.rule, work.base, members.group, work.backend, self._path).path
        decays = work.rule.has_work(members.eta_lam)
        if not decays and path != "one_pass":
            return
        gradients = cast("list[Tensor]", members.gradients)
        sparse = [i for i, g in enumerate(gradients) if g.is_sparse]
        if sparse:
            self._check_layouts(gradients)
            yield paths.rows, members.only(sparse)
            members = members.only([i for i, g in enumerate(gradients) if not g.is_sparse])
        if path == "one_pass":
            members, others = have_state(work.base, members)
            if decays:
                yield from self._along(others)
            yield paths.one_pass, members
        elif path == "direction":
            yield from self._along(members)
        else:
            yield paths.NAMED[path], members

    def _along(self, members: Members) -> Iterator[tuple[paths.Path, Members]]:
        """The path direction, and one with a copy for gradients in another layout than their weights (partial sums).

        To read those, the direction would need a collective, as the base itself does; a comparison needs no gradient.
        If the user forces a path, all members keep it.
        """
        otherwise = laid_out_otherwise(cast("list[Tensor]", members.gradients), members.parameters)
        if otherwise and self._path is None:
            yield paths.NAMED[copying(self._work.base, members.group)], members.only(sorted(otherwise))
            members = members.only([i for i in range(len(members.parameters)) if i not in otherwise])
        yield paths.direction, members

    def _walk(self, takes_part: Callable[[Tensor, Tensor | None], bool]) -> Iterator[tuple[Members, int | None]]:
        """The members of each group, each parameter once, and the index of the group that gives their decay.

        ``takes_part``: is a parameter with this gradient a member? The groups are read anew at each step, because
        engines replace parameters. Parameters that the base's own decay skips are left out; if the rule acts on every
        group, they are yielded with eta*lam 0 and the index None.
        """
        eta_lams = self._eta_lams()
        seen: set[int] = set()
        first = 0
        for i, group in enumerate(self._work.base.param_groups):
            if self._acts_on(group, eta_lams[i]):
                members = self._members_of(i, eta_lams[i], first, seen, takes_part)
                yield from self._exempt_apart(members, i)
            first += len(group["params"])

    def _acts_on(self, group: dict[str, Any], eta_lam: float | Tensor) -> bool:
        rule = self._work.rule
        return rule.has_work(eta_lam) or (rule.rounds and any(p.element_size() == 2 for p in group["params"]))

    def _members_of(
        self,
        i: int,
        eta_lam: float | Tensor,
        first: int,
        seen: set[int],
        takes_part: Callable[[Tensor, Tensor | None], bool],
    ) -> Members:
        """The members of group ``i``, if no earlier group has them; ``first`` is the number of its first parameter.

        ``seen`` holds the ids of the parameters of earlier groups; those of this group are added.
        """
        work = self._work
        group = work.base.param_groups[i]
        parameters = list(group["params"])
        gradients = [p.grad for p in parameters]
        numbers = range(first, first + len(parameters))
        names = group.get("param_names", ())
        names = names if len(names) == len(parameters) else ()
        stream = work.stream if work.rule.draws else None
        index = work.index(i, group)
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

    def _exempt_apart(self, members: Members, i: int) -> Iterator[tuple[Members, int | None]]:
        """The members with the index ``i`` of their decay; those that the base's own decay skips apart, or left out."""
        skips = quirks.exempt(self._work.base, members.group)
        if skips is not None:
            exempt = {j for j, p in enumerate(members.parameters) if skips(p)}
            if exempt and self._work.rule.every_group:
                yield replace(members.only(sorted(exempt)), eta_lam=0.0), None
            members = members.only([j for j in range(len(members.parameters)) if j not in exempt])
        if members.parameters:
            yield members, i

    @staticmethod
    def _steps(_: Tensor, gradient: Tensor | None) -> bool:
        return gradient is not None

    @staticmethod
    def _could_step(p: Tensor, gradient: Tensor | None) -> bool:
        return gradient is not None or p.requires_grad

    def _check_layouts(self, gradients: Sequence[Tensor | None]) -> None:
        work = self._work
        if work.rule.reads_gradient and any(g is not None and g.is_sparse for g in gradients):
            msg = (
                f"{work.rule.name} needs dense gradients, but {type(work.base).__name__} has sparse ones: pass "
                "sparse=False to the embedding, or use CautiousDecay with mask='update'"
            )
            raise ValueError(msg)
