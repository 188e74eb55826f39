"""Where pickles of version 0.1.0 find the methods."""

from cwd_wrap.methods import CautiousDecay, CautiousUpdate, PNormDecay

__all__ = ["CautiousDecay", "CautiousUpdate", "PNormDecay"]
