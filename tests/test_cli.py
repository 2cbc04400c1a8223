"""The command line, end to end: tiny networks with random weights on generated pictures."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from knowiso_train import Report, diagnose
from knowiso_train.cli import main, parser
from knowiso_train.cli._measure import SIMILARITIES
from knowiso_train.cli._options import layer_pairs
from knowiso_train.diagnosis import Diagnosis
from knowiso_train.diagnosis.comparison import StageComparison
from knowiso_train.errors import OptionError
from knowiso_train.loading import load_model
from knowiso_train.measurement.similarity import SIMILARITY_NAMES
from tests.helpers.diagnoses import stability_report

ROOT = Path(__file__).resolve().parents[1]
COUNT = 150  # about 30 of them to report on: enough for no warning


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"class{i % 2}" / f"{i:03d}.png")
    return folder


def options(pictures: Path, **changes: str) -> list[str]:
    values = {
        "source": "test_resnet",
        "target": "test_resnet",
        "layers": "layer1",
        "dataset": str(pictures),
        "image-size": "32",
        "input-size": "image",
        "order": "0",
        "batch-size": "30",
        "workers": "0",
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [
        "measure",
        "--no-pretrained",
        "--no-progress",
        *(word for name, value in values.items() for word in (f"--{name}", *value.split())),
    ]


def test_measure_prints_and_writes(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"json": tmp_path / "deep" / "out.json", "plot": tmp_path / "deep" / "out.png"}
    arguments = options(
        pictures,
        target="test_efficientnet",
        layers="layer1=blocks.1 layer2.0.conv1=blocks.2",
        directions="both",
        similarity="cka pooled_cka",
        at="output",
        **{k: str(v) for k, v in files.items()},
    )
    assert main([*arguments, "--functional"]) == 0
    out, err = capsys.readouterr()
    report = Report.from_json(files["json"])
    assert all(len(pair.functional) == 1 and pair.functional[0].top1 is None for pair in report)
    assert out == f"{report}\n"
    assert err == ""
    assert (report.source, report.target) == ("test_resnet", "test_efficientnet")
    assert [(pair.source, pair.target) for pair in report] == [
        ("layer1", "blocks.1"), ("layer2.0.conv1", "blocks.2"), ("blocks.1", "layer1"), ("blocks.2", "layer2.0.conv1")
    ]  # fmt: skip
    assert sum(report.images.values()) == COUNT
    assert all(list(pair.similarity) == ["cka", "pooled_cka"] for pair in report)
    assert all(abs(sum(pair.shares) + pair.unexplained - 1) < 1e-9 for pair in report)
    with Image.open(files["plot"]) as image:
        assert image.format == "PNG"


def test_measure_says_the_same_twice_and_obeys_the_seed(pictures: Path, tmp_path: Path) -> None:
    found = []
    for seed in ("3", "3", "4"):
        assert main([*options(pictures, json=str(tmp_path / "out.json")), "--seed", seed]) == 0
        found.append(Report.from_json(tmp_path / "out.json").pairs[0].unexplained)
    assert found[0] == found[1] != found[2]


def test_a_network_explains_itself(pictures: Path, tmp_path: Path) -> None:
    """The same weights on both sides leave no residual, so checkpoints, transforms and layer names arrive."""
    import timm

    torch.save({"state_dict": timm.create_model("test_resnet").state_dict()}, tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    assert (
        main(
            options(
                pictures,
                source_checkpoint=weights,
                target_checkpoint=weights,
                json=str(tmp_path / "out.json"),
                max_images="120",
            )
        )
        == 0
    )
    report = Report.from_json(tmp_path / "out.json")
    assert report.pairs[0].unexplained < 1e-3
    assert (report.source, report.target) == ("test_resnet (w) (source)", "test_resnet (w) (target)")
    assert sum(report.images.values()) == 120


def test_similarity_without_names_means_the_default_ones_and_inputs_are_measured(
    pictures: Path, tmp_path: Path
) -> None:
    assert SIMILARITIES == SIMILARITY_NAMES
    path = tmp_path / "out.json"
    figures = []
    for extra in (["--similarity", "--at", "input"], []):
        assert main([*options(pictures, json=str(path)), *extra]) == 0
        report = Report.from_json(path)
        figures.append((report.settings["at"], list(report.pairs[0].similarity)))
    assert figures == [("input", ["cka", "procrustes", "r2"]), ("output", [])]


def test_report_shows_a_saved_one_again(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(pictures, json=str(tmp_path / "out.json"))) == 0
    first = capsys.readouterr().out
    files = {name: tmp_path / f"again.{name}" for name in ("png", "html", "csv")}
    arguments = ["--plot", str(files["png"]), "--html", str(files["html"]), "--csv", str(files["csv"])]
    assert main(["report", str(tmp_path / "out.json"), *arguments]) == 0
    assert capsys.readouterr().out == first
    assert files["png"].stat().st_size > 10_000
    saved = Report.from_json(tmp_path / "out.json")
    assert files["html"].read_text(encoding="utf-8") == saved.to_html()
    assert files["csv"].read_text(encoding="utf-8") == saved.to_csv()


def diagnose_options(pictures: Path, *words: str) -> list[str]:
    given = [word if word != "measure" else "diagnose" for word in options(pictures)]
    for option in ("--source", "--target"):
        i = given.index(option)
        del given[i : i + 2]
    return [*given, "--num-directions", "2", *words]


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
def test_diagnose_writes_what_report_shows_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"first.{name}" for name in ("json", "html")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    networks = ["--weak", "test_resnet", "--strong", "test_efficientnet", "--layers", "layer1=blocks.1"]
    assert main(diagnose_options(pictures, *networks, *words)) == 0
    out = capsys.readouterr().out
    diagnosis = Diagnosis.from_json(files["json"])
    assert out == f"{diagnosis}\n"
    assert (diagnosis.weak, diagnosis.strong) == ("test_resnet", ("test_efficientnet",))
    assert [(layer.kind, layer.pair.source, layer.pair.target) for layer in diagnosis] == [
        ("blind_spots", "layer1", "blocks.1"),
        ("unreliable", "blocks.1", "layer1"),
    ]
    # Classes of the folder, which are not those of the networks
    assert diagnosis.class_names == ("class0", "class1")
    assert all({entry.label for entry in layer.classes} == {0, 1} for layer in diagnosis)
    assert all(layer.pair.residual_only.top1 is None for layer in diagnosis)
    assert all(len(layer.directions) == 2 for layer in diagnosis)
    again = tmp_path / "again.html"
    assert main(["report", str(files["json"]), "--html", str(again)]) == 0
    assert capsys.readouterr().out == out
    assert again.read_bytes() == files["html"].read_bytes()
    assert main(["report", str(files["json"]), "--csv", str(tmp_path / "a.csv")]) == 2
    assert "--csv is not available for a Diagnosis" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
def test_diagnose_takes_weights_for_each_strong_network(pictures: Path, tmp_path: Path) -> None:
    """A strong network with the weights of the weak one has no blind spots; random weights have."""
    weights, path = str(tmp_path / "w.pth"), tmp_path / "out.json"
    torch.save(load_model("test_resnet", pretrained=False).state_dict(), weights)
    networks = ["--weak", "test_resnet", "--weak-checkpoint", weights, "--strong", "test_resnet", "test_resnet"]
    files = ["--strong-checkpoint", weights, "-"]
    assert main(diagnose_options(pictures, *networks, *files, "--no-functional", "--json", str(path))) == 0
    diagnosis = Diagnosis.from_json(path)
    assert diagnosis.weak == "test_resnet (w) (weak)"
    assert diagnosis.strong == ("test_resnet (w) (strong 1)", "test_resnet")
    same, other = diagnosis.blind_spots
    assert same.pair.unexplained < 1e-3 < other.pair.unexplained
    assert same.pair.functional == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strong-checkpoint", "a.pth", "b.pth"], "one value of --strong-checkpoint for each of 1 strong networks"),
        (["--strong-classes", "3", "4"], "one value of --strong-classes"),
        (["--strong-checkpoint", "none.pth"], "no weight file at none.pth"),
        (["--strong", "test_resnat"], "nearest: test_resnet"),
        (["--layers", "layer9"], "layer9"),
        (["--num-directions", "-1"], "num_directions"),
        (["--plot", "out.doc"], "--plot writes .png, .pdf or .svg"),
    ],
)
def test_errors_of_diagnose_are_one_message(
    pictures: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = ["--weak", "test_resnet", "--strong", "test_resnet"]
    assert main(diagnose_options(pictures, *networks, *words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("knowiso: ")
    assert message in err


def test_report_shows_every_kind_and_names_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Path
) -> None:
    stability = stability_report()
    stability.to_json(tmp_path / "stability.json")
    assert main(["report", str(tmp_path / "stability.json"), "--html", str(tmp_path / "stability.html")]) == 0
    assert capsys.readouterr().out == f"{stability}\n"
    assert (tmp_path / "stability.html").read_text(encoding="utf-8") == stability.to_html()
    for content in ("[1, 2]", '{"format": "other"}', '{"format": ["a"]}', "{", ""):
        (tmp_path / "bad.json").write_text(content)
        assert main(["report", str(tmp_path / "bad.json")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "bad.json" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "layer9"}, "layer9"),
        ({"layers": "layer1="}, "expected source=target"),
        ({"source": "test_resnat"}, "nearest: test_resnet"),
        ({"dataset": "no/such/folder"}, "no folder 'no/such/folder'"),
        ({"split": "test"}, "no split 'test'"),
        ({"source_checkpoint": "none.pth"}, "no weight file at none.pth"),
        ({"plot": "out.doc"}, "--plot writes .png, .pdf or .svg"),
        ({"device": "nonsense"}, "device='nonsense' cannot be used here"),
        ({"order": "-1"}, "order"),
    ],
)
def test_errors_are_one_message(
    pictures: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(pictures, **changes)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("knowiso: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("default::knowiso_train.errors.KnowisoWarning")
def test_warnings_are_one_line_each(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 96 channels on one position: far too few rows
    assert main(options(pictures, layers="layer4", max_images="40")) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("knowiso: warning: layer4 → layer4 (forward): ") for line in lines)
    assert "! layer4 (forward): " in out


def test_debugging_lets_errors_through(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWISO_DEBUG", "1")
    with pytest.raises(OptionError):
        main(options(pictures, layers="=layer1"))


def test_files_are_written_where_the_reader_of_the_text_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, page = tmp_path / "stability.json", tmp_path / "stability.html"
    stability_report().to_json(saved)
    read, write = os.pipe()
    os.close(read)  # as `| head` does
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["report", str(saved), "--html", str(page)]) == 0
    assert page.is_file()


def test_defaults_of_diagnose_are_those_of_the_function() -> None:
    words = ["diagnose", "--weak", "a", "--strong", "b", "--layers", "c", "--dataset", "d"]
    defaults = vars(parser().parse_args(words))
    names = ("num_directions", "num_shared", "num_images", "num_thumbnails", "order", "kernel_size", "noise_floor")
    signature = inspect.signature(diagnose).parameters
    assert {name: defaults[name] for name in names} == {name: signature[name].default for name in names}


def test_layers_lists_names_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "test_resnet", "--image-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test_resnet, input 3 × 64 × 64"
    row = next(line for line in lines if line.strip().startswith("layer2 "))
    assert "Sequential" in row
    assert "8 × 8" in row
    assert not any("layer2.0.conv1" in line for line in lines)
    assert main(["layers", "test_resnet", "--match", "**.conv1"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:-2]]
    assert "layer2.0.conv1" in names
    assert all(name.endswith("conv1") for name in names)
    assert main(["layers", "vit_tiny_patch16_224", "--image-size", "64", "--depth", "1"]) == 2
    assert "cannot run on images of 64 × 64" in capsys.readouterr().err


def test_layer_pairs() -> None:
    assert layer_pairs(["a", "b.*"]) == ["a", "b.*"]
    assert layer_pairs(["a=b", "c"]) == [("a", "b"), ("c", "c")]
    for bad in ("=b", "a="):
        with pytest.raises(OptionError, match="source=target"):
            layer_pairs([bad])


def test_every_option_says_what_it_does_and_its_default() -> None:
    commands: Any = next(action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"
            if action.option_strings and not action.required and action.dest != "help":
                assert "default" in action.help, f"{name} {action.option_strings[0]} does not tell its default"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from knowiso_train.cli import parser; parser().format_help(); "
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert time.perf_counter() - began < 5  # 0.1 s where nothing else runs


def test_accelerate_launch_measures_the_same_in_two_processes(pictures: Path, tmp_path: Path) -> None:
    arguments = options(pictures, json=str(tmp_path / "one.json"))
    assert main(arguments) == 0
    arguments[arguments.index(str(tmp_path / "one.json"))] = str(tmp_path / "two.json")
    port = str(29_100 + os.getpid() % 400)
    # With --cpu, accelerate would start one process
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        port,
        "-m",
        "knowiso_train.cli",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["settings"]["processes"] == 2
    assert two["images"] == one["images"]
    assert two["pairs"][0]["unexplained"] == pytest.approx(one["pairs"][0]["unexplained"], abs=1e-6)
    assert done.stdout.count("explained from") == 1  # the main process alone prints


def compare_options(pictures: Path, *words: str) -> list[str]:
    options = ["--dataset", str(pictures), "--image-size", "32", "--input-size", "image", "--layers", "layer1"]
    return ["compare", "--no-progress", "--workers", "0", "--device", "cpu", "--no-pretrained", *options, *words]


# Random networks have channels without variance
@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_compare_checkpoints_with_the_last_and_show_them_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = [load_model("test_resnet", pretrained=False) for _ in range(2)]
    for epoch, network in zip((1, 2, 10), [*networks, networks[1]], strict=True):
        torch.save(network.state_dict(), tmp_path / f"epoch-{epoch}.pth")
    files = {name: str(tmp_path / f"out.{name}") for name in ("json", "html", "csv")}
    outputs = [word for name, file in files.items() for word in (f"--{name}", file)]
    words = ["--model", "test_resnet", "--checkpoints", str(tmp_path), "--path", str(tmp_path / "stages"), *outputs]
    assert main(compare_options(pictures, *words)) == 0
    printed = capsys.readouterr().out
    comparison = StageComparison.from_json(Path(files["json"]))
    assert comparison.reference == "epoch-10"
    assert [stage.step for stage in comparison] == [1, 2]
    first, second = comparison.curve("layer1")
    assert first > 0.05 > 0.001 > second
    assert len(list((tmp_path / "stages").glob("*.json"))) == 2
    assert main(["report", files["json"]]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_compare_weight_files_and_networks_with_a_reference(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.pth"
    torch.save(load_model("test_resnet", pretrained=False).state_dict(), file)
    words = [
        "--reference",
        "test_resnet",
        "--reference-checkpoint",
        str(file),
        "--no-functional",
        "--max-images",
        "100",
    ]
    stages = [f"same={file}", "test_resnet"]
    assert main(compare_options(pictures, *words, "--stages", *stages, "--json", str(tmp_path / "a.json"))) == 0
    comparison = StageComparison.from_json(tmp_path / "a.json")
    assert comparison.names == ("same", "test_resnet")
    assert comparison["same"]["layer1"].lost < 0.001 < 0.05 < comparison["test_resnet"]["layer1"].lost
    # A folder of results refuses another content of the file, whose path may hold "="
    stage = tmp_path / "epoch=3-step=400.pth"
    torch.save(load_model("test_resnet", pretrained=False).state_dict(), stage)
    resumed = compare_options(pictures, *words, "--stages", str(stage), "--path", str(tmp_path / "stages"))
    assert main(resumed) == main(resumed) == 0
    torch.manual_seed(7)
    torch.save(load_model("test_resnet", pretrained=False).state_dict(), stage)
    assert main(resumed) == 2
    assert "was measured with other settings (network is" in capsys.readouterr().err
    assert main(compare_options(pictures, "--stages", str(file))) == 2
    assert "need --model" in capsys.readouterr().err
    assert main(compare_options(pictures, *words, "--stages", "a=test_resnet", "a=test_resnet")) == 2
    assert "two stages are named 'a'" in capsys.readouterr().err
