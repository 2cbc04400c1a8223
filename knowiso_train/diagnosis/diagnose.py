"""Diagnosis of a weak network: its blind spots and its unreliable features beside strong networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowiso_train.diagnosis._run import DiagnosisRun, Transform
from knowiso_train.diagnosis.config import DiagnoseConfig
from knowiso_train.diagnosis.report import Diagnosis
from knowiso_train.errors import OptionError
from knowiso_train.features.hooks import Side
from knowiso_train.features.modules import network_name
from knowiso_train.measurement.config import Mask, MeasureConfig, Repeated
from knowiso_train.measurement.functional import AUTO_LABELS
from knowiso_train.measurement.measure import Layers
from knowiso_train.utils.validation import validate_arguments


@validate_arguments
def diagnose(
    weak: nn.Module,
    strong: nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    layers: Layers,
    *,
    order: int = 0,
    kernel_size: int | None = None,
    num_directions: int = 6,
    num_shared: int = 3,
    num_images: int = 8,
    num_thumbnails: int = 256,
    functional: bool = True,
    labels: str | Callable[[Any], Any] | None = AUTO_LABELS,
    groups: str | Callable[[Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    to_image: Callable[[Any], Tensor] | None = None,
    hidden: int | None = None,
    ridge: float | Literal["search"] = "search",
    split: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    max_images: int | None = None,
    max_rows: int | None = None,
    positions: int | None = None,
    source_channels: int | None = None,
    noise_floor: bool = True,
    bootstrap: int = 500,
    weak_transform: Transform | None = None,
    strong_transform: Transform | Sequence[Transform | None] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    at: Side | Mapping[str, Side] = "output",
    mask: Mask | None = "auto",
    layout: str | Mapping[str, str] | None = None,
    repeated: Repeated = "error",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
    solver_options: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Find the blind spots and the unreliable features of a weak network by comparison with strong networks.

    Blind spots are the residual of a strong network's feature given the weak network's. Unreliable features are the
    residual of the weak network's feature given a strong one's. Both are examined on the report images by direction,
    channel, position, class and image. Method: arXiv 1908.01581, section 4.

    Args:
        weak: Network to diagnose.
        strong: Network to compare with, or several. With several, each residual is also compared with what the other
            strong networks reproduce.
        loader: Batches, as for `measure`.
        layers: Layer pairs, as for `measure`, with the weak network as the source and each strong one as the target.
        order: Highest number of non-linear steps.
        kernel_size: Kernel size of the maps. None: 1.
        num_directions: Number of directions of each residual.
        num_shared: Number of directions of each explained part.
        num_images: Number of images of each ranking.
        num_thumbnails: Maximum number of pictures in the result; further images have only a heat map.
        functional: Measure the functional shares of the pairs, and the effect of each direction on the network's
            output. The layers behind the examined one run once per direction and batch.
        labels: Labels of the images, for the results by class and for top-1: the key of batches that are mappings, or a
            function of the batch. "auto": the second element of a tuple, or an entry such as "labels". None: no labels.
        groups: Class of each image for the results by class, in the forms of `labels`, where it is not a class of the
            networks, such as the origin of the image. None: `labels`.
        output: Function of a network's output that returns its logits (N, C, …). None: as for `measure`.
        class_names: Name of each class. None: no names.
        to_image: Function of the inputs that returns images with values in [0, 1], for the pictures. None: each image
            is scaled from its least to its greatest value.
        hidden: Width of the hidden maps, as for `measure`.
        ridge: Relative ridge ρ, or "search" on the selection images.
        split: Fractions of the images to fit, select and report on.
        seed: Seed of split, order, sample, bootstrap and hidden maps.
        max_images: Maximum number of images. None: all.
        max_rows: Maximum number of positions kept in memory for orders ≥ 1, as for `measure`.
        positions: Number of random positions of each image for the fit of order 0. None: all.
        source_channels: Number of random orthonormal directions to project the source feature on. None: no projection.
        noise_floor: Also report the share that is explained after a permutation of the targets.
        bootstrap: Number of replicates for the 95 % intervals.
        weak_transform: Transform of the images for the weak network.
        strong_transform: Transform for the strong network, or one for each.
        forward: `forward(model, batch)`, replaces `model(images)`.
        at: Side to examine, "output" or "input", or a mapping from name or glob to side.
        mask: Valid positions of the batches, as for `measure`.
        layout: Layout of the features, as for `measure`.
        repeated: Treatment of layers that are called more than once.
        device: Device of all networks during the call. None: their present devices.
        autocast: dtype of autocast for the networks. None: no autocast.
        names: Names of all networks in the result, the weak one first. None: class names.
        progress: Show progress bars.
        solver_options: Fields of `NonlinearConfig`.

    Returns:
        A `Diagnosis` with one result for each layer pair, strong network and kind.

    Raises:
        KnowisoError: See its subclasses. Modes, `requires_grad`, devices and random state are restored also then.

    Examples:
        >>> strong = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> weak = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> loader = torch.utils.data.DataLoader(torch.randn(200, 3, 8, 8), batch_size=50)
        >>> diagnosis = diagnose(weak, strong, loader, "1", progress=False)
        >>> blind_spots = diagnosis["1"]
        >>> len(blind_spots.channels), len(blind_spots.directions)
        (8, 6)
    """
    networks = [weak, *([strong] if isinstance(strong, nn.Module) else strong)]
    if len(networks) == 1:
        raise OptionError("expected at least one strong network, got none")
    config = MeasureConfig(
        order=order,
        kernel_size=kernel_size,
        directions="both",
        hidden=hidden,
        ridge=ridge,
        split=split,
        seed=seed,
        max_images=max_images,
        max_rows=max_rows,
        positions=positions,
        source_channels=source_channels,
        noise_floor=noise_floor,
        bootstrap=bootstrap,
        functional=functional,
        labels=labels,
        output=output,
        forward=forward,
        at=at,
        mask=mask,
        layout=layout,
        repeated=repeated,
        device=device,
        autocast=autocast,
        progress=progress,
        solver_options=solver_options,
    )
    options = DiagnoseConfig(
        num_directions=num_directions,
        num_shared=num_shared,
        num_images=num_images,
        num_thumbnails=num_thumbnails,
        groups=groups,
        class_names=class_names,
        to_image=to_image,
    )
    transforms = _transforms(weak_transform, strong_transform, len(networks))
    run = DiagnosisRun(networks, _names(networks, names), transforms, loader, config, options)
    return run.diagnose(layers)


def _names(networks: Sequence[nn.Module], names: Sequence[str] | None) -> list[str]:
    """Return a different name for each network: the given ones, or class names with the roles if they are equal."""
    if names is not None:
        if len(names) != len(networks) or len(set(names)) != len(networks):
            raise OptionError(
                f"expected a different name for each of the {len(networks)} networks, got {list(names)}; "
                "the weak network is first"
            )
        return list(names)
    classes = [network_name(network) for network in networks]
    roles = ["weak", *("strong" if len(networks) == 2 else f"strong {i}" for i in range(1, len(networks)))]
    repeated = Counter(classes)
    return [f"{name} ({role})" if repeated[name] > 1 else name for name, role in zip(classes, roles, strict=True)]


def _transforms(
    weak: Transform | None, strong: Transform | Sequence[Transform | None] | None, count: int
) -> list[Transform | None]:
    """Return the transform of each network, the weak one first."""
    if not isinstance(strong, Sequence):
        return [weak, *[strong] * (count - 1)]
    if len(strong) != count - 1:
        raise OptionError(
            f"strong_transform must be one function, or one for each of the {count - 1} strong networks; "
            f"got {len(strong)}"
        )
    return [weak, *strong]
