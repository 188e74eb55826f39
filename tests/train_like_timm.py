"""A training script in the manner of timm's train.py, small: timm's flags, factory, schedulers, scaler, checkpoints.

It does not import cwd_wrap. ``python -m cwd_wrap.timm train_like_timm.py --opt cautious_adamw`` runs it as it is.
"""

import argparse
import copy
import logging
import sys

import torch
from timm.models import create_model, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, NativeScaler, ParseKwargs, init_distributed_device, is_primary
from torch.nn.parallel import DistributedDataParallel

_logger = logging.getLogger("train")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="test_vit")
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--opt-eps", default=None, type=float)
    parser.add_argument("--opt-betas", default=None, type=float, nargs="+")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--layer-decay", type=float, default=None)
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-epochs", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="in an epoch")
    parser.add_argument("--clip-grad", type=float, default=None)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--output", default="")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    args = parse_args()
    device = init_distributed_device(args)
    if not is_primary(args):
        logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=10, img_size=32)

    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    defaults = copy.deepcopy(optimizer.defaults)
    defaults["weight_decay"] = args.weight_decay  # timm sets it in the groups only
    defaults_str = ", ".join(f"{k}: {v}" for k, v in defaults.items())
    _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {defaults_str}")  # noqa: G004
    loss_scaler = NativeScaler(device=device.type) if args.amp else None
    start_epoch = 0
    if args.resume:
        start_epoch = resume_checkpoint(model, args.resume, optimizer=optimizer, loss_scaler=loss_scaler)
    saver = CheckpointSaver(
        model=model, optimizer=optimizer, args=args, amp_scaler=loss_scaler, checkpoint_dir=args.output, max_history=1
    )
    if args.distributed:
        model = DistributedDataParallel(model)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=args.steps,
    )
    if scheduler is not None and start_epoch:
        scheduler.step_update(start_epoch * args.steps)
    for epoch in range(start_epoch, epochs):
        loss = train_one_epoch(epoch, model, optimizer, scheduler, loss_scaler, args)
        if args.output and is_primary(args):
            saver.save_checkpoint(epoch, metric=loss)
    if args.distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(epoch, model, optimizer, scheduler, loss_scaler, args) -> float:
    second_order = hasattr(optimizer, "is_second_order") and optimizer.is_second_order
    losses = AverageMeter()
    model.train()
    for step in range(args.steps):
        update = epoch * args.steps + step
        generator = torch.Generator().manual_seed(update * args.world_size + args.rank)
        images = torch.randn(8, 3, 32, 32, generator=generator)
        targets = torch.randint(10, (8,), generator=generator)
        with torch.autocast(args.device, enabled=args.amp, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        if loss_scaler is not None:
            loss_scaler(
                loss,
                optimizer,
                clip_grad=args.clip_grad,
                parameters=list(model.parameters()),
                create_graph=second_order,
            )
        else:
            loss.backward(create_graph=second_order)
            if args.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
        if scheduler is not None:
            scheduler.step_update(num_updates=update + 1, metric=losses.avg)
        losses.update(loss.item(), images.size(0))
        lrl = [param_group["lr"] for param_group in optimizer.param_groups]
        lr = sum(lrl) / len(lrl)
        where = f"Train: {epoch} [{step:>4d}/{args.steps}]"
        _logger.info(f"{where}  Loss: {losses.val:#.6g} ({losses.avg:#.5g})  LR: {lr:.3e}")  # noqa: G004
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    return losses.avg


if __name__ == "__main__":
    main()
