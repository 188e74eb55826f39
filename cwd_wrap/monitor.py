"""Collects the share of weights that decays. It takes reports, and does not import the wrappers."""

from typing import Protocol

import torch
from torch import Tensor, distributed

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
        self._read = 0

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
        """One number for each call of `step`, NaN where nothing took part. Reading it waits for the accelerator.

        Of the weights on this rank; `read` can take all ranks together. A call with a learning rate of 0 is no step and
        has no number (torch's distributed checkpoints make one). DeepSpeed calls ``step`` once for each param group.
        """
        return [_share(active, total) for active, total in zip(self._counts, self._totals, strict=True)]

    def read(self, *, over_ranks: bool = False) -> float:
        """The share over all calls of `step` since the last reading; NaN where nothing took part.

        ``over_ranks``: over the weights of all ranks, so all must call this together. What several ranks hold counts
        once for each of them.
        """
        active, total = (column[self._read :] for column in (self._counts, self._totals))
        self._read = len(self._counts)
        counts = [(sum(map(int, active)), sum(map(int, total)))]
        if over_ranks and distributed.is_available() and distributed.is_initialized():
            counts *= distributed.get_world_size()
            distributed.all_gather_object(counts, counts[0])
        return _share(sum(active for active, _ in counts), sum(total for _, total in counts))

    def _put_together(self) -> None:
        alone = [torch.as_tensor(self._counts[i]) for i in self._apart]
        for i, count in zip(self._apart, torch.stack(alone), strict=True):
            self._counts[i] = count
        self._apart = []


def _share(active: int | Tensor, total: int) -> float:
    return float(active) / total if total else float("nan")
