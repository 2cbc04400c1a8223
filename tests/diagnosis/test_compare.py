"""Comparison of stages: planted changes, equality with `measure`, memory, files and errors."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import DeQuantStub, QuantStub

import knowiso_train as ki
from knowiso_train.diagnosis.comparison import StageComparison, StageLayer, StageResult, checkpoint_stages
from knowiso_train.errors import InputTypeError, LayerNameError, OptionError
from knowiso_train.measurement.data import SplitImageLoader
from tests.helpers.processes import run_in_processes
from tests.helpers.reports import functional_pair
from tests.helpers.stages import (
    class_images,
    class_network,
    gaussian_images,
    orthogonal_network,
    with_noise,
    without_channels,
)

# Channels without variance are planted
pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")

LAYERS = ["first", "second", "third"]
compare = partial(ki.compare_stages, progress=False)


def test_removed_channels_and_added_noise_are_found_in_their_layer_step_and_amount() -> None:
    reference = orthogonal_network()
    pruned = without_channels(reference, "second", 2)
    stages = {"copy": orthogonal_network(), "pruned": pruned, "noisy": with_noise(pruned, 0.5)}
    # The layers are in the order of the network, not of the names
    comparison = compare(reference, stages, gaussian_images(), LAYERS[::-1], functional=False)
    assert comparison.layers == tuple(LAYERS)
    assert comparison.curve("first") == pytest.approx([0, 0, 0.2], abs=0.02)
    # Two of eight equal channels; noise of variance s² hides s² / (1 + s²) of the others
    for layer in LAYERS[1:]:
        assert comparison.curve(layer) == pytest.approx([0, 1 / 4, 1 / 4 + 3 / 4 * 0.2], abs=0.02)
        assert comparison.curve(layer, "gained") == pytest.approx([0, 0, 0.2], abs=0.02)
        assert comparison.curve(layer, "kept") == pytest.approx([1 - lost for lost in comparison.curve(layer)])
    assert [comparison.loss_start(name) for name in comparison.names] == [None, "second", "first"]
    assert comparison.loss_start("noisy", beside="pruned") == "first"
    assert comparison.loss_start("pruned", beside="copy") == "second"
    assert comparison.loss_start("pruned", beside="noisy") is None
    assert comparison.loss_start("noisy", tolerance=0.3) == "second"


def test_a_forgotten_class_is_found_with_its_effect_on_the_output() -> None:
    reference = class_network()
    forgetful = class_network()
    forgetful.second.weight.data[2] = 0
    comparison = compare(reference, {"forgetful": forgetful}, class_images(), LAYERS, split=(0.5, 0.1, 0.4))
    stage = comparison["forgetful"]
    assert comparison.loss_start("forgetful") == "second"
    # Indicators of classes 1 and 3 leave 2 and 0 apart from each other by half: variance 1/8 of 9/16
    assert stage["second"].lost == pytest.approx(2 / 9, abs=0.03)
    assert stage["first"].lost == pytest.approx(0, abs=1e-4)
    assert stage.output is not None
    assert stage.output.top1 is not None
    for agreement in (stage.output.agreement, stage["second"].figure("agreement"), stage.output.top1):
        assert agreement == pytest.approx(0.75, abs=0.05)
    assert stage["first"].figure("agreement") == 1
    assert stage["second"].figure("kl") > 0.2 > stage["first"].figure("kl")


@pytest.mark.parametrize("cache_gib", [2.0, 0.0, 1e-4])
def test_figures_equal_those_of_single_measurements(cache_gib: float) -> None:
    reference = orthogonal_network()
    stages = {"pruned": without_channels(reference, "second", 3), "other": orthogonal_network(1)}
    options: dict[str, Any] = {"similarity": True, "bootstrap": 50, "max_images": 300, "seed": 3}
    loader = gaussian_images()
    comparison = compare(reference, stages, loader, LAYERS, cache_gib=cache_gib, **options)
    for name, network in stages.items():
        single = ki.measure(
            reference,
            network,
            loader,
            LAYERS,
            order=0,
            directions="both",
            functional=True,
            noise_floor=False,
            progress=False,
            **options,
        )
        assert tuple(entry.of_stage for entry in comparison[name]) == single.forward
        assert tuple(entry.of_reference for entry in comparison[name]) == single.backward
        assert comparison[name].images == single.images
        share = comparison[name].output
        assert share is not None
        assert share.agreement == pytest.approx(report_agreement(reference, network, loader, max_images=300, seed=3))


def report_agreement(reference: nn.Module, network: nn.Module, loader: Any, max_images: int, seed: int) -> float:
    """Return the share of report images for which both networks have the same class."""
    images = SplitImageLoader(loader, seed=seed, max_images=max_images)
    agrees = []
    with torch.no_grad():
        for batch in images.report_batches():
            own, output = (model(batch.batch[0]).argmax(1) for model in (reference, network))
            agrees += (own == output).tolist()
    return sum(agrees) / len(agrees)


def test_the_reference_runs_once_for_all_stages() -> None:
    reference, calls = orthogonal_network(), []
    reference.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    stages = {str(seed): orthogonal_network(seed) for seed in range(4)}
    compare(reference, stages, gaussian_images(), LAYERS, functional=False)
    # 400 images, and for every stage one image to estimate the memory and one batch for the layouts
    assert sum(calls) <= 400 + 4 * (1 + 50) + 50
    calls.clear()
    compare(reference, stages, gaussian_images(), LAYERS, functional=False, cache_gib=0)
    assert sum(calls) >= 4 * 400


def test_stages_are_made_one_after_another_and_released() -> None:
    made: list[weakref.ref[nn.Module]] = []

    def make(seed: int) -> nn.Module:
        gc.collect()
        assert [reference() for reference in made] == [None] * len(made)
        network = orthogonal_network(seed)
        made.append(weakref.ref(network))
        return network

    functions = {str(seed): partial(make, seed) for seed in range(3)}
    compare(orthogonal_network(), functions, gaussian_images(), "second")
    tuples: Iterator[tuple[str, nn.Module]] = ((str(seed), make(seed)) for seed in range(3))
    comparison = compare(orthogonal_network(), tuples, gaussian_images(), "second")
    assert len(made) == 6
    assert all(pair.disentangler is None for stage in comparison for pair in (stage.layers[0].of_stage,))


def test_state_is_as_before_also_after_an_error() -> None:
    reference = orthogonal_network()
    reference.second.eval()
    modes = [module.training for module in reference.modules()]
    with pytest.raises(InputTypeError) as caught:
        compare(reference, {"first": orthogonal_network(1), "bad": lambda: 3}, gaussian_images(), LAYERS)
    assert "'bad'" in "".join(caught.value.__notes__)
    assert [module.training for module in reference.modules()] == modes
    assert not any(module._forward_hooks for module in reference.modules())


def test_finished_stages_are_read_and_not_made_again(tmp_path: Path) -> None:
    reference = orthogonal_network()
    made: list[int] = []

    class Recorder:
        """Identified by its class; a list that a function holds is identified by its content."""

        def add(self, seed: int) -> None:
            made.append(seed)

    recorder = Recorder()

    def make(seed: int) -> nn.Module:
        recorder.add(seed)
        return orthogonal_network(seed)

    stages = {f"run {seed}/a": partial(make, seed) for seed in range(3)}
    run = partial(compare, reference, loader=gaussian_images(), layers="second", path=tmp_path, bootstrap=20)
    with pytest.raises(RuntimeError, match="stop"):
        run(stages=iter([*list(stages.items())[:2], ("bad", partial(_raise, RuntimeError("stop")))]))
    assert made == [0, 1]
    comparison = run(stages=stages)
    assert made == [0, 1, 2]
    again = run(stages=stages)
    assert again.stages == comparison.stages
    assert made == [0, 1, 2]
    # Another argument, another function, and another network that a function holds
    other = orthogonal_network(4)
    for changed in (partial(make, 5), lambda: orthogonal_network(0), lambda: other):
        with pytest.raises(OptionError, match=r"network is .*, was .*path="):
            run(stages={"run 0/a": changed})
    first, second = orthogonal_network(6), orthogonal_network(7)
    held = [run(stages={"held": lambda network=network: network}) for network in (first, first)]
    assert held[0].stages == held[1].stages
    with pytest.raises(OptionError, match="network is"):
        run(stages={"held": lambda network=second: network})


def _raise(error: Exception) -> nn.Module:
    raise error


def test_files_of_other_settings_or_networks_are_refused(tmp_path: Path) -> None:
    reference = orthogonal_network()
    run = partial(compare, layers="second", path=tmp_path, bootstrap=20)
    stages = {"a": orthogonal_network(1)}
    run(reference, stages, gaussian_images())
    with pytest.raises(OptionError, match=r"bootstrap is 30, was 20.*path="):
        run(reference, stages, gaussian_images(), bootstrap=30)
    with pytest.raises(OptionError, match="reference is"):
        run(orthogonal_network(2), stages, gaussian_images())
    with pytest.raises(OptionError, match="first_batch is"):
        run(reference, stages, gaussian_images(seed=1))
    with pytest.raises(OptionError, match="network is"):
        run(reference, {"a": orthogonal_network(3)}, gaussian_images())
    with pytest.raises(OptionError, match=r"layers is \['first'\], was 'second'"):
        run(reference, stages, gaussian_images(), layers=["first"])
    with pytest.raises(OptionError, match="stage_transform is"):
        run(reference, stages, gaussian_images(), stage_transform={"a": nn.Identity()})
    assert run(reference, stages | {"b": reference}, gaussian_images(), stage_transform={"b": nn.Identity()})
    with pytest.raises(OptionError, match="must be a folder"):
        run(reference, stages, gaussian_images(), path=next(tmp_path.iterdir()))


SCRIPT = """
import sys, time
from functools import partial
import torch
import knowiso_train as ki
from tests.helpers.stages import gaussian_images, orthogonal_network
def stages():
    for seed in range(200):
        time.sleep(0.3)
        yield str(seed), partial(orthogonal_network, seed)
ki.compare_stages(orthogonal_network(), stages(), gaussian_images(), "second", path=sys.argv[1], bootstrap=20)
"""


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=root, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.json"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    files = list(tmp_path.glob("*.json"))
    finished = {json.loads(file.read_text())["result"]["name"] for file in files}
    times = {file: file.stat().st_mtime_ns for file in files}
    names = [str(seed) for seed in range(len(finished) + 1)]
    stages = {name: partial(orthogonal_network, int(name)) for name in names}
    resumed = compare(orthogonal_network(), stages, gaussian_images(), "second", path=tmp_path, bootstrap=20)
    assert finished == set(names[:-1])
    assert {file: file.stat().st_mtime_ns for file in files} == times
    assert len(list(tmp_path.glob("*.json"))) == len(names)
    fresh = compare(orthogonal_network(), stages, gaussian_images(), "second", bootstrap=20)
    assert [stage.layers for stage in resumed] == [stage.layers for stage in fresh]
    assert [stage.output for stage in resumed] == [stage.output for stage in fresh]


def test_bad_input_is_named() -> None:
    reference, loader = orthogonal_network(), gaussian_images()
    network = orthogonal_network(1)
    with pytest.raises(OptionError, match="at least one stage"):
        compare(reference, {}, loader, LAYERS)
    with pytest.raises(OptionError, match="'a' twice"):
        compare(reference, [("a", network), ("a", network)], loader, "second")
    with pytest.raises(InputTypeError, match=r"\(name, network\)"):
        compare(reference, [network], loader, LAYERS)
    with pytest.raises(InputTypeError, match=r"stage 'a'.*got int"):
        compare(reference, [("a", 3)], loader, LAYERS)
    with pytest.raises(OptionError, match="no option directions, color"):
        compare(reference, {"a": network}, loader, LAYERS, directions="both", color=1)
    with pytest.raises(LayerNameError, match="fourth"):
        compare(reference, {"a": network}, loader, "fourth")
    with pytest.raises(OptionError, match="no entry for stage 'a'"):
        compare(reference, {"a": network}, loader, {"b": ["second"]})


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Images with another noise whenever they are read."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(16, 2, 2) + random.random() + np.random.rand()  # noqa: NPY002
        return noise + torch.randn(16, 2, 2, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_images_are_the_same_for_all_stages(workers: int) -> None:
    """The cached features of the reference belong to the images that a stage built later receives."""
    reference = orthogonal_network()

    def same() -> nn.Module:
        torch.rand(7), random.random(), np.random.rand()  # noqa: NPY002
        return copy.deepcopy(reference)

    loader = torch.utils.data.DataLoader(Noisy(), batch_size=50, num_workers=workers)
    state = torch.get_rng_state()
    comparison = compare(reference, {"first": same, "second": same}, loader, LAYERS, functional=False)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in LAYERS:
        assert comparison.curve(layer) == pytest.approx([0, 0], abs=1e-3)


def test_files_of_other_functions_are_refused(tmp_path: Path) -> None:
    reference, stage, images = orthogonal_network(), orthogonal_network(), gaussian_images(2)

    def power(x: Tensor, p: float) -> Tensor:
        return x.sign() * x.abs() ** p

    def run(**options: Any) -> StageComparison:
        return compare(reference, {"a": stage}, images, LAYERS, functional=False, path=tmp_path, **options)

    run(stage_transform=partial(power, p=1.0)).to_json(tmp_path / "comparison.json")
    run(stage_transform=partial(power, p=1.0))  # the file beside those of the stages is not read
    for options in ({"stage_transform": partial(power, p=3.0)}, {"stage_transform": lambda x: x}):
        with pytest.raises(OptionError, match="stage_transform is "):
            run(**options)
    with pytest.raises(OptionError, match="reference_transform is "):
        run(stage_transform=partial(power, p=1.0), reference_transform=lambda x: 2 * x)


def test_names_that_no_stage_has_raise() -> None:
    reference, images = orthogonal_network(), gaussian_images(2)
    for option, value in (("stage_transform", {"b": lambda x: x}), ("layers", {"a": LAYERS, "b": LAYERS})):
        options = {"layers": LAYERS} | {option: value}
        with pytest.raises(OptionError, match=f"{option}= names 'b', which is none of the stages .'a'."):
            compare(reference, {"a": orthogonal_network()}, images, **options)
    networks = {"a": reference, "b": orthogonal_network()}
    with pytest.raises(OptionError, match=r"transforms= names 'c', which is none of the networks \['a', 'b'\]"):
        ki.stability(networks, images, LAYERS, transforms={"c": lambda x: x}, progress=False)


def test_layers_may_differ_between_stages() -> None:
    reference = orthogonal_network()
    layers = {"a": {"second": "third"}, "b": ["first", "second"]}
    comparison = compare(reference, {"a": reference, "b": reference}, gaussian_images(), layers)
    assert [(entry.layer, entry.stage_layer) for entry in comparison["a"]] == [("second", "third")]
    assert comparison.curve("first")[0] != comparison.curve("first")[0]  # NaN
    assert comparison.curve("second") == pytest.approx([0, 0], abs=1e-4)
    with pytest.raises(LayerNameError, match="compared: second"):
        comparison["a"]["first"]
    assert str(comparison)
    assert comparison.to_html()
    assert comparison.plot()


class _Int8Network(nn.Module):
    """Network that torch's static quantization converts."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.first, self.relu, self.second = nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.relu(self.first(self.quant(x))))
        output: Tensor = self.dequant(self.fc(self.flatten(self.pool(x))))
        return output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_network_of_8_bit_integers_is_a_stage(tmp_path: Path) -> None:
    reference, loader = _Int8Network().eval(), gaussian_images()
    coarse = copy.deepcopy(reference)
    engine = torch.backends.quantized.supported_engines[-1]
    coarse.qconfig = quantization.get_default_qconfig(engine)  # type: ignore[assignment]
    with _quantized_engine(engine):
        quantization.prepare(coarse, inplace=True)
        coarse(next(iter(loader))[0])
        quantization.convert(coarse, inplace=True)
        assert coarse(next(iter(loader))[0]).dtype == torch.float32
        comparison = compare(reference, {"int8": coarse}, loader, ["first", "second"], path=tmp_path)
    stage = comparison["int8"]
    for layer in stage:
        assert 1e-6 < layer.lost < 0.01
        assert 1e-6 < layer.gained < 0.01
        assert layer.of_stage.functional[0].agreement > 0.9
    assert comparison.loss_start("int8") is None
    assert stage.output is not None
    assert stage.output.agreement > 0.9


@contextmanager
def _quantized_engine(engine: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def compare_in_two_processes(rank: int, folder: Path) -> None:
    comparison = compare_planted(folder / "stages")
    assert len(list((folder / "stages").glob("*.json"))) == 2
    comparison.to_json(folder / f"{rank}.json")
    assert compare_planted(folder / "stages").stages == comparison.stages


def compare_planted(path: Path | None = None) -> StageComparison:
    reference = orthogonal_network()
    stages = {"pruned": without_channels(reference, "second", 2), "noisy": with_noise(reference, 0.5)}
    warnings.simplefilter("ignore", ki.KnowisoWarning)
    return compare(reference, stages, gaussian_images(), LAYERS, path=path)


def test_two_processes_compare_as_one(tmp_path: Path) -> None:
    run_in_processes(compare_in_two_processes, tmp_path)
    first, second = (StageComparison.from_json(tmp_path / f"{rank}.json") for rank in range(2))
    assert first.stages == second.stages
    for stage in compare_planted():
        assert first[stage.name].images == stage.images
        output = first[stage.name].output
        assert output is not None
        assert stage.output is not None
        assert output.agreement == stage.output.agreement
        assert output.kl == pytest.approx(stage.output.kl, rel=1e-4, abs=1e-6)
        for entry in stage:
            for name in ("lost", "gained", "agreement", "kl"):
                assert first[stage.name].figure(entry.layer, name) == pytest.approx(
                    entry.figure(name), rel=1e-4, abs=1e-6
                )


def made_up() -> StageComparison:
    pairs = functional_pair("conv", "conv.<b>", "backward", warnings=("rough",)), functional_pair("conv.<b>", "conv")
    layer = StageLayer("conv.<b>", "conv", *pairs)
    output = pairs[0].functional[0]
    stages = tuple(StageResult(f"stage {i}", 10 * i, (layer,), output, {"fit": 60}, 0.5) for i in range(3))
    return StageComparison("large", stages, {"order": 1}, 1.5, {"torch": "2"})


def test_printed_results_begin_with_the_stage_and_layer_in_which_the_loss_starts() -> None:
    comparison = made_up()
    unharmed = functional_pair("conv", "conv.<b>", "backward", unexplained=0.001, interval=(0.0, 0.002))
    first, *others = (replace(stage, step=None) for stage in comparison)
    first = replace(first, layers=(replace(first.layers[0], of_reference=unharmed),))
    starts_later = str(replace(comparison, stages=(first, *others)))
    assert "The loss starts at stage 1 in conv.<b>, of which 15.0 % is lost" in starts_later
    assert "the stages before lose at most 1 %" in starts_later
    assert "step" not in starts_later
    assert "No stage loses more than 1 %" in str(replace(comparison, stages=(first,)))


def test_results_are_printed_written_and_read(tmp_path: Path) -> None:
    comparison = made_up()
    assert StageComparison.from_json(comparison.to_json(tmp_path / "a.json")) == comparison
    text = str(comparison)
    assert ["stage", "2", "conv.<b>", "(15.0", "%)", "90.0", "%", "0.2", "20"] in [
        line.split() for line in text.splitlines()
    ]
    assert "Lost share, mean over the layers: 15.0 % at stage 0, 15.0 % at stage 2." in text
    assert "93.7 %" in text
    assert "! stage 0, conv.<b>: rough" in text
    assert "order 1" in str(comparison["stage 0"])
    header, *rows = comparison.to_csv(tmp_path / "a.csv").splitlines()
    values = dict(zip(header.split(","), rows[1].split(","), strict=True))
    assert values["stage"] == "stage 1"
    assert values["step"] == "10"
    assert float(values["lost"]) == pytest.approx(0.15)
    assert values["stage_output_agreement"] == "0.9"
    assert values["lost_functional_1_top1"] == "0.92"
    page = comparison.to_html(tmp_path / "a.html")
    assert "<b>" not in page
    assert "<h2>conv.&lt;b&gt;</h2>" in page
    assert "▸ 15.0\xa0%" in page
    assert "gained" in page.lower()
    comparison.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(OptionError, match="figure must be one of"):
        comparison.curve("conv.<b>", "loss")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no stage 'x'"):
        comparison["x"]


def test_a_trajectory_emerges_step_by_step(tmp_path: Path) -> None:
    last = orthogonal_network()
    scales = (2.0, 1.0, 0.5, 0.0)
    for epoch, scale in enumerate(scales):
        torch.save(with_noise(last, scale).state_dict(), tmp_path / f"epoch-{epoch}.pth")
    stages = checkpoint_stages(tmp_path, orthogonal_network)
    comparison = compare(last, stages, gaussian_images(), LAYERS, functional=False)
    assert [stage.step for stage in comparison] == [0, 1, 2, 3]
    kept = [1 / (1 + scale**2) for scale in scales]
    for layer in LAYERS:
        assert comparison.curve(layer, "kept") == pytest.approx(kept, abs=0.03)
        assert comparison.emerged(layer) == pytest.approx([b - a for a, b in itertools.pairwise(kept)], abs=0.03)
