"""CUDA graphs: is one being captured?

What a graph reads and writes must stay in its place while the graph is replayed, and a graph gives no signal when it is
freed. So what is made during a capture is the graph's own, and is not kept for later steps. What was there before and a
graph reads is never released.
"""

import torch


def capturing() -> bool:
    """Is what is launched now recorded, and not run?"""
    # Asked before CUDA is initialised, torch would initialise it, or raise where there is no card.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
