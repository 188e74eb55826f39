"""The examples for engines run on two ranks, as under torchrun, and print their optimizer."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from ranks import launch, spawn
from torch import distributed as dist
from torch import nn
from torch.optim import AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate

if not dist.is_available() or not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

ROOT = Path(__file__).parents[1]
OURS = "<class 'cwd_wrap.methods.cautious_decay.CautiousDecay'>"
SMALL = ["--every", 2, "--width", 32, "--layers", 1, "--context", 16, "--batch", 2]
RECIPES = {
    "with_accelerate.py": (
        "accelerate",
        f"AcceleratedOptimizer'> around {OURS}, DistributedType.MULTI_CPU",
    ),
    "with_lightning.py": ("lightning.pytorch.cli", OURS.removeprefix("<class '")),
    "with_trainer.py": (
        "transformers.trainer",
        f"AcceleratedOptimizer'> around {OURS}",
    ),
    "with_deepspeed.py": (
        "deepspeed",
        f"DeepSpeedZeroOptimizer'> around {OURS}",
    ),
    "with_torchtitan.py": ("torchtitan", "CautiousOptimizers'> of [<class 'cwd_wrap.optim.AdamW'>"),
}


def printed(done: list[subprocess.CompletedProcess[str]]) -> str:
    """The output of processes that returned 0."""
    for process in done:
        assert process.returncode == 0, process.stderr
    return "".join(process.stdout + process.stderr for process in done)


def test_fsdp_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """The last four of six steps, repeated from a checkpoint, have the same losses and shares of decayed weights."""
    pytest.importorskip("tqdm")
    script, words = ROOT / "examples" / "with_fsdp.py", ["--steps", 6, "--folder", tmp_path, *SMALL]
    text = printed(launch(script, *words))
    for step in (4, 6):
        shutil.rmtree(tmp_path / str(step))
    again = printed(launch(script, *words))
    lines, lines_again = (re.findall(r"step \d+: loss [\d.]+, mask [\d.]+", each) for each in (text, again))

    assert f"type(optimizer): {OURS}" in text
    assert len(lines) == 3
    assert lines[1:] == lines_again


@pytest.mark.parametrize("script", RECIPES)
def test_recipes_run(script: str) -> None:
    """The example trains on two ranks and prints the class of its optimizer, which is the wrapper."""
    module, kind = RECIPES[script]
    pytest.importorskip(module.split(".")[0])
    text = printed(launch(ROOT / "examples" / script, imports=[module]))

    assert re.search(rf"type\(optimizer\): <class '[\w.]*{re.escape(kind)}", text)


def accelerated(rank: int) -> Any:
    """Train under accelerate's FSDP2, which on the CPU must be set in the accelerator's state."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = engines.net()
    model, optimizer = accelerator.prepare(model, made(model.parameters()))
    for step in range(engines.STEPS):
        optimizer.zero_grad()
        accelerator.backward(engines.loss_of(model, engines.part_of(engines.batch(model, step), 2)))
        optimizer.step()
    p = optimizer.param_groups[0]["params"][0]
    return type(p.data).__name__, type(optimizer.optimizer).__name__, engines.flat(model.parameters()).numpy()


def made(parameters: Any) -> CautiousDecay:
    return CautiousDecay(AdamW(parameters, lr=0.01, weight_decay=0.5))


@pytest.mark.filterwarnings("ignore")
def test_accelerate_with_fsdp2() -> None:
    """accelerate puts sharded parameters into the wrapper's groups, and training is that of one process."""
    pytest.importorskip("accelerate")
    for parameter, optimizer, weights in spawn(2, accelerated):
        assert ("DTensor", "CautiousDecay") == (parameter, optimizer)
        expected = engines.alone(engines.net(), made)
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-15)


def under_deepspeed(rank: int, stage: int, scale: Any) -> str:
    """The error's text of a step, or ""."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 1))
    optimizer = CautiousUpdate(AdamW(model.parameters(), lr=1e-2), scale=scale)
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        engine.backward(engine(torch.ones(4, 3)).square().mean())
        engine.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_has_flat_pieces(stage: int) -> None:
    """Under ZeRO a scale over each tensor is refused; scale=None, which the error names, runs."""
    pytest.importorskip("deepspeed")
    for text in spawn(2, under_deepspeed, stage, "mean"):
        assert "CautiousUpdate needs a count over each whole tensor, but param group 0 of AdamW has flat pieces" in text
        assert "pass scale=None in place of 'mean'" in text
    assert ["", ""] == spawn(2, under_deepspeed, stage, None)
