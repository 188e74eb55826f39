"""Copies of weights from before a step: taken, reused from step to step, dropped. Knows no rule."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

KernelOf = Callable[[torch.device], ModuleType]


class Snapshots:
    """Buffers for `take`, one a tensor, kept until the tensor is no longer asked for or `drop` is called.

    They live here and never in an optimizer's ``state``: many optimizers take a parameter with any state at all for
    one that is already initialised.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def take(self, owners: Sequence[Tensor], tensors: Sequence[Tensor], kernel: KernelOf) -> list[Tensor]:
        """Copies of ``tensors``, equal in shape, type and device, and dense; valid until the next call.

        ``owners`` are the parameters that the tensors belong to (the tensors may be new views at each step); ``kernel``
        gives the module that copies on a device.
        """
        kept = {id(owner): self._buffer(owner, t) for owner, t in zip(owners, tensors, strict=True)}
        self._buffers = kept
        copies = list(kept.values())
        batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for copy, t in zip(copies, tensors, strict=True):
            to, source = batches.setdefault((t.device, t.dtype), ([], []))
            to.append(copy)
            source.append(t)
        for (device, _), (to, source) in batches.items():
            kernel(device).copy(to, source)
        return copies

    def drop(self) -> None:
        """Give the memory back; the next `take` allocates anew."""
        self._buffers = {}

    def _buffer(self, owner: Tensor, t: Tensor) -> Tensor:
        old = self._buffers.get(id(owner))
        alike = old is not None and (old.shape, old.dtype, old.device) == (t.shape, t.dtype, t.device)
        # A buffer is dense, even where the tensor is a view with gaps.
        if old is not None and alike and old.stride() in (t.stride(), torch.empty_like(t, device="meta").stride()):
            return old
        with torch.inference_mode(mode=False):  # one made in inference mode could not be written outside of it
            return torch.empty_like(t)
