"""Recipes with image classifiers of transformers: distilled, pruned, refined, and loaded without the library."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ViTConfig

import knowiso_train as ki
from knowiso_train.errors import OptionError
from tests.helpers import image_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import distill
import prune
import refine

pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images beside networks of transformers: resnet, large and vit."""
    folder = image_folder.write(
        tmp_path_factory.mktemp("hub"), {"train": 96, "validation": 33, "test": 33}, SIDE, faint=True
    )
    torch.manual_seed(0)
    for name, width in (("resnet", 8), ("large", 12)):
        config = ResNetConfig(embedding_size=8, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type="basic")
        AutoModelForImageClassification.from_config(config).save_pretrained(folder / name)
    vit = ViTConfig(image_size=SIDE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    AutoModelForImageClassification.from_config(vit).save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def made(*more: str) -> list[str]:
        images = f"--dataset {folder} --image-size {SIDE} --batch-size 16 --output {tmp_path / 'run'}"
        return [*images.split(), *more]

    return made


def loaded_by_card(run: Path, name: str) -> nn.Module:
    """Run the code of a card, which imports transformers alone."""
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert code is not None
    assert "knowiso" not in code[1]
    namespace: dict[str, nn.Module] = {}
    exec(code[1].replace(f"'{name}.safetensors'", repr(str(run / f"{name}.safetensors"))), namespace)
    return namespace["model"]


def test_a_distilled_student_is_loaded_by_transformers(
    folder: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    networks = f"--teacher hf:{folder}/vit --teacher-epochs 1 --student hf:{folder}/resnet --student-pretrained"
    layers = "--layers resnet.encoder.stages.1=vit.layers.1 --arms ours --epochs 2 --weight 100"
    assert distill.main(words(*networks.split(), *layers.split())) == 0
    (card,) = json.loads((tmp_path / "run/summary.json").read_text())["arms"][1:]
    assert 0 < card["explained"]["resnet.encoder.stages.1 → vit.layers.1"] < 1
    student = loaded_by_card(tmp_path / "run/ours", "last")
    assert student.config.num_labels == 3
    assert (tmp_path / "run/ours/README.md").read_text().startswith("---\nlibrary_name: transformers")
    for name, value in load_file(tmp_path / "run/ours/last.safetensors").items():
        assert torch.equal(student.state_dict()[name], value), name


@pytest.mark.parametrize(("name", "training"), [("resnet", "--tune-steps 2 --epochs 1"), ("vit", "")])
def test_a_network_is_pruned_and_trained(
    name: str, training: str, folder: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    options = f"--model-pretrained --images 64 --macs 0.9 {training}".split()
    with pytest.raises(OptionError, match=r"are for 2 classes, and the images have 3.*--model-checkpoint"):
        prune.main(words("--model", f"hf:{folder}/{name}", *options))
    config = AutoConfig.from_pretrained(folder / name, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / name)
    assert prune.main(words("--model", f"hf:{tmp_path}/{name}", *options)) == 0
    stages = {card["name"]: card for card in json.loads((tmp_path / "run/summary.json").read_text())["stages"]}
    assert stages["1-pruned"]["macs"] <= 0.9 * stages["original"]["macs"]
    fresh = AutoModelForImageClassification.from_config(config)
    network = ki.load_pruned(tmp_path / "run/pruned", model=fresh)
    assert network(torch.zeros(2, 3, SIDE, SIDE)).logits.shape == (2, 3)
    assert sum(p.numel() for p in network.parameters()) == stages["1-pruned"]["parameters"]


def test_a_network_is_refined(folder: Path, tmp_path: Path, words: Callable[..., list[str]]) -> None:
    options = f"--model hf:{folder}/resnet --peers hf:{folder}/large --labels 4 --steps 2"
    assert refine.main(words(*options.split())) == 0
    assert {"report.json", "refined.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    network = loaded_by_card(tmp_path / "run", "refined")
    assert network(torch.zeros(2, 3, SIDE, SIDE)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (distill, "--student hf:FOLDER/resnet depth=3", "expected no options of timm"),
        (distill, "--student hf:FOLDER/vit --image-size 48", "vit does not accept images of (48, 48) pixels"),
        (prune, "--model hf:FOLDER/vit --image-size 48", "vit does not accept images of (48, 48) pixels"),
    ],
)
def test_errors_name_what_to_do(
    recipe: object, options: str, message: str, folder: Path, words: Callable[..., list[str]]
) -> None:
    with pytest.raises(OptionError) as error:
        recipe.main(words(*options.replace("FOLDER", str(folder)).split()))  # type: ignore[attr-defined]
    assert message in str(error.value)
