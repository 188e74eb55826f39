"""Every backend computes what rules.py defines, for all sizes, strides, types and values.

A backend is tested where it can run. The Triton kernels need a card, or the interpreter in a process of its own:

TRITON_INTERPRET=1 pytest tests/test_kernels.py -k triton

The expected values are computed on the CPU, wherever the kernels run: there torch rounds each operation separately, as
rules.py is written. The Triton kernels must equal them bit for bit, with two exceptions. The p-norm decay uses
libdevice's logarithm, ex2.approx.ftz and div.full (2 units each; a power below 2**-126 is 0). A momentum's direction is
fused. The interpreter shows neither: it rounds the direction twice. tests/test_triton_compiled.py checks that there
are no other exceptions.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from support import both_paths, net, train, update_of, values
from test_stochastic_rounding import draws, sigmas, weights
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay, kernels, rules, updates
from cwd_wrap.buckets import Coming, Stepped, Whole
from cwd_wrap.draws import Draws
from cwd_wrap.kernels import _eager
from cwd_wrap.tensors import Shard

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MIXED = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.float64),
]
# Around the sizes at which a kernel packs tensors, cuts them into blocks or chunks, or has a masked rest.
SIZES = [0, 1, 7, 1023, 1024, 1025, 1 << 14, (1 << 14) + 1, (1 << 15) + 1027]
SHAPES = [(0,), (), (129, 3), *((n,) for n in SIZES[1:])]
FEW = SHAPES[:6]
PAIRS = {"adam": (0.9, 1 - 0.9), "gan": (0.5, 0.5), "beta 0.3": (0.3, 0.7), "sgd": (0.9, 1.0), "maximize": (0.9, -0.1)}

all_types = pytest.mark.parametrize("dtype", DTYPES, ids=str)
strict_or_not = pytest.mark.parametrize("strict", [False, True])
narrow_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities and NaN


# ---- where the kernels run


@dataclass(frozen=True)
class Place:
    """A backend on a device. The tensors of a test are made on that device."""

    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    def __getattr__(self, kernel: str) -> Any:
        return getattr(kernels.choose(self.name, torch.device(self.device)), kernel)

    def some(self, shape: int | tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        size = (shape,) if isinstance(shape, int) else shape
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def many(self, dtype: torch.dtype, seed: int, shapes: Iterable[Any] = SHAPES) -> list[Tensor]:
        """A tensor of each shape, different ones for seeds that are 100 apart."""
        return [self.some(shape, dtype, i + seed) for i, shape in enumerate(shapes)]

    def special(self, columns: int) -> list[Tensor]:
        """All combinations of the special numbers."""
        return [
            t.reshape(-1).to(self.device) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * columns, indexing="ij")
        ]

    def equal(self, one: Tensor, other: Tensor) -> bool:
        """Bit for bit; NaN equals NaN.

        The interpreter truncates to 16-bit types, so there one unit in the last place is allowed. On a card torch fuses
        multiplications with additions, so eager may differ by some roundings of numbers of size 1.
        """
        one, other = one.cpu(), other.cpu()
        if self.name == "eager" and self.device == "cuda":
            return fused_apart(one, other)
        if self.name == "triton" and self.device == "cpu" and one.element_size() == 2:
            return bool(((one.view(torch.int16).int() - other.view(torch.int16).int()).abs() <= 1).all())
        return torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))

    def close(self, one: Tensor, other: Tensor, ulps: int = 16) -> bool:
        """Within ``ulps`` units in the last place (one of 16-bit types), on a card, which approximates, twice as many.

        exp2(y * log2|x|) has an error of up to |y * log2|x|| units, here below 2 * 12.
        """
        one, other = one.cpu(), other.cpu()
        on_card = self.device == "cuda"
        same = (one == other) | one.isnan() & other.isnan()
        units = 1 if one.element_size() == 2 else ulps * (1 + on_card)
        return bool((same | ((one - other).abs() <= units * torch.finfo(one.dtype).eps * other.abs())).all())

    def all_equal(self, some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
        return all(self.equal(one, other) for one, other in zip(some, others, strict=True))


def fused_apart(one: Tensor, other: Tensor) -> bool:
    """Do they differ by no more than fused and separate roundings?

    Each number must be within 8 roundings, except at most one in a hundred, where the terms of a sum nearly cancel.
    Those must be within 8 roundings of the terms, which are of size 8 or less.
    """
    eps = torch.finfo(one.dtype).eps
    one, other = one.double(), other.double()
    gap = torch.where((one == other) | one.isnan() & other.isnan(), 0.0, (one - other).abs())
    cancelled = gap > 8 * eps * other.abs()
    return bool((gap <= 8 * eps * (other.abs() + 8)).all()) and int(cancelled.sum()) <= 2 + one.numel() // 100


def places() -> list[Any]:
    devices = {"cpu": (), "cuda": pytest.mark.gpu} if torch.cuda.is_available() else {"cpu": ()}
    known = [name for name in kernels.BACKENDS if importlib.util.find_spec(f"cwd_wrap.kernels._{name}")]
    return [
        pytest.param(Place(name, device), marks=marks, id=f"{name}-{device}")
        for device, marks in devices.items()
        for name in known
        if kernels.obstacle(name, torch.device(device)) is None
    ]


@pytest.fixture(params=places())
def on(request: pytest.FixtureRequest) -> Place:
    return request.param


# ---- the values expected by rules.py


def on_the_cpu(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``rule`` with its tensors moved to the CPU."""

    @functools.wraps(rule)
    def there(*args: Any) -> Tensor:
        return rule(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))

    return there


@on_the_cpu
def expected_along(
    x: Tensor, m: Tensor | None, g: Tensor, a: float, b: float, eta_lam: float | Tensor, strict: bool = False,
    leak: float = 0.0,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    return rules.decay(x, x, rules.aligned(direction(m, g, a, b, wide), x.to(wide), strict), eta_lam, leak)


def direction(m: Tensor | None, g: Tensor, a: float, b: float, wide: torch.dtype) -> Tensor:
    if m is None:
        return b * g.to(wide)
    m, g = m.to(wide), g.to(wide)
    slope = torch.tensor(b if b == 1 - a else b / a, dtype=wide)
    if b != 1 - a:
        return fused(slope, g, m)
    return fused(slope, g - m, m) if b < 0.5 else fused(slope - 1, g - m, g)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a*b + c with one rounding: float64 holds products of two float32 exactly."""
    return (a.double() * b.double() + c.double()).to(b.dtype)


@on_the_cpu
def expected_after(w: Tensor, x: Tensor, eta_lam: float | Tensor, strict: bool = False, leak: float = 0.0) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    return rules.decay(w, x, rules.moved_towards_zero(x.to(wide), w.to(wide), strict), eta_lam, leak)


@on_the_cpu
def expected_update(w: Tensor, x: Tensor, g: Tensor, eta_lam: float | Tensor, scale: str | None = "mean") -> Tensor:
    mask = rules.agrees(w, x, g)
    kept = mask.sum().to(torch.promote_types(w.dtype, torch.float32))
    return rules.cautious_update(w, x, mask, rules.alpha(kept, torch.tensor(w.numel()), scale), eta_lam)


@on_the_cpu
def expected_shrink(w: Tensor, x: Tensor, p: float, eta_lam: float | Tensor) -> Tensor:
    return rules.p_norm_decay(w, x, p, eta_lam, x.count_nonzero() == 0)


def expected_whole(bucket: Whole, i: int, strict: bool = False, leak: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """(the sums of tensor ``i``, the values to be written to it and its state), computed before a step on the CPU."""
    if bucket.update.averages:
        x, u, s, numbers, eta_lam = before_update(bucket, i)
        mask = rules.aligned(u, x, strict)
        after, step, *new = getattr(rules, bucket.update.formula)(
            u, x, rules.taken(x, mask, float(eta_lam), leak), *s, *numbers
        )
    else:
        x, _, u, step, new, eta_lam = expected_of_update(bucket, i)
        mask = rules.aligned(u, x, strict)
        after = rules.decay(x - step, x, mask, eta_lam, leak)
    written = [after, *new]
    sums = rules.sums(mask, rules.aligned(u, x, strict=True), x, step, written[0], leak)
    return sums, in_types_of(bucket, i, written)


def expected_update_whole(bucket: Whole, i: int, scale: str | None) -> tuple[int, list[Tensor]]:
    """(how many of the updates of tensor ``i`` are kept, what the cautious update is to write)."""
    x, g, u, step, new, eta_lam = expected_of_update(bucket, i)
    mask = rules.aligned(u, g, strict=True)
    alpha = rules.alpha(mask.sum().to(x.dtype), torch.tensor(x.numel()), scale)
    return int(mask.sum()), in_types_of(bucket, i, [rules.rescaled(x, step, mask, alpha, eta_lam), *new])


def expected_shrink_whole(bucket: Whole, i: int, p: float) -> list[Tensor]:
    """What the p-norm decay is to write."""
    x, _, _, step, new, eta_lam = expected_of_update(bucket, i)
    return in_types_of(bucket, i, [rules.p_norm_decay(x - step, x, p, eta_lam, x.count_nonzero() == 0), *new])


def in_types_of(bucket: Whole, i: int, written: Sequence[Tensor]) -> list[Tensor]:
    columns = [column[i] for column in (bucket.w, *bucket.state)]
    return [value.to(old.dtype) for value, old in zip(written, columns, strict=False)]  # no state, no column


def before_update(bucket: Whole, i: int) -> tuple[Any, ...]:
    """x, the gradient that is descended, the state, the formula's numbers, and eta*lam of tensor ``i``, on the CPU."""
    update = bucket.update
    lr, eta_lam = (rate.cpu() if isinstance(rate, Tensor) else rate for rate in (bucket.lr, bucket.eta_lam))
    w, g, *state = (column[i].cpu() for column in bucket.columns)
    x = w.to(torch.promote_types(w.dtype, torch.float32))
    g = -g.to(x.dtype) if update.maximize else g.to(x.dtype)
    counters = [float(column[i]) for column in bucket.counters]
    (((numbers, _),), _) = update.steps(float(lr), [tuple(counters)])
    s: list[Tensor | None] = [each.to(x.dtype) for each in state]
    return x, g, s, numbers, eta_lam


def expected_of_update(bucket: Whole, i: int) -> tuple[Any, ...]:
    """x, the gradient that is descended, direction, eta*u, new state, and eta*lam of tensor ``i``, on the CPU."""
    x, g, s, numbers, eta_lam = before_update(bucket, i)
    formula = getattr(rules, bucket.update.formula)
    s += [None] * (len(inspect.signature(formula).parameters) - 1 - len(numbers) - len(s))
    u, step, *new = formula(g, *s, *numbers)
    return x, g, u, step, new, eta_lam


def same_sums(on: Place, sums: Tensor, expected: Sequence[Tensor], of: Sequence[Tensor]) -> bool:
    """Are the counts equal, except where torch fuses on a card, and the squares to 1e-4, since float32 may sum them?"""
    sums, rows = (t.where(~(t > 3e38), torch.inf) for t in (sums.cpu(), torch.stack(list(expected))))
    slack = 1e-5 * torch.tensor([t.numel() for t in of])[:, None] if str(on) == "eager-cuda" else 0.5
    counts = (sums[:, :2] - rows[:, :2]).abs() <= slack
    return bool(counts.all()) and torch.allclose(sums[:, 2:], rows[:, 2:], rtol=1e-4, equal_nan=True)


# ---- the calls, with one bucket unless the test is about several


def along(
    on: Place,
    w: Any,
    m: Any,
    g: Any,
    pair: tuple[float, float],
    eta_lam: Any,
    strict: bool = False,
    count: bool = False,
) -> Any:
    return on.decay_along([Coming(w, g, m, *pair, eta_lam)], strict=strict, count=count)


def after(on: Place, w: Any, x: Any, eta_lam: Any, strict: bool = False, count: bool = False) -> Any:
    return on.decay_from_snapshot([Stepped(w, w, x, None, eta_lam)], strict=strict, count=count)


def update(on: Place, w: Any, x: Any, g: Any, eta_lam: Any, scale: str | None = "mean") -> Tensor:
    """Make the cautious update with the calls of the wrapper; return the counts."""
    buckets = [Stepped(w, w, x, g, eta_lam)]
    counts = on.count_agreeing(buckets)
    numel = on.vector([t.numel() for t in w], torch.device(on.device))
    kept = counts.to(torch.promote_types(w[0].dtype, torch.float32))
    on.cautious_update(buckets, rules.alpha(kept, numel, scale))
    return counts


def shrink(on: Place, w: Any, x: Any, p: float, eta_lam: Any) -> Tensor:
    """Make the p-norm decay with the calls of the wrapper; return the counts."""
    counts = on.count_nonzero(x)
    on.p_norm_decay([Stepped(w, w, x, None, eta_lam)], p, counts)
    return counts


def whole(on: Place, *buckets: Whole, strict: bool = False, leak: float = 0.0, count: bool = False) -> Any:
    return on.step_whole(list(buckets), strict=strict, own=leak, count=count)


def update_whole(on: Place, buckets: Sequence[Whole], scale: str | None = "mean") -> Tensor:
    """Step with the cautious update, with the calls of the wrapper; return the counts."""
    counts = on.count_agreeing(buckets)
    numel = on.vector([t.numel() for bucket in buckets for t in bucket.w], torch.device(on.device))
    alpha = rules.alpha(counts.to(torch.promote_types(buckets[0].w[0].dtype, torch.float32)), numel, scale)
    on.step_whole(buckets, method="with_caution", factor=None if scale is None else alpha, count=False)
    return counts


def shrink_whole(on: Place, buckets: Sequence[Whole], p: float) -> None:
    """Step with the p-norm decay, with the calls of the wrapper."""
    w = [t for bucket in buckets for t in bucket.w]
    wide = torch.promote_types(w[0].dtype, torch.float32)
    factor = (on.count_nonzero(w) != 0).to(wide) * p
    on.step_whole(buckets, method="with_p_norm", factor=factor, own=p - 2, count=False)


# ---- before and after the step


@strict_or_not
@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_along_equals_the_rule(on: Place, pair: tuple[float, float], strict: bool) -> None:
    """Decay along a momentum, over tensors of every size in one call, is the rule on each."""
    w, m, g = (on.many(torch.float32, k) for k in (0, 100, 200))
    expected = [expected_along(*row, *pair, 0.3, strict) for row in zip(w, m, g, strict=True)]
    along(on, w, m, g, pair, 0.3, strict)

    assert on.all_equal(w, expected)


@pytest.mark.parametrize("b", [1.0, -1.0, 0.3])
@all_types
def test_along_a_gradient_equals_the_rule(on: Place, dtype: torch.dtype, b: float) -> None:
    """The same holds along the gradient alone, in every type; a negative b maximizes."""
    w, g = (on.many(dtype, k) for k in (0, 100))
    expected = [expected_along(x, None, y, 0.0, b, 0.3) for x, y in zip(w, g, strict=True)]
    along(on, w, None, g, (0.0, b), 0.3)

    assert on.all_equal(w, expected)


@strict_or_not
@all_types
def test_from_snapshot_equals_the_rule(on: Place, dtype: torch.dtype, strict: bool) -> None:
    """Decay from a snapshot, over tensors of every size in one call, is the rule on each."""
    w, x = (on.many(dtype, k) for k in (0, 100))
    expected = [expected_after(*pair, 0.3, strict) for pair in zip(w, x, strict=True)]
    after(on, w, x, 0.3, strict)

    assert on.all_equal(w, expected)


def test_a_large_tensor(on: Place) -> None:
    """A tensor of more than a million weights is decayed to its last one, and summed."""
    w, x = (on.some((1 << 20) + 3, torch.float32, k) for k in (0, 1))
    expected, step = expected_after(w, x, 0.3), (x - w).cpu()
    masks = [rules.moved_towards_zero(x, w, only).cpu() for only in (False, True)]
    sums = after(on, [w], [x.clone()], 0.3, count=True)

    assert on.equal(w, expected)
    assert same_sums(on, sums, [rules.sums(*masks, x.cpu(), step, expected)], [w])


@pytest.mark.parametrize("types", [(dtype,) * 3 for dtype in DTYPES] + MIXED, ids=str)
def test_types_may_differ(on: Place, types: tuple[torch.dtype, ...]) -> None:
    """Weights, momenta and gradients may differ in type; kernels compute in float32, or float64 for such weights."""
    w, m, g = (on.some(1500, dtype, seed) for seed, dtype in enumerate(types))
    expected = expected_along(w, m, g, *PAIRS["adam"], 0.3)
    along(on, [w], [m], [g], PAIRS["adam"], 0.3)

    assert on.equal(w, expected)


@strict_or_not
@pytest.mark.parametrize("repeat", [1, 10])  # packed with other small tensors, or cut into blocks
def test_special_values(on: Place, strict: bool, repeat: int) -> None:
    """Every combination of signed zeros, denormals, huge numbers, infinities and NaN gives what rules.py gives."""
    one, other, third = (t.repeat(repeat) for t in on.special(3))
    if on.name == "eager":  # without two denormals and infinite updates, which its scaled product gets wrong
        infinite = torch.stack([other, direction(other, third, *PAIRS["adam"], torch.float32), one - other]).isinf()
        seen = (torch.stack([one, other, third]).abs() != 1e-45).all(0) & ~infinite.any(0)
        one, other, third = one[seen], other[seen], third[seen]
    by_momentum, by_gradient, stepped = one.clone(), one.clone(), one.clone()
    along(on, [by_momentum], [other], [third], PAIRS["adam"], 0.3, strict)
    along(on, [by_gradient], None, [other], (0.0, 1.0), 0.3, strict)
    after(on, [stepped], [other], 0.3, strict)

    assert on.equal(by_momentum, expected_along(one, other, third, *PAIRS["adam"], 0.3, strict))
    assert on.equal(by_gradient, expected_along(one, None, other, 0.0, 1.0, 0.3, strict))
    assert on.equal(stepped, expected_after(one, other, 0.3, strict))


def test_the_sign_of_zero_is_that_of_the_rule(on: Place) -> None:
    """A weight of 0.0 or -0.0, decayed or not, gets the sign of zero that rules.py gives it."""
    w = torch.tensor([-0.0, 0.0, -0.0, 0.0], device=on.device)
    g = torch.tensor([1.0, 1.0, -1.0, -1.0], device=on.device)
    expected = expected_along(w, None, g, 0.0, 1.0, 0.3)
    along(on, [w], None, [g], (0.0, 1.0), 0.3)

    assert torch.equal(torch.signbit(w.cpu()), torch.signbit(expected))


def test_other_coefficients(on: Place) -> None:
    """Where a and b do not add up to 1 (SGD), the sign is that of a*m + b*g; a negative b maximizes."""
    m, g = (torch.tensor(t, device=on.device) for t in ([1.0, 1.0, -1.0, 0.0], [-2.0, 0.5, 3.0, 0.0]))
    for b in (1.0, -1.0):
        w = torch.ones(4, device=on.device)
        along(on, [w], [m], [g], (0.9, b), 0.5, strict=True)

        assert w.tolist() == [0.5 if 0.9 * mi + b * gi > 0 else 1.0 for mi, gi in zip(m, g, strict=True)]


def test_thousands_of_small_tensors(on: Place) -> None:
    """Two thousand tensors of 1 to 13 weights are decayed in one call."""
    w, x = (on.many(torch.float32, k, (1 + i % 13 for i in range(2000))) for k in (0, 5000))
    expected = [expected_after(*pair, 0.3) for pair in zip(w, x, strict=True)]
    after(on, w, x, 0.3)

    assert on.all_equal(w, expected)


def test_each_bucket_has_its_own_numbers(on: Place) -> None:
    """Coefficients and eta*lam may differ between buckets; eta*lam may be a number or a tensor of any type."""
    w, m, g = (on.many(torch.float32, k, [50] * 8) for k in (0, 50, 100))
    pairs = [(0.9, 1 - 0.9), (0.9, 1.0), (0.5, 0.5), (0.9, -0.1), (0.0625, 3.0)]
    tensors = [torch.tensor(t, device=on.device) for t in (0.2, [0.0, 0.5])]
    eta_lam = [0.1, tensors[0], torch.tensor([0.25], dtype=torch.float64, device=on.device), 0.1, tensors[1][1]]
    cuts = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 7), slice(7, 8)]
    rows = list(zip(cuts, pairs, eta_lam, strict=True))
    expected = [expected_along(*row, *pair, c) for at, pair, c in rows for row in zip(w[at], m[at], g[at], strict=True)]
    buckets = [Coming(w[at], g[at], m[at], *pair, c) for at, pair, c in rows]
    on.decay_along(buckets, strict=False, count=False)

    assert on.all_equal(w, expected)


@pytest.mark.parametrize("shape", [50, (1 << 14) + 1])
def test_a_tensor_strength(on: Place, shape: int) -> None:
    """eta*lam as a tensor gives what the number gives; changed in place, it gives the new value at the next call."""
    eta_lam, x = torch.tensor(0.25, device=on.device), on.some(shape, torch.float32, 1)
    for value in (0.25, 0.5):
        number, tensor = on.some(shape, torch.float32, 0), on.some(shape, torch.float32, 0)
        eta_lam.fill_(value)
        after(on, [number], [x], value)
        after(on, [tensor], [x], eta_lam)

        assert torch.equal(number, tensor)


@strict_or_not
@all_types
def test_a_leak_equals_the_rule(on: Place, dtype: torch.dtype, strict: bool) -> None:
    """Before and after the step, weights outside the mask take the leak's part of the decay; the sums say how much."""
    for leak in (0.25, 1.0):
        w, x, g = (on.many(dtype, k) for k in (0, 100, 200))
        moved = [rules.moved_towards_zero(*(t.cpu() for t in pair), strict) for pair in zip(x, w, strict=True)]
        expected = [expected_after(*pair, 0.3, strict, leak) for pair in zip(w, x, strict=True)]
        taken = [
            float((rules.share(t.cpu().double(), m, leak) * t.cpu()).square().sum())
            for t, m in zip(x, moved, strict=True)
        ]
        sums = on.decay_from_snapshot([Stepped(w, w, x, None, 0.3)], strict=strict, leak=leak, count=True)

        assert on.all_equal(w, expected)
        assert sums[:, 2].tolist() == pytest.approx(taken, rel=1e-4)
        assert sums[:, 0].tolist() == [int(m.sum()) for m in moved]
        for m, pair in ((x, PAIRS["adam"]), (None, (0.0, 1.0))):
            rows = list(zip(w, [None] * len(w) if m is None else m, g, strict=True))
            along_it = [expected_along(*row, *pair, 0.3, strict, leak) for row in rows]
            on.decay_along([Coming(w, g, m, *pair, 0.3)], strict=strict, leak=leak, count=False)

            assert on.all_equal(w, along_it)


@strict_or_not
@all_types
def test_sums_along_a_direction(on: Place, dtype: torch.dtype, strict: bool) -> None:
    """The sums for a monitor are `rules.sums` of each tensor; those of the step are 0, since it is still to come."""
    w, m, g = (on.many(dtype, k) for k in (0, 100, 200))
    g[-1][:5], m[-1][:5] = 0.0, 0.0  # not masked if strict
    for momentum, pair in ((None, (0.0, -1.0)), (m, PAIRS["gan"])):
        expected = []
        for i, x in enumerate(t.cpu() for t in w):
            wide = torch.promote_types(x.dtype, torch.float32)
            u = direction(None if momentum is None else m[i].cpu(), g[i].cpu(), *pair, wide)
            masks = [rules.aligned(u, x.to(wide), only) for only in (strict, True)]
            expected.append(rules.sums(*masks, x))
        sums = along(on, [t.clone() for t in w], momentum, g, pair, 0.3, strict, count=True)

        assert same_sums(on, sums, expected, w)


@strict_or_not
@all_types
def test_sums_from_a_snapshot(on: Place, dtype: torch.dtype, strict: bool) -> None:
    """After the step all of `rules.sums` is known for each tensor, also without a decay (`sums_of_step`)."""
    w, x = (on.many(dtype, k) for k in (0, 100))
    w[-1][:5] = x[-1][:5]
    expected, of_step = [], []
    for after_, before in zip((t.cpu() for t in w), (t.cpu() for t in x), strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        masks = [rules.moved_towards_zero(before, after_, only) for only in (strict, True)]
        step, none = before.to(wide) - after_.to(wide), torch.zeros_like(masks[0])
        expected.append(rules.sums(*masks, before, step, rules.decay(after_.to(wide), before.to(wide), masks[0], 0.3)))
        of_step.append(rules.sums(none, none, before, step, after_))

    assert same_sums(on, on.sums_of_step([Stepped(w, w, x, None, 0.3)]), of_step, w)
    assert same_sums(on, after(on, w, x, 0.3, strict, count=True), expected, w)


def test_empty_tensors(on: Place) -> None:
    """Empty tensors are accepted, and all their counts and sums are 0."""
    empty = [torch.empty(0, device=on.device), torch.empty(0, 3, device=on.device)]
    on.copy(empty, empty)

    assert after(on, empty, empty, 0.3, count=True).tolist() == [[0.0] * 5] * 2
    assert along(on, empty, None, empty, (0, 1), 1, count=True).tolist() == [[0.0] * 5] * 2
    assert update(on, empty, empty, empty, 0.3).tolist() == shrink(on, empty, empty, 0.8, 0.3).tolist() == [0, 0]


# ---- where the tensors lie


@pytest.mark.parametrize("n", [100, 5000])
def test_strides_do_not_matter(on: Place, n: int) -> None:
    """Transposed, strided, expanded and channels_last tensors, and companions of other strides, give the same."""
    base, x = on.some((4, n), torch.float32, 0), on.some((4, n), torch.float32, 1)
    expected = expected_after(base, x, 0.3)
    gaps = torch.zeros(4, 2 * n, device=on.device)
    last = base.view(1, 2, 2, n).clone(memory_format=torch.channels_last)
    w = [base.t().contiguous().t(), gaps[:, ::2].copy_(base), base.clone(), last]
    after(on, w, [x, x, x.t().contiguous().t(), x.view(1, 2, 2, n)], 0.3)

    assert all(on.equal(t.reshape(4, n), expected) for t in w)
    assert not gaps[:, 1::2].any()


def test_an_expanded_gradient(on: Place) -> None:
    """The gradient of a sum, one number expanded, is read with its full shape."""
    w, g = on.some((3, 50), torch.float32, 0), torch.ones(1, device=on.device).expand(3, 50)
    expected = expected_along(w, None, g, 0.0, 1.0, 0.3)
    along(on, [w], None, [g], (0.0, 1.0), 0.3)

    assert on.equal(w, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_at_odd_offsets(on: Place, dtype: torch.dtype) -> None:
    """Views of a flat buffer may begin at any offset, and the numbers between them do not change."""
    w, x, g = (on.some(4000, dtype, k) for k in range(3))
    edges = list(pairwise((1, 8, 1033, 2500, 3999)))
    for act, wanted in (
        (lambda w, x, _: after(on, w, x, 0.3), lambda w, x, _: expected_after(w, x, 0.3)),
        (lambda w, x, g: update(on, w, x, g, 0.3), lambda *row: expected_update(*row, 0.3)),
        (lambda w, x, _: shrink(on, w, x, 0.8, 0.3), lambda w, x, _: expected_shrink(w, x, 0.8, 0.3)),
    ):
        flat, expected = w.clone(), w.clone()
        for a, b in edges:
            expected[a:b] = wanted(w[a:b], x[a:b], g[a:b])
        act(*([t[a:b] for a, b in edges] for t in (flat, x, g)))

        assert on.close(flat, expected)


@all_types
def test_copy(on: Place, dtype: torch.dtype) -> None:
    """A copy is bit for bit, from aligned addresses and from others, whatever the strides."""
    numbers = on.some(5000, dtype, 0)
    special = torch.tensor(SPECIAL, device=on.device).to(dtype)
    source = [special, numbers[:0], numbers, numbers[1:], numbers[:60].view(6, 10).t()]
    to = [torch.full_like(t, 7) for t in source]
    on.copy(to, source)

    assert all(torch.equal(a.nan_to_num(5), b.nan_to_num(5)) for a, b in zip(to, source, strict=True))


# ---- the siblings, which count each tensor first


@pytest.mark.parametrize("scale", ["mean", "numel", None])
@all_types
def test_cautious_update_equals_the_rule(on: Place, dtype: torch.dtype, scale: str | None) -> None:
    """The cautious update, over tensors of every size, is the rule on each, and its counts are right."""
    w, x, g = (on.many(dtype, k) for k in (0, 100, 200))
    kept = [int(rules.agrees(*row).sum()) for row in zip(w, x, g, strict=True)]
    expected = [expected_update(*row, 0.3, scale) for row in zip(w, x, g, strict=True)]

    assert update(on, w, x, g, 0.3, scale).tolist() == kept
    assert on.all_equal(w, expected)


@pytest.mark.parametrize("p", [0.2, 0.8, 1.0, 1.5, 2.0])
@all_types
def test_p_norm_decay_equals_the_rule(on: Place, dtype: torch.dtype, p: float) -> None:
    """The p-norm decay, over tensors of every size, is the rule on each; one is 0 as a whole."""
    w, x = (on.many(dtype, k) for k in (0, 100))
    x[4].zero_()
    x[5][::2] = 0
    nonzero = [int(t.count_nonzero()) for t in x]
    expected = [expected_shrink(*row, p, 0.3) for row in zip(w, x, strict=True)]
    kept = w[4].clone()

    assert shrink(on, w, x, p, 0.3).tolist() == nonzero
    assert all(map(on.close, w, expected))
    assert torch.equal(w[4], kept)
    assert p == 2 or not w[5][::2].any()


def test_special_values_of_the_siblings(on: Place) -> None:
    """Every combination of special values gives what rules.py gives, at every p and rate."""
    w, x, g = on.special(3)
    for scale in ("mean", None):
        updated = w.clone()
        update(on, [updated], [x], [g], 0.3, scale)

        assert on.equal(updated, expected_update(w, x, g, 0.3, scale)), scale
    for p in (0.2, 0.8, 1.0, 1.5, 2.0):
        for eta_lam in (0.0, 1e-6, 0.3, torch.tensor(0.3, device=on.device), torch.tensor(0.0, device=on.device)):
            shrunk = w.clone()
            shrink(on, [shrunk], [x], p, eta_lam)

            assert on.close(shrunk, expected_shrink(w, x, p, eta_lam), ulps=256), (p, eta_lam)  # 2 * 150 at 1e-45


def test_the_siblings_with_many_small_tensors(on: Place) -> None:
    """Three hundred tensors of 0 to 12 weights: each has a count and a factor of its own."""
    w, x, g = (on.many(torch.float32, k, (i % 13 for i in range(300))) for k in (0, 5000, 10_000))
    for t in x[::7]:
        t.zero_()
    updated, shrunk = ([t.clone() for t in w] for _ in range(2))
    update(on, updated, x, g, 0.3)
    shrink(on, shrunk, x, 0.8, 0.3)

    assert on.all_equal(updated, (expected_update(*row, 0.3) for row in zip(w, x, g, strict=True)))
    assert all(map(on.close, shrunk, (expected_shrink(*row, 0.8, 0.3) for row in zip(w, x, strict=True))))


def test_the_siblings_with_other_strides(on: Place) -> None:
    """Transposed and strided weights, and companions of other strides, give the same."""
    flat, x, g = (on.some((40, 100), torch.float32, k) for k in range(3))
    gaps = torch.zeros(40, 200, device=on.device)
    for act, expected in (
        (lambda w, x, g: update(on, w, x, g, 0.3), expected_update(flat, x, g, 0.3)),
        (lambda w, x, _: shrink(on, w, x, 0.8, 0.3), expected_shrink(flat, x, 0.8, 0.3)),
    ):
        w = [gaps[:, ::2].copy_(flat), flat.t().contiguous().t()]
        act(w, [x.t().contiguous().t(), x], [g, g])

        assert all(on.close(t, expected) for t in w)
        assert not gaps[:, 1::2].any()


def test_the_siblings_read_a_strength_afresh(on: Place) -> None:
    """Each bucket has its own eta*lam, a number or a tensor that is read at each call."""
    half = torch.tensor(0.5, device=on.device)
    eta_lam = [0.1, half, torch.tensor([0.25], dtype=torch.float64, device=on.device)]
    alpha, nonzero = (torch.tensor(t, device=on.device) for t in ([1.0, 2.0, 3.0], [1, 0, 50]))
    for value in (0.5, 0.01):
        half.fill_(value)
        w, x, g = (on.many(torch.float32, k, [50] * 3) for k in (0, 50, 100))
        updated, shrunk = ([t.clone() for t in w] for _ in range(2))
        on.cautious_update(
            [Stepped([a], [a], [b], [c], d) for a, b, c, d in zip(updated, x, g, eta_lam, strict=True)], alpha
        )
        on.p_norm_decay(
            [Stepped([a], [a], [b], None, d) for a, b, d in zip(shrunk, x, eta_lam, strict=True)], 0.8, nonzero
        )
        for i, c in enumerate(eta_lam):
            mask = rules.agrees(w[i], x[i], g[i])

            assert on.equal(updated[i], rules.cautious_update(w[i], x[i], mask, alpha[i], c))
            assert on.close(shrunk[i], rules.p_norm_decay(w[i], x[i], 0.8, c, nonzero[i] == 0))


def test_vector(on: Place) -> None:
    """Numbers become a tensor of integers on the device."""
    numbers = on.vector([8, 0, 1 << 40], torch.device(on.device))

    assert numbers.tolist() == [8, 0, 1 << 40]
    assert (numbers.device.type, numbers.dtype) == (on.device, torch.int64)


# ---- the whole step


# The optimizers of these may not be installed. The numbers of a schedule are k, r, weight_sum, lr_max and its power.
LION = updates.Update("lion", ("exp_avg",), (0.9, 0.99), updates._of_lion)
SCHEDULE = (3.0, 0.5, 7.0, 2.0, 1.0)
FREE_SGD = updates.Update("free_sgd", ("z",), (8.0, 0.9, *SCHEDULE), updates._of_free_sgd, averages=True)
FREE_ADAM = updates.Update(
    "free_adam", ("z", "exp_avg_sq"), (8.0, 0.9, 0.99, 1e-8, *SCHEDULE), updates._of_free_adamw, averages=True
)
UPDATES: dict[str, updates.Update] = {
    "adam": update_of(Adam),
    "adam, beta 0": update_of(Adam, betas=(0.0, 0.0)),
    "adam, maximize": update_of(Adam, maximize=True),
    "amsgrad": update_of(Adam, betas=(0.9, 0.99), amsgrad=True),
    "amsgrad, maximize": update_of(Adam, amsgrad=True, maximize=True),
    "sgd": update_of(SGD),
    "sgd, maximize": update_of(SGD, maximize=True),
    "sgd, momentum": update_of(SGD, momentum=0.9),
    "sgd, dampening, maximize": update_of(SGD, momentum=0.9, dampening=0.1, maximize=True),
    "sgd, nesterov": update_of(SGD, momentum=0.9, nesterov=True),
    "lion": LION,
    "lion, beta 0": replace(LION, options=(0.0, 0.0)),
    "lion, maximize": replace(LION, options=(0.95, 0.98), maximize=True),
    "free_sgd": FREE_SGD,
    "free_sgd, first step": replace(FREE_SGD, options=(0.0, 0.9, 0.0, 0.0, 0.0, -1.0, 2.0)),
    "free_adam": FREE_ADAM,
    "free_adam, betas 0": replace(FREE_ADAM, options=(0.0, 0.0, 0.0, 1e-8, *SCHEDULE)),
    "free_adam, not rectified": replace(FREE_ADAM, of_step=updates._of_free_radam, options=FREE_ADAM.options),
}
KERNELS = ("adam", "amsgrad", "sgd", "sgd, momentum", "lion", "free_sgd", "free_adam")
all_updates = pytest.mark.parametrize("name", UPDATES)
all_kernels = pytest.mark.parametrize("name", KERNELS)


def each_with_one(names: Sequence[str], options: Sequence[Any]) -> list[tuple[str, Any]]:
    """The first name with every option, each other one with one of them, in turn."""
    first, *others = names
    return [*((first, option) for option in options), *zip(others, cycle(options), strict=False)]


PAIRED = [name for name, update in UPDATES.items() if not update.averages]
"""Those that make a pair with each method."""


@pytest.fixture
def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make square roots round as in IEEE 754. On some CPUs torch's do not: MKL's are sometimes off by a unit."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: torch.sqrt(x.double()).to(x.dtype))


def shapes_for(name: str) -> list[Any]:
    """Every size for the first update, few for the others: the loop over the tensors is the same for all."""
    return SHAPES if name == "adam" else FEW


def a_bucket(
    on: Place,
    name: str,
    types: Sequence[torch.dtype],
    shapes: Iterable[Any] = SHAPES,
    lr: float | Tensor = 0.01,
    eta_lam: float | Tensor = 0.005,
) -> Whole:
    """Random weights, gradients and state of three types, and counters that differ."""
    update = UPDATES[name]
    shapes = list(shapes)
    w, g = on.many(types[0], 0, shapes), on.many(types[1], 100, shapes)
    state = tuple(on.many(types[2], 200 + 100 * k, shapes) for k in range(len(update.state_keys)))
    for column in state[1:]:  # squares
        for t in column:
            t.copy_(t.float().square() * 0.01 + 1e-3)
    steps = [torch.tensor(float(10**i - 1 if i < 4 else i), device=on.device) for i in range(len(shapes))]
    return Whole(w, g, state, (steps,) if update.counters else (), update, lr, eta_lam)


def equals_the_rule(on: Place, *buckets: Whole, strict: bool = False, leak: float = 0.0) -> bool:
    """Step once; do the weights, the state, the counters and the sums equal those of rules.py?"""
    expected = [[expected_whole(bucket, i, strict, leak) for i in range(len(bucket.w))] for bucket in buckets]
    steps = [[float(t) + 1 for column in bucket.counters for t in column] for bucket in buckets]
    sums = whole(on, *buckets, strict=strict, leak=leak, count=True)
    written = [
        on.all_equal((bucket.w[i], *(column[i] for column in bucket.state)), wanted)
        for bucket, of_bucket in zip(buckets, expected, strict=True)
        for i, (_, wanted) in enumerate(of_bucket)
    ]
    stepped = [[float(t) for column in bucket.counters for t in column] for bucket in buckets]
    of_rules = [of_one for of_bucket in expected for of_one, _ in of_bucket]
    summed = same_sums(on, sums, of_rules, [t for bucket in buckets for t in bucket.w])
    return all(written) and stepped == steps and summed


@strict_or_not
@all_updates
@pytest.mark.usefixtures("ieee")
def test_the_whole_step_equals_the_rule(on: Place, name: str, strict: bool) -> None:
    """Three steps over tensors of several sizes, at different counts, are the rule, state and count included.

    Each has another leak.
    """
    bucket = a_bucket(on, name, [torch.float32] * 3, shapes_for(name))
    for k, leak in enumerate((0.25, 0.0, 1.0)):
        bucket.g = on.many(torch.float32, 1000 + 100 * k, shapes_for(name))

        assert equals_the_rule(on, bucket, strict=strict, leak=leak)


@pytest.mark.parametrize(
    ("name", "types"),
    each_with_one(
        KERNELS, [(torch.bfloat16,) * 3, (torch.float16,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32), *MIXED]
    ),
    ids=str,
)
@pytest.mark.usefixtures("ieee")
def test_the_whole_step_in_other_types(on: Place, name: str, types: tuple[torch.dtype, ...]) -> None:
    """16-bit state is computed in float32 and rounded once; weights, gradients and state may differ in type."""
    assert equals_the_rule(on, a_bucket(on, name, types, [7, 1500]))


@all_updates
def test_the_whole_step_in_float64(on: Place, name: str) -> None:
    """float64 weights are computed in float64; only 1 - beta**t differs, by less than 1e-12."""
    bucket = a_bucket(on, name, [torch.float64] * 3, [7, 1500, 3])
    expected = [expected_whole(bucket, i)[1] for i in range(3)]
    whole(on, bucket)
    for i, wanted in enumerate(expected):
        for one, other in zip((bucket.w[i], *(column[i] for column in bucket.state)), wanted, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("t", [1, 2, 100, 100_000])
def test_the_bias_correction(on: Place, beta: float, t: int) -> None:
    """With gradient 1 at every step, m and v are 1 - beta**t, and the update is 1 to 10 digits."""
    of_t = 1 - beta**t if t > 1 else 1 - beta
    one = torch.ones(2, dtype=torch.float64, device=on.device)
    before = (of_t - (1 - beta)) / beta if beta else 0.0  # of step t - 1
    adam = update_of(Adam, betas=(beta, beta), eps=0.0)
    state = ([one * before], [one * before])
    bucket = Whole([one * 0], [one], state, ([torch.tensor(t - 1.0, device=on.device)],), adam, 1.0, 0.0)
    whole(on, bucket)

    assert bucket.w[0].tolist() == pytest.approx([-1.0, -1.0], rel=1e-10)


@strict_or_not
@all_kernels
@pytest.mark.usefixtures("ieee")
def test_special_values_of_the_whole_step(on: Place, name: str, strict: bool) -> None:
    """Every combination of signed zeros, denormals, huge numbers, infinities and NaN gives what rules.py gives."""
    w, g, m, v = on.special(4)
    state = {"adam": ([m], [v.abs()]), "amsgrad": ([m], [v.abs()], [m.abs()]), "sgd": ()}
    state = {**state, "free_adam": ([m], [v.abs()])}.get(name, ([m],))
    steps = ([torch.tensor(3.0, device=on.device)],) if UPDATES[name].counters else ()
    state = tuple([t.clone() for t in column] for column in state)

    assert equals_the_rule(on, Whole([w], [g], state, steps, UPDATES[name], 0.01, 0.3), strict=strict)


@all_kernels
@pytest.mark.usefixtures("ieee")
def test_the_whole_step_with_other_strides(on: Place, name: str) -> None:
    """Transposed, strided and channels_last weights with gradients and state of any strides are stepped in place."""
    n = 300
    bucket = a_bucket(on, name, [torch.float32] * 3, [(1, 2, 2, n)] * 5)
    gaps = torch.zeros(1, 2, 2, 2 * n, device=on.device)
    lay: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: gaps[..., ::2].copy_(t),
        lambda t: t.mean().expand(t.shape),
    ]
    bucket.w = [lay[k](t) for k, t in zip((1, 2, 3, 0, 1), bucket.w, strict=True)]
    bucket.g = [lay[k](t) for k, t in zip((1, 0, 2, 4, 0), bucket.g, strict=True)]
    bucket.state = tuple(
        [lay[k](t) for k, t in zip(order, column, strict=True)]
        for order, column in zip(((1, 0, 0, 2, 0), (1, 2, 1, 1, 0), (0, 0, 2, 1, 2)), bucket.state, strict=False)
    )

    assert equals_the_rule(on, bucket)
    assert not gaps[..., 1::2].any()


@all_kernels
@pytest.mark.usefixtures("ieee")
def test_the_whole_step_of_several_buckets(on: Place, name: str) -> None:
    """Each bucket has its own coefficients and rates; rates may be tensors, which are read at each call."""
    lr, eta_lam = torch.tensor(0.01, device=on.device), torch.tensor(0.005, device=on.device)
    buckets = [
        a_bucket(on, name, [torch.float32] * 3, [5, 2000], 0.1, 0.0),
        a_bucket(on, name, [torch.float32] * 3, [1100], lr, eta_lam),
        a_bucket(on, name, [torch.float32] * 3, [7], 0.02, torch.tensor([0.1], dtype=torch.float64, device=on.device)),
    ]
    mine = buckets[0].update
    alike = lambda u: (u.formula, u.state_keys) == (mine.formula, mine.state_keys)
    other = next(u for u in UPDATES.values() if alike(u) and u != mine)
    buckets[2].update = other
    for value in (0.25, 0.125):
        lr.fill_(value)
        eta_lam.fill_(value / 2)

        assert equals_the_rule(on, *buckets)


def same_step(on: Place, bucket: Whole, expected: Sequence[Sequence[Tensor]], close: bool = False) -> bool:
    """Are the weights (almost) as expected, and the state exactly?"""
    rows = zip(bucket.w, *bucket.state, strict=True)
    equal = [
        (on.close if close else on.equal)(w, wanted[0]) and on.all_equal(state, wanted[1:])
        for (w, *state), wanted in zip(rows, expected, strict=True)
    ]
    return all(equal)


@pytest.mark.parametrize(("name", "scale"), each_with_one(PAIRED, ["mean", "numel", None]))
@pytest.mark.usefixtures("ieee")
def test_the_cautious_update_in_one_pass_equals_the_rule(on: Place, name: str, scale: str | None) -> None:
    """Over tensors of several sizes, at different counts, it is the rule on each. To count writes nothing."""
    bucket = a_bucket(on, name, [torch.float32] * 3, shapes_for(name))
    kept, expected = zip(*(expected_update_whole(bucket, i, scale) for i in range(len(bucket.w))), strict=True)
    before = [t.clone() for column in (bucket.w, *bucket.state, *bucket.counters) for t in column]
    counts = on.count_agreeing([bucket])

    assert counts.tolist() == list(kept)
    assert on.all_equal(before, [t for column in (bucket.w, *bucket.state, *bucket.counters) for t in column])
    update_whole(on, [bucket], scale)

    assert same_step(on, bucket, expected)


@pytest.mark.parametrize(("name", "p"), each_with_one(PAIRED, [0.8, 1.0, 2.0]))
@pytest.mark.usefixtures("ieee")
def test_the_p_norm_decay_in_one_pass_equals_the_rule(on: Place, name: str, p: float) -> None:
    """Over tensors of several sizes it is the rule on each; one is 0 as a whole, and one has zeros."""
    bucket = a_bucket(on, name, [torch.float32] * 3, shapes_for(name))
    bucket.w[4].zero_()
    bucket.w[5][::2] = 0
    expected = [expected_shrink_whole(bucket, i, p) for i in range(len(bucket.w))]
    shrink_whole(on, [bucket], p)

    assert same_step(on, bucket, expected, close=True)
    assert bool((bucket.w[4] != 0).any())
    assert p == 2 or not bucket.w[5][::2].any()


@pytest.mark.parametrize(
    ("name", "types"),
    each_with_one([name for name in KERNELS if name in PAIRED], [(torch.bfloat16,) * 3, (torch.float64,) * 3, *MIXED]),
    ids=str,
)
@pytest.mark.usefixtures("ieee")
def test_the_siblings_in_one_pass_in_other_types(on: Place, name: str, types: tuple[torch.dtype, ...]) -> None:
    """16-bit numbers are computed in float32 and rounded once; weights, gradients and state may differ in type."""
    if types[0] == torch.float64 and on.device == "cuda":
        pytest.skip("float64 differs there in the last digits")
    updated, shrunk = (a_bucket(on, name, types, [7, 1500]) for _ in range(2))
    _, of_update = zip(*(expected_update_whole(updated, i, "mean") for i in range(2)), strict=True)
    of_decay = [expected_shrink_whole(shrunk, i, 0.8) for i in range(2)]
    update_whole(on, [updated])
    shrink_whole(on, [shrunk], 0.8)

    assert same_step(on, updated, of_update, close=types[0] == torch.float64)
    assert same_step(on, shrunk, of_decay, close=True)


@pytest.mark.usefixtures("ieee")
def test_special_values_of_the_siblings_in_one_pass(on: Place) -> None:
    """Every combination of signed zeros, denormals, huge numbers, infinities and NaN gives what rules.py gives."""
    x, g, m = on.special(3)

    def bucket() -> Whole:
        return Whole([x.clone()], [g], ([m.clone()],), (), UPDATES["sgd, momentum"], 0.01, 0.3)

    kept, expected = expected_update_whole(bucket(), 0, "mean")
    updated = bucket()

    assert update_whole(on, [updated]).tolist() == [kept]
    assert same_step(on, updated, [expected])
    for p in (0.2, 0.8, 1.0, 1.5, 2.0):
        shrunk = bucket()
        shrink_whole(on, [shrunk], p)

        assert on.close(shrunk.w[0], expected_shrink_whole(bucket(), 0, p)[0], ulps=256), p


def test_the_siblings_in_one_pass_of_several_buckets(on: Place) -> None:
    """Each tensor has its own count and factor, each bucket its own rates, which may be tensors, and strides."""
    lr, eta_lam = torch.tensor(0.01, device=on.device), torch.tensor(0.005, device=on.device)

    def buckets() -> list[Whole]:
        made = [
            a_bucket(on, "sgd, momentum", [torch.float32] * 3, [5, 2000, 7], 0.1, 0.0),
            a_bucket(on, "sgd, momentum", [torch.float32] * 3, [(30, 40)], lr, eta_lam),
        ]
        made[1].w[0] = made[1].w[0].t().contiguous().t()
        return made

    for act, expected in (
        (lambda some: update_whole(on, some), lambda *row: expected_update_whole(*row, "mean")[1]),
        (lambda some: shrink_whole(on, some, 0.8), lambda *row: expected_shrink_whole(*row, 0.8)),
    ):
        stepped = buckets()
        wanted = [[expected(bucket, i) for i in range(len(bucket.w))] for bucket in buckets()]
        act(stepped)

        assert all(same_step(on, bucket, of_one, close=True) for bucket, of_one in zip(stepped, wanted, strict=True))


def test_the_whole_step_of_nothing(on: Place) -> None:
    """Empty tensors have sums of 0, but their step counters increase."""
    bucket = a_bucket(on, "adam", [torch.float32] * 3, [0, (0, 3)])

    assert whole(on, bucket, count=True).tolist() == [[0.0] * 5] * 2
    assert list(map(float, bucket.counters[0])) == [1.0, 10.0]


@narrow_types
def test_the_whole_step_rounds_stochastically(on: Place, dtype: torch.dtype) -> None:
    """16-bit weights and state are right on average, where rounding to nearest does not change them."""
    n = 1 << 14
    ones = torch.ones(n, dtype=dtype, device=on.device)
    expected = {"w": 1 - 1e-4, "m": 0.9999, "v": 0.9999}
    update = update_of(Adam, betas=(0.9999, 0.9999))
    for stochastic in (True, False):
        w, m, v = ([ones.clone()] for _ in range(3))
        steps = [torch.zeros((), device=on.device)]
        whole(on, Whole(w, [ones * 0], (m, v), (steps,), update, 0.0, 1e-4, draws(*w) if stochastic else None))
        for (column, mean), (t,) in zip(expected.items(), (w, m, v), strict=True):
            if stochastic:
                assert abs(sigmas(t.double() - mean)) < 5, column
                assert t.unique().numel() == 2, column
            else:
                assert on.equal(t, ones), column


@narrow_types
def test_each_column_draws_its_own_numbers(on: Place, dtype: torch.dtype) -> None:
    """Weight and state, each halfway between two numbers, round to the same side half of the time, pair by pair."""
    gap = torch.finfo(dtype).eps / 2
    ones = torch.ones(1 << 14, dtype=dtype, device=on.device)
    update = update_of(Adam, betas=(0.5, 0.25), amsgrad=True)
    state = tuple([t] for t in (ones.clone(), ones.clone(), ones * 0))
    steps = [torch.zeros((), device=on.device)]
    bucket = Whole([ones.clone()], [ones - gap], state, (steps,), update, 0.0, gap / 2, draws(ones))
    whole(on, bucket)
    w, m, v, largest = (t.double() for t in (bucket.w[0], *(column[0] for column in state)))
    upper = [t == t.max() for t in (w, m, v, largest)]

    assert [t.unique().numel() for t in (w, m, v, largest)] == [2] * 4
    assert all(0.47 < side.double().mean() < 0.53 for side in upper)
    for i in range(4):
        for k in range(i):
            assert 0.47 < (upper[i] == upper[k]).double().mean() < 0.53, (i, k)


@both_paths
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "normal"), (torch.float16, "normal"), (torch.float16, "subnormal")],
    ids=["bf16", "fp16", "fp16 subnormal"],
)
def test_the_mean_decay_is_that_of_float32(on: Place, dtype: torch.dtype, kind: str, path: str) -> None:
    """Two decays of 16,384 weights by 1e-4 equal those of float32 on average; rounded to nearest, no weight moves."""
    x = weights(kind, dtype)[: 1 << 14].to(on.device)
    w, plain, wide = x.clone(), x.clone(), x.float()
    for out, drawn in ((w, draws(w)), (w, draws(w, step=1)), (plain, None)):
        if path == "snapshot":
            on.decay_from_snapshot([Stepped([out], [out], [out.clone()], None, 1e-4, drawn)], strict=False, count=False)
        else:
            on.decay_along([Coming([out], [x], None, 0.0, 1.0, 1e-4, drawn)], strict=False, count=False)
    for _ in range(2):
        wide -= 1e-4 * wide
    error = (w.float() - wide) * x.sign()

    assert abs(sigmas(error)) < 5
    assert abs(sigmas(error + (wide - x.float()) * x.sign() / 2)) > 5  # half the decay would fail the check
    assert on.equal(plain, x)


@narrow_types
def test_masked_weights_keep_their_bits(on: Place, dtype: torch.dtype) -> None:
    """Under stochastic rounding a masked weight keeps its bits, and a repeated step gives the same bits."""
    x, g, runs = on.some(3000, dtype, 0), on.some(3000, dtype, 1), []
    for seed in range(2):
        torch.manual_seed(seed)
        w = x.clone()
        on.decay_along([Coming([w], [g], None, 0.0, 1.0, 0.01, draws(w))], strict=False, count=False)
        runs.append(w)
    masked = ~rules.aligned(g, x, strict=False)

    assert torch.equal(w.view(torch.int16)[masked], x.view(torch.int16)[masked])
    assert not torch.equal(w[~masked], x[~masked])
    assert torch.equal(*runs)


@narrow_types
def test_backends_draw_the_same_bits(on: Place, dtype: torch.dtype) -> None:
    """Every backend rounds each place of each tensor like eager, in shards made of runs and in every column."""
    sizes = [3000, 64, 1500]
    shards = [Shard(0, 3000, 3000, 3000), Shard(7, 16, 48, 64), Shard(1 << 40, 500, 1 << 20, 1500)]
    stream = rules.stream(torch.tensor(3), torch.tensor(5)).to(on.device)
    drawn = Draws(stream, [4, 2, 9], shards)
    update = UPDATES["sgd, momentum"]
    outcomes = []
    for backend in (on, Place("eager", on.device)):
        w, g, m = ([on.some((n,), dtype, i + k) for i, n in enumerate(sizes)] for k in (0, 100, 200))
        for t in (*w, *g, *m):  # normal numbers: the interpreter writes no subnormal bfloat16
            t.copy_(torch.nan_to_num(t).clamp(-2, 2) + torch.where(t < 0, -0.25, 0.25))
        bucket = Whole(w, g, (m,), (), update, 0.1, 1e-3, drawn)
        whole(backend, bucket)
        outcomes.append([*w, *m])

    assert all(map(torch.equal, *outcomes))


# ---- through the wrapper


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p, **options: CautiousDecay(AdamW(p, lr=0.01, weight_decay=0.5), path="direction", **options),
        lambda p, **options: CautiousDecay(SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5), path="direction", **options),
        lambda p, **options: CautiousDecay(AdamW(p, lr=0.01, weight_decay=0.5), path="snapshot", **options),
        lambda p, **options: CautiousDecay(AdamW(p, lr=0.01, weight_decay=0.5, fused=True), path="one_pass", **options),
        lambda p, **options: CautiousUpdate(AdamW(p, lr=0.01, weight_decay=0.5), **options),
        lambda p, **options: CautiousUpdate(AdamW(p, lr=0.01, weight_decay=0.5), scale="numel", **options),
        lambda p, **options: PNormDecay(AdamW(p, lr=0.01, weight_decay=0.5), **options),
        lambda p, **options: PNormDecay(AdamW(p, lr=0.01, weight_decay=0.5), p=2, **options),
    ],
    ids=[
        "AdamW",
        "SGD",
        "snapshot",
        "one pass",
        "CautiousUpdate",
        "CautiousUpdate numel",
        "PNormDecay",
        "PNormDecay 2",
    ],
)
def test_the_wrapper_gives_what_it_gives_with_eager(on: Place, wrap: Callable[..., Any]) -> None:
    """Four steps of the wrapper equal four with backend="eager", observers included."""
    trained, reports = {}, {}
    for backend in ("eager", on.name):
        model = net().to(on.device)
        opt = wrap(model.parameters(), backend=backend)
        if not isinstance(opt, CautiousDecay):  # for CautiousDecay, eager may count a weight of 0 as decayed or not
            with torch.no_grad():
                model[2].weight.zero_()
                model[0].bias[:2] = 0
        counts: list[tuple[int, int]] = []
        opt.observer = lambda report, to=counts: to.append((int(report.active), report.total))
        train(model, opt, range(4))
        trained[backend], reports[backend] = values(model), counts

    torch.testing.assert_close(trained[on.name], trained["eager"])
    assert reports[on.name] == reports["eager"]
    assert len(reports["eager"]) == 4


# ---- the eager kernels


@strict_or_not
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mask_by_signs_is_the_rule(strict: bool, sign: float) -> None:
    """Eager's mask by signs, used on a card, equals that of rules.py for all special numbers."""
    d, x = (torch.cat(parts) for parts in zip(Place("eager", "cpu").special(2), torch.randn(2, 100), strict=True))
    mask = _eager._mask_by_signs(d.clone(), x, sign, strict)

    assert torch.equal(mask, rules.aligned(-sign * d, x, strict).float())
    assert torch.equal(mask[-100:], _eager._mask_by_product(d.clone(), x, sign, strict)[-100:])


def test_where_the_mask_is_taken_by_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager uses the product on the CPU, and compares signs on other devices."""
    taken = []
    for name in ("_mask_by_signs", "_mask_by_product"):
        monkeypatch.setattr(_eager, name, lambda d, *_, name=name: taken.append(name) or d)
    for device in ("cpu", "meta"):
        w, g = (torch.ones(3, device=device) for _ in range(2))
        _eager.decay_along([Coming([w], [g], None, 0.0, 1.0, 0.1)], strict=False, count=False)

    assert taken == ["_mask_by_product", "_mask_by_signs"]


def test_scratch_stays_small() -> None:
    """At most three blocks of scratch are allocated, however large the tensors are."""
    w = torch.empty(1 << 26, device="meta")
    scratch = _eager._scratch([Coming([w], [w], None, 0.0, 1.0, 0.1)], 3)
    small = torch.empty(1 << 22)

    assert sum(t.numel() for t in scratch) <= 3 * _eager.BLOCK_ELSEWHERE
    assert _eager._scratch([Coming([small], [small], None, 0.0, 1.0, 0.1)], 1)[0].numel() == _eager.BLOCK_ON_CPU
