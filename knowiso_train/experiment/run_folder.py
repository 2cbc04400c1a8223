"""Folder of a training run: log, checkpoints and results."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import DataError, FormatError, OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.utils.serialization import dump_json, parse_json, replace_file, write_file, write_json

LOG_FILE, SETTINGS_FILE, PROGRESS_FILE = "log.jsonl", "settings.json", "progress.json"
PARTIAL_FOLDER = "partial"


class RunFolder:
    """Checkpoints, weights, a log and JSON files of one run, each file written completely or not at all.

    Args:
        path: Folder; created if it does not exist.
        writes: Write files. False for the other processes of a launch, which only read.

    Raises:
        DataError: The folder cannot be created.

    Example:
        >>> import tempfile
        >>> run = RunFolder(tempfile.mkdtemp())
        >>> run.write_json("card.json", {"epochs": 3})
        >>> run.read_json("card.json"), run.read_json("other.json")
        ({'epochs': 3}, None)
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the folder {self.path} cannot be created: {error}") from error

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a new run, or compare them with those of the run in this folder.

        Raises:
            OptionError: The run in this folder has other settings; the message names them.
        """
        settings = parse_json(dump_json(settings))
        saved = self.read_json(SETTINGS_FILE)
        if saved is None:
            self.write_json(SETTINGS_FILE, settings)
            return
        names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if names:
            changes = "; ".join(f"{name} is {settings.get(name)!r}, was {saved.get(name)!r}" for name in names)
            raise OptionError(
                f"{self.path} holds a run with other settings ({changes}). Choose another folder, or remove that one."
            )

    def save_checkpoint(self, accelerator: Any, progress: Mapping[str, Any]) -> None:
        """Save the accelerator's state, and delete older checkpoints; all processes must call it.

        Args:
            accelerator: Accelerator with the objects of the training.
            progress: Values for `load_checkpoint`, as JSON. `progress["step"]` orders the checkpoints.
        """
        partial = self.path / PARTIAL_FOLDER
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if self.writes:
            write_json(partial / PROGRESS_FILE, progress)
            older = self._checkpoints()
            # Only a complete checkpoint has this name
            partial.rename(self.path / f"checkpoint-{progress['step']:010d}")
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load_checkpoint(self, accelerator: Any) -> dict[str, Any]:
        """Load the newest checkpoint into the accelerator's objects.

        Returns:
            The `progress` of `save_checkpoint`; empty if there is no checkpoint.
        """
        newest = max(self._checkpoints(), default=None)
        if newest is None:
            return {}
        accelerator.load_state(str(newest))
        return self.read_json(f"{newest.name}/{PROGRESS_FILE}") or {}

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints of a finished run."""
        if self.writes:
            for folder in [*self._checkpoints(), self.path / PARTIAL_FOLDER]:
                shutil.rmtree(folder, ignore_errors=True)

    def write_network(self, name: str, model: nn.Module, card: Mapping[str, Any]) -> None:
        """Write the plain state dict of the unwrapped network to `name`.safetensors, then its card to `name`.json."""
        if not self.writes:
            return
        from safetensors.torch import save_file

        weights = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in unwrap_model(model).state_dict().items()
        }
        with replace_file(self.path / f"{name}.safetensors") as partial:
            save_file(weights, partial)
        self.write_json(f"{name}.json", card)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        if self.writes:
            write_json(self.path / name, content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file; return None if it does not exist.

        Raises:
            FormatError: The file is not JSON.
        """
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{path} is not JSON: {error}; remove it, or start over in another folder") from error
        return content

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        if self.writes:
            with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(dump_json(entry, indent=None) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log, without lines that are incomplete because the process was killed."""
        path = self.path / LOG_FILE
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entries.append(parse_json(line))
            except ValueError:
                continue
        return entries

    def truncate_log(self, part: Mapping[str, Any], step: int) -> None:
        """Remove the log entries of one part of the run beyond a step, which a resumed training will repeat.

        Args:
            part: Keys and values of the entries of this part, such as {"arm": "student"}.
            step: Last step to keep.
        """
        if self.writes:
            entries = [entry for entry in self.read_log() if entry["step"] <= step or not part.items() <= entry.items()]
            write_file(self.path / LOG_FILE, "".join(dump_json(entry, indent=None) + "\n" for entry in entries))

    def _checkpoints(self) -> list[Path]:
        return list(self.path.glob("checkpoint-*"))
