"""Choice of layer pairs for distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

from torch import Tensor, nn

from knowiso_train.errors import LayerNameError
from knowiso_train.features.modules import forward_override, unwrap_model
from knowiso_train.features.state import device_of
from knowiso_train.features.summary import stage_grids
from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import Report
from knowiso_train.utils.batch import get_inputs, to_device
from knowiso_train.utils.distributed import ProcessGroup

MIN_UNEXPLAINED = 0.05  # unexplained share below which there is nothing left to teach


@dataclass(frozen=True)
class Suggestion:
    """Pairs worth teaching, most unexplained first taken, in the order of the networks; and the report that says so."""

    layers: tuple[tuple[str, str], ...]
    report: Report

    def __str__(self) -> str:
        lines = []
        for pair in self.report:
            chosen = "  teach" if (pair.source, pair.target) in self.layers else "       "
            lines.append(
                f"{chosen}  {pair.source} → {pair.target}: unexplained {pair.unexplained:.1%}, noise floor {pair.noise_floor:.1%}"
            )
        return "\n".join(lines)


def suggest_layers(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    most: int = 3,
    max_images: int = 512,
    teacher_transform: Callable[[Tensor], Tensor] | None = None,
    teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
    layout: str | Mapping[str, str] | None = None,
    repeated: str = "error",
    verbose: bool = True,
) -> Suggestion:
    """Pairs of stages for `IsomorphismLoss`, by what the student does not explain of the teacher yet.

    Every stage of the student is held against the teacher's stage on the nearest grid (of several, at the nearest
    relative depth), at order 0.
    Left out are pairs that the student explains to 95 % already, and pairs on which nothing is explained beyond the
    noise floor; of the others
    those with the largest unexplained shares are taken.

    Args:
        student: the network that is trained.
        teacher: the network that is asked.
        loader: images as the student takes them; read as `measure` reads.
        most: pairs to take.
        max_images: to measure on.
        teacher_transform: applied to the images before the teacher.
        teacher_forward: `teacher_forward(teacher, images)` in place of `teacher(images)`.
        layout: of layers whose layout cannot be inferred, as for `measure`.
        repeated: "error", "first" or "last", for layers that fire more than once.
        verbose: print the shares, on the main process.

    Raises:
        LayerNameError: networks without two stages in common, or nothing left to teach.

    Example:
        >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)) for _ in range(2))
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(80, 3, 16, 16)), batch_size=20)
        >>> suggest_layers(a, b, loader, verbose=False).layers
        (('1', '1'), ('2', '2'))
    """
    images = next((get_inputs(batch) for batch in islice(iter(loader), 1)), None)
    if images is None:
        raise LayerNameError("layers='auto' needs images to measure on, and the loader gives none")
    few = images[:2]
    forward = forward_override(teacher, teacher_forward or _plainly)
    pairs = _nearest(_stages(student, few, None, forward), _stages(teacher, few, teacher_transform, forward))
    if not pairs:
        raise LayerNameError(
            "no stages with maps or tokens were found in both networks; name the layers: layers={student layer: teacher layer}"
        )
    report = measure(
        student, teacher, loader, pairs, order=0, max_images=max_images, bootstrap=0, target_transform=teacher_transform, layout=layout,
        repeated=cast(Literal["error"], repeated), forward=forward, progress=False,
    )  # fmt: skip
    open_ = [
        pair for pair in report if pair.unexplained > MIN_UNEXPLAINED and sum(pair.shares) > (pair.noise_floor or 0.0)
    ]
    taken = sorted(open_, key=lambda pair: -pair.unexplained)[:most]
    suggestion = Suggestion(tuple((pair.source, pair.target) for pair in report if pair in taken), report)
    if verbose and ProcessGroup().rank == 0:
        print(f"layers of {report.target} that {report.source} may learn:\n{suggestion}")
    if not taken:
        raise LayerNameError(
            f"nothing is left to teach, or nothing is explained beyond noise:\n{suggestion}\nName the layers to teach them anyway."
        )
    return suggestion


def _plainly(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _stages(
    model: nn.Module,
    images: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, tuple[int, int]]:
    device = device_of(model)
    images = images if device is None else to_device(images, device)
    given = images if transform is None else transform(images)
    return stage_grids(model, lambda: forward(unwrap_model(model), given))


def _nearest(student: dict[str, tuple[int, int]], teacher: dict[str, tuple[int, int]]) -> list[tuple[str, str]]:
    def distance(i: int, j: int) -> tuple[float, float]:
        (a, b), (c, d) = list(student.values())[i], list(teacher.values())[j]
        return abs(math.log(a * b / (c * d))), abs(_relative(i, student) - _relative(j, teacher))

    names = list(teacher)
    if not names:
        return []
    nearest = [min(range(len(names)), key=partial(distance, i)) for i in range(len(student))]
    return [(name, names[j]) for name, j in zip(student, nearest, strict=True)]


def _relative(index: int, stages: dict[str, Any]) -> float:
    return (index + 1) / len(stages)
