"""Every kind of tensor a model may hold: absent and sparse gradients, shapes, strides, types, extreme values."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import ruled
from support import weight
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, SparseAdam

from cwd_wrap import CautiousDecay

LR, LAM = 0.125, 0.5  # their product, 0.0625, is exact in every type
ETA_LAM = LR * LAM


def sgd(*params: nn.Parameter, **options: Any) -> SGD:
    return SGD(params, lr=LR, weight_decay=LAM, **options)


def plain_step(p: Tensor) -> Tensor:
    """The weights that SGD without decay takes ``p`` to."""
    with torch.no_grad():
        return p.detach() - LR * p.grad


# ------------------------------------------------------------------------------------ by eye


def test_four_weights_by_hand(every_path: PathOptions) -> None:
    """Of 1, 1, -1, -1 with gradients 1, -1, 1, -1, the first and the last are on their way to zero, and decay."""
    p = weight(1, 1, -1, -1, grad=[1, -1, 1, -1])
    CautiousDecay(sgd(p), **every_path).step()

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
@pytest.mark.parametrize("case", ZEROS.values(), ids=list(ZEROS))
def test_at_zero(case: tuple[float, ...], strict: bool, every_path: PathOptions) -> None:
    """A weight that the step leaves alone decays, with strict=True it does not; both zeros are the same zero."""
    x, g, loose, tight = case
    p = weight(x, grad=[g], dtype=torch.float64)
    CautiousDecay(sgd(p), strict=strict, **every_path).step()

    assert pytest.approx(tight if strict else loose, rel=1e-15) == p.item()


def both_ways(x: float, g: float, path: str) -> tuple[Tensor, Tensor]:
    """What is expected, and what comes, of a weight on its way to zero and one on its way from it, in float32."""
    p = weight(x, -x, grad=[g, g])
    before = p.detach().double()
    expected = ruled(before, before - LR * p.grad.double(), ETA_LAM)
    CautiousDecay(sgd(p), path=path).step()
    return expected, p.detach().double()


# One unit in the last place for each of three roundings; for denormals that unit is 1.4e-45.
UNITS = {"rtol": 4e-7, "atol": 5e-45}


@pytest.mark.parametrize("size", [1e-30, 1.2e-38, 1e30, 3e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tiny_and_huge_weights(sign: float, size: float, every_path: PathOptions) -> None:
    """Tiny and huge weights obey the mask: products of weight and update would under- or overflow here."""
    torch.testing.assert_close(*both_ways(sign * size, sign * size, path), **UNITS)


@pytest.mark.parametrize(("size", "grad"), [(1e-40, 1e-40), (1e-39, 2e-38)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_denormal_weights(sign: float, size: float, grad: float, every_path: PathOptions) -> None:
    """The mask of a denormal weight may be wrong, as the caveats say: by less than the smallest normal number."""
    expected, actual = both_ways(sign * size, sign * grad, path)

    assert bool(((expected - actual).abs() < torch.finfo(torch.float32).tiny).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_denormal_gradients(sign: float, every_path: PathOptions) -> None:
    """A denormal gradient has a sign; where the step is lost in rounding, only the direction path knows it."""
    p = weight(sign, -sign, grad=[sign * 1e-40] * 2)
    CautiousDecay(sgd(p), **every_path).step()

    assert [0.9375 * sign, -sign * (0.9375 if path == "snapshot" else 1.0)] == p.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_stays_where_it_is(where: str, bad: float, every_path: PathOptions) -> None:
    """A NaN or an infinity in one place does not hide, and its neighbours step and decay as without it."""
    p = weight(bad if where == "weight" else 1.0, 1.0, -1.0, grad=[bad if where == "gradient" else 1.0, 1.0, 1.0])
    CautiousDecay(sgd(p), **every_path).step()

    assert not math.isfinite(p[0].item())
    assert [1 - 0.1875, -1.125] == p[1:].tolist()


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
    CautiousDecay(sgd(p), **every_path).step()
    w = x - LR * g
    # The direction path knows u's sign even where the step is too small to change x.
    keeps = torch.sign(g) * torch.sign(x) < 0
    expected = ruled(x, w, ETA_LAM) if path == "snapshot" else torch.where(keeps, w, w - ETA_LAM * x)

    # Of a difference of two numbers, as exact as the larger of them; and of a denormal weight nothing is claimed.
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


# ------------------------------------------------------------------------------------ who takes part


def test_a_parameter_without_a_gradient_keeps_its_value(every_path: PathOptions) -> None:
    """Gradient None: no step, no decay; the other parameter takes both."""
    p, q = weight(1.0), weight(1.0, grad=[0.0])
    CautiousDecay(sgd(p, q), **every_path).step()

    assert [1.0, 0.9375] == [p.item(), q.item()]


def test_a_frozen_parameter_keeps_its_value(every_path: PathOptions) -> None:
    """requires_grad=False in the groups: untouched, from the start or frozen between steps."""
    p, q = nn.Parameter(torch.ones(1), requires_grad=False), weight(1.0, grad=[0.0])
    opt = CautiousDecay(sgd(p, q), **every_path)
    opt.step()
    q.requires_grad_(requires_grad=False).grad = None
    opt.step()

    assert [1.0, 0.9375] == [p.item(), q.item()]


def test_no_gradient_at_all(every_path: PathOptions) -> None:
    """A step before any backward changes nothing."""
    p = weight(1.0)
    CautiousDecay(sgd(p), **every_path).step()

    assert 1.0 == p.item()


def test_tied_weights_decay_once(every_path: PathOptions) -> None:
    """Two layers that share a weight: model.parameters() has it once, and it decays once."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros(2, 2)
    CautiousDecay(sgd(*model.parameters()), **every_path).step()

    torch.testing.assert_close(before * 0.9375, model[0].weight.detach())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_in_a_group_decays_once(every_path: PathOptions) -> None:
    """torch only warns of it and steps twice; the decay is taken once: 1 - 2*0.125 - 0.0625."""
    p = weight(1.0, grad=[1.0])
    CautiousDecay(sgd(p, p), **every_path).step()

    assert 0.6875 == p.item()


def test_gradients_that_come_and_go(every_path: PathOptions) -> None:
    """Parameters that take part in every other step decay in every other step."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0)
    opt = CautiousDecay(sgd(p, q), **every_path)
    for _ in range(4):
        opt.step()
        p.grad, q.grad = q.grad, p.grad

    assert [0.9375**2] * 2 == [p.item(), q.item()]


def test_a_group_that_opted_out_does_not_decay(every_path: PathOptions) -> None:
    """A group with weight_decay 0 takes the base's step only, bit for bit."""
    p, q = weight(0.1, grad=[0.3]), weight(1.0, grad=[0.0])
    expected = plain_step(p)
    base = SGD([{"params": [p], "weight_decay": 0.0}, {"params": [q]}], lr=LR, weight_decay=LAM, **every_path.base)
    CautiousDecay(base, **every_path).step()

    assert torch.equal(expected, p)
    assert 0.9375 == q.item()


def test_groups_of_both_paths_in_one_base() -> None:
    """The group with ``caution`` goes in pieces, the other by direction: both decay just the same."""
    p, q = weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])
    base = SGD([{"params": [p]}, {"params": [q]}], lr=LR, weight_decay=LAM, momentum=0.5)
    base.param_groups[1]["caution"] = True
    opt = CautiousDecay(base)
    opt.step()

    assert 4 == opt.snapshot_bytes
    assert ["direction", "pieces"] == [of_group.path for of_group in opt.paths()]
    assert [0.8125, 0.8125] == [p.item(), q.item()]


# ------------------------------------------------------------------------------------ sparse gradients


def sparse(indices: list[int], values: list[list[float]], rows: int = 4) -> Tensor:
    return torch.sparse_coo_tensor([indices], values, (rows, len(values[0])), check_invariants=True)


SPARSE = {
    "SGD": (lambda p, **o: SGD([p], lr=LR, **o), ("direction", "snapshot")),
    "Adagrad": (lambda p, **_: Adagrad([p], lr=LR), ("direction", "snapshot")),
    "SparseAdam": (lambda p, **_: SparseAdam([p], lr=LR), ("snapshot",)),
}
sparse_bases = pytest.mark.parametrize(
    ("build", "path"),
    [pytest.param(b, path, id=f"{n}-{path}") for n, (b, paths) in SPARSE.items() for path in paths],
)


@sparse_bases
@pytest.mark.parametrize("closure", [False, True], ids=["backward", "closure"])
def test_only_rows_in_the_gradient_decay(build: Any, path: str, closure: bool) -> None:
    """Rows 0 and 2 have a gradient: they step and decay by the rule. Rows 1 and 3 keep their bits."""
    ours, theirs = (nn.Parameter(torch.tensor([[1.0, -1.0]] * 4)) for _ in range(2))
    opt, plain = CautiousDecay(build(ours), lam=LAM, path=path), build(theirs)
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
def test_an_explicit_zero_in_a_sparse_gradient(build: Any, path: str, strict: bool) -> None:
    """A row that is in the gradient with value 0 decays, as a dense 0 does; with strict=True it does not."""
    p = nn.Parameter(torch.ones(4, 1))
    p.grad = sparse([1], [[0.0]])
    CautiousDecay(build(p), lam=LAM, path=path, strict=strict).step()

    torch.testing.assert_close(torch.tensor([1.0, 1.0 if strict else 0.9375, 1.0, 1.0]), p.detach().flatten())


@sparse_bases
def test_a_row_that_comes_twice_decays_once_by_the_sum(build: Any, path: str) -> None:
    """Row 2 comes with +1 and -3: their sum grows the weight, so it does not decay; row 1, twice +1, decays once."""
    p, q = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(4, 1))
    p.grad = sparse([2, 2, 1, 1], [[1.0], [-3.0], [1.0], [1.0]])
    q.grad = p.grad.coalesce()
    opt, plain, reports = CautiousDecay(build(p), lam=LAM, path=path), build(q), []
    opt.observer = reports.append
    opt.step()
    plain.step()

    assert [(1, 2)] == [(int(report.active), report.total) for report in reports]
    torch.testing.assert_close(q.detach() - torch.tensor([[0], [ETA_LAM], [0], [0]]), p.detach())


@sparse_bases
def test_an_empty_sparse_gradient_changes_nothing(build: Any, path: str) -> None:
    """A sparse gradient without entries: no row steps, none decays."""
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.long), torch.empty(0, 2), (4, 2), check_invariants=True
    )
    CautiousDecay(build(p), lam=LAM, path=path).step()

    assert torch.equal(torch.ones(4, 2), p)


def test_a_gradient_that_is_sparse_in_both_dimensions(every_path: PathOptions) -> None:
    """Where single entries are given, single entries decay."""
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, -1.0], (2, 2), check_invariants=True)
    CautiousDecay(sgd(p), **every_path).step()

    torch.testing.assert_close(torch.tensor([[1.0, 0.8125], [1.125, 1.0]]), p.detach())


def test_an_embedding_among_dense_layers(every_path: PathOptions) -> None:
    """Sparse and dense gradients in one group: looked-up rows and the dense weight decay, other rows do not."""
    embedding, head = nn.Embedding(4, 1, sparse=True), weight(1.0, grad=[0.0])
    embedding.weight.data.fill_(1.0)
    opt = CautiousDecay(sgd(embedding.weight, head), **every_path)
    embedding(torch.tensor([0, 2, 2])).sum().backward()
    opt.step()

    assert [1 - 0.125 - 0.0625, 1, 1 - 0.25 - 0.0625, 1] == embedding.weight.flatten().tolist()
    assert 0.9375 == head.item()


def test_a_gradient_may_turn_from_dense_to_sparse(every_path: PathOptions) -> None:
    """Each step looks at the gradient that it has: first all rows decay, then one."""
    p = nn.Parameter(torch.ones(3, 1))
    opt = CautiousDecay(sgd(p), **every_path)
    for grad in (torch.zeros(3, 1), sparse([1], [[0.0]], rows=3), torch.zeros(3, 1)):
        p.grad = grad
        opt.step()

    assert [0.9375**2, 0.9375**3, 0.9375**2] == p.flatten().tolist()


# ------------------------------------------------------------------------------------ shapes, strides, types

SMALL, LARGE = (4, 6, 2, 2), (64, 128, 2, 2)  # packed with others, and worked on in place


def strided(kind: str, shape: tuple[int, ...]) -> Tensor:
    """A random tensor of ``shape``, laid out in memory as ``kind`` says."""
    t = torch.randn(shape, dtype=torch.float64)
    return {
        "contiguous": lambda: t,
        "channels_last": lambda: t.to(memory_format=torch.channels_last),
        "transposed": lambda: t.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": lambda: torch.stack([t, t + 1], dim=-1)[..., 0],
        "part of a larger one": lambda: torch.nn.functional.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    }[kind]()


LAYOUTS = ["contiguous", "channels_last", "transposed", "every other", "part of a larger one"]


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_layouts(of_weight: str, of_grad: str, every_path: PathOptions) -> None:
    """Weights and gradients of any strides, equal or not, small or large, obey the rule and keep their strides."""
    params = [nn.Parameter(strided(of_weight, shape)) for shape in (SMALL, LARGE, SMALL)]
    strides = [p.stride() for p in params]
    for p in params:
        p.grad = strided(of_grad, tuple(p.shape))
    expected = [ruled(p.detach().clone(), plain_step(p), ETA_LAM) for p in params]
    CautiousDecay(sgd(*params), **every_path).step()

    assert strides == [p.stride() for p in params]
    torch.testing.assert_close(expected, [p.detach() for p in params], rtol=1e-14, atol=1e-14)


def test_memory_between_the_weights_is_left_alone(every_path: PathOptions) -> None:
    """A parameter that is every other number of a buffer decays; the numbers between keep their bits."""
    buffer = torch.ones(8)
    p = nn.Parameter(buffer[::2])
    p.grad = torch.zeros(4)
    CautiousDecay(sgd(p), **every_path).step()

    assert [0.9375, 1.0] * 4 == buffer.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1, 1, 1)])
def test_small_shapes(shape: tuple[int, ...], every_path: PathOptions) -> None:
    """0-d, empty and one-element parameters decay, or do not mind."""
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.zeros(shape)
    CautiousDecay(sgd(p), **every_path).step()

    assert torch.equal(torch.full(shape, 0.9375), p)


@pytest.mark.parametrize("base", [SGD, Adam, AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype, base: Any, every_path: PathOptions) -> None:
    """float64 down to bfloat16: with a zero gradient a step is one rounding of 0.9375 x, and the type stays."""
    x = torch.linspace(-2, 2, 65, dtype=dtype)
    p = nn.Parameter(x.clone())
    p.grad = torch.zeros_like(p)
    options = {} if base is SGD else {"eps": 1e-4}  # Adam's own 1e-8 is 0 in float16, and 0/0 NaN
    CautiousDecay(base([p], lr=LR, weight_decay=LAM, **options), **every_path).step()

    assert dtype == p.dtype
    assert torch.equal((x.double() - ETA_LAM * x.double()).to(dtype), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_obey_the_mask(dtype: torch.dtype, every_path: PathOptions) -> None:
    """In 16 bits too, of 1, 1, -1, -1 the first and the last decay; these numbers are exact in both types."""
    p = weight(1, 1, -1, -1, grad=[1, -1, 1, -1], dtype=dtype)
    CautiousDecay(sgd(p), **every_path).step()

    assert [0.8125, 1.125, -1.125, -0.8125] == p.tolist()


def test_the_direction_sees_a_step_that_rounds_away() -> None:
    """In bfloat16, 1 + 2^-10 is 1: the snapshot cannot tell that the weight was to grow; the direction can."""
    results = []
    for path in ("direction", "snapshot"):
        p = weight(1.0, grad=[-(2.0**-7)], dtype=torch.bfloat16)
        CautiousDecay(sgd(p), path=path).step()
        results.append(p.item())

    assert [1.0, 0.9375] == results


@pytest.mark.parametrize("foreach", [False, True])
def test_types_mixed_in_one_group(foreach: bool, every_path: PathOptions) -> None:
    """Parameters of four types in one group each obey the rule in their own."""
    types = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [weight(1, 1, -1, -1, grad=[1, -1, 1, -1], dtype=dtype) for dtype in types * 2]
    CautiousDecay(sgd(*params, foreach=foreach), **every_path).step()

    assert [[0.8125, 1.125, -1.125, -0.8125]] * 8 == [p.tolist() for p in params]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_decay_by_their_parts(dtype: torch.dtype, every_path: PathOptions) -> None:
    """Real and imaginary part are two weights, as torch takes them: of 1+i with gradient 1-i only the 1 decays."""
    p = nn.Parameter(torch.tensor([1 + 1j, -1 - 1j], dtype=dtype))
    p.grad = torch.tensor([1 - 1j, 1 - 1j], dtype=dtype)
    CautiousDecay(sgd(p), **every_path).step()

    assert [0.8125 + 1.125j, -1.125 - 0.8125j] == p.tolist()


@pytest.mark.parametrize("base", [Adam, AdamW])
def test_complex_weights_with_a_state(base: Any, every_path: PathOptions) -> None:
    """Adam's moments of complex weights are complex; the mask is of the parts still."""
    p = nn.Parameter(torch.tensor([1 + 1j, -1 - 1j], dtype=torch.complex128))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    opt, real = (CautiousDecay(base([w], lr=LR, weight_decay=LAM), **every_path) for w in (p, q))
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
    CautiousDecay(AdamW([p], lr=lr, weight_decay=LAM, foreach=False, **every_path.base), **every_path).step()

    assert (dtype, 0.9375) == (p.dtype, p.item())


def test_many_small_tensors(every_path: PathOptions) -> None:
    """A thousand tensors of different sizes, in groups of different strengths, each decay by their own."""
    groups = [
        {"params": [nn.Parameter(torch.ones(i % 7, 3)) for i in range(100)], "weight_decay": k / 16} for k in range(10)
    ]
    base = SGD(groups, lr=1.0)
    for group in base.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    CautiousDecay(base, **every_path).step()

    for k, group in enumerate(base.param_groups):
        assert {1 - k / 16} == {x for p in group["params"] for x in p.flatten().tolist()}


def test_the_snapshot_follows_its_parameters() -> None:
    """Between steps a parameter changes its type and a group its parameters: the copies are taken anew."""
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
