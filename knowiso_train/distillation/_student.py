"""Capture of the student's calls: images, further arguments, features, and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation._outputs import OutputCapture
from knowiso_train.distillation.config import Repeated
from knowiso_train.errors import CaptureError
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.hooks import DetachedOnCopyHook, FeatureTaps, Side, is_recomputing
from knowiso_train.features.modules import LayerPair
from knowiso_train.features.padding import ValidPositions, find_padding
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import INPUT_KEYS, get_inputs, image_size, replace_inputs
from knowiso_train.utils.distributed import ProcessGroup

HALF_DTYPES = (torch.bfloat16, torch.float16)
LOSS_KEYWORDS = ("labels", "label", "num_items_in_batch", "return_loss")


@dataclass(frozen=True)
class StudentInput:
    """Arguments of one student forward.

    Attributes:
        images: Images as the student received them.
        args: Positional arguments; the first holds the images if `keyword` is None. Default: the images alone.
        kwargs: Keyword arguments.
        keyword: Keyword argument that held the images; None: first positional argument.
        modified: Whether the images were written to after the forward began.
    """

    images: Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    keyword: str | None = None
    modified: bool = False

    def with_images(self, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for a frozen network: other images, tensors on their device, nothing for the loss."""

        def moved(value: Any) -> Any:
            return value.detach().to(images.device) if isinstance(value, Tensor) else value

        kwargs = {name: moved(value) for name, value in self.kwargs.items() if name not in LOSS_KEYWORDS}
        if self.keyword is not None:
            return (), kwargs | {self.keyword: images}
        if not self.args:
            return (images,), kwargs
        return (replace_inputs(self.args[0], images), *(moved(value) for value in self.args[1:])), kwargs

    def valid_positions(self) -> ValidPositions | None:
        """Return the positions that are not padding; None without padding."""
        valid = find_padding(self.kwargs, len(self.images))
        return None if valid is None or valid.complete else valid


class InputCapture:
    """Arguments of the student's last forward, held until they are taken."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: dict[int, int]
    fired: bool
    ran_as_teacher: bool

    def __init__(self) -> None:
        self.clear()

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Register the hook on the unwrapped student."""
        return student.register_forward_pre_hook(_InputHook(self), with_kwargs=True)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the arguments of a forward, and the version of every tensor among them."""
        self.args, self.kwargs, self.fired, self.ran_as_teacher = args, kwargs, True, False
        if not torch.compiler.is_compiling():
            values = [value for argument in (*args, *kwargs.values()) for value in _values(argument)]
            versions = {id(value): _version(value) for value in values}
            self.versions = {key: version for key, version in versions.items() if version is not None}

    def clear(self) -> None:
        """Drop the arguments."""
        self.args, self.kwargs, self.versions, self.fired, self.ran_as_teacher = (), {}, {}, False, False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of an empty capture."""
        return vars(InputCapture())

    def take(self) -> StudentInput:
        """Return the images and drop the arguments.

        The images are the first positional argument, or in it if it is a batch, or the keyword argument of one of
        `INPUT_KEYS`.

        Raises:
            CaptureError: No forward since the last call, or no images among its arguments.
        """
        try:
            if not self.fired:
                raise CaptureError(
                    "the student has not run since the last iso(): call student(x) before iso(), inside `with iso:`, "
                    "or pass iso(images=x) after a call of a part such as student.forward_features(x). "
                    "If it was compiled and called before the hooks were attached, call torch.compiler.reset()"
                )
            if self.args:
                if isinstance(self.args[0], (Tensor, Mapping, tuple, list)):
                    return self._student_input(get_inputs(self.args[0]), None)
            else:
                keyword = next((key for key in INPUT_KEYS if isinstance(self.kwargs.get(key), Tensor)), None)
                if keyword is not None:
                    return self._student_input(self.kwargs[keyword], keyword)
            kinds = [type(value).__name__ for value in self.args]
            kinds += [f"{key}={type(value).__name__}" for key, value in self.kwargs.items()]
            raise CaptureError(
                "expected the student to be called with images as its first argument, or under one of "
                f"{INPUT_KEYS}; got ({', '.join(kinds)})"
            )
        finally:
            self.clear()

    def _student_input(self, images: Tensor, keyword: str | None) -> StudentInput:
        version = self.versions.get(id(images))
        modified = version is not None and _version(images) != version
        return StudentInput(images, self.args, self.kwargs, keyword, modified)


class _InputHook(DetachedOnCopyHook):
    """Forward pre-hook of the student."""

    def __init__(self, capture: InputCapture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_recomputing():
            self.capture.record(args, kwargs)


def mark_as_teacher(model: nn.Module) -> None:
    """Record in the captures of losses whose student is this network that another loss ran it as teacher or peer."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _InputHook):
            hook.capture.ran_as_teacher = True


def _values(argument: Any) -> Iterable[Any]:
    """Return an argument, or the elements of one that is a batch."""
    if isinstance(argument, Mapping):
        return argument.values()
    return argument if isinstance(argument, (tuple, list)) else (argument,)


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
        padding: `StudentInput.valid_positions`.
        outputs: Outputs of the student with gradient, in several processes.
        autocast_dtype: Half precision of the student, in which the teacher then runs too. None: full precision.
    """

    input: StudentInput
    branches: list[Tensor]
    features: list[Tensor]
    padding: ValidPositions | None = None
    outputs: tuple[Tensor, ...] = ()
    autocast_dtype: torch.dtype | None = None


class StudentCapture:
    """Hooks on the student: its images and the outputs of its paired layers, with gradient.

    Args:
        model: Student, wrapped or not.
        pairs: Layer pairs of the unwrapped networks.
        layout: Layout of layers for which it cannot be inferred.
        repeated: Capture to use of layers that fire more than once.
        sides: Side of each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[LayerPair],
        layout: str | Mapping[str, str] | None,
        repeated: Repeated,
        sides: Mapping[str, Side],
    ) -> None:
        self.model, self.pairs = model, tuple(pairs)
        layers = list(dict.fromkeys(pair.source for pair in pairs))
        self.taps: FeatureTaps[Tensor] = FeatureTaps(model, layers, at=sides, repeated=repeated)
        self.reader = FeatureReader(model, layers, "student", layout, sides)
        self._input, self._output = InputCapture(), OutputCapture()

    def attach_calls(self) -> list[RemovableHandle]:
        """Register the hooks that record the images, and the outputs in several processes, which `taps` does not."""
        student = unwrap_model(self.model)
        return [self._input.attach(student), *([self._output.attach(student)] if ProcessGroup().size > 1 else [])]

    @staticmethod
    def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StudentInput:
        """Return the images in the arguments of a forward that is not captured.

        Raises:
            CaptureError: No images among the arguments.
        """
        capture = InputCapture()
        capture.record(args, kwargs)
        return capture.take()

    def clear(self) -> None:
        """Drop all captures."""
        self._input.clear()
        self._output.clear()
        self.taps.clear()

    def take(self, images: Tensor | None = None) -> StudentBatch:
        """Return images and features of the last forward.

        Args:
            images: Images of a call that was not the student's forward. None: those of its forward.

        Raises:
            CaptureError: No forward since the last call, a layer that did not fire, or features without gradient.
        """
        ran_as_teacher = self._input.ran_as_teacher
        if images is not None:
            self._input.record((images,), {})
        student_input = self._input.take()
        # Autocast may surround a part of the student's forward alone, and its layers may still return float32
        autocast_dtype = self.taps.autocast_dtype
        size, captures = image_size(student_input.images), self.taps.collect()
        branches = [captures[pair.source].view_as(captures[pair.source]) for pair in self.pairs]
        features = [
            self.reader.read_layer(pair.source, branch, len(student_input.images), size)
            for pair, branch in zip(self.pairs, branches, strict=True)
        ]
        if autocast_dtype is None:
            autocast_dtype = next((feature.dtype for feature in features if feature.dtype in HALF_DTYPES), None)
        trainable = any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and trainable and not any(branch.requires_grad for branch in branches):
            if ran_as_teacher:
                raise CaptureError(
                    "another IsomorphismLoss ran the student as its teacher after the training forward (mutual "
                    "learning), so the features carry no gradient. Pass the outputs of both training forwards: "
                    "ab(teacher_output=output_b) + ba(teacher_output=output_a)"
                )
            raise CaptureError(
                f"the features of {', '.join(repr(pair.source) for pair in self.pairs)} carry no gradient: the "
                "student's last forward ran without gradient, or everything below these layers is frozen. Call iso() "
                "right after the training forward student(x), or under torch.no_grad() to evaluate the loss"
            )
        return StudentBatch(
            student_input, branches, features, student_input.valid_positions(), self._output.take(), autocast_dtype
        )
