"""Errors have the right type, name the value, the place and a way out, and leave everything unchanged."""

import copy
import inspect
import itertools
import math
import sys
from typing import Any

import pytest
import torch
from support import Method, PathOptions, in_turn, weight
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay

NOT_DECAYS = [-0.1, math.nan, math.inf, -math.inf]


def sgd(**options: Any) -> SGD:
    """SGD with two groups that both decay."""
    groups = [{"params": [weight(1.0, grad=[1.0])]}, {"params": [weight(1.0, grad=[1.0])], "weight_decay": 0.25}]
    return SGD(groups, **{"lr": 0.1, "weight_decay": 0.5, **options})


def with_key(base: Optimizer, key: str, value: object, group: int = 1) -> Optimizer:
    base.param_groups[group][key] = value
    return base


class LookaheadLike(Optimizer):
    """Keeps the inner optimizer under the attribute name that timm uses."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self._base_optimizer = base


# ------------------------------------------------------------------------------------ what cannot be wrapped

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], list[str]]] = {
    "a number": (3, {}, TypeError, ["CautiousDecay wraps an optimizer, but got an int. Pass CautiousDecay(AdamW("]),
    "weight_decay=": (sgd(), {"weight_decay": 0.1}, TypeError, ["does not take weight_decay", "to SGD", "as lam="]),
    "lr=": (
        sgd(),
        {"lr": 0.1, "lam": 0.1},
        TypeError,
        ["not take lr: pass that to SGD. It takes ['lam', 'mask',"],
    ),
    "lr of two elements": (
        with_key(sgd(), "lr", torch.tensor([0.1, 0.2])),
        {},
        ValueError,
        ["lr of param group 1 of SGD", "shape (2,)", "one element"],
    ),
    "wrapped": (CautiousDecay(sgd()), {}, ValueError, ["CautiousDecay(SGD", "decay twice", "base_optimizer"]),
    "wrapped inside": (LookaheadLike(CautiousDecay(sgd())), {}, ValueError, ["CautiousDecay(SGD", "decay twice"]),
    "unknown mask": (sgd(), {"mask": "sign"}, ValueError, ["'sign'", "'update'"]),
    "unknown backend": (sgd(), {"backend": "cuda12"}, ValueError, ["'cuda12'", "'eager'", "None"]),
    "no direction": (
        LBFGS([weight(1.0)]),
        {"lam": 0.5, "path": "direction"},
        ValueError,
        ["path='direction'", "LBFGS", "path=None"],
    ),
    "no direction, momentum tensor": (
        with_key(sgd(momentum=0.9), "momentum", torch.tensor(0.9)),
        {"path": "direction"},
        ValueError,
        ["path='direction'", "SGD", "tensors"],
    ),
    "lr None": (with_key(sgd(), "lr", None), {}, ValueError, ["group 1 of SGD", "lr=None", "step_size="]),
    "relative_step": (
        with_key(sgd(), "relative_step", value=True),
        {},
        ValueError,
        ["group 1 of SGD", "relative_step=True", "step_size="],
    ),
    "differentiable": (
        sgd(differentiable=True),
        {},
        ValueError,
        ["group 0 of SGD", "differentiable=True", "leave differentiable off"],
    ),
    "differentiable, one group": (
        with_key(sgd(), "differentiable", value=True),
        {},
        ValueError,
        ["group 1 of SGD", "differentiable=True"],
    ),
    "step_size a number": (sgd(), {"step_size": 0.1}, TypeError, ["step_size=0.1", "function", "group"]),
    "lam a string": (sgd(), {"lam": "0.1"}, TypeError, ["lam of CautiousDecay", "'0.1'", "str"]),
    "lam a list": (sgd(), {"lam": [0.1, 0.2]}, TypeError, ["lam of CautiousDecay", "[0.1, 0.2]"]),
    **{f"lam={v}": (sgd(), {"lam": v}, ValueError, ["lam", repr(v), "zero or above"]) for v in NOT_DECAYS},
    **{
        f"weight_decay={v}": (
            with_key(sgd(), "weight_decay", v),
            {},
            ValueError,
            ["weight_decay", "group 1 of SGD", repr(v), "zero or above"],
        )
        for v in NOT_DECAYS
    },
    "weight_decay of two elements": (
        with_key(sgd(), "weight_decay", torch.tensor([0.1, 0.2])),
        {},
        ValueError,
        ["weight_decay", "group 1 of SGD", "(2,)", "one element"],
    ),
    "weight_decay a string": (
        with_key(sgd(), "weight_decay", "0.1"),
        {},
        TypeError,
        ["weight_decay", "group 1 of SGD", "'0.1'"],
    ),
}


def contents(base: object) -> object:
    """Everything in the groups of an optimizer, with parameters and their lists by identity."""
    groups = getattr(base, "param_groups", []) if isinstance(base, Optimizer) else []
    return [
        {k: [id(v), *map(id, v)] if k == "params" else copy.deepcopy(repr(v)) for k, v in g.items()} for g in groups
    ]


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_wrapped_is_refused(case: Any) -> None:
    """The error has the right type and names what was given, where, and what to do; the base is unchanged."""
    base, options, error, pieces = case
    before = contents(base)
    with pytest.raises(error) as caught:
        CautiousDecay(base, **options)

    assert error is type(caught.value)
    assert [] == [piece for piece in pieces if piece not in str(caught.value)]
    assert before == contents(base)


@pytest.mark.parametrize("keywords", [{"params": [], "lr": 0.1}, {"base_optimizer": sgd(), "weight_decay": 0.1}])
def test_the_error_for_an_argument_of_the_optimizer_names_the_optimizer(keywords: dict[str, Any]) -> None:
    """The error names the optimizer that takes the argument; it names lam= only if the method has lam."""
    owner = "SGD" if "base_optimizer" in keywords else "the optimizer"
    name = ", ".join(key for key in keywords if key != "base_optimizer")
    with pytest.raises(TypeError, match=f"^CautiousUpdate does not take {name}: pass that to {owner}. It takes "):
        CautiousUpdate(**keywords)


def test_a_subclass_may_take_any_keyword() -> None:
    """A subclass with **kwargs in its constructor may take any keyword."""

    class Logged(CautiousDecay):
        def __init__(self, base_optimizer: Optimizer, **kwargs: Any) -> None:
            super().__init__(base_optimizer, kwargs["strength"])

    assert 0.25 == Logged(sgd(), strength=0.25).lam
    assert ["base_optimizer", "lam"] == list(inspect.signature(CautiousDecay).parameters)[:2]


def test_a_refused_lam_is_not_written_into_any_group() -> None:
    """If group 1 has no learning rate, lam is not written into group 0 either."""
    base = with_key(sgd(), "lr", None)
    with pytest.raises(ValueError, match="step_size="):
        CautiousDecay(base, lam=0.125)

    assert [0.5, 0.25] == [group["weight_decay"] for group in base.param_groups]


def test_a_wrapped_optimizer_inside_timms_lookahead_is_found() -> None:
    """Lookahead around a wrapped optimizer is refused; the wrapper goes around the Lookahead."""
    timm = pytest.importorskip("timm.optim")
    inside = timm.Lookahead(CautiousDecay(sgd()))
    with pytest.raises(ValueError, match="decay twice"):
        CautiousDecay(inside)

    assert isinstance(CautiousDecay(timm.Lookahead(sgd())), Optimizer)


def test_nothing_to_decay_gives_one_warning() -> None:
    """A base in which no group decays gives one warning, which names both ways to set a decay."""
    with pytest.warns(UserWarning, match=r"will not decay anything: .*lam=.*weight_decay in SGD") as caught:
        CautiousDecay(SGD([weight(1.0)], lr=0.1))

    assert 1 == len(caught)
    assert __file__ == caught[0].filename


# ------------------------------------------------------------------------------------ a step that cannot be taken

UNFIT: dict[str, tuple[str, Any, list[str]]] = {
    **{f"weight_decay={v}": ("weight_decay", v, ["weight_decay", repr(v), "zero or above"]) for v in NOT_DECAYS},
    **{f"lr={v}": ("lr", v, ["lr", repr(v)]) for v in NOT_DECAYS},
    "lr=None": ("lr", None, ["lr=None", "step_size="]),
    "weight_decay=tensor(nan)": ("weight_decay", torch.tensor(math.nan), ["weight_decay", "nan"]),
}


@pytest.mark.parametrize(("name", "path_in_turn"), in_turn(UNFIT))
def test_an_unfit_group_stops_the_step(name: str, path_in_turn: PathOptions) -> None:
    """A bad value written into group 1 raises a ValueError that names it, and no weight moves."""
    key, value, pieces = UNFIT[name]
    base = sgd(**path_in_turn.base)
    opt = CautiousDecay(base, **path_in_turn)
    base.param_groups[1][key] = value
    before = contents(base)
    with pytest.raises(ValueError, match="group 1 of SGD") as caught:
        opt.step()

    assert [] == [piece for piece in pieces if piece not in str(caught.value)]
    assert before == contents(base)
    assert [1.0, 1.0] == [group["params"][0].item() for group in base.param_groups]
    assert 0 == len(base._optimizer_step_pre_hooks)


def test_an_unfit_step_size_stops_the_step(every_path: PathOptions) -> None:
    """A step_size= that returns a negative, NaN or infinite value raises with the group, and no weight moves."""
    for value in NOT_DECAYS:
        base = sgd(**every_path.base)
        opt = CautiousDecay(base, step_size=lambda group, value=value: value, **every_path)
        with pytest.raises(ValueError, match=r"step_size=.*group 0 of SGD") as caught:
            opt.step()

        assert repr(value) in str(caught.value)
        assert [1.0, 1.0] == [group["params"][0].item() for group in base.param_groups]


def broken(*_: object, **__: object) -> None:
    msg = "raised on purpose"
    raise RuntimeError(msg)


def test_a_base_that_raises_gets_its_decay_back(every_method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the base's step reaches the caller, and groups and hooks are restored."""
    base = with_key(sgd(**every_method.base), "always_adapt", value=False)
    opt = every_method.wrap(base)
    before = contents(base)
    monkeypatch.setattr(SGD, "_init_group", broken)
    with pytest.raises(RuntimeError, match="raised on purpose"):
        opt.step()

    assert before == contents(base)
    assert 0 == len(base._optimizer_step_pre_hooks)


def test_a_step_after_an_error_is_right(every_rule: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a failed one applies the base and the method, with the group's own weight_decay."""
    base = sgd(**every_rule.base)
    opt = every_rule.wrap(base)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(SGD, "_init_group", broken)
        opt.step()
    (p,) = base.param_groups[0]["params"]
    expected = every_rule.after_sgd(p, p.grad)
    opt.step()

    torch.testing.assert_close(expected, p.detach())


def test_an_error_in_a_closure_or_a_hook_reaches_the_caller(every_method: Method) -> None:
    """An error in a closure or in a hook, of four, reaches the caller; groups and the base's hooks are restored."""
    base = sgd(**every_method.base)
    opt = every_method.wrap(base)
    before = contents(base)
    with pytest.raises(RuntimeError, match="raised on purpose"):
        opt.step(broken)

    assert before == contents(base), "closure"
    for owner, which in itertools.product((opt, base), ("pre", "post")):
        handle = getattr(owner, f"register_step_{which}_hook")(broken)
        with pytest.raises(RuntimeError, match="raised on purpose"):
            opt.step()
        handle.remove()

        assert before == contents(base), (owner, which)
        assert 0 == len(base._optimizer_step_pre_hooks) == len(base._optimizer_step_post_hooks), (owner, which)


def test_the_decay_is_off_while_the_base_steps(every_method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the base steps, weight_decay is 0 and always_adapt is on; its hooks see the original values."""
    base = with_key(sgd(**every_method.base), "always_adapt", value=False)
    opt, inside, outside = every_method.wrap(base), [], []
    module = sys.modules["torch.optim.sgd"]
    inner = module.sgd

    def look(log: list[Any]) -> None:
        log.append([(g["weight_decay"], g.get("always_adapt")) for g in base.param_groups])

    monkeypatch.setattr(module, "sgd", lambda *args, **kwargs: (look(inside), inner(*args, **kwargs)))
    base.register_step_pre_hook(lambda *_: look(outside))
    base.register_step_post_hook(lambda *_: look(outside))
    opt.step()

    assert 2 <= len(inside)  # one call for each group, and more in pieces
    assert [[(0.0, None), (0.0, True)]] * len(inside) == inside
    assert [[(0.5, None), (0.25, False)]] * 2 == outside
    assert [0.5, 0.25] == [group["weight_decay"] for group in base.param_groups]
    assert base.param_groups[1]["always_adapt"] is False


def test_lamb_gets_always_adapt_back() -> None:
    """timm's LAMB has its weight_decay and always_adapt back after its step raised."""
    timm = pytest.importorskip("timm.optim")
    base = timm.Lamb([weight(1.0, grad=[1.0])], lr=0.1, weight_decay=0.5)
    opt = CautiousDecay(base)
    before = contents(base)
    base.register_step_pre_hook(broken)
    with pytest.raises(RuntimeError, match="raised on purpose"):
        opt.step()

    assert before == contents(base)


# ------------------------------------------------------------------------------------ arguments that are set later

SET_LATER = [
    (CautiousDecay, "mask", "updates", "unknown mask 'updates': pass one of 'update', 'gradient', 'random', 'all'"),
    (CautiousDecay, "rounding", "up", "unknown rounding 'up'"),
    (CautiousDecay, "strict", 1, "strict=1: pass one of True, False"),
    (CautiousDecay, "path", "fast", "unknown path 'fast': pass one of 'one_pass'"),
    (CautiousDecay, "backend", "cuda", "unknown backend 'cuda': pass one of 'eager'"),
    (CautiousDecay, "seed", "x", "seed='x': pass an int from 0 up to"),
    (CautiousDecay, "step_size", 0.1, "step_size=0.1 is not callable: pass a function of a param group"),
    (CautiousDecay, "lam", "0.1", "lam of CautiousDecay is '0.1'"),
    (
        CautiousDecay,
        "observer",
        MaskMonitor,
        r"observer is the class MaskMonitor: set an instance, such as MaskMonitor\(\)",
    ),
    (
        CautiousDecay,
        "observer",
        [print],
        r"observer=\[<built-in function print>\] cannot be called: set a MaskMonitor\(\), or",
    ),
    (PNormDecay, "p", 3, "p of PNormDecay is 3"),
    (CautiousUpdate, "scale", "sum", "unknown scale 'sum': pass one of 'mean', 'numel', None"),
]


@pytest.mark.parametrize(("wrap", "name", "value", "text"), SET_LATER)
def test_an_argument_that_is_set_later_is_checked(wrap: Any, name: str, value: object, text: str) -> None:
    """A wrong value that is set on a wrapper raises there or at the next step, which changes nothing."""
    opt = wrap(sgd())

    with pytest.raises((TypeError, ValueError), match=text):
        setattr(opt, name, value)
        opt.step()
    assert [1.0, 1.0] == [p.item() for group in opt.param_groups for p in group["params"]]
    assert [0.5, 0.25] == [group["weight_decay"] for group in opt.param_groups]


# ------------------------------------------------------------------------------------ groups added later


@pytest.mark.parametrize(
    ("group", "pieces"),
    [
        ({"weight_decay": -0.1}, ["weight_decay", "group 2 of SGD", "-0.1"]),
        ({"weight_decay": math.nan}, ["weight_decay", "group 2 of SGD", "nan"]),
        ({"lr": None}, ["group 2 of SGD", "lr=None", "step_size="]),
        ({"differentiable": True}, ["group 2 of SGD", "differentiable=True"]),
    ],
)
def test_an_unfit_group_is_not_added(group: dict[str, Any], pieces: list[str]) -> None:
    """A group that cannot be stepped is refused when it is added, and the base keeps its groups."""
    opt = CautiousDecay(sgd())
    before = contents(opt)
    with pytest.raises(ValueError, match="group 2 of SGD") as caught:
        opt.add_param_group({"params": [weight(1.0)], **group})

    assert [] == [piece for piece in pieces if piece not in str(caught.value)]
    assert before == contents(opt)


def test_variants_of_adam_are_not_refused() -> None:
    """Plain, fused, amsgrad and maximize variants of Adam and AdamW are accepted."""
    for base in (Adam, AdamW):
        for options in ({}, {"fused": True}, {"amsgrad": True}, {"maximize": True}):
            assert isinstance(CautiousDecay(base([weight(1.0)], weight_decay=0.5, **options)), Optimizer)
