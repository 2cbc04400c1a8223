"""Run the Python blocks of all documents on small networks, parse their commands, and check names and links."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from benchmarks.distill.pairs import PAIRS
from benchmarks.distill.store import ResultsStore, summary
from knowiso_train.cli import parser
from knowiso_train.cli._main import RECIPES
from knowiso_train.distillation import kd_loss

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Sources that define the options of the recipes
RECIPE_SOURCES = "".join(
    file.read_text() for folder in ("recipes", "knowiso_train/experiment") for file in (ROOT / folder).glob("*.py")
)
# Old public names and options, as regular expressions. The table in CHANGELOG.md has the new ones.
OLD_NAMES = [
    r"\bki\.tune\b",
    r"\bki\.carrying\b",
    r"\blabelled=",
    r"\bfloor=",
    r"\bform=",
    r"\bkeep_useless\b",
    r"\bleast=",
    r"\bmix_patches\b",
    r"\bHeadRecipe\b",
    r"\bpruning\.(recording|composed|take)\b",
    r"\bknowiso_train\.(losses|statistics)\b",
    r"\bintegrations\.(prune|timm|pruned_\w+)\b",
    r"\bDESIGN\b",
]


def blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of a document in one language."""
    return [code for name, code in FENCE.findall(path.read_text()) if name == language]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of a small network."""
    folder = tmp_path_factory.mktemp("run")
    for epoch in (1, 2):
        torch.save(small_network().state_dict(), folder / f"epoch-{epoch}.pth")
    return folder


# Options of timm's smallest ResNet
SMALL = {"channels": (8, 8, 16, 24), "stem_width": 8, "num_classes": 5}


def small_network() -> torch.nn.Module:
    return timm.create_model("test_resnet", **SMALL)


def namespace() -> dict[str, Any]:
    """Return the names that blocks use without defining them."""
    images, labels = torch.randn(90, 3, 32, 32), torch.arange(90) % 5
    loader = DataLoader(TensorDataset(images, labels), batch_size=30)
    return {
        "F": F,
        "accelerator": Accelerator(cpu=True),
        "copy": copy,
        "examples": [{"pixel_values": images[i], "labels": i % 5} for i in range(16)],
        "few": DataLoader(TensorDataset(images[:40], labels[:40]), batch_size=20),
        "held_out": loader,
        "images": images[:10],
        "kd_loss": kd_loss,
        "ki": ki,
        "labels": labels[:10],
        "loader": loader,
        "make_network": small_network,
        "torch": torch,
        "tp": tp,
        "x_source": torch.randn(200, 6, 3, 3),
        "x_target": torch.randn(200, 4, 3, 3),
        **{name: small_network() for name in ("model", "peer", "other", "student", "teacher")},
    }


def write_images(folder: Path) -> None:
    """Write 60 images in folders of five classes."""
    for i in range(60):
        file = folder / f"class{i % 5}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8)).save(file)


WITH_BLOCKS = [path for path in DOCUMENTS if blocks(path, "python")]


# The documents use more images than this test
@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
@pytest.mark.parametrize("path", WITH_BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_block_runs(
    path: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the blocks of a document one after the other, with small networks in place of timm's."""
    torch.manual_seed(0)
    create = timm.create_model
    # The blocks of the quickstart are a whole script
    names = {} if path.name == "quickstart.md" else namespace()
    small = SMALL | {"pretrained_cfg_overlay": {"input_size": (3, 48, 48)}}

    def create_small(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if name.startswith("vit"):
            return create("test_vit", img_size=32, depth=12, num_classes=5)
        return create("test_resnet", **{**small, **options})

    monkeypatch.setattr(timm, "create_model", create_small)
    # Orders above 0 train on as many positions as these images deserve
    monkeypatch.setattr(ki, "Disentangler", partial(ki.Disentangler, solver_options={"rows_seen": 10_000}))
    finetune = ki.finetune
    monkeypatch.setattr(ki, "finetune", lambda *args, **options: finetune(*args, **{**options, "steps": 10}))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, tmp_path / "output/run")
    write_images(tmp_path / "images")
    for block in blocks(path, "python"):
        exec(block, names)
    if path == ROOT / "README.md":
        assert {"report", "components", "features", "iso"} <= set(names)
        assert (tmp_path / "report.html").exists()
        assert (tmp_path / "output/iso/history.json").exists()
        assert 0.4 < names["pruned"].report.macs[1] / names["pruned"].report.macs[0] <= 0.5
        assert (tmp_path / "pruned/model.safetensors").exists()
        assert names["smaller"](torch.randn(2, 3, 64, 64)).shape[0] == 2
        assert names["loss"].isfinite()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_documents_are_understood(path: Path) -> None:
    """Parse each command of the library in the shell blocks, with continued lines joined and comments removed."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    for line in text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in ("...", "…")]
        is_recipe = words[:2] == ["accelerate", "launch"] and words[2].startswith("recipes/")
        if is_recipe or (words[:1] == ["knowiso"] and words[1:2] and words[1] in RECIPES):
            options = {word.split("=")[0] for word in words[2:] if word.startswith("--")} - {"--config"}
            assert all(f'"{option}"' in RECIPE_SOURCES for option in options), line
        elif words[:1] == ["knowiso"] and "--config" not in words:
            parser().parse_args(words[1:])


def test_the_readme_uses_every_public_function() -> None:
    for name in set(ki.__all__) - {"KnowisoWarning", "Report", "save_pruned"}:
        assert f"ki.{name}" in README, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_no_old_names(path: Path) -> None:
    text = path.read_text()
    assert [name for name in OLD_NAMES if re.search(name, text)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_documents_exist(path: Path) -> None:
    prefixes = {"ki": "knowiso_train", "pruning": "knowiso_train.pruning", "refinement": "knowiso_train.refinement"}
    for prefix, name in re.findall(r"(?<![\w./(])(ki|pruning|refinement)\.([A-Za-z_]\w*)", path.read_text()):
        assert hasattr(importlib.import_module(prefixes[prefix]), name), f"{prefix}.{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_scripts_in_documents_exist(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"recipes/\w+\.py|tests/[\w/]+\.py|benchmarks/results/\w+\.\w+", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


PAIR = re.compile(r"([+−-]?\d+\.\d+) ± (\d+\.\d+)")


@pytest.mark.parametrize(
    ("name", "least"),
    [("README.md", 5), ("docs/benchmarks.md", 5), ("docs/choosing.md", 4), ("docs/compared.md", 4)],
)
def test_figures_with_errors_are_in_the_results_files(name: str, least: int) -> None:
    """Compare each mean ± standard error with the recorded ones, rounded as it is printed."""
    files = (ROOT / "benchmarks/results").glob("*.json")
    texts = [json.dumps(json.loads(file.read_text()), ensure_ascii=False) for file in files]
    # The mean over the pairs of networks is computed from several files
    texts += [str(summary([ResultsStore(pair) for pair in PAIRS], "final", 10))]
    values = [(float(mean), float(error)) for text in texts for mean, error in PAIR.findall(text)]
    pairs = PAIR.findall((ROOT / name).read_text())
    assert len(pairs) >= least
    for mean, error in pairs:
        # Half a unit of the last digit, and the rounding of the recorded figure
        tolerance = 0.5 * 10.0 ** -len(mean.split(".")[1]) + 0.006
        printed = float(mean.replace("−", "-")), float(error)
        assert any(
            abs(value - printed[0]) <= tolerance and abs(spread - printed[1]) <= tolerance for value, spread in values
        ), f"{mean} ± {error}"
