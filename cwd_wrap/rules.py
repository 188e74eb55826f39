"""The maths, in the papers' symbols.

    x <- x - eta * (u + lam * 1[u*x >= 0] * x)      cautious weight decay, arXiv 2510.12402, Algorithm 1
    x <- x - eta * (u + lam * (leak + (1 - leak) * 1[u*x >= 0]) * x)        the same with a leak: a part decays anywhere
    x <- x - eta * u * alpha(u*g) * 1[u*g > 0]      cautious update, arXiv 2411.16085, Algorithm 1
    w <- w / (1 + p*eta*lam * |x|**(p-2))           decoupled p-norm decay, arXiv 2404.10824

``x`` is the weight before the optimizer's step, ``w`` the weight after it, ``u`` its update: w = x - eta*u.
``g`` is the gradient.

Each of `FORMULAS` stands here once, for every backend. It is written in Python's operators and a few words. Here the
words are torch's, so a formula takes tensors of one wide type (float32 or float64) and gives new ones; `kernels.bind`
makes copies in which the words are those of numba or Triton. So a formula has no defaults, reassigns no optional
argument, and does no arithmetic with literals, which would make numba compute in float64.

The updates are as their optimizers compute them, with `updates.Update.numbers`. Each returns the direction (which has
the sign of u), eta*u, and its new state. Its first number is proportional to eta. The methods in one pass take what an
update returns: a kernel is compiled from the pair. The updates of `AVERAGING` optimizers also take the decay, and
return the new weight in place of the direction, which is the gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Maybe: TypeAlias = Tensor | None
"""A state that the optimizer keeps only with some options."""
_T = TypeVar("_T")


# ---- the words


def where(condition: Any, a: _T, b: _T) -> _T:
    """``a`` where the condition holds, else ``b``."""
    chosen: _T
    if isinstance(condition, Tensor):
        chosen = torch.where(condition, a, b)  # type: ignore[call-overload]
        return chosen
    return a if condition else b


def number(flag: Tensor, like: Tensor) -> Tensor:
    """1 where ``flag`` is true, else 0, in the type of ``like``."""
    return flag.to(like.dtype)


def one(like: _T) -> _T:  # noqa: ARG001 - numba needs to know the type
    """1 in the type of ``like``."""
    return 1.0  # type: ignore[return-value]


def root(a: Tensor) -> Tensor:
    """The square root, rounded to nearest."""
    return a.sqrt()


def divide(a: Tensor, b: Tensor | float) -> Tensor:
    """a / b, rounded to nearest."""
    return a / b


def power(a: Tensor, exponent: float) -> Tensor:
    """a**exponent for ``a`` of 0 or more and exponents of 0 or less."""
    return a**exponent


def fused(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """a*b + c, which the compiled backends round once."""
    return a * b + c


# ---- the methods


def aligned(u: Tensor, x: Tensor, strict: bool) -> Tensor:
    """1[u*x >= 0], or 1[u*x > 0] if ``strict``: does the step ``x - eta*u`` move ``x`` towards zero?

    Computed from the signs, since the product underflows (in float32, 1e-25 * -1e-25 is -0.0, and -0.0 >= 0). So ``u``
    can be any tensor with the update's signs. NaN is never aligned.
    """
    return (u > 0) & (x > 0) | (u < 0) & (x < 0) if strict else (u >= 0) & (x >= 0) | (u <= 0) & (x <= 0)


def moved_towards_zero(x: Tensor, w: Tensor, strict: bool) -> Tensor:
    """`aligned` of the update u that took ``x`` to ``w``, by comparison alone: u >= 0 where w <= x.

    A step across zero counts as towards zero, however far it goes. NaN is never aligned.
    """
    return (w < x) & (x > 0) | (w > x) & (x < 0) if strict else (w <= x) & (x >= 0) | (w >= x) & (x <= 0)


def share(x: Tensor, mask: Tensor, leak: float) -> Tensor:
    """leak + (1 - leak) * mask: how much of the decay each weight takes, in the type of ``x``."""
    return where(mask, number(mask, x), leak)


def taken(x: Tensor, mask: Tensor, eta_lam: float, leak: float) -> Tensor:
    """eta*lam * share * x: what the decay takes off."""
    return share(x, mask, leak) * x * eta_lam


def decayed(w: Tensor, x: Tensor, mask: Tensor, eta_lam: float, leak: float) -> Tensor:
    """w - eta*lam * share * x: decay where ``mask`` is 1, computed from the weight ``x`` before the step."""
    return w - taken(x, mask, eta_lam, leak)


def heading(m: Tensor, g: Tensor, slope: float, average: float) -> Tensor:
    """A tensor with the sign of the coming update a*m + b*g, a > 0.

    ``slope`` is b/a; or b if ``average`` is not 0, where a + b = 1: then it is computed as torch.lerp does, so that
    near-cancellations come out as the optimizer's own.
    """
    low = slope < 0.5
    mean = fused(where(low, slope, slope - one(slope)), g - m, where(low, m, g))
    return where(average > 0, mean, fused(slope, g, m))


def agrees(w: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """1[u*g > 0]: did the step from ``x`` to ``w`` go down the current gradient? By comparison, without rounding."""
    return (w < x) & (g > 0) | (w > x) & (g < 0)


def rescaled(x: Tensor, step: Tensor, mask: Tensor, alpha: float, eta_lam: float) -> Tensor:
    """v - eta*lam*v with v = x - alpha * mask * eta*u: the masked, rescaled update, then decoupled decay."""
    v = x - alpha * number(mask, x) * step
    return v - eta_lam * v


def shrunk(w: Tensor, x: Tensor, strength: float, exponent: float) -> Tensor:
    """w / (1 + strength * |x|**exponent), with strength p*eta*lam and exponent p - 2; w where the strength is 0."""
    return where(strength == 0, w, divide(w, one(x) + strength * power(abs(x), exponent)))


# ---- the methods in one pass, from what an update returns
#
# Each returns the new weight and the method's mask. ``g`` is the gradient that the update descends, ``mask`` is
# `aligned` of u and x, ``factor`` a number for each whole tensor, ``own`` one of the method's own.


def with_decay(
    x: Tensor, g: Tensor, u: Tensor, step: Tensor, mask: Tensor,  # noqa: ARG001 - all methods take the same
    eta_lam: float, factor: float, own: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decayed`; ``own`` is the leak."""
    return decayed(x - step, x, mask, eta_lam, own), mask


def with_caution(
    x: Tensor, g: Tensor, u: Tensor, step: Tensor, mask: Tensor,  # noqa: ARG001 - all methods take the same
    eta_lam: float, factor: float, own: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rescaled` where u*g > 0; ``factor`` is `alpha`."""
    kept = aligned(u, g, True)
    return rescaled(x, step, kept, factor, eta_lam), kept


def with_p_norm(
    x: Tensor, g: Tensor, u: Tensor, step: Tensor, mask: Tensor,  # noqa: ARG001 - all methods take the same
    eta_lam: float, factor: float, own: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shrunk`; ``factor`` is p, or 0 for a tensor that is 0 as a whole, and ``own`` p - 2."""
    return shrunk(x - step, x, factor * eta_lam, own), x != 0


# ---- the updates


def lerp(m: Tensor, g: Tensor, weight: float) -> Tensor:
    """``m + weight*(g - m)``, computed from the nearer end as torch does: a weight of 1 gives g, however large m is."""
    low = weight < 0.5
    return where(low, m, g) + where(low, weight, weight - one(weight)) * (g - m)


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of the two; NaN if one is NaN."""
    return where((a > b) | (a != a), a, b)  # noqa: PLR0124 - true for NaN


def added(buffer: Maybe, u: Tensor, momentum: float) -> Tensor:
    """momentum*buffer + u; u without momentum, where there is no buffer."""
    total = u
    if buffer is not None:
        total = momentum * buffer + u
    return total


def adam(
    g: Tensor, m: Tensor, v: Tensor, largest: Maybe, eta: float, root_of_rest: float, rest1: float, beta2: float,
    rest2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Adam (arXiv 1412.6980, Algorithm 1), also with amsgrad, and AdamW.

        m <- m + (1 - beta1) * (g - m),    v <- beta2*v + (1 - beta2) * g * g
        u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)

    With amsgrad the ``largest`` v so far takes the place of v in u. rest: 1 - beta; ``eta`` is here eta/(1 - beta1**t),
    ``root_of_rest`` sqrt(1 - beta2**t).
    """
    m = lerp(m, g, rest1)
    v = beta2 * v + rest2 * g * g
    most = v
    if largest is not None:
        most = larger(v, largest)
    return m, divide(eta * m, divide(root(most), root_of_rest) + eps), m, v, most


def sgd(
    g: Tensor, m: Maybe, eta: float, momentum: float, rest: float, nesterov: float
) -> tuple[Tensor, Tensor, Tensor]:
    """SGD, as torch has it: u = g without momentum.

    With it, m <- momentum*m + (1 - dampening)*g, and u = m, or g + momentum*m with ``nesterov``. rest: 1 - dampening.
    """
    new = g
    u = g
    if m is not None:
        new = momentum * m + rest * g
        u = where(nesterov > 0, g + momentum * new, new)
    return u, eta * u, new


def lion(g: Tensor, m: Tensor, eta: float, rest1: float, rest2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lion (arXiv 2302.06675, Algorithm 2); rest: 1 - beta.

    u = sign(m + (1 - beta1)*(g - m)),    m <- m + (1 - beta2)*(g - m)
    """
    mean = lerp(m, g, rest1)
    u = number(mean > 0, g) - number(mean < 0, g)
    return u, eta * u, lerp(m, g, rest2)


def nadam(
    g: Tensor, m: Tensor, v: Tensor, eta: float, root_of_rest: float, of_m: float, rest1: float, beta2: float,
    rest2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """NAdam (Dozat, ICLR 2016 workshop), as torch has it: m and v as in `adam`, mu_t = beta1 * (1 - 0.96**(t*psi) / 2).

    u = ((1 - mu_t)/(1 - mu_1...mu_t) * g + mu_t+1/(1 - mu_1...mu_t+1) * m) / (sqrt(v / (1 - beta2**t)) + eps)

    ``eta`` is here eta times the factor of g, and ``of_m`` the factor of m over that of g.
    """
    m = lerp(m, g, rest1)
    v = beta2 * v + rest2 * g * g
    u = g + of_m * m
    return u, divide(eta * u, divide(root(v), root_of_rest) + eps), m, v


def nadamw(
    g: Tensor, m: Tensor, v: Tensor, eta: float, root_of_rest: float, rest1: float, beta2: float, rest2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """timm's NAdamW: `adam` with m + (1 - beta1) * (g - m) in place of the new m in u."""
    m = lerp(m, g, rest1)
    v = beta2 * v + rest2 * g * g
    u = lerp(m, g, rest1)
    return u, divide(eta * u, divide(root(v), root_of_rest) + eps), m, v


def radam(
    g: Tensor, m: Tensor, v: Tensor, eta: float, rectifies: float, rest1: float, beta2: float, rest2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RAdam (arXiv 1908.03265, Algorithm 2), as torch has it: m and v as in `adam`.

    u = r * m / (1 - beta1**t) * sqrt(1 - beta2**t) / (sqrt(v) + eps) if it ``rectifies``, else m / (1 - beta1**t)

    ``eta`` is here eta times all factors of u.
    """
    m = lerp(m, g, rest1)
    v = beta2 * v + rest2 * g * g
    return m, eta * where(rectifies > 0, divide(m, root(v) + eps), m), m, v


def adamax(
    g: Tensor, m: Tensor, largest: Tensor, eta: float, rest1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adamax (arXiv 1412.6980, Algorithm 2), as torch has it: m as in `adam`.

    largest <- max(beta2*largest, |g| + eps),    u = m / (1 - beta1**t) / largest

    ``eta`` is here eta/(1 - beta1**t).
    """
    m = lerp(m, g, rest1)
    largest = larger(beta2 * largest, abs(g) + eps)
    return m, divide(eta * m, largest), m, largest


def adagrad(g: Tensor, total: Tensor, eta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011): total <- total + g*g,    u = g / (sqrt(total) + eps)."""
    total = total + g * g
    return g, divide(eta * g, root(total) + eps), total


def adadelta(
    g: Tensor, v: Tensor, of_steps: Tensor, eta: float, rho: float, rest: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adadelta (arXiv 1212.5701, Algorithm 1); rest: 1 - rho.

    v <- rho*v + (1 - rho) * g * g,    u = sqrt(of_steps + eps) / sqrt(v + eps) * g
    of_steps <- rho*of_steps + (1 - rho) * u * u
    """  # fmt: skip
    v = rho * v + rest * g * g
    u = divide(root(of_steps + eps), root(v + eps)) * g
    return g, eta * u, v, rho * of_steps + rest * u * u


def rmsprop(
    g: Tensor, v: Tensor, buffer: Maybe, eta: float, alpha: float, rest: float, eps: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSprop (Tieleman and Hinton, 2012), as torch has it; rest: 1 - alpha.

        v <- alpha*v + (1 - alpha) * g * g,    u = g / (sqrt(v) + eps)

    With momentum, buffer <- momentum*buffer + that, and u = buffer.
    """
    v = alpha * v + rest * g * g
    u = added(buffer, divide(g, root(v) + eps), momentum)
    return u, eta * u, v, u


def rmsprop_centered(
    g: Tensor, v: Tensor, mean: Tensor, buffer: Maybe, eta: float, alpha: float, rest: float, eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`rmsprop` with the variance (arXiv 1308.0850): mean <- alpha*mean + (1 - alpha)*g, and v - mean**2 for v in u."""
    v = alpha * v + rest * g * g
    mean = lerp(mean, g, rest)
    u = added(buffer, divide(g, root(v - mean * mean) + eps), momentum)
    return u, eta * u, v, mean, u


def rmsprop_tf(
    g: Tensor, v: Tensor, buffer: Maybe, eta: float, rest: float, eps: float, momentum: float, inside: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """timm's RMSpropTF, as TensorFlow has it: `rmsprop` with g / sqrt(v + eps).

    If eta is ``inside``, the buffer sums eta * g / sqrt(v + eps), and eta*u is the buffer.
    """
    v = v + rest * (g * g - v)
    u = added(buffer, where(inside > 0, eta, one(eta)) * divide(g, root(v + eps)), momentum)
    return u, where(inside > 0, u, eta * u), v, u


def rmsprop_tf_centered(
    g: Tensor, v: Tensor, mean: Tensor, buffer: Maybe, eta: float, rest: float, eps: float, momentum: float,
    inside: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`rmsprop_tf` with the variance, as in `rmsprop_centered`."""
    v = v + rest * (g * g - v)
    mean = mean + rest * (g - mean)
    scale = where(inside > 0, eta, one(eta))
    u = added(buffer, scale * divide(g, root(v - mean * mean + eps)), momentum)
    return u, where(inside > 0, u, eta * u), v, mean, u


# ---- the updates of schedule-free optimizers (arXiv 2405.15682)


def averaged(y: Tensor, z: Tensor, step: Tensor, c: float, share: float) -> tuple[Tensor, Tensor]:
    """The new y and z: the paper's x is the average of all z, and y lies between the two.

        z_new <- z - step,    x_new <- x + c*(z_new - x),    y = (1 - beta1)*z + beta1*x

    Without x this is y_new <- y + c*(z - y) - (1 - beta1*(1 - c)) * step. ``share`` is 1 - beta1*(1 - c).
    """
    return lerp(y, z, c) - share * step, z - step


def free_sgd(
    g: Tensor, y: Tensor, decay: Tensor, z: Tensor, eta: float, c: float, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Schedule-free SGD (Section 2): `averaged` with step = eta*u + decay, u = g. The gradient is that at y."""
    step = eta * g
    y, z = averaged(y, z, step + decay, c, share)
    return y, step, z


def free_adam(
    g: Tensor, y: Tensor, decay: Tensor, z: Tensor, v: Tensor, eta: float, c: float, share: float, rest: float,
    beta2: float, rest2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Schedule-free AdamW (Algorithm 1) and RAdam: `averaged` with step = eta*u + decay.

    v <- beta2*v + (1 - beta2) * g * g,    u = g / (sqrt(v / (1 - beta2**t)) + eps)

    ``rest`` is 1 - beta2**t; below 0 it says that RAdam does not rectify: then u = g.
    """
    v = beta2 * v + rest2 * g * g
    step = eta * where(rest < 0, g, divide(g, root(divide(v, rest)) + eps))
    y, z = averaged(y, z, step + decay, c, share)
    return y, step, z, v


FORMULAS: tuple[Callable[..., Any], ...] = (
    aligned, moved_towards_zero, share, taken, decayed, heading, agrees, rescaled, shrunk, lerp, larger, added,
    with_decay, with_caution, with_p_norm, averaged,
)  # fmt: skip
"""The formulas that every backend has. Each uses only words and formulas before it."""
METHODS: tuple[Callable[..., Any], ...] = (with_decay, with_caution, with_p_norm)
"""Those of the methods in one pass."""
UPDATES: tuple[Callable[..., Any], ...] = (
    adam, sgd, lion, nadam, nadamw, radam, adamax, adagrad, adadelta, rmsprop, rmsprop_centered, rmsprop_tf,
    rmsprop_tf_centered,
)  # fmt: skip
"""Those of the updates. The arguments of each: the gradient; its state, up to three tensors; up to seven numbers."""
AVERAGING: tuple[Callable[..., Any], ...] = (free_sgd, free_adam)
"""Those of schedule-free updates. They take the weight and its decay after the gradient."""


# ---- on tensors of any type


def decay(
    w: Tensor, x: Tensor, mask: Tensor, eta_lam: float | Tensor, leak: float = 0.0, random: Tensor | None = None
) -> Tensor:
    """`decayed`, computed in float32 or wider and rounded once: to nearest, or as `stochastic_rounding` does it.

    The latter where ``random`` is given (16-bit weights only).
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    new = decayed(w.to(wide), x.to(wide), mask, eta_lam, leak)  # type: ignore[arg-type]
    return new.to(w.dtype) if random is None else stochastic_rounding(new, w.dtype, random)


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


def alpha(kept: Tensor, numel: int | Tensor, scale: str | None) -> Tensor:
    """The factor that compensates for masked coordinates, where ``kept`` out of ``numel`` are not masked.

    ``"mean"``: 1 / max(kept/numel, 1e-3), the authors' current code and timm. ``"numel"``: numel / (kept + 1), the
    paper. None: 1. ``kept`` may hold the counts of many tensors; the factors have its type and shape.
    """
    if scale == "mean":
        return 1 / (kept / numel).clamp(min=1e-3)
    return numel / (kept + 1) if scale == "numel" else torch.ones_like(kept)


def cautious_update(w: Tensor, x: Tensor, mask: Tensor, alpha: Tensor, eta_lam: float | Tensor) -> Tensor:
    """`rescaled`, computed in float32 or wider and rounded once."""
    wide = torch.promote_types(w.dtype, torch.float32)
    x = x.to(wide)
    return rescaled(x, x - w.to(wide), mask, alpha.to(wide), eta_lam).to(w.dtype)  # type: ignore[arg-type]


def p_norm_decay(w: Tensor, x: Tensor, p: float, eta_lam: float | Tensor, zero_initialised: Tensor) -> Tensor:
    """w / (1 + p*eta*lam * |x|**(p-2)): the authors' w * X / (X + p*eta*lam) with X = |x|**(2-p).

    This form does not overflow at large ``x``. Where eta*lam is 0 it returns w. For p below 2 a weight that was exactly
    0 becomes 0, except in a tensor that was 0 as a whole (``zero_initialised``), which could otherwise never train.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    strength = torch.as_tensor(p * eta_lam, dtype=wide, device=w.device) * ~zero_initialised
    return shrunk(w.to(wide), x.to(wide), strength, p - 2).to(w.dtype)  # type: ignore[arg-type]


def sums(
    mask: Tensor, moved: Tensor, x: Tensor, step: Tensor | None = None, w: Tensor | None = None, leak: float = 0.0
) -> Tensor:
    """Five sums over the elements of one tensor, for monitors, as a tensor of shape (5,) in the type of `exact`.

        sum mask,    sum 1[u*x > 0],    sum (share*x)**2,    sum (eta*u)**2,    sum w**2

    ``moved`` is `aligned` with ``strict``, ``step`` eta*u, ``w`` the weight after the step. None gives a sum of 0.
    """
    wide = exact(x.device)
    squares = [None if t is None else t.to(wide).square() for t in (share(x, mask, leak) * x, step, w)]
    zero = torch.zeros((), dtype=wide, device=x.device)
    return torch.stack([zero if t is None else t.sum(dtype=wide) for t in (mask, moved, *squares)])


def squares(ts: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor; all of one device and type."""
    norms = torch._foreach_norm([t.to(torch.promote_types(t.dtype, torch.float32)) for t in ts])
    return torch.stack(norms).to(exact(ts[0].device)).square()


def exact(device: torch.device) -> torch.dtype:
    """The type of sums over whole tensors: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- random numbers

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
