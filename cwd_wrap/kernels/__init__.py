"""Chooses who carries the rules out."""

from types import ModuleType

from cwd_wrap.kernels import _eager

_BACKENDS = {"eager": _eager}


def check(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None (the library chooses) or the name of one."""
    if backend is not None and backend not in _BACKENDS:
        known = ", ".join(repr(name) for name in _BACKENDS)
        msg = f"unknown backend {backend!r}: pass one of {known}, or None to let the library choose"
        raise ValueError(msg)


def choose(backend: str | None) -> ModuleType:
    """The module that carries the rules out."""
    return _BACKENDS[name(backend)]


def name(backend: str | None) -> str:
    """The name of what `choose` returns."""
    return "eager" if backend is None else backend
