"""How long are the import and the first steps, in which numba is imported and compiles? Each run is a new process.

python benchmarks/first_step.py

The base makes its state in the first step, so one pass begins with the second. A kernel is compiled once for each
combination of types and kept on disk, beside the package or in the user's cache folder.
"""

import os
import subprocess
import sys
import tempfile

from common import Table, arguments, duration

PROGRAM = """
import time, torch
def timed(call):
    start = time.perf_counter(); call(); print(time.perf_counter() - start)
def package():
    import cwd_wrap
timed(package)
from cwd_wrap import CautiousDecay
w = torch.nn.Parameter(torch.ones(1000)); w.grad = torch.ones(1000)
opt = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.1)
if BACKEND:
    opt = CautiousDecay(opt, backend=BACKEND)
for _ in range(3):
    timed(opt.step)
"""


def seconds(backend: str | None, cache: str) -> list[float]:
    """The times of one process."""
    program = PROGRAM.replace("BACKEND", repr(backend))
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": ""}
    return [float(line) for line in subprocess.check_output([sys.executable, "-c", program], env=environment).split()]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rounds = options.rounds or 7
    table = Table("first-step", "", "import cwd_wrap, after torch", "first step", "second", "third")
    with tempfile.TemporaryDirectory() as folder:
        seconds(None, folder)  # keeps the bytecode for the next imports
        runs = {
            "numba, nothing on disk": [seconds("numba", f"{folder}/{i}") for i in range(rounds)],
            "numba, compiled before": [seconds("numba", f"{folder}/0") for _ in range(rounds)],
            "eager": [seconds("eager", folder) for _ in range(rounds)],
            "AdamW alone": [seconds(None, folder) for _ in range(rounds)],
        }
    for name, each in runs.items():
        table.row(name, *map(duration, zip(*each, strict=True)))
    if options.write:
        table.write()


if __name__ == "__main__":
    main()
