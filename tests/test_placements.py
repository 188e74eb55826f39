"""Sharded and replicated weights: two gloo processes give what one gives, whatever layout the gradient comes in."""

import pytest
import torch
from ranks import spawn

from cwd_wrap import CautiousDecay, CautiousUpdate

pytestmark = pytest.mark.xdist_group("ranks")
WEIGHTS, GRADIENTS = [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]
EXPECTED = [0.85, 1.1, -1.1, -0.85]


def work(rank: int, layout: str, path: str | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole, gradient = torch.tensor(WEIGHTS), torch.tensor(GRADIENTS)
    placement = Shard(0) if layout == "sharded" else Replicate()
    p = torch.nn.Parameter(distribute_tensor(whole, mesh, [placement]))
    if layout == "partial sums":
        p.grad = DTensor.from_local(gradient * (3.0, -2.0)[rank], mesh, [Partial()])
    else:
        p.grad = distribute_tensor(gradient, mesh, [placement])
    CautiousDecay(torch.optim.SGD([p], lr=0.1), lam=0.5, path=path).step()
    torch.testing.assert_close(p.full_tensor().tolist(), EXPECTED)

    q = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [placement]))
    opt = CautiousUpdate(torch.optim.SGD([q], lr=0.1, momentum=0.9))
    for step in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -0.5])):
        q.grad = distribute_tensor(step, mesh, [placement])
        opt.step()
    torch.testing.assert_close(
        q.full_tensor().detach(), torch.tensor([-0.3533, -0.3533, -0.3533, -0.1]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("path", ["direction", "snapshot"])
@pytest.mark.parametrize("layout", ["sharded", "replicated", "partial sums"])
def test_two_ranks_are_one(layout: str, path: str) -> None:
    """The mask is that of the whole gradient on every rank, the mean of a cautious update that of the whole tensor."""
    pytest.importorskip("torch.distributed.tensor").__dict__.get("DTensor") or pytest.skip("no public DTensor")
    spawn(2, work, layout, path)
