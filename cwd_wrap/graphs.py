"""Says whether a CUDA graph is being captured, and what follows for memory.

A graph's memory must stay in place as long as the graph is replayed, and a graph gives no signal when it is freed. So
tensors made during a capture belong to the graph and are not reused in later steps. Tensors from before the capture
that a graph reads are never released.
"""

import torch


def capturing() -> bool:
    """True while launches on the current stream are recorded instead of run."""
    # Before CUDA is initialised, torch's function would initialise it, or raise without a card.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
