"""Folder of a training run: log, checkpoints and results."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from knowiso_train.errors import DataError, FormatError, OptionError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.loading.model_card import loading_code, write_model_card
from knowiso_train.utils.serialization import dump_json, parse_json, read_json, write_file, write_json, write_tensors

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOG_FILE, SETTINGS_FILE, PROGRESS_FILE = "log.jsonl", "settings.json", "progress.json"
# Settings that may differ when a run is resumed
RESUMABLE_SETTINGS = ("arms", "workers", "log_every", "save_every", "data_dir")
PARTIAL_FOLDER, DELETED_PREFIX = "partial", "deleted-"
# Open descriptors of the folders that this process has locked, by device and inode; closing one releases the lock
_LOCKS: dict[tuple[int, int], int] = {}


class RunFolder:
    """Checkpoints, weights, a log and JSON files of one run, each file written completely or not at all.

    One process writes to a folder at a time. Its lock ends with the process, also with one that is killed.

    Args:
        path: Folder; created if it does not exist.
        writes: Write files. False for the other processes of a launch, which only read.

    Raises:
        DataError: The folder cannot be created, or another process writes to it.

    Examples:
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
        if writes:
            _lock(self.path)

    def check_settings(self, settings: Mapping[str, Any], *, may_differ: Collection[str] = ()) -> None:
        """Compare the settings with those of the run in this folder, if there is one, and write them.

        Arms, workers, intervals and the folder of the data may differ.

        Args:
            settings: Settings, as JSON.
            may_differ: Names of further settings that may differ.

        Raises:
            OptionError: The run in this folder has other settings; the message names them.
        """
        settings = parse_json(dump_json(settings))
        saved = self.read_json(SETTINGS_FILE)
        if saved is None:
            self.write_json(SETTINGS_FILE, settings)
            return
        different = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        names = [name for name in different if name not in (*RESUMABLE_SETTINGS, *may_differ)]
        if names:
            changes = "; ".join(f"{name} is {settings.get(name)!r}, was {saved.get(name)!r}" for name in names)
            raise OptionError(
                f"{self.path} holds a run with other settings ({changes}). Choose another folder, or remove that one."
            )
        if different:
            self.write_json(SETTINGS_FILE, settings)

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
            folder = self.path / f"checkpoint-{progress['step']:010d}"
            older = [checkpoint for checkpoint in self._checkpoints() if checkpoint != folder]
            if folder.exists():
                # A resumed training saves its first step again; both checkpoints are complete
                older.append(folder.rename(f"{folder}-replaced"))
            # Only a complete checkpoint has this name
            partial.rename(folder)
            self._delete(older)
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
            self._delete([*self._checkpoints(), self.path / PARTIAL_FOLDER])

    def write_network(self, name: str, model: nn.Module, card: Mapping[str, Any]) -> None:
        """Write the plain state dict of the unwrapped network to `name`.safetensors, then its card to `name`.json.

        A card with the code that loads the network also becomes a model card, `README.md`.
        """
        if not self.writes:
            return
        write_tensors(self.path / f"{name}.safetensors", unwrap_model(model).state_dict())
        self.write_json(f"{name}.json", card)
        if "load" in card:
            write_model_card(
                self.path,
                f"{card.get('architecture', name)}, {self.path.name}",
                "Trained with knowiso_train. `settings.json` of the run repeats it with `--config`.",
                loading_code(card["load"].replace("FILE", f"{name}.safetensors")),
                library="transformers" if "transformers" in card["load"] else "timm",
                figures={key: card[key] for key in ("parameters", "top1") if key in card},
            )

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        if self.writes:
            write_json(self.path / name, content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of an object; return None if it does not exist.

        Raises:
            FormatError: The file is no JSON, or no object.
        """
        path = self.path / name
        if not path.is_file():
            return None
        content = read_json(path)
        if not isinstance(content, dict):
            raise FormatError(
                f"expected a JSON object in {path}, got {type(content).__name__}; remove it, or start over in another "
                "folder"
            )
        return content

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        if self.writes:
            path = self.path / LOG_FILE
            line = dump_json(entry, indent=None) + "\n"
            # A killed process may have left half a line, which the next entry must not continue
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log, without lines that are incomplete because the process was killed."""
        path = self.path / LOG_FILE
        entries = []
        # Only "\n" ends a line: text values may hold other line separators
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries

    def truncate_log(self, part: Mapping[str, Any], step: int) -> None:
        """Remove the log entries of one part of the run beyond a step, which a resumed training will repeat.

        Args:
            part: Keys and values of the entries of this part, such as {"arm": "student"}.
            step: Last step to keep.
        """
        if self.writes:
            entries = [
                entry for entry in self.read_log() if entry.get("step", 0) <= step or not part.items() <= entry.items()
            ]
            write_file(self.path / LOG_FILE, "".join(dump_json(entry, indent=None) + "\n" for entry in entries))

    def _checkpoints(self) -> list[Path]:
        return list(self.path.glob("checkpoint-*"))

    def _delete(self, folders: list[Path]) -> None:
        """Delete folders, each under another name first: a killed process leaves no half of a checkpoint."""
        for folder in folders:
            if folder.exists():
                folder.rename(folder.with_name(DELETED_PREFIX + folder.name))
        for folder in self.path.glob(f"{DELETED_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> None:
    """Lock a folder for this process until it ends; nothing happens where the file system has no locks.

    Raises:
        DataError: Another process holds the lock.
    """
    status = os.stat(folder)
    key = (status.st_dev, status.st_ino)
    if fcntl is None or key in _LOCKS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(
            f"another process writes to the run in {folder}; wait for its end, or choose another folder"
        ) from error
    except OSError:
        os.close(descriptor)
        return
    _LOCKS[key] = descriptor


def _close_locks() -> None:
    """Close the descriptors of a forked process, such as a loader's worker, which would keep the parent's locks."""
    while _LOCKS:
        os.close(_LOCKS.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
