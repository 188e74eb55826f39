"""The Hugging Face Trainer with CautiousDecay, on a tiny random model (no download): seconds on a CPU.

    python examples/with_trainer.py
    torchrun --standalone --nproc-per-node 2 examples/with_trainer.py   # DDP

Needs: pip install cwd-wrap transformers accelerate
"""

import os
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from cwd_wrap import CautiousDecay


class CautiousTrainer(Trainer):
    """Wraps the optimizer that the Trainer makes, with its groups, learning rate and schedule."""

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = CautiousDecay(super().create_optimizer(*args, **kwargs))
        return self.optimizer


class Counting(Dataset):
    """Sequences that count upwards, modulo 32."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + i) % 32
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            weight_decay=0.1,  # lam; the Trainer leaves biases and norms out
            logging_steps=10,
            report_to=[],
            use_cpu=True,
        )
        trainer = CautiousTrainer(model, args, train_dataset=Counting())
        trainer.train()
        inner = trainer.optimizer.optimizer  # accelerate's optimizer is around ours
        assert isinstance(inner, CautiousDecay)
        if trainer.is_world_process_zero():
            print(f"type(optimizer): {type(trainer.optimizer)} around {type(inner)}", flush=True)
        trainer.accelerator.wait_for_everyone()
    if args.world_size > 1:
        os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
