"""Batches in the forms that loaders give, and state left as it was found."""

from __future__ import annotations

import random
from collections import UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from knowiso_train.errors import DataError, InputTypeError, OptionError, ShapeError
from knowiso_train.features import device_of, on_device, preserve_state
from knowiso_train.pruning import finetune
from knowiso_train.refinement.models import ClassifierModel, extract_pooled_features
from knowiso_train.utils.batch import (
    LABEL_KEYS,
    batch_size,
    check_loader,
    concatenate_batches,
    get_inputs,
    index_batch,
    labels_of,
    replace_inputs,
    to_device,
)

IMAGES, LABELS = torch.arange(24.0).view(4, 6), torch.arange(4)
Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        Pair(IMAGES, LABELS),
        {"label": LABELS, "pixel_values": IMAGES},
        {"image": IMAGES, "mask": torch.zeros(4, 6)},
        {"anything": IMAGES, "label": LABELS},
        UserDict(img=IMAGES, label=LABELS),
        MappingProxyType({"x": IMAGES}),
    ],
)
def test_images_are_found_moved_selected_and_replaced(batch: Any) -> None:
    assert get_inputs(batch) is IMAGES
    assert batch_size(batch) == 4
    assert get_inputs(to_device(batch, "meta")).device.type == "meta"
    some = index_batch(batch, torch.tensor([3, 1]))
    torch.testing.assert_close(get_inputs(some), IMAGES[[3, 1]])
    assert isinstance(some, dict if isinstance(batch, MappingProxyType) else type(batch))
    other = -IMAGES
    assert get_inputs(replace_inputs(batch, other)) is other
    assert get_inputs(batch) is IMAGES  # the batch itself is not touched


def test_the_first_known_key_wins() -> None:
    assert get_inputs({"x": LABELS, "inputs": LABELS, "pixel_values": IMAGES}) is IMAGES


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"a": IMAGES, "b": IMAGES}, r"keys \['a', 'b'\], 2 such.*forward="),
        ({"label": LABELS}, "0 such"),
        ({"image": "cat.png"}, "str at 'image'"),
        (("cat.png", IMAGES), "str at 0"),
        ([], "list"),
        ("cat.png", "got str"),
        (None, "NoneType"),
    ],
)
def test_a_batch_without_images_says_what_it_is(batch: Any, says: str) -> None:
    with pytest.raises(InputTypeError, match=says):
        get_inputs(batch)


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS, torch.zeros(4)],
        Pair(IMAGES, LABELS.int()),
        *({"image": IMAGES, key: LABELS} for key in LABEL_KEYS),
        UserDict(img=IMAGES, label=LABELS.to(torch.uint8)),
    ],
)
def test_labels_of_returns_int64_labels_from_every_form_of_batch(batch: Any) -> None:
    labels = labels_of(batch)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES, "tensor of labels as the second element.*got none in a Tensor"),
        ((IMAGES,), "got none in a tuple"),
        ({"image": IMAGES, "class": LABELS}, "got none in a dict"),
        ((IMAGES, ["a", "b", "c", "d"]), "got list in a tuple"),
        ((IMAGES, LABELS.float()), r"one integer label for each image, got torch.float32 of shape \(4,\)"),
        ((IMAGES, LABELS[:3]), r"got torch.int64 of shape \(3,\)"),
        ((IMAGES, LABELS[:, None]), r"got torch.int64 of shape \(4, 1\)"),
        ((IMAGES, LABELS - 1), "labels of at least 0, got -1"),
    ],
)
def test_labels_of_refuses_batches_without_one_class_per_image(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"labeled images: .*{message}"):
        labels_of(batch, "labeled images")


def labels_seen_by_refine(batch: Any) -> list[int]:
    """Return the labels that `refine` takes from a batch of vectors."""
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4)).eval()
    features = extract_pooled_features([ClassifierModel(model, "1", "model")], [batch], labels=True)
    assert features.labels is not None
    return features.labels.tolist()


def cross_entropy_of_finetune(batch: Any) -> float | None:
    """Return the cross-entropy with the labels before a fine-tuning step."""
    torch.manual_seed(0)
    original, pruned = nn.Linear(6, 4), nn.Linear(6, 4)
    report = finetune(
        pruned,
        original,
        [batch],
        layers=(),
        label_weight=1.0,
        steps=1,
        batch_size=4,
        validation_fraction=0.5,
        progress=False,
    )
    return report.before.cross_entropy


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_refine_and_finetune_use_the_same_labels_of_a_batch(key: str) -> None:
    images, labels = torch.randn(16, 6), torch.arange(16) % 4
    batch = {"image": images, key: labels}
    assert labels_seen_by_refine(batch) == labels.tolist()
    assert cross_entropy_of_finetune(batch) == cross_entropy_of_finetune((images, labels))
    assert cross_entropy_of_finetune(batch) != cross_entropy_of_finetune((images, labels.flip(0)))
    for function in (labels_seen_by_refine, cross_entropy_of_finetune):
        with pytest.raises(DataError, match="labels of at least 0, got -1"):
            function({"image": images, key: labels - 1})


def test_size_falls_back_to_the_first_tensor() -> None:
    assert batch_size({"scale": torch.tensor(1.0), "a": IMAGES, "b": torch.zeros(4, 2)}) == 4
    with pytest.raises(InputTypeError, match="at least one tensor"):
        batch_size(["cat.png"])


def test_select_takes_rows_and_items_and_passes_the_rest() -> None:
    batch = {
        "image": IMAGES,
        "name": ["a", "b", "c", "d"],
        "boxes": ([1], [2], [3], [4]),
        "nested": {"label": LABELS, "temperature": torch.tensor(2.0), "classes": ["cat", "dog"]},
        "id": 7,
    }
    some = index_batch(batch, torch.tensor([False, True, False, True]))
    assert some["name"] == ["b", "d"]
    assert some["boxes"] == ([2], [4])
    assert some["nested"]["label"].tolist() == [1, 3]
    assert some["nested"]["temperature"] == 2
    assert some["nested"]["classes"] == ["cat", "dog"]
    assert some["id"] == 7


def test_select_does_not_mistake_two_columns_for_two_samples() -> None:
    images, labels = index_batch([torch.zeros(2, 3), torch.tensor([5, 6])], torch.tensor([1]))
    assert images.shape == (1, 3)
    assert labels.tolist() == [6]
    some = index_batch({"image": torch.zeros(2, 3), "views": [torch.zeros(2, 3), torch.ones(2, 3)]}, torch.tensor([1]))
    assert [view.shape for view in some["views"]] == [(1, 3), (1, 3)]


def test_select_refuses_what_cannot_index() -> None:
    with pytest.raises(ShapeError, match="length 4"):
        index_batch(IMAGES, torch.tensor([True]))
    with pytest.raises(ShapeError, match="1-D"):
        index_batch(IMAGES, torch.tensor(1))


@pytest.mark.parametrize("count", [2, 4])
def test_joined_batches_can_be_split_again(count: int) -> None:
    whole = {
        "image": IMAGES,
        "name": ["a", "b", "c", "d"],
        "views": [IMAGES, 2 * IMAGES],
        "nested": Pair(LABELS, ("w", "x", "y", "z")),
        "classes": ["cat", "dog", "owl", "bat", "elk"],
        "anchors": torch.ones(5, 2),
        "scale": torch.tensor(2.0),
    }
    parts = [index_batch(whole, index) for index in torch.arange(4).split(3 if count == 2 else 1)]
    joined = concatenate_batches(parts)
    assert [joined[key] for key in ("name", "classes")] == [whole["name"], whole["classes"]]
    assert isinstance(joined["nested"], Pair)
    assert joined["nested"].label == whole["nested"].label  # type: ignore[attr-defined]
    assert torch.equal(joined["nested"].image, LABELS)
    assert torch.equal(joined["views"][1], 2 * IMAGES)
    assert [joined[key].shape for key in ("anchors", "scale")] == [(5, 2), ()]
    assert isinstance(concatenate_batches([UserDict(img=IMAGES)] * 2), UserDict)


def test_two_columns_of_two_samples_are_joined_as_columns() -> None:
    images, labels = concatenate_batches([[torch.zeros(2, 3), torch.tensor([5, 6])]] * 2)
    assert images.shape == (4, 3)
    assert labels.tolist() == [5, 6, 5, 6]


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"x": IMAGES}, {"x": IMAGES[:, :2]}, "images of one size"),
        ({"x": IMAGES, "boxes": torch.zeros(5, 4)}, {"x": IMAGES, "boxes": torch.zeros(6, 4)}, "one row per image"),
        ({"x": IMAGES, "names": ["a"]}, {"x": IMAGES, "names": ["a", "b"]}, "one item per image"),
        ({"x": IMAGES}, {"x": IMAGES, "names": ["a"]}, "the same keys"),
        ((IMAGES, LABELS), IMAGES, "Tensor and tuple"),
    ],
)
def test_batches_of_different_forms_are_not_joined(first: Any, second: Any, says: str) -> None:
    with pytest.raises((ShapeError, InputTypeError), match=says):
        concatenate_batches([first, second])


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002  # the state that others draw from


def seed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def test_undisturbed_restores_modes_gradients_and_random_state() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net[1].eval()
    net[0].weight.requires_grad_(False)
    seed()
    expected = drawn()
    seed()

    def disturb() -> None:
        with preserve_state(nn.DataParallel(net), net):
            assert not any(module.training for module in net.modules())
            net.requires_grad_(True)
            net[0].bias.requires_grad_(False)
            drawn()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert drawn() == expected


def test_undisturbed_reaches_through_wrappers_and_may_leave_the_mode() -> None:
    net = nn.Dropout()
    with preserve_state(torch.compile(net)):
        assert not net.training
    assert net.training
    with preserve_state(net, eval_mode=False):
        assert net.training
        net.eval()
    assert net.training
    assert not torch.cuda.is_initialized()
    with pytest.raises(InputTypeError), preserve_state("resnet18"):  # type: ignore[arg-type]
        pass


def test_on_device_moves_there_and_back() -> None:
    net = nn.BatchNorm1d(2, affine=False)  # buffers only
    assert device_of(net) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
    with on_device(None, net), on_device("cpu", net, net, nn.ReLU()):
        assert device_of(net) == torch.device("cpu")
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(OptionError, match=r"\['cpu', 'meta'\]"), on_device("cpu", spread):
        pass


@pytest.mark.parametrize(
    "loader",
    [IMAGES, (IMAGES, LABELS), [IMAGES, LABELS], {"image": IMAGES}, torch.nn.Identity(), 3, None],
)
@pytest.mark.parametrize("again", [True, False])
def test_what_is_no_loader_is_refused(loader: Any, again: bool) -> None:
    with pytest.raises(InputTypeError, match=f"peers.*got {type(loader).__name__}.*into a list"):
        check_loader(loader, "peers", again=again)


def test_an_iterator_can_be_read_once() -> None:
    check_loader(iter([IMAGES]), again=False)
    check_loader([IMAGES])
    check_loader((IMAGES, IMAGES[:2]))
    with pytest.raises(InputTypeError, match="more than once; got an iterator"):
        check_loader(iter([IMAGES]))
