"""Image classification through timm's own API: `--opt adamw` against `--opt cautious_adamw`.

Trains a small ConvNeXt of timm on scikit-learn's handwritten digits (no download), each optimizer from the
same seeds, and prints accuracies with their spread. The flags are those of timm's train.py:

    python examples/with_timm.py                                                  # both, about a minute on two cores
    python examples/with_timm.py --opt cautious_lion --lr 1e-4 --weight-decay 1.0 --epochs 20 --sched cosine

Needs: pip install cwd-wrap[plots] timm scikit-learn tqdm
"""

import argparse
import statistics
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, ParseKwargs, accuracy
from torch import Tensor, nn
from tqdm import tqdm

import cwd_wrap.timm  # noqa: F401  this one line adds cautious_<name> to timm's names

Data = tuple[Tensor, Tensor]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", nargs="+", default=["adamw", "cautious_adamw"], help="one or more names of timm")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--layer-decay", type=float, default=None)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--warmup-lr", type=float, default=1e-5)
    parser.add_argument("--min-lr", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="test_convnext")
    parser.add_argument("--model-kwargs", nargs="*", default={"patch_size": 1}, action=ParseKwargs)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    return parser.parse_args()


def digits() -> tuple[Data, Data]:
    """898 images to train on and 899 to test on, 8 by 8 grey values."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    split = train_test_split(images, torch.tensor(labels), test_size=0.5, random_state=0, stratify=labels)
    return (split[0], split[2]), (split[1], split[3])


def train(args: argparse.Namespace, opt: str, seed: int, data: Data, test: Data, bar: tqdm) -> list[float]:
    """Train one model; returns the test accuracy in percent after each epoch."""
    torch.manual_seed(seed)
    model = timm.create_model(args.model, in_chans=1, num_classes=10, **args.model_kwargs)
    cfg = argparse.Namespace(**{**vars(args), "opt": opt})
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=cfg), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(cfg))
    images, labels = data
    accuracies = []
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for batch in torch.randperm(len(images)).split(args.batch_size):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(batch))
            bar.update()
        if scheduler is not None:
            scheduler.step(epoch + 1)
        model.eval()
        with torch.no_grad():
            accuracies.append(accuracy(model(test[0]), test[1])[0].item())
        bar.set_description(f"{opt} seed {seed}: loss {losses.avg:.3f} accuracy {accuracies[-1]:.1f} %")
    return accuracies


def table(results: dict[str, list[list[float]]]) -> str:
    """Accuracy at the end: mean over seeds, lowest and highest."""
    rows = [f"{'--opt':28}{'mean':>8}{'lowest':>9}{'highest':>9}  test accuracy in %, after the last epoch"]
    for opt, runs in results.items():
        last = [run[-1] for run in runs]
        rows.append(f"{opt:28}{statistics.mean(last):8.2f}{min(last):9.2f}{max(last):9.2f}")
    return "\n".join(rows)


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    """Mean accuracy over the epochs, with the band between the lowest and the highest seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for opt, runs in results.items():
        epochs = range(1, len(runs[0]) + 1)
        by_epoch = list(zip(*runs, strict=True))
        (line,) = ax.plot(epochs, [statistics.mean(a) for a in by_epoch], label=opt)
        low, high = [min(a) for a in by_epoch], [max(a) for a in by_epoch]
        ax.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2)
    title = f"handwritten digits, {len(runs)} seeds, band: lowest to highest"
    lowest = min(run[-1] for runs in results.values() for run in runs)
    ax.set(xlabel="epoch", ylabel="test accuracy in %", title=title, ylim=(lowest - 10, min(100, lowest + 10)))
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    data, test = digits()
    steps = -(-len(data[0]) // args.batch_size) * args.epochs * args.seeds * len(args.opt)
    results: dict[str, list[list[float]]] = {}
    with tqdm(total=steps, unit="step") as bar:
        for opt in args.opt:
            results[opt] = [train(args, opt, seed, data, test, bar) for seed in range(args.seeds)]
    print(table(results))
    path = args.output / "with_timm.png"
    draw(results, path)
    print(f"picture: {path}")
    if len(results) == 2:
        (_, first), (_, second) = results.items()
        gain = statistics.mean(run[-1] for run in second) - statistics.mean(run[-1] for run in first)
        spread = max(max(r[-1] for r in runs) - min(r[-1] for r in runs) for runs in (first, second))
        verdict = "more" if abs(gain) > spread else "no more"
        print(f"difference: {gain:+.2f} points, {verdict} than the spread between seeds ({spread:.2f})")


if __name__ == "__main__":
    main()
