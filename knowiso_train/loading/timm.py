"""Loading of timm models, and transforms to their input size and normalization."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import DataError, InputTypeError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.loading.checkpoints import CHECKPOINT_SUFFIXES, load_checkpoint
from knowiso_train.loading.hub import PREFIX, hub_snippet, is_hub_name, load_hub_model

REMOTE_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
INTERPOLATION_MODES = ("bicubic", "bilinear")
# timm's defaults for models whose configuration has no normalization.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InputTransform(nn.Module):
    """Module that resizes and normalizes float images in [0, 1].

    Images are scaled to cover `size` with their aspect ratio kept, then cropped at the center.

    Args:
        size: (height, width). None: the size of the image.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        interpolation: "bicubic" or "bilinear", antialiased.

    Raises:
        OptionError: Another interpolation.

    Examples:
        >>> transform = InputTransform((4, 4), mean=(0.5,), std=(0.5,))
        >>> images = torch.full((1, 1, 8, 6), 0.75)
        >>> transform(images).shape, round(transform(images).mean().item(), 4)
        (torch.Size([1, 1, 4, 4]), 0.5)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
    ) -> None:
        super().__init__()
        if interpolation not in INTERPOLATION_MODES:
            raise OptionError(f"interpolation must be one of {INTERPOLATION_MODES}, got {interpolation!r}")
        self.size, self.interpolation = size, interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Transform images (N, C, H, W) in [0, 1] to the network's input.

        Raises:
            InputTypeError: Images that are not floating, or outside [0, 1].
            ShapeError: Another number of channels or axes.
        """
        if not images.is_floating_point():
            raise InputTypeError(f"expected float images in [0, 1], got {images.dtype}; divide bytes by 255")
        if images.ndim != 4 or images.shape[1] != self.mean.shape[1]:
            raise ShapeError(f"expected images (N, {self.mean.shape[1]}, H, W), got shape {tuple(images.shape)}")
        low, high = (float(bound) for bound in images.aminmax())
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputTypeError(
                f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}; "
                "they must not be normalized before"
            )
        return self.applied(images)

    def applied(self, images: Tensor) -> Tensor:
        """Transform images without checking their values, and so without synchronizing with a GPU."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = self._resized(images, self.size)
        return (images - self.mean.to(images)) / self.std.to(images)

    def extra_repr(self) -> str:
        """Return size, interpolation and normalization for `repr`."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"size={self.size}, interpolation={self.interpolation!r}, mean={mean}, std={std}"

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = images.shape[2:]
        scale = max(size[0] / height, size[1] / width)
        covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        # Bicubic interpolation overshoots the range at edges.
        images = F.interpolate(images, covering, mode=self.interpolation, antialias=True, align_corners=False).clamp(
            0, 1
        )
        top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
        return images[:, :, top : top + size[0], left : left + size[1]]


class InputBridge(nn.Module):
    """Module that converts the inputs of one network to those of another: inverse normalization, then its transform.

    It lets a teacher with another normalization or resolution run on the student's inputs in distillation. Detail that
    the student's resolution lost is not restored.

    Args:
        given: Transform that produced the inputs.
        wanted: Transform of the other network.

    Raises:
        ShapeError: Transforms for different numbers of channels.

    Examples:
        >>> student, teacher = InputTransform(None, (0.5,), (0.5,)), InputTransform((8, 8), (0.2,), (0.3,))
        >>> images = torch.rand(2, 1, 4, 4)
        >>> torch.allclose(InputBridge(student, teacher)(student(images)), teacher(images), atol=1e-5)
        True
    """

    def __init__(self, given: InputTransform, wanted: InputTransform) -> None:
        super().__init__()
        if given.mean.shape != wanted.mean.shape:
            raise ShapeError(
                f"expected transforms for equally many channels, got {given.mean.shape[1]} and {wanted.mean.shape[1]}"
            )
        self.given, self.wanted = given, wanted
        self.alike = all(torch.equal(a.cpu(), b.cpu()) for a, b in ((given.mean, wanted.mean), (given.std, wanted.std)))

    def forward(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W) of one transform to the other; return the same tensor if both agree."""
        if self.alike and self.wanted.size in (None, tuple(images.shape[2:])):
            return images
        plain = images * self.given.std.to(images) + self.given.mean.to(images)
        # Rounding may exceed the range slightly.
        return self.wanted.applied(plain.clamp(0, 1))


def load_model(
    spec: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_order: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm network, or an image classifier of transformers, in eval mode.

    Args:
        spec: Name in timm with or without a pretrained tag ("resnet18", "resnet18.a1_in1k"), or "hf-hub:…" /
            "local-dir:…" for networks that timm saved. "hf:OWNER/NAME", or a folder with `config.json`, for an image
            classifier of transformers.
        checkpoint: Weight file (.safetensors, .pth, .pt, .th) to load instead of the published weights.
        pretrained: Load the published weights. Ignored with `checkpoint`.
        num_classes: Width of the classifier. None: the network's default.
        in_order: Assign the checkpoint's tensors in order if their names differ and their shapes agree.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        OptionError: No such network or tag; the message lists the nearest names.
        DataError: Published weights that cannot be loaded, or no such checkpoint.
        FormatError: A checkpoint that does not fit.

    Examples:
        >>> type(load_model("test_resnet", pretrained=False, num_classes=10)).__name__
        'ResNet'
    """
    wanted = pretrained and checkpoint is None
    if not is_hub_name(spec):
        model = _create_model(spec, wanted, kwargs if num_classes is None else kwargs | {"num_classes": num_classes})
    elif kwargs:
        raise OptionError(f"expected no options of timm for {spec!r}, got {', '.join(kwargs)}")
    else:
        model = load_hub_model(spec.removeprefix(PREFIX), pretrained=wanted, num_classes=num_classes)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, in_order=in_order)
    return model.eval()


def _create_model(spec: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """Create a network of timm."""
    import timm

    _check_name(spec)
    try:
        model: nn.Module = timm.create_model(spec, pretrained=pretrained, **options)
    # httpx, urllib, safetensors and the hub have no common base error.
    except Exception as error:
        is_remote = spec.startswith(REMOTE_PREFIXES)
        if isinstance(error, TypeError) or not (pretrained or is_remote):
            raise
        if is_remote:
            raise DataError(
                f"{spec!r} cannot be loaded: {str(error).strip() or type(error).__name__} Expected a network that timm "
                "saved, with config.json; for networks of transformers use hf:OWNER/NAME or hf:FOLDER"
            ) from error
        raise DataError(
            f"the published weights of {spec!r} cannot be loaded: {str(error).strip() or type(error).__name__} "
            "Give a weight file with checkpoint= (--source-checkpoint, --target-checkpoint), "
            "or pretrained=False (--no-pretrained) for random weights. "
            "With the weights in the hub's cache, HF_HUB_OFFLINE=1 works without a network."
        ) from error
    return model


def input_transform(
    model: nn.Module,
    *,
    size: int | tuple[int, int] | Literal["model", "image"] = "model",
    interpolation: str | None = None,
) -> InputTransform:
    """Return the transform from images in [0, 1] to a timm network's input, so that several networks share a loader.

    timm's `crop_pct` is not applied, so that all networks get the same part of the picture.

    Args:
        model: timm network; its input configuration is read.
        size: "model": the network's resolution. "image": that of the images. Else a side, or (height, width).
        interpolation: "bicubic" or "bilinear". None: the network's own.

    Raises:
        OptionError: An invalid option, or a network without an input configuration.

    Examples:
        >>> transform = input_transform(load_model("test_resnet", pretrained=False), size=64)
        >>> transform(torch.rand(2, 3, 100, 80)).shape
        torch.Size([2, 3, 64, 64])
    """
    config = input_config(model)
    if config is None:
        raise OptionError(
            f"expected a timm model with an input configuration, got {type(model).__name__}; "
            "build InputTransform(size, mean, std) for it"
        )
    if isinstance(size, str) and size not in ("model", "image"):
        raise OptionError(f'size must be "model", "image", a side or (height, width), got {size!r}')
    sides: tuple[int, int] | None = None
    if size == "model":
        sides = config.size[1:]
    elif not isinstance(size, str):
        sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    return InputTransform(sides, config.mean, config.std, interpolation or config.interpolation)


class InputConfig(NamedTuple):
    """Input that a timm model was configured for.

    Attributes:
        size: (C, H, W) of one image.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        interpolation: Name of the resampling filter.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def input_config(model: nn.Module) -> InputConfig | None:
    """Return the input size, normalization and interpolation of a timm model; None for other models.

    The size is that of the position embedding where the model has one of fixed size, else that of the pretrained
    weights. timm itself is not imported.

    Args:
        model: Network, wrapped or not.

    Examples:
        >>> config = input_config(load_model("test_vit", pretrained=False, img_size=32))
        >>> config.size, config.mean
        ((3, 32, 32), (0.5, 0.5, 0.5))
        >>> input_config(nn.Linear(2, 2)) is None
        True
    """
    inner: Any = unwrap_model(model)
    config = getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None)
    if not isinstance(config, Mapping):
        return None
    size = config.get("input_size")
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    # A transformer built with img_size= accepts only that size; its configuration still names the published one.
    embedded = getattr(getattr(inner, "patch_embed", None), "img_size", None)
    height, width = embedded if isinstance(embedded, (tuple, list)) and len(embedded) == 2 else size[1:]
    return InputConfig(
        (int(size[0]), int(height), int(width)),
        tuple(config.get("mean") or IMAGENET_MEAN),
        tuple(config.get("std") or IMAGENET_STD),
        config.get("interpolation") or "bicubic",
    )


def loading_snippet(architecture: str, options: Mapping[str, Any], state: Mapping[str, Tensor], file: str) -> str:
    """Return the code that loads a saved state dict without this library.

    Warns when timm builds a network of another structure from this name and these options.

    Args:
        architecture: Name of the network, as of `load_model`, or class name of another network.
        options: Keyword arguments of `timm.create_model`.
        state: State dict that the built network must fit.
        file: Name of the weight file.

    Examples:
        >>> state = load_model("test_resnet", pretrained=False, num_classes=4).state_dict()
        >>> loading_snippet("test_resnet", {"num_classes": 4}, state, "model.safetensors")
        "timm.create_model('test_resnet', num_classes=4, checkpoint_path='model.safetensors')"
    """
    import timm

    if is_hub_name(architecture):
        return hub_snippet(architecture.removeprefix(PREFIX), options.get("num_classes"), file)
    fallback = f"build the network as it was built, then model.load_state_dict(safetensors.torch.load_file({file!r}))"
    if not timm.is_model(architecture):
        return fallback
    with torch.random.fork_rng():
        built = timm.create_model(architecture, pretrained=False, **options)
    expected = {name: tuple(value.shape) for name, value in state.items()}
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    different = next((name for name in (*expected, *shapes) if expected.get(name) != shapes.get(name)), None)
    arguments = "".join(f"{key}={value!r}, " for key, value in options.items())
    if different is None:
        return f"timm.create_model({architecture!r}, {arguments}checkpoint_path={file!r})"
    warnings.warn(
        f"timm.create_model({architecture!r}, {arguments.rstrip(', ')}) builds another network: "
        f"{different!r} has shape {shapes.get(different)} there and {expected.get(different)} here. "
        "Pass the options that built this network, "
        "such as options={'in_chans': 1}; save a pruned network with save_pruned",
        KnowisoWarning,
        stacklevel=3,
    )
    return fallback


def _check_name(spec: str) -> None:
    import timm

    if spec.startswith(REMOTE_PREFIXES):
        return
    name, _, tag = spec.partition(".")
    if not timm.is_model(name):
        if "/" in spec:
            raise OptionError(f"timm has no network {spec!r}; for a network of transformers use {PREFIX}{spec}")
        if spec.endswith(CHECKPOINT_SUFFIXES):
            raise OptionError(
                f"expected the name of a network, got the file {spec!r}; name its architecture, and give the file as "
                "the checkpoint (checkpoint=, --source-checkpoint, …)"
            )
        near = get_close_matches(name, timm.list_models(), n=6, cutoff=0.5) or timm.list_models(f"*{name}*")[:6]
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists all"
        raise OptionError(f"timm has no network {name!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    # Configurations without published weights, such as "untrained", have tags too
    config = timm.get_pretrained_cfg(name)
    if tag and tag not in tags and (config is None or tag != config.tag):
        raise OptionError(f"timm has no pretrained tag {tag!r} of {name!r}; its tags: {', '.join(tags) or 'none'}")
