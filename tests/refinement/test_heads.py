"""Closed forms of refinement with a known answer: a signal shared by all networks, and private noise of each."""

from __future__ import annotations

import math

import pytest
import torch

from knowiso_train.errors import DataError, NonFiniteError, OptionError, ShapeError
from knowiso_train.refinement import HeadConfig, consensus_head, fit_peer_projection, ridge_head, score_peer
from knowiso_train.refinement._metrics import consensus_vs_labels_cv
from knowiso_train.refinement.heads import ConsensusFeatures, isomorphic_parts, pseudo_labels
from knowiso_train.regression.ridge import RidgeSolver
from tests.helpers.refine_models import SIGNAL, WIDTH, SignalNet, images

X, Y = images(3000, noise=1.0)
TEST, LABELS = images(2000, seed=1, noise=1.0)
NETS = [SignalNet(i) for i in range(3)]


def accuracy(scores: torch.Tensor, labels: torch.Tensor = LABELS) -> float:
    return 100 * float((scores.argmax(1) == labels).float().mean())


def test_the_projection_keeps_the_shared_signal_and_drops_private_noise() -> None:
    own, peer = (net.features(X) for net in NETS[:2])
    made = fit_peer_projection(own, [peer])
    signal, noise = NETS[0].mixing[:, :SIGNAL].double(), NETS[0].mixing[:, SIGNAL:].double()
    assert (noise.T @ made.matrix @ noise).norm() < 0.02 * (signal.T @ made.matrix @ signal).norm()
    assert (signal.T @ made.matrix @ signal).diagonal().min() > 0.5


def test_few_labels_on_projected_features_approach_the_optimum() -> None:
    """The optimum is the same classifier on the signal alone."""
    gained, optimum, raw = [], [], []
    own, peers, test = NETS[0].features(X), [net.features(X) for net in NETS[1:]], NETS[0].features(TEST)
    made = fit_peer_projection(own, peers)
    for seed in range(8):
        few = torch.cat([torch.nonzero(c == Y)[seed * 4 : seed * 4 + 4, 0] for c in range(3)])
        raw.append(accuracy(ridge_head(own[few], Y[few], 3, 1e-2)(test)))
        gained.append(accuracy(ridge_head(made(own[few]), Y[few], 3, 1e-2)(made(test))))
        optimum.append(accuracy(ridge_head(X[few, :SIGNAL, 0, 0], Y[few], 3, 1e-2)(TEST[:, :SIGNAL, 0, 0])))
    raw_mean, gained_mean, optimum_mean = (sum(v) / len(v) for v in (raw, gained, optimum))
    assert gained_mean - raw_mean > 0.8 * (optimum_mean - raw_mean) > 4


def test_a_peer_that_is_the_network_itself_changes_nothing() -> None:
    own = NETS[0].features(X)
    made = fit_peer_projection(own, [own])
    torch.testing.assert_close(made.matrix, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(made.shift, torch.zeros(WIDTH, dtype=torch.float64), rtol=0, atol=1e-4)
    found = score_peer(own, own, "itself")
    assert found.r2_of_model > 0.9999
    assert found.useful


def test_the_consensus_head_beats_self_training_and_labels_alone() -> None:
    train, test = [net.features(X) for net in NETS], NETS[0].features(TEST)
    gaps = []
    for seed in range(6):
        few = torch.cat([torch.nonzero(c == Y)[seed * 4 : seed * 4 + 4, 0] for c in range(3)])
        rest = torch.ones(len(X), dtype=torch.bool)
        rest[few] = False
        heads = [
            consensus_head([f[few] for f in nets], Y[few], [f[rest] for f in nets], 3) for nets in (train, train[:1])
        ]
        alone = max(accuracy(ridge_head(train[0][few], Y[few], 3, r)(test)) for r in (0.01, 0.1, 1.0))
        gaps.append([accuracy(head(test)) - alone for head in heads])
    with_peers, without = torch.tensor(gaps).mean(0).tolist()
    assert with_peers > 12
    assert with_peers > without + 2


def test_a_class_prior_balances_pseudo_labels_and_raises_accuracy() -> None:
    """Sixty classes in 24 directions: unbalanced pseudo-labels favor some of them more and more."""
    few = torch.arange(240)
    for seed in range(3):
        train, labels, x, y = many_classes(seed)
        alone = accuracy(ridge_head(train[0][few], labels[few], 60, 0.1)(x), y)
        heads = []
        for class_prior in (None, "uniform"):
            recipe = HeadConfig(class_prior=class_prior, inverse_temperature=math.inf)
            heads.append(consensus_head([f[few] for f in train], labels[few], [f[240:] for f in train], 60, recipe))
        left, brought = heads
        assert brought.targets.sum(0).std() < 0.5 * left.targets.sum(0).std()
        assert accuracy(left(x), y) < alone - 10
        assert accuracy(brought(x), y) > accuracy(left(x), y) + 20
        softly = consensus_head(
            [f[few] for f in train], labels[few], [f[240:] for f in train], 60, HeadConfig(class_prior="uniform")
        )
        assert accuracy(softly(x), y) > alone + 5


def many_classes(seed: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two networks' training features, labels, and the first network's test features and labels."""
    generator = torch.Generator().manual_seed(seed)
    center, labels = torch.randn(60, 24, generator=generator), torch.arange(6000) % 60
    signal = center[labels] + 1.2 * torch.randn(6000, 24, generator=generator)
    networks = [torch.cat([signal, torch.randn(6000, 24, generator=generator)], 1) for _ in range(2)]
    return [f[:4000] for f in networks], labels[:4000], networks[0][4000:], labels[4000:]


def test_cross_validation_detects_misleading_pseudo_labels() -> None:
    index, recipe = torch.arange(240), HeadConfig(inverse_temperature=math.inf)
    for seed in range(3):
        train, labels, _, _ = many_classes(seed)
        found = consensus_vs_labels_cv(
            ConsensusFeatures.from_views(train), train[0][index], index, labels[index], 60, recipe
        )
        assert found.significantly_worse
        assert found.gain + found.std_error < -10
    own = [net.features(X) for net in NETS]
    few = torch.cat([torch.nonzero(c == Y)[:5, 0] for c in range(3)])
    assert not consensus_vs_labels_cv(
        ConsensusFeatures.from_views(own), own[0][few], few, Y[few], 3, HeadConfig()
    ).significantly_worse
    # Too few to say
    assert not consensus_vs_labels_cv(
        ConsensusFeatures.from_views(own), own[0][few[:6]], few[:6], Y[few[:6]], 3, HeadConfig()
    ).significantly_worse


def test_pseudo_labels_reach_a_given_class_prior() -> None:
    scores = torch.randn(3000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.tensor(
        [0.6, 0.1, 0.0, -0.1]
    )
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = pseudo_labels(scores, 12.0, 5 * wanted)
    torch.testing.assert_close(found.mean(0), wanted, atol=1e-3, rtol=0)
    ratio = found / (12 * scores).softmax(1)  # by nothing but a factor for each class
    torch.testing.assert_close(ratio / ratio[:, :1], (ratio / ratio[:, :1])[:1].expand_as(ratio))


@pytest.mark.parametrize("kind", ["noise", "blind", "shuffled"])
def test_a_peer_without_shared_signal_is_not_useful(kind: str) -> None:
    own = NETS[0].features(X)
    peer = {
        "noise": torch.randn(len(X), 40),
        "blind": SignalNet(1, has_signal=False).features(X),
        "shuffled": NETS[1].features(X).flip(0),
    }[kind]
    found = score_peer(own, peer, kind)
    assert not found.useful
    assert abs(found.r2_of_model) < 0.05
    assert "left out" in found.reason


def test_r2_of_the_model_is_the_known_share_of_the_signal() -> None:
    """The peer predicts the signal exactly, and nothing of the private noise."""
    own, peer = NETS[0].features(X), NETS[1].features(X)
    of_signal, total = X[:, :SIGNAL].var(0).sum(), own.var(0).sum()
    assert score_peer(own, peer).r2_of_model == pytest.approx(float(of_signal / total), abs=0.03)


def test_the_isomorphic_part_has_the_gram_matrix_of_the_regression() -> None:
    views = [net.features(X).double() for net in NETS[:2]]
    views = [view - view.mean(0) for view in views]
    part = isomorphic_parts(views, 1e-9)[0]
    told = torch.linalg.lstsq(views[0], views[1]).solution
    wanted, got = told @ told.T, part @ part.T
    torch.testing.assert_close(got / got.trace(), wanted / wanted.trace(), rtol=1e-4, atol=1e-6)


def test_the_solver_is_ridge_regression_in_primal_and_dual_form() -> None:
    torch.manual_seed(0)
    for n, d in ((30, 5), (5, 30)):
        x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
        smoother = RidgeSolver(x)
        weight, bias = smoother.solve(y, 0.5)
        centered, rho = x - x.mean(0), 0.5 * (x - x.mean(0)).square().sum() / min(n, d)
        wanted = torch.linalg.solve(
            centered.T @ centered + rho * torch.eye(d, dtype=torch.float64), centered.T @ (y - y.mean(0))
        )
        torch.testing.assert_close(weight, wanted)
        torch.testing.assert_close(x @ weight + bias, smoother.predict(y, 0.5))


def test_all_images_labeled_is_a_ridge_classifier() -> None:
    train = [net.features(X)[:200] for net in NETS]
    head = consensus_head(train, Y[:200], [f[:0] for f in train], 3, HeadConfig(head_ridge=0.5))
    wanted = ridge_head(train[0], Y[:200], 3, 0.5)
    torch.testing.assert_close(head.weight, wanted.weight)


def test_invalid_features_labels_and_options_raise() -> None:
    with pytest.raises(DataError, match="too few"):
        score_peer(torch.randn(30, 2), torch.randn(30, 2))
    with pytest.raises(ShapeError, match="labels must lie"):
        ridge_head(torch.randn(3, 2), torch.tensor([0, 1, 2]), 2)
    with pytest.raises(ShapeError, match="one integer label"):
        consensus_head([torch.randn(3, 2)], torch.tensor([0, 1]), [torch.randn(3, 2)], 2)
    bad = torch.full((4, 2), float("nan"))
    with pytest.raises(NonFiniteError, match="network 1"):
        consensus_head([torch.randn(4, 2), bad], torch.tensor([0, 1, 0, 1]), [torch.randn(9, 2), torch.randn(9, 2)], 2)
    with pytest.raises(OptionError, match="num_rounds"):
        HeadConfig(num_rounds=0)
    for wrong in ("many", (), (0.5, -0.5)):
        with pytest.raises(OptionError, match="class_prior"):
            HeadConfig(class_prior=wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="class_prior of 2 classes, got 3"):
        consensus_head(
            [torch.randn(4, 2)], torch.tensor([0, 1, 0, 1]), [torch.randn(9, 2)], 2, HeadConfig(class_prior=(1, 1, 2))
        )
    with pytest.raises(OptionError, match="ridge must be"):
        fit_peer_projection(torch.randn(30, 2), [torch.randn(30, 2)], ridge=-1.0)
    with pytest.raises(ShapeError, match="peers on the same"):
        fit_peer_projection(torch.randn(30, 2), [])
