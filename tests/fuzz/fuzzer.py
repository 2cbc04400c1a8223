"""Seeded bad inputs for the public functions, and checks of what a call leaves behind.

    python -m tests.fuzz.fuzzer --count 10000 --seed 1            # long; prints each finding once, with its count
    python -m tests.fuzz.fuzzer --target measure --count 500

A call may succeed or raise a KnowisoError. Findings are: any other exception, a call over the time limit, and a network
whose weights, buffers, modes, `requires_grad` flags or hooks, or a random state, differ after the call.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.common.results import record
from tests.fuzz.calls import CLASSES, INTERRUPTED_TARGETS, SIDE, Call, Interrupted, calls, loader, network
from tests.fuzz.damage import damage, saved_files

SECONDS = 20  # limit of the processor time of one call, which does not depend on other programs


# Options that state the length of a run, for which a large number is no mistake
RUN_LENGTHS = {"steps", "epochs", "block_steps"}


class OutOfTimeError(BaseException):
    """A call over the time limit. Not an Exception, so that no handler swallows it."""


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
    """Raise OutOfTimeError in the main thread after some seconds of processor time."""

    def expired(*_: Any) -> None:
        raise OutOfTimeError

    previous = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def attempt(call: Call, allowed: tuple[type[BaseException], ...] = ()) -> str | None:
    """Make a call, and return a finding or None."""
    before, finding, failed = snapshot([*call.untouched, *call.changed]), None, True
    try:
        with time_limit(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            call.function(**call.arguments)
        failed = False
    except (ki.KnowisoError, *allowed):
        pass
    except OutOfTimeError as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "knowiso_train" in f.filename]
        finding = f"over {SECONDS} s in {place(frames)}"
    except Exception as error:
        if not of_the_user(error, call):
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "knowiso_train/" in f.filename]
            finding = f"raw {type(error).__name__} at {place(frames)}: {str(error)[:100]}"
    # After an error the networks that are changed in place are as before, too
    models = [*call.untouched, *call.changed] if failed else call.untouched
    after = snapshot(models)
    left = differences(before[: len(after)], after, models)
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
    called_wrongly = isinstance(error, (TypeError, ValueError)) and (callables or replaced)
    return "the user's function failed" in str(error) or in_network or recorded or called_wrongly


def place(frames: list[traceback.FrameSummary]) -> str:
    """Return file, line and function of the innermost frame of the library."""
    if not frames:
        return "?"
    frame = frames[-1]
    return f"{frame.filename.split('knowiso_train/')[-1]}:{frame.lineno} {frame.name}"


def is_long(value: Any) -> bool:
    """Return whether a value is a finite number of steps or epochs that takes too long for a test."""
    return isinstance(value, (int, float)) and 1000 < value < math.inf


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
            given |= {name: 3 for name in RUN_LENGTHS & given.keys() if is_long(given[name])}
            # Networks that are replaced by bad values are not watched
            shown = ", ".join(f"{key}={str(value)[:50]!r} ({type(value).__name__})" for key, value in given.items())
            call.arguments |= given
            yield target, shown, attempt(call)


def interrupts(seed: int, count: int, targets: list[str] | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Yield target, input and finding of calls whose network raises in its n-th forward."""
    rng = random.Random(seed)
    names = targets or [*INTERRUPTED_TARGETS]
    for _ in range(count):
        target, error, after = (
            rng.choice(names),
            rng.choice((KeyboardInterrupt, RuntimeError, MemoryError)),
            rng.randrange(12),
        )
        torch.manual_seed(0)
        layer = Interrupted(error)
        call = calls(layer)[target]()
        layer.forwards.left = after
        yield target, f"{error.__name__} at forward {after}", attempt(call, (error,))


def damaged_files(seed: int, count: int) -> Iterator[tuple[str, str, str | None]]:
    """Yield reader, damage and finding of saved files with damage."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        readers = saved_files(Path(name))
        for read, _ in readers.values():
            read()
        for _ in range(count):
            label = rng.choice(list(readers))
            read, file = readers[label]
            whole = file.read_bytes()
            shown, damaged = damage(whole, file.suffix, rng)
            file.write_bytes(damaged)
            yield label, f"{file.name}: {shown}", attempt(Call(read, {}))
            file.write_bytes(whole)


def main() -> None:
    """Fuzz, and print the findings with their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=1000, help="inputs in all: 80 % arguments, 10 % interrupts, 10 % files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", help="functions; default: all")
    parser.add_argument("--record", action="store_true", help="write the counts to benchmarks/results/fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    findings: Counter[tuple[str, str]] = Counter()
    inputs: Counter[str] = Counter()
    examples: dict[tuple[str, str], str] = {}
    kinds = [bad_arguments(args.count * 8 // 10, args.seed, args.target)]
    if not args.target:
        kinds += [interrupts(args.seed, args.count // 10), damaged_files(args.seed, args.count // 10)]
    for kind in kinds:
        for target, shown, finding in kind:
            inputs[target] += 1
            if finding:
                findings[target, finding] += 1
                if (target, finding) not in examples:
                    examples[target, finding] = shown
                    print(f"* {target} | {finding} | {shown}", flush=True)
    for (target, finding), times in findings.most_common():
        print(f"{times} times: {target} | {finding}")
    print(f"{inputs.total()} inputs, {findings.total()} findings of {len(findings)} kinds")
    if args.record:
        figures = {"inputs": inputs.total(), "findings": findings.total(), "targets": dict(sorted(inputs.items()))}
        seconds = round(time.monotonic() - start)
        print(record("fuzz", figures | {"seconds": seconds}, settings={"count": args.count, "seed": args.seed}))


if __name__ == "__main__":
    main()
