"""Images of a measurement: loaders, samplers, streams, parts and permuted targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from knowiso_train.errors import DataError, InputTypeError
from knowiso_train.measurement.data import PermutedTargets, SplitImageLoader
from knowiso_train.utils.distributed import ProcessGroup
from tests.helpers.measurements import assert_close, run


@pytest.fixture
def images() -> Tensor:
    return torch.randn(120, 3, 8, 8)


def test_tensors_tuples_and_dicts_give_the_same(images: Tensor) -> None:
    batches = list(images.split(30))
    expected = run(batches)
    assert_close(run([(b, torch.zeros(len(b))) for b in batches]), expected)
    assert_close(run([{"pixel_values": b, "labels": torch.zeros(len(b))} for b in batches]), expected)


def test_a_data_loader_is_read_by_index_whatever_its_order(images: Tensor) -> None:
    data = TensorDataset(images)
    expected = run(DataLoader(data, batch_size=30))
    assert_close(run(DataLoader(data, batch_size=30, shuffle=True)), expected)
    assert_close(run(DataLoader(data, batch_size=30, shuffle=True, num_workers=1)), expected)
    assert sum(expected.images.values()) == 120


def test_batch_size_changes_the_shuffled_pairing_only(images: Tensor) -> None:
    data = TensorDataset(images)
    a, b = (run(DataLoader(data, batch_size=n)) for n in (30, 7))
    for one, other in zip(a.pairs, b.pairs, strict=True):
        assert one.unexplained == pytest.approx(other.unexplained, abs=1e-7)
        assert one.interval == pytest.approx(other.interval, abs=1e-6)


def test_samplers_decide_which_images_belong(images: Tensor) -> None:
    data = TensorDataset(images)
    chosen = list(range(0, 120, 2))
    report = run(DataLoader(data, batch_size=20, sampler=SubsetRandomSampler(chosen)))
    assert sum(report.images.values()) == 60
    assert sum(run(DataLoader(Subset(data, chosen), batch_size=20)).images.values()) == 60
    assert sum(run(DataLoader(data, batch_size=20), max_images=50).images.values()) == 50
    assert (
        sum(
            run(
                DataLoader(data, batch_size=20, sampler=RandomSampler(data, num_samples=500, replacement=True))
            ).images.values()
        )
        == 120
    )
    assert sum(run(list(images.split(20)), max_images=50).images.values()) == 50


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_sampler_that_draws_gives_the_same_images_again(own_generator: bool, images: Tensor) -> None:
    data, generator = TensorDataset(images), torch.Generator() if own_generator else None
    samplers = [
        RandomSampler(data, num_samples=40, generator=generator),
        WeightedRandomSampler([1.0] * 120, 60, generator=generator),
    ]
    for sampler in samplers:
        loader = DataLoader(data, batch_size=10, sampler=sampler)
        state = torch.get_rng_state() if generator is None else generator.get_state()
        batches = [list(SplitImageLoader(loader).fit_batches()) for _ in range(2)]
        assert torch.equal(state, torch.get_rng_state() if generator is None else generator.get_state())
        torch.manual_seed(len(batches[0]))  # another process
        batches.append(list(SplitImageLoader(loader).fit_batches()))
        first, *others = [[batch.index.tolist() for batch in part] for part in batches]
        assert others == [first, first]
        assert len({index for batch in first for index in batch}) < 60


class TwoProcesses(ProcessGroup):
    """One of two processes; the other one gathered other values."""

    def __init__(self, rank: int, other: Any) -> None:
        self.rank, self.size, self.other = rank, 2, other

    def gather(self, value: Any) -> list[Any]:
        return [self.other, value] if self.rank else [value, self.other]


def test_processes_that_read_the_same_stream_are_refused(images: Tensor) -> None:
    def first_images(stream: list[Tensor]) -> list[bytes]:
        loader = SplitImageLoader(stream, group=TwoProcesses(0, []))
        list(loader.fit_batches())
        return loader._first_images

    shuffled, few = images[:20].flip(0), torch.cat([images[60:75], images[:5]])
    for other, same in ((images, True), (shuffled, True), (few, False), (images[60:], False)):
        loader = SplitImageLoader(list(images.split(20)), group=TwoProcesses(1, first_images(list(other.split(20)))))
        list(loader.fit_batches())
        expected = pytest.raises(DataError, match="processes 0 and 1 read the same") if same else nullcontext()
        with expected:
            loader.check_distinct()
    # One that is read by index is divided
    loader = SplitImageLoader(DataLoader(TensorDataset(images), 20), group=TwoProcesses(1, first_images([images])))
    list(loader.fit_batches())
    loader.check_distinct()


def test_split_is_a_property_of_the_image(images: Tensor) -> None:
    stream = SplitImageLoader(DataLoader(TensorDataset(images), batch_size=16), seed=3)
    seen = {
        int(i): int(r)
        for part in (stream.fit_batches(), stream.report_batches())
        for b in part
        for i, r in zip(b.index, b.part, strict=True)
    }
    assert sorted(seen) == list(range(120))
    assert seen == {i: int(r) for i, r in enumerate(stream.parts(np.arange(120)))}
    share = np.bincount(stream.parts(np.arange(20_000)), minlength=3) / 20_000
    np.testing.assert_allclose(share, [0.6, 0.2, 0.2], atol=0.01)
    assert any(stream.parts(np.arange(120)) != SplitImageLoader([images], seed=4).parts(np.arange(120)))


def test_streams_that_differ_when_read_again_are_refused(images: Tensor) -> None:
    class Shuffled:
        def __iter__(self) -> Iterator[Tensor]:
            yield from images[torch.randperm(120)].split(30)

    class Shrinking:
        left = 4

        def __iter__(self) -> Iterator[Tensor]:
            yield from images.split(30)[: self.left]
            self.left -= 1

    with pytest.raises(DataError, match="another image"):
        run(Shuffled())
    with pytest.raises(DataError, match="120 images at first and 90"):
        run(Shrinking())
    with pytest.raises(InputTypeError, match="can be read more than once"):
        run(iter([images]))


def test_a_loader_whose_dataset_gives_whole_batches_is_read_as_a_stream(images: Tensor) -> None:
    class Batches(Dataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Tensor:
            return images[30 * i : 30 * (i + 1)]

    assert_close(run(DataLoader(Batches(), batch_size=None)), run(list(images.split(30))))


def test_augmenting_datasets_are_fine_when_read_by_index(images: Tensor) -> None:
    class Noisy(Dataset[Tensor]):
        def __len__(self) -> int:
            return 120

        def __getitem__(self, i: int) -> Tensor:
            return images[i] + 0.01 * torch.randn(3, 8, 8)

    assert sum(run(DataLoader(Noisy(), batch_size=30)).images.values()) == 120


@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_too_few_images_are_an_error_that_says_so(images: Tensor) -> None:
    with pytest.raises(DataError, match="empty"):
        run(DataLoader(TensorDataset(images[:0])))
    with pytest.raises(DataError, match="no image"):
        run([images[:1]], split=(0.01, 0.0, 0.99))
    with pytest.raises(DataError, match="at least 2 images in the report set, got 0"):
        run(DataLoader(TensorDataset(images[:3])), split=(0.98, 0.01, 0.01), ridge=1e-3)
    with pytest.raises(DataError, match="at least 2 images in the report set, got 1"):
        run([images[:6]], ridge=1e-3)
    with pytest.warns(UserWarning, match="images to report on"):
        run(DataLoader(TensorDataset(images[:20]), batch_size=10), ridge=1e-2)


def test_shuffler_never_pairs_an_image_with_itself_twice_in_a_role() -> None:
    shuffle = PermutedTargets()
    y = torch.arange(8.0).view(8, 1, 1, 1)
    role = torch.tensor([0, 0, 1, 0, 2, 2, 0, 2])
    got = shuffle(y, role).flatten()
    for value in (0, 2):
        members = role == value
        assert set(got[members].tolist()) == set(y.flatten()[members].tolist())
        assert (got[members] != y.flatten()[members]).all()
    later = shuffle(y + 10, torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])).flatten()
    assert later[-1] == 2.0  # alone in its batch: the last of its role before
