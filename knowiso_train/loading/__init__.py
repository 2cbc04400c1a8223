"""Loading of networks, weights and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowiso_train.utils.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from knowiso_train.loading.checkpoints import load_checkpoint, read_weights
    from knowiso_train.loading.datasets import TrainingImages, image_loader, labeled_images, training_loader
    from knowiso_train.loading.timm import InputBridge, InputTransform, input_transform, load_model

__all__ = [
    "InputBridge",
    "InputTransform",
    "TrainingImages",
    "image_loader",
    "input_transform",
    "labeled_images",
    "load_checkpoint",
    "load_model",
    "read_weights",
    "training_loader",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    globals(),
    {
        "InputBridge": "timm",
        "InputTransform": "timm",
        "TrainingImages": "datasets",
        "image_loader": "datasets",
        "input_transform": "timm",
        "labeled_images": "datasets",
        "load_checkpoint": "checkpoints",
        "load_model": "timm",
        "read_weights": "checkpoints",
        "training_loader": "datasets",
    },
)
