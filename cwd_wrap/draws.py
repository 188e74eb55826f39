"""Random numbers that are a function of a seed, the step, the parameter and the place in it. No generator is used.

So replicas agree however their generators are seeded, shards agree with the whole tensor, and nothing else in the
program draws other numbers. The bits are SplitMix64's (Steele, Lea and Flood, 2014; `rules.mix`) at the counter (seed,
step, parameter, place).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cwd_wrap import rules
from cwd_wrap.tensors import Shard


class Draws(NamedTuple):
    """Where the random numbers for the tensors of a bucket come from."""

    stream: Tensor
    """The stream of this step: one int64, on the tensors' device."""
    numbers: Sequence[int]
    """Each tensor's number among the parameters of the optimizer."""
    shards: Sequence[Shard]
    """Which places of the whole parameter each tensor holds."""

    def words(self, i: int) -> Tensor:
        """64 random bits for each place of tensor ``i``: a flat int64 tensor."""
        offset, run, jump, numel = self.shards[i]
        local = torch.arange(numel, device=self.stream.device)
        places = local + offset if run >= numel else offset + local // run * jump + local % run
        return rules.random_words(rules.stream(self.stream, self.numbers[i]), places)


class Stream:
    """The random numbers of one wrapper: a function of its seed and of the steps that its base has taken.

    The count of steps is the base's own ``step`` if its state has one, so a resumed run draws the same numbers.
    For other bases the count begins at 0 when a checkpoint is loaded.
    """

    def __init__(self, seed: int, steps: int | None = None) -> None:
        self.seed = seed
        self._counters: dict[torch.device, Tensor] = {}
        self._steps = steps or 0
        self._is_known = steps is not None

    @property
    def steps(self) -> int | None:
        """Steps that were taken; None if that is to be read from the base's state."""
        return self._steps if self._is_known else None

    def restart(self) -> None:
        """Read the count of steps from the base's state again, at the next step."""
        self._is_known = False

    def begin(self, base: Optimizer) -> None:
        """Begin a step: read the count from the base's state, if that is to be done."""
        if not self._is_known:
            self._steps, self._is_known = _steps_taken(base.state), True
            for counter in self._counters.values():
                counter.fill_(self._steps)  # in place: a CUDA graph may use this counter

    def count(self) -> None:
        """Count a step that was taken. One that raised is not counted, so the next one draws the same numbers."""
        self._steps += 1
        for counter in self._counters.values():
            counter.add_(1)  # on the device, so that each replay of a CUDA graph counts too

    def on(self, device: torch.device) -> Tensor:
        """The stream of this step, on ``device``."""
        if device not in self._counters:
            with torch.inference_mode(mode=False):  # else it could not be increased outside of it
                self._counters[device] = torch.tensor(self._steps, device=device)
        return rules.stream(torch.tensor(self.seed, device="cpu"), self._counters[device])


def _steps_taken(state: Any) -> int:
    """The largest ``step`` in a state; 0 where it has none."""
    steps = [of_one["step"] for of_one in state.values() if isinstance(of_one, dict) and "step" in of_one]
    return max((int(step) for step in steps if isinstance(step, int | float | Tensor)), default=0)
