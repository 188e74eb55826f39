"""Views of a parameter and its companions that elementwise kernels can work on."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DISTRIBUTED = ("torch.distributed.tensor", "torch.distributed._tensor")  # the second up to torch 2.4
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def local_real_view(t: Tensor) -> Tensor:
    """A view of ``t`` as real numbers, and only of this rank's shard of it."""
    if _is_distributed(t):
        t = _arrived(t.to_local())  # type: ignore[attr-defined]
    return torch.view_as_real(t.detach()) if t.is_complex() else t


def local_real_views(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """`local_real_view` of each; nearly always the ``parameters`` themselves, since a step has thousands of them."""
    if _PLAIN.issuperset(map(type, parameters)) and not any(map(Tensor.is_complex, parameters)):
        return parameters
    return [local_real_view(p) for p in parameters]


def companion(t: Tensor, parameter: Tensor) -> Tensor:
    """A gradient or state of ``parameter``, as real numbers laid out over the ranks as the parameter is.

    Gradients of replicated weights may come as a partial sum on each rank.
    """
    if _is_distributed(t):
        if t.placements != parameter.placements:  # type: ignore[attr-defined]
            t = t.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        t = t.to_local()  # type: ignore[attr-defined]
    t = _arrived(t).resolve_conj().resolve_neg()
    return torch.view_as_real(t.detach()) if t.is_complex() else t


def companions(ts: Sequence[Tensor], parameters: Sequence[Tensor], views: Sequence[Tensor]) -> Sequence[Tensor]:
    """`companion` of each; nearly always the tensors themselves. ``views``: `local_real_views` of the parameters."""
    if views is parameters and _PLAIN.issuperset(map(type, ts)) and not any(map(Tensor.is_neg, ts)):
        return ts
    return [companion(t, p) for t, p in zip(ts, parameters, strict=True)]


class Shard(NamedTuple):
    """Which places of a whole parameter a tensor holds: runs of ``run``, the first at ``offset``, ``jump`` apart."""

    offset: int
    run: int
    jump: int
    numel: int


def shard(parameter: Tensor) -> Shard:
    """The places that this rank holds of ``parameter``, as `local_real_view` shows them.

    Raises ValueError where they are not evenly spaced runs: sharded along two dimensions besides the first.
    """
    numbers = 2 if parameter.is_complex() else 1
    if not _is_distributed(parameter):
        numel = parameter.numel() * numbers
        return Shard(0, numel, numel, numel)
    where = sys.modules[f"{_distributed().__name__}._utils"].compute_local_shape_and_global_offset
    shape, offset = where(parameter.shape, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    numel = math.prod(shape) * numbers
    inner = [math.prod(parameter.shape[d + 1 :]) * numbers for d in range(parameter.dim())]
    split = [d for d in range(1, parameter.dim()) if shape[d] != parameter.shape[d]]
    if numel and len(split) > 1:
        msg = (
            f"a parameter of shape {tuple(parameter.shape)} is sharded along dimensions {split}: random numbers for "
            "its places are known where it is sharded along the first and one more"
        )
        raise ValueError(msg)
    start = sum(o * i for o, i in zip(offset, inner, strict=True))
    if not split or not numel:
        return Shard(start, numel, numel, numel)
    return Shard(start, shape[split[0]] * inner[split[0]], parameter.shape[split[0]] * inner[split[0]], numel)


def sparse_indices(gradient: Tensor) -> tuple[Tensor, ...]:
    """The places that a sparse gradient holds values for, each once, as indices into the parameter."""
    return tuple(gradient.detach().coalesce().indices())


def total(parameter: Tensor, local: Tensor) -> Tensor:
    """The sum over all shards of ``parameter`` of a number, of which ``local`` is this rank's part."""
    if not _is_distributed(parameter):
        return local
    module = _distributed()
    of_each = parameter.placements  # type: ignore[attr-defined]
    placements = [module.Replicate() if placement.is_replicate() else module.Partial() for placement in of_each]
    whole: Tensor = module.DTensor.from_local(local, parameter.device_mesh, placements).full_tensor()  # type: ignore[attr-defined]
    return whole


def totals(parameters: Sequence[Tensor], local: Tensor) -> Tensor:
    """`total` for each of the ``parameters``, of whose numbers ``local`` holds this rank's parts."""
    if not any(map(_is_distributed, parameters)):
        return local
    return torch.stack([total(p, part) for p, part in zip(parameters, local, strict=True)])


def _is_distributed(t: Tensor) -> bool:
    if type(t) in _PLAIN:
        return False
    module = _distributed()
    return module is not None and isinstance(t, module.DTensor)


def _arrived(t: Tensor) -> Tensor:
    """A tensor that a collective is still filling has no address yet: wait for it."""
    wait = getattr(t, "wait", None) if type(t) not in _PLAIN else None
    return t if wait is None else wait()


def _distributed() -> Any:
    """The module of DTensor, None where it has not been imported: then no tensor is one, and importing it is slow."""
    return next((m for name in _DISTRIBUTED if hasattr(m := sys.modules.get(name), "DTensor")), None)
