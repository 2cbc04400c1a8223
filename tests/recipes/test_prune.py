"""recipes/prune.py, end to end: tiny networks on generated pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import knowiso_train as ki
from knowiso_train.errors import KnowisoError, OptionError
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.loading.checkpoints import load_checkpoint
from knowiso_train.loading.timm import load_model
from knowiso_train.pruning.kept_indices import index_kept
from knowiso_train.pruning.serialization import load_kept_indices
from tests.helpers import image_folder

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import prune  # noqa: E402

# So few images deserve them
pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
# In the second step's training, whose newest state is then that of step 2
BATCHES, EPOCHS, SIDE, KILLED_AT = 5, 3, 24, 4

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(RECIPES)!r})
import prune
from knowiso_train.experiment import RunFolder
write = RunFolder.log
def log(self, entry):
    write(self, entry)
    if (entry["stage"], entry["step"]) == ("2-trained", {KILLED_AT}):
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log
prune.main(sys.argv[1:])
"""
LOADED = """
import sys, torch, knowiso_train as ki
model = ki.load_pruned(sys.argv[1])
assert "torch_pruning" not in sys.modules
print(model(torch.ones(1, 3, 24, 24)).tolist())
"""
STAGES = ["original", "1-pruned", "1-tuned", "1-trained", "2-pruned", "2-tuned", "2-trained"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = image_folder.write(
        tmp_path_factory.mktemp("pictures"), {"train": 16 * BATCHES + 3, "validation": 33}, SIDE
    )

    def made(output: Path, *more: str) -> list[str]:
        data = f"--output {output} --dataset {folder} --image-size {SIDE} --batch-size 16 --log-every 1 --save-every 2"
        return [
            *data.split(),
            "--model",
            "test_resnet",
            "channels=(8,8,16,16)",
            "--model-epochs",
            "2",
            "--images",
            "64",
            *more,
        ]

    return made


GRADUAL = (
    "--steps",
    "2",
    "--macs",
    "0.5",
    "--block-steps",
    "2",
    "--tune-steps",
    "3",
    "--epochs",
    str(EPOCHS),
    "--flip",
)


@pytest.fixture(scope="module")
def whole(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert prune.main(words(output, *GRADUAL)) == 0
    return output


def entries(output: Path, stage: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name != "seconds"}
        for entry in found
        if entry["stage"] == stage
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_stage_is_smaller_and_in_the_table(whole: Path) -> None:
    cards = json.loads((whole / "summary.json").read_text())["stages"]
    assert [card["name"] for card in cards] == STAGES
    share = {card["name"]: card["macs"] / cards[0]["macs"] for card in cards}
    assert share["1-pruned"] == share["1-trained"] <= 0.5**0.5
    assert share["2-pruned"] == share["2-trained"] <= 0.5
    assert cards[0]["agreement"] == 100
    assert all(card["latency_ms"] > 0 and 0 <= card["top1"] <= 100 for card in cards)
    assert cards[-1]["parameters"] == sum(
        parameter.numel() for parameter in ki.load_pruned(whole / "pruned").parameters()
    )
    assert json.loads((whole / "2-tuned" / "report.json").read_text())["layers"]
    assert not list(whole.rglob("checkpoint-*"))


def test_each_network_is_trained_against_the_original_with_a_loss_of_its_own(whole: Path) -> None:
    for stage in ("1-trained", "2-trained"):
        steps = entries(whole, stage)
        assert [entry["step"] for entry in steps] == list(range(1, EPOCHS * BATCHES + 1))
        assert all(
            entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["isomorphism"] + entry["kd"])
            for entry in steps
        )
        shares = [entry["isomorphism"] for entry in steps]
        # No map yet; of each of four layers less than twice its variance
        assert shares[0] == 0 < shares[-1] < 8
    assert "isomorphism" not in entries(whole, "original")[0]


def test_kept_entries_are_those_of_the_first_original(whole: Path) -> None:
    original = load_model("test_resnet", pretrained=False, num_classes=3, channels=(8, 8, 16, 16))
    load_checkpoint(original, whole / "original" / "original.safetensors")
    kept, before = load_kept_indices(whole / "pruned"), original.state_dict()
    assert kept
    for name, value in weights(whole / "pruned").items():
        if name in kept:
            assert index_kept(before[name], kept[name]).shape == value.shape
    first, then = load_kept_indices(whole / "1-pruned"), load_kept_indices(whole / "2-pruned")
    assert first
    assert then == kept
    for name, axes in first.items():
        for wide, narrow in zip(axes, kept[name], strict=True):
            assert wide is None or set(narrow) <= set(wide)


def test_what_is_saved_loads_in_another_process(whole: Path) -> None:
    got = subprocess.run(
        [sys.executable, "-c", LOADED, str(whole / "pruned")], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        wanted = ki.load_pruned(whole / "2-trained")(torch.ones(1, 3, SIDE, SIDE))
    assert torch.allclose(torch.tensor(json.loads(got.stdout)), wanted, atol=1e-6)


def test_killed_it_goes_on_to_the_same_weights(
    whole: Path,
    words: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Sums are rounded by the number of threads
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *words(tmp_path, *GRADUAL)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == -9, ended.stderr
    assert [path.name for path in (tmp_path / "2-trained").glob("checkpoint-*")] == ["checkpoint-0000000002"]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors") if "2-trained" not in path.parts}
    taken_up: list[tuple[str, int]] = []
    write = RunFolder.log

    def log(run: RunFolder, entry: dict[str, Any]) -> None:
        taken_up.append((entry["stage"], entry["step"]))
        write(run, entry)

    monkeypatch.setattr(RunFolder, "log", log)
    assert prune.main(words(tmp_path, *GRADUAL)) == 0
    assert taken_up[0] == ("2-trained", 3)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for stage in (*STAGES[1:], "pruned"):
        a, b = weights(tmp_path / stage), weights(whole / stage)
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert [entries(tmp_path, stage) for stage in STAGES] == [entries(whole, stage) for stage in STAGES]

    capsys.readouterr()
    assert prune.main(words(tmp_path, *GRADUAL)) == 0  # a finished run shows its table again
    assert len(taken_up) == EPOCHS * BATCHES - 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in STAGES] == STAGES


def test_the_original_runs_without_the_autocast_of_its_training(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: dict[str, Any] = {}
    compare = prune.compare_networks
    monkeypatch.setattr(
        prune, "compare_networks", lambda nets, *a, **k: compared.update(nets) or compare(nets, *a, **k)
    )
    assert prune.main(words(tmp_path, "--macs", "0.7", "--mixed-precision", "bf16")) == 0
    fresh = load_model("test_resnet", pretrained=False, num_classes=3, channels=(8, 8, 16, 16))
    load_checkpoint(fresh, tmp_path / "original" / "original.safetensors")
    images = torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(compared["original"](images), fresh.eval()(images))


def test_one_shot_from_a_weight_file(whole: Path, words: Callable[..., list[str]], tmp_path: Path) -> None:
    start = ["--model-checkpoint", str(whole / "original" / "original.safetensors")]
    assert prune.main(words(tmp_path, *start, "--params", "0.7", "--round-to", "4", "--ignored", "layer1")) == 0
    cards = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [card["name"] for card in cards] == ["original", "1-pruned"]
    report = json.loads((tmp_path / "1-pruned" / "report.json").read_text())
    assert all(group["after"] % 4 == 0 and not group["name"].startswith("layer1") for group in report["widths"])
    assert not (tmp_path / "log.jsonl").exists()  # nothing was trained


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ("--ignored layer9", KnowisoError, "layer9"),
        ("--images 40 --tune-steps 5 --batch-size 36", OptionError, "40 images.*no batch of 36"),
        ("--model resnet19", OptionError, "nearest:.*resnet18"),
    ],
)
def test_arguments_that_cannot_work(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, more: str, error: type[KnowisoError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune.main(
            words(tmp_path, "--model-checkpoint", str(whole / "original" / "original.safetensors"), *more.split())
        )
    assert not list(tmp_path.iterdir())  # the folder takes other words


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model-epochs 0", "needs weights"),
        ("--steps 0", "at least 1"),
        ("--macs 0.5 --params 0.5", "one budget.*--macs 0.5, --params 0.5"),
        ("--macs 1.5", "between 0 and 1"),
        ("--latency 0", "between 0 and 1"),
    ],
)
def test_words_without_meaning(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        prune.main(words(tmp_path, *more.split()))
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
