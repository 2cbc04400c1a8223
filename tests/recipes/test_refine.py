"""recipes/refine.py, end to end: tiny networks on generated pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from knowiso_train.errors import OptionError
from knowiso_train.experiment.run_folder import RunFolder
from tests.helpers import image_folder
from tests.helpers.processes import run_script_in_processes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import refine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
SIDE, STEPS, KILLED_AT = 32, 7, 5  # the newest state is then that of step 4

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(RECIPES)!r})
import refine
from knowiso_train.experiment import RunFolder
write = RunFolder.log
def log(self, entry):
    write(self, entry)
    if entry["towards"] == "consensus" and entry["step"] == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log
refine.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Faint colors; two networks of one architecture that know colors."""
    folder = image_folder.write(
        tmp_path_factory.mktemp("pictures"), {"train": 210, "validation": 33, "test": 33}, SIDE, faint=True
    )
    torch.manual_seed(0)
    for name in ("own", "peer"):
        torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / f"{name}.pth")

    def made(output: Path, *more: str) -> list[str]:
        data = f"--output {output} --dataset {folder} --image-size {SIDE} --batch-size 16 --labels 4 --lr 0.001 --flip"
        nets = f"--model test_resnet={folder / 'own.pth'} --peers test_resnet={folder / 'peer.pth'}"
        return [*data.split(), *nets.split(), "--steps", str(STEPS), "--log-every", "1", "--save-every", "2", *more]

    return made


@pytest.fixture(scope="module")
def whole(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert refine.main(words(output)) == 0
    return output


def test_results(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary["results"]) == ["closed form", "consensus", "labels"]
    assert summary["results"][summary["chosen"]]["validation"] == max(
        found["validation"] for found in summary["results"].values()
    )
    report = json.loads((whole / "report.json").read_text())
    assert report["num_images"] == {"unlabeled": 210, "labeled": 12, "validation": 33, "test": 33}
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    for way, terms in (("consensus", {"cross_entropy", "consensus", "soft_targets"}), ("labels", {"cross_entropy"})):
        of_way = [entry for entry in entries if entry["towards"] == way]
        assert [entry["step"] for entry in of_way] == list(range(1, STEPS + 1))
        assert all(terms == {"cross_entropy", "consensus", "soft_targets"} & set(entry) for entry in of_way)
    assert not list(whole.rglob("checkpoint-*"))


def test_what_is_saved_is_a_plain_timm_network(whole: Path) -> None:
    card = json.loads((whole / "refined.json").read_text())
    model = timm.create_model(card["architecture"], checkpoint_path=whole / "refined.safetensors", **card["options"])
    assert model.num_classes == 3
    kept = "closed" if card["method"] == "closed form" else f"{card['method']}/tuned"
    assert all(
        torch.equal(value, load_file(whole / f"{kept}.safetensors")[name]) for name, value in model.state_dict().items()
    )


def test_a_run_that_is_killed_and_interrupted_goes_on_to_the_same_bits(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, "-c", KILLED, *words(tmp_path)]
    killed = subprocess.run(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    write = RunFolder.log

    def interrupted(run: RunFolder, entry: dict[str, Any]) -> None:
        write(run, entry)
        if (entry["towards"], entry["step"]) == ("labels", KILLED_AT):
            raise KeyboardInterrupt

    def checkpoints() -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("checkpoint-*")]

    assert checkpoints() == ["consensus/checkpoint-0000000004"]
    monkeypatch.setattr(RunFolder, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine.main(words(tmp_path))
    assert checkpoints() == ["labels/checkpoint-0000000004"]
    monkeypatch.setattr(RunFolder, "log", write)
    assert refine.main(words(tmp_path)) == 0
    for trained in ("consensus", "labels"):
        wanted, got = (load_file(folder / trained / "tuned.safetensors") for folder in (whole, tmp_path))
        assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    assert refine.main(words(tmp_path)) == 0  # a finished run shows its table


def test_other_settings_need_another_folder(whole: Path, words: Callable[..., list[str]]) -> None:
    with pytest.raises(OptionError, match="labels is 7, was 4"):
        refine.main(words(whole, "--labels", "7"))


def test_two_processes_refine_as_one(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """The closed form is made by one of them and is that of one process; then both train, and one writes."""
    run_script_in_processes(RECIPES / "refine.py", words(tmp_path / "two", "--steps", "2"))
    assert refine.main(words(tmp_path / "one", "--steps", "2")) == 0
    for name in ("closed", "teachers"):
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    logs = [
        [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        for folder in ("one", "two")
    ]
    assert [(entry["towards"], entry["step"]) for entry in logs[1]] == [
        ("consensus", 1),
        ("consensus", 2),
        ("labels", 1),
        ("labels", 2),
    ]
    assert all(entry["soft_targets"] >= 0 for entry in logs[1][:2])
    assert all(entry["cross_entropy"] > 0 for entry in logs[1])
