"""Runs a script of examples/ or results/ in this process, with its words on the command line.

A new process imports torch, which takes longer than most of what is tested here, and so does each worker of
`language_model.processes`: here their tasks run at once, as copies that went through pickle. test_examples.py starts
real ones.
"""

import contextlib
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("examples", "results")]

import language_model  # noqa: E402

UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Here:
    """Stands in for an executor."""

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        task, arguments = pickle.loads(pickle.dumps((task, arguments)))
        done: Future[Any] = Future()
        done.set_result(pickle.loads(pickle.dumps(task(*arguments))))
        return done


@contextlib.contextmanager
def _here(_jobs: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> Iterator[Here]:
    if initializer is not None:
        initializer(*arguments)
    yield Here()


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """What ``python <script>.py words`` returns and prints, warnings included; an error that it does not catch."""
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", [script, *map(str, words)]),
        mock.patch.object(language_model, "processes", _here),
        mock.patch.object(language_model, "_steps_done", None),
    ):
        warnings.simplefilter("default")
        for category in UNSEEN:
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda *about: print(warnings.formatwarning(*about[:4]), file=err)
        try:
            importlib.import_module(script).main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            if isinstance(stopped.code, str):
                print(stopped.code, file=err)
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), err.getvalue())
