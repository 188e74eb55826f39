"""Real processes: one rank each, joined by gloo over a file, that end cleanly."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in ``ranks`` processes that form one group; raise if any of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (ranks, str(Path(folder) / "store"), function, arguments), nprocs=ranks)


def _run(rank: int, ranks: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    dist.barrier()
    # gloo's threads may still run when the interpreter takes the group apart, which aborts the process.
    os._exit(0)
