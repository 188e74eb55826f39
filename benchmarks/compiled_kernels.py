"""The compiled code of the Triton kernels, for targets that may be absent, and the host's time for a launch.

python benchmarks/compiled_kernels.py

Loads and stores are those of the main path: the loop over whole blocks, in which a thread handles 8 weights a round.
"""

import contextlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import triton
import triton.language as tl
from common import where
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cwd_wrap.bases.updates import Update, find
from cwd_wrap.kernels import _triton
from cwd_wrap.kernels.buckets import Coming, Whole

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WEIGHTS_A_THREAD = _triton.BLOCK // _triton.THREADS
AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}


@dataclass(frozen=True)
class Kernel:
    """A rule, the types of its columns, and options. ``aligned``: are addresses promised to be aligned?

    ``update``: does it make the optimizer's update, with which ``method``? None: a schedule-free one. ``write``: does
    it write, or only count? ``stochastic``: does it round at random? ``counts``: does it read counters?
    ``per_tensor``: does it read a number for each tensor? ``own``: and one of the method's own, such as a leak?
    ``sums``: how many of `rules.sums` it adds.
    """

    rule: Any
    types: tuple[tl.dtype, ...]
    update: bool = False
    method: str | None = "with_decay"
    write: bool = True
    aligned: bool = True
    stochastic: bool = False
    counts: bool = False
    per_tensor: bool = False
    own: bool = False
    sums: int = 0

    @property
    def read(self) -> tuple[tl.dtype, ...]:
        """The types of the columns that it reads. To count before an update, what gives its sign is enough."""
        return self.types[1:] if self.rule is _triton._copy or (self.update and not self.write) else self.types

    @property
    def written(self) -> tuple[tl.dtype, ...]:
        """The types of the columns that it writes."""
        return (self.types[0], *(self.types[2:] if self.update else ())) if self.write else ()

    def __str__(self) -> str:
        remarks = f"{'' if self.aligned else ', unaligned'}{', stochastic' if self.stochastic else ''}"
        method = f" {self.method}" if self.method != "with_decay" else ", leak" if self.own else ""
        return f"{self.rule.__name__.lstrip('_')}{method} {' '.join(map(str, self.types))}{remarks}"


@dataclass(frozen=True)
class Code:
    """``loads`` and ``stores`` of one round of the main path, as {bits: number}; ``stack`` in bytes per thread.

    ``inexact``: the kinds of instructions in a CUDA kernel that fuse in float32, approximate or take denormals for 0.
    """

    loads: Counter[int]
    stores: Counter[int]
    registers: int
    spills: int
    stack: int
    inexact: frozenset[str] = frozenset()


F32, BF16 = tl.float32, tl.bfloat16
_adam, _sgd, _lion = (_triton._BOUND[name] for name in ("adam", "sgd", "lion"))
COLUMNS = {  # of the other updates, with all the state that they can have
    "nadam": 4, "nadamw": 4, "radam": 4, "adamax": 4, "adagrad": 3, "adadelta": 4, "rmsprop": 4, "rmsprop_centered": 5,
    "rmsprop_tf": 4, "rmsprop_tf_centered": 5,
}  # fmt: skip
KERNELS = {
    "direction": Kernel(_triton._along_momentum, (F32,) * 3),
    "direction, no momentum": Kernel(_triton._along_gradient, (F32,) * 2),
    "snapshot": Kernel(_triton._from_snapshot, (F32,) * 2),
    "copy": Kernel(_triton._copy, (F32,) * 2),
    "count agreeing": Kernel(_triton._agrees, (F32,) * 3, write=False),
    "cautious update": Kernel(_triton._cautious_update, (F32,) * 3, per_tensor=True),
    "count nonzero": Kernel(_triton._nonzero, (F32,), write=False),
    "p-norm decay": Kernel(_triton._p_norm_decay, (F32,) * 2, per_tensor=True, own=True),
    "direction, leak": Kernel(_triton._along_momentum, (F32,) * 3, own=True),
    "snapshot, leak": Kernel(_triton._from_snapshot, (F32,) * 2, own=True),
    "adam, leak": Kernel(_adam, (F32,) * 4, update=True, counts=True, own=True),
    "free_adam, leak": Kernel(_triton._BOUND["free_adam"], (F32,) * 4, update=True, method=None, own=True),
    "adam": Kernel(_adam, (F32,) * 4, update=True, counts=True),
    "amsgrad": Kernel(_adam, (F32,) * 5, update=True, counts=True),
    "sgd": Kernel(_sgd, (F32,) * 2, update=True),
    "sgd, momentum": Kernel(_sgd, (F32,) * 3, update=True),
    "lion": Kernel(_lion, (F32,) * 3, update=True),
    **{
        name: Kernel(_triton._BOUND[name], (F32,) * columns, update=True, counts=name == "nadamw")
        for name, columns in COLUMNS.items()
    },
    "free_sgd": Kernel(_triton._BOUND["free_sgd"], (F32,) * 3, update=True, method=None),
    "free_adam": Kernel(_triton._BOUND["free_adam"], (F32,) * 4, update=True, method=None),
    "sgd, momentum, count agreeing": Kernel(_sgd, (F32,) * 3, update=True, method="with_caution", write=False),
    **{
        f"{name}, {method}": Kernel(
            _triton._BOUND[name],
            (F32,) * columns,
            update=True,
            method=method,
            counts=name == "adam",
            per_tensor=True,
            own=method == "with_p_norm",
        )
        for method in ("with_caution", "with_p_norm")
        for name, columns in (("adam", 5), ("nadam", 4), ("rmsprop_tf_centered", 5))  # those with the most to hold
    },
    "direction, bf16": Kernel(_triton._along_momentum, (BF16,) * 3),
    "direction, bf16 with fp32 momentum": Kernel(_triton._along_momentum, (BF16, F32, BF16)),
    "snapshot, bf16": Kernel(_triton._from_snapshot, (BF16,) * 2),
    "count agreeing, bf16": Kernel(_triton._agrees, (BF16,) * 3, write=False),
    "cautious update, bf16": Kernel(_triton._cautious_update, (BF16,) * 3, per_tensor=True),
    "count nonzero, bf16": Kernel(_triton._nonzero, (BF16,), write=False),
    "p-norm decay, bf16": Kernel(_triton._p_norm_decay, (BF16,) * 2, per_tensor=True, own=True),
    "adam, bf16": Kernel(_adam, (BF16,) * 4, update=True, counts=True),
    "adam, bf16 with fp32 state": Kernel(_adam, (BF16, BF16, F32, F32), update=True, counts=True),
    "rmsprop_centered, bf16": Kernel(_triton._BOUND["rmsprop_centered"], (BF16,) * 5, update=True),
    "direction, bf16, stochastic": Kernel(_triton._along_momentum, (BF16,) * 3, stochastic=True),
    "snapshot, fp16, stochastic": Kernel(_triton._from_snapshot, (tl.float16,) * 2, stochastic=True),
    "adam, bf16, stochastic": Kernel(_adam, (BF16,) * 4, update=True, counts=True, stochastic=True),
}


def compile_kernel(kernel: Kernel, target: GPUTarget, **options: int) -> Code:
    """Compile as `_triton._launch` would on ``target``, and read the generated code."""
    columns = ("FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH")
    constants = {
        "RULE": kernel.rule,
        "UPDATE": kernel.update,
        "METHOD": _triton._BOUND[kernel.method] if kernel.update and kernel.method else None,
        "WRITE": kernel.write,
        **dict(zip(columns, [*kernel.types, None, None, None, None], strict=False)),
        "ROW": _triton.ROW,
        "WIDE": tl.float32,
        "ALIGNED": kernel.aligned,
        "STRICT": False,
        "COUNT": not kernel.write or kernel.sums > 0,
        "SUMS": kernel.sums,
        "OWN": kernel.own,
        "IN_RUNS": False,
        "BLOCK": _triton.BLOCK,
    }
    names = _triton._sweep.arg_names
    pointers = {"addresses": "*i64", "tensors": "i32", "chunks": "*i64", "rows": "*i64", "numbers": "*fp64"}
    optional = {
        "steps": "*i64" if kernel.counts else None,
        "counts": "*fp64" if kernel.sums else None if kernel.write else "*i64",
        "streams": "*i64" if kernel.stochastic else None,
        "shards": "*i64" if kernel.stochastic else None,
        "per_tensor": "*fp32" if kernel.per_tensor else None,
    }
    pointers |= {name: pointer for name, pointer in optional.items() if pointer is not None}
    constants |= {name: None for name, pointer in optional.items() if pointer is None}
    source = ASTSource(
        _triton._sweep,
        {name: pointers.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": _triton.THREADS // target.warp_size, "enable_fp_fusion": False, **options}
    assembly = triton.compile(source, target=target, options=options).asm
    return _read_cuda(assembly) if target.backend == "cuda" else _read_amd(assembly["amdgcn"])


def _read_cuda(assembly: dict[str, Any]) -> Code:
    found = re.findall(r"(?<!\S)(ld|st)\.global(?:\.v(\d))?\.\w(\d+)", _main_path(assembly["ptx"], r"\$L__BB"))
    widths = [(kind, int(lanes or 1) * int(bits)) for kind, lanes, bits in found]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(assembly["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    inexact = re.findall(
        r"\b(fma\.rn\.f32(?=\s|x2)|\w+(?:\.\w+)*\.(?:approx|full|ftz)(?:\.\w+)*)[\sx]", assembly["ptx"]
    )
    return Code(
        _count(widths, "ld"), _count(widths, "st"), used["REG"], used["LOCAL"], used["STACK"], frozenset(inexact)
    )


def _read_amd(assembly: str) -> Code:
    main = _main_path(assembly, r"\.LBB")
    found = re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+)", main)
    widths = [(kind, AMD_BITS[size]) for kind, size in found]
    used = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    # Scalar registers spill to lanes of vector registers, without memory; spills to memory show in the stack.
    return Code(
        _count(widths, "load"),
        _count(widths, "store"),
        used["vgpr_count"],
        used["vgpr_spill_count"],
        used["private_segment_fixed_size"],
    )


def _main_path(assembly: str, label: str) -> str:
    """The first loop that loads, from its label to the last branch back to it. (The tail after it may jump.)"""
    for head in re.finditer(rf"^({label}\w+):", assembly, flags=re.MULTILINE):
        below = assembly[head.end() :]
        back = [branch.end() for branch in re.finditer(rf"bra[\w.]*\s+{re.escape(head[1])}\b", below)]
        if back and re.search(r"ld\.global|_load_", body := below[: back[-1]]):
            return body
    msg = "no loop loads anything"
    raise ValueError(msg)


def _count(widths: list[tuple[str, int]], kind: str) -> Counter[int]:
    return Counter(bits for found, bits in widths if found == kind)


class _NoDriver:
    """Replaces the driver, so that Triton prepares launches for an sm_90 without a card."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]


@contextlib.contextmanager
def stubbed() -> Iterator[dict[str, int]]:
    """Compile nothing and launch nothing, but count: {"compiled": ..., "launched": ...}."""
    counted = {"compiled": 0, "launched": 0}

    class Launcher(mock.Mock):
        def run(self, *args: object) -> None:
            counted["launched"] += 1

    def compiled(function: Any, key: object, signature: object, device: int, *args: object) -> Launcher:
        counted["compiled"] += 1
        function.device_caches[device][0][key] = launcher
        return launcher

    launcher = Launcher()
    jit = type(_triton._sweep)
    with (
        mock.patch.object(triton.runtime.driver, "_active", _NoDriver()),
        mock.patch.object(jit, "_do_compile", compiled),
        mock.patch.dict(_triton._sweep.device_caches, clear=True),
    ):
        yield counted


def host_microseconds(tensors: int, calls: int, *, schedule: bool, whole: bool = False) -> float:
    """Time of the fastest call on ``tensors`` tensors with warm tables; nothing is launched.

    The call is `decay_along`, or `step_whole` with Adam if ``whole``, without the increase of the counters.
    """
    w, g, m, v, steps = ([torch.zeros(8) for _ in range(tensors)] for _ in range(5))
    base = torch.optim.Adam([torch.zeros(8)])
    adam = cast("Update", find(base, base.param_groups[0]))
    act = _triton.step_whole if whole else _triton.decay_along
    seconds = []
    with stubbed(), mock.patch.object(torch, "_foreach_add_"):
        for call in range(calls + 3):
            eta_lam = 1e-4 * (call if schedule else 1)
            coming = Coming(w, g, m, 0.9, 1 - 0.9, eta_lam)
            bucket = Whole(w, g, (m, v), (steps,), adam, 10 * eta_lam, eta_lam) if whole else coming
            start = time.perf_counter()
            act([bucket], strict=False, count=False)
            seconds.append(time.perf_counter() - start)
    return min(seconds[3:]) * 1e6


def _widths(counted: Counter[int]) -> str:
    return " + ".join(f"{number} x {bits}" for bits, number in sorted(counted.items(), reverse=True))


def main() -> None:
    torch.set_num_threads(1)
    print(f"{where()}; triton {triton.__version__}\n")
    print(
        f"{'kernel':36}{'target':8}{'loads x bits':>15}{'stores x bits':>15}{'registers':>11}{'spills':>8}{'stack':>7}"
    )
    unaligned = {f"{name}, unaligned": replace(KERNELS[name], aligned=False) for name in ("direction", "snapshot")}
    for name, kernel in (KERNELS | unaligned).items():
        for arch, target in TARGETS.items():
            code = compile_kernel(kernel, target)
            loads, stores = _widths(code.loads), _widths(code.stores)
            print(f"{name:36}{arch:8}{loads:>15}{stores:>15}{code.registers:11}{code.spills:8}{code.stack:7}")
    print(f"\n{'host microseconds of a call, nothing launched':48}{'constant lr':>14}{'lr changes':>12}")
    for name, whole in (("direction", False), ("adam", True)):
        for tensors in (3, 300, 3000):
            constant, scheduled = (
                host_microseconds(tensors, 51, schedule=schedule, whole=whole) for schedule in (False, True)
            )
            print(f"{f'{name}, {tensors} tensors':48}{constant:14.0f}{scheduled:12.0f}")


if __name__ == "__main__":
    main()
