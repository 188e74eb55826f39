"""What several methods use: a check of their arguments, and the sums of those without a mask of the decay."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.kernels.buckets import Bucket, Sums

FULLY_SHARD = "or shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the shapes"


def check_known(what: str, value: object, known: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the ``known`` ones."""
    if value not in known:
        msg = f"unknown {what} {value!r}: pass one of {', '.join(map(repr, known))}"
        raise ValueError(msg)


def step_between(w: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """eta*u of the step from ``x`` to ``w``, in float32 or wider."""
    wide = torch.promote_types(w[0].dtype, torch.float32)
    return [before.to(wide) - after.to(wide) for after, before in zip(w, x, strict=True)]


def wide(buckets: Sequence[Bucket]) -> torch.dtype:
    """The type in which the kernels compute."""
    return torch.promote_types(buckets[0].w[0].dtype, torch.float32)


def without_decay(sums: Sums) -> Sums:
    """`rules.sums` of methods without a mask of the decay, with NaN in the two sums that they do not have."""
    if sums is not None:
        sums[:, 1:3] = math.nan
    return sums


def sums_of(active: Tensor, step: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    """`rules.sums` of methods without a mask of the decay: NaN in the two sums that they do not have."""
    size = rules.squares(step)
    return torch.stack([active.to(size.dtype), *[torch.full_like(size, math.nan)] * 2, size, rules.squares(w)], dim=1)
