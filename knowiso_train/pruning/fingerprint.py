"""Tells whether a network is the one that was saved: by its weights to the bit, by its output within rounding."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knowiso_train.errors import FormatError, InputTypeError, NonFiniteError, OptionError
from knowiso_train.features import bare
from knowiso_train.features.state import undisturbed
from knowiso_train.statistics.hashing import hash_unit

PROJECTIONS, TOLERANCE = 8, 1e-4


@dataclass(frozen=True)
class Probe:
    """A network's answer to an input that every machine can make again.

    Attributes:
        shape: of the input.
        seed: of the input and of the projections.
        norm: of the output, all its tensors as one vector.
        projections: of the output onto vectors of random signs, each about as large as the norm.
    """

    shape: tuple[int, ...]
    seed: int
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, shape: Sequence[int], seed: int = 0) -> Probe:
        """Run a network, or a copy of it where it is elsewhere than on the CPU in float32; modes and random state are left as they were.

        Args:
            model: takes one float tensor and gives tensors, alone or in tuples and mappings.
            shape: of the input.
            seed: of input and projections.

        Raises:
            OptionError: the network does not take such an input.
            NonFiniteError: NaN or Inf in the output.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> probe = Probe.of(model, (1, 3))
            >>> probe.check(Probe.of(model, (1, 3)), "the model")
            >>> len(probe.projections)
            8
        """
        model = bare(model)
        if any(tensor.is_floating_point() and (tensor.device.type, tensor.dtype) != ("cpu", torch.float32) for tensor in model.state_dict().values()):
            model = copy.deepcopy(model).cpu().float()
        numbers = hash_unit(np.arange(math.prod(shape)), seed)
        example = torch.from_numpy((numbers - 0.5) * math.sqrt(12)).float().view(tuple(shape))  # mean 0, variance 1
        with undisturbed(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                output = model(example)
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
                reason = str(error).partition("\n")[0]
                raise OptionError(
                    f"{type(model).__name__} does not take the probe, a float tensor of shape {tuple(shape)} ({type(error).__name__}: {reason})."
                ) from error
        vector = torch.cat([tensor.double().flatten() for tensor in _tensors(output)])
        if not vector.isfinite().all():
            raise NonFiniteError(f"the output of {type(model).__name__} for the probe input of shape {tuple(shape)} is not finite")
        return cls(tuple(shape), seed, float(vector.norm()), tuple(_projection(vector, seed, 1 + row) for row in range(PROJECTIONS)))

    def check(self, other: Probe, what: str) -> None:
        """Compare with the probe of another network.

        Args:
            other: what arrived.
            what: for the message.

        Raises:
            FormatError: the outputs differ by more than 1e-4 of their norm.
        """
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        off = max(abs(mine - theirs) for mine, theirs in pairs) / max(self.norm, 1e-12)
        if not off <= TOLERANCE:
            raise FormatError(
                f"{what} does not compute what the pruned network computed: for the probe input of shape {self.shape} an output of norm "
                f"{self.norm:.6g} was expected and {other.norm:.6g} arrived; they differ by {off:.2g} of it, at most {TOLERANCE:g} is rounding."
            )


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    Example:
        >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _projection(vector: Tensor, seed: int, stream: int) -> float:
    signs = torch.from_numpy(np.sign(hash_unit(np.arange(len(vector)), seed, stream) - 0.5))
    return float(vector @ signs)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)) and output:
        return [tensor for entry in output for tensor in _tensors(entry)]
    raise InputTypeError(f"expected a network that gives tensors, alone or in tuples and mappings, got {type(output).__name__}")
