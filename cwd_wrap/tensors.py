"""Views of parameters, gradients and state for elementwise kernels."""

import math
import sys
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DISTRIBUTED = ("torch.distributed.tensor", "torch.distributed._tensor")  # the second up to torch 2.4
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DTYPE, _SHAPE, _LAYOUT = attrgetter("dtype"), attrgetter("shape"), attrgetter("layout")


def local_real_view(t: Tensor) -> Tensor:
    """A view of ``t`` as real numbers, limited to this rank's shard."""
    if is_distributed(t):
        t = _arrived(t.to_local())
    return torch.view_as_real(t.detach()) if t.is_complex() else t


def local_real_views(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """`local_real_view` of each; nearly always the ``parameters`` themselves, since a step has thousands of them."""
    if are_plain(parameters):
        return parameters
    return [local_real_view(p) for p in parameters]


def are_plain(ts: Sequence[Tensor]) -> bool:
    """True if all are real tensors of torch's own classes."""
    return _PLAIN.issuperset(map(type, ts)) and not any(map(Tensor.is_complex, ts))


def marks(columns: Sequence[Sequence[Tensor]]) -> list[object]:
    """What must not change for a kernel to find the same elements at the tensors' addresses; [] if it never may."""
    ts = list(chain.from_iterable(columns))
    if not (are_plain(ts) and {torch.strided}.issuperset(map(_LAYOUT, ts)) and all(map(Tensor.is_contiguous, ts))):
        return []
    return [*map(_DTYPE, ts), *map(_SHAPE, ts), *map(Tensor.get_device, ts)]


def companion(t: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient or state of ``parameter``, as real numbers, in the parameter's layout over ranks.

    It communicates if ``t`` has another layout: the gradient of a replicated weight can be a partial sum on each rank.
    """
    if is_distributed(t):
        whole = cast("DTensor", parameter)
        if t.placements != whole.placements:
            t = t.redistribute(whole.device_mesh, whole.placements)
        t = t.to_local()
    t = _arrived(t).resolve_conj().resolve_neg()
    return torch.view_as_real(t.detach()) if t.is_complex() else t


def companions(ts: Sequence[Tensor], parameters: Sequence[Tensor], views: Sequence[Tensor]) -> Sequence[Tensor]:
    """`companion` of each; nearly always the tensors themselves. ``views``: `local_real_views` of the parameters."""
    if views is parameters and _PLAIN.issuperset(map(type, ts)) and not any(map(Tensor.is_neg, ts)):
        return ts
    return [companion(t, p) for t, p in zip(ts, parameters, strict=True)]


def real_numel(parameter: Tensor) -> int:
    """How many real numbers the whole parameter has, over all ranks: two for each complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


class Shard(NamedTuple):
    """The places of a whole parameter that a tensor of ``numel`` numbers holds, in its flat order.

    Run k holds ``run`` consecutive places, from ``offset + k*jump``.
    """

    offset: int
    run: int
    jump: int
    numel: int


def shard(parameter: Tensor) -> Shard:
    """The places of ``parameter`` on this rank, in the order of `local_real_view`.

    Raises ValueError if they are not evenly spaced runs (sharded along two dimensions besides the first).
    """
    numbers = 2 if parameter.is_complex() else 1
    if not is_distributed(parameter):
        numel = parameter.numel() * numbers
        return Shard(0, numel, numel, numel)
    where = sys.modules[f"{_distributed().__name__}._utils"].compute_local_shape_and_global_offset
    shape, offset = where(parameter.shape, parameter.device_mesh, parameter.placements)
    numel = math.prod(shape) * numbers
    inner = [math.prod(parameter.shape[d + 1 :]) * numbers for d in range(parameter.dim())]
    split = [d for d in range(1, parameter.dim()) if shape[d] != parameter.shape[d]]
    if numel and len(split) > 1:
        msg = (
            f"a parameter of shape {tuple(parameter.shape)} is sharded along dimensions {split}, but random numbers "
            "can be drawn only where the first dimension and at most one other are sharded: shard fewer dimensions, or "
            'use neither mask="random" nor rounding="stochastic"'
        )
        raise ValueError(msg)
    start = sum(o * i for o, i in zip(offset, inner, strict=True))
    if not split or not numel:
        return Shard(start, numel, numel, numel)
    return Shard(start, shape[split[0]] * inner[split[0]], parameter.shape[split[0]] * inner[split[0]], numel)


def sparse_indices(gradient: Tensor) -> tuple[Tensor, ...]:
    """The places that a sparse gradient holds values for, each once, as indices into the parameter."""
    return tuple(gradient.detach().coalesce().indices())


def laid_out_otherwise(ts: Sequence[Tensor], parameters: Sequence[Tensor]) -> set[int]:
    """Indices of the ``ts`` with another layout over the ranks than their parameter: `companion` communicates there."""
    if _PLAIN.issuperset(map(type, ts)):
        return set()
    pairs = enumerate(zip(ts, parameters, strict=True))
    return {i for i, (t, p) in pairs if is_distributed(t) and t.placements != cast("DTensor", p).placements}


def largest_shard(parameter: Tensor) -> int:
    """Bytes of the parameter on the rank with the largest shard: the same number on all ranks."""
    sizes = list(parameter.shape)
    if is_distributed(parameter):
        for i, placement in enumerate(parameter.placements):
            if (dim := getattr(placement, "dim", None)) is not None:
                sizes[dim] = -(-sizes[dim] // parameter.device_mesh.size(i))
    return math.prod(sizes) * parameter.element_size()


def held_by(parameter: Tensor) -> int:
    """How many ranks hold the same places of the parameter, if it is a DTensor; else 1."""
    if not is_distributed(parameter):
        return 1
    placements = enumerate(parameter.placements)
    return math.prod(parameter.device_mesh.size(i) for i, each in placements if each.is_replicate())


def totals(parameters: Sequence[Tensor], local: Tensor) -> Tensor:
    """The sum of ``local``, one number for each of the ``parameters``, over the shards of each parameter.

    Ranks that share a parameter must call this together. Parameters of one mesh that are sharded over the same of its
    dimensions share an all-reduce for each of these dimensions.
    """
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(parameters):
        if is_distributed(p):
            sharded = tuple(not placement.is_replicate() for placement in p.placements)
            if any(sharded):
                alike.setdefault((p.device_mesh, sharded), []).append(i)
    if not alike:
        return local
    module, whole = _distributed(), local.clone()
    for (mesh, sharded), rows in alike.items():
        placements = [module.Partial() if each else module.Replicate() for each in sharded]
        chosen = slice(None) if len(rows) == len(parameters) else rows
        whole[chosen] = module.DTensor.from_local(local[chosen], mesh, placements).full_tensor()
    return whole


def has_numbers(t: Tensor) -> bool:
    """False for meta tensors and for those of FakeTensorMode: they stand for tensors, and nothing can be read."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return not (t.is_meta or (fake is not None and isinstance(t, fake.FakeTensor)))


def made_of_others(t: Tensor) -> bool:
    """True for a subclass whose tensors are made of other tensors (torchao's quantized weights), except for DTensor."""
    return hasattr(type(t), "__tensor_flatten__") and not is_distributed(t)


def is_distributed(t: Tensor) -> "TypeGuard[DTensor]":
    """True for a DTensor: each rank holds a part of it."""
    if type(t) in _PLAIN:
        return False
    module = _distributed()
    return module is not None and isinstance(t, module.DTensor)


def _arrived(t: Tensor) -> Tensor:
    """The tensor ``t``, after a wait if a collective is still filling it: it has no address before."""
    wait = getattr(t, "wait", None) if type(t) not in _PLAIN else None
    return t if wait is None else wait()


def _distributed() -> Any:
    """The module of DTensor, or None if it is not imported: then there are no DTensors, and importing it is slow."""
    return next((m for name in _DISTRIBUTED if hasattr(m := sys.modules.get(name), "DTensor")), None)
