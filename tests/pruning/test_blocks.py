"""Fine-tuning of blocks: closer to the original on new images, restored without an improvement, no side effects."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.pruning import _blocks as blocks
from knowiso_train.pruning._blocks import _RecordedBlock, _update_images, finetunable_blocks
from knowiso_train.pruning.calibration import Calibration
from tests.helpers.pruned_models import settled


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    """Two blocks, a residual convolution after them, and a classifier."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, inner), Block(width, inner))
        self.last = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = self.last(x) + x
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def random_images(n: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def original(seed: int) -> Net:
    torch.manual_seed(seed)
    return settled(Net(), random_images(256, seed=9))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fine_tuned_blocks_are_closer_to_the_original_on_new_images(seed: int) -> None:
    model, images, new_images = original(seed), random_images(seed=seed), random_images(256, seed=100 + seed)
    plain = ki.prune(model, [images], macs=0.5, progress=False)
    tuned = ki.prune(model, [images], macs=0.5, block_steps=40, progress=False)
    assert [block.name for block in tuned.report.blocks] == ["blocks.0", "blocks.1"]
    assert not plain.report.blocks
    assert all(block.after < block.before for block in tuned.report.blocks)
    with torch.no_grad():
        outputs = [network.blocks(F.relu(network.stem(new_images))) for network in (model, plain.model, tuned.model)]
    assert (outputs[2] - outputs[0]).square().mean() < 0.97 * (outputs[1] - outputs[0]).square().mean()
    assert {key: value.shape for key, value in tuned.model.state_dict().items()} == {
        k: v.shape for k, v in plain.model.state_dict().items()
    }


def test_reported_share_equals_the_distance_of_the_models() -> None:
    model, images = original(0), random_images()
    pruned = ki.prune(model, [images], macs=0.5, block_steps=20, progress=False)
    features: dict[str, Tensor] = {}
    for role, network in (("original", model), ("pruned", pruned.model)):
        network.blocks[1].register_forward_hook(lambda _m, _a, output, role=role: features.__setitem__(role, output))
        with torch.no_grad():
            network(images)
    held_out = slice(-round(0.1 * len(images)), None)
    variance = (features["original"] - features["original"].mean(0)).square().mean()
    share = (features["pruned"][held_out] - features["original"][held_out]).square().mean() / variance
    assert pruned.report.blocks[1].after == pytest.approx(float(share), rel=1e-4)


def test_later_layers_fit_the_residual_of_a_fine_tuned_block() -> None:
    model, images = original(1), random_images(400)
    small = ki.prune(model, [images], macs=0.5, progress=False)
    network = copy.deepcopy(small.model)
    ki.refit(network, model, [images], kept=small.kept, ridge=1e-9, rows=10_000, block_steps=30, progress=False)
    with torch.no_grad():
        fitted = images[:360]  # the last tenth is held out
        inputs = network.blocks(F.relu(network.stem(fitted)))
        reference = model.blocks(F.relu(model.stem(fitted)))
        residual = (model.last(reference) + reference) - (network.last(inputs) + inputs)
        x, y = (value.permute(0, 2, 3, 1).flatten(0, 2).double() for value in (inputs, residual))
        x, y = x - x.mean(0), y - y.mean(0)
        correlation = (x.T @ y).abs() / (x.norm(dim=0)[:, None] * y.norm(dim=0)).clamp_min(1e-12)
    # Least squares: the residual is uncorrelated with the inputs
    assert float(correlation.max()) < 1e-3


def test_block_is_restored_without_an_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(2), random_images()
    small = ki.prune(model, [images], macs=0.5, progress=False)
    plain, tuned = copy.deepcopy(small.model), copy.deepcopy(small.model)
    ki.refit(plain, model, [images], kept=small.kept, progress=False)
    monkeypatch.setattr(blocks, "BLOCK_LR", 50.0)
    report = ki.refit(tuned, model, [images], kept=small.kept, block_steps=5, progress=False)
    assert len(report.blocks) == 2
    assert [block.before for block in report.blocks] == [block.after for block in report.blocks]
    states = plain.state_dict(), tuned.state_dict()
    assert len(states[1]) > 20
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_hooks_are_removed_and_requires_grad_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(0), random_images()
    small = ki.prune(model, [images], macs=0.5, progress=False)
    flags = {name: index % 2 == 0 for index, (name, _) in enumerate(small.model.named_parameters())}
    for name, parameter in small.model.named_parameters():
        parameter.requires_grad_(flags[name])
    ki.refit(copy.deepcopy(small.model), model, [images], kept=small.kept, block_steps=2, progress=False)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    network = copy.deepcopy(small.model)
    with pytest.raises(KeyboardInterrupt):
        ki.refit(network, model, [images], kept=small.kept, block_steps=2, progress=False)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in [*network.modules(), *model.modules()]
    )
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags


def test_invalid_arguments_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(0), random_images(64)
    with pytest.raises(OptionError, match="block_steps needs the refit"):
        ki.prune(model, [images], refit=False, block_steps=3, progress=False)
    with pytest.raises(OptionError, match="block_steps must be"):
        ki.prune(model, [images], block_steps=-1, progress=False)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    with pytest.raises(OptionError, match="Sequential has no blocks"):
        ki.prune(plain, [images], block_steps=3, progress=False)
    # Ranking takes long and must not be reached
    monkeypatch.setattr("knowiso_train.pruning.api.rank_by_isomorphism", None)
    with pytest.raises(OptionError, match="Sequential has no blocks"):
        ki.prune(plain, [images], block_steps=3, progress=False)
    monkeypatch.undo()
    with pytest.raises(DataError, match="2 calibration images"):
        finetunable_blocks(model, model, ["blocks.0.conv1", "blocks.0.conv2"], Calibration([images[:1]]), steps=3)
    with pytest.raises(NonFiniteError):
        ki.prune(model, [images * float("nan")], block_steps=3, progress=False)


def test_an_update_of_a_block_takes_fewer_images_of_large_maps() -> None:
    assert _update_images(torch.empty(4, 3, 8, 8)) == 128
    assert _update_images(torch.empty(4, 3, 64, 64)) == 32
    assert _update_images(torch.empty(4, 3, 512, 512)) == 16
    assert _update_images(torch.empty(4, 2**12, 3)) == 32


def test_arguments_of_another_length_are_shared_by_all_images() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor, *, shift: Tensor) -> Tensor:
            return x * scale + shift

    x, scale, shift = torch.randn(6, 3), torch.randn(3), torch.tensor(2.0)
    target = x * scale + shift
    block = _RecordedBlock("block", Scaled(), [x, scale], {"shift": shift}, target, variance=1.0)
    assert torch.equal(block.forward(torch.tensor([4, 1])), target[[4, 1]])
    assert block.mean_distance(torch.arange(6), 4) == 0
