"""The rules on one tensor: first numbers that can be checked by eye, then properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PathOptions

from cwd_wrap import CautiousDecay, rules

INF, NAN = float("inf"), float("nan")
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_four_numbers() -> None:
    """Of the weights 1, 1, -1, -1 with updates 1, -1, 1, -1, the first and the last move towards zero and decay."""
    x = torch.tensor([1.0, 1.0, -1.0, -1.0])
    u = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = rules.aligned(u, x, strict=False)

    assert mask.tolist() == [True, False, False, True]
    assert rules.decay(x - 0.1 * u, x, mask, 0.1 * 0.5).tolist() == pytest.approx([0.85, 1.1, -1.1, -0.85])


def test_four_numbers_through_the_wrapper(every_path: PathOptions) -> None:
    """One step of SGD gives the same four numbers on every path."""
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    CautiousDecay(torch.optim.SGD([w], lr=0.1, **every_path.base), lam=0.5, **every_path).step()

    assert w.tolist() == pytest.approx([0.85, 1.1, -1.1, -0.85])


@pytest.mark.parametrize(("strict", "expected"), [(False, [0.95, -0.95, 0.0]), (True, [1.0, -1.0, 0.0])])
def test_zero_update(strict: bool, expected: list[float], every_path: PathOptions) -> None:
    """A weight with update 0 decays (the paper's >=) unless strict (>); a zero weight stays zero."""
    w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
    w.grad = torch.zeros(3)
    CautiousDecay(torch.optim.SGD([w], lr=0.1, **every_path.base), lam=0.5, strict=strict, **every_path).step()

    assert w.tolist() == pytest.approx(expected)


def test_four_numbers_with_a_leak(every_path: PathOptions) -> None:
    """With a leak of 0.2 the weights that grow lose 0.2 * 0.1 * 0.5 of themselves, on every path."""
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    CautiousDecay(torch.optim.SGD([w], lr=0.1, **every_path.base), lam=0.5, leak=0.2, **every_path).step()

    assert w.tolist() == pytest.approx([0.85, 1.09, -1.09, -0.85])


def test_a_leak_of_0_or_1_changes_no_bit() -> None:
    """Leak 0 takes mask * x * eta*lam off, and leak 1 takes x * eta*lam off: special values and signs of 0 included."""
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-45, 3e38, INF, -INF, NAN])
    for mask in (torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool), torch.arange(10) % 2 == 0):
        for leak, share in ((0.0, mask.float()), (1.0, torch.ones(10))):
            expected, taken = share * x * 0.3, rules.taken(x, mask, 0.3, leak)
            alike = (taken == expected) | taken.isnan() & expected.isnan()

            assert alike.all()
            assert torch.equal(torch.signbit(taken)[:-3], torch.signbit(expected)[:-3])


def test_crossing_zero_is_towards_zero() -> None:
    """A step from 1 to -5 has u*x > 0, so x decays, although the weight ends up larger in size."""
    x, w = torch.tensor([1.0]), torch.tensor([-5.0])

    assert rules.moved_towards_zero(x, w, strict=True).tolist() == [True]


def test_tiny_products_do_not_underflow() -> None:
    """1e-25 * -1e-25 is -0.0 in float32, and -0.0 >= 0; the mask compares signs, so it is 0."""
    x, u = torch.tensor([1e-25]), torch.tensor([-1e-25])

    assert (u * x >= 0).tolist() == [True]
    assert rules.aligned(u, x, strict=False).tolist() == [False]
    assert rules.moved_towards_zero(x, x - u, strict=False).tolist() == [False]


def test_nan_is_not_aligned() -> None:
    """A NaN weight, before or after the step, is not decayed."""
    one, nan = torch.tensor([1.0]), torch.tensor([NAN])

    assert not rules.aligned(one, nan, strict=False)
    assert not rules.aligned(nan, one, strict=False)
    assert not rules.moved_towards_zero(nan, one, strict=False)
    assert not rules.moved_towards_zero(one, nan, strict=False)


@pytest.mark.parametrize("strict", [False, True])
@given(x=numbers, w=numbers)
@settings(max_examples=300, deadline=None)
def test_both_masks_agree(strict: bool, x: float, w: float) -> None:
    """The mask from a snapshot equals the mask of the update x - w, computed in float64 so that its sign is exact."""
    x32, w32 = torch.tensor([x]), torch.tensor([w])
    u = x32.double() - w32.double()

    assert rules.moved_towards_zero(x32, w32, strict).item() == rules.aligned(u, x32.double(), strict).item()


@given(x=numbers, w=numbers, c=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_decay_pulls_towards_zero_or_does_nothing(x: float, w: float, c: float) -> None:
    """A weight that grew keeps its value; decay moves any other weight against the sign of x, if at all."""
    x64, w64 = torch.tensor([x], dtype=torch.float64), torch.tensor([w], dtype=torch.float64)
    mask = rules.moved_towards_zero(x64, w64, strict=False)
    decayed = rules.decay(w64, x64, mask, c)
    if x * w > 0 and not mask.item():
        assert decayed.item() == w
    if mask.item():
        assert torch.sign(w64 - decayed).item() in (0.0, torch.sign(x64).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """The decay of a 16-bit weight is the float32 result, rounded."""
    x = torch.linspace(-2, 2, 101).to(dtype)
    w = (x.float() * 0.9).to(dtype)
    mask = rules.moved_towards_zero(x, w, strict=False)
    wide = w.float() - 0.3 * mask * x.float()

    assert torch.equal(rules.decay(w, x, mask, 0.3), wide.to(dtype))
