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

LATENCY_ROUNDS = 3  # measurements of each network, of which the fastest counts


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
    """Return the top-1 accuracy in percent; all processes must call it, and each image counts once.

    Args:
        model: Network on the accelerator's device; its mode is restored.
        images: Map-style dataset of (float image (C, H, W), integer label).
        accelerator: Accelerator of the launch.
        to_input: Transform from the dataset's images to the network's inputs. None: no transform.
        batch_size: Images per batch, in each process.
        workers: Processes that read images.

    Examples:
        >>> from accelerate import Accelerator
        >>> images = [(torch.eye(4)[i].view(4, 1, 1), 0) for i in range(4)]  # image i as logits: class i
        >>> top1_accuracy(nn.Flatten(), images, Accelerator(cpu=True))
        25.0
    """
    subset = Subset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    num_correct = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    training = model.training
    model.eval()
    try:
        for batch, labels in DataLoader(subset, batch_size, num_workers=workers):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                prediction = model(batch if to_input is None else to_input(batch)).argmax(1)
            num_correct += (prediction == labels.to(accelerator.device)).sum()
    finally:
        model.train(training)
    return 100 * float(accelerator.reduce(num_correct)) / len(images)


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
    """Compare classifiers with the first one in accuracy, size and latency.

    Args:
        networks: Classifiers by name, on one device; their modes are restored.
        images: Map-style dataset of (float image (C, H, W), integer label).
        to_input: Transform from the dataset's images to the networks' inputs. None: no transform.
        batch_size: Images per batch.
        workers: Processes that read images.
        progress: Function that wraps the loader, such as `tqdm`.

    Returns:
        One card per network: `name`, `top1` and `agreement` in percent, `macs` of one image, `parameters`, and
        `latency_ms` of up to 32 images, the smallest of three medians.

    Raises:
        OptionError: No networks, or no images.

    Examples:
        >>> data = [(torch.eye(4)[i].view(4, 1, 1), 0) for i in range(4)]  # image i as logits: class i
        >>> card = compare_networks({"plain": nn.Flatten()}, data)[0]
        >>> card["top1"], card["agreement"]
        (25.0, 100.0)
    """
    if not networks or not len(images):
        raise OptionError(f"expected networks and images to compare, got {len(networks)} and {len(images)}")
    first = next(iter(networks))
    device = device_of(networks[first]) or torch.device("cpu")
    num_correct, num_agreeing = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0)
    loader = DataLoader(images, batch_size, num_workers=workers)

    def run(network: nn.Module, batch: Any) -> Any:
        inputs = get_inputs(batch).to(device)
        return network(inputs if to_input is None else to_input(inputs))

    with preserve_state(*networks.values()):
        for batch, labels in progress(loader):
            predictions = {name: run(network, batch).argmax(1).cpu() for name, network in networks.items()}
            for name, prediction in predictions.items():
                num_correct[name] += int((prediction == labels).sum())
                num_agreeing[name] += int((prediction == predictions[first]).sum())
        sample_batch = Calibration(loader, TIMED_IMAGES, device, run)
        times = [
            {name: measure_latency(network, sample_batch) for name, network in networks.items()}
            for _ in range(LATENCY_ROUNDS)
        ]
        image = sample_batch.first(1)
        macs = {name: count_macs(network, image, run) for name, network in networks.items()}
    return [
        {
            "name": name,
            "top1": 100 * num_correct[name] / len(images),
            "agreement": 100 * num_agreeing[name] / len(images),
            "macs": macs[name],
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "latency_ms": 1e3 * min(time[name] for time in times),
        }
        for name, network in networks.items()
    ]


def comparison_table(cards: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of networks.

    Args:
        cards: Cards of `compare_networks`, optionally with `seconds`, the time to create the network.

    Examples:
        >>> card = {"name": "small", "top1": 91.0, "agreement": 95.5, "macs": 5e6, "parameters": 1200}
        >>> card["latency_ms"] = 2.5
        >>> print(comparison_table([card]))
               top-1  agreement  multiply-adds  parameters  latency  seconds
        small  91.00 %    95.50 %          5.0 M       1,200   2.5 ms
    """
    rows = [["", "top-1", "agreement", "multiply-adds", "parameters", "latency", "seconds"]]
    for card in cards:
        size = [f"{card['macs'] / 1e6:,.1f} M", f"{card['parameters']:,}", f"{card['latency_ms']:.1f} ms"]
        seconds = "" if card.get("seconds") is None else f"{card['seconds']:.0f}"
        rows.append([card["name"], f"{card['top1']:.2f} %", f"{card['agreement']:.2f} %", *size, seconds])
    return format_table(rows)
