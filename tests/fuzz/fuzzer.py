"""Seeded bad inputs for the public functions, and checks of what a call leaves behind.

    python -m tests.fuzz.fuzzer --count 10000 --seed 1            # long; prints each finding once, with its count
    python -m tests.fuzz.fuzzer --target measure --count 500

A call may succeed or raise a KnowisoError. Findings are: any other exception, a call over the time limit, and a network
whose weights, buffers, modes, `requires_grad` flags or hooks, or a random state, differ after the call.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import io
import json
import math
import random
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import knowiso_train as ki

SECONDS = 20  # limit of one call
SIDE, IMAGES, BATCH = 8, 60, 20


class OutOfTimeError(BaseException):
    """A call over the time limit. Not an Exception, so that no handler swallows it."""


@dataclass
class Call:
    """A function with valid arguments, and the networks that it may (`changed`) and may not change."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    untouched: list[nn.Module] = field(default_factory=list)


class Interrupted(nn.Module):
    """A layer that raises at its n-th forward."""

    def __init__(self, error: type[BaseException], after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error("interrupted")
        return x


def network(seed: int = 0, extra: nn.Module | None = None) -> nn.Sequential:
    """Return a small convolutional classifier with batch norm and buffers."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        extra or nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def loader(labels: bool = False) -> list[Any]:
    """Return batches of noise images, with labels where they are asked for."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator).split(BATCH)
    numbers = torch.arange(IMAGES).remainder(4).split(BATCH)
    return list(zip(images, numbers, strict=True)) if labels else list(images)


def pruned_pair() -> tuple[nn.Module, nn.Module]:
    """Return a network, and itself with half of its inner width."""
    original = network()
    return original, ki.prune(original, loader(), macs=0.6, progress=False).model


def loss_step(**options: Any) -> None:
    """Build a loss, and take one step with it."""
    iso = ki.IsomorphismLoss(**options)
    with iso:
        loss = options["student"](loader()[0][:4]).square().mean() + iso()
        loss.backward()
    options["student"].zero_grad()


def calls(extra: nn.Module | None = None) -> dict[str, Callable[[], Call]]:
    """Return makers of a valid call for every public function."""

    def measure() -> Call:
        a, b = network(1, extra), network(2)
        given = {"source": a, "target": b, "loader": loader(), "layers": ["2", "5"], "order": 0, "progress": False}
        return Call(ki.measure, given, [a, b])

    def loss() -> Call:
        a, b = network(1, extra).train(), network(2)
        return Call(loss_step, {"student": a, "teacher": b, "layers": ["2", "5"]}, [b])

    def prune() -> Call:
        model = network(1, extra)
        return Call(ki.prune, {"model": model, "loader": loader(), "macs": 0.7, "progress": False}, [model])

    def refit() -> Call:
        original, pruned = pruned_pair()
        given = {"pruned": pruned, "original": original, "loader": loader(), "progress": False}
        return Call(ki.refit, given, [original])

    def finetune() -> Call:
        original, pruned = pruned_pair()
        given = {"pruned": pruned, "original": original, "loader": loader(), "steps": 2, "progress": False}
        return Call(ki.finetune, given, [original])

    def refine() -> Call:
        a, b = network(1, extra), network(2)
        given = {"model": a, "peers": [b], "loader": loader(), "progress": False}
        return Call(ki.refine, given, [a, b])

    def importance() -> Call:
        model = network(1, extra)
        return Call(ki.IsomorphismImportance, {"model": model, "loader": loader()}, [model])

    def taps() -> Call:
        model = network(1, extra)
        return Call(ki.FeatureTaps, {"model": model, "layers": ["2"]}, [model])

    def disentangler() -> Call:
        x, y = torch.randn(40, 6, 4, 4), torch.randn(40, 8, 4, 4)
        return Call(lambda **options: ki.Disentangler(**options).fit(x, y), {"order": 0}, [])

    def callback() -> Call:
        a, b = network(1, extra), network(2)
        given = {"student": a, "teacher": b, "layers": ["2"], "loader": loader(), "every": 1, "order": 0}
        return Call(lambda **options: ki.IsomorphismCallback(**options).step(), given, [a, b])

    return {
        "measure": measure,
        "loss": loss,
        "prune": prune,
        "refit": refit,
        "finetune": finetune,
        "refine": refine,
        "importance": importance,
        "taps": taps,
        "disentangler": disentangler,
        "callback": callback,
    }


CLASSES = {"loss": ki.IsomorphismLoss, "disentangler": ki.Disentangler, "callback": ki.IsomorphismCallback}


def parameters_of(target: str, call: Call) -> list[str]:
    """Return the names of the parameters that can be given to a target."""
    signature = inspect.signature(CLASSES.get(target, call.function))
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self"
    ]


def bad_values(rng: random.Random, folder: Path) -> list[Callable[[], Any]]:
    """Return makers of values that are rarely what a parameter expects."""
    numbers = [-1, 0, 1, 2, 3, 10**6, 10**18, -(10**18), 0.5, -0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan]
    simple: list[Any] = [
        None, True, False, *numbers, "", "3", "layer", "auto", "all", "cuda:99", "meta", b"bytes", 1j, object(), int,
        nn.Module, len, (), [], {}, {"a": 1}, {"2": None}, ["2", "2"], [None], (1, 2, 3), (0.6, 0.2, 0.2),
        ("a", "b", "c"), [1.0, math.nan], {1: 2}, {"2": "5"}, [("2", "5", "8")], np.int64(3), np.float32(0.5),
        np.zeros(3), Path("nowhere/x"), range(3), frozenset({"2"}), torch.float16, torch.device("cpu"),
        torch.device("meta"),
    ]  # fmt: skip
    made: list[Callable[[], Any]] = [
        lambda: torch.tensor(2),
        lambda: torch.randn(2),
        lambda: torch.full((1,), math.nan),
        lambda: torch.randn(2, 3, SIDE, SIDE),
        lambda: nn.Identity(),
        lambda: nn.Linear(2, 2),
        lambda: network(3),
        lambda: network(3).half(),
        lambda: network(3).to("meta"),
        lambda: nn.Sequential(),
        lambda: iter(loader()),
        lambda: loader()[:1],
        lambda: [x[:0] for x in loader()],
        lambda: [x[:, :2] for x in loader()],
        lambda: [x.half() for x in loader()],
        lambda: [x.long() for x in loader()],
        lambda: [x * math.nan for x in loader()],
        lambda: [x.to("meta") for x in loader()],
        lambda: [x.numpy() for x in loader()],
        lambda: [{"image": x, "y": 1} for x in loader()],
        lambda: [(x, None) for x in loader()],
        lambda: [[x] for x in loader()],
        lambda: [None, *loader()],
        lambda: [(x, y - 9) for x, y in loader(labels=True)],
        lambda: [(x, y.float()) for x, y in loader(labels=True)],
        lambda: loader(labels=True),
        lambda: lambda *a, **k: None,
        lambda: lambda x: x[:1],
        lambda: lambda *a: (_ for _ in ()).throw(RuntimeError("the user's function failed")),
        lambda: folder,
        lambda: folder / "missing" / "file.json",
        lambda: random.Random(1),
    ]
    return [*(lambda value=value: value for value in simple), *made]


def snapshot(models: list[nn.Module]) -> list[Any]:
    """Return everything of networks and random states that a call must leave as it is."""
    states: list[Any] = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    for model in models:
        states.append({name: value.clone() for name, value in model.state_dict(keep_vars=False).items()})
        states.append(
            [(name, str(value.device), value.dtype, value.requires_grad) for name, value in model.named_parameters()]
        )
        states.append([(name, module.training) for name, module in model.named_modules()])
        states.append([len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()])
    return states


def differences(before: list[Any], after: list[Any], models: list[nn.Module]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    kinds = ["torch random state", "random state", "NumPy random state"]
    kinds += ["weights or buffers", "devices, dtypes or requires_grad", "modes", "hooks"] * len(models)
    return [kind for kind, old, new in zip(kinds, before, after, strict=True) if not same(old, new)]


def same(old: Any, new: Any) -> bool:
    """Return whether two parts of a snapshot are equal."""
    if isinstance(old, Tensor):
        return old.device == new.device and old.shape == new.shape and torch.equal(old, new)
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(same(old[key], new[key]) for key in old)
    return bool(old == new)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTimeError in the main thread after some seconds."""

    def expired(*_: Any) -> None:
        raise OutOfTimeError

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(call: Call, allowed: tuple[type[BaseException], ...] = ()) -> str | None:
    """Make a call, and return a finding or None."""
    before, finding = snapshot(call.untouched), None
    try:
        with time_limit(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            call.function(**call.arguments)
    except (ki.KnowisoError, *allowed):
        pass
    except OutOfTimeError as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "knowiso_train" in f.filename]
        finding = f"over {SECONDS} s in {place(frames)}"
    except Exception as error:
        if not of_the_user(error, call):
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "knowiso_train/" in f.filename]
            finding = f"raw {type(error).__name__} at {place(frames)}: {str(error)[:100]}"
    left = differences(before, snapshot(call.untouched), call.untouched)
    if left:
        finding = f"left behind: {', '.join(left)}" + (f" after {finding}" if finding else "")
    return finding


def of_the_user(error: Exception, call: Call) -> bool:
    """Return whether an error was raised inside of a network or function of the user, which passes it on."""
    frames = list(traceback.extract_tb(error.__traceback__))
    last = max((i for i, frame in enumerate(frames) if "knowiso_train/" in frame.filename), default=-1)
    in_network = any("torch/nn/modules" in frame.filename for frame in frames[last + 1 :])
    # `__torch_function__` of the recorder runs each operation of the network
    recorded = last >= 0 and frames[last].name == "__torch_function__"
    callables = any(callable(value) for value in call.arguments.values() if not isinstance(value, nn.Module))
    replaced = any(isinstance(call.arguments.get(name), nn.Module) for name in ("forward", "log", "schedule"))
    called_wrongly = isinstance(error, TypeError) and (callables or replaced)
    return "the user's function failed" in str(error) or in_network or recorded or called_wrongly


def place(frames: list[traceback.FrameSummary]) -> str:
    """Return file, line and function of the innermost frame of the library."""
    if not frames:
        return "?"
    frame = frames[-1]
    return f"{frame.filename.split('knowiso_train/')[-1]}:{frame.lineno} {frame.name}"


def bad_arguments(count: int, seed: int, targets: list[str] | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Yield target, input and finding of calls with one or two bad arguments."""
    rng = random.Random(seed)
    makers = calls()
    with tempfile.TemporaryDirectory() as name:
        values = bad_values(rng, Path(name))
        for _ in range(count):
            target = rng.choice(targets or list(makers))
            torch.manual_seed(0)
            call = makers[target]()
            changed = rng.sample(parameters_of(target, call), rng.choice((1, 1, 1, 2)))
            given = {parameter: rng.choice(values)() for parameter in changed}
            # Networks that are replaced by bad values are not watched
            shown = ", ".join(f"{key}={str(value)[:50]!r} ({type(value).__name__})" for key, value in given.items())
            call.arguments |= given
            yield target, shown, attempt(call)


def interrupts(seed: int, count: int, targets: list[str] | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Yield target, input and finding of calls whose network raises in its n-th forward."""
    rng = random.Random(seed)
    names = targets or ["measure", "loss", "prune", "refine", "importance", "callback"]
    for _ in range(count):
        target, error, after = (
            rng.choice(names),
            rng.choice((KeyboardInterrupt, RuntimeError, MemoryError)),
            rng.randrange(12),
        )
        torch.manual_seed(0)
        call = calls(Interrupted(error, after))[target]()
        yield target, f"{error.__name__} at forward {after}", attempt(call, (error,))


def damaged_files(seed: int, count: int) -> Iterator[tuple[str, str, str | None]]:
    """Yield reader, damage and finding of saved files with damage."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dead channels of the small network
            report = ki.measure(network(1), network(2), loader(), "2", order=0, progress=False)
        report.to_json(folder / "report.json")
        report.pairs[0].disentangler.save(folder / "maps")
        original, pruned = pruned_pair()
        ki.save_pruned(folder / "pruned", pruned, original, factory="external", example=(1, 3, SIDE, SIDE))
        readers: dict[str, tuple[Callable[[], Any], list[Path]]] = {
            "Report.from_json": (lambda: ki.Report.from_json(folder / "report.json"), [folder / "report.json"]),
            "Disentangler.load": (lambda: ki.Disentangler.load(folder / "maps"), sorted((folder / "maps").iterdir())),
            "load_pruned": (
                lambda: ki.load_pruned(folder / "pruned", model=copy.deepcopy(original)),
                sorted((folder / "pruned").iterdir()),
            ),
        }
        for reader, _ in readers.values():
            reader()
        for _ in range(count):
            label = rng.choice(list(readers))
            read, files = readers[label]
            file = rng.choice(files)
            whole = file.read_bytes()
            shown, damaged = damage(whole, file.suffix == ".json", rng)
            file.write_bytes(damaged)
            yield label, f"{file.name}: {shown}", attempt(Call(read, {}, [original]))
            file.write_bytes(whole)


def damage(content: bytes, is_json: bool, rng: random.Random) -> tuple[str, bytes]:
    """Return a description of some damage, and the damaged content."""
    kinds = [
        "truncated",
        "bytes",
        "empty",
        "pickle",
        "text",
        *(["value", "removed", "deep", "huge"] * 2 if is_json else []),
    ]
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
    if kind == "deep":
        return kind, b"[" * 100_000 + b"]" * 100_000
    if kind == "huge":
        return kind, content.replace(b"1", b"1" + b"0" * rng.choice((5, 12, 400)), 1)
    tree = json.loads(content)
    spots = list(places_in(tree))
    parent, key = rng.choice(spots)
    if kind == "removed":
        shown = f"{key!r} removed"
        del parent[key]
    else:
        value = rng.choice([None, True, -1, 0, 10**12, 1.5, "text", [], {}, [1, 2], {"a": 1}, "NaN"])
        shown, parent[key] = f"{key!r} = {value!r}", value
    return shown, json.dumps(tree).encode()


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a JSON value."""
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from places_in(value)


def main() -> None:
    """Fuzz, and print the findings with their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=1000, help="inputs in all: 80 % arguments, 10 % interrupts, 10 % files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", help="functions; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    findings: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    kinds = [bad_arguments(args.count * 8 // 10, args.seed, args.target)]
    if not args.target:
        kinds += [interrupts(args.seed, args.count // 10), damaged_files(args.seed, args.count // 10)]
    total = 0
    for kind in kinds:
        for target, shown, finding in kind:
            total += 1
            if finding:
                findings[target, finding] += 1
                examples.setdefault((target, finding), shown)
    for (target, finding), times in findings.most_common():
        print(f"* {target} | {finding} | {times} | {examples[target, finding]}")
    print(f"{total} inputs, {sum(findings.values())} findings of {len(findings)} kinds")


if __name__ == "__main__":
    main()
