"""Collects the share of weights that decays. It takes reports, and does not import the wrappers."""

from typing import Protocol

import torch
from torch import Tensor

from cwd_wrap.graphs import capturing

TOGETHER = 256  # counts that are put into one tensor: one alone takes 512 bytes on a device


class StepReport(Protocol):
    """What a wrapper reports of one step."""

    @property
    def active(self) -> int | Tensor:
        """Weights decayed."""

    @property
    def total(self) -> int:
        """Weights that could have been."""


class MaskMonitor:
    """Collects the share of weights that decayed at each step: the mean of the mask over all weights that took part.

    Example:
        >>> import torch
        >>> from cwd_wrap import CautiousDecay, MaskMonitor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> opt = CautiousDecay(torch.optim.SGD([w], lr=0.1), lam=0.5)
        >>> opt.observer = monitor = MaskMonitor()
        >>> w.grad = torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> opt.step()
        >>> monitor.ratios
        [0.25]
    """

    def __init__(self) -> None:
        self._counts: list[int | Tensor] = []
        self._totals: list[int] = []
        self._apart: list[int] = []

    def __call__(self, report: StepReport) -> None:
        """Record one step."""
        if isinstance(report.active, Tensor):
            self._apart.append(len(self._counts))
        self._counts.append(report.active)
        self._totals.append(report.total)
        if len(self._apart) >= TOGETHER and not capturing():
            self._put_together()

    @property
    def ratios(self) -> list[float]:
        """One number for each step, NaN if no weight took part. Reading it synchronises with the accelerator."""
        return [
            float(active) / total if total else float("nan")
            for active, total in zip(self._counts, self._totals, strict=True)
        ]

    def _put_together(self) -> None:
        alone = [torch.as_tensor(self._counts[i]) for i in self._apart]
        for i, count in zip(self._apart, torch.stack(alone), strict=True):
            self._counts[i] = count
        self._apart = []
