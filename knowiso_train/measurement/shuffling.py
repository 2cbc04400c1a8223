"""Targets of other images, for the noise floor."""

from __future__ import annotations

from torch import Tensor


class Shuffler:
    """Pairs every image with the target of another one of the same role: the next in its batch, so that the pairing does not depend on processes.

    An image that is alone in its batch takes the target that was seen last; only a role with a single image at all keeps its own.

    Example:
        >>> y = torch.arange(4.0).view(4, 1, 1, 1)
        >>> Shuffler()(y, torch.tensor([0, 1, 0, 0])).flatten().tolist()
        [2.0, 1.0, 3.0, 0.0]
    """

    def __init__(self) -> None:
        self._last: dict[int, Tensor] = {}

    def __call__(self, y: Tensor, role: Tensor) -> Tensor:
        """(N, C, H, W) targets and (N,) roles → targets of other images."""
        result = y.clone()
        for value in sorted(set(role.tolist())):
            members = (role == value).nonzero().flatten().to(y.device)
            if len(members) > 1:
                result[members] = y[members.roll(-1)]
            elif value in self._last:
                result[members] = self._last[value].to(y)
            self._last[value] = y[members[-1:]].clone()
        return result
