"""The Triton kernels, interpreted, do what rules.py says. Needs a process of its own:

TRITON_INTERPRET=1 pytest tests/test_triton_values.py
"""

import os
from itertools import pairwise

import pytest
import torch
from support import both_paths, net, train, values
from test_stochastic_rounding import sigmas, weights
from torch import Tensor
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay, kernels, rules

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

import triton.language as tl  # noqa: E402

from cwd_wrap.kernels import _triton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities and NaN

SIZES = [0, 1, 7, 1023, 1024, 1025, _triton.CHUNK, _triton.CHUNK + 1, 2 * _triton.CHUNK + 1027]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = {"adam": (0.9, 1 - 0.9), "gan": (0.5, 0.5), "beta 0.3": (0.3, 0.7), "sgd": (0.9, 1.0), "maximize": (0.9, -0.1)}
MIXED = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.float64),
]


def some(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_along(
    x: Tensor, m: Tensor | None, g: Tensor, a: float, b: float, eta_lam: float | Tensor, strict: bool = False
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    u = b * g.to(wide)
    if m is not None:
        m, g = m.to(wide), g.to(wide)
        average = m + b * (g - m) if b < 0.5 else g + (torch.tensor(b, dtype=wide) - 1) * (g - m)
        u = average if b == 1 - a else m + b / a * g
    return rules.decay(x, x, rules.aligned(u, x.to(wide), strict), eta_lam)


def expected_after(w: Tensor, x: Tensor, eta_lam: float | Tensor, strict: bool = False) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    return rules.decay(w, x, rules.moved_towards_zero(x.to(wide), w.to(wide), strict), eta_lam)


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN being NaN; 16-bit types to one unit in the last place, since the interpreter truncates."""
    if one.element_size() > 2:
        return torch.equal(torch.nan_to_num(one, nan=123.0), torch.nan_to_num(other, nan=123.0))
    return bool(((one.view(torch.int16).int() - other.view(torch.int16).int()).abs() <= 1).all())


def along(w: list[Tensor], m: list[Tensor | None], g: list[Tensor], pair: tuple[float, float], eta_lam, strict=False):
    n = len(w)
    a, b = [pair[0]] * n, [pair[1]] * n
    return _triton.decay_along(w, m, g, a, b, [eta_lam] * n, strict=strict, count=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_along_equals_the_rule(pair: tuple[float, float], strict: bool) -> None:
    """Decay along a momentum, over tensors of every size in one launch, is the rule on each."""
    w, m, g = ([some(n, torch.float32, n + k) for n in SIZES] for k in (0, 1, 2))
    expected = [expected_along(*row, *pair, 0.3, strict) for row in zip(w, m, g, strict=True)]
    along(w, m, g, pair, 0.3, strict)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("b", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_along_a_gradient_equals_the_rule(dtype: torch.dtype, b: float) -> None:
    """So it is along the gradient alone, in every type; a negative b maximizes."""
    w, g = ([some(n, dtype, n + k) for n in (0, 7, 1025)] for k in (0, 1))
    expected = [expected_along(x, None, y, 0.0, b, 0.3) for x, y in zip(w, g, strict=True)]
    along(w, [None] * 3, g, (0.0, b), 0.3)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_snapshot_equals_the_rule(dtype: torch.dtype, strict: bool) -> None:
    """Decay from a snapshot, over tensors of every size in one launch, is the rule on each."""
    w, x = ([some(n, dtype, n + k) for n in SIZES] for k in (0, 1))
    expected = [expected_after(*pair, 0.3, strict) for pair in zip(w, x, strict=True)]
    _triton.decay_from_snapshot(w, x, [0.3] * len(w), strict=strict, count=False)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("types", [(dtype,) * 3 for dtype in DTYPES] + MIXED, ids=str)
def test_types_may_differ(types: tuple[torch.dtype, ...]) -> None:
    """Weights, momenta and gradients of different types are worked on in float32, or in float64 for such weights."""
    w, m, g = (some(1500, dtype, seed) for seed, dtype in enumerate(types))
    expected = expected_along(w, m, g, *PAIRS["adam"], 0.3)
    along([w], [m], [g], PAIRS["adam"], 0.3)

    assert equal(w, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_special_values(strict: bool) -> None:
    """Signed zeros, denormals, huge numbers, infinities and NaN come out as rules.py has them, in every combination."""
    one, other, third = (t.reshape(-1) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * 3, indexing="ij"))
    by_momentum, by_gradient, after = one.clone(), one.clone(), one.clone()
    along([by_momentum], [other], [third], PAIRS["adam"], 0.3, strict)
    along([by_gradient], [None], [other], (0.0, 1.0), 0.3, strict)
    _triton.decay_from_snapshot([after], [other], [0.3], strict=strict, count=False)

    assert equal(by_momentum, expected_along(one, other, third, *PAIRS["adam"], 0.3, strict))
    assert equal(by_gradient, expected_along(one, None, other, 0.0, 1.0, 0.3, strict))
    assert equal(after, expected_after(one, other, 0.3, strict))


def test_the_sign_of_zero_survives() -> None:
    """-0.0 - 0.3 * -0.0 is 0.0, and a weight of -0.0 that is not decayed is -0.0 - 0.0 = -0.0, as in rules.py."""
    w = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    g = torch.tensor([1.0, 1.0, -1.0, -1.0])
    expected = expected_along(w, None, g, 0.0, 1.0, 0.3)
    along([w], [None], [g], (0.0, 1.0), 0.3)

    assert torch.equal(torch.signbit(w), torch.signbit(expected))


def test_thousands_of_small_tensors() -> None:
    """Two thousand tensors of 1 to 13 weights go in one launch."""
    w, x = ([some(1 + i % 13, torch.float32, i + k) for i in range(2000)] for k in (0, 5000))
    expected = [expected_after(*pair, 0.3) for pair in zip(w, x, strict=True)]
    _triton.decay_from_snapshot(w, x, [0.3] * len(w), strict=False, count=False)

    assert all(map(equal, w, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_at_odd_offsets(dtype: torch.dtype) -> None:
    """Views of a flat buffer that begin anywhere are decayed, and what lies between them is left alone."""
    w, x = some(4000, dtype, 0), some(4000, dtype, 1)
    edges = (1, 8, 1033, 2500, 3999)
    expected = w.clone()
    expected[1:3999] = expected_after(w[1:3999], x[1:3999], 0.3)
    w_views, x_views = ([t[a:b] for a, b in pairwise(edges)] for t in (w, x))
    _triton.decay_from_snapshot(w_views, x_views, [0.3] * 4, strict=False, count=False)

    assert equal(w, expected)


def test_strides_do_not_matter() -> None:
    """Transposed, strided and channels_last weights, and companions of other strides, give the same."""
    base, x = some(4000, torch.float32, 0).view(4, 1000), some(4000, torch.float32, 1).view(4, 1000)
    expected = expected_after(base, x, 0.3)
    transposed = base.t().contiguous().t()
    strided = torch.zeros(4, 2000)[:, ::2].copy_(base)
    last = base.view(1, 2, 2, 1000).clone(memory_format=torch.channels_last)
    pairs = [(transposed, x), (strided, x), (base.clone(), x.t().contiguous().t()), (last, x.view(1, 2, 2, 1000))]
    _triton.decay_from_snapshot(*map(list, zip(*pairs, strict=True)), [0.3] * 4, strict=False, count=False)

    assert all(equal(w.reshape(4, 1000), expected) for w, _ in pairs)


def test_each_tensor_has_its_own_numbers() -> None:
    """Coefficients and strengths may differ from tensor to tensor; strengths may be numbers or tensors of any type."""
    w, m, g = ([some(50, torch.float32, i + k) for i in range(5)] for k in (0, 50, 100))
    a, b = [0.9, 0.9, 0.5, 0.9, 0.0625], [1 - 0.9, 1.0, 0.5, -0.1, 3.0]
    eta_lam = [0.1, torch.tensor(0.2), torch.tensor([0.25], dtype=torch.float64), 0.1, torch.tensor([0.0, 0.5])[1]]
    expected = [expected_along(*row) for row in zip(w, m, g, a, b, eta_lam, strict=True)]
    _triton.decay_along(w, m, g, a, b, eta_lam, strict=False, count=False)

    assert all(map(equal, w, expected))


def test_a_strength_on_the_device_is_read_afresh() -> None:
    """A tensor whose value changes in place gives the new value at the next call, though no table has changed."""
    eta_lam = torch.tensor(0.5)
    w, x = torch.ones(3), torch.ones(3)
    _triton.decay_from_snapshot([w], [x], [eta_lam], strict=False, count=False)
    eta_lam.fill_(0.25)
    _triton.decay_from_snapshot([w], [x], [eta_lam], strict=False, count=False)

    assert w.tolist() == [0.25] * 3


def test_count() -> None:
    """The weights that were decayed are counted over all tensors, those in the masked rest of a block included once."""
    w, g = ([some(n, torch.float32, n + k) for n in SIZES] for k in (0, 1))
    expected = sum(int(rules.aligned(y, x).sum()) for x, y in zip(w, g, strict=True))

    assert int(along(w, [None] * len(w), g, (0.0, 1.0), 0.3)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(dtype: torch.dtype) -> None:
    """A copy is bit for bit."""
    source = [
        torch.tensor(SPECIAL).to(dtype),
        *(some(n, dtype, n) for n in (0, 1025)),
        some(60, dtype, 1).view(6, 10).t(),
    ]
    to = [torch.full_like(t, 7) for t in source]
    _triton.copy(to, source)

    assert all(torch.equal(a.nan_to_num(5), b.nan_to_num(5)) for a, b in zip(to, source, strict=True))


def test_empty_tensors_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to decay there is no launch."""
    monkeypatch.setattr(_triton, "_sweep", None)
    empty = [torch.empty(0), torch.empty(0, 3)]
    _triton.copy(empty, empty)

    assert _triton.decay_from_snapshot([], [], [], strict=False, count=True) == 0
    assert _triton.decay_along(empty, [None] * 2, empty, [0.0] * 2, [1.0] * 2, [0.1] * 2, strict=False, count=True) == 0


@triton.jit
def _p_norm(w, y, z, p, beta, eta_lam, STRICT: tl.constexpr):
    size = tl.exp2((2 - p) * tl.log2(tl.abs(w)))
    return w * size / (size + p * eta_lam), size > 0


def test_another_rule_fits_the_frame() -> None:
    """A rule is one function: here the p-norm decay, with one tensor in and a coefficient of its own."""
    w = [some(n, torch.float32, n) for n in (5, 1500)]
    expected = [t * t.abs() ** 1.2 / (t.abs() ** 1.2 + 0.8 * 0.1) for t in w]
    _triton._launch(_p_norm, (w,), [(0.8, 0.0)] * 2, _triton._as_it_is, [0.1] * 2)

    torch.testing.assert_close(w, expected)


@both_paths
@pytest.mark.parametrize(
    "build",
    [lambda p: AdamW(p, lr=0.01, weight_decay=0.5), lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5)],
    ids=["AdamW", "SGD"],
)
def test_the_wrapper_gives_what_it_gives_with_eager(build, snapshot: bool) -> None:
    """Four steps of the wrapper with backend="triton" equal four with backend="eager", and None means triton here."""
    trained = {}
    for backend in ("eager", "triton", None):
        model = net()
        train(model, CautiousDecay(build(model.parameters()), snapshot=snapshot, backend=backend), range(4))
        trained[backend] = values(model)

    torch.testing.assert_close(trained["triton"], trained["eager"])
    assert torch.equal(trained[None], trained["triton"])


def test_a_compiled_call_equals_an_uncompiled_one() -> None:
    """Inside a compiled region the launch breaks the graph, and each call gives what it gives outside."""
    plain, compiled, x = (some(7, torch.float32, seed) for seed in (0, 0, 1))

    def work(w: Tensor) -> Tensor:
        _triton.decay_from_snapshot([w], [x * 2], [0.3], strict=False, count=False)
        return w + 1

    torch._dynamo.reset()
    calls = torch.compile(work, backend="eager")

    assert all(torch.equal(calls(compiled), work(plain)) for _ in range(3))


@both_paths
def test_compiled_steps_equal_uncompiled_ones(snapshot: bool) -> None:
    """Under torch.compile the wrapper's steps do what they do outside."""
    trained = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        torch._dynamo.reset()
        model = net()
        opt = CautiousDecay(SGD(model.parameters(), lr=0.1), lam=0.5, snapshot=snapshot, backend="triton")
        step = wrap(lambda opt=opt: opt.step())
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            step()
        trained.append(values(model))

    torch.testing.assert_close(*trained)


# ---- the siblings: they count each tensor first


def update(w: list[Tensor], x: list[Tensor], g: list[Tensor], eta_lam, scale: str | None = "mean") -> Tensor:
    """The cautious update as the wrapper has it carried out; returns the counts."""
    counts = _triton.count_agreeing(w, x, g)
    numel = _triton.vector([t.numel() for t in w], torch.device("cpu"))
    kept = counts.to(torch.promote_types(w[0].dtype, torch.float32))
    _triton.cautious_update(w, x, g, rules.alpha(kept, numel, scale), [eta_lam] * len(w))
    return counts


def expected_update(w: Tensor, x: Tensor, g: Tensor, eta_lam, scale: str | None = "mean") -> Tensor:
    mask = rules.agrees(w, x, g)
    kept = mask.sum().to(torch.promote_types(w.dtype, torch.float32))
    return rules.cautious_update(w, x, mask, rules.alpha(kept, torch.tensor(w.numel()), scale), eta_lam)


def shrink(w: list[Tensor], x: list[Tensor], p: float, eta_lam) -> Tensor:
    """The p-norm decay as the wrapper has it carried out; returns the counts."""
    counts = _triton.count_nonzero(x)
    _triton.p_norm_decay(w, x, p, [eta_lam] * len(w), counts)
    return counts


def expected_shrink(w: Tensor, x: Tensor, p: float, eta_lam) -> Tensor:
    return rules.p_norm_decay(w, x, p, eta_lam, x.count_nonzero() == 0)


def close(one: Tensor, other: Tensor, ulps: int = 16) -> bool:
    """To so many units in the last place: those of exp2(y * log2|x|) are up to |y * log2|x||, here below 2 * 12."""
    if one.element_size() == 2:
        return equal(one, other)
    limit = ulps * torch.finfo(one.dtype).eps * other.abs()
    same = (one == other) | one.isnan() & other.isnan()
    return bool((same | ((one - other).abs() <= limit)).all())


@pytest.mark.parametrize("scale", ["mean", "numel", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cautious_update_equals_the_rule(dtype: torch.dtype, scale: str | None) -> None:
    """The cautious update, over tensors of every size in two launches, is the rule on each, and counts right."""
    w, x, g = ([some(n, dtype, n + k) for n in SIZES] for k in (0, 1, 2))
    kept = [int(rules.agrees(*row).sum()) for row in zip(w, x, g, strict=True)]
    expected = [expected_update(*row, 0.3, scale) for row in zip(w, x, g, strict=True)]

    assert update(w, x, g, 0.3, scale).tolist() == kept
    assert all(map(equal, w, expected))


@pytest.mark.parametrize("p", [0.2, 0.8, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_p_norm_decay_equals_the_rule(dtype: torch.dtype, p: float) -> None:
    """The p-norm decay, over tensors of every size in two launches, is the rule on each; one is 0 as a whole."""
    w, x = ([some(n, dtype, n + k) for n in SIZES] for k in (0, 1))
    x[4].zero_()
    x[5][::2] = 0
    nonzero = [int(t.count_nonzero()) for t in x]
    expected = [expected_shrink(*row, p, 0.3) for row in zip(w, x, strict=True)]
    kept = w[4].clone()

    assert shrink(w, x, p, 0.3).tolist() == nonzero
    assert all(map(close, w, expected))
    assert torch.equal(w[4], kept)
    assert p == 2 or not w[5][::2].any()


def test_p_norm_decay_of_special_values() -> None:
    """Signed zeros, denormals, huge numbers, infinities and NaN come out as rules.py has them, at every p and rate."""
    one, other = (t.reshape(-1) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * 2, indexing="ij"))
    for p in (0.2, 0.8, 1.0, 1.5, 2.0):
        for eta_lam in (0.0, 1e-6, 0.3, torch.tensor(0.3), torch.tensor(0.0)):
            w = one.clone()
            shrink([w], [other], p, eta_lam)

            assert close(w, expected_shrink(one, other, p, eta_lam), ulps=256), (p, eta_lam)  # 2 * 150 at 1e-45


def test_cautious_update_of_special_values() -> None:
    """So it is with the cautious update, in every combination."""
    w, x, g = (t.reshape(-1) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * 3, indexing="ij"))
    for scale in ("mean", None):
        after = w.clone()
        update([after], [x], [g], 0.3, scale)

        assert equal(after, expected_update(w, x, g, 0.3, scale))


def test_p_norm_and_cautious_update_of_many_small_tensors() -> None:
    """Three hundred tensors of 0 to 12 weights: each has a count and a factor of its own."""
    w, x, g = ([some(i % 13, torch.float32, i + k) for i in range(300)] for k in (0, 5000, 10_000))
    for t in x[::7]:
        t.zero_()
    updated, shrunk = ([t.clone() for t in w] for _ in range(2))
    update(updated, x, g, 0.3)
    shrink(shrunk, x, 0.8, 0.3)

    assert all(equal(a, expected_update(*row, 0.3)) for a, *row in zip(updated, w, x, g, strict=True))
    assert all(close(a, expected_shrink(*row, 0.8, 0.3)) for a, *row in zip(shrunk, w, x, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_norm_and_cautious_update_of_views(dtype: torch.dtype) -> None:
    """Views that begin anywhere, and transposed and strided ones, give the same; what lies between is left alone."""
    flat, x, g = (some(4000, dtype, k) for k in range(3))
    views = [slice(1, 8), slice(8, 1033), slice(1033, 3999)]
    wide = torch.zeros(40, 200, dtype=dtype)
    strided = wide[:, ::2]
    transposed = flat.view(40, 100).t().contiguous().t()
    for rule, wanted in (
        (lambda w, x, g: update(w, x, g, 0.3), lambda *row: expected_update(*row, 0.3)),
        (lambda w, x, g: shrink(w, x, 0.8, 0.3), lambda w, x, g: expected_shrink(w, x, 0.8, 0.3)),
    ):
        w, expected = flat.clone(), flat.clone()
        for view in views:
            expected[view] = wanted(flat[view], x[view], g[view])
        rule([w[view] for view in views], [x[view] for view in views], [g[view] for view in views])
        both = [strided.copy_(flat.view(40, 100)), transposed.copy_(flat.view(40, 100))]
        x_g = [x.view(40, 100).t().contiguous().t(), x.view(40, 100)], [g.view(40, 100)] * 2
        rule(both, *x_g)

        assert close(w, expected)
        assert all(close(t.reshape(-1), wanted(flat, x, g)) for t in both)
        assert not wide[:, 1::2].any()


def test_p_norm_and_cautious_update_of_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing there is no launch, and the counts are 0."""
    monkeypatch.setattr(_triton, "_sweep", None)
    empty = [torch.empty(0), torch.empty(0, 3)]

    assert update(empty, empty, empty, 0.3).tolist() == shrink(empty, empty, 0.8, 0.3).tolist() == [0, 0]


def test_p_norm_and_cautious_update_read_a_strength_afresh() -> None:
    """Each tensor has its own strength, a number or a tensor whose value of the moment counts."""
    eta_lam = [0.1, torch.tensor(0.5), torch.tensor([0.25], dtype=torch.float64)]
    for _ in range(2):
        w, x, g = ([some(50, torch.float32, i + k) for i in range(3)] for k in (0, 50, 100))
        updated, shrunk = ([t.clone() for t in w] for _ in range(2))
        _triton.cautious_update(updated, x, g, torch.tensor([1.0, 2.0, 3.0]), eta_lam)
        _triton.p_norm_decay(shrunk, x, 0.8, eta_lam, torch.tensor([1, 0, 50]))
        for i, c in enumerate(eta_lam):
            mask = rules.agrees(w[i], x[i], g[i])
            assert equal(updated[i], rules.cautious_update(w[i], x[i], mask, torch.tensor(i + 1.0), c))
            assert close(shrunk[i], rules.p_norm_decay(w[i], x[i], 0.8, c, torch.tensor(i == 1)))
        eta_lam[1].fill_(0.01)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda base, **backend: CautiousUpdate(base, **backend),
        lambda base, **backend: CautiousUpdate(base, scale="numel", **backend),
        lambda base, **backend: PNormDecay(base, **backend),
        lambda base, **backend: PNormDecay(base, p=2, **backend),
    ],
    ids=["cautious_update", "cautious_update numel", "p_norm 0.8", "p_norm 2"],
)
def test_the_siblings_give_what_they_give_with_eager(wrap) -> None:
    """Three steps over AdamW with backend="triton" equal three with backend="eager", observers included."""
    trained, heard = {}, {}
    for backend in ("eager", "triton", None):
        model, reports = net(), []
        with torch.no_grad():
            model[2].weight.zero_()
            model[0].bias[:2] = 0
        opt = wrap(AdamW(model.parameters(), lr=0.01, weight_decay=0.5), backend=backend)
        opt.observer = lambda report, to=reports: to.append((int(report.active), report.total))
        train(model, opt, range(3))
        trained[backend], heard[backend] = values(model), reports

    torch.testing.assert_close(trained["triton"], trained["eager"])
    assert torch.equal(trained[None], trained["triton"])
    assert heard["eager"] == heard["triton"]
    assert len(heard["eager"]) == 3


# ---- stochastic rounding


@triton.jit
def _second(w, y, z, alpha, beta, strength, STRICT: tl.constexpr):
    return y, y == y


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide`` in ``dtype``, as a kernel rounds what it writes."""
    out = torch.empty(wide.shape, dtype=dtype)
    _triton._launch(_second, ([out], [wide]), [(0.0, 0.0)], _triton._as_it_is, [0.0], stochastic=True)
    return out


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@NARROW
def test_any_number_is_rounded_to_a_neighbour(dtype: torch.dtype) -> None:
    """Float32 of every size come out as one of the two that rules.py chooses from; NaN stays NaN."""
    wide = torch.randint(-(1 << 31), 1 << 31, (20_000,)).to(torch.int32).view(torch.float32)
    small = torch.randint(0x32000000, 0x39000000, (5000,)).to(torch.int32).view(torch.float32)  # 7e-9 to 1.2e-4
    normal = (wide.abs() < 3.3e38) & (wide.abs() > 2.0**-126)  # the interpreter writes no subnormal bfloat16
    wide = torch.cat([wide[normal], small, -small, torch.tensor([0.0, -0.0, float("inf"), 65519.0, 65520.0])])
    one = rounded(wide, dtype)
    choices = [rules.stochastic_rounding(wide, dtype, torch.full_like(wide, random)) for random in (0.0, 1.0)]
    bits, *expected = (t.view(torch.int16) for t in (one, *choices))
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)

    assert ((bits == expected[0]) | (bits == expected[1])).all()
    assert (bits != expected[0]).any()
    assert (bits != expected[1]).any()
    assert rounded(nan, dtype).isnan().all()


@pytest.mark.parametrize("wide", [0.9991, -1.0003, 3e-5, -6.09e-5, 5.3 * 2.0**-24, -0.3 * 2.0**-24, 60_001.0])
@NARROW
def test_the_mean_of_what_is_rounded(dtype: torch.dtype, wide: float) -> None:
    """The mean of 8,192 roundings is the number: near powers of two, subnormal, and below the smallest of all."""
    numbers = torch.full((8192,), wide)

    assert abs(sigmas(rounded(numbers, dtype).double() - numbers.double())) < 5


@both_paths
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "normal"), (torch.float16, "normal"), (torch.float16, "subnormal")],
    ids=["bf16", "fp16", "fp16 subnormal"],
)
def test_the_mean_decay_is_that_of_float32(dtype: torch.dtype, kind: str, snapshot: bool) -> None:
    """Two decays by 1e-4 of 16,384 weights are those of float32 on average; without the flag none of them moves."""
    x = weights(kind, dtype)[: 1 << 14]
    w, plain, wide = x.clone(), x.clone(), x.float()
    for out, stochastic in ((w, True), (plain, False)):
        for _ in range(2 if stochastic else 1):
            flags = {"strict": False, "count": False, "stochastic": stochastic}
            if snapshot:
                _triton.decay_from_snapshot([out], [out.clone()], [1e-4], **flags)
            else:
                _triton.decay_along([out], [None], [x], [0.0], [1.0], [1e-4], **flags)
    for _ in range(2):
        wide -= 1e-4 * wide
    error = (w.float() - wide) * x.sign()

    assert abs(sigmas(error)) < 5
    assert abs(sigmas(error + (wide - x.float()) * x.sign() / 2)) > 5  # it would notice a decay that is half off
    assert equal(plain, x)


@NARROW
def test_stochastic_rounding_leaves_masked_weights(dtype: torch.dtype) -> None:
    """A weight that is not decayed keeps its bits, and the generator gives the same roundings again."""
    x, g, runs = some(3000, dtype, 0), some(3000, dtype, 1), []
    for _ in range(2):
        torch.manual_seed(0)
        w = x.clone()
        _triton.decay_along([w], [None], [g], [0.0], [1.0], [0.01], strict=False, count=False, stochastic=True)
        runs.append(w)
    masked = ~rules.aligned(g, x)

    assert torch.equal(w.view(torch.int16)[masked], x.view(torch.int16)[masked])
    assert not torch.equal(w[~masked], x[~masked])
    assert torch.equal(*runs)


def test_tensors_blocks_and_neighbours_are_rounded_apart() -> None:
    """Two tensors, two blocks, two chunks, two weights side by side and two launches each get numbers of their own."""
    w = [torch.full((2 * _triton.CHUNK,), 1 - 2**-9) for _ in range(2)]
    out = [torch.empty_like(t, dtype=torch.bfloat16) for t in w]
    launches = []
    for _ in range(2):
        _triton._launch(_second, (out, w), [(0.0, 0.0)] * 2, _triton._as_it_is, [0.0] * 2, stochastic=True)
        launches.append(out[0].clone())
    a = out[0]
    pairs = [(a, out[1]), (a[1024:], a[:-1024]), (a[_triton.CHUNK :], a[: -_triton.CHUNK]), launches]
    pairs += [(a[k:], a[:-k]) for k in (1, 2, 3, 4, 8)]

    assert all(0.47 < (one == other).float().mean() < 0.53 for one, other in pairs)


@both_paths
def test_the_wrapper_rounds_stochastically(snapshot: bool) -> None:
    """Through the wrapper, bfloat16 weights draw one seed a launch and round with it; float32 ones draw nothing."""
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.nn.Parameter(torch.ones(2000, dtype=dtype))
        p.grad = torch.zeros_like(p)
        opt = CautiousDecay(SGD([p], lr=0.5), lam=2**-8, snapshot=snapshot, backend="triton", rounding="stochastic")
        before = torch.get_rng_state()
        opt.step()
        drawn = not torch.equal(torch.get_rng_state(), before)

        assert set(p.tolist()) == ({1.0, 1 - 2**-8} if dtype == torch.bfloat16 else {1 - 2**-9})
        assert drawn == (dtype == torch.bfloat16)


def test_the_interpreter_is_chosen_on_the_cpu_only() -> None:
    """With TRITON_INTERPRET=1 the choice on the CPU is triton, and for other devices it cannot be had."""
    cpu = torch.device("cpu")

    assert kernels.choose(None, cpu) is kernels.choose("triton", cpu) is _triton
    with pytest.raises(ValueError, match=r"cannot run on cuda:0.*'eager'"):
        kernels.choose("triton", torch.device("cuda", 0))
