"""The methods: each checks its arguments and makes its rule."""

from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import notices, rules
from cwd_wrap.buckets import Bucket, Coming, Count, Stepped, Whole
from cwd_wrap.choice import Rule
from cwd_wrap.kernels import Backend
from cwd_wrap.tensors import local_real_view, totals
from cwd_wrap.weight_decay import StepSize
from cwd_wrap.wrapper import OptimizerWrapper

MASKS = ("update", "gradient", "random", "all")
ROUNDINGS = ("nearest", "stochastic")
SCALES = ("mean", "numel", None)
_FULLY_SHARD = "or shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the shapes"
_HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # of the smallest part of a weight that can be lost


class CautiousDecay(OptimizerWrapper):
    """Cautious weight decay around any torch optimizer (arXiv 2510.12402, Algorithm 1).

        x <- x - eta * (u + lam * 1[u*x >= 0] * x)

    ``u`` is the base's update (subtracted): a weight decays only where the step already moves it towards zero, or
    leaves it. The decay is decoupled, whatever the base's own kind is; mask and decay use ``x`` from before the step.

    Args:
        base_optimizer: a torch.optim.Optimizer, ready made, over weights of any shape and any real or complex type. Its
            groups' ``weight_decay`` is lam, in units of 1/eta: one step takes at most the share eta*lam off a weight.
            It may be scheduled.
        lam: None leaves each group its own ``weight_decay``. A number is written into every group whose
            ``weight_decay`` is not 0, or into all if none has one; for optimizers without that option it is kept here.
        mask: which weights decay. ``"update"`` is the paper's. The others are its ablations, and compare with a copy:
            ``"gradient"``, 1[g*x >= 0]; ``"random"``, each weight with the probability that the paper's mask is 1 in
            its tensor, drawn from torch's default generator (replicas on several ranks must be seeded alike);
            ``"all"``, plain decoupled decay.
        strict: decay where u*x > 0 only, so that weights which the step leaves in place (rows of an embedding that
            were not looked up) stay as they are.
        step_size: a function of a param group that returns eta, for optimizers whose ``lr`` is not their step size. By
            default eta is what the optimizer multiplies its own decay by: see `cwd_wrap.weight_decay.eta`.
        path: None takes the cheapest path that each param group can take (see `paths`). ``"one_pass"``: one kernel
            decays and makes the base's step. ``"direction"``: decay before the step, along the sign of the coming
            update. ``"pieces"``: the base steps its parameters piece by piece, each compared with a copy of the piece.
            ``"snapshot"``: the same with a copy of all decaying weights (`snapshot_bytes`). A path that cannot be
            taken is refused with the reason.
        rounding: how bfloat16 and float16 weights are written. ``"stochastic"``: up or down at random, so that decays
            too small for one step are kept on average; on the path "one_pass" so is the whole step, weights and
            state. Drawn from torch's default generator of the device. Other types draw nothing.
        backend: None lets the library choose, for each device: ``"triton"`` on CUDA and ROCm, ``"numba"`` on the CPU
            where it is installed, else ``"eager"``, torch operations.

    Raises:
        TypeError: not an optimizer, or a class of them; lam or a group's ``weight_decay`` not a number.
        ValueError: lam, a group's ``weight_decay`` or a step size negative, NaN or infinite; an unknown mask,
            rounding, path or backend; a base that decays cautiously already or keeps its own copy of the weights; no
            known learning rate; a path that the base cannot take; a backend that cannot run.

    Example:
        >>> import torch
        >>> from cwd_wrap import CautiousDecay
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> opt = CautiousDecay(torch.optim.SGD([w], lr=0.1), lam=0.5)
        >>> w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> opt.step()  # the first and the last weight are on their way to zero: they decay by 0.1 * 0.5
        >>> w.data
        tensor([ 0.8500,  1.1000, -1.1000, -0.8500])
    """

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "mask", "strict", "rounding")
    _warned: bool

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float | None = None,
        *,
        mask: str = "update",
        strict: bool = False,
        step_size: StepSize | None = None,
        path: str | None = None,
        rounding: str = "nearest",
        backend: str | None = None,
    ) -> None:
        _check_known("mask", mask, MASKS)
        _check_known("rounding", rounding, ROUNDINGS)
        _check_flag("strict", strict, (True, False))
        self.mask = mask
        self.strict = strict
        self.rounding = rounding
        super().__init__(base_optimizer, lam, step_size, path, backend)

    def _rule(self) -> Rule:
        name = type(self).__name__
        if self.mask == "update":
            rounds = self.rounding == "stochastic"
            return Rule(name, after=self._after, before=self._before, whole=self._whole, rounds=rounds)
        why = f"mask={self.mask!r} is an ablation, and compares with a copy"
        way_out = f"pass another mask than 'random', {_FULLY_SHARD}" if self.mask == "random" else None
        reads = self.mask == "gradient"
        return Rule(name, after=self._ablate, needs_copy=why, reads_gradient=reads, whole_tensors=way_out)

    def _flags(self, count: bool) -> dict[str, bool]:
        return {"strict": self.strict, "count": count, "stochastic": self.rounding == "stochastic"}

    def _before(self, backend: Backend, buckets: Sequence[Coming], count: bool) -> Count:
        self._warn_if_lost(buckets)
        return backend.decay_along(buckets, **self._flags(count))

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Count:
        self._warn_if_lost(buckets)
        return backend.decay_from_snapshot(buckets, **self._flags(count))

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Count:
        self._warn_if_lost(buckets)
        return backend.step_whole(buckets, **self._flags(count))

    def _warn_if_lost(self, buckets: Sequence[Bucket]) -> None:
        """Warn once where a decay is below half a unit in the last place of every weight."""
        dtype = buckets[0].w[0].dtype
        if self._warned or self.rounding == "stochastic" or dtype not in _HALF_ULP:
            return
        sizes = [bucket.eta_lam for bucket in buckets if not isinstance(bucket.eta_lam, Tensor)]
        if lost := [size for size in sizes if 0 < size < _HALF_ULP[dtype]]:
            self._warned = True
            notices.warn(
                f"eta*lam = {lost[0]:.1e} is lost when {dtype} weights are rounded to nearest: they need at least "
                f'{_HALF_ULP[dtype]:.1e}. Pass rounding="stochastic", or keep float32 weights'
            )

    def _start(self) -> None:
        super()._start()
        self._warned = False

    def _ablate(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Count:
        del backend  # an ablation need not be fast
        self._warn_if_lost(buckets)
        active: Count = 0
        for bucket in buckets:
            for i, (w, x) in enumerate(zip(bucket.w, bucket.x, strict=True)):
                if self.mask == "gradient" and bucket.g is not None:
                    mask = rules.aligned(bucket.g[i], x, self.strict)
                elif self.mask == "random":
                    cautious = rules.moved_towards_zero(x, w, self.strict)
                    mask = torch.rand(x.shape, device=x.device) < cautious.float().mean()
                else:
                    mask = torch.ones_like(x, dtype=torch.bool)
                active = active + mask.sum() if count else 0
                chosen = self.rounding == "stochastic" and w.element_size() == 2
                random = torch.rand(w.shape, device=w.device) if chosen else None
                w.copy_(rules.decay(w, x, mask, bucket.eta_lam, random))
        return active


class CautiousUpdate(OptimizerWrapper):
    """A cautious optimizer around any torch optimizer (arXiv 2411.16085): C-AdamW, C-Lion, C-anything.

        x <- x - eta * alpha * 1[u*g > 0] * u            then, if the group decays:  x <- x - eta*lam*x

    The base's update ``u`` is kept only where it goes down the current gradient ``g``, and what is kept is scaled up by
    ``alpha``, one number a parameter. The base's own state is not masked. Its own decay is taken off and applied
    decoupled, after the masked update. Always copies the weights. It means nothing where the update has the gradient's
    sign by construction (SGD without momentum, Adagrad, RMSprop): all is kept.

    Args:
        base_optimizer: a torch.optim.Optimizer, ready made; its groups' ``weight_decay`` is lam.
        scale: ``"mean"``: 1 / max(mean(mask), 1e-3), as the authors' code and timm have it; ``"numel"``: numel /
            (kept + 1), as the paper prints it; None: 1. A sharded parameter (DTensor) is counted whole, in one
            all-reduce for all. Flat pieces, as FSDP1 and DeepSpeed make them, are refused, unless it is None.
        backend: as for `CautiousDecay`, with two launches after the step.

    Raises:
        TypeError: not an optimizer, or a class of them.
        ValueError: an unknown scale or backend; a base that masks its updates already, or decays cautiously (wrap that
            around this instead); what `CautiousDecay` raises for the base's groups. At a step: sparse gradients.

    Example:
        >>> import torch
        >>> from cwd_wrap import CautiousUpdate
        >>> w = torch.nn.Parameter(torch.zeros(4))
        >>> opt = CautiousUpdate(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        >>> for gradient in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -0.5])):
        ...     w.grad = gradient
        ...     opt.step()
        >>> w.data  # the last one's momentum still goes up its gradient: it waits, and the others take 4/3 of a step
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
        _check_known("scale", scale, SCALES)
        self.scale = scale
        super().__init__(base_optimizer, None, None, path, backend)

    def _clash(self, inner: OptimizerWrapper) -> str | None:
        if isinstance(inner, CautiousUpdate):
            return super()._clash(inner)
        return "its decay would be masked along with the update. Put the decay around this instead"

    def _rule(self) -> Rule:
        why = "the size of the update is known only from a copy"
        way_out = None if self.scale is None else f"pass scale=None in place of {self.scale!r}, {_FULLY_SHARD}"
        return Rule(
            type(self).__name__,
            after=self._after,
            needs_copy=why,
            reads_gradient=True,
            every_group=True,
            whole_tensors=way_out,
        )

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Count:
        p = [each for bucket in buckets for each in bucket.p]
        here = backend.count_agreeing(buckets)
        kept = totals(p, here).to(torch.promote_types(buckets[0].w[0].dtype, torch.float32))
        numel = backend.vector([each.numel() * (2 if each.is_complex() else 1) for each in p], here.device)
        backend.cautious_update(buckets, rules.alpha(kept, numel, self.scale))
        return here.sum() if count else 0


class PNormDecay(OptimizerWrapper):
    """Decoupled p-norm weight decay around any torch optimizer (pWD, arXiv 2404.10824).

        w <- w * X / (X + p*eta*lam),    X = |x|**(2-p),    x the weight before the step, w after it

    For p below 2 small weights are pulled to zero ever faster, so that many become (almost) 0: sparsity from decay.
    p = 2 is L2 decay in implicit form, p = 1 takes eta*lam off a weight's size. Below 2 a weight that is exactly 0
    stays 0, as in the authors' code, except in a tensor that is 0 as a whole (a zero-initialised layer), which must be
    able to train. Always copies the weights. Sharded parameters (DTensor) are looked at whole, in one all-reduce for
    all; flat pieces, as FSDP1 and DeepSpeed make them, are refused.

    Args:
        base_optimizer: a torch.optim.Optimizer, ready made; its groups' ``weight_decay`` is lam.
        lam: as for `CautiousDecay`. It is the lam of the authors' code; a summary of the paper has lam*p in its place.
        p: above 0, up to 2.
        step_size: as for `CautiousDecay`.
        backend: as for `CautiousDecay`, with two launches after the step.

    Raises:
        TypeError: not an optimizer, or a class of them; lam or p not a number.
        ValueError: p not above 0 and at most 2, and what `CautiousDecay` raises.

    Example:
        >>> import torch
        >>> from cwd_wrap import PNormDecay
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
        >>> opt = PNormDecay(torch.optim.SGD([w], lr=0.1), lam=0.1, p=1.0)
        >>> w.grad = torch.zeros(2)
        >>> opt.step()  # the large one loses about 0.1 * 0.1, the small one half of itself
        >>> w.data
        tensor([0.9901, 0.0050])
    """

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "p")
    p: float

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
        if not isinstance(p, Real) or not 0 < p <= 2:
            msg = f"p of {type(self).__name__} is {p!r}: pass a number above 0, up to 2"
            raise ValueError(msg) if isinstance(p, Real) else TypeError(msg)
        self.p = p
        super().__init__(base_optimizer, lam, step_size, path, backend)

    @torch.no_grad()
    def sparsity(self, threshold: float = 1e-13) -> list[float]:
        """The share of weights below ``threshold`` in size, of each param group; NaN for an empty one.

        Sharded parameters (DTensor) count whole, so all ranks that share one must call this together: it communicates,
        once for each mesh and placement.
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
        why = "the decay depends on the weights from before the step and acts on those from after it"
        way_out = f"use CautiousDecay, {_FULLY_SHARD}"
        return Rule(type(self).__name__, after=self._after, needs_copy=why, whole_tensors=way_out)

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Count:
        p, w, x = (
            list(chain.from_iterable(column)) for column in zip(*((b.p, b.w, b.x) for b in buckets), strict=True)
        )
        nonzero = backend.count_nonzero(x)
        whole = [local_real_view(each) for each in p]
        if any(some.numel() != every.numel() for some, every in zip(w, whole, strict=True)):
            # Rows that a sparse gradient touches: the others count too.
            nonzero = nonzero + backend.count_nonzero(whole) - backend.count_nonzero(w)
        backend.p_norm_decay(buckets, self.p, totals(p, nonzero))
        return sum(map(Tensor.numel, w)) if count else 0


def _check_flag(what: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is flag for flag in known):
        msg = f"{what}={value!r}: pass one of {', '.join(map(repr, known))}"
        raise TypeError(msg)


def _check_known(what: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        msg = f"unknown {what} {value!r}: pass one of {', '.join(map(repr, known))}"
        raise ValueError(msg)
