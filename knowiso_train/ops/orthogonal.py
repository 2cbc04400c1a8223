"""Matrices with all singular values made one, nearly: what steps of orthogonalised momentum are made of (K. Jordan et al., *Muon*, 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned by its authors for few rounds
ROUNDS = 5
SMALLEST = 1e-12
SHORT, LONG = 32, 128  # sides of a batch are multiples of these
AT_ONCE = 2**22  # values of a batch, at most, but one matrix


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the nearest matrix whose singular values are one: between 0.7 and 1.2, which serves as well and takes products only.

    Args:
        matrix: (…, m, n), one or several.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalised(torch.randn(8, 20)))
        >>> 0.5 < values.min().item() <= values.max().item() < 1.3
        True
    """
    a, b, c = COEFFICIENTS
    x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(SMALLEST)
    x = x.mT if _tall(matrix) else x
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if _tall(matrix) else x
    return found


def all_orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalised` of each; a GPU, which takes longer to launch a small one than to compute it, gets those of about one size together.

    Args:
        matrices: (m, n) each, of one dtype and device.

    Example:
        >>> [tuple(found.shape) for found in all_orthogonalised([torch.randn(8, 20), torch.randn(30, 7)])]
        [(8, 20), (30, 7)]
    """
    if not matrices or matrices[0].device.type == "cpu":
        return [orthogonalised(matrix) for matrix in matrices]
    return _in_batches(matrices)


def _in_batches(matrices: Sequence[Tensor]) -> list[Tensor]:
    """With zeros at their ends, which change nothing.

    Example:
        >>> several = [torch.randn(8, 20), torch.randn(30, 7), torch.randn(200, 300)]
        >>> all(torch.allclose(one, orthogonalised(x), atol=1e-4) for one, x in zip(_in_batches(several), several))
        True
    """
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at, matrix in enumerate(matrices):
        batches[_rounded(min(matrix.shape), SHORT), _rounded(max(matrix.shape), LONG)].append(at)
    found: list[Tensor] = list(matrices)
    for (short, long), members in batches.items():
        step = max(1, AT_ONCE // (short * long))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            wide = [matrices[at].mT if _tall(matrices[at]) else matrices[at] for at in part]
            done = orthogonalised(torch.stack([F.pad(x, (0, long - x.shape[1], 0, short - x.shape[0])) for x in wide]))
            for at, x, own in zip(part, wide, done, strict=True):
                own = own[: x.shape[0], : x.shape[1]]
                found[at] = own.mT if _tall(matrices[at]) else own
    return found


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
