"""timm networks, weight files, input transforms and image loaders."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common.models import DATA
from knowiso_train.errors import DataError, FormatError, InputTypeError, MissingDependencyError, OptionError, ShapeError
from knowiso_train.experiment.networks import build_checkpoint
from knowiso_train.experiment.processes import Processes
from knowiso_train.features import named_stages
from knowiso_train.features.summary import layer_summary
from knowiso_train.loading.datasets import image_loader
from knowiso_train.loading.timm import InputTransform, input_config, input_transform, load_model

TINY = "test_resnet"


@pytest.fixture
def trained() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return timm.create_model(TINY, num_classes=4).state_dict()


def load(path: Path, **options: Any) -> nn.Module:
    return load_model(TINY, checkpoint=path, num_classes=4, **options)


def assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_networks_come_in_eval_mode() -> None:
    model = load_model(TINY, pretrained=False, num_classes=3)
    assert not any(module.training for module in model.modules())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_unknown_networks_and_tags_name_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"nearest:.*resnet18"):
        load_model("resnet19", pretrained=False)
    with pytest.raises(OptionError, match="a1_in1k"):
        load_model("resnet18.nothing", pretrained=False)


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"No pretrained weights exist.*--source-checkpoint"):
        load_model("test_vit4")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(DataError, match=r"Name or service not known.*--no-pretrained.*HF_HUB_OFFLINE"):
        load_model(TINY)
    with pytest.raises(ConnectionError):  # nothing was to be downloaded, so this is another fault
        load_model(TINY, pretrained=False)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("ending", ["pth", "pt", "th"])
def test_checkpoints_are_unwrapped(
    trained: dict[str, Tensor], tmp_path: Path, wrapper: str | None, ending: str
) -> None:
    weights = {f"module.{name}": value for name, value in trained.items()}
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, tmp_path / f"w.{ending}")
    assert_loaded(load(tmp_path / f"w.{ending}"), trained)


def test_safetensors_are_read(trained: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(trained, tmp_path / "w.safetensors")
    assert_loaded(load(tmp_path / "w.safetensors"), trained)


def test_checkpoints_in_order(trained: dict[str, Tensor], tmp_path: Path) -> None:
    renamed = {f"t{i}": value for i, value in enumerate(trained.values())}
    torch.save(renamed, tmp_path / "w.pth")
    assert_loaded(load(tmp_path / "w.pth", in_order=True), trained)
    with pytest.raises(FormatError, match="in_order=True"):
        load(tmp_path / "w.pth")
    torch.save(dict(list(renamed.items())[:-1]), tmp_path / "short.pth")
    with pytest.raises(FormatError, match=f"network has {len(trained)} tensors, the file {len(trained) - 1}"):
        load(tmp_path / "short.pth", in_order=True)
    torch.save(dict(reversed(renamed.items())), tmp_path / "reversed.pth")
    with pytest.raises(FormatError, match=f"tensor 0 is '{next(iter(trained))}'.*'t{len(trained) - 1}'"):
        load(tmp_path / "reversed.pth", in_order=True)


def test_in_order_still_goes_by_name_where_names_agree(trained: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(dict(reversed(trained.items())), tmp_path / "w.pth")
    assert_loaded(load(tmp_path / "w.pth", in_order=True), trained)


def test_checkpoints_that_do_not_fit_show_the_first_mismatch(trained: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(
        {name: value for name, value in trained.items() if name != "fc.bias"} | {"more": torch.zeros(1)},
        tmp_path / "w.pth",
    )
    with pytest.raises(
        FormatError, match=r"1 of its .* missing \(first: 'fc.bias'\), 1 are unknown to it \(first: 'more'\)"
    ):
        load(tmp_path / "w.pth")
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(FormatError, match=r"'fc.weight'.*num_classes="):
        load_model(TINY, checkpoint=tmp_path / "w.pth", num_classes=5)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no weight file"):
        load(tmp_path / "none.pth")
    with pytest.raises(FormatError, match="ends in one of"):
        load(tmp_path / "w.onnx")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(FormatError, match="refused because reading them runs their code"):
        load(tmp_path / "module.pth")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
    with pytest.raises(FormatError, match="no complete safetensors file"):
        load(tmp_path / "text.safetensors")
    (tmp_path / "text.pth").write_bytes(b"")
    with pytest.raises(FormatError, match="not a file that torch"):
        load(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(FormatError, match="epoch: int"):
        load(tmp_path / "epoch.pth")


def test_transform_is_what_timm_would_do() -> None:
    """Against timm's own evaluation transform, at crop_pct 1, on a picture that needs both resizing and cropping."""
    model = load_model(TINY, pretrained=False)
    config = timm.data.resolve_model_data_config(model)
    rows, columns = np.mgrid[0:300, 0:400]
    picture = np.stack([rows / 300, columns / 400, (rows + columns) / 700], 2)
    image = Image.fromarray((255 * picture).round().astype(np.uint8))
    expected = timm.data.create_transform(**(config | {"crop_pct": 1.0}))(image)
    got = input_transform(model)(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)[0]
    assert got.shape == expected.shape == config["input_size"]
    assert (got - expected).abs().max() < 0.03  # PIL rounds to bytes: 1 / 255 / 0.225 = 0.017


def test_transform_sizes() -> None:
    model = load_model(TINY, pretrained=False)
    images = torch.rand(2, 3, 40, 60)
    assert input_transform(model)(images).shape[2:] == timm.data.resolve_model_data_config(model)["input_size"][1:]
    assert input_transform(model, size="image")(images).shape[2:] == (40, 60)
    assert input_transform(model, size=16)(images).shape[2:] == (16, 16)
    assert input_transform(model, size=(16, 24))(images).shape[2:] == (16, 24)
    whole = input_transform(model, size="image")(images)
    torch.testing.assert_close(
        whole * torch.tensor(model.default_cfg["std"]).view(3, 1, 1)
        + torch.tensor(model.default_cfg["mean"]).view(3, 1, 1),
        images,
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_100"])
def test_the_input_configuration_is_that_of_timm(name: str) -> None:
    model = timm.create_model(name)
    expected = timm.data.resolve_model_data_config(model)
    config = input_config(torch.compile(model))
    assert config is not None
    assert config == (expected["input_size"], expected["mean"], expected["std"], expected["interpolation"])


def test_the_input_size_of_a_transformer_is_the_one_it_was_built_for() -> None:
    model = timm.create_model("test_vit", img_size=(32, 48))
    config = input_config(model)
    assert config is not None
    assert config.size == (3, 32, 48)
    with torch.no_grad():
        assert len(model(input_transform(model)(torch.rand(2, 3, 40, 40)))) == 2


def test_models_without_a_timm_configuration_have_no_input_transform() -> None:
    assert input_config(torch.nn.Conv2d(3, 4, 3)) is None
    with pytest.raises(OptionError, match="got Conv2d; build InputTransform"):
        input_transform(torch.nn.Conv2d(3, 4, 3))


def test_transform_crops_the_center_and_does_not_overshoot() -> None:
    transform = InputTransform((8, 8), (0.0,), (1.0,))
    sides = torch.zeros(1, 1, 8, 24)
    sides[..., 8:16] = 1
    assert transform(sides).eq(1).all()
    edge = torch.zeros(1, 1, 32, 32)
    edge[..., 16:] = 1
    assert 0 <= transform(edge).min() <= transform(edge).max() <= 1


def test_transform_refuses_other_images() -> None:
    transform = InputTransform((8, 8), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(InputTypeError, match="divide bytes by 255"):
        transform(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputTypeError, match="from -1 to 1"):
        transform(torch.linspace(-1, 1, 192).view(1, 3, 8, 8))
    with pytest.raises(ShapeError, match="N, 3, H, W"):
        transform(torch.zeros(1, 1, 8, 8))
    with pytest.raises(OptionError, match="bicubic"):
        InputTransform((8, 8), (0.5,), (0.5,), "lanczos")
    with pytest.raises(OptionError, match='"model", "image"'):
        input_transform(load_model(TINY, pretrained=False), size="native")  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write six oblong images of two classes in a split `val`: black, with a white center in class 1."""
    for i in range(6):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[:, 1:29] = 255 * (i % 2)
        place = tmp_path / "val" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_folders_are_read_cropped_and_labeled(folder: Path) -> None:
    loader = image_loader(str(folder), image_size=10, batch_size=4, workers=0)
    batches = list(loader)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.shape == (6, 3, 10, 10)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(images.mean((1, 2, 3)), labels.float())
    assert len(image_loader(str(folder), split="validation", workers=0).dataset) == 6  # type: ignore[arg-type]


def test_splits_that_are_not_there_are_not_replaced(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test'.*\['val'\]"):
        image_loader(str(folder), split="test")
    with pytest.raises(DataError, match="no folder"):
        image_loader(str(folder / "nothing"))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="Found 0 images"):
        image_loader(str(folder), split="empty")


def test_broken_images_are_named_and_not_skipped(folder: Path) -> None:
    (folder / "val" / "class1" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image 4 .*3\.png"):
        list(image_loader(str(folder), workers=0))


def test_loader_options_without_meaning(folder: Path) -> None:
    for options in ({"image_size": 0}, {"batch_size": 0}, {"workers": -1}, {"workers": 10**9}):
        with pytest.raises(OptionError, match="at least"):
            image_loader(str(folder), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="stream"):
        image_loader("wds/x")
    with pytest.raises(OptionError, match="--data-dir"):
        image_loader("torch/cifar10")
    with pytest.raises(DataError, match="cannot be read"):
        image_loader("torch/cifar10", root=folder)


def test_hfds_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"knowiso_train\[data\]"):
        image_loader("hfds/cifar10")


def test_hfds_reads_local_folders_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (6, 6), (i, i, i)) for i in (0, 51, 255)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0]}, features=columns)
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "test-00000.parquet")
    (images, labels), *_ = image_loader(f"hfds/{tmp_path / 'set'}", image_size=4, workers=0, root=tmp_path / "cache")
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([0.0, 0.2, 1.0]))
    assert labels.tolist() == [0, 1, 0]


@pytest.mark.data
def test_hfds_reads_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loader = image_loader(f"hfds/{DATA / 'cifar10'}", split="test", image_size=32, batch_size=8, workers=0)
    images, labels = next(iter(loader))
    table = importlib.import_module("datasets").load_dataset(str(DATA / "cifar10"), split="test")
    assert len(loader.dataset) == len(table) == 10_000  # type: ignore[arg-type]
    assert labels.tolist() == table[:8]["label"]
    for image, picture in zip(images, table[:8]["image"], strict=True):
        torch.testing.assert_close(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)


def test_outline_gives_channels_and_grids() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.unused, self.pair = (
                nn.Conv2d(3, 8, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.ReLU(),
                Pair(),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.act(self.act(self.conv(x))))[0].flatten(1)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = Odd().train()
    lines = {line.name: line for line in layer_summary(model, torch.zeros(2, 3, 6, 6))}
    assert (lines["conv"].channels, lines["conv"].grid, lines["conv"].note) == (8, (6, 6), "")
    assert lines["act"].note == "runs 2 times"
    assert lines["unused"].note == "did not run"
    assert "tuple" in lines["pair"].note
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert named_stages(model) == set()
    assert {"layer2", "layer4"} <= named_stages(timm.create_model("resnet10t"))


def test_processes_alone_and_devices_that_are_not_there() -> None:
    alone = Processes("cpu")
    assert alone.is_main
    assert alone.device.type == "cpu"
    with pytest.raises(OptionError, match="'nonsense'"):
        Processes("nonsense")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "model."])
def test_a_weight_file_gives_its_number_of_classes(prefix: str, tmp_path: Path) -> None:
    saved = load_model("test_resnet", pretrained=False, num_classes=4)
    file = tmp_path / "epoch=3.pth"
    torch.save({f"{prefix}{name}": value for name, value in saved.state_dict().items()}, file)
    built = build_checkpoint(f"test_resnet={file}")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), built.parameters(), strict=True))
