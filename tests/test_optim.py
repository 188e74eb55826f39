"""`cwd_wrap.optim`: a class for each optimizer of torch, `cautious` for those of other libraries."""

import ast
import copy
import functools
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import net, train, values, weight
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import cwd_wrap
from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay, optim, params_first
from cwd_wrap.optim import cautious

TORCHS = sorted(
    name
    for name, each in vars(torch.optim).items()
    if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
)
duplicates = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)

# ------------------------------------------------------------------------------------ a class for each of torch.optim


def test_four_weights() -> None:
    """A step decays the weights that it moves towards zero, by lr * weight_decay = 0.05; with mask="all" every one."""
    gradient = [1.0, -1.0, 1.0, -1.0]
    p, q = (weight(1.0, 1.0, -1.0, -1.0, grad=gradient) for _ in range(2))
    optim.SGD([p], lr=0.1, weight_decay=0.5).step()
    optim.SGD([q], lr=0.1, weight_decay=0.5, mask="all").step()

    assert torch.allclose(p, torch.tensor([0.85, 1.1, -1.1, -0.85]))
    assert torch.allclose(q, torch.tensor([0.85, 1.05, -1.05, -0.85]))


@pytest.mark.parametrize("name", TORCHS)
def test_each_optimizer_of_torch_has_a_class(name: str) -> None:
    """The class is what over() returns, each time the same, and is listed by dir()."""
    cls = getattr(optim, name)

    assert cls is getattr(importlib.import_module("cwd_wrap.optim"), name)
    assert cls is CautiousDecay.over(getattr(torch.optim, name))
    assert name in dir(optim)


@pytest.mark.parametrize("name", TORCHS)
def test_the_class_can_be_imported_by_what_logs_show(name: str) -> None:
    """Logs show module and __qualname__, or module and __name__; both lead to the class."""
    cls = getattr(optim, name)

    assert (cls.__module__, cls.__qualname__) == ("cwd_wrap.optim", name)
    assert f"<class 'cwd_wrap.optim.{name}'>" == repr(cls)
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls


def test_the_found_names_are_not_none() -> None:
    """The list of torch's optimizers, on which these tests run, has more than ten."""
    assert {"AdamW", "SGD"} < set(TORCHS)
    assert len(TORCHS) > 10


def test_dir_lists_classes_and_the_function() -> None:
    """dir() names what a user can use, and nothing else."""
    assert [*TORCHS, "cautious"] == dir(optim)


def test_type_checkers_see_each_class() -> None:
    """Each optimizer of this torch is declared for type checkers, which do not run the module."""
    tree = ast.parse(Path(optim.__file__).read_text())

    assert set(TORCHS) <= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@duplicates
def test_the_class_and_its_instances_can_be_copied(duplicate: Any) -> None:
    """A copy of the class is the class, and a copy of an optimizer keeps its class and options."""
    opt = duplicate(optim.AdamW([weight(1.0)], weight_decay=0.1, strict=True))

    assert optim.AdamW is duplicate(optim.AdamW) is type(opt)
    assert opt.strict


def test_a_pickle_holds_the_name() -> None:
    """The pickle of the class names module and class, and nothing else."""
    assert b"ccwd_wrap.optim\nAdamW\n." == pickle.dumps(optim.AdamW, protocol=0).replace(b"p0\n", b"")


def test_pickles_of_version_0_1_load() -> None:
    """What version 0.1 wrote for the class, a call of `params_first.make`, gives the class."""
    old = b"\x80\x04ccwd_wrap.params_first\nmake\nccwd_wrap.wrappers\nCautiousDecay\nctorch.optim.adamw\nAdamW\n)\x87R."

    assert pickle.loads(old) is optim.AdamW


def test_other_classes_from_over_keep_their_recipe() -> None:
    """With options, or of a sibling, a class has no name to be imported by, and its pickle says how to make it."""
    for cls in (CautiousDecay.over(AdamW, strict=True), CautiousUpdate.over(AdamW)):
        assert b"make" in pickle.dumps(cls)
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_class_trains_as_the_wrapper() -> None:
    """The class trains bit for bit as the wrapper around torch's optimizer with the same options."""
    one, two = net(), net()
    train(one, optim.AdamW(one.parameters(), lr=0.01, weight_decay=0.5, strict=True), range(3))
    train(two, CautiousDecay(AdamW(two.parameters(), lr=0.01, weight_decay=0.5), strict=True), range(3))

    assert torch.equal(values(one), values(two))


# ------------------------------------------------------------------------------------ options of both


def test_a_class_takes_the_arguments_of_both() -> None:
    """Positional arguments are the base's, keywords go to whom they belong."""
    opt: Any = optim.AdamW([weight(1.0)], 0.25, (0.5, 0.75), weight_decay=0.1, lam=0.3, mask="all", seed=7)

    assert (0.25, (0.5, 0.75), 0.3) == tuple(opt.param_groups[0][key] for key in ("lr", "betas", "weight_decay"))
    assert ("all", 7, 0.3) == (opt.mask, opt.seed, opt.lam)


def test_the_signature_is_that_of_both() -> None:
    """The signature has torch's parameters, then the wrapper's as keywords, with their defaults."""
    plain = inspect.signature(AdamW).parameters
    both = inspect.signature(optim.AdamW).parameters
    added = {name: p for name, p in both.items() if name not in plain}

    assert [*both] == [*plain, *added]
    assert {"lam", "leak", "mask", "strict", "step_size", "path", "rounding", "seed", "backend"} == {*added}
    assert {inspect.Parameter.KEYWORD_ONLY} == {p.kind for p in added.values()}
    assert "update" == added["mask"].default


def test_an_option_of_over_is_a_default() -> None:
    """What over() was given is the default, shown in the signature; a call may say otherwise."""
    cls: Any = CautiousDecay.over(SGD, strict=True, seed=1)

    assert [True, 1] == [inspect.signature(cls).parameters[name].default for name in ("strict", "seed")]
    assert (True, 1) == ((opt := cls([weight(1.0)], lam=0.1)).strict, opt.seed)
    assert (False, 1) == ((opt := cls([weight(1.0)], lam=0.1, strict=False)).strict, opt.seed)


def seeded(params: Any, seed: int = 0, **kwargs: Any) -> Optimizer:
    optimizer = SGD(params, lr=0.1, **kwargs)
    optimizer.seed_of_base = seed  # type: ignore[attr-defined]
    return optimizer


def test_a_name_that_both_have_is_the_bases() -> None:
    """A call passes it to the base; over() passes it to the wrapper."""
    opt: Any = CautiousDecay.over(seeded, seed=5)([weight(1.0)], seed=3, lam=0.1, strict=True)

    assert (3, 5, True) == (opt.base_optimizer.seed_of_base, opt.seed, opt.strict)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mask": "sign"}, ValueError, "unknown mask 'sign'"),
        ({"lam": -1.0}, ValueError, "lam of CautiousDecayAdamW is -1.0"),
        ({"beta": 0.9}, TypeError, r"unexpected keyword argument 'beta'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """The wrapper refuses its own bad values; a name that neither has reaches the base, which refuses it."""
    with pytest.raises(error, match=text):
        optim.AdamW([weight(1.0)], **options)


def test_a_base_may_have_an_argument_base_optimizer() -> None:
    """SAM and Lookahead take their own base_optimizer; the wrapper leaves it to them."""

    class Outer(SGD):
        def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
            super().__init__(params, **kwargs)
            self.base_optimizer = base_optimizer(self.param_groups, **kwargs)

    opt: Any = CautiousDecay.over(Outer)([weight(1.0)], base_optimizer=SGD, lr=0.1, weight_decay=0.1)

    assert (Outer, SGD) == (type(opt.base_optimizer), type(opt.base_optimizer.base_optimizer))


# ------------------------------------------------------------------------------------ other libraries


@pytest.mark.parametrize("base", ["torch.optim.Adagrad", "Adagrad", Adagrad, functools.partial(Adagrad, lr_decay=0)])
def test_cautious_takes_a_dotted_name_or_what_it_names(base: Any) -> None:
    """`cautious` builds Adagrad and wraps it, with options for both."""
    opt = cautious([weight(1.0)], base=base, lr=0.5, weight_decay=0.1, path="snapshot")

    assert (CautiousDecay.over(Adagrad).__name__, Adagrad) == (type(opt).__name__, type(opt.base_optimizer))
    assert (0.5, "snapshot") == (opt.param_groups[0]["lr"], opt.path)


def test_cautious_makes_the_siblings() -> None:
    """`method` names another wrapper, with its own options."""
    made = [
        cautious([weight(1.0)], "SGD", method="CautiousUpdate", lr=0.1, scale=None),
        cautious([weight(1.0)], "SGD", method="PNormDecay", lr=0.1, lam=0.1, p=0.5),
    ]

    assert [CautiousUpdate, PNormDecay] == [type(opt).__bases__[0] for opt in made]
    assert (None, 0.5) == (made[0].scale, made[1].p)


def test_cautious_finds_other_libraries() -> None:
    """timm's Lion is found by name; params may be a keyword."""
    pytest.importorskip("timm")
    opt = cautious(params=[weight(1.0)], base="timm.optim.Lion", lr=0.1, weight_decay=0.1)

    assert "Lion" == type(opt.base_optimizer).__name__


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "case": ({"base": "adamw"}, ValueError, "base='adamw': torch.optim has no 'adamw' .* Did you mean AdamW or Adam"),
    "module": ({"base": "tiny.Lion"}, ImportError, "base='tiny.Lion': cannot import 'tiny' .*Write module.Class"),
    "not there": ({"base": "torch.optim.AdamX"}, ValueError, "torch.optim has no 'AdamX'. Did you mean .*Adam"),
    "a module": ({"base": "torch.optim.lr_scheduler"}, ValueError, "torch.optim has no 'lr_scheduler'"),
    "empty": ({"base": ""}, ValueError, "base='': torch.optim has no ''"),
    "dots": ({"base": "..AdamW"}, ImportError, "cannot import '.'"),
    "no optimizer": ({"base": "torch.nn.Linear"}, TypeError, "over takes a class of optimizers"),
    "method": ({"base": "SGD", "method": "Cautious"}, ValueError, "unknown method 'Cautious': pass one of 'CautiousDe"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG.values(), ids=list(WRONG))
def test_cautious_says_what_is_wrong(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    """A name that leads nowhere is shown with near ones, or with the form that is wanted."""
    with pytest.raises(error, match=text):
        cautious([weight(1.0)], **arguments)


@pytest.mark.parametrize(("name", "near"), [("adamw", "AdamW or Adam"), ("Adadleta", "Adadelta"), ("SDG", "SGD")])
def test_an_unknown_class_lists_near_ones(name: str, near: str) -> None:
    """The AttributeError names the module, the name and near names, whatever their case."""
    with pytest.raises(AttributeError, match=f"module 'cwd_wrap.optim' has no attribute '{name}'. Did you mean {near}"):
        getattr(optim, name)


def test_a_name_without_near_ones() -> None:
    """Where nothing is near, the text ends with the name; hasattr works."""
    with pytest.raises(AttributeError, match=r"has no attribute 'xyz'$"):
        _ = optim.xyz

    assert not hasattr(cwd_wrap.optim, "xyz")


def test_only_classes_without_options_are_in_the_module() -> None:
    """`importable` has one entry for each of torch's optimizers, all of CautiousDecay."""
    assert {(CautiousDecay, getattr(torch.optim, name)) for name in TORCHS} == set(params_first.importable)
