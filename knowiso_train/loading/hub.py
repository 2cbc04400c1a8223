"""Image classifiers of Hugging Face transformers, by id or local folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from knowiso_train.errors import DataError, KnowisoWarning, MissingDependencyError

PREFIX = "hf:"
# Values of `resample` of image processors, as in PIL
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
DEFAULT_SIDE = 224


def load_hub_model(name: str, *, pretrained: bool = True, num_classes: int | None = None) -> nn.Module:
    """Create an image classifier of transformers.

    Its image processor gives input size and normalization, which `input_transform` reads.

    Args:
        name: Id on the hub, or a local folder with `config.json`.
        pretrained: Load the published weights.
        num_classes: Width of the classifier; a classifier of another width is initialized anew. None: that of the
            configuration.

    Raises:
        MissingDependencyError: transformers is not installed.
        DataError: No such network, or one that is no image classifier.

    Examples:
        >>> import tempfile
        >>> from transformers import ResNetConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]).save_pretrained(folder)
        ...     _ = Path(folder, "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
        ...     type(load_hub_model(folder, pretrained=False, num_classes=3)).__name__
        'ResNetForImageClassification'
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise MissingDependencyError(
            f'{PREFIX}{name} needs transformers, which is not installed; pip install "knowiso_train[transformers]"'
        ) from error
    labels = {} if num_classes is None else {"num_labels": num_classes}
    try:
        if pretrained:
            model: Any = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
        else:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name, **labels))
    # The hub, safetensors and the configurations have no common base error
    except Exception as error:
        raise DataError(
            f"{PREFIX}{name} cannot be loaded as an image classifier: {str(error).strip() or type(error).__name__}. "
            f"Expected {PREFIX}OWNER/NAME, or {PREFIX}FOLDER with config.json and weights"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name).to_dict()
    except Exception as error:
        processor = {}
        warnings.warn(
            f"{PREFIX}{name} has no image processor that can be loaded ({type(error).__name__}): images are normalized "
            "as those of ImageNet",
            KnowisoWarning,
            stacklevel=3,
        )
    if processor.get("do_flip_channel_order"):
        warnings.warn(
            f"the image processor of {PREFIX}{name} reverses the channels (BGR), which input_transform does not. Pass "
            "a transform of your own, such as lambda images: images.flip(1)",
            KnowisoWarning,
            stacklevel=3,
        )
    # The classes of the weights, also where `num_classes` is another number
    published = (AutoConfig.from_pretrained(name) if labels else model.config).num_labels
    model.pretrained_cfg = processor_config(processor, model.config) | {"num_classes": published}
    # transformers 5 keeps the precision of the file
    return model.float().eval()  # type: ignore[no-any-return]


def processor_config(processor: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """Return the input configuration of an image processor in timm's form.

    Args:
        processor: Fields of the processor.
        config: Configuration of the network, whose `image_size` is used where the processor has none.

    Examples:
        >>> processor_config({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}})["input_size"]
        (3, 224, 224)
    """
    own = processor.get("data_config")
    if isinstance(own, Mapping):  # a network of timm
        return {name: own.get(name) for name in ("input_size", "mean", "std", "interpolation")}
    size = (processor.get("crop_size") if processor.get("do_center_crop", True) else None) or processor.get("size")
    if size is None:
        size = getattr(config, "image_size", None) or DEFAULT_SIDE
    if isinstance(size, Mapping):
        side = size.get("shortest_edge") or size.get("longest_edge")
        size = (size.get("height") or side, size.get("width") or side)
    height, width = (size, size) if isinstance(size, int) else size
    normalizes = bool(processor.get("do_normalize", True))
    return {
        "input_size": (getattr(config, "num_channels", 3), height, width),
        "mean": processor.get("image_mean") if normalizes else (0.0, 0.0, 0.0),
        "std": processor.get("image_std") if normalizes else (1.0, 1.0, 1.0),
        "interpolation": INTERPOLATIONS.get(processor.get("resample", 3), "bicubic"),
    }


def plain_logits(model: nn.Module) -> nn.Module:
    """Let an image classifier of transformers return its logits, as timm's networks do, and return the network.

    Layer names, weights and `save_pretrained` are unchanged.

    Examples:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        >>> plain_logits(ResNetForImageClassification(config))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    model.register_forward_hook(_logits_of)
    return model


def _logits_of(model: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def hub_snippet(name: str, num_classes: int | None, file: str) -> str:
    """Return the code that loads a saved state dict of an image classifier of transformers.

    Args:
        name: Id on the hub, or a local folder with `config.json`.
        num_classes: Width of the classifier. None: that of the configuration.
        file: Name of the weight file.

    Examples:
        >>> print(hub_snippet("microsoft/resnet-18", 10, "last.safetensors"))
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForImageClassification
        <BLANKLINE>
        config = AutoConfig.from_pretrained('microsoft/resnet-18', num_labels=10)
        model = AutoModelForImageClassification.from_config(config)
        model.load_state_dict(load_file('last.safetensors'))
    """
    labels = "" if num_classes is None else f", num_labels={num_classes}"
    return (
        "from safetensors.torch import load_file\n"
        "from transformers import AutoConfig, AutoModelForImageClassification\n\n"
        f"config = AutoConfig.from_pretrained({name!r}{labels})\n"
        "model = AutoModelForImageClassification.from_config(config)\n"
        f"model.load_state_dict(load_file({file!r}))"
    )


def is_hub_name(spec: str) -> bool:
    """Return whether a name stands for a network of transformers: `hf:…`, or a folder with a transformers config.

    Examples:
        >>> is_hub_name("hf:microsoft/resnet-18"), is_hub_name("resnet18")
        (True, False)
    """
    return spec.startswith(PREFIX) or (Path(spec) / "config.json").is_file()
