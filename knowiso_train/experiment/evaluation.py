"""Accuracy of networks, and their comparison by size and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from knowiso_train.errors import OptionError
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.pruning.allocation import count_macs
from knowiso_train.pruning.api import TIMED_IMAGES, measure_latency
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.utils.batch import get_inputs
from knowiso_train.utils.text_table import format_table

LATENCY_ROUNDS = 3  # of the latency


@torch.no_grad()
def top1_accuracy(
    model: nn.Module,
    images: Any,
    accelerator: Any,
    *,
    to_input: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> float:
    """Share of images whose label is the network's first guess, in percent. Every process calls it; nothing is padded, no image counts twice.

    Args:
        model: the network, on the accelerator's device; its mode is as before afterwards.
        images: map-style dataset of (float image (C, H, W), integer label).
        accelerator: accelerate's.
        to_input: from the dataset's images to the network's inputs.
        batch_size: images a batch, in each process.
        workers: processes that read.

    Example:
        >>> from accelerate import Accelerator
        >>> images = [(torch.eye(4)[i].view(4, 1, 1), 0) for i in range(4)]  # the network repeats the image: one of four is of class 0
        >>> top1_accuracy(nn.Flatten(), images, Accelerator(cpu=True))
        25.0
    """
    mine = Subset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    right = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    training = model.training
    model.eval()
    try:
        for batch, labels in DataLoader(mine, batch_size, num_workers=workers):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                guess = model(batch if to_input is None else to_input(batch)).argmax(1)
            right += (guess == labels.to(accelerator.device)).sum()
    finally:
        model.train(training)
    return 100 * float(accelerator.reduce(right)) / len(images)


@torch.no_grad()
def compare_networks(
    networks: Mapping[str, nn.Module],
    images: Any,
    *,
    to_input: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> list[dict[str, Any]]:
    """A card for each network; the first one is what the others are compared with.

    Args:
        networks: classifiers by name, on one device; modes are as before afterwards.
        images: map-style dataset of (float image (C, H, W), integer label).
        to_input: from the dataset's images to the networks' inputs.
        batch_size: images a batch.
        workers: processes that read.
        progress: wraps the loader, such as `tqdm`.

    Returns:
        For each `name`, `top1` and `agreement` in percent, `macs` for one image, `parameters`, and `latency_ms` of up
        to 32 images: the least of
        three medians, the networks in turn, so that whatever else runs here slows all of them.

    Raises:
        OptionError: no networks, or no images.

    Example:
        >>> data = [(torch.eye(4)[i].view(4, 1, 1), 0) for i in range(4)]  # one of four is of class 0
        >>> card = compare_networks({"plain": nn.Flatten()}, data)[0]
        >>> card["top1"], card["agreement"]
        (25.0, 100.0)
    """
    if not networks or not len(images):
        raise OptionError(f"expected networks and images to compare, got {len(networks)} and {len(images)}")
    first = next(iter(networks))
    device = device_of(networks[first]) or torch.device("cpu")
    right, same = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0)
    loader = DataLoader(images, batch_size, num_workers=workers)

    def run(network: nn.Module, batch: Any) -> Any:
        seen = get_inputs(batch).to(device)
        return network(seen if to_input is None else to_input(seen))

    with preserve_state(*networks.values()):
        for batch, labels in progress(loader):
            guesses = {name: run(network, batch).argmax(1).cpu() for name, network in networks.items()}
            for name, guess in guesses.items():
                right[name] += int((guess == labels).sum())
                same[name] += int((guess == guesses[first]).sum())
        few = Calibration(loader, TIMED_IMAGES, device, run)
        times = [
            {name: measure_latency(network, few) for name, network in networks.items()} for _ in range(LATENCY_ROUNDS)
        ]
        one = few.first(1)
        macs = {name: count_macs(network, one, run) for name, network in networks.items()}
    return [
        {
            "name": name,
            "top1": 100 * right[name] / len(images),
            "agreement": 100 * same[name] / len(images),
            "macs": macs[name],
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "latency_ms": 1e3 * min(time[name] for time in times),
        }
        for name, network in networks.items()
    ]


def comparison_table(cards: Sequence[Mapping[str, Any]]) -> str:
    """One row for each network.

    Args:
        cards: from `compare_networks`; `seconds`, where a card has them, are what it took to make the network.

    Example:
        >>> small = {"name": "small", "top1": 91.0, "agreement": 95.5, "macs": 5e6, "parameters": 1200, "latency_ms": 2.5}
        >>> print(comparison_table([small]))
               top-1  agreement  multiply-adds  parameters  latency  seconds
        small  91.00 %    95.50 %          5.0 M       1,200   2.5 ms
    """
    rows = [["", "top-1", "agreement", "multiply-adds", "parameters", "latency", "seconds"]]
    for card in cards:
        size = [f"{card['macs'] / 1e6:,.1f} M", f"{card['parameters']:,}", f"{card['latency_ms']:.1f} ms"]
        seconds = "" if card.get("seconds") is None else f"{card['seconds']:.0f}"
        rows.append([card["name"], f"{card['top1']:.2f} %", f"{card['agreement']:.2f} %", *size, seconds])
    return format_table(rows)
