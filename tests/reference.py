"""Every method and every update on one tensor, in float64, written from the papers without `cwd_wrap.rules`.

The reference of a method takes the weights ``x`` before a step, the weights ``w`` after a step of the plain base, the
gradient ``g`` that the base descends, and eta*lam. It returns the weights after a step of the wrapped base.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reference = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def aligned(u: Tensor, x: Tensor, strict: bool = False) -> Tensor:
    """1[u*x >= 0], or > if ``strict``. It compares signs, because the product may underflow."""
    product = torch.sign(u) * torch.sign(x)
    return product > 0 if strict else product >= 0


def decay(mask: str = "update", strict: bool = False, leak: float = 0.0) -> Reference:
    """arXiv 2510.12402, Algorithm 1, and the masks of its ablations; other weights take the part ``leak``."""

    def reference(x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
        chosen = {
            "update": lambda: aligned(x - w, x, strict),
            "gradient": lambda: aligned(g, x, strict),
            "all": lambda: torch.ones_like(x, dtype=torch.bool),
        }[mask]()
        return torch.where(chosen, w - eta_lam * x, w - eta_lam * leak * x)

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


# ---- the updates of optimizers: eta*u of a step, from the gradients of all steps so far
#
# They are written as sums over all steps, so that no state is needed.

Gradients = Sequence[Tensor]


def mean(values: Gradients, beta: float) -> Tensor:
    """The exponential moving average of ``values`` that begins at 0, without a correction of its bias."""
    return sum(((1 - beta) * beta**i * value for i, value in enumerate(reversed(values))), torch.zeros(()))


def squared(gradients: Gradients) -> list[Tensor]:
    """g * g of each step."""
    return [g * g for g in gradients]


def adam(
    gradients: Gradients, lr: float, betas: tuple[float, float], eps: float, amsgrad: bool = False
) -> Tensor:  # fmt: skip
    """arXiv 1412.6980, Algorithm 1, and amsgrad (arXiv 1904.09237) as torch corrects its bias."""
    t, (beta1, beta2) = len(gradients), betas
    v = mean(squared(gradients), beta2)
    if amsgrad:
        v = torch.stack([mean(squared(gradients[: k + 1]), beta2) for k in range(t)]).amax(0)
    return lr * mean(gradients, beta1) / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def nadam(
    gradients: Gradients, lr: float, betas: tuple[float, float], eps: float, momentum_decay: float = 4e-3
) -> Tensor:  # fmt: skip
    """Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop, Algorithm 8."""
    t, (beta1, beta2) = len(gradients), betas
    mu = [beta1 * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in range(1, t + 2)]
    of_g = (1 - mu[t - 1]) * gradients[-1] / (1 - math.prod(mu[:t]))
    of_m = mu[t] * mean(gradients, beta1) / (1 - math.prod(mu))
    return lr * (of_g + of_m) / ((mean(squared(gradients), beta2) / (1 - beta2**t)).sqrt() + eps)


def nadamw(gradients: Gradients, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam with beta1*m_t + (1 - beta1)*g_t in place of m_t, as in timm."""
    t, (beta1, beta2) = len(gradients), betas
    ahead = beta1 * mean(gradients, beta1) + (1 - beta1) * gradients[-1]
    return lr * ahead / (1 - beta1**t) / ((mean(squared(gradients), beta2) / (1 - beta2**t)).sqrt() + eps)


def radam(gradients: Gradients, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """arXiv 1908.03265, Algorithm 2. torch adds eps to the root of v before it corrects v's bias."""
    t, (beta1, beta2) = len(gradients), betas
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    m = mean(gradients, beta1) / (1 - beta1**t)
    if length <= 5:
        return lr * m
    r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return lr * r * m * math.sqrt(1 - beta2**t) / (mean(squared(gradients), beta2).sqrt() + eps)


def adamax(gradients: Gradients, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """arXiv 1412.6980, Algorithm 2, with eps added to each |g| as in torch."""
    t, (beta1, beta2) = len(gradients), betas
    sizes = [beta2 ** (t - 1 - i) * (g.abs() + eps) for i, g in enumerate(gradients)]
    return lr / (1 - beta1**t) * mean(gradients, beta1) / torch.stack(sizes).amax(0)


def adagrad(
    gradients: Gradients, lr: float, eps: float, lr_decay: float = 0.0, initial_accumulator_value: float = 0.0
) -> Tensor:
    """Duchi, Hazan and Singer, JMLR 2011, with the diagonal matrix."""
    total = torch.stack(squared(gradients)).sum(0) + initial_accumulator_value
    return lr / (1 + (len(gradients) - 1) * lr_decay) * gradients[-1] / (total.sqrt() + eps)


def adadelta(gradients: Gradients, lr: float, rho: float, eps: float) -> Tensor:
    """arXiv 1212.5701, Algorithm 1, times lr."""
    steps: list[Tensor] = []
    for t, g in enumerate(gradients):
        of_g = mean(squared(gradients[: t + 1]), rho)
        steps.append(((mean(squared(steps), rho) + eps) / (of_g + eps)).sqrt() * g)
    return lr * steps[-1]


def rmsprop(
    gradients: Gradients, lr: float, alpha: float, eps: float, momentum: float = 0.0, centered: bool = False
) -> Tensor:
    """Tieleman and Hinton, 2012; arXiv 1308.0850 for ``centered``; momentum sums the scaled gradients."""
    total = torch.zeros(())
    for t, g in enumerate(gradients):
        v = mean(squared(gradients[: t + 1]), alpha)
        v = v - mean(gradients[: t + 1], alpha) ** 2 if centered else v
        total = momentum * total + g / (v.sqrt() + eps)
    return lr * total


def rmsprop_tf(
    gradients: Gradients, lr: float, alpha: float, eps: float, momentum: float = 0.0, centered: bool = False
) -> Tensor:
    """RMSprop as in TensorFlow: eps inside of the root, and the mean of squares begins at 1."""
    total = torch.zeros(())
    for t, g in enumerate(gradients):
        v = mean(squared(gradients[: t + 1]), alpha) + alpha ** (t + 1)
        v = v - mean(gradients[: t + 1], alpha) ** 2 if centered else v
        total = momentum * total + lr * g / (v + eps).sqrt()
    return total


def sgd(
    gradients: Gradients, lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> Tensor:
    """SGD as in torch: the first gradient is not dampened."""
    buffer = gradients[0]
    for g in gradients[1:]:
        buffer = momentum * buffer + (1 - dampening) * g
    return lr * (gradients[-1] + momentum * buffer if nesterov else buffer if momentum else gradients[-1])


def lion(gradients: Gradients, lr: float, betas: tuple[float, float]) -> Tensor:
    """arXiv 2302.06675, Algorithm 2."""
    beta1, beta2 = betas
    return lr * torch.sign(beta1 * mean(gradients[:-1], beta2) + (1 - beta1) * gradients[-1])


# ---- schedule-free optimizers (arXiv 2405.15682), which have no eta*u of their own: the average is in every step

Iterates = tuple[Tensor, Tensor, Tensor]
"""y, where the gradient is computed, the average x, and z."""


def schedule_free(
    start: Tensor,
    gradients: Gradients,
    etas: Sequence[float],
    direction: Callable[[Gradients], Tensor],
    beta: float,
    lam: float = 0.0,
    strict: bool = False,
    r: float = 0.0,
    power: float = 2.0,
) -> Iterates:
    """Algorithm 1 with its x, and with cautious weight decay at y. ``direction`` gives u from all gradients so far.

    The weights of the average are t**r * max(etas so far)**power, as in the authors' code.
    """
    x = z = y = start
    total = 0.0
    for t, eta in enumerate(etas, 1):
        u = direction(gradients[:t])
        z = z - eta * (u + lam * aligned(u, y, strict) * y)
        weight = t**r * max(etas[:t]) ** power
        total += weight
        c = weight / total if total else 0.0
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
    return y, x, z


def normalized(gradients: Gradients, beta2: float, eps: float) -> Tensor:
    """Adam's u without momentum."""
    v = mean(squared(gradients), beta2) / (1 - beta2 ** len(gradients))
    return gradients[-1] / (v.sqrt() + eps)


def rectification(t: int, beta2: float) -> float | None:
    """arXiv 1908.03265, Algorithm 2: the factor of step ``t``; None where the variance is not tractable."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 4:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
