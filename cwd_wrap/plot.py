"""Pictures of what a `MaskMonitor` collected. Needs matplotlib (``pip install cwd-wrap[plots]``), imported on call."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


def plot_mask_ratio(ratios: Sequence[float], *, ax: "Axes | None" = None, label: str | None = None) -> "Axes":
    """Draw the share of decayed weights over the looks into ``ax``, or into a new figure. Returns the axes.

    ``ratios``: `MaskMonitor.ratios`, as in ``plot_mask_ratio(monitor.ratios).figure.savefig("ratios.png")``.
    """
    ax = _axes(ax)
    ax.plot(range(1, len(ratios) + 1), ratios, label=label)
    ax.set(xlabel="recorded step", ylabel="share of weights decayed", ylim=(0, 1))
    if label is not None:
        ax.legend()
    return ax


def plot_ratio_by_layer(rows: Rows, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a bar for each parameter: its mean share of decayed weights over the looks.

    ``rows``: those of a ``MaskMonitor(per_parameter=True)``, as in ``plot_ratio_by_layer(monitor.rows())``. Draws into
    ``ax``, or into a new figure; returns the axes.
    """
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["weights"]:
            shares.setdefault(row["name"], []).append(row["share_decayed"])
    ax = _axes(ax)
    ax.barh(list(shares), [sum(of_one) / len(of_one) for of_one in shares.values()])
    ax.invert_yaxis()  # the first layer on top
    ax.set(xlabel="share of weights decayed", xlim=(0, 1))
    return ax


def plot_weight_norms(runs: Mapping[str, Rows], *, ax: "Axes | None" = None) -> "Axes":
    """Draw a line for each run: the Euclidean norm of its decaying weights over the steps.

    ``runs``: the rows of a monitor for each label, as in ``{"plain": one.rows(), "cautious": other.rows()}``. For the
    plain run use ``CautiousDecay(mask="all")`` around the same optimizer. Draws into ``ax``, or into a new figure;
    returns the axes.
    """
    ax = _axes(ax)
    for label, rows in runs.items():
        squares: dict[int, float] = {}
        for row in rows:
            squares[row["step"]] = squares.get(row["step"], 0.0) + row["weight_norm"] ** 2
        ax.plot(list(squares), [square**0.5 for square in squares.values()], label=label)
    ax.set(xlabel="step", ylabel="norm of the decaying weights")
    ax.legend()
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    import matplotlib.pyplot as plt

    return plt.subplots()[1] if ax is None else ax
