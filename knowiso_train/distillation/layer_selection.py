"""Choice of layer pairs for distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from knowiso_train.distillation._shape_inference import EXAMPLE_IMAGES
from knowiso_train.distillation.config import IsomorphismLossConfig, Repeated
from knowiso_train.errors import LayerNameError, OptionError
from knowiso_train.features.calls import forward_override
from knowiso_train.features.modules import LayerPair, pair_layers
from knowiso_train.features.state import device_of, preserve_random_state
from knowiso_train.features.summary import stage_grids
from knowiso_train.features.wrappers import runnable_model
from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import Report
from knowiso_train.utils.batch import get_inputs, image_size, to_device
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.validation import PositiveInt, validate_arguments

# Unexplained share below which a pair is not selected
MIN_UNEXPLAINED = 0.05


@dataclass(frozen=True)
class Suggestion:
    """Layer pairs for `IsomorphismLoss`.

    Attributes:
        layers: Selected (student layer, teacher layer) pairs, in the order of the networks.
        report: Measurement of all candidate pairs.
    """

    layers: tuple[tuple[str, str], ...]
    report: Report

    def __str__(self) -> str:
        lines = []
        for pair in self.report:
            mark = "selected" if (pair.source, pair.target) in self.layers else "        "
            lines.append(
                f"  {mark}  {pair.source} → {pair.target}: unexplained {pair.unexplained:.1%}, "
                f"noise floor {pair.noise_floor:.1%}"
            )
        return "\n".join(lines)


@validate_arguments
def suggest_layers(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    max_pairs: PositiveInt = 3,
    max_images: PositiveInt = 512,
    teacher_transform: Callable[[Tensor], Tensor] | None = None,
    teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
    layout: str | Mapping[str, str] | None = None,
    repeated: Repeated = "error",
    verbose: bool = True,
) -> Suggestion:
    """Select pairs of stages for `IsomorphismLoss` by the teacher's unexplained share, given the student's features.

    Each stage of the student is paired with the teacher's stage of the nearest grid, among equal grids of the nearest
    relative depth. The pairs are measured at order 0. Pairs below 5 % unexplained are excluded, and pairs whose
    explained share is not above the noise floor. Of the others those with the largest unexplained shares are selected.

    Args:
        student: Network in training.
        teacher: Frozen reference network.
        loader: Batches of student images, as for `measure`.
        max_pairs: Maximal number of pairs. Default: 3.
        max_images: Maximal number of images of the measurement. Default: 512.
        teacher_transform: Transform of the images for the teacher. Default: none.
        teacher_forward: Function `teacher_forward(teacher, images)` in place of `teacher(images)`.
        layout: Layout of layers for which it cannot be inferred, as for `measure`.
        repeated: Capture to use of layers that fire more than once: "first", "last", or "error" (default).
        verbose: Print the shares on the main process.

    Raises:
        OptionError: An option out of bounds.
        LayerNameError: A loader without images, networks without stages, or no pair that can be selected.

    Examples:
        >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)) for _ in range(2))
        >>> images = torch.utils.data.TensorDataset(torch.randn(80, 3, 16, 16))
        >>> loader = torch.utils.data.DataLoader(images, batch_size=20)
        >>> suggest_layers(a, b, loader, verbose=False).layers
        (('1', '1'), ('2', '2'))
    """
    with preserve_random_state():
        images = next((get_inputs(batch) for batch in islice(iter(loader), 1)), None)
    if images is None:
        raise LayerNameError('layers="auto" needs images to measure on, and the loader has none')
    example = images[:EXAMPLE_IMAGES]
    forward = forward_override(teacher, teacher_forward or _plain_forward)
    pairs = pair_stages(_stages(student, example, None, forward), _stages(teacher, example, teacher_transform, forward))
    if not pairs:
        raise LayerNameError(
            "expected stages with feature maps or tokens in both networks, found none. "
            "Name the layers: layers={student layer: teacher layer}"
        )
    report = measure(
        student, teacher, loader, pairs, order=0, max_images=max_images, bootstrap=0, layout=layout,
        target_transform=teacher_transform, repeated=repeated, forward=forward, progress=False,
    )  # fmt: skip
    candidates = [
        pair for pair in report if pair.unexplained > MIN_UNEXPLAINED and sum(pair.shares) > (pair.noise_floor or 0.0)
    ]
    selected = sorted(candidates, key=lambda pair: -pair.unexplained)[:max_pairs]
    suggestion = Suggestion(tuple((pair.source, pair.target) for pair in report if pair in selected), report)
    if verbose and ProcessGroup().rank == 0:
        print(f"candidate layers, {report.target} → {report.source}:\n{suggestion}")
    if not selected:
        raise LayerNameError(
            f"no pair has both unexplained and explained shares of the teacher:\n{suggestion}\n"
            "Name the layers to distill them anyway"
        )
    return suggestion


def selected_pairs(
    student: nn.Module, teacher: nn.Module, layers: Any, loader: Iterable[Any] | None, config: IsomorphismLossConfig
) -> tuple[LayerPair, ...]:
    """Return the pairs of layers by name, or those that `layers="auto"` selects.

    Raises:
        OptionError: "auto" without a loader or with another side than the outputs, or a loader beside names.
        LayerNameError: As `pair_layers` and `suggest_layers`.
    """
    if layers != "auto":
        if loader is not None:
            raise OptionError('loader= has no effect with layers by name, only with layers="auto". Leave it out')
        return tuple(pair_layers(student, teacher, layers))
    if loader is None:
        raise OptionError('layers="auto" measures unexplained shares: pass loader=, batches of student images')
    if config.at != "output":
        raise OptionError(f'layers="auto" selects outputs of layers; name the layers for at={config.at!r}')
    suggestion = suggest_layers(
        student,
        teacher,
        loader,
        teacher_transform=config.teacher_transform,
        teacher_forward=config.teacher_forward,
        layout=config.layout,
        repeated=config.repeated,
    )
    return tuple(pair_layers(student, teacher, suggestion.layers))


def pair_stages(
    student_grids: Mapping[str, tuple[int, int]], teacher_grids: Mapping[str, tuple[int, int]]
) -> list[tuple[str, str]]:
    """Pair each stage of the student with the teacher's stage of the nearest grid, then of the nearest relative depth.

    The distance of grids is |log(H_S W_S / H_T W_T)|. The relative depth of the i-th of n stages is i / n.

    Args:
        student_grids: (height, width) by layer name, in the order of the network.
        teacher_grids: Likewise.

    Returns:
        (student layer, teacher layer) tuples; empty for a teacher without stages.

    Examples:
        >>> pair_stages({"a": (8, 8), "b": (8, 8)}, {"1": (8, 8), "2": (8, 8), "3": (8, 8), "4": (8, 8)})
        [('a', '2'), ('b', '4')]
    """
    if not teacher_grids:
        return []
    teacher_stages = [
        (name, height * width, index / len(teacher_grids))
        for index, (name, (height, width)) in enumerate(teacher_grids.items(), 1)
    ]
    pairs = []
    for index, (name, (height, width)) in enumerate(student_grids.items(), 1):
        depth = index / len(student_grids)
        distances = [
            (abs(math.log(height * width / positions)), abs(depth - teacher_depth))
            for _, positions, teacher_depth in teacher_stages
        ]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        pairs.append((name, teacher_stages[nearest][0]))
    return pairs


def _plain_forward(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _stages(
    model: nn.Module,
    images: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, tuple[int, int]]:
    """Return the grid of every stage by layer name, for the transformed images."""
    device = device_of(model)
    images = images if device is None else to_device(images, device)
    inputs = images if transform is None else transform(images)
    return stage_grids(model, lambda: forward(runnable_model(model), inputs), image_size(inputs))
