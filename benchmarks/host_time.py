"""How much time does a step spend in Python for each tensor? The kernels are stubbed, so only the host's work is left.

python benchmarks/host_time.py
"""

import statistics
from types import SimpleNamespace
from unittest import mock

import torch
from common import interleaved, many_small, where

from cwd_wrap import CautiousDecay
from cwd_wrap.kernels import _eager

ROUNDS = 60


def main() -> None:
    print(where())
    nothing = {name: lambda *_, **__: 0 for name in ("decay_along", "decay_from_snapshot", "step_whole", "copy")}
    stub = SimpleNamespace(**{**vars(_eager), **nothing})
    print(f"\n{'microseconds per tensor and step':36}{'600':>8}{'3,000':>8}")
    columns = {}
    for tensors in (600, 3000):
        settings = {"lr": 1e-9, "weight_decay": 0.1, "fused": True}
        plain = torch.optim.AdamW(many_small(tensors, 1), **settings)
        wrapped = {
            path: CautiousDecay(torch.optim.AdamW(many_small(tensors, 1), **settings), path=path)
            for path in ("direction", "snapshot", "one_pass")
        }
        for opt in wrapped.values():
            opt.step()  # the base makes its state
        with mock.patch("cwd_wrap.kernels.choose", lambda *_: stub):
            seconds = interleaved({"plain": plain.step, **{path: opt.step for path, opt in wrapped.items()}}, ROUNDS)
        per_tensor = {name: statistics.median(times) / tensors * 1e6 for name, times in seconds.items()}
        columns[tensors] = {
            "plain step": per_tensor["plain"],
            "direction, beyond the plain step": per_tensor["direction"] - per_tensor["plain"],
            "snapshot, beyond the plain step": per_tensor["snapshot"] - per_tensor["plain"],
            "one_pass, in all": per_tensor["one_pass"],
        }
    for row in columns[600]:
        print(f"{row:36}{columns[600][row]:8.2f}{columns[3000][row]:8.2f}")


if __name__ == "__main__":
    main()
