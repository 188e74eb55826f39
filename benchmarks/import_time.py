"""How long does `import cwd_wrap` take once torch is imported? The median over new processes.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from common import where

PROGRAM = "import time, torch; start = time.perf_counter(); import cwd_wrap; print(time.perf_counter() - start)"


def main() -> None:
    times = [float(subprocess.check_output([sys.executable, "-c", PROGRAM])) for _ in range(9)]
    print(where())
    median, worst = statistics.median(times) * 1e3, max(times) * 1e3
    print(f"import cwd_wrap beyond torch: median {median:.1f} ms, worst {worst:.1f} ms")


if __name__ == "__main__":
    main()
