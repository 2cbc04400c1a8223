"""Shapes and layouts of features from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from knowiso_train.distillation.frozen_model import FrozenModel, StudentInput
from knowiso_train.errors import CaptureError, KnowisoError, OptionError
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.loading.timm import input_config
from knowiso_train.utils.batch import image_size

PROBE_SIDES = (64, 224, 32, 128)  # tried where a network does not say what it was made for
PROBE_IMAGES = 2


def infer_shapes(
    student: nn.Module,
    taps: FeatureTaps[Tensor],
    reader: FeatureReader,
    frozen: Sequence[FrozenModel],
    example: Tensor | None,
) -> None:
    """Run every network once on a small batch; the readers learn the channels.

    Args:
        student: the network.
        taps: of the student.
        reader: of the student.
        frozen: teacher and peers.
        example: a batch of images for the student; None guesses its size from timm's configuration and the first layer.

    Raises:
        OptionError: no size that was guessed fits all networks.
    """
    if example is not None:
        _run(student, taps, reader, frozen, example[:PROBE_IMAGES])
        return
    last: Exception | None = None
    for images in _guesses([student, *(network.model for network in frozen)]):
        try:
            _run(student, taps, reader, frozen, images)
            return
        except CaptureError:
            raise
        except (KnowisoError, RuntimeError, ValueError, AssertionError) as error:  # timm asserts on sizes
            last = last or error
    raise OptionError(
        "cannot run student and teacher on a guessed input. Pass example=images, one batch as the student gets it; and teacher_transform= where the "
        f"teacher needs another resolution or normalization. The first attempt ended with: {type(last).__name__}: {last}"
    ) from last


def _run(
    student: nn.Module, taps: FeatureTaps[Tensor], reader: FeatureReader, frozen: Sequence[FrozenModel], images: Tensor
) -> None:
    models = [student, *(network.model for network in frozen)]
    with ExitStack() as stack:
        stack.enter_context(preserve_state(*models))
        stack.enter_context(torch.no_grad())
        # Compiled parts must not be compiled without the hooks of the training
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        device = device_of(student)
        images = images if device is None else images.to(device)
        stack.enter_context(taps)
        with _unless_captured(taps):
            unwrap_model(student)(images)
        reader.read(taps.collect(), len(images), image_size(images))
        for network in frozen:
            stack.enter_context(network.taps)
            with _unless_captured(network.taps):
                network.called(StudentInput(images, None))
            network.collected(network.prepared(images))


@contextmanager
def _unless_captured(taps: FeatureTaps[Tensor]) -> Iterator[None]:
    """Lets a forward fail after the tapped layers: a head of fixed size refuses a guessed one, and is not asked for anything."""
    try:
        yield
    except Exception as failure:
        try:
            _ = taps.features
        except CaptureError:
            raise failure from None


def _guesses(models: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Zero images of the sizes that the networks name, then of common ones."""
    dtype = next((parameter.dtype for parameter in models[0].parameters()), torch.float32)
    first = next((module for module in models[0].modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield torch.zeros(PROBE_IMAGES, first.in_features, dtype=dtype)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
    named = [config.size[1:] for model in models if (config := input_config(model)) is not None]
    for height, width in dict.fromkeys([*named, *((side, side) for side in PROBE_SIDES)]):
        yield torch.zeros(PROBE_IMAGES, channels, height, width, dtype=dtype)
