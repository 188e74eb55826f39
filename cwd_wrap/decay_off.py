"""The base's own decay, taken off for its step and put back."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import quirks

_OFF = float("0")  # told from anyone else's 0.0 by identity


class DecayOff:
    """Sets every ``weight_decay`` to 0 (`off`) and restores what was there (`on`)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._changed: list[tuple[dict[str, Any], str, object, object]] = []

    def off(self) -> None:
        """Take the decay off, in the groups that have one."""
        for group in self._optimizer.param_groups:
            decay = group.get("weight_decay")
            if decay is None or (not isinstance(decay, Tensor) and decay == 0):
                continue
            for key, value in ({"weight_decay": _OFF} | quirks.kept_while_off(self._optimizer, group)).items():
                self._changed.append((group, key, group[key], value))
                group[key] = value

    def on(self) -> None:
        """Put it back, but where a hook or a closure has written a new value meanwhile (a schedule), leave that."""
        for group, key, before, meanwhile in self._changed:
            if group.get(key) is meanwhile:
                group[key] = before
        self._changed = []
