"""How long is a step on this card, and how near is each kernel to the speed of a copy? Prints one CSV row a figure.

python benchmarks/gpu_step_time.py [--scale 4] >> rows.csv

Bytes are those that have to move; ``of_copy`` is the speed as a share of ``torch.Tensor.copy_`` on the same card.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date

import torch
import triton
from common import gpt2_small
from triton.testing import do_bench

from cwd_wrap import CautiousDecay
from cwd_wrap.kernels import _eager, _triton


@dataclass(frozen=True)
class Row:
    what: str
    dtype: str
    weights: int
    ms: float
    ms_20: float
    ms_80: float
    gb_s: float
    of_copy: float
    gpu: str
    torch: str
    triton: str
    date: str


def rows(scale: int, dtype: torch.dtype) -> list[Row]:
    parameters = [torch.nn.Parameter(p.detach().to("cuda", dtype)) for p in gpt2_small(scale)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    w, g = [p.detach() for p in parameters], [p.grad for p in parameters]
    m, x = ([torch.randn_like(t) for t in w] for _ in range(2))
    n, weights, size = len(w), sum(t.numel() for t in w), w[0].element_size()
    flat, other = (torch.empty(weights, dtype=dtype, device="cuda") for _ in range(2))
    a, b, eta_lam = [0.9] * n, [1 - 0.9] * n, [1e-9] * n
    flags = {"strict": False, "count": False}
    settings = {"lr": 1e-9, "weight_decay": 0.1, "fused": True}
    plain = torch.optim.AdamW(parameters, **settings)
    along = CautiousDecay(torch.optim.AdamW(parameters, **settings), backend="triton")
    after = CautiousDecay(torch.optim.AdamW(parameters, **settings), backend="triton", snapshot=True)
    # What is timed, and how many values it reads and writes for each weight.
    measured: dict[str, tuple[Callable[[], object], int]] = {
        "copy_": (lambda: other.copy_(flat), 2),
        "copy, triton": (lambda: _triton.copy(x, w), 2),
        "direction, triton": (lambda: _triton.decay_along(w, m, g, a, b, eta_lam, **flags), 4),
        "direction, eager": (lambda: _eager.decay_along(w, m, g, a, b, eta_lam, **flags), 4),
        "snapshot, triton": (lambda: _triton.decay_from_snapshot(w, x, eta_lam, **flags), 3),
        "snapshot, eager": (lambda: _eager.decay_from_snapshot(w, x, eta_lam, **flags), 3),
        "step: fused AdamW": (plain.step, 7),
        "step: CautiousDecay, direction": (along.step, 11),
        "step: CautiousDecay, snapshot": (after.step, 12),
    }
    found, copy_speed = [], 0.0
    for what, (call, values) in measured.items():
        middle, low, high = do_bench(call, quantiles=[0.5, 0.2, 0.8])
        speed = values * size * weights / middle / 1e6
        copy_speed = copy_speed or speed
        where = (torch.cuda.get_device_name(), torch.__version__, triton.__version__, str(date.today()))
        found.append(Row(what, str(dtype)[6:], weights, middle, low, high, speed, speed / copy_speed, *where))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide the widths of GPT-2 small by this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA or ROCm device")
    table = csv.DictWriter(sys.stdout, [field.name for field in fields(Row)])
    table.writeheader()
    for dtype in (torch.float32, torch.bfloat16):
        for row in rows(arguments.scale, dtype):
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


if __name__ == "__main__":
    main()
