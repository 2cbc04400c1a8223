"""Fine-tuning of a refinement: what is trained, and continuation of an interrupted run to the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.refinement import BatchCycle, RefineFinetuneConfig, RefineTrainer
from knowiso_train.refinement.finetune import finetune_classifier, set_training_mode
from knowiso_train.refinement.models import ClassifierModel, classifier_model
from tests.helpers.refine_models import SignalNet, batches, images

X, Y = images(64)
STEPS, SAVED_AT = 7, 4


class Interrupted(Exception):
    """Stands for a killed process."""


class DropoutSignalNet(SignalNet):
    """An `SignalNet` with dropout, so that a step depends on torch's random state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def shuffling_loader(*tensors: torch.Tensor, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


def model_and_peer() -> tuple[ClassifierModel, list[ClassifierModel]]:
    return classifier_model(DropoutSignalNet(0), "network"), [classifier_model(SignalNet(1), "peer")]


@pytest.mark.parametrize("consensus_weight", [1.0, 0.0], ids=["consensus", "labels"])
def test_an_interrupted_run_continues_to_the_same_bits(consensus_weight: float) -> None:
    model, peers = model_and_peer()
    config = RefineFinetuneConfig(
        steps=STEPS, lr=0.05, consensus_weight=consensus_weight, kd_weight=consensus_weight, seed=3
    )
    # Passes of 3 and of 2 batches: the state lies in the middle of a pass of the first loader
    loaders = shuffling_loader(X, batch_size=24), shuffling_loader(X[:20], Y[:20], batch_size=10)
    states: list[dict[str, Any]] = []

    def interrupt(state: dict[str, Any]) -> None:
        states.append(copy.deepcopy(state))
        raise Interrupted

    complete = finetune_classifier(model.module, model, peers, *loaders, config)
    with pytest.raises(Interrupted):
        finetune_classifier(model.module, model, peers, *loaders, config, save_state=interrupt, save_every=SAVED_AT)
    assert states[0]["trainer"]["num_steps"] == SAVED_AT
    torch.manual_seed(99)
    resumed = finetune_classifier(model.module, model, peers, *loaders, config, state=states[0])
    weights = complete.state_dict()
    assert not torch.equal(weights["trunk.weight"], model.module.state_dict()["trunk.weight"])
    assert all(torch.equal(value, weights[name]) for name, value in resumed.state_dict().items())
    # The state matters: without it the remaining steps lead elsewhere
    fresh = finetune_classifier(model.module, model, peers, *loaders, RefineFinetuneConfig(steps=STEPS, seed=4))
    assert not torch.equal(fresh.trunk.weight, complete.trunk.weight)  # type: ignore[union-attr]


def test_a_cycle_continues_a_shuffled_pass() -> None:
    loader = shuffling_loader(torch.arange(10), batch_size=2)
    cycle = BatchCycle(loader, "images")
    first = [next(cycle)[0].tolist() for _ in range(7)]
    state, random_state = cycle.state_dict(), torch.get_rng_state()
    expected = [next(cycle)[0].tolist() for _ in range(6)]
    torch.manual_seed(5)
    other = BatchCycle(loader, "images")
    other.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert [next(other)[0].tolist() for _ in range(6)] == expected
    assert sorted(index for batch in first[:5] for index in batch) == list(range(10))
    assert first[:5] != first[5:]


def test_a_cycle_without_batches_raises() -> None:
    with pytest.raises(DataError, match="loader of images gave no images"):
        next(BatchCycle([], "images"))
    once = BatchCycle(iter([1]), "images")
    assert next(once) == 1
    with pytest.raises(DataError, match="readable more than once"):
        next(once)


def test_a_step_decreases_the_cross_entropy_and_counts() -> None:
    student = SignalNet(0)
    config = RefineFinetuneConfig(steps=30, lr=0.1, consensus_weight=0.0, kd_weight=0.0)
    model = classifier_model(student, "network")
    with RefineTrainer(student, copy.deepcopy(student), model, [], config) as trainer:
        losses = [trainer.step(None, (X, Y)) for _ in range(30)]
    assert trainer.num_steps == 30
    assert all(set(terms) == {"cross_entropy"} for terms in losses)
    assert losses[-1]["cross_entropy"] < 0.8 * losses[0]["cross_entropy"]


def test_the_terms_of_a_step_are_weighted() -> None:
    terms = []
    for weights in ({}, {"consensus_weight": 2.0, "kd_weight": 3.0}):
        model, peers = model_and_peer()
        student, teacher = SignalNet(0), SignalNet(0).eval()
        config = RefineFinetuneConfig(**weights)
        with RefineTrainer(student, teacher, model, peers, config, X) as trainer:
            terms.append(trainer.step(X, None))
        assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules())
    assert set(terms[0]) == {"consensus", "soft_targets"}
    torch.testing.assert_close(terms[1]["consensus"], 2 * terms[0]["consensus"])
    torch.testing.assert_close(terms[1]["soft_targets"], 3 * terms[0]["soft_targets"])


def test_a_trainer_without_peers_or_without_labels_raises() -> None:
    model, _ = model_and_peer()
    student = SignalNet(0)
    with pytest.raises(OptionError, match="no useful peer is left"):
        RefineTrainer(student, SignalNet(0), model, [], RefineFinetuneConfig(), X)
    labels_alone = RefineFinetuneConfig(consensus_weight=0.0, kd_weight=0.0)
    with RefineTrainer(student, SignalNet(0), model, [], labels_alone) as trainer:
        with pytest.raises(OptionError, match="nothing to train on"):
            trainer.step(X, None)
        with pytest.raises(NonFiniteError, match="at step 0"):
            trainer.step(None, (X * float("nan"), Y))


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_statistics_are_frozen_on_request(freeze: bool) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    set_training_mode(module, freeze)
    module(torch.randn(8, 3) + 5)
    assert torch.equal(module[0].running_mean, torch.zeros(3)) is freeze
    assert module[1].training


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": -1}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"targets": "own"}, "targets"),
        ({"kd_weight": -1.0}, "kd_weight"),
    ],
)
def test_options_out_of_bounds_raise(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match=f"RefineFinetuneConfig: {name} must be"):
        RefineFinetuneConfig(**options)


@pytest.mark.parametrize("frozen", ["trunk", "fc"])
def test_frozen_layers_stay_frozen_and_the_classifier_is_trained(frozen: str) -> None:
    start = SignalNet(0)
    start.get_submodule(frozen).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in start.named_parameters()}
    config = RefineFinetuneConfig(steps=2, lr=0.1, consensus_weight=0.0, kd_weight=0.0)
    tuned = finetune_classifier(start, classifier_model(start, "own"), [], batches(X), batches(X, Y), config)
    assert {name: parameter.requires_grad for name, parameter in tuned.named_parameters()} == flags
    before = start.state_dict()
    changed = [name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == (["fc.weight", "fc.bias"] if frozen == "trunk" else list(flags))


def test_the_start_is_not_modified() -> None:
    model, peers = model_and_peer()
    before = copy.deepcopy(model.module.state_dict())
    config = RefineFinetuneConfig(steps=2, lr=0.1)
    finetune_classifier(model.module, model, peers, batches(X), batches(X, Y), config)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
