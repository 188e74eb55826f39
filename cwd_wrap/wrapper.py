"""An optimizer around an optimizer: the whole contract of torch.optim.Optimizer, and the course of a step, once.

The wrapper owns no parameter, no group and no state: ``param_groups``, ``state`` and ``defaults`` are the base's own
objects, looked up each time, since schedulers, checkpoints and engines replace them. What is forwarded is forwarded by
name; there is no ``__getattr__``, so that GradScaler meets a plain optimizer, unscales for it and skips for it.
"""

import functools
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import kernels, quirks, strength
from cwd_wrap.batch import Batch, Report, Rows, Tally
from cwd_wrap.decay_off import DecayOff
from cwd_wrap.directions import Direction
from cwd_wrap.over import make
from cwd_wrap.snapshot import Snapshots
from cwd_wrap.tensors import plain, sparse_indices

if TYPE_CHECKING:
    from typing_extensions import Self

Closure = Callable[[], float]
Group = dict[str, Any]
StepFunction = TypeVar("StepFunction", bound=Callable[..., Any])


def _forwarded(name: str) -> property:
    """The base's attribute of that name; where the base has none, the wrapper has none either (AttributeError)."""
    return property(lambda self: getattr(self.base_optimizer, name))


def _with_hooks(step: StepFunction) -> StepFunction:
    """Fire the wrapper's own step hooks around ``step``.

    torch patches every ``step`` to do so, unless it is marked as ``hooked``; but its patch would fire the global hooks
    as well, which the base's step does already, and they count steps (the profiler's do).
    """

    @functools.wraps(step)
    def hooked(self: "OptimizerWrapper", *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            arguments: tuple[Any, ...] = (self, *args)
            for pre_hook in self._optimizer_step_pre_hooks.values():
                changed = pre_hook(self, arguments, kwargs)
                if changed is not None:
                    arguments, kwargs = changed
            result = step(*arguments, **kwargs)
            for post_hook in self._optimizer_step_post_hooks.values():
                post_hook(self, arguments, kwargs)
            return result

    hooked.hooked = True  # type: ignore[attr-defined]
    return cast("StepFunction", hooked)


class OptimizerWrapper(Optimizer):
    """What `CautiousDecay` and its siblings share; a subclass names its rule.

    The base is stepped with every group's ``weight_decay`` at 0, which is restored whatever is raised; the decay is
    the wrapper's.
    """

    base_optimizer: Optimizer
    observer: Callable[[Report], object] | None
    """Called with a `Report` after each step, if set. Like hooks, it is not pickled."""

    _settings: ClassVar[tuple[str, ...]] = ("lam", "step_size", "backend")

    def __init__(
        self, base_optimizer: Optimizer, lam: float | None, step_size: strength.StepSize | None, backend: str | None
    ) -> None:
        self._check_base(base_optimizer)
        kernels.check(backend)
        if lam is not None:
            strength.check(lam, "lam", type(self).__name__)
        if step_size is not None and not callable(step_size):
            msg = (
                f"step_size={step_size!r} is not callable: pass a function of a param group that returns its step size"
            )
            raise TypeError(msg)
        self.base_optimizer = base_optimizer
        self.lam = lam
        self.step_size = step_size
        self.backend = backend
        self._start()
        self._give_lam()

    @classmethod
    def over(cls, base_class: type[Optimizer], **options: Any) -> "type[Self]":
        """A class that builds ``base_class`` from parameters and wraps it, for every place that asks for a class.

        Its constructor is the base's: ``over(AdamW)(params, lr=1e-3, weight_decay=0.1)``. ``options`` are this
        wrapper's own keyword arguments. The class and its instances can be pickled and copied; asked for twice, it is
        the same class. Raises TypeError for anything but an optimizer class.
        """
        if not (isinstance(base_class, type) and issubclass(base_class, Optimizer)):
            msg = f"{cls.__name__}.over takes a class of optimizers, such as torch.optim.AdamW, got {base_class!r:.80}"
            raise TypeError(msg)
        return cast("type[Self]", make(cls, base_class, tuple(sorted(options.items()))))

    def _start(self) -> None:
        """Make what is neither a setting nor the base's: at construction and after unpickling."""
        # Optimizer.__init__ would build groups and state of its own; these are the other things it makes.
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._snapshots = Snapshots()
        self.observer = None

    # ---- the rule, named by the subclass

    def _direction(self, group: Group) -> Direction | str:
        """How to know the coming update's sign in this group, or why a snapshot is needed."""
        raise NotImplementedError

    def _before_step(self, kernel: ModuleType, batch: Batch) -> int | Tensor:
        """Carry the rule out on weights that are about to be stepped; return how many were decayed if observed."""
        raise NotImplementedError

    def _after_step(self, kernel: ModuleType, batch: Batch) -> int | Tensor:
        """Carry the rule out on weights that have been stepped; return how many were decayed if observed."""
        raise NotImplementedError

    # ---- torch.optim.Optimizer: the base's own objects, always fresh

    @property
    def param_groups(self) -> list[Group]:
        """The base's param groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base. One that names no ``weight_decay`` gets ``lam``, if that was given."""
        named = "weight_decay" in param_group
        strength.check_group(self.defaults | param_group, len(self.param_groups), self.lam, self.step_size, self._owner)
        self.base_optimizer.add_param_group(param_group)
        added = self.param_groups[-1]
        if self.lam is not None and not named and "weight_decay" in added:
            added["weight_decay"] = self.lam

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, key for key: a checkpoint of the plain optimizer and one of this are the same."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base, or of this. Its ``weight_decay`` is the decay from here on, as with torch."""
        state_dict = state_dict.copy()  # the hooks may change it, the caller's stays
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base_optimizer.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("base_optimizer", *self._settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # what Optimizer.load_state_dict hands over: state and param_groups
            self.base_optimizer.__setstate__(state)
            return
        self.__dict__.update(state)
        self._start()

    # Trainer and accelerate ask for train and eval, timm's train.py for the others; each exists where the base has it.
    train = _forwarded("train")
    eval = _forwarded("eval")
    is_second_order = _forwarded("is_second_order")
    sync_lookahead = _forwarded("sync_lookahead")

    # ---- the step

    @_with_hooks
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One step of the base with its decay off, and the wrapper's own decay.

        ``closure`` runs with gradients enabled, as often as the base wants it to. A parameter without a gradient, or a
        row without one where gradients are sparse, is not decayed. Raises ValueError where a group's ``weight_decay``
        or step size is negative, NaN, infinite or unknown; nothing is changed then.
        """
        if self._snapshot_reason() is None:
            return self._step_along(closure)
        return self._step_from_snapshot(closure)

    def _step_along(self, closure: Closure | None) -> float | None:
        """Decay along the direction of the coming update, then step: nothing is copied."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        switch, rows, tally = DecayOff(self.base_optimizer), list[Rows](), Tally()

        def last_moment(*_: object) -> None:
            eta_lams = self._eta_lams()
            switch.off()
            with torch.no_grad():
                self._decay_along(eta_lams, rows, tally)

        # As the base's last hook, so that gradients which another hook still changes (clipping) are seen as the step
        # will see them, and a step that somebody skips is a step that does not decay.
        handle = self.base_optimizer.register_step_pre_hook(last_moment)
        try:
            self.base_optimizer.step()
        finally:
            handle.remove()
            switch.on()
        with torch.no_grad():
            self._decay_rows(rows, tally)
        self._report(tally)
        return loss

    def _step_from_snapshot(self, closure: Closure | None) -> float | None:
        """Copy the weights, step, and decay those that the step took towards zero."""
        eta_lams = self._eta_lams()
        members = [(p, i) for p, i in self._members(eta_lams) if closure is not None or p.grad is not None]
        stepped = {id(p) for p, _ in members if p.grad is not None}
        switch, rows, tally = DecayOff(self.base_optimizer), list[Rows](), Tally()

        def forwarded() -> float:
            nonlocal eta_lams, stepped
            switch.on()
            with torch.enable_grad():
                loss = cast("Closure", closure)()
            eta_lams = self._eta_lams()
            stepped = {id(p) for p, _ in members if p.grad is not None}
            switch.off()
            return loss

        with torch.no_grad():
            if closure is None:
                rows = [Rows.of(p, p.grad, eta_lams[i]) for p, i in members if p.grad is not None and p.grad.is_sparse]
                members = [(p, i) for p, i in members if not _is_sparse(p)]
            copies = self._snapshots.take([p for p, _ in members], [plain(p) for p, _ in members])
        switch.off()
        try:
            loss = self.base_optimizer.step() if closure is None else self.base_optimizer.step(forwarded)
        finally:
            switch.on()
        with torch.no_grad():
            batches: dict[object, Batch] = defaultdict(Batch)
            for (p, i), x in zip(members, copies, strict=True):
                if id(p) not in stepped or _is_zero(eta_lams[i]):
                    continue
                if _is_sparse(p):
                    indices = sparse_indices(cast("Tensor", p.grad))
                    rows.append(Rows(p, indices, x[indices], eta_lams[i]))
                    continue
                w = plain(p)
                batch = batches[w.device, w.dtype]
                batch.w.append(w)
                batch.x.append(x)
                batch.eta_lam.append(eta_lams[i])
            for batch in batches.values():
                tally.add(batch, self._after_step(kernels.choose(self.backend, batch.w[0].device), batch))
            self._decay_rows(rows, tally)
        self._report(tally)
        return loss

    def drop_snapshot(self) -> None:
        """Give back the memory of the snapshot; the next step takes it anew. Nothing happens where none was taken."""
        self._snapshots.drop()

    @property
    def snapshot_bytes(self) -> int:
        """Extra bytes needed at the peak of a step, on this rank: a copy of the decaying weights, or 0 without one.

        Parameters whose gradient is sparse count with all their rows until the gradient is there.
        """
        if self._snapshot_reason() is None:
            return 0
        parameters = [
            p
            for group in self.param_groups
            if strength.decays(group, self.lam)
            for p in group["params"]
            if p.requires_grad
        ]
        local = [plain(p) for p in {id(p): p for p in parameters if not _is_sparse(p)}.values()]
        return sum(t.numel() * t.element_size() for t in local)

    def __repr__(self) -> str:
        lams = [strength.lam(group, self.lam) for group in self.param_groups]
        reason = self._snapshot_reason()
        path = "direction" if reason is None else "snapshot"
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        backend = self.backend or kernels.name(None, device)
        return (
            f"{type(self).__name__}({self._owner}, lam={lams[0] if len(set(lams)) == 1 else lams}, path={path!r}, "
            f"backend={backend!r}, snapshot_bytes={self.snapshot_bytes})"
        )

    # ---- parts of the above

    @property
    def _owner(self) -> str:
        return type(self.base_optimizer).__name__

    def _check_base(self, base: object) -> None:
        """Raise unless ``base`` is an optimizer that this can be put around."""
        name = type(self).__name__
        if isinstance(base, type) and issubclass(base, Optimizer):
            msg = (
                f"{name} wraps an optimizer, not a class of them: pass {base.__name__}(params, ...), "
                f"or make a class with {name}.over({base.__name__})"
            )
            raise TypeError(msg)
        if not isinstance(base, Optimizer):
            msg = f"{name} wraps a torch.optim.Optimizer, got {type(base).__name__}: {base!r:.80}"
            raise TypeError(msg)
        for layer in _layers(base):
            if isinstance(layer, OptimizerWrapper):
                msg = f"{layer!r} decays already; a {name} around it would decay twice: pass its base_optimizer instead"
                raise ValueError(msg)
            if (reason := quirks.refusal(layer)) is not None:
                msg = f"{name} cannot be put around {type(layer).__name__}: {reason}"
                raise ValueError(msg)

    def _give_lam(self) -> None:
        """Write ``lam`` into the groups that decay, or into all if none does; change nothing if a group is unfit."""
        has_decay = [strength.decays(group, None) or "weight_decay" not in group for group in self.param_groups]
        chosen = [self.lam is not None and (has or not any(has_decay)) for has in has_decay]
        for i, (group, take) in enumerate(zip(self.param_groups, chosen, strict=True)):
            given = group | {"weight_decay": self.lam} if take else group
            strength.check_group(given, i, self.lam, self.step_size, self._owner)
            self._direction(group)  # raises where a snapshot is needed and forbidden
        for group, take in zip(self.param_groups, chosen, strict=True):
            if take and "weight_decay" in group:
                group["weight_decay"] = self.lam
        if (remark := quirks.warning(self.base_optimizer)) is not None:
            warnings.warn(f"{type(self).__name__} over {self._owner}: {remark}", stacklevel=4)
        if self.lam is None and not any(strength.decays(group, None) for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__} over {self._owner} has nothing to decay: every param group has weight_decay 0 "
                f"or none. Pass lam=, or weight_decay= to {self._owner} or its groups",
                stacklevel=4,
            )

    def _eta_lams(self) -> list[float | Tensor]:
        return [
            strength.eta_lam(group, i, self.lam, self.step_size, self._owner)
            for i, group in enumerate(self.param_groups)
        ]

    def _snapshot_reason(self) -> str | None:
        """Why the coming step needs a snapshot; None if every decaying group has a direction."""
        for group in self.param_groups:
            if strength.decays(group, self.lam) and isinstance(reason := self._direction(group), str):
                return reason
        return None

    def _members(self, eta_lams: list[float | Tensor]) -> Iterator[tuple[Tensor, int]]:
        """Each parameter that decays, once, with its group's index. Walked afresh: engines replace parameters."""
        seen: set[int] = set()
        for i, group in enumerate(self.param_groups):
            if _is_zero(eta_lams[i]):
                continue
            for p in group["params"]:
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p, i

    def _decay_along(self, eta_lams: list[float | Tensor], rows: list[Rows], tally: Tally) -> None:
        batches: dict[object, Batch] = defaultdict(Batch)
        of_group = [self._direction(group) for group in self.param_groups]
        for p, i in self._members(eta_lams):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                rows.append(Rows.of(p, p.grad, eta_lams[i]))
                continue
            m, a, b = cast("Direction", of_group[i]).of(self.state.get(p, {}))
            w, g = plain(p), plain(p.grad)
            m = None if m is None else plain(m)
            batch = batches[w.device, w.dtype, g.dtype, None if m is None else m.dtype]
            batch.w.append(w)
            batch.g.append(g)
            batch.m.append(m)
            batch.a.append(a)
            batch.b.append(b)
            batch.eta_lam.append(eta_lams[i])
        for batch in batches.values():
            tally.add(batch, self._before_step(kernels.choose(self.backend, batch.w[0].device), batch))

    def _decay_rows(self, rows: list[Rows], tally: Tally) -> None:
        for parameter, indices, before, eta_lam in rows:
            w = plain(parameter)
            batch = Batch(eta_lam=[eta_lam], w=[w[indices]], x=[before])
            tally.add(batch, self._after_step(kernels.choose(self.backend, batch.w[0].device), batch))
            w[indices] = batch.w[0]

    def _report(self, tally: Tally) -> None:
        if self.observer is not None:
            self.observer(Report(tally.active, tally.total))


def _layers(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer, and those inside it under the names in use for that."""
    while isinstance(optimizer, Optimizer):
        yield optimizer
        names = ("base_optimizer", "_base_optimizer", "optimizer")
        optimizer = next((inner for name in names if (inner := getattr(optimizer, name, None)) is not None), None)


def _is_zero(eta_lam: float | Tensor) -> bool:
    return not isinstance(eta_lam, Tensor) and eta_lam == 0


def _is_sparse(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse
