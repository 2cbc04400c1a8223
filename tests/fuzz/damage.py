"""Saved files of every kind, and seeded damage to their contents."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import knowiso_train as ki
from knowiso_train.diagnosis import Diagnosis, StabilityReport
from knowiso_train.pruning import load_kept_indices
from knowiso_train.utils.serialization import DESCRIPTION_KEY, HEADER_SIZE_BYTES
from tests.fuzz.calls import SIDE, loader, network, pruned_pair


def saved_files(folder: Path) -> dict[str, tuple[Callable[[], Any], Path]]:
    """Save one file of each kind, and return functions that read and use it, with its path."""
    x, y = torch.randn(40, 6, 4, 4), torch.randn(40, 6, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dead channels of the small network
        report = ki.measure(network(1), network(2), loader(), "2", order=0, progress=False)
        diagnosis = ki.diagnose(network(1), network(2), loader(labels=True), "2", num_images=2, progress=False)
        stability = ki.stability([network(1), network(2)], loader(), "2", progress=False)
    report.to_json(folder / "report.json")
    diagnosis.to_json(folder / "diagnosis.json")
    stability.to_json(folder / "stability.json")
    ki.Disentangler(order=1, source_channels=4).fit(x, y).save(folder / "maps")
    ki.Disentangler(order=1, solver="paper", solver_options={"epochs": 1}).fit(x, y).save(folder / "paper")
    original, pruned = pruned_pair()
    kept = {"0.bias": [list(range(len(pruned[0].bias)))]}
    ki.save_pruned(folder / "pruned", pruned, original, kept=kept, factory="external", example=(1, 3, SIDE, SIDE))

    def read_report() -> None:
        read = ki.Report.from_json(folder / "report.json")
        str(read), read._repr_html_()
        read.to_json(folder / "again.json")

    def read_diagnosis() -> None:
        read = Diagnosis.from_json(folder / "diagnosis.json")
        str(read), *map(str, read), read.to_html(), read.to_json(folder / "again.json")

    def read_stability() -> None:
        read = StabilityReport.from_json(folder / "stability.json")
        str(read), read.to_html(), read.to_json(folder / "again.json")

    def read_maps(name: str) -> None:
        ki.Disentangler.load(folder / name).split(x[:2], y[:2])

    def read_pruned() -> None:
        load_kept_indices(folder / "pruned")
        with torch.no_grad():
            ki.load_pruned(folder / "pruned", model=copy.deepcopy(original)).eval()(loader()[0])

    return {
        "Report.from_json": (read_report, folder / "report.json"),
        "Diagnosis.from_json": (read_diagnosis, folder / "diagnosis.json"),
        "StabilityReport.from_json": (read_stability, folder / "stability.json"),
        "Disentangler.load": (lambda: read_maps("maps"), folder / "maps" / "disentangler.safetensors"),
        "Disentangler.load, paper": (lambda: read_maps("paper"), folder / "paper" / "disentangler.safetensors"),
        "load_pruned": (read_pruned, folder / "pruned" / "model.safetensors"),
    }


def damage(content: bytes, suffix: str, rng: random.Random) -> tuple[str, bytes]:
    """Return a description of some damage, and the damaged content of a file with this suffix."""
    kinds = ["truncated", "bytes", "empty", "pickle", "text"]
    kinds += {".json": ["json"] * 8, ".safetensors": ["header"] * 4 + ["description"] * 8}.get(suffix, [])
    kind = rng.choice(kinds)
    if kind == "truncated":
        return kind, content[: rng.randrange(len(content))]
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return kind, bytes(changed)
    if kind == "empty":
        return kind, b""
    if kind == "pickle":
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(2)}, buffer)
        return kind, buffer.getvalue()
    if kind == "text":
        return kind, rng.choice([b"[]", b"null", b"{}", b'"text"', b"3", b"\xff\xfe"])
    shown, damaged = damage_json(content, rng) if kind == "json" else damage_header(content, kind == "description", rng)
    return f"{kind}: {shown}", damaged


def damage_header(content: bytes, in_description: bool, rng: random.Random) -> tuple[str, bytes]:
    """Damage the JSON header of a safetensors file, or the description within it; sizes and tensors stay valid."""
    start = HEADER_SIZE_BYTES + int.from_bytes(content[:HEADER_SIZE_BYTES], "little")
    header = content[HEADER_SIZE_BYTES:start]
    if in_description:
        tree = json.loads(header)
        shown, text = damage_json(tree["__metadata__"][DESCRIPTION_KEY].encode(), rng)
        tree["__metadata__"][DESCRIPTION_KEY] = text.decode()
        header = json.dumps(tree).encode()
    else:
        shown, header = damage_json(header, rng)
    return shown, len(header).to_bytes(HEADER_SIZE_BYTES, "little") + header + content[start:]


def damage_json(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage JSON text, mostly one value of it."""
    kind = rng.choice(["value"] * 4 + ["near"] * 4 + ["removed"] * 2 + ["added", "deep", "huge", "text"])
    if kind == "deep":
        return kind, b"[" * 100_000 + b"]" * 100_000
    if kind == "huge":
        return kind, content.replace(b"1", b"1" + b"0" * rng.choice((5, 12, 400)), 1)
    if kind == "text":
        return kind, rng.choice([b"", b"[]", b"null", b"{}", b"3", b"{", content[: len(content) // 2]])
    tree = json.loads(content)
    parent, key = rng.choice(list(places_in(tree)))
    if kind == "removed":
        del parent[key]
        return f"{key!r} removed", json.dumps(tree).encode()
    if kind == "added" and isinstance(parent, dict):
        parent["unknown"] = parent[key]
        return f"'unknown' added beside {key!r}", json.dumps(tree).encode()
    value = rng.choice([None, True, -1, 0, 10**12, 2**70, 1.5, "text", "", [], {}, [1, 2], {"a": 1}, "NaN", "Infinity"])
    if kind == "near" and isinstance(parent[key], (int, float)):
        # Valid by itself, but not beside the other values
        value = rng.choice([parent[key] + 1, parent[key] - 1, 2 * parent[key], -parent[key]])
    elif kind == "near" and isinstance(parent[key], list) and parent[key]:
        value = rng.choice([parent[key][1:], parent[key] * 2, parent[key][::-1]])
    elif kind == "near" and isinstance(parent[key], str):
        value = rng.choice([parent[key] + "x", parent[key][1:], parent[key].upper()])
    shown, parent[key] = f"{key!r} = {str(value)[:60]}", value
    return shown, json.dumps(tree).encode()


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a JSON value."""
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from places_in(value)
