"""Padded positions are left out of fit, selection, report, noise floor and similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from knowiso_train import Report, measure
from knowiso_train.errors import CaptureError, InputTypeError, OptionError, ShapeError
from knowiso_train.measurement.similarity import SIMILARITY_NAMES
from knowiso_train.utils.hashing import split_by_hash

CHANNELS, LENGTH, PADDED_LENGTH = 5, 6, 11


def encoder(seed: int, *more: nn.Module) -> nn.Sequential:
    """Return a network of tokens (N, L, C)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.Tanh(), nn.Linear(2 * CHANNELS, 4), *more)


def tokens(images: int = 150) -> Tensor:
    return torch.randn(images, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(0))


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sequences with constant padding on both sides, of another number per image, and their valid positions."""
    padding = torch.full((len(x), PADDED_LENGTH, CHANNELS), 7.0)
    valid = torch.zeros(len(x), PADDED_LENGTH, dtype=torch.bool)
    for i, sequence in enumerate(x):
        start = i % (PADDED_LENGTH - LENGTH)
        padding[i, start : start + LENGTH], valid[i, start : start + LENGTH] = sequence, True
    return padding, valid


def run(batches: list[Any], **options: Any) -> Report:
    defaults: dict[str, Any] = {"order": 0, "progress": False, "similarity": SIMILARITY_NAMES}
    return measure(
        encoder(1), encoder(2), batches, "2", forward=lambda model, batch: model(batch["x"]), **defaults | options
    )


def figures(report: Report) -> list[float]:
    (pair,) = report.pairs
    return [*pair.shares, pair.unexplained, *pair.interval, pair.noise_floor or 0, *pair.similarity.values(), pair.rows]


def batches(x: Tensor, **entries: Tensor) -> list[dict[str, Tensor]]:
    values = {"x": x} | entries
    return [
        dict(zip(values, parts, strict=True)) for parts in zip(*(v.split(32) for v in values.values()), strict=True)
    ]


@pytest.mark.parametrize(
    "mask",
    [
        lambda valid: {"attention_mask": valid.long()},
        lambda valid: {"padding_mask": ~valid},
        lambda valid: {"key_padding_mask": ~valid, "labels": valid.long()},
    ],
)
def test_padded_sequences_give_the_figures_of_unpadded_ones(mask: Any) -> None:
    expected = run(batches(tokens()))
    x, valid = padded(tokens())
    np.testing.assert_allclose(figures(run(batches(x, **mask(valid)))), figures(expected), atol=2e-5)
    # Constant padding is explained by everything
    assert run(batches(x, **mask(valid)), mask=None)["2"].unexplained < 0.8 * expected["2"].unexplained


def test_a_function_gives_the_mask_also_on_a_grid() -> None:
    x, valid = padded(tokens())
    expected = figures(run(batches(tokens())))
    reports = [
        run(batches(x, where=valid), mask=lambda batch: batch["where"]),
        run(batches(x, where=valid[:, None]), mask=lambda batch: batch["where"]),
    ]
    for report in reports:
        np.testing.assert_allclose(figures(report), expected, atol=2e-5)


def test_orders_above_zero_train_on_valid_positions() -> None:
    x, valid = padded(tokens(400))
    options: dict[str, Any] = {"order": 1, "noise_floor": False, "similarity": False, "ridge": 1e-4}
    report = run(batches(x, attention_mask=valid), **options)
    assert report["2"].unexplained == pytest.approx(run(batches(tokens(400)), **options)["2"].unexplained, abs=0.02)


def test_lengths_may_differ_and_images_may_be_all_padding() -> None:
    x = torch.randn(150, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(LENGTH) < (torch.arange(150) % (LENGTH + 1))[:, None]
    split = (0.8, 0.0, 0.2)
    report = run(batches(x, attention_mask=valid), split=split, ridge=0.0)
    part = split_by_hash(np.arange(150), split, 0) == 2
    with torch.no_grad():
        a, b = (encoder(seed)(x).double().numpy() for seed in (1, 2))
    keep = valid.numpy()
    (fit_x, report_x), (fit_y, report_y) = ([f[chosen][keep[chosen]] for chosen in (~part, part)] for f in (a, b))
    design = np.c_[fit_x, np.ones(len(fit_x))]
    residual = report_y - np.c_[report_x, np.ones(len(report_x))] @ np.linalg.lstsq(design, fit_y, rcond=None)[0]
    expected = ((residual - residual.mean(0)) ** 2).sum() / ((report_y - report_y.mean(0)) ** 2).sum()
    assert report["2"].unexplained == pytest.approx(expected, abs=1e-5)
    assert report.images["report"] == (part & keep.any(1)).sum()
    # Permuted targets come from valid positions of other images
    assert abs(report["2"].noise_floor or 1) < 0.05


def test_the_output_with_a_feature_mapped_at_valid_positions_is_the_networks_own() -> None:
    x, valid = padded(tokens())

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        weights = batch["attention_mask"][..., None].float()
        return (model(batch["x"]) * weights).sum(1) / weights.sum(1)

    pair = measure(
        encoder(1), encoder(1), batches(x, attention_mask=valid), "2", order=0, forward=classify, functional=True,
        progress=False, ridge=0.0,
    )["2"]  # fmt: skip
    assert pair.unexplained < 1e-6
    assert pair.functional[0].agreement == 1
    assert pair.functional[0].kl < 1e-6
    assert pair.residual_only is not None
    assert pair.residual_only.kl > 1e-4


def test_complete_masks_change_nothing_and_exclude_no_option() -> None:
    complete = batches(tokens(), attention_mask=torch.ones(150, LENGTH))
    np.testing.assert_allclose(figures(run(complete)), figures(run(batches(tokens()))), atol=2e-5)
    for options in ({"kernel_size": 3}, {"positions": 3}):
        np.testing.assert_allclose(
            figures(run(complete, **options)), figures(run(batches(tokens()), **options)), atol=2e-5
        )


def test_padding_that_cannot_be_left_out_is_refused() -> None:
    x, valid = padded(tokens(64))
    with pytest.raises(CaptureError, match=r"attention_mask= marks padded positions.*kernel_size=1.*11"):
        run(batches(x, attention_mask=valid), kernel_size=3)
    with pytest.raises(CaptureError, match=r"one position for each of its 22"):
        run(batches(x, attention_mask=valid.repeat(1, 2)))
    for options in ({"positions": 3}, {"solver": "paper", "solver_options": {"epochs": 1}}):
        with pytest.raises(OptionError, match=r"attention_mask= marks padded positions"):
            run(batches(x, attention_mask=valid), **options)
    for wrong in (lambda batch: valid[:32].long(), lambda batch: None, lambda batch: valid[0]):
        with pytest.raises(InputTypeError, match="boolean tensor"):
            run(batches(x), mask=wrong)
    with pytest.raises(ShapeError, match="32 images"):
        run(batches(x), mask=lambda batch: valid[:3])
    with pytest.raises(OptionError, match="mask"):
        run(batches(x), mask="attention_mask")
