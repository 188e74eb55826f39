"""Cautious weight decay with the optimizer you already have (arXiv 2510.12402)."""

from cwd_wrap import optim as optim
from cwd_wrap.methods import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.monitor import MaskMonitor
from cwd_wrap.plot import plot_mask_ratio, plot_ratio_by_layer, plot_weight_norms

__all__ = [
    "CautiousDecay", "CautiousUpdate", "MaskMonitor", "PNormDecay", "plot_mask_ratio", "plot_ratio_by_layer",
    "plot_weight_norms",
]  # fmt: skip


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("cwd-wrap")
        except PackageNotFoundError:
            return "0+checkout"
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
