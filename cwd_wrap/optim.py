"""Optimizers with cautious weight decay, built from parameters, under names that a configuration can hold.

    cwd_wrap.optim.AdamW(params, lr=1e-3, weight_decay=0.1, mask="all")

Each optimizer of torch.optim has a class of its name here: ``AdamW`` is ``CautiousDecay.over(torch.optim.AdamW)``. It
takes the arguments of both. `cautious` takes an optimizer of any library by its dotted name.
"""

import importlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from cwd_wrap import params_first
from cwd_wrap.methods import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.methods.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_METHODS: dict[str, type[OptimizerWrapper]] = {
    each.__name__: each for each in (CautiousDecay, CautiousUpdate, PNormDecay)
}


def cautious(
    params: "ParamsT", base: str | Callable[..., Optimizer], *, method: str = "CautiousDecay", **options: Any
) -> Any:  # not -> OptimizerWrapper: LightningCLI would take the function for a class, and drop the options
    """Build an optimizer from parameters and wrap it: for configurations, which can only name it.

    Args:
        params: parameters, or param groups.
        base: the optimizer's dotted name, such as ``"timm.optim.Lion"``; a name without a dot is one of torch.optim. Or
            the class itself, or a function that returns an optimizer.
        method: ``"CautiousDecay"``, ``"CautiousUpdate"`` or ``"PNormDecay"``.
        options: the keyword arguments of both, as for the class that `CautiousDecay.over` makes.

    Raises:
        ImportError: the module in ``base`` cannot be imported.
        ValueError: there is no optimizer of the name ``base``, or no such ``method``; what the method raises.
        TypeError: ``base`` is no class of optimizers and no function; what the optimizer and the method raise.

    Examples:
        >>> import torch
        >>> from cwd_wrap.optim import cautious
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = cautious([w], base="torch.optim.NAdam", lr=1e-3, weight_decay=0.1, strict=True)
        >>> type(opt).__name__, opt.strict
        ('CautiousDecayNAdam', True)
    """
    if method not in _METHODS:
        msg = f"unknown method {method!r}: pass one of {', '.join(map(repr, _METHODS))}"
        raise ValueError(msg)
    return _METHODS[method].over(_found(base) if isinstance(base, str) else base)(params, **options)


def _found(name: str) -> Any:
    """What has this dotted name."""
    path, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(path or "torch.optim")
    except (ImportError, TypeError, ValueError) as error:  # the last two for names such as ..Lion
        msg = f"base={name!r}: cannot import {path!r} ({error}). Write module.Class, such as timm.optim.Lion"
        raise ImportError(msg) from error
    found = getattr(module, last, None)
    if not callable(found):
        elsewhere = "" if path else " (of another library: write module.Class, such as timm.optim.Lion)"
        msg = f"base={name!r}: {module.__name__} has no {last!r}{elsewhere}{_near(last, _optimizers(module))}"
        raise ValueError(msg)
    return found


def _optimizers(module: object) -> dict[str, type[Optimizer]]:
    """The optimizers in a module, by their names there."""
    return {
        name: each
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
    }


def _near(name: str, known: Iterable[str]) -> str:
    """The end of an error text: the known names that are close to ``name``, whatever their case."""
    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(name.lower(), by_lower, n=3)
    return f". Did you mean {' or '.join(by_lower[each] for each in close)}?" if close else ""


# ------------------------------------------------------------------------------------ a class for each of torch.optim

_BASES = _optimizers(torch.optim)
params_first.importable.update({(CautiousDecay, base): (__name__, name) for name, base in _BASES.items()})

if TYPE_CHECKING:

    class _Cautious(CautiousDecay):
        def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None: ...

    class ASGD(_Cautious): ...

    class Adadelta(_Cautious): ...

    class Adafactor(_Cautious): ...

    class Adagrad(_Cautious): ...

    class Adam(_Cautious): ...

    class AdamW(_Cautious): ...

    class Adamax(_Cautious): ...

    class LBFGS(_Cautious): ...

    class Muon(_Cautious): ...

    class NAdam(_Cautious): ...

    class RAdam(_Cautious): ...

    class RMSprop(_Cautious): ...

    class Rprop(_Cautious): ...

    class SGD(_Cautious): ...

    class SparseAdam(_Cautious): ...
else:

    def __getattr__(name: str) -> Any:
        base = _BASES.get(name.removeprefix("CautiousDecay"))  # logs have the class's __name__: CautiousDecayAdamW
        if base is None:
            msg = f"module {__name__!r} has no attribute {name!r}{_near(name, _BASES)}"
            raise AttributeError(msg)
        globals()[name] = made = CautiousDecay.over(base)
        return made


def __dir__() -> list[str]:
    return [*sorted(_BASES), "cautious"]
