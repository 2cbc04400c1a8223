"""Outputs of several kinds, memory formats, and state dicts whose modules check their version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import InputTypeError, OptionError
from knowiso_train.loading.checkpoints import load_checkpoint
from knowiso_train.loading.timm import load_model
from knowiso_train.pruning._ranking import output_tensor
from knowiso_train.utils.batch import tensor_leaves
from tests.helpers.prune_models import family


@dataclass
class Output:
    """An output as a dataclass."""

    loss: None
    scores: Tensor


class Wrapped(nn.Module):
    """A small network whose output holds more than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1)]
        self.body, self.wrap = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "with None": lambda y: (y, None),
    "None first": lambda y: (None, y),
    "number": lambda y: [3, y, 0.5],
    "string": lambda y: {"name": "cat", "scores": y},
    "logits": lambda y: {"name": "cat", "logits": y},
    "nested": lambda y: ("a", {"aux": [None, y]}),
    "dataclass": lambda y: Output(None, y),
}


@pytest.mark.parametrize("name", list(OUTPUTS))
@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
def test_the_tensors_of_an_output_are_pruned_by_tuned_and_saved(name: str, tmp_path: Path) -> None:
    model, images = Wrapped(OUTPUTS[name]).eval(), torch.randn(48, 3, 12, 12)
    pruned = ki.prune(model, [images], macs=0.6, progress=False)
    assert pruned.report.macs[1] <= 0.6 * pruned.report.macs[0]
    plain = ki.prune(Wrapped(OUTPUTS["tensor"]).eval(), [images], macs=0.6, progress=False)
    assert torch.equal(output_tensor(pruned.model(images)), output_tensor(plain.model(images)))
    pruned.save(tmp_path, factory="external", example=(1, 3, 12, 12))
    loaded = ki.load_pruned(tmp_path, model=Wrapped(OUTPUTS[name]))
    assert torch.equal(tensor_leaves(loaded(images))[0], tensor_leaves(pruned.model(images))[0])
    ki.finetune(pruned.model, model, [images], steps=1, batch_size=8, progress=False)


@pytest.mark.parametrize("output", ["cat", None, (None, 3), {"a": []}, (torch.arange(3),)])
def test_outputs_without_a_floating_tensor_raise(output: Any) -> None:
    with pytest.raises(InputTypeError, match="holds a floating tensor"):
        output_tensor(output)


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "densenet121"])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
def test_cut_weights_keep_channels_last(name: str, refit: bool) -> None:
    model, images = family(name)
    pruned = ki.prune(
        model.to(memory_format=torch.channels_last), [images], macs=0.6, refit=refit, progress=False
    ).model
    weights = {key: value for key, value in pruned.named_parameters() if value.ndim == 4}
    assert weights
    assert [key for key, value in weights.items() if not value.is_contiguous(memory_format=torch.channels_last)] == []


def test_contiguous_weights_stay_contiguous() -> None:
    model, images = family("test_resnet")
    pruned = ki.prune(model, [images], macs=0.6, refit=False, progress=False).model
    assert all(value.is_contiguous() for value in pruned.parameters())


def mnasnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mnasnet0_5(num_classes=4).eval()


def test_modules_that_check_the_version_of_their_state_are_saved_finetuned_and_loaded(tmp_path: Path) -> None:
    model, images = mnasnet(), torch.randn(32, 3, 48, 48)
    pruned = ki.prune(model, [images], macs=0.7, refit=False, progress=False)
    ki.finetune(pruned.model, model, [images], steps=1, batch_size=8, progress=False)
    pruned.save(tmp_path / "pruned", factory="external", example=(1, 3, 48, 48))
    loaded = ki.load_pruned(tmp_path / "pruned", model=mnasnet())
    assert torch.equal(loaded(images), pruned.model.eval()(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_files_load_into_modules_that_check_the_version(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, other = mnasnet(), torchvision.models.mnasnet0_5(num_classes=4).eval()
    state = dict(model.state_dict())
    (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"weights{suffix}")
    load_checkpoint(other, tmp_path / f"weights{suffix}")
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["cspresnet50d", "convnext_atto_rms", "coatnet_pico_rw_224"])
def test_timm_networks_without_published_weights_have_the_tag_untrained(name: str) -> None:
    model = load_model(f"{name}.untrained", pretrained=False, num_classes=4)
    assert model.pretrained_cfg["tag"] == "untrained"
    with pytest.raises(OptionError, match="no pretrained tag 'nothing'"):
        load_model(f"{name}.nothing", pretrained=False)


def test_a_pruned_timm_network_without_published_weights_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("mnasnet_050", num_classes=4).eval(), torch.randn(8, 3, 48, 48)
    pruned = ki.prune(model, [images], macs=0.9, refit=False, progress=False)
    pruned.save(tmp_path, example=(1, 3, 48, 48))
    assert torch.equal(ki.load_pruned(tmp_path)(images), pruned.model(images))
