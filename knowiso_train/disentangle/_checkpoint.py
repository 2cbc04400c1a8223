"""Checkpoints of the paper's training, each bound to one fit."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.disentangle.config import PaperConfig
from knowiso_train.errors import FormatError
from knowiso_train.regression.sampling import Sample
from knowiso_train.utils.serialization import replace_file

NUM_FINGERPRINT_VALUES = 256  # of each feature
# Features of another run may differ by rounding, those of other images or layers by their standard deviation
FINGERPRINT_TOLERANCE = 0.01
MAX_NAME_LENGTH = 80


def checkpoint_path(path: str, label: str) -> str:
    """Return the file of one fit: the path with the label of the fit before its suffix.

    Args:
        path: Option `checkpoint`.
        label: Layers, direction and target of the fit.

    Examples:
        >>> checkpoint_path("run/paper.pt", "layer1 → layer2 (forward)")
        'run/paper.layer1-layer2-forward-879ef3ea.pt'
    """
    words = re.sub(r"[^\w.]+", "-", label).strip("-")[:MAX_NAME_LENGTH]
    digest = hashlib.blake2b(label.encode(), digest_size=4).hexdigest()
    file = Path(path)
    return str(file.with_name(f"{file.stem}.{words}-{digest}{file.suffix}"))


@dataclass(frozen=True)
class Checkpoint:
    """State of one training of the paper's network in a file.

    The file holds what it was fitted on: the label, the options, the sizes of the maps and a fingerprint of the
    features. It is refused for any other fit.

    Attributes:
        path: File.
        maps: Network in training.
        optimizer: Its optimizer.
        generator: Generator of the order of the images.
        identity: Label, options and sizes of the fit, as plain values.
        fingerprint: Values of the features at fixed places, relative to their standard deviations.
    """

    path: str
    maps: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    identity: Mapping[str, Any]
    fingerprint: Tensor

    @classmethod
    def of(
        cls,
        config: PaperConfig,
        maps: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        sample: Sample,
        *,
        seed: int,
        label: str,
    ) -> Checkpoint:
        """Return the checkpoint of a training, in the file `config.checkpoint`."""
        options = {name: value for name, value in asdict(config).items() if name != "checkpoint"}
        shapes = {name: list(value.shape) for name, value in maps.state_dict().items()}
        identity = {"fit": label, "seed": seed, **options, "maps": shapes}
        return cls(str(config.checkpoint), maps, optimizer, generator, identity, _fingerprint(sample))

    def save(self, epoch: int) -> None:
        """Write the state after an epoch, atomically."""
        state = {
            "epoch": epoch,
            "maps": self.maps.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.generator.get_state(),
            "identity": dict(self.identity),
            "fingerprint": self.fingerprint,
        }
        with replace_file(self.path) as partial:
            torch.save(state, partial)

    def resume(self) -> int:
        """Restore the state of the file and return its epoch; 0 without a file.

        Raises:
            FormatError: A damaged file, or one of another fit.
        """
        if not Path(self.path).exists():
            return 0
        damaged = f"{self.path} is damaged or not a checkpoint of solver='paper'. Delete it, or name another checkpoint"
        try:
            device = next(self.maps.parameters()).device
            state = torch.load(self.path, weights_only=True, map_location=device)
            identity, fingerprint = state["identity"], state["fingerprint"].cpu()
            self._check_identity(identity)
            self._check_fingerprint(fingerprint)
            epoch = state["epoch"]
            finite = all(bool(value.isfinite().all()) for value in state["maps"].values())
            if not isinstance(epoch, int) or not 0 <= epoch <= self.identity["epochs"] or not finite:
                raise FormatError(damaged)
            self.maps.load_state_dict(state["maps"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["random"].cpu())
        except FormatError:
            raise
        # The errors of torch.load, pickle and zip files, and of states of another structure
        except (
            RuntimeError,
            OSError,
            EOFError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            raise FormatError(damaged) from error
        return epoch

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        names = self.identity.keys() | identity.keys()
        different = sorted(name for name in names if identity.get(name) != self.identity.get(name))
        if different:
            values = {name: (identity.get(name), self.identity.get(name)) for name in different if name != "maps"}
            detail = ", ".join(f"{name} {old!r} instead of {new!r}" for name, (old, new) in values.items())
            raise FormatError(
                f"{self.path} was written by another fit ({detail or 'other channels, order or kernel size'}). "
                "Delete it, or name another checkpoint"
            )

    def _check_fingerprint(self, fingerprint: Tensor) -> None:
        same_size = fingerprint.shape == self.fingerprint.shape
        if not same_size or not torch.allclose(fingerprint, self.fingerprint, rtol=0, atol=FINGERPRINT_TOLERANCE):
            raise FormatError(
                f"{self.path} was fitted to other features: another network, layer, direction or set of images. Delete "
                "it, or name another checkpoint"
            )


def _fingerprint(sample: Sample) -> Tensor:
    """Return sizes, means and values at evenly spaced places of both features, in units of their deviations."""
    parts = []
    for feature in (sample.x, sample.y):
        places = torch.linspace(0, feature.numel() - 1, NUM_FINGERPRINT_VALUES, dtype=torch.float64).long()
        scale, mean = feature.float().std(correction=0).clamp(min=1e-30), feature.float().mean()
        values = feature.flatten()[places.to(feature.device)].float() / scale
        sizes = torch.tensor([float(size) for size in feature.shape])
        parts += [sizes, torch.stack([scale.log(), mean / scale]).cpu(), values.cpu()]
    return torch.cat(parts)
