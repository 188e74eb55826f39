"""On a card: the Triton kernels equal eager ones, in one launch, without waiting, and inside a CUDA graph.

pytest -m gpu
"""

import os

import pytest
import torch
from support import both_paths, net, values
from torch import Tensor
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, kernels

triton_kernels = pytest.importorskip("cwd_wrap.kernels._triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels read the CPU's memory"),
]

SIZES = [0, 1, 7, 1023, 1024, 1025, (1 << 14) + 1, (1 << 20) + 3]


def some(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_equal_eager_ones(dtype: torch.dtype) -> None:
    """Along a direction and from a snapshot, the weights are those of the same kernels in torch operations."""
    eager = kernels.choose("eager", torch.device("cuda"))
    n, weights = len(SIZES), []
    for kernel in (eager, triton_kernels):
        w, m, g = ([some(size, dtype, size + k) for size in SIZES] for k in (0, 1, 2))
        kernel.decay_along(w, m, g, [0.9] * n, [1 - 0.9] * n, [0.3] * n, strict=False, count=False)
        kernel.decay_from_snapshot(w, m, [torch.tensor(0.2, device="cuda")] * n, strict=False, count=False)
        weights.append(torch.cat(w).double())

    # A mask may differ where a*m + b*g cancels; elsewhere it is a rounding or two.
    tolerance = 8 * torch.finfo(dtype).eps
    assert ((weights[0] - weights[1]).abs() > tolerance * weights[0].abs()).float().mean() < 1e-5


@pytest.mark.parametrize("offset", [0, 1])
def test_copy(offset: int) -> None:
    """A copy is exact from aligned addresses and from others."""
    source = some(5000, torch.bfloat16, 0)[offset:]
    to = torch.zeros_like(source)
    triton_kernels.copy([to], [source])

    assert torch.equal(to, source)


@both_paths
def test_a_step_does_not_wait(snapshot: bool) -> None:
    """With a tensor learning rate, no step makes the host wait for the card."""
    model = net().cuda()
    lr = torch.tensor(0.01, device="cuda")
    opt = CautiousDecay(AdamW(model.parameters(), lr=lr, fused=True), lam=0.1, snapshot=snapshot, backend="triton")
    model(torch.ones(1, 3, device="cuda")).sum().backward()
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_paths
def test_a_cuda_graph_sees_new_learning_rates(snapshot: bool) -> None:
    """Replayed steps under a changing learning rate equal steps outside a graph."""
    trained = []
    for captured in (False, True):
        p = torch.nn.Parameter(some(3000, torch.float32, 0))
        p.grad = some(3000, torch.float32, 1)
        lr = torch.tensor(0.1, device="cuda")
        base = AdamW([p], lr=lr, capturable=True)
        opt = CautiousDecay(base, lam=0.5, snapshot=snapshot, backend="triton")
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
        trained.append(p.detach().clone())

    torch.testing.assert_close(*trained)


@both_paths
def test_the_wrapper_gives_what_it_gives_with_eager(snapshot: bool) -> None:
    """Steps of the wrapper with backend="triton", which None means here, equal those with backend="eager"."""
    trained = {}
    for backend in ("eager", "triton", None):
        model = net()
        opt = CautiousDecay(SGD(model.cuda().parameters(), lr=0.1), lam=0.5, snapshot=snapshot, backend=backend)
        for _ in range(3):
            model(torch.ones(1, 3, device="cuda")).sum().backward()
            opt.step()
        trained[backend] = values(model)

    torch.testing.assert_close(trained["triton"], trained["eager"])
    assert torch.equal(trained[None], trained["triton"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_second_device() -> None:
    """Weights on a device that is not the current one are decayed there."""
    w, x = torch.ones(5, device="cuda:1"), torch.ones(5, device="cuda:1")
    triton_kernels.decay_from_snapshot([w], [x], [0.5], strict=False, count=False)

    assert w.tolist() == [0.5] * 5
