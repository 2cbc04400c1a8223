"""Folder of a training run: log, checkpoints and results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import DataError, FormatError, OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.utils.serialization import dump_json, parse_json, replace_file, write_file, write_json

PARTIAL_SUFFIX = "partial"


class RunFolder:
    """States, weights, a log and JSON files, each written under another name first and then renamed.

    Args:
        path: the folder; made where it is missing.
        writes: whether this process writes. The others of an `accelerate launch` read.

    Raises:
        DataError: the folder cannot be made.

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
            raise DataError(f"the folder {self.path} cannot be made: {error}") from error

    def claim(self, settings: Mapping[str, Any]) -> None:
        """One folder, one set of settings: the first claim writes them to settings.json, a later one must bring the same.

        Raises:
            OptionError: other settings than those that began the run; the message names them.
        """
        wanted = parse_json(dump_json(settings))
        before = self.read_json("settings.json")
        if before is None:
            self.write_json("settings.json", wanted)
            return
        names = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
        if names:
            changes = "; ".join(f"{name} is {wanted.get(name)!r}, was {before.get(name)!r}" for name in names)
            raise OptionError(
                f"{self.path} holds a run with other settings ({changes}). Choose another folder, or remove that one."
            )

    def save_state(self, accelerator: Any, progress: Mapping[str, Any]) -> None:
        """`accelerator.save_state`, whole or not at all; older states are removed after it. Every process calls it.

        Args:
            accelerator: accelerate's.
            progress: what `load_state` is to return, for JSON; `progress["step"]` orders the states.
        """
        partial = self.path / PARTIAL_SUFFIX
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if self.writes:
            write_json(partial / "progress.json", progress)
            older = list(self.path.glob("state-*"))
            partial.rename(self.path / f"state-{progress['step']:010d}")
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load_state(self, accelerator: Any) -> dict[str, Any]:
        """The newest complete state, where there is one: into the accelerator's objects, and its progress as it was saved; else an empty dict."""
        newest = max(self.path.glob("state-*"), default=None)
        if newest is None:
            return {}
        accelerator.load_state(str(newest))
        return self.read_json(f"{newest.name}/progress.json") or {}

    def remove_states(self) -> None:
        """For a run that has ended."""
        if self.writes:
            for folder in [*self.path.glob("state-*"), self.path / PARTIAL_SUFFIX]:
                shutil.rmtree(folder, ignore_errors=True)

    def write_network(self, name: str, model: nn.Module, card: Mapping[str, Any]) -> None:
        """`name`.safetensors, the plain state dict of the bare network, and `name`.json, what to know to load it. The JSON comes last."""
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
        """A JSON file, indented; what JSON does not know, such as paths, as text."""
        if self.writes:
            write_json(self.path / name, content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None where there is none.

        Raises:
            FormatError: it is not JSON.
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
        """Append one line to log.jsonl."""
        if self.writes:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(dump_json(entry, indent=None) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Lines of log.jsonl; one that a kill cut off is left out."""
        path = self.path / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entries.append(parse_json(line))
            except ValueError:
                continue
        return entries

    def keep_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines of log.jsonl: those of steps that a resumed run does again."""
        if self.writes:
            lines = [dump_json(entry, indent=None) + "\n" for entry in self.read_log() if keep(entry)]
            write_file(self.path / "log.jsonl", "".join(lines))
