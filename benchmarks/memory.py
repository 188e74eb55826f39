"""How much memory does a step need beyond the plain optimizer's? Peak resident memory, each case in a fresh process.

python benchmarks/memory.py
"""

import subprocess
import sys
from pathlib import Path

import torch
from common import gpt2_small, where

from cwd_wrap import CautiousDecay

CASES = {"plain AdamW": None, "direction": None, "snapshot": True, "snapshot, then dropped": True}


def resident(field: str) -> int:
    """A line of this process's own memory account, in bytes: VmHWM is the peak, VmRSS is now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: str) -> None:
    """Print the peak of one step above what is held before it, what stays after it, and the bytes announced."""
    optimizer = torch.optim.AdamW(gpt2_small(), lr=1e-4, weight_decay=0.1, fused=True)
    optimizer.step()  # the base's own state is not what is asked for
    wrapped = optimizer if case == "plain AdamW" else CautiousDecay(optimizer, snapshot=CASES[case])
    before = resident("VmRSS")
    reset_peak()
    wrapped.step()
    peak = resident("VmHWM") - before
    if case == "snapshot, then dropped":
        wrapped.drop_snapshot()
    print(peak, resident("VmRSS") - before, getattr(wrapped, "snapshot_bytes", 0))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    weights = sum(p.numel() for p in gpt2_small())
    print(where())
    print(f"GPT-2 small: {weights:,} float32 weights, {4 * weights / 2**20:.1f} MiB\n")
    print(f"{'':28}{'peak of a step':>16}{'left after it':>16}{'snapshot_bytes':>16}   (MiB above the plain state)")
    for case in CASES:
        run = subprocess.run([sys.executable, __file__, case], check=True, capture_output=True, text=True)
        print(f"{case:28}" + "".join(f"{int(n) / 2**20:16.1f}" for n in run.stdout.split()))


if __name__ == "__main__":
    main()
