"""Never run: mypy checks that a strictly typed client can use `cwd_wrap.optim`. An unused ignore is an error."""

import torch
from torch.optim.lr_scheduler import StepLR

import cwd_wrap
from cwd_wrap import CautiousDecay, MaskMonitor
from cwd_wrap.optim import SGD, AdamW

net = torch.nn.Linear(2, 1)
opt = AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, mask="all")
opt.lam = 0.2
StepLR(opt, 1)
decay: CautiousDecay = cwd_wrap.optim.Muon([{"params": list(net.parameters()), "lr": 0.1}], lr=0.1)
monitor: MaskMonitor = MaskMonitor(every=10).watch(opt)


class Tuned(SGD):
    """A class of the user's own."""


def build(cls: type[AdamW]) -> AdamW:
    return cls(net.named_parameters())


Tuned(net.parameters(), 0.1, 0.9).lam = "0.1"  # type: ignore[assignment]
print(opt.missing)  # type: ignore[attr-defined]
print(cwd_wrap.optim.AdamX)  # type: ignore[attr-defined]
