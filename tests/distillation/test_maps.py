"""Maps on features with a known unexplained share, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.distillation._closed_form_map import MIN_SAMPLES_PER_FEATURE, ClosedFormMap
from knowiso_train.distillation._consensus_map import ConsensusMap
from knowiso_train.distillation._learned_map import LearnedMap
from knowiso_train.errors import (
    KnowisoWarning,
)
from knowiso_train.ops import channel_scale
from knowiso_train.regression import batch_moments


def stream(calls: int, seed: int = 0, images: int = 16, channels: int = 6, side: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, side, side, generator=generator) for _ in range(calls)]


def run(map_: ClosedFormMap, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(map_(x, y).detach()) for x, y in pairs]


class TestClosedFormMap:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_noise_of_a_quarter_of_the_variance_is_the_unexplained_share(self, seed: int, kernel_size: int) -> None:
        torch.manual_seed(seed)
        conv = nn.Conv2d(6, 5, kernel_size, padding=kernel_size // 2)
        xs, noises = stream(60, seed), stream(60, seed + 100, channels=5)
        with torch.no_grad():
            clean = [conv(x) for x in xs]
        energy = torch.cat(clean).var(dim=(0, 2, 3)).sum()
        scale = (energy / 5 / 3).sqrt()  # the noise is a quarter of the variance
        map_ = ClosedFormMap(6, 5, kernel_size, ridge=0.0)
        losses = run(map_, [(x, y + scale * e) for x, y, e in zip(xs, clean, noises, strict=True)])
        assert sum(losses[20:]) / 40 == pytest.approx(0.25, abs=0.02)

    def test_the_loss_of_independent_noise_is_near_one(self) -> None:
        map_ = ClosedFormMap(120, 8)
        # 128 rows, 120 channels
        xs, ys = stream(40, 1, images=8, channels=120), stream(40, 2, images=8, channels=8)
        losses = run(map_, list(zip(xs, ys, strict=True)))
        on = [loss for loss in losses if loss > 0]
        assert len(on) > 10
        assert 0.95 < sum(on) / len(on) < 1.2

    def test_the_loss_is_invariant_to_scale_and_one_for_collapsed_features(self) -> None:
        xs = stream(30)
        ys = [x[:, :4] + 0.5 * torch.relu(x[:, 1:5]) for x in xs]
        plain = run(ClosedFormMap(6, 4), list(zip(xs, ys, strict=True)))
        for factor in (1e-3, 1e3):
            scaled = run(ClosedFormMap(6, 4), [(factor * x, y) for x, y in zip(xs, ys, strict=True)])
            assert scaled == pytest.approx(plain, rel=1e-4)
        assert 0 < plain[-1] < 0.2
        collapsed = ClosedFormMap(6, 4, name="a → b")
        with pytest.warns(KnowisoWarning, match="a → b: the student's feature is constant"):
            flat = run(collapsed, [(torch.full_like(x, 0.3), y) for x, y in zip(xs, ys, strict=True)])
        assert flat[-1] == pytest.approx(1.0, abs=0.05)

    def test_the_map_excludes_the_current_batch(self) -> None:
        xs, ys = stream(13), stream(13, 9, channels=4)
        first, second = ClosedFormMap(6, 4, refresh=1), ClosedFormMap(6, 4, refresh=1)
        run(first, list(zip(xs[:12], ys[:12], strict=True)))
        run(second, list(zip(xs[:12], ys[:12], strict=True)))
        first(xs[12], ys[12])
        second(xs[12], 100 * ys[12])
        assert torch.equal(first.weight, second.weight)
        first.solve()
        second.solve()
        assert not torch.equal(first.weight, second.weight)

    def test_the_loss_is_zero_below_ten_samples_per_regressor(self) -> None:
        map_ = ClosedFormMap(50, 4, window=math.inf)
        losses = run(
            map_,
            list(
                zip(stream(20, images=1, channels=50, side=6), stream(20, 3, images=1, channels=4, side=6), strict=True)
            ),
        )
        rows = 36 * torch.arange(20)  # before each call
        assert [loss > 0 for loss in losses] == (rows >= MIN_SAMPLES_PER_FEATURE * 50).tolist()

    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_gradcheck(self, kernel_size: int) -> None:
        map_ = ClosedFormMap(3, 4, kernel_size).double().eval()
        map_.weight.normal_()
        map_.bias.normal_()
        map_.variance.fill_(2.0)
        map_.ready = True
        x, y = (
            torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(2, 4, 3, 4, dtype=torch.float64),
        )
        assert torch.autograd.gradcheck(lambda x: map_(x, y, update=False), x)
        analytic = -2 * F.conv_transpose2d(y - map_.predict(x), map_.weight, padding=kernel_size // 2) / 24 / 2.0
        (gradient,) = torch.autograd.grad(map_(x, y, update=False), x)
        torch.testing.assert_close(gradient, analytic)

    def test_the_gradient_at_the_optimum_equals_that_through_the_map(self) -> None:
        x, y = (
            torch.randn(9, 3, 4, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(9, 5, 4, 4, dtype=torch.float64),
        )
        moments = batch_moments(x, y)
        # No map in sight: the share itself
        through = 1 - (moments.xy * torch.linalg.solve(moments.xx, moments.xy)).sum() / moments.yy.sum()
        map_ = ClosedFormMap(3, 5, ridge=0.0).double()
        map_.moments.update(x, y)
        map_.solve()
        constant = map_.unexplained(x, y)
        torch.testing.assert_close(constant, through)
        torch.testing.assert_close(torch.autograd.grad(constant, x)[0], torch.autograd.grad(through, x)[0])

    def test_a_constant_target_has_loss_zero_and_warns(self) -> None:
        map_ = ClosedFormMap(6, 4, name="layer2 → layer3")
        with pytest.warns(KnowisoWarning, match="layer2 → layer3: the teacher's feature is constant"):
            losses = run(map_, [(x, torch.full((16, 4, 4, 4), 3.0)) for x in stream(5)])
        assert losses[-1] == 0

    def test_dead_channels_single_positions_and_half_precision_are_explained(self) -> None:
        for dtype, side in ((torch.float32, 1), (torch.bfloat16, 4), (torch.float16, 4)):
            xs = stream(30, images=64, side=side)
            ys = [(x[:, :4] * 2 + 1).to(dtype) for x in xs]
            for x in xs:
                x[:, 5] = 0.0
                x[:, 4] = x[:, 3]
            losses = run(ClosedFormMap(6, 4), [(x.to(dtype), y) for x, y in zip(xs, ys, strict=True)])
            assert losses[-1] < 1e-3


class TestLearnedMap:
    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_gradcheck_for_single_positions(self, order: int) -> None:
        map_ = LearnedMap(3, 4, order).double().eval()
        map_.mean.normal_()
        map_.spread.fill_(1.5)
        map_.ready = True
        x, y = (
            torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True),
            torch.randn(4, 4, 1, 1, dtype=torch.float64),
        )
        assert torch.autograd.gradcheck(lambda x, *parameters: map_(x, y, update=False), (x, *map_.parameters()))

    @pytest.mark.parametrize("order", [0, 2])
    @pytest.mark.parametrize("channels", [4, 3])
    def test_the_loss_equals_the_formula(self, order: int, channels: int) -> None:
        map_ = LearnedMap(channels, 4, order, 3, penalty=0.3)
        x, y = torch.randn(5, channels, 6, 6, requires_grad=True), 7 + 3 * torch.randn(5, 4, 6, 6)
        loss = map_(x, y)
        variance = y.var(dim=(0, 2, 3), correction=0).mean()
        g = y.mean((0, 2, 3)).view(-1, 1, 1) + variance.sqrt() * map_.maps(x)
        expected = (y - g).square().mean() / variance + 0.3 * map_.maps.gates.square().sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0], atol=1e-6, rtol=1e-4
        )

    def test_training_recovers_a_linear_map(self) -> None:
        xs = stream(150)
        xs = [x / channel_scale(x) for x in xs]
        plant = nn.Conv2d(6, 5, 1).requires_grad_(False)
        map_ = LearnedMap(6, 5, 0)
        optimizer = torch.optim.Adam(map_.parameters(), lr=0.02)
        losses = []
        for x in xs:
            loss = map_(x, plant(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] > 0.5
        assert losses[-1] < 0.02


class TestConsensusMap:
    def test_parts_without_peer_support_are_not_in_the_target(self) -> None:
        xs, own, shared = stream(80), stream(80, 5, channels=4), stream(80, 6, channels=4)
        # Half of it is known to the peer
        teachers = [torch.cat([a, b], 1) for a, b in zip(shared, own, strict=True)]
        # Knows exactly what the peer knows
        students = [torch.cat([x[:, :2], b], 1) for x, b in zip(xs, shared, strict=True)]
        moment, consensus = ClosedFormMap(6, 8), ConsensusMap(6, 8, 4)
        plain = run(moment, list(zip(students, teachers, strict=True)))
        taught = [float(consensus(x, y, peer)) for x, y, peer in zip(students, teachers, shared, strict=True)]
        assert sum(plain[40:]) / 40 == pytest.approx(0.5, abs=0.03)
        assert sum(taught[40:]) / 40 == pytest.approx(0.0, abs=0.03)

    def test_gradcheck(self) -> None:
        map_ = ConsensusMap(3, 4, 2).double().eval()
        for part in (map_.peers, map_.student):
            part.weight.normal_()
            part.variance.fill_(2.0)
            part.ready = True
        x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        y, peers = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: map_(x, y, peers, update=False), x)

    def test_peers_map_freezes_at_200_samples_per_regressor(self) -> None:
        consensus = ConsensusMap(6, 8, 4, refresh=1)
        for x, peer in zip(stream(60), stream(60, 6, channels=4), strict=True):
            samples = float(consensus.peers.moments.count)
            consensus(x, torch.cat([peer, peer], 1), peer)
            assert consensus.frozen == (samples >= 200 * 4)
        assert consensus.frozen
        before = consensus.peers.moments.count.clone()
        consensus(x, torch.cat([peer, peer], 1), peer)
        assert consensus.peers.moments.count == before
