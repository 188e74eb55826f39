"""Small nets under the engines of torch.distributed, in float64, and the same nets in one process."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cwd_wrap.step import paths

STEPS = 3
BATCH = 12  # divisible by 1, 2, 3 and 4
Build = Callable[[], tuple[nn.Module, nn.Module]]


def net() -> nn.Sequential:
    """A small net with uneven shards. Two ranks split 5 rows into 3 and 2, and one row into 1 and 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Residual(nn.Module):
    """A block of a transformer without attention, as sequence parallelism splits it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def block() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Linear(6, 1)).double()
    nn.init.normal_(model[0].norm.weight, 1, 0.1)
    nn.init.normal_(model[0].norm.bias, 0, 0.1)
    return model


def batch(model: nn.Module, step: int) -> Tensor:
    sizes = (BATCH, 3) if isinstance(model[0], nn.Linear) else (BATCH, 4, 6)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.square().sum(-1, keepdim=True)).square().mean()


def whole(t: Tensor) -> Tensor:
    """The whole tensor, gathered from its shards."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def flat(tensors: Iterator[Tensor]) -> Tensor:
    return torch.cat([whole(t).flatten() for t in tensors])


# ---- engines: the module to call, and into how many parts the ranks split a batch


def ddp() -> tuple[nn.Module, int]:
    return nn.parallel.DistributedDataParallel(net()), dist.get_world_size()


def fsdp2(make: Callable[[], nn.Sequential] = net, **options: Any) -> tuple[nn.Module, int]:
    from torch.distributed.fsdp import fully_shard

    model = make()
    for layer in (model[0], model[-1], model):
        fully_shard(layer, **options)
    return model, dist.get_world_size()


def columns() -> tuple[nn.Module, int]:
    """Shard each weight along its last dimension."""
    from torch.distributed.tensor import Shard

    return fsdp2(block, shard_placement_fn=lambda p: Shard(p.ndim - 1))


def offloaded() -> tuple[nn.Module, int]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixed() -> tuple[nn.Module, int]:
    """Shard the first layer; leave the last one replicated, as plain tensors."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model[0])
    for p in model[2].parameters():
        p.register_hook(averaged)
    return model, dist.get_world_size()


def averaged(gradient: Tensor) -> Tensor:
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def hsdp() -> tuple[nn.Module, int]:
    from torch.distributed.device_mesh import init_device_mesh

    return fsdp2(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def in_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """Tensor and sequence parallelism: the norm's weights are replicated, their gradients partial sums."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    rows = {"input_layouts": (Replicate(),), "desired_input_layouts": (Shard(1),)}
    plan = {
        "0": PrepareModuleInput(**rows),
        "0.norm": SequenceParallel(),
        "0.up": ColwiseParallel(input_layouts=Shard(1)),
        "0.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "1": SequenceParallel(use_local_output=False),
    }
    gathered = PrepareModuleOutput(output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),))
    return parallelize_module(parallelize_module(model, mesh, plan), mesh, gathered)


def sequence_parallel() -> tuple[nn.Module, int]:
    from torch.distributed.device_mesh import init_device_mesh

    return in_parallel(block(), init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))), 1


def fsdp2_and_tp() -> tuple[nn.Module, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = in_parallel(block(), mesh["tp"])
    for layer in (model[0], model[1], model):
        fully_shard(layer, mesh=mesh["dp"])
    return model, 2


# ---- training


def part_of(x: Tensor, parts: int) -> Tensor:
    """The rows that this rank trains on."""
    return x[dist.get_rank() * parts // dist.get_world_size() :: parts]


def inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def trained(rank: int, engine: Callable[[], tuple[nn.Module, int]], build: Any, piece: int) -> Any:
    """Train; return all weights at the end, the gradients of each step, and the optimizer's class name."""
    model, parts = engine()
    paths.PIECE, before = piece, paths.PIECE
    optimizer = build(model.parameters())
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(inner(model), step)
        loss_of(model, part_of(x, parts)).backward()
        gradients.append(flat(p.grad for p in model.parameters()).numpy())
        optimizer.step()
    paths.PIECE = before
    return flat(model.parameters()).numpy(), gradients, type(optimizer).__name__


def alone(model: nn.Module, build: Any, last: Any = None) -> Tensor:
    """The weights after the same training in one process; the last step uses another optimizer, if given."""
    optimizer = build(model.parameters())
    for step in range(STEPS):
        if step == STEPS - 1 and last is not None:
            state = optimizer.state_dict()
            optimizer = last(model.parameters())
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        loss_of(model, batch(model, step)).backward()
        optimizer.step()
    return flat(model.parameters())


def replayed(model: nn.Module, build: Any, gradients: list[Any]) -> Tensor:
    """The weights after steps along these gradients in one process."""
    parameters = list(model.parameters())
    optimizer = build(parameters)
    for of_step in gradients:
        parts = torch.from_numpy(of_step).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
    return flat(iter(parameters))
