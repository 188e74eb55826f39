"""Launches, rules and rounding of the Triton kernels. tests/test_kernels.py checks their values.

They run interpreted on the CPU, or compiled on a card:

TRITON_INTERPRET=1 pytest tests/test_triton_values.py
pytest -m gpu tests/test_triton_values.py
"""

import os
from typing import Any

import pytest
import torch
from support import both_paths, net, update_of, values
from test_devices import DEFAULTS, fused_adamw, same_on_a_default_device, sgd
from test_stochastic_rounding import draws, sigmas
from torch import Tensor
from torch.optim import SGD, Adam

from cwd_wrap import CautiousDecay, kernels, rules
from cwd_wrap.buckets import Coming, Stepped, Whole

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process, or a card", allow_module_level=True)

import triton.language as tl  # noqa: E402

from cwd_wrap.kernels import _triton  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of infinities and NaN
    pytest.mark.filterwarnings("ignore:.*is too small for bfloat16"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def some(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---- launches and rules


def test_empty_tensors_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty tensors launch no kernel."""
    monkeypatch.setattr(_triton, "_sweep", None)
    empty = [torch.empty(0, device=DEVICE), torch.empty(0, 3, device=DEVICE)]
    buckets = [Stepped(empty, empty, empty, empty, 0.1)]
    adam = update_of(Adam)
    flags = {"strict": False, "count": True}
    _triton.copy(empty, empty)
    _triton.cautious_update(buckets, torch.ones(2))
    _triton.p_norm_decay(buckets, 0.8, torch.ones(2))

    assert _triton.count_agreeing(buckets).tolist() == _triton.count_nonzero(empty).tolist() == [0, 0]
    for act, bucket in (
        (_triton.decay_along, Coming(empty, empty, None, 0.0, 1.0, 0.1)),
        (_triton.decay_from_snapshot, buckets[0]),
        (
            _triton.step_whole,
            Whole(empty, empty, (empty, empty), ([torch.zeros(()), torch.zeros(())],), adam, 0.1, 0.1),
        ),
    ):
        assert act([bucket], **flags).tolist() == [[0.0] * 5] * 2
        assert act([], **flags) is None


@triton.jit
def _p_norm(w, y, z, eta_lam, p, n1, own, STRICT: tl.constexpr):
    size = tl.exp2((2 - p) * tl.log2(tl.abs(w)))
    return w * size / (size + p * eta_lam), size > 0


def test_another_rule_fits_the_frame() -> None:
    """A rule is one function: here the p-norm decay, with one input tensor and its own coefficient."""
    w = [some(n, torch.float32, n) for n in (5, 1500)]
    expected = [t * t.abs() ** 1.2 / (t.abs() ** 1.2 + 0.8 * 0.1) for t in w]
    _triton._launch(_p_norm, [(w,)], [_triton._row(0.1, 0.8)])

    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("wide", [torch.float64, torch.int64])
def test_counters_of_another_type(wide: torch.dtype) -> None:
    """Counters of another type than float32 give the same step and are increased."""
    weights = []
    for dtype in (torch.float32, wide):
        w, g, m, v = ([torch.ones(3, device=DEVICE)] for _ in range(4))
        steps = [torch.tensor(4, dtype=dtype, device=DEVICE)]
        _triton.step_whole([Whole(w, g, (m, v), (steps,), update_of(Adam), 0.1, 0.1)], strict=False, count=False)
        weights += w

        assert steps[0].item() == 5
    assert torch.equal(*weights)


def test_a_compiled_call_equals_an_uncompiled_one() -> None:
    """Inside a compiled region the launch breaks the graph, and each call gives what it gives outside."""
    plain, compiled, x = (some(7, torch.float32, seed) for seed in (0, 0, 1))

    def work(w: Tensor) -> Tensor:
        bucket = Stepped([w], [w], [x * 2], None, 0.3)
        _triton.decay_from_snapshot([bucket], strict=False, count=False)
        return w + 1

    torch._dynamo.reset()
    calls = torch.compile(work, backend="eager")

    assert all(torch.equal(calls(compiled), work(plain)) for _ in range(3))


@both_paths
def test_compiled_steps_equal_uncompiled_ones(path: str) -> None:
    """The wrapper's steps under torch.compile give the same weights as outside it."""
    trained = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        torch._dynamo.reset()
        model = net().to(DEVICE)
        opt = CautiousDecay(SGD(model.parameters(), lr=0.1), lam=0.5, path=path, backend="triton")
        step = wrap(lambda opt=opt: opt.step())
        for _ in range(3):
            model(torch.ones(1, 3, device=DEVICE)).sum().backward()
            step()
        trained.append(values(model))

    torch.testing.assert_close(*trained)


# ---- stochastic rounding


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide`` in ``dtype``, rounded by a kernel when it writes."""
    out = torch.zeros(wide.shape, dtype=dtype, device=DEVICE)
    _triton._launch(_triton._copy, [([out], [wide.to(DEVICE)])], [_triton._row(0.0)], draws=[draws(out)])
    return out.cpu()


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@NARROW
def test_any_number_is_rounded_to_a_neighbour(dtype: torch.dtype) -> None:
    """A float32 number of any size is rounded to one of the two between which rules.py chooses; NaN stays NaN."""
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
def test_the_mean_of_rounded_numbers(dtype: torch.dtype, wide: float) -> None:
    """The mean of 8,192 roundings is the number itself, near powers of two, for subnormal and for smaller numbers."""
    numbers = torch.full((8192,), wide)

    assert abs(sigmas(rounded(numbers, dtype).double() - numbers.double())) < 5


def test_tensors_blocks_and_neighbours_draw_different_numbers() -> None:
    """Two tensors, two blocks, two chunks, two weights side by side and two steps draw different random numbers."""
    w = [torch.full((2 * _triton.CHUNK,), 1 - 2**-9, device=DEVICE) for _ in range(2)]
    out = [torch.zeros_like(t, dtype=torch.bfloat16) for t in w]
    launches = []
    for step in range(2):
        _triton._launch(_triton._copy, [(out, w)], [_triton._row(0.0)], draws=[draws(*out, step=step)])
        launches.append(out[0].clone())
    a = out[0]
    pairs = [(a, out[1]), (a[1024:], a[:-1024]), (a[_triton.CHUNK :], a[: -_triton.CHUNK]), launches]
    pairs += [(a[k:], a[:-k]) for k in (1, 2, 3, 4, 8)]

    assert all(0.47 < (one == other).float().mean() < 0.53 for one, other in pairs)


@both_paths
def test_the_wrapper_rounds_stochastically(path: str) -> None:
    """Through the wrapper, bfloat16 weights are rounded stochastically; no generator is drawn from."""
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.nn.Parameter(torch.ones(2000, dtype=dtype, device=DEVICE))
        p.grad = torch.zeros_like(p)
        opt = CautiousDecay(SGD([p], lr=0.5), lam=2**-8, path=path, backend="triton", rounding="stochastic")
        before = torch.get_rng_state()
        opt.step()

        assert torch.equal(torch.get_rng_state(), before)
        assert set(p.tolist()) == ({1.0, 1 - 2**-8} if dtype == torch.bfloat16 else {1 - 2**-9})


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_chosen_on_the_cpu_only() -> None:
    """With TRITON_INTERPRET=1 the choice on the CPU is triton, and triton is refused on other devices."""
    cpu = torch.device("cpu")

    assert kernels.choose(None, cpu) is kernels.choose("triton", cpu) is _triton
    with pytest.raises(ValueError, match=r"cannot run on cuda:0.*'eager'"):
        kernels.choose("triton", torch.device("cuda", 0))


def draws_or_copies(method: Any, path: dict[str, str], options: dict[str, str]) -> bool:
    """Does a case use what others do, and random numbers or both counts of a method besides?"""
    return path.get("backend") == "numba" and (method is not CautiousDecay or "rounding" in options)


@pytest.mark.parametrize("case", [case for case in DEFAULTS if draws_or_copies(*case.values[0])])
def test_a_default_device_changes_nothing(case: Any) -> None:
    """With another default device every path, method and monitor gives the same numbers."""
    method, path, options = case
    base = fused_adamw if path.base else sgd
    on_triton = {**options, "path": path["path"], "backend": "triton"}

    assert same_on_a_default_device(lambda o: method(o, **on_triton), base, torch.bfloat16, str(DEVICE))
