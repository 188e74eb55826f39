"""Which optimizers may be stepped in pieces."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

TABLE = (
    "torch.optim._muon.Muon",
    "torch.optim._adafactor.Adafactor",
    "torch.optim.rmsprop.RMSprop",
    "torch.optim.rprop.Rprop",
    "torch.optim.asgd.ASGD",
)


def why_not(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Why not; None if it may."""
    cls = type(optimizer)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return None if name in TABLE else f"{cls.__name__} is not known to step its parameters one by one alike"
