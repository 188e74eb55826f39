"""Views of a parameter and its companions that elementwise kernels can work on."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DISTRIBUTED = ("torch.distributed.tensor", "torch.distributed._tensor")  # the second up to torch 2.4


def plain(t: Tensor, companion_of: Tensor | None = None) -> Tensor:
    """``t`` without autograd, as real numbers, and only this rank's shard of it.

    A parameter comes as a view. A gradient or state, the ``companion_of`` a parameter, is first laid out over the ranks
    as that is: gradients of replicated weights may come as a partial sum on each rank.
    """
    if _is_distributed(t):
        if companion_of is not None and t.placements != companion_of.placements:  # type: ignore[attr-defined]
            t = t.redistribute(companion_of.device_mesh, companion_of.placements)  # type: ignore[attr-defined]
        t = t.to_local()  # type: ignore[attr-defined]
    t = t.detach()
    if companion_of is not None:
        t = t.resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t


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
    if type(t) in (Tensor, torch.nn.Parameter):  # nearly always, and this is asked three times a parameter and step
        return False
    module = _distributed()
    return module is not None and isinstance(t, module.DTensor)


def _distributed() -> Any:
    """The module of DTensor, None where it has not been imported: then no tensor is one, and importing it is slow."""
    return next((m for name in _DISTRIBUTED if hasattr(m := sys.modules.get(name), "DTensor")), None)
