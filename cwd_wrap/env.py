"""Describes this machine for a bug report: `python -m cwd_wrap env`."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from cwd_wrap import kernels
from cwd_wrap.bases import directions, known, pieces, quirks, updates
from cwd_wrap.kernels import _threads

PACKAGES = ("cwd-wrap", "torch", "numpy", "numba", "triton", "transformers", "accelerate", "lightning")
# The module of each optimizer library, and the name under which it is installed.
LIBRARIES = {
    "torch.optim": "torch",
    "timm.optim": "timm",
    "torch_optimizer": "torch-optimizer",
    "pytorch_optimizer": "pytorch-optimizer",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "dadaptation": "dadaptation",
    "schedulefree": "schedulefree",
    "optimi": "torch-optimi",
    "rose_opt": "rose-opt",
    "heavyball": "heavyball",
    "flashoptim": "flashoptim",
}
PATHS = ("one_pass", "direction", "pieces", "snapshot", "refused")


def report(*, optimizers: bool = False) -> str:
    """Versions, devices, backends and paths as plain text; with ``optimizers``, also the path of each class.

    Examples:
        >>> from cwd_wrap import env
        >>> env.report().startswith("python 3.")
        True
    """
    return "\n".join([*_versions(), "", *_devices(), "", *_paths(optimizers=optimizers)])


def path_of(cls: type[Optimizer]) -> str:
    """The first path that the tables allow ``cls`` to take, or "refused"."""
    name = known.name(cls)
    if quirks.refusal_of(cls) is not None and name not in updates.TABLE:
        return "refused"
    tables = zip(PATHS, (updates.TABLE, directions.TABLE, pieces.TABLE), strict=False)
    return next((path for path, table in tables if name in table), "snapshot")


def classes(module: str) -> list[type[Optimizer]]:
    """The optimizer classes that ``module`` offers, without those that another library imports from torch.

    What the import of ``module`` prints or warns is dropped.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        offered = vars(importlib.import_module(module)).values()
    found = {value for value in offered if isinstance(value, type) and issubclass(value, Optimizer)} - {Optimizer}
    own = (cls for cls in found if module == "torch.optim" or not cls.__module__.startswith("torch."))
    return sorted(own, key=lambda cls: cls.__qualname__)


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    versions = {name: _version(name) for name in (*PACKAGES, *LIBRARIES.values())}
    yield from (f"{name} {version}" for name, version in versions.items() if version)
    if missing := [name for name, version in versions.items() if version is None]:
        yield f"not installed: {', '.join(missing)}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    """Each device with the backends that can run on it, and why the others cannot."""
    for device, description in _found():
        yield f"{device}: {description}"
        for backend in kernels.BACKENDS:
            reason = _obstacle(backend, device)
            chosen = " (chosen)" if backend == kernels.name(None, device) else ""
            yield f"  {backend}: " + (f"can run{chosen}" if reason is None else f"cannot run: {reason}")
        if _obstacle("numba", device) is None:
            yield f"  numba's threads: {_threads.described()}"


def _found() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        yield torch.device("cuda", index), f"{found.name}, {found.total_memory >> 30} GiB, {capability}, {toolkit}"
    if torch.backends.mps.is_available():
        yield torch.device("mps"), "Apple GPU"


def _obstacle(backend: str, device: torch.device) -> str | None:
    """`kernels.obstacle`, after the attempt to load the backend."""
    with contextlib.suppress(ValueError):
        kernels.choose(backend, device)
    return kernels.obstacle(backend, device)


def _paths(*, optimizers: bool) -> Iterator[str]:
    """How many optimizers of each installed library take each path."""
    yield "the first path that each class can take. Its options and the device can rule it out: opt.paths() shows it."
    yield "one_pass needs a compiled backend, and an optimizer built without foreach=... and fused=False."
    for module in LIBRARIES:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            continue
        try:
            found = {cls: path_of(cls) for cls in classes(module)}
        except Exception as error:  # a library with a broken import belongs in the report
            yield f"{module}: cannot be imported ({type(error).__name__}: {error})"
            continue
        counts = Counter(found.values())
        yield f"{module}: " + ", ".join(f"{path} {counts[path]}" for path in PATHS if counts[path])
        if optimizers:
            for cls, path in found.items():
                reason = quirks.refusal_of(cls) if path == "refused" else None
                yield f"  {cls.__qualname__}: {path}" + (f" ({reason})" if reason else "")
