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

GPU_CHUNK_BYTES = 2**27  # of a chunk on a GPU: little of its memory, and products large enough for their launches

# Of the quintic iteration of Muon, tuned by its authors for few steps
QUINTIC_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MIN_NORM = 1e-12
SHORT_SIDE_MULTIPLE, LONG_SIDE_MULTIPLE = 32, 128  # to which matrices are padded in a batch
MAX_BATCH_VALUES = 2**22  # of a batch of several matrices

JITTER_GROWTH, MAX_JITTER_STEPS = 10.0, 16

# Gram matrices of at least this many columns are computed on and above the diagonal only, in this many bands
MIN_TRIANGLE_COLUMNS, NUM_TRIANGLE_BANDS = 512, 8


def chunk_slices(x: Tensor, image_bytes: int, chunk_bytes: int) -> list[slice]:
    """Return slices of images whose working memory is bounded.

    Args:
        x: (N, …), for its length and device.
        image_bytes: Working memory of one image.
        chunk_bytes: Working memory of a chunk on a CPU; on a GPU at least `GPU_CHUNK_BYTES`.

    Examples:
        >>> import torch
        >>> chunk_slices(torch.zeros(5, 1), 100, 250)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    step = max(1, (chunk_bytes if x.device.type == "cpu" else max(chunk_bytes, GPU_CHUNK_BYTES)) // image_bytes)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def triangle_bands(columns: int, band_rows: int) -> list[slice]:
    """Return the rows of each band of a square matrix.

    Examples:
        >>> triangle_bands(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + band_rows, columns)) for start in range(0, columns, band_rows)]


def mirror_triangle(total: Tensor, bands: list[slice]) -> None:
    """Copy the upper triangle of a symmetric (…, d, d) matrix to the blocks below its diagonal bands, in place.

    Examples:
        >>> import torch
        >>> total = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> mirror_triangle(total, triangle_bands(2, 1))
        >>> total.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for band in bands[1:]:
        total[..., band, : band.start] = total[..., : band.start, band].mT


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """Return the further settings of the precision: object, attribute, and the value for full precision."""
    # fp32_precision exists since torch 2.9, allow_tf32 before
    backends = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
        getattr(torch.backends.cudnn, "conv", None),
    ]
    switches: list[tuple[Any, str, Any]] = [
        (backend, "fp32_precision", "ieee") for backend in backends if hasattr(backend, "fp32_precision")
    ]
    return switches or [(torch.backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 in products and convolutions within a context.

    Reduced precision would lose differences of large sums, and small eigenvalues of second moments. PyTorch has two
    settings, `torch.set_float32_matmul_precision` and, since 2.9, `torch.backends.cuda.matmul.fp32_precision`. Both are
    restored.

    Args:
        device: Device type of the autocast.

    Examples:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    switches = [(backend, name, full, getattr(backend, name)) for backend, name, full in _precision_switches()]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The two settings contradict each other, and the first cannot be read
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        for backend, name, full, _ in switches:
            setattr(backend, name, full)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, name, _, previous in switches:
            setattr(backend, name, previous)


def orthogonalize(matrix: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Return a matrix with the singular vectors of another and singular values between about 0.7 and 1.2.

    This approximates the nearest semi-orthogonal matrix with products only.

    Args:
        matrix: (…, m, n), one or several.
        steps: Number of Newton-Schulz steps. With fewer, small singular values stay smaller.

    Examples:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 20)))
        >>> 0.5 < values.min().item() <= values.max().item() < 1.3
        True
    """
    a, b, c = QUINTIC_COEFFICIENTS
    x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(MIN_NORM)
    x = x.mT if _tall(matrix) else x
    # Newton-Schulz iteration: each step maps every singular value s to a s + b s³ + c s⁵, with a fixed region around 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if _tall(matrix) else x
    return result


def orthogonalize_all(matrices: Sequence[Tensor], steps: int = NEWTON_SCHULZ_STEPS) -> list[Tensor]:
    """Orthogonalize several matrices, on a GPU in batches of similar sizes.

    Launching the kernels of a small matrix takes a GPU longer than computing it.

    Args:
        matrices: (m, n) each, of one dtype and device.
        steps: Number of Newton-Schulz steps.

    Examples:
        >>> [tuple(matrix.shape) for matrix in orthogonalize_all([torch.randn(8, 20), torch.randn(30, 7)])]
        [(8, 20), (30, 7)]
    """
    if not matrices or matrices[0].device.type == "cpu":
        return [orthogonalize(matrix, steps) for matrix in matrices]
    return _in_batches(matrices, steps)


def _in_batches(matrices: Sequence[Tensor], steps: int = NEWTON_SCHULZ_STEPS) -> list[Tensor]:
    """Orthogonalize matrices in padded batches; zero rows and columns stay zero.

    Examples:
        >>> several = [torch.randn(8, 20), torch.randn(30, 7), torch.randn(200, 300)]
        >>> all(torch.allclose(one, orthogonalize(x), atol=1e-4) for one, x in zip(_in_batches(several), several))
        True
    """
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        batches[
            _round_up(min(matrix.shape), SHORT_SIDE_MULTIPLE), _round_up(max(matrix.shape), LONG_SIDE_MULTIPLE)
        ].append(i)
    results: list[Tensor] = list(matrices)
    for (short, long), members in batches.items():
        step = max(1, MAX_BATCH_VALUES // (short * long))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            wide = [matrices[i].mT if _tall(matrices[i]) else matrices[i] for i in part]
            padded = torch.stack([F.pad(x, (0, long - x.shape[1], 0, short - x.shape[0])) for x in wide])
            for i, x, result in zip(part, wide, orthogonalize(padded, steps), strict=True):
                result = result[: x.shape[0], : x.shape[1]]
                results[i] = result.mT if _tall(matrices[i]) else result
    return results


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def jittered_cholesky(matrix: Tensor, jitter: Tensor) -> Tensor:
    """Return the Cholesky factor L with `L Lᵀ = matrix + diag(jitter)`; the jitter grows until the factor exists.

    Second moments that were multiplied in float32 may have eigenvalues a little below zero if the samples do not span
    the space.

    Args:
        matrix: (…, d, d), symmetric.
        jitter: Addition to the diagonal, (…, d), positive.

    Raises:
        NonFiniteError: NaN or Inf in the matrix.

    Examples:
        >>> tilted = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
        >>> jittered_cholesky(tilted, torch.full((2,), 1e-7, dtype=torch.float64)).diagonal()[1].item() ** 2 > 0
        True
    """
    for _ in range(MAX_JITTER_STEPS):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(jitter))
        if not bool(failed.any()):
            return factor
        jitter = JITTER_GROWTH * jitter
    raise NonFiniteError(
        "the second moments of a layer's input are not finite, or too large to factor; check the images and the weights"
    )


def gram(parts: Iterable[Tensor], total: Tensor) -> Tensor:
    """Add Σ x·xᵀ over parts (…, d, R) to `total` (…, d, d) in place; wide matrices compute one triangle only.

    Examples:
        >>> x = torch.randn(600, 50, dtype=torch.float64)
        >>> torch.allclose(gram(x.split(20, 1), torch.zeros(600, 600, dtype=torch.float64)), x @ x.T)
        True
    """
    d = total.shape[-1]
    bands = triangle_bands(d, d if d < MIN_TRIANGLE_COLUMNS else -(-d // NUM_TRIANGLE_BANDS))
    for x in parts:
        for band in bands:
            total[..., band, band.start :] += x[..., band, :] @ x[..., band.start :, :].mT
    mirror_triangle(total, bands)
    return total
