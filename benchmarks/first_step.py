"""How much time does numba add to the first steps, in which it is imported and compiles? Each run is a new process.

python benchmarks/first_step.py

AdamW's first step takes the direction, in which the base makes its state; the second step is one pass. Each kernel is
compiled once for each combination of types and kept on disk, beside the package or in the user's cache folder.
"""

import os
import statistics
import subprocess
import sys
import tempfile

from common import where

PROGRAM = """
import time, torch
from cwd_wrap import CautiousDecay
w = torch.nn.Parameter(torch.ones(1000)); w.grad = torch.ones(1000)
base = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.1, fused=True); base.step(); base.state.clear()
opt = CautiousDecay(base, backend="BACKEND")
for _ in range(3):
    start = time.perf_counter(); opt.step(); print(time.perf_counter() - start)
"""


def seconds(backend: str, cache: str) -> list[float]:
    program = PROGRAM.replace("BACKEND", backend)
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    return [float(line) for line in subprocess.check_output([sys.executable, "-c", program], env=environment).split()]


def main() -> None:
    print(where())
    print(f"\n{'seconds':32}{'first step':>12}{'second':>12}{'third':>12}")
    with tempfile.TemporaryDirectory() as empty:
        rows = {"numba, nothing on disk": [seconds("numba", empty)]}
        rows["numba, compiled before"] = [seconds("numba", empty) for _ in range(5)]
        rows["eager"] = [seconds("eager", empty) for _ in range(5)]
    for name, runs in rows.items():
        print(f"{name:32}" + "".join(f"{statistics.median(step):12.3f}" for step in zip(*runs, strict=True)))


if __name__ == "__main__":
    main()
