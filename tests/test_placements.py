"""Sharded and replicated weights on two gloo processes train like one process, for every layout of the gradient."""

from typing import Any

import pytest
import torch
from ranks import spawn
from support import METHODS_ON_PATHS, METHODS_ONCE, Method
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cwd_wrap import PNormDecay

ALL, ONCE = ([case.values[0] for case in cases if not case.marks] for cases in (METHODS_ON_PATHS, METHODS_ONCE))
CASES: dict[str, list[Method]] = {"rows": ALL, "columns": ONCE, "replicated": ONCE, "partial sums": ONCE}
"""Every method on every path on rows; each path with one method, and each method on one path, in other layouts."""
STEPS = 3
F64 = torch.float64


def starts() -> list[Tensor]:
    """Weights that give uneven shards, an empty shard, zeros in one shard only, and a tensor of zeros."""
    torch.manual_seed(0)
    half = torch.ones(5, 3, dtype=F64)
    half[:3] = 0
    return [torch.randn(5, 3, dtype=F64), torch.randn(1, 3, dtype=F64), half, torch.zeros(4, 3, dtype=F64)]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(start.shape, dtype=F64, generator=generator) for start in starts()]


def trained(method: Method, base: Any, place: Any = None, place_gradient: Any = None) -> list[Tensor]:
    """The whole weights after three steps in the layout that ``place`` makes."""
    place = place or (lambda t: t)
    params = [nn.Parameter(place(start)) for start in starts()]
    opt = method.wrap(base(params, **method.base))
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = (place_gradient or place)(g)
        opt.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in params]


BASES = {
    "SGD": lambda params, **options: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.5, **options),
    "AdamW": lambda params, **options: AdamW(params, lr=0.1, weight_decay=0.5, **options),
}


def check_layout(rank: int, layout: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    placement = {"rows": Shard(0), "columns": Shard(1)}.get(layout, Replicate())
    place_gradient = None
    if layout == "partial sums":
        place_gradient = lambda g: DTensor.from_local(g * (3.0, -2.0)[rank], mesh, [Partial()])  # their sum is g
    for method in CASES[layout]:
        for name, base in BASES.items():
            if method.base and name == "SGD":
                continue  # torch's fused SGD takes no DTensor
            ours = trained(method, base, lambda t: distribute_tensor(t, mesh, [placement]), place_gradient)
            named = lambda text, case=f"{method} over {name}": f"{case}: {text}"
            torch.testing.assert_close(ours, trained(method, base), rtol=1e-10, atol=1e-11, msg=named)

    whole = starts()
    params = [nn.Parameter(distribute_tensor(start, mesh, [placement])) for start in whole]
    zeros, numel = sum(int((start == 0).sum()) for start in whole), sum(map(Tensor.numel, whole))
    assert PNormDecay(SGD(params, lr=0.1), lam=0.5).sparsity() == [zeros / numel]


@pytest.mark.parametrize("layout", CASES)
def test_two_ranks_are_one(layout: str) -> None:
    """Every method on every path gives the weights of one process, also on uneven and empty shards.

    Masks follow the whole gradient; means, zeros and the sparsity are those of the whole tensor.
    """
    pytest.importorskip("torch.distributed.tensor").__dict__.get("DTensor") or pytest.skip("no public DTensor")
    spawn(2, check_layout, layout)
