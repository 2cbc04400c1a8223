"""ResNet-8 networks trained on CIFAR-10 with stated seeds, data and label noise, kept in `.cache/small_networks`.

They are trained with labels alone or distilled: from ResNet-56 with published weights, or generation by generation
(born-again networks, Furlanello et al., ICML 2018). Two networks with equal settings are equal to the bit on one
machine. Trained in bfloat16 autocast: 35 seconds on one CPU core with matrix units for 600 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.baselines.distillation.hints import FitNet
from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import CifarResNet, cifar_resnet
from knowiso_train import FeatureTaps, IsomorphismLoss
from knowiso_train.distillation import kd_loss

CACHE_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "small_networks"
BATCH_IMAGES, PEAK_LEARNING_RATE, WARMUP_STEPS, PADDING_PIXELS = 64, 0.1, 30, 4
Method = Literal["", "kd", "fitnet", "isomorphism"]
LAYERS, WIDTHS = ("layer1", "layer2", "layer3"), (16, 32, 64)
TEACHER_DEPTH = 56
FITNET_WEIGHT = 100.0  # as published; see `FitNet`
GENERATION_SEEDS = 1000  # distance between the seeds of two generations


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
        method: Term beside the cross-entropy, with ResNet-56 as the teacher: "kd" of weight 1, "fitnet" of its
            published weight, or "isomorphism", `IsomorphismLoss` with its defaults. "": none.
        generation: Generations before this network. Each is distilled by KD from the one before; the first is not
            distilled.
    """

    seed: int = 0
    order_seed: int | None = None
    first_image: int = 0
    num_images: int = 6000
    label_noise: float = 0.0
    num_steps: int = 600
    num_checkpoints: int = 1
    depth: int = 8
    method: Method = ""
    generation: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        values = dataclasses.asdict(self)
        for name in ("method", "generation"):  # Folders of networks without a teacher do not name them
            values = values if values[name] else {key: value for key, value in values.items() if key != name}
        return CACHE_FOLDER / "_".join(f"{key}={value}" for key, value in values.items())

    @property
    def files(self) -> list[Path]:
        """Files of the checkpoints."""
        return [self.folder / f"step{step}.safetensors" for step in self.checkpoint_steps]

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
    train_networks([training], images, labels)
    network = CifarResNet(training.depth)
    network.load_state_dict(load_file(training.files[checkpoint]))
    return network.eval()


def train_networks(trainings: Sequence[Training], images: Tensor, labels: Tensor) -> None:
    """Train the networks that are not in the cache, side by side; a teacher runs once for equal batches.

    Args:
        trainings: Settings of the runs, with equal numbers of steps.
        images: Normalized CIFAR-10 training images, (N, 3, 32, 32).
        labels: Labels, (N,).
    """
    missing = [training for training in trainings if not all(file.exists() for file in training.files)]
    published, runs = Teacher(cifar_resnet(TEACHER_DEPTH)) if any(t.method for t in missing) else None, []
    for training in missing:
        training.folder.mkdir(parents=True, exist_ok=True)
        teacher = published if training.method else None
        if training.generation:
            before = replace(training, generation=training.generation - 1)
            teacher = Teacher(trained_network(before, images, labels))
        runs.append(_train(training, images, labels, teacher))
    for states in zip(*runs, strict=True):
        for training, (step, model) in zip(missing, states, strict=True):
            if step in training.checkpoint_steps:
                file = training.folder / f"step{step}.safetensors"
                save_file(model.state_dict(), file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)


class Teacher:
    """Logits and features of a network for the last batch, which all its students share."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.taps = network, FeatureTaps(network, list(LAYERS))
        self.images, self.logits = torch.empty(0), torch.empty(0)
        self.features: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, images: Tensor) -> None:
        """Compute the outputs for images in bfloat16 autocast, unless they are those of the last batch."""
        if not torch.equal(images, self.images):
            with self.taps, torch.autocast("cpu", torch.bfloat16):
                self.logits, self.images = self.network(images), images
                self.features = self.taps.collect()


class Distillation:
    """Term beside the cross-entropy of a student.

    Args:
        method: Name of the term, as for `Training`.
        student: Network in training.
        teacher: Its teacher.
    """

    def __init__(self, method: str, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher
        self.iso = IsomorphismLoss(student, teacher.network, LAYERS) if method == "isomorphism" else None
        self.fitnet = FitNet(WIDTHS, WIDTHS) if method == "fitnet" else None
        self.taps = FeatureTaps(student, list(LAYERS))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Register the hooks at the student that the term needs."""
        with self.iso or nullcontext(), self.taps if self.fitnet else nullcontext():
            yield

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained with the student."""
        return list(self.fitnet.parameters()) if self.fitnet else []

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return the term for a batch, after the student's forward."""
        self.teacher.run(images)
        if self.iso is not None:
            loss: Tensor = self.iso(teacher_features=self.teacher.features)
        elif self.fitnet is not None:
            student = self.taps.collect()
            pairs = ([features[layer] for layer in LAYERS] for features in (student, self.teacher.features))
            loss = FITNET_WEIGHT * self.fitnet(*pairs)
        else:
            loss = kd_loss(logits, self.teacher.logits)
        return loss


@torch.no_grad()
def accuracy(network: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    predictions = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return 100 * float((predictions == labels).double().mean())


def _train(
    training: Training, images: Tensor, labels: Tensor, teacher: Teacher | None
) -> Iterator[tuple[int, CifarResNet]]:
    """Train a network, and yield the number of steps and the network after every step."""
    seed = training.seed + GENERATION_SEEDS * training.generation
    torch.manual_seed(seed)
    model = CifarResNet(training.depth)
    generator = torch.Generator().manual_seed(seed if training.order_seed is None else training.order_seed)
    subset = slice(training.first_image, training.first_image + training.num_images)
    padded, labels = F.pad(images[subset], (PADDING_PIXELS,) * 4), labels[subset].clone()
    is_noisy = torch.rand(len(labels), generator=generator) < training.label_noise
    labels[is_noisy] = torch.randint(10, (int(is_noisy.sum()),), generator=generator)
    term = None if teacher is None else Distillation(training.method, model, teacher)
    parameters = [*model.parameters(), *(term.parameters() if term else [])]
    optimizer = torch.optim.SGD(parameters, PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    step = 0
    with term.attached() if term else nullcontext():
        while True:
            for batch in torch.randperm(len(labels), generator=generator).split(BATCH_IMAGES):
                warmup, progress = min(1.0, (step + 1) / WARMUP_STEPS), step / training.num_steps
                optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warmup * (1 + math.cos(math.pi * progress)) / 2
                crops = random_crops_and_flips(padded[batch], images.shape[-1], generator)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model.train()(crops)
                    loss = F.cross_entropy(logits.float(), labels[batch])
                    loss = loss if term is None else loss + term.loss(crops, logits)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                yield step, model
                if step == training.num_steps:
                    return
