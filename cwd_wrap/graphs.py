"""CUDA graphs: is one being captured?

A graph's memory must stay in place as long as the graph is replayed, and a graph gives no signal when it is freed. So
tensors made during a capture belong to the graph and are not reused in later steps. Tensors from before the capture
that a graph reads are never released.
"""

import torch


def capturing() -> bool:
    """Are launches recorded now instead of run?"""
    # Before CUDA is initialised, this question would initialise it, or raise without a card.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
