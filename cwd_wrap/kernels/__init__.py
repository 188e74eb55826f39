"""What each backend can do (`Backend`), and the choice of one for a device (`choose`)."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cwd_wrap import notices
from cwd_wrap.buckets import Bucket, Coming, Stepped, Sums, Whole

BACKENDS = ("eager", "numba", "triton")
_obstacles: dict[tuple[str, torch.device], str | None] = {}  # torch.compile cannot trace functools.cache
_said: set[str] = set()
_BROKEN = "Triton cannot"  # so begin the reasons that `_say_once` warns of


class Backend(Protocol):
    """The functions of a backend, which is a module. All buckets of a call are of one `buckets.kind`.

    ``w``: the weight; ``x``: the weight before the step; ``g``: the gradient; ``u``: the update. ``strict``: > for >=.
    """

    def watch(self, buckets: Sequence[Bucket]) -> Callable[[], bool] | None:
        """A function that returns whether the tensors have the types, sizes and layouts that they have now.

        None if a kernel cannot read all of them where they are (subclasses, other layouts than contiguous).
        """

    def decay_along(self, buckets: Sequence[Coming], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
        """w <- w - eta*lam * 1[(a*m + b*g)*w >= 0] * w in place, before the optimizer's step.

        `rules.aligned` and `rules.decay`, with its ``leak``. If ``count``, returns `rules.sums` in a tensor of shape
        (tensors, 5) on the tensors' device, without a host sync, with 0 for the last two (see `sums_of_step`); else
        None. Buckets with ``draws``: `rules.stochastic_rounding` of 16-bit weights.
        """

    def decay_from_snapshot(
        self, buckets: Sequence[Stepped], *, count: bool, strict: bool = False, leak: float = 0.0
    ) -> Sums:
        """w <- w - eta*lam * 1[the step took x towards zero] * x in place, after the step.

        `rules.moved_towards_zero` and `rules.decay`. The sums have all five numbers; the rest is as in `decay_along`.
        """

    def step_whole(
        self,
        buckets: Sequence[Whole],
        *,
        count: bool,
        strict: bool = False,
        method: str = "with_decay",
        factor: Tensor | None = None,
        own: float = 0.0,
    ) -> Sums:
        """w <- w - eta*u - eta*lam * 1[u*w >= 0] * w in place, and the new state of the update ``u``.

        One of `rules.UPDATES`, then one of `rules.METHODS`, by its name; or one of `rules.AVERAGING`, which takes the
        decay, and needs a number as learning rate. ``factor``: a number for each tensor, in the wide type; None is 1.
        ``own``: the method's own number.
        Everything is checked before anything is written, and the counters are set last. Buckets with ``draws``:
        `rules.stochastic_rounding` of all 16-bit tensors that are written, the weight by column 0 of `rules.uniform`,
        the state's tensors by columns 1, 2 and so on.
        """

    def sums_of_step(self, buckets: Sequence[Stepped]) -> Tensor:
        """The last two of `rules.sums` of each tensor, those of the step, after three zeros: shape (tensors, 5)."""

    def copy(self, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        """to <- source, tensor by tensor; all are of one device and type."""

    def count_nonzero(self, x: Sequence[Tensor]) -> Tensor:
        """How many elements of each tensor are not 0, as an int64 vector; all tensors are of one device and type."""

    def count_agreeing(self, buckets: Sequence[Stepped] | Sequence[Whole]) -> Tensor:
        """In how many places of each tensor the step went down the gradient (`rules.agrees`), as an int64 vector.

        Of a `Whole`: in how many the update is to go down it. Nothing is changed.
        """

    def vector(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """``numbers`` as an int64 tensor on ``device``, without a host sync. Callers must not write to it."""

    def cautious_update(self, buckets: Sequence[Stepped], alpha: Tensor) -> None:
        """w <- v - eta*lam*v with v = x + alpha * 1[u*g > 0] * (w - x) in place; ``alpha``: one number for each tensor.

        `rules.agrees` and `rules.cautious_update`.
        """

    def p_norm_decay(self, buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
        """w <- w / (1 + p*eta*lam * |x|**(p-2)) in place, but w in tensors whose entry of ``nonzero`` is 0.

        `rules.p_norm_decay`. ``nonzero``: how many elements of each whole tensor x are not 0.
        """


def check(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None (the library chooses) or the name of one."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        msg = f"unknown backend {backend!r}: pass one of {known}, or None to let the library choose"
        raise ValueError(msg)


def choose(backend: str | None, device: torch.device) -> Backend:
    """The module of ``backend``. If that is None, a compiled backend that can run on ``device``, else the eager one."""
    chosen = name(backend, device)
    if chosen == "triton":
        from cwd_wrap.kernels import _triton

        return _triton
    if chosen == "numba":
        try:
            from cwd_wrap.kernels import _numba
        except ImportError as error:  # installed but broken: `obstacle` does not import it, which is slow
            _obstacles["numba", device] = f"numba cannot be imported ({error})"
            if backend is None:
                notices.warn(
                    f"cwd_wrap uses torch operations on {device}: numba cannot be imported ({error}). "
                    'Reinstall numba, or pass backend="eager"'
                )
            return choose(backend, device)
        return _numba
    from cwd_wrap.kernels import _eager

    if backend is None:
        _say_once(device)
    return _eager


def name(backend: str | None, device: torch.device) -> str:
    """The name of what `choose` returns. Raises ValueError where ``backend`` cannot run on ``device``."""
    if backend is None:
        return next((name for name in ("triton", "numba") if obstacle(name, device) is None), "eager")
    check(backend)
    if (reason := obstacle(backend, device)) is not None:
        can = ", ".join(repr(name) for name in BACKENDS if obstacle(name, device) is None)
        msg = f"backend={backend!r} cannot run on {device}: {reason}. Backends that can run there: {can}"
        raise ValueError(msg)
    return backend


def obstacle(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``; None if it can."""
    if backend == "eager":
        return None
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return "compiled kernels read memory, and under FakeTensorMode no tensor has any"
    if (backend, device) not in _obstacles:
        _obstacles[backend, device] = _triton_obstacle(device) if backend == "triton" else _numba_obstacle(device)
    return _obstacles[backend, device]


def _say_once(device: torch.device) -> None:
    """Warn where Triton is installed for a device that it could run on, but does not work."""
    reason = obstacle("triton", device)
    if reason is not None and reason.startswith(_BROKEN) and reason not in _said:
        _said.add(reason)
        notices.warn(f'cwd_wrap uses torch operations on {device}: {reason}. Pass backend="eager" to silence this')


def _numba_obstacle(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "numba's kernels run on the CPU only"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install cwd-wrap[cpu])"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT switches numba's compiler off"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``; None if it can. Imports Triton only where it could run."""
    # The interpreter runs in this process: addresses in our tables must be those of the CPU's memory.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if device.type != ("cpu" if interpreted else "cuda"):
        return "Triton runs on CUDA and ROCm devices, or with TRITON_INTERPRET=1 on the CPU"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0 or higher"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install cwd-wrap[triton])"
    try:
        importlib.import_module("cwd_wrap.kernels._triton")
    except ImportError as error:
        return f"{_BROKEN} be imported ({error})"
    return None if interpreted else _launcher_obstacle()


def _launcher_obstacle() -> str | None:
    """Triton compiles the C code of its launcher when its driver is first used; slim images have no compiler for it."""
    try:
        importlib.import_module("triton").runtime.driver.active.utils  # noqa: B018 - the attribute is built on access
    except Exception as error:  # noqa: BLE001 - a failed build can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{_BROKEN} build its launcher, which needs a C compiler and Python's headers ({reason})"
    return None
