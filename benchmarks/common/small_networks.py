"""ResNet-8 networks trained on CIFAR-10 with stated seeds, data and label noise, kept in `.cache/small_networks`.

Two networks with equal settings are equal to the bit on one machine. Trained in bfloat16 autocast: 30 seconds on one
CPU core with matrix units for 600 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import CifarResNet

CACHE_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "small_networks"
BATCH_IMAGES, PEAK_LEARNING_RATE, WARMUP_STEPS, PADDING_PIXELS = 64, 0.1, 30, 4


@dataclass(frozen=True)
class Training:
    """Settings of one training run.

    Attributes:
        seed: Seed of the initial weights.
        order_seed: Seed of batches, augmentation and noise. None: `seed`.
        first_image: First of the training images.
        num_images: Number of training images.
        label_noise: Fraction of the labels that are replaced by random ones.
        num_steps: Number of optimizer steps.
        num_checkpoints: Number of saved checkpoints, at equal distances; the last one is the trained network.
        depth: Depth of the ResNet, 6n + 2.
    """

    seed: int = 0
    order_seed: int | None = None
    first_image: int = 0
    num_images: int = 6000
    label_noise: float = 0.0
    num_steps: int = 600
    num_checkpoints: int = 1
    depth: int = 8

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        return CACHE_FOLDER / "_".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps after which a checkpoint is saved."""
        return [round(self.num_steps * (i + 1) / self.num_checkpoints) for i in range(self.num_checkpoints)]


def trained_network(training: Training, images: Tensor, labels: Tensor, checkpoint: int = -1) -> CifarResNet:
    """Return a trained network in eval mode; train it if its checkpoints are not in the cache.

    Args:
        training: Settings of the run.
        images: Normalized CIFAR-10 training images, (N, 3, 32, 32).
        labels: Labels, (N,).
        checkpoint: Index of the checkpoint. -1: the last one.
    """
    files = [training.folder / f"step{step}.safetensors" for step in training.checkpoint_steps]
    if not all(file.exists() for file in files):
        training.folder.mkdir(parents=True, exist_ok=True)
        model = CifarResNet(training.depth)
        for step in _train(model, training, images, labels):
            if step in training.checkpoint_steps:
                file = training.folder / f"step{step}.safetensors"
                save_file(model.state_dict(), file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
    network = CifarResNet(training.depth)
    network.load_state_dict(load_file(files[checkpoint]))
    return network.eval()


@torch.no_grad()
def accuracy(network: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    predictions = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return 100 * float((predictions == labels).double().mean())


def _train(model: CifarResNet, training: Training, images: Tensor, labels: Tensor) -> Iterator[int]:
    """Train a network, and yield the number of steps after every step."""
    torch.manual_seed(training.seed)
    model.load_state_dict(CifarResNet(training.depth).state_dict())
    generator = torch.Generator().manual_seed(training.seed if training.order_seed is None else training.order_seed)
    subset = slice(training.first_image, training.first_image + training.num_images)
    padded, labels = F.pad(images[subset], (PADDING_PIXELS,) * 4), labels[subset].clone()
    is_noisy = torch.rand(len(labels), generator=generator) < training.label_noise
    labels[is_noisy] = torch.randint(10, (int(is_noisy.sum()),), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    step = 0
    while True:
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH_IMAGES):
            warmup, progress = min(1.0, (step + 1) / WARMUP_STEPS), step / training.num_steps
            optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warmup * (1 + math.cos(math.pi * progress)) / 2
            crops = random_crops_and_flips(padded[batch], images.shape[-1], generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.train()(crops)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()
            step += 1
            yield step
            if step == training.num_steps:
                return
