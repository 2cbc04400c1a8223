r"""Prune a network and refit it in closed form; optionally fine-tune it to its original, with or without labels.

    pip install -e ".[demo]"
    accelerate launch recipes/prune.py                          # real digits, under three minutes on two CPU cores
    accelerate launch recipes/prune.py --dataset torch/cifar10 --data-dir data --image-size 32 --model resnet18 \
        --model-checkpoint FILE --macs 0.4 --steps 3 --tune-steps 200 --epochs 5 --padding 4 --flip \
        --batch-size 256 --output output/cifar10

The network is timm's, by name or weight file, or of transformers, hf:OWNER/NAME or hf:FOLDER; the dataset is any that
timm reads. Only --epochs and the table use labels. With --steps, pruning and fine-tuning alternate. A run that was
killed is resumed by the same command; a finished run prints its table.

Writes log.jsonl, summary.json and a folder per stage; `knowiso_train.load_pruned("pruned")` loads the last network.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import knowiso_train as ki
from knowiso_train.distillation import kd_loss
from knowiso_train.errors import OptionError
from knowiso_train.experiment import (
    RecipeParser,
    ResumableTraining,
    RunFolder,
    at_least,
    build_network,
    check_published_classifier,
    compare_networks,
    comparison_table,
    describe_run,
    launch_accelerator,
    load_datasets,
    loader_options,
    network_card,
    run_settings,
    sgd_with_schedule,
    timm_options,
    training_options,
)
from knowiso_train.features import resolve_layers, stage_grids
from knowiso_train.loading import input_transform, load_checkpoint, training_loader
from knowiso_train.loading.hub import is_hub_name
from knowiso_train.pruning import compose_kept_indices, cutmix, load_kept_indices

Data = tuple[Any, Any, int]  # calibration and test images: (float image in [0, 1], label); number of classes
BUDGETS = ("macs", "params", "latency")
WARMUP_FRACTION = 0.05  # of the updates of a training with labels


@dataclass(frozen=True)
class Run:
    """Arguments, data, original network and accelerator of a run."""

    args: argparse.Namespace
    data: Data
    original: nn.Module
    accelerator: Accelerator

    @property
    def from_hub(self) -> bool:
        """True if the original is a network of transformers."""
        return is_hub_name(self.args.model[0])

    def folder(self, name: str) -> RunFolder:
        """Return the folder of a stage."""
        return RunFolder(self.args.output / name, writes=self.accelerator.is_main_process)

    def load(self, stage: str) -> nn.Module:
        """Load the network of a stage on the CPU; the original stays on its device."""
        if stage == "original":
            return self.original
        fresh = build_network(self.args.model, num_classes=self.data[2]) if self.from_hub else None
        return ki.load_pruned(self.args.output / stage, model=fresh)

    def save(self, stage: str, network: nn.Module, kept: Any) -> None:
        """Save a pruned network with the timm factory of its original, if it has one."""
        factory = "external" if self.from_hub else (self.args.model[0], timm_options(self.args.model, self.data[2]))
        options = {"kept": kept, "factory": factory, "example": (1, *self.data[0][0][0].shape)}
        ki.save_pruned(self.args.output / stage, network, self.original, **options)


def main(words: list[str] | None = None) -> int:
    """Run all stages, and print their table."""
    args = parse_arguments(words)
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision)
    data = load_datasets(args)
    original = build(data, args)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    output.check_settings(run_settings(args))
    run = Run(args, data, original, accelerator)
    train_original(run)

    stages = ["original"]
    for step in range(1, args.steps + 1):
        stages += prune_step(run, step, stages[-1])
    if accelerator.is_main_process and output.read_json("summary.json") is None:
        run.save("pruned", run.load(stages[-1]), load_kept_indices(args.output / stages[-1]))
        networks = {stage: run.load(stage).to(accelerator.device) for stage in stages}
        to_input = input_transform(original, size="image").to(accelerator.device)
        options = {"batch_size": args.batch_size, "workers": args.workers, "progress": partial(tqdm, desc="test")}
        cards = compare_networks(networks, data[1], to_input=to_input, **options)
        cards = [card | (run.folder(card["name"]).read_json("card.json") or {}) for card in cards]
        output.write_json("summary.json", {**describe_run(args), "stages": cards})
    if accelerator.is_main_process:
        print(f"\n{comparison_table((output.read_json('summary.json') or {})['stages'])}\n")
        print(f"latency: 32 images. Written: {args.output}/pruned, summary.json, log.jsonl, and all stages")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def build(data: Data, args: argparse.Namespace) -> nn.Module:
    """Build the network, and check the options that concern it before hours of work."""
    weights = {"checkpoint": args.model_checkpoint, "pretrained": args.model_pretrained}
    shape = data[0][0][0].shape
    original = build_network(args.model, num_classes=data[2], seed=args.seed, input_size=shape, **weights)
    if args.model_pretrained and args.model_checkpoint is None:
        cure = "Train the network on these images, and pass it as --model-checkpoint"
        check_published_classifier(original, args.model[0], data[2], cure)
    if args.ignored:
        resolve_layers(original, args.ignored)
    num_images = min(args.images, len(data[0]))
    # An eighth of the images validates the fine-tuning
    if args.tune_steps and num_images - round(num_images / 8) < args.batch_size:
        raise OptionError(
            f"{num_images} images, an eighth of them held out, make no batch of {args.batch_size} to tune with; "
            "use more --images, or a smaller --batch-size"
        )
    return original


def train_original(run: Run) -> None:
    """Train the original with labels if it has no weights."""
    args, original = run.args, run.original
    if not (args.model_checkpoint or args.model_pretrained):
        folder = run.folder("original")
        if train(run, "original", original, None, args.model_epochs, args.model_lr):
            name, options = args.model[0], timm_options(args.model, run.data[2])
            card = network_card(original, name, options, run.data[0][0][0].shape)
            folder.write_network("original", original, card)
        finish_training(run, "original")
        load_checkpoint(original, folder.path / "original.safetensors")
    original.eval().requires_grad_(True).to(run.accelerator.device)


def prune_step(run: Run, step: int, stage: str) -> list[str]:
    """Prune the network of a stage, fine-tune it without and with labels, and return the names of the new stages.

    Each stage is saved and loaded again, so that a resumed run continues with the same network.
    """
    args, images = run.args, run.data[0]
    generator = torch.Generator().manual_seed(args.seed)
    images = Subset(images, torch.randperm(len(images), generator=generator)[: args.images].tolist())
    to_input = input_transform(run.original, size="image")
    # The calibration loader drops the labels
    loader = DataLoader(
        images, args.batch_size, collate_fn=lambda items: to_input(torch.stack([image for image, _ in items]))
    )
    names = []
    for name, function in [("pruned", prune_stage), ("tuned", tune_stage)][: 2 if args.tune_steps else 1]:
        folder = run.folder(f"{step}-{name}")
        if run.accelerator.is_main_process and folder.read_json("card.json") is None:
            start = time.monotonic()
            report = function(run, stage, folder.path.name, run.load(stage).to(run.accelerator.device), loader)
            print(f"\n{folder.path.name}\n{report}\n")
            report.to_json(folder.path / "report.json")
            folder.write_json("card.json", {"stage": folder.path.name, "seconds": time.monotonic() - start})
        run.accelerator.wait_for_everyone()  # for the stage of the main process
        names.append(stage := folder.path.name)
    if args.epochs:
        network, kept = run.load(stage), load_kept_indices(args.output / stage)
        names.append(stage := f"{step}-trained")
        if train(run, stage, network, run.original, args.epochs, args.lr) and run.accelerator.is_main_process:
            run.save(stage, network.cpu(), kept)
        finish_training(run, stage)
    return names


def prune_stage(run: Run, stage: str, new_stage: str, network: nn.Module, loader: Any) -> Any:
    """Prune to the budget of one step, save the network, and return the report."""
    args = run.args
    # Equal factors, whose product over the steps is the budget
    budget = {name: value ** (1 / args.steps) for name in BUDGETS if (value := getattr(args, name)) is not None}
    options = {name: getattr(args, name) for name in ("ignored", "round_to", "block_steps", "seed")}
    options |= {"min_width": args.min_width ** (1 / args.steps), "max_images": args.images}
    result = ki.prune(network, loader, **(budget or {"macs": 0.5 ** (1 / args.steps)}), **options)
    earlier = {} if stage == "original" else load_kept_indices(args.output / stage)
    kept = None if earlier is None else compose_kept_indices(earlier, result.kept, run.original)
    run.save(new_stage, result.model, kept)
    return result.report


def tune_stage(run: Run, stage: str, new_stage: str, network: nn.Module, loader: Any) -> Any:
    """Fine-tune without labels to the features of the original, save the network, and return the report."""
    args, transform = run.args, partial(cutmix, flip=run.args.flip)
    options = {"steps": args.tune_steps, "lr": args.tune_lr, "batch_size": args.batch_size, "seed": args.seed}
    report = ki.finetune(network, run.original, loader, max_images=args.images, transform=transform, **options)
    run.save(new_stage, network, load_kept_indices(args.output / stage))
    return report


def train(run: Run, stage: str, network: nn.Module, teacher: Any, epochs: int, lr: float) -> bool:
    """Train in place with labels and, for a pruned network, with the features and logits of the original.

    Returns:
        False if this training had been finished before.
    """
    args, data = run.args, run.data
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision)  # saves and loads its own objects
    folder, output = run.folder(stage), run.folder("")
    if folder.read_json("card.json") is not None:
        return False
    network.to(accelerator.device)
    to_input = input_transform(teacher or network, size="image").to(accelerator.device)
    loader: Any = training_loader(data[0], **loader_options(args))
    sampler, total = loader.sampler, epochs * len(loader)
    iso = None
    if teacher is not None:
        example = to_input(data[0][0][0][None].to(accelerator.device))
        layers = list(stage_grids(teacher, lambda: teacher(example)))
        options = {"scale": "linear", "weight": 1.0, "schedule": None}
        iso = ki.IsomorphismLoss(network, teacher, layers, example=example, **options)
        iso.to(accelerator.device)
    optimizer, scheduler = sgd_with_schedule(
        network.parameters(), lr=lr, weight_decay=args.weight_decay, warmup=int(WARMUP_FRACTION * total), total=total
    )
    model, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(*([iso] if iso else []))
    training = ResumableTraining(accelerator, folder, output, {"stage": stage}, total=total, **training_options(args))
    model.train()
    with training, iso or nullcontext():
        for images, labels in training.batches(loader, sampler):
            logits = model(to_input.applied(images))
            losses = {"cross_entropy": F.cross_entropy(logits, labels)}
            if iso:
                losses["isomorphism"] = args.iso_weight * iso()  # runs the original
                losses["kd"] = args.kd_weight * kd_loss(logits, iso.teacher_output, args.temperature)
            accelerator.backward(sum(losses.values()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            training.advance(losses)
            training.save_if_due()
    # Other stages run without the autocast that prepare has put around the forward
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    folder.write_json("trained.json", {"stage": stage, "seconds": training.seconds})
    return True


def finish_training(run: Run, stage: str) -> None:
    """Write the card of a stage whose network is saved, and delete its checkpoints."""
    folder = run.folder(stage)
    folder.write_json("card.json", folder.read_json("trained.json") or {})
    run.accelerator.wait_for_everyone()
    folder.delete_checkpoints()


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line; every default is explained in --help."""
    parser = RecipeParser(__doc__)
    add = parser.add
    add("--output", Path("output/prune"), Path, "folder of the run")
    parser.add_data(["train", "validation"], "to prune and train with, and to test on", digits="2,000 + 3,000 of MNIST")
    default = ["resnet10t", "channels=(32,64,128,256)"]
    add("--model", default, str, "name in timm, and KEY=VALUE options; hf:OWNER/NAME or hf:FOLDER", nargs="+")
    add("--model-checkpoint", None, Path, "weight file; such a network is not trained before pruning")
    add("--model-pretrained", False, help="load the published weights; also not trained")
    add("--model-epochs", 6, at_least(0), "epochs to train a network without weights; enough for digits")
    add("--model-lr", 0.05, at_least(0, float), "peak learning rate of that training; 0.05 suits 64 images a batch")
    add("--macs", None, at_least(0, float), "fraction of the multiply-adds to keep; 0.5 without another budget")
    add("--params", None, at_least(0, float), "fraction of the parameters to keep, instead of --macs")
    add("--latency", None, at_least(0, float), "fraction of the measured latency to keep, instead of --macs")
    add("--steps", 1, at_least(1), "steps of equal factors; 1 is best without training, 3 with training in between")
    add("--images", 1024, at_least(1), "unlabeled images to prune and tune with; more have little effect")
    add("--ignored", [], str, "layers whose width is kept", nargs="*")
    add("--min-width", 0.125, at_least(0, float), "smallest fraction of a width to keep")
    add("--round-to", 1, at_least(1), "multiple of the widths; 8 is faster on most devices at slightly lower accuracy")
    add("--block-steps", 0, at_least(0), "updates of each block to the original's outputs in pruning; 60 are enough")
    add("--tune-steps", 0, at_least(0), "updates to the original's features after each step; 200 gain much accuracy")
    add("--tune-lr", 1e-2, at_least(0, float), "peak step size of these updates, relative to the norm of a weight")
    add("--epochs", 0, at_least(0), "epochs of training with labels after each step")
    add("--lr", 0.01, at_least(0, float), "peak learning rate of that training; a fifth of --model-lr")
    add("--iso-weight", 1.0, at_least(0, float), "weight of the isomorphism loss at the original's stages")
    add("--kd-weight", 1.0, at_least(0, float), "weight of the loss to the original's logits")
    add("--temperature", 4.0, at_least(0.01, float), "temperature of these logits; 4 as in most of the literature")
    parser.add_training(padding=2, save_every=200)
    args = parser.parse_args(words)
    budgets = {name: value for name in BUDGETS if (value := getattr(args, name)) is not None}
    if len(budgets) > 1 or not all(0 < value < 1 for value in budgets.values()):
        listed = ", ".join(f"--{name} {value:g}" for name, value in budgets.items())
        parser.error(f"expected one budget, a fraction between 0 and 1: got {listed}")
    if not (args.model_checkpoint or args.model_pretrained or args.model_epochs):
        parser.error("a network needs weights: --model-checkpoint, --model-pretrained or --model-epochs")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as error:
        sys.exit(f"prune: {error}")
