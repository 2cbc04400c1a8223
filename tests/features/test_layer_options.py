"""Options by layer name or glob, and options without effect, in the functions that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import IsomorphismCallback, IsomorphismLoss, diagnose, measure, stability
from knowiso_train.errors import LayerNameError, LayoutError, OptionError
from knowiso_train.features import Extractor

# Tokens (N, T, C) and (N, C, T) of equal sizes, whose shape does not determine the layout
TOKENS = 6
OPTIONS: dict[str, Any] = {"order": 0, "progress": False}


class Network(nn.Module):
    """Linear layer with a name of its own, over sequences."""

    def __init__(self, seed: int, name: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleDict({name: nn.Linear(TOKENS, TOKENS)})

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.blocks.values()
        return layer(x)  # type: ignore[no-any-return]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(200, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))


def unexplained(images: Tensor, layout: Any) -> float:
    report = measure(Network(1, "a"), Network(2, "b"), [images], [("blocks.a", "blocks.b")], layout=layout, **OPTIONS)
    return float(report.pairs[0].unexplained)


def test_layouts_are_given_by_name_or_glob(images: Tensor) -> None:
    expected = unexplained(images, "nlc:line")
    assert expected < 1e-6  # one linear map of each token's channels
    for layout in ({"blocks.a": "nlc:line", "blocks.b": "nlc:line"}, {"blocks.*": "nlc:line"}):
        assert unexplained(images, layout) == expected
    # Later entries replace earlier ones; over positions the map is not linear
    assert unexplained(images, {"blocks.*": "nlc:line", "blocks.b": "ncl:line"}) > 0.5
    with pytest.raises(LayerNameError, match=r"layout= names 'blocks.c', which is none of the layers; these are"):
        unexplained(images, {"blocks.*": "nlc:line", "blocks.c": "nlc:line"})


def test_an_extractor_uses_the_entries_of_its_layers(images: Tensor) -> None:
    network = Network(1, "a")
    for layout in ({"blocks.*": "nlc:line", "of another network": "nc"}, {"blocks.a": "nlc:line"}):
        with Extractor(network, "blocks.a", layout=layout) as extractor:
            assert extractor.run(images[:3])["blocks.a"].shape == (3, TOKENS, 1, TOKENS)


def test_diagnose_takes_options_for_the_layers_of_any_network(images: Tensor) -> None:
    networks = Network(1, "a"), [Network(2, "b"), Network(3, "b")]

    def run(layout: dict[str, str], at: dict[str, str]) -> Any:
        pair = [("blocks.a", "blocks.b")]
        return diagnose(*networks, [images], pair, layout=layout, at=at, functional=False, progress=False)

    result = run({f"blocks.{name}": "nlc:line" for name in "ab"}, {"blocks.a": "output"})
    assert all(layer.pair.unexplained < 1e-6 for layer in result)
    with pytest.raises(LayerNameError, match=r"layout= names 'blocks.d'"):
        run({"blocks.d": "nlc:line"}, {})
    with pytest.raises(LayerNameError, match=r"at= names 'blocks.d'"):
        run({"blocks.*": "nlc:line"}, {"blocks.d": "input"})


def test_the_loss_and_its_monitor_take_layouts_by_glob(images: Tensor) -> None:
    student, teacher, peer = Network(1, "a"), Network(2, "b"), Network(3, "p")
    pair = [("blocks.a", "blocks.b")]
    iso = IsomorphismLoss(student, teacher, pair, layout={"blocks.*": "nlc:line"}, example=images[:2], weight=1.0)
    with iso:
        for _ in range(6):
            loss = student(images).square().mean() + iso()
    loss.backward()  # type: ignore[no-untyped-call]
    monitor = IsomorphismCallback.of(iso, [images])
    assert monitor.measure().pairs[0].unexplained < 1e-6
    consensus: dict[str, Any] = {
        "target": "consensus",
        "peers": [peer],
        "peer_layers": {"blocks.b": "blocks.p"},
        "example": images[:2],
    }
    names = dict.fromkeys(("blocks.a", "blocks.b", "blocks.p"), "nlc:line")
    IsomorphismLoss(student, teacher, pair, layout=names, **consensus)
    with pytest.raises(LayerNameError, match=r"layout= names 'blocks.q'"):
        IsomorphismLoss(student, teacher, pair, layout={**names, "blocks.q": "nlc:line"}, **consensus)


def test_layouts_may_name_candidates_that_auto_does_not_select() -> None:
    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())

    images = torch.randn(200, 3, 16, 16)
    student, teacher = network(1), network(2)
    teacher[0].load_state_dict(student[0].state_dict())  # nothing is unexplained there
    layout = {"1": "nchw", "3": "nchw"}
    iso = IsomorphismLoss(student, teacher, "auto", loader=[images], layout=layout)
    assert [pair.source for pair in iso.pairs] == ["3"]
    assert IsomorphismCallback.of(iso, [images]).measure().pairs[0].unexplained > 0
    with pytest.raises(LayerNameError, match=r"layout= names '5'"):
        IsomorphismLoss(student, teacher, "auto", loader=[images], layout={"5": "nchw"})


@pytest.mark.parametrize("option", [{"labels": "label"}, {"labels": len}, {"output": len}], ids=str)
def test_options_of_functional_shares_without_them_raise(images: Tensor, option: dict[str, Any]) -> None:
    networks = Network(1, "a"), Network(2, "a")
    (name,) = option
    with pytest.raises(OptionError, match=f"{name}= has an effect only with functional=True"):
        measure(*networks, [images], "blocks.a", **option, **OPTIONS)
    with pytest.raises(OptionError, match=f"{name}= has an effect only with functional=True"):
        stability(networks, [images], "blocks.a", functional=False, **option)
    measure(*networks, [images], "blocks.a", labels=None, layout="nlc:line", **OPTIONS)


def test_equal_names_raise(images: Tensor) -> None:
    networks = Network(1, "a"), Network(2, "a")
    with pytest.raises(OptionError, match=r"names= must be different for source and target, got \('x', 'x'\)"):
        measure(*networks, [images], "blocks.a", names=("x", "x"), **OPTIONS)


def test_layouts_that_do_not_fit_raise(images: Tensor) -> None:
    with pytest.raises(LayoutError, match="needs 4 axes"):
        unexplained(images, {"blocks.*": "nchw"})
