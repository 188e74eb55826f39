"""Collects the share of weights that decays. It takes reports, and does not import the wrappers."""

from typing import Protocol

from torch import Tensor, distributed


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
        self._read = 0

    def __call__(self, report: StepReport) -> None:
        """Record one step."""
        self._counts.append((report.active, report.total))

    @property
    def ratios(self) -> list[float]:
        """One number for each call of `step`, NaN where nothing took part. Reading it waits for the accelerator.

        Of the weights on this rank; `read` can take all ranks together. A call with a learning rate of 0 is no step and
        has no number (torch's distributed checkpoints make one). DeepSpeed calls ``step`` once for each param group.
        """
        return [_share(active, total) for active, total in self._counts]

    def read(self, *, over_ranks: bool = False) -> float:
        """The share over all calls of `step` since the last reading; NaN where nothing took part.

        ``over_ranks``: over the weights of all ranks, so all must call this together. What several ranks hold counts
        once for each of them.
        """
        new = self._counts[self._read :]
        self._read = len(self._counts)
        counts = [(sum(int(active) for active, _ in new), sum(total for _, total in new))]
        if over_ranks and distributed.is_available() and distributed.is_initialized():
            counts *= distributed.get_world_size()
            distributed.all_gather_object(counts, counts[0])
        return _share(sum(active for active, _ in counts), sum(total for _, total in counts))


def _share(active: int | Tensor, total: int) -> float:
    return float(active) / total if total else float("nan")
