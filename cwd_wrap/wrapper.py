"""Base class of CautiousDecay, CautiousUpdate and PNormDecay: checks, lam, step and repr. `Step` does one step."""

from collections.abc import Callable
from contextlib import nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import kernels, notices, params_first, quirks, weight_decay
from cwd_wrap.buckets import Report
from cwd_wrap.choice import PathOfGroup, Rule, check_path, check_pieces, choose, paths_of
from cwd_wrap.contract import Contract, Group, check_optimizer, with_hooks
from cwd_wrap.draws import Stream
from cwd_wrap.journal import Journal
from cwd_wrap.paths import Work, copied_bytes, index_of
from cwd_wrap.plan import Plan, compile_plan
from cwd_wrap.snapshot import Buffers, Gradients
from cwd_wrap.step import Closure, Step

if TYPE_CHECKING:
    from typing_extensions import Self


_PATIENCE = 60.0  # seconds that a state dict waits for a step in another thread


class OptimizerWrapper(Contract):
    """Steps the base with ``weight_decay`` 0 and applies the method's rule around it.

    Every group's ``weight_decay`` is restored after the step, also if the step raises. A subclass defines `_rule`.
    """

    observer: Callable[[Report], object] | None
    """Called with a `Report` after each step, unless every group's ``lr`` is 0. Like hooks, it is not pickled.

    If it has a method ``looks_at``, this is called before each such step with the indices of the groups that step. If
    it returns False, the step is neither counted nor reported.
    """

    _settings: ClassVar[tuple[str, ...]] = ("_lam", "_took", "step_size", "path", "backend")
    seed = 0
    """The seed of the random numbers, for methods that draw some."""
    _way_out = weight_decay.WAY_OUT
    """The end of error texts about an unknown learning rate: what the user can do about it."""
    _what = "decay"
    """What the method does, as a verb, for the error about two wrappers that do the same."""

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float | None,
        step_size: weight_decay.StepSize | None,
        path: str | None,
        backend: str | None,
    ) -> None:
        self._check_base(base_optimizer)
        kernels.check(backend)
        check_path(path)
        if lam is not None:
            weight_decay.check(lam, "lam", type(self).__name__)
        weight_decay.check_step_size(step_size)
        self.base_optimizer = base_optimizer
        self.step_size = step_size
        self.path = path
        self.backend = backend
        self._took: tuple[int, ...] = ()
        """The groups that took lam when it was last set."""
        self._start()
        self._give_lam(lam)
        if (remark := quirks.warning(base_optimizer)) is not None:
            notices.warn(f"{type(self).__name__} over {self._owner}: {remark}")
        self._warn_if_idle()

    @classmethod
    def over(cls, base_class: Callable[..., Optimizer], **options: Any) -> "Callable[..., Self]":
        """Make a class that builds ``base_class`` from parameters and wraps it, for places that expect a class.

        ``base_class`` is a class of optimizers, or a function that returns an optimizer. The new class takes its
        arguments, and those of this wrapper as keywords; a name that both have is the base's. ``options`` are the
        wrapper's for all instances, and are checked here as by its constructor. The same arguments return the same
        class: for an optimizer of torch and without options that in `cwd_wrap.optim`. The class and its instances can
        be copied, and pickled if ``base_class`` and the options can. Raises TypeError for anything but a class of
        optimizers or a function, and for unknown or unhashable options.

        Examples:
            >>> import torch
            >>> from cwd_wrap import CautiousDecay
            >>> CautiousAdamW = CautiousDecay.over(torch.optim.AdamW, strict=True)
            >>> CautiousAdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3, weight_decay=0.1).strict
            True
        """
        return cast("Callable[..., Self]", params_first.over(cls, base_class, options))

    def _start(self) -> None:
        super()._start()
        self._buffers = Buffers()
        self._gradients = Gradients()
        self._stream = Stream(self.seed, self.__dict__.pop("_steps_drawn", None))
        self.observer = None
        self._built_with = set(map(quirks.shapes, self.param_groups))
        self._groups = list(self.param_groups)
        self._lock = RLock()
        self._plan: Plan | None = None
        self._stepping: Step | None = None
        self._journal = Journal()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_steps_drawn": self._stream.steps}

    def _rule(self) -> Rule:
        """The method with its current arguments."""
        raise NotImplementedError

    # ---- for users

    @torch._disable_dynamo  # type: ignore[attr-defined]  # in compiled code the restored decay would be lost
    @with_hooks
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Step the base with its decay off, and apply the wrapper's own rule.

        ``closure`` runs with gradients enabled, as often as the base evaluates it. A parameter without a gradient does
        not decay, nor does a row without one in a sparse gradient. Returns the loss, or what the base returns. Raises
        ValueError if a group's ``weight_decay`` or step size is negative, NaN, infinite or unknown, and TypeError if
        it is not a number. This is checked before the base steps.
        """
        count = self._is_looked_at()
        if self._lock._is_owned():  # type: ignore[attr-defined]  # a step inside a step, in a hook or a closure
            return self._run(self._new_step(Journal(), count), closure)
        with self._lock:
            if self._stepping is not None:  # a step was interrupted, and again while it restored the groups
                self._stepping.undo()
            self._stepping = step = self._new_step(self._journal, count)
            try:
                return self._run(step, closure)
            finally:
                self._stepping = None

    @property
    def lam(self) -> float | None:
        """The decay strength that was passed or set; None leaves each group its own ``weight_decay``.

        The step size multiplies it. Setting it writes it into every group that decays. If none does, it is written into
        the groups that took lam when it was last set (so lam may rise from 0), or else into all.
        """
        return self._lam

    @lam.setter
    def lam(self, value: float | None) -> None:
        if value is not None:
            weight_decay.check(value, "lam", type(self).__name__)
        self._give_lam(value)

    def paths(self) -> list[PathOfGroup]:
        """Which path each param group takes, and why; "plain" for a group that does not decay."""
        lams = [weight_decay.lam(group, self.lam) for group in self.param_groups]
        return paths_of(self._rule(), self.base_optimizer, lams, self.backend, self.path)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base. It gets ``lam``, if that was given, unless it has a ``weight_decay`` of its own."""
        if not isinstance(param_group, dict):
            msg = f"param_group must be a dict, but got {type(param_group).__name__}"
            raise TypeError(msg)
        named = "weight_decay" in param_group
        self._check_group(self.defaults | param_group | {"params": []}, len(self.param_groups), self.lam)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        self._built_with.add(quirks.shapes(added))
        self._groups.append(added)
        if self.lam is not None and not named and "weight_decay" in added:
            added["weight_decay"] = self.lam

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, key for key: checkpoints of the plain optimizer and of the wrapper are the same.

        In a signal handler that interrupts a step, the param groups in it are those from between steps. Another thread
        waits for the end of the step; it raises RuntimeError after a minute (a step that waits for that thread).
        """
        if not self._lock.acquire(timeout=_PATIENCE):
            msg = (
                f"{type(self).__name__}.state_dict waited {_PATIENCE:g} seconds for the end of a step in another "
                "thread: call it between steps"
            )
            raise RuntimeError(msg)
        try:
            with nullcontext() if self._stepping is None else self._journal.suspended():
                return super().state_dict()
        finally:
            self._lock.release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base or the wrapper. Its ``weight_decay`` replaces the current one, as in torch."""
        super().load_state_dict(state_dict)
        self._stream.restart()
        self._groups = list(self.param_groups)
        self._warn_if_idle()

    def drop_snapshot(self) -> None:
        """Free the copies of weights, if there are any. The next step that needs them allocates them again."""
        self._plan = None
        self._buffers.drop()

    @property
    def snapshot_bytes(self) -> int:
        """Extra bytes that a step needs at its peak, on this rank.

        For groups on the path "snapshot" this is a copy of their decaying weights; for groups on the path "pieces" one
        piece; otherwise 0. It doubles while a method also copies gradients. Parameters with a sparse gradient count
        with all their rows until the gradient exists.
        """
        of_path: dict[str, list[Tensor]] = {}
        for i, path, _ in self.paths():
            of_path.setdefault(path, []).extend(self.param_groups[i]["params"])
        copies = 2 if self._rule().reads_gradient and self._gradients.copied else 1
        return copies * copied_bytes(of_path.get("snapshot", []), of_path.get("pieces", []))

    def __repr__(self) -> str:
        lams = [weight_decay.lam(group, self.lam) for group in self.param_groups]
        try:
            taken = [of_group.path for of_group in self.paths() if of_group.path != "plain"]
            copied = f"{self.snapshot_bytes}"
        except ValueError:  # a loaded checkpoint rules out the path that the user forces: the next step says why
            taken, copied = [str(self.path)], "?"
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        return (
            f"{type(self).__name__}({self._owner}, lam={_one_or_all(lams)}, path={_one_or_all(taken)}, "
            f"backend={self.backend or kernels.name(None, device)!r}, snapshot_bytes={copied})"
        )

    # ---- parts of the above

    def _new_step(self, journal: Journal, count: bool) -> Step:
        return Step(self.base_optimizer, journal, lambda closure: self._plan_of_step(journal, closure, count))

    def _run(self, step: Step, closure: Closure | None) -> float | None:
        loss = step.run(closure)
        self._plan = step.done
        if not step.begun:
            notices.warn(
                f"{self._owner}.step ran without its step hooks, so {type(self).__name__} did nothing and the step had "
                f"{self._owner}'s own weight decay: if step was replaced on the instance, let the replacement call the "
                "original"
            )
        elif step.done is not None and step.done.work.count and self.observer is not None:
            self.observer(Report(step.done.work.parts))
        return loss

    def _plan_of_step(self, journal: Journal, closure: bool, count: bool) -> Plan:
        """The plan of the coming step: that of the last one, if it holds, or a new one."""
        arguments = [self.__dict__[name] for name in self._settings]
        fresh = closure or count or journal is not self._journal
        last = None if fresh else self._plan
        self._plan = None  # until the step is done: an interrupt may leave it half changed
        if last is not None and last.holds(arguments):
            return last
        rule = self._rule()
        of_wrapper = (self.backend, self._buffers, self._gradients, self._stream)
        work = Work(self.base_optimizer, rule, *of_wrapper, journal, count, self._groups)
        strength = weight_decay.Strength(self.base_optimizer, self.lam, self.step_size, self._way_out)
        check_pieces(rule, strength, self._built_with)
        if rule.draws:
            self._stream.advance(self.base_optimizer)
        with torch.no_grad():
            plan = compile_plan(work, strength, self.path, closure=closure)
        if not fresh:
            plan.keep(arguments)
        return plan

    def _is_looked_at(self) -> bool:
        """True if the coming step is to be reported to the observer."""
        if self.observer is None or all(map(weight_decay.stands_still, self.param_groups)):
            return False
        looks_at = getattr(self.observer, "looks_at", None)
        groups = self.base_optimizer.param_groups
        return looks_at is None or bool(
            looks_at([index_of(self._groups, i, group) for i, group in enumerate(groups) if group["params"]])
        )

    @property
    def _owner(self) -> str:
        return type(self.base_optimizer).__name__

    def _check_base(self, base: Optimizer) -> None:
        """Raise unless ``base`` is an optimizer that this method can wrap."""
        name = type(self).__name__
        check_optimizer(name, base)
        for layer in quirks.layers(base):
            if isinstance(layer, OptimizerWrapper) and (text := self._clash(layer)) is not None:
                msg = f"{name} cannot wrap {layer!r}: {text}"
                raise ValueError(msg)
            if self._rule().reads_gradient and (reason := quirks.many_gradients(layer)) is not None:
                msg = (
                    f"{name} cannot use the gradient of {type(layer).__name__}: {reason}. "
                    'CautiousDecay with mask="update" uses none'
                )
                raise ValueError(msg)
            if (reason := quirks.refusal(layer, getattr(self, "rounding", "nearest"))) is not None:
                msg = f"{name} cannot wrap {type(layer).__name__}: {reason}"
                raise ValueError(msg)

    def _clash(self, inner: "OptimizerWrapper") -> str | None:
        """Why this method cannot wrap ``inner``; None if it can."""
        if inner._what != self._what:
            return None
        return f"it {inner._what}s already, and two wrappers would {inner._what} twice. Pass its base_optimizer instead"

    def _check_group(self, group: Group, index: int, lam: float | None) -> None:
        weight_decay.check_group(group, index, lam, self.step_size, self.base_optimizer, self._way_out)
        if self.path is not None and self._rule().has_work(weight_decay.lam(group, lam)):
            choose(self._rule(), self.base_optimizer, group, self.backend, self.path)
        for device in {p.device for p in group["params"] if not p.is_meta}:
            kernels.name(self.backend, device)

    def _give_lam(self, lam: float | None) -> None:
        """Write ``lam`` into the groups that decay; if none does, into those that did when lam was set before, or all.

        Nothing is changed if a check fails.
        """
        for i, group in enumerate(self.param_groups):
            weight_decay.check(weight_decay.lam(group, None), "weight_decay", f"param group {i} of {self._owner}")
        chosen = weight_decay.take_lam(self.param_groups, lam, self._took)
        for i, (group, take) in enumerate(zip(self.param_groups, chosen, strict=True)):
            self._check_group(group | {"weight_decay": lam} if take else group, i, lam)
        self._lam = lam
        self._took = tuple(i for i, take in enumerate(chosen) if take) or self._took
        for group, take in zip(self.param_groups, chosen, strict=True):
            if take and "weight_decay" in group:
                group["weight_decay"] = lam

    def _warn_if_idle(self) -> None:
        if not self._rule().every_group and not any(weight_decay.decays(g, self.lam) for g in self.param_groups):
            notices.warn(
                f"{type(self).__name__} over {self._owner} has nothing to decay: every param group has weight_decay 0 "
                "or none. Unless a schedule raises it later, pass lam=, or weight_decay= to "
                f"{self._owner} or its groups"
            )


def _one_or_all(values: list[Any]) -> str:
    return repr(values[0]) if len(set(values)) == 1 else repr(values)
