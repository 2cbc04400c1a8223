"""Pruning without training and without labels: `ki.prune` against every importance of torch-pruning, a channel-mixing ridge and a local search.

    python benchmarks/bench_prune.py --screen      # every rival at one ratio and seed, judged on the select images
    python benchmarks/bench_prune.py               # the best eight and ours in full; writes results/bench_prune.json
    python benchmarks/bench_prune.py --quick       # does it run? a minute, nothing is written

Stopped and started again, it goes on where it was: each row is kept in `benchmarks/.cache/bench_prune/rows.jsonl` as it is finished.

ResNet-56 on CIFAR-10 (real weights, 93.39 %): 1,024 training images calibrate, drawn by the seed; choices are made on the first 2,000 test images
("select"), what is claimed is judged on the other 8,000. Everybody prunes the widths inside of the blocks: option-A shortcuts fix the others.
timm's `tf_efficientnet_lite0` (ImageNet weights): half of the 1,000 photographs calibrates, drawn by the seed, the other half judges; rivals are
screened on the judging half too, which favours them. "inner" are widths with one writer and one reader; "all channels" is whatever torch-pruning
finds but the classifier's output.

Every method gets the same images and the same number of multiply-adds of convolutions and linear layers, counted by one function: at most
1 / ratio of the original's. torch-pruning's pruners are brought there by bisection on the pruning ratio; iterative ones in five steps of equal
multiply-adds, scores taken anew at each. Criteria that ask for gradients take what the original network says for labels.

Finishes: "bare"; "statistics": batch norms' running statistics from the same images; "refit": `ki.refit` on the same images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pruning_rivals import (
    IMPORTANCES,
    Calibration,
    Cutter,
    Macs,
    Regression,
    grams,
    inner_roots,
    mixed,
    prune_with,
    recompute_statistics,
    set_weights,
    uniform,
)
from record import record, table
from torch import Tensor, nn
from zoo import DATA, cifar10, cifar_resnet, efficientnet_lite

import knowiso_train as ki
from knowiso_train.pruning import mix_patches, recording

CACHE = Path(__file__).parent / ".cache" / "bench_prune"
FINISHES = ("bare", "statistics", "refit")
OURS = "ki.prune"
STEPS = 5
BEST = 8


class Task:
    """A network, what calibrates it and what judges it.

    Attributes:
        name: of the network.
        ratios: how many times fewer multiply-adds.
        screened: the ratio of the screening.
        parts: of the judging images.
        claimed: the part that is claimed on; `chosen`: the part that choices are made on.
    """

    name: str
    ratios: tuple[float, ...]
    screened: float
    claimed, chosen = "judged", "judged"
    batch = 100

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    @cached_property
    def original(self) -> nn.Module:
        return self.build().requires_grad_(True)

    @cached_property
    def macs(self) -> Macs:
        return Macs(self.original, self.example)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        """Names of the layers whose output channels may go."""
        raise NotImplementedError

    @property
    def example(self) -> Tensor:
        raise NotImplementedError

    def build(self) -> nn.Module:
        raise NotImplementedError

    def calibration(self, seed: int) -> Tensor:
        raise NotImplementedError

    def judges(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        """Batches, labels, the original's logits, and the parts."""
        raise NotImplementedError

    def importances(self) -> list[str]:
        return list(IMPORTANCES)


class Cifar(Task):
    """ResNet-56 on CIFAR-10."""

    name, ratios, screened, chosen = "resnet56", (1.5, 2.0, 2.5, 3.0), 2.0, "select"

    def build(self) -> nn.Module:
        return cifar_resnet(56)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, 32, 32)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        return {"inner": [name for name, module in self.original.named_modules() if isinstance(module, nn.Conv2d) and name.endswith(".conv1")]}

    @cached_property
    def train(self) -> Tensor:
        return kept_on_disk("cifar10_train", lambda: cifar10("train"))[0]

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        return kept_on_disk("cifar10_test", lambda: cifar10("test"))

    @cached_property
    def logits(self) -> Tensor:
        return kept_on_disk("resnet56_logits", lambda: (predict(self.original, self.test[0].split(self.batch)),))[0]

    def calibration(self, seed: int) -> Tensor:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[: 256 if self.quick else 1024]]

    def judges(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        n = 600 if self.quick else 2000 if screen else 10_000
        images, labels = self.test
        select = n // 2 if self.quick else 2000
        parts = {"select": slice(0, select), "judged": slice(select, n), "all": slice(0, n)}
        if select == n:
            parts = {"select": parts["select"]}
        return list(images[:n].split(self.batch)), labels[:n], self.logits[:n], parts


class Lite(Task):
    """EfficientNet-Lite0 on ImageNet photographs."""

    name, ratios, screened = "lite0", (1.3, 1.5, 2.0), 1.5
    batch = 25

    def build(self) -> nn.Module:
        return efficientnet_lite(0)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, 224, 224)

    @cached_property
    def spaces(self) -> dict[str, list[str]]:
        classifier = next(name for name, module in self.original.named_modules() if isinstance(module, nn.Linear))
        inner = inner_roots(self.original, self.example, [classifier])
        layers = {name: module for name, module in self.original.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1}
        return {"inner": inner, "all": list(layers)}

    @cached_property
    def photographs(self) -> tuple[Tensor, Tensor]:
        """As bytes, and class numbers."""
        return kept_on_disk("photographs", photographs)

    @cached_property
    def logits(self) -> Tensor:
        return kept_on_disk("lite0_logits", lambda: (predict(self.original, list(map(normalised, self.photographs[0].split(self.batch)))),))[0]

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(self.photographs[0]), generator=torch.Generator().manual_seed(seed))
        half = 50 if self.quick else len(order) // 2
        return order[:half], order[half : 2 * half]

    def calibration(self, seed: int) -> Tensor:
        return normalised(self.photographs[0][self.halves(seed)[0]])

    def judges(self, seed: int, screen: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        at = self.halves(seed)[1]
        images, labels = self.photographs
        return list(map(normalised, images[at].split(self.batch))), labels[at], self.logits[at], {"judged": slice(0, len(at))}

    def importances(self) -> list[str]:
        return [name for name in IMPORTANCES if name != "OBD-C"]  # knows no depthwise layers


TASKS = {task.name: task for task in (Cifar, Lite)}


def photographs() -> tuple[Tensor, Tensor]:
    """`imagenet1k_sample`, short side 256, centre crop 224."""
    import csv

    from PIL import Image
    from torchvision.transforms import functional as T

    folder = DATA / "imagenet1k_sample"
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = [T.pil_to_tensor(T.center_crop(T.resize(Image.open(folder / row["file"]).convert("RGB"), 256), [224, 224])) for row in rows]
    return torch.stack(images), torch.tensor([int(row["class_index"]) for row in rows])


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # depthwise layers run twice as fast


def kept_on_disk(name: str, make: Callable[[], tuple[Tensor, ...]]) -> Any:
    path = CACHE / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(make()), path)
    return torch.load(path, weights_only=True)


def fingerprint(kept: dict[str, Any]) -> str:
    """Of a choice of channels."""
    return hashlib.sha256(json.dumps({name: str(kept[name]) for name in sorted(kept)}).encode()).hexdigest()[:16]


def library() -> str:
    """Fingerprint of the code that prunes and refits: rows of other code are told apart."""
    root = Path(ki.__file__).parent
    files = sorted([*(root / "pruning").glob("*.py"), *(root / "integrations").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


LIBRARY = library()


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


@dataclass
class Setting:
    """One task, seed and ratio: what a method may look at."""

    task: Task
    seed: int
    ratio: float
    data: Calibration
    memory: dict[str, Any] = field(default_factory=dict)  # of the seed

    @property
    def batches(self) -> list[Tensor]:
        return list(self.data.images.split(self.task.batch))

    @property
    def target(self) -> float:
        return self.task.macs(self.task.original) / self.ratio

    def cutter(self, model: nn.Module, space: str = "inner") -> Cutter:
        return Cutter(model, self.task.example, self.task.macs, self.task.spaces[space])

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


@dataclass(frozen=True)
class Method:
    """How channels are chosen, and what may follow.

    Attributes:
        name: of the choice.
        cut: prunes the model in place.
        weights: sets weights of the consumers, before "bare" and "statistics"; a refit starts from the surviving original weights.
        finishes: that make sense.
    """

    name: str
    cut: Callable[[Setting, nn.Module], None]
    weights: Callable[[Setting, nn.Module], None] | None = None
    finishes: tuple[str, ...] = FINISHES


def isomorphism(model: nn.Module, data: Calibration) -> Any:
    batches = list(data.images.split(64))
    return ki.IsomorphismImportance(model, batches, max_images=len(data.images), seed=data.seed, progress=False)


def by_importance(name: str, scope: str, steps: int, space: str) -> Method:
    prepare = IMPORTANCES.get(name, isomorphism)

    def cut(setting: Setting, model: nn.Module) -> None:
        prune_with(setting.cutter(model, space), prepare, setting.data, setting.target, scope, steps)

    pace = "one-shot" if steps == 1 else "iterative"
    return Method(f"{name}, {scope}, {pace}" + ("" if space == "inner" else ", all channels"), cut)


def inputs_of_consumers(setting: Setting, taps: bool) -> dict[str, Tensor]:
    """Gram matrices of what the consumers read in the original network."""
    original = setting.task.original
    consumers = list(consumers_of(setting).values())
    return setting.remembered(f"grams {taps}", lambda: grams(original, consumers, setting.batches, taps=taps, seed=setting.seed))


def survivors(setting: Setting, model: nn.Module) -> dict[str, list[int]]:
    """Channels that are left of each root, from the record of the cut."""
    kept = setting.memory["kept"]
    widths = {name: setting.task.original.get_submodule(name).weight.shape[0] for name in setting.task.spaces["inner"]}
    return {name: (kept.get(f"{name}.weight") or [None])[0] or list(range(width)) for name, width in widths.items()}


def consumers_of(setting: Setting) -> dict[str, str]:
    return setting.remembered("consumers", lambda: setting.cutter(setting.task.original).consumers())


def set_consumers(setting: Setting, model: nn.Module, of: Callable[[str, list[int]], Tensor]) -> None:
    """`of(root, kept)` gives the weights of the root's consumer; a consumer that is a root itself has lost outputs too."""
    kept, consumers = survivors(setting, model), consumers_of(setting)
    found = {name: of(root, kept[root]) for root, name in consumers.items()}
    set_weights(model, {name: weight[kept[name]] if name in kept else weight for name, weight in found.items()})


def grail(setting: Setting, model: nn.Module) -> None:
    """Consumers' weights compensated by the ridge map from kept to all channels of the original network."""
    original, matrices, consumers = setting.task.original, inputs_of_consumers(setting, taps=False), consumers_of(setting)
    set_consumers(setting, model, lambda root, kept: mixed(original.get_submodule(consumers[root]).weight, matrices[consumers[root]], kept))


def problems(setting: Setting) -> dict[str, Regression]:
    original, matrices = setting.task.original, inputs_of_consumers(setting, taps=True)
    consumers = consumers_of(setting)
    return {root: Regression(original.get_submodule(name).weight, matrices[name]) for root, name in consumers.items()}


def uniform_widths(setting: Setting) -> dict[str, int]:
    """Of every root, by bisection on the share that goes."""
    task = setting.task
    widths = {name: task.original.get_submodule(name).weight.shape[0] for name in task.spaces["inner"]}

    def macs(kept: dict[str, int]) -> float:
        model = copy.deepcopy(task.original)
        setting.cutter(model).remove({name: list(range(width)) for name, width in kept.items()})
        return task.macs(model)

    low, high = 0.0, 1.0
    for _ in range(12):
        ratio = (low + high) / 2
        low, high = (low, ratio) if macs(uniform(widths, ratio)) <= setting.target else (ratio, high)
    return uniform(widths, high)


def our_widths(setting: Setting) -> dict[str, int]:
    key = f"widths {setting.ratio}"
    if key not in setting.memory:
        raise LookupError(f"there is no row of {OURS} at this ratio and seed to take widths from")
    return setting.memory[key]


def osscar(widths: Callable[[Setting], dict[str, int]], setting: Setting, model: nn.Module) -> None:
    """Channels by the local search, at given widths."""
    chosen = widths(setting)
    found = setting.remembered("problems", lambda: problems(setting))
    setting.cutter(model).remove({root: found[root].search(chosen[root]) for root in found})


def osscar_weights(setting: Setting, model: nn.Module) -> None:
    """The closed form on the original network's inputs."""
    found = setting.remembered("problems", lambda: problems(setting))
    set_consumers(setting, model, lambda root, kept: found[root].weights(kept))


def rivals(task: Task) -> list[Method]:
    """All that is screened, ours inside of torch-pruning's pruners too."""
    grid = [
        (name, scope, steps, space)
        for space in task.spaces
        for name in [*task.importances(), "Isomorphism"]
        for scope in ("local", "global")
        for steps in (1, STEPS)
        if name != "Random" or steps == 1
    ]
    closed = [
        Method("GRAIL", by_importance("L2", "local", 1, "inner").cut, grail, ("bare", "statistics")),
        Method("OSSCAR", partial(osscar, uniform_widths), osscar_weights),
    ]
    if hasattr(ki, "prune"):
        closed.append(Method(f"OSSCAR, {OURS}'s widths", partial(osscar, our_widths), osscar_weights))
    return closed + [by_importance(*point) for point in grid]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What may follow ki.prune: name -> function(setting, pruned model) that trains it in place. Each entry becomes a row of ki.prune at every ratio,
# with the name as its finish: label-free tuning on the setting's images, and training with labels for some epochs.
# ---------------------------------------------------------------------------------------------------------------------------------------------
def tuned(setting: Setting, model: nn.Module) -> None:
    """A short training on the same images, without labels: about a minute of two cores."""
    images = setting.batches
    ki.tune(model, setting.task.original, images, steps=200, transform=partial(mix_patches, flip=True), seed=setting.seed, progress=False)


AFTERWARDS: dict[str, Callable[[Setting, nn.Module], None]] = {"tuned": tuned}  # of ResNet-56


class Book:
    """Rows that are done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next(iter(self.select(**key)), None)

    def select(self, **key: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        at = row["accuracy"]
        print(f"{row['network']} {row['ratio']:g}x seed {row['seed']}: {row['method']}, {row['finish']}:", at, f"{row['seconds']:.0f} s", flush=True)


class Runner:
    """All methods of one seed, whatever is not in the book."""

    def __init__(self, task: Task, seed: int, book: Book, screen: bool) -> None:
        self.task, self.seed, self.book, self.screen = task, seed, book, screen
        self.memory: dict[str, Any] = {}
        self.failures: list[str] = []

    @cached_property
    def data(self) -> Calibration:
        images = self.task.calibration(self.seed)
        said = predict(self.task.original, images.split(self.task.batch)).argmax(1)
        return Calibration(images, said, self.seed)

    @cached_property
    def judges(self) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        return self.task.judges(self.seed, self.screen)

    def key(self, method: str, finish: str, ratio: float) -> dict[str, Any]:
        return {"network": self.task.name, "method": method, "finish": finish, "ratio": ratio, "seed": self.seed, "screen": self.screen}

    def setting(self, ratio: float) -> Setting:
        return Setting(self.task, self.seed, ratio, self.data, self.memory)

    def run(self, methods: Iterable[Method], ratio: float, finishes: Callable[[Method], Sequence[str]]) -> None:
        self.ours(ratio)
        for method in methods:
            missing = [finish for finish in finishes(method) if self.book.find(**self.key(method.name, finish, ratio)) is None]
            if missing:
                self._guarded(method.name, partial(self._run, method, ratio, missing))

    def ours(self, ratio: float) -> None:
        """ki.prune, and what follows it."""
        finishes = ("refit", *(AFTERWARDS if self.task.name == "resnet56" else ()))
        missing = [name for name in finishes if self.book.find(**self.key(OURS, name, ratio)) is None]
        if missing and hasattr(ki, "prune"):
            self._guarded(OURS, partial(self._ours, ratio, missing))
        row = self.book.find(**self.key(OURS, "refit", ratio))
        if row is not None:
            self.memory[f"widths {ratio}"] = row["widths"]

    def _ours(self, ratio: float, missing: Sequence[str]) -> None:
        setting, began = self.setting(ratio), time.perf_counter()
        images = setting.data.images
        pruned = ki.prune(self.task.original, setting.batches, macs=1 / ratio, max_images=len(images), seed=self.seed, progress=False).model
        seconds = time.perf_counter() - began
        for finish in missing:
            model, began = copy.deepcopy(pruned), time.perf_counter()
            if finish != "refit":
                AFTERWARDS[finish](setting, model)
            more = {"widths": {name: model.get_submodule(name).weight.shape[0] for name in self.task.spaces["inner"]}}
            self._add(OURS, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _run(self, method: Method, ratio: float, missing: Sequence[str]) -> None:
        setting, cut, began = self.setting(ratio), copy.deepcopy(self.task.original), time.perf_counter()
        with recording(cut) as kept:
            method.cut(setting, cut)
        self.memory["kept"] = kept
        seconds = time.perf_counter() - began
        for finish in missing:
            plain = finish == "refit" or method.weights is None
            more = {"kept": fingerprint(kept)} if plain else {}
            key = self.key(method.name, finish, ratio)
            same = self.book.find(**{name: value for name, value in key.items() if name != "method"}, **more) if plain else None
            if same is not None:  # another criterion chose the very same channels
                self.book.add({**same, "method": method.name})
                continue
            model, began = copy.deepcopy(cut), time.perf_counter()
            self._finish(setting, method, finish, model, kept)
            self._add(method.name, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _finish(self, setting: Setting, method: Method, finish: str, model: nn.Module, kept: Any) -> None:
        if finish != "refit" and method.weights is not None:
            method.weights(setting, model)
        if finish == "statistics":
            recompute_statistics(model, setting.batches)
        if finish == "refit":
            ki.refit(model, self.task.original, setting.batches, kept=kept, max_images=len(setting.data.images), seed=self.seed, progress=False)

    def _add(self, method: str, finish: str, ratio: float, model: nn.Module, seconds: float, **more: Any) -> None:
        batches, labels, original, parts = self.judges
        said = predict(model, batches).argmax(1)
        accuracy = {name: round(100 * float((said[part] == labels[part]).float().mean()), 3) for name, part in parts.items()}
        agreement = {name: round(100 * float((said[part] == original.argmax(1)[part]).float().mean()), 3) for name, part in parts.items()}
        macs = self.task.macs
        share = macs(model) / macs(self.task.original)
        row = {**self.key(method, finish, ratio), "macs": round(share, 5), "seconds": round(seconds, 1), "accuracy": accuracy, "agreement": agreement}
        self.book.add({**row, **more, "library": LIBRARY})

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """A method that fails leaves no row, and the others go on; the run ends with an error that names it."""
        try:
            work()
        except Exception:
            traceback.print_exc()
            self.failures.append(f"{self.task.name}, seed {self.seed}: {name}")


def screen(task: Task, seed: int, book: Book, wanted: Callable[[Method], bool], finishes: Sequence[str], ratio: float) -> list[str]:
    runner = Runner(task, seed, book, screen=True)
    possible = [finish for finish in finishes if finish != "refit" or hasattr(ki, "refit")]
    runner.run(filter(wanted, rivals(task)), ratio, lambda method: [finish for finish in possible if finish in method.finishes])
    return runner.failures


def chosen(task: Task, book: Book) -> list[tuple[str, str]]:
    """The best eight rivals of the screening, and the best of each finish, GRAIL and OSSCAR where they are not among them."""
    rows = [row for row in book.select(network=task.name, screen=True, ratio=task.screened) if row["method"] != OURS]
    rows.sort(key=lambda row: -row["accuracy"][task.chosen])
    own = [row for row in rows if row["method"].startswith("Isomorphism")][:1]
    others = [row for row in rows if not row["method"].startswith("Isomorphism")]
    picked = others[:BEST] + own
    for finish in FINISHES[:2]:
        picked += [row for row in others if row["finish"] == finish][:1]
    for name in ("GRAIL", "OSSCAR"):
        picked += [row for row in others if row["method"] == name][:1]
    return list(dict.fromkeys((row["method"], row["finish"]) for row in picked))


def full(task: Task, seed: int, book: Book, wanted: Callable[[Method], bool], ratios: Sequence[float]) -> list[str]:
    """Ours and the best rivals at every ratio."""
    runner, pairs = Runner(task, seed, book, screen=False), chosen(task, book)
    if not pairs:
        raise SystemExit(f"nothing of {task.name} is screened yet: run with --screen first")
    for ratio in ratios:
        methods = [method for method in rivals(task) if wanted(method) and any(method.name == name for name, _ in pairs)]
        runner.run(methods, ratio, lambda method: [finish for name, finish in pairs if name == method.name])
    return runner.failures


def spread(values: Sequence[float], signed: bool = False) -> str:
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan
    return f"{mean:+.2f} ± {error:.2f}" if signed else f"{mean:.2f} ± {error:.2f}"


def summary(task: Task, book: Book, ratio: float) -> list[dict[str, Any]]:
    """Mean ± standard error over the seeds, and over the differences to ki.prune seed by seed."""
    rows = book.select(network=task.name, screen=False, ratio=ratio)
    ours = {row["seed"]: row for row in rows if (row["method"], row["finish"]) == (OURS, "refit")}
    lines = []
    for method, finish in dict.fromkeys((row["method"], row["finish"]) for row in rows):
        own = [row for row in rows if (row["method"], row["finish"]) == (method, finish)]
        paired = [(row, ours[row["seed"]]) for row in own if row["seed"] in ours]
        line = {"network": task.name, "ratio": ratio, "method": method, "finish": finish, "seeds": len(own)}
        line["MACs %"] = round(100 * sum(row["macs"] for row in own) / len(own), 2)
        line |= {part: spread([row["accuracy"][part] for row in own]) for part in own[0]["accuracy"]}
        line["agreement"] = spread([row["agreement"][task.claimed] for row in own])
        for name in ("accuracy", "agreement"):
            line[f"{name} - {OURS}'s"] = spread([a[name][task.claimed] - b[name][task.claimed] for a, b in paired], True) if paired else "-"
        lines.append((-sum(row["accuracy"][task.claimed] for row in own) / len(own), {**line, "s": round(sum(r["seconds"] for r in own) / len(own))}))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def screening(task: Task, book: Book) -> list[dict[str, Any]]:
    """Rows of the screening, the best first."""
    rows = sorted(book.select(network=task.name, screen=True), key=lambda row: -row["accuracy"][task.chosen])
    return [
        {
            **{key: row[key] for key in ("network", "ratio", "seed", "method", "finish")},
            "MACs %": round(100 * row["macs"], 2),
            task.chosen: row["accuracy"][task.chosen],
            "agreement": row["agreement"][task.chosen],
            "s": round(row["seconds"]),
        }
        for row in rows
    ]


def report(tasks: Sequence[Task], book: Book, write: bool) -> None:
    tables = {task.name: [summary(task, book, ratio) for ratio in task.ratios] for task in tasks}
    for task in tasks:
        for rows in (screening(task, book), *tables[task.name]):
            if rows:
                print(table(rows), "\n", flush=True)
    every = [TASKS[name](False) for name in TASKS]
    if write and any(not row["screen"] for row in book.rows):
        figures = {
            task.name: {
                "table": [row for ratio in task.ratios for row in summary(task, book, ratio)],
                "screening": screening(task, book),
                "rows": book.select(network=task.name, screen=False),
            }
            for task in every
        }
        print(record("bench_prune", figures, settings={"calibration": {"resnet56": 1024, "lite0": 500}, "iterative steps": STEPS, "best": BEST}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screen", action="store_true", help="all rivals at one ratio and the first seed")
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ratios", nargs="+", type=float, help="times fewer multiply-adds")
    parser.add_argument("--methods", nargs="+", help="those whose name contains one of these; none: `--methods -` runs ki.prune alone")
    parser.add_argument("--finishes", nargs="+", choices=FINISHES, default=list(FINISHES), help="of the screening")
    parser.add_argument("--quick", action="store_true", help="few images, one ratio, one seed; rows of its own, no results file")
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is there and write the results file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", module="torch_pruning")
    book = Book(CACHE / ("rows_quick.jsonl" if args.quick else "rows.jsonl"))
    tasks = [TASKS[name](args.quick) for name in args.networks]
    failures: list[str] = []

    def wanted(method: Method) -> bool:
        return args.methods is None or any(part in method.name for part in args.methods)

    for task in tasks if not args.tables else []:
        ratios = args.ratios or task.ratios
        seeds = args.seeds[:1] if args.quick else args.seeds
        if args.screen or args.quick:
            for ratio in args.ratios or [task.screened]:
                failures += screen(task, seeds[0], book, wanted, args.finishes, ratio)
        if not args.screen:
            for seed in seeds:
                failures += full(task, seed, book, wanted, [task.screened] if args.quick else ratios)
    report(tasks, book, write=not args.quick and not args.screen)
    if failures:
        sys.exit("failed, without a row:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
