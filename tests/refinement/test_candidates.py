"""Closed-form candidates: which ones a method compares, and the classifiers of the peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.refinement._candidate_search import CandidateSearch, CandidateSet, closed_form_candidates
from knowiso_train.refinement._candidates import Candidate, heads_of_peers, original_classifier, replace_classifier
from knowiso_train.refinement._evaluator import FeatureSets
from knowiso_train.refinement.heads import HeadConfig, consensus_head, ridge_head
from knowiso_train.refinement.models import classifier_model
from tests.helpers.refine_models import SignalNet, batches, images, with_best_classifier

X, Y = images(1500)
VALIDATION = images(300, seed=2)
FEW = torch.cat([torch.nonzero(c == Y)[:4, 0] for c in range(3)])


def search(*peers: nn.Module, own: nn.Module | None = None, labeled: bool = True, **options: Any) -> CandidateSearch:
    models = [
        classifier_model(own or SignalNet(0), "own"),
        *(classifier_model(p, f"p{i}") for i, p in enumerate(peers, 1)),
    ]
    sets = FeatureSets.extract(
        models,
        batches(X),
        batches(X[FEW], Y[FEW]) if labeled else None,
        batches(*VALIDATION) if options.get("validation", True) else None,
        None,
        None,
        False,
    )
    useful = options.get("useful", list(range(1, len(models))))
    return CandidateSearch(models, useful, sets, "search", HeadConfig(), 0)


def titles(found: CandidateSet) -> list[str]:
    """First words of the candidates' names, without repetition."""
    return list(dict.fromkeys(candidate.name.split(", ")[0] for candidate in found.candidates))


def groups(found: CandidateSet) -> list[str]:
    """Peers of the consensus heads, without repetition."""
    names = (candidate.name.split(", ") for candidate in found.candidates)
    return list(dict.fromkeys(parts[1] for parts in names if parts[0] == "consensus head"))


def test_fold_has_one_candidate_and_without_useful_peers_the_original() -> None:
    found = closed_form_candidates("fold", search(SignalNet(1)))
    assert [candidate.name for candidate in found.candidates] == ["fold, p1, ridge search"]
    assert found.default is found.candidates[0]
    found = closed_form_candidates("fold", search(SignalNet(1), useful=[]))
    assert [candidate.name for candidate in found.candidates] == ["original"]


def test_head_compares_labels_and_one_consensus_and_not_the_original() -> None:
    found = closed_form_candidates("head", search(SignalNet(1), SignalNet(2)))
    assert titles(found) == ["labels only", "consensus head"]
    assert groups(found) == ["p1 + p2"]


def test_head_without_useful_peers_trains_itself() -> None:
    assert titles(closed_form_candidates("head", search(SignalNet(1), useful=[]))) == ["labels only", "self-training"]


def test_consensus_starts_from_the_original_or_from_the_best_head() -> None:
    found = closed_form_candidates("consensus", search(SignalNet(1)))
    assert titles(found) == ["original", "labels only", "consensus head"]
    without_labels = closed_form_candidates("consensus", search(SignalNet(1), labeled=False))
    assert titles(without_labels) == ["original"]
    trained = with_best_classifier(SignalNet(0), X, Y, logit_scale=10)
    assert (
        closed_form_candidates("consensus", search(SignalNet(1), own=trained, validation=False)).default.name
        == "original"
    )
    untrained = closed_form_candidates("consensus", search(SignalNet(1), validation=False)).default
    assert untrained.name.startswith("consensus head")


def test_auto_tries_every_group_of_peers() -> None:
    found = closed_form_candidates("auto", search(SignalNet(1), SignalNet(2)))
    assert titles(found) == ["original", "labels only", "self-training", "consensus head"]
    assert groups(found) == ["p1", "p2", "p1 + p2"]
    assert groups(closed_form_candidates("auto", search(SignalNet(1)))) == ["p1"]


def test_auto_folds_into_a_trained_classifier_or_without_labels() -> None:
    trained = with_best_classifier(SignalNet(0), X, Y, logit_scale=10)
    assert "fold" in titles(closed_form_candidates("auto", search(SignalNet(1), own=trained)))
    without_labels = closed_form_candidates("auto", search(SignalNet(1), labeled=False))
    names = [candidate.name for candidate in without_labels.candidates]
    assert names == ["original", *(f"fold, p1, ridge {ridge}" for ridge in ("search", 0.1, 1.0))]


def test_a_peer_gets_the_consensus_head_of_its_own_features() -> None:
    """The consensus of the same networks, with the peer in front."""
    inputs = search(SignalNet(1, classes=5), SignalNet(2, classes=5), validation=False)
    sets, config = inputs.images, HeadConfig(head_ridge=2.0)
    layers = heads_of_peers(inputs.models, sets.labeled, sets.unlabeled_only, [1, 2], config, None, False)
    assert list(layers) == [0, 1]
    for position, order in ((0, [1, 0, 2]), (1, [2, 0, 1])):
        features = sets.labeled.select(order), sets.unlabeled_only.select(order)
        head = consensus_head(features[0], sets.labeled.labels, features[1], 3, config)
        # Logits are ten times the scores where no temperature is fitted
        torch.testing.assert_close(layers[position].weight.double(), 10 * head.weight, rtol=1e-4, atol=1e-5)
        assert not layers[position].weight.requires_grad
        assert layers[position].weight.dtype == torch.float32


def test_a_peer_gets_the_head_of_the_labels_alone_on_request() -> None:
    inputs = search(SignalNet(1, classes=5), validation=False)
    sets, config = inputs.images, HeadConfig(label_ridge=0.7)
    layer = heads_of_peers(inputs.models, sets.labeled, sets.unlabeled_only, [1], config, None, True)[0]
    head = ridge_head(sets.labeled.features[1], sets.labeled.labels, 3, 0.7)
    torch.testing.assert_close(layer.weight.double(), 10 * head.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("validation", [True, False])
def test_a_peer_keeps_its_own_classifier_where_it_is_better(validation: bool) -> None:
    trained = with_best_classifier(SignalNet(1), X, Y, logit_scale=10)
    inputs = search(trained, validation=validation)
    sets = inputs.images
    # A ridge that leaves a new classifier near chance
    config = HeadConfig(label_ridge=1e6, head_ridge=1e6)
    layer = heads_of_peers(inputs.models, sets.labeled, sets.unlabeled_only, [1], config, sets.validation, True)[0]
    is_own = torch.equal(layer.weight, trained.fc.weight)
    new = ridge_head(sets.labeled.features[1], sets.labeled.labels, 3, 1e6)
    correct = (new(trained.features(VALIDATION[0])).argmax(1) == VALIDATION[1]).double().mean()
    own_correct = (trained(VALIDATION[0]).argmax(1) == VALIDATION[1]).double().mean()
    assert own_correct > correct
    assert is_own


def test_a_replaced_classifier_leaves_the_network_itself_alone() -> None:
    network = SignalNet(0).bfloat16()
    before = network.fc.weight.clone()
    candidate = Candidate("new", torch.ones(3, 12).double(), torch.ones(3).double())
    changed = replace_classifier(network, "fc", candidate)
    assert torch.equal(changed.fc.weight, torch.ones(3, 12).bfloat16())
    assert torch.equal(network.fc.weight, before)
    with pytest.raises(OptionError, match="expected a Linear"):
        replace_classifier(network, "trunk", candidate)
    network.fc.bias = None
    with pytest.raises(OptionError, match="has no bias"):
        replace_classifier(network, "fc", candidate)
    assert original_classifier(classifier_model(network, "own")).bias.count_nonzero() == 0
