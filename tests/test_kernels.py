"""The blocked kernels do what rules.py says, bit for bit, whatever the sizes, strides, types and values."""

import pytest
import torch
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.kernels import _eager

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(0,), (), (1,), (7,), (64,), (129, 3), (1 << 14,), ((1 << 14) + 1,), ((1 << 20) + 3,)]


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def expect_along(x: Tensor, m: Tensor | None, g: Tensor, a: float, b: float, eta_lam: float, strict: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    u = b * g.to(wide) if m is None else torch.lerp(m.to(wide), g.to(wide), b)
    assert m is None or b == 1 - a
    return rules.decay(x, x, rules.aligned(u, x.to(wide), strict), eta_lam)


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one, nan=123.0), torch.nan_to_num(other, nan=123.0))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_along_equals_the_rule(dtype: torch.dtype, strict: bool) -> None:
    """Decay along a direction, over tensors of every size in one call, is the rule on each."""
    w, m, g = ([some(shape, dtype, i + k) for i, shape in enumerate(SIZES)] for k in (0, 50, 100))
    a, b, eta_lam = 0.9, 1 - 0.9, 0.3
    expected = [expect_along(x, mi, gi, a, b, eta_lam, strict) for x, mi, gi in zip(w, m, g, strict=True)]
    _eager.decay_along(w, m, g, [a] * 9, [b] * 9, [eta_lam] * 9, strict=strict, count=False)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_snapshot_equals_the_rule(dtype: torch.dtype, strict: bool) -> None:
    """Decay from a snapshot, over tensors of every size in one call, is the rule on each."""
    w, x = ([some(shape, dtype, i + k) for i, shape in enumerate(SIZES)] for k in (0, 50))
    expected = [rules.decay(wi, xi, rules.moved_towards_zero(xi, wi, strict), 0.3) for wi, xi in zip(w, x, strict=True)]
    _eager.decay_from_snapshot(w, x, [0.3] * 9, strict=strict, count=False)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("repeat", [1, 200])  # packed with its like, or cut into blocks
def test_special_values(strict: bool, repeat: int) -> None:
    """Signed zeros, denormals, huge numbers, infinite and NaN weights come out as rules.py has them, in all pairs."""
    column, row = torch.tensor(SPECIAL * repeat), torch.tensor(SPECIAL)
    one, other = (t.reshape(-1) for t in torch.meshgrid(column, row, indexing="ij"))
    # What the scaled product misses, as its docstring says: two denormals, and updates that overflow.
    seen = (torch.maximum(one.abs(), other.abs()) != 1e-45) & ~other.isinf() & ~((one - other).isinf() & ~one.isinf())
    one, other = one[seen], other[seen]
    along, after = one.clone(), one.clone()
    _eager.decay_along([along], [None], [other], [0.0], [1.0], [0.3], strict=strict, count=False)
    _eager.decay_from_snapshot([after], [other], [0.3], strict=strict, count=False)

    assert equal(along, rules.decay(one, one, rules.aligned(other, one, strict), 0.3))
    assert equal(after, rules.decay(one, other, rules.moved_towards_zero(other, one, strict), 0.3))


@pytest.mark.parametrize("n", [100, 40_000])
def test_strides_do_not_matter(n: int) -> None:
    """Transposed, strided, expanded and channels_last tensors, and companions of other strides, give the same."""
    base, x = some((4, n), torch.float32, 0), some((4, n), torch.float32, 1)
    expected = rules.decay(base, x, rules.moved_towards_zero(x, base), 0.3)
    transposed = base.t().contiguous().t()
    strided = torch.zeros(4, 2 * n)[:, ::2].copy_(base)
    last = base.view(1, 2, 2, n).clone(memory_format=torch.channels_last)
    x_last = x.view(1, 2, 2, n)
    pairs = [(transposed, x), (strided, x), (base.clone(), x.t().contiguous().t()), (last, x_last)]
    _eager.decay_from_snapshot(*map(list, zip(*pairs, strict=True)), [0.3] * 4, strict=False, count=False)

    assert all(equal(w.reshape(4, n), expected) for w, _ in pairs)


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number expanded: it is read as what it stands for."""
    w, g = some((3, 50), torch.float32, 0), torch.ones(1).expand(3, 50)
    expected = expect_along(w, None, g, 0.0, 1.0, 0.3, False)
    _eager.decay_along([w], [None], [g], [0.0], [1.0], [0.3], strict=False, count=False)

    assert equal(w, expected)


def test_mixed_types() -> None:
    """A bfloat16 weight with float32 momentum and a bfloat16 gradient is worked on in float32."""
    w, m, g = some((999,), torch.bfloat16, 0), some((999,), torch.float32, 1), some((999,), torch.bfloat16, 2)
    expected = expect_along(w, m, g, 0.9, 1 - 0.9, 0.3, False)
    _eager.decay_along([w], [m], [g], [0.9], [1 - 0.9], [0.3], strict=False, count=False)

    assert equal(w, expected)


def test_each_tensor_has_its_own_numbers() -> None:
    """Small tensors are packed only with neighbours whose coefficients and strength are the same."""
    w, m, g = ([some((50,), torch.float32, i + k) for i in range(6)] for k in (0, 50, 100))
    a, eta_lam = [0.9, 0.9, 0.5, 0.5, 0.9, 0.9], [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    b = [1 - ai for ai in a]
    expected = [expect_along(*row, strict=False) for row in zip(w, m, g, a, b, eta_lam, strict=True)]
    _eager.decay_along(w, m, g, a, b, eta_lam, strict=False, count=False)

    assert all(map(equal, w, expected))


def test_other_coefficients() -> None:
    """Where a and b do not add up to 1 (SGD), the sign is that of a*m + b*g; a negative b maximizes."""
    m, g = torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([-2.0, 0.5, 3.0, 0.0])
    for b in (1.0, -1.0):
        w = torch.ones(4)
        _eager.decay_along([w], [m], [g], [0.9], [b], [0.5], strict=True, count=False)

        assert w.tolist() == [0.5 if 0.9 * mi + b * gi > 0 else 1.0 for mi, gi in zip(m, g, strict=True)]


@pytest.mark.parametrize("shape", [(50,), ((1 << 20) + 3,)])
def test_tensor_strength(shape: tuple[int, ...]) -> None:
    """eta*lam as a tensor gives what the number gives, to one rounding of the product."""
    number, tensor = some(shape, torch.float32, 0), some(shape, torch.float32, 0)
    x = some(shape, torch.float32, 1)
    _eager.decay_from_snapshot([number], [x], [0.25], strict=False, count=False)
    _eager.decay_from_snapshot([tensor], [x], [torch.tensor(0.25)], strict=False, count=False)

    assert torch.equal(number, tensor)


def test_count() -> None:
    """The number of decayed weights is counted when asked for."""
    w, g = some((3 << 19,), torch.float32, 0), some((3 << 19,), torch.float32, 1)
    expected = int(rules.aligned(g, w).sum())

    assert _eager.decay_along([w], [None], [g], [0.0], [1.0], [0.1], strict=False, count=True) == expected


def test_scratch_stays_small() -> None:
    """However large the tensors, at most three blocks of scratch are taken."""
    w = torch.empty(1 << 26, device="meta")

    assert sum(t.numel() for t in _eager._scratch([w], 3)) <= 3 * _eager.BLOCK_ELSEWHERE
    assert _eager._scratch([torch.empty(1 << 22)], 1)[0].numel() == _eager.BLOCK_ON_CPU
