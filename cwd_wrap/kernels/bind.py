"""Makes a backend's own copies of the formulas in `rules`, in which the words are that backend's operations."""

import inspect
import linecache
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor

from cwd_wrap import rules

STATES, NUMBERS = 3, 7
"""Of an update: so many tensors of state and so many numbers it may have."""

Compiler = Callable[[Callable[..., Any]], Any]


def bind(words: Mapping[str, object], compiled: Compiler) -> dict[str, Any]:
    """`rules.FORMULAS`, `rules.UPDATES` and `rules.AVERAGING`, ``compiled``, by name, with the ``words`` of a backend.

    The updates all take (g, a, b, c, n0, ..., n6) and return (direction, eta*u, a, b, c), whatever state and numbers
    they have. What is returned for a state that they do not have is of no use. A state that they lack is None. The
    averaging ones take (g, x, decay, a, ...) and return (new x, eta*u, a, b, c).
    """
    space: dict[str, Any] = {"__name__": __name__, **words}
    for formula in rules.FORMULAS:
        space[formula.__name__] = compiled(_copy(formula, space))
    bound = dict(space)
    for update in (*rules.UPDATES, *rules.AVERAGING):
        space[f"own_{update.__name__}"] = compiled(_copy(update, space))
        first = ["g", "x", "decay"] if update in rules.AVERAGING else ["g"]
        bound[update.__name__] = compiled(_with_all_arguments(update, first, space))
    return bound


def _copy(formula: Callable[..., Any], space: dict[str, Any]) -> Callable[..., Any]:
    own = FunctionType(formula.__code__, space, formula.__name__)
    own.__module__, own.__qualname__ = formula.__module__, formula.__qualname__
    return own


def _with_all_arguments(update: Callable[..., Any], first: list[str], space: dict[str, Any]) -> Callable[..., Any]:
    """A function that calls ``own_<update>``, whose ``first`` arguments are not state.

    It is written as text, since compilers read a function's source.
    """
    kinds = [parameter.annotation for parameter in inspect.signature(update).parameters.values()]
    numbers = kinds.count(float)
    states = len(kinds) - numbers - len(first)
    if not 0 < states <= STATES or numbers > NUMBERS or kinds[0] is not Tensor:
        msg = f"{update.__name__} takes {states} states and {numbers} numbers: at most {STATES} and {NUMBERS} are bound"
        raise TypeError(msg)
    of_state = ["a", "b", "c"]
    new = [f"new_{name}" for name in of_state[:states]]
    given = [*first, *of_state[:states], *(f"n{i}" for i in range(numbers))]
    source = (
        f"def {update.__name__}({', '.join(first)}, a, b, c, {', '.join(f'n{i}' for i in range(NUMBERS))}):\n"
        f"    made, step, {', '.join(new)} = own_{update.__name__}({', '.join(given)})\n"
        f"    return made, step, {', '.join([*new, *[new[0]] * (STATES - states)])}\n"
    )
    name = f"<{update.__name__} with all arguments>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), space)  # noqa: S102 - our own text, above
    made: Callable[..., Any] = space[update.__name__]
    return made
