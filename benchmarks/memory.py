"""How much memory does a step need beyond the plain optimizer's? Peak resident memory, each case in a new process.

python benchmarks/memory.py
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import gpt2_small, where
from torch.optim import Adafactor, AdamW, Muon, Optimizer, RMSprop, Rprop

from cwd_wrap import CautiousDecay

MEBI = 2**20


def matrices() -> list[torch.nn.Parameter]:
    """Eight matrices of 16 MiB: two pieces, and small enough for Muon to be fast."""
    parameters = [torch.nn.Parameter(torch.randn(1024, 4096) * 0.02) for _ in range(8)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


# The optimizer, and its forced path.
CASES: dict[str, tuple[Callable[[], Optimizer], str | None]] = {
    "AdamW, plain": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "plain"),
    "AdamW, one_pass": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "one_pass"),
    "AdamW, direction": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "direction"),
    "AdamW, pieces": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "pieces"),
    "AdamW, snapshot": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "snapshot"),
    "AdamW, snapshot, then dropped": (lambda: AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True), "snapshot"),
    "RMSprop with momentum": (lambda: RMSprop(gpt2_small(), lr=1e-4, momentum=0.9, weight_decay=0.1), None),
    "Rprop": (lambda: Rprop(gpt2_small(), lr=1e-4), None),
    "ASGD": (lambda: torch.optim.ASGD(gpt2_small(), lr=1e-4, weight_decay=0.1), None),
    "Adafactor, 8 matrices": (lambda: Adafactor(matrices(), lr=1e-4, weight_decay=0.1), None),
    "Muon, 8 matrices": (lambda: Muon(matrices(), lr=1e-4, weight_decay=0.1), None),
}


def resident(field: str) -> int:
    """A field of this process's memory status, in bytes: VmHWM is the peak, VmRSS the current size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of(optimizer: Optimizer) -> int:
    """Bytes above what is held now, at the peak of one step."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    optimizer.step()
    return resident("VmHWM") - before


def measure(case: str) -> None:
    """Print the peak of one step above that of the plain step, the memory left after it, and `snapshot_bytes`."""
    build, path = CASES[case]
    optimizer = build()
    lam = None if "weight_decay" in optimizer.param_groups[0] else 0.1
    optimizer.step()  # the base's own state is not part of the measurement
    plain = peak_of(optimizer)
    if path == "plain":
        print(plain, 0, 0)
        return
    wrapped = CautiousDecay(optimizer, lam, path=path)
    small = torch.nn.Parameter(torch.ones(1000))
    small.grad = torch.ones(1000)
    CautiousDecay(AdamW([small], fused=True), 0.1, path="direction").step()  # loads numba and its code
    before = resident("VmRSS")
    peak = peak_of(wrapped)
    if "dropped" in case:
        wrapped.drop_snapshot()
    print(peak - plain, resident("VmRSS") - before, wrapped.snapshot_bytes)


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    weights = sum(p.numel() for p in gpt2_small())
    print(where())
    print(f"GPT-2 small: {weights:,} float32 weights, {4 * weights / MEBI:.1f} MiB, the largest tensor 147.2 MiB\n")
    print(f"{'MiB above the plain step':32}{'peak of a step':>16}{'left after it':>16}{'snapshot_bytes':>16}")
    for case in CASES:
        run = subprocess.run([sys.executable, __file__, case], check=True, capture_output=True, text=True)
        print(f"{case:32}" + "".join(f"{int(n) / MEBI:16.1f}" for n in run.stdout.split()), flush=True)


if __name__ == "__main__":
    main()
