"""How much memory does a step need beyond the plain optimizer's? Peak resident memory, each case in a new process.

python benchmarks/memory.py
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import Table, arguments, gpt2_small, parameters
from torch.optim import Adafactor, AdamW, Muon, Optimizer, RMSprop, Rprop

from cwd_wrap import CautiousDecay

MEBI = 2**20


def adamw(**options: bool) -> Optimizer:
    return AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, **options)


def matrices() -> list[torch.nn.Parameter]:
    """Eight matrices of 16 MiB: two pieces, and small enough for Muon to be fast."""
    return parameters([(1024, 4096)] * 8)


# The optimizer, and its path if that is not the first that fits. GPT-2 small, unless the name says otherwise.
CASES: dict[str, tuple[Callable[[], Optimizer], str | None]] = {
    "AdamW()": (adamw, None),
    "AdamW(fused=True)": (lambda: adamw(fused=True), None),
    "AdamW(fused=True), direction": (lambda: adamw(fused=True), "direction"),
    "AdamW(fused=True), pieces": (lambda: adamw(fused=True), "pieces"),
    "AdamW(fused=True), snapshot": (lambda: adamw(fused=True), "snapshot"),
    "the same, then `drop_snapshot()`": (lambda: adamw(fused=True), "snapshot"),
    "RMSprop(momentum=0.9)": (lambda: RMSprop(gpt2_small(), lr=1e-4, momentum=0.9, weight_decay=0.1), None),
    "Rprop()": (lambda: Rprop(gpt2_small(), lr=1e-4), None),
    "ASGD()": (lambda: torch.optim.ASGD(gpt2_small(), lr=1e-4, weight_decay=0.1), None),
    "Adafactor(), 8 matrices": (lambda: Adafactor(matrices(), lr=1e-4, weight_decay=0.1), None),
    "Muon(), 8 matrices": (lambda: Muon(matrices(), lr=1e-4, weight_decay=0.1), None),
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
    """Print the path, the peak of a step above that of the plain step, what is left after it, and `snapshot_bytes`."""
    build, path = CASES[case]
    optimizer = build()
    lam = None if "weight_decay" in optimizer.param_groups[0] else 0.1
    optimizer.step()  # the base's own state is not part of the measurement
    plain = peak_of(optimizer)
    wrapped = CautiousDecay(optimizer, lam, path=path)
    small = torch.nn.Parameter(torch.ones(1000))
    small.grad = torch.ones(1000)
    CautiousDecay(AdamW([small], fused=True), 0.1, path="direction").step()  # loads numba and its code
    before = resident("VmRSS")
    peak = peak_of(wrapped)
    if "drop" in case:
        wrapped.drop_snapshot()
    print(wrapped.paths()[0].path, peak - plain, resident("VmRSS") - before, wrapped.snapshot_bytes)


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1] in CASES:
        measure(sys.argv[1])
        return
    options = arguments(__doc__).parse_args()
    table = Table("memory", "MiB above the plain step", "path", "peak of a step", "left after it", "`snapshot_bytes`")
    for case in CASES:
        run = subprocess.run([sys.executable, __file__, case], check=True, capture_output=True, text=True)
        path, *found = run.stdout.split()
        table.row(case, path, *(f"{int(n) / MEBI:.1f}" for n in found))
    if options.write:
        table.write()


if __name__ == "__main__":
    main()
