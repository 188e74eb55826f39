"""Chooses who carries the rules out."""

import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("eager", "triton")
_obstacles: dict[torch.device, str | None] = {}  # what `_obstacle` said; torch.compile sees through no functools.cache


def check(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None (the library chooses) or the name of one."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        msg = f"unknown backend {backend!r}: pass one of {known}, or None to let the library choose"
        raise ValueError(msg)


def choose(backend: str | None, device: torch.device) -> ModuleType:
    """The module that carries the rules out on ``device``: Triton's where it can run, unless ``backend`` names one."""
    return importlib.import_module(f"cwd_wrap.kernels._{name(backend, device)}")


def name(backend: str | None, device: torch.device) -> str:
    """The name of what `choose` returns. Raises ValueError where ``backend`` cannot run on ``device``."""
    if backend == "eager":
        return backend
    if device not in _obstacles:
        _obstacles[device] = _obstacle(device)
    obstacle = _obstacles[device]
    if obstacle is None:
        return "triton"
    if backend is None:
        return "eager"
    msg = f"backend={backend!r} cannot run on {device}: {obstacle}. What can run there: 'eager'"
    raise ValueError(msg)


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``; None if it can. Imports Triton only where it could."""
    # The interpreter follows the addresses in our tables, and in this process they lead to the CPU's memory only.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if device.type != ("cpu" if interpreted else "cuda"):
        return "Triton runs on CUDA and ROCm devices, or with TRITON_INTERPRET=1 on the CPU"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0"
    try:
        importlib.import_module("cwd_wrap.kernels._triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
