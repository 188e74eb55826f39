"""The interface of torch.optim.Optimizer for an optimizer that wraps another: all of it but the step.

It has no parameters, groups or state: ``param_groups``, ``state`` and ``defaults`` are the base's own objects, looked
up each time, since schedulers, checkpoints and engines replace them. Each attribute that is forwarded is named here.
There is no ``__getattr__``, so GradScaler treats even a fused base as a plain optimizer: GradScaler itself unscales the
gradients and skips steps.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer

from cwd_wrap import notices

if TYPE_CHECKING:
    from typing_extensions import Self

Group = dict[str, Any]
StepFunction = TypeVar("StepFunction", bound=Callable[..., Any])


def _forwarded(name: str) -> property:
    """A property that returns the base's attribute of that name, or raises AttributeError if the base has none."""
    return property(lambda self: getattr(self.base_optimizer, name))


def with_hooks(step: StepFunction) -> StepFunction:
    """Fire the wrapper's own step hooks around ``step``.

    torch patches every ``step`` to do so, unless it is marked as ``hooked``. But that patch also fires the global
    hooks, which the base's step fires already. The profiler's count steps, and would count each twice.
    """

    def run(self: "Contract", *args: Any, **kwargs: Any) -> Any:
        arguments: tuple[Any, ...] = (self, *args)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, arguments, kwargs)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and len(changed) == 2):
                msg = f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), not {changed!r:.80}"
                raise RuntimeError(msg)
            arguments, kwargs = changed
        result = step(*arguments, **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, arguments, kwargs)
        return result

    @functools.wraps(step)
    def hooked(self: "Contract", *args: Any, **kwargs: Any) -> Any:
        if not _profiler_enabled():  # a range of the profiler takes longer than a small step
            return run(self, *args, **kwargs)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            return run(self, *args, **kwargs)

    hooked.hooked = True  # type: ignore[attr-defined]
    return cast("StepFunction", hooked)


def check_optimizer(name: str, base: object) -> None:
    """Raise TypeError unless ``base`` is an instance of an optimizer."""
    if isinstance(base, Optimizer):
        return
    items = base.values() if isinstance(base, dict) else base if isinstance(base, list | tuple | set) else ()
    if isinstance(base, type) and issubclass(base, Optimizer):
        cls = base.__name__
        way_out = f": pass {name}({cls}(params, ...)), or make a class with {name}.over({cls})"
    elif any(isinstance(each, Optimizer) for each in items):
        way_out = f": wrap each, [{name}(each) for each in optimizers]"
    else:
        way_out = (
            f". Pass {name}(AdamW(params, ...)). Code that builds the optimizer from parameters needs a class: "
            f"{name}.over(AdamW)(params, ...)"
        )
    msg = f"{name} wraps an optimizer, but got {notices.described(base)}{way_out}"
    raise TypeError(msg)


def _check_call(cls: type[Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError for what is no optimizer, and for arguments that belong to the optimizer."""
    parameters = inspect.signature(cls.__init__).parameters
    if hasattr(cls, "_recipe") or "base_optimizer" not in parameters:  # a class that builds the optimizer itself
        return
    given = [*args[:1], *([kwargs["base_optimizer"]] if "base_optimizer" in kwargs else [])]
    for base in given:
        check_optimizer(cls.__name__, base)
    unknown = [name for name in kwargs if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        takes = [name for name in parameters if name not in {"self", "base_optimizer"}]
        lam = ", or the strength of the decay as lam=" if "weight_decay" in unknown and "lam" in takes else ""
        owner = type(given[0]).__name__ if given else "the optimizer"
        msg = f"{cls.__name__} does not take {', '.join(unknown)}: pass that to {owner}{lam}. It takes {takes}"
        raise TypeError(msg)


def _takes_set_to_none(zero_grad: Callable[..., Any]) -> bool:
    # Nothing is remembered: a function can keep its class alive. Nearly all classes have this one.
    if zero_grad is Optimizer.zero_grad:
        return True
    parameters = inspect.signature(zero_grad).parameters.values()
    return any(p.name == "set_to_none" or p.kind is p.VAR_KEYWORD for p in parameters)


class Contract(Optimizer):
    """torch.optim.Optimizer around ``base_optimizer``. A subclass names the attributes to pickle in ``_settings``."""

    base_optimizer: Optimizer
    _settings: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Self":
        """Check the constructor's arguments before Python does: its error does not say what to do."""
        if args or kwargs:  # copy and pickle pass none
            _check_call(cls, args, kwargs)
        return super().__new__(cls)

    def _start(self) -> None:
        """Set the attributes that are not pickled: at construction and after unpickling."""
        # Optimizer.__init__ is not called, since it would build groups and state. These are its other attributes.
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

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
        """Reset the gradients, as the base does. A base without ``set_to_none`` (apex) is called without it."""
        if set_to_none and not _takes_set_to_none(type(self.base_optimizer).zero_grad):
            self.base_optimizer.zero_grad()
        else:
            self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, key for key: checkpoints of the plain optimizer and of the wrapper are the same."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base or the wrapper. Its ``weight_decay`` replaces the current one, as in torch."""
        state_dict = state_dict.copy()  # hooks may change the copy, not the caller's dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base_optimizer.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("base_optimizer", *self._settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # Optimizer.load_state_dict passes state and param_groups
            self.base_optimizer.__setstate__(state)
            return
        self.__dict__.update(state)
        self._start()

    # Trainer and accelerate use train and eval, timm's train.py the others. Each exists only where the base has it.
    train = _forwarded("train")
    eval = _forwarded("eval")
    is_second_order = _forwarded("is_second_order")
    sync_lookahead = _forwarded("sync_lookahead")
