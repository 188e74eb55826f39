"""Optimizers as people write and patch them, each wrapped, with the plain one beside it.

They skip steps, accumulate gradients, hold other optimizers, multiply the decay in ways of their own, set their own
learning rate, or keep weights under a constraint. The wrapper must give the right weights, or say why it cannot.
"""

import enum
import functools
import gc
import importlib
import importlib.util
import inspect
import math
import random
import sys
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from support import weight
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.bases import directions, known, pieces, probe, updates
from cwd_wrap.step import paths

LAM = 0.5


@pytest.fixture
def silent() -> Iterator[None]:
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --------------------------------------------------------------------------- steps that are not taken


class SkipsOutliers(SGD):
    """Returns before the step if the gradient is large."""

    def step(self, closure: Any = None) -> Any:
        if any(p.grad.norm() > 10 for group in self.param_groups for p in group["params"]):
            return None
        return super().step(closure)


class ScalesOutliersAway(SGD):
    """Multiplies the learning rate by 0 if the gradient is large."""

    def step(self, closure: Any = None) -> Any:
        lrs = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= all(p.grad.norm() <= 10 for p in group["params"])
        super().step(closure)
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr


class VirtualSteps(Optimizer):
    """Adds gradients up, and has the optimizer inside step at each eighth call."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.optimizer, self.calls = optimizer.param_groups, optimizer, 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return None if self.calls % 8 else self.optimizer.step(closure)


every_skipping = pytest.mark.parametrize("cls", [SkipsOutliers, ScalesOutliersAway])


@pytest.mark.filterwarnings("ignore")
@every_skipping
@pytest.mark.parametrize("wrap", [CautiousDecay, functools.partial(PNormDecay, p=2)], ids=["decay", "p-norm"])
def test_a_step_that_the_base_skips_does_not_decay(wrap: Any, cls: Any) -> None:
    """Ten skipped steps leave the weight 1.0 as it is. Decaying by 0.05 each would leave 0.599."""
    p = weight(1.0, grad=[100.0])
    opt = wrap(cls([p], lr=0.1, weight_decay=0.5))
    for _ in range(10):
        opt.step()

    assert 1.0 == p.item()


@pytest.mark.filterwarnings("ignore")
@every_skipping
def test_a_step_that_the_base_skips_does_not_decay_with_strict(cls: Any) -> None:
    """With strict=True a weight that stays in place does not decay in any case."""
    p = weight(1.0, grad=[100.0])
    opt = CautiousDecay(cls([p], lr=0.1, weight_decay=0.5), strict=True)
    opt.step()

    assert 1.0 == p.item()


@pytest.mark.parametrize("strict", [False, True])
@every_skipping
def test_a_skipped_step_warns_once_with_the_way_out(cls: Any, strict: bool) -> None:
    """The first skipped step warns, and the warning says what to wrap instead; later ones are silent."""
    opt = CautiousDecay(cls([weight(1.0, grad=[100.0])], lr=0.1, weight_decay=0.5), strict=strict)
    with pytest.warns(UserWarning, match=rf"{cls.__name__}.*skip") as caught:
        for _ in range(3):
            opt.step()

    assert 1 == len(caught)


@pytest.mark.filterwarnings("ignore")
def test_virtual_steps_decay_only_where_the_optimizer_inside_steps() -> None:
    """Of 16 calls two step. Gradients of 1e-5 leave only the decay: (1 - 0.05)**2 = 0.9025, not 0.95**16 = 0.44."""
    p = weight(1.0, grad=[1e-5])
    opt = CautiousDecay(VirtualSteps(SGD([p], lr=0.1, weight_decay=0.5)))
    for _ in range(16):
        opt.step()

    assert pytest.approx(0.9025, abs=1e-5) == p.item()


class ClearsOutliers(SGD):
    """If a gradient is large, sets all to 0 and returns."""

    clear: Any = None

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(
            p.grad.coalesce().values().abs().sum() > 10 if p.grad.is_sparse else p.grad.norm() > 10 for p in parameters
        ):
            for p in parameters:
                type(self).clear(p)
            return loss
        super().step()
        return loss


CLEARS: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.grad.zero_(),  # type: ignore[union-attr]
    "in its data": lambda p: p.grad.data.zero_(),  # type: ignore[union-attr]
    "by zeros": lambda p: setattr(p, "grad", torch.zeros_like(p)),
    "by None": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("clear", CLEARS.values(), ids=list(CLEARS))
@pytest.mark.parametrize("by_closure", [False, True], ids=["backward", "closure"])
@pytest.mark.parametrize("asks", [True, False], ids=["asked", "not asked"])
@pytest.mark.parametrize("gradient", [[100.0, 0.0], [0.0] * 5 + [100.0]], ids=["at once", "at the end"])
def test_a_skipped_step_that_clears_the_gradients_does_not_decay(
    gradient: list[float], asks: bool, by_closure: bool, clear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three such steps leave the weights at 1; a step with gradients of 0 takes 0.05 off, as before."""
    monkeypatch.setattr(ClearsOutliers, "clear", clear)
    if not asks:  # as for weights on an accelerator
        monkeypatch.setattr(paths, "_can_ask", lambda _: False)
    p = weight(*[1.0] * len(gradient))
    opt = CautiousDecay(ClearsOutliers([p], lr=0.1), lam=0.5)

    def closure(size: float) -> float:
        p.grad = size * torch.tensor(gradient)
        return 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the step was skipped
        for _ in range(3):
            opt.step(lambda: closure(1.0)) if by_closure else (closure(1.0), opt.step())

    assert [1.0] * len(gradient) == p.tolist()
    opt.step(lambda: closure(0.0)) if by_closure else (closure(0.0), opt.step())

    assert pytest.approx([0.95] * len(gradient)) == p.tolist()


def test_a_skipped_step_that_clears_sparse_gradients_does_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a sparse gradient stay as they are, too."""
    monkeypatch.setattr(ClearsOutliers, "clear", lambda p: p.grad.zero_())
    p = nn.Parameter(torch.ones(3, 2))
    opt = CautiousDecay(ClearsOutliers([p], lr=0.1), lam=0.5)
    p.grad = torch.sparse_coo_tensor([[1]], [[100.0, 0.0]], (3, 2), check_invariants=True)
    with pytest.warns(UserWarning, match="skips"):
        opt.step()

    assert torch.equal(torch.ones(3, 2), p)


def replaces_its_groups(cls: type[Optimizer]) -> type[Optimizer]:
    """A class whose step ends with copies of its param groups in their place."""

    class Replaces(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.param_groups = [dict(group) for group in self.param_groups]
            return loss

    return Replaces


@pytest.mark.parametrize("cls", [SkipsOutliers, AdamW])
def test_groups_that_the_base_replaces_in_its_step_keep_their_decay(cls: Any, silent: None) -> None:
    """Each of three steps takes 0.05 off: the copies of the groups have not kept the 0 of the step."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(replaces_its_groups(cls)([p], lr=0.1, weight_decay=0.5))
    for _ in range(3):
        opt.step()

    assert pytest.approx(0.95**3) == p.item()
    assert (0.5, [p]) == (opt.lam, opt.param_groups[0]["params"])


def test_a_hook_and_the_step_may_both_replace_the_groups(silent: None) -> None:
    """The copies that the step makes of the hook's copies have not kept the 0 of the step either: 0.95**3."""
    p = weight(1.0, grad=[0.0])
    base = replaces_its_groups(AdamW)([p], lr=0.1, weight_decay=0.5)
    opt = CautiousDecay(base)
    base.register_step_pre_hook(lambda *_: setattr(base, "param_groups", [dict(group) for group in base.param_groups]))
    for _ in range(3):
        opt.step()

    assert (pytest.approx(0.95**3), 0.5) == (p.item(), opt.lam)


class AddsAGroup(SGD):
    """SGD that adds a group of one weight at the begin of its second step."""

    later: Any = None
    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 2:
            self.add_param_group({"params": [self.later], "weight_decay": 0.5})
        return super().step(closure)


def test_a_group_that_the_base_adds_in_its_step_is_said() -> None:
    """Its own decay is on in that step, also where the weight grows (1.05); from the next on the rule holds (1.15)."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[-1.0])
    opt = CautiousDecay(base := AddsAGroup([p], lr=0.1, weight_decay=0.5))
    base.later = q
    opt.step()
    with pytest.warns(UserWarning, match=r"^AddsAGroup replaced or added param groups during its step\."):
        opt.step()
    assert pytest.approx(1.05) == q.item()
    opt.step()

    assert pytest.approx(1.15) == q.item()


def test_a_step_that_a_user_has_replaced_by_two_steps(silent: None) -> None:
    """Each of the two is a step with the rule: 1 - 0.1 - 0.05 = 0.85, then 0.85 - 0.1 - 0.0425."""
    p = weight(1.0, grad=[1.0])
    base = SGD([p], lr=0.1, weight_decay=0.5)
    opt, step = CautiousDecay(base), base.step
    base.step = lambda closure=None: (step(closure), step(closure))[1]  # type: ignore[method-assign]
    opt.step()

    assert pytest.approx(0.7075) == p.item()
    assert (0.5, 0) == (opt.lam, len(base._optimizer_step_pre_hooks))


def test_zero_gradients_are_no_skipped_step(silent: None) -> None:
    """With gradients of 0 the update is 0, and the weight decays: 0.95**3."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SkipsOutliers([p], lr=0.1, weight_decay=0.5))
    for _ in range(3):
        opt.step()

    assert pytest.approx(0.95**3) == p.item()


def test_a_16_bit_step_that_is_rounded_away_is_mentioned() -> None:
    """A bfloat16 weight whose step is lost in rounding looks the same: it does not decay, and the warning says so."""
    p = weight(1.0, grad=[1e-4], dtype=torch.bfloat16)
    opt = CautiousDecay(SkipsOutliers([p], lr=0.1, weight_decay=0.5))
    with pytest.warns(UserWarning, match="bfloat16"):
        opt.step()

    assert 1.0 == p.item()


def of_library(base: type, module: str, name: str, **members: Any) -> type:
    """A subclass that looks as if ``module`` had made it."""
    return type(name, (base,), {"__module__": module, **members})


@pytest.mark.parametrize(
    ("module", "name", "way_out"),
    [
        ("opacus.optimizers.optimizer", "DPOptimizer", "make_private"),
        ("lightning.pytorch.core.optimizer", "LightningOptimizer", "configure_optimizers"),
        ("pytorch_lightning.core.optimizer", "LightningOptimizer", "configure_optimizers"),
        ("lightning.fabric.wrappers", "_FabricOptimizer", "fabric.setup"),
        ("accelerate.optimizer", "AcceleratedOptimizer", "accelerator.prepare"),
        ("torchft.optim", "OptimizerWrapper", "Wrap the optimizer inside it"),
        ("hivemind.optim.optimizer", "Optimizer", "Wrap the optimizer inside it"),
    ],
)
def test_an_optimizer_that_is_known_to_skip_steps_is_refused(module: str, name: str, way_out: str) -> None:
    """In these libraries the class and its subclasses are refused, with the way out. The name alone is not."""
    base = type("Sub", (of_library(SGD, module, name),), {})([weight(1.0)], lr=0.1, weight_decay=0.5)
    with pytest.raises(ValueError, match=rf"cannot wrap Sub: it may skip a step.*{way_out}"):
        CautiousDecay(base)
    CautiousDecay(of_library(SGD, "mine", name)([weight(1.0)], lr=0.1, weight_decay=0.5))


@pytest.mark.parametrize(
    ("attributes", "text"),
    [({"backward_passes_per_step": 4}, "backward_passes_per_step=4 accumulates"), ({"_starting_models": {}}, "Adasum")],
    ids=["accumulates", "Adasum"],
)
def test_what_horovod_makes_is_refused_if_it_accumulates(attributes: dict[str, Any], text: str) -> None:
    """horovod makes a subclass with the same name. It is refused if it accumulates, or steps during backward."""
    base = of_library(SGD, "horovod.torch.optimizer", "SGD")([weight(1.0)], lr=0.1, weight_decay=0.5)
    base.backward_passes_per_step = 1
    CautiousDecay(base)
    vars(base).update(attributes)
    with pytest.raises(ValueError, match=rf"cannot wrap SGD: {text}.*hvd.DistributedOptimizer\(CautiousDecay.over"):
        CautiousDecay(base)


# --------------------------------------------------------------------------- a class is trusted by its code


class Beside:
    """A wrapped optimizer and the plain one without decay, on the same weights and gradients."""

    def __init__(self, build: Callable[..., Optimizer], eta: float) -> None:
        self.eta_lam = eta * LAM
        self.weights, self.plain_weights = self.make(), self.make()
        self.wrapped = CautiousDecay(build(self.weights), LAM, step_size=lambda group: group["lr"])
        self.plain = build(self.plain_weights)
        for group in self.plain.param_groups:
            group["weight_decay"] = 0.0

    @staticmethod
    def make() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (2, 2))]

    def step(self, number: int) -> float:
        """The largest difference to the rule after a step of both from the same weights."""
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(self.weights, self.plain_weights, strict=True):
            q.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone().double() for p in self.weights]
        self.wrapped.step()
        self.plain.step()
        return max(
            float((p.detach() - reference.ruled(x, q.detach().double(), self.eta_lam)).abs().max())
            for x, p, q in zip(before, self.weights, self.plain_weights, strict=True)
        )


def clips(step: Any) -> Any:
    """Clip the gradients first."""

    def patched(self: Optimizer, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        return step(self, closure)

    return patched


def centralises(step: Any) -> Any:
    """Take twice the mean off each gradient, which turns the signs of some."""

    def patched(self: Optimizer, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad - 2 * p.grad.mean()
        return step(self, closure)

    return patched


def halves(step: Any) -> Any:
    """Undo half of the step."""

    def patched(self: Optimizer, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        loss = step(self, closure)
        for p, x in zip(parameters, before, strict=True):
            p.data.lerp_(x, 0.5)
        return loss

    return patched


def with_marks(patch: Any) -> Any:
    """The same patch with functools.wraps, which copies the name of the step and torch's mark ``hooked``."""
    return lambda step: functools.wraps(step)(patch(step))


PATCHES = {
    "clips": clips,
    "centralises": centralises,
    "halves": halves,
    "clips with functools.wraps": with_marks(clips),
    "centralises with functools.wraps": with_marks(centralises),
    "clips with torch.no_grad": lambda step: torch.no_grad()(clips(step)),
}
# Each class with the path that it takes unpatched.
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one_pass": (AdamW, {"fused": True}),
    "direction": (AdamW, {"foreach": True}),
    "one_pass of SGD": (SGD, {"momentum": 0.9, "fused": True}),
    "direction of NAdam": (NAdam, {}),
    "pieces": (Rprop, {}),
    **({"pieces of Muon": (torch.optim.Muon, {})} if hasattr(torch.optim, "Muon") else {}),
}


@pytest.mark.parametrize(
    ("base", "patch"),
    [*((base, "clips") for base in BASES), *(("one_pass", patch) for patch in PATCHES if patch != "clips")],
)
@pytest.mark.parametrize("when", ["before it is built", "after", "after, and another is built"])
def test_a_patched_step_obeys_the_rule(base: str, patch: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a program replaces the step of a class, then the rule acts around the whole new step."""
    (cls, options), patch = BASES[base], PATCHES[patch]
    build = functools.partial(cls, lr=0.1, **options)
    if when == "before it is built":
        monkeypatch.setattr(cls, "step", patch(cls.step))
    beside = Beside(build, eta=0.1)
    if when != "before it is built":
        beside.step(-1)
        monkeypatch.setattr(cls, "step", patch(cls.step))
    if when == "after, and another is built":
        build(Beside.make())

    assert max(beside.step(number) for number in range(3)) < 1e-6
    assert "snapshot" == beside.wrapped.paths()[0].path


def test_a_step_that_is_patched_to_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradient 100 clipped to 0.01 three steps are almost the decay alone: 0.9**3 = 0.729."""
    monkeypatch.setattr(SGD, "step", clips(SGD.step))
    p = weight(1.0)
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=1.0, fused=True))
    for _ in range(3):
        p.grad = torch.tensor([100.0])
        opt.step()

    assert pytest.approx(0.729, abs=0.004) == p.item()


class KeepsItsParentsName(SGD):
    """A subclass with the name and module of its parent, which clips."""

    __module__, __qualname__ = SGD.__module__, SGD.__qualname__
    step = clips(SGD.step)


def test_a_subclass_that_keeps_its_parents_name_obeys_the_rule() -> None:
    """A class is known only if its module exports it: this one has the name of SGD, and clips."""
    beside = Beside(functools.partial(KeepsItsParentsName, lr=0.1, fused=True), eta=0.1)

    assert (SGD.__module__, SGD.__qualname__) == (KeepsItsParentsName.__module__, KeepsItsParentsName.__qualname__)
    assert max(beside.step(number) for number in range(3)) < 1e-6
    assert "snapshot" == beside.wrapped.paths()[0].path


def test_a_patched_step_of_a_parent_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without a step of its own has the patched one of its parent."""
    child = type("Child", (RMSprop,), {})

    assert "torch" == known.library(child)
    monkeypatch.setattr(RMSprop, "step", clips(RMSprop.step))

    assert known.library(child) is known.library(RMSprop) is known.name(RMSprop) is None
    assert Beside(functools.partial(child, lr=0.1), eta=0.1).step(0) < 1e-6


def test_a_patched_part_of_a_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and functions that the step calls by name must be the library's, too."""
    for cls, owner, name in ((Adam, Adam, "_init_group"), (NAdam, sys.modules[NAdam.__module__], "nadam")):
        with monkeypatch.context() as patch:
            known._found.pop(cls, None)
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, original=original, **options: original(*args, **options))

            assert known.name(cls) is None
        known._found.pop(cls, None)

        assert f"{cls.__module__}.{cls.__qualname__}" == known.name(cls)


def test_every_class_of_the_tables_is_known_as_installed() -> None:
    """Each class of the tables that is installed passes the check, before it is built and after."""
    checked = 0
    for row in {*directions.TABLE, *pieces.TABLE, *updates.TABLE}:
        module, _, name = row.rpartition(".")
        if importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is None:
            continue
        cls = getattr(importlib.import_module(module), name, None)
        if cls is None:
            continue  # of another version
        for _ in range(2):
            assert row == known.name(cls)
            cls([nn.Parameter(torch.ones(2, 2))], lr=0.1)
        checked += 1

    assert checked > 10


def test_a_known_class_can_be_freed() -> None:
    """What is known of a class does not keep it alive."""
    cls = type("Local", (SGD,), {})
    CautiousDecay(cls([weight(1.0, grad=[1.0])], lr=0.1, weight_decay=0.5)).step()
    ref = weakref.ref(cls)
    del cls
    gc.collect()

    assert ref() is None


OWN_NAMES = ["AdamP", "SGDP", "ROSE", "Rose", "TRAC", "FTRL", "Nero", "StableAdamW", "SPlus", "AdamS", "Magma", "LOMO"]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_users_own_class_may_have_the_name_of_a_known_one(name: str, silent: None) -> None:
    """Only the library's class is special, so a class of this name that steps as SGD does is wrapped."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(type(name, (SGD,), {"__module__": "mine"})([p], lr=0.1, weight_decay=0.5)).step()

    assert pytest.approx(0.95) == p.item()


# --------------------------------------------------------------------------- how a stranger multiplies its decay


class Descends(Optimizer):
    """Plain gradient descent with a decoupled decay; subclasses say by what they multiply it."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - self.factor(group, p) * group["weight_decay"])
                    p.add_(p.grad, alpha=-group["lr"])


class DecaysByRatio(Descends):
    """lr / initial lr, as composer's DecoupledAdamW."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] / group["initial_lr"]


class DecaysByRatioInside(Descends):
    """The same with the first learning rate in an attribute, as optimizers of lucidrains."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self._init_lr = lr

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] / self._init_lr


class DecaysFixed(Descends):
    """1, if an attribute says so."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, *, fixed: bool = False) -> None:
        super().__init__(params, lr, weight_decay)
        self.is_fixed = fixed

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return 1.0 if self.is_fixed else group["lr"]


class DecaysBySquare(Descends):
    """lr**2 / max_lr, with the largest lr so far."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        group["max_lr"] = max(group["lr"], group.get("max_lr", 0.0))
        return group["lr"] ** 2 / group["max_lr"]


class DecaysByDividing(Descends):
    """w / (1 + lr * weight_decay), as Adan."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"]).div_(1 + group["lr"] * group["weight_decay"])


class KeepsInState(Descends):
    """1, if its state says so, or an attribute with a name that begins like that of the state."""

    def __init__(
        self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, *, fixed: bool = False, state_fixed: bool = False
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.state["fixed"], self.state_is_fixed = fixed, state_fixed

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return 1.0 if self.state["fixed"] or self.state_is_fixed else group["lr"]


MEASURED: dict[str, tuple[Callable[..., Optimizer], list[float]]] = {
    "lr": (Descends, [0.1, 0.05, 0.025]),
    "lr / initial_lr": (DecaysByRatio, [1.0, 0.5, 0.25]),
    "lr / _init_lr": (DecaysByRatioInside, [1.0, 0.5, 0.25]),
    "1": (functools.partial(DecaysFixed, fixed=True), [1.0, 1.0, 1.0]),
    "1, by the state": (functools.partial(KeepsInState, fixed=True), [1.0, 1.0, 1.0]),
    "1, by an attribute state_": (functools.partial(KeepsInState, state_fixed=True), [1.0, 1.0, 1.0]),
    "lr, by an attribute": (DecaysFixed, [0.1, 0.05, 0.025]),
    "lr**2 / max_lr": (DecaysBySquare, [0.1, 0.025, 0.00625]),
    "lr, by dividing": (DecaysByDividing, [0.1, 0.05, 0.025]),
    "inside another optimizer": (
        lambda params, **options: Lookahead(DecaysByRatio(params, **options)),
        [1.0, 0.5, 0.25],
    ),
}


class Lookahead(Optimizer):
    """Has the optimizer inside step, under an unusual name."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.fast = optimizer.param_groups, optimizer

    def step(self, closure: Any = None) -> Any:
        return self.fast.step(closure)


@pytest.mark.parametrize(("build", "etas"), MEASURED.values(), ids=list(MEASURED))
def test_eta_is_the_factor_of_the_strangers_own_decay(build: Any, etas: list[float], silent: None) -> None:
    """While a schedule halves lr, wrapped and plain decay by the same with gradients of 0, and nothing is said."""
    lam = 2.0**-7
    p, q = weight(1.0, -2.0, grad=[0.0, 0.0]), weight(1.0, -2.0, grad=[0.0, 0.0])
    wrapped, plain = CautiousDecay(build([p], lr=0.1, weight_decay=lam)), build([q], lr=0.1, weight_decay=lam)
    expected = torch.tensor([1.0, -2.0])
    for number, eta in enumerate(etas):
        for optimizer in (wrapped, plain):
            optimizer.param_groups[0]["lr"] = 0.1 / 2**number
            optimizer.step()
        expected = expected * (1 - eta * lam)

        torch.testing.assert_close(expected, p.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(q, p, rtol=2e-6, atol=0)


class Adapts(Descends):
    """Written by hand as D-Adaptation: grows a factor ``d`` of lr."""

    def __init__(
        self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, d: float = 1e-6, **options: Any
    ) -> None:
        super().__init__(params, lr, weight_decay, d=d, k=0, **options)

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["d"] * group["lr"]

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = max(group["d"], 0.5)


class HasOptions(Optimizer):
    """Descends, and has no decay."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("options", [{"growth_rate": 2.0}, {}, {"d": 1.0}], ids=str)
def test_a_factor_d_of_lr_is_measured(options: dict[str, Any], silent: None) -> None:
    """A D-Adaptation of one's own decays as the plain one, from its small first d on."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    plain, wrapped = Adapts([q], weight_decay=0.5, **options), CautiousDecay(Adapts([p], weight_decay=0.5, **options))
    for _ in range(3):
        plain.step()
        wrapped.step()

    assert pytest.approx(q.item(), rel=1e-6) == p.item() < 0.96


@pytest.mark.parametrize("options", [{"d": 8, "k": 3}, {"d": 0.5, "step": 1}, {"d": 1e-3, "k": 0}], ids=str)
@pytest.mark.parametrize("cls", [HasOptions, Descends])
def test_an_option_named_d_may_be_something_else(options: dict[str, Any], cls: Any, silent: None) -> None:
    """Where d does not multiply the decay, eta is lr: 0.95."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(cls([p], **options), lam=0.5).step()

    assert pytest.approx(0.95) == p.item()


class DecaysMore(Descends):
    """1.5 * lr."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return 1.5 * group["lr"]


class DecaysLittle(Descends):
    """lr**2."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] ** 2


class WarmsUp(Descends):
    """Multiplies lr by a share of the steps taken, in its own step, as BertAdam does."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, warmup: int = -1) -> None:
        super().__init__(params, lr, weight_decay, warmup=warmup)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                lr = group["lr"] * (state["step"] / group["warmup"] if group["warmup"] > 0 else 1)
                p.sub_(p.grad + group["weight_decay"] * p, alpha=lr)


class SetsItsLr(Descends):
    """Sets the lr of its groups in its own step, as Noam."""

    def step(self, closure: Any = None) -> None:
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 * self.count**-0.5
        super().step()


class ShrinksItsLr(Descends):
    """Multiplies the lr of its groups after each step, as ``lrd`` of pyro."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.99


class ReadsMultipliers(Descends):
    """Multiplies by ``p.wd_mul``, and its steps by ``p.lr_mul``."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * getattr(p, "lr_mul", 1.0) * getattr(p, "wd_mul", 1.0)


class ReadsItems(Descends):
    """Multiplies by a tensor ``p.wd_mul``."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * (p.wd_mul.item() if hasattr(p, "wd_mul") else 1.0)


class SkipsVectors(Descends):
    """Decays no vectors."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] if p.ndim > 1 else 0.0


class Schedules(Descends):
    """Multiplies lr by a schedule of its own, over the steps that it counts in the ``place``."""

    def __init__(self, params: Any, rule: Callable[[int], float], place: str = "state", **options: Any) -> None:
        super().__init__(params, weight_decay=0.5, **options)
        self.rule, self.place, self.steps = rule, place, 0

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        kept: Any = {"state": self.state[p], "group": group, "attribute": vars(self)}[self.place]
        kept["steps"] = kept.get("steps", torch.zeros(()) if self.place == "state" else 0) + 1
        return group["lr"] * self.rule(int(kept["steps"]))


class ReadsAMark(Descends):
    """Does not decay what has a mark, of any kind."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return 0.0 if hasattr(p, "mark") else group["lr"]


class Kind(enum.Enum):
    """Of parameters."""

    BIAS = 1


class DecaysByWidth(Descends):
    """Multiplies lr by the root of the ratio of a matrix's sides where it is wide."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * (max(1, p.shape[1] / p.shape[0]) ** 0.5 if p.ndim == 2 else 1)


class CouplesVectors(Descends):
    """Adds the decay of vectors to their gradients, in Adam, and decays others by ``rate`` * lr."""

    def __init__(self, params: Any, weight_decay: float = 0.5, rate: float = 1.0) -> None:
        super().__init__(params, weight_decay=weight_decay, rate=rate)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                vector = p.ndim == 1
                if not vector:
                    p.mul_(1 - group["rate"] * group["lr"] * group["weight_decay"])
                g = p.grad + group["weight_decay"] * p if vector else p.grad
                p.sub_(in_adam(self.state[p], g), alpha=group["lr"])


class Signs(Descends):
    """Steps by the sign of the gradient and the coupled decay, which flips few signs."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad + group["weight_decay"] * p).sign(), alpha=group["lr"])


def with_attributes(**attributes: Any) -> list[nn.Parameter]:
    """Two parameters, one with attributes."""
    parameters = [weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])]
    vars(parameters[1]).update(attributes)
    return parameters


def a_vector_and_a_matrix() -> list[nn.Parameter]:
    return [weight(1.0), nn.Parameter(torch.ones(1, 1))]


REFUSED: dict[str, tuple[Callable[[], Optimizer], str]] = {
    "1.5 * lr": (lambda: DecaysMore([weight(1.0)], weight_decay=0.5), "by 0.075 at lr=0.05, 0.15 at lr=0.1"),
    "a small factor": (
        lambda: DecaysLittle([weight(1.0)], lr=1e-3, weight_decay=0.5),
        "at lr=0.0005, 9.5",
    ),
    "warm-up inside": (
        lambda: WarmsUp([weight(1.0)], weight_decay=0.5, warmup=10),
        "by 0.005 at lr=0.05, 0.02 at lr=0.1, 0.015 at lr=0.05",
    ),
    "sets its lr": (lambda: SetsItsLr([weight(1.0)], weight_decay=0.5), "its step changes lr"),
    "shrinks its lr": (lambda: ShrinksItsLr([weight(1.0)], weight_decay=0.5), "changes lr, from 0.05 to 0.0495"),
    "p.wd_mul": (lambda: ReadsMultipliers(with_attributes(wd_mul=0.0), weight_decay=0.5), "differ in wd_mul"),
    "p.lr_mul": (lambda: ReadsMultipliers(with_attributes(lr_mul=5.0), weight_decay=0.5), "differ in lr_mul"),
    "a tensor p.lr_mul": (
        lambda: ReadsMultipliers(with_attributes(lr_mul=torch.tensor(5.0)), weight_decay=0.5),
        "differ in lr_mul",
    ),
    "a numpy p.wd_mul": (
        lambda: ReadsMultipliers(with_attributes(wd_mul=pytest.importorskip("numpy").float32(0.5)), weight_decay=0.5),
        "differ in wd_mul",
    ),
    "an item of a parameter p.wd_mul": (
        lambda: ReadsItems(with_attributes(wd_mul=nn.Parameter(torch.tensor(0.5))), weight_decay=0.5),
        "differ in wd_mul",
    ),
    **{
        f"a mark, {mark!r}": (
            functools.partial(lambda mark: ReadsAMark(with_attributes(mark=mark), weight_decay=0.5), mark),
            r"by 0.05 at lr=0.05, 0 at lr=0.05.* \(its parameters differ in mark\)",
        )
        for mark in ("bias", None, Kind.BIAS, {"decay": False}, ("no", 1))
    },
    **{
        f"{name}, counted in {place}": (
            functools.partial(lambda rule, place: Schedules([weight(1.0)], rule, place), rule, place),
            f"by {first} in its first steps, but by {later} at the same lr after a thousand",
        )
        for place in ("state", "group", "attribute")
        for name, rule, first, later in (
            ("a cosine", lambda t: math.cos(t / 1000) ** 2, "0.05", "0.0137"),
            ("a late begin", lambda t: t > 100, "0", "0.05"),
        )
    },
    "by its width": (
        lambda: DecaysByWidth([nn.Parameter(torch.ones(1, 2))], weight_decay=0.5),
        "by 0.0577 at lr=0.05",
    ),
    "couples vectors": (
        lambda: CouplesVectors(a_vector_and_a_matrix(), rate=0.5),
        "it decays some of its parameters through their gradients, and others in another way or not at all: give",
    ),
    "couples vectors, others do not decay": (
        lambda: CouplesVectors(a_vector_and_a_matrix(), rate=0.0),
        "it decays some of its parameters through their gradients, and others in another way or not at all: give",
    ),
    "skips vectors": (
        lambda: SkipsVectors(a_vector_and_a_matrix(), weight_decay=0.5),
        "by 0 at lr=0.05, 0.05 at lr=0.05",
    ),
}


@pytest.mark.parametrize(("build", "text"), REFUSED.values(), ids=list(REFUSED))
def test_a_stranger_without_a_single_eta_is_refused(build: Any, text: str, silent: None) -> None:
    """The error says what was measured and names step_size=, which is accepted; so is a group that does not decay."""
    with pytest.raises(
        ValueError, match=rf"^param group 0 of \w+ has no single step size .*{text}.*, or pass step_size="
    ):
        CautiousDecay(build())
    CautiousDecay(build(), step_size=lambda group: group["lr"])
    base = build()
    base.param_groups[0]["weight_decay"] = 0.0
    base.add_param_group({"params": [nn.Parameter(torch.ones(1, 1))], "weight_decay": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to decay
        opt = CautiousDecay(base)
    opt.param_groups[0]["weight_decay"] = 0.5
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=text):
        opt.step()


class DecaysSome(Descends):
    """Decays the parameters that `decays` names; ``kept`` is how it knows them."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, kept: Any = ()) -> None:
        super().__init__(params, lr, weight_decay)
        self.kept = kept

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        raise NotImplementedError

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] if self.decays(group, p) else 0.0


class DecaysByName(DecaysSome):
    """By the names that torch keeps in the group, for named parameters."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        names = (name for name, each in zip(group["param_names"], group["params"], strict=True) if each is p)
        return "bias" not in next(names)


class DecaysByOwnName(DecaysSome):
    """By names in an attribute."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return "bias" not in next(name for name, each in zip(self.kept, group["params"], strict=True) if each is p)


class DecaysById(DecaysSome):
    """By a container of ids."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return id(p) not in self.kept


class DecaysByObject(DecaysSome):
    """By a container of parameters."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return not any(p is each for each in self.kept)


class DecaysMatrices(DecaysSome):
    """By shape."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return p.ndim >= 2


class DecaysByDefault(DecaysSome):
    """By a dict that has an answer for all."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return bool(self.kept[p])


class DecaysByInfo(DecaysSome):
    """By objects that hold parameters."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return not any(p is each.of for each in self.kept)


class DecaysByFunction(DecaysSome):
    """By a function that it is given, or all."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return not self.kept or self.kept(p)


class DecaysByConfig(DecaysSome):
    """By an attribute of an object that it is given, or all."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return not self.kept or p.ndim >= self.kept.least


def has_dimensions(p: Tensor, least: int) -> bool:
    return p.ndim >= least


def at_least(least: int) -> Callable[[Tensor], bool]:
    return lambda p: p.ndim >= least


class Floored:
    """The same as an object."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, p: Tensor) -> bool:
        return p.ndim >= self.least


TELLING: dict[str, tuple[type[DecaysSome], Callable[[nn.Parameter, nn.Parameter], Any]]] = {
    "names": (DecaysByName, lambda *_: ()),
    "names of one's own": (DecaysByOwnName, lambda *_: ["a.bias", "a.weight"]),
    "a set of ids": (DecaysById, lambda bias, _: {id(bias)}),
    "a dict by id": (DecaysById, lambda bias, _: {id(bias): {"why": "a bias"}}),
    "a set of parameters": (DecaysByObject, lambda bias, _: {bias}),
    "a list of parameters": (DecaysByObject, lambda bias, _: [bias]),
    "a dict of lists": (DecaysByObject, lambda bias, _: {bias: [1, 2]}),
    "a deque": (DecaysByObject, lambda bias, _: deque([bias])),
    "a dict with a default": (DecaysByDefault, lambda bias, _: defaultdict(lambda: True, {bias: False})),
    "objects": (DecaysByInfo, lambda bias, _: [SimpleNamespace(of=bias)]),
    "a function with a cell": (DecaysByFunction, lambda *_: at_least(2)),
    "a partial": (DecaysByFunction, lambda *_: functools.partial(has_dimensions, least=2)),
    "an object to call": (DecaysByFunction, lambda *_: Floored(2)),
    "an object": (DecaysByConfig, lambda *_: SimpleNamespace(least=2)),
    "shape": (DecaysMatrices, lambda *_: ()),
}
if "param_names" not in inspect.getsource(Optimizer.add_param_group):  # they came with torch 2.6
    del TELLING["names"]


@pytest.mark.parametrize(("cls", "kept"), TELLING.values(), ids=list(TELLING))
def test_a_stranger_that_decays_some_parameters_of_a_group_is_refused(cls: Any, kept: Any, silent: None) -> None:
    """Which weights should decay is then not what weight_decay says. The way out is a group with weight_decay=0."""
    bias, matrix = weight(1.0, grad=[0.0]), nn.Parameter(torch.ones(1, 1))
    matrix.grad = torch.zeros(1, 1)
    named = [("a.bias", bias), ("a.weight", matrix)] if cls is DecaysByName else [bias, matrix]
    build = functools.partial(cls, weight_decay=0.5, kept=kept(bias, matrix))
    with pytest.raises(ValueError, match=r"by 0 at lr=0.05, 0.05 at lr=0.05.*: give the group weight_decay=0"):
        CautiousDecay(build(named))
    if cls in {DecaysByOwnName, DecaysByDefault}:  # what they keep is for one group
        return
    CautiousDecay(build([{"params": named[:1], "weight_decay": 0.0}, {"params": named[1:]}])).step()

    assert [1.0, pytest.approx(0.95)] == [bias.item(), matrix.item()]


@pytest.mark.parametrize(("cls", "kept"), TELLING.values(), ids=list(TELLING))
def test_a_group_that_a_stranger_does_not_decay_at_all_is_said(cls: Any, kept: Any) -> None:
    """The wrapper decays it, as weight_decay says, and one warning tells that the optimizer itself does not."""
    bias = weight(1.0, grad=[0.0])
    given = [("a.bias", bias)] if cls is DecaysByName else [bias]
    base = cls(given, weight_decay=0.5, kept=["a.bias"] if cls is DecaysByOwnName else kept(bias, bias))
    with pytest.warns(
        UserWarning, match=rf"^{cls.__name__} itself does not decay the weights of param group 0"
    ) as said:
        opt = CautiousDecay(base)
        opt.step()

    assert 1 == len(said)
    assert pytest.approx(0.95) == bias.item()


@pytest.mark.parametrize("cls", [DecaysById, DecaysByObject])
def test_a_stranger_that_may_tell_parameters_apart_but_does_not_is_accepted(cls: Any, silent: None) -> None:
    """Parameters of another group in the same container, or names that decay, change nothing."""
    p, other = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    groups = [{"params": [p], "weight_decay": 0.5}, {"params": [other]}]
    CautiousDecay(cls(groups, kept={id(other)} if cls is DecaysById else {other})).step()

    assert [pytest.approx(0.95), 1.0] == [p.item(), other.item()]


def test_attributes_of_parameters_may_refer_to_one_another(silent: None) -> None:
    """A dict that holds itself is left out of a measurement; so is an object."""
    p = weight(1.0, grad=[0.0])
    kept: dict[str, Any] = {"object": object()}
    kept["kept"] = kept
    vars(p)["kept"] = kept
    CautiousDecay(Descends([p], weight_decay=0.5)).step()

    assert pytest.approx(0.95) == p.item()


def test_without_its_schedule_or_multipliers_a_stranger_is_accepted(silent: None) -> None:
    """The options and attributes in use count: without warm-up, multipliers or vectors eta is lr."""
    for base in (
        WarmsUp([weight(1.0)], weight_decay=0.5),
        ReadsMultipliers(with_attributes(color=1), weight_decay=0.5),
        SkipsVectors([nn.Parameter(torch.ones(1, 1))], weight_decay=0.5),
    ):
        CautiousDecay(base)


class DecaysAnyway(Descends):
    """Keeps the decay that it was built with in an attribute."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * self.decay).sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("options", [{}, {"lam": 0.5}, {"step_size": lambda group: group["lr"]}], ids=" ".join)
def test_a_decay_that_does_not_switch_off_is_refused(options: dict[str, Any], silent: None) -> None:
    """If weight_decay=0 in the group leaves the decay on, weights would decay twice. A base built with 0 is taken."""
    with pytest.raises(ValueError, match=r"stays on while .* weight_decay is 0.*Build it with weight_decay=0.*lam="):
        CautiousDecay(DecaysAnyway([weight(1.0)], weight_decay=0.25), **options)
    p = weight(1.0, grad=[0.0])
    CautiousDecay(DecaysAnyway([p]), lam=0.5).step()

    assert pytest.approx(0.95) == p.item()


class AdaptsWhereItDecays(Descends):
    """Multiplies its step by a trust ratio in groups that decay, as LARS; the decay is decoupled."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                ratio = 0.1 * p.norm() / p.grad.norm() if group["weight_decay"] != 0 else 1.0
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad * ratio, alpha=group["lr"])


class AdaptsAndCouples(Descends):
    """The same with the decay in the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                g, ratio = p.grad, 1.0
                if group["weight_decay"] > 0:
                    ratio = 0.1 * p.norm() / (g.norm() + group["weight_decay"] * p.norm())
                    g = g + group["weight_decay"] * p
                p.sub_(g * ratio, alpha=group["lr"])


class CentralisesWhereItDecays(Descends):
    """Takes the mean off the gradients in groups that decay."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["weight_decay"]:
                for p in group["params"]:
                    p.grad = p.grad - p.grad.mean()
        super().step()


SWITCHING = [
    AdaptsWhereItDecays,
    AdaptsAndCouples,
    CentralisesWhereItDecays,
    lambda *a, **o: Around(SWITCHING[0](*a, **o)),
]


@pytest.mark.parametrize("build", SWITCHING, ids=["decoupled", "coupled", "centralises", "inside another"])
@pytest.mark.parametrize("when", ["built with it", "lam=", "raised later", "raised later, with step_size"])
def test_a_step_that_is_another_one_without_a_decay_stays_as_it_is(build: Any, when: str) -> None:
    """The wrapped step is that of the plain one with a decay too small to see, and the cautious decay."""
    p, q = (weight(1.0, -2.0, 3.0) for _ in range(2))
    plain = build([q], weight_decay=1e-30)
    options = {"step_size": lambda group: group["lr"]} if "step_size" in when else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the decay is coupled, or 0
        opt = CautiousDecay(
            build([p], weight_decay=0.5 if when == "built with it" else 0.0), 0.5 if when == "lam=" else None, **options
        )
    opt.param_groups[0]["weight_decay"] = 0.5
    for number in range(3):
        before = p.detach().clone()
        q.data.copy_(p)
        p.grad = torch.tensor([0.5, 0.25, -1.0]) * (number + 1)
        q.grad = p.grad.clone()
        opt.step()
        plain.step()

        assert 0.5 == opt.param_groups[0]["weight_decay"]
        torch.testing.assert_close(reference.ruled(before, q.detach(), 0.05), p.detach())


class DividesByItsDecay(Descends):
    """Divides the gradient by weight_decay, unless it is 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / (group["weight_decay"] or 1.0), alpha=group["lr"])


def test_a_step_that_divides_by_the_decay_is_refused() -> None:
    """Without the decay its step would be another one, and with a tiny one it would be infinite."""
    with pytest.raises(ValueError, match=r"^param group 0 of DividesByItsDecay cannot be wrapped: .*another one at"):
        CautiousDecay(DividesByItsDecay([weight(1.0)], weight_decay=0.5))


class Moves(Optimizer):
    """Has no weight_decay; subclasses say how a step moves a parameter."""

    def move(self, group: dict[str, Any], p: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.move(group, p)


def in_adam(state: dict[str, Any], g: Tensor) -> Tensor:
    """Adam's update for the gradient ``g``, without bias correction."""
    state["m"] = state.get("m", 0) * 0.9 + g * 0.1
    state["v"] = state.get("v", 0) * 0.99 + g * g * 0.01
    return state["m"] / (state["v"].sqrt() + 1e-8)


class DecaysByWd(Moves):
    """Has another name for its decay."""

    def __init__(self, params: Any, lr: float = 0.1, wd: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "wd": wd})

    def move(self, group: dict[str, Any], p: Tensor) -> None:
        p.mul_(1 - group["lr"] * group["wd"]).sub_(p.grad, alpha=group["lr"])


class AddsL2(Moves):
    """Has another name for a coupled decay, in an attribute."""

    def __init__(self, params: Any, lr: float = 0.1, l2: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.l2 = l2

    def move(self, group: dict[str, Any], p: Tensor) -> None:
        p.sub_(p.grad + self.l2 * p, alpha=group["lr"])


class AddsL2ToAdam(Moves):
    """Adam with such a decay in an option."""

    def __init__(self, params: Any, lr: float = 0.1, l2: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "l2": l2})

    def move(self, group: dict[str, Any], p: Tensor) -> None:
        p.sub_(in_adam(self.state[p], p.grad + group["l2"] * p), alpha=group["lr"])


class Diffuses(Moves):
    """Adds noise, as Langevin dynamics."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def move(self, group: dict[str, Any], p: Tensor) -> None:
        p.sub_(p.grad + torch.randn(p.shape), alpha=group["lr"])


class DecaysTwice(Descends):
    """Has a second decay besides weight_decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])


BESIDE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "wd": DecaysByWd,
    "a small wd": functools.partial(DecaysByWd, lr=1e-3, wd=1e-4),
    "l2": AddsL2,
    "l2 in Adam": AddsL2ToAdam,
    "twice": DecaysTwice,
    "around SGD": lambda params: DecaysAround(SGD(params, lr=0.1)),
}


@pytest.mark.parametrize("build", BESIDE.values(), ids=list(BESIDE))
@pytest.mark.parametrize("step_size", [None, lambda group: group["lr"]], ids=["measured", "step_size"])
def test_a_decay_under_another_name_warns_once(build: Any, step_size: Any) -> None:
    """It stays on beside that of the wrapper, and the warning says so."""
    base = build([weight(1.0)])
    with pytest.warns(UserWarning, match="its own decay is on beside that of the wrapper.*pass 0 for it") as caught:
        opt = CautiousDecay(base, lam=0.5, step_size=step_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.lam = 0.25

    assert 1 == len(caught)


def test_a_decay_under_another_name_that_is_switched_on_later_warns(silent: None) -> None:
    """It is 0 when the wrapper is built, and says nothing then."""
    opt = CautiousDecay(DecaysByWd([weight(1.0, grad=[0.0])], wd=0.0), lam=0.5)
    opt.step()
    opt.param_groups[0]["wd"] = 0.1
    with pytest.warns(UserWarning, match="its own decay is on beside"):
        opt.step()


def test_without_it_nothing_warns(silent: None) -> None:
    """With 0 for the decay, and where the wrapper does not decay, there is nothing to say."""
    CautiousDecay(DecaysByWd([weight(1.0)], wd=0.0), lam=0.5)
    CautiousDecay(AddsL2([weight(1.0)], l2=0.0), lam=0.5)
    CautiousDecay(AddsL2ToAdam([weight(1.0)], l2=0.0), lam=0.5)
    CautiousDecay(Diffuses([nn.Parameter(torch.ones(2, 2))]), lam=0.5)
    CautiousUpdate(DecaysByWd([weight(1.0)]))


class AddsToTheGradient(Descends):
    """Adam with a coupled decay, written by hand."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(in_adam(self.state[p], p.grad + group["weight_decay"] * p), alpha=group["lr"])


@pytest.mark.parametrize("cls", [AddsToTheGradient, CouplesVectors, Signs])
def test_a_stranger_with_coupled_decay_is_accepted(cls: Any, silent: None) -> None:
    """A coupled decay has no factor: eta is lr. Other parameters may have no dimensions, or a decay by lr."""
    parameters = [weight(1.0, grad=[0.0]), *(nn.Parameter(torch.ones([1] * ndim)) for ndim in (0, 2))]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    CautiousDecay(cls(parameters, weight_decay=0.0), lam=0.5).step()

    assert [pytest.approx(0.95)] * 3 == [p.item() for p in parameters]


@pytest.mark.parametrize(
    "rule", [lambda t: 1.0, lambda t: (1.0, 1.0, 1.0, 1.0)[t]], ids=["counts", "has a short table"]
)
def test_a_stranger_that_counts_its_steps_is_accepted(rule: Any, silent: None) -> None:
    """Where the decay does not change with the steps, or where later steps cannot be tried."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(Schedules([p], rule)).step()

    assert pytest.approx(0.95) == p.item()


def test_a_function_of_a_stranger_may_have_an_empty_cell(silent: None) -> None:
    """As one that refers to a name that has no value yet."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(DecaysAll([p], weight_decay=0.5, kept=lambda: later)).step()
    later = None

    assert pytest.approx(0.95) == p.item()


class MakesBuffers(Descends):
    """Keeps what its first step makes in a dict by id, and in a list."""

    buffers: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self.buffers is None:
            self.buffers, self.flat = {id(p): torch.zeros_like(p) for p in parameters}, torch.zeros(len(parameters))
        for p in parameters:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            self.buffers[id(p)].add_(p.grad)
        super().step()


def test_a_stranger_may_be_wrapped_after_steps_that_made_its_buffers(silent: None) -> None:
    """The copies make buffers of their own."""
    p = weight(1.0, grad=[0.0])
    base = MakesBuffers([p], weight_decay=0.0)
    base.step()
    CautiousDecay(base, lam=0.5).step()

    assert pytest.approx(0.95) == p.item()


class NeedsAModel(Descends):
    """Is built from a model."""

    def __init__(self, model: nn.Module, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(model.parameters(), lr, weight_decay)


class Communicates(Descends):
    """Averages the gradients over all ranks."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                torch.distributed.all_reduce(p.grad)
        super().step()


class HasASchedule(Descends):
    """Its group holds an object with a tensor of many values."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, weight_decay=0.5, schedule=SimpleNamespace(of_steps=torch.ones(100)))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank."""
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def by_ids(*parameters: Tensor) -> Callable[[Tensor], bool]:
    ids = {id(p) for p in parameters}
    return lambda p: id(p) in ids


class DecaysAll(DecaysSome):
    """In spite of what it keeps."""

    def decays(self, group: dict[str, Any], p: Tensor) -> bool:
        return True


def of_one(kept: Callable[[nn.Parameter], Any]) -> Optimizer:
    return DecaysAll([p := weight(1.0)], weight_decay=0.5, kept=kept(p))


UNMEASURED: dict[str, tuple[Callable[[], Optimizer], str]] = {
    "needs a model": (lambda: NeedsAModel(nn.Linear(1, 1), weight_decay=0.5), "'list' object has no"),
    "communicates": (lambda: Communicates([weight(1.0)], weight_decay=0.5), "its step communicates with other ranks"),
    "holds a large object": (lambda: HasASchedule([weight(1.0)]), "its group holds a SimpleNamespace as schedule"),
    "a function of ids": (lambda: of_one(by_ids), "its kept, a function, cannot be copied"),
    "a module": (lambda: of_one(lambda _: nn.Identity()), "its kept, a Identity, cannot be copied"),
    "many numbers": (lambda: of_one(lambda _: torch.ones(3)), "its kept, a Tensor, cannot be copied"),
}


@pytest.mark.parametrize(("build", "why"), UNMEASURED.values(), ids=list(UNMEASURED))
def test_a_stranger_that_cannot_be_measured_warns_once(build: Any, why: str, one_rank: None) -> None:
    """eta is taken to be lr then; one warning says so, with the reason and the way out, and step_size= silences it."""
    with pytest.warns(UserWarning, match=rf"could not be measured \(.*{why}.*lr \* weight_decay.*step_size=") as caught:
        opt = CautiousDecay(build())
    for p in opt.param_groups[0]["params"]:
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        CautiousDecay(build(), step_size=lambda group: group["lr"])

    assert 1 == len(caught)
    assert pytest.approx(0.95) == opt.param_groups[0]["params"][0].flatten()[0].item()


class TakesItsParametersByName(Optimizer):
    """Calls its decay wd, and takes lr first, as Moonlight's Muon."""

    def __init__(self, lr: float = 0.1, wd: float = 0.5, parameters: Any = None) -> None:
        super().__init__(parameters, {"lr": lr, "wd": wd})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["wd"]).add_(p.grad, alpha=-group["lr"])


def test_a_decay_that_cannot_be_measured_may_have_another_name() -> None:
    """The warning says that it stays on beside the wrapper's: 1 * 0.95 - 0.05."""
    p = weight(1.0, grad=[0.0])
    with pytest.warns(UserWarning, match=r"could not be measured.* under another name, that stays on: pass 0 for it\."):
        CautiousDecay(TakesItsParametersByName(parameters=[p]), lam=0.5).step()

    assert pytest.approx(0.90) == p.item()


class Noisy(Descends):
    """Draws from all generators, prints, and counts its steps."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.counts = {"steps": 0}

    def step(self, closure: Any = None) -> None:
        print("a step", random.random(), torch.rand(1))
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.random()
        self.counts["steps"] += 1
        super().step()


def test_a_measurement_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Measuring changes no generator, weight, gradient, state, group, attribute or class, and fires no hook."""
    pytest.importorskip("numpy").random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    numpy = sys.modules["numpy"].random
    p = weight(1.0, 2.0, grad=[0.5, 0.25])
    base = Noisy([p], weight_decay=0.5)
    step, fired = vars(Noisy)["step"], []
    handle = register_optimizer_step_pre_hook(lambda *_: fired.append("global"))
    base.register_step_pre_hook(lambda *_: fired.append("own"))
    generators = torch.get_rng_state(), random.getstate(), numpy.get_state()[1].copy()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
    CautiousDecay(base)
    handle.remove()

    assert probe.measure(base, base.param_groups[0], lambda _, group: group["lr"]) == probe.Found()
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    assert (generators[2] == numpy.get_state()[1]).all()
    assert ([1.0, 2.0], [0.5, 0.25], {}) == (p.tolist(), p.grad.tolist(), dict(base.state))
    assert groups == [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
    assert ({"steps": 0}, []) == (base.counts, fired)
    assert step is vars(Noisy)["step"]
    assert "" == capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_default_dtype_does_not_disturb_a_measurement(dtype: torch.dtype, silent: None) -> None:
    """The copies are float32 whatever torch's default is, and what is refused stays refused."""
    torch.set_default_dtype(dtype)
    try:
        CautiousDecay(DecaysByRatio([weight(1.0)], weight_decay=0.5))
        with pytest.raises(ValueError, match=r"by 0\.075 at lr"):
            CautiousDecay(DecaysMore([weight(1.0)], weight_decay=0.5))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_measurement_does_not_hook_a_patched_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch adds its hooks to a patched step when the next optimizer is built. A measurement takes them off again."""
    base = SGD([weight(1.0)], lr=0.1, weight_decay=0.5)
    patched = clips(SGD.step)
    monkeypatch.setattr(SGD, "step", patched)
    CautiousDecay(base)
    CautiousDecay(Around(base))

    assert patched is vars(SGD)["step"]


def test_an_optimizer_of_a_tested_library_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests measure these already, so no copy of them is made."""
    monkeypatch.setattr(probe, "measure", lambda *_: pytest.fail("measured"))
    CautiousDecay(AdamW([weight(1.0)], weight_decay=0.5))
    CautiousDecay(CautiousUpdate(type("Mine", (AdamW,), {})([weight(1.0)], weight_decay=0.5)))
    with pytest.raises(pytest.fail.Exception):
        CautiousDecay(Descends([weight(1.0)], weight_decay=0.5))


def test_a_group_is_measured_once_and_again_with_other_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement for groups that differ in lr or lam only; a switch (a bool) that changes makes another."""
    made = []
    measure = probe.measure
    monkeypatch.setattr(probe, "measure", lambda *args: made.append(args[1]) or measure(*args))
    groups = [{"params": [weight(1.0, grad=[1.0])], "lr": lr, "weight_decay": 1 - lr} for lr in (0.2, 0.3, 0.4)]
    base = Descends([*groups, {"params": [nn.Parameter(torch.ones(1, 1))]}], weight_decay=0.5)
    opt = CautiousDecay(base)
    for lr in (0.1, 0.2, 0.3):
        opt.param_groups[0]["lr"] = lr
        opt.step()

    assert 2 == len(made)
    opt.param_groups[1]["fixed_decay"] = False
    opt.step()

    assert 3 == len(made)


class ReadsOption(Descends):
    """Multiplies by an option of the group."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * group["mult"]


class ReadsName(Descends):
    """Decays a group with this name less."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * (0.1 if group["name"] == "bias" else 1.0)


class ReadsInitialLr(Descends):
    """lr / initial_lr, once there is one."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] / group["initial_lr"] if "initial_lr" in group else group["lr"]


class ReadsLrScale(Descends):
    """lr * lr_scale, as timm's layer decay has it."""

    def factor(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] * group["lr_scale"]


DIFFERING: dict[str, tuple[Any, str, tuple[Any, Any]]] = {
    "mult": (ReadsOption, "mult", (1.0, 0.1)),
    "lr_scale": (ReadsLrScale, "lr_scale", (1.0, 0.1)),
    "max_lr": (DecaysBySquare, "max_lr", (0.1, 1.0)),
    "name": (ReadsName, "name", ("kernel", "bias")),
}


@pytest.mark.parametrize(("cls", "key", "values"), DIFFERING.values(), ids=list(DIFFERING))
@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_each_option_of_a_group_counts(cls: Any, key: str, values: tuple[Any, Any], order: int) -> None:
    """A group with another value is measured for itself: each decays as its own would, or is refused, in any order."""
    options = [{key: value} for value in values][::order]
    p, q = ([weight(1.0, grad=[0.0]) for _ in options] for _ in range(2))
    build = functools.partial(cls, lr=0.1, weight_decay=0.5)
    plain = build([{"params": [w], **each} for w, each in zip(q, options, strict=True)])
    plain.step()
    try:
        CautiousDecay(build([{"params": [w], **each} for w, each in zip(p, options, strict=True)])).step()
    except ValueError as error:
        assert "has no single step size" in str(error)
    else:
        assert pytest.approx([w.item() for w in q]) == [w.item() for w in p]


def test_an_option_that_changes_is_measured_anew() -> None:
    """A factor that an option changes after wrapping is refused; a key that a scheduler adds changes eta."""
    opt = CautiousDecay(ReadsOption([weight(1.0, grad=[0.0])], weight_decay=0.5, mult=1.0))
    opt.step()
    opt.param_groups[0]["mult"] = 0.1
    with pytest.raises(ValueError, match="has no single step size"):
        opt.step()
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(ReadsInitialLr([p], weight_decay=0.5))
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.1)
    opt.step()

    assert pytest.approx(1 - 0.1 * 0.5) == p.item()


def test_what_changes_at_each_step_is_not_measured_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the step writes is not watched, and one that a schedule writes is taken for that at its fourth."""

    class Counts(Descends):
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1

    made = []
    measure = probe.measure
    monkeypatch.setattr(probe, "measure", lambda *args: made.append(args[1]) or measure(*args))
    opt = CautiousDecay(Counts([weight(1.0, grad=[1.0])], weight_decay=0.5))
    for _ in range(10):
        opt.step()

    assert 1 == len(made)
    for number in range(10):
        opt.param_groups[0]["temperature"] = number / 10
        opt.step()

    assert 4 == len(made)


def test_a_second_measurement_that_fails_leaves_the_first(silent: None) -> None:
    """A stranger that only its first state lets step cannot be copied later: what was found counts."""

    class StartsAtZero(DecaysFixed):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                if group["begin"]:
                    self.state["begun"] = True
                assert self.state["begun"]
            super().step()

    p = weight(1.0, grad=[0.0])
    base = StartsAtZero([p], weight_decay=0.5, fixed=True)
    base.param_groups[0]["begin"] = 1
    opt = CautiousDecay(base)
    for begin in (1, 0):
        opt.param_groups[0]["begin"] = begin
        opt.step()

    assert pytest.approx(0.25) == p.item()


def test_a_wrapped_stranger_can_be_freed() -> None:
    """What was measured does not keep the optimizer alive."""
    base = DecaysByRatio([weight(1.0, grad=[1.0])], weight_decay=0.5)
    CautiousDecay(base).step()
    ref = weakref.ref(base)
    del base
    gc.collect()

    assert ref() is None


class Override8bit(Descends):
    """What bitsandbytes' optimizers share: a manager that overrides options of single parameters."""

    __module__ = "bitsandbytes.optim.optimizer"

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.mng = SimpleNamespace(pid2config={}, index2config={}, module_weight_config_triple=[])


Override8bit.__name__ = "Optimizer8bit"


def test_an_override_of_bitsandbytes_is_refused() -> None:
    """A decay that GlobalOptimManager gives to single parameters is refused, also after the wrapper is built."""
    for where in ("pid2config", "index2config", "module_weight_config_triple"):
        p = weight(1.0, grad=[1.0])
        base = Override8bit([p], weight_decay=0.5)
        opt = CautiousDecay(base)
        config = {"weight_decay": 0.0}
        getattr(base.mng, where).extend([(None, "weight", config)]) if where.endswith("triple") else getattr(
            base.mng, where
        ).update({id(p): config})
        with pytest.raises(ValueError, match="GlobalOptimManager overrides"):
            opt.step()
        with pytest.raises(ValueError, match=r"cannot wrap Optimizer8bit: .*a group of their own"):
            CautiousDecay(base, step_size=lambda group: group["lr"])


# --------------------------------------------------------------------------- optimizers that hold others


class Both(Optimizer):
    """Steps several optimizers, and has groups of its own over all parameters."""

    def __init__(self, *optimizers: Optimizer, hold: Callable[[Any], Any] = list) -> None:
        parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.5})
        self.inside = hold(optimizers)
        self.each = lambda: optimizers

    def step(self, closure: Any = None) -> None:
        for optimizer in self.each():
            optimizer.step()


class Sharing(Both):
    """The same, with the groups of the optimizers inside."""

    def __init__(self, *optimizers: Optimizer, hold: Callable[[Any], Any] = list) -> None:
        super().__init__(*optimizers, hold=hold)
        self.param_groups = [group for each in optimizers for group in each.param_groups]


class Empty(Both):
    """The same, with no parameters of its own."""

    def __init__(self, *optimizers: Optimizer, hold: Callable[[Any], Any] = list) -> None:
        super().__init__(*optimizers, hold=hold)
        self.param_groups[0]["params"] = []


def two() -> list[Optimizer]:
    options = {"lr": 0.1, "weight_decay": 0.5}
    return [AdamW([weight(1.0, grad=[0.0])], **options), SGD([weight(1.0, grad=[0.0])], **options)]


@pytest.mark.parametrize("cls", [Both, Empty])
@pytest.mark.parametrize(
    "hold",
    [list, tuple, lambda each: {"a": each[0], "b": each[1]}, lambda each: each[0]],
    ids=["list", "tuple", "dict", "one"],
)
def test_optimizers_inside_with_groups_of_their_own_are_refused(cls: Any, hold: Any) -> None:
    """Their decay would stay on: three steps with gradients of 0 would leave 0.95**6. The error names them."""
    with pytest.raises(
        ValueError, match=rf"cannot wrap {cls.__name__}: it holds optimizers .* \(AdamW.*Wrap each of these"
    ):
        CautiousDecay(cls(*two(), hold=hold), lam=0.5)


def test_each_optimizer_inside_can_be_wrapped(silent: None) -> None:
    """This is the way out: three steps with gradients of 0 leave 0.95**3."""
    inside = two()
    both = Both(*map(CautiousDecay, inside))
    for _ in range(3):
        both.step()

    for optimizer in inside:
        assert pytest.approx(0.95**3) == optimizer.param_groups[0]["params"][0].item()


def test_optimizers_inside_that_share_the_groups_are_accepted(silent: None) -> None:
    """With the groups of those inside, one wrapper switches each decay off: 0.95**3, as the plain ones leave."""
    wrapped, plain = two(), two()
    opt, beside = CautiousDecay(Sharing(*wrapped)), Sharing(*plain)
    for _ in range(3):
        opt.step()
        beside.step()

    for optimizer in (*wrapped, *plain):
        assert pytest.approx(0.95**3) == optimizer.param_groups[0]["params"][0].item()


def test_an_optimizer_of_other_parameters_may_be_an_attribute(silent: None) -> None:
    """An attribute with an optimizer of other parameters is nobody's business."""
    base = SGD([weight(1.0)], lr=0.1, weight_decay=0.5)
    base.teacher = SGD([weight(1.0)], lr=0.1, weight_decay=0.5)
    CautiousDecay(base)


def test_what_is_refused_alone_is_refused_inside() -> None:
    """A wrapper that decays, or a class that is refused, is found in a container, too."""
    for inner in (CautiousDecay(two()[1]), of_library(SGD, "schedulefree", "SGDScheduleFree")([weight(1.0)], lr=0.1)):
        with pytest.raises(ValueError, match=r"decays already|SGDScheduleFree"):
            CautiousDecay(Sharing(two()[0], inner))


# --------------------------------------------------------------------------- constraints


class Normalizes(Descends):
    """Keeps each tensor at the norm 1."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.div_(p.norm())


class KeepsItsOwnCopy(Descends):
    """Computes the weights from a sum of all gradients, as dual averaging does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("start", p.clone())
                state["sum"] = state.get("sum", 0) + p.grad
                p.copy_(state["start"] - group["lr"] * state["sum"])


class ToTheGrid(Descends):
    """Rounds the weights to -1 and 1."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.sign_()


@pytest.mark.parametrize("cls", [Normalizes, KeepsItsOwnCopy, ToTheGrid])
@pytest.mark.parametrize("wrap", [functools.partial(CautiousDecay, lam=0.5), CautiousUpdate])
def test_a_step_that_undoes_a_decay_is_refused(cls: Any, wrap: Any) -> None:
    """If the step takes the weights from elsewhere, or forces them onto a constraint, a decay is lost or breaks it."""
    with pytest.raises(
        ValueError, match=r"^param group 0 of \w+ cannot be wrapped: .*a copy of its own, or .*a constraint"
    ):
        wrap(cls([nn.Parameter(torch.ones(3, 2))]))


class KeepsMasters(Descends):
    """Steps 16-bit weights in float32 copies in its state, and float32 weights as they are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                w = p if p.dtype == torch.float32 else self.state[p].setdefault("master", p.float())
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.float(), alpha=group["lr"])
                p.copy_(w)


class BuildsMasters(Descends):
    """The same with copies that it makes at once, and gathers in a list."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.weights = [p for group in self.param_groups for p in group["params"]]
        self.masters = [p.detach().float() for p in self.weights]  # float32 ones stay the same memory

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for p, w in zip(self.weights, self.masters, strict=True):
            w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.float(), alpha=group["lr"])
            p.copy_(w)


@pytest.mark.parametrize("cls", [KeepsMasters, BuildsMasters])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("around", [lambda base: base, Lookahead], ids=["alone", "inside another"])
def test_float32_copies_of_16_bit_weights_are_refused(around: Any, dtype: torch.dtype, cls: Any, silent: None) -> None:
    """The decay would be lost at the next step. A float32 weight in another group does not hide it."""
    CautiousDecay(around(cls([weight(1.0)])), lam=0.5)
    with pytest.raises(ValueError, match=r"param group 0 of .* cannot be wrapped: .*a copy of its own"):
        CautiousDecay(around(cls([weight(1.0, dtype=dtype)])), lam=0.5)
    base = cls([{"params": [weight(1.0)]}, {"params": [weight(1.0), weight(1.0, dtype=dtype)]}])
    with pytest.raises(ValueError, match=r"param group 1 of .* cannot be wrapped: .*a copy of its own"):
        CautiousDecay(around(base), lam=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [Descends, DecaysByDividing])
def test_16_bit_weights_without_copies_are_accepted(cls: Any, dtype: torch.dtype, silent: None) -> None:
    """Three steps with gradients of 0 leave 0.95**3, but for roundings."""
    p = weight(1.0, grad=[0.0], dtype=dtype)
    opt = CautiousDecay(cls([p], lr=0.1), lam=0.5)
    for _ in range(3):
        opt.step()

    assert pytest.approx(0.95**3, abs=0.01) == p.item()


def test_weights_that_become_16_bit_are_measured_anew() -> None:
    """``module.bfloat16()`` after wrapping keeps the parameters, with other data."""
    p = weight(1.0)
    opt = CautiousDecay(KeepsMasters([p]), lam=0.5)
    p.data = p.data.bfloat16()
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="a copy of its own"):
        opt.step()


class Sphere:
    """Named as geoopt's."""


class Euclidean:
    """Named as geoopt's."""


class OnManifolds(Descends):
    """Keeps weights with a manifold at the norm 1, and others free, as geoopt's optimizers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(getattr(p, "manifold", None), Sphere):
                    p.div_(p.norm())


def test_parameters_on_a_manifold_are_refused_where_they_decay() -> None:
    """A decay after the step would take them off the manifold. In a group without decay they are left alone."""
    bound, free = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    bound.manifold, free.manifold = Sphere(), Euclidean()
    with pytest.raises(
        ValueError, match=r"cannot be wrapped: .*manifold Sphere.*a group of their own with weight_decay=0"
    ):
        CautiousDecay(OnManifolds([bound, free], weight_decay=0.5))
    opt = CautiousDecay(OnManifolds([{"params": [bound], "weight_decay": 0.0}, {"params": [free]}], weight_decay=0.5))
    bound.grad, free.grad = torch.ones(4), torch.zeros(4)
    opt.step()

    assert pytest.approx(1.0) == bound.norm().item()
    assert pytest.approx(0.95) == free[0].item()
    opt.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match="manifold Sphere"):
        opt.step()


# --------------------------------------------------------------------------- optimizers around others


class Around(Optimizer):
    """Has the optimizer inside step, on shared groups; subclasses do more."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.param_groups, self.state, self.optimizer = optimizer.param_groups, optimizer.state, optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class WarmsUpAround(Around):
    """Multiplies lr by a share of the steps taken, during the step only."""

    def __init__(self, inner: Optimizer, steps: int = 10) -> None:
        super().__init__(inner)
        self.steps, self.count = steps, 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        lrs = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= min(1, self.count / self.steps)
        loss = super().step(closure)
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr
        return loss


class NoamAround(Around):
    """Sets the lr of the groups, and leaves it there."""

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 * self.count**-0.5
        return super().step(closure)


class RestoresAround(Around):
    """Keeps the weights as the optimizer inside left them, and puts them back before its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, kept in zip(parameters, getattr(self, "kept", parameters), strict=True):
            p.copy_(kept)
        super().step()
        self.kept = [p.clone() for p in parameters]


class DecaysAround(Around):
    """Decays before the step, whatever weight_decay is."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])
        super().step()


class NormalizesAround(Around):
    """Keeps each tensor at the norm 1."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.div_(p.norm())


AROUND: dict[str, tuple[Callable[[Optimizer], Optimizer], str]] = {
    "warms up": (WarmsUpAround, "no single step size .*by 0.005 at lr=0.05, 0.02 at lr=0.1"),
    "warms up, under Lookahead": (lambda inner: Lookahead(WarmsUpAround(inner)), "no single step size .*by 0.005"),
    "sets its lr": (NoamAround, "its step changes lr"),
    "restores": (RestoresAround, "cannot be wrapped: .*a copy of its own"),
    "restores, over CautiousUpdate": (lambda inner: RestoresAround(CautiousUpdate(inner)), "a copy of its own"),
    "normalizes": (NormalizesAround, "cannot be wrapped: .*a constraint"),
}


@pytest.mark.parametrize(("around", "text"), AROUND.values(), ids=list(AROUND))
@pytest.mark.parametrize("inner", [AdamW, SGD, Descends])
def test_an_optimizer_around_a_known_one_is_measured(inner: Any, around: Any, text: str) -> None:
    """What an optimizer of one's own does around a step of torch's counts as what it does in a step of its own."""
    with pytest.raises(ValueError, match=text):
        CautiousDecay(around(inner([weight(1.0)], lr=0.1, weight_decay=0.5)))


class Interpolates(Around):
    """Takes the weights a part of the way from a slow copy to where the optimizer inside leads, each ``k`` steps."""

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        super().__init__(optimizer)
        self.k, self.alpha, self.count = k, alpha, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in zip((p for group in self.param_groups for p in group["params"]), self.slow, strict=True):
                p.copy_(slow.lerp_(p, self.alpha))
        return loss


class MovesEachSecond(Around):
    """Shows the weights of every other step only, and goes on from its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        shown = [p.detach().clone() for p in parameters]
        if self.count:
            for p, kept in zip(parameters, self.kept, strict=True):
                p.copy_(kept)
        super().step()
        self.kept = [p.detach().clone() for p in parameters]
        self.count += 1
        if self.count % 2:
            for p, old in zip(parameters, shown, strict=True):
                p.copy_(old)


PULLING: dict[str, Callable[[Optimizer], Optimizer]] = {
    **{
        f"each {k}, by {alpha}": functools.partial(Interpolates, k=k, alpha=alpha)
        for k in (1, 2, 3, 5)
        for alpha in (0.5, 0.8, 0.9)
    },
    "moves each second": MovesEachSecond,
    "restores": RestoresAround,
}


@pytest.mark.parametrize("around", PULLING.values(), ids=list(PULLING))
@pytest.mark.parametrize("inner", [AdamW, Descends, DecaysByRatio])
def test_an_optimizer_that_pulls_back_decays_right_or_says_what_to_wrap(inner: Any, around: Any, silent: None) -> None:
    """Where it is taken, the wrapped step is the plain one and the decay. Else the way out decays as the plain one."""
    eta_lam = 0.5 * (1.0 if inner is DecaysByRatio else 0.1)
    p, q = weight(1.0, -2.0, grad=[0.0, 0.0]), weight(1.0, -2.0, grad=[0.0, 0.0])
    plain = around(inner([q], lr=0.1, weight_decay=0.5))
    try:
        opt: Optimizer = CautiousDecay(around(inner([p], lr=0.1, weight_decay=0.5)))
    except ValueError as error:
        assert "rap the optimizer inside it" in str(error)
        opt = around(CautiousDecay(inner([p], lr=0.1, weight_decay=0.5)))
        for _ in range(6):
            opt.step()
            plain.step()
        torch.testing.assert_close(q, p)
    else:
        plain.param_groups[0]["weight_decay"] = 0.0
        for _ in range(6):
            before = p.detach().clone()
            q.data.copy_(p)
            opt.step()
            plain.step()
            torch.testing.assert_close(reference.ruled(before, q.detach(), eta_lam), p.detach())


@pytest.mark.parametrize("inner", [AdamW, SGD, Adam, Descends])
@pytest.mark.parametrize("around", [Around, Lookahead, Sharing, lambda inner: Lookahead(Around(inner))])
def test_an_optimizer_around_another_that_only_steps_it_is_accepted(inner: Any, around: Any, silent: None) -> None:
    """It was measured without a word, and decays by lr: 0.95."""
    p = weight(1.0, grad=[0.0])
    CautiousDecay(around(inner([p], lr=0.1)), lam=0.5).step()

    assert pytest.approx(0.95) == p.item()


def test_an_optimizer_that_shards_another_is_not_measured(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    """fairscale's OSS communicates in its step, so it cannot be copied. The optimizer inside counts."""
    oss = of_library(WarmsUpAround, "fairscale.optim.oss", "OSS")
    with pytest.raises(ValueError, match=r"by 0\.075"):
        CautiousDecay(oss(DecaysMore([weight(1.0)], weight_decay=0.5)))
    monkeypatch.setattr(probe, "Copies", lambda *_: pytest.fail("measured"))
    CautiousDecay(oss(AdamW([weight(1.0)], weight_decay=0.5)))


def test_an_optimizer_around_another_that_cannot_be_copied_warns() -> None:
    """It is built from something else than the optimizer inside, so nothing is measured."""

    class OfTwo(Around):
        def __init__(self, name: str, inside: Optimizer) -> None:
            super().__init__(inside)

    with pytest.warns(UserWarning, match="the decay of OfTwo could not be measured"):
        CautiousDecay(OfTwo("mine", AdamW([weight(1.0)], weight_decay=0.5)))


# --------------------------------------------------------------------------- groups that are added later


class KeepsStartsFrom(Around):
    """Notes the weights of its groups when they are added, and has no defaults of its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inside = vars(self).get("optimizer")
        if inside is None:  # while it is built
            super().add_param_group(param_group)
            return
        inside.add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["start"] = p.detach().clone()


def on_a_manifold() -> nn.Parameter:
    p = weight(1.0)
    p.manifold = Sphere()
    return p


def in_bfloat16() -> nn.Parameter:
    return weight(1.0, dtype=torch.bfloat16)


UNFIT: dict[str, tuple[Callable[[Any], Optimizer], Callable[[], dict[str, Any]]]] = {
    "another factor": (functools.partial(ReadsOption, mult=1.0), lambda: {"params": weight(1.0), "mult": 0.1}),
    "a multiplier": (ReadsMultipliers, lambda: {"params": with_attributes(wd_mul=0.0)}),
    "vectors": (SkipsVectors, lambda: {"params": a_vector_and_a_matrix()}),
    "on a manifold": (OnManifolds, lambda: {"params": (p for p in [on_a_manifold()])}),
    "16 bits": (KeepsMasters, lambda: {"params": [in_bfloat16()]}),
    "inside": (lambda groups: KeepsStartsFrom(KeepsMasters(groups)), lambda: {"params": [in_bfloat16()]}),
    "inside, over CautiousUpdate": (
        lambda groups: CautiousUpdate(KeepsStartsFrom(SkipsVectors(groups))),
        lambda: {"params": a_vector_and_a_matrix()},
    ),
    "a NaN": (functools.partial(SGD, lr=0.1), lambda: {"params": [weight(1.0)], "weight_decay": math.nan}),
    "low bits elsewhere": (
        functools.partial(SGD, lr=0.1),
        lambda: {"params": [in_bfloat16()], "master_bytewidth": 4},
    ),
}


@pytest.mark.parametrize(("build", "group"), UNFIT.values(), ids=list(UNFIT))
def test_a_group_that_is_refused_at_construction_is_refused_when_it_is_added(build: Any, group: Any) -> None:
    """The text is the same, nothing of the group stays, and the next group counts for itself."""
    matrix = nn.Parameter(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"param group 1|cannot wrap SGD") as at_construction:
        CautiousDecay(build([{"params": [matrix]}, group()]), lam=0.5)
    base = build([{"params": [matrix]}])
    opt = CautiousDecay(base, lam=0.5)
    had, added = set(base.state), group()
    keys = set(added)
    with pytest.raises(ValueError, match=r"param group 1|cannot wrap SGD") as when_added:
        opt.add_param_group(added)

    assert str(at_construction.value) == str(when_added.value)
    assert (1, had, keys) == (len(base.param_groups), set(base.state), set(added))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1, 1))], **({"mult": 1.0} if "mult" in added else {})})
    for p in (p for each in opt.param_groups for p in each["params"]):
        p.grad = torch.zeros_like(p)
    opt.step()

    assert pytest.approx([0.95, 0.95]) == [each["params"][0].item() for each in opt.param_groups]


def test_a_group_that_is_added_takes_lam_and_is_checked_with_it() -> None:
    """The base's own 0 is no excuse: lam is what the group would decay by."""
    opt = CautiousDecay(SkipsVectors([nn.Parameter(torch.ones(1, 1))]), lam=0.5)
    with pytest.raises(ValueError, match=r"^param group 1 of SkipsVectors has no single step size"):
        opt.add_param_group({"params": a_vector_and_a_matrix()})
    opt.add_param_group({"params": a_vector_and_a_matrix(), "weight_decay": 0.0})

    assert [0.5, 0.0] == [group["weight_decay"] for group in opt.param_groups]


def test_empty_groups_may_be_added(silent: None) -> None:
    """A group may be empty when the wrapper is built, and when it is added."""
    opt = CautiousDecay(Descends([{"params": [weight(1.0, grad=[0.0])]}, {"params": []}]), lam=0.5)
    opt.add_param_group({"params": []})
    opt.step()

    assert pytest.approx(0.95) == opt.param_groups[0]["params"][0].item()


def test_what_was_refused_may_be_mended(silent: None) -> None:
    """Without the attributes for which it was refused, the same optimizer is taken."""
    multiplied, on = weight(1.0), on_a_manifold()
    multiplied.wd_mul = 0.5
    for cls, p, name in ((ReadsMultipliers, multiplied, "wd_mul"), (OnManifolds, on, "manifold")):
        base = cls([p, weight(1.0)], weight_decay=0.5)
        with pytest.raises(ValueError, match=name):
            CautiousDecay(base)
        delattr(p, name)
        CautiousDecay(base)


# --------------------------------------------------------------------------- coupled decay

COUPLED: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "SGD": (SGD, {}, None),
    "SGD with momentum": (SGD, {"momentum": 0.9}, "momentum makes the decay 10 times as strong"),
    "SGD with dampening": (SGD, {"momentum": 0.9, "dampening": 0.9}, None),
    "Adam": (Adam, {}, "adds the decay to the gradient"),
    "RMSprop": (RMSprop, {}, "adds the decay to the gradient"),
    "AdamW": (AdamW, {}, None),
    "NAdam": (NAdam, {}, "adds the decay to the gradient"),
    "NAdam, decoupled": (NAdam, {"decoupled_weight_decay": True}, None),
    "a stranger": (AddsToTheGradient, {}, "adds the decay to the gradient"),
    "a stranger, decoupled": (Descends, {}, None),
}


@pytest.mark.parametrize(("cls", "options", "text"), COUPLED.values(), ids=list(COUPLED))
def test_a_coupled_decay_is_told_once(cls: Any, options: dict[str, Any], text: str | None) -> None:
    """One warning says that a coupled weight_decay is another strength. lam= is a choice, and silences it."""
    base = cls([{"params": [weight(1.0)]}, {"params": [weight(1.0)]}], lr=0.1, weight_decay=5e-4, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CautiousDecay(base)
    said = [str(each.message) for each in caught]

    assert len(said) == (text is not None)
    assert text is None or (text in said[0] and "pass it as lam=" in said[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CautiousDecay(base, lam=0.1)


def test_momentum_makes_a_coupled_decay_ten_times_as_strong() -> None:
    """The number in the warning: plain SGD with momentum 0.9 decays as the wrapper does with 10 * lam."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    plain = SGD([p], lr=0.01, momentum=0.9, weight_decay=0.01)
    wrapped = CautiousDecay(SGD([q], lr=0.01, momentum=0.9), lam=0.1)
    for _ in range(1000):
        plain.step()
        wrapped.step()

    assert pytest.approx(math.log(q.item()), rel=0.02) == math.log(p.item())
