"""The blocked eager kernels against torch.compile of the three-line rule, on the same data: GPT-2 small, float32.

python benchmarks/eager_vs_compiled.py            (needs a C++ compiler for inductor)
"""

import torch
from common import Table, arguments, duration, gpt2_small, interleaved, ratio
from torch import Tensor

from cwd_wrap.kernels import _eager
from cwd_wrap.kernels.buckets import Coming, Stepped

ETA_LAM, BETA = 1e-5, 0.9


def along(x: Tensor, m: Tensor, g: Tensor) -> None:
    """The plain rule: direction, mask, decay."""
    u = m.lerp(g, 1 - BETA)
    mask = torch.sign(u) * x >= 0
    x.sub_(ETA_LAM * mask * x)


def from_snapshot(w: Tensor, x: Tensor) -> None:
    """The same from a copy."""
    mask = torch.sign(x) * w <= x.abs()
    w.sub_(ETA_LAM * mask * x)


@torch.no_grad()
def main() -> None:
    rounds = arguments(__doc__).parse_args().rounds or 15
    x = [p.data for p in gpt2_small()]
    m, g = [torch.randn_like(t) for t in x], [torch.randn_like(t) for t in x]
    compiled_along, compiled_snapshot = torch.compile(along, dynamic=True), torch.compile(from_snapshot, dynamic=True)
    coming = [Coming(x, g, m, BETA, 1 - BETA, ETA_LAM)]
    stepped = [Stepped(x, x, m, None, ETA_LAM)]
    pairs = {
        "from the direction": (
            lambda: [compiled_along(*row) for row in zip(x, m, g, strict=True)],
            lambda: _eager.decay_along(coming, strict=False, count=False),
        ),
        "from a snapshot": (
            lambda: [compiled_snapshot(*row) for row in zip(x, m, strict=True)],
            lambda: _eager.decay_from_snapshot(stepped, strict=False, count=False),
        ),
    }
    table = Table("eager-or-compiled", "mask", "torch.compile of the rule", "blocked eager", "ratio (quartiles)")
    for name, (compiled, eager) in pairs.items():
        seconds = interleaved({"compiled": compiled, "eager": eager}, rounds)
        table.row(name, *map(duration, seconds.values()), ratio(seconds["eager"], seconds["compiled"]))


if __name__ == "__main__":
    main()
