"""Run the Python blocks of the README on small networks, and check names and links in all documents."""

from __future__ import annotations

import copy
import importlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.distillation import kd_loss

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
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


# The README uses more images than this test
@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_every_python_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **rest: create("test_resnet", **{"num_classes": 5, **rest})
    )
    # Orders above 0 train on as many positions as these images deserve
    short = {"solver_options": {"rows_seen": 10_000}}
    monkeypatch.setattr(ki, "measure", partial(ki.measure, **short))
    monkeypatch.setattr(ki, "Disentangler", partial(ki.Disentangler, **short))
    monkeypatch.setattr(ki, "finetune", partial(ki.finetune, steps=10))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(90, 3, 32, 32), torch.randint(5, (90,))), batch_size=20)
    names: dict[str, Any] = {
        "copy": copy,
        "ki": ki,
        "tp": tp,
        "torch": torch,
        "F": F,
        "kd_loss": kd_loss,
        "loader": loader,
        "model": create("test_resnet"),
        "held_out": loader,
        "few": DataLoader(TensorDataset(torch.randn(40, 3, 32, 32), torch.arange(40) % 5), batch_size=20),
        "peer": create("test_resnet", num_classes=5),
        "accelerator": Accelerator(cpu=True),
        "images": torch.randn(2, 3, 64, 64),
        "x_source": torch.randn(200, 6, 3, 3),
        "x_target": torch.randn(200, 4, 3, 3),
    }
    for block in BLOCKS:
        exec(block, names)
    assert {"report", "components", "features", "iso"} <= set(names)
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "output/iso/history.json").exists()
    assert 0.4 < names["pruned"].report.macs[1] / names["pruned"].report.macs[0] <= 0.5
    assert (tmp_path / "pruned/model.safetensors").exists()
    assert names["smaller"](names["images"]).shape == (2, 1000)
    assert 0 < float(names["loss"].detach()) < 100


def test_the_readme_uses_every_public_function() -> None:
    assert len(BLOCKS) >= 10
    for name in set(ki.__all__) - {"KnowisoWarning", "Report", "save_pruned"}:
        assert f"ki.{name}" in README, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_no_old_names(path: Path) -> None:
    text = path.read_text()
    assert [name for name in OLD_NAMES if re.search(name, text)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_documents_exist(path: Path) -> None:
    prefixes = {"ki": "knowiso_train", "pruning": "knowiso_train.pruning", "refinement": "knowiso_train.refinement"}
    for prefix, name in re.findall(r"(?<![\w./])(ki|pruning|refinement)\.([A-Za-z_]\w*)", path.read_text()):
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


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/benchmarks.md"], ids=lambda path: path.name)
def test_figures_with_errors_are_in_the_results_files(path: Path) -> None:
    """Compare each mean ± standard error with the recorded ones, rounded as it is printed."""
    files = (ROOT / "benchmarks/results").glob("*.json")
    texts = [json.dumps(json.loads(file.read_text()), ensure_ascii=False) for file in files]
    values = [(float(mean), float(error)) for text in texts for mean, error in PAIR.findall(text)]
    pairs = PAIR.findall(path.read_text())
    assert len(pairs) >= 5
    for mean, error in pairs:
        # Half a unit of the last digit, and the rounding of the recorded figure
        tolerance = 0.5 * 10.0 ** -len(mean.split(".")[1]) + 0.006
        printed = float(mean.replace("−", "-")), float(error)
        assert any(
            abs(value - printed[0]) <= tolerance and abs(spread - printed[1]) <= tolerance for value, spread in values
        ), f"{mean} ± {error}"
