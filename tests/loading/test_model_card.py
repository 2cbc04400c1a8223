"""Model cards beside saved networks, as the hub's own library reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import nn

import knowiso_train as ki
from knowiso_train.experiment import RunFolder
from knowiso_train.loading.model_card import write_model_card


def test_the_hub_reads_metadata_and_code(tmp_path: Path) -> None:
    write_model_card(
        tmp_path, "resnet18, pruned", "Half.", "model = 1", tags=["pruned"], base_model="timm/resnet18.a1_in1k"
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "timm/resnet18.a1_in1k"
    assert {"knowiso_train", "pruned"} <= set(card.data.tags)
    assert "```python\nmodel = 1\n```" in card.text
    write_model_card(tmp_path, "again", "Half.", "model = 2")
    assert "model = 2" in (tmp_path / "README.md").read_text()


def test_a_readme_of_another_origin_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_model_card(tmp_path, "title", "text", "code")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_pruned_networks_and_those_of_recipes_have_cards_whose_code_loads_them(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))
    images = torch.randn(64, 3, 12, 12)
    pruned = ki.prune(model, [images], progress=False)
    pruned.save(tmp_path / "pruned", factory="external", example=(1, 3, 12, 12))
    text = (tmp_path / "pruned/README.md").read_text()
    assert f"{pruned.report.parameters[1]:,} of {pruned.report.parameters[0]:,}" in text
    assert 'ki.load_pruned("pruned", model=original)' in text
    run = RunFolder(tmp_path / "run")
    run.write_network("last", nn.Linear(2, 2), {"load": "timm.create_model('x', checkpoint_path='FILE')", "top1": 9.5})
    assert "checkpoint_path='last.safetensors'" in ModelCard.load(tmp_path / "run/README.md").text
