"""Containers passed between the paths and the kernels: tensors of one param group, one device and the same types.

The columns of a bucket run in parallel, one entry a tensor. ``eta_lam`` is the decay of one step where the mask is 1.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from cwd_wrap.updates import Update

Count: TypeAlias = int | Tensor
"""A number of weights; a tensor where reading it would make an accelerator wait."""


@dataclass(frozen=True)
class Report:
    """What one step did: of the ``total`` weights that took part and are subject to decay, ``active`` were decayed."""

    active: Count
    total: int


@dataclass
class Coming:
    """Weights ``w`` that are about to be stepped in the direction of a*m + b*g; ``m`` is None without momentum."""

    w: Sequence[Tensor]
    g: Sequence[Tensor]
    m: Sequence[Tensor] | None
    a: float
    b: float
    eta_lam: float | Tensor

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.g) if self.m is None else (self.w, self.m, self.g)


@dataclass
class Stepped:
    """Weights ``w`` that have been stepped, and ``x``, the same from before the step.

    ``p``: the parameters that the weights are views of, whole where these are shards. ``g``: the gradients (negated
    where the step climbs them), for rules that read them.
    """

    p: Sequence[Tensor]
    w: Sequence[Tensor]
    x: Sequence[Tensor]
    g: Sequence[Tensor] | None
    eta_lam: float | Tensor

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.x) if self.g is None else (self.w, self.x, self.g)


@dataclass
class Whole:
    """Weights ``w`` to be decayed and stepped at once, by ``update``, on the base's own state.

    ``state``: a column for each of the update's state keys. ``steps``: the base's counters, one number each, not yet
    increased; empty where it counts none.
    """

    w: Sequence[Tensor]
    g: Sequence[Tensor]
    state: tuple[Sequence[Tensor], ...]
    steps: Sequence[Tensor]
    update: Update
    lr: float | Tensor
    eta_lam: float | Tensor

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The columns that are there, the weights first."""
        return (self.w, self.g, *self.state)


Bucket: TypeAlias = Coming | Stepped | Whole


def kind(bucket: Bucket) -> Hashable:
    """What buckets must have in common for one call of a kernel: device, types, and the kernel of a whole update."""
    update = bucket.update.kernel if isinstance(bucket, Whole) else None
    return (update, bucket.w[0].device, *(column[0].dtype for column in bucket.columns))
