"""The compiled code of the Triton kernels, also for targets that are absent, and what a launch does on the host."""

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")  # compiling for another target has no public interface
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled: unset TRITON_INTERPRET", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compiled_kernels
import triton.language as tl
from compiled_kernels import KERNELS, TARGETS, WEIGHTS_A_THREAD, Kernel, stubbed
from support import update_of

from cwd_wrap import CautiousUpdate, PNormDecay, kernels, rules
from cwd_wrap.kernels import _tables, _triton
from cwd_wrap.kernels.buckets import Coming, Stepped, Whole
from cwd_wrap.methods import p_norm_decay

compile_kernel = functools.cache(compiled_kernels.compile_kernel)
# Every kernel is compiled for sm_90. For the other targets these are, which take every way through the frame: a rule
# before and after the step, a copy, a count, an update with and without counters, each method, a schedule-free one,
# 16-bit and mixed types, and both ways to round at random. `python benchmarks/compiled_kernels.py` compiles the rest.
EVERYWHERE = (
    "direction", "snapshot", "copy", "count agreeing", "cautious update", "p-norm decay", "adam", "free_adam",
    "adam, with_caution", "nadam, with_p_norm", "direction, bf16 with fp32 momentum", "adam, bf16, stochastic",
    "snapshot, fp16, stochastic",
)  # fmt: skip


def compiled_for(*archs: str) -> Any:
    """Cases of a kernel and a target."""
    return pytest.mark.parametrize(
        ("kernel", "target"),
        [
            pytest.param(kernel, TARGETS[arch], id=f"{arch}-{name}")
            for arch in archs
            for name, kernel in KERNELS.items()
            if arch == "sm_90" or name in EVERYWHERE
        ],
    )


def wide(kernel: Kernel) -> tuple[Counter[int], Counter[int]]:
    """The loads and stores of one thread in one round, if each is of 128 bits."""
    loads, stores = (sum(t.primitive_bitwidth for t in types) for types in (kernel.read, kernel.written))
    return Counter({128: loads * WEIGHTS_A_THREAD // 128}), +Counter({128: stores * WEIGHTS_A_THREAD // 128})


@compiled_for(*TARGETS)
def test_every_load_and_store_of_the_main_path_is_of_128_bits(kernel: Kernel, target: object) -> None:
    """Aligned kernels move each byte once, 128 bits at a time, without spills, in at most 168 registers.

    None uses the stack, but that of NAdam with the p-norm decay: four numbers of a thread, on sm_90.
    """
    code = compile_kernel(kernel, target)
    most = 16 if (kernel.rule, kernel.method) == (_triton._BOUND["nadam"], "with_p_norm") else 0

    assert (code.loads, code.stores) == wide(kernel)
    assert code.spills == 0
    assert code.stack <= most
    assert 0 < code.registers <= ((144 if kernel.method == "with_decay" else 168) if kernel.update else 96)


@compiled_for(*(name for name, target in TARGETS.items() if target.backend == "cuda"))
def test_inexact_instructions(kernel: Kernel, target: object) -> None:
    """Only a momentum's direction fuses, as torch.lerp does, and only the p-norm decay approximates.

    Two instructions that take denormals for 0 are harmless: in the size that exp2 compares, and in rounding down.
    """
    code = compile_kernel(kernel, target)
    expected: set[str] = {"fma.rn.f32"} if kernel.rule is _triton._along_momentum else set()
    if kernel.rule is _triton._p_norm_decay or kernel.method == "with_p_norm":
        expected = {"ex2.approx.ftz.f32", "fma.rn.ftz.f32"}
    harmless = {"abs.ftz.f32"} if kernel.counts else set()
    if kernel.stochastic and tl.float16 in kernel.types:
        harmless = {"cvt.rmi.ftz.f32.f32"}

    assert code.inexact - harmless == expected


def test_bytes_per_four_weights() -> None:
    """Four float32 weights take 3 loads and 1 store of 128 bits along a direction, 4 and 3 for the whole of Adam."""
    rounds = WEIGHTS_A_THREAD // 4
    for name, loads, stores in (("direction", 3, 1), ("snapshot", 2, 1), ("adam", 4, 3), ("lion", 3, 2)):
        code = compile_kernel(KERNELS[name], TARGETS["sm_90"])

        assert (code.loads, code.stores) == (Counter({128: loads * rounds}), Counter({128: stores * rounds})), name
        assert (code.spills, code.stack) == (0, 0), name


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *((name, "sm_90") for name in ("snapshot", "amsgrad", "lion", "direction, bf16", "adam, bf16")),
        *((name, arch) for name in ("direction", "adam") for arch in TARGETS),
    ],
)
def test_a_monitor_costs_only_registers(name: str, arch: str) -> None:
    """With the sums for a monitor, kernels load and store the same, and spill nothing."""
    plain = KERNELS[name]
    code = compile_kernel(replace(plain, sums=3 if plain.rule is _triton._along_momentum else 5), TARGETS[arch])

    assert (code.loads, code.stores) == wide(plain)
    assert (code.spills, code.stack) == (0, 0)
    assert 0 < code.registers <= 168


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_check_of_widths_can_fail(arch: str) -> None:
    """Without aligned addresses, the same kernel moves 32 bits at a time, and the check finds it."""
    code = compile_kernel(replace(KERNELS["direction"], aligned=False), TARGETS[arch])

    assert code.loads == Counter({32: 3 * WEIGHTS_A_THREAD})
    assert (code.spills, code.stack) == (0, 0)


def test_the_check_of_spills_can_fail() -> None:
    """Limited to 16 registers, the kernel keeps values on the stack, and the check finds it."""
    code = compile_kernel(KERNELS["direction"], TARGETS["sm_90"], maxnreg=16)

    assert code.stack > 0 or code.spills > 0


def call(rule: str, tensors: int, eta_lam: object = 0.1, a: float = 0.9, lr: object = 0.1, **options: object) -> None:
    """Call the kernel of a rule on ``tensors`` tensors, in two buckets if there are two or more."""
    w, g, m, v, steps = ([torch.zeros(8) for _ in range(tensors)] for _ in range(5))
    buckets = []
    for at in (slice(tensors // 2), slice(tensors // 2, None)):
        if rule == "step_whole":
            adam = update_of(torch.optim.Adam, betas=(a, 0.999))
            buckets.append(Whole(w[at], g[at], (m[at], v[at]), (steps[at],), adam, lr, eta_lam))
        elif rule == "decay_along":
            buckets.append(Coming(w[at], g[at], m[at], a, 1 - a, eta_lam))
        else:
            buckets.append(Stepped(w[at], w[at], m[at], g[at], eta_lam))
    buckets = [bucket for bucket in buckets if bucket.w]
    if rule == "p_norm_decay":
        _triton.p_norm_decay(buckets, options.get("p", 0.8), _triton.count_nonzero(m))
    elif rule == "cautious_update":
        kept, numel = _triton.count_agreeing(buckets).float(), _triton.vector([8] * tensors, torch.device("cpu"))
        _triton.cautious_update(buckets, rules.alpha(kept, numel, options.get("scale", "mean")))
    else:
        flags = {"strict": False, "count": False}
        getattr(_triton, rule)(buckets, **(flags | options))


LAUNCHES = {"decay_along": 1, "decay_from_snapshot": 1, "step_whole": 1, "p_norm_decay": 2, "cautious_update": 2}


@pytest.mark.parametrize("rule", LAUNCHES)
@pytest.mark.parametrize("tensors", [1, 3, 3000])
def test_launches(rule: str, tensors: int) -> None:
    """One tensor and three thousand take one launch, or two where each tensor is counted first."""
    with stubbed() as counted:
        call(rule, tensors)

    assert counted["launched"] == LAUNCHES[rule]


@pytest.mark.parametrize("rule", LAUNCHES)
def test_no_value_is_compiled_in(rule: str) -> None:
    """Other rates, coefficients, numbers of tensors or of groups, and tensor rates need no new kernel; strict does."""
    varied = {"p_norm_decay": ("p", (0.2, 1.0, 2.0)), "cautious_update": ("scale", ("numel", None))}
    option, choices = varied.get(rule, ("a", (0.9, 0.5, 0.99)))
    with stubbed() as counted:
        for rate in (0.1, 0.0, 1.0, 2.0, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            call(rule, 1, rate, lr=rate)
        for choice in choices:
            call(rule, 16, **{option: choice})
        once = counted["compiled"]
        if LAUNCHES[rule] == 1:
            call(rule, 1, strict=True)

    assert once == LAUNCHES[rule]
    assert counted["compiled"] == 2


@pytest.mark.parametrize("cls", [PNormDecay, CautiousUpdate])
@pytest.mark.parametrize("tensors", [3, 300])
@pytest.mark.parametrize(("path", "launched"), [("one_pass", 2), ("snapshot", 3)])
def test_launches_of_the_siblings(
    cls: type, path: str, launched: int, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in one pass is two launches; from a copy there is a third, for the copy."""
    monkeypatch.setattr(kernels, "choose", lambda *_: _triton)
    monkeypatch.setattr(p_norm_decay, "has_numbers", lambda _: False)  # as on a card, where no count is read
    weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(tensors)]
    for w in weights:
        w.grad = torch.ones(8)
    opt = cls(torch.optim.SGD(weights, lr=0.1, weight_decay=0.1), path=path)
    with stubbed() as counted:
        opt.step()

    assert counted["launched"] == launched


def launches(monkeypatch: pytest.MonkeyPatch, *w: torch.Tensor) -> list[dict[str, object]]:
    """The arguments of each launch for these weights."""
    seen: list[dict[str, object]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **constants: seen.append({**constants, "grid": grid, "args": args})

    monkeypatch.setattr(_triton, "_sweep", Recorder())
    bucket = Stepped(w, w, [t.clone() for t in w], None, 0.1)
    _triton.decay_from_snapshot([bucket], strict=False, count=False)
    return seen


def arguments(monkeypatch: pytest.MonkeyPatch, *w: torch.Tensor) -> dict[str, object]:
    """The arguments of the only launch for these weights."""
    (seen,) = launches(monkeypatch, *w)
    return seen


def test_alignment_is_promised_only_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that do not begin at a multiple of 16 bytes go into a launch that promises no alignment."""
    flat = torch.zeros(100)
    tensors = [flat[:10], flat[13:20], flat[12:], flat[:0], flat[5:8]]
    aligned, unaligned = launches(monkeypatch, *tensors)

    assert (aligned["ALIGNED"], [row[0] for row in aligned["args"][2].tolist()]) == (True, [0, 2])
    assert (unaligned["ALIGNED"], [row[0] for row in unaligned["args"][2].tolist()]) == (False, [1, 4])
    assert aligned["args"][0].data_ptr() == unaligned["args"][0].data_ptr()
    assert arguments(monkeypatch, flat[:10], flat[12:])["ALIGNED"]
    assert not arguments(monkeypatch, flat[1:10], flat[10:])["ALIGNED"]
    assert not arguments(monkeypatch, flat[1:10], flat[:0])["ALIGNED"]


def test_one_odd_companion_makes_a_tensor_unaligned() -> None:
    """A tensor is aligned if its address in every column is."""
    columns = [[16, 32, 48, 1 << 40], [16, 33, 48, 8 + (1 << 40)]]
    found = _triton._by_alignment(_triton._bytes([*columns[0], *columns[1]]), 4)

    assert found == [(True, bytes([1, 0, 1, 0])), (False, bytes([0, 1, 0, 1]))]


def instructions(call: Callable[[], object]) -> int:
    """How many instructions of Python's virtual machine ``call`` runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_the_check_of_alignment_runs_no_python_loop() -> None:
    """Python runs as many instructions for 9,000 addresses as for 90; a loop over the addresses runs more."""
    few, many = ([*range(8, 16 * 3 * n, 16)] for n in (30, 3000))
    loop = lambda addresses: instructions(lambda: [address % 16 for address in addresses])
    check = lambda addresses: instructions(
        lambda: _triton._by_alignment(_triton._bytes(addresses), len(addresses) // 3)
    )

    assert check(few) == check(many) > 0
    assert loop(few) < loop(many)


def test_one_program_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each chunk the table holds tensor, first element, last element plus one, and row; empty tensors have none."""
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
    """A second call uses the same tables; a call with a weight at another address has new addresses only."""
    w = torch.zeros(10)
    x = [torch.zeros(10)]
    kept = []
    monkeypatch.setattr(
        _triton, "_sweep", type("Recorder", (), {"__getitem__": lambda *_: lambda *args, **_: kept.append(args)})()
    )
    for weight in (w, w, w.clone()):
        bucket = Stepped([weight], [weight], x, None, 0.1)
        _triton.decay_from_snapshot([bucket], strict=False, count=False)
    first, second, moved = kept

    assert first[2] is second[2] is moved[2]
    assert first[0].data_ptr() == second[0].data_ptr() != moved[0].data_ptr()
    assert moved[0].tolist() != first[0].tolist()


@pytest.mark.parametrize("whole", [False, True], ids=["direction", "adam"])
def test_host_time_is_measured_warm(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 23 calls of the benchmark only the first builds its tables; a new eta*lam adds one to each call."""
    built = []
    keep = _tables._Tables.keep
    monkeypatch.setattr(_tables._Tables, "keep", lambda *args: (built.append(args), keep(*args)))

    assert compiled_kernels.host_microseconds(3, 20, schedule=False, whole=whole) > 0
    assert len(built) <= 5
    assert compiled_kernels.host_microseconds(3, 20, schedule=True, whole=whole) > 0
    assert 23 - 1 <= len(built) <= 23 + 2 * 5
