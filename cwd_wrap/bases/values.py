"""Looks into what an optimizer holds (numbers, containers, functions, objects), and copies it.

An optimizer can hold its parameters, or their ids, in any of them.
"""

import copy
import functools
from collections import deque
from collections.abc import Collection, Mapping
from enum import Enum
from numbers import Real
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_SCALARS = (Real, complex, str, Enum, type, torch.dtype, torch.device, type(None))
_ROWS = (list, tuple, set, frozenset, deque)
FUNCTIONS = (FunctionType, functools.partial)


def is_number(value: object) -> bool:
    """True for real numbers, also for numpy's, and for tensors without dimensions."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta
        return plain and value.ndim == 0 and not value.is_complex()
    return isinstance(value, Real)


def text(value: object, depth: int = 3) -> str | None:
    """The same text for equal values. None for others than numbers, names and marks, and lists and dicts of them."""
    if is_number(value):
        return repr(float(apart(value)))
    if value is None or isinstance(value, str | Enum | type):
        return repr(value)
    if isinstance(value, dict | list | tuple | set | frozenset) and depth:
        pairs = [[*value], [*value.values()]] if isinstance(value, dict) else [[*value]]
        texts = [text(each, depth - 1) for some in pairs for each in some]
        return None if None in texts else f"{type(value).__name__}{texts}"
    return None


def apart(value: Any) -> Any:
    """A copy, of a tensor without its history."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def refers(value: object, ids: Collection[int], depth: int = 3) -> bool:
    """True if the value is, or contains, one of the parameters with these ids, or one of the ids."""
    inside = _inside(value) if depth else None
    if inside is not None:
        return any(refers(each, ids, depth - 1) for each in inside)
    return (id(value) if isinstance(value, Tensor) else value if type(value) is int else None) in ids


def _inside(value: Any) -> list[Any] | None:
    """What a container, a function or an object holds; None for others."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _ROWS):
        return [*value]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # which is empty
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, Tensor | MethodType | torch.nn.Module | Optimizer | type) or not hasattr(value, "__dict__"):
        return None
    return [*vars(value).values()]


def with_twins(value: Any, twins: Mapping[int, Tensor]) -> Any:
    """A copy of the value with a twin in place of each parameter and id. Parameters without one are left out."""

    def is_left_out(each: object) -> bool:
        return isinstance(each, Tensor) and id(each) not in twins

    if isinstance(value, Tensor):
        return twins[id(value)]
    if isinstance(value, _SCALARS):
        return id(twins[value]) if type(value) is int and value in twins else value
    if isinstance(value, dict):
        pairs = ((key, each) for key, each in value.items() if not is_left_out(key) and not is_left_out(each))
        inside = {with_twins(key, twins): with_twins(each, twins) for key, each in pairs}
        value = copy.copy(value)
        value.clear()
        value.update(inside)
        return value
    if isinstance(value, _ROWS):
        return type(value)(with_twins(each, twins) for each in value if not is_left_out(each))
    if not refers(value, twins):
        return copy.deepcopy(value)
    if isinstance(value, FUNCTIONS):
        msg = f"it has a {type(value).__name__} that refers to parameters"
        raise TypeError(msg)
    value = copy.copy(value)
    vars(value).update({name: with_twins(each, twins) for name, each in vars(value).items()})
    return value


def is_plain(value: object, *, option: bool = False, own_ids: Collection[int] = (), objects: bool = True) -> bool:
    """True if a copy of the value is small, and does not lead back to the optimizer, but to parameters of ``own_ids``.

    An object is plain if all that it holds is. An ``option`` of a group may also be a small tensor, or an object that
    holds others (a schedule).
    """
    inside = functools.partial(is_plain, option=option, own_ids=own_ids, objects=objects)
    if isinstance(value, Tensor):
        return id(value) in own_ids or value.ndim == 0 or (option and value.numel() <= 16)
    if isinstance(value, MethodType | torch.nn.Module | Optimizer):
        return False
    if isinstance(value, dict):
        return all(map(inside, [*value.values(), *(key for key in value if isinstance(key, Tensor))]))
    if isinstance(value, (*_ROWS, *FUNCTIONS)):
        return all(map(inside, _inside(value) or ()))
    if isinstance(value, _SCALARS):
        return True
    inside = functools.partial(inside, objects=option)
    return objects and hasattr(value, "__dict__") and all(map(inside, vars(value).values()))
