"""One step: the base's own step with its decay off, and the method's rule around it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from cwd_wrap.bases import known, weight_decay
from cwd_wrap.bases.journal import Journal
from cwd_wrap.step.choice import steps_without_closure
from cwd_wrap.step.paths import Snapshot, unhooked_step
from cwd_wrap.step.plan import Plan, check_layouts

if TYPE_CHECKING:
    from collections import OrderedDict


Closure = Callable[[], float]
_READERS = ("state_dict", "__getstate__")
"""Methods that save a base. During its step they must see the groups as they are between steps: see `Step._guarded`."""
_untraced: Callable[[Callable[..., None]], Callable[..., None]] = torch.compiler.disable


def is_unheard(base: Optimizer) -> bool:
    """True if no hook, replaced ``step`` or profiler sees a step of ``base``."""
    own = vars(base)
    return not (
        own.get("_optimizer_step_pre_hooks")
        or own.get("_optimizer_step_post_hooks")
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in own
        or _profiler_enabled()
    )


class Step:
    """One step of ``base``.

    The rule is applied in the last pre-hook and the first post-hook of the base's step. So it uses gradients and decays
    as other hooks (clipping, a schedule) leave them, these hooks see the real ``weight_decay`` and the decayed weights,
    and nothing decays if the base's step is skipped.

    ``plan`` returns the plan of the step, given whether the base calls a closure. It is called just before the base's
    own code. The ``journal`` has what is changed for the time of the step.
    """

    def __init__(self, base: Optimizer, journal: Journal, plan: Callable[[bool], Plan]) -> None:
        self.begun = False
        """True once the rule has begun. Still False after the step if the base did not fire its hooks."""
        self.done: Plan | None = None
        """The plan, once it has been carried out."""
        self._base = base
        self._journal = journal
        self._make_plan = plan
        self._plan: Plan | None = None  # from the begin of the rule to its end
        self._changes = False  # are there any to undo?
        self._own_readers: dict[str, Any] = {}  # those that the base has as attributes of the instance
        self._hooks: tuple[dict[int, Any], ...] = ()
        self._closure: Closure | None = None  # that of the user, if the base is to call it
        self._closes = False  # does the base call a closure, which may be a hook's?
        self._grad = True  # the gradient mode before the step
        # The base's when the step began, for a step that never comes to the rule, and again when its decay was switched
        # off: a hook may have replaced them.
        self._groups: list[dict[str, Any]] = []
        self._depth = 0  # of nested base steps: a step that calls its parent class's step fires the hooks twice

    def run(self, closure: Closure | None) -> float | None:
        """Step once. Returns the closure's loss if it is called here, else what the base returns."""
        loss = None
        if closure is not None and steps_without_closure(self._base):
            with torch.enable_grad():
                loss = closure()
        else:
            self._closure = closure
        self._grad = torch.is_grad_enabled()
        try:
            # An interrupt can land in a `finally` too, but only once: then the outer one finishes its work.
            try:
                stepped = self._step()
            finally:
                self.undo()
        finally:
            self.undo()
        return stepped if loss is None else loss

    def undo(self) -> None:
        """Restore all that the step has changed and not yet restored."""
        if not self._changes:
            return
        weight_decay.on(self._base, self._journal, self._groups)
        if self.done is None:
            torch._C._set_grad_enabled(self._grad)
        for hooks in self._hooks:
            hooks.pop(id(self), None)
        attributes = vars(self._base)
        for name in _READERS:
            attributes.pop(name, None)
        attributes.update(self._own_readers)
        self._changes = False

    def _step(self) -> float | None:
        base = self._base
        attributes = vars(base)
        self._own_readers = {name: attributes[name] for name in _READERS if name in attributes}
        readers = [self._guarded(getattr(base, name)) for name in _READERS]
        self._changes = True
        self._groups = list(base.param_groups)
        attributes.update(zip(_READERS, readers, strict=True))
        step: Callable[..., float | None] = base.step
        if is_unheard(base) and known.name(type(base)) is not None:
            self._begin(self._closure is not None)
            step = unhooked_step(base)  # without torch's layer, which would find no hooks
        elif getattr(type(base).step, "hooked", False) and hasattr(base, "_optimizer_step_pre_hooks"):
            before, after = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
            self._hooks = before, after
            traced = hasattr(base.step, "_torchdynamo_orig_callable")  # a step that is compiled traces its hooks
            before[id(self)] = _untraced(self._before_base) if traced else self._before_base
            after[id(self)] = _untraced(self._after_base) if traced else self._after_base
            cast("OrderedDict[int, object]", after).move_to_end(id(self), last=False)
        else:
            self._begin(self._closure is not None)
        stepped = step() if self._closure is None else step(partial(self._call, self._closure))
        if self._plan is not None:  # the base did not fire its hooks
            self._end()
        return stepped

    def _guarded(self, read: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """A method that reads the groups as they are between steps. It returns copies of them."""

        def read_between() -> dict[str, Any]:
            with self._journal.suspended():
                found = read()
                return found | {"param_groups": [dict(group) for group in found.get("param_groups", ())]}

        return read_between

    def _before_base(self, _: object, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._plan is None:  # also for a second step of the base within one: its `step` may be a user's function
            self._begin(closure is not None)
        if closure is None or not self._closes or getattr(closure, "func", None) == self._call:
            return None
        ours = partial(self._call, closure)  # a hook's closure
        return (args, kwargs | {"closure": ours}) if "closure" in kwargs else ((args[0], ours, *args[2:]), kwargs)

    def _after_base(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._end()

    def _begin(self, closure: bool) -> None:
        self.begun = True
        self._closes = closure
        self._groups = list(self._base.param_groups)
        self._plan = plan = self._make_plan(closure)
        for group, key, value in plan.own_decay:
            self._journal.put(group, key, value)
        plan.begin()

    def _end(self) -> None:
        plan, self._plan = cast("Plan", self._plan), None
        weight_decay.on(self._base, self._journal, self._groups)
        plan.end()
        self.done = plan

    def _call(self, closure: Closure) -> float:
        """Call ``closure`` for the base. The decay is restored meanwhile: the closure can read and set it."""
        weight_decay.on(self._base, self._journal, self._groups)
        with torch.enable_grad():
            loss = closure()
        weight_decay.on(self._base, self._journal, self._groups)  # it may call the closure that the base was to call
        plan = cast("Plan", self._plan)
        for members, i in plan.members:
            members.eta_lam = 0.0 if i is None else plan.strength.eta_lam(i)
        for path in plan.paths:
            cast("Snapshot", path).note()  # with a closure there is no other path
        for members, _ in plan.members:
            check_layouts(plan.work, members.gradients)
        self._groups = list(self._base.param_groups)
        for group, key, value in weight_decay.own_decay(self._base):
            self._journal.put(group, key, value)
        return loss
