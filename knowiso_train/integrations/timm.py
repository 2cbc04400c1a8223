"""timm: its networks, with weights from the hub or from a file, and what they expect of their images."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from torch import nn

from knowiso_train.errors import DataError, OptionError
from knowiso_train.integrations.checkpoints import load_checkpoint
from knowiso_train.integrations.datasets import image_loader
from knowiso_train.integrations.inputs import InputTransform

__all__ = ["image_loader", "input_transform", "load_model"]


def load_model(
    spec: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_order: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm network in eval mode.

    Args:
        spec: name in timm, with or without its pretrained tag ("resnet18", "resnet18.a1_in1k"), or "hf-hub:…" / "local-dir:…".
        checkpoint: weight file (.safetensors, .pth, .pt, .th) to load instead of the published weights.
        pretrained: load the published weights; ignored with `checkpoint`.
        num_classes: width of the classifier; None is the network's default.
        in_order: map the checkpoint's tensors in order where its names differ but the shapes agree one for one.
        **kwargs: passed on to `timm.create_model`.

    Raises:
        OptionError: no such network or tag; the message names the nearest.
        DataError: published weights that cannot be had, or no such checkpoint.
        FormatError: a checkpoint that does not fit.

    Example:
        >>> type(load_model("test_resnet", pretrained=False, num_classes=10)).__name__
        'ResNet'
    """
    import timm

    _check_name(spec)
    options = kwargs if num_classes is None else kwargs | {"num_classes": num_classes}
    wanted = pretrained and checkpoint is None
    try:
        model: nn.Module = timm.create_model(spec, pretrained=wanted, **options)
    except Exception as error:  # httpx, urllib, safetensors and the hub have no common error
        if not wanted or isinstance(error, TypeError):
            raise
        raise DataError(
            f"the published weights of {spec!r} cannot be loaded: {str(error).strip() or type(error).__name__} "
            "Give a weight file with checkpoint= (--source-checkpoint, --target-checkpoint), "
            "or pretrained=False (--no-pretrained) for random weights. "
            "With the weights in the hub's cache, HF_HUB_OFFLINE=1 works without a network."
        ) from error
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, in_order=in_order)
    return model.eval()


def input_transform(
    model: nn.Module, *, size: int | tuple[int, int] | Literal["model", "image"] = "model", interpolation: str | None = None
) -> InputTransform:
    """A module that brings float images in [0, 1] to what a timm network expects, so that networks with different inputs can share a loader.

    timm's `crop_pct` is left out on purpose: both networks must see the same picture.

    Args:
        model: made by timm, as its data config is read.
        size: "model" is the network's own resolution, "image" keeps that of the images; or a side, or (height, width).
        interpolation: "bicubic" or "bilinear"; None is the network's own.

    Raises:
        OptionError: an option without meaning.

    Example:
        >>> transform = input_transform(load_model("test_resnet", pretrained=False), size=64)
        >>> transform(torch.rand(2, 3, 100, 80)).shape
        torch.Size([2, 3, 64, 64])
    """
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    if isinstance(size, str) and size not in ("model", "image"):
        raise OptionError(f'size must be "model", "image", a side or (height, width), got {size!r}')
    sides: tuple[int, int] | None = None
    if size == "model":
        sides = (int(config["input_size"][1]), int(config["input_size"][2]))
    elif not isinstance(size, str):
        sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    return InputTransform(sides, config["mean"], config["std"], interpolation or config["interpolation"])


def _check_name(spec: str) -> None:
    import timm

    if spec.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    name, _, tag = spec.partition(".")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=6, cutoff=0.5) or timm.list_models(f"*{name}*")[:6]
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists all"
        raise OptionError(f"timm has no network {name!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise OptionError(f"timm has no pretrained tag {tag!r} of {name!r}; its tags: {', '.join(tags) or 'none'}")
