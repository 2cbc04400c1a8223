"""Output of the explained network with parts of a feature in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import Report, measure
from knowiso_train.errors import CaptureError, DataError, NonFiniteError, ShapeError
from knowiso_train.features.calls import find_logits
from knowiso_train.measurement.functional import FunctionalShare
from knowiso_train.utils.hashing import split_by_hash

SPLIT = (0.6, 0.2, 0.2)


def images(count: int = 160, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 6, 6, generator=torch.Generator().manual_seed(3))


def classes(count: int = 160, num_classes: int = 5) -> Tensor:
    return torch.randint(0, num_classes, (count,), generator=torch.Generator().manual_seed(4))


def loader(*tensors: Tensor, batch_size: int = 25) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def network(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(9 * width, 5),
    )


def run(source: nn.Module, target: nn.Module, data: Any, layers: Any, **options: Any) -> Report:
    return measure(
        source,
        target,
        data,
        layers,
        **{"order": 0, "progress": False, "functional": True, "bootstrap": 0, "split": SPLIT} | options,
    )


def by_hand(report: Report, start: nn.Module, rest: nn.Module, x: Tensor, data: Tensor, y: Tensor | None) -> list[Any]:
    """Return the figures of functional[k] …, residual_only and target_output from a network cut in two."""
    part = torch.from_numpy(split_by_hash(np.arange(len(data)), SPLIT, 0))
    with torch.no_grad():
        feature = start(data)
        components = report.pairs[0].disentangler.components(x[part == 2])
        center = feature[part == 0].mean((0, 2, 3), keepdim=True)
        own = rest(feature[part == 2].clone()).log_softmax(1)
        sums = list(torch.stack(components).cumsum(0))
        rows = []
        for replaced in (*sums, feature[part == 2] - sums[-1] + center, feature[part == 2]):
            output = rest(replaced.clone()).log_softmax(1)  # activations overwrite it
            same = (output.argmax(1) == own.argmax(1)).float().reshape(len(own), -1).mean(1)
            divergence = nn.functional.kl_div(output, own, log_target=True, reduction="none").sum(1).mean()
            top1 = None if y is None else (output.argmax(1) == y[part == 2])[y[part == 2] != 255].float().mean().item()
            error = same.std().item() / len(same) ** 0.5
            rows.append(FunctionalShare(same.mean().item(), error, divergence.item(), top1))
    return rows


def figures(report: Report, pair: int = 0) -> list[FunctionalShare]:
    result = report.pairs[pair]
    assert result.residual_only is not None
    assert result.target_output is not None
    return [*result.functional, result.residual_only, result.target_output]


def assert_equal(found: list[FunctionalShare], expected: list[FunctionalShare]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.top1 is None) == (b.top1 is None)
        values = [{name: value for name, value in vars(share).items() if value is not None} for share in (a, b)]
        assert values[0] == pytest.approx(values[1], rel=2e-4, abs=2e-6)


@pytest.mark.parametrize(("layer", "at"), [(1, "output"), (3, "output"), (3, "input")])
def test_figures_equal_those_of_a_network_cut_in_two(layer: int, at: Any) -> None:
    source, target, data, labels = network(1, 8), network(2).eval(), images(), classes()
    with torch.no_grad():
        target(data)
    options = {"order": 1, "solver_options": {"epochs": 2}, "at": at}
    report = run(source, target, loader(data, labels), str(layer), **options)
    cut = layer + (at == "output")
    with torch.no_grad():
        x = source.eval()[:cut](data)
    assert_equal(figures(report), by_hand(report, target[:cut], target[cut:], x, data, labels))
    plain = run(source, target, loader(data, labels), str(layer), functional=False, **options)
    assert plain.pairs[0].shares == report.pairs[0].shares
    assert (plain.pairs[0].functional, plain.pairs[0].residual_only, plain.pairs[0].target_output) == ((), None, None)
    assert report.pairs[0].target_output == FunctionalShare(1.0, 0.0, 0.0, figures(report)[-1].top1)


class Planted(nn.Module):
    """Network whose feature consists of a projection of three image channels and, four times as large, of three others.

    Args:
        uses: Channels that the output is computed from.
    """

    def __init__(self, uses: slice) -> None:
        super().__init__()
        self.feature = nn.Conv2d(6, 8, 1, bias=False)
        self.head = nn.Linear(4 * 36, 5)
        self.uses = uses
        with torch.no_grad():
            self.feature.weight[:4, 3:] = 0
            self.feature.weight[4:, :3] = 0
            self.feature.weight[4:] *= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.feature(x)[:, self.uses].flatten(1))


class Limited(nn.Module):
    """Network that sees three image channels."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature(x[:, :3]).mean((2, 3))


def test_a_residual_that_the_rest_ignores_and_one_that_it_needs() -> None:
    data = loader(images(600, 6), batch_size=100)
    ignored = run(Limited(), Planted(slice(0, 4)), data, "feature").pairs[0]
    needed = run(Limited(), Planted(slice(4, 8)), data, "feature").pairs[0]
    for pair in (ignored, needed):
        assert pair.residual_only is not None
        assert pair.unexplained > 0.4
    assert ignored.functional[0].agreement == 1
    assert ignored.functional[0].kl < 1e-6
    assert ignored.residual_only is not None
    assert ignored.residual_only.agreement < 0.5
    assert needed.residual_only is not None
    assert needed.residual_only.agreement > 0.97  # the map fits a little of the noise
    assert needed.functional[0].agreement < 0.5
    assert needed.functional[0].kl > 0.1


def test_directions_explain_the_respective_network() -> None:
    a, b, data = network(1, 8), network(2), loader(images(), classes())
    both = run(a, b, data, ["1", "3"], directions="both")
    swapped = run(b, a, data, ["1", "3"])
    for i, pair in enumerate(both.backward):
        assert_equal([*pair.functional], [*swapped.pairs[i].functional])
        assert pair.target_output == swapped.pairs[i].target_output
    assert both.forward[0].target_output != both.backward[0].target_output


def test_state_is_as_before() -> None:
    source, target = network(1), network(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    run(source, target, loader(images()), ["1", "3"], directions="both")
    for model in (source, target):
        assert all(module.training for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


def test_streams_give_the_figures_of_a_dataset() -> None:
    a, b, data, labels = network(1, 8), network(2), images(), classes()
    stream = [(data[i : i + 25], labels[i : i + 25]) for i in range(0, len(data), 25)]
    for found, expected in zip(run(a, b, stream, ["1", "3"]), run(a, b, loader(data, labels), ["1", "3"]), strict=True):
        assert_equal([*found.functional], [*expected.functional])


class Dense(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.stem(x).relu()), "aux": x}


def test_dense_outputs_are_compared_position_by_position() -> None:
    source, target, data = Dense(1), Dense(2), images()
    masks = torch.randint(0, 4, (160, 6, 6))
    masks[torch.rand(masks.shape) < 0.3] = 255
    report = run(source, target, loader(data, masks), "stem")
    with torch.no_grad():
        x = source.stem(data)
    expected = by_hand(report, target.stem, nn.Sequential(nn.ReLU(), target.head), x, data, masks)
    assert_equal(figures(report), expected)


class Wrapped(nn.Module):
    """Network with several outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        logits = self.model(x)
        return {"scores": {"main": logits, "other": -logits}}


def test_function_of_the_output_and_of_the_batch() -> None:
    a, b, data, labels = network(1, 8), network(2), images(), classes()
    batches = [{"image": data[i : i + 25], "truth": {"class": labels[i : i + 25]}} for i in range(0, len(data), 25)]
    plain = run(a, b, loader(data, labels), "3")
    found = run(
        Wrapped(a),
        Wrapped(b),
        batches,
        "model.3",
        output=lambda out: out["scores"]["main"],
        labels=lambda batch: batch["truth"]["class"],
    )
    assert_equal(figures(found), figures(plain))
    with pytest.raises(ShapeError, match=r"got a dict with 2 floating tensors. Pass output="):
        run(Wrapped(a), Wrapped(b), batches, "model.3", labels=None)


@pytest.mark.parametrize(
    ("batch_labels", "option", "message"),
    [
        (classes().float(), "auto", r"one class index for each of 25 images, got torch.float32 of shape \(25,\)"),
        (classes()[:, None].expand(-1, 2), "auto", r"got torch.int64 of shape \(25, 2\); pass labels=, or labels=None"),
        (classes() + 1, "auto", "expected labels from 0 to 4, .* got 1 to 5"),
        (classes() - 1, "auto", "expected labels from 0 to 4, .* got -1 to 3"),
        (classes(), "label", "expected labels at 'label' of each batch .*, got list"),
        (classes(), lambda batch: {"a": 1}, "expected labels as a tensor of class indices, got dict"),
    ],
)
def test_bad_labels(batch_labels: Tensor, option: Any, message: str) -> None:
    data = loader(images(), batch_labels)
    with pytest.raises(DataError, match=message):
        run(network(1), network(2), data, "3", labels=option)
    assert figures(run(network(1), network(2), data, "3", labels=None))[0].top1 is None


class Head(nn.Module):
    """Network with another output."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.function = network(1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.model(x))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda out: out[:, :1], ShapeError, r"target: expected logits .* of at least two classes, got \(25, 1\)"),
        (lambda out: out[:, None], ShapeError, r"got \(25, 1, 5\). Pass output="),
        (lambda out: out.argmax(1), ShapeError, "with 0 floating tensors"),
        (lambda out: out / 0, NonFiniteError, "target: NaN or .Inf in the network's output"),
        (lambda out: out + torch.rand(()), CaptureError, "target: the output changes although"),
        (lambda out: None, ShapeError, "got a NoneType with 0 floating tensors"),
    ],
)
def test_bad_outputs_are_found_before_maps_are_fitted(
    function: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(network(1), Head(function), loader(images()), {"3": "model.3"}, ridge=1e-4)


def test_logits_of_outputs() -> None:
    logits = torch.zeros(2, 3)
    for output in (logits, (logits,), {"logits": logits, "loss": torch.zeros(())}, [logits, torch.ones(2).long()]):
        assert find_logits(output) is logits


def test_classes_that_an_output_excludes() -> None:
    mask = torch.tensor([0.0, float("-inf"), 0, 0, 0])
    shares = figures(run(network(2), Head(lambda out: out + mask), loader(images()), {"3": "model.3"}))
    assert all(0 <= share.kl < 100 for share in shares)
    assert shares[-1].kl == 0


def test_report_keeps_and_shows_the_figures() -> None:
    options = {"order": 1, "solver_options": {"epochs": 1}, "bootstrap": 20}
    report = run(network(1), network(2), loader(images(), classes()), ["1", "3"], **options)
    assert Report.from_json(report.to_json()) == report
    text = str(report)
    assert "output agrees  residual agrees" in text
    assert "residual top-1  own top-1" in text
    assert f"{100 * report.pairs[0].functional[1].agreement:.1f} %" in text
    assert "residual top-1" not in str(run(network(1), network(2), loader(images()), "3"))
    assert "output agrees" in report._repr_html_()


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")  # fewer images than channels
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_tiny_patch16_224", ["blocks.2", "blocks.8.norm1"]),
        ("swin_tiny_patch4_window7_224", ["layers.1"]),
        ("resnet18", ["layer2", "layer3.0.bn1"]),
    ],
)
def test_a_network_explained_from_itself_keeps_its_output(name: str, layers: list[str]) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32} if "vit" in name else {"img_size": 64, "window_size": 2} if "swin" in name else {}
    model = timm.create_model(name, num_classes=5, **options)
    size = 32 if "vit" in name else 64
    data = loader(torch.randn(60, 3, size, size), batch_size=12)
    for pair in run(model, model, data, layers, ridge=1e-9, noise_floor=False, split=(0.8, 0, 0.2)):
        assert pair.unexplained < 0.3
        assert pair.functional[0].kl < 0.1


class TokenNetwork(nn.Module):
    """Classifier of token sequences that leaves out padding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = self.head(self.embed(x).tanh())
        return (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def test_padding_has_no_influence() -> None:
    x, mask = torch.randn(120, 7, 4), torch.arange(7) < torch.randint(2, 8, (120, 1))
    reports = []
    for padding in (torch.zeros(()), 100 * torch.randn(120, 7, 4)):
        tokens = torch.where(mask[:, :, None], x, padding)
        batches = [{"input": tokens[i : i + 20], "attention_mask": mask[i : i + 20]} for i in range(0, 120, 20)]
        networks = TokenNetwork(1), TokenNetwork(2)
        options = {"layout": "nlc", "forward": lambda model, batch: model(batch["input"], batch["attention_mask"])}
        reports.append(run(*networks, batches, "embed", **options))
    assert figures(reports[0])[1].kl > 0
    assert_equal(figures(reports[0]), figures(reports[1]))
