"""Views of a parameter and its companions that elementwise kernels can work on."""

import sys

import torch
from torch import Tensor


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
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    placements = [Replicate() if p.is_replicate() else Partial() for p in parameter.placements]  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements).full_tensor()


def _is_distributed(t: Tensor) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter):  # nearly always, and this is asked three times a parameter and step
        return False
    # A DTensor exists only once its module has been imported; importing it here would slow down everyone else.
    modules = (sys.modules.get(name) for name in ("torch.distributed.tensor", "torch.distributed._tensor"))  # 2nd: 2.4
    classes = [getattr(module, "DTensor", None) for module in modules]
    return any(isinstance(t, cls) for cls in classes if cls is not None)
