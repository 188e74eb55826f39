"""Watches how much of the weights is decayed. It is handed reports and knows no wrapper."""

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
    """Collects the share of weights decayed at each step: ``1[u*x >= 0]``'s mean over all that take part.

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
        """Note down one step."""
        self._counts.append((report.active, report.total))

    @property
    def ratios(self) -> list[float]:
        """One number a step, NaN for a step in which nothing took part. Reading it waits for an accelerator."""
        return [float(active) / total if total else float("nan") for active, total in self._counts]
