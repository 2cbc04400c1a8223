"""Loading of networks, weights and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowiso_train.utils.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from knowiso_train.loading.checkpoints import load_checkpoint
    from knowiso_train.loading.datasets import image_loader, labeled_images, training_loader
    from knowiso_train.loading.timm import InputBridge, InputTransform, input_transform, load_model

__all__ = [
    "InputBridge",
    "InputTransform",
    "image_loader",
    "input_transform",
    "labeled_images",
    "load_checkpoint",
    "load_model",
    "training_loader",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    globals(),
    {
        "InputBridge": "timm",
        "InputTransform": "timm",
        "image_loader": "datasets",
        "input_transform": "timm",
        "labeled_images": "datasets",
        "load_checkpoint": "checkpoints",
        "load_model": "timm",
        "training_loader": "datasets",
    },
)
