"""Image classification in the style of timm's training script: mixup, soft targets, weight averaging, checkpoints."""

import argparse
import logging
import os
from collections import OrderedDict

import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    accuracy,
    random_seed,
    setup_default_logging,
    update_summary,
)

import knowiso_train as ki  # + knowiso

logger = logging.getLogger("train")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--img-size", type=int, default=32)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--sched", default="cosine")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--weight-decay", type=float, default=1e-4)
parser.add_argument("--mixup", type=float, default=0.2)
parser.add_argument("--cutmix", type=float, default=1.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--model-ema-decay", type=float, default=0.9)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--resume", default="")
parser.add_argument("--device", default="cpu")


def main():
    """Train for some epochs and save checkpoints."""
    setup_default_logging()
    args = parser.parse_args()
    random_seed(args.seed)
    device = torch.device(args.device)
    os.makedirs(args.output, exist_ok=True)

    train_set = create_dataset("", root=args.data_dir, split="train")
    validation_set = create_dataset("", root=args.data_dir, split="validation")
    num_classes = len(train_set.reader.class_to_idx)
    model = create_model(args.model, num_classes=num_classes).to(device)
    teacher = create_model("resnet10t", num_classes=num_classes, checkpoint_path="teacher.pth")  # + knowiso
    global iso  # + knowiso
    iso = ki.IsomorphismLoss(model, teacher.to(device), ["layer2", "layer3"]).attach()  # + knowiso

    config = resolve_data_config({"img_size": args.img_size}, model=model)
    shared = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"], "num_workers": 0}
    shared |= {"batch_size": args.batch_size, "use_prefetcher": False, "persistent_workers": False}
    train_loader = create_loader(train_set, is_training=True, scale=(0.7, 1.0), color_jitter=0.2, **shared)
    validation_loader = create_loader(validation_set, crop_pct=1.0, **shared)
    mixup_fn = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)

    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    start_epoch = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else 0
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay)
    if args.resume:
        load_checkpoint(model_ema.module, args.resume, use_ema=True)
    updates = len(train_loader)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=updates
    )
    lr_scheduler.step_update(start_epoch * updates)
    train_loss_fn, validate_loss_fn = SoftTargetCrossEntropy(), torch.nn.CrossEntropyLoss()
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=model_ema, checkpoint_dir=args.output)

    for epoch in range(start_epoch, num_epochs):
        train_metrics = train_one_epoch(
            epoch, model, train_loader, optimizer, train_loss_fn, args, lr_scheduler, mixup_fn, model_ema, device
        )
        eval_metrics = validate(model, validation_loader, validate_loss_fn, device)
        ema_metrics = validate(model_ema, validation_loader, validate_loss_fn, device)
        eval_metrics.update({f"{name}_ema": value for name, value in ema_metrics.items()})
        train_metrics.update(iso.log())  # + knowiso
        update_summary(
            epoch,
            train_metrics,
            eval_metrics,
            os.path.join(args.output, "summary.csv"),
            write_header=epoch == start_epoch,
        )
        saver.save_checkpoint(epoch, metric=eval_metrics["top1"])


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args, lr_scheduler, mixup_fn, model_ema, device):
    """Train for one epoch."""
    model.train()
    losses = AverageMeter()
    for index, (images, target) in enumerate(loader):
        images, target = mixup_fn(images.to(device), target.to(device))
        output = model(images)
        loss = loss_fn(output, target)
        loss = loss + iso()  # + knowiso
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update = epoch * len(loader) + index + 1
        model_ema.update(model, step=update)
        lr_scheduler.step_update(num_updates=update)
        losses.update(loss.item(), images.size(0))
    logger.info(f"Train: {epoch} loss: {losses.avg:.4f} lr: {optimizer.param_groups[0]['lr']:.2e}")
    return OrderedDict([("loss", losses.avg)])


def validate(model, loader, loss_fn, device):
    """Return loss and accuracy on the validation images."""
    model.eval()
    losses, top1 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, target in loader:
            output, target = model(images.to(device)), target.to(device)
            losses.update(loss_fn(output, target).item(), images.size(0))
            top1.update(accuracy(output, target)[0].item(), images.size(0))
    return OrderedDict([("loss", losses.avg), ("top1", top1.avg)])


if __name__ == "__main__":
    main()
