"""Starts real processes, one rank each, that gloo joins over a file. They stay for the next test and end cleanly."""

import atexit
import importlib
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from processes import LIMIT, ROOT, call, context, finished, started

_kept: dict[int, "Ranks"] = {}


def spawn(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(rank, *arguments)`` in ``ranks`` processes that form one group; return what each returned.

    Raises if any of them fails. The processes are kept, because starting them takes far longer than most functions.
    """
    if ranks not in _kept:
        _kept[ranks] = Ranks(ranks)
    try:
        return _kept[ranks].run(function, *arguments)
    except BaseException:
        _kept.pop(ranks).kill()
        raise


class Ranks:
    """Processes that form one group over their own file and run one function after another."""

    def __init__(self, ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(ranks):
            here, there = context().Pipe()
            process = context().Process(target=_serve, args=(rank, ranks, store, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run ``function(rank, *arguments)`` everywhere; return what each rank returned."""
        self.start(function, *arguments)
        return self.results()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin to run ``function(rank, *arguments)`` everywhere."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def results(self) -> list[Any]:
        """What each rank returned."""
        answers: dict[int, Any] = {}
        end = time.monotonic() + LIMIT
        while len(answers) < len(self._pipes):
            left = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(left, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(set(range(len(self._pipes))) - set(answers))} did not answer")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    done, answer = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    done, answer = False, f"the process ended with {self.processes[rank].exitcode}"
                if not done:
                    raise AssertionError(f"rank {rank} of {len(self._pipes)}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(len(self._pipes))]

    def end(self) -> None:
        """Let the processes end, together."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        """Kill the processes that are left, as if the machine failed."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def launch(*words: object, imports: Sequence[str] = ()) -> list[subprocess.CompletedProcess[str]]:
    """What ``python *words`` returns and prints in two new processes, with the environment that torchrun gives.

    torchrun itself is a third process, and each imports torch anew. These share what ``imports`` names, too.
    """
    done: list[subprocess.CompletedProcess[str]] = call(_launch, words, imports)
    return done


def _launch(words: tuple[object, ...], imports: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    for module in imports:
        importlib.import_module(module)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    of_ranks = []
    for rank in range(2):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        numbers |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {name: str(number) for name, number in numbers.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}
        of_ranks.append(started(context, words, ROOT, environment))
    return finished(of_ranks)


@atexit.register
def _end_all() -> None:
    for ranks in _kept.values():
        ranks.end()
    _kept.clear()


def _serve(rank: int, ranks: int, store: str, pipe: Connection) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.barrier()
    # gloo's threads may still run when the interpreter takes the group apart, which aborts the process.
    os._exit(0)
