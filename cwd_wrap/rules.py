"""The maths on one tensor, in the papers' symbols. Tests compare every kernel with these functions.

    x <- x - eta * (u + lam * 1[u*x >= 0] * x)      cautious weight decay, arXiv 2510.12402, Algorithm 1
    x <- x - eta * u * alpha(u*g) * 1[u*g > 0]      cautious update, arXiv 2411.16085, Algorithm 1
    w <- w / (1 + p*eta*lam * |x|**(p-2))           decoupled p-norm decay, arXiv 2404.10824

The updates of Adam, SGD and Lion are here for the kernels that also compute the base's update.

``x`` is the weight before the optimizer's step, ``w`` the weight after it, ``u`` its update: w = x - eta*u.
``g`` is the gradient. The functions take tensors of one shape and return new ones; with 16-bit weights they compute in
float32 and round once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def aligned(u: Tensor, x: Tensor, strict: bool = False) -> Tensor:
    """1[u*x >= 0], or 1[u*x > 0] if ``strict``: does the step ``x - eta*u`` move ``x`` towards zero?

    Computed from the signs, since the product underflows (in float32, 1e-25 * -1e-25 is -0.0, and -0.0 >= 0). So ``u``
    can be any tensor with the update's signs. NaN is never aligned.
    """
    if strict:
        return (u > 0) & (x > 0) | (u < 0) & (x < 0)
    return (u >= 0) & (x >= 0) | (u <= 0) & (x <= 0)


def moved_towards_zero(x: Tensor, w: Tensor, strict: bool = False) -> Tensor:
    """`aligned` of the update u that took ``x`` to ``w``, by comparison alone: u >= 0 where w <= x.

    A step across zero counts as towards zero, however far it goes. NaN is never aligned.
    """
    if strict:
        return (w < x) & (x > 0) | (w > x) & (x < 0)
    return (w <= x) & (x >= 0) | (w >= x) & (x <= 0)


def decay(w: Tensor, x: Tensor, mask: Tensor, eta_lam: float | Tensor, random: Tensor | None = None) -> Tensor:
    """w - eta*lam * mask * x: decay where ``mask`` is 1, computed from the weight ``x`` before the step.

    Rounded to nearest, or by `stochastic_rounding` where ``random`` is given (16-bit weights only).
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    decayed = w.to(wide) - mask.to(wide) * x.to(wide) * eta_lam
    return decayed.to(w.dtype) if random is None else stochastic_rounding(decayed, w.dtype, random)


def stochastic_rounding(wide: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``wide`` (float32) in a 16-bit ``dtype``: one of its two neighbours there, so that the mean is ``wide``.

    With ``random`` uniform in [0, 1), the farther neighbour is chosen with probability |wide - nearest| / gap. Numbers
    that ``dtype`` holds exactly stay, including the sign of 0. NaN, infinities and overflow are as in rounding to
    nearest.
    """
    nearest = wide.to(dtype)
    outwards = (wide.abs() > nearest.abs()).to(torch.int16)
    # Read as an integer, the next number outwards is one more and the next towards zero one less, for either sign.
    other = (nearest.view(torch.int16) + (2 * outwards - 1)).view(dtype)
    chance = (wide - nearest) / (other.to(wide.dtype) - nearest)  # NaN, so never below, if wide is exact
    return torch.where(random < chance, other, nearest)


def adam(
    g: Tensor, m: Tensor, v: Tensor, largest: Tensor | None, t: float, *, eta: float | Tensor, beta1: float,
    beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(direction, eta*u, m, v, largest) of step ``t`` of Adam (arXiv 1412.6980, Algorithm 1) and of AdamW.

        m <- m + (1 - beta1) * (g - m),    v <- beta2*v + (1 - beta2) * g * g
        u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)

    With amsgrad the ``largest`` v so far takes the place of v in u; otherwise it is None. u has the sign of m.
    """
    m = lerp(m, g, 1 - beta1)
    v = beta2 * v + (1 - beta2) * g * g
    largest = None if largest is None else torch.maximum(largest, v)
    root = (v if largest is None else largest).sqrt() / (1 - beta2**t) ** 0.5
    return m, eta / (1 - beta1**t) * m / (root + eps), m, v, largest


def sgd(
    g: Tensor, m: Tensor | None, *, eta: float | Tensor, momentum: float, dampening: float, nesterov: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(direction, eta*u, m) of SGD, as torch has it: u = g without momentum (``m`` None).

    With it, m <- momentum*m + (1 - dampening)*g, and u = m, or g + momentum*m with ``nesterov``.
    """
    if m is None:
        return g, eta * g, None
    m = momentum * m + (1 - dampening) * g
    u = g + momentum * m if nesterov else m
    return u, eta * u, m


def lion(g: Tensor, m: Tensor, *, eta: float | Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor, Tensor]:
    """(direction, eta*u, m) of Lion (arXiv 2302.06675, Algorithm 2).

    u = sign(m + (1 - beta1)*(g - m)),    m <- m + (1 - beta2)*(g - m)
    """
    u = lerp(m, g, 1 - beta1).sign()
    return u, eta * u, lerp(m, g, 1 - beta2)


def lerp(m: Tensor, g: Tensor, weight: float) -> Tensor:
    """``m + weight*(g - m)``, computed from the nearer end as torch does: a weight of 1 gives g, however large m is."""
    return m + weight * (g - m) if weight < 0.5 else g + (weight - 1) * (g - m)


def sums(mask: Tensor, moved: Tensor, x: Tensor, step: Tensor | None = None, w: Tensor | None = None) -> Tensor:
    """Five sums over the elements of one tensor, for monitors, as a tensor of shape (5,) in the type of `exact`.

        sum mask,    sum 1[u*x > 0],    sum (mask*x)**2,    sum (eta*u)**2,    sum w**2

    ``moved`` is `aligned` with ``strict``, ``step`` eta*u, ``w`` the weight after the step. None gives a sum of 0.
    """
    wide = exact(x.device)
    squares = [None if t is None else t.to(wide).square() for t in (mask * x, step, w)]
    zero = torch.zeros((), dtype=wide, device=x.device)
    return torch.stack([zero if t is None else t.sum(dtype=wide) for t in (mask, moved, *squares)])


def squares(ts: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor; all of one device and type."""
    norms = torch._foreach_norm([t.to(torch.promote_types(t.dtype, torch.float32)) for t in ts])
    return torch.stack(norms).to(exact(ts[0].device)).square()


def exact(device: torch.device) -> torch.dtype:
    """The type of sums over whole tensors: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as an int64


def mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, bit for bit, on int64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def stream(of: Tensor, number: Tensor | int) -> Tensor:
    """The stream with a ``number`` among those derived from ``of``, which is another stream or a seed; all int64."""
    number = number if isinstance(number, Tensor) else torch.tensor(number, device="cpu")
    return mix(of + number * _GOLDEN)


def random_words(of: Tensor, places: Tensor) -> Tensor:
    """64 random bits for each place of a stream, as int64."""
    return mix(of + places * _GOLDEN)


def uniform(words: Tensor, column: int) -> Tensor:
    """A float32 multiple of 2**-16 in [0, 1) for each word, from 16 of its bits: ``column`` is 0 to 3."""
    return (_shifted(words, 16 * column) & 0xFFFF).float() * 2.0**-16


def _shifted(z: Tensor, bits: int) -> Tensor:
    """``z >> bits`` as of unsigned numbers: zeros come in on the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1) if bits else z


def agrees(w: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """1[u*g > 0]: did the step from ``x`` to ``w`` go down the current gradient? By comparison, without rounding."""
    return (w < x) & (g > 0) | (w > x) & (g < 0)


def alpha(kept: Tensor, numel: int | Tensor, scale: str | None) -> Tensor:
    """The factor that compensates for masked coordinates, where ``kept`` out of ``numel`` are not masked.

    ``"mean"``: 1 / max(kept/numel, 1e-3), the authors' current code and timm. ``"numel"``: numel / (kept + 1), the
    paper. None: 1. ``kept`` may hold the counts of many tensors; the factors have its type and shape.
    """
    if scale == "mean":
        return 1 / (kept / numel).clamp(min=1e-3)
    return numel / (kept + 1) if scale == "numel" else torch.ones_like(kept)


def cautious_update(w: Tensor, x: Tensor, mask: Tensor, alpha: Tensor, eta_lam: float | Tensor) -> Tensor:
    """v - eta*lam*v with v = x + alpha * mask * (w - x): the masked, rescaled update, then decoupled decay."""
    wide = torch.promote_types(w.dtype, torch.float32)
    v = x.to(wide) + alpha.to(wide) * mask.to(wide) * (w.to(wide) - x.to(wide))
    return (v - eta_lam * v).to(w.dtype)


def p_norm_decay(w: Tensor, x: Tensor, p: float, eta_lam: float | Tensor, zero_initialised: Tensor) -> Tensor:
    """w / (1 + p*eta*lam * |x|**(p-2)): the authors' w * X / (X + p*eta*lam) with X = |x|**(2-p).

    This form does not overflow at large ``x``. Where eta*lam is 0 it returns w. For p below 2 a weight that was exactly
    0 becomes 0, except in a tensor that was 0 as a whole (``zero_initialised``), which could otherwise never train.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    strength = torch.as_tensor(p * eta_lam, dtype=wide, device=w.device)
    shrunk = w.to(wide) / (1 + strength * x.to(wide).abs() ** (p - 2))
    return torch.where((strength == 0) | zero_initialised, w.to(wide), shrunk).to(w.dtype)
