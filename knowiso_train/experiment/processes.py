"""Processes of one launch."""

from __future__ import annotations

import torch

from knowiso_train.errors import OptionError


class Processes:
    """The processes of an `accelerate launch`, or this one alone.

    Args:
        device: overrides accelerate's choice; with several processes only its kind can be overridden ("cpu").

    Raises:
        OptionError: no such device.

    Example:
        >>> processes = Processes("cpu")
        >>> processes.is_main, processes.device.type
        (True, 'cpu')
    """

    def __init__(self, device: str | None = None) -> None:
        from accelerate import PartialState

        wanted = _checked(device)
        self._state = PartialState(cpu=True) if wanted is not None and wanted.type == "cpu" else PartialState()
        self.device: torch.device = self._state.device
        if wanted is not None and wanted != self.device and wanted != torch.device(self.device.type):
            if self._state.num_processes > 1:
                raise OptionError(
                    f"device {device!r} cannot be given to all {self._state.num_processes} processes; leave the device to accelerate"
                )
            self.device = wanted

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return bool(self._state.is_main_process)

    def close(self) -> None:
        """Leave the process group, where there is one."""
        if self._state.num_processes > 1:
            self._state.destroy_process_group()


def _checked(device: str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise OptionError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return wanted
