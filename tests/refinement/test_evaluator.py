"""Rows that a candidate evaluator collects, on features with a known answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from knowiso_train.errors import DataError, ShapeError
from knowiso_train.refinement._candidates import Candidate, original_classifier
from knowiso_train.refinement._evaluator import CandidateEvaluator, FeatureSets, explained_by_peers
from knowiso_train.refinement.models import classifier_model
from tests.helpers.refine_models import SignalNet, batches, images, with_best_classifier

X, Y = images(600)
VALIDATION, TEST = images(300, seed=2), images(400, seed=3)


def models() -> list:
    trained = with_best_classifier(SignalNet(1), X, Y, logit_scale=10)
    return [classifier_model(SignalNet(0), "network"), classifier_model(trained, "peer")]


def evaluator(labeled: bool = True, validation: bool = True) -> CandidateEvaluator:
    networks = models()
    sets = FeatureSets.extract(
        networks,
        batches(X),
        batches(X[:60], Y[:60]) if labeled else None,
        batches(*VALIDATION) if validation else None,
        batches(*TEST),
        None,
        False,
    )
    return CandidateEvaluator(networks, sets)


def good_candidate(name: str = "good") -> Candidate:
    trained = with_best_classifier(SignalNet(0), X, Y, logit_scale=10)
    return replace(original_classifier(classifier_model(trained, "trained")), name=name)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def test_the_first_row_scores_the_network_itself() -> None:
    row = evaluator().rows[0]
    with torch.no_grad():
        expected = [accuracy(SignalNet(0)(x), y) for x, y in (VALIDATION, TEST)]
    assert (row.name, row.role) == ("network", "before")
    assert [row.validation.accuracy, row.test.accuracy] == pytest.approx(expected)
    assert (row.validation.num_images, row.test.num_images) == (300, 400)


def test_candidates_have_rows_except_the_original() -> None:
    board = evaluator()
    board.add_candidates([original_classifier(board.models[0]), good_candidate()])
    assert [(row.name, row.role) for row in board.rows] == [("network", "before"), ("good", "candidate")]
    assert board.rows[1].test.accuracy > board.rows[0].test.accuracy + 10


def test_the_best_has_the_highest_validation_accuracy_and_of_equal_ones_is_the_first() -> None:
    board = evaluator()
    candidates = [original_classifier(board.models[0]), good_candidate("first"), good_candidate("second")]
    assert board.best(candidates).name == "first"
    assert board.best(candidates[::-1]).name == "second"
    assert board.validation_accuracy(candidates[1]) == board.validation_score(candidates[1]).accuracy


def test_without_validation_images_there_is_no_score() -> None:
    board = evaluator(validation=False)
    assert board.rows[0].validation is None
    assert board.validation_score(good_candidate()) is None
    assert board.validation_accuracy(good_candidate()) == -math.inf


def test_the_result_repeats_the_row_of_the_choice() -> None:
    board = evaluator()
    board.add_candidates([good_candidate()])
    board.add_result("good")
    result = board.rows[-1]
    assert (result.name, result.role, result.note) == ("network", "after", "good")
    assert result.test == board.rows[1].test
    board.add_result("original")
    assert board.rows[-1].test == board.rows[0].test


def test_a_network_with_other_features_is_run_on_the_images() -> None:
    board = evaluator()
    trained = with_best_classifier(SignalNet(2), X, Y, logit_scale=10)
    validation_accuracy = board.add_model("other", "candidate", trained, batches(*VALIDATION), None)
    with torch.no_grad():
        expected = accuracy(trained(VALIDATION[0]), VALIDATION[1])
    assert validation_accuracy == board.rows[-1].validation.accuracy == pytest.approx(expected)
    assert board.rows[-1].test is None
    assert board.add_model("unseen", "candidate", trained, None, batches(*TEST)) == -math.inf


def test_peers_keep_their_own_classifier_where_it_is_better() -> None:
    board = evaluator()
    board.add_peers([1])
    peer, ensemble = board.rows[-2:]
    with torch.no_grad():
        expected = accuracy(board.models[1].module(TEST[0]), TEST[1])
    assert (peer.name, peer.role, ensemble.role) == ("peer", "peer", "ensemble")
    assert peer.test.accuracy == pytest.approx(expected)
    assert ensemble.note == "2 networks at inference"


def test_peers_with_other_classes_need_labels_for_a_row() -> None:
    networks = [classifier_model(SignalNet(0), "network"), classifier_model(SignalNet(1, classes=5), "peer")]
    for labeled, roles in ((None, ["before"]), (batches(X[:60], Y[:60]), ["before", "peer", "ensemble"])):
        sets = FeatureSets.extract(networks, batches(X), labeled, None, batches(*TEST), None, False)
        board = CandidateEvaluator(networks, sets)
        board.add_peers([1])
        assert [row.role for row in board.rows] == roles


def test_labeled_images_are_taken_out_of_the_unlabeled_ones() -> None:
    sets = evaluator().images
    assert len(sets.unlabeled_only) == 540
    assert sets.counts() == {"unlabeled": 600, "labeled": 60, "validation": 300, "test": 400}
    assert evaluator(labeled=False).images.unlabeled_only is not None


def test_labeled_images_among_the_validation_images_are_noted() -> None:
    assert evaluator().images.overlap_notes() == evaluator(validation=False).images.overlap_notes() == []
    labeled = torch.cat([X[:60], VALIDATION[0][:7]]), torch.cat([Y[:60], VALIDATION[1][:7]])
    validation = batches(*VALIDATION, size=50)  # other batches, in which features differ by rounding
    sets = FeatureSets.extract(models(), batches(X), batches(*labeled), validation, None, None, False)
    assert [note[:27] for note in sets.overlap_notes()] == ["7 of 300 validation images "]


def test_images_without_labels_or_with_unknown_classes_raise() -> None:
    networks = models()
    with pytest.raises(DataError, match="validation"):
        FeatureSets.extract(networks, batches(X), None, batches(X[:20]), None, None, False)
    with pytest.raises(ShapeError, match="labels up to 9, but the network has 3 classes"):
        FeatureSets.extract(networks, batches(X), None, None, batches(X[:4], torch.full((4,), 9)), None, False)


def test_a_network_explains_itself_and_not_its_private_noise() -> None:
    pooled = evaluator().images.unlabeled
    assert explained_by_peers(pooled, [0], seed=0) > 0.9999
    signal, total = X[:, :3].var(0).sum(), SignalNet(0).features(X).var(0).sum()
    assert explained_by_peers(pooled, [1], seed=0) == pytest.approx(float(signal / total), abs=0.05)
