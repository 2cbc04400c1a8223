"""Image classifiers of transformers by folder, with their image processors, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import knowiso_train as ki
from knowiso_train.cli import main
from knowiso_train.errors import DataError, KnowisoWarning, OptionError
from knowiso_train.loading import input_transform, load_model
from knowiso_train.loading.hub import processor_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return folders of a saved ResNet with an image processor, and of a ViT without one."""
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    vit = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32)
    paths = [tmp_path_factory.mktemp(name) for name in ("resnet", "vit")]
    ResNetForImageClassification(resnet).save_pretrained(paths[0])
    ViTForImageClassification(vit).save_pretrained(paths[1])
    (paths[0] / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "resample": 2,'
        ' "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}'
    )
    return paths


def test_the_network_has_its_weights_and_the_transform_of_its_processor(folders: list[Path]) -> None:
    images = torch.rand(3, 3, 60, 50)
    for spec in (str(folders[0]), f"hf:{folders[0]}"):
        network = load_model(spec)
        transform = input_transform(network)
        assert (transform.size, transform.interpolation) == ((48, 48), "bilinear")
        assert transform.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        saved = ResNetForImageClassification.from_pretrained(folders[0]).eval()
        with torch.no_grad():
            inputs = transform(images)
            torch.testing.assert_close(network(inputs).logits, saved(inputs).logits)


def test_weights_in_half_precision_are_loaded_in_float32(folders: list[Path], tmp_path: Path) -> None:
    ResNetForImageClassification.from_pretrained(folders[0]).half().save_pretrained(tmp_path)
    for pretrained in (True, False):
        with pytest.warns(KnowisoWarning, match="no image processor"):
            network = load_model(f"hf:{tmp_path}", pretrained=pretrained)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_random_weights_and_another_classifier(folders: list[Path]) -> None:
    trained = load_model(str(folders[0]))
    torch.manual_seed(1)
    random = load_model(str(folders[0]), pretrained=False)
    assert not torch.equal(next(trained.parameters()), next(random.parameters()))
    assert load_model(str(folders[0]), num_classes=7)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 7)


@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_the_command_line_measures_what_python_measures(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    for index in range(40):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
        (tmp_path / "images/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/a/{index:02d}.png")
    names = "resnet.encoder.stages.1=vit.layers.1"
    words = ["--source", f"hf:{folders[0]}", "--target", f"hf:{folders[1]}", "--layers", names, "--functional"]
    images = ["--dataset", str(tmp_path / "images"), "--image-size", "32", "--input-size", "image", "--workers", "0"]
    main(["layers", f"hf:{folders[1]}", "--depth", "3"])
    assert "vit.layers.1" in capsys.readouterr().out
    options = ["--order", "0", "--no-progress", "--json", str(tmp_path / "report.json")]
    assert main(["measure", *words, *images, *options]) == 0
    pair = ki.Report.from_json(tmp_path / "report.json").pairs[0]
    assert 0 < pair.unexplained <= 1.5
    assert pair.functional[0].agreement is not None


def test_sizes_of_processors() -> None:
    assert processor_config({"size": {"height": 20, "width": 30}})["input_size"] == (3, 20, 30)
    assert processor_config({"size": {"shortest_edge": 20}, "crop_size": 16, "do_center_crop": False})[
        "input_size"
    ] == (3, 20, 20)
    assert processor_config({})["input_size"] == (3, 224, 224)
    own = {"input_size": (3, 160, 160), "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic", "crop_pct": 1.0}
    assert processor_config({"data_config": own}) == {key: own[key] for key in list(own)[:4]}
    statistics = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    assert processor_config(statistics | {"do_normalize": True})["mean"] == [0.4] * 3
    for value in (False, None):  # None of MobileViT
        config = processor_config(statistics | {"do_normalize": value})
        assert (config["mean"], config["std"]) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("hf:nobody/nothing", DataError, "hf:nobody/nothing cannot be loaded as an image classifier"),
        ("microsoft/resnet-18", OptionError, "use hf:microsoft/resnet-18"),
        ("weights.pth", OptionError, "expected the name of a network, got the file 'weights.pth'"),
        ("local-dir:nothing", DataError, "'local-dir:nothing' cannot be loaded"),
    ],
)
def test_errors_name_what_to_do(spec: str, kind: type[Exception], message: str) -> None:
    for pretrained in (True, False):
        with pytest.raises(kind) as error:
            load_model(spec, pretrained=pretrained)
        assert message in str(error.value)
