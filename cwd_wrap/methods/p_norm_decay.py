"""`PNormDecay`: decoupled p-norm weight decay (arXiv 2404.10824)."""

from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases.weight_decay import StepSize
from cwd_wrap.kernels import Backend
from cwd_wrap.kernels.buckets import Stepped, Sums, Whole
from cwd_wrap.methods.shared import FULLY_SHARD, step_between, sums_of, wide, without_decay
from cwd_wrap.methods.wrapper import OptimizerWrapper
from cwd_wrap.step.choice import Method
from cwd_wrap.tensors import has_numbers, local_real_view, real_numel, totals


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
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 < value <= 2:
            msg = f"p of {type(self).__name__} is {value!r}: pass a number above 0, up to 2"
            raise ValueError(msg) if number else TypeError(msg)
        self._p = float(value)

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
            count = sum(map(real_numel, group["params"]))
            shares.append(sum(small[id(p)] for p in group["params"]) / count if count else float("nan"))
        return shares

    def _method(self) -> Method:
        why = f"{type(self).__name__} needs a copy of the weights: its decay depends on those from before the step"
        way_out = f"use CautiousDecay, {FULLY_SHARD}"
        return Method(type(self).__name__, self._after, needs_copy=why, whole=self._whole, whole_tensors=way_out)

    def _after(self, backend: Backend, buckets: Sequence[Stepped], count: bool) -> Sums:
        p, w, x = (
            list(chain.from_iterable(column)) for column in zip(*((b.p, b.w, b.x) for b in buckets), strict=True)
        )
        nonzero = backend.count_nonzero(x)
        whole = [local_real_view(each) for each in p]
        if any(some.numel() != every.numel() for some, every in zip(w, whole, strict=True)):
            # ``w`` holds only the rows of a sparse gradient; count the other rows too.
            nonzero = nonzero + backend.count_nonzero(whole) - backend.count_nonzero(w)
        step = step_between(w, x) if count else []
        backend.p_norm_decay(buckets, self.p, totals(p, nonzero))
        return sums_of(backend.vector(list(map(Tensor.numel, w)), w[0].device), step, w) if count else None

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Sums:
        p, w = (list(chain.from_iterable(column)) for column in zip(*((b.p, b.w) for b in buckets), strict=True))
        factor = (totals(p, _nonzero(backend, w)) != 0).to(wide(buckets)) * self.p
        sums = backend.step_whole(buckets, method="with_p_norm", factor=factor, own=self.p - 2, count=count)
        sums = without_decay(sums)
        if sums is not None:
            sums[:, 0] = backend.vector(list(map(Tensor.numel, w)), sums.device)
        return sums


def _nonzero(backend: Backend, w: Sequence[Tensor]) -> Tensor:
    """A count of the elements of each tensor that are not 0, or of some of them if one of these is not 0."""
    if w[0].device.type == "cpu" and has_numbers(w[0]):  # elsewhere the answer would be waited for
        of_last_rows = backend.count_nonzero([t[-1:] if t.dim() else t for t in w])
        if of_last_rows.all():
            return of_last_rows
    return backend.count_nonzero(w)
