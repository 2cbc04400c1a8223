"""Run five training scripts without and with the lines that docs/guides/scripts.md adds, and check the outcome.

A line of a script that ends in `# + knowiso` is added to the plain script; `# + knowiso, for: CODE` replaces CODE. The
plain script trains a wider network, which is then the teacher of the script with the added lines.

    python -m benchmarks.clients.run_clients                     # all scripts on CIFAR-10 images
    python -m benchmarks.clients.run_clients --images digits timm_train
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.common.models import cifar_bytes
from benchmarks.common.results import record, table
from knowiso_train.experiment import demo_digits

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
GUIDE = ROOT / "docs/guides/scripts.md"
MARK = re.compile(r"^( *)\S.*  # \+ knowiso(?:, for: (.*))?$")
NUM_TRAIN_IMAGES, NUM_VALIDATION_IMAGES, BATCH_IMAGES = 640, 160, 32
STEPS_PER_EPOCH = NUM_TRAIN_IMAGES // BATCH_IMAGES


def plain_script(text: str) -> str:
    """Return a script without the added lines."""
    lines = []
    for line in text.splitlines():
        mark = MARK.match(line)
        if mark is None:
            lines.append(line)
        elif mark[2]:
            lines.append(mark[1] + mark[2])
    return "\n".join(lines) + "\n"


def added_lines(text: str) -> list[str]:
    """Return the code of the added lines of a script."""
    return [line.split("  # + knowiso")[0].strip() for line in text.splitlines() if MARK.match(line)]


def guide_lines(section: str) -> list[str]:
    """Return the highlighted lines of the first example in a section of the guide."""
    text = GUIDE.read_text().split(f"\n## {section}\n", 1)[1]
    example = re.search(r'```python hl_lines="([\d ]+)"\n(.*?)```', text, re.DOTALL)
    if example is None:
        raise ValueError(f"{GUIDE}: the section {section} has no highlighted example")
    code = example[2].splitlines()
    return [code[int(number) - 1].strip() for number in example[1].split()]


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError unless a condition holds."""
    if not condition:
        raise RuntimeError(message)


def tensorboard_figures(folder: Path) -> list[dict[str, float]]:
    """Read the figures of each step from TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            steps.setdefault(event.step, {})[tag] = event.value
    return [steps[step] for step in sorted(steps)]


def csv_figures(file: str) -> Callable[[Path], list[dict[str, float]]]:
    """Return a reader of the figures in a CSV file."""

    def read(folder: Path) -> list[dict[str, float]]:
        rows = list(csv.DictReader((folder / file).read_text().splitlines()))
        return [{key: float(value) for key, value in row.items() if value} for row in rows]

    return read


def trainer_figures(folder: Path) -> list[dict[str, float]]:
    """Read the log history of the Trainer."""
    history: list[dict[str, float]] = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return history


LOAD_TIMM = """
import timm
state = torch.load({path!r} + "/model.pth", weights_only=True)
model = timm.create_model("test_resnet", num_classes=10)
model.load_state_dict(state)
"""
LOAD_TIMM_CHECKPOINT = """
import timm
model = timm.create_model("test_resnet", num_classes=10, checkpoint_path={path!r} + "/last.pth.tar")
"""
LOAD_TRANSFORMERS = """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({path!r})
"""


@dataclass(frozen=True)
class Client:
    """Script, and how it is run.

    Attributes:
        section: Section of the guide with the added lines.
        images: Options with the folders of the images.
        output: Option with the output folder.
        wide: Options of a wider network.
        resume: Option with a checkpoint.
        checkpoint: Checkpoint after half of the training, in the output folder.
        saved: File or folder of the trained network, in the output folder.
        teacher: Name under which the script expects the teacher.
        figures: Reader of the logged figures of an output folder.
        load: Code that loads the trained network of folder `path` as `model`.
        restores_loss: Whether a checkpoint includes the state of the loss.
        options: Further options.
    """

    section: str
    images: tuple[str, ...]
    output: str
    wide: tuple[str, ...]
    resume: str
    checkpoint: str
    saved: str
    teacher: str
    figures: Callable[[Path], list[dict[str, float]]]
    load: str
    restores_loss: bool = True
    options: tuple[str, ...] = ()


FOLDERS = ("--train_dir", "images/train", "--validation_dir", "images/validation")
WIDE_TIMM = ("--model", "resnet10t")
TRAINER_OPTIONS = {
    "do_train": True,
    "use_cpu": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": BATCH_IMAGES,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "report_to": "none",
}
CLIENTS = {
    "accelerate_loop": Client(
        section="accelerate",
        images=("--data_dir", "images"),
        output="--output_dir",
        wide=WIDE_TIMM,
        resume="--resume_from_checkpoint",
        checkpoint="epoch_0",
        saved="model.pth",
        teacher="teacher.pth",
        figures=tensorboard_figures,
        load=LOAD_TIMM,
        options=("--cpu",),
    ),
    "transformers_trainer": Client(
        section="Hugging Face Trainer",
        images=FOLDERS,
        output="--output_dir",
        wide=("--width", "32"),
        resume="--resume_from_checkpoint",
        checkpoint=f"checkpoint-{STEPS_PER_EPOCH}",
        saved="",
        teacher="teacher",
        figures=trainer_figures,
        load=LOAD_TRANSFORMERS,
        options=tuple(word for key, value in TRAINER_OPTIONS.items() for word in (f"--{key}", str(value))),
    ),
    "transformers_no_trainer": Client(
        section="accelerate",
        images=FOLDERS,
        output="--output_dir",
        wide=("--hidden_size", "64"),
        resume="--resume_from_checkpoint",
        checkpoint=f"step_{STEPS_PER_EPOCH // 2}",
        saved="",
        teacher="teacher",
        figures=tensorboard_figures,
        load=LOAD_TRANSFORMERS,
        options=("--checkpointing_steps", str(STEPS_PER_EPOCH // 2)),
    ),
    "timm_train": Client(
        section="timm's train.py",
        images=("--data-dir", "images"),
        output="--output",
        wide=WIDE_TIMM,
        resume="--resume",
        checkpoint="checkpoint-0.pth.tar",
        saved="last.pth.tar",
        teacher="teacher.pth",
        figures=csv_figures("summary.csv"),
        load=LOAD_TIMM_CHECKPOINT,
        restores_loss=False,
    ),
    "lightning_module": Client(
        section="Lightning",
        images=("--data", "images"),
        output="--output",
        wide=WIDE_TIMM,
        resume="--resume",
        checkpoint="epoch=0.ckpt",
        saved="model.pth",
        teacher="teacher.pth",
        figures=csv_figures("logs/metrics.csv"),
        load=LOAD_TIMM,
    ),
}


def write_images(folder: Path, name: str) -> None:
    """Write folders of training and validation images, with one folder per class.

    Args:
        folder: Target folder.
        name: "cifar10", or "digits" of the demo package.
    """
    if name == "digits":
        images, labels = demo_digits()
        images = images.mul(255).byte()
    else:
        images, labels = cifar_bytes(name, "train", NUM_TRAIN_IMAGES + NUM_VALIDATION_IMAGES)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for number, index in enumerate(order[: NUM_TRAIN_IMAGES + NUM_VALIDATION_IMAGES].tolist()):
        split = "train" if number < NUM_TRAIN_IMAGES else "validation"
        file = folder / split / f"class{labels[index]}" / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).resize((32, 32)).save(file)


def run(*command: str, folder: Path) -> float:
    """Run Python with these arguments, and return its CPU seconds.

    Raises:
        RuntimeError: The process failed; with its last output.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder.parent / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:200]}: {result.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def relative_difference(left: Path, right: Path) -> float:
    """Return the difference of two saved networks' parameters and buffers, relative to the norm of the first."""

    def load(path: Path) -> Mapping[str, Any]:
        if path.is_dir():
            return load_file(path / "model.safetensors")
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm saves its arguments
            state: Mapping[str, Any] = torch.load(path, weights_only=True)
        return state.get("state_dict", state)

    first, second = load(left), load(right)
    require(first.keys() == second.keys(), f"{left} and {right} have different names")
    squares = [
        (
            float((first[name].double() - second[name].double()).square().sum()),
            float(first[name].double().square().sum()),
        )
        for name in first
    ]
    difference, norm = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(difference / norm)


def loss_figures(client: Client, folder: Path) -> list[dict[str, float]]:
    """Return the logged figures of the isomorphism loss, by step."""
    rows = [{key: row[key] for key in row if "iso/train/" in key} for row in client.figures(folder)]
    return [row for row in rows if row]


def check_client(name: str, folder: Path) -> dict[str, Any]:
    """Run a script without and with the added lines, resume it and load its network without the library.

    Args:
        name: Name of the script.
        folder: Empty folder beside which `images` lies.

    Returns:
        Row of the table.
    """
    client, text = CLIENTS[name], (FOLDER / f"{name}.py").read_text()
    folder.mkdir()
    (folder / "images").symlink_to(folder.parent / "images")
    plain = plain_script(text)
    require("knowiso" not in plain, f"{name}: the plain script still names the library")
    (folder / "plain.py").write_text(plain)
    (folder / "full.py").write_text(text)
    added, guide = added_lines(text), guide_lines(client.section)
    require(len(added) <= len(guide), f"{name}: {len(added)} added lines, and {len(guide)} in the guide")
    shared = [*client.images, *client.options, client.output]
    plain_seconds = run("plain.py", *shared, "plain", folder=folder)
    run("plain.py", *shared, "wide", *client.wide, folder=folder)
    shutil.move(folder / "wide" / client.saved, folder / client.teacher)
    full_seconds = run("full.py", *shared, "full", folder=folder)
    differences = []
    for name_of_run in ("plain", "full"):
        resumed, checkpoint = f"{name_of_run}_resumed", f"{name_of_run}/{client.checkpoint}"
        run(f"{name_of_run}.py", *shared, resumed, client.resume, checkpoint, folder=folder)
        difference = relative_difference(folder / name_of_run / client.saved, folder / resumed / client.saved)
        differences.append(difference)
    load = client.load.format(path=str(folder / "full"))
    blocked = f"import sys, torch\nsys.modules['knowiso_train'] = None\n{load}\nmodel(torch.zeros(2, 3, 32, 32))"
    run("-c", blocked, folder=folder)

    logged = loss_figures(client, folder / "full")
    shares = {key: value for key, value in logged[-1].items() if key.endswith("/share")}
    require(len(shares) == 2 and all(0 < share < 1 for share in shares.values()), f"{name}: {shares}")
    if differences[0] == 0 and client.restores_loss:
        require(differences[1] == 0, f"{name}: resumed and uninterrupted training differ by {differences[1]}")
    elif client.restores_loss:
        # A restored map is solved at the first step
        first = loss_figures(client, folder / "full_resumed")[0]
        require(all(value == 1 for key, value in first.items() if key.endswith("/ready")), f"{name}: {first}")
    return {
        "script": name,
        "added": len(added),
        "guide": len(guide),
        "logged": len(logged),
        "explained": sum(shares.values()) / len(shares),
        "resumed_plain": differences[0],
        "resumed_full": differences[1],
        "cpu_s_plain": plain_seconds,
        "cpu_s_full": full_seconds,
    }


def main() -> None:
    """Run the scripts, print the table and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"scripts to run: {', '.join(CLIENTS)}")
    parser.add_argument("--images", default="cifar10", choices=["cifar10", "digits"])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "images"), args.images)
        for name in args.scripts or CLIENTS:
            rows.append(check_client(name, Path(folder, name)))
            print(f"{name}: passed", flush=True)
    print(table(rows))
    if not args.scripts:
        settings = {"train_images": NUM_TRAIN_IMAGES, "validation_images": NUM_VALIDATION_IMAGES, "epochs": 2}
        print(record("clients", rows, images=args.images, settings=settings))


if __name__ == "__main__":
    main()
