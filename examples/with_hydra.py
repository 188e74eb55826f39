"""Hydra with CautiousDecay: the optimizer is built from names in a config, in seconds on a CPU, without a download.

    python examples/with_hydra.py
    python examples/with_hydra.py optimizer._target_=cwd_wrap.optim.NAdam optimizer.strict=true

Needs: pip install cwd-wrap hydra-core
"""

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

CONFIG = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}],  # no log file left behind
    "steps": 50,
    "optimizer": {
        "_target_": "cwd_wrap.optim.AdamW",
        "lr": 0.01,
        "weight_decay": 0.1,
        "strict": False,
    },
    "hydra": {"output_subdir": None, "run": {"dir": "."}},
}
ConfigStore.instance().store("config", node=CONFIG)


@hydra.main(version_base=None, config_name="config")
def main(cfg: DictConfig) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = instantiate(cfg.optimizer, model.parameters())  # a config cannot name the parameters
    x = torch.randn(64, 3)
    for _ in range(cfg.steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
    print(optimizer)
    print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
