"""Runs a compiled function on several threads: those of the OpenMP runtime that torch has loaded, where it can.

After each of its operations torch's OpenMP workers wait for the next one in a loop. Threads of our own would compete
with them for the cores, so the function is started on these workers. It is called once on each thread, with a `Control`
by which the threads share the work out.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

TAKEN, DONE, CHUNKS = range(3)
"""Places of a control: how many chunks of the work have been taken, how many are done, and how many there are."""
Control = ctypes.c_int64 * 19
"""What the function is given: these three numbers, and then its own."""

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # a call releases the interpreter lock
_RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[^/]*$")
_forked = False


def run(function: int, control: "ctypes.Array[ctypes.c_int64]", threads: int) -> None:
    """Call the C function at the address ``function`` with ``control`` on each of ``threads`` threads.

    The work is done when this returns or raises: no interrupt leaves a thread at work behind.
    """
    control[TAKEN] = control[DONE] = 0
    if threads == 1:
        _function(function)(ctypes.addressof(control))
    elif _obstacle() is None and (parallel := _entry()) is not None:
        parallel(function, ctypes.addressof(control), threads, 0)
    else:
        _on_python_threads(function, control, threads)


@cache
def _function(address: int) -> Callable[[int], None]:
    return _FUNCTION(address)


def described() -> str:
    """Which threads `run` uses, for bug reports."""
    if (reason := _obstacle()) is None:
        return f"torch's own OpenMP threads ({Path(_runtimes()[0]).name})"
    return f"Python threads: {reason}"


def _obstacle() -> str | None:
    """Why torch's own threads cannot be used; None if they can."""
    if _forked:
        return "this process was forked, and OpenMP's threads do not survive a fork"
    if not _runtimes():
        return "torch has loaded no OpenMP runtime that is known here"
    if len(_runtimes()) > 1:
        return f"several OpenMP runtimes are loaded ({', '.join(Path(path).name for path in _runtimes())})"
    return None if _entry() is not None else f"{Path(_runtimes()[0]).name} has no GOMP_parallel"


@cache
def _runtimes() -> list[str]:
    """The OpenMP runtimes that are loaded; only those of torch's own folder, if there are any."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # macOS, Windows
        return []
    loaded = sorted({line[line.index("/") :] for line in lines if _RUNTIME.search(line)})
    own = [path for path in loaded if Path(torch.__file__).parent in Path(path).parents]
    return own or loaded


@cache
def _entry() -> Callable[[int, int, int, int], None] | None:
    entry = getattr(ctypes.CDLL(_runtimes()[0]), "GOMP_parallel", None)
    if entry is not None:
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        entry.restype = None
    return entry


def _on_python_threads(function: int, control: "ctypes.Array[ctypes.c_int64]", threads: int) -> None:
    own = Control.from_buffer_copy(control)  # a thread that begins late finds all chunks of its own control taken

    def work() -> None:
        _function(function)(ctypes.addressof(own))

    raised: BaseException | None = None
    try:
        for _ in range(threads - 1):
            threading.Thread(target=work, name="cwd_wrap", daemon=True).start()
    except RuntimeError:  # while Python exits no thread can be started: this one does all the work
        pass
    except BaseException as error:  # noqa: BLE001 - an interrupt waits for the end of the work
        raised = error
    while own[DONE] < own[CHUNKS]:
        try:
            work()
            time.sleep(0)
        except BaseException as error:  # noqa: BLE001
            raised = error
    if raised is not None:
        raise raised


def _note_fork() -> None:
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_note_fork)
