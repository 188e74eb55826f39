"""Has Triton's interpreter list its builtins once. It would in each call of a function: a quarter of its time."""

import functools
import inspect
from typing import Any

from triton.runtime import interpreter


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in inspect.getmembers(package) if interpreter.tl.core.is_builtin(each)]


def _patch_builtins(package: Any, *rest: Any) -> None:
    for name, each in _builtins(package):
        interpreter._patch_attr(package, name, each, *rest)


interpreter._patch_builtin = _patch_builtins
