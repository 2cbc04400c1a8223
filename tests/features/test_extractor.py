"""One network on batches: its own transform and call, one form of features, checked before anybody counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, InputTypeError, LayoutError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features import Extractor


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def images(n: int = 2, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: {"label": torch.zeros(len(x)), "image": x}]
)
def test_features_of_any_batch(wrap: Any) -> None:
    model, x = net(), images()
    with Extractor(model, ["4", "0"], name="source") as extractor:
        for n in (2, 5):
            x = images(n)
            found = extractor.run(wrap(x))
            assert list(found) == ["4", "0"]
            torch.testing.assert_close(found["0"], torch.nn.functional.conv2d(x, model[0].weight, model[0].bias))
            assert found["4"].shape == (n, 5, 1, 1)
            assert not any(feature.requires_grad or feature.is_inference() for feature in found.values())
    assert {name: spec.layout for name, spec in extractor.specs.items()} == {"0": "nchw", "4": "nc"}
    assert extractor.steps == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    with pytest.raises(CaptureError, match="context manager"):
        extractor.run(x)


def test_transform_and_forward() -> None:
    model, x = net(), images(2, 16)
    seen: list[Any] = []

    def half(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2)

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(batch["image"] + batch["shift"])

    with Extractor(model, "0", transform=half) as extractor:
        plain = extractor.run(x)["0"]
        torch.testing.assert_close(plain, model[0](half(x)))
    with Extractor(model, "0", transform=half, forward=forward) as extractor:
        batch = {"image": x, "shift": torch.zeros(1)}
        torch.testing.assert_close(extractor.run(batch)["0"], plain)
    assert seen[0]["image"].shape == (2, 3, 8, 8)
    assert batch["image"] is x
    # A batch that only forward= understands
    with Extractor(model, "0", forward=lambda model, batch: model(batch["a"])) as extractor:
        assert extractor.run({"a": images(), "b": images()})["0"].shape == (2, 4, 6, 6)
    with Extractor(model, "0") as extractor, pytest.raises(InputTypeError, match="forward="):
        extractor.run({"a": images(), "b": images()})


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [(torch.float64, None, torch.float64), (torch.float32, torch.bfloat16, torch.float32)],
)
def test_dtypes(dtype: torch.dtype, autocast: torch.dtype | None, expected: torch.dtype) -> None:
    model = net().to(dtype)
    inside: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    with Extractor(model, "0", autocast=autocast) as extractor:
        assert extractor.run(images().to(dtype))["0"].dtype == expected
    assert inside == [autocast or dtype]


def test_nan_names_role_layer_and_batch() -> None:
    model = net()
    x = images()
    with Extractor(model, ["0", "4"], name="target") as extractor:
        extractor.run(x)
        x[1, 0, 3, 3] = torch.nan
        with pytest.raises(
            NonFiniteError, match=r"target: NaN or Inf in layer '0' and 1 more at batch 2: 36 NaN and 0 Inf of 288"
        ):
            extractor.run(x)
        assert extractor.run(images())["0"].isfinite().all()


def test_another_grid_or_another_width_is_refused() -> None:
    with Extractor(net(), "0", name="source") as extractor:
        extractor.run(images(2, 8))
        extractor.run(images(1, 8))
        with pytest.raises(
            ShapeError, match=r"source: layer '0' emitted \(4, 8, 8\) per image at batch 3, \(4, 6, 6\) before"
        ):
            extractor.run(images(2, 10))


def test_another_first_axis_than_the_images_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 8))
    with Extractor(model, "1") as extractor, pytest.raises(ShapeError, match=r"\(6, 8, 8\) for 2 images"):
        extractor.run(images())


def test_layouts_given() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Conv2d(3, 3, 1)), torch.randn(2, 3, 4, 8)
    with Extractor(model, "0", layout="nhwc") as extractor:
        assert extractor.run(x)["0"].shape == (2, 8, 3, 4)
    with Extractor(model, "0", layout={"0": "nhwc", "of another network": "nc"}) as extractor:
        assert extractor.run(x)["0"].shape == (2, 8, 3, 4)
    with Extractor(model, "0", layout="nlc") as extractor, pytest.raises(LayoutError, match="needs 3 axes"):
        extractor.run(x)


def test_repeated_and_what_is_no_feature() -> None:
    shared = nn.Linear(3, 3)
    model, x = nn.Sequential(shared, shared), torch.randn(2, 3)
    with Extractor(model, "0", repeated="last") as extractor:
        torch.testing.assert_close(extractor.run(x)["0"][:, :, 0, 0], shared(shared(x)))
    with pytest.raises(OptionError, match="repeated"):
        Extractor(model, "0", repeated="all")  # type: ignore[arg-type]

    class Top(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with Extractor(nn.Sequential(Top()), "0") as extractor, pytest.raises(CaptureError, match="int64"):
        extractor.run(x)


def test_an_error_in_the_network_leaves_no_capture_for_the_next_batch() -> None:
    with Extractor(net(), "0") as extractor:
        with pytest.raises(RuntimeError, match="channels"):
            extractor.run(torch.randn(2, 5, 8, 8))
        assert extractor.run(images(3))["0"].shape[0] == 3
