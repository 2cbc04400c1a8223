"""Options and checks of the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from knowiso_train.distillation.frozen_model import FrozenModel, Transform
from knowiso_train.errors import InputTypeError, LayerNameError, LayoutError, NonFiniteError, OptionError
from knowiso_train.features.extractor import FeatureReader
from knowiso_train.features.modules import LayerPair, unwrap_model

Solver = Literal["closed_form", "learned"]
Target = Literal["teacher", "consensus"]


def pair_key(pair: LayerPair) -> str:
    """A name that ModuleDict takes: no dots."""
    return f"{pair.source}→{pair.target}".replace(".", "/")


def pair_label(pair: LayerPair, pairs: Sequence[LayerPair]) -> str:
    """The student's layer, and the teacher's where the former stands in several pairs."""
    return pair.source if sum(other.source == pair.source for other in pairs) == 1 else f"{pair.source}→{pair.target}"


def fixed_weights(weight: float | Mapping[str, float] | str, pairs: Sequence[LayerPair]) -> list[float]:
    if isinstance(weight, Mapping):
        names = {pair.source for pair in pairs}
        if set(weight) != names:
            raise LayerNameError(
                f"weight must name every student layer once: expected {sorted(names)}, got {sorted(weight)}"
            )
        values = [float(weight[pair.source]) for pair in pairs]
    elif isinstance(weight, str):
        raise OptionError(f'weight must be a number, a dict by student layer, or "balanced"; got {weight!r}')
    else:
        if not isinstance(weight, (int, float)):
            raise OptionError(f'weight must be a number, a dict by student layer, or "balanced"; got {weight!r}')
        values = [float(weight)] * len(pairs)
    if not all(0 <= value < math.inf for value in values):
        raise OptionError(f"weights must be finite and >= 0, got {values}")
    return values


def freeze_peers(
    peers: Sequence[nn.Module],
    of_teacher: list[str],
    layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None,
    transforms: Transform | Sequence[Transform | None] | None,
    layout: str | Mapping[str, str] | None,
    repeated: str,
) -> list[tuple[FrozenModel, dict[str, str]]]:
    """Each peer, with the layer of it that stands for each of the teacher's."""
    named = [layers] * len(peers) if layers is None or isinstance(layers, Mapping) else list(layers)
    applied = [transforms] * len(peers) if transforms is None or callable(transforms) else list(transforms)
    if len(named) != len(peers) or len(applied) != len(peers):
        raise OptionError(
            f"{len(peers)} peers need one peer_layers and peer_transforms for all or one each, got {len(named)} and {len(applied)}"
        )
    found = []
    for i, (peer, names, transform) in enumerate(zip(peers, named, applied, strict=True)):
        own = {name: name for name in of_teacher} if names is None else dict(names)
        if set(own) != set(of_teacher):
            raise LayerNameError(
                f"peer_layers of peer {i} must name a layer for each of the teacher's {of_teacher}, got {own}"
            )
        network = FrozenModel(peer, list(dict.fromkeys(own.values())), f"peer {i}", transform, None, layout, repeated)
        found.append((network, own))
    return found


def check_options(
    student: nn.Module,
    teacher: nn.Module,
    solver: Solver,
    target: Target,
    order: int,
    kernel_size: int,
    refresh: int,
    ridge: float,
    window: float | None,
    ratio: float,
    peers: Sequence[nn.Module],
    repeated: str,
    schedule: object,
) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
    if unwrap_model(student) is unwrap_model(teacher):
        raise OptionError(
            "student and teacher are the same network; copy it (copy.deepcopy) before training, to hold the student to its original"
        )
    for name, choice, choices in (("solver", solver, get_args(Solver)), ("target", target, get_args(Target))):
        if choice not in choices:
            raise OptionError(f"{name} must be {' or '.join(map(repr, choices))}, got {choice!r}")
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise OptionError(f"order must be an integer K >= 0 (the number of non-linear steps), got {order!r}")
    if order and solver != "learned":
        raise OptionError(f'solver="closed_form" fits maps of order 0; order={order} needs solver="learned"')
    if target == "consensus" and solver == "learned":
        raise OptionError('target="consensus" needs solver="closed_form"; solver="learned" needs target="teacher"')
    for name, count in (("kernel_size", kernel_size), ("refresh", refresh)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise OptionError(f"{name} must be an integer, got {count!r}")
    for name, number in (("ridge", ridge), ("window", 1 if window is None else window), ("ratio", ratio)):
        if not isinstance(number, (int, float)):
            raise OptionError(f"{name} must be a number, got {number!r}")
    if schedule is not None and not callable(schedule):
        raise OptionError(
            f"schedule must be a function of the number of calls, such as WeightSchedule(warmup=500), got {schedule!r}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise OptionError(f"kernel_size must be odd and positive (1, 3, ...), got {kernel_size}")
    if refresh < 1:
        raise OptionError(f"refresh must be at least 1 call, got {refresh}")
    if not ridge >= 0:
        raise OptionError(f"ridge must be >= 0 (relative to the mean variance of the student's feature), got {ridge}")
    if window is not None and not window >= 1:
        raise OptionError(f"window must be at least 1 call, or None, got {window}")
    if not ratio > 0:
        raise OptionError(f"ratio must be positive, got {ratio}")
    if (target == "consensus") != bool(peers):
        raise OptionError(
            'target="consensus" needs peers=[network, ...]'
            if target == "consensus"
            else f'peers= needs target="consensus", got target={target!r}'
        )
    if repeated not in ("error", "first", "last"):
        raise OptionError(f"repeated must be 'error', 'first' or 'last', got {repeated!r}")


def check_grids(
    pair: LayerPair, feature: Tensor, target: Tensor, of_student: FeatureReader, of_teacher: FeatureReader
) -> None:
    """Raises:
    LayoutError: tokens without a known grid on one side, a map on the other.
    """
    sides = (
        ("student", of_student, pair.source, feature, target),
        ("teacher", of_teacher, pair.target, target, feature),
    )
    for role, reader, name, own, other in sides:
        if name in reader.without_grid and min(other.shape[2:]) > 1:
            raise LayoutError(
                f"{role}: the {own.shape[2]} tokens of layer {name!r} form no grid that is known, so they have no place on the other "
                f"network's of {other.shape[2]} × {other.shape[3]}: tokens that are dropped or merged (patch_drop_rate), or images of a size "
                "that the network does not name. Train without dropping, or pair a pooled layer."
            )


def check_finite(pair: LayerPair, loss: Tensor, feature: Tensor, target: Tensor, step: int) -> None:
    """Reads the loss.

    Raises:
        NonFiniteError: NaN or Inf; the message names layer and step.
    """
    if not bool(loss.detach().isfinite()):
        counts = [
            f"{role} {name!r}: {int((~x.isfinite()).sum())} of {x.numel()} values"
            for role, name, x in (("student's", pair.source, feature.detach()), ("teacher's", pair.target, target))
        ]
        raise NonFiniteError(
            f"NaN or Inf in the isomorphism loss at step {step} (counted from 0): {'; '.join(counts)} are not finite. "
            "Nothing was accumulated from that batch. Check learning rate, images and the autocast dtype."
        )
