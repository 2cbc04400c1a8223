"""Damaged and hostile files end in a FormatError that names the file, before anything of their sizes is built."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from knowiso_train import Disentangler, Report, load_pruned, save_pruned
from knowiso_train.errors import FormatError, OptionError
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.measurement.report import PairResult
from knowiso_train.pruning.serialization import load_kept_indices
from knowiso_train.utils.serialization import DESCRIPTION_KEY, read_json, read_tensors, write_tensors

Reader = tuple[Callable[[], Any], Path]


def small(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def saved_report(folder: Path) -> Reader:
    pair = PairResult(
        "a", "a", "forward", (0.5,), 0.5, (0.4, 0.6), ((0.4, 0.6),), 0.0, (0.5,), True, 2, 2, (1, 1), (1, 1), (0.0,), 9
    )
    Report("x", "y", (pair,), {"fit": 9}, {"order": 0}, 0.1, {"torch": "2"}).to_json(folder / "report.json")
    return lambda: str(Report.from_json(folder / "report.json")), folder / "report.json"


def saved_maps(folder: Path, **options: Any) -> Reader:
    torch.manual_seed(0)
    maps = Disentangler(**options).fit(torch.randn(40, 3), torch.randn(40, 3))
    maps.save(folder)
    return lambda: Disentangler.load(folder), folder / "disentangler.safetensors"


def saved_pruned(folder: Path) -> Reader:
    kept = {"0.bias": [[0, 1]]}
    save_pruned(folder, small(2), small(8), factory="external", kept=kept, example=(1, 3))
    return lambda: (load_kept_indices(folder), load_pruned(folder, model=small(8))), folder / "model.safetensors"


def saved_settings(folder: Path) -> Reader:
    run = RunFolder(folder)
    run.check_settings({"lr": 0.1})
    return lambda: run.check_settings({"lr": 0.1}), folder / "settings.json"


READERS: dict[str, Callable[[Path], Reader]] = {
    "report": saved_report,
    "closed_form": lambda folder: saved_maps(folder, order=1, solver_options={"epochs": 1}),
    "paper": lambda folder: saved_maps(folder, order=1, solver="paper", solver_options={"epochs": 1}),
    "pruned": saved_pruned,
    "settings": saved_settings,
}


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-3],
    "half": lambda content: content[: len(content) // 2],
    "pickle": lambda content: pickle.dumps({"a": 1}),
    "torch": lambda content: pickled(),
    "list": lambda content: b"[]",
    "null": lambda content: b"null",
    "number": lambda content: b"3",
    "not UTF-8": lambda content: b"\xff\xfe\x00",
    "deep": lambda content: b"[" * 100_000 + b"]" * 100_000,
    "deep but within the recursion limit": lambda content: b"[" * 200 + b"]" * 200,
    "long integer": lambda content: b'{"format": ' + b"1" * 9999 + b"}",
    "zeros": lambda content: bytes(100),
}


@pytest.mark.parametrize("damage", list(CONTENTS))
@pytest.mark.parametrize("reader", list(READERS))
def test_damaged_contents_raise_an_error_that_names_the_file(reader: str, damage: str, tmp_path: Path) -> None:
    read, path = READERS[reader](tmp_path)
    read()
    path.write_bytes(CONTENTS[damage](path.read_bytes()))
    state = torch.get_rng_state()
    with pytest.raises(FormatError, match=path.name):
        read()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reader", ["closed_form", "paper", "pruned"])
def test_damaged_descriptions_in_tensor_files_raise(reader: str, tmp_path: Path) -> None:
    read, path = READERS[reader](tmp_path)
    tensors, _ = read_tensors(path)
    for text in ("", "[]", "null", "{", '{"format_version": NaN}', "[" * 100_000, '{"format_version": 1}'):
        save_file(tensors, path, metadata={DESCRIPTION_KEY: text})
        with pytest.raises(FormatError, match=path.name):
            read()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a JSON value."""
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from places(value)


@pytest.mark.parametrize("reader", list(READERS))
def test_any_changed_value_is_read_or_raises_a_format_error(reader: str, tmp_path: Path) -> None:
    read, path = READERS[reader](tmp_path)
    is_json = path.suffix == ".json"
    tensors, content = ({}, read_json(path)) if is_json else read_tensors(path)
    values = [None, True, -1, 0, 10**12, 10**400, 1.5, "text", "NaN", [], {}, [1, 2], {"a": 1}]
    errors: list[Exception] = []
    for index in range(len(list(places(content)))):
        # A third of the values at each place, all of them at three places in a row
        for value in values[index % 3 :: 3]:
            text = json.dumps(content)
            tree = json.loads(text)
            container, key = list(places(tree))[index]
            container[key] = value
            if is_json:
                path.write_text(json.dumps(tree))
            else:
                write_tensors(path, tensors, tree)
            try:
                read()
            except (FormatError, OptionError) as error:
                errors.append(error)
    assert errors
    assert all(path.name in str(error) for error in errors if isinstance(error, FormatError))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("maps", {"order": 10**12}),
        ("maps", {"source_channels": 10**12}),
        ("maps", {"target_channels": 2**62}),
        ("maps", {"hidden": 10**12}),
        ("maps", {"kernel_size": 10**9 + 1}),
        ("maps", {"projected_channels": 10**12}),
        ("maps", {"dtype": "Generator"}),
        ("maps", {"dtype": "float64"}),
        ("maps", {"kind": "paper"}),
        ("config", {"order": 10**12}),
        ("config", {"solver_options": {"epochs": 0}}),
        ("config", {"ridge": "NaN"}),
        ("config", {"unknown": 1}),
    ],
    ids=str,
)
def test_sizes_of_maps_beyond_their_tensors_raise(part: str, change: dict[str, Any], tmp_path: Path) -> None:
    read, path = READERS["closed_form"](tmp_path)
    tensors, description = read_tensors(path)
    description[part] |= change
    write_tensors(path, tensors, description)
    with pytest.raises(FormatError, match=path.name):
        read()


@pytest.mark.parametrize("reader", ["closed_form", "paper"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_with_non_finite_weights_raise(reader: str, value: float, tmp_path: Path) -> None:
    read, path = READERS[reader](tmp_path)
    tensors, description = read_tensors(path)
    next(tensor for tensor in tensors.values() if tensor.ndim == 4)[0, 0] = value
    write_tensors(path, tensors, description)
    with pytest.raises(FormatError, match="finite"):
        read()


@pytest.mark.parametrize("reader", ["closed_form", "paper"])
def test_loading_maps_leaves_the_random_state(reader: str, tmp_path: Path) -> None:
    read, _ = READERS[reader](tmp_path)
    state = torch.get_rng_state()
    read()
    assert torch.equal(state, torch.get_rng_state())


def test_changes_of_the_file_do_not_change_loaded_maps(tmp_path: Path) -> None:
    read, path = READERS["closed_form"](tmp_path)
    maps, source = read(), torch.randn(4, 3)
    expected = maps(source)
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(maps(source), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"factory": {"name": "test_resnet", "arguments": {"num_classes": 10**12}}},
        {"factory": {"name": "test_resnet", "arguments": {"layers": {"tuple": [10**9, 1, 1, 1]}}}},
        {"factory": {"name": "test_resnet", "arguments": {}}, "original_shapes": {"a": [10**12]}},
        {"factory": {"name": "test_resnet", "arguments": {}}, "original_shapes": {"a": 10**12}},
    ],
    ids=str,
)
def test_originals_beyond_the_weights_of_a_pruned_model_are_not_built(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = READERS["pruned"](tmp_path)
    tensors, description = read_tensors(path)
    write_tensors(path, tensors, description | change)
    monkeypatch.setattr("knowiso_train.pruning.serialization.build_model", lambda factory: pytest.fail("built"))
    with pytest.raises(FormatError, match=path.name):
        load_pruned(tmp_path)


def test_attributes_beyond_the_sizes_of_a_pruned_model_raise_before_a_forward(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))

    save_pruned(tmp_path, network(), network(), factory="external", example=(1, 3, 8, 8))
    path = tmp_path / "model.safetensors"
    tensors, description = read_tensors(path)
    for attributes in ({"padding": {"tuple": [10**5, 10**5]}}, {"dilation": {"tuple": [10**9, 1]}}, {"stride": 10**12}):
        write_tensors(path, tensors, description | {"attributes": {"0": attributes}})
        with pytest.raises(FormatError, match="above the original's"):
            load_pruned(tmp_path, model=network())


def test_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        for read in (read_json, read_tensors, Report.from_json):
            with pytest.raises(FormatError, match="no regular file"):
                read(path)
