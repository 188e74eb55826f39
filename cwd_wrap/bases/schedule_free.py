"""The schedule-free optimizers of the library schedulefree (arXiv 2405.15682), and the schedule of a step.

Their weights are y while they train. The state has z. The average x of all z is not stored: ``eval()`` computes it from
y and z, and ``train()`` goes back. The numbers of the schedule are in the param group, and the optimizer's own step
counts them on, even where it has no parameter left to step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap.bases import known

Group = Mapping[str, Any]

_SCHEDULE = "lr r k train_mode weight_sum lr_max scheduled_lr weight_lr_power weight_decay foreach"
_OPTIONS: Mapping[str, set[str]] = {
    f"schedulefree.{module}.{name}": {*_SCHEDULE.split(), *own.split()}
    for module, name, own in (
        ("adamw_schedulefree", "AdamWScheduleFree", "betas eps warmup_steps"),
        ("sgd_schedulefree", "SGDScheduleFree", "momentum warmup_steps"),
        ("radam_schedulefree", "RAdamScheduleFree", "betas eps silent_sgd_phase"),
    )
}
"""The options of the classes whose steps are known. Those of versions 1.3 and 1.4; others compute other steps."""


def is_known(optimizer: Optimizer) -> bool:
    """True if the steps of ``optimizer`` are those that `updates` describes."""
    options = _OPTIONS.get(known.name(type(optimizer)) or "")
    # torch adds an option when it loads or copies an optimizer.
    return options is not None and options == optimizer.defaults.keys() - {"differentiable"}


def is_of_another_version(optimizer: Optimizer) -> bool:
    """True if ``optimizer`` is of one of the classes, but has other options, and so may take other steps."""
    return known.name(type(optimizer)) in _OPTIONS and not is_known(optimizer)


def is_in_eval_mode(optimizer: Optimizer) -> bool:
    """True if the next step of ``optimizer``, which is a known one, raises before it does anything."""
    return not bool(optimizer.param_groups[0]["train_mode"])


def give_state(optimizer: Optimizer, group: Group, parameters: Sequence[Tensor]) -> None:
    """Make the state that the first step of ``parameters`` of the ``group`` makes, where there is none."""
    for p in parameters:
        state = optimizer.state[p]
        if "z" not in state:
            state["z"] = torch.clone(p, memory_format=torch.preserve_format)
            if "betas" in group:
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)


# ---- the schedule


def eta(group: Group) -> float | Tensor:
    """The learning rate of the coming step of ``group``, with its warm-up or rectification."""
    lr: float | Tensor = group["lr"]
    if "warmup_steps" in group:
        return lr * warmed_up(group["k"], group["warmup_steps"])
    return lr * rectified(group["k"], group["betas"][1], group["silent_sgd_phase"])


def warmed_up(k: float, warmup_steps: float) -> float:
    """The factor of a linear warm-up in the step after ``k`` others."""
    return (k + 1) / warmup_steps if k < warmup_steps else 1.0


def length(k: float, beta2: float) -> float:
    """Over how many steps RAdam's second moments average (arXiv 1908.03265): they are used if it is above 4."""
    t = k + 1
    return float(2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t))


def rectified(k: float, beta2: float, silent: float) -> float:
    """RAdam's factor in the step after ``k`` others. Before it can be known it is 0 if ``silent``, else 1."""
    longest, now = 2 / (1 - beta2) - 1, length(k, beta2)
    if now <= 4:
        return float(not silent)
    return float(((now - 4) * (now - 2) * longest / ((longest - 4) * (longest - 2) * now)) ** 0.5)


def averaging(
    eta: float, beta1: float, k: float, r: float, weight_sum: float, lr_max: float, power: float
) -> tuple[float, float]:
    """(c, 1 - beta1*(1 - c)): the weight c of the newest z in the average, and how much of z's step y takes at once."""
    weight = (k + 1) ** r * max(eta, lr_max) ** power
    total = weight_sum + weight
    c = weight / total if total else 0.0
    return c, 1 - beta1 * (1 - c)
