"""Views of a parameter and its companions that elementwise kernels can work on."""

import sys

import torch
from torch import Tensor


def plain(t: Tensor) -> Tensor:
    """``t`` without autograd, as real numbers, and only this rank's shard of it: a view, never a copy."""
    # A DTensor exists only once its module has been imported; importing it here would slow down everyone else.
    for module in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the second up to torch 2.4
        distributed = getattr(sys.modules.get(module), "DTensor", None)
        if distributed is not None and isinstance(t, distributed):
            t = t.to_local()
    t = t.detach()
    return torch.view_as_real(t) if t.is_complex() else t


def sparse_indices(gradient: Tensor) -> tuple[Tensor, ...]:
    """The places that a sparse gradient holds values for, each once, as indices into the parameter."""
    return tuple(gradient.detach().coalesce().indices())
