"""`measure`: how much of one network's knowledge another network has, layer by layer, at which non-linear order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from knowiso_train.disentangle import Settings
from knowiso_train.errors import DataError, OptionError
from knowiso_train.features import Extractor, LayerPair, pair_layers, undisturbed
from knowiso_train.features.placement import on_device
from knowiso_train.measurement.capacity import check_capacity
from knowiso_train.measurement.images import Images, ImageStream
from knowiso_train.measurement.link import Link
from knowiso_train.measurement.report import Report
from knowiso_train.measurement.versions import network_name, versions
from knowiso_train.statistics import Group

DIRECTIONS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}


def measure(
    source: nn.Module,
    target: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str],
    *,
    order: int = 2,
    kernel_size: int | None = None,
    solver: str = "closed_form",
    directions: str = "forward",
    hidden: int | None = None,
    ridge: float | str = "search",
    split: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    max_images: int | None = None,
    max_rows: int = 131_072,
    positions: int | None = None,
    source_channels: int | None = None,
    noise_floor: bool = True,
    bootstrap: int = 500,
    source_transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layout: str | Mapping[str, str] | None = None,
    repeated: str = "error",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    names: tuple[str, str] | None = None,
    progress: bool = True,
    solver_options: Mapping[str, Any] | None = None,
) -> Report:
    """Split each target feature into the parts that the source reproduces with 0, 1, … K non-linear steps and the part that it cannot.

    Both networks run once per image, for all layer pairs together: first over the images to fit and select on, then over those to report on.
    Every share is measured on the report images.

    Args:
        source: the network that explains (A).
        target: the network that is explained (B).
        loader: batches (tensor, tuple or dict). A DataLoader over a map-style dataset is read by index, each image once, dealt to the
            processes of an initialised `torch.distributed` group; any other iterable must give the same batches when it is read twice.
        layers: names or globs for both networks, (source, target) tuples, or a dict {source: target}.
        order: K, the highest number of non-linear steps.
        kernel_size: neighbourhood of the maps; None is 1, or 3 for the paper's solver on grids.
        solver: "closed_form", or "paper" (arXiv 1908.01581, trained by its published recipe).
        directions: "forward" (B explained from A), "backward" (A explained from B) or "both".
        hidden: width of the hidden maps of orders ≥ 1; None is twice the target's channels, 512 at most.
        ridge: relative ridge ρ, or "search" on the selection images.
        split: fractions of the images to fit, select and report on, by a seeded hash of the dataset index.
        seed: of split, order, sample, bootstrap and hidden maps.
        max_images: read no more than this many.
        max_rows: most positions kept in memory for orders ≥ 1 (closed form) or for training (paper).
        positions: fit order 0 on this many random positions of each image instead of all.
        source_channels: project the source on this many random orthonormal directions first; the unexplained share is then an upper bound.
        noise_floor: fit once more with the targets shuffled between images, and report what that explains.
        bootstrap: replicates for the 95 % intervals.
        source_transform: applied to the images before the source network (resolution, normalisation).
        target_transform: the same before the target network.
        forward: `forward(model, batch)` where a network needs more than the images.
        layout: "nchw", "nhwc", "nlc", "ncl" or "nc" for all layers, or by layer name, where it cannot be inferred.
        repeated: "error", "first" or "last", for layers that fire more than once in one forward.
        device: run both networks there, and bring them back; None leaves each where it is.
        autocast: dtype for autocast around the networks (statistics stay in float32 and float64).
        names: of source and target in the report.
        progress: show a progress bar.
        solver_options: see `PaperRecipe` and `StageRecipe`.

    Returns:
        A `Report`; its pairs carry the fitted disentanglers.

    Raises:
        KnowisoError: see the subclasses; modes, `requires_grad`, devices and random state are as before, also then.

    Example:
        >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()) for _ in range(2))
        >>> images = torch.utils.data.TensorDataset(torch.randn(200, 3, 8, 8))
        >>> report = measure(a, b, torch.utils.data.DataLoader(images, batch_size=20), "1", order=0, progress=False)
        >>> abs(sum(report.pairs[0].shares) + report.pairs[0].unexplained - 1) < 1e-9
        True
    """
    if directions not in DIRECTIONS:
        raise OptionError(f"directions must be one of {tuple(DIRECTIONS)}, got {directions!r}")
    if bootstrap < 0:
        raise OptionError(f"bootstrap must be >= 0, got {bootstrap}")
    began = time.perf_counter()
    settings = Settings(order, kernel_size, solver, hidden, ridge, max_rows, positions, source_channels, seed, solver_options)
    group = Group()
    stream = ImageStream(loader, split, seed, max_images, group)
    pairs = pair_layers(source, target, layers)
    show = progress and group.rank == 0
    counts: dict[str, int] = dict.fromkeys(("fit", "select", "report"), 0)

    with ExitStack() as stack:
        stack.enter_context(undisturbed(source, target))
        stack.enter_context(on_device(device, source, target))
        networks = [
            stack.enter_context(
                Extractor(
                    model,
                    sorted({getattr(p, role) for p in pairs}),
                    name=role,
                    layout=layout,
                    repeated=repeated,
                    transform=transform,
                    forward=forward,
                    autocast=autocast,
                )
            )
            for model, role, transform in ((source, "source", source_transform), (target, "target", target_transform))
        ]

        def features(images: Images, *roles: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            for role in roles:
                counts[role] += int(images.of(role).sum())
            of_source, of_target = (network.run(images.batch) for network in networks)
            return of_source, of_target

        links: list[Link] = []
        for images in tqdm(stream.fitting(), desc="fit", total=stream.batches(report=False), unit="batch", disable=not show):
            of_source, of_target = features(images, "fit", "select")
            if not links:
                links = _links(pairs, directions, settings, of_source, of_target, stream, group, noise_floor, bootstrap)
            for link in links:
                link.fit(of_source, of_target, images)
        if not all(group.gather(bool(links))):
            raise DataError(f"no image to fit on for at least one of {group.size} process(es); give more images, or a smaller batch size")
        for link in tqdm(links, desc="solve", unit="layer", disable=not show or not (order or solver == "paper")):
            link.solve(progress=show)
        for images in tqdm(stream.reporting(), desc="report", total=stream.batches(report=True), unit="batch", disable=not show):
            of_source, of_target = features(images, "report")
            for link in links:
                link.report(of_source, of_target, images)
        totals = {role: sum(group.gather(count)) for role, count in counts.items()}
        if not totals["report"]:
            raise DataError(
                f"no image fell to the report set (fit {totals['fit']}, select {totals['select']}); "
                "give more images or a larger last fraction in split="
            )
        results = tuple(link.result() for link in links)

    source_name, target_name = names or (network_name(source), network_name(target))
    return Report(
        source=source_name,
        target=target_name,
        pairs=results,
        images=totals,
        settings=settings.to_dict()
        | {"directions": directions, "split": list(split), "max_images": max_images, "bootstrap": bootstrap, "processes": group.size},
        seconds=time.perf_counter() - began,
        versions=versions(),
    )


def _links(
    pairs: list[LayerPair],
    directions: str,
    settings: Settings,
    of_source: dict[str, torch.Tensor],
    of_target: dict[str, torch.Tensor],
    stream: ImageStream,
    group: Group,
    noise_floor: bool,
    bootstrap: int,
) -> list[Link]:
    """One link per layer pair and direction, all shapes known, and memory checked before any of it is taken."""
    make = [
        Link(
            pair,
            direction,
            settings,
            of_source[pair.source],
            of_target[pair.target],
            stream.expected,
            group,
            noise_floor=noise_floor,
            bootstrap=bootstrap,
        )
        for direction in DIRECTIONS[directions]
        for pair in pairs
    ]
    by_device: dict[torch.device, list[Link]] = {}
    for link in make:
        by_device.setdefault(link.device, []).append(link)
    for device, members in by_device.items():
        check_capacity([member.need for member in members], device)
    return make
