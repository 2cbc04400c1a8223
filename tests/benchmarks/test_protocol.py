"""Test the published protocol: augmentation on the device, the learning rates, and interrupted calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.common import results
from benchmarks.distill import bench_protocol, pairs
from benchmarks.distill.pairs import Images, Pair, pooled
from tests.benchmarks.test_distill_harness import SmallNetwork

ARMS = ["kd", "kd+ours", "kd+fitnet,weight=1+srd"]


def small_images(dataset: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    return torch.randn(96, 3, 32, 32, generator=generator).half(), torch.randint(4, (96,), generator=generator)


def small_teacher() -> SmallNetwork:
    torch.manual_seed(1)
    return SmallNetwork(8)


PAIR = Pair(
    "none", small_teacher, lambda: SmallNetwork(4), {"stage": "stage"}, ("classifier", "classifier"), pooled, 64
)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "decoded_images", small_images)
    monkeypatch.setitem(bench_protocol.PAIRS, "small", PAIR)
    monkeypatch.setattr(bench_protocol, "FOLDER", tmp_path / "checkpoints")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")


def test_crops_equal_those_of_a_loop() -> None:
    images = Images(PAIR)
    indices = torch.tensor([5, 90, 0, 41])
    crops = images.augmented(2, indices)
    all_corners, all_flips = images._crops
    assert 0 < all_flips.sum() < 96
    assert set(all_corners.unique().tolist()) == set(range(9))
    for crop, index in zip(crops, indices, strict=True):
        top, left = all_corners[index].tolist()
        expected = images.padded[index, :, top : top + 32, left : left + 32].float()
        assert torch.equal(crop, expected.flip(-1) if all_flips[index] else expected)


def test_interrupted_calls_equal_one_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--pair", "small", "--epochs", "8", "--device", "cpu", "--arms", *ARMS]
    whole = bench_protocol.main(words)
    monkeypatch.setattr(bench_protocol, "FOLDER", tmp_path / "others")
    train_epoch, rates = bench_protocol.ProtocolTraining._train_epoch, []

    def interrupted(training: bench_protocol.ProtocolTraining) -> None:
        rates.append(training.run.learning_rate(2 * training.epoch))
        if training.epoch == 3 and len(rates) == 4:
            raise KeyboardInterrupt
        train_epoch(training)

    monkeypatch.setattr(bench_protocol.ProtocolTraining, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_protocol.main(words)
    assert bench_protocol.main(words) == whole
    assert [row["arm"] for row in whole] == ARMS
    # 8 epochs: the learning rate falls after 5, 6 and 7
    assert rates[4:] == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.00005])
    checkpoints = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*/*.pt"))]
    first, second = ([module for arm in c["arms"].values() for module in arm["modules"]] for c in checkpoints)
    for values, others in zip(first, second, strict=True):
        assert all(torch.equal(value, others[name]) for name, value in values.items())


def test_a_call_ends_in_time() -> None:
    words = ["--pair", "small", "--epochs", "2", "--device", "cpu", "--arms", "kd"]
    assert bench_protocol.main([*words, "--minutes", "0"]) == []
    assert len(bench_protocol.main(words)) == 1
