"""The methods: what a user wraps an optimizer in."""

from cwd_wrap.methods.cautious_decay import CautiousDecay
from cwd_wrap.methods.cautious_update import CautiousUpdate
from cwd_wrap.methods.p_norm_decay import PNormDecay

__all__ = ["CautiousDecay", "CautiousUpdate", "PNormDecay"]
