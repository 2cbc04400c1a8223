"""The instrument as users call it: transforms, layers, options, restoring, errors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import KnowisoError, measure
from knowiso_train.errors import CapacityError, InputTypeError, LayerNameError, NonFiniteError, OptionError
from knowiso_train.measurement.data import SplitImageLoader
from tests.helpers.measurements import assert_close, figures, network, run


@pytest.fixture
def images() -> Tensor:
    return torch.randn(120, 3, 8, 8)


def test_a_compiled_network_that_ran_before_is_measured_as_the_plain_one(images: Tensor) -> None:
    compiled = torch.compile(network(1).eval(), backend="eager")
    compiled(images[:2])
    loader = DataLoader(TensorDataset(images), batch_size=32)
    reports = [measure(model, network(2), loader, ["1"], order=0, progress=False) for model in (compiled, network(1))]
    assert_close(*reports)


def test_every_network_runs_once_per_image(images: Tensor) -> None:
    counts = [0, 0]
    models = [network(1), network(2)]
    for i, model in enumerate(models):
        model.register_forward_pre_hook(lambda module, inputs, i=i: counts.__setitem__(i, counts[i] + len(inputs[0])))
    measure(
        *models,
        DataLoader(TensorDataset(images), batch_size=32),
        ["0", "1", "4"],
        order=1,
        directions="both",
        progress=False,
        solver_options={"epochs": 1},
    )
    # And once more for the first image, which gives the memory of a batch
    assert counts == [121, 121]


def test_transforms_and_forward(images: Tensor) -> None:
    base = run(list(images.split(30)))
    scaled = run(
        [2 * b + 1 for b in images.split(30)],
        source_transform=lambda x: (x - 1) / 2,
        target_transform=lambda x: (x - 1) / 2,
    )
    assert_close(scaled, base, 1e-5)
    odd = [{"weird": b, "other": b} for b in images.split(30)]
    assert_close(run(odd, forward=lambda model, batch: model(batch["weird"])), base)
    with pytest.raises(InputTypeError, match="forward="):
        run(odd)


def test_networks_of_different_resolution(images: Tensor) -> None:
    report = run(list(images.split(30)), source_transform=lambda x: nn.functional.interpolate(x, scale_factor=2))
    assert report.pairs[0].source_grid == (16, 16)
    assert report.pairs[0].target_grid == (8, 8)


def test_everything_is_as_before_also_after_an_error(images: Tensor) -> None:
    a, b = network(1), network(2)
    a.train()
    a[1].eval()
    b.eval()
    a[0].weight.requires_grad_(False)
    buffers = {k: v.clone() for k, v in a.state_dict().items()}
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    loader = DataLoader(TensorDataset(images), batch_size=30, shuffle=True)

    def check() -> None:
        assert [m.training for m in a] == [True, False, True, True, True]
        assert not any(m.training for m in b)
        assert [p.requires_grad for p in a.parameters()][:2] == [False, True]
        assert all(torch.equal(v, a.state_dict()[k]) for k, v in buffers.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for model in (a, b) for m in model.modules())
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])

    measure(a, b, loader, "4", order=1, progress=False, solver_options={"epochs": 1})
    check()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        measure(a, b, loader, "4", progress=False, target_transform=Broken())
    check()


def test_named_and_pattern_layers(images: Tensor) -> None:
    loader = list(images.split(30))
    options: dict[str, Any] = {"order": 0, "progress": False}
    report = measure(network(1), network(2), loader, {"0": "4"}, **options)
    assert (report.pairs[0].source, report.pairs[0].target) == ("0", "4")
    assert len(measure(network(1), network(2), loader, "*", **options).pairs) == 5
    with pytest.raises(LayerNameError, match="layer9"):
        measure(network(1), network(2), loader, "layer9", **options)


def test_neighborhoods_of_a_single_position_are_that_position() -> None:
    vectors = list(torch.randn(120, 6, 1, 1).split(30))
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    reports = [
        measure(model, model, vectors, "1", order=0, kernel_size=k, split=(0.5, 0.2, 0.3), progress=False)
        for k in (1, 3)
    ]
    assert figures(reports[0]) == figures(reports[1])
    assert reports[1].pairs[0].disentangler.config.kernel_size == 1


def test_networks_of_one_class_are_told_apart(images: Tensor) -> None:
    report = run([images])
    assert (report.source, report.target) == ("Sequential (source)", "Sequential (target)")
    assert "Sequential (target) explained from Sequential (source)" in str(report)
    assert run([images], names=("a", "b")).target == "b"


def test_options_without_meaning_are_refused(images: Tensor) -> None:
    for options in (
        {"directions": "sideways"},
        {"split": (0.5, 0.5)},
        {"split": (0.5, 0.2, 0.2)},
        {"order": 1.5},
        {"bootstrap": -1},
        {"max_images": 0},
        {"solver": "x"},
    ):
        with pytest.raises(OptionError):
            run([images], **options)
    with pytest.raises(InputTypeError):
        run(3)
    with pytest.raises(OptionError, match="hidden cannot be set with solver"):
        run([images], solver="paper", hidden=4)


def test_non_finite_features_name_layer_and_network(images: Tensor) -> None:
    images = images.clone()
    images[70, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"source.*'0'|'0'.*source"):
        run(DataLoader(TensorDataset(images), batch_size=30))


def test_memory_is_refused_before_it_is_gone(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowiso_train.utils.memory.free_bytes", lambda device: 2**20)
    with pytest.raises(CapacityError, match="kernel_size=1") as caught:
        run(DataLoader(TensorDataset(images), batch_size=30), order=2, kernel_size=3)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, KnowisoError)


def test_bfloat16_autocast_stays_near_float32(images: Tensor) -> None:
    loader = list(images.split(30))
    a, b = run(loader), run(loader, autocast=torch.bfloat16)
    for one, other in zip(a.pairs, b.pairs, strict=True):
        # Bf16 keeps 8 bits: noise of 1e-5 of the variance, and some gates
        assert one.unexplained == pytest.approx(other.unexplained, abs=0.01)


def test_paper_solver_reports_as_published(images: Tensor) -> None:
    a, b = network(1), network(2)
    report = measure(
        a,
        b,
        list(images.split(30)),
        "0",
        solver="paper",
        order=1,
        progress=False,
        noise_floor=False,
        solver_options={"epochs": 30, "lr": 1e-2},
    )
    pair = report.pairs[0]
    assert not pair.additive
    assert pair.shares == pair.component_variances
    assert pair.disentangler.config.kernel_size == 3
    assert pair.noise_floor is None


def test_disentangler_of_a_pair_gives_the_reported_share(images: Tensor) -> None:
    a, b = network(1).eval(), network(2).eval()
    stream = SplitImageLoader(DataLoader(TensorDataset(images), batch_size=30))
    pair = measure(
        a,
        b,
        DataLoader(TensorDataset(images), batch_size=30),
        "4",
        order=1,
        progress=False,
        solver_options={"epochs": 2},
    ).pairs[0]
    chosen = images[torch.from_numpy(stream.parts(np.arange(120)) == 2)]
    with torch.no_grad():
        y = b(chosen)
        _, residual = pair.disentangler.split(a(chosen), y)
    expected = residual.var((0, 2, 3), correction=0).sum() / y.var((0, 2, 3), correction=0).sum()
    assert pair.unexplained == pytest.approx(float(expected), rel=1e-4)


def test_interval_covers_the_truth() -> None:
    """Twelve seeds; a 95 % interval that misses more than three times would be wrong."""
    hits = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 4, 1, 1, generator=generator)
        y = x[:, :2] + torch.randn(300, 2, 1, 1, generator=generator)
        both = torch.cat([x, y], 1)

        class Part(nn.Module):
            def __init__(self, part: slice) -> None:
                super().__init__()
                self.part, self.out = part, nn.Identity()

            def forward(self, z: Tensor) -> Tensor:
                return self.out(z[:, self.part])

        pair = measure(
            Part(slice(0, 4)),
            Part(slice(4, 6)),
            [both],
            "out",
            order=0,
            ridge=0.0,
            seed=seed,
            progress=False,
            noise_floor=False,
        ).pairs[0]
        low, high = pair.interval
        hits += low <= 0.5 * (1 + 5 / 180) <= high  # least squares on 180 rows with 5 coefficients
    assert hits >= 9


def test_convolutional_net_against_transformers() -> None:
    """Layouts only: random weights, so no share is quoted."""
    loader = list(torch.randn(24, 3, 64, 64).split(12))
    cnn = timm.create_model("resnet18")
    others = {"vit_tiny_patch16_224": "blocks.11", "swin_tiny_patch4_window7_224": "layers.2"}
    for name, layer in others.items():
        other = timm.create_model(name, img_size=64, **({"window_size": 2} if "swin" in name else {}))
        with pytest.warns(UserWarning, match="rough|rows for|without variance"):
            report = measure(cnn, other, loader, {"layer3": layer}, order=0, directions="both", progress=False)
        forward, backward = report.forward[0], report.backward[0]
        assert forward.target_grid == (4, 4)
        assert backward.target_grid == (4, 4)
        assert forward.target_channels == {"vit_tiny_patch16_224": 192, "swin_tiny_patch4_window7_224": 384}[name]
        assert backward.target_channels == 256


def test_inputs_of_layers_are_those_of_an_independent_hook(images: Tensor) -> None:
    source, target = network(1), network(2)
    recorded: dict[str, Tensor] = {}
    for name, model in (("source", source), ("target", target)):
        # The in-place activation overwrites its input
        handle = model[2].register_forward_pre_hook(lambda _, args, name=name: recorded.update({name: args[0].clone()}))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
    identity = nn.Sequential(nn.Identity())
    both = torch.cat([recorded["source"], recorded["target"]], 1)
    transforms = {"source_transform": lambda x: x[:, :6], "target_transform": lambda x: x[:, 6:]}
    options: dict[str, Any] = {"order": 0, "progress": False, "split": (0.5, 0.2, 0.3)}
    expected = measure(identity, nn.Sequential(nn.Identity()), [both], "0", **transforms, **options)
    report = measure(source, target, [images], "2", at="input", **options)
    assert_close(report, expected, 1e-6)
    assert report.settings["at"] == "input"
    assert "inputs of layers" in str(report)
    assert measure(source, target, [images], "2", **options)["2"].unexplained != report["2"].unexplained
    # A mapping may name layers of either network
    mixed = measure(source, target, [images], [("2", "1")], at={"2": "input"}, **options)
    assert_close(mixed, expected, 1e-6)
    for pattern in ("3", "nothing"):
        with pytest.raises(LayerNameError, match=f"at= names '{pattern}', which is none of the layers"):
            measure(source, target, [images], "2", at={pattern: "input"}, **options)
    with pytest.raises(OptionError, match="at must be"):
        measure(source, target, [images], "2", at="inside", **options)
