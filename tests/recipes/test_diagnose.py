"""recipes/diagnose.py, end to end: tiny networks on generated pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import knowiso_train as ki
from knowiso_train.diagnosis import Diagnosis
from knowiso_train.errors import DataError, LayerNameError, OptionError
from knowiso_train.loading import image_loader, input_transform, load_model
from tests.helpers import image_folder
from tests.helpers.processes import run_script_in_processes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import diagnose  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
SIDE, COUNT = 32, 100

# Ends the process while the file of the second layer pair is written
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(RECIPES)!r})
import diagnose
from knowiso_train.utils import serialization
replaced = os.replace
def replace(source, target):
    if str(target).endswith("layer2=layer2.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(source, target)
os.replace = replace
diagnose.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Return the arguments of a run with one weak and two strong networks."""
    folder = image_folder.write(tmp_path_factory.mktemp("pictures"), {"validation": COUNT}, SIDE, faint=True)
    torch.manual_seed(0)
    for name in ("weak", "a", "b"):
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / f"{name}.pth")

    def arguments(output: Path, *more: str) -> list[str]:
        networks = (
            f"--weak test_resnet={folder}/weak.pth --strong test_resnet={folder}/a.pth test_resnet={folder}/b.pth"
        )
        data = f"--dataset {folder} --split validation --image-size {SIDE} --batch-size 30 --labels --directions 2"
        return [*networks.split(), *data.split(), "--layers", "layer1", "layer2", "--output", str(output), *more]

    return arguments


@pytest.fixture(scope="module")
def finished(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without interruption."""
    output = tmp_path_factory.mktemp("finished")
    assert diagnose.main(words(output)) == 0
    return output


def test_the_joint_result_is_that_of_one_call(finished: Path, words: Callable[..., list[str]]) -> None:
    joint = Diagnosis.from_json(finished / "diagnosis.json")
    names = ("test_resnet (weak)", "test_resnet (a)", "test_resnet (b)")
    assert (joint.weak, *joint.strong) == names
    assert joint.class_names == ("class0", "class1", "class2")
    arguments = diagnose.parse_arguments(words(finished))
    files = [spec.partition("=")[2] for spec in (arguments.weak, *arguments.strong)]
    networks = [load_model("test_resnet", checkpoint=file, num_classes=3) for file in files]
    loader = image_loader(arguments.dataset, split="validation", image_size=SIDE, batch_size=30, workers=0)
    transform = input_transform(networks[0], size=SIDE)
    expected = ki.diagnose(
        networks[0], networks[1:], loader, ["layer1", "layer2"], num_directions=2, names=names, progress=False,
        weak_transform=transform, strong_transform=transform,
    )  # fmt: skip
    assert len(joint) == len(expected) == 8
    results = {(layer.kind, layer.network, layer.explaining, layer.layer): layer for layer in joint}
    for layer in expected:
        same = results[layer.kind, layer.network, layer.explaining, layer.layer]
        assert same.pair.unexplained == pytest.approx(layer.pair.unexplained, abs=1e-6)
        assert same.pair.residual_only.top1 == pytest.approx(layer.pair.residual_only.top1)
        assert same.confirmed_by_none == pytest.approx(layer.confirmed_by_none, abs=1e-6)
    shown = {image.index for layer in joint for direction in layer.directions for image in direction.images}
    assert shown <= {picture.index for picture in joint.thumbnails}
    assert (finished / "diagnosis.html").read_text(encoding="utf-8") == joint.to_html()
    assert (finished / "diagnosis.png").stat().st_size > 10_000


def test_a_killed_run_is_resumed_by_two_processes_without_a_second_measurement(
    finished: Path, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words(tmp_path)], env=environment, capture_output=True, timeout=240
    )
    assert killed.returncode == -9, killed.stderr
    first, second = (tmp_path / "layers" / f"{layer}={layer}.json" for layer in ("layer1", "layer2"))
    assert list((tmp_path / "layers").glob("*.json")) == [first]
    assert not (tmp_path / "diagnosis.json").exists()
    before = first.stat().st_mtime_ns
    run_script_in_processes(RECIPES / "diagnose.py", words(tmp_path, "--device", "cpu"))
    assert first.stat().st_mtime_ns == before
    assert [Diagnosis.from_json(file).settings["processes"] for file in (first, second)] == [1, 2]
    one, two = (Diagnosis.from_json(folder / "diagnosis.json") for folder in (finished, tmp_path))
    assert two.images == one.images
    assert len(two) == len(one) == 8
    for a, b in zip(one, two, strict=True):
        assert b.pair.unexplained == pytest.approx(a.pair.unexplained, abs=1e-5)
    monkeypatch.setattr(ki, "diagnose", None)
    assert diagnose.main(words(tmp_path)) == 0  # a finished run is shown again


def test_bad_arguments_are_named(finished: Path, words: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="order is 1, was 0"):
        diagnose.main(words(finished, "--order", "1"))
    with pytest.raises(OptionError, match="WEAK=STRONG"):
        diagnose.main(words(tmp_path / "a", "--layers", "layer1="))
    with pytest.raises(LayerNameError, match="layer9"):
        diagnose.main(words(tmp_path / "b", "--layers", "layer9"))
    with pytest.raises(DataError, match="no folder"):
        diagnose.main(words(tmp_path / "c", "--dataset", "no/such/folder"))
