"""Paper's solver: its exact split against a term-by-term evaluation of the recursion, and its training."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines.paper import PublishedDisentangler, train_epochs
from knowiso_train.disentangle import Disentangler
from knowiso_train.disentangle.config import DisentangleConfig, PaperConfig, solve_bar
from knowiso_train.disentangle.disentangler import make_fitter
from knowiso_train.disentangle.paper import PaperMaps, fit_paper
from knowiso_train.errors import FormatError, OptionError, ShapeError
from knowiso_train.measurement import measure
from knowiso_train.ops import channel_scale, gate
from knowiso_train.ops.reference import gate_factor
from knowiso_train.regression import Sample


def term_by_term(maps: PaperMaps, x: torch.Tensor) -> list[torch.Tensor]:
    """Evaluate x^(j) = V_K D_K ⋯ V_{K-j+1} D_{K-j+1} (U_{K-j} x + b_{K-j}) one term at a time.

    The gates D are recorded from one plain forward pass.
    """
    pad, order = maps.kernel_size // 2, maps.order

    def scale(h: torch.Tensor) -> torch.Tensor:
        if h[0, 0].numel() == 1:
            return torch.ones_like(h)
        flat = h.flatten(2)
        variance = ((flat - flat.mean(2, keepdim=True)) ** 2).sum(2) / (flat.shape[2] - 1)
        return (variance.sqrt() + 1e-5)[:, :, None, None]

    u = [(c.weight, c.bias) for c in maps.of_source]
    v = [c.weight for c in (maps.of_source if maps.tied else maps.of_gated)]
    v = v if not maps.tied else v[1:]
    p = 1 / (1 + torch.exp(-maps.q))
    x = x / scale(x)
    h, gates = F.conv2d(x, *u[0], padding=pad), []
    for k in range(1, order + 1):
        gates.append((h > 0).to(h.dtype) * p[k - 1] / scale(h))
        h = F.conv2d(x, *u[k], padding=pad) + F.conv2d(gates[-1] * h, v[k - 1], padding=pad)
    terms = []
    for j in range(order + 1):
        term = F.conv2d(x, *u[order - j], padding=pad)
        for k in range(order - j + 1, order + 1):
            term = F.conv2d(gates[k - 1] * term, v[k - 1], padding=pad)
        terms.append(term)
    return terms


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("grid", [(7, 6), (1, 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_split_equals_the_published_recursion_term_by_term(
    order: int, kernel_size: int, grid: tuple[int, int], tied: bool
) -> None:
    maps = PaperMaps(6, 6, order, kernel_size, tied=tied)
    with torch.no_grad():
        maps.q.uniform_(-2, 2)
    x = torch.randn(3, 6, *grid)
    parts = maps.components(x)
    for ours, expected in zip(parts, term_by_term(maps, x), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(parts).sum(0), maps(x), atol=1e-5, rtol=1e-5)


def test_split_takes_one_pass() -> None:
    maps, calls = PaperMaps(4, 4, order=3), []
    for conv in maps.of_source:
        conv.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    maps.components(torch.randn(2, 4, 5, 5))
    assert sum(calls) == 2 * (3 + 1) * (3 + 2) // 2


def test_network_equals_the_published_one() -> None:
    rival, ours = PublishedDisentangler(5, order=2), PaperMaps(5, 5, order=2)
    for mine, theirs in zip(ours.of_source, rival.maps, strict=True):
        mine.weight.data.copy_(theirs.weight.data)
    x = torch.randn(4, 5, 6, 6)
    torch.testing.assert_close(ours(x), rival(x), atol=1e-6, rtol=1e-5)


def test_training_gives_the_weights_of_the_published_training() -> None:
    rival, ours = PublishedDisentangler(4, order=2), PaperMaps(4, 4, order=2)
    for mine, theirs in zip(ours.of_source, rival.maps, strict=True):
        mine.weight.data.copy_(theirs.weight.data)
    x, y = torch.randn(40, 4, 5, 5), torch.randn(40, 4, 5, 5)
    for _ in train_epochs(rival, x, y, epochs=6, batch_size=16, seed=3):
        pass
    fit_paper(ours, Sample(x, y, None, 0), PaperConfig(epochs=6, batch_size=16), seed=3)
    torch.testing.assert_close(ours.q, rival.q, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(ours.of_source, rival.maps, strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, atol=1e-5, rtol=1e-4)


def test_training_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    sample = Sample(torch.randn(20, 3, 4, 4), torch.randn(20, 3, 4, 4), None, 0)

    class Stop(Exception):
        pass

    def trained(checkpoint: str | None, stop_at: int | None = None) -> PaperMaps:
        torch.manual_seed(1)
        maps = PaperMaps(3, 3, order=1)
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1
            if stop_at is not None and seen > stop_at:
                raise Stop

        maps.of_source[0].register_forward_pre_hook(count)
        recipe = PaperConfig(epochs=60, batch_size=20, checkpoint=checkpoint)
        try:
            return fit_paper(maps, sample, recipe, seed=5)
        except Stop:
            return maps

    whole = trained(None)
    path = str(tmp_path / "paper.pt")
    trained(path, stop_at=55)
    torch.testing.assert_close(trained(path).of_source[0].weight, whole.of_source[0].weight, atol=0, rtol=0)
    with pytest.raises(FormatError, match=r"another fit .epochs 60 instead of 70"):
        fit_paper(PaperMaps(3, 3, order=1), sample, PaperConfig(epochs=70, batch_size=20, checkpoint=path), seed=5)


def checkpointed(path: Path, sample: Sample, **options: Any) -> PaperMaps:
    """Return maps trained with a checkpoint."""
    torch.manual_seed(1)
    defaults = {"label": "a → b (forward)", "seed": 5, "order": 1, "kernel_size": 3, "epochs": 3} | options
    maps = PaperMaps(sample.x.shape[1], sample.y.shape[1], defaults["order"], defaults["kernel_size"])
    config = PaperConfig(epochs=defaults["epochs"], batch_size=20, checkpoint=str(path))
    return fit_paper(maps, sample, config, seed=defaults["seed"], label=defaults["label"])


def paired(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(*(torch.randn(20, 3, 4, 4, generator=generator) for _ in range(2)), None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "a → c (forward)"}, "another fit .fit 'a → b"),
        ({"label": "b → a (backward)"}, "another fit .fit"),
        ({"label": "a → b (forward) (shuffled)"}, "another fit .fit"),
        ({"seed": 6}, "another fit .seed 5 instead of 6"),
        ({"epochs": 4}, "another fit .epochs 3 instead of 4"),
        ({"order": 2}, "another fit"),
        ({"kernel_size": 1}, "another fit"),
        ({"sample": paired(1)}, "other features"),
        ({"sample": paired().with_target(paired().y.roll(1, 0))}, "other features"),
        ({"sample": Sample(paired().y, paired().x, None, 0)}, "other features"),
        ({"sample": Sample(paired().x[:19], paired().y[:19], None, 0)}, "other features"),
    ],
)
def test_a_checkpoint_of_another_fit_raises(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "paper.pt"
    checkpointed(path, paired())
    with pytest.raises(FormatError, match=message):
        checkpointed(path, change.pop("sample", paired()), **change)


def test_a_checkpoint_serves_features_that_differ_by_rounding(tmp_path: Path) -> None:
    path, sample = tmp_path / "paper.pt", paired()
    first = checkpointed(path, sample)
    again = checkpointed(path, Sample(sample.x * (1 + 1e-5), sample.y + 1e-6, None, 0))
    assert torch.equal(again.of_source[0].weight, first.of_source[0].weight)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "other structure", "nan", "epoch", "state"])
def test_a_damaged_checkpoint_raises(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "paper.pt"
    checkpointed(path, paired())
    data, state = path.read_bytes(), torch.load(path)
    if damage in ("truncated", "empty", "text", "pickle"):
        contents = {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "text": b"weights",
            "pickle": pickle.dumps(print),
        }
        path.write_bytes(contents[damage])
    else:
        state["maps"]["q"][:] = float("nan") if damage == "nan" else 0
        state["epoch"] = 99 if damage == "epoch" else 1
        state["optimizer"] = {} if damage == "state" else state["optimizer"]
        torch.save([state] if damage == "other structure" else state, path)
    with pytest.raises(FormatError, match="damaged or not a checkpoint"):
        checkpointed(path, paired())


def test_one_checkpoint_option_serves_every_pair_direction_and_permutation(tmp_path: Path) -> None:
    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    images = torch.randn(100, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def unexplained(**options: Any) -> list[float]:
        report = measure(
            network(0), network(1), [images], ["1", "3"], order=1, solver="paper", directions="both", bootstrap=0,
            progress=False, solver_options={"epochs": 3, "lr": 1e-2} | options,
        )  # fmt: skip
        return [value for pair in report.pairs for value in (pair.unexplained, pair.noise_floor or 0.0)]

    expected = unexplained()
    options = {"checkpoint": str(tmp_path / "paper.pt")}
    assert unexplained(**options) == expected
    # 2 pairs in 2 directions, each with its permuted targets
    assert len(list(tmp_path.iterdir())) == 8
    assert unexplained(**options) == expected


@pytest.mark.parametrize("max_rows", [None, 36 * 10])
def test_the_number_of_rows_used_is_reported(max_rows: int | None) -> None:
    x, y = (torch.randn(50, 3, 6, 6) for _ in range(2))
    config = DisentangleConfig(order=0, solver="paper", max_rows=max_rows, solver_options={"epochs": 1}).on_grid((6, 6))
    fitter = make_fitter(config, x, y, 50)
    fitter.update(x, y, np.arange(50), np.zeros(50, dtype=bool))
    fitter.finish(bar=solve_bar(fitter.work, show=False), label="pair")
    assert fitter.rows == (50 * 36 if max_rows is None else 10 * 36)
    notes = [] if max_rows is None else ["trained on 10 of 50 images (360 rows), as max_rows=360"]
    assert fitter.notes == notes


def test_gate_and_its_gradient() -> None:
    h = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x = torch.randn_like(h)
    p = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(gate(x, h, p), x + gate_factor(h, p) * h)
    scale = channel_scale(h)
    torch.testing.assert_close(scale[0, 0, 0, 0], h[0, 0].flatten().var().sqrt() + 1e-5)
    h2 = h.detach().requires_grad_()
    gate(x.detach(), h2, p).sum().backward()
    torch.testing.assert_close(h2.grad, gate_factor(h2.detach(), p))  # σ held constant


def test_untied_form_between_different_channels() -> None:
    maps = PaperMaps(3, 7, order=2)
    assert not maps.tied
    assert maps.components(torch.randn(2, 3, 5, 5))[2].shape == (2, 7, 5, 5)
    with pytest.raises(OptionError, match="tied=False"):
        PaperMaps(3, 7, tied=True)
    with pytest.raises(ShapeError, match=r"\(N, 3, H, W\)"):
        maps(torch.randn(2, 7, 5, 5))


def test_the_public_class_learns_a_linear_map() -> None:
    x = torch.randn(60, 4, 6, 6)
    y = torch.einsum("dc,nchw->ndhw", torch.linalg.qr(torch.randn(4, 4))[0], x / channel_scale(x))
    maps = Disentangler(
        order=1, solver="paper", solver_options={"epochs": 300, "lr": 3e-2, "lr_end": 1e-3, "penalty": 0.01}
    ).fit(x, y)
    components, residual = maps.split(x, y)
    assert len(components) == 2
    assert residual.var() < 0.1 * y.var()
    with pytest.raises(OptionError, match="unknown options"):
        Disentangler(solver="paper", solver_options={"epoch": 3}).fit(x, y)
