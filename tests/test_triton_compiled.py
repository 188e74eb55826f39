"""What the compilers make of the Triton kernels, for targets that are not here, and what a launch asks of the host."""

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.8")  # compiling for a target that is not here is no public interface
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled: unset TRITON_INTERPRET", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compiled_kernels
from compiled_kernels import KERNELS, TARGETS, WEIGHTS_A_THREAD, Kernel, compile_kernel, stubbed

from cwd_wrap import CautiousUpdate, PNormDecay, kernels, rules
from cwd_wrap.kernels import _triton

all_targets = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


def wide(kernel: Kernel) -> tuple[Counter[int], Counter[int]]:
    """The loads and stores of one thread, one round, if each is of 128 bits."""
    bits = (0 if dtype is None else dtype.primitive_bitwidth for dtype in kernel.types)
    out, *inputs = (each * WEIGHTS_A_THREAD // 128 for each in bits)
    return Counter({128: sum(inputs)}), Counter({128: out})


@all_targets
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=str)
def test_every_load_and_store_of_the_main_path_is_of_128_bits(kernel: Kernel, target: object) -> None:
    """Aligned kernels move each byte once, 128 bits at a time, without spills or stack, in at most 80 registers."""
    code = compile_kernel(kernel, target)

    assert (code.loads, code.stores) == wide(kernel)
    assert (code.spills, code.stack) == (0, 0)
    assert 0 < code.registers <= 80


@all_targets
def test_bytes_per_four_weights(target: object) -> None:
    """Four float32 weights take 3 loads and 1 store of 128 bits along a direction, 2 and 1 from a snapshot."""
    rounds = WEIGHTS_A_THREAD // 4
    direction, snapshot = (compile_kernel(KERNELS[name], target) for name in ("direction", "snapshot"))

    assert (direction.loads, direction.stores) == (Counter({128: 3 * rounds}), Counter({128: rounds}))
    assert (snapshot.loads, snapshot.stores) == (Counter({128: 2 * rounds}), Counter({128: rounds}))


@all_targets
def test_the_check_of_widths_can_fail(target: object) -> None:
    """Without the promise of alignment the same kernel moves 32 bits at a time, and is seen to."""
    code = compile_kernel(replace(KERNELS["direction"], aligned=False), target)

    assert code.loads == Counter({32: 3 * WEIGHTS_A_THREAD})
    assert (code.spills, code.stack) == (0, 0)


def test_the_check_of_spills_can_fail() -> None:
    """Held to 16 registers, the kernel keeps values on the stack, and is seen to."""
    code = compile_kernel(KERNELS["direction"], TARGETS["sm_90"], maxnreg=16)

    assert code.stack > 0 or code.spills > 0


def call(tensors: int, eta_lam: object = 0.1, a: float = 0.9, **flags: bool) -> None:
    w, m, g = ([torch.zeros(8) for _ in range(tensors)] for _ in range(3))
    options = {"strict": False, "count": False, **flags}
    _triton.decay_along(w, m, g, [a] * tensors, [1 - a] * tensors, [eta_lam] * tensors, **options)


@pytest.mark.parametrize("tensors", [1, 3, 3000])
def test_one_launch(tensors: int) -> None:
    """Three tensors and three thousand take one launch each."""
    with stubbed() as counted:
        call(tensors)

    assert counted["launched"] == 1


def test_no_value_is_compiled_in() -> None:
    """Other rates, coefficients, numbers of tensors or of groups, and tensor rates need no new kernel; strict does."""
    with stubbed() as counted:
        for eta_lam in (0.1, 0.0, 1.0, 2.0, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            call(1, eta_lam)
        for a in (0.9, 0.5, 0.99):
            call(16, a=a)
        w = [torch.zeros(8) for _ in range(3)]
        for groups in ([0.1, 0.2, 0.2], [0.1, 0.2, 0.3]):
            _triton.decay_along(w, w, w, [0.9] * 3, [1 - 0.9] * 3, groups, strict=False, count=False)
        once = counted["compiled"]
        call(1, strict=True)

    assert (once, counted["compiled"], counted["launched"]) == (1, 2, 12)


def call_sibling(rule: str, tensors: int, eta_lam: object = 0.1, p: float = 0.8, scale: str | None = "mean") -> None:
    w, x, g = ([torch.zeros(8) for _ in range(tensors)] for _ in range(3))
    if rule == "p_norm_decay":
        _triton.p_norm_decay(w, x, p, [eta_lam] * tensors, _triton.count_nonzero(x))
    else:
        kept, numel = _triton.count_agreeing(w, x, g).float(), _triton.vector([8] * tensors, torch.device("cpu"))
        _triton.cautious_update(w, x, g, rules.alpha(kept, numel, scale), [eta_lam] * tensors)


siblings = pytest.mark.parametrize("rule", ["p_norm_decay", "cautious_update"])


@siblings
@pytest.mark.parametrize("tensors", [1, 3, 3000])
def test_two_launches(rule: str, tensors: int) -> None:
    """Where each tensor is counted first, three tensors and three thousand take two launches."""
    with stubbed() as counted:
        call_sibling(rule, tensors)

    assert counted["launched"] == 2


@siblings
def test_no_value_of_the_siblings_is_compiled_in(rule: str) -> None:
    """Other rates, p, scales, factors and numbers of tensors need no new kernel: it is one for each launch."""
    with stubbed() as counted:
        for eta_lam in (0.1, 0.0, 1.0, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            call_sibling(rule, 1, eta_lam)
        for p in (0.2, 1.0, 2.0):
            call_sibling(rule, 16, p=p)
        for scale in ("numel", None):
            call_sibling(rule, 17, scale=scale)

    assert (counted["compiled"], counted["launched"]) == (2, 20)


@pytest.mark.parametrize("cls", [PNormDecay, CautiousUpdate])
@pytest.mark.parametrize("tensors", [3, 300])
def test_a_step_of_the_siblings_is_three_launches(cls: type, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the wrapper they are two after the step; before it one takes the copy."""
    monkeypatch.setattr(kernels, "choose", lambda *_: _triton)
    weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(tensors)]
    for w in weights:
        w.grad = torch.ones(8)
    opt = cls(torch.optim.SGD(weights, lr=0.1, weight_decay=0.1))
    with stubbed() as counted:
        opt.step()

    assert counted["launched"] == 3


def arguments(monkeypatch: pytest.MonkeyPatch, *w: torch.Tensor) -> dict[str, object]:
    """What the kernel is launched with for these weights."""
    seen: dict[str, object] = {}

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **constants: seen.update(constants, grid=grid, args=args)

    monkeypatch.setattr(_triton, "_sweep", Recorder())
    _triton.decay_from_snapshot(w, [t.clone() for t in w], [0.1] * len(w), strict=False, count=False)
    return seen


def test_alignment_is_promised_only_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a flat buffer that begin at no multiple of 16 bytes take the variant without the promise."""
    flat = torch.zeros(100)

    assert arguments(monkeypatch, flat[:10], flat[12:])["ALIGNED"]
    assert not arguments(monkeypatch, flat[:10], flat[10:])["ALIGNED"]


def test_one_program_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds tensor, first element, the one after the last and row of each chunk; empty tensors have none."""
    sizes = (0, 5, 2 * _triton.CHUNK + 1, _triton.CHUNK)
    seen = arguments(monkeypatch, *(torch.zeros(n) for n in sizes))
    c = _triton.CHUNK

    assert seen["grid"] == (5,)
    assert seen["args"][2].tolist() == [
        [1, 0, 5, 0],
        [2, 0, c, 0],
        [2, c, 2 * c, 0],
        [2, 2 * c, 2 * c + 1, 0],
        [3, 0, c, 0],
    ]


def test_tables_are_kept_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call finds its tables; one with a weight elsewhere gets new addresses and keeps the chunks."""
    w = torch.zeros(10)
    x = [torch.zeros(10)]
    kept = []
    monkeypatch.setattr(
        _triton, "_sweep", type("Recorder", (), {"__getitem__": lambda *_: lambda *args, **_: kept.append(args)})()
    )
    for weight in (w, w, w.clone()):
        _triton.decay_from_snapshot([weight], x, [0.1], strict=False, count=False)
    first, second, moved = kept

    assert first[2] is second[2] is moved[2]
    assert first[0].data_ptr() == second[0].data_ptr() != moved[0].data_ptr()
    assert moved[0].tolist() != first[0].tolist()


def test_host_time_is_measured_warm() -> None:
    """The benchmark's call on 3 tensors is well below a millisecond: nothing is rebuilt or compiled."""
    assert 0 < compiled_kernels.host_microseconds(3, 20, schedule=False) < 1000
