"""Outputs and features of a teacher on augmented images, computed once and kept on disk in bfloat16."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "distill"
# Bound of the whole folder; images of further epochs are computed in every run
MAX_DISK_BYTES = int(float(os.environ.get("KNOWISO_DISTILL_CACHE_GB", "6")) * 1e9)


@dataclass(frozen=True)
class TeacherBatch:
    """Logits (N, classes), pooled features (N, D) and features (N, C, H, W) by layer, in float32."""

    logits: Tensor
    pooled: Tensor
    features: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """Logits, pooled features and features, in this order."""
        return [self.logits, self.pooled, *self.features.values()]


class RecordedTeacher:
    """Network in bfloat16 whose logits, pooled features and layers are recorded, without gradient."""

    def __init__(self, model: nn.Module, layers: Sequence[str], classifier: str) -> None:
        self.model, self.layers = model.eval().to(memory_format=torch.channels_last), list(layers)
        self._captured: dict[str, Tensor] = {}
        for layer in layers:
            hook = lambda _m, _x, out, layer=layer: self._captured.update({layer: out})  # noqa: E731
            model.get_submodule(layer).register_forward_hook(hook)
        model.get_submodule(classifier).register_forward_pre_hook(
            lambda _m, inputs: self._captured.update({"pooled": inputs[0]})
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherBatch:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
        features = {layer: self._captured[layer].float().contiguous() for layer in self.layers}
        return TeacherBatch(logits.float(), self._captured["pooled"].float(), features)


class TeacherCache:
    """Batches of a teacher by epoch and image. The file of an epoch has one row for each image.

    Args:
        teacher: Recorded network.
        name: Subfolder of the cache, one for each teacher and data set.
        num_images: Number of training images.
        example: One image, (1, C, H, W), from which the shapes are inferred.
    """

    def __init__(self, teacher: RecordedTeacher, name: str, num_images: int, example: Tensor) -> None:
        self.teacher, self.folder, self.num_images, self.seconds = teacher, CACHE / name, num_images, 0.0
        self.shapes = [tensor.shape[1:] for tensor in teacher(example).tensors]
        self._epoch, self._rows, self._computed = -1, torch.empty(0), torch.empty(0)

    def batch(self, epoch: int, indices: Tensor, images: Tensor) -> TeacherBatch:
        """Return the teacher's batch for augmented images, from the disk where it was computed before."""
        if epoch != self._epoch:
            self._open(epoch)
        if self._computed.numel() and bool(self._computed[indices].all()):
            return self._split(self._rows[indices].float())
        began = time.process_time()
        batch = self.teacher(images)
        self.seconds += time.process_time() - began
        rows = torch.cat([tensor.flatten(1) for tensor in batch.tensors], 1)
        if self._computed.numel():
            self._rows[indices] = rows.bfloat16()
            self._computed[indices] = True
        return self._split(rows.bfloat16().float())

    def _open(self, epoch: int) -> None:
        """Map the files of an epoch, or keep nothing where the folder would become too large."""
        width = sum(math.prod(shape) for shape in self.shapes)
        path, self._epoch = self.folder / f"epoch{epoch}.bfloat16", epoch
        size = 2 * width * self.num_images
        if not path.exists() and size + sum(f.stat().st_size for f in CACHE.rglob("*.bfloat16")) > MAX_DISK_BYTES:
            self._rows = self._computed = torch.empty(0)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.bfloat16)
        self._rows = rows.view(self.num_images, width)
        computed = str(path.with_suffix(".computed"))
        self._computed = torch.from_file(computed, shared=True, size=self.num_images, dtype=torch.bool)

    def _split(self, rows: Tensor) -> TeacherBatch:
        parts = rows.split([math.prod(shape) for shape in self.shapes], dim=1)
        logits, pooled, *features = (p.reshape(-1, *shape) for p, shape in zip(parts, self.shapes, strict=True))
        return TeacherBatch(logits, pooled, dict(zip(self.teacher.layers, features, strict=True)))
