"""Warnings that name the user's own line."""

import inspect
import warnings
from weakref import WeakKeyDictionary

_said: WeakKeyDictionary[object, set[tuple[str, int]]] = WeakKeyDictionary()
_NOT_THE_USERS = ("cwd_wrap", "torch", "contextlib")


def param_group(index: int, name: object = None) -> str:
    """How texts name a group: by its index, and by its name if it has one."""
    return f"param group {index}" if name in (None, f"group {index}") else f"param group {index} ({name})"


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
