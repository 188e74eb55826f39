"""Who carries the rules out: chosen by device, refused where it cannot run, imported only when chosen."""

import os
import subprocess
import sys

import pytest
import torch
from support import weight
from torch.optim import SGD

from cwd_wrap import CautiousDecay, kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter changes the choice")

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_eager_runs_everywhere(device: str) -> None:
    """Without a CUDA or ROCm device the choice is eager, and so it is wherever eager is asked for."""
    assert kernels.name(None, torch.device(device)) == kernels.name("eager", torch.device(device)) == "eager"
    assert kernels.choose(None, CPU).__name__ == "cwd_wrap.kernels._eager"


def test_triton_is_refused_where_it_cannot_run() -> None:
    """Asked for on the CPU, triton is an error that says why and lists what can run; nothing is decayed."""
    p = weight(1.0, grad=[1.0])
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5, backend="triton")

    with pytest.raises(ValueError, match=r"backend='triton' cannot run on cpu: .*TRITON_INTERPRET=1.* 'eager'"):
        opt.step()
    assert p.item() == 1.0
    assert "backend='triton'" in repr(opt)


def test_a_step_on_the_cpu_does_not_import_the_triton_kernels() -> None:
    """Neither the import nor a step loads the module that imports triton."""
    lines = [
        "import sys, torch, cwd_wrap",
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = torch.ones(1)",
        "cwd_wrap.CautiousDecay(torch.optim.SGD([p], lr=0.1), lam=0.1).step()",
        "print('cwd_wrap.kernels._triton' in sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
