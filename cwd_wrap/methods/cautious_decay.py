"""`CautiousDecay`: cautious weight decay (arXiv 2510.12402)."""

from collections.abc import Sequence
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import notices, rules
from cwd_wrap.bases.weight_decay import StepSize
from cwd_wrap.kernels import Backend
from cwd_wrap.kernels.buckets import Bucket, Coming, Stepped, Sums, Whole
from cwd_wrap.methods.shared import FULLY_SHARD, check_known, step_between
from cwd_wrap.methods.wrapper import OptimizerWrapper
from cwd_wrap.step.choice import Method
from cwd_wrap.tensors import local_real_view, real_numel, totals

MASKS = ("update", "gradient", "random", "all")
ROUNDINGS = ("nearest", "stochastic")
_HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # least half unit in the last place, over the weight


class CautiousDecay(OptimizerWrapper):
    """Cautious weight decay around any torch optimizer (arXiv 2510.12402, Algorithm 1).

        x <- x - eta * (u + lam * 1[u*x >= 0] * x)

    ``u`` is the base's update, which is subtracted, and eta its step size, usually ``lr``. A weight decays only where
    the step moves it towards zero or leaves it in place. The decay is decoupled, whatever the base's own decay is. Mask
    and decay use the ``x`` before the step. A complex weight counts as two real ones.

    With a ``leak`` the other weights decay too, by that part of the decay: leak 0 is the paper's rule, and leak 1 plain
    decoupled decay of every weight.

        x <- x - eta * (u + lam * (leak + (1 - leak) * 1[u*x >= 0]) * x)

    Args:
        base_optimizer: an instance of torch.optim.Optimizer, over weights of any shape and any real or complex type.
            Its groups' ``weight_decay`` is lam, which eta multiplies: one step takes at most the share ``eta*lam`` off
            a weight. It may be scheduled.
        lam: None leaves each group its own ``weight_decay``. A number is written into every group whose
            ``weight_decay`` is not 0, or into all groups if all have 0. If the optimizer has no ``weight_decay``,
            the wrapper keeps the number.
        mask: which weights decay. ``"update"`` is the paper's mask. The others are its ablations, and need a copy of
            the weights. ``"gradient"``: where ``g*x >= 0`` for the gradient ``g``. ``"random"``: each weight with the
            same probability, the share of 1s in the paper's mask of its tensor. ``"all"``: all weights, which is plain
            decoupled decay.
        strict: decay only where ``u*x > 0``. Weights that the step leaves in place (rows of an embedding that were not
            looked up) then stay as they are.
        leak: a number from 0 to 1, the part of the decay that weights outside the mask take. It may be set later.
        step_size: a function of a param group that returns eta, for optimizers whose ``lr`` is not their step size. By
            default eta is the factor by which the optimizer multiplies its own decay.
        path: None takes the cheapest path that each param group can take (see `paths`). ``"one_pass"``: one kernel
            decays and makes the base's step. ``"direction"``: decay before the step, along the sign of the coming
            update. ``"pieces"``: the base steps its parameters piece by piece, and each piece is compared with a copy.
            ``"snapshot"``: the same with one copy of all decaying weights (`snapshot_bytes`). A path that the base
            cannot take raises ValueError with the reason.
        rounding: how bfloat16 and float16 weights are written. ``"stochastic"`` rounds up or down at random, so that
            decays too small for one step add up on average. On the path "one_pass" this covers the whole step,
            weights and state.
        seed: an int for the random numbers of ``mask="random"`` and ``rounding="stochastic"``. They are a function of
            the seed, the number of steps taken (the base's own ``step`` if its state has one), the parameter and the
            place in it. So they are the same on all ranks and in all layouts, and no generator is used.
        backend: None chooses one for each device: ``"triton"`` on CUDA and ROCm, ``"numba"`` on the CPU if it is
            installed, else ``"eager"``, which uses torch operations.

    Raises:
        TypeError: ``base_optimizer`` is not an optimizer, or is a class; lam, leak or a group's ``weight_decay`` is not
            a number; strict is not a bool; step_size is not callable; seed is not an int from 0 up to 2**63 - 1.
        ValueError: lam, a group's ``weight_decay`` or a step size is negative, NaN or infinite; leak is not from 0 to
            1; mask, rounding, path or backend is unknown; a wrapper inside the base decays already; the base cannot be
            wrapped (the text says why), or a group has ``differentiable=True``; its learning rate is unknown; it cannot
            take the path; the backend cannot run.

    Examples:
        >>> import torch
        >>> from cwd_wrap import CautiousDecay
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> opt = CautiousDecay(torch.optim.SGD([w], lr=0.1), lam=0.5)
        >>> w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> opt.step()  # the first and the last weight move towards zero: they decay by 0.1 * 0.5
        >>> w.data
        tensor([ 0.8500,  1.1000, -1.1000, -0.8500])
    """

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "mask", "strict", "_leak", "rounding", "_seed")
    _leak: float
    _warned: set[int]

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float | None = None,
        *,
        mask: str = "update",
        strict: bool = False,
        leak: float = 0.0,
        step_size: StepSize | None = None,
        path: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        _check_seed(seed)
        self.mask = mask
        self.strict = strict
        self.leak = leak
        self.rounding = rounding
        self._seed = seed
        super().__init__(base_optimizer, lam, step_size, path, backend)

    @property
    def leak(self) -> float:
        """The part of the decay that weights outside the mask take. It may be set between steps or in a step hook.

        It is an argument: no state dict holds it.
        """
        return self._leak

    @leak.setter
    def leak(self, value: float) -> None:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            msg = f"leak={value!r:.80}: pass a number from 0 (the paper's rule) to 1 (every weight decays)"
            raise ValueError(msg) if number else TypeError(msg)
        self._leak = float(value)

    @property
    def seed(self) -> int:
        """The seed of the random numbers. It may be set between steps; a CUDA graph keeps that of its capture."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        _check_seed(value)
        self._seed = self._stream.seed = value

    def _method(self) -> Method:
        check_known("mask", self.mask, MASKS)
        check_known("rounding", self.rounding, ROUNDINGS)
        _check_flag("strict", self.strict, (True, False))
        name = type(self).__name__
        if self.mask == "update":
            rounds = self.rounding == "stochastic"
            paths = (self._after, None, self._before, self._whole)
            return Method(name, *paths, draws=rounds, rounds=rounds, averages=True)
        why = f"mask={self.mask!r} is an ablation, which needs a copy of the weights"
        draws = self.mask == "random" or self.rounding == "stochastic"
        way_out = f"pass another mask than 'random', {FULLY_SHARD}" if self.mask == "random" else None
        reads = self.mask == "gradient"
        return Method(name, self._ablate, needs_copy=why, reads_gradient=reads, draws=draws, whole_tensors=way_out)

    def _before(self, backend: Backend, buckets: Sequence[Coming], count: bool) -> Sums:
        self._warn_if_lost(buckets)
        return backend.decay_along(buckets, strict=self.strict, leak=self.leak, count=count)

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Sums:
        self._warn_if_lost(buckets)
        return backend.decay_from_snapshot(buckets, strict=self.strict, leak=self.leak, count=count)

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Sums:
        self._warn_if_lost(buckets)
        return backend.step_whole(buckets, strict=self.strict, own=self.leak, count=count)

    def _warn_if_lost(self, buckets: Sequence[Bucket]) -> None:
        """Warn once for a group whose decay, or its leak, is below half a unit in the last place of every weight."""
        dtype = buckets[0].w[0].dtype
        if self.rounding == "stochastic" or dtype not in _HALF_ULP:
            return
        for bucket in buckets:
            eta_lam, of = bucket.eta_lam, bucket.of
            if of is None or isinstance(eta_lam, Tensor) or of.members.index in self._warned:
                continue
            what, size, so = "lr * weight_decay", eta_lam, "nothing decays"
            if size >= _HALF_ULP[dtype]:
                what, size, so = f"{what} * leak", size * self.leak, "only aligned weights decay"
            if 0 < size < _HALF_ULP[dtype]:
                self._warned.add(of.members.index)
                where, weights = notices.param_group(of.members.index, of.name), str(dtype).removeprefix("torch.")
                notices.warn(
                    f"{what} = {size:.2g} is too small for {weights} weights (needs {_HALF_ULP[dtype]:.2g}), so "
                    f'{so} in {where}. Pass rounding="stochastic", or keep float32 weights'
                )

    def _start(self) -> None:
        super()._start()
        self._warned = set()
        self.__dict__.setdefault("_leak", 0.0)  # of a wrapper that was pickled before there was one

    def _ablate(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Sums:
        del backend  # ablations use torch operations: they need not be fast
        self._warn_if_lost(buckets)
        sums: list[Tensor] = []
        for bucket in buckets:
            for i, (w, x) in enumerate(zip(bucket.w, bucket.x, strict=True)):
                words = None if bucket.draws is None else bucket.draws.words(i).view(w.shape)
                if self.mask == "gradient" and bucket.g is not None:
                    mask = rules.aligned(bucket.g[i], x, self.strict)
                elif self.mask == "random" and words is not None:
                    p, here = bucket.p[i], rules.moved_towards_zero(x, w, self.strict).sum()
                    mask = rules.uniform(words, 1) < totals([p], here[None])[0] / max(1, _numel(p, w))
                else:
                    mask = torch.ones_like(x, dtype=torch.bool)
                random = None
                if self.rounding == "stochastic" and w.element_size() == 2 and words is not None:
                    random = rules.uniform(words, 0)
                after = rules.decay(w, x, mask, bucket.eta_lam, self.leak, random)
                if count:
                    moved = rules.moved_towards_zero(x, w, strict=True)
                    sums.append(rules.sums(mask, moved, x, step_between([w], [x])[0], after, self.leak))
                w.copy_(after)
        return torch.stack(sums) if count else None


def _numel(parameter: Tensor, local: Tensor) -> int:
    """Elements of the whole parameter, or of the rows in its sparse gradient if ``local`` holds only those."""
    return local.numel() if local.shape != local_real_view(parameter).shape else real_numel(parameter)


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        msg = f"seed={seed!r}: pass an int from 0 up to 2**63 - 1"
        raise TypeError(msg)


def _check_flag(what: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is flag for flag in known):
        msg = f"{what}={value!r}: pass one of {', '.join(map(repr, known))}"
        raise TypeError(msg)
