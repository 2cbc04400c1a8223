"""Configuration of the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, LayerNameError, OptionError
from knowiso_train.features.hooks import Side
from knowiso_train.features.modules import LayerPair
from knowiso_train.features.state import check_materialized
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    checked_value,
    validate_fields,
)

Solver = Literal["closed_form", "learned"]
Target = Literal["teacher", "consensus"]
Scale = Literal["log", "linear"]
Repeated = Literal["error", "first", "last"]
Schedule = Callable[[int], float] | Literal["learning_rate"] | None
Transform = Callable[[Tensor], Tensor]
Weight = float | Mapping[str, float] | Literal["auto", "balanced"]

# Fixed weight of the pairs that cannot be balanced, chosen on validation images, see docs/benchmarks.md#distillation
FALLBACK_WEIGHT = 100.0
# Channels up to which maps are 3×3 by default; their moments have 81 times as many entries as those of 1×1 maps
MAX_NEIGHBORHOOD_CHANNELS = 64


@dataclass(frozen=True)
class IsomorphismLossConfig:
    """Options of an `IsomorphismLoss`, without networks, layers and images; its docstring describes each.

    Raises:
        OptionTypeError: An option of the wrong type.
        OptionError: An option out of bounds, or options that exclude each other.

    Examples:
        >>> IsomorphismLossConfig(solver="learned", order=1).refresh
        10
        >>> IsomorphismLossConfig(order=1)
        Traceback (most recent call last):
        knowiso_train.errors.OptionError: solver="closed_form" fits maps of order 0; order=1 needs solver="learned"
    """

    solver: Solver = "closed_form"
    target: Target = "teacher"
    order: NonNegativeInt = 0
    kernel_size: PositiveInt | Literal["auto"] = "auto"
    scale: Scale = "log"
    weight: Weight = "auto"
    ratio: PositiveFloat = 1.0
    schedule: Schedule = "learning_rate"
    teacher_transform: Transform | None = None
    teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None
    peer_layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None
    peer_transforms: Transform | Sequence[Transform | None] | None = None
    ridge: NonNegativeFloat | Literal["auto"] = "auto"
    refresh: PositiveInt = 10
    window: Annotated[float, Range(1)] | None = None
    penalty: NonNegativeFloat = 0.1
    layout: str | Mapping[str, str] | None = None
    repeated: Repeated = "error"
    at: Side | Mapping[str, Side] = "output"

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.kernel_size != "auto" and self.kernel_size % 2 == 0:
            raise OptionError(f"kernel_size must be odd (1, 3, ...), got {self.kernel_size}")
        if self.order and self.solver != "learned":
            raise OptionError(f'solver="closed_form" fits maps of order 0; order={self.order} needs solver="learned"')
        if self.target == "consensus" and self.solver == "learned":
            raise OptionError('target="consensus" needs solver="closed_form"; solver="learned" needs target="teacher"')
        weights = list(self.weight.values()) if isinstance(self.weight, Mapping) else [self.weight]
        if not all(isinstance(weight, str) or 0 <= weight < math.inf for weight in weights):
            raise OptionError(f"weights must be finite and at least 0, got {self.weight!r}")
        if self.ratio != 1 and not isinstance(self.weight, str):
            raise OptionError(
                f"ratio= has no effect with weight={self.weight!r}, only with balanced weights. Multiply the weight by "
                f"{self.ratio:g}, or leave weight= out"
            )

    def check_networks(self, student: nn.Module, teacher: nn.Module, peers: Sequence[nn.Module]) -> None:
        """Check the networks of a loss.

        Raises:
            InputTypeError: Student or teacher is not a module.
            OptionError: Student and teacher are the same network, or peers and `target` exclude each other.
        """
        for role, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module):
                raise InputTypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
        checked_value("IsomorphismLoss: peers", peers, Sequence[nn.Module])
        check_materialized(teacher, *peers)
        if unwrap_model(student) is unwrap_model(teacher):
            raise OptionError(
                "student and teacher are the same network. To distill from the original weights, pass "
                "copy.deepcopy(student) as the teacher before training"
            )
        if self.target == "consensus" and not peers:
            raise OptionError('target="consensus" needs peers=[network, ...]')
        if self.target != "consensus" and peers:
            raise OptionError(f'peers= needs target="consensus", got target={self.target!r}')

    def pair_weights(self, pairs: Sequence[LayerPair]) -> list[float]:
        """Return the fixed weight of every layer pair; none if the weights are balanced.

        Raises:
            LayerNameError: Weights by student layer that do not name every layer once.
        """
        if isinstance(self.weight, str):
            return []
        if not isinstance(self.weight, Mapping):
            return [float(self.weight)] * len(pairs)
        names = {pair.source for pair in pairs}
        if set(self.weight) != names:
            raise LayerNameError(
                f"weight must name every student layer once: expected {sorted(names)}, got {sorted(self.weight)}"
            )
        return [float(self.weight[pair.source]) for pair in pairs]

    def kernel_size_of(self, channels: int, grids: Sequence[tuple[int, int] | None]) -> int:
        """Return the kernel size of the map of a layer pair.

        Args:
            channels: Channels of the student's layer.
            grids: (height, width) of both layers; None for tokens and vectors.

        Examples:
            >>> config = IsomorphismLossConfig()
            >>> [config.kernel_size_of(channels, [(8, 8), (8, 8)]) for channels in (64, 128)]
            [3, 1]
            >>> config.kernel_size_of(64, [(8, 8), None])
            1
        """
        if self.kernel_size != "auto":
            return self.kernel_size
        wide = channels > MAX_NEIGHBORHOOD_CHANNELS or any(grid is None or min(grid) < 3 for grid in grids)
        return 1 if wide or self.solver == "learned" or self.target == "consensus" else 3

    def peer_options(
        self, num_peers: int, teacher_layers: Sequence[str]
    ) -> list[tuple[dict[str, str], Transform | None]]:
        """Return the layer by teacher layer, and the transform, of every peer.

        Raises:
            OptionError: Lists of another length than the number of peers.
            LayerNameError: Peer layers that do not name a layer for each of the teacher's.
        """
        layers, transforms = self.peer_layers, self.peer_transforms
        layer_maps = [layers] * num_peers if layers is None or isinstance(layers, Mapping) else list(layers)
        all_transforms = [transforms] * num_peers if transforms is None or callable(transforms) else list(transforms)
        if len(layer_maps) != num_peers or len(all_transforms) != num_peers:
            raise OptionError(
                f"{num_peers} peers need one peer_layers and one peer_transforms for all or one for each, "
                f"got {len(layer_maps)} and {len(all_transforms)}"
            )
        options = []
        for index, (layer_map, transform) in enumerate(zip(layer_maps, all_transforms, strict=True)):
            names = {name: name for name in teacher_layers} if layer_map is None else dict(layer_map)
            if set(names) != set(teacher_layers):
                raise LayerNameError(
                    f"peer_layers of peer {index} must name a layer for each of the teacher's {list(teacher_layers)}, "
                    f"got {names}"
                )
            options.append((names, transform))
        return options
