"""Checkpoints of a training as stages, in the layouts of timm, Trainer, Lightning, accelerate and of plain files."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from knowiso_train.diagnosis.comparison._digests import file_digest
from knowiso_train.errors import DataError, InputTypeError, OptionError
from knowiso_train.loading.checkpoints import CHECKPOINT_SUFFIXES, load_checkpoint, weight_files
from knowiso_train.utils.validation import validate_arguments

# Words before a number, the finer one first; other numbers count if they stand alone, as in "checkpoint-12"
NUMBER_PATTERNS = {
    "step": r"(?:step|iteration|iter)s?[-_=]?(\d+)",
    "epoch": r"(?:epoch|ep)s?[-_=]?(\d+)",
    "": r"(?<![A-Za-z\d.])(\d+)(?![A-Za-z\d]|\.\d)",
}
CHECKPOINTS_FOLDER = "checkpoints"  # of Lightning and accelerate, within the folder of a run


@dataclass(frozen=True)
class CheckpointStage:
    """Checkpoint whose network is made and loaded when it is called.

    Attributes:
        name: Name of the file or folder without its suffix.
        step: Number in that name.
        path: Weight file, or folder with weights.
        make_network: Function that returns the network without the checkpoint's weights.
        in_order: Assign tensors in order if their names differ and their shapes agree.
    """

    name: str
    step: int
    path: Path
    make_network: Callable[[], nn.Module]
    in_order: bool = False

    def __call__(self) -> nn.Module:
        """Return the network with the weights of the checkpoint.

        Raises:
            FormatError: Weights of another network, or a file that would run code when it is read.
            InputTypeError: `make_network` does not return a network.
        """
        network = self.make_network()
        if not isinstance(network, nn.Module):
            raise InputTypeError(f"make_network must return a network, got {type(network).__name__}")
        load_checkpoint(network, self.path, in_order=self.in_order)
        return network

    def digest(self) -> str:
        """Return a digest of the weight files."""
        return file_digest(weight_files(self.path))


@validate_arguments
def checkpoint_stages(
    source: str | Path, make_network: Callable[[], nn.Module], *, in_order: bool = False
) -> list[CheckpointStage]:
    """Return the checkpoints of a training as stages for `compare_stages`, in the order of their steps or epochs.

    Nothing is loaded before a stage is called. Files are read without running code (`weights_only`, safetensors).

    Args:
        source: Folder of the run, or a glob of files or folders. In a folder, names without a number, such as
            `last.pth.tar`, are left out. A checkpoint is a weight file, or a folder with `model.safetensors` or
            `pytorch_model.bin`, whole or in shards.
        make_network: Function that returns the network without the checkpoint's weights.
        in_order: Assign tensors in order if their names differ and their shapes agree.

    Raises:
        DataError: No checkpoints, or several of one number.
        OptionError: A glob that selects a name without a number, or numbers of different kinds.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> for epoch in (2, 10):
        ...     torch.save(nn.Linear(2, 2).state_dict(), f"{folder}/epoch-{epoch}.pth")
        >>> stages = checkpoint_stages(folder, lambda: nn.Linear(2, 2))
        >>> [stage.step for stage in stages], stages[-1]()
        ([2, 10], Linear(in_features=2, out_features=2, bias=True))
    """
    is_folder = Path(source).is_dir()
    paths = _in_folder(Path(source)) if is_folder else [Path(path) for path in sorted(glob.glob(str(source)))]
    numbers = {path: _number(path) for path in paths}
    named = [path.name for path, number in numbers.items() if number is None]
    if named and not is_folder:
        raise OptionError(f"expected a step or epoch in the name of each checkpoint, got {named[0]!r}; narrow the glob")
    numbered = {path: number for path, number in numbers.items() if number is not None}
    if not numbered:
        raise DataError(
            f"expected checkpoints with a step or epoch in their names at {source}, got "
            f"{', '.join(named[:6]) or 'none'}; pass a folder or a glob of {', '.join(CHECKPOINT_SUFFIXES)} files"
        )
    kinds = {kind: path.name for path, (kind, _) in numbered.items()}
    if len(kinds) > 1:
        raise OptionError(f"expected steps alone or epochs alone, got {' and '.join(kinds.values())}; use a glob")
    by_step: dict[int, Path] = {}
    for path, (_, step) in numbered.items():
        if step in by_step:
            raise DataError(f"{by_step[step].name} and {path.name} have the same number; select one with a glob")
        by_step[step] = path
    return [CheckpointStage(_stem(path), step, path, make_network, in_order) for step, path in sorted(by_step.items())]


def _in_folder(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, or in the folder "checkpoints" in it."""
    paths = [path for path in sorted(folder.iterdir()) if _is_checkpoint(path)]
    inner = folder / CHECKPOINTS_FOLDER
    if not any(map(_number, paths)) and inner.is_dir():
        return [path for path in sorted(inner.iterdir()) if _is_checkpoint(path)]
    return paths


def _is_checkpoint(path: Path) -> bool:
    return bool(weight_files(path)) if path.is_dir() else path.suffix in CHECKPOINT_SUFFIXES


def _stem(path: Path) -> str:
    name = path.name
    while not path.is_dir() and Path(name).suffix in CHECKPOINT_SUFFIXES:
        name = Path(name).stem
    return name


def _number(path: Path) -> tuple[str, int] | None:
    """Return the kind of the number in a checkpoint's name, and the number."""
    for kind, pattern in NUMBER_PATTERNS.items():
        if numbers := re.findall(pattern, _stem(path)):
            return kind, int(numbers[-1])
    return None
