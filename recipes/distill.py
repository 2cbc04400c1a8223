r"""Distill a teacher into a smaller student with labels, the teacher's logits (KD) and its features (isomorphism loss).

    pip install -e ".[demo]"
    accelerate launch recipes/distill.py                        # real digits, under three minutes on two CPU cores
    accelerate launch recipes/distill.py --dataset torch/cifar100 --data-dir data --data-options download=True \
        --image-size 32 --padding 4 --flip --teacher resnet34 --teacher-epochs 60 --student resnet18 --epochs 60 \
        --batch-size 256 --mixed-precision bf16 --output output/cifar100

Teacher and student are networks of timm, by name or weight file, or of transformers, hf:OWNER/NAME or hf:FOLDER; the
dataset is any that timm reads. All arms have the same initial weights, order of images and number of updates. A run
that was killed is resumed by the same command; a finished run prints its table.

Writes log.jsonl, summary.json, summary.html and summary.png, and {best,last}.safetensors for each network: plain timm
state dicts, each with a card that has the code to load it.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import knowiso_train as ki
from knowiso_train.distillation import kd_loss, suggest_layers
from knowiso_train.experiment import (
    RecipeParser,
    ResumableTraining,
    RunFolder,
    at_least,
    build_network,
    check_published_classifier,
    describe_run,
    launch_accelerator,
    load_datasets,
    loader_options,
    network_card,
    results_table,
    run_settings,
    sgd_with_schedule,
    timm_options,
    top1_accuracy,
    training_options,
    write_arms,
)
from knowiso_train.features import pair_layers
from knowiso_train.loading import InputBridge, input_transform, load_checkpoint, training_loader

# Terms of the loss beside the cross-entropy
ARMS = {"student": (), "kd": ("kd",), "iso": ("iso",), "ours": ("kd", "iso")}
Pairs = list[tuple[str, str]]  # (student layer, teacher layer)
Data = tuple[Any, Any, int]  # training and test images: (float image in [0, 1], label); number of classes


def main(words: list[str] | None = None) -> int:
    """Train the teacher and all arms, and print their table."""
    args = parse_arguments(words)
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision, args.accumulate)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    output.check_settings(run_settings(args))
    data = load_datasets(args)

    teacher, _ = (build(role, args, data) for role in ("teacher", "student"))  # options fail before any training
    if args.teacher_checkpoint is None and args.teacher_epochs:
        cards = [train("teacher", None, [], data, args)]
        load_checkpoint(teacher, args.output / "teacher" / "last.safetensors")
    else:
        cards = [{"arm": "teacher", **evaluate("teacher", teacher.to(accelerator.device), data, args, accelerator)}]
    teacher.eval().requires_grad_(False).to(accelerator.device)

    layers = choose_layers(teacher, data, args, output)
    for arm in dict.fromkeys(args.arms):
        card = train(arm, teacher, layers, data, args)
        shares = explained_shares(args.output / arm / "last.safetensors", teacher, layers, data, args)
        cards.append(card | {"explained": shares})

    summary = {**describe_run(args), "layers": layers, "arms": cards}
    output.write_json("summary.json", summary)
    if accelerator.is_main_process:
        print(f"\n{results_table(cards, output.read_log())}\n")
        files = write_arms(args.output, summary)
        print(f"written: {args.output}/summary.json, {files}, log.jsonl, <arm>/{{best,last}}.safetensors")
    accelerator.end_training()
    return 0


def train(arm: str, teacher: Any, layers: Pairs, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Train a network with the losses of its arm, or resume its training, and return its card."""
    role, epochs, terms = ("student", args.epochs, ARMS.get(arm, ()))
    if arm == "teacher":
        role, epochs = "teacher", args.teacher_epochs
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision, args.accumulate)
    run, output = (RunFolder(path, writes=accelerator.is_main_process) for path in (args.output / arm, args.output))
    if (card := run.read_json("last.json")) is not None:
        return card

    network = build(role, args, data).to(accelerator.device)
    size = image_size(role, args)
    to_input, to_teacher = input_transforms(network, teacher, args, accelerator.device, size=size)
    loader: Any = training_loader(data[0], **loader_options(args))
    sampler = loader.sampler
    iso = None
    if "iso" in terms:
        options = {name: getattr(args, name) for name in ("solver", "order", "kernel_size", "scale", "weight")}
        if args.compile and args.weight == "auto":
            options["weight"] = 100.0  # as "auto" chooses, since gradients inside a compiled network are not accessible
        example = to_input(data[0][0][0][None].to(accelerator.device))
        iso = ki.IsomorphismLoss(network, teacher, layers, teacher_transform=to_teacher, example=example, **options)
        iso.to(accelerator.device)

    parameters = [*network.parameters(), *(iso.parameters() if iso else ())]
    updates = epochs * math.ceil(len(loader) / args.accumulate)
    warmup = int(args.warmup * updates)
    optimizer, scheduler = sgd_with_schedule(
        parameters, lr=args.lr, weight_decay=args.weight_decay, warmup=warmup, total=updates
    )
    ema = ModelEmaV3(network, decay=args.ema, use_warmup=True) if args.ema else None
    if args.compile:
        torch.compiler.reset()
        network.compile()  # in place: layer names stay, and the hooks are registered before the first call
    model, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(*(part for part in (iso, ema) if part is not None))
    tested = ema.module if ema else network  # tested and saved

    training = ResumableTraining(
        accelerator,
        run,
        output,
        {"arm": arm},
        total=epochs * len(loader),
        values={"best_top1": -1.0, "best_epoch": 0},
        **training_options(args),
    )
    model.train()
    with training, iso or nullcontext():
        for images, labels in training.batches(loader, sampler):
            with accelerator.accumulate(model):
                inputs = to_input.applied(images)
                logits = model(inputs)
                losses = {"cross_entropy": F.cross_entropy(logits, labels)}
                if iso:
                    losses["isomorphism"] = iso()  # runs the teacher
                if "kd" in terms:
                    with torch.no_grad(), accelerator.autocast():
                        teacher_logits = iso.teacher_output if iso else teacher(to_teacher(inputs))
                    losses["kd"] = args.kd_weight * kd_loss(logits, teacher_logits, args.temperature)
                accelerator.backward(sum(losses.values()))
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if ema and accelerator.sync_gradients:
                ema.update(network, scheduler.scheduler.last_epoch)
            epoch = 1 + training.step // len(loader)
            training.advance(losses, {"epoch": epoch, "lr": lr}, iso)

            if training.step % len(loader) == 0:
                scores = evaluate(role, tested, data, args, accelerator)
                card = {"arm": arm, **scores, "epoch": epoch, "epochs": epochs}
                training.log({"epoch": epoch, "top1": card["top1"]})
                if card["top1"] > training.values["best_top1"]:
                    training.values |= {"best_top1": card["top1"], "best_epoch": epoch}
                    run.write_network("best", tested, card)
            training.save_if_due()

    card = (card or {}) | training.values | {"seconds": training.seconds}
    run.write_network("last", tested, card)
    accelerator.wait_for_everyone()
    run.delete_checkpoints()
    return card


def build(role: str, args: argparse.Namespace, data: Data) -> nn.Module:
    """Build the teacher or the student with its initial weights."""
    words, checkpoint, pretrained = (getattr(args, role + end) for end in ("", "_checkpoint", "_pretrained"))
    options = {"num_classes": data[2], "checkpoint": checkpoint, "pretrained": pretrained, "seed": args.seed}
    network = build_network(words, input_size=input_shape(role, data, args), **options)
    if role == "teacher" and pretrained and checkpoint is None and not args.teacher_epochs:
        check_published_classifier(network, words[0], data[2], "Train it with --teacher-epochs")
    return network


def image_size(role: str, args: argparse.Namespace) -> Any:
    """Return the size of a network's images; "image" is that of the data."""
    return args.teacher_size or "image" if role == "teacher" else "image"


def input_shape(role: str, data: Data, args: argparse.Namespace) -> tuple[int, ...]:
    """Return the shape (C, H, W) of a network's images."""
    channels, *sides = data[0][0][0].shape
    size = image_size(role, args)
    return (channels, *(sides if size == "image" else (size, size)))


def input_transforms(
    model: nn.Module, teacher: nn.Module | None, args: argparse.Namespace, device: torch.device, size: Any = "image"
) -> tuple[Any, Any]:
    """Return the transforms from images in [0, 1] to the network's inputs, and from these to the teacher's."""
    to_input = input_transform(model, size=size).to(device)
    if teacher is None:
        return to_input, None
    return to_input, InputBridge(to_input, input_transform(teacher, size=image_size("teacher", args))).to(device)


def choose_layers(teacher: nn.Module, data: Data, args: argparse.Namespace, output: RunFolder) -> Pairs:
    """Return the layer pairs of --layers; "auto" measures, once per run, which layers are not explained yet."""
    device = next(teacher.parameters()).device
    student = build("student", args, data).to(device)
    if args.layers != ["auto"]:
        names = [(source, target or source) for source, _, target in (name.partition("=") for name in args.layers)]
        return [(pair.source, pair.target) for pair in pair_layers(student, teacher, names)]
    suggestion = output.read_json("layers.json")
    if suggestion is None:
        to_input, to_teacher = input_transforms(student, teacher, args, device)
        loader = DataLoader(
            data[0],
            args.batch_size,
            collate_fn=lambda items: to_input(torch.stack([image for image, _ in items]).to(device)),
        )
        suggestion = {"layers": suggest_layers(student, teacher, loader, teacher_transform=to_teacher).layers}
        output.write_json("layers.json", suggestion)
    return [(source, target) for source, target in suggestion["layers"]]


def evaluate(
    role: str, model: nn.Module, data: Data, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the card of a network with its test accuracy."""
    to_input, _ = input_transforms(model, None, args, accelerator.device, size=image_size(role, args))
    options = {"to_input": to_input.applied, "batch_size": args.batch_size, "workers": args.workers}
    top1 = top1_accuracy(model, data[1], accelerator, **options)
    words = getattr(args, role)
    card = network_card(model, words[0], timm_options(words, data[2]), input_shape(role, data, args))
    return {**card, "top1": top1}


def explained_shares(
    weights: Path, teacher: nn.Module, layers: Pairs, data: Data, args: argparse.Namespace
) -> dict[str, float]:
    """Return the share of each of the teacher's layers that a saved student explains linearly on test images."""
    device = next(teacher.parameters()).device
    student = build("student", args, data).to(device)
    load_checkpoint(student, weights)
    to_input, to_teacher = input_transforms(student, teacher, args, device)
    report = ki.measure(
        student,
        teacher,
        DataLoader(data[1], args.batch_size),
        layers,
        order=0,
        max_images=2_000,
        noise_floor=False,
        bootstrap=0,
        source_transform=to_input,
        target_transform=lambda images: to_teacher(to_input(images)),
        progress=False,
    )
    return {f"{pair.source} → {pair.target}": pair.explained for pair in report}


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line; every default is explained in --help."""
    parser = RecipeParser(__doc__)
    add = parser.add
    add("--output", Path("output/distill"), Path, "folder of the run")
    arms = "student: labels; kd: labels and logits; iso: labels and features; ours: all three"
    add("--arms", ["student", "kd", "ours"], str, arms, nargs="+", choices=ARMS)
    parser.add_data(
        ["train", "validation"],
        "to train on, and to test and select the best epoch on",
        digits="2,000 + 3,000 MNIST images",
    )
    words_help = "name in timm, and KEY=VALUE for timm.create_model; hf:OWNER/NAME or hf:FOLDER"
    add("--teacher", ["resnet10t", "channels=(32,64,128,256)"], str, words_help, nargs="+")
    add("--student", ["test_resnet"], str, words_help + "; a third of the default teacher", nargs="+")
    for role, note, trained in (
        ("teacher", "; such a teacher is not trained", "; trained further unless --teacher-epochs 0"),
        ("student", "", ""),
    ):
        add(f"--{role}-checkpoint", None, Path, "weight file to start from" + note)
        add(f"--{role}-pretrained", False, help="start from the published weights" + trained)
    add("--teacher-size", None, at_least(1), "image size of the teacher, if it differs from the student's")
    add("--teacher-epochs", 6, at_least(0), "epochs to train the teacher with labels; 0: no training")
    add("--epochs", 2, at_least(1), "epochs of each arm; digits need few, 60 to 240 are usual for CIFAR")
    layers = "layers to match: names, globs or STUDENT=TEACHER; auto: the least explained stages"
    add("--layers", ["layer2", "layer3"], str, layers, nargs="+")
    solver = "map of the loss: closed_form, from running moments; learned, the paper's network"
    add("--solver", "closed_form", help=solver, choices=("closed_form", "learned"))
    add("--order", 0, at_least(0), "non-linear steps of the learned solver")
    kernel = "kernel size of the map, odd; 1 is the cheapest; auto: 3 for layers of at most 64 channels"
    add("--kernel-size", "auto", at_least(1, word="auto"), kernel)
    add("--scale", "log", help="loss: unexplained share, or its logarithm", choices=("log", "linear"))
    weight = "weight of each layer's isomorphism loss; auto: its gradient as large as that of the other terms"
    add("--weight", "auto", at_least(0, float, "auto"), weight)
    add("--kd-weight", 1.0, at_least(0, float), "weight of the logits' loss")
    add("--temperature", 4.0, at_least(0.01, float), "temperature of the logits; 4 as in most of the literature")
    add("--lr", 0.05, at_least(0, float), "peak learning rate of SGD; 0.05 suits 64 images a batch")
    add("--warmup", 0.05, at_least(0, float), "fraction of the training with a rising learning rate, before the cosine")
    add("--accumulate", 1, at_least(1), "batches per update")
    add(
        "--ema",
        0.0,
        at_least(0, float),
        "decay of a running mean of the weights to test and save; 0: none, 0.999 usual",
    )
    add("--compile", False, help="compile the trained networks; pays off in long runs")
    parser.add_training(padding=2, save_every=200)
    args = parser.parse_args(words)
    if not (args.teacher_checkpoint or args.teacher_pretrained or args.teacher_epochs):
        parser.error("a teacher needs --teacher-epochs, --teacher-checkpoint or --teacher-pretrained")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as error:
        sys.exit(f"distill: {error}")
