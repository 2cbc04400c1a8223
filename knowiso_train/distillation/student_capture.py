"""Capture of the student's images and features in its training forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation.config import Repeated
from knowiso_train.errors import CaptureError
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.hooks import DetachedOnCopyHook, FeatureTaps, is_recomputing
from knowiso_train.features.modules import LayerPair, unwrap_model
from knowiso_train.utils.batch import INPUT_KEYS, image_size


@dataclass(frozen=True)
class StudentInput:
    """Images of one student forward.

    Attributes:
        images: Images as the student received them.
        keyword: Keyword argument that held them; None: first positional argument.
        modified: Whether they were written to after the forward began.
    """

    images: Tensor
    keyword: str | None = None
    modified: bool = False


class InputCapture:
    """Arguments of the student's last forward, held until they are taken."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: dict[int, int]
    fired: bool

    def __init__(self) -> None:
        self.clear()

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Register the hook on the unwrapped student."""
        return student.register_forward_pre_hook(_InputHook(self), with_kwargs=True)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the arguments of a forward, and the version of every tensor among them."""
        self.args, self.kwargs, self.fired = args, kwargs, True
        if not torch.compiler.is_compiling():
            versions = {id(value): _version(value) for value in (*args, *kwargs.values())}
            self.versions = {key: version for key, version in versions.items() if version is not None}

    def clear(self) -> None:
        """Drop the arguments."""
        self.args, self.kwargs, self.versions, self.fired = (), {}, {}, False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of an empty capture."""
        return vars(InputCapture())

    def take(self) -> StudentInput:
        """Return the images and drop the arguments.

        The images are the first positional argument, or the keyword argument of one of `INPUT_KEYS`.

        Raises:
            CaptureError: No forward since the last call, or no images among its arguments.
        """
        try:
            if not self.fired:
                raise CaptureError(
                    "the student has not run since the last iso(): call student(x) before iso(), inside `with iso:`. "
                    "If it was compiled and called before the hooks were attached, call torch.compiler.reset()"
                )
            if self.args:
                if isinstance(self.args[0], Tensor):
                    return self._student_input(self.args[0], None)
            else:
                keyword = next((key for key in INPUT_KEYS if isinstance(self.kwargs.get(key), Tensor)), None)
                if keyword is not None:
                    return self._student_input(self.kwargs[keyword], keyword)
            kinds = [type(value).__name__ for value in self.args]
            kinds += [f"{key}={type(value).__name__}" for key, value in self.kwargs.items()]
            raise CaptureError(
                "expected the student to be called with a tensor of images as its first argument, or under one of "
                f"{INPUT_KEYS}; got ({', '.join(kinds)})"
            )
        finally:
            self.clear()

    def _student_input(self, images: Tensor, keyword: str | None) -> StudentInput:
        version = self.versions.get(id(images))
        return StudentInput(images, keyword, version is not None and _version(images) != version)


class _InputHook(DetachedOnCopyHook):
    """Forward pre-hook of the student."""

    def __init__(self, capture: InputCapture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_recomputing():
            self.capture.record(args, kwargs)


def _version(value: Any) -> int | None:
    """Return the counter of in-place writes to a tensor; None for other values and inference tensors."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


@dataclass(frozen=True)
class StudentBatch:
    """Images and features of the student's last forward.

    Attributes:
        input: Images, and how they were passed.
        branches: One view of the layer's output per pair, which only that pair's loss uses.
        features: The branches as (N, C, H, W), per pair.
    """

    input: StudentInput
    branches: list[Tensor]
    features: list[Tensor]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Half precision of any feature, in which the teacher then runs too; None for full precision."""
        halves = (torch.bfloat16, torch.float16)
        return next((feature.dtype for feature in self.features if feature.dtype in halves), None)


class StudentCapture:
    """Hooks on the student: its images and the outputs of its paired layers, with gradient.

    Args:
        model: Student, wrapped or not.
        pairs: Layer pairs of the unwrapped networks.
        layout: Layout of layers for which it cannot be inferred.
        repeated: Capture to use of layers that fire more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[LayerPair],
        layout: str | Mapping[str, str] | None,
        repeated: Repeated,
    ) -> None:
        self.model, self.pairs = model, tuple(pairs)
        layers = list(dict.fromkeys(pair.source for pair in pairs))
        self.taps: FeatureTaps[Tensor] = FeatureTaps(model, layers, repeated=repeated)
        self.reader = FeatureReader(model, layers, "student", layout)
        self._input = InputCapture()

    def attach_input(self) -> RemovableHandle:
        """Register the hook that records the images; `taps` has the hooks on the layers."""
        return self._input.attach(unwrap_model(self.model))

    def clear(self) -> None:
        """Drop all captures."""
        self._input.clear()
        self.taps.clear()

    def take(self) -> StudentBatch:
        """Return images and features of the last forward.

        Raises:
            CaptureError: No forward since the last call, a layer that did not fire, or features without gradient.
        """
        student_input = self._input.take()
        size, captures = image_size(student_input.images), self.taps.collect()
        branches = [captures[pair.source].view_as(captures[pair.source]) for pair in self.pairs]
        features = [
            self.reader.read_layer(pair.source, branch, len(student_input.images), size)
            for pair, branch in zip(self.pairs, branches, strict=True)
        ]
        trainable = any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and trainable and not any(branch.requires_grad for branch in branches):
            raise CaptureError(
                f"the features of {', '.join(repr(pair.source) for pair in self.pairs)} carry no gradient: the "
                "student's last forward ran without gradient, or everything below these layers is frozen. Call iso() "
                "right after the training forward student(x), or under torch.no_grad() to evaluate the loss"
            )
        return StudentBatch(student_input, branches, features)
