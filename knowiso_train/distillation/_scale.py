"""Logarithmic scale of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowiso_train.utils.distributed import ProcessGroup

# Summand of the share in log scale; bounds the gradient of a pair that is nearly explained
LOG_SHARE_OFFSET = 1e-3
# Explained share from which the student gets the whole gradient of a pair in log scale. Without this factor students
# had dead units with weights of 1,000, and at a weight of 50 without normalization or with learned maps
FULL_GRADIENT_SHARE = 0.05
# Unexplained share above which the gradient of a learned map is bounded. With 1 maps recovered more slowly from steps
# that were too large, with 10 they moved further away
LARGE_SHARE = 3.0


def log_share(unexplained: Tensor) -> Tensor:
    """Return `log(u + 1e-3)` of an unexplained share u; 0 for u = 0, of an unsolved map or a constant target.

    Examples:
        >>> log_share(torch.tensor([0.0, 0.009, 0.999]))
        tensor([ 0.0000, -4.6052,  0.0000])
    """
    return torch.where(unexplained == 0, torch.zeros_like(unexplained), (unexplained + LOG_SHARE_OFFSET).log())


def map_reliability(unexplained: Tensor) -> Tensor:
    """Return the factor `min(1, (1 - u) / 0.05)` of a pair's gradient, 0 where its map explains nothing.

    Through a map that fits the present features worse than a constant, the gradient has no meaning. The factor is 0
    until the map explains something.

    Examples:
        >>> map_reliability(torch.tensor([0.0, 0.9, 0.96, 1.2]))
        tensor([1.0000, 1.0000, 0.8000, 0.0000])
    """
    return ((1 - unexplained.detach()) / FULL_GRADIENT_SHARE).clamp(0, 1)


def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the product with a factor that float16 may not hold, in the precision of the gradient.

    Examples:
        >>> scaled_gradient(torch.full((1,), 1e-4, dtype=torch.float16), torch.tensor(1e5)).round()
        tensor([10.], dtype=torch.float16)
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(dtype) * factor.to(gradient.device, dtype)).to(gradient.dtype)


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return the norm of a gradient in at least float32.

    Examples:
        >>> gradient_norm(torch.full((4,), 300.0, dtype=torch.float16))
        tensor(600.)
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
    return norm


def joint_shares(shares: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the mean shares of all processes, each with the gradient of this process's own share. Collective.

    DDP averages gradients: the mean of `∇u_r / (ū + ε)` over processes r is the gradient of `log(ū + ε)` of the joint
    batch, and the mean of `∇u_r / (u_r + ε)` is not. Processes with a share of 0, thus without images, do not count.

    Args:
        shares: Unexplained share of this process's batch for every pair, scalars; 0 without images.
        group: Processes.

    Examples:
        >>> joint_shares([torch.tensor(0.5)], ProcessGroup())
        [tensor(0.5000)]
    """
    if group.size == 1:
        return list(shares)
    own = torch.stack([share.detach().to(group.device, torch.float64) for share in shares])
    sums = torch.stack([own, (own != 0).double()])
    group.sum_(sums)
    means = sums[0] / sums[1].clamp(min=1)
    return [share + (mean.to(share) - share).detach() for share, mean in zip(shares, means, strict=True)]


def separate_log_gradients(map_loss: Tensor, unexplained: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `w log(u + ε)` with the gradient of a learned map's own loss, and the factor for that of the feature.

    The factors w and 1 / u would change the learning rate of the map. Where u is above 3, the map's gradient is
    multiplied by 3 / u and equals that of 3 log u. Otherwise each step that is too large leads to a larger one.
    Multiplied by the returned factor, the gradient of the feature is `w ∇u / (u + ε)`.

    Args:
        map_loss: Loss of the map, with gradient.
        unexplained: Unexplained share, without gradient.
        weight: Weight w of the pair.

    Examples:
        >>> u = torch.tensor(9.0, requires_grad=True)
        >>> loss, factor = separate_log_gradients(u, u.detach(), torch.tensor(2.0))
        >>> (own,) = torch.autograd.grad(loss, u)
        >>> round(float(own), 4), round(float(factor * own), 4)
        (0.3333, 0.2222)
    """
    divisor = (unexplained / LARGE_SHARE).clamp(min=1)
    own_loss = map_loss / divisor
    term = own_loss + (weight * log_share(unexplained) - own_loss).detach()
    return term, weight * divisor / (unexplained + LOG_SHARE_OFFSET)


def log_term(
    map_loss: Tensor, unexplained: Tensor, weight: Tensor, source: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of a pair in log scale, and the factor of its gradient beside the weight.

    The gradient of the feature is `w f ∇u / (u + ε)` with the returned factor f, see `map_reliability`.

    Args:
        map_loss: Loss of the map, with gradient.
        unexplained: Unexplained share; without gradient if the map is learned.
        weight: Weight w of the pair.
        source: Feature of the student, a tensor that only this pair uses.
        learned: Whether the map is trained by the gradient of its own loss.
    """
    reliability = factor = map_reliability(unexplained)
    if learned:
        term, log_factor = separate_log_gradients(map_loss, unexplained, weight)
        factor = reliability * log_factor
    else:
        term = weight * log_share(unexplained)
    if source.requires_grad:
        source.register_hook(lambda gradient: scaled_gradient(gradient, factor))  # type: ignore[no-untyped-call]
    return term, reliability
