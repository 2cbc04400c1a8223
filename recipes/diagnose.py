r"""Find what strong networks represent and a weak one cannot reproduce, and which of its features none confirms.

    pip install -e ".[demo]"
    accelerate launch recipes/diagnose.py     # EfficientNet-Lite0 beside Lite1 on real digits, a few minutes of CPU
    accelerate launch recipes/diagnose.py --weak resnet18 --strong resnet50 resnet101 --layers layer3 layer4 \
        --dataset FOLDER --split validation --image-size 224 --labels --output output/resnets

1. Each layer pair is diagnosed beside all strong networks (`knowiso_train.diagnose`), and saved in OUTPUT/layers.
2. The results of all layer pairs are joined into one page, one picture and one JSON file.

A run that was killed is resumed by the same command: finished layer pairs are read from their files. Writes
diagnosis.html (opens in a browser without a network), diagnosis.json, diagnosis.png and settings.json.
`knowiso report OUTPUT/diagnosis.json` shows the result again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.diagnosis import Diagnosis
from knowiso_train.errors import OptionError
from knowiso_train.experiment import (
    Processes,
    RecipeParser,
    RunFolder,
    architecture_name,
    at_least,
    build_checkpoint,
    demo_digits,
    parse_key_value,
    run_settings,
)
from knowiso_train.experiment.arguments import image_side
from knowiso_train.experiment.processes import main_process_first
from knowiso_train.features import LayerPair, pair_layers
from knowiso_train.loading import image_loader, input_transform
from knowiso_train.loading.datasets import class_names

# Of EfficientNet-Lite: the ends of an early, a middle and a late stage; `knowiso layers MODEL` lists all layers
DEMO_LAYERS = ["blocks.2", "blocks.4", "blocks.6"]
DIGIT_CLASSES = tuple(map(str, range(10)))


def main(words: list[str] | None = None) -> int:
    """Diagnose each layer pair that is not finished, and write the joint result."""
    args = parse_arguments(words)
    with Processes(args.device) as processes:
        output = RunFolder(args.output, writes=processes.is_main)
        output.check_settings(run_settings(args), may_differ=("layers", "device"))  # further layer pairs may join
        names = [args.weak, *args.strong]
        networks = [build_checkpoint(name, seed=args.seed).to(processes.device) for name in names]
        loader, classes = load_images(args)
        pairs = common_pairs(networks, args.layers)
        files = {pair: args.output / "layers" / f"{pair.source}={pair.target}.json" for pair in pairs}
        # Listed by each process before the first common pass, so that all diagnose the same layer pairs
        unfinished = [pair for pair, file in files.items() if not file.is_file()]
        for pair in unfinished:
            if processes.is_main:
                print(f"{pair.source} → {pair.target}, {unfinished.index(pair) + 1} of {len(unfinished)}", flush=True)
            diagnosis = diagnose_pair(pair, networks, loader, classes, args, show=processes.is_main)
            if processes.is_main:
                diagnosis.to_json(files[pair])
        if processes.is_main:
            diagnosis = join([Diagnosis.from_json(file) for file in files.values()])
            print(f"\n{diagnosis}\n")
            diagnosis.to_json(args.output / "diagnosis.json")
            diagnosis.to_html(args.output / "diagnosis.html")
            diagnosis.plot(args.output / "diagnosis.png")
            print(f"written: {args.output}/diagnosis.html, diagnosis.json, diagnosis.png")
    return 0


def diagnose_pair(
    pair: LayerPair,
    networks: list[nn.Module],
    loader: DataLoader[Any],
    classes: tuple[str, ...],
    args: argparse.Namespace,
    *,
    show: bool,
) -> Diagnosis:
    """Diagnose one layer of the weak network beside that of all strong ones."""
    # From images in [0, 1] to the normalization of each network
    transforms = [input_transform(network, size=args.image_size) for network in networks]
    return ki.diagnose(
        networks[0],
        networks[1:],
        loader,
        [(pair.source, pair.target)],
        order=args.order,
        kernel_size=args.kernel_size,
        num_directions=args.directions,
        num_images=args.ranked_images,
        num_thumbnails=args.thumbnails,
        labels="auto" if args.labels else None,
        groups="auto",
        class_names=classes,
        to_image=lambda images: images,  # already in [0, 1]
        max_images=args.max_images,
        seed=args.seed,
        weak_transform=transforms[0],
        strong_transform=transforms[1:],
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.autocast),
        names=[network_label(name) for name in (args.weak, *args.strong)],
        progress=show,
    )


def common_pairs(networks: list[nn.Module], layers: list[str]) -> list[LayerPair]:
    """Return the layer pairs, which all strong networks must have."""
    words = [tuple(word.split("=")) if "=" in word else (word, word) for word in layers]
    if any(len(word) != 2 or not all(word) for word in words):
        raise OptionError(f"expected names, globs or WEAK=STRONG pairs in --layers, got {' '.join(layers)}")
    pairs = [pair_layers(networks[0], strong, words) for strong in networks[1:]]  # type: ignore[arg-type]
    if any(other != pairs[0] for other in pairs):
        raise OptionError(f"the strong networks have different layers for {' '.join(layers)}; name layers of all")
    return pairs[0]


def join(parts: list[Diagnosis]) -> Diagnosis:
    """Return one diagnosis with the results and pictures of all parts."""
    pictures = {picture.index: picture for part in parts for picture in part.thumbnails}
    return replace(
        parts[0],
        layers=tuple(layer for part in parts for layer in part),
        thumbnails=tuple(pictures[index] for index in sorted(pictures)),
        seconds=sum(part.seconds for part in parts),
    )


def load_images(args: argparse.Namespace) -> tuple[DataLoader[Any], tuple[str, ...]]:
    """Load images in [0, 1] with labels, and the names of the classes."""
    if args.dataset == "digits":
        images, labels = demo_digits()
        # The digits are sorted by class: spread evenly
        index = torch.linspace(0, len(images) - 1, min(args.max_images or len(images), len(images))).round().long()
        return DataLoader(TensorDataset(images[index], labels[index]), batch_size=args.batch_size), DIGIT_CLASSES
    with main_process_first():  # it may download
        loader = image_loader(
            args.dataset,
            split=args.split,
            image_size=args.image_size,
            batch_size=args.batch_size,
            workers=args.workers,
            root=args.data_dir,
            **dict(args.data_options),
        )
    return loader, class_names(loader.dataset)


def network_label(name: str) -> str:
    """Return the architecture of a network, with the name of its weight file."""
    file = name.partition("=")[2]
    return f"{architecture_name(name)} ({Path(file).stem})" if file else architecture_name(name)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line; every default is explained in --help."""
    parser = RecipeParser(__doc__)
    add = parser.add
    forms = "name in timm, NAME=FILE, or lite0, lite1, lite2 (demo packages)"
    add("--output", Path("output/diagnose"), Path, "folder of the run")
    add("--weak", "lite0", str, f"network to diagnose: {forms}")
    add("--strong", ["lite1"], str, "networks to compare with, one or several, in the same forms", nargs="+")
    add("--layers", DEMO_LAYERS, str, "names or globs, or WEAK=STRONG pairs; those of the demo's networks", nargs="+")
    add("--dataset", "digits", str, "folder, hfds/NAME or torch/NAME; digits: 5,000 of MNIST")
    add("--split", None, str, "split; none: a folder whole, else the first held-out split")
    add("--data-dir", None, Path, "folder of torch/NAME datasets")
    add("--data-options", [], parse_key_value, "KEY=VALUE for timm.data.create_dataset: download=True", nargs="*")
    add("--image-size", 96, image_side, "side of the images in pixels; 224 suits photographs")
    add("--max-images", 1_000, at_least(1), "images to read; a fifth of them is examined")
    add("--labels", False, help="also report top-1, for labels that are the networks' classes; not for digits")
    add("--batch-size", 50, at_least(2), "images per batch and process")
    add("--workers", 0, at_least(0), "processes that read images; 0 suits images in memory")
    add("--order", 0, at_least(0), "highest number of non-linear steps; 0: linear maps, which take seconds")
    add("--kernel-size", 1, at_least(1), "neighborhood of the maps, 1 or 3")
    add("--directions", 6, at_least(0), "directions of each residual; the rest of a network runs once for each")
    add("--ranked-images", 8, at_least(0), "images per direction and ranking")
    add("--thumbnails", 256, at_least(0), "pictures per layer pair at most, which make the files large")
    add("--seed", 0, at_least(0), "seed of the split of the images, and of new classifiers")
    add("--device", None, str, "device; none: that of accelerate")
    add("--autocast", None, str, "precision of the networks, not of the statistics", choices=("bf16", "fp16"))
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as error:
        sys.exit(f"diagnose: {error}")
