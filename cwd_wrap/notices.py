"""Warnings that name the user's own line, and names of things in texts."""

import inspect
import warnings
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

_said: WeakKeyDictionary[object, set[tuple[str, int]]] = WeakKeyDictionary()
_NOT_THE_USERS = ("cwd_wrap", "torch", "contextlib")


def param_group(index: int, name: object = None) -> str:
    """The name of a group in texts: its index, and its name if it has one."""
    return f"param group {index}" if name in (None, f"group {index}") else f"param group {index} ({name})"


def described(value: object) -> str:
    """What ``value`` is, for the text of an error: "a list of 2 parameters". No number in it is printed."""
    kind = type(value).__name__
    article = "an" if kind[0] in "AEIOaeio" else "a"
    if isinstance(value, type):
        text = f"the class {value.__name__}"
    elif isinstance(value, dict) and "params" in value:
        text = "a param group"
    elif not isinstance(value, list | tuple | dict | set):
        text = "None" if value is None else f"{article} {kind}"
    elif not value:
        text = f"an empty {kind}"
    else:
        text = f"{article} {kind} of {_items(list(value.values() if isinstance(value, dict) else value))}"
    return text


def _items(items: list[object]) -> str:
    if any(isinstance(item, Optimizer) for item in items):
        return ", ".join(type(item).__name__ for item in items)
    kinds = (("parameter", Tensor), ("param group", dict), ("named parameter", tuple))
    name = next((name for name, cls in kinds if all(isinstance(item, cls) for item in items)), "object")
    return f"{len(items)} {name}{'s' * (len(items) > 1)}"


def warn(text: str) -> None:
    """Warn at the nearest line of the call stack that is neither in this package nor in torch."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def warn_once(owner: object, what: str, index: int, text: str) -> None:
    """`warn`, once for each owner (an optimizer), kind of warning and param group."""
    said = _said.setdefault(owner, set())
    if (what, index) not in said:
        said.add((what, index))
        warn(text)
