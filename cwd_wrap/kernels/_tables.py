"""Tables of numbers on a device: sent there once, and kept for later launches that read the same numbers."""

import os
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TypeAlias

import torch
from torch import Tensor

from cwd_wrap.graphs import capturing

# Always keep this many tables per device.
SEVERAL = 64
# Keep more while their total is below this, for programs with thousands of one-parameter optimizers.
BYTES = 16 << 20
ALLOCATED = 512  # bytes that torch gives to the smallest tensor on a device
SPARES = 4  # pieces of pinned memory of one size that are kept for a capture

_Build: TypeAlias = Callable[..., Tensor]
_Key: TypeAlias = tuple[object, _Build, tuple[bytes, ...]]

_in_graphs: dict[int, Tensor] = {}
"""What CUDA graphs read at each replay: older tables, and pinned memory. Never released, see `graphs`."""


class _Tables:
    """The tables of one device, in the order of their last use."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._spares: list[Tensor] = []
        self._lock = Lock()

    def find(self, key: _Key) -> Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: _Key, table: Tensor) -> None:
        with self._lock:
            if key not in self._kept:
                self._bytes += _allocated(table)
            self._kept[key] = table
            while len(self._kept) > SEVERAL and self._bytes > BYTES:
                self._bytes -= _allocated(self._kept.popitem(last=False)[1])

    def of_any_stream(self, build: _Build, parts: tuple[bytes, ...]) -> Tensor | None:
        with self._lock:
            return next((table for key, table in self._kept.items() if key[1:] == (build, parts)), None)

    def spare(self, like: Tensor) -> None:
        """Keep pinned memory for a capture, during which older versions of torch cannot allocate any."""
        with self._lock:
            alike = [spare for spare in self._spares if spare.nbytes == like.nbytes]
            if len(alike) < SPARES and len(self._spares) < SEVERAL:
                self._spares.append(torch.empty(like.nbytes, dtype=torch.uint8).pin_memory())

    def take_spare(self, like: Tensor) -> Tensor:
        """Pinned memory with the numbers of ``like``."""
        with self._lock:
            i = next((i for i, spare in enumerate(self._spares) if spare.nbytes == like.nbytes), None)
            spare = None if i is None else self._spares.pop(i)
        if spare is not None:
            return spare.view(like.dtype).view(like.shape).copy_(like)
        try:
            return like.pin_memory()
        except RuntimeError as error:
            msg = (
                f"a step in a CUDA graph capture needs a table of {like.nbytes} bytes that no step before it has made, "
                "and this version of torch cannot allocate pinned memory during a capture: take two or three steps of "
                "the same optimizer on a side stream before the capture"
            )
            raise RuntimeError(msg) from error


_of_device: dict[torch.device, _Tables] = {}
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_of_device.clear)  # a child has none of its parent's threads, which hold locks


def table(build: _Build, device: torch.device, *parts: bytes) -> Tensor:
    """``build(*parts)`` on ``device``, the current one; sent there only if the parts differ from those of recent calls.

    Callers must not write to it. A CUDA graph reads a table that was sent before the capture (which waits until it has
    arrived) if there is one; otherwise each replay sends it.
    """
    tables = _of_device.setdefault(device, _Tables())
    if capturing():
        found = tables.of_any_stream(build, parts)
        if found is not None:
            _in_graphs[id(found)] = found
            return found
        source = tables.take_spare(build(*parts))
        _in_graphs[id(source)] = source
        return source.to(device, non_blocking=True)  # recorded, not run, so the result is not kept for other calls
    # One table for each stream: another stream could read it before it has arrived.
    stream = None if device.type == "cpu" else getattr(torch, device.type).current_stream(device)
    key = (stream, build, parts)
    found = tables.find(key)
    if found is None:
        found = build(*parts)
        if device.type != "cpu":
            tables.spare(found)
            found = found.pin_memory().to(device, non_blocking=True)
        tables.keep(key, found)
    return found


def plain(*parts: bytes) -> Tensor:
    """The parts one after the other, as bytes."""
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _allocated(table: Tensor) -> int:
    return -(-table.nbytes // ALLOCATED) * ALLOCATED
