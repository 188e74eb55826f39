"""What errors, warnings and the repr say: the mistake, in plain words, without tensors, and the way out."""

import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from support import weight
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop, Rprop, SparseAdam
from torch.testing._internal.two_tensor import TwoTensor

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay

METHODS: list[Any] = [CautiousDecay, CautiousUpdate, PNormDecay]


def adamw(**options: Any) -> AdamW:
    return AdamW([weight(1.0)], **options)


def message(act: Callable[[], object], kind: type[Exception] = TypeError) -> str:
    """The text of the error that ``act`` raises."""
    with pytest.raises(kind) as caught:
        act()
    text = str(caught.value)
    assert "tensor(" not in text, text
    assert "Parameter containing" not in text, text
    return text


# ------------------------------------------------------------------------------------ what is wrapped

WRAPS = "CautiousDecay wraps an optimizer, but got "
BUILD = (
    ". Pass CautiousDecay(AdamW(params, ...)). Code that builds the optimizer from parameters needs a class: "
    "CautiousDecay.over(AdamW)(params, ...)"
)
p = weight(1.0)

NO_OPTIMIZERS: dict[str, tuple[Callable[[], object], str]] = {
    "two optimizers": (
        lambda: CautiousDecay([adamw(), SGD([p])]),
        f"{WRAPS}a list of AdamW, SGD: wrap each, [CautiousDecay(each) for each in optimizers]",
    ),
    "a tuple of one": (
        lambda: CautiousDecay((adamw(),)),
        f"{WRAPS}a tuple of AdamW: wrap each, [CautiousDecay(each) for each in optimizers]",
    ),
    "a dict of optimizers": (
        lambda: CautiousDecay({"a": adamw(), "b": adamw()}),
        f"{WRAPS}a dict of AdamW, AdamW: wrap each, [CautiousDecay(each) for each in optimizers]",
    ),
    "optimizers and a lam": (
        lambda: CautiousDecay([adamw(), SGD([p])], lam=0.1, strict=True),
        f"{WRAPS}a list of AdamW, SGD: wrap each, [CautiousDecay(each) for each in optimizers]",
    ),
    "a list of parameters": (lambda: CautiousDecay([p, p]), f"{WRAPS}a list of 2 parameters{BUILD}"),
    "groups": (lambda: CautiousDecay([{"params": [p]}]), f"{WRAPS}a list of 1 param group{BUILD}"),
    "named parameters": (lambda: CautiousDecay([("w", p)]), f"{WRAPS}a list of 1 named parameter{BUILD}"),
    "one group": (lambda: CautiousDecay({"params": [p]}), f"{WRAPS}a param group{BUILD}"),
    "a generator": (lambda: CautiousDecay(nn.Linear(1, 1).parameters()), f"{WRAPS}a generator{BUILD}"),
    "a parameter": (lambda: CautiousDecay(p), f"{WRAPS}a Parameter{BUILD}"),
    "a module": (lambda: CautiousDecay(nn.Linear(1, 1)), f"{WRAPS}a Linear{BUILD}"),
    "a number": (lambda: CautiousDecay(3), f"{WRAPS}an int{BUILD}"),
    "a name": (lambda: CautiousDecay("adamw"), f"{WRAPS}a str{BUILD}"),
    "None": (lambda: CautiousDecay(None), f"{WRAPS}None{BUILD}"),
    "nothing": (lambda: CautiousDecay([]), f"{WRAPS}an empty list{BUILD}"),
    "parameters and options of the optimizer": (
        lambda: CautiousDecay([p, p], lr=0.1, weight_decay=0.1),
        f"{WRAPS}a list of 2 parameters{BUILD}",
    ),
    "type(o)(params, **o.defaults)": (
        lambda: type(CautiousDecay(adamw()))([p], **adamw().defaults),
        f"{WRAPS}a list of 1 parameter{BUILD}",
    ),
    "a class": (
        lambda: CautiousDecay(AdamW),
        f"{WRAPS}the class AdamW: pass CautiousDecay(AdamW(params, ...)), or make a class with "
        "CautiousDecay.over(AdamW)",
    ),
    "a class and its arguments": (
        lambda: CautiousDecay(AdamW, [p], lr=0.1),
        f"{WRAPS}the class AdamW: pass CautiousDecay(AdamW(params, ...)), or make a class with "
        "CautiousDecay.over(AdamW)",
    ),
    "a class and keywords": (
        lambda: CautiousDecay(AdamW, params=[p], weight_decay=0.1),
        f"{WRAPS}the class AdamW: pass CautiousDecay(AdamW(params, ...)), or make a class with "
        "CautiousDecay.over(AdamW)",
    ),
    "a class of no optimizer": (lambda: CautiousDecay(nn.Linear), f"{WRAPS}the class Linear{BUILD}"),
    "a partial": (lambda: CautiousDecay(partial(AdamW, lr=0.1)), f"{WRAPS}a partial{BUILD}"),
    "keywords alone": (
        lambda: CautiousDecay(params=[p], lr=0.1),
        "CautiousDecay does not take params, lr: pass that to the optimizer. It takes ",
    ),
}


@pytest.mark.parametrize("name", NO_OPTIMIZERS)
def test_what_is_no_optimizer(name: str) -> None:
    """The error says what came, without its numbers, and what to write instead."""
    act, text = NO_OPTIMIZERS[name]

    assert message(act).removesuffix("']").startswith(text)
    assert len(message(act)) < 300


def test_a_class_that_horovod_makes() -> None:
    """A class made of the wrapper's own, as hvd.DistributedOptimizer makes it, is told of `over`."""

    class Distributed:
        def __init__(self, params: Any) -> None:
            super(self.__class__, self).__init__(params)

    opt = CautiousDecay(adamw())
    cls = type(type(opt).__name__, (type(opt),), dict(vars(Distributed)))

    assert f"{WRAPS}a list of 1 param group{BUILD}" == message(lambda: cls(opt.param_groups))


@pytest.mark.parametrize("method", METHODS)
def test_the_texts_name_the_method(method: Any) -> None:
    """Each method's texts have its own name."""
    name = method.__name__
    assert f"{name}(AdamW(params, ...))" in message(lambda: method([p]))
    assert f"{name}(each)" in message(lambda: method([adamw()]))
    assert f"{name}.over(SGD)" in message(lambda: method(SGD))


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (
            adamw(),
            "an optimizer, AdamW(...): pass a class, CautiousDecay.over(AdamW), or wrap it, CautiousDecay(optimizer)",
        ),
        (
            CautiousDecay(adamw()),
            "an optimizer, CautiousDecay(...): pass a class, CautiousDecay.over(AdamW), or wrap it, "
            "CautiousDecay(optimizer)",
        ),
        (
            [p],
            "a list of 1 parameter: pass parameters to the class that it makes, CautiousDecay.over(AdamW)(params, ...)",
        ),
        ("adamw", "a str: pass parameters to the class that it makes, CautiousDecay.over(AdamW)(params, ...)"),
        (
            nn.Linear,
            "the class Linear: pass parameters to the class that it makes, CautiousDecay.over(AdamW)(params, ...)",
        ),
    ],
    ids=["optimizer", "wrapper", "parameters", "name", "class"],
)
def test_what_over_does_not_take(got: Any, text: str) -> None:
    """`over` says what came, and what to pass."""
    over = "CautiousDecay.over takes a class of optimizers, or a function that returns an optimizer, but got "

    assert over + text == message(lambda: CautiousDecay.over(got))


def two_tensors(decay: float) -> dict[str, Any]:
    """A group with a weight of a subclass that is made of two tensors, as quantized weights are."""
    p = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    p.grad = TwoTensor(torch.ones(2), torch.ones(2))
    return {"params": [p], "weight_decay": decay}


@pytest.mark.parametrize("method", METHODS)
def test_weights_made_of_other_tensors(method: Any) -> None:
    """A decaying weight of such a subclass is refused for what it is, when it is wrapped, added or given a lam."""
    text = (
        "of SGD has a weight of type TwoTensor, which is made of other tensors (as quantized weights are), and cannot "
        "be written by place: give its group weight_decay=0, or train a plain tensor"
    )
    assert f"param group 0 {text}" == message(lambda: method(SGD([two_tensors(0.1)])), ValueError)
    opt = method(SGD([{"params": [weight(1.0)], "weight_decay": 0.1}]))
    assert f"param group 1 {text}" == message(lambda: opt.add_param_group(two_tensors(0.1)), ValueError)
    assert 1 == len(opt.param_groups)


def test_weights_made_of_other_tensors_that_do_not_decay() -> None:
    """In a group that does not decay they are stepped as always, and frozen ones may be anywhere."""
    group, frozen = two_tensors(0.0), two_tensors(0.1)
    frozen["params"][0].requires_grad_(False).grad = None
    opt = CautiousDecay(SGD([group, frozen, {"params": [weight(1.0)], "weight_decay": 0.1}], lr=0.5))
    opt.step()

    assert [0.5, 0.5] == group["params"][0].a.tolist()
    off = CautiousDecay(SGD([two_tensors(0.0)]), lam=0)
    assert "TwoTensor" in message(lambda: setattr(off, "lam", 0.1), ValueError)


# ------------------------------------------------------------------------------------ lam

LARGE = 10**400


@pytest.mark.parametrize("value", [LARGE, -LARGE, Fraction(LARGE, 3)], ids=["int", "negative", "fraction"])
@pytest.mark.parametrize("method", [CautiousDecay, PNormDecay])
def test_a_number_that_no_float_holds(method: Any, value: Any) -> None:
    """A lam, weight_decay, lr or step size above all floats raises the error of other numbers that are not finite."""
    text = "pass a finite number, zero or above"
    set_later = method(adamw())
    base = adamw()
    base.param_groups[0]["weight_decay"] = value
    given = [
        ("lam", lambda: method(adamw(), lam=value)),
        ("lam", lambda: setattr(set_later, "lam", value)),
        ("weight_decay", lambda: method(base)),
        ("lr", lambda: method(SGD([weight(1.0)], lr=value if value > 0 else -value, weight_decay=0.1))),
        ("step_size", lambda: method(adamw(), step_size=lambda _: value).step()),
    ]
    for name, act in given:
        found = message(act, ValueError)

        assert name in found
        assert found.endswith(text)
        assert len(found) < 200


@pytest.mark.parametrize("build", [LBFGS, SparseAdam, Rprop])
def test_a_base_without_weight_decay_is_told_of_lam_alone(build: Any) -> None:
    """An optimizer that has no weight_decay is not told to set it."""
    name = build.__name__
    text = f"CautiousDecay({name}) will not decay anything: {name} has no weight_decay. Pass lam="
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        CautiousDecay(build([weight(1.0)]))


def test_a_base_that_does_not_decay() -> None:
    """An optimizer whose weight_decay is 0 everywhere: both ways to set it, and when to ignore the warning."""
    text = (
        "PNormDecay(SGD) will not decay anything: weight_decay is 0 in every param group. Pass lam=, or set "
        "weight_decay in SGD. (Ignore this if a schedule raises it later.)"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        PNormDecay(SGD([weight(1.0)]))


@pytest.mark.parametrize("method", [CautiousDecay, PNormDecay])
@pytest.mark.parametrize("base", [AdamW, SGD, Rprop])
@pytest.mark.parametrize("lam", [0, 0.0, torch.tensor(0.0)], ids=str)
def test_a_lam_of_0_does_not_warn(method: Any, base: Any, lam: Any) -> None:
    """lam=0, the baseline of a sweep, is what the user wants: no warning, also when its checkpoint is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = method(base([weight(1.0)]), lam=lam)
        opt.load_state_dict(opt.state_dict())

    assert 0 == opt.lam


# ------------------------------------------------------------------------------------ checkpoints of others

OTHERS = [
    (adamw, lambda: SGD([weight(1.0)]), "SGD", "dampening, momentum"),
    (lambda: SGD([weight(1.0)]), adamw, "AdamW", "betas, eps"),
    (adamw, lambda: RMSprop([weight(1.0)]), "RMSprop", "alpha"),
    (
        lambda: SGD([weight(1.0)]),
        lambda: Rprop([weight(1.0)]),
        "Rprop",
        "etas, step_sizes",
    ),
]


@pytest.mark.parametrize(("saved", "into", "name", "missing"), OTHERS)
def test_a_checkpoint_of_another_optimizer(saved: Any, into: Any, name: str, missing: str) -> None:
    """It raises when it is loaded, not at the step; it names what is missing, and the optimizer is as before."""
    opt = CautiousDecay(into(), lam=0.1)
    before = opt.state_dict()
    text = (
        f"the checkpoint is of another optimizer than {name}: its param group 0 has no {missing}. Load a checkpoint of "
        f"{name}"
    )

    assert text == message(lambda: opt.load_state_dict(saved().state_dict()), ValueError)
    assert before == opt.state_dict()
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    opt.step()


def test_checkpoints_of_relatives_and_of_older_versions_load() -> None:
    """Adam's options are AdamW's, and torch fills in options that an older checkpoint lacks."""
    older = adamw().state_dict()
    for group in older["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
        group["initial_lr"] = 0.1  # of a scheduler
    opt = CautiousDecay(adamw(lr=0.5))
    opt.load_state_dict(older)
    opt.load_state_dict(Adam([weight(1.0)], weight_decay=0.1).state_dict())

    assert 0.1 == opt.lam


class Mine(SGD):
    """A user's optimizer with an option that it reads only if it is there."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults["warm"] = True


def test_options_of_a_users_class_may_be_missing() -> None:
    """What another class needs is not known, so its checkpoints load as it loads them."""
    opt = CautiousDecay(Mine([weight(1.0)], lr=0.1), lam=0.1)
    opt.load_state_dict(SGD([weight(1.0)], weight_decay=0.1).state_dict())

    assert 0.1 == opt.lam


# ------------------------------------------------------------------------------------ the monitor


@pytest.mark.parametrize(
    "given", [CautiousDecay(adamw()), adamw(), nn.Linear(1, 1), 10], ids=["wrapper", "plain", "model", "number"]
)
def test_a_monitor_takes_no_optimizer(given: Any) -> None:
    """MaskMonitor(opt) says how a monitor is attached."""
    text = (
        (
            f"MaskMonitor takes keyword arguments only, but got a {type(given).__name__}. To watch an optimizer: "
            "MaskMonitor().watch(optimizer)"
        )
        .replace("a AdamW", "an AdamW")
        .replace("a int", "an int")
    )

    assert text == message(lambda: MaskMonitor(given))


# ------------------------------------------------------------------------------------ the repr


def layers(n: int, *decays: float) -> CautiousDecay:
    """``n`` groups whose weight_decay goes round through ``decays``."""
    groups = [{"params": [weight(1.0)], "weight_decay": decays[i % len(decays)]} for i in range(n)]
    return CautiousDecay(AdamW(groups, foreach=True))


@pytest.mark.parametrize(
    ("opt", "text"),
    [
        (layers(1, 0.1), "lam=0.1, path='direction'"),
        (layers(16, 0.1), "lam=0.1, path='direction'"),
        (layers(2, 0.1, 0.0), "lam=[0.1, 0.0], path='direction'"),
        (layers(16, 0.1, 0.0), "lam=0.1 (8 groups), 0.0 (8 groups), path='direction'"),
        (layers(17, 0.1, 0.2, 0.0), "lam=0.1 (6 groups), 0.2 (6 groups), 0.0 (5 groups), path='direction'"),
        (layers(12, *(k / 10 for k in range(12))), "lam=0.0 to 1.1 (12 groups), path='direction'"),
        (CautiousDecay(adamw(), lam=0), "lam=0, path='plain'"),
        (CautiousDecay(AdamW([{"params": [weight(1.0)]} for _ in range(9)]), lam=0), "lam=0, path='plain'"),
    ],
)
def test_the_repr_is_short(opt: CautiousDecay, text: str) -> None:
    """Few groups are listed, many are counted, and no group that decays is "plain", not an empty list."""
    assert text in repr(opt)


def test_paths_in_the_repr() -> None:
    """Several paths are counted in the same way."""
    groups = [{"params": [weight(1.0)], "momentum": 0.9 * (i % 3 == 0), "weight_decay": 0.1} for i in range(9)]
    opt = CautiousDecay(RMSprop(groups), backend="eager")

    assert "path='pieces' (3 groups), 'direction' (6 groups)" in repr(opt)


def test_a_wrapper_over_nothing() -> None:
    """An optimizer whose groups hold no parameters has a repr, too."""
    assert "path='plain'" in repr(CautiousDecay(Rprop([{"params": []}]), lam=0))


# ------------------------------------------------------------------------------------ reasons and warnings


def reasons(opt: Any) -> list[str]:
    return [of_group.reason for of_group in opt.paths()]


def test_reasons_in_plain_words() -> None:
    """Why a group does not take the earlier paths: one sentence for each of them."""
    groups = [{"params": [weight(1.0)]}, {"params": [weight(1.0)], "weight_decay": 0.0}]

    assert [
        "not one_pass: no kernel for Rprop. Not direction: the sign of Rprop's step is not known before it"
    ] == reasons(CautiousDecay(Rprop([weight(1.0)]), lam=0.1))
    assert "weight_decay is 0: a plain step, without decay" == reasons(CautiousDecay(AdamW(groups)))[1]


@pytest.mark.parametrize(
    ("dtype", "lr", "text"),
    [
        (torch.bfloat16, 1e-4, "lr * weight_decay = 1e-05 is too small for bfloat16 weights (needs 0.002)"),
        (torch.float16, 1e-3, "lr * weight_decay = 0.0001 is too small for float16 weights (needs 0.00024)"),
    ],
    ids=str,
)
def test_a_decay_that_is_lost(dtype: torch.dtype, lr: float, text: str) -> None:
    """The warning says what is too small for what, that nothing decays there, and the way out."""
    p = weight(1.0, grad=[1.0], dtype=dtype)
    opt = CautiousDecay(SGD([{"params": [p], "name": "head"}], lr=lr, weight_decay=0.1))
    rest = ', so nothing decays in param group 0 (head). Pass rounding="stochastic", or keep float32 weights'
    with pytest.warns(UserWarning, match=f"^{re.escape(text + rest)}$"):
        opt.step()


def test_a_leak_that_is_lost() -> None:
    """Where the decay is large enough but what leaks of it is not, the warning says so."""
    p = weight(1.0, grad=[1.0], dtype=torch.bfloat16)
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.1), leak=0.1)
    text = (
        "lr * weight_decay * leak = 0.001 is too small for bfloat16 weights (needs 0.002), so only aligned weights "
        'decay in param group 0. Pass rounding="stochastic", or keep float32 weights'
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        opt.step()


def test_a_step_without_hooks() -> None:
    """If the base's step did not fire its hooks, the warning says what happened and what to do; it is the only one."""
    base = SGD([weight(1.0, grad=[1.0])], lr=0.1, weight_decay=0.1)
    opt = CautiousDecay(base)
    base.step = lambda closure=None: None  # type: ignore[method-assign]
    text = (
        "SGD.step did not fire its hooks, so CautiousDecay had no effect and SGD used its own weight decay. If you "
        "replaced SGD.step, call the original from the replacement"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$") as caught:
        opt.step()

    assert 1 == len(caught)


def without(key: str) -> Any:
    return lambda opt: opt.param_groups[0].pop(key)


SICK: dict[str, tuple[Any, str]] = {
    "no params": (without("params"), "<CautiousDecay, not described: KeyError: 'params'>"),
    "no betas": (without("betas"), "<CautiousDecay, not described: KeyError: 'betas'>"),
    "no group": (lambda opt: opt.param_groups.append(None), "<CautiousDecay, not described: AttributeError: "),
    "no flag": (lambda opt: setattr(opt, "strict", "yes"), "<CautiousDecay, not described: TypeError: strict='yes'"),
    "no mask": (lambda opt: setattr(opt, "mask", "none"), "CautiousDecay(AdamW, lam=0.5, path='None', "),
    "no number": (lambda opt: opt.param_groups[0].update(weight_decay="x"), "CautiousDecay(AdamW, lam='x', path="),
    "no base": (lambda opt: delattr(opt, "base_optimizer"), "<CautiousDecay, not described: AttributeError: "),
    "nothing": (lambda opt: vars(opt).clear(), "<CautiousDecay, not described: AttributeError: "),
}


@pytest.mark.parametrize(("spoil", "text"), SICK.values(), ids=list(SICK))
def test_a_repr_never_raises(spoil: Any, text: str) -> None:
    """Debuggers and errors print a wrapper whatever is wrong with it."""
    opt = CautiousDecay(AdamW([weight(1.0)], lr=0.1, weight_decay=0.5))
    spoil(opt)

    assert repr(opt).startswith(text)
