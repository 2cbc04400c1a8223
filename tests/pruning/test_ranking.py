"""Candidate widths and the selection among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import knowiso_train as ki
from knowiso_train.pruning import _builder as builder
from knowiso_train.pruning._ranking import ChannelRanking
from knowiso_train.pruning.allocation import LayerCost, total_cost
from knowiso_train.pruning.calibration import Calibration


class TestCandidates:
    @staticmethod
    def network() -> nn.Sequential:
        """Every channel of the first layer is there twice; those of the second are all different."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
        with torch.no_grad():
            for value in (model[0].weight, model[0].bias):
                value[8:] = value[:8]
        return model

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_the_nearer_network_is_taken(self, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        offered = [{"0": 8, "2": 16, "4": 8}, {"0": 16, "2": 8, "4": 8}]
        monkeypatch.setattr(ChannelRanking, "candidates", lambda self, *args: [offered[i] for i in order])
        pruned = ki.prune(self.network(), [torch.randn(96, 3, 10, 10)], macs=0.9, progress=False)
        assert {width.name: width.after for width in pruned.report.widths} == offered[0]

    @pytest.mark.parametrize(("work", "images"), [(1e12, 256), (1.0, 64)])
    def test_large_networks_are_tried_on_fewer_images(
        self, work: float, images: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The target of a trial is what the original gives for its images; a third of them more judge."""
        seen: list[int] = []
        real = builder.record_reference_outputs

        def spied(model: nn.Module, epilogues: Any, of: Calibration, *rest: Any, **options: Any) -> Any:
            seen.append(of.count)
            return real(model, epilogues, of, *rest, **options)

        monkeypatch.setattr(builder, "record_reference_outputs", spied)
        monkeypatch.setattr(builder, "MAX_TRIAL_MACS", work)
        monkeypatch.setattr(
            ChannelRanking, "candidates", lambda self, *args: [{"0": 8, "2": 16, "4": 8}, {"0": 16, "2": 8, "4": 8}]
        )
        pruned = ki.prune(self.network(), [torch.randn(400, 3, 10, 10)], macs=0.9, progress=False)
        assert seen == [images]  # that of the refit is made while widths are chosen
        assert pruned.report.widths[0].after == 8

    def test_all_fit_the_budget_and_differ(self) -> None:
        costs = {"a": LayerCost(1.0, 1, 8, {}, {"a": 1.0}), "b": LayerCost(1.0, 1, 8, {}, {"b": 1.0})}
        harms = {name: torch.arange(8.0, -1, -1).double() ** 2 for name in costs}
        choice = ChannelRanking(
            {name: list(range(8)) for name in costs}, harms, {"a": 1.0, "b": 4.0}, {"a": "channels", "b": "channels"}
        )
        found = choice.candidates(costs, 0.5, 0.125, 1)
        assert len(found) == len({tuple(widths.items()) for widths in found}) > 1
        for widths in found:
            assert total_cost(costs, {name: 8 - width for name, width in widths.items()}) <= 0.5 * total_cost(costs, {})
            assert widths["b"] > widths["a"]
        spread = [widths["b"] - widths["a"] for widths in found]
        assert spread == sorted(spread)  # the fuller the sensitivity counts, the further they are apart
