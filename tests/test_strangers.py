"""Optimizers as people write and patch them: each wrapped, with the plain one beside it.

The classes here skip steps, accumulate, hold other optimizers, multiply the decay in ways of their own, schedule their
own learning rate or keep weights under a constraint. `Beside` compares a wrapped optimizer with a plain one that is
built without decay: after each step the weights must be those of the plain step, plus the rule.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from support import weight
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, Rprop

from cwd_wrap import CautiousDecay, PNormDecay, directions, known, pieces, updates

LAM = 0.5


class Beside:
    """A wrapped optimizer and the plain one, on the same weights and gradients."""

    def __init__(self, build: Callable[..., Optimizer], eta: float, wrap: Any = CautiousDecay) -> None:
        self.eta_lam = eta * LAM
        self.weights, self.plain_weights = self.make(), self.make()
        self.wrapped = wrap(build([{"params": self.weights, "weight_decay": LAM}]))
        self.plain = build([{"params": self.plain_weights, "weight_decay": 0.0}])

    @staticmethod
    def make() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (2, 2))]

    def step(self, number: int) -> float:
        """The largest difference to the rule after a step of both."""
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(self.weights, self.plain_weights, strict=True):
            q.data.copy_(p)
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone().double() for p in self.weights]
        self.wrapped.step()
        self.plain.step()
        expected = [
            reference.ruled(x, q.detach().double(), self.eta_lam)
            for x, q in zip(before, self.plain_weights, strict=True)
        ]
        return max(float((p - w).abs().max()) for p, w in zip(self.weights, expected, strict=True))


# --------------------------------------------------------------------------- a class is trusted by its code


def clips(step: Any) -> Any:
    """Clip the gradients first."""

    def patched(self: Optimizer, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        return step(self, closure)

    return patched


def centralises(step: Any) -> Any:
    """Take the mean off each gradient, which turns the signs of some."""

    def patched(self: Optimizer, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
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


def wraps(patch: Any) -> Any:
    """The same patch with functools.wraps, which copies torch's mark ``hooked``."""

    @functools.wraps(patch)
    def patch_with_marks(step: Any) -> Any:
        return functools.wraps(step)(patch(step))

    return patch_with_marks


PATCHES = {"clips": clips, "centralises": centralises, "halves": halves}
# Each base with the path that it takes unpatched.
PATCHED_BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one_pass": (AdamW, {"lr": 0.1, "fused": True}),
    "direction": (AdamW, {"lr": 0.1, "foreach": True}),
    "one_pass of SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "direction of NAdam": (NAdam, {"lr": 0.1}),
    "pieces": (Muon, {"lr": 0.1}),
    "pieces of Rprop": (Rprop, {"lr": 0.1}),
}
every_patched_base = pytest.mark.parametrize(("cls", "options"), PATCHED_BASES.values(), ids=list(PATCHED_BASES))
every_patch = pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))


@every_patched_base
@every_patch
@pytest.mark.parametrize("when", ["before it is built", "after", "between two"])
@pytest.mark.parametrize("marked", [False, True], ids=["bare", "functools.wraps"])
def test_x(cls: Any, options: Any, patch: Any, when: str, marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cls is Rprop:
        cls_ = lambda groups, **o: Rprop([p for g in groups for p in g["params"]], **o)
        build = functools.partial(cls_, **options)
        wrap = functools.partial(CautiousDecay, lam=LAM)
    else:
        build = functools.partial(cls, **options)
        wrap = CautiousDecay
    patch = wraps(patch) if marked else patch

    def act():
        monkeypatch.setattr(cls, "step", patch(cls.step))

    if when == "before it is built":
        act()
    both = Beside(build, eta=0.1, wrap=wrap)
    if when != "before it is built":
        both.step(-1)
        act()
    if when == "between two":
        build([{"params": Beside.make()}])
    assert max(both.step(number) for number in range(3)) < 1e-6
