"""Frozen networks of the loss, teacher and peers, which run on the student's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.distillation._feature_map import warn_once
from knowiso_train.distillation._student import StudentInput, mark_as_teacher
from knowiso_train.distillation.config import IsomorphismLossConfig, Repeated, Transform
from knowiso_train.errors import CaptureError, InputTypeError, ShapeError
from knowiso_train.features.calls import explain_dtype_errors
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.hooks import FeatureTaps, Side
from knowiso_train.features.state import device_of
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import image_size


class FrozenModel:
    """Network that runs on the student's images in eval mode and without gradient; modes are restored afterwards.

    Args:
        model: Network.
        layers: Layer names of the unwrapped network.
        role: Name of the network in messages, such as "teacher".
        transform: Transform of the student's images for this network. Default: none.
        forward: Call `forward(model, images)` in place of `model(images)`.
        layout: Layout of layers for which it cannot be inferred.
        repeated: Capture to use of layers that fire more than once.
        sides: Side of each layer. Default: all outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        role: str,
        transform: Transform | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        layout: str | Mapping[str, str] | None = None,
        repeated: Repeated = "error",
        sides: Mapping[str, Side] | None = None,
    ) -> None:
        self.model, self.role = model, role
        self.taps: FeatureTaps[Tensor] = FeatureTaps(model, list(layers), at=sides or "output", repeated=repeated)
        self.reader = FeatureReader(model, self.taps.names, role, layout, sides)
        self._transform, self._custom_forward = transform, forward
        self._modules = list(unwrap_model(model).modules())

    def features(
        self, student_input: StudentInput, autocast: torch.dtype | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """Run the network and return its features (N, C, H, W) by layer name, and its output.

        Args:
            student_input: Images of the student.
            autocast: Precision of the forward. None: as the caller's context.

        Raises:
            CaptureError: A layer that did not fire once, or images that were written to after the student's forward.
            ShapeError: As `FeatureReader.read`.
        """
        if student_input.modified:
            raise CaptureError(
                f"the student's images were written to after its forward began, so the {self.role} would run on other "
                "images: an in-place operation in the student, or a write between student(x) and iso(). "
                "Call student(x.clone())"
            )
        images, output = self.forward(student_input, autocast)
        return self.collect(images), output

    def forward(self, student_input: StudentInput, autocast: torch.dtype | None = None) -> tuple[Tensor, Any]:
        """Run the network and return its transformed images and its output; `collect` returns the features."""
        self.taps.clear()
        images = self.transform(student_input.images)
        precision = nullcontext() if autocast is None else torch.autocast(images.device.type, dtype=autocast)
        with torch.no_grad(), self._eval_mode(), precision, self._explain_dtype_errors(images):
            output = self._call(student_input, images)
        mark_as_teacher(unwrap_model(self.model))
        return images, output

    def transform(self, images: Tensor) -> Tensor:
        """Return the student's images on this network's device, after its transform."""
        images = images.detach()
        device = device_of(self.model)
        if device is not None and device != images.device:
            if device.type == "cpu":
                warn_once(
                    self,
                    f"the {self.role} is on the CPU and the student's images are on {images.device}, so it runs on the "
                    f"CPU in every step. Move it: {self.role.split()[0]}.to({str(images.device)!r})",
                    "device",
                )
            images = images.to(device)
        with torch.no_grad():
            images = images if self._transform is None else self._transform(images)
        if not isinstance(images, Tensor):
            raise InputTypeError(f"the {self.role}'s transform must return a tensor, got {type(images).__name__}")
        return images

    def collect(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of the last forward, which ran on these transformed images."""
        features = self.reader.read(self.taps.collect(), len(images), image_size(images))
        return {name: feature.detach() for name, feature in features.items()}

    def collect_called(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of a forward that the caller made on the student's images."""
        # In mutual learning the teacher is in training too
        trains = any(feature.requires_grad for feature in self.taps.features.values())
        if not trains and any(module.training and _depends_on_mode(module) for module in self._modules):
            warn_once(
                self,
                f"the {self.role} was called in training mode, in which batch normalization and dropout depend on the "
                f"batch. Call {self.role}.eval() before",
                "mode",
            )
        return self.collect(self.transform(images))

    def from_cache(self, features: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Return features that the caller computed before, as (N, C, H, W) on this network's device.

        Args:
            features: Outputs of this network's layers by layer name.
            images: Images of the student.

        Raises:
            CaptureError: A layer that is missing.
            InputTypeError: No mapping, or a feature that is not a tensor.
            ShapeError: Another number of images than the student's batch.
        """
        if not isinstance(features, Mapping):
            raise InputTypeError(
                f"{self.role}: expected features as a mapping from layer names, got {type(features).__name__}"
            )
        names = self.reader.names
        missing = [name for name in names if name not in features]
        if missing:
            raise CaptureError(
                f"{self.role}: expected features of layers {list(names)}, got {list(features)}; missing are {missing}"
            )
        for name in names:
            feature = features[name]
            if not isinstance(feature, Tensor):
                raise InputTypeError(
                    f"{self.role}: the feature of layer {name!r} must be a tensor, got {type(feature).__name__}"
                )
            if not feature.ndim or len(feature) != len(images):
                raise ShapeError(
                    f"{self.role}: the feature of layer {name!r} must be of the {len(images)} images in the student's "
                    f"batch, got shape {tuple(feature.shape)}"
                )
        device = device_of(self.model) or images.device
        # The grid of tokens (N, L, C) follows from the size of the transformed images
        with_tokens = any(features[name].ndim == 3 for name in names)
        size = image_size(self.transform(images)) if with_tokens else None
        return self.reader.read({name: features[name].detach().to(device) for name in names}, size=size)

    def _call(self, student_input: StudentInput, images: Tensor) -> Any:
        """Call the network as the student was called, with its own images.

        Raises:
            CaptureError: Arguments of the student that this network's forward does not take.
        """
        if self._custom_forward is not None:
            return self._custom_forward(self.model, images)
        args, kwargs = student_input.with_images(images)
        if len(args) > 1 or kwargs:
            try:
                signature(unwrap_model(self.model).forward).bind(*args, **kwargs)
            except TypeError as error:
                names = [type(value).__name__ for value in args] + [f"{name}=" for name in kwargs]
                raise CaptureError(
                    f"the student was called with ({', '.join(names)}), which the forward of the {self.role} does not "
                    f"take: {error}. Pass teacher_forward=lambda teacher, images: ..., or "
                    "iso(teacher_output=...) after running the teacher"
                ) from None
        return self.model(*args, **kwargs)

    def _explain_dtype_errors(self, images: Tensor) -> AbstractContextManager[None]:
        # Autocast converts both
        if torch.is_autocast_enabled(images.device.type):
            return nullcontext()
        option = "peer_transforms" if self.role.startswith("peer") else "teacher_transform"
        return explain_dtype_errors(
            self.model,
            images,
            lambda weights, given, _: (
                f"the {self.role} has weights of {weights}, and the student's images are {given}. Pass "
                f"{option}=lambda images: images.to({weights})"
            ),
        )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Set the flags of all modules; `.eval()` may be overridden, and the list of modules is cached for speed."""
        training = [module for module in self._modules if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module is a batch normalization, a dropout or a stochastic depth."""
    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return isinstance(module, layers) or hasattr(module, "drop_prob")


@dataclass(frozen=True)
class Peer:
    """Frozen peer of the teacher.

    Attributes:
        network: Peer with hooks on its layers.
        layers: Peer layer by teacher layer.
    """

    network: FrozenModel
    layers: dict[str, str]

    def features(self, student_input: StudentInput, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
        """Run the peer and return its features by teacher layer."""
        features, _ = self.network.features(student_input, autocast)
        return {teacher_layer: features[layer] for teacher_layer, layer in self.layers.items()}

    def num_channels(self, teacher_layer: str) -> int:
        """Return the channels of the layer that is paired with a teacher layer."""
        return self.network.reader.channels[self.layers[teacher_layer]]


def freeze_peers(
    peers: Sequence[nn.Module], teacher_layers: Sequence[str], config: IsomorphismLossConfig, sides: Mapping[str, Side]
) -> list[Peer]:
    """Return the peers with hooks on the layers that stand for the teacher's, at the same sides.

    Raises:
        OptionError, LayerNameError: As `IsomorphismLossConfig.peer_options`.
    """
    frozen = []
    for index, (layers, transform) in enumerate(config.peer_options(len(peers), teacher_layers)):
        names = list(dict.fromkeys(layers.values()))
        network = FrozenModel(
            peers[index], names, f"peer {index}", transform, None, config.layout, config.repeated,
            {peer: sides[name] for name, peer in layers.items()},
        )  # fmt: skip
        frozen.append(Peer(network, layers))
    return frozen
