r"""Refine a checkpoint with a few labels, unlabeled images and peer networks for the same kind of images.

    pip install -e ".[demo]"
    accelerate launch recipes/refine.py     # EfficientNet-Lite0, peer Lite1, real digits, five labels per class
    accelerate launch recipes/refine.py --dataset FOLDER --splits train validation test --image-size 224 --labels 10 \
        --model resnet18 --peers resnet34 resnet50 --steps 1000 --output output/clothes

1. Closed form (`knowiso_train.refine`): features that the peers reproduce, and a classifier on them.
2. With --steps, two fine-tunings of the whole network: to the consensus (the features that the peers reproduce, and the
   mean of all classifiers' logits), and to labels alone with as many images, which is better if pseudo-labels mislead.
3. The candidate with the highest validation accuracy is selected, the original included. Test images select nothing.

A run that was killed is resumed by the same command. Writes report.json, summary.json, log.jsonl, and
refined.safetensors: plain timm weights with a card that has the code to load them, without the peers.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import DataError
from knowiso_train.experiment import (
    RecipeParser,
    ResumableTraining,
    RunFolder,
    architecture_name,
    at_least,
    build_checkpoint,
    demo_digits,
    describe_run,
    launch_accelerator,
    loader_options,
    network_card,
    run_settings,
    top1_accuracy,
    training_options,
)
from knowiso_train.loading import (
    InputBridge,
    TrainingImages,
    input_transform,
    labeled_images,
    load_checkpoint,
    training_loader,
)
from knowiso_train.refinement import RefineFinetuneConfig, RefineTrainer, classifier_model


def main(words: list[str] | None = None) -> int:
    """Refine in closed form, fine-tune, and write the best network."""
    args = parse_arguments(words)
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    output.check_settings(run_settings(args))
    data, build = load_data(args), partial(build_checkpoint, seed=args.seed)
    labeled = draw_labeled(data.train, args)

    model, peers = build(args.model, data.classes), [build(name) for name in args.peers]
    closed_form = refine_closed_form(model, peers, labeled, data, args, output, accelerator)
    load_checkpoint(model, args.output / "closed.safetensors")
    results = {"closed form": closed_form}
    for objective in args.towards if args.steps else ():
        if objective == "consensus" and not closed_form["useful"]:
            accelerator.print("no peer explains enough of the network's features for the consensus; try other --peers")
            continue
        results[objective] = finetune(objective, model, peers, labeled, data, args)

    best = max(results, key=lambda name: results[name]["validation"])  # the first of equal ones
    if best != "closed form":
        load_checkpoint(model, args.output / best / "tuned.safetensors")
    image_shape = (3, args.image_size, args.image_size)
    card = network_card(model, architecture_name(args.model), {"num_classes": data.classes}, image_shape)
    output.write_network("refined", model, {**card, **results[best], "method": best})
    output.write_json("summary.json", {**describe_run(args), "chosen": best, "results": results})
    if accelerator.is_main_process:
        rows = [f"{name:12}  validation {r['validation']:.2f} %  test {r['test']:.2f} %" for name, r in results.items()]
        print("\n" + "\n".join(rows) + f"\n\nselected: {best}")
        print(f"written: {args.output}/refined.safetensors, refined.json, report.json, summary.json")
    accelerator.end_training()
    return 0


def refine_closed_form(
    model: nn.Module,
    peers: list[nn.Module],
    labeled: Subset[Any],
    data: SimpleNamespace,
    args: argparse.Namespace,
    output: RunFolder,
    accelerator: Accelerator,
) -> Any:
    """Refine in closed form in the main process, once per run, and return the card of the result."""
    if accelerator.is_main_process and output.read_json("closed.json") is None:
        transforms = [input_transform(network, size=args.image_size) for network in (model, *peers)]
        loader = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers)
        refined = ki.refine(
            model,
            peers,
            loader(data.train),
            labeled=loader(labeled),
            validation=loader(data.validation),
            test=loader(data.test),
            transform=transforms[0],
            peer_transforms=transforms[1:],
            names=[args.model, *args.peers],
            max_images=args.max_images,
            seed=args.seed,
            device=accelerator.device,
        )
        print(f"\n{refined.report}\n")
        refined.report.to_json(args.output / "report.json")
        row: Any = refined.report.row("after")
        card = {
            "validation": row.validation.accuracy,
            "test": row.test.accuracy,
            "chosen": refined.report.chosen,
            "useful": [i for i, peer in enumerate(refined.report.peers) if peer.useful],
        }
        classifiers = refined.peer_classifiers
        output.write_network("teachers", nn.ModuleList(classifiers.values()), {"of": list(classifiers)})
        output.write_network("closed", refined.model, card)
    accelerator.wait_for_everyone()
    return output.read_json("closed.json")


def finetune(
    objective: str, start: nn.Module, peers: list[nn.Module], labeled: Subset[Any], data: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune the closed form to the consensus or to the labels, or resume that, and return its card."""
    accelerator = launch_accelerator(args.batch_size, args.mixed_precision)  # saves and loads its own objects
    device, folder = accelerator.device, args.output / objective
    output, run = (RunFolder(path, writes=accelerator.is_main_process) for path in (args.output, folder))
    if (card := run.read_json("tuned.json")) is not None:
        return card
    network = build_checkpoint(args.model, data.classes, seed=args.seed)
    load_checkpoint(network, args.output / "closed.safetensors")
    network.to(device)
    to_input = input_transform(network, size=args.image_size).to(device)
    example = to_input(torch.stack([labeled[i][0] for i in range(2)]).to(device))
    trainer = build_trainer(objective, network, start.to(device), peers, to_input, example, accelerator, args)
    loader, sampler = None, None
    if trainer.consensus:
        loader = training_loader(data.train, **loader_options(args))
        sampler, loader = loader.sampler, accelerator.prepare(loader)
    accelerator.register_for_checkpointing(trainer)
    # Half a batch of labeled images beside a batch of unlabeled ones; with labels alone, as many images in total
    num_labeled = max(1, args.batch_size // 2 // accelerator.num_processes)
    num_labeled += 0 if trainer.consensus else args.batch_size // accelerator.num_processes
    augmented = TrainingImages(labeled, seed=args.seed, padding=args.padding, flip=args.flip)

    part = {"towards": objective}
    training = ResumableTraining(accelerator, run, output, part, total=args.steps, **training_options(args))
    with training, trainer:
        for batch in training.batches(loader, sampler):
            index = torch.randperm(len(labeled))[:num_labeled].tolist()
            # The augmentation is drawn by index: another one at every step
            items = [augmented[len(labeled) * training.step + i] for i in index]
            images = to_input.applied(torch.stack([image for image, _ in items]).to(device))
            labels = torch.tensor([label for _, label in items])
            losses = trainer.step(None if batch is None else to_input.applied(batch[0]), (images, labels))
            training.advance(losses, iso=trainer.consensus)
            training.save_if_due()

    options = {"to_input": to_input.applied, "batch_size": args.batch_size, "workers": args.workers}
    card = {
        name: top1_accuracy(network, getattr(data, name), accelerator, **options) for name in ("validation", "test")
    }
    run.write_network("tuned", network, card | {"seconds": training.seconds})
    accelerator.wait_for_everyone()
    run.delete_checkpoints()
    return card


def build_trainer(
    objective: str,
    student: nn.Module,
    teacher: nn.Module,
    peers: list[nn.Module],
    to_input: Any,
    example: Tensor,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> RefineTrainer:
    """Set up the training to the consensus of the useful peers, or to the labels alone."""
    device, with_peers = example.device, objective == "consensus"
    config = RefineFinetuneConfig(
        steps=args.steps,
        lr=args.lr,
        weight_decay=args.weight_decay,
        consensus_weight=args.weight if with_peers else 0.0,
        kd_weight=args.kd_weight if with_peers else 0.0,
        temperature=args.temperature,
        layers=args.layers or None,
        peer_layers=dict(zip(args.layers, args.peer_layers, strict=True)) if args.peer_layers else None,
    )
    models, classifiers = [], {}
    if config.uses_peers:
        useful = (RunFolder(args.output, writes=False).read_json("closed.json") or {})["useful"]
        weights = {name: tensor.to(device) for name, tensor in load_file(args.output / "teachers.safetensors").items()}
        for i, peer in enumerate(peers[j].to(device) for j in useful):
            bridge = InputBridge(to_input, input_transform(peer, size=args.image_size)).to(device)
            models.append(classifier_model(peer, f"peer {i}", transform=bridge))
            classifiers[i] = partial(F.linear, weight=weights[f"{i}.weight"], bias=weights[f"{i}.bias"])
    model = classifier_model(teacher.eval().requires_grad_(False), "network")
    return RefineTrainer(student, teacher, model, models, config, example, heads=classifiers, accelerator=accelerator)


def load_data(args: argparse.Namespace) -> SimpleNamespace:
    """Load training, validation and test images, neither augmented nor normalized, and the number of classes."""
    if args.dataset == "digits":
        images, labels = demo_digits()
        fold = torch.arange(len(labels)) % 10
        masks = {"train": fold < 4, "validation": fold == 4, "test": fold > 4}
        return SimpleNamespace(**{name: TensorDataset(images[m], labels[m]) for name, m in masks.items()}, classes=10)
    options = {"image_size": args.image_size, "root": args.data_dir, "classes": args.classes, **dict(args.data_options)}
    train, validation, classes = labeled_images(args.dataset, *args.splits[:2], **options)
    _, test, _ = labeled_images(args.dataset, args.splits[0], args.splits[2], **options)
    return SimpleNamespace(train=train, validation=validation, test=test, classes=classes)


def draw_labeled(train: Any, args: argparse.Namespace) -> Subset[Any]:
    """Draw --labels images of each class; the other images are used without their labels."""
    labels = torch.tensor([int(train[i][1]) for i in range(len(train))])
    generator = torch.Generator().manual_seed(args.seed)
    members = [(labels == c).nonzero().flatten() for c in labels.unique().tolist() if c >= 0]
    if not members:
        raise DataError("the training images have no labels; the refinement of a classifier needs a few")
    index = [m[torch.randperm(len(m), generator=generator)[: args.labels]] for m in members]
    return Subset(train, torch.cat(index).tolist())


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line; every default is explained in --help."""
    parser = RecipeParser(__doc__)
    add = parser.add
    add("--output", Path("output/refine"), Path, "folder of the run")
    names = "name in timm, NAME=FILE, hf:OWNER/NAME, hf:FOLDER, or lite0, lite1, lite2 (demo packages)"
    add("--model", "lite0", str, f"network to refine: {names}")
    add("--peers", ["lite1"], str, "networks for the same kind of images, in the same forms", nargs="+")
    use = "to train, to select and to test on"
    parser.add_data(["train", "validation", "test"], use, digits="2,000 + 500 + 2,500 of MNIST", image_size=64)
    add("--labels", 5, at_least(1), "images per class whose labels are used")
    add("--max-images", 20_000, at_least(1), "maximum number of unlabeled images for the closed form")
    add("--steps", 0, at_least(0), "updates of each fine-tuning after the closed form; 0: none")
    objectives = ("consensus", "labels")
    add("--towards", list(objectives), str, "objectives of the fine-tunings", nargs="+", choices=objectives)
    add("--layers", [], str, "layers matched to the peers in fine-tuning; none: the classifier's input", nargs="*")
    add("--peer-layers", [], str, "the peers' layers for these, if the names differ", nargs="*")
    add("--weight", 1.0, at_least(0, float), "weight of the consensus loss")
    add("--kd-weight", 1.0, at_least(0, float), "weight of the loss to the mean of all classifiers")
    add("--temperature", 2.0, at_least(0.01, float), "temperature of that loss")
    add("--lr", 0.003, at_least(0, float), "peak learning rate of SGD")
    parser.add_training(padding=0, weight_decay=1e-4, save_every=100)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as error:
        sys.exit(f"refine: {error}")
