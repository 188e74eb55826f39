"""The methods `CautiousDecay`, `CautiousUpdate` and `PNormDecay`: each checks its arguments and makes its `Rule`."""

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import notices, rules
from cwd_wrap.buckets import Bucket, Coming, Stepped, Sums, Whole
from cwd_wrap.choice import Rule
from cwd_wrap.kernels import Backend
from cwd_wrap.tensors import has_numbers, local_real_view, totals
from cwd_wrap.weight_decay import StepSize
from cwd_wrap.wrapper import OptimizerWrapper

MASKS = ("update", "gradient", "random", "all")
ROUNDINGS = ("nearest", "stochastic")
SCALES = ("mean", "numel", None)
_FULLY_SHARD = "or shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the shapes"
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
            1; mask, rounding, path or
            backend is unknown; a wrapper inside the base decays already; the base cannot be wrapped (the text says
            why), or a group has ``differentiable=True``; its learning rate is unknown; it cannot take the path; the
            backend cannot run.

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
    _leak = 0.0
    """That of wrappers that were pickled before there was one."""
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
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            number = isinstance(value, Real) and not isinstance(value, bool)
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

    def _rule(self) -> Rule:
        _check_known("mask", self.mask, MASKS)
        _check_known("rounding", self.rounding, ROUNDINGS)
        _check_flag("strict", self.strict, (True, False))
        name = type(self).__name__
        if self.mask == "update":
            rounds = self.rounding == "stochastic"
            paths = (self._after, None, self._before, self._whole)
            return Rule(name, *paths, draws=rounds, rounds=rounds, averages=True)
        why = f"mask={self.mask!r} is an ablation, which needs a copy of the weights"
        draws = self.mask == "random" or self.rounding == "stochastic"
        way_out = f"pass another mask than 'random', {_FULLY_SHARD}" if self.mask == "random" else None
        reads = self.mask == "gradient"
        return Rule(name, self._ablate, needs_copy=why, reads_gradient=reads, draws=draws, whole_tensors=way_out)

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
            lost = {"lr * weight_decay": (eta_lam, "nothing decays"),
                    "lr * weight_decay * leak": (eta_lam * self.leak, "only aligned weights decay")}  # fmt: skip
            for what, (size, so) in lost.items():
                if 0 < size < _HALF_ULP[dtype]:
                    self._warned.add(of.members.index)
                    where, weights = notices.param_group(of.members.index, of.name), str(dtype).removeprefix("torch.")
                    notices.warn(
                        f"{what} = {size:.2g} is too small for {weights} weights (needs {_HALF_ULP[dtype]:.2g}), so "
                        f'{so} in {where}. Pass rounding="stochastic", or keep float32 weights'
                    )
                    break

    def _start(self) -> None:
        super()._start()
        self._warned = set()

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
                    sums.append(rules.sums(mask, moved, x, _step([w], [x])[0], after, self.leak))
                w.copy_(after)
        return torch.stack(sums) if count else None


class CautiousUpdate(OptimizerWrapper):
    """A cautious optimizer around any torch optimizer (arXiv 2411.16085): C-AdamW, C-Lion, C-anything.

        x <- x - eta * alpha * 1[u*g > 0] * u            then, if the group decays:  x <- x - eta*lam*x

    The base's update ``u`` is kept only where it goes down the current gradient ``g``. The part that is kept is scaled
    up by ``alpha``, one number for each parameter. The base's state is not masked. The base's own decay is switched off
    and applied decoupled, after the masked update. Where the update always has the gradient's sign (SGD without
    momentum, Adagrad, RMSprop) all of it is kept, and only zeros in the gradient, which count as masked, make alpha
    differ from 1. On the path "one_pass" the mask takes the sign of the update itself; on the others that of the
    rounded step, so an update too small to change a weight is masked there.

    Args:
        base_optimizer: an instance of torch.optim.Optimizer; its groups' ``weight_decay`` is lam.
        scale: alpha. ``"mean"``: 1 / max(mean(mask), 1e-3), as in the authors' code and timm. ``"numel"``:
            numel / (kept + 1), as in the paper. None: 1. The mask of a sharded parameter (DTensor) is counted over all
            ranks, with one all-reduce for parameters of the same mesh and sharding. Flat pieces, as FSDP1 and DeepSpeed
            make them, are refused unless scale is None.
        path: as for `CautiousDecay`, without ``"direction"``: the sign of the update is not enough.
        backend: as for `CautiousDecay`, with two launches: one counts the mask (not if scale is None).

    Raises:
        TypeError: ``base_optimizer`` is not an optimizer, or is a class.
        ValueError: scale, path or backend is unknown; a wrapper inside the base masks its updates already, or decays
            (put that one around this one instead); the base computes several gradients in a step (LBFGS, SAM); what
            `CautiousDecay` raises for the base and its groups. At a step: a gradient is sparse.

    Examples:
        >>> import torch
        >>> from cwd_wrap import CautiousUpdate
        >>> w = torch.nn.Parameter(torch.zeros(4))
        >>> opt = CautiousUpdate(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        >>> for gradient in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -0.5])):
        ...     w.grad = gradient
        ...     opt.step()
        >>> w.data  # the last weight's update goes up its gradient, so it is masked; the others are scaled by 4/3
        tensor([-0.3533, -0.3533, -0.3533, -0.1000])
    """

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "scale")
    _way_out = ""
    _what = "mask"

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        scale: str | None = "mean",
        path: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.scale = scale
        super().__init__(base_optimizer, None, None, path, backend)

    def _clash(self, inner: OptimizerWrapper) -> str | None:
        if isinstance(inner, CautiousUpdate):
            return super()._clash(inner)
        outer = f"{type(inner).__name__}({type(self).__name__}(optimizer))"
        return f"its decay would be masked with the update. Wrap in the other order: {outer}"

    def _rule(self) -> Rule:
        _check_known("scale", self.scale, SCALES)
        why = f"{type(self).__name__} needs a copy of the weights to know the size of the update"
        way_out = None if self.scale is None else f"pass scale=None in place of {self.scale!r}, {_FULLY_SHARD}"
        return Rule(
            type(self).__name__,
            after=self._after,
            whole=self._whole,
            needs_copy=why,
            reads_gradient=True,
            every_group=True,
            whole_tensors=way_out,
        )

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Sums:
        here = backend.count_agreeing(buckets)
        step = [step for bucket in buckets for step in _step(bucket.w, bucket.x)] if count else []
        backend.cautious_update(buckets, self._alpha(backend, buckets, here))
        return _sums_of(here, step, [w for bucket in buckets for w in bucket.w]) if count else None

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Sums:
        here = None if self.scale is None else backend.count_agreeing(buckets)
        alpha = None if here is None else self._alpha(backend, buckets, here)
        return _of_step(backend.step_whole(buckets, method="with_caution", factor=alpha, count=count))

    def _alpha(self, backend: Backend, buckets: Sequence[Stepped | Whole], here: Tensor) -> Tensor:
        """The factor of each tensor, ``here`` of whose updates are kept on this rank."""
        p = [each for bucket in buckets for each in bucket.p]
        kept = totals(p, here).to(_wide(buckets))
        numel = backend.vector([each.numel() * (2 if each.is_complex() else 1) for each in p], here.device)
        return rules.alpha(kept, numel, self.scale)


class PNormDecay(OptimizerWrapper):
    """Decoupled p-norm weight decay around any torch optimizer (pWD, arXiv 2404.10824).

        w <- w * X / (X + p*eta*lam),    X = |x|**(2-p),    x the weight before the step, w after it

    For p below 2 the smaller a weight is, the larger is the share that one step takes off it: many weights become
    (almost) 0. p = 2 is L2 decay in implicit form; p = 1 takes about ``eta*lam`` off a weight's size. For p below 2 a
    weight that is exactly 0 stays 0, as in the authors' code. The exception is a tensor that is 0 as a whole (a
    zero-initialised layer), which must be able to train. The nonzero weights of a sharded parameter (DTensor) are
    counted over all ranks, with one all-reduce for parameters of the same mesh and sharding; flat pieces, as FSDP1 and
    DeepSpeed make them, are refused.

    Args:
        base_optimizer: an instance of torch.optim.Optimizer; its groups' ``weight_decay`` is lam.
        lam: as for `CautiousDecay`. It is the lam of the authors' code; the lam in a summary of the paper is ``p*lam``.
        p: the power, a number above 0, up to 2.
        step_size: as for `CautiousDecay`.
        path: as for `CautiousDecay`, without ``"direction"``: the decay depends on the weights before the step.
        backend: as for `CautiousDecay`, with two launches: one looks for tensors that are 0 as a whole.

    Raises:
        TypeError: ``base_optimizer`` is not an optimizer, or is a class; lam or p is not a number.
        ValueError: p is not above 0 and at most 2; what `CautiousDecay` raises.

    Examples:
        >>> import torch
        >>> from cwd_wrap import PNormDecay
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
        >>> opt = PNormDecay(torch.optim.SGD([w], lr=0.1), lam=0.1, p=1.0)
        >>> w.grad = torch.zeros(2)
        >>> opt.step()  # the large weight loses about 0.1 * 0.1, the small one half of itself
        >>> w.data
        tensor([0.9901, 0.0050])
    """

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "_p")
    _p: float

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float | None = None,
        *,
        p: float = 0.8,
        step_size: StepSize | None = None,
        path: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.p = p
        super().__init__(base_optimizer, lam, step_size, path, backend)

    @property
    def p(self) -> float:
        """The power. It may be set between steps or in a step hook. It is an argument: no state dict holds it."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 < value <= 2:
            msg = f"p of {type(self).__name__} is {value!r}: pass a number above 0, up to 2"
            raise ValueError(msg) if isinstance(value, Real) else TypeError(msg)
        self._p = value

    @torch.no_grad()
    def sparsity(self, threshold: float = 1e-13) -> list[float]:
        """For each param group, the share of weights with ``abs(w) < threshold``; NaN for an empty group.

        Sharded parameters (DTensor) are counted over all ranks, so all ranks that share one must call this together. It
        makes one all-reduce for parameters of the same mesh and sharding.
        """
        small: dict[int, int] = {}
        of_device: dict[torch.device, list[Tensor]] = {}
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            of_device.setdefault(p.device, []).append(p)
        for p in of_device.values():
            here = torch.stack([(local_real_view(each).abs() < threshold).sum() for each in p])
            small |= zip(map(id, p), totals(p, here).tolist(), strict=True)
        shares = []
        for group in self.param_groups:
            count = sum(p.numel() * (2 if p.is_complex() else 1) for p in group["params"])
            shares.append(sum(small[id(p)] for p in group["params"]) / count if count else float("nan"))
        return shares

    def _rule(self) -> Rule:
        why = f"{type(self).__name__} needs a copy of the weights: its decay depends on those from before the step"
        way_out = f"use CautiousDecay, {_FULLY_SHARD}"
        return Rule(type(self).__name__, self._after, needs_copy=why, whole=self._whole, whole_tensors=way_out)

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Sums:
        p, w, x = (
            list(chain.from_iterable(column)) for column in zip(*((b.p, b.w, b.x) for b in buckets), strict=True)
        )
        nonzero = backend.count_nonzero(x)
        whole = [local_real_view(each) for each in p]
        if any(some.numel() != every.numel() for some, every in zip(w, whole, strict=True)):
            # ``w`` holds only the rows of a sparse gradient; count the other rows too.
            nonzero = nonzero + backend.count_nonzero(whole) - backend.count_nonzero(w)
        step = _step(w, x) if count else []
        backend.p_norm_decay(buckets, self.p, totals(p, nonzero))
        return _sums_of(backend.vector(list(map(Tensor.numel, w)), w[0].device), step, w) if count else None

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Sums:
        p, w = (list(chain.from_iterable(column)) for column in zip(*((b.p, b.w) for b in buckets), strict=True))
        factor = (totals(p, _nonzero(backend, w)) != 0).to(_wide(buckets)) * self.p
        sums = backend.step_whole(buckets, method="with_p_norm", factor=factor, own=self.p - 2, count=count)
        sums = _of_step(sums)
        if sums is not None:
            sums[:, 0] = backend.vector(list(map(Tensor.numel, w)), sums.device)
        return sums


def _step(w: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """eta*u of the step from ``x`` to ``w``, in float32 or wider."""
    wide = torch.promote_types(w[0].dtype, torch.float32)
    return [before.to(wide) - after.to(wide) for after, before in zip(w, x, strict=True)]


def _nonzero(backend: Backend, w: Sequence[Tensor]) -> Tensor:
    """A count of the elements of each tensor that are not 0, or of some of them if one of these is not 0."""
    if w[0].device.type == "cpu" and has_numbers(w[0]):  # elsewhere the answer would be waited for
        of_last_rows = backend.count_nonzero([t[-1:] if t.dim() else t for t in w])
        if of_last_rows.all():
            return of_last_rows
    return backend.count_nonzero(w)


def _wide(buckets: Sequence[Bucket]) -> torch.dtype:
    """The type in which the kernels compute."""
    return torch.promote_types(buckets[0].w[0].dtype, torch.float32)


def _of_step(sums: Sums) -> Sums:
    """`rules.sums` of methods without a mask of the decay, with NaN in the two sums that they do not have."""
    if sums is not None:
        sums[:, 1:3] = math.nan
    return sums


def _sums_of(active: Tensor, step: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    """`rules.sums` of methods without a mask of the decay: NaN in the two sums that they do not have."""
    size = rules.squares(step)
    return torch.stack([active.to(size.dtype), *[torch.full_like(size, math.nan)] * 2, size, rules.squares(w)], dim=1)


def _numel(parameter: Tensor, local: Tensor) -> int:
    """Elements of the whole parameter, or of the rows in its sparse gradient if ``local`` holds only those."""
    return (
        local.numel()
        if local.shape != local_real_view(parameter).shape
        else parameter.numel() * (2 if parameter.is_complex() else 1)
    )


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        msg = f"seed={seed!r}: pass an int from 0 up to 2**63 - 1"
        raise TypeError(msg)


def _check_flag(what: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is flag for flag in known):
        msg = f"{what}={value!r}: pass one of {', '.join(map(repr, known))}"
        raise TypeError(msg)


def _check_known(what: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        msg = f"unknown {what} {value!r}: pass one of {', '.join(map(repr, known))}"
        raise ValueError(msg)
