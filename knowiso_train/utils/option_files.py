"""Command-line options in files: read by `--config`, and written beside the results of a command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

CONFIG_OPTION = "--config"


class ConfigParser(argparse.ArgumentParser):
    """Argument parser with `--config FILE`: options from a YAML or JSON file, which those of the command line override.

    Keys are the names of the options, with or without dashes: `max-images: 500` is `--max-images 500`. A list gives
    the values of an option that takes several, and true sets a switch.

    Examples:
        >>> import tempfile
        >>> parser = ConfigParser()
        >>> _ = parser.add_argument("--max-images", type=int)
        >>> _ = parser.add_argument("--flip", action="store_true")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.yaml").write_text("{max-images: 500, flip: true}")
        ...     parser.parse_args(["--config", f"{folder}/run.yaml", "--max-images", "20"])
        Namespace(max_images=20, flip=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.add_argument(
            CONFIG_OPTION,
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML or JSON file of options, which further options override (default: none)",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse words after those of the file have been put before them."""
        return super().parse_known_args(self._expanded(sys.argv[1:] if args is None else list(args)), namespace)

    def _expanded(self, words: list[str]) -> list[str]:
        """Return the words of `--config` files, then the other words."""
        config_words, others, rest = [], [], iter(words)
        for word in rest:
            name, equals, value = word.partition("=")
            if name != CONFIG_OPTION:
                others.append(word)
                continue
            file = value if equals else next(rest, None)
            if not file:
                self.error("argument --config: expected one argument")
            config_words += self._words(Path(file))
        return config_words + others

    def _words(self, path: Path) -> list[str]:
        """Return the options of a file as words of a command line."""
        try:
            options = read_options(path)
        except (OSError, ValueError) as error:
            self.error(f"argument --config: {error}")
        actions = {name: action for action in self._actions for name in _names(action)}
        words = []
        for key, value in options.items():
            action = actions.get(str(key).lstrip("-").replace("_", "-"))
            if action is None or not action.option_strings:
                near = get_close_matches(str(key).replace("_", "-"), actions, n=3, cutoff=0.5)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                self.error(f"argument --config: {path} has an unknown option {key!r}{hint}")
            words += _action_words(action, str(key), value)
        return words


def read_options(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file.

    Raises:
        OSError: A file that cannot be read.
        ValueError: A file that is no mapping.

    Examples:
        >>> read_options(Path("missing.json"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'missing.json'
    """
    import yaml  # installed with accelerate and timm

    text = path.read_text(encoding="utf-8")
    try:
        options = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {'JSON' if path.suffix.lower() == '.json' else 'YAML'}: {error}") from error
    if not isinstance(options, Mapping):
        raise ValueError(f"expected a mapping of options in {path}, got {type(options).__name__}")
    return dict(options)


def option_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parsed options as values for a file; those that are None or functions are left out.

    Args:
        values: Options by name, such as `vars(args)`.

    Examples:
        >>> option_values({"output": Path("run"), "data_options": [("download", True)], "ema": None})
        {'output': 'run', 'data_options': ['download=True']}
    """
    return {name: _plain(value) for name, value in values.items() if value is not None and not callable(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2:  # KEY=VALUE
        return f"{value[0]}={value[1]!r}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float) else str(value)


def _names(action: argparse.Action) -> Iterable[str]:
    """Return the names of an option in a file."""
    return [*(option.lstrip("-") for option in action.option_strings), action.dest.replace("_", "-")]


def _action_words(action: argparse.Action, key: str, value: Any) -> list[str]:
    """Return one option of a file as words."""
    option = action.option_strings[-1]
    if action.nargs == 0:
        # `pretrained: false` and `no-pretrained: true` both set --no-pretrained
        constant = getattr(action, "const", True)
        names_destination = key.lstrip("-").replace("-", "_") == action.dest
        return [option] if bool(value) == (constant if names_destination else True) else []
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [option, *map(str, values)] if action.nargs is not None else [f"{option}={value}"]
