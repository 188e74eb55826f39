"""Is an optimizer's class, with its step, the code that a library shipped?

The tables of `directions`, `updates` and `pieces` describe code, and a name does not vouch for code. Programs replace
``torch.optim.AdamW.step`` to clip, save or log, and have classes of their own with the names of known ones.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch.optim import Optimizer


class _Known(NamedTuple):
    step: Callable[[], object]  # a weak reference: a step can keep its class alive
    library: str | None
    name: str | None


_found: WeakKeyDictionary[type, _Known] = WeakKeyDictionary()


def name(cls: type[Optimizer]) -> str | None:
    """``module.Class``, if ``cls`` and its step are what a library ships under this name; else None."""
    return _look_up(cls).name


def library(cls: type[Optimizer]) -> str | None:
    """The top-level module with the class, ``cls`` or a parent of it, that defines the step; None if it is patched."""
    return _look_up(cls).library


def _look_up(cls: type[Optimizer]) -> _Known:
    step = cls.step
    known = _found.get(cls)
    if known is None or known.step() is not step:
        known = _found[cls] = _Known(weakref.ref(step), *_examine(cls, step))
    return known


def _examine(cls: type[Optimizer], step: object) -> tuple[str | None, str | None]:
    own = _without_torchs_layers(step)
    if not isinstance(own, FunctionType):
        return None, None
    source = _library_of(own.__globals__["__name__"])
    if not any(
        own.__qualname__ == f"{c.__qualname__}.step" and _library_of(c.__module__) == source for c in cls.__mro__
    ):
        return None, None  # another function was put in place of the step of the class body
    exported: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        exported = getattr(exported, part, None)
    shipped = exported is cls and _library_of(cls.__module__) == source and not any(_foreign(cls, own, source))
    return source, f"{cls.__module__}.{cls.__qualname__}" if shipped else None


def _without_torchs_layers(function: object) -> object:
    """The function inside the layers that torch puts around a step: hooks, gradient mode, torch.compile."""
    while isinstance(function, FunctionType) and _library_of(function.__globals__["__name__"]) == "torch":
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def _foreign(cls: type, step: FunctionType, source: str) -> Iterator[bool]:
    """For each function that ``step`` calls by name: is it neither of its library nor of torch or Python?"""
    trusted = {source, "torch", "typing_extensions", *sys.stdlib_module_names}
    for called in step.__code__.co_names:
        for function in (getattr(cls, called, None), step.__globals__.get(called)):
            inner = _without_torchs_layers(function)
            if isinstance(inner, FunctionType):
                yield _library_of(inner.__globals__["__name__"]) not in trusted


def _library_of(module: str) -> str:
    return module.split(".", 1)[0]
