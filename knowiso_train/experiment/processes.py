"""Processes of one launch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import torch

from knowiso_train.errors import OptionError
from knowiso_train.features.state import checked_device

if TYPE_CHECKING:
    from accelerate import Accelerator

WAIT_HOURS = 12  # for the main process, while it prunes or refines alone


def main_process_first() -> AbstractContextManager[Any]:
    """Let the first process of each machine run the context before the others, as for a download.

    Examples:
        >>> with main_process_first():
        ...     pass
    """
    from accelerate import PartialState

    return PartialState().local_main_process_first()  # type: ignore[no-any-return]


class Processes:
    """Device and rank of this process in an `accelerate launch`, or of a single process.

    The context leaves the process group of several processes at its end.

    Args:
        device: Device to use. None: selected by accelerate. With several processes only the type ("cpu") can be given.

    Raises:
        OptionError: The device does not exist, or cannot be used by all processes.

    Examples:
        >>> with Processes("cpu") as processes:
        ...     processes.is_main, processes.device.type
        (True, 'cpu')
    """

    def __init__(self, device: str | None = None) -> None:
        from accelerate import PartialState

        requested = checked_device(device)
        on_cpu = requested is not None and requested.type == "cpu"
        self._state = PartialState(cpu=True) if on_cpu else PartialState()
        self.device: torch.device = self._state.device
        if requested is not None and requested not in (self.device, torch.device(self.device.type)):
            if self._state.num_processes > 1:
                raise OptionError(
                    f"device {device!r} cannot be used by all {self._state.num_processes} processes; "
                    "leave the device to accelerate"
                )
            self.device = requested

    @property
    def is_main(self) -> bool:
        """True in the process that prints and writes files."""
        return bool(self._state.is_main_process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._state.num_processes > 1:
            self._state.destroy_process_group()


def launch_accelerator(batch_size: int, mixed_precision: str | None = None, accumulate: int = 1) -> Accelerator:
    """Create the accelerator of a recipe, in which a batch is split over the processes.

    The number of processes thus has no effect on the batches.

    Args:
        batch_size: Images per batch, in all processes together.
        mixed_precision: "no", "bf16" or "fp16". None: as configured by `accelerate launch`.
        accumulate: Batches per update.

    Raises:
        OptionError: A batch size that the number of processes does not divide, or fp16 on a CPU.

    Examples:
        >>> launch_accelerator(8).num_processes
        1
    """
    from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs

    options: dict[str, Any] = {
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(hours=WAIT_HOURS))],
    }
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate, **options)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError("fp16 needs a GPU; on a CPU use --mixed-precision bf16 or no")
    if batch_size % accelerator.num_processes:
        raise OptionError(f"--batch-size {batch_size} cannot be divided among {accelerator.num_processes} processes")
    return accelerator
