"""What a layer makes of the channels that it reads: the regression that pruning asks about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.statistics import Moments


def regression_weight(weight: Tensor) -> Tensor:
    """A convolution's (C_out, C, k, k) or a linear layer's (C_out, C) weight as a regression's (k² · C, C_out), in the order of `ops.patch_rows`.

    Example:
        >>> regression_weight(torch.zeros(5, 3, 3, 3)).shape
        torch.Size([27, 5])
    """
    return weight.T if weight.ndim == 2 else weight.permute(2, 3, 1, 0).flatten(0, 2)


def conv_columns(channels: int, kernel_size: int = 1) -> Tensor:
    """(C, k²): the columns of each channel among those of `ops.patch_rows`.

    Example:
        >>> conv_columns(2, 3)[1].tolist()
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    return torch.arange(kernel_size**2 * channels).view(-1, channels).T.contiguous()


@dataclass(frozen=True)
class Consumer:
    """One layer that reads a group of channels.

    Attributes:
        name: for messages.
        xx: (d, d), second moments of its input rows about their mean, per row.
        weight: (d, c), the layer's weights as regression weights.
        columns: (J, m), the columns of each of the group's J channels: m = k² for a convolution, more where a flatten repeats a channel. Columns of
            no channel belong to other groups, and stay.
        variance: of its output, summed over its channels: what the cost of a removal is held against.
    """

    name: str
    xx: Tensor
    weight: Tensor
    columns: Tensor
    variance: float

    @classmethod
    def of(cls, name: str, moments: Moments, weight: Tensor, columns: Tensor) -> Consumer:
        """From the moments of the layer's input and its weight.

        Args:
            name: for messages.
            moments: with the layer's input as the source; the target is not read.
            weight: (C_out, C, k, k) or (C_out, C).
            columns: (J, m), see `conv_columns`.

        Raises:
            ShapeError: a weight for other columns than the moments have, or channels that share columns.
            NonFiniteError: NaN or Inf in the moments.
            OptionError: moments of no rows.

        Example:
            >>> from knowiso_train.statistics import batch_moments
            >>> x = torch.randn(64, 4, 5, 5)
            >>> consumer = Consumer.of("conv", batch_moments(x, x, 3), torch.randn(8, 4, 3, 3), conv_columns(4, 3))
            >>> consumer.columns.shape
            torch.Size([4, 9])
        """
        matrix, d = regression_weight(weight.detach()).double(), len(moments.mean_x)
        if len(matrix) != d:
            raise ShapeError(f"{name}: weight of shape {tuple(weight.shape)} reads {len(matrix)} columns, the moments have {d}")
        flat = columns.flatten()
        if columns.ndim != 2 or flat.numel() == 0 or int(flat.min()) < 0 or int(flat.max()) >= d or len(set(flat.tolist())) != len(flat):
            raise ShapeError(f"{name}: expected columns (J, m) that differ and lie within {d}, got shape {tuple(columns.shape)}")
        if not float(moments.count) > 0:
            raise OptionError(f"{name}: no rows were seen; give some images")
        xx = moments.xx.double() / moments.count
        if not bool(xx.isfinite().all()):
            raise NonFiniteError(f"{name}: NaN or Inf in what this layer reads")
        return cls(name, xx, matrix, columns, float((matrix * (xx @ matrix)).sum()))
