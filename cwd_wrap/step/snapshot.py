"""Copies from before a step: of weights, in reused buffers, and of gradients. Independent of the rules."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cwd_wrap.graphs import capturing
from cwd_wrap.kernels.buckets import Kept
from cwd_wrap.tensors import has_numbers, local_real_view

Copy = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
CopyOn = Callable[[torch.device], Copy]


class Buffers:
    """Memory for copies of weights, kept from step to step. `drop` frees it.

    Each call of `whole` frees the copies that it does not need. The copies are not in the optimizer's ``state``,
    because many optimizers treat a parameter with any state as already initialised.

    During the capture of a CUDA graph, copies are made in the graph's own memory and are not kept here. They live as
    long as the graph, whether or not `drop` is called.
    """

    def __init__(self) -> None:
        self._whole: dict[int, Tensor] = {}
        self._piece: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def whole(self, owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Room for copies of ``tensors``, equal in shape, type and device, and dense; valid until the next call.

        ``owners``: the parameters that the tensors belong to (the tensors may be new views at each step).
        """
        if capturing():
            return [_buffer_like(t) for t in tensors]
        self._whole = {id(owner): self._buffer(owner, t) for owner, t in zip(owners, tensors, strict=True)}
        return list(self._whole.values())

    def piece(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Like `whole`, but in one buffer for each device and type, which the next call reuses."""
        needed: dict[tuple[torch.device, torch.dtype], int] = {}
        for t in tensors:
            needed[t.device, t.dtype] = needed.get((t.device, t.dtype), 0) + _aligned(t)
        piece = {} if capturing() else self._piece
        for key, numel in needed.items():
            if key not in piece or piece[key].numel() < numel:
                piece.pop(key, None)  # free it before the larger one is allocated
                with torch.inference_mode(mode=False):
                    piece[key] = torch.empty(numel, dtype=key[1], device=key[0])
        used = dict.fromkeys(needed, 0)
        copies = []
        for t in tensors:
            key = t.device, t.dtype
            copies.append(piece[key].as_strided(t.shape, _dense_stride(t), used[key]))
            used[key] += _aligned(t)
        return copies

    def drop(self) -> None:
        """Free all memory; the next step that needs some allocates it again."""
        self.drop_whole()
        self._piece = {}

    def drop_whole(self) -> None:
        """Free the memory of `whole`."""
        self._whole = {}

    def _buffer(self, owner: Tensor, t: Tensor) -> Tensor:
        old = self._whole.get(id(owner))
        alike = old is not None and (old.shape, old.dtype, old.device) == (t.shape, t.dtype, t.device)
        # A buffer is dense, even where the tensor is a view with gaps.
        if old is not None and alike and (old.stride() == t.stride() or old.stride() == _dense_stride(t)):
            return old
        return _buffer_like(t)


def _buffer_like(t: Tensor) -> Tensor:
    with torch.inference_mode(mode=False):  # a tensor made in inference mode cannot be written outside of it
        return torch.empty_like(t)


def _aligned(t: Tensor) -> int:
    """Elements to reserve for ``t``, so that the next tensor starts on a boundary of 64 bytes."""
    return (t.numel() + 31) // 32 * 32


def _dense_stride(t: Tensor) -> tuple[int, ...]:
    return t.stride() if t.is_contiguous() else torch.empty_like(t, device="meta").stride()


def copying(
    copies: Sequence[Tensor], tensors: Sequence[Tensor], copy_on: CopyOn
) -> list[tuple[Copy, list[Tensor], list[Tensor]]]:
    """The calls that fill the ``copies`` with the ``tensors``: one for each device and type, as (copy, to, source).

    ``copy_on`` returns the function that copies on a device.
    """
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for copy, t in zip(copies, tensors, strict=True):
        to, source = alike.setdefault((t.device, t.dtype), ([], []))
        to.append(copy)
        source.append(t)
    return [(copy_on(device), to, source) for (device, _), (to, source) in alike.items()]


class Gradients:
    """Keeps the gradients that a method reads after the step: as copies, while the base may modify them in place."""

    def __init__(self) -> None:
        self.copied = True

    def keep(self, gradients: Sequence[Tensor | None]) -> list[Kept | None]:
        """The gradients, copied if necessary; None for a parameter without one."""
        return list(self._each(gradients))

    def check(self, kept: Sequence[Kept], now: Sequence[Tensor | None]) -> bool:
        """Stop copying gradients once a step shows that the base leaves them unmodified; resume if it modifies them.

        Returns whether the base modified gradients that were not copied, so that the method has to use modified ones.
        """
        left = [(k, g) for k, g in zip(kept, now, strict=True) if g is not None]
        if self.copied:
            # The comparison waits for the device. A capture cannot wait, so the graph copies at each replay.
            self.copied = capturing() or not _untouched([(k.gradient, g) for k, g in left])
            return False
        self.copied = any(g._version != k.version for k, g in left)
        return self.copied

    def _each(self, gradients: Sequence[Tensor | None]) -> Iterator[Kept | None]:
        for g in gradients:
            if g is None:
                yield None
            else:
                kept = g.detach().clone() if self.copied else g
                yield Kept(kept, kept._version)


def _untouched(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """True if the gradients before and after the step are equal, and not all 0. Waits once for each accelerator."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for pair in pairs:
        before, after = map(local_real_view, pair)
        if (before.shape, before.device) != (after.shape, after.device) or not has_numbers(before):
            return False
        of_device.setdefault(before.device, []).append(torch.stack([before.any(), (before != after).any()]))
    found = [torch.stack(flags).any(0).tolist() for flags in of_device.values()]
    return any(nonzero for nonzero, _ in found) and not any(differ for _, differ in found)
