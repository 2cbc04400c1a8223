"""Pruning between two steps of training: the next step equals that of the original with masked channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import knowiso_train as ki
from knowiso_train.errors import InputTypeError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import index_kept
from knowiso_train.pruning.optimizer_state import preserve_optimizer_state, transfer_optimizer_state
from tests.helpers.pruned_models import SIDE, network, prune

PRUNED = [1, 4]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda groups: AdamW(groups, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda groups: Adam(groups, lr=0.01, amsgrad=True, foreach=False),
}


class Net(nn.Module):
    """Convolution, norm, convolution; pruning corresponds to a mask of the channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.a(x)).relu()
        out: Tensor = self.b(hidden if mask is None else hidden * mask)
        return out


def step(model: nn.Module, optimizer: Optimizer, seed: int, *mask: Tensor) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8, generator=generator), *mask).square().mean().backward()
    optimizer.step()


def cut(model: nn.Module, channels: list[int] = PRUNED) -> None:
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    # torch-pruning traces gradients, and finds no layer without them
    model.requires_grad_(True)
    example = torch.randn(1, 3, 8, 8, dtype=model.a.weight.dtype)
    graph = tp.DependencyGraph().build_dependency(model, example)
    for parameter, needed in zip(model.parameters(), trainable, strict=True):
        parameter.requires_grad_(needed)
    graph.get_pruning_group(model.a, tp.prune_conv_out_channels, channels).prune()


def mask() -> Tensor:
    channels = torch.ones(6, 1, 1)
    channels[PRUNED] = 0
    return channels


def groups(model: Net) -> list[dict[str, Any]]:
    return [
        {"params": [*model.a.parameters(), *model.norm.parameters()]},
        {"params": list(model.b.parameters()), "weight_decay": 0.0, "lr": 0.03},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["in place", "copy", "names from before"])
def test_steps_after_pruning_equal_those_of_the_masked_original(name: str, mode: str) -> None:
    original = Net()
    optimizer = OPTIMIZERS[name](groups(original))
    for seed in range(3):
        step(original, optimizer, seed)
    pruned = copy.deepcopy(original)
    if mode == "in place":
        new = OPTIMIZERS[name](groups(pruned))
        new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with preserve_optimizer_state(pruned, new) as kept:
            cut(pruned)
    elif mode == "copy":
        with track_kept_indices(pruned) as kept:
            cut(pruned)
        pruned.train()
        new = transfer_optimizer_state(optimizer, original, pruned, kept)
    else:
        old = OPTIMIZERS[name](groups(pruned))
        old.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = dict(pruned.named_parameters())
        with track_kept_indices(pruned) as kept:
            cut(pruned)
        pruned.train()
        new = transfer_optimizer_state(old, before, pruned, kept)
    assert type(new) is type(optimizer)
    for seed in range(3, 6):
        step(original, optimizer, seed, mask())
        step(pruned, new, seed)
    for key, value in original.state_dict().items():
        if key != "norm.num_batches_tracked":
            torch.testing.assert_close(
                pruned.state_dict()[key], index_kept(value, kept[key]) if key in kept else value, rtol=1e-4, atol=1e-6
            )
    assert [group["lr"] for group in new.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert {id(parameter) for group in new.param_groups for parameter in group["params"]} == {
        id(parameter) for parameter in pruned.parameters()
    }


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "regnetx_002"])
def test_momenta_of_whole_models_are_cut_and_training_continues(name: str) -> None:
    model = network(name)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, SIDE, SIDE)).square().sum().backward()
    optimizer.step()
    momenta = {key: optimizer.state[value]["exp_avg"].clone() for key, value in model.named_parameters()}
    with preserve_optimizer_state(model, optimizer) as kept:
        prune(model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(mine is theirs for mine, theirs in zip(parameters, model.parameters(), strict=True))
    for key, value in model.named_parameters():
        momentum = optimizer.state[value]["exp_avg"]
        assert torch.equal(momentum, index_kept(momenta[key], kept[key]) if key in kept else momenta[key])
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    model(torch.randn(2, 3, SIDE, SIDE)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters())


class TestPreservedState:
    def test_frozen_layers_stay_frozen(self) -> None:
        model = Net()
        model.a.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
        step(model, optimizer, 0)
        with preserve_optimizer_state(model, optimizer):
            cut(model)
            assert model.a.weight.requires_grad
            assert not model.training
        assert model.training
        assert model.norm.training
        assert not model.a.weight.requires_grad
        assert len(optimizer.param_groups[0]["params"]) == 4
        before = copy.deepcopy(model.state_dict())
        step(model, optimizer, 1)
        assert torch.equal(before["a.weight"], model.a.weight)
        assert not torch.equal(before["b.weight"], model.b.weight)

    def test_frozen_parameters_of_the_optimizer_are_not_stepped(self) -> None:
        model = Net()
        model.a.requires_grad_(False)
        optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        with preserve_optimizer_state(model, optimizer):
            cut(model)
        before = model.a.weight.clone()
        step(model, optimizer, 0)
        assert torch.equal(before, model.a.weight)

    def test_schedulers_stay_valid(self) -> None:
        model = Net()
        optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        step(model, optimizer, 0)
        scheduler.step()
        original = copy.deepcopy(model)
        old = SGD(original.parameters(), lr=1.0)
        with preserve_optimizer_state(model, optimizer) as kept:
            cut(model)
        step(model, optimizer, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.param_groups[0]["initial_lr"] == 1.0
        follower = StepLR(old, 1, gamma=0.5)
        old.step()
        follower.step()
        new = transfer_optimizer_state(old, original, model, kept)
        follower.optimizer = new
        new.step()
        follower.step()
        assert (new.param_groups[0]["lr"], new.param_groups[0]["initial_lr"], old.param_groups[0]["lr"]) == (
            0.25,
            1.0,
            0.5,
        )
        before = copy.deepcopy(model.state_dict())
        step(model, new, 2)
        assert not torch.equal(before["a.weight"], model.a.weight)

    def test_state_survives_gradual_pruning(self) -> None:
        model = Net()
        optimizer = AdamW(model.parameters(), lr=0.01)
        step(model, optimizer, 0)
        for seed, width in enumerate((4, 2), start=1):
            with preserve_optimizer_state(model, optimizer):
                cut(model, [0, 1])
            assert model.a.out_channels == width
            step(model, optimizer, seed)
        assert optimizer.state[model.b.weight]["exp_avg"].shape == (4, 2, 3, 3)
        assert len(optimizer.state) == len(list(model.parameters()))

    def test_a_context_without_pruning_warns(self) -> None:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        step(model, optimizer, 0)
        momenta = [value["momentum_buffer"].clone() for value in optimizer.state.values()]
        with (
            pytest.warns(KnowisoWarning, match="call transfer_optimizer_state") as caught,
            preserve_optimizer_state(model, optimizer),
        ):
            cut(copy.deepcopy(model))
        assert caught[0].filename == __file__
        assert all(
            torch.equal(optimizer.state[key]["momentum_buffer"], momentum)
            for key, momentum in zip(model.parameters(), momenta, strict=True)
        )
        assert all(
            mine is theirs for mine, theirs in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
        )

    def test_parameters_of_a_loss_keep_their_state(self) -> None:
        model, weight = Net(), nn.Parameter(torch.ones(3))
        optimizer = Adam([{"params": model.parameters()}, {"params": [weight], "lr": 0.5}], lr=0.1)
        weight.grad = torch.ones(3)
        step(model, optimizer, 0)
        weight.grad = torch.ones(3)
        optimizer.step()
        state = copy.deepcopy(optimizer.state[weight])
        original, old = model, optimizer
        pruned = copy.deepcopy(model)
        with track_kept_indices(pruned) as kept:
            cut(pruned)
        new = transfer_optimizer_state(old, original, pruned, kept)
        assert new.param_groups[1]["params"][0] is weight
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(new.state[weight][key], value) for key, value in state.items())
        assert new.state[weight]["exp_avg"] is not old.state[weight]["exp_avg"]

    def test_the_old_optimizer_is_not_modified(self) -> None:
        model = Net()
        optimizer = Adam(model.parameters(), lr=0.1)
        step(model, optimizer, 0)
        before = copy.deepcopy(optimizer.state_dict())
        pruned = copy.deepcopy(model)
        with track_kept_indices(pruned) as kept:
            cut(pruned)
        new = transfer_optimizer_state(optimizer, model, pruned, kept)
        step(pruned, new, 1)
        after = optimizer.state_dict()
        assert before["param_groups"] == after["param_groups"]
        assert len(before["state"]) == 6
        assert all(
            torch.equal(value, after["state"][i][key])
            for i, entry in before["state"].items()
            for key, value in entry.items()
        )

    def test_added_biases_join_the_group_of_their_weight(self) -> None:
        original = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
        original[2].requires_grad_(False)
        pruned = copy.deepcopy(original)
        for layer in pruned:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
        optimizer = AdamW([("0.weight", original[0].weight)], lr=0.1)
        optimizer.add_param_group({"params": [("1.weight", original[1].weight)], "lr": 0.2})
        new = transfer_optimizer_state(optimizer, original, pruned, {})
        assert [group["param_names"] for group in new.param_groups] == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
        assert new.param_groups[1]["params"][1] is pruned[1].bias
        assert not pruned[2].bias.requires_grad
        pruned.scale = nn.Parameter(torch.ones(1))
        with pytest.warns(KnowisoWarning, match="scale beside no weight"):
            transfer_optimizer_state(optimizer, original, pruned, {})

    def test_removed_parameters_leave_their_group(self) -> None:
        original = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        pruned = copy.deepcopy(original)
        pruned[0].bias = None
        new = transfer_optimizer_state(SGD(original.parameters(), lr=0.1), original, pruned, {})
        assert len(new.param_groups[0]["params"]) == 3

    def test_accelerate_wrappers_and_replaced_data_are_supported(self) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = nn.Linear(3, 4)
        model, wrapped = accelerator.prepare(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
        model(torch.ones(1, 3)).sum().backward()
        wrapped.step()
        with preserve_optimizer_state(model, wrapped):
            model.weight.data = model.weight.data[[0, 2]]
            model.bias = nn.Parameter(model.bias.data[[0, 2]])
        assert wrapped.state[model.weight]["momentum_buffer"].shape == (2, 3)
        assert wrapped.param_groups[0]["params"][1] is model.bias
        with pytest.raises(InputTypeError, match="wraps another"):
            transfer_optimizer_state(wrapped, model, model, {})


class TestErrors:
    def test_an_original_that_was_pruned_raises(self) -> None:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        with track_kept_indices(model) as kept:
            cut(model)
        with pytest.raises(ShapeError, match=r"pass its named_parameters\(\) from before|do not fit"):
            transfer_optimizer_state(optimizer, model, model, kept)

    def test_the_optimizer_of_another_model_raises(self) -> None:
        model = Net()
        with (
            pytest.raises(OptionError, match="none of the 6 parameters of SGD"),
            preserve_optimizer_state(model, SGD(Net().parameters(), lr=0.1)),
        ):
            cut(model)

    def test_missing_kept_indices_raise(self) -> None:
        original, pruned = nn.Linear(3, 4), nn.Linear(3, 2)
        with pytest.raises(ShapeError, match=r"'weight' has shape \(4, 3\) in the original and \(2, 3\)"):
            transfer_optimizer_state(SGD(original.parameters(), lr=0.1), original, pruned, {})

    def test_a_state_that_cannot_be_cut_raises_before_any_change(self) -> None:
        model = Net()
        first, second = (
            SGD(model.norm.parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adafactor(model.parameters(), lr=0.1),
        )
        step(model, first, 0)
        step(model, second, 1)
        parameters = [*first.param_groups[0]["params"]]
        with pytest.raises(ShapeError, match="no value for each entry"), preserve_optimizer_state(model, first, second):
            cut(model)
        assert all(mine is theirs for mine, theirs in zip(parameters, first.param_groups[0]["params"], strict=True))

    def test_optimizers_with_parameters_outside_their_groups_raise(self) -> None:
        model = nn.Linear(3, 2)
        with pytest.raises(InputTypeError, match="LBFGS keeps parameters or an optimizer of its own in '_params'"):
            transfer_optimizer_state(torch.optim.LBFGS(model.parameters()), model, model, {})
        with (
            pytest.raises(InputTypeError, match=r"expected a torch.optim.Optimizer, got str"),
            preserve_optimizer_state(model, "sgd"),
        ):  # type: ignore[arg-type]
            pass


class WithoutBias(nn.Module):
    """Without norms between the layers, so that a refit adds a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(m, n, 3, padding=1, bias=False) for m, n in ((3, 16), (16, 8)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return out


def test_biases_that_a_refit_adds_within_the_context_join_the_optimizer() -> None:
    torch.manual_seed(0)
    model, images = WithoutBias(), torch.randn(64, 3, 8, 8)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    step(model, optimizer, 0)
    original = copy.deepcopy(model)
    importance = ki.IsomorphismImportance(model, [images], progress=False)
    pruner = tp.pruner.BasePruner(model, images[:1], importance, pruning_ratio=0.5, ignored_layers=[model.head])
    with preserve_optimizer_state(model, optimizer):
        pruner.step()
        ki.refit(model, original, [images], progress=False)
    assert isinstance(model.b.bias, nn.Parameter)
    before = model.b.bias.detach().clone()
    step(model, optimizer, 1)
    assert not torch.equal(model.b.bias, before)
