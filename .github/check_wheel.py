"""Check the contents of wheel and sdist, and use the installed wheel: public names, README, commands and recipes.

Run it with the Python of an environment that has nothing but the wheel, in an empty folder:

    FRESH/bin/python CHECKOUT/.github/check_wheel.py CHECKOUT/dist
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import knowiso_train as ki
from knowiso_train.errors import MissingDependencyError

RECIPES = ("diagnose", "distill", "measure", "prune", "refine")
IN_WHEEL = {
    "knowiso_train/py.typed",
    "knowiso_train/pages/page.css",
    "knowiso_train/pages/page.js",
    *(f"knowiso_train/recipes/{name}.py" for name in RECIPES),
}
IN_SDIST = {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "pyproject.toml", "mkdocs.yml", "tests/conftest.py"}
SUFFIXES_OF_WHEEL = {".py", ".typed", ".css", ".js", ""}
NEVER = ("__pycache__", ".cache", ".pyc", "/results/", "output/", ".safetensors", ".pth", ".egg-info", "shared/data")


def require(condition: bool, message: str) -> None:
    """Exit with a message unless a condition holds."""
    if not condition:
        sys.exit(f"check_wheel: {message}")


def check_contents(dist: Path) -> None:
    """Check the names of the files in the wheel and in the sdist."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    for name, files, expected in (("wheel", in_wheel, IN_WHEEL), ("sdist", in_sdist, IN_SDIST)):
        require(expected <= files, f"the {name} lacks {sorted(expected - files)}")
        extra = [file for file in files if any(part in file for part in NEVER)]
        require(not extra, f"the {name} has {extra}")
    extra = [f for f in in_wheel if ".dist-info/" not in f and Path(f).suffix not in SUFFIXES_OF_WHEEL]
    require(not extra, f"the wheel has {extra}")
    folders = {file.partition("/")[0] for file in in_wheel}
    require(len(folders) == 2, f"the wheel has the folders {sorted(folders)}")


def check_imports() -> None:
    """Import every public name, and every module whose packages are installed."""
    require("site-packages" in str(ki.__file__), f"{ki.__file__} is not the installed wheel")
    for name in ki.__all__:
        getattr(ki, name)
    for module in pkgutil.walk_packages(ki.__path__, "knowiso_train."):
        if ".recipes" in module.name or module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except MissingDependencyError as error:
            require("pip install" in str(error), f"{module.name}: {error}")


def write_images(folder: Path) -> None:
    """Write images of three classes to folder/split/class."""
    noise = np.random.default_rng(0)
    for index in range(150):
        pixels = noise.integers(0, 160, (32, 32, 3))
        pixels[..., index % 3] += noise.integers(0, 90)
        split = "train" if index < 90 else "validation" if index < 120 else "test"
        file = folder / split / f"class{index % 3}" / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)


def knowiso(line: str, code: int = 0) -> str:
    """Run the installed command and return what it prints."""
    command = [str(Path(sys.executable).with_name("knowiso")), *line.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    require(result.returncode == code, f"knowiso {line} ended with {result.returncode}:\n{output[-3000:]}")
    require("Traceback" not in output, f"knowiso {line}:\n{output[-3000:]}")
    print(f"passed: knowiso {line}", flush=True)
    return output


def check_readme() -> None:
    """Run the first example of the README on small networks."""
    torch.manual_seed(0)
    loader = [torch.rand(30, 3, 32, 32) for _ in range(4)]
    teacher, student = (timm.create_model("test_resnet") for _ in range(2))
    report = ki.measure(student, teacher, loader, ["layer3", "layer4"], order=0, directions="both", functional=True)
    require("layer4" in str(report), str(report))
    report.to_html("readme.html")
    require(Path("readme.html").stat().st_size > 1000, "readme.html is empty")


def check_commands() -> None:
    """Run every command and recipe with tiny settings, and a command again from its options in a file."""
    write_images(Path("images"))
    for seed, name in enumerate(("weights", "peer")):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), f"{name}.pth")
    for command in ("distill", "prune", "refine", "compare"):
        require("--" in knowiso(f"{command} --help"), f"knowiso {command} --help lists no options")
    require("layer3" in knowiso("layers test_resnet"), "knowiso layers lists no layer3")
    require("nearest" in knowiso("layers test_resnett", code=2), "a wrong name has no nearest names")
    images = "--dataset images/train --image-size 32 --input-size image --workers 0 --no-progress --order 0"
    target = "--target test_resnet --target-checkpoint weights.pth --target-classes 3"
    networks = f"--source test_resnet {target} --no-pretrained --layers layer3"
    knowiso(f"measure {networks} {images} --no-noise-floor --json report.json")
    knowiso("measure --config report.config.json --json again.json")
    first, again = (json.loads(Path(file).read_text()) for file in ("report.json", "again.json"))
    require(first["pairs"] == again["pairs"], "measure --config gives another report")
    knowiso("report report.json --html report.html")
    knowiso(f"diagnose --weak test_resnet --strong test_resnet --no-pretrained --layers layer3 {images} --html d.html")

    data = "--dataset images --image-size 32 --batch-size 16"
    student = "--student test_resnet channels=(8,8,16,16) --epochs 1 --arms ours"
    knowiso(f"distill {data} --teacher test_resnet --teacher-checkpoint weights.pth {student} --output distill")
    knowiso("distill --config distill/settings.json --output distill")  # finished: prints its table
    require(not Path("distill/kd").exists(), "distill --config trains other arms")
    model = "--model test_resnet --model-checkpoint weights.pth --images 64 --tune-steps 2"
    knowiso(f"prune {data} {model} --output prune")
    require(ki.load_pruned("prune/pruned")(torch.zeros(1, 3, 32, 32)).shape == (1, 3), "the pruned network")
    knowiso(f"refine {data} --model test_resnet=weights.pth --peers test_resnet=peer.pth --labels 4 --output refine")
    for file in ("distill/ours/last.safetensors", "distill/summary.html", "refine/refined.safetensors"):
        require(Path(file).is_file(), f"{file} was not written")


if __name__ == "__main__":
    for dist in sys.argv[1:]:
        check_contents(Path(dist))
    check_imports()
    check_readme()
    check_commands()
    print("check_wheel: passed")
