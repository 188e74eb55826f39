"""What the wrapper hands to the kernels, and what it hears back."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from cwd_wrap.tensors import plain, sparse_indices


@dataclass(frozen=True)
class Report:
    """What one step did: of the ``total`` weights that took part and are subject to decay, ``active`` were decayed.

    ``active`` is a tensor where reading it would make an accelerator wait.
    """

    active: int | Tensor
    total: int


@dataclass
class Batch:
    """Tensors of one device and the same types, for one call of a kernel; the lists run in parallel.

    ``w``: weights. Before the step (direction path): ``m`` (or None), ``g``, ``a``, ``b``, where sign(u) is
    sign(a*m + b*g). After it (snapshot path): ``x``, the weights from before, and ``g``, the gradients (negated where
    they are to be climbed). ``p``: the parameters that the weights are views of, whole where these are shards.
    """

    eta_lam: list[float | Tensor] = field(default_factory=list)
    p: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    m: list[Tensor | None] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    a: list[float] = field(default_factory=list)
    b: list[float] = field(default_factory=list)


class Rows(NamedTuple):
    """The rows of a parameter that a sparse gradient touches, as they were before the step."""

    parameter: Tensor
    indices: tuple[Tensor, ...]
    before: Tensor
    eta_lam: float | Tensor

    @classmethod
    def of(cls, parameter: Tensor, gradient: Tensor, eta_lam: float | Tensor) -> "Rows":
        """The rows that ``gradient``, which is sparse, touches, as they are now."""
        indices = sparse_indices(gradient)
        return cls(parameter, indices, plain(parameter)[indices], eta_lam)


class Tally:
    """Adds up what the kernels report."""

    def __init__(self) -> None:
        self.active: int | Tensor = 0
        self.total = 0

    def add(self, batch: Batch, active: int | Tensor) -> None:
        """Count a batch, of which ``active`` weights were decayed."""
        self.active = self.active + active
        self.total += sum(w.numel() for w in batch.w)
