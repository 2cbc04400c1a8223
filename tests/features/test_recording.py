"""Recording observes a network: no output is replaced, and no hook is left."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import KnowisoError
from knowiso_train.features.recording import record_outputs
from knowiso_train.features.summary import layer_summary, stage_grids

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4


class SharedActivation(nn.Module):
    """Network that uses one activation after each of its convolutions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 4)
        self.passes: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))
        self.passes.append((x.detach(), logits.detach()))
        return logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("convert", [None, lambda output: output * 0, lambda output: [output]])
def test_recording_replaces_no_output_of_a_shared_module(convert: Any) -> None:
    model = SharedActivation().eval()
    expected = model(IMAGES[:2])
    with record_outputs(dict(model.named_modules()), convert) as outputs:
        assert torch.equal(model(IMAGES[:2]), expected)
    assert len(outputs["relu"]) == 2
    assert hooks(model) == 0


@pytest.mark.parametrize("call", ["stages", "summary", "auto"])
def test_functions_that_list_layers_replace_no_output_of_a_shared_module(call: str) -> None:
    model = SharedActivation().eval()
    if call == "stages":
        stage_grids(model, lambda: model(IMAGES[:2]))
    elif call == "summary":
        layer_summary(model, IMAGES[:2])
    else:
        ki.IsomorphismLoss(model, SharedActivation(1), "auto", loader=list(IMAGES.repeat(4, 1, 1, 1).split(16)))
    assert model.passes
    for images, output in model.passes.copy():
        torch.testing.assert_close(output, model(images).detach())
    assert hooks(model) == 0


BATCHES: dict[str, list[Any]] = {
    "string": ["images"],
    "none": [None],
    "mapping without tensors": [{"images": 1}],
    "integers": [(torch.zeros(4, 3, 8, 8, dtype=torch.long), LABELS[:4])],
    "vector": [(torch.zeros(4), LABELS[:4])],
    "other channels": [(torch.randn(4, 5, 8, 8), LABELS[:4])],
    "no labels": [IMAGES],
    "no images": [(IMAGES[:0], LABELS[:0])],
    "nested": [[[[IMAGES]]]],
    "object": [(object(), LABELS)],
    "nan": [(IMAGES * float("nan"), LABELS)],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("method", ["auto", "fold", "head", "consensus"])
@pytest.mark.parametrize("role", ["loader", "validation", "labeled"])
@pytest.mark.filterwarnings("ignore")
def test_refine_leaves_no_hook_after_batches_that_it_cannot_use(role: str, method: str, batches: list[Any]) -> None:
    usable = DataLoader(TensorDataset(IMAGES, LABELS), 16)
    loaders: dict[str, Any] = {"loader": usable, "validation": usable, "labeled": usable, role: batches}
    model, peer = SharedActivation(), SharedActivation()
    # Errors of the network itself are passed on
    with contextlib.suppress(KnowisoError, RuntimeError, ValueError, TypeError):
        ki.refine(model, [peer], method=method, progress=False, **loaders)  # type: ignore[arg-type]
    assert hooks(model) == hooks(peer) == 0
    assert model.training


def test_stages_of_a_network_of_transformers() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    expected = {"resnet.encoder.stages.0": (8, 8), "resnet.encoder.stages.1": (4, 4)}
    assert stage_grids(model, lambda: model(torch.zeros(2, 3, 32, 32))) == expected
