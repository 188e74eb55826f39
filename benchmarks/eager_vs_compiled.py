"""The blocked eager kernels against torch.compile of the three-line rule, on the same data: GPT-2 small, float32.

python benchmarks/eager_vs_compiled.py            (needs a C++ compiler for inductor)
"""

import argparse

import torch
from common import gpt2_small, interleaved, print_ratios, where
from torch import Tensor

from cwd_wrap.buckets import Coming, Stepped
from cwd_wrap.kernels import _eager

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    x = [p.data for p in gpt2_small()]
    m, g = [torch.randn_like(t) for t in x], [torch.randn_like(t) for t in x]
    compiled_along, compiled_snapshot = torch.compile(along, dynamic=True), torch.compile(from_snapshot, dynamic=True)
    print(where())
    print("\nmask from the direction")
    candidates = {
        "torch.compile of the rule": lambda: [compiled_along(*row) for row in zip(x, m, g, strict=True)],
        "blocked eager": lambda: _eager.decay_along(
            [Coming(x, g, m, BETA, 1 - BETA, ETA_LAM)], strict=False, count=False
        ),
    }
    print_ratios(interleaved(candidates, rounds), "torch.compile of the rule")
    print("\nmask from a snapshot")
    candidates = {
        "torch.compile of the rule": lambda: [compiled_snapshot(*row) for row in zip(x, m, strict=True)],
        "blocked eager": lambda: _eager.decay_from_snapshot(
            [Stepped(x, x, m, None, ETA_LAM)], strict=False, count=False
        ),
    }
    print_ratios(interleaved(candidates, rounds), "torch.compile of the rule")


if __name__ == "__main__":
    main()
