"""Every kind of tensor that a model may hold: no or sparse gradients, shapes, strides, types, extreme values."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import ruled
from support import ALL_PATHS, PathOptions, param, weight
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, SparseAdam

from cwd_wrap import CautiousDecay

LR, LAM = 0.125, 0.5  # their product, 0.0625, is exact in every type
ETA_LAM = LR * LAM


def sgd(*params: nn.Parameter, **options: Any) -> SGD:
    return SGD(params, lr=LR, weight_decay=LAM, **options)


# ------------------------------------------------------------------------------------ by eye


def test_four_weights_by_hand(every_path: PathOptions) -> None:
    """Of 1, 1, -1, -1 with gradients 1, -1, 1, -1, the first and the last move towards zero and decay."""
    p = weight(1, 1, -1, -1, grad=[1, -1, 1, -1])
    CautiousDecay(sgd(p, **every_path.base), **every_path).step()

    assert [1 - 0.125 - 0.0625, 1 + 0.125, -1 - 0.125, -1 + 0.125 + 0.0625] == p.tolist()


ZEROS: dict[str, tuple[float, float, float, float]] = {
    # weight, gradient -> weight after the step, and with strict=True
    "no gradient": (1.0, 0.0, 0.9375, 1.0),
    "gradient -0": (1.0, -0.0, 0.9375, 1.0),
    "no gradient, negative weight": (-1.0, 0.0, -0.9375, -1.0),
    "weight 0": (0.0, 1.0, -0.125, -0.125),
    "weight -0": (-0.0, 1.0, -0.125, -0.125),
    "weight 0, other way": (0.0, -1.0, 0.125, 0.125),
    "both 0": (0.0, 0.0, 0.0, 0.0),
    "crosses zero": (0.1, 8.0, 0.1 - 1 - 0.00625, 0.1 - 1 - 0.00625),
    "crosses zero, from below": (-0.1, -8.0, -0.1 + 1 + 0.00625, -0.1 + 1 + 0.00625),
}


@pytest.mark.parametrize("strict", [False, True], ids=[">=", ">"])
def test_at_zero(strict: bool, every_path: PathOptions) -> None:
    """A weight with update 0 decays unless strict=True; 0.0 and -0.0 act the same."""
    x, g, loose, tight = zip(*ZEROS.values(), strict=True)
    p = weight(*x, grad=g, dtype=torch.float64)
    CautiousDecay(sgd(p, **every_path.base), strict=strict, **every_path).step()

    expected = dict(zip(ZEROS, tight if strict else loose, strict=True))
    assert pytest.approx(expected, rel=1e-15) == dict(zip(ZEROS, p.tolist(), strict=True))


def both_ways(x: float, g: float, path: PathOptions) -> tuple[Tensor, Tensor]:
    """Expected and actual results in float32 for a weight moving towards zero and one moving away."""
    p = weight(x, -x, grad=[g, g])
    before = p.detach().double()
    expected = ruled(before, before - LR * p.grad.double(), ETA_LAM)
    CautiousDecay(sgd(p, **path.base), **path).step()
    return expected, p.detach().double()


# One unit in the last place for each of three roundings; for denormals that unit is 1.4e-45.
UNITS = {"rtol": 4e-7, "atol": 5e-45}


def test_tiny_and_huge_weights(every_path: PathOptions) -> None:
    """Tiny and huge weights obey the mask: products of weight and update would under- or overflow here."""
    for size in (1e-30, 1.2e-38, 1e30, 3e38):
        for x in (size, -size):
            torch.testing.assert_close(*both_ways(x, x, every_path), **UNITS)


def test_denormal_weights(every_path: PathOptions) -> None:
    """The mask of a denormal weight may be wrong (docs/caveats.md); the error is below the smallest normal number."""
    for size, grad in ((1e-40, 1e-40), (1e-39, 2e-38)):
        for sign in (1, -1):
            expected, actual = both_ways(sign * size, sign * grad, every_path)

            assert bool(((expected - actual).abs() < torch.finfo(torch.float32).tiny).all()), (sign, size)


def test_denormal_gradients(every_path: PathOptions) -> None:
    """A denormal gradient has a sign; if the step is lost in rounding, paths that copy the weights miss the sign."""
    for sign in (1.0, -1.0):
        p = weight(sign, -sign, grad=[sign * 1e-40] * 2)
        CautiousDecay(sgd(p, **every_path.base), **every_path).step()

        assert [0.9375 * sign, -sign * (0.9375 if every_path.copies else 1.0)] == p.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_in_its_place(bad: float, every_path: PathOptions) -> None:
    """A NaN or an infinity, of a weight or of a gradient, stays in its place; the weights beside it step and decay."""
    p = weight(bad, 1.0, -1.0, 1.0, grad=[1.0, 1.0, 1.0, bad])
    CautiousDecay(sgd(p, **every_path.base), **every_path).step()

    assert [False, True, True, False] == p.isfinite().tolist()
    assert [1 - 0.1875, -1.125] == p[1:3].tolist()


# ------------------------------------------------------------------------------------ any numbers

numbers = st.floats(-1e150, 1e150, allow_nan=False) | st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 1e-300, -1e-300])


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
@example(pairs=[(2.225073858507203e-309, 5e-324)])  # denormal both
def test_any_numbers(every_path: PathOptions, pairs: list[tuple[float, float]]) -> None:
    """For all weights and gradients, x - eta*u - eta*lam*x where u*x >= 0, else x - eta*u, in double precision."""
    x, g = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    p = nn.Parameter(x.clone())
    p.grad = g.clone()
    CautiousDecay(sgd(p, **every_path.base), **every_path).step()
    w = x - LR * g
    # Paths without a copy have u's sign even where the step is too small to change x.
    keeps = torch.sign(g) * torch.sign(x) < 0
    expected = ruled(x, w, ETA_LAM) if every_path.copies else torch.where(keeps, w, w - ETA_LAM * x)

    # A difference of two numbers is as exact as the larger of them; denormal weights are not checked.
    smallest = torch.finfo(torch.float64).tiny
    assert bool(((expected - p.detach()).abs() <= 4e-16 * (x.abs() + g.abs()) + smallest).all())


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=8))
def test_the_paths_agree_where_the_step_moves(pairs: list[tuple[float, float]]) -> None:
    """Direction and snapshot give the same weights, wherever the step was not lost in rounding."""
    x, g = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    results = []
    for path in ("direction", "snapshot"):
        p = nn.Parameter(x.clone())
        p.grad = g.clone()
        CautiousDecay(sgd(p), path=path).step()
        results.append(p.detach())
    moved = (x - LR * g != x) | (g == 0)

    torch.testing.assert_close(results[0][moved], results[1][moved], rtol=1e-14, atol=1e-14)


# ------------------------------------------------------------------------------------ which weights take part


def test_a_frozen_parameter_keeps_its_value(every_path: PathOptions) -> None:
    """A parameter with requires_grad=False keeps its value, frozen from the start or between steps."""
    p, q = nn.Parameter(torch.ones(1), requires_grad=False), weight(1.0, grad=[0.0])
    opt = CautiousDecay(sgd(p, q, **every_path.base), **every_path)
    opt.step()
    q.requires_grad_(requires_grad=False).grad = None
    opt.step()

    assert [1.0, 0.9375] == [p.item(), q.item()]


def test_no_gradient_at_all(every_path: PathOptions) -> None:
    """A step before any backward changes nothing."""
    p = weight(1.0)
    CautiousDecay(sgd(p, **every_path.base), **every_path).step()

    assert 1.0 == p.item()


def test_tied_weights_decay_once(every_path: PathOptions) -> None:
    """A weight that two layers share is in model.parameters() once, and decays once."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros(2, 2)
    CautiousDecay(sgd(*model.parameters(), **every_path.base), **every_path).step()

    torch.testing.assert_close(before * 0.9375, model[0].weight.detach())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_in_a_group_decays_once(every_path: PathOptions) -> None:
    """A parameter listed twice in a group steps twice, as in torch, but decays once: 1 - 2*0.125 - 0.0625."""
    p = weight(1.0, grad=[1.0])
    CautiousDecay(sgd(p, p, **every_path.base), **every_path).step()

    assert 0.6875 == p.item()


def test_gradients_that_come_and_go(every_path: PathOptions) -> None:
    """A parameter that has a gradient in every other step decays in every other step."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0)
    opt = CautiousDecay(sgd(p, q, **every_path.base), **every_path)
    for _ in range(4):
        opt.step()
        p.grad, q.grad = q.grad, p.grad

    assert [0.9375**2] * 2 == [p.item(), q.item()]


def test_groups_of_both_paths_in_one_base() -> None:
    """A group with ``caution`` takes pieces and the other the direction; both decay the same."""
    p, q = weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])
    base = SGD([{"params": [p]}, {"params": [q]}], lr=LR, weight_decay=LAM, momentum=0.5)
    base.param_groups[1]["caution"] = True
    opt = CautiousDecay(base, backend="eager")
    opt.step()

    assert 4 == opt.snapshot_bytes
    assert ["direction", "pieces"] == [of_group.path for of_group in opt.paths()]
    assert [0.8125, 0.8125] == [p.item(), q.item()]


# ------------------------------------------------------------------------------------ sparse gradients


def sparse(indices: list[int], values: list[list[float]], rows: int = 4) -> Tensor:
    return torch.sparse_coo_tensor([indices], values, (rows, len(values[0])), check_invariants=True)


# torch's fused optimizers, and so the path "one_pass", take no sparse gradients.
UNFUSED = [path for path in ALL_PATHS if not path.base]
unfused = pytest.mark.parametrize("path", [param(path, path=path) for path in UNFUSED])
SPARSE = {
    "SGD": lambda p: SGD([p], lr=LR),
    "Adagrad": lambda p: Adagrad([p], lr=LR),
    "SparseAdam": lambda p: SparseAdam([p], lr=LR),
}
sparse_bases = pytest.mark.parametrize(
    ("build", "path"),
    [
        pytest.param(build, path, id=f"{name}-{path}", marks=param(path=path).marks)
        for name, build in SPARSE.items()
        for path in UNFUSED
        if name != "SparseAdam" or path.copies
    ],
)


@sparse_bases
@pytest.mark.parametrize("closure", [False, True], ids=["backward", "closure"])
def test_only_rows_in_the_gradient_decay(build: Any, path: PathOptions, closure: bool) -> None:
    """Rows 0 and 2 have a gradient: they step and decay by the rule. Rows 1 and 3 keep their bits."""
    ours, theirs = (nn.Parameter(torch.tensor([[1.0, -1.0]] * 4)) for _ in range(2))
    opt, plain = CautiousDecay(build(ours), lam=LAM, **path), build(theirs)
    for _ in range(2):
        before = ours.detach().clone()
        theirs.data.copy_(ours.data)
        theirs.grad = sparse([0, 2], [[1.0, 1.0], [-2.0, 0.5]])
        plain.step()
        expected = ruled(before, theirs.detach(), ETA_LAM)
        expected[[1, 3]] = before[[1, 3]]
        ours.grad = None if closure else theirs.grad
        opt.step((lambda g=theirs.grad: setattr(ours, "grad", g) or 0.0) if closure else None)

        assert torch.equal(before[[1, 3]], ours[[1, 3]])
        torch.testing.assert_close(expected, ours.detach())


@pytest.mark.parametrize("strict", [False, True], ids=[">=", ">"])
@sparse_bases
def test_an_explicit_zero_in_a_sparse_gradient(build: Any, path: PathOptions, strict: bool) -> None:
    """A row that is in the gradient with value 0 decays, as a dense 0 does; with strict=True it does not."""
    p = nn.Parameter(torch.ones(4, 1))
    p.grad = sparse([1], [[0.0]])
    CautiousDecay(build(p), lam=LAM, **path, strict=strict).step()

    torch.testing.assert_close(torch.tensor([1.0, 1.0 if strict else 0.9375, 1.0, 1.0]), p.detach().flatten())


@sparse_bases
def test_a_repeated_row_decays_once_by_the_sum(build: Any, path: PathOptions) -> None:
    """Row 2 appears with 1 and -3, so it grows and does not decay; row 1 appears with 1 twice and decays once."""
    p, q = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(4, 1))
    p.grad = sparse([2, 2, 1, 1], [[1.0], [-3.0], [1.0], [1.0]])
    q.grad = p.grad.coalesce()
    opt, plain, reports = CautiousDecay(build(p), lam=LAM, **path), build(q), []
    opt.observer = reports.append
    opt.step()
    plain.step()

    assert [(1, 2)] == [(int(report.active), report.total) for report in reports]
    torch.testing.assert_close(q.detach() - torch.tensor([[0], [ETA_LAM], [0], [0]]), p.detach())


@sparse_bases
def test_an_empty_sparse_gradient_changes_nothing(build: Any, path: PathOptions) -> None:
    """With a sparse gradient without entries, no row steps or decays."""
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.long), torch.empty(0, 2), (4, 2), check_invariants=True
    )
    CautiousDecay(build(p), lam=LAM, **path).step()

    assert torch.equal(torch.ones(4, 2), p)


@unfused
def test_a_gradient_that_is_sparse_in_both_dimensions(path: PathOptions) -> None:
    """In a gradient that is sparse in both dimensions, single entries decay."""
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, -1.0], (2, 2), check_invariants=True)
    CautiousDecay(sgd(p), **path).step()

    torch.testing.assert_close(torch.tensor([[1.0, 0.8125], [1.125, 1.0]]), p.detach())


@unfused
def test_an_embedding_among_dense_layers(path: PathOptions) -> None:
    """Sparse and dense gradients in one group: looked-up rows and the dense weight decay, other rows do not."""
    embedding, head = nn.Embedding(4, 1, sparse=True), weight(1.0, grad=[0.0])
    embedding.weight.data.fill_(1.0)
    opt = CautiousDecay(sgd(embedding.weight, head), **path)
    embedding(torch.tensor([0, 2, 2])).sum().backward()
    opt.step()

    assert [1 - 0.125 - 0.0625, 1, 1 - 0.25 - 0.0625, 1] == embedding.weight.flatten().tolist()
    assert 0.9375 == head.item()


@unfused
def test_a_gradient_may_turn_from_dense_to_sparse(path: PathOptions) -> None:
    """Each step uses its own gradient: with a dense one all rows decay, with a sparse one only its row."""
    p = nn.Parameter(torch.ones(3, 1))
    opt = CautiousDecay(sgd(p), **path)
    for grad in (torch.zeros(3, 1), sparse([1], [[0.0]], rows=3), torch.zeros(3, 1)):
        p.grad = grad
        opt.step()

    assert [0.9375**2, 0.9375**3, 0.9375**2] == p.flatten().tolist()


# ------------------------------------------------------------------------------------ shapes, strides, types


def test_memory_between_the_weights_is_left_alone(every_path: PathOptions) -> None:
    """If a parameter is every second number of a buffer, it decays, and the numbers between keep their bits."""
    buffer = torch.ones(8)
    p = nn.Parameter(buffer[::2])
    p.grad = torch.zeros(4)
    CautiousDecay(sgd(p, **every_path.base), **every_path).step()

    assert [0.9375, 1.0] * 4 == buffer.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype, every_path: PathOptions) -> None:
    """In every type a step with a zero gradient gives 0.9375 * x, rounded once, and the type stays."""
    x = torch.linspace(-2, 2, 65, dtype=dtype)
    for base, options in ((SGD, {}), (Adam, {"eps": 1e-4})):  # Adam's own 1e-8 is 0 in float16, and 0/0 NaN
        p = nn.Parameter(x.clone())
        p.grad = torch.zeros_like(p)
        CautiousDecay(base([p], lr=LR, weight_decay=LAM, **options, **every_path.base), **every_path).step()

        assert dtype == p.dtype
        assert torch.equal((x.double() - ETA_LAM * x.double()).to(dtype), p)


def test_the_direction_has_the_sign_of_a_step_that_rounds_away() -> None:
    """In bfloat16, 1 + 2**-10 rounds to 1: the snapshot misses that the weight should grow; the direction does not."""
    results = []
    for path in ("direction", "snapshot"):
        p = weight(1.0, grad=[-(2.0**-7)], dtype=torch.bfloat16)
        CautiousDecay(sgd(p), path=path).step()
        results.append(p.item())

    assert [1.0, 0.9375] == results


@unfused
@pytest.mark.parametrize("base", [Adam, AdamW])
def test_complex_weights_with_a_state(base: Any, path: PathOptions) -> None:
    """With Adam's complex moments, the mask still applies to real and imaginary parts."""
    p = nn.Parameter(torch.tensor([1 + 1j, -1 - 1j], dtype=torch.complex128))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    opt, real = (CautiousDecay(base([w], lr=LR, weight_decay=LAM), **path) for w in (p, q))
    for _ in range(3):
        p.grad = torch.randn(2, dtype=torch.complex128)
        q.grad = torch.view_as_real(p.grad).clone()
        opt.step()
        real.step()

    torch.testing.assert_close(q.detach(), torch.view_as_real(p.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_learning_rate_of_another_type(dtype: torch.dtype, every_path: PathOptions) -> None:
    """A float64 tensor lr does not change the type of the weights: 1 - 0.125*0.5."""
    p = weight(1.0, grad=[0.0], dtype=dtype)
    lr = torch.tensor(LR, dtype=torch.float64)
    CautiousDecay(AdamW([p], lr=lr, weight_decay=LAM, **(every_path.base or {"foreach": False})), **every_path).step()

    assert (dtype, 0.9375) == (p.dtype, p.item())


def test_many_small_tensors(every_path: PathOptions) -> None:
    """A thousand tensors in groups of different strengths each decay by their group's strength."""
    groups = [
        {"params": [nn.Parameter(torch.ones(i % 7, 3)) for i in range(100)], "weight_decay": k / 16} for k in range(10)
    ]
    base = SGD(groups, lr=1.0, **every_path.base)
    for group in base.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    CautiousDecay(base, **every_path).step()

    for k, group in enumerate(base.param_groups):
        assert {1 - k / 16} == {x for p in group["params"] for x in p.flatten().tolist()}


def test_the_snapshot_follows_its_parameters() -> None:
    """If a parameter changes its type, or a group its parameters, between steps, new copies are made."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, 1.0, grad=[0.0, 0.0])
    opt = CautiousDecay(sgd(p), path="snapshot")
    opt.step()
    p.data, p.grad = p.data.double(), None
    p.grad = torch.zeros(1, dtype=torch.float64)
    opt.step()
    opt.param_groups[0]["params"] = [q]
    opt.step()
    opt.drop_snapshot()
    opt.step()

    assert [0.9375**2, 0.9375**2] == [p.item(), q[0].item()]
