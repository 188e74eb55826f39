"""On a card, steps with the Triton kernels do not wait, and work inside a CUDA graph and on side streams.

tests/test_kernels.py checks the kernels' values on a card too (pytest -m gpu); benchmarks/gpu_proof.py measures them.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from support import net
from torch import Tensor
from torch.optim import AdamW

from cwd_wrap import CautiousDecay, kernels
from cwd_wrap.kernels.buckets import Stepped

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

triton_kernels = pytest.importorskip("cwd_wrap.kernels._triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels read the CPU's memory"),
]

compiled_paths = pytest.mark.parametrize("path", ["one_pass", "direction", "snapshot"])


def some(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).cuda()


def test_triton_is_the_choice() -> None:
    """On a card the library chooses triton."""
    assert kernels.choose(None, torch.device("cuda")) is triton_kernels


@compiled_paths
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_does_not_wait(path: str, rounding: str) -> None:
    """With a tensor learning rate, no step makes the host wait for the card."""
    model = net().cuda().bfloat16()
    lr = torch.tensor(0.01, device="cuda")
    base = AdamW(model.parameters(), lr=lr, fused=True)
    opt = CautiousDecay(base, lam=0.1, path=path, rounding=rounding, backend="triton")
    model(torch.ones(1, 3, device="cuda", dtype=torch.bfloat16)).sum().backward()
    for _ in range(2):
        opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@compiled_paths
def test_a_cuda_graph_uses_new_learning_rates(path: str) -> None:
    """Replayed steps under a changing learning rate equal steps outside a graph, counters included."""
    trained = []
    for captured in (False, True):
        p = torch.nn.Parameter(some(3000, 0))
        p.grad = some(3000, 1)
        lr = torch.tensor(0.1, device="cuda")
        base = AdamW([p], lr=lr, capturable=True, fused=True)
        opt = CautiousDecay(base, lam=0.5, path=path, backend="triton")
        step = opt.step
        for _ in range(3):
            step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            step = graph.replay
        for rate in (0.1, 0.01, 0.2):
            lr.fill_(rate)
            step()
        trained.append((p.detach().clone(), base.state[p]["step"].clone()))

    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("part", ["sync", "graphs", "streams"])
def test_the_rows_of_the_proof_hold(part: str) -> None:
    """No path waits; replays equal steps and write to no freed memory; two streams give the weights of one."""
    import gpu_proof

    rows = list(gpu_proof.in_this_process(part))

    assert len(rows) > 5
    assert [str(row) for row in rows if row.outcome != "ok"] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_second_device() -> None:
    """Weights on a device other than the current one decay on their own device."""
    w, x = torch.ones(5, device="cuda:1"), torch.ones(5, device="cuda:1")
    bucket = Stepped([w], [w], [x], None, 0.5)
    triton_kernels.decay_from_snapshot([bucket], strict=False, count=False)

    assert w.tolist() == [0.5] * 5
