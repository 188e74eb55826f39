"""Pictures of what a `MaskMonitor` collected. Needs matplotlib (``pip install cwd-wrap[plots]``), imported on call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_mask_ratio(ratios: Sequence[float], *, ax: "Axes | None" = None, label: str | None = None) -> "Axes":
    """Draw the share of decayed weights over the steps into ``ax``, or into a new figure. Returns the axes."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots()
    ax.plot(range(1, len(ratios) + 1), ratios, label=label)
    ax.set(xlabel="step", ylabel="share of weights decayed", ylim=(0, 1))
    if label is not None:
        ax.legend()
    return ax
