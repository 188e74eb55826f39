"""Classes that build an optimizer from parameters and wrap it: what `OptimizerWrapper.over` returns."""

import copyreg
import inspect
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary

from torch.optim import SGD, Optimizer

from cwd_wrap import notices

Options = tuple[tuple[str, object], ...]


class _Over(type):
    """The metaclass of these classes. Few are in a module, so pickle stores how to make the others."""


importable: dict[tuple[Any, Any], tuple[str, str]] = {}
"""Module and name of the classes that a module keeps, by their wrapper and base. They have no options."""

# Weak: an unused class is freed, with its options (lambdas, for example).
_made: WeakValueDictionary[Any, Any] = WeakValueDictionary()


def over(wrapper: Any, base: Callable[..., Optimizer], options: dict[str, object]) -> Any:
    """`make`, after a check of the user's arguments. Raises TypeError if they are wrong."""
    name = wrapper.__name__
    if not (issubclass(base, Optimizer) if isinstance(base, type) else callable(base)):
        way_out = f"pass parameters to the class that it makes, {name}.over(AdamW)(params, ...)"
        got = notices.described(base)
        if isinstance(base, Optimizer):
            cls = type(getattr(base, "base_optimizer", base)).__name__
            got = f"an optimizer, {type(base).__name__}(...)"
            way_out = f"pass a class, {name}.over({cls}), or wrap it, {name}(optimizer)"
        takes = "a class of optimizers, or a function that returns an optimizer"
        msg = f"{name}.over takes {takes}, but got {got}: {way_out}"
        raise TypeError(msg)
    known = _options_of(wrapper)
    if unknown := sorted(set(options) - set(known)):
        msg = (
            f"{name}.over got {', '.join(unknown)}, which {name} does not take: it takes {[*known]}. "
            "Pass arguments of the optimizer to the class that over returns"
        )
        raise TypeError(msg)
    return make(wrapper, base, tuple(sorted(options.items())))


def make(wrapper: Any, base: Callable[..., Optimizer], options: Options) -> Any:
    """The class for this wrapper, base and options. While it is in use it is the only one, so a pickle loads as it."""
    _check_options(wrapper, options)
    key = wrapper, base, tuple((name, type(value), value) for name, value in options)  # 1 and 1.0 are equal
    if (made := _made.get(key)) is not None:
        return made
    signature, ours = _signature(wrapper, base, dict(options))
    called: Any = getattr(base, "func", base)  # a functools.partial is named by its function,
    called = called if hasattr(called, "__qualname__") else type(called)  # other callable objects by their class
    name = wrapper.__name__ + called.__name__
    module, qualname = (wrapper.__module__, name) if options else importable.get(key[:2], (wrapper.__module__, name))
    names = {
        "__init__": _constructor(wrapper, base, dict(options), signature, ours),
        "__doc__": f"`{wrapper.__name__}` over `{called.__module__}.{called.__qualname__}`, built from parameters.",
        "__module__": module,
        "__qualname__": qualname,
        "__signature__": signature,
        "_recipe": (wrapper, base, options),
    }
    return _made.setdefault(key, _Over(name, (wrapper,), names))


def _options_of(wrapper: Any) -> dict[str, inspect.Parameter]:
    """The wrapper's arguments beside the optimizer, as keywords."""
    parameters = [*inspect.signature(wrapper.__init__).parameters.values()][2:]  # after self and base_optimizer
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in named}


def _signature(wrapper: Any, base: Any, options: dict[str, Any]) -> tuple[inspect.Signature, frozenset[str]]:
    """That of the class: the base's parameters, then the wrapper's options that the base has not; and their names."""
    signature = inspect.signature(base)
    its_own = [*signature.parameters.values()]
    ours = {
        name: p.replace(default=options.get(name, p.default))
        for name, p in _options_of(wrapper).items()
        if name not in signature.parameters
    }
    end = len(its_own) - any(p.kind is p.VAR_KEYWORD for p in its_own)
    parameters = [*its_own[:end], *ours.values(), *its_own[end:]]
    return signature.replace(parameters=parameters), frozenset(ours)


def _check_options(wrapper: Any, options: Options) -> None:
    """Raise the constructor's errors before there are parameters, and TypeError for an unhashable option."""
    if options:
        takes_every_path = SGD([{"params": []}], lr=1.0, weight_decay=0.5, fused=True)
        wrapper(takes_every_path, **dict(options))
    for name, value in options:
        if not isinstance(value, Hashable):
            msg = (
                f"{wrapper.__name__}.over got {name}={value!r:.80}, a {type(value).__name__}, which is not hashable: "
                f"pass a function, or use {wrapper.__name__}(optimizer, {name}=...), which takes it"
            )
            raise TypeError(msg)


def _constructor(
    wrapper: Any,
    base: Callable[..., Optimizer],
    options: dict[str, Any],
    signature: inspect.Signature,
    ours: frozenset[str],
) -> Callable[..., None]:
    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in ours & kwargs.keys()}
        optimizer = base(*args, **kwargs)
        if not isinstance(optimizer, Optimizer):
            got = f"{type(self).__name__} got {notices.described(optimizer)}"
            msg = f"{got} from the function that was passed to over: it must return an optimizer"
            raise TypeError(msg)
        wrapper.__init__(self, optimizer, **(options | given))

    # jsonargparse (LightningCLI) reads this signature, other libraries read the class's.
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    return __init__


def _reduce(cls: type) -> Any:
    recipe = cls.__dict__.get("_recipe")
    if recipe is None:  # a subclass is found by its name, as usual
        return cls.__qualname__
    *pair, options = recipe
    return (make, recipe) if options or tuple(pair) not in importable else cls.__qualname__


copyreg.pickle(_Over, _reduce)
