"""Patches of other images, pasted at their own position, and mirrored images."""

from __future__ import annotations

import pytest
import torch

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.pruning.augmentation import cutmix


def test_cutmix_pastes_patches_of_other_images_at_their_own_position() -> None:
    images = torch.arange(64.0).view(64, 1, 1, 1) + torch.linspace(0, 0.9, 64).view(1, 1, 8, 8)
    mixed = cutmix(images)
    source, position = mixed.floor(), mixed - mixed.floor()
    assert torch.allclose(position, torch.linspace(0, 0.9, 64).view(1, 1, 8, 8).expand_as(position), atol=1e-4)
    pasted = source != torch.arange(64.0).view(64, 1, 1, 1)
    assert {int(count) for count in pasted.sum((1, 2, 3))} <= {0, 16}
    assert pasted.sum() >= 60 * 16
    assert len({tuple(map(int, mask.nonzero()[0])) for mask in pasted if mask.any()}) > 5


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.linspace(0, 0.9, 8).expand(64, 1, 8, 8)
    mirrored = cutmix(images, flip=True)
    assert 16 < int((mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, 7]).sum()) < 48


def test_the_patch_covers_its_fraction_of_each_side() -> None:
    images = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 1, 8, 12)
    pasted = cutmix(images, patch_fraction=0.25) != images
    # Images that the permutation leaves in place show no patch
    assert {int(count) for count in pasted.sum((1, 2, 3))} - {0} == {2 * 3}


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ShapeError, match="expected images"):
        cutmix(torch.zeros(3, 4))
    with pytest.raises(OptionError, match="patch_fraction must be"):
        cutmix(torch.zeros(3, 1, 4, 4), patch_fraction=1.5)
