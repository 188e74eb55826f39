"""The course of a step: the base steps with its decay off, and the rule that a subclass names is carried out too."""

import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cwd_wrap import kernels, quirks, weight_decay
from cwd_wrap.batch import Batch, Report, Rows, Tally
from cwd_wrap.contract import Contract, Group, with_hooks
from cwd_wrap.directions import Direction
from cwd_wrap.params_first import make
from cwd_wrap.snapshot import Snapshots
from cwd_wrap.tensors import plain, sparse_indices
from cwd_wrap.weight_decay import DecayOff

if TYPE_CHECKING:
    from typing_extensions import Self

Closure = Callable[[], float]


class OptimizerWrapper(Contract):
    """What `CautiousDecay` and its siblings share; a subclass names its rule.

    The base is stepped with every group's ``weight_decay`` at 0, which is restored whatever is raised; the decay is
    the wrapper's.
    """

    observer: Callable[[Report], object] | None
    """Called with a `Report` after each step, if set. Like hooks, it is not pickled."""

    _settings: ClassVar[tuple[str, ...]] = ("lam", "step_size", "backend")

    def __init__(
        self, base_optimizer: Optimizer, lam: float | None, step_size: weight_decay.StepSize | None, backend: str | None
    ) -> None:
        self._check_base(base_optimizer)
        kernels.check(backend)
        if lam is not None:
            weight_decay.check(lam, "lam", type(self).__name__)
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
    def over(cls, base_class: type[Optimizer], **options: Any) -> "Callable[..., Self]":
        """A class that builds ``base_class`` from parameters and wraps it, for every place that asks for a class.

        Its constructor is the base's: ``over(AdamW)(params, lr=1e-3, weight_decay=0.1)``. ``options`` are this
        wrapper's own keyword arguments. The class and its instances can be pickled and copied; asked for twice, it is
        the same class. Raises TypeError for anything but an optimizer class, and for unknown options.
        """
        if not (isinstance(base_class, type) and issubclass(base_class, Optimizer)):
            msg = f"{cls.__name__}.over takes a class of optimizers, such as torch.optim.AdamW, got {base_class!r:.80}"
            raise TypeError(msg)
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "base_optimizer")]
        if unknown := sorted(set(options) - set(known)):
            msg = f"{cls.__name__}.over got {', '.join(unknown)}, which {cls.__name__} does not take: it takes {known}"
            raise TypeError(msg)
        return cast("Callable[..., Self]", make(cls, base_class, tuple(sorted(options.items()))))

    def _start(self) -> None:
        super()._start()
        self._snapshots = Snapshots()
        self._keeps_gradients = self._reads_gradient  # until a step has shown that the base leaves them as they are
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

    _reads_gradient = False
    """Does `_after_step` want the gradients?"""
    _way_out = weight_decay.WAY_OUT
    """What the user of this wrapper can do where a learning rate is unknown."""
    _what = "decay"
    """What it does, for the text that refuses to do it twice."""

    def _takes(self, eta_lam: float | Tensor) -> bool:
        """Does a group of this strength have anything to do?"""
        return isinstance(eta_lam, Tensor) or eta_lam != 0

    # ---- for users

    @torch._disable_dynamo  # type: ignore[attr-defined]  # compiled, the decay put back would be lost (torch 2.14)
    @with_hooks
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One step of the base with its decay off, and the wrapper's own decay.

        ``closure`` runs with gradients enabled, as often as the base wants it to. A parameter without a gradient, or a
        row without one where gradients are sparse, is not decayed. Raises ValueError where a group's ``weight_decay``
        or step size is negative, NaN, infinite or unknown; nothing is changed then.
        """
        loss = None
        if closure is not None and all(isinstance(self._direction(group), Direction) for group in self.param_groups):
            with torch.enable_grad():
                loss = closure()
            closure = None
        course = _Course(self, closure)
        handles = course.hook_in() if self._base_fires_hooks() else []
        try:
            if not handles:
                course.begin()
            stepped = self.base_optimizer.step() if closure is None else self.base_optimizer.step(course.closure)
            course.finish()
        finally:
            for handle in handles:
                handle.remove()
            course.switch.on()
        self._report(course)
        return stepped if loss is None else loss

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base. One that names no ``weight_decay`` gets ``lam``, if that was given."""
        if not isinstance(param_group, dict):
            msg = f"param_group must be a dict, but got {type(param_group).__name__}"
            raise TypeError(msg)
        named = "weight_decay" in param_group
        self._check_snapshot(self._reason(self.defaults | param_group))
        weight_decay.check_group(
            self.defaults | param_group,
            len(self.param_groups),
            self.lam,
            self.step_size,
            self.base_optimizer,
            self._way_out,
        )
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if self.lam is not None and not named and "weight_decay" in added:
            added["weight_decay"] = self.lam

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
        parameters = {
            id(p): plain(p)
            for group in self.param_groups
            if self._takes(weight_decay.lam(group, self.lam))
            for p in group["params"]
            if p.requires_grad and (p.grad is None or not p.grad.is_sparse)
        }
        copies = 2 if self._keeps_gradients else 1
        return copies * sum(t.numel() * t.element_size() for t in parameters.values())

    def __repr__(self) -> str:
        lams = [weight_decay.lam(group, self.lam) for group in self.param_groups]
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
        for layer in quirks.layers(base):
            if isinstance(layer, OptimizerWrapper) and (text := self._clash(layer)) is not None:
                msg = f"{name} cannot be put around {layer!r}: {text}"
                raise ValueError(msg)
            if self._reads_gradient and (reason := quirks.many_gradients(layer)) is not None:
                msg = f"{name} cannot read the gradient of {type(layer).__name__}: {reason}"
                raise ValueError(msg)
            if (reason := quirks.refusal(layer, getattr(self, "rounding", "nearest"))) is not None:
                msg = f"{name} cannot be put around {type(layer).__name__}: {reason}"
                raise ValueError(msg)

    def _clash(self, inner: "OptimizerWrapper") -> str | None:
        """Why this method makes no sense around another; None if it does."""
        if inner._what != self._what:
            return None
        return f"it {inner._what}s already, and two of them would {inner._what} twice. Pass its base_optimizer instead"

    def _watch_gradients(self, kept: list[tuple[Tensor, Tensor | None, int]]) -> None:
        """Copy gradients only as long as the base is known, or may be thought, to change them in place.

        ``kept``: what was kept of each gradient, that gradient now, and its version when it was kept.
        """
        if not kept:
            return
        if self._keeps_gradients:
            compared = [(before, now) for before, now, _ in kept if now is not None and before.any()]
            self._keeps_gradients = not compared or not all(torch.equal(before, plain(now)) for before, now in compared)
        elif any(now is not None and now._version != version for _, now, version in kept):
            self._keeps_gradients = True
            warnings.warn(
                f"{self._owner} has changed gradients in place, so {type(self).__name__} has read changed ones in this "
                "step; from the next on it copies them before",
                stacklevel=6,
            )

    def _give_lam(self) -> None:
        """Write ``lam`` into the groups that decay, or into all if none does; change nothing if a group is unfit."""
        for i, group in enumerate(self.param_groups):
            weight_decay.check(weight_decay.lam(group, None), "weight_decay", f"param group {i} of {self._owner}")
        has_decay = [weight_decay.decays(group, None) or "weight_decay" not in group for group in self.param_groups]
        chosen = [self.lam is not None and (has or not any(has_decay)) for has in has_decay]
        for i, (group, take) in enumerate(zip(self.param_groups, chosen, strict=True)):
            given = group | {"weight_decay": self.lam} if take else group
            weight_decay.check_group(given, i, self.lam, self.step_size, self.base_optimizer, self._way_out)
            self._check_snapshot(self._reason(group))
        for group, take in zip(self.param_groups, chosen, strict=True):
            if take and "weight_decay" in group:
                group["weight_decay"] = self.lam
        if (remark := quirks.warning(self.base_optimizer)) is not None:
            warnings.warn(f"{type(self).__name__} over {self._owner}: {remark}", stacklevel=4)
        self._warn_if_idle()

    def _warn_if_idle(self) -> None:
        if self.lam is None and not any(weight_decay.decays(group, None) for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__} over {self._owner} has nothing to decay: every param group has weight_decay 0 "
                f"or none. Pass lam=, or weight_decay= to {self._owner} or its groups",
                stacklevel=5,
            )

    def _eta_lams(self) -> list[float | Tensor]:
        return [
            weight_decay.eta_lam(group, i, self.lam, self.step_size, self.base_optimizer, self._way_out)
            for i, group in enumerate(self.param_groups)
        ]

    def _reason(self, group: Group) -> str | None:
        direction = self._direction(group)
        return direction if isinstance(direction, str) else None

    def _check_snapshot(self, reason: str | None) -> None:
        """Raise if a snapshot is needed, for ``reason``, and the user forbade it."""

    def _snapshot_reason(self) -> str | None:
        """Why the coming step needs a snapshot; None if every decaying group has a direction."""
        for group in self.param_groups:
            if self._takes(weight_decay.lam(group, self.lam)) and (reason := self._reason(group)) is not None:
                return reason
        return None

    def _kernel(self, device: torch.device) -> ModuleType:
        return kernels.choose(self.backend, device)

    def _report(self, course: "_Course") -> None:
        if not course.begun:
            warnings.warn(
                f"{self._owner}.step ran without its step hooks, so nothing was decayed: if it was replaced on the "
                "instance, let the replacement call the original",
                stacklevel=5,
            )
        elif self.observer is not None:
            self.observer(Report(course.tally.active, course.tally.total))

    def _base_fires_hooks(self) -> bool:
        """Some optimizers skip Optimizer.__init__, and with it the hooks."""
        return getattr(type(self.base_optimizer).step, "hooked", False) and hasattr(
            self.base_optimizer, "_optimizer_step_pre_hooks"
        )


class _Course:
    """One step: what is done at the last moment before the base's own, and after it."""

    def __init__(self, wrapper: OptimizerWrapper, closure: Closure | None) -> None:
        self.switch = DecayOff(wrapper.base_optimizer)
        self._wrapper = wrapper
        self._given_closure = closure
        self.begun = False
        self._depth = 0  # of base steps: one that calls its parent's fires the hooks twice
        self._finished = False
        self._eta_lams: list[float | Tensor] = []
        self._copied: list[tuple[Tensor, int, Tensor]] = []  # parameter, its group's index, the weights from before
        self._gradients: dict[int, tuple[Tensor, int]] = {}  # of those that take part: the gradient and its version
        self._rows: list[Rows] = []
        self.tally = Tally()

    def hook_in(self) -> list[RemovableHandle]:
        """Have the base call `begin` as its last hook before its step, and `end` as its first after it.

        So gradients and decays that another hook still changes (clipping, a schedule) are seen as the step will see
        them, the hooks see the decay and what came of it, and a step that somebody skips is one that does not decay.
        """
        base = self._wrapper.base_optimizer
        before = base.register_step_pre_hook(self.begin)
        after = base.register_step_post_hook(self.end)
        cast("OrderedDict[int, object]", base._optimizer_step_post_hooks).move_to_end(after.id, last=False)
        return [before, after]

    @torch.no_grad()
    def begin(self, *_: object) -> None:
        """Decay along the direction of the coming update or, where that is not known, copy the weights."""
        self._depth += 1
        if self.begun:
            return
        self.begun = True
        self._eta_lams = self._wrapper._eta_lams()
        reason = self._wrapper._snapshot_reason()
        self._wrapper._check_snapshot(reason)
        self.switch.off()
        members = [(p, i) for p, i in self._members() if p.requires_grad or p.grad is not None]
        if self._given_closure is None:
            stepped = [(p, i, p.grad) for p, i in members if p.grad is not None]
            self._check_layouts(g for _, _, g in stepped)
            self._rows = [Rows.of(p, g, self._eta_lams[i]) for p, i, g in stepped if g.is_sparse]
            members = [(p, i) for p, i, g in stepped if not g.is_sparse]
        if reason is None and self._given_closure is None:
            self._wrapper._snapshots.drop()
            self._decay_along(members)
            return
        copies = self._wrapper._snapshots.take(
            [p for p, _ in members], [plain(p) for p, _ in members], self._wrapper._kernel
        )
        self._copied = [(p, i, x) for (p, i), x in zip(members, copies, strict=True)]
        self._note_gradients()

    def closure(self) -> float:
        """The user's closure, for the base to call: it sees the decay, may schedule it, and makes the gradients."""
        self.switch.on()
        with torch.enable_grad():
            loss = cast("Closure", self._given_closure)()
        self._eta_lams = self._wrapper._eta_lams()
        self._check_layouts(p.grad for p, _, _ in self._copied if p.grad is not None)
        self._note_gradients()
        self.switch.off()
        return loss

    def end(self, *_: object) -> None:
        """After the outermost step, before any other hook: `finish`."""
        self._depth -= 1
        if self._depth == 0:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the base's decay back, and carry out what was left until after the step."""
        if self._finished or not self.begun:
            return
        self._finished = True
        self.switch.on()
        batches: dict[object, Batch] = defaultdict(Batch)
        kept: list[tuple[Tensor, Tensor | None, int]] = []
        climbs = [quirks.maximizes(self._wrapper.base_optimizer, group) for group in self._wrapper.param_groups]
        for p, i, x in self._copied:
            if id(p) not in self._gradients or not self._wrapper._takes(self._eta_lams[i]):
                continue
            gradient, version = self._gradients[id(p)]
            if gradient.is_sparse:
                indices = sparse_indices(gradient)
                self._rows.append(Rows(p, indices, x[indices], self._eta_lams[i]))
                continue
            w = plain(p)
            batch = batches[w.device, w.dtype, gradient.dtype]
            batch.p.append(p)
            batch.w.append(w)
            batch.x.append(x)
            batch.eta_lam.append(self._eta_lams[i])
            if self._wrapper._reads_gradient:
                g = plain(gradient, p)
                kept.append((plain(gradient), p.grad, version))
                batch.g.append(-g if climbs[i] else g)
        self._wrapper._watch_gradients(kept)
        for batch in batches.values():
            self._carry_out(self._wrapper._after_step, batch)
        for parameter, indices, before, eta_lam in self._rows:
            w = plain(parameter)
            batch = Batch(eta_lam=[eta_lam], p=[parameter], w=[w[indices]], x=[before])
            self._carry_out(self._wrapper._after_step, batch)
            w[indices] = batch.w[0]

    def _members(self) -> Iterator[tuple[Tensor, int]]:
        """Each parameter that decays, once, with its group's index. Walked afresh: engines replace parameters."""
        seen: set[int] = set()
        for i, group in enumerate(self._wrapper.param_groups):
            if not self._wrapper._takes(self._eta_lams[i]):
                continue
            for p in group["params"]:
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p, i

    def _check_layouts(self, gradients: Iterable[Tensor]) -> None:
        wrapper = self._wrapper
        if wrapper._reads_gradient and any(g.is_sparse for g in gradients):
            msg = f"{type(wrapper).__name__} reads gradients, and cannot read the sparse ones of {wrapper._owner}"
            raise ValueError(msg)

    def _note_gradients(self) -> None:
        """Who takes part in the step, and along which gradient: as they are just before it."""
        keep = self._wrapper._keeps_gradients
        for p, _, _ in self._copied:
            if p.grad is None:
                self._gradients.pop(id(p), None)
            else:
                gradient = p.grad.detach().clone() if keep else p.grad
                self._gradients[id(p)] = gradient, gradient._version

    def _decay_along(self, members: list[tuple[Tensor, int]]) -> None:
        batches: dict[object, Batch] = defaultdict(Batch)
        of_group = [self._wrapper._direction(group) for group in self._wrapper.param_groups]
        for p, i in members:
            m, a, b = cast("Direction", of_group[i]).of(self._wrapper.state.get(p, {}))
            w, g = plain(p), plain(cast("Tensor", p.grad), p)
            m = None if m is None else plain(m, p)
            batch = batches[w.device, w.dtype, g.dtype, None if m is None else m.dtype]
            batch.w.append(w)
            batch.g.append(g)
            batch.m.append(m)
            batch.a.append(a)
            batch.b.append(b)
            batch.eta_lam.append(self._eta_lams[i])
        for batch in batches.values():
            self._carry_out(self._wrapper._before_step, batch)

    def _carry_out(self, rule: Callable[[ModuleType, Batch], int | Tensor], batch: Batch) -> None:
        self.tally.add(batch, rule(self._wrapper._kernel(batch.w[0].device), batch))
