"""A network that is asked and never taught: the teacher, or a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, InputTypeError, ShapeError
from knowiso_train.features import FeatureTaps, bare, device_of, image_size
from knowiso_train.losses.flat import warn_once
from knowiso_train.losses.inputs import StudentInput
from knowiso_train.losses.reader import FeatureReader

Transform = Callable[[Tensor], Tensor]


class FrozenNetwork:
    """Runs a network on the student's images: in eval mode, without gradient, after its own transform; the mode is as before afterwards.

    Args:
        model: the network.
        layers: bare names of its layers.
        role: for messages.
        transform: applied to the student's images before this network.
        forward: `forward(model, images)` in place of the plain call.
        layout: of its layers, where it cannot be inferred.
        repeated: for layers that fire more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        role: str,
        transform: Transform | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        layout: str | Mapping[str, str] | None = None,
        repeated: Any = "error",
    ) -> None:
        self.model, self.role = model, role
        self.taps: FeatureTaps[Tensor] = FeatureTaps(model, list(layers), repeated=repeated)
        self.reader = FeatureReader(model, self.taps.names, role, layout)
        self._transform, self.forward = transform, forward
        self._modules = list(bare(model).modules())

    def run(self, given: StudentInput, autocast: torch.dtype | None = None) -> tuple[dict[str, Tensor], Any]:
        """Features (N, C, H, W) by layer name, and the network's output.

        Raises:
            CaptureError: a layer that did not fire once; images that are not what the student was given.
            ShapeError: as `FeatureReader.read`.
        """
        if given.changed:
            raise CaptureError(
                f"the student's images were written to since it was given them, so the {self.role} would see others: by the student's own forward "
                "(an in-place normalisation or activation), or between student(x) and iso(). Call student(x.clone())"
            )
        images, output = self.called(given, autocast)
        return self.collected(images), output

    def called(self, given: StudentInput, autocast: torch.dtype | None = None) -> tuple[Tensor, Any]:
        """The images that this network saw, and its output; the features wait for `collected`."""
        self.taps.clear()
        images = self.prepared(given.images)
        precision = nullcontext() if autocast is None else torch.autocast(images.device.type, dtype=autocast)
        with torch.no_grad(), self._evaluating(), precision:
            return images, self._called(images, given.keyword)

    def prepared(self, images: Tensor) -> Tensor:
        """The student's images as this network wants them."""
        images = images.detach()
        device = device_of(self.model)
        if device is not None and device != images.device:
            if device.type == "cpu":
                warn_once(
                    self,
                    f"the {self.role} is on the CPU and the student's images are on {images.device}: it runs there in every step. "
                    f"Move it: {self.role.split()[0]}.to({str(images.device)!r})",
                )
            images = images.to(device)
        with torch.no_grad():
            images = images if self._transform is None else self._transform(images)
        if not isinstance(images, Tensor):
            raise InputTypeError(f"the {self.role}'s transform must return a tensor, got {type(images).__name__}")
        return images

    def collected(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a forward that has just run."""
        return {name: feature.detach() for name, feature in self.reader.read(self.taps.collect(), len(images), image_size(images)).items()}

    def given(self, features: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Features that the caller has, checked."""
        missing = [name for name in self.reader.names if name not in features]
        if missing:
            raise CaptureError(f"{self.role}: expected features of layers {list(self.reader.names)}, got {list(features)}; missing are {missing}")
        device = device_of(self.model) or images.device
        for name in self.reader.names:
            if not isinstance(features[name], Tensor):
                raise InputTypeError(f"{self.role}: the feature of layer {name!r} must be a tensor, got {type(features[name]).__name__}")
            if not features[name].ndim or len(features[name]) != len(images):
                raise ShapeError(f"{self.role}: {len(images)} images in the student's batch, shape {tuple(features[name].shape)} given for {name!r}")
        tokens = any(features[name].ndim == 3 for name in self.reader.names)  # whose grid the size of the images settles
        found = {name: features[name].detach().to(device) for name in self.reader.names}
        return self.reader.read(found, size=image_size(self.prepared(images)) if tokens else None)

    def _called(self, images: Tensor, keyword: str | None) -> Any:
        if self.forward is not None:
            return self.forward(self.model, images)
        return self.model(images) if keyword is None else self.model(**{keyword: images})

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
