"""The sign of the optimizer's next update, for optimizers whose gradient and state alone determine it.

    sign(u) = sign(a*m + b*g)        m: a tensor in the parameter's state, g: its gradient, a > 0 and b scalars

Then the mask is known before the step: no copy is needed, and rounding of the step (bfloat16) cannot change the mask.
A class is in the table, as its library ships it (`known`), only if its update reads no weight (so that decay and step
give the same in either order) and a test holds it equal to the snapshot path. These are left out because the equation
does not hold: Rprop (its update is 0 after a change of sign), RMSprop with momentum (each past gradient was divided by
its own scale), all that read the weight (ASGD, Adafactor, LAMB, LARS, AdamP, SGDP), Muon, LBFGS, and all with
``caution`` on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases import known

Group = Mapping[str, Any]
State = Mapping[str, Any]


class Direction(NamedTuple):
    """``sign(u) = sign(a*m + b*g)`` for the parameters of one group; m is the state's entry ``state_key``.

    Where ``state_key`` is None or the state has no such entry yet, ``sign(u) = sign(first*g)``.
    """

    state_key: str | None
    first: float
    pair: tuple[float, float] = (0.0, 0.0)
    varying: Callable[[State], tuple[float, float]] | None = None
    """(a, b) from a parameter's state, if they change from step to step; else None, and (a, b) is ``pair``."""

    def numbers(self, state: State) -> tuple[float, float]:
        """(a, b) for a parameter with this state."""
        return self.pair if self.varying is None else self.varying(state)


def find(optimizer: Optimizer, group: Group) -> Direction | str:
    """The direction of ``optimizer``'s coming step on ``group``, or the reason why it is unknown."""
    cls = type(optimizer)
    name = known.name(cls) or ""
    if name not in TABLE:
        return f"the sign of {cls.__name__}'s step is not known before it"
    if group.get("caution"):
        return f"{cls.__name__} masks its own update in a group with caution=True"
    return TABLE[name](group)


def _sign(group: Group) -> float:
    return -1.0 if group.get("maximize") else 1.0


def _gradient(group: Group) -> Direction | str:
    return Direction(None, _sign(group))


def _momentum_buffer(group: Group) -> Direction | str:
    """u = buf, or g + mu*buf with Nesterov, where buf <- mu*buf + (1 - dampening)*g; the first buf is g, undampened."""
    mu, dampening = group["momentum"], group["dampening"]
    if mu == 0:
        return _gradient(group)
    return _linear(
        group, "momentum_buffer", *((mu * mu, 1 + mu * (1 - dampening)) if group["nesterov"] else (mu, 1 - dampening))
    )


def _moving_average(group: Group) -> Direction | str:
    """u = (beta1*m + (1 - beta1)*g) / (something positive), or its sign."""
    beta1 = group["betas"][0]
    return _linear(group, "exp_avg", beta1, 1 - beta1)


def _twice_averaged(group: Group) -> Direction | str:
    """u = (beta1*m' + (1 - beta1)*g) / (something positive), m' = beta1*m + (1 - beta1)*g."""
    beta1 = group["betas"][0]
    return _linear(group, "exp_avg", beta1 * beta1, 1 - beta1 * beta1)


def _nadam(group: Group) -> Direction | str:
    """u = ((1 - mu_t)/(1 - prod mu_1..t) * g + mu_t+1/(1 - prod mu_1..t+1) * m') / (something positive)."""
    if group.get("capturable"):
        return "NAdam with capturable=True keeps the coefficients of its update on the device"
    beta1, momentum_decay = group["betas"][0], group["momentum_decay"]
    if beta1 == 0:
        return _gradient(group)
    sign = _sign(group)

    def coefficients(state: State) -> tuple[float, float]:
        t, product = float(state["step"]) + 1, float(state["mu_product"])
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        of_g = (1 - mu) / (1 - product * mu)
        of_m = mu_next / (1 - product * mu * mu_next)
        return of_m * beta1, sign * (of_g + of_m * (1 - beta1))

    return Direction("exp_avg", sign, varying=coefficients)


def _unscaled_only(group: Group) -> Direction | str:
    if group["momentum"] != 0:
        return "RMSprop with momentum divides each past gradient by its own scale"
    return _gradient(group)


def _linear(group: Group, state_key: str, a: float, b: float) -> Direction | str:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return "its coefficients (momentum, betas) are tensors: pass numbers"
    return Direction(state_key, _sign(group), (a, _sign(group) * b)) if a > 0 else _gradient(group)


TABLE: Mapping[str, Callable[[Group], Direction | str]] = {
    "torch.optim.adadelta.Adadelta": _gradient,
    "torch.optim.adagrad.Adagrad": _gradient,
    "torch.optim.adam.Adam": _moving_average,
    "torch.optim.adamax.Adamax": _moving_average,
    "torch.optim.adamw.AdamW": _moving_average,
    "torch.optim.nadam.NAdam": _nadam,
    "torch.optim.radam.RAdam": _moving_average,
    "torch.optim.rmsprop.RMSprop": _unscaled_only,
    "torch.optim.sgd.SGD": _momentum_buffer,
    "timm.optim.adamw.AdamWLegacy": _moving_average,
    "timm.optim.lion.Lion": _moving_average,
    "timm.optim.nadamw.NAdamW": _twice_averaged,
    "timm.optim.sgdw.SGDW": _momentum_buffer,
    "lion_pytorch.lion_pytorch.Lion": _moving_average,
}
