"""PNormDecay: the authors' formula, its guards (zero, learning rate 0, extreme values), groups and sparsity."""

import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import net, train, values, weight
from torch import nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, PNormDecay, rules

F64 = torch.float64
LR, LAM = 0.125, 0.5
all_p = pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 1.0, 1.5, 2.0])


def still(*weights: float, p: float = 0.8, dtype: torch.dtype = F64, **options: Any) -> nn.Parameter:
    """The weights after one step of SGD with gradients 0, so that only the decay acts."""
    q = weight(*weights, grad=[0.0] * len(weights), dtype=dtype)
    PNormDecay(SGD([q], **{"lr": LR, "weight_decay": LAM, **options}), p=p).step()
    return q


# ------------------------------------------------------------------------------------ by eye


def test_p_2_is_implicit_l2_decay() -> None:
    """With p = 2 every weight, zero or not, is divided by 1 + 2 * eta*lam."""
    assert [3 / 1.125, -1 / 1.125, 0.0] == pytest.approx(still(3, -1, 0, p=2.0).tolist(), rel=1e-15)


def test_p_1_takes_about_eta_lam_off() -> None:
    """With p = 1 and eta*lam = 1/16 a weight of 1 becomes 16/17, and one of 1/16 is halved: w*|w| / (|w| + 1/16)."""
    assert [16 / 17, 1 / 32, -1 / 32] == pytest.approx(still(1, 1 / 16, -1 / 16, p=1.0).tolist(), rel=1e-15)


@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
def test_p_1_is_like_soft_shrinkage(size: float) -> None:
    """With p = 1 a large weight loses eta*lam, with an error below eta*lam squared over the weight."""
    taken = size - still(size, p=1.0).item()

    assert pytest.approx(1 / 16, abs=(1 / 16) ** 2 / size * 1.01) == taken


def test_small_weights_collapse_below_p_1() -> None:
    """With p = 0.5 a weight of 1e-4 is multiplied by 3.2e-5 in one step, which makes weights sparse."""
    assert pytest.approx(1e-4 * 1e-6 / (1e-6 + 0.5 / 16), rel=1e-12) == still(1e-4, p=0.5).item()


def test_the_factor_depends_on_the_weight_before_the_step() -> None:
    """After a step from 1 to 3, the factor is that of a weight of 1; after one from 3 to 1, that of a weight of 3."""
    q = weight(1, 3, grad=[-2, 2], dtype=F64)
    PNormDecay(SGD([q], lr=1.0, weight_decay=0.5), p=1.0).step()

    assert [3 * 1 / 1.5, 1 * 3 / 3.5] == pytest.approx(q.tolist(), rel=1e-15)


@all_p
def test_to_first_order_it_is_the_decay_of_the_penalty(p: float) -> None:
    """For small eta the decay is eta * lam * d|w|**p/dw: lam is that of the authors' code, without another factor p."""
    eta = 1e-7
    x = torch.tensor([0.5, -2.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad((x.abs() ** p).sum(), x)
    q = weight(0.5, -2, grad=[0, 0], dtype=F64)
    PNormDecay(SGD([q], lr=eta, weight_decay=LAM), p=p).step()

    torch.testing.assert_close(LAM * gradient, (x - q).detach() / eta, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ guards


@all_p
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=F64)], ids=["float", "f32", "f64"])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_learning_rate_0_is_the_identity(dtype: torch.dtype, lr: Any, p: float) -> None:
    """With lr 0, float or tensor, no weight changes; zeros, even whole tensors of them, give no 0/0."""
    x = torch.tensor([0.0, -0.0, 1.0, -1e-30, 1e30]).to(dtype)
    q, zeros = nn.Parameter(x.clone()), nn.Parameter(torch.zeros(3, dtype=dtype))
    q.grad, zeros.grad = torch.ones_like(q), torch.ones_like(zeros)
    PNormDecay(SGD([q, zeros], lr=lr, weight_decay=LAM), p=p).step()

    assert torch.equal(x, q.detach())
    assert [0.0] * 3 == zeros.tolist()


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_warm_up_from_0(tensor: bool) -> None:
    """A warm-up from learning rate 0 gives no NaN, and a layer that starts at 0 trains once lr is above 0."""
    model = net()
    nn.init.zeros_(model[2].weight)
    lr = torch.tensor(0.1) if tensor else 0.1
    opt = PNormDecay(SGD(model.parameters(), lr=lr, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 4)
    for step in range(4):
        train(model, opt, [step])
        schedule.step()

    assert bool(values(model).isfinite().all())
    assert bool((model[2].weight != 0).all())


@pytest.mark.parametrize("p", [0.2, 0.8, 1.0, 1.5])
def test_zero_stays_zero(p: float) -> None:
    """A weight that is 0 among others that are not stays 0, whatever its gradient, as in the authors' code."""
    q = weight(0, -0.0, 1, grad=[1, -1, 1])
    opt = PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=p)
    for _ in range(3):
        opt.step()

    assert [0.0, 0.0] == q.tolist()[:2]


def test_p_2_trains_zeros() -> None:
    """At p = 2 the factor does not depend on the weight, so a zero weight can train, as in the authors' code."""
    q = weight(0, 1, grad=[1, 1], dtype=F64)
    PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=2.0).step()

    assert pytest.approx([-0.125 / 1.125, 0.875 / 1.125]) == q.tolist()


@all_p
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_a_zero_initialised_tensor_trains(shape: tuple[int, ...], p: float) -> None:
    """A tensor that is 0 as a whole takes its first step undecayed, and decays from the next on."""
    q = nn.Parameter(torch.zeros(shape, dtype=F64))
    q.grad = torch.ones(shape, dtype=F64)
    opt = PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=p)
    opt.step()
    first = q.detach().clone()
    if p < 2:
        assert torch.equal(torch.full(shape, -LR, dtype=F64), first)
    opt.step()

    torch.testing.assert_close(reference.p_norm(p)(first, first - LR, first, LR * LAM), q.detach())


def test_zeros_left_after_the_first_step_of_a_zero_tensor_stay() -> None:
    """Only the first step of a zero tensor is undecayed: weights that are still 0 after it stay 0."""
    q = weight(0, 0, grad=[1, 0])
    opt = PNormDecay(SGD([q], lr=LR, weight_decay=LAM))
    opt.step()
    q.grad = torch.ones(2)
    opt.step()

    assert 0 == q[1].item()
    assert q[0].item() < 0


def test_a_net_with_zero_initialised_layers_trains() -> None:
    """Zero-initialised weights and biases of a usual net all move within three steps."""
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    for tensor in (model[0].bias, model[2].weight, model[2].bias):
        nn.init.zeros_(tensor)
    opt = PNormDecay(AdamW(model.parameters(), lr=0.01), lam=1e-3)
    train(model, opt, range(3))

    assert [True] * 4 == [bool((p != 0).all()) for p in model.parameters()]


def test_zero_rows_under_sparse_gradients_stay_zero() -> None:
    """A zero row of an embedding (a padding row) stays 0 under sparse gradients, as under dense ones."""
    rows = []
    for sparse in (False, True):
        embedding = nn.Embedding(4, 2, sparse=sparse)
        embedding.weight.data[1] = 0
        opt = PNormDecay(SGD(embedding.parameters(), lr=LR, weight_decay=LAM))
        embedding(torch.tensor([1])).sum().backward()
        opt.step()
        rows.append(embedding.weight[1].tolist())

    assert [[0.0, 0.0], [0.0, 0.0]] == rows


@all_p
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_huge_and_tiny_values(dtype: torch.dtype, p: float) -> None:
    """Weights of any size give finite results; none grows or changes its sign, and for p up to 1 huge ones stay."""
    x = torch.tensor([3e38, 1e30, 1e-30, 1e-38, 1e-40, -3e38, -1e-40]).to(dtype)
    q = nn.Parameter(x.clone())
    q.grad = torch.zeros_like(q)
    PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=p).step()

    assert bool(q.isfinite().all())
    assert bool((q.abs() <= x.abs()).all())
    assert bool((q * x.sign() >= 0).all())
    if p < 2:
        assert torch.equal(x[x.abs() > 1], q.detach()[x.abs() > 1]) or p > 1


@all_p
def test_a_value_that_is_not_finite_stays_in_its_place(p: float) -> None:
    """NaN stays NaN and an infinity infinite, and the weights beside them decay as usual."""
    q, alone = still(math.nan, math.inf, -math.inf, 1.0, p=p), still(1.0, p=p)

    assert q[0].isnan()
    assert [math.inf, -math.inf, alone.item()] == q.tolist()[1:]


def test_a_nan_gradient_is_not_hidden_by_a_zero_weight() -> None:
    """A NaN or infinite step from a weight of 0 stays NaN or infinite, and does not become 0."""
    q = weight(0, 0, 1, grad=[math.nan, math.inf, 1])
    PNormDecay(SGD([q], lr=LR, weight_decay=LAM)).step()

    assert [False, False, True] == q.isfinite().tolist()


# ------------------------------------------------------------------------------------ arguments and groups

WRONG_P: list[tuple[Any, type[Exception]]] = [
    (0, ValueError),
    (0.0, ValueError),
    (-0.5, ValueError),
    (2.0001, ValueError),
    (3, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    ("0.8", TypeError),
    (None, TypeError),
    ([0.8], TypeError),
    (True, TypeError),
]


@pytest.mark.parametrize(("p", "error"), WRONG_P, ids=[repr(p) for p, _ in WRONG_P])
def test_p_out_of_range(p: Any, error: type[Exception]) -> None:
    """p must be above 0 and at most 2; the error has the name, the value and that range, and the base is unchanged."""
    base = SGD([weight(1.0)], lr=LR, weight_decay=LAM)
    with pytest.raises(error, match="p of PNormDecay") as caught:
        PNormDecay(base, lam=0.25, p=p)

    assert f"p of PNormDecay is {p!r}: pass a number above 0, up to 2" == str(caught.value)
    assert LAM == base.param_groups[0]["weight_decay"]


@pytest.mark.parametrize("p", [1, Fraction(1, 2)], ids=repr)
def test_p_is_kept_as_a_float(p: Any) -> None:
    """An int or a fraction is read as the float of that size."""
    opt = PNormDecay(SGD([weight(1.0)], lr=LR, weight_decay=LAM), p=p)

    assert (p, float) == (opt.p, type(opt.p))


def test_groups_without_decay_stay_out() -> None:
    """A group with weight_decay 0 takes the plain base's step, and its weights are not copied."""
    a, b = weight(1, 0, grad=[1, 1]), weight(1, 0, grad=[1, 1])
    base = SGD([{"params": [a]}, {"params": [b], "weight_decay": 0.0}], lr=LR, weight_decay=LAM)
    opt = PNormDecay(base, p=1.0, path="snapshot")
    opt.step()

    assert [0.875, -0.125] == b.tolist()
    assert pytest.approx([0.875 * 16 / 17, 0.0]) == a.tolist()
    assert 8 == opt.snapshot_bytes


def test_lam_goes_where_the_groups_decay() -> None:
    """lam= is written into the groups that decay."""
    base = SGD([{"params": [weight(1)]}, {"params": [weight(1)], "weight_decay": 0.0}], lr=LR, weight_decay=LAM)
    opt = PNormDecay(base, lam=0.25)

    assert [0.25, 0.0] == [group["weight_decay"] for group in opt.param_groups]


def test_nothing_to_decay_is_warned_of() -> None:
    """PNormDecay around a base without decay, and without lam=, warns that nothing decays."""
    with pytest.warns(UserWarning, match=r"^PNormDecay.SGD. will not decay anything: .*lam="):
        PNormDecay(SGD([weight(1)], lr=LR))


def test_step_size() -> None:
    """lam is multiplied by the result of step_size=."""
    q = weight(1, grad=[0], dtype=F64)
    PNormDecay(SGD([q], lr=0.01, weight_decay=0.5), p=2.0, step_size=lambda group: 0.125).step()

    assert pytest.approx(1 / 1.125) == q.item()


def test_sparsity_of_each_group() -> None:
    """sparsity() gives, for each group, the share of weights below the threshold in size; NaN for an empty group."""
    groups = [{"params": [weight(0, 1e-14, -1e-14, 1), weight(-1, 1, 1, 1)]}, {"params": [weight(1)]}, {"params": []}]
    opt = PNormDecay(SGD(groups, lr=LR, weight_decay=LAM))
    first, second, third = opt.sparsity()

    assert [3 / 8, 0.0] == [first, second]
    assert math.isnan(third)
    assert [1 / 8, 1.0] == [opt.sparsity(threshold=1e-20)[0], opt.sparsity(threshold=1.5)[1]]


def test_sparsity_changes_nothing() -> None:
    """sparsity() changes no weight or gradient, and returns floats."""
    q = weight(1, 0, grad=[1, 1])
    shares = PNormDecay(SGD([q], lr=LR, weight_decay=LAM)).sparsity()

    assert [float] == [type(share) for share in shares]
    assert q.requires_grad
    assert [1.0, 1.0] == q.grad.tolist()


# ------------------------------------------------------------------------------------ properties

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(w=floats, x=floats, p=st.floats(0.01, 2), eta_lam=st.floats(0, 1e3))
@settings(max_examples=50, deadline=None)
def test_the_decay_never_enlarges_a_weight_or_flips_its_sign(w: float, x: float, p: float, eta_lam: float) -> None:
    """For all numbers the result is finite and between 0 and w."""
    w32, x32 = torch.tensor([w]), torch.tensor([x])
    out = rules.p_norm_decay(w32, x32, p, eta_lam, torch.tensor(False))

    assert bool(out.isfinite())
    assert min(w32.item(), 0) <= out.item() <= max(w32.item(), 0)


@given(w=st.floats(-100, 100), x=st.floats(-100, 100), p=st.floats(0.1, 2), eta_lam=st.floats(1e-8, 1))
@settings(max_examples=50, deadline=None)
def test_both_forms_are_equal(w: float, x: float, p: float, eta_lam: float) -> None:
    """w / (1 + c*|x|**(p-2)) is the authors' w*X / (X + c), zeros included."""
    w64, x64 = torch.tensor([w], dtype=F64), torch.tensor([x], dtype=F64)
    out = rules.p_norm_decay(w64, x64, p, eta_lam, torch.tensor(False))

    size = x64.abs() ** (2 - p)  # of a tiny x smaller than any number; its inverse is infinite

    torch.testing.assert_close(w64 * size / (size + p * eta_lam), out, rtol=1e-12, atol=1e-296)


@given(small=st.floats(1e-6, 1), more=st.floats(1.01, 100), p=st.floats(0.1, 1.9))
@settings(max_examples=50, deadline=None)
def test_smaller_weights_shrink_more(small: float, more: float, p: float) -> None:
    """For p below 2 the share that a weight keeps grows with its size."""
    a, b = still(small, small * more, p=p).tolist()

    assert a / small < b / (small * more)


# ------------------------------------------------------------------------------------ in use


def test_it_makes_weights_sparse() -> None:
    """Over 90 % of the weights fall below 1e-13 and the fit stays good; with plain decay none does."""
    shares, errors = [], []
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    for wrap in (lambda opt: PNormDecay(opt, lam=0.05, p=0.8), lambda opt: CautiousDecay(opt, lam=0.05, mask="all")):
        w = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(1)))
        opt = wrap(SGD([w], lr=0.05))
        for _ in range(800):
            opt.zero_grad()
            loss = (inputs @ w - 2 * inputs[:, 0]).square().mean()
            loss.backward()
            opt.step()
        shares.append((w.abs() < 1e-13).float().mean().item())
        errors.append(abs(w[0].item() - 2))

    assert [True, True] == [shares[0] > 0.9, shares[1] == 0]
    assert max(errors) < 0.1


def test_a_usual_training_run_gives_no_warning() -> None:
    """Three steps around AdamW give no warning."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, PNormDecay(AdamW(model.parameters(), lr=0.01), lam=1e-3), range(3))
