"""Tests of strict JSON and atomic writes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from knowiso_train.errors import DataError, InputTypeError
from knowiso_train.utils import serialization
from knowiso_train.utils.serialization import dump_json, parse_json, replace_file, write_file, write_json


def strict(text: str) -> object:
    """Parse JSON that has no bare NaN or Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"a bare {name}"))


def test_non_finite_floats_survive_the_round_trip_as_strict_json() -> None:
    values = {"up": math.inf, "down": -math.inf, "none": math.nan, "nested": [{"x": (math.inf, 1.5)}]}
    text = dump_json(values)
    assert strict(text) == {"up": "Infinity", "down": "-Infinity", "none": "NaN", "nested": [{"x": ["Infinity", 1.5]}]}
    parsed = parse_json(text)
    assert math.isnan(parsed.pop("none"))
    assert parsed == {"up": math.inf, "down": -math.inf, "nested": [{"x": [math.inf, 1.5]}]}


def test_scalars_paths_and_torch_types_become_plain_values() -> None:
    values = {
        "float32": np.float32(0.5),
        "int64": np.int64(3),
        "bool": np.bool_(True),
        "infinite": np.float32(np.inf),
        "tensor": torch.tensor(2.0),
        "path": Path("a") / "b",
        "dtype": torch.float64,
        "device": torch.device("cpu"),
        2: "integer key",
    }
    assert parse_json(dump_json(values)) == {
        "float32": 0.5,
        "int64": 3,
        "bool": True,
        "infinite": math.inf,
        "tensor": 2.0,
        "path": str(Path("a") / "b"),
        "dtype": "torch.float64",
        "device": "cpu",
        "2": "integer key",
    }


@pytest.mark.parametrize("value", [{1, 2}, np.zeros(2), torch.zeros(2), object(), 1j])
def test_unsupported_values_raise_with_their_place(value: object) -> None:
    with pytest.raises(InputTypeError, match=rf"{type(value).__name__} at \['settings'\]\[1\]"):
        dump_json({"settings": [0, value]})


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "{"])
def test_text_that_is_not_strict_json_raises(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|Expecting"):
        parse_json(text)


def test_values_that_cannot_be_serialized_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_json(path, {"a": 1})
    with pytest.raises(InputTypeError):
        write_json(path, {"a": object()})
    assert parse_json(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["card.json"]


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    write_file(path, b"old")

    def interrupted_write() -> None:
        with replace_file(path) as partial:
            partial.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_the_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(serialization.os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(serialization.os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_file(tmp_path / "new" / "note.txt", "α")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "new" / "note.txt").read_text(encoding="utf-8") == "α"


def test_symbolic_links_stay_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("")
    write_file(tmp_path / "atomic.txt", "")
    assert (tmp_path / "atomic.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@pytest.mark.parametrize("folder", ["report", "report/deeper"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "report").write_text("kept")
    with pytest.raises(DataError, match=f"a folder at .*{folder}, to write card.json into, got a file"):
        write_file(tmp_path / folder / "card.json", "{}")
    assert (tmp_path / "report").read_text() == "kept"


def test_a_folder_in_place_of_a_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the name of a file, got the folder .*Add a file name"):
        write_json(tmp_path, {"epochs": 3})
    assert not list(tmp_path.iterdir())


def test_standard_output_in_a_pipe_is_written_to() -> None:
    code = "from knowiso_train.utils.serialization import write_json; write_json('/dev/stdout', {'a': 1})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, json.loads(run.stdout)) == (0, {"a": 1}), run.stderr
