"""What several test files share: the two paths, a table of bases, a small net to train, and the rule in one line."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

both_paths = pytest.mark.parametrize("path", ["direction", "snapshot"])

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, weight_decay=0.5),
    "SGD-momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.5),
    "Adam": lambda params: Adam(params, lr=0.01, weight_decay=0.5),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.5),
    "AdamW-fused": lambda params: AdamW(params, lr=0.01, weight_decay=0.5, fused=True),
    "AdamW-foreach": lambda params: AdamW(params, lr=0.01, weight_decay=0.5, foreach=True),
    "Adagrad": lambda params: Adagrad(params, lr=0.1, weight_decay=0.5),
}
all_bases = pytest.mark.parametrize("build", BASES.values(), ids=list(BASES))


def weight(*values: float, grad: Iterable[float] | None = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A vector of weights, with a gradient if one is given."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(list(grad), dtype=dtype)
    return p


def net() -> nn.Sequential:
    """The same small net at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss on batch number ``step``."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """One step on each of the batches ``steps``."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def values(model: nn.Module) -> Tensor:
    """All weights in one vector, copied."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ruled(x: Tensor, w: Tensor, eta_lam: float) -> Tensor:
    """The rule, for a step that took ``x`` to ``w``: all decay by ``eta_lam * x`` but the weights that it grew."""
    grew = (x > 0) & (w > x) | (x < 0) & (w < x)
    return torch.where(grew, w, w - eta_lam * x)


def same(a: object, b: object) -> bool:
    """Are two nested structures equal, tensors bit for bit?"""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
