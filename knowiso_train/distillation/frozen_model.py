"""Frozen teachers and peers, run on the inputs of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation.estimators import warn_once
from knowiso_train.errors import CaptureError, InputTypeError, ShapeError
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.hooks import DetachedOnCopyHook, FeatureTaps, is_recomputing
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of
from knowiso_train.utils.batch import INPUT_KEYS, image_size

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StudentInput:
    """The images of one forward, the keyword under which they were passed, if any, and whether they were written to since."""

    images: Tensor
    keyword: str | None
    changed: bool = False


class InputCapture:
    """The input of the student's last forward, remembered until it is taken."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: dict[int, int]

    def __init__(self) -> None:
        self.clear()

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Put the hook on the bare network."""
        return student.register_forward_pre_hook(_InputHook(self), with_kwargs=True)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what a forward was given."""
        self.args, self.kwargs, self.fired = args, kwargs, True
        if not torch.compiler.is_compiling():
            self.versions = {
                id(value): version for value in (*args, *kwargs.values()) if (version := _version(value)) is not None
            }

    def clear(self) -> None:
        """Forget it."""
        self.args, self.kwargs, self.versions, self.fired = (), {}, {}, False

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing."""
        return vars(InputCapture())

    def take(self) -> StudentInput:
        """The images: the first positional argument, or the keyword that holds them.

        Raises:
            CaptureError: no forward since the last call, or no images in it.
        """
        try:
            if not self.fired:
                raise CaptureError(
                    "the student has not run since the last iso(): call student(x) before iso(), inside `with iso:`. A student that was compiled and "
                    "called before the hooks were attached never fires them: attach first, or call torch.compiler.reset() after attaching."
                )
            if self.args:
                if isinstance(self.args[0], Tensor):
                    return self._seen(self.args[0], None)
            else:
                keyword = next((key for key in INPUT_KEYS if isinstance(self.kwargs.get(key), Tensor)), None)
                if keyword is not None:
                    return self._seen(self.kwargs[keyword], keyword)
            kinds = [type(value).__name__ for value in self.args] + [
                f"{key}={type(value).__name__}" for key, value in self.kwargs.items()
            ]
            raise CaptureError(
                f"expected the student to be called with a tensor of images as its first argument, or under one of {INPUT_KEYS}; "
                f"got ({', '.join(kinds)})"
            )
        finally:
            self.clear()

    def _seen(self, images: Tensor, keyword: str | None) -> StudentInput:
        before = self.versions.get(id(images))
        return StudentInput(images, keyword, before is not None and _version(images) != before)


class _InputHook(DetachedOnCopyHook):
    """Forward pre-hook of the student."""

    def __init__(self, tap: InputCapture) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_recomputing():
            self.tap.see(args, kwargs)


def _version(value: Any) -> int | None:
    """What every write to a tensor counts up; None where nothing counts."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def autocast_dtype(features: list[Tensor]) -> torch.dtype | None:
    """The precision that the student ran in, seen from its features: a half where any is one, so that the teacher follows."""
    return next((feature.dtype for feature in features if feature.dtype in (torch.bfloat16, torch.float16)), None)


class FrozenModel:
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
        self._modules = list(unwrap_model(model).modules())

    def run(self, given: StudentInput, autocast: torch.dtype | None = None) -> tuple[dict[str, Tensor], Any]:
        """Features (N, C, H, W) by layer name, and the network's output.

        Raises:
            CaptureError: a layer that did not fire once; images that are not what the student was given.
            ShapeError: as `FeatureReader.read`.
        """
        if given.changed:
            raise CaptureError(
                f"the student's images were written to since it was given them, so the {self.role} would see others: by the student's own forward "
                "(an in-place normalization or activation), or between student(x) and iso(). Call student(x.clone())"
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
        return {
            name: feature.detach()
            for name, feature in self.reader.read(self.taps.collect(), len(images), image_size(images)).items()
        }

    def given(self, features: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Features that the caller has, checked."""
        missing = [name for name in self.reader.names if name not in features]
        if missing:
            raise CaptureError(
                f"{self.role}: expected features of layers {list(self.reader.names)}, got {list(features)}; missing are {missing}"
            )
        device = device_of(self.model) or images.device
        for name in self.reader.names:
            if not isinstance(features[name], Tensor):
                raise InputTypeError(
                    f"{self.role}: the feature of layer {name!r} must be a tensor, got {type(features[name]).__name__}"
                )
            if not features[name].ndim or len(features[name]) != len(images):
                raise ShapeError(
                    f"{self.role}: {len(images)} images in the student's batch, shape {tuple(features[name].shape)} given for {name!r}"
                )
        # Whose grid the size of the images settles
        tokens = any(features[name].ndim == 3 for name in self.reader.names)
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
