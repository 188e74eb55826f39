"""Classes that build an optimizer from parameters and wrap it: what `OptimizerWrapper.over` hands out."""

import copyreg
import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

Recipe = tuple[type[Optimizer], type[Optimizer], tuple[tuple[str, object], ...]]  # wrapper, base, the wrapper's options


class _Over(type):
    """The type of these classes. They stand in no module, so pickle is told how they were made instead."""


_made: dict[Recipe, Any] = {}


def make(*recipe: Any) -> Any:
    """The one class for this `Recipe`, so that what comes back from a pickle has the type of what went in."""
    wrapper, base, options = recipe
    if recipe not in _made:
        names = {
            "__init__": _constructor(wrapper, base, dict(options)),
            "__doc__": f"`{wrapper.__name__}` over `{base.__module__}.{base.__qualname__}`, built from parameters.",
            "__module__": wrapper.__module__,
            "__signature__": inspect.signature(base),
            "_recipe": recipe,
        }
        _made[recipe] = _Over(wrapper.__name__ + base.__name__, (wrapper,), names)
    return _made[recipe]


def _constructor(wrapper: Any, base: type[Optimizer], options: dict[str, Any]) -> Callable[..., None]:
    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        wrapper.__init__(self, base(*args, **kwargs), **options)

    # jsonargparse (LightningCLI) reads this one, others the class's.
    __init__.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]
    return __init__


def _reduce(cls: type) -> Any:
    recipe = cls.__dict__.get("_recipe")
    return cls.__qualname__ if recipe is None else (make, recipe)  # a subclass of one is found by its name, as usual


copyreg.pickle(_Over, _reduce)
