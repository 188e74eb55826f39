"""`over`: its options, its cache, its pickles; classes of optimizers and functions that return one."""

import copy
import functools
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import net, train, values, weight
from torch.optim import SGD, AdamW, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay, params_first


def thousandth(group: dict[str, Any]) -> float:
    return 1e-3


def amsgrad(params: Any, lr: float = 0.01, **kwargs: Any) -> Optimizer:
    return AdamW(params, lr=lr, amsgrad=True, **kwargs)


class StepSize:
    """A callable that compares by value, so it has no hash."""

    def __call__(self, group: dict[str, Any]) -> float:
        return 1e-3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepSize)


# ------------------------------------------------------------------------------------ what it takes


@pytest.mark.parametrize("wrong", [SGD([weight(1.0)]), torch.nn.Linear, 3])
def test_over_takes_classes_and_functions(wrong: Any) -> None:
    """over() refuses an instance and a class that is not an optimizer, and says what it takes."""
    text = r"^CautiousDecay.over takes a class of optimizers, or a function that returns an optimizer, but got "
    with pytest.raises(TypeError, match=text):
        CautiousDecay.over(wrong)


UNFIT: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "strict=1": (CautiousDecay, {"strict": 1}, TypeError, "^strict=1: pass one of True, False$"),
    "leak=2": (CautiousDecay, {"leak": 2}, ValueError, "^leak=2: pass a number from 0"),
    "lam=-1": (CautiousDecay, {"lam": -1.0}, ValueError, "lam of CautiousDecay is -1.0"),
    "lam=[]": (CautiousDecay, {"lam": [0.1]}, TypeError, r"lam of CautiousDecay is \[0.1\]"),
    "mask": (CautiousDecay, {"mask": "sign"}, ValueError, "unknown mask 'sign'"),
    "step_size": (CautiousDecay, {"step_size": 0.1}, TypeError, "step_size=0.1 is not callable"),
    "scale": (CautiousUpdate, {"scale": "max"}, ValueError, "unknown scale 'max'"),
    "p": (PNormDecay, {"p": 3}, ValueError, "p of PNormDecay is 3"),
    "lr": (CautiousDecay, {"lr": 0.1}, TypeError, "over got lr, .* Pass arguments of the optimizer to the class"),
    "no hash": (
        CautiousDecay,
        {"step_size": StepSize()},
        TypeError,
        r"^CautiousDecay.over got step_size=.*StepSize.* not hashable: pass a function, or use "
        r"CautiousDecay\(optimizer, step_size=...\)",
    ),
}


@pytest.mark.parametrize(("method", "options", "error", "text"), UNFIT.values(), ids=list(UNFIT))
def test_options_are_checked_when_over_is_called(method: Any, options: Any, error: Any, text: str) -> None:
    """over() raises the constructor's error for a bad option at once; an unhashable option is named."""
    with pytest.raises(error, match=text):
        method.over(AdamW, **options)


def test_the_constructor_takes_an_unhashable_option() -> None:
    """An unhashable option works in the constructor, which the error of over() recommends."""
    assert isinstance(CautiousDecay(SGD([weight(1.0)], weight_decay=0.1), step_size=StepSize()), Optimizer)


# ------------------------------------------------------------------------------------ which class it is


def test_equal_options_of_different_types_are_different_classes() -> None:
    """lam=1 and lam=1.0 are equal, but each class keeps the value it was given, whichever came first."""
    whole, real = PNormDecay.over(SGD, lam=1), PNormDecay.over(SGD, lam=1.0)
    kept = [cls([weight(1.0)], lr=0.1, weight_decay=0.1).lam for cls in (whole, real)]

    assert [int, float] == list(map(type, kept))
    assert (whole, real) == (PNormDecay.over(SGD, lam=1), PNormDecay.over(SGD, lam=1.0))


def test_a_refused_option_leaves_no_class_behind() -> None:
    """over() with strict=True works after strict=1 was refused."""
    with pytest.raises(TypeError, match="strict=1"):
        CautiousDecay.over(AdamW, strict=1)

    assert CautiousDecay.over(AdamW, strict=True)([weight(1.0)]).strict is True


def test_classes_with_lambdas_are_freed() -> None:
    """An unused class is freed with its options; a class in use is returned again."""
    kept = CautiousDecay.over(AdamW, step_size=thousandth)
    gc.collect()
    before = len(params_first._made)
    for _ in range(20):
        CautiousDecay.over(AdamW, step_size=lambda group: 1e-3)([weight(1.0)])
    gc.collect()

    assert before == len(params_first._made)
    assert kept is CautiousDecay.over(AdamW, step_size=thousandth)


def test_the_check_of_options_uses_no_generator() -> None:
    """over() works under another default device, and does not advance torch's generator."""
    state = torch.get_rng_state()
    with torch.device("meta"):
        CautiousDecay.over(AdamW, lam=0.25)

    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("factory", [amsgrad, functools.partial(AdamW, lr=0.01, amsgrad=True)])
def test_a_function_trains_as_what_it_returns(factory: Callable[..., Optimizer]) -> None:
    """A class over a function is an Optimizer, calls the function, and trains bit for bit as the wrapper around it."""
    cls: Any = CautiousDecay.over(factory, strict=True)
    one, two = net(), net()
    built = cls(one.parameters(), weight_decay=0.5)
    train(one, built, range(3))
    train(two, CautiousDecay(factory(two.parameters(), weight_decay=0.5), strict=True), range(3))

    assert issubclass(cls, CautiousDecay)
    assert (AdamW, True, True) == (type(built.base_optimizer), built.defaults["amsgrad"], built.strict)
    assert torch.equal(values(one), values(two))


def test_a_class_over_a_function_has_its_name_and_signature() -> None:
    """The class has the function's name and parameters (for jsonargparse and Hydra); of a partial, its class's name.

    The wrapper's options come after the named parameters.
    """
    cls: Any = CautiousUpdate.over(amsgrad)
    both = ["params", "lr", "scale", "path", "backend", "kwargs"]

    assert ("CautiousUpdateamsgrad", both) == (cls.__name__, [*inspect.signature(cls).parameters])
    assert ["self", *both] == [*inspect.signature(cls.__init__).parameters]
    assert "CautiousDecayAdamW" == CautiousDecay.over(functools.partial(AdamW, lr=0.1)).__name__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_class_over_an_importable_function_is_pickled(duplicate: Any) -> None:
    """A class over an importable function, and its instances, can be pickled."""
    cls: Any = CautiousDecay.over(amsgrad, step_size=thousandth)

    assert cls is duplicate(cls) is type(duplicate(cls([weight(1.0)])))


def test_a_function_that_returns_no_optimizer_is_refused() -> None:
    """A function that returns no optimizer raises an error with the class and the returned value."""
    with pytest.raises(TypeError, match=r"^CautiousDecay<lambda> got a list of 1 parameter from the function"):
        CautiousDecay.over(lambda params: list(params))([weight(1.0)])


# ------------------------------------------------------------------------------------ classes that are no longer used


def stepped(wrap: Any) -> list[weakref.ref[Any]]:
    """Weak references to a class of this call alone, its instance and its parameter, all of it used once."""

    class Local(SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)

        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    p = weight(1.0, grad=[1.0])
    opt = wrap(Local)([p], lr=0.1, weight_decay=0.1)
    opt.step()
    opt.zero_grad()
    opt.load_state_dict(opt.state_dict())
    repr(opt), opt.paths(), copy.deepcopy(opt)
    return [weakref.ref(each) for each in (Local, opt, opt.base_optimizer, p)]


WRAPS: dict[str, Any] = {
    "decay": lambda cls: lambda *args, **kwargs: CautiousDecay(cls(*args, **kwargs)),
    "update": lambda cls: lambda *args, **kwargs: CautiousUpdate(cls(*args, **kwargs)),
    "p-norm": lambda cls: lambda *args, **kwargs: PNormDecay(cls(*args, **kwargs)),
    "over": CautiousDecay.over,
    "over with options": lambda cls: CautiousDecay.over(cls, strict=True, step_size=thousandth),
}


@pytest.mark.parametrize("name", WRAPS)
def test_a_class_that_is_no_longer_used_is_freed(name: str) -> None:
    """A class of optimizers that was wrapped and stepped, as in a notebook's cell, can be freed with its instances."""
    left = stepped(WRAPS[name])
    for _ in range(3):  # the first frees the class that `over` made, and with it the last hold on the other
        gc.collect()

    assert [None] * len(left) == [each() for each in left]
