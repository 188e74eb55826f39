"""The Hugging Face Trainer with CautiousDecay, on a tiny random model (no download): seconds on a CPU.

Needs: pip install cwd-wrap transformers accelerate
"""

import tempfile

import torch
from torch.optim import AdamW
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from cwd_wrap import CautiousDecay


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
            weight_decay=0.1,  # goes into the groups that decay, and the wrapper takes it from there
            logging_steps=10,
            report_to=[],
            use_cpu=True,
        )
        Trainer(
            model,
            args,
            train_dataset=Counting(),
            optimizer_cls_and_kwargs=(CautiousDecay.over(AdamW), {"lr": args.learning_rate}),
        ).train()


if __name__ == "__main__":
    main()
