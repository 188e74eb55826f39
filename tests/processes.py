"""New processes, forked from one that has imported torch, which takes seconds. It has not stepped an optimizer.

Where there is no fork, each process imports everything itself.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LIMIT = 300.0  # seconds that a function or a command may take

PRELOADED = [
    "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.device_mesh",
    "torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.tensor.parallel", "numba", "pytest",
    "timm.optim", "cwd_wrap",
]  # fmt: skip
"""What takes long to import. What cannot be imported is left out."""


@functools.cache
def context() -> Any:
    """The multiprocessing context whose processes are forked from the one that has imported `PRELOADED`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns in a new process. Raises if it raises there, or the process ends."""
    here, there = context().Pipe()
    process = context().Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(LIMIT):
            raise TimeoutError(f"{function} takes longer than {LIMIT} s")
        try:
            done, answer = here.recv()
        except EOFError:
            process.join()
            done, answer = False, f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if not done:
        raise AssertionError(answer)
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def python(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What ``python *words`` in the folder ``cwd`` returns and prints. The words: a script, or -m and a module."""
    return finished([started(context(), words, cwd, {})])[0]


Started = tuple[Any, tempfile.TemporaryDirectory[str]]
"""A process, and the folder of what it prints."""


def started(of: Any, words: Sequence[object], cwd: Path, environment: dict[str, str]) -> Started:
    """Start ``python *words`` in a process ``of`` a context."""
    folder = tempfile.TemporaryDirectory()
    process = of.Process(target=_run, args=([str(word) for word in words], cwd, environment, folder.name))
    process.start()
    return process, folder


def finished(processes: Sequence[Started]) -> list[subprocess.CompletedProcess[str]]:
    """What the processes returned and printed. One that takes too long is killed."""
    done = []
    for process, folder in processes:
        process.join(LIMIT)
        process.kill()
        process.join()
        with folder:
            printed = [Path(folder.name, name).read_text() for name in ("1", "2")]
        done.append(subprocess.CompletedProcess([], process.exitcode, *printed))
    return done


def _run(words: list[str], cwd: Path, environment: dict[str, str], folder: str) -> None:
    for stream in (1, 2):
        with Path(folder, str(stream)).open("w") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    os.environ |= environment
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch is imported already
    try:
        if words[0] == "-m":
            sys.argv, sys.path[:0] = words[1:], [str(cwd)]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
            main = ModuleType("__main__")
            main.__file__ = words[0]
            sys.modules |= {"__main__": main, "__mp_main__": main}  # the second for what its own processes send back
            exec(compile(Path(words[0]).read_text(), words[0], "exec"), vars(main))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
