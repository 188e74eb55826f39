"""`CautiousUpdate`: cautious optimizers (arXiv 2411.16085)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import rules
from cwd_wrap.kernels import Backend
from cwd_wrap.kernels.buckets import Stepped, Sums, Whole
from cwd_wrap.methods.shared import FULLY_SHARD, check_known, step_between, sums_of, wide, without_decay
from cwd_wrap.methods.wrapper import OptimizerWrapper
from cwd_wrap.step.choice import Method
from cwd_wrap.tensors import real_numel, totals

SCALES = ("mean", "numel", None)


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

    def _method(self) -> Method:
        check_known("scale", self.scale, SCALES)
        why = f"{type(self).__name__} needs a copy of the weights to know the size of the update"
        way_out = None if self.scale is None else f"pass scale=None in place of {self.scale!r}, {FULLY_SHARD}"
        return Method(
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
        step = [step for bucket in buckets for step in step_between(bucket.w, bucket.x)] if count else []
        backend.cautious_update(buckets, self._alpha(backend, buckets, here))
        return sums_of(here, step, [w for bucket in buckets for w in bucket.w]) if count else None

    def _whole(self, backend: Backend, buckets: Sequence[Whole], count: bool) -> Sums:
        here = None if self.scale is None else backend.count_agreeing(buckets)
        alpha = None if here is None else self._alpha(backend, buckets, here)
        return without_decay(backend.step_whole(buckets, method="with_caution", factor=alpha, count=count))

    def _alpha(self, backend: Backend, buckets: Sequence[Stepped | Whole], here: Tensor) -> Tensor:
        """The factor of each tensor, ``here`` of whose updates are kept on this rank."""
        p = [each for bucket in buckets for each in bucket.p]
        kept = totals(p, here).to(wide(buckets))
        numel = backend.vector(list(map(real_numel, p)), here.device)
        return rules.alpha(kept, numel, self.scale)
