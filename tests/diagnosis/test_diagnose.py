"""Diagnosis of networks with planted blind spots, unreliable features and useless directions."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import diagnose
from knowiso_train.diagnosis import Diagnosis, LayerDiagnosis
from knowiso_train.errors import DataError, FormatError, LayerNameError, OptionError, ShapeError
from knowiso_train.measurement.data import SplitImageLoader

# Erased channels have no variance, of which the measurement warns
pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")

CHANNELS, CLASSES, GRID, COUNT = 8, 4, 6, 300


class FeatureNetwork(nn.Module):
    """Convolution, a change of its feature, and a classifier of the pooled feature."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor] | None = None, channels: int = CHANNELS) -> None:
        super().__init__()
        # Orthogonal filters on white noise give independent channels
        self.convolution = nn.Conv2d(CLASSES, CHANNELS, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        nn.init.orthogonal_(self.convolution.weight.data.flatten(1), generator=generator)
        nn.init.zeros_(self.convolution.bias)
        self.feature = nn.Identity()
        self.classifier = nn.Linear(channels, CLASSES)
        nn.init.normal_(self.classifier.weight, generator=generator)
        nn.init.zeros_(self.classifier.bias)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.convolution(images))
        x = self.feature(x if self.change is None else self.change(x, images))
        return self.classifier(x.mean((2, 3)))


def images(count: int = COUNT) -> Tensor:
    return torch.randn(count, CLASSES, GRID, GRID, generator=torch.Generator().manual_seed(1))


def run(weak: nn.Module, strong: Any, data: Tensor | TensorDataset | None = None, **options: Any) -> Diagnosis:
    dataset: Any = images() if data is None else data
    options = {"progress": False, "bootstrap": 20, "num_thumbnails": 4} | options
    return diagnose(weak, strong, DataLoader(dataset, batch_size=64), "feature", **options)


def above(values: Any, threshold: float = 0.5) -> set[int]:
    return {i for i, value in enumerate(values) if value > threshold}


def assert_precise(found: set[Any], planted: set[Any]) -> None:
    precision, recall = len(found & planted) / len(found), len(found & planted) / len(planted)
    assert (precision, recall) == (1.0, 1.0), f"found {found}, planted {planted}"


def erase_channels(*channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, _: x * torch.tensor([float(c not in channels) for c in range(CHANNELS)]).view(1, -1, 1, 1)


def test_erased_channels_are_the_blind_spots() -> None:
    planted = {1, 4, 6}
    diagnosis = run(FeatureNetwork(erase_channels(*planted)), FeatureNetwork(), num_directions=3)
    spots = diagnosis["feature"]
    assert_precise(above(spots.channels), planted)
    assert_precise({direction.channels[0] for direction in spots.directions}, planted)
    assert sum(d.share for d in spots.directions) == pytest.approx(spots.pair.unexplained, abs=1e-3)
    # What is left in the weak network is in the strong one
    assert above(diagnosis["feature", "unreliable"].channels) == set()


def test_erased_class_is_the_blind_spot() -> None:
    labels = torch.arange(COUNT) % CLASSES
    # Images of class k have content in input channel k alone, and the weak network ignores channel 2
    content = images() * nn.functional.one_hot(labels, CLASSES)[:, :, None, None]
    weak = FeatureNetwork()
    weak.convolution.weight.data[:, 2] = 0
    spots = run(weak, FeatureNetwork(), TensorDataset(content, labels))["feature"]
    assert_precise({entry.label for entry in spots.classes if entry.unexplained > 0.5}, {2})
    assert {image.label for image in spots.images} == {2}
    assert sum(entry.share for entry in spots.classes) == pytest.approx(1)


def test_erased_region_is_the_blind_spot() -> None:
    planted = {(row, column) for row in range(2) for column in range(3, 6)}
    mask = torch.ones(GRID, GRID)
    mask[:2, 3:6] = 0
    spots = run(FeatureNetwork(lambda x, _: x * mask), FeatureNetwork())["feature"]
    heat = np.array(spots.positions) / np.array(spots.position_variances)
    assert_precise(set(map(tuple, np.argwhere(heat > heat.max() / 2).tolist())), planted)
    assert heat.mean() * 0 + np.array(spots.positions).mean() == pytest.approx(spots.pair.unexplained, abs=1e-3)
    # Images are ranked by what they hold in that region
    assert {image.peak for image in spots.images} <= planted


def noise(channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Append channels that vary too fast with the image for any linear map."""
    weight = torch.randn(channels, CLASSES, 1, 1, generator=torch.Generator().manual_seed(7))
    return lambda x, images: torch.cat([x, torch.sin(40 * nn.functional.conv2d(images, weight))], 1)


def test_noise_channels_are_the_unreliable_ones() -> None:
    diagnosis = run(FeatureNetwork(noise(3), CHANNELS + 3), FeatureNetwork())
    assert_precise(above(diagnosis["feature", "unreliable"].channels), {8, 9, 10})
    assert above(diagnosis["feature"].channels) == set()


def test_other_strong_networks_confirm_what_is_no_noise() -> None:
    weak = FeatureNetwork(erase_channels(2, 5))
    diagnosis = run(weak, [FeatureNetwork(noise(3), CHANNELS + 3), FeatureNetwork()], num_directions=5)
    noisy, plain = diagnosis.blind_spots
    assert_precise(above(noisy.channels), {2, 5, 8, 9, 10})
    assert_precise(above(noisy.confirmations[0].channels), {2, 5})
    confirmed = {d.channels[0] for d in noisy.directions if d.confirmed[0] > 0.5}
    assert_precise(confirmed & set(range(CHANNELS)), {2, 5})
    assert noisy.confirmations[0].network == diagnosis.strong[1]
    assert noisy.confirmed_by_none == pytest.approx(noisy.pair.unexplained - noisy.confirmations[0].share)
    assert plain.confirmed_by_all == pytest.approx(plain.pair.unexplained, abs=1e-3)
    assert plain.confirmed_by_none == pytest.approx(0, abs=1e-3)


def test_effect_of_a_direction_is_what_the_output_uses_of_it() -> None:
    # More variance in channel 5, so that each erased channel is a principal direction of its own
    scale = torch.ones(CHANNELS, 1, 1)
    scale[5] = 1.5
    strong = FeatureNetwork(lambda x, _: x * scale)
    with torch.no_grad():
        strong.classifier.weight.mul_(30)[:, 5] = 0  # large on 2, none on 5
        strong.classifier.bias.sub_(strong(images()).mean(0))  # all classes occur
    spots = run(FeatureNetwork(erase_channels(2, 5)), strong, num_directions=2)["feature"]
    assert [d.channels[0] for d in spots.directions] == [5, 2]
    ignored, used = (d.effect for d in spots.directions)
    assert used is not None
    assert ignored is not None
    assert ignored.kl < 1e-2 * used.kl
    assert ignored.agreement > 0.97 > used.agreement


def test_effect_equals_a_forward_pass_with_the_changed_feature() -> None:
    labels = torch.arange(COUNT) % CLASSES
    weak, strong = FeatureNetwork(erase_channels(2)), FeatureNetwork()
    data = TensorDataset(images(), labels)
    spots = run(weak, strong, data, num_directions=1)["feature"]
    index, x, y = report_features(weak, strong)
    residual = spots.pair.disentangler.split(x, y)[1]
    along = torch.einsum("c,nchw->nhw", spots.directions[0].vector.float(), residual)
    vector = spots.directions[0].vector.float()[None, :, None, None]
    with torch.no_grad():
        before = strong.classifier(y.mean((2, 3))).log_softmax(1)
        after = strong.classifier((y - vector * (along - along.mean())[:, None]).mean((2, 3))).log_softmax(1)
    effect = spots.directions[0].effect
    assert effect is not None
    assert effect.kl == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-3)
    assert effect.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).float().mean()))
    correct = [float((logits.argmax(1) == labels[index]).float().mean()) for logits in (before, after)]
    assert effect.top1_change == pytest.approx(correct[1] - correct[0])
    functional = spots.pair.functional[0]
    assert functional.agreement <= effect.agreement  # without the whole residual
    assert run(weak, strong, data, functional=False)["feature"].directions[0].effect is None


def report_features(weak: nn.Module, strong: nn.Module) -> tuple[np.ndarray[Any, Any], Tensor, Tensor]:
    """Return the indices of the report images, and both features, computed without the library."""
    stream = SplitImageLoader(DataLoader(images(), batch_size=64))
    index = np.concatenate([batch.index for batch in stream.report_batches()])
    features: list[Tensor] = []
    for network in (weak, strong):
        handle = network.feature.register_forward_hook(lambda module, args, output: features.append(output.detach()))
        with torch.no_grad():
            network(images()[index])
        handle.remove()
    return index, features[0], features[1]


def test_streamed_figures_equal_those_of_stored_features() -> None:
    labels = torch.arange(COUNT) % CLASSES
    mask = torch.linspace(0, 1, GRID).view(1, 1, 1, GRID)
    weak, strong = FeatureNetwork(lambda x, _: erase_channels(3)(x, x) * mask), FeatureNetwork()
    spots = run(weak, strong, TensorDataset(images(), labels), num_directions=2, num_shared=2, num_images=5)["feature"]
    index, x, y = report_features(weak, strong)
    r = spots.pair.disentangler.split(x, y)[1].double().numpy()
    r, y = (v - v.mean((0, 2, 3), keepdims=True) for v in (r, y.double().numpy()))
    total = np.square(y).sum()
    np.testing.assert_allclose(spots.channels, np.square(r).sum((0, 2, 3)) / np.square(y).sum((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(spots.channel_variances, np.square(y).sum((0, 2, 3)) / total, atol=1e-6)
    np.testing.assert_allclose(spots.positions, np.square(r).sum((0, 1)) / total * GRID**2, rtol=1e-3)
    assert spots.pair.unexplained == pytest.approx(np.square(r).sum() / total, rel=1e-5)
    for entry in spots.classes:
        of_class = labels.numpy()[index] == entry.label
        assert entry.images == of_class.sum()
        assert entry.unexplained == pytest.approx(np.square(r[of_class]).sum() / np.square(y[of_class]).sum(), rel=1e-5)
    energies = np.square(r).sum((1, 2, 3))
    assert [image.index for image in spots.images] == index[np.argsort(-energies)][:5].tolist()
    np.testing.assert_allclose([i.share for i in spots.images], np.sort(energies)[::-1][:5] / energies.sum(), rtol=1e-4)
    first = np.square(r).sum(1)[energies.argmax()]
    np.testing.assert_allclose(spots.images[0].heat_map, first / (total / len(y) / GRID**2), rtol=1e-3)
    assert spots.images[0].peak == np.unravel_index(first.argmax(), first.shape)
    for directions, part in ((spots.directions, r), (spots.shared, y - r)):
        rows = part.transpose(0, 2, 3, 1).reshape(-1, CHANNELS)
        values, vectors = np.linalg.eigh(rows.T @ rows)
        for i, direction in enumerate(directions, 1):
            assert direction.share == pytest.approx(values[-i] / total, rel=1e-4)
            assert abs(vectors[:, -i] @ direction.vector.numpy()) == pytest.approx(1, abs=1e-4)
    along = np.einsum("c,nchw->nhw", spots.directions[0].vector.numpy(), r)
    best = np.square(along).sum((1, 2)).argmax()
    top = spots.directions[0].images[0]
    assert top.index == index[best]
    assert top.value is not None
    along_target = np.einsum("c,nchw->nhw", spots.directions[0].vector.numpy(), y)
    assert top.value == pytest.approx(along[best][top.peak] / along_target.std(), rel=1e-3)


def figures(layer: LayerDiagnosis) -> np.ndarray[Any, Any]:
    """Return figures without those that depend on the batches (noise floor)."""
    values = [*layer.channels, *layer.channel_variances, *np.ravel(layer.positions)]
    for direction in (*layer.directions, *layer.shared):
        values += [direction.share, direction.unexplained, *(image.share for image in direction.images)]
        values += [] if direction.effect is None else [direction.effect.kl, direction.effect.agreement]
    values += [value for entry in layer.classes for value in (entry.images, entry.unexplained, entry.share)]
    return np.array([*values, *(image.index for image in layer.images)], dtype=float)


def test_batches_and_kinds_of_loaders_do_not_matter() -> None:
    weak = FeatureNetwork(lambda x, images: noise(1)(erase_channels(3)(x, images), images), CHANNELS + 1)
    strong, data = FeatureNetwork(), TensorDataset(images(), torch.arange(COUNT) % CLASSES)
    expected = run(weak, strong, data)
    small = diagnose(weak, strong, DataLoader(data, batch_size=7), "feature", progress=False, bootstrap=20)
    streamed = diagnose(weak, strong, list(DataLoader(data, batch_size=50)), "feature", progress=False, bootstrap=20)
    for other in (small, streamed):
        for a, b in zip(expected, other, strict=True):
            np.testing.assert_allclose(figures(b), figures(a), atol=2e-4)


class TokenNetwork(nn.Module):
    """Linear feature of each token, and a classifier of its mean over the valid tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.feature, self.classifier = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, batch: Any) -> Tensor:
        mask = batch["attention_mask"][..., None]
        feature: Tensor = self.feature(batch["x"]).relu() * mask
        return self.classifier(feature.sum(1) / mask.sum(1))


def test_padded_positions_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(COUNT, 7, 5, generator=generator)
    mask = torch.arange(7) < torch.randint(2, 8, (COUNT, 1), generator=generator)
    results = []
    for padding in (0.0, 50.0):
        padded = torch.where(mask[..., None], tokens, padding)
        batches = [{"x": x, "attention_mask": m} for x, m in zip(padded.split(60), mask.split(60), strict=True)]
        results.append(
            diagnose(
                TokenNetwork(1),
                TokenNetwork(2),
                batches,
                "feature",
                forward=lambda model, batch: model(batch),
                layout="nlc:line",
                num_directions=3,
                progress=False,
            )
        )
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(figures(b), figures(a), atol=1e-6)
        assert np.mean(a.positions) == pytest.approx(a.pair.unexplained, rel=1e-3)
    variances = results[0]["feature"].position_variances[0]
    assert variances[0] > variances[6]  # the last position is valid in few images


def test_shared_directions_show_images_that_excite_both_networks() -> None:
    data = images()
    planted = {10, 75, 160, 222, 281}
    for i in planted:
        data[i] *= 6
    indices = torch.arange(COUNT)
    shared = run(FeatureNetwork(erase_channels(0)), FeatureNetwork(), TensorDataset(data, indices % 2))[
        "feature"
    ].shared
    stream = SplitImageLoader(DataLoader(data, batch_size=64))
    reported = planted & set(np.flatnonzero(stream.parts(indices.numpy()) == 2).tolist())
    assert reported
    assert reported <= {image.index for image in shared[0].images[: len(reported)]}
    assert all(direction.unexplained < 0.1 for direction in shared)


def test_each_network_gets_its_own_images_and_side() -> None:
    transforms = [None, lambda x: x.flip(3)]
    plain, flipped = run(
        FeatureNetwork(), [FeatureNetwork(), FeatureNetwork()], strong_transform=transforms
    ).blind_spots
    assert plain.pair.unexplained < 1e-3
    assert flipped.pair.unexplained > 0.5
    loader: Any = DataLoader(images(), batch_size=64)  # type: ignore[arg-type]
    pooled = diagnose(
        FeatureNetwork(erase_channels(1)), FeatureNetwork(), loader, "classifier", at="input", progress=False
    )
    assert_precise(above(pooled["classifier"].channels), {1})


def test_labels_are_found_in_the_batch_or_by_a_function() -> None:
    a, b, labels = FeatureNetwork(), FeatureNetwork(), torch.arange(COUNT) % 3
    given = run(a, b, TensorDataset(images(), labels))["feature"].classes
    assert sorted(entry.label for entry in given) == [0, 1, 2]
    assert sum(entry.images for entry in given) == len(report_features(a, b)[0])
    data = TensorDataset(images(), torch.zeros(COUNT), labels)
    assert run(a, b, data, labels=lambda batch: batch[2])["feature"].classes == given
    spots = run(a, b, images())["feature"]
    assert spots.classes == ()
    assert spots.images[0].label is None


def test_wrong_options_are_refused() -> None:
    a, b = FeatureNetwork(), FeatureNetwork()
    with pytest.raises(DataError, match="one class index for each"):
        run(a, b, labels=lambda batch: torch.zeros(3))
    with pytest.raises(OptionError, match="at least one strong"):
        run(a, [])
    with pytest.raises(OptionError, match="different name"):
        run(a, b, names=["a", "a"])
    with pytest.raises(OptionError, match="one for each of the 1"):
        run(a, b, strong_transform=[None, None])
    with pytest.raises(OptionError, match="directions"):
        run(a, b, num_directions=-1)
    with pytest.raises(ShapeError, match="to_image"):
        run(a, b, to_image=lambda inputs: inputs)


def test_networks_are_as_before_after_an_error() -> None:
    weak, strong = FeatureNetwork().train(), FeatureNetwork()
    calls, last_call = 0, -1

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise ZeroDivisionError
        return model(batch)

    run(weak, strong, forward=forward)
    calls, last_call = 0, calls  # with a replaced feature, in the pass of the figures
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        run(weak, strong, forward=forward)
    assert torch.equal(torch.get_rng_state(), state)
    for network in (weak, strong):
        assert network.training
        assert all(parameter.requires_grad for parameter in network.parameters())
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in vars(module)


def test_result_is_saved_printed_and_drawn(tmp_path: Path) -> None:
    data = TensorDataset(images(100)[:, :3].repeat(1, 1, 8, 20), torch.arange(100) % 2)
    weak, strong = FeatureNetwork(), FeatureNetwork()
    for network in (weak, strong):
        network.convolution = nn.Conv2d(3, CHANNELS, 3, stride=3)
    diagnosis = run(weak, strong, data, class_names=["cat", "dog"])
    assert Diagnosis.from_json(diagnosis.to_json(tmp_path / "diagnosis.json")) == diagnosis
    assert Diagnosis.from_json(tmp_path / "diagnosis.json") == diagnosis
    values = diagnosis.to_dict()
    values["layers"][0]["directions"][1]["share"] = "much"
    with pytest.raises(FormatError, match=r"'layers'\[0\]: 'directions'\[1\]: 'share' must be a number"):
        Diagnosis.from_dict(values)
    assert (diagnosis.weak, diagnosis.strong) == ("FeatureNetwork (weak)", ("FeatureNetwork (strong)",))
    text = str(diagnosis)
    assert "blind spots: FeatureNetwork (strong) not explained from FeatureNetwork (weak)" in text
    assert "cat (" in text or "dog (" in text
    assert "direction" in str(diagnosis["feature"])
    assert "RankedImage(" not in str(diagnosis["feature"])
    with pytest.raises(LayerNameError, match="examined: feature"):
        diagnosis["conv"]
    assert len(diagnosis.thumbnails) == 4
    picture = base64.b64decode(diagnosis.thumbnails[0].picture.split(",")[1])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert max(len(row) for image in diagnosis["feature"].images for row in image.heat_map) <= 14
    diagnosis.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000
    json.loads(diagnosis.to_json())
    with pytest.raises(OptionError, match="no layer pairs"):
        replace(diagnosis, layers=()).plot()


def test_thumbnails_show_the_images() -> None:
    gray = images(100).repeat(1, 1, 4, 4).sigmoid()
    spots = run(FeatureNetwork(), FeatureNetwork(noise(1), CHANNELS + 1), gray, to_image=lambda x: x[:, :1])
    thumbnail = spots.thumbnails[0]
    png = io.BytesIO(base64.b64decode(thumbnail.picture.split(",")[1]))
    with Image.open(png) as picture:
        np.testing.assert_allclose(np.array(picture) / 255, gray[thumbnail.index, 0], atol=1 / 255)


def test_constant_features_have_no_directions() -> None:
    weak, strong = FeatureNetwork(), FeatureNetwork(lambda x, _: torch.zeros_like(x))
    diagnosis = run(weak, strong)
    assert diagnosis["feature"].directions == ()
    assert set(diagnosis["feature"].channels) == {0.0}
    assert np.isfinite(figures(diagnosis["feature"])).all()
    assert diagnosis["feature", "unreliable"].pair.unexplained == pytest.approx(1, abs=1e-6)
