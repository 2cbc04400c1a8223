"""Networks of bench_prune.py with their calibration and evaluation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.tp_importances import IMPORTANCES
from benchmarks.baselines.tp_pruner import MacCounter, inner_layers
from benchmarks.common.models import DATA, cifar10, cifar_resnet, efficientnet_lite

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench_prune"


class Task:
    """Network with calibration and evaluation images.

    Attributes:
        name: Name of the network.
        ratios: Factors by which multiply-adds are reduced.
        screened: Ratio of the screening.
        selection_part: Part of the evaluation images on which methods are selected.
        reported_part: Part of the evaluation images that is reported.
        afterwards: Names of the finetunings of `finetune.py` to run.
        batch: Batch size.
    """

    name: str
    ratios: tuple[float, ...]
    screened: float
    # "judged" is the name in the recorded results
    reported_part, selection_part = "judged", "judged"
    afterwards: tuple[str, ...] = ("tuned",)
    batch = 100

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    @cached_property
    def original(self) -> nn.Module:
        return self.build().requires_grad_(True)

    @cached_property
    def macs(self) -> MacCounter:
        return MacCounter(self.original, self.example)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        """Names of the layers whose output channels may be pruned, by search space."""
        raise NotImplementedError

    @property
    def example(self) -> Tensor:
        raise NotImplementedError

    def build(self) -> nn.Module:
        raise NotImplementedError

    @cached_property
    def labeled(self) -> tuple[Tensor, Tensor]:
        """Images and labels for training after pruning."""
        raise NotImplementedError

    def calibration(self, seed: int) -> Tensor:
        raise NotImplementedError

    def evaluation_data(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        """Return evaluation batches, labels, logits of the original, and the parts."""
        raise NotImplementedError

    def importances(self) -> list[str]:
        return list(IMPORTANCES)


class CifarTask(Task):
    """ResNet-56 on CIFAR-10."""

    name, ratios, screened, selection_part = "resnet56", (1.5, 2.0, 2.5, 3.0), 2.0, "select"
    afterwards = ("tuned", "tuned, four times", "blocks, tuned", "5 epochs, cross-entropy", "5 epochs, ki.finetune")

    def build(self) -> nn.Module:
        return cifar_resnet(56)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, 32, 32)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        return {
            "inner": [
                name
                for name, module in self.original.named_modules()
                if isinstance(module, nn.Conv2d) and name.endswith(".conv1")
            ]
        }

    @cached_property
    def labeled(self) -> tuple[Tensor, Tensor]:
        images, labels = cache_tensors("cifar10_train", lambda: cifar10("train"))
        return (images[:128], labels[:128]) if self.quick else (images, labels)

    @cached_property
    def train(self) -> Tensor:
        return cache_tensors("cifar10_train", lambda: cifar10("train"))[0]

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        return cache_tensors("cifar10_test", lambda: cifar10("test"))

    @cached_property
    def logits(self) -> Tensor:
        return cache_tensors("resnet56_logits", lambda: (predict(self.original, self.test[0].split(self.batch)),))[0]

    def calibration(self, seed: int) -> Tensor:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[: 256 if self.quick else 1024]]

    def evaluation_data(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        n = 600 if self.quick else 2000 if screen else 10_000
        images, labels = self.test
        select = n // 2 if self.quick else 2000
        parts = {"select": slice(0, select), "judged": slice(select, n), "all": slice(0, n)}
        if select == n:
            parts = {"select": parts["select"]}
        return list(images[:n].split(self.batch)), labels[:n], self.logits[:n], parts


class LiteTask(Task):
    """EfficientNet-Lite0 on ImageNet photographs."""

    name, ratios, screened = "lite0", (1.3, 1.5, 2.0), 1.5
    batch = 25

    def build(self) -> nn.Module:
        return efficientnet_lite(0)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, 224, 224)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        classifier = next(name for name, module in self.original.named_modules() if isinstance(module, nn.Linear))
        inner = inner_layers(self.original, self.example, [classifier])
        layers = {
            name: module
            for name, module in self.original.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1
        }
        return {"inner": inner, "all": list(layers)}

    @cached_property
    def photographs(self) -> tuple[Tensor, Tensor]:
        """Images as uint8, and class indices."""
        return cache_tensors("photographs", load_photographs)

    @cached_property
    def logits(self) -> Tensor:
        return cache_tensors(
            "lite0_logits",
            lambda: (predict(self.original, list(map(normalize, self.photographs[0].split(self.batch)))),),
        )[0]

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(self.photographs[0]), generator=torch.Generator().manual_seed(seed))
        half = 50 if self.quick else len(order) // 2
        return order[:half], order[half : 2 * half]

    def calibration(self, seed: int) -> Tensor:
        return normalize(self.photographs[0][self.halves(seed)[0]])

    def evaluation_data(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        indices = self.halves(seed)[1]
        images, labels = self.photographs
        return (
            list(map(normalize, images[indices].split(self.batch))),
            labels[indices],
            self.logits[indices],
            {"judged": slice(0, len(indices))},
        )

    def importances(self) -> list[str]:
        return [name for name in IMPORTANCES if name != "OBD-C"]  # does not support depthwise layers


TASKS = {task.name: task for task in (CifarTask, LiteTask)}


def load_photographs() -> tuple[Tensor, Tensor]:
    """Load `imagenet1k_sample`: short side 256, center crop 224."""
    import csv

    from PIL import Image
    from torchvision.transforms import functional as T

    folder = DATA / "imagenet1k_sample"
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = [
        T.pil_to_tensor(T.center_crop(T.resize(Image.open(folder / row["file"]).convert("RGB"), 256), [224, 224]))
        for row in rows
    ]
    return torch.stack(images), torch.tensor([int(row["class_index"]) for row in rows])


def normalize(images: Tensor) -> Tensor:
    """Normalize uint8 images; channels_last, in which depthwise layers are twice as fast."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def cache_tensors(name: str, make: Callable[[], tuple[Tensor, ...]]) -> Any:
    """Load tensors from the cache; compute and store them if they are missing."""
    path = CACHE / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(make()), path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Return the logits of all batches."""
    return torch.cat([model(batch) for batch in batches])
