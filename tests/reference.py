"""Every method on one tensor, in float64, written from the papers without `cwd_wrap.rules`.

A reference takes the weights ``x`` before a step, the weights ``w`` after a step of the plain base, the gradient ``g``
that the base descends, and eta*lam. It returns the weights after a step of the wrapped base.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reference = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def aligned(u: Tensor, x: Tensor, strict: bool = False) -> Tensor:
    """1[u*x >= 0], or > if ``strict``. It compares signs, because the product may underflow."""
    product = torch.sign(u) * torch.sign(x)
    return product > 0 if strict else product >= 0


def decay(mask: str = "update", strict: bool = False) -> Reference:
    """arXiv 2510.12402, Algorithm 1, and the masks of its ablations."""

    def reference(x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
        chosen = {
            "update": lambda: aligned(x - w, x, strict),
            "gradient": lambda: aligned(g, x, strict),
            "all": lambda: torch.ones_like(x, dtype=torch.bool),
        }[mask]()
        return torch.where(chosen, w - eta_lam * x, w)

    return reference


def update(scale: str | None = "mean") -> Reference:
    """arXiv 2411.16085: Algorithm 1 (``numel``), the authors' code (``mean``), or no factor (None)."""

    def reference(x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
        kept = aligned(x - w, g, strict=True).double()
        if scale == "mean":
            alpha = 1 / kept.mean().clamp(min=1e-3)
        else:
            alpha = kept.numel() / (kept.sum() + 1) if scale == "numel" else torch.ones(())
        return (1 - eta_lam) * (x + alpha * kept * (w - x))

    return reference


def p_norm(p: float = 0.8) -> Reference:
    """arXiv 2404.10824, as in the authors' code: X = |x|**(2-p); w *= X / (X + p*eta*lam)."""

    def reference(x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
        size = x.abs() ** (2 - p)
        return w * size / (size + p * eta_lam) if eta_lam and x.any() else w

    return reference


def ruled(x: Tensor, w: Tensor, eta_lam: float) -> Tensor:
    """The weights that the paper's rule gives for a step from ``x`` to ``w``."""
    return decay()(x, w, x, eta_lam)
