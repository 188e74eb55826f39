"""Collects the share of weights that decays. It takes reports, and does not import the wrappers."""

from typing import Protocol

from torch import Tensor


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
        self._counts: list[tuple[int | Tensor, int]] = []

    def __call__(self, report: StepReport) -> None:
        """Record one step."""
        self._counts.append((report.active, report.total))

    @property
    def ratios(self) -> list[float]:
        """One number for each step, NaN if no weight took part. Reading it synchronises with the accelerator."""
        return [float(active) / total if total else float("nan") for active, total in self._counts]
