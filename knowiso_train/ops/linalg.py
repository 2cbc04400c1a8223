"""Blocked Gram matrices, jittered Cholesky factors, orthogonalization and full precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import NonFiniteError

GPU_BYTES = 2**27  # alive at once on a GPU: little of its memory, and products that are worth their launches

# Of the quintic iteration, tuned by its authors for few rounds
QUINTIC_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MIN_NORM = 1e-12
SHORT, LONG = 32, 128  # sides of a batch are multiples of these
MAX_BATCH_VALUES = 2**22  # values of a batch, at most, but one matrix

JITTER_GROWTH, MAX_JITTER_STEPS = 10.0, 16

# Columns from which on one triangle is computed, in so many blocks
MIN_TRIANGLE_COLUMNS, NUM_TRIANGLE_BANDS = 512, 8


def chunk_slices(x: Tensor, each: int, at_once: int) -> list[slice]:
    """Slices of images.

    Args:
        x: (N, …), for its length and device.
        each: bytes that an image takes.
        at_once: bytes that are alive at once on a CPU; on a GPU `GPU_BYTES` are, where that is more.

    Example:
        >>> import torch
        >>> chunk_slices(torch.zeros(5, 1), 100, 250)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    step = max(1, (at_once if x.device.type == "cpu" else max(at_once, GPU_BYTES)) // each)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def triangle_bands(columns: int, wide: int) -> list[slice]:
    """Rows of each band.

    Example:
        >>> triangle_bands(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + wide, columns)) for start in range(0, columns, wide)]


def mirror_triangle(total: Tensor, parts: list[slice]) -> None:
    """Fill what the bands of a (…, d, d) product have left out, in place.

    Example:
        >>> import torch
        >>> total = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> mirror_triangle(total, triangle_bands(2, 1))
        >>> total.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for band in parts[1:]:
        total[..., band, : band.start] = total[..., : band.start, band].mT


def _switches() -> list[tuple[Any, str, Any]]:
    """What else holds a precision of its own, the attribute, and the value for full precision; the older one before torch 2.9."""
    places = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
        getattr(torch.backends.cudnn, "conv", None),
    ]
    new: list[tuple[Any, str, Any]] = [
        (place, "fp32_precision", "ieee") for place in places if hasattr(place, "fp32_precision")
    ]
    return new or [(torch.backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or less in products and convolutions: differences of large sums, and small eigenvalues of second moments, are lost
    otherwise.

    PyTorch has two ways to allow these, `torch.set_float32_matmul_precision` and, since 2.9,
    `torch.backends.cuda.matmul.fp32_precision`; where they
    have been used against each other the first cannot be read. Both are as before afterwards.

    Args:
        device: whose autocast is meant.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    switches = [(place, name, full, getattr(place, name)) for place, name, full in _switches()]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new way says less than "highest", of which the old one does not know
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        for place, name, full, _ in switches:
            setattr(place, name, full)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for place, name, _, own in switches:
            setattr(place, name, own)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearly the nearest matrix whose singular values are one: between 0.7 and 1.2, which serves as well and takes products only.

    Args:
        matrix: (…, m, n), one or several.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 20)))
        >>> 0.5 < values.min().item() <= values.max().item() < 1.3
        True
    """
    a, b, c = QUINTIC_COEFFICIENTS
    x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(MIN_NORM)
    x = x.mT if _tall(matrix) else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if _tall(matrix) else x
    return found


def orthogonalize_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalize` of each; a GPU, which takes longer to launch a small one than to compute it, gets those of about one size together.

    Args:
        matrices: (m, n) each, of one dtype and device.

    Example:
        >>> [tuple(found.shape) for found in orthogonalize_all([torch.randn(8, 20), torch.randn(30, 7)])]
        [(8, 20), (30, 7)]
    """
    if not matrices or matrices[0].device.type == "cpu":
        return [orthogonalize(matrix) for matrix in matrices]
    return _in_batches(matrices)


def _in_batches(matrices: Sequence[Tensor]) -> list[Tensor]:
    """With zeros at their ends, which change nothing.

    Example:
        >>> several = [torch.randn(8, 20), torch.randn(30, 7), torch.randn(200, 300)]
        >>> all(torch.allclose(one, orthogonalize(x), atol=1e-4) for one, x in zip(_in_batches(several), several))
        True
    """
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at, matrix in enumerate(matrices):
        batches[_rounded(min(matrix.shape), SHORT), _rounded(max(matrix.shape), LONG)].append(at)
    found: list[Tensor] = list(matrices)
    for (short, long), members in batches.items():
        step = max(1, MAX_BATCH_VALUES // (short * long))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            wide = [matrices[at].mT if _tall(matrices[at]) else matrices[at] for at in part]
            done = orthogonalize(torch.stack([F.pad(x, (0, long - x.shape[1], 0, short - x.shape[0])) for x in wide]))
            for at, x, own in zip(part, wide, done, strict=True):
                own = own[: x.shape[0], : x.shape[1]]
                found[at] = own.mT if _tall(matrices[at]) else own
    return found


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


def jittered_cholesky(matrix: Tensor, added: Tensor) -> Tensor:
    """L with `L Lᵀ = matrix + diag(added)`. Moments that were multiplied in float32 may have eigenvalues a little below zero, where the rows do not
    fill the space; what is added then grows tenfold until the factor exists.

    Args:
        matrix: (…, d, d), symmetric.
        added: (…, d), to the diagonal, positive.

    Raises:
        NonFiniteError: no such factor: NaN or Inf in the moments.

    Example:
        >>> tilted = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
        >>> jittered_cholesky(tilted, torch.full((2,), 1e-7, dtype=torch.float64)).diagonal()[1].item() ** 2 > 0
        True
    """
    for _ in range(MAX_JITTER_STEPS):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(added))
        if not bool(failed.any()):
            return factor
        added = JITTER_GROWTH * added
    raise NonFiniteError(
        "the moments of what a layer reads are not finite, or too large to factor; check the images and the weights"
    )


def gram(parts: Iterable[Tensor], total: Tensor) -> Tensor:
    """Σ x·xᵀ over parts (…, d, R), added to `total` (…, d, d) in place; of wide ones the products on and above the diagonal's blocks.

    Example:
        >>> x = torch.randn(600, 50, dtype=torch.float64)
        >>> torch.allclose(gram(x.split(20, 1), torch.zeros(600, 600, dtype=torch.float64)), x @ x.T)
        True
    """
    d = total.shape[-1]
    rows = triangle_bands(d, d if d < MIN_TRIANGLE_COLUMNS else -(-d // NUM_TRIANGLE_BANDS))
    for x in parts:
        for band in rows:
            total[..., band, band.start :] += x[..., band, :] @ x[..., band.start :, :].mT
    mirror_triangle(total, rows)
    return total
