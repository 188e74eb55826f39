"""The maths on one tensor, in the papers' symbols: the definition every kernel is held to.

    x <- x - eta * (u + lam * 1[u*x >= 0] * x)      Cautious Weight Decay, arXiv 2510.12402, Algorithm 1

``x`` is the weight before the optimizer's step, ``w`` the weight after it, ``u`` its update: w = x - eta*u.
The functions are elementwise, take tensors of one shape and return new ones.
"""

import torch
from torch import Tensor


def aligned(u: Tensor, x: Tensor, strict: bool = False) -> Tensor:
    """1[u*x >= 0], or 1[u*x > 0] if ``strict``: does the step ``x - eta*u`` move ``x`` towards zero?

    Written with the signs, since the product underflows (in float32, 1e-25 * -1e-25 is -0.0, and -0.0 >= 0); so ``u``
    may be anything with the update's sign. NaN is never aligned.
    """
    if strict:
        return (u > 0) & (x > 0) | (u < 0) & (x < 0)
    return (u >= 0) & (x >= 0) | (u <= 0) & (x <= 0)


def moved_towards_zero(x: Tensor, w: Tensor, strict: bool = False) -> Tensor:
    """`aligned` of the update u that took ``x`` to ``w``, by comparison alone: u >= 0 where w <= x.

    A step across zero counts as towards it, however far it lands on the other side. NaN is never aligned.
    """
    if strict:
        return (w < x) & (x > 0) | (w > x) & (x < 0)
    return (w <= x) & (x >= 0) | (w >= x) & (x <= 0)


def decay(w: Tensor, x: Tensor, mask: Tensor, eta_lam: float | Tensor) -> Tensor:
    """w - eta*lam * mask * x: the decay that ``mask`` lets through, taken of the weight before the step.

    16-bit weights are worked on in float32 and rounded once.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    return (w.to(wide) - mask.to(wide) * x.to(wide) * eta_lam).to(w.dtype)
