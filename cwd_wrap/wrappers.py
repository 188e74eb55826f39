"""The methods: each checks its arguments and names its rule."""

from types import ModuleType
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import directions
from cwd_wrap.batch import Batch
from cwd_wrap.contract import Group
from cwd_wrap.directions import Direction
from cwd_wrap.strength import StepSize
from cwd_wrap.wrapper import OptimizerWrapper

MASKS = ("update",)


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
        mask: which weights decay; ``"update"`` is the paper's.
        strict: decay where u*x > 0 only, so that weights which the step leaves in place (rows of an embedding that
            were not looked up) stay as they are.
        step_size: a function of a param group that returns eta, for optimizers whose ``lr`` is not their step size. By
            default eta is what the optimizer multiplies its own decay by: see `cwd_wrap.strength.eta`.
        snapshot: None knows the mask from gradient and state where that is possible, and otherwise compares with a
            copy of the weights (`snapshot_bytes`). True always copies. False never does.
        backend: None lets the library choose; ``"eager"`` is torch operations.

    Raises:
        TypeError: not an optimizer, or a class of them; lam or a group's ``weight_decay`` not a number.
        ValueError: lam, a group's ``weight_decay`` or a step size negative, NaN or infinite; an unknown mask or
            backend; a base that decays cautiously already or keeps its own copy of the weights; no known learning rate;
            ``snapshot=False`` where the base needs one.

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

    _settings: ClassVar[tuple[str, ...]] = (*OptimizerWrapper._settings, "mask", "strict", "snapshot")
    decays = True

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float | None = None,
        *,
        mask: str = "update",
        strict: bool = False,
        step_size: StepSize | None = None,
        snapshot: bool | None = None,
        backend: str | None = None,
    ) -> None:
        if mask not in MASKS:
            known = ", ".join(repr(name) for name in MASKS)
            msg = f"unknown mask {mask!r}: pass one of {known}"
            raise ValueError(msg)
        self.mask = mask
        self.strict = strict
        self.snapshot = snapshot
        super().__init__(base_optimizer, lam, step_size, backend)

    def _direction(self, group: Group) -> Direction | str:
        if self.snapshot is True:
            return "snapshot=True asks for one"
        direction = directions.find(self.base_optimizer, group)
        if self.snapshot is False and isinstance(direction, str):
            msg = (
                f"snapshot=False, but {type(self.base_optimizer).__name__} needs one: {direction}. "
                "Pass snapshot=None and have a copy of the weights taken at each step"
            )
            raise ValueError(msg)
        return direction

    def _before_step(self, kernel: ModuleType, batch: Batch) -> int | Tensor:
        active: int | Tensor = kernel.decay_along(
            batch.w,
            batch.m,
            batch.g,
            batch.a,
            batch.b,
            batch.eta_lam,
            strict=self.strict,
            count=self.observer is not None,
        )
        return active

    def _after_step(self, kernel: ModuleType, batch: Batch) -> int | Tensor:
        active: int | Tensor = kernel.decay_from_snapshot(
            batch.w, batch.x, batch.eta_lam, strict=self.strict, count=self.observer is not None
        )
        return active
