"""Shapes and layouts of features from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from knowiso_train.distillation._frozen_networks import FrozenModel
from knowiso_train.distillation._student import StudentCapture
from knowiso_train.errors import CaptureError, KnowisoError, OptionError, OptionTypeError
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.features.wrappers import is_sharded, runnable_model
from knowiso_train.loading.timm import input_config
from knowiso_train.utils.batch import image_size

# Sides in pixels, tried in this order for networks without a configured input size
CANDIDATE_IMAGE_SIDES = (64, 224, 32, 128)
EXAMPLE_IMAGES = 2
# Images, positional arguments, or keyword arguments of the student
Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def infer_shapes(student: StudentCapture, frozen: Sequence[FrozenModel], example: Example | None) -> None:
    """Run every network once on a small batch, so that the readers store channels and layouts.

    Args:
        student: Hooks on the student.
        frozen: Teacher and peers.
        example: Batch of student images, tuple of positional arguments, or mapping of keyword arguments. None: zeros of
            a size guessed from timm's configuration and the first layer.

    Raises:
        OptionError: No guessed size that all networks accept, an example that they do not accept, or a module inside a
            network that FSDP shards.
        OptionTypeError: An example of another type.
    """
    models = [student.model, *(network.model for network in frozen)]
    for model in models:
        runnable_model(model)
    if example is not None:
        try:
            _run(student, frozen, *_example_arguments(example))
        except KnowisoError:
            raise
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise OptionError(
                f"student and teacher cannot run on example=, {type(error).__name__}: {error}. Pass a batch as in "
                "training, and teacher_transform= or teacher_forward= if the teacher needs other images or arguments"
            ) from error
        return
    first_error: Exception | None = None
    for images in _candidate_images(models):
        try:
            _run(student, frozen, (images,), {})
            return
        except CaptureError:
            raise
        # timm asserts on sizes
        except (KnowisoError, RuntimeError, ValueError, AssertionError) as error:
            first_error = first_error or error
        # FSDP cannot run again after an interrupted forward
        if any(map(is_sharded, models)):
            break
    raise OptionError(
        "cannot run student and teacher on a guessed input; the first attempt ended with "
        f"{type(first_error).__name__}: {first_error}. Pass example=images, one batch of the student, and "
        "teacher_transform= if the teacher needs another resolution or normalization"
    ) from first_error


def _example_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the student for the first images of an example.

    Raises:
        OptionTypeError: An example of another type.
    """
    names = list(example) if isinstance(example, Mapping) else []
    if not isinstance(example, (Tensor, tuple, list, Mapping)) or not all(isinstance(name, str) for name in names):
        raise OptionTypeError(
            "example must be a batch of student images, a tuple of its arguments or a mapping of its keyword "
            f"arguments, got {type(example).__name__}{f' with the keys {names}' if names else ''}"
        )
    args = () if isinstance(example, Mapping) else example if isinstance(example, (tuple, list)) else (example,)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    num_images = max((len(value) for value in (*args, *kwargs.values()) if _is_batch(value)), default=0)

    def first_images(value: Any) -> Any:
        return value[:EXAMPLE_IMAGES] if _is_batch(value) and len(value) == num_images else value

    return tuple(map(first_images, args)), {name: first_images(value) for name, value in kwargs.items()}


def _is_batch(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0


def _run(student: StudentCapture, frozen: Sequence[FrozenModel], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with ExitStack() as stack:
        stack.enter_context(preserve_state(student.model, *(network.model for network in frozen)))
        stack.enter_context(torch.no_grad())
        # A compilation here would lack the hooks of the training
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        device = device_of(student.model)
        args = tuple(_moved(value, device) for value in args)
        kwargs = {name: _moved(value, device) for name, value in kwargs.items()}
        student_input = student.input_of(args, kwargs)
        images = student_input.images
        stack.enter_context(student.taps)
        run = runnable_model(student.model)
        with _allow_errors_after_captures(student):
            run(*args, **kwargs)
        student.reader.read(student.taps.collect(), len(images), image_size(images))
        for network in frozen:
            stack.enter_context(network.taps)
            with _allow_errors_after_captures(network):
                network.forward(student_input)
            network.collect(network.transform(images))


def _moved(value: Any, device: torch.device | None) -> Any:
    return value if device is None or not isinstance(value, Tensor) else value.to(device)


@contextmanager
def _allow_errors_after_captures(network: StudentCapture | FrozenModel) -> Iterator[None]:
    """Ignore an error once all layers are captured: a head of fixed size refuses a guessed size, and is not needed."""
    try:
        yield
    except Exception as error:
        if is_sharded(network.model):
            raise
        try:
            _ = network.taps.features
        except CaptureError:
            raise error from None


def _candidate_images(models: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Generate batches of zeros: of the sizes in the networks' configurations, then of common sizes."""
    dtype = next((parameter.dtype for parameter in models[0].parameters()), torch.float32)
    first = next((module for module in models[0].modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield torch.zeros(EXAMPLE_IMAGES, first.in_features, dtype=dtype)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
    configured = [config.size[1:] for model in models if (config := input_config(model)) is not None]
    for height, width in dict.fromkeys([*configured, *((side, side) for side in CANDIDATE_IMAGE_SIDES)]):
        yield torch.zeros(EXAMPLE_IMAGES, channels, height, width, dtype=dtype)
