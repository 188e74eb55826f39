"""Base class of CautiousDecay, CautiousUpdate and PNormDecay: checks, lam, step and repr. `Step` does one step."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import kernels, notices, params_first
from cwd_wrap.bases import quirks, weight_decay
from cwd_wrap.bases.journal import Journal
from cwd_wrap.draws import Stream
from cwd_wrap.methods.contract import Contract, Group, check_optimizer, with_hooks
from cwd_wrap.report import Report
from cwd_wrap.step.choice import Method, PathOfGroup, check_path, check_pieces, choose, paths_of
from cwd_wrap.step.paths import Work, copied_bytes, index_of
from cwd_wrap.step.plan import Plan, compile_plan
from cwd_wrap.step.snapshot import Buffers, Gradients
from cwd_wrap.step.step import Closure, Step, is_unheard
from cwd_wrap.tensors import made_of_others

if TYPE_CHECKING:
    from typing_extensions import Self


_NOT_READ = {"initial_accumulator_value", "maximize"}  # by a step of Adagrad; and of others, unless it is there
_PATIENCE = 60.0  # seconds that a state dict waits for a step in another thread
_GLANCE = 0.2  # seconds that a repr waits


_alive: "WeakSet[OptimizerWrapper]" = WeakSet()


def _end_steps_of_other_threads() -> None:
    """In a forked child the threads that stepped are gone: undo what they had changed, and make their locks anew."""
    for wrapper in _alive:
        if not wrapper._lock._is_owned():  # type: ignore[attr-defined]
            wrapper._lock = RLock()
            if wrapper._stepping is not None:
                wrapper._stepping.undo()
                wrapper._stepping = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_end_steps_of_other_threads)


class OptimizerWrapper(Contract):
    """Steps the base with ``weight_decay`` 0 and applies the method's rule around it.

    Every group's ``weight_decay`` is restored after the step, also if the step raises. A subclass defines `_method`.
    """

    _settings: ClassVar[tuple[str, ...]] = ("_lam", "_took", "_step_size", "path", "backend")
    _seed = 0
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
        self.base_optimizer = base_optimizer
        self.step_size = step_size
        self.path = path
        self.backend = backend
        self._took: tuple[int, ...] = ()
        """The groups that took lam when it was last set."""
        self._start()
        weight_decay.look_anew(base_optimizer)
        self._give_lam(lam)
        if lam is None and not isinstance(base_optimizer, OptimizerWrapper):  # which has said it
            self._warn_if_coupled()
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
        self._stream = Stream(self._seed, self.__dict__.pop("_steps_taken", None))
        self.observer = None
        self._built_with = set(map(quirks.shapes, self.param_groups))
        self._groups = list(self.param_groups)
        self._lock = RLock()
        self._plan: Plan | None = None
        self._stepping: Step | None = None
        self._journal = Journal()
        self._asked = False  # was the observer asked about the step?
        _alive.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_steps_taken": self._stream.steps}

    def _method(self) -> Method:
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
        if self._lock._is_owned():  # type: ignore[attr-defined]  # a step inside a step, in a hook or a closure
            return self._run(self._new_step(Journal(), self._is_looked_at()), closure)
        with self._lock:
            if self._stepping is not None:  # a step was interrupted, and again while it restored the groups
                self._stepping.undo()
            count = self._is_looked_at()
            if closure is None and not count and self._stepped_alone():
                return None
            self._stepping = step = self._new_step(self._journal, count)
            try:
                return self._run(step, closure)
            finally:
                self._stepping = None

    @property
    def lam(self) -> float | Tensor | None:
        """The decay strength that is in force: the ``weight_decay`` of the groups that decay.

        None if they differ, 0 if no group decays. The step size multiplies it. It is read from the groups, so it shows
        what a checkpoint or a schedule has written. Setting it writes it into every group that decays. If none does, it
        is written into the groups that took lam when it was last set (so lam may rise from 0), or else into all. None
        leaves each group its own.
        """
        with self._between_steps("lam"):
            lams = [weight_decay.lam(g, self._lam) for g in self.param_groups if weight_decay.decays(g, self._lam)]
        return 0.0 if not lams else lams[0] if all(_equal(each, lams[0]) for each in lams) else None

    @lam.setter
    def lam(self, value: float | None) -> None:
        if value is not None:
            weight_decay.check(value, "lam", type(self).__name__)
        self._give_lam(value)

    @property
    def step_size(self) -> weight_decay.StepSize | None:
        """The function of a param group that returns eta, or None. It may be set between steps."""
        return self._step_size

    @step_size.setter
    def step_size(self, value: weight_decay.StepSize | None) -> None:
        weight_decay.check_step_size(value)
        self._step_size = value

    @property
    def observer(self) -> Callable[[Report], object] | None:
        """Called with a `Report` after each step, unless every group's ``lr`` is 0. Like hooks, it is not pickled.

        If it has a method ``looks_at``, this is called before each such step with the indices of the groups that step.
        If it returns False, the step is neither counted nor reported. If the step then raises, its method
        ``step_failed`` is called, if it has one.
        """
        return cast("Callable[[Report], object] | None", self.__dict__["observer"])

    @observer.setter
    def observer(self, value: Callable[[Report], object] | None) -> None:
        if isinstance(value, type):
            msg = f"observer is the class {value.__name__}: set an instance, such as {value.__name__}()"
            raise TypeError(msg)
        if value is not None and not callable(value):
            msg = f"observer={value!r:.80} cannot be called: set a MaskMonitor(), or a function that takes a Report"
            raise TypeError(msg)
        self.__dict__["observer"] = value

    def paths(self) -> list[PathOfGroup]:
        """Which path each param group takes, and why; "plain" for a group that does not decay."""
        with self._between_steps("paths"):
            lams = [weight_decay.lam(group, self._lam) for group in self.param_groups]
            return paths_of(self._method(), self.base_optimizer, lams, self.backend, self.path)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base. It gets ``lam``, if that was given, unless it has a ``weight_decay`` of its own.

        Raises what the constructor raises for such a group. It is not added then.
        """
        if not isinstance(param_group, dict):
            msg = f"param_group must be a dict, but got {type(param_group).__name__}"
            raise TypeError(msg)
        if isinstance(param_group.get("params"), Iterator):  # which can be read once
            param_group["params"] = list(param_group["params"])
        given, had = dict(param_group), set(self.state)
        super().add_param_group(param_group)
        added, index = self.param_groups[-1], len(self.param_groups) - 1
        if self._lam is not None and "weight_decay" not in given and "weight_decay" in added:
            added["weight_decay"] = self._lam
        weight_decay.look_anew(self.base_optimizer, index)
        try:
            self._check_base(self.base_optimizer)
            self._check_group(added, index, self._lam)
        except BaseException:
            self.param_groups.pop()
            for p in self.state.keys() - had:
                del self.state[p]
            param_group.clear()  # torch has written the defaults into it
            param_group.update(given)
            raise
        self._built_with.add(quirks.shapes(added))
        self._groups = list(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, key for key: checkpoints of the plain optimizer and of the wrapper are the same.

        In a signal handler that interrupts a step, the param groups in it are those from between steps. Another thread
        waits for the end of the step; it raises RuntimeError after a minute (a step that waits for that thread).
        """
        with self._between_steps("state_dict"):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base or the wrapper.

        Its ``weight_decay`` replaces the current one, as in torch. If that was given as lam, a warning names both: to
        go on with yours, set ``lam`` afterwards.
        """
        before = self.state, self.param_groups
        super().load_state_dict(state_dict)
        self._check_options(before)
        self._plan = None
        self._stream.restart()
        self._groups = list(self.param_groups)
        if not self._lam_was_replaced():
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
        with all their rows until the gradient exists. Not counted: for `CautiousUpdate` and `PNormDecay` on the path
        "one_pass" the first step of a parameter, in which the base makes its state, takes a path with a copy.
        """
        with self._between_steps("snapshot_bytes"):
            of_path: dict[str, list[Tensor]] = {}
            for i, path, _ in self.paths():
                of_path.setdefault(path, []).extend(self.param_groups[i]["params"])
            copies = 2 if self._method().reads_gradient and self._gradients.copied else 1
            return copies * copied_bytes(of_path.get("snapshot", []), of_path.get("pieces", []))

    def __repr__(self) -> str:
        """What it does, in a line. It raises nothing and waits for no step, since errors and debuggers print it."""
        try:
            if not self._lock.acquire(timeout=_GLANCE):
                return f"{type(self).__name__}({self._owner}, in a step of another thread)"
            try:
                with self._between_steps("__repr__"):
                    return self._described()
            finally:
                self._lock.release()
        except Exception as error:  # noqa: BLE001  # of a group without its options, or of a wrapper that is half built
            return f"<{type(self).__name__}, not described: {type(error).__name__}: {error!s:.100}>"

    # ---- parts of the above

    def _described(self) -> str:
        lams = [weight_decay.lam(group, self._lam) for group in self.param_groups]
        try:
            taken = [of_group.path for of_group in self.paths() if of_group.path != "plain"]
            copied = f"{self.snapshot_bytes}"
        except ValueError:  # a loaded checkpoint rules out the path that the user forces: the next step says why
            taken, copied = [str(self.path)], "?"
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        return (
            f"{type(self).__name__}({self._owner}, lam={_summary(lams)}, path={_summary(taken or ['plain'])}, "
            f"backend={self.backend or kernels.name(None, device)!r}, snapshot_bytes={copied})"
        )

    def _new_step(self, journal: Journal, count: bool) -> Step:
        return Step(self.base_optimizer, journal, lambda closure: self._plan_of_step(journal, closure, count))

    def _run(self, step: Step, closure: Closure | None) -> float | None:
        try:
            loss = step.run(closure)
        except BaseException:
            self._tell_that_it_failed()
            raise
        self._plan = step.done if step.done is not None and step.done.is_kept else None
        if not step.begun:
            notices.warn(
                f"{self._owner}.step did not fire its hooks, so {type(self).__name__} had no effect and {self._owner} "
                f"used its own weight decay. If you replaced {self._owner}.step, call the original from the replacement"
            )
        elif step.done is not None and step.done.work.count and self.observer is not None:
            self.observer(Report(step.done.work.parts))
        return loss

    def _stepped_alone(self) -> bool:
        """Make the step without the base's own, if that would find nothing to do and no hook or profiler sees it.

        On small models, the base's step of nothing would take a third of the time.
        """
        plan, self._plan = self._plan, None  # until the step is done: an interrupt may leave it half changed
        if plan is None or plan.alone is None or not is_unheard(self.base_optimizer):
            self._plan = plan
            return False
        try:
            if not plan.holds(self._arguments()):
                return False
            plan.act_alone()
        except BaseException:
            self._tell_that_it_failed()
            raise
        self._plan = plan
        return True

    def _arguments(self) -> list[object]:
        """What a plan is made from, of the wrapper itself."""
        return [self.base_optimizer, *(self.__dict__[name] for name in self._settings)]

    def _plan_of_step(self, journal: Journal, closure: bool, count: bool) -> Plan:
        """The plan of the coming step: that of the last one, if it holds, or a new one."""
        arguments = self._arguments()
        fresh = closure or count or journal is not self._journal
        last = None if fresh else self._plan
        self._plan = None  # until the step is done: an interrupt may leave it half changed
        if last is not None and last.holds(arguments):
            return last
        method = self._method().apart_from(self)
        of_wrapper = (self.backend, self._buffers, self._gradients, self._stream)
        work = Work(self.base_optimizer, method, *of_wrapper, journal, count, self._groups)
        strength = weight_decay.Strength(self.base_optimizer, self._lam, self.step_size, self._way_out)
        check_pieces(method, strength, self._built_with)
        if method.draws:
            self._stream.begin(self.base_optimizer)
        with torch.no_grad():
            plan = compile_plan(work, strength, self.path, closure=closure)
        if not fresh:
            plan.keep(arguments)
        return plan

    @contextmanager
    def _between_steps(self, what: str) -> Iterator[None]:
        """Inside this context the groups are as they are between steps. Another thread's step is waited for."""
        if not self._lock.acquire(timeout=_PATIENCE):
            msg = (
                f"{type(self).__name__}.{what} waited {_PATIENCE:g} seconds for the end of a step in another thread: "
                "call it between steps"
            )
            raise RuntimeError(msg)
        try:
            with nullcontext() if self._stepping is None else self._journal.suspended():
                yield
        finally:
            self._lock.release()

    def _is_looked_at(self) -> bool:
        """True if the coming step is to be reported to the observer."""
        self._asked = self.observer is not None and not all(map(weight_decay.stands_still, self.param_groups))
        if not self._asked:
            return False
        looks_at = getattr(self.observer, "looks_at", None)
        groups = self.base_optimizer.param_groups
        return looks_at is None or bool(
            looks_at([index_of(self._groups, i, group) for i, group in enumerate(groups) if group["params"]])
        )

    def _tell_that_it_failed(self) -> None:
        """Tell the observer that the step that it was asked about has raised."""
        step_failed = getattr(self.observer, "step_failed", None) if self._asked else None
        if step_failed is not None:
            step_failed()

    @property
    def _owner(self) -> str:
        return type(self.base_optimizer).__name__

    def _check_base(self, base: Optimizer) -> None:
        """Raise unless ``base`` is an optimizer that this method can wrap."""
        name = type(self).__name__
        check_optimizer(name, base)
        for layer in quirks.all_layers(base):
            if isinstance(layer, OptimizerWrapper) and (text := self._clash(layer)) is not None:
                msg = f"{name} cannot wrap {layer!r}: {text}"
                raise ValueError(msg)
            if self._method().reads_gradient and (reason := quirks.many_gradients(layer)) is not None:
                msg = (
                    f"{name} cannot use the gradient of {type(layer).__name__}: {reason}. "
                    'CautiousDecay with mask="update" uses none'
                )
                raise ValueError(msg)
            averages = layer is base and self._method().averages
            if (reason := quirks.refusal(layer, getattr(self, "rounding", "nearest"), averages=averages)) is not None:
                msg = f"{name} cannot wrap {type(layer).__name__}: {reason}"
                raise ValueError(msg)
            if inside := [type(inner).__name__ for inner in quirks.apart(layer)]:
                msg = (
                    f"{name} cannot wrap {type(layer).__name__}: it holds optimizers with param groups of their own "
                    f"({', '.join(inside)}), whose decay would stay on. Wrap each of these instead"
                )
                raise ValueError(msg)

    def _clash(self, inner: "OptimizerWrapper") -> str | None:
        """Why this method cannot wrap ``inner``; None if it can."""
        if inner._what != self._what:
            return None
        return f"it {inner._what}s already, and two wrappers would {inner._what} twice. Pass its base_optimizer instead"

    def _check_group(self, group: Group, index: int, lam: float | None) -> None:
        acts = self._method().has_work(weight_decay.lam(group, lam))
        weight_decay.check_group(group, index, lam, self.step_size, self.base_optimizer, self._way_out, acts)
        if acts:
            self._check_weights(group, index)
            if self.path is not None or quirks.refusal_of(type(self.base_optimizer)) is not None:
                choose(self._method(), self.base_optimizer, group, self.backend, self.path)
        for device in {p.device for p in group["params"] if not p.is_meta}:
            kernels.name(self.backend, device)

    def _check_weights(self, group: Group, index: int) -> None:
        """Raise for a weight that kernels cannot write to."""
        for p in group["params"]:
            if p.requires_grad and made_of_others(p):
                msg = (
                    f"param group {index} of {self._owner} has a weight of type {type(p).__name__}, which is made of "
                    "other tensors (as quantized weights are), and cannot be written by place: give its group "
                    "weight_decay=0, or train a plain tensor"
                )
                raise ValueError(msg)

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

    def _warn_if_coupled(self) -> None:
        """Warn if ``weight_decay`` was chosen for a coupled decay, so that it is another strength here."""
        for i, group in enumerate(self.param_groups):
            if (why := weight_decay.coupling(group, i, self.base_optimizer)) is not None:
                notices.warn(
                    f"{type(self).__name__} decays by lr * weight_decay. {self._owner}'s own decay is coupled: {why}. "
                    "So the same weight_decay is another strength here: choose it anew, and pass it as lam="
                )
                return

    def _check_options(self, before: tuple[Any, list[Group]]) -> None:
        """Raise if a checkpoint lacks options that torch's optimizer reads; then state and groups are as ``before``."""
        if not f"{type(self.base_optimizer).__module__}.".startswith("torch.optim."):
            return  # an option may be new in a later version, with a default for old checkpoints
        for i, group in enumerate(self.param_groups):
            if missing := sorted(self.defaults.keys() - group.keys() - _NOT_READ):
                self.state, self.param_groups = before
                msg = (
                    f"the checkpoint is of another optimizer than {self._owner}: its param group {i} has no "
                    f"{', '.join(missing)}. Load a checkpoint of {self._owner}"
                )
                raise ValueError(msg)

    def _lam_was_replaced(self) -> bool:
        """Compare lam with what a checkpoint has written into the groups that took it. Warns, and keeps the new one."""
        groups = [group for i, group in enumerate(self.param_groups) if i in self._took]
        loaded = [weight_decay.lam(group, self._lam) for group in groups]
        before = self._lam
        if before is None or all(_equal(each, before) for each in loaded):
            return False
        least, most = min(map(float, loaded)), max(map(float, loaded))
        by = f"{most:g}" if least == most else f"{least:g} to {most:g}"
        lam = f"{float(before):g}"
        notices.warn(
            f"{type(self).__name__}.load_state_dict replaced lam={lam} by weight_decay {by} of the checkpoint: to go "
            f"on with yours, set opt.lam = {lam} after loading"
        )
        self._lam = most if least == most else before
        return True

    def _warn_if_idle(self) -> None:
        """Warn if nothing decays, unless lam=0 asked for that: it is the baseline of a sweep."""
        asked = self._lam is not None and not weight_decay.decays({}, self._lam)
        if asked or self._method().every_group or any(weight_decay.decays(g, self._lam) for g in self.param_groups):
            return
        why = f"{self._owner} has no weight_decay. Pass lam="
        if any("weight_decay" in group for group in self.param_groups):
            why = (
                f"weight_decay is 0 in every param group. Pass lam=, or set weight_decay in {self._owner}. "
                "(Ignore this if a schedule raises it later.)"
            )
        notices.warn(f"{type(self).__name__}({self._owner}) will not decay anything: {why}")


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    return a is b or bool(a == b)


def _summary(values: Sequence[object]) -> str:
    """The values of all groups, for the repr: one, a short list, counts, or a range of numbers."""
    texts = list(map(repr, values))
    counts = {text: texts.count(text) for text in texts}
    if len(counts) <= 1:
        return "".join(counts)
    if len(texts) <= 4:
        return f"[{', '.join(texts)}]"
    if len(counts) <= 4:
        return ", ".join(f"{text} ({count} group{'s' * (count > 1)})" for text, count in counts.items())
    numbers = sorted(map(float, cast("Sequence[float]", values)))
    return f"{numbers[0]} to {numbers[-1]} ({len(numbers)} groups)"
