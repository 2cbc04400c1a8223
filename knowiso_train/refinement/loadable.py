"""How a saved network is loaded again, tried before it is said."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import KnowisoWarning


def load_line(architecture: str, options: Mapping[str, Any], state: Mapping[str, Tensor], file: str) -> str:
    """What to write to load a state dict without this library; a warning where timm builds another network from this name and these options.

    Args:
        architecture: timm's name, or that of a class.
        options: of `timm.create_model`.
        state: that it must fit.
        file: where it lies.

    Example:
        >>> import timm
        >>> state = timm.create_model("test_resnet", num_classes=4).state_dict()
        >>> load_line("test_resnet", {"num_classes": 4}, state, "model.safetensors")
        "timm.create_model('test_resnet', num_classes=4, checkpoint_path='model.safetensors')"
    """
    by_hand = f"build the network as it was built, then model.load_state_dict(safetensors.torch.load_file({file!r}))"
    timm: Any = sys.modules.get("timm")  # whoever has a network of timm's has loaded it
    if timm is None or not timm.is_model(architecture):
        return by_hand
    with torch.random.fork_rng():
        built = timm.create_model(architecture, pretrained=False, **options)
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    other = next((name for name in (*wanted, *found) if wanted.get(name) != found.get(name)), None)
    words = "".join(f"{key}={value!r}, " for key, value in options.items())
    if other is None:
        return f"timm.create_model({architecture!r}, {words}checkpoint_path={file!r})"
    warnings.warn(
        f"timm.create_model({architecture!r}, {words.rstrip(', ')}) builds another network: {other!r} is {found.get(other)} there and "
        f"{wanted.get(other)} here. Say with architecture= and options= how this one is built, such as options={{'in_chans': 1}}; a pruned one is "
        "saved by save_pruned",
        KnowisoWarning,
        stacklevel=3,
    )
    return by_hand


def input_of(model: nn.Module) -> dict[str, Any]:
    """Size, mean and standard deviation of the images that a timm network expects; nothing of others.

    Example:
        >>> import timm
        >>> input_of(timm.create_model("test_resnet"))["size"]
        [3, 160, 160]
    """
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    names = {"size": "input_size", "mean": "mean", "std": "std"}
    return {name: list(known[key]) for name, key in names.items() if key in known}
