"""Diagnoses of made-up figures."""

from __future__ import annotations

import numpy as np

from knowiso_train.diagnosis import (
    ClassResult,
    Confirmation,
    Diagnosis,
    FeatureDirection,
    LayerDiagnosis,
    OutputEffect,
    RankedImage,
    Thumbnail,
)
from knowiso_train.diagnosis.report import Kind
from knowiso_train.diagnosis.stability import StabilityEntry, StabilityReport
from knowiso_train.pages import thumbnail
from tests.helpers.reports import functional_pair, pair

NUM_IMAGES, NUM_CHANNELS, GRID = 6, 30, 4
CLASS_NAMES = ("cat", "dog", "<script>alert(1)</script>")


def diagnosis(*, strong: tuple[str, ...] = ("large",), labels: bool = True) -> Diagnosis:
    """Return a diagnosis of two layers in both kinds, with a thumbnail of every image but one."""
    rng = np.random.default_rng(0)
    layers = tuple(
        layer_diagnosis(rng, kind, name, network, strong, labels)
        for name in ("layer1", "layer2.<b>")
        for network in strong
        for kind in ("blind_spots", "unreliable")
    )
    return Diagnosis(
        weak="small",
        strong=strong,
        layers=layers,
        images={"fit": 60, "select": 20, "report": 20},
        thumbnails=tuple(Thumbnail(i, thumbnail(rng.random((3, 8, 8)))) for i in range(NUM_IMAGES - 1)),
        class_names=CLASS_NAMES if labels else (),
        settings={"order": 1, "seed": 0},
        seconds=1.5,
        versions={"torch": "2"},
    )


def layer_diagnosis(
    rng: np.random.Generator, kind: Kind, name: str, network: str, strong: tuple[str, ...], labels: bool
) -> LayerDiagnosis:
    """Return one result."""
    networks = (network, "small") if kind == "blind_spots" else ("small", network)
    others = tuple(other for other in strong if other != network) if kind == "blind_spots" else ()
    directions = tuple(_direction(rng, labels, len(others)) for _ in range(5))
    classes = tuple(ClassResult(label, 10, 0.9 - 0.1 * label, 1 / 3) for label in range(3)) if labels else ()
    return LayerDiagnosis(
        kind=kind,
        network=networks[0],
        explaining=networks[1],
        pair=functional_pair(name, name, "forward" if kind == "blind_spots" else "backward", warnings=("rough",)),
        directions=directions,
        shared=directions[:2],
        channels=tuple(rng.random(NUM_CHANNELS).tolist()),
        channel_variances=tuple(rng.dirichlet(np.ones(NUM_CHANNELS)).tolist()),
        positions=_heat_map(rng),
        position_variances=_heat_map(rng),
        classes=classes,
        images=tuple(_image(rng, index, labels, None) for index in range(NUM_IMAGES)),
        confirmations=tuple(Confirmation(other, 0.05, (0.05,) * NUM_CHANNELS) for other in others),
        warnings=("few images",),
    )


def _direction(rng: np.random.Generator, labels: bool, num_others: int) -> FeatureDirection:
    return FeatureDirection(
        share=float(rng.random() / 10),
        unexplained=float(rng.random()),
        channels=(3, 1),
        weights=(0.8, -0.6),
        images=tuple(_image(rng, index, labels, 2.5) for index in (0, NUM_IMAGES - 1)),
        effect=OutputEffect(0.125, 0.75, -0.01 if labels else None),
        confirmed=(0.5,) * num_others,
    )


def _image(rng: np.random.Generator, index: int, labels: bool, value: float | None) -> RankedImage:
    label = index % 4 if labels else None  # one more class than there are names
    return RankedImage(index, label, float(rng.random() / 10), value, (1, 2), _heat_map(rng))


def _heat_map(rng: np.random.Generator) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, rng.random((GRID, GRID)).tolist()))


def stability_report(*, functional: bool = True) -> StabilityReport:
    """Return a stability report of two layers and three networks."""
    networks, layers = ("a", "b", "<script>alert(1)</script>"), ("layer1", "layer2")
    pair_of = functional_pair if functional else pair
    entries = []
    for layer in layers:
        for i, source in enumerate(networks):
            for j, target in enumerate(networks):
                if i != j:
                    result = pair_of(layer, layer, shares=(0.1 * (i + 1), 0.2 * (j + 1)), warnings=("rough",))
                    entries.append(StabilityEntry(layer, source, target, result))
    return StabilityReport(
        networks=networks,
        layers=layers,
        entries=tuple(entries),
        images={"fit": 60, "select": 20, "report": 20},
        settings={"order": 1},
        seconds=1.5,
        versions={"torch": "2"},
    )
