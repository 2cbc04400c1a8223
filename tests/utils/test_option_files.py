"""Options in files: read by `--config`, and written so that a command can be repeated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from knowiso_train.cli import main, parser
from knowiso_train.experiment import RecipeParser, at_least, run_settings
from knowiso_train.utils.option_files import ConfigParser, option_values

MEASURE = ["measure", "--source", "a", "--target", "b", "--layers", "x", "y=z", "--dataset", "folder"]


def write(folder: Path, content: dict[str, Any], name: str = "run.json") -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--no-pretrained", "--max-images", "7", "--similarity"],
        ["--similarity", "cka", "r2", "--functional", "--json", "out.json", "--at", "input"],
    ],
    ids=" ".join,
)
def test_options_written_to_a_file_repeat_the_command(extra: list[str], tmp_path: Path) -> None:
    args = parser().parse_args(MEASURE + extra)
    file = write(tmp_path, option_values(vars(args)))
    assert vars(parser().parse_args(["measure", "--config", file])) == vars(args)


def test_settings_of_a_recipe_repeat_its_run(tmp_path: Path) -> None:
    recipe = RecipeParser("A recipe.")
    recipe.add_data(["train", "test"], "splits", digits="some")
    recipe.add_training(padding=2, save_every=10)
    recipe.add("--ratio", 0.5, at_least(0, float), "a ratio")
    args = recipe.parse_args(["--data-options", "download=True", "kind=(1, 2)", "--flip", "--ratio", "0.25"])
    file = write(tmp_path, run_settings(args))
    assert vars(recipe.parse_args(["--config", file])) == vars(args)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: a\ntarget: b\nlayers: [x]\ndataset: folder\nmax_images: 5\npretrained: false\n")
    args = parser().parse_args(["measure", f"--config={file}", "--max-images", "9", "--layers", "p", "q"])
    assert (args.max_images, args.layers, args.pretrained) == (9, ["p", "q"], False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"layerz": 1}', "unknown option 'layerz'; nearest: layers"),
        ("[1, 2]", "expected a mapping of options in"),
        ("{", "is no JSON"),
        ('{"order": "two"}', "argument --order: invalid int value: 'two'"),
    ],
)
def test_errors_name_file_and_option(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit):
        parser().parse_args([*MEASURE, "--config", str(tmp_path / "run.json")])
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--config", "missing.yaml"], ["--config"]):
        with pytest.raises(SystemExit):
            ConfigParser().parse_args(words)
    assert "missing.yaml" in (text := capsys.readouterr().err)
    assert "expected one argument" in text


def test_recipes_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in (("distill", "--teacher"), ("prune", "--tune-steps"), ("refine", "--peer")):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0
        assert f"usage: knowiso {name}" in text
        assert option in text
    assert isinstance(parser(), argparse.ArgumentParser)
