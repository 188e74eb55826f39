"""What one step did, as an observer gets it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Part:
    """What one step did to some parameters of one param group; each parameter has a row of ``sums``."""

    group: int
    """The group's index."""
    name: str
    """The group's ``name``, or ``group 0``."""
    labels: Sequence[str]
    """The parameters' names, if the optimizer was given some; else like ``0.3``: the group's index, the place in it."""
    weights: Sequence[int]
    """For each parameter, how many weights the method acted on, on this rank."""
    copies: int
    """How many ranks hold the same weights, by the placements of a DTensor; 1 for other tensors."""
    path: str
    eta_lam: float | Tensor
    sums: Tensor
    """`rules.sums`, still on the device. NaN for what the method does not have."""


@dataclass(frozen=True)
class Report:
    """What one step did, in ``parts``."""

    parts: Sequence[Part]

    @property
    def active(self) -> Tensor | int:
        """How many weights were decayed, as a tensor that is still on the device."""
        return sum(part.sums[:, 0].sum() for part in self.parts)

    @property
    def total(self) -> int:
        """How many weights the method acted on."""
        return sum(sum(part.weights) for part in self.parts)
