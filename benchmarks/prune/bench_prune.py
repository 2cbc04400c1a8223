"""Pruning without training and without labels: `ki.prune` against every importance of torch-pruning, a channel-mixing ridge and a local search.

    python -m benchmarks.prune.bench_prune --screen      # every rival at one ratio and seed, judged on the select images
    python -m benchmarks.prune.bench_prune               # the best eight and ours in full; writes results/bench_prune.json
    python -m benchmarks.prune.bench_prune --quick       # does it run? a minute, nothing is written

Stopped and started again, it goes on where it was: each row is kept in `benchmarks/.cache/bench_prune/rows.jsonl` as it
is finished
(in a fresh clone that begins with the rows of the results file; delete those that are to be run again).

ResNet-56 on CIFAR-10 (real weights, 93.39 %): 1,024 training images calibrate, drawn by the seed; choices are made on
the first 2,000 test images
("select"), what is claimed is judged on the other 8,000. Everybody prunes the widths inside of the blocks: option-A
shortcuts fix the others.
timm's `tf_efficientnet_lite0` (ImageNet weights): half of the 1,000 photographs calibrates, drawn by the seed, the
other half judges; rivals are
screened on the judging half too, which favors them. "inner" are widths with one writer and one reader; "all channels"
is whatever torch-pruning
finds but the classifier's output.

Every method gets the same images and the same number of multiply-adds of convolutions and linear layers, counted by one
function: at most
1 / ratio of the original's. torch-pruning's pruners are brought there by bisection on the pruning ratio; iterative ones
in five steps of equal
multiply-adds, scores taken anew at each. Criteria that ask for gradients take what the original network says for
labels.

Finishes: "bare"; "statistics": batch norms' running statistics from the same images; "refit": `ki.refit` on the same
    images, in closed form;
"blocks": and every block tuned as a whole, by 60 updates (`block_steps`): gradients, but within one block at a time.
ki.prune at the screened ratio
also what prune_afterwards.py holds: short trainings without labels, and with them as a control (`--afterwards`).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.baselines.grail_osscar import recompute_statistics
from benchmarks.baselines.tp_importances import CalibrationData
from benchmarks.common.results import RESULTS
from benchmarks.prune.finetune import FINETUNINGS
from benchmarks.prune.methods import (
    BLOCK_STEPS,
    FINISHES,
    OURS,
    REFIT_FINISHES,
    Method,
    MethodContext,
    baseline_methods,
)
from benchmarks.prune.results_store import (
    ALGORITHM_VERSION,
    RESULTS_NAME,
    SEEDS,
    ResultsStore,
    fingerprint,
    report,
    select_baselines,
)
from benchmarks.prune.tasks import CACHE, TASKS, Task, predict
from knowiso_train.pruning import track_kept_indices


class Runner:
    """All methods of one seed, whatever is not in the book."""

    def __init__(
        self,
        task: Task,
        seed: int,
        book: ResultsStore,
        screen: bool,
        finishes: Sequence[str],
        afterwards: Sequence[str] = (),
    ) -> None:
        self.task, self.seed, self.book, self.screen = task, seed, book, screen
        self.finishes, self.afterwards = finishes, afterwards
        self.memory: dict[str, Any] = {}
        self.failures: list[str] = []

    @cached_property
    def data(self) -> CalibrationData:
        images = self.task.calibration(self.seed)
        said = predict(self.task.original, images.split(self.task.batch)).argmax(1)
        return CalibrationData(images, said, self.seed)

    @cached_property
    def judges(self) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        return self.task.judges(self.seed, self.screen)

    def key(self, method: str, finish: str, ratio: float) -> dict[str, Any]:
        return {
            "network": self.task.name,
            "method": method,
            "finish": finish,
            "ratio": ratio,
            "seed": self.seed,
            "screen": self.screen,
        }

    def setting(self, ratio: float) -> MethodContext:
        return MethodContext(self.task, self.seed, ratio, self.data, self.memory)

    def run(self, methods: Iterable[Method], ratio: float, finishes: Callable[[Method], Sequence[str]]) -> None:
        self.ours(ratio)
        for method in methods:
            wanted = [finish for finish in finishes(method) if finish in self.finishes]
            missing = [finish for finish in wanted if self.book.find(**self.key(method.name, finish, ratio)) is None]
            if missing:
                self._guarded(method.name, partial(self._run, method, ratio, missing))

    def ours(self, ratio: float) -> None:
        """ki.prune, and what follows it."""
        finishes = (
            *(finish for finish in REFIT_FINISHES if finish in self.finishes),
            *(
                name
                for name in self.afterwards
                if ratio == self.task.screened and not self.screen and name in self.task.afterwards
            ),
        )
        missing = [name for name in finishes if self.book.find(**self.key(OURS, name, ratio)) is None]
        if missing:
            self._guarded(OURS, partial(self._ours, ratio, missing))
        row = self.book.find(**self.key(OURS, "refit", ratio))
        if row is not None:
            self.memory[f"widths {ratio}"] = row["widths"]

    def _ours(self, ratio: float, missing: Sequence[str]) -> None:
        setting, began = self.setting(ratio), time.perf_counter()
        images = setting.data.images
        pruned = ki.prune(
            self.task.original, setting.batches, macs=1 / ratio, max_images=len(images), seed=self.seed, progress=False
        )
        seconds = time.perf_counter() - began
        for finish in missing:
            model, began = copy.deepcopy(pruned.model), time.perf_counter()
            if finish.startswith("blocks"):  # as prune(block_steps=) does
                self._refit(setting, model, pruned.kept, BLOCK_STEPS)
            if finish in FINETUNINGS:
                FINETUNINGS[finish](setting, model)
            more = {"widths": {name: model.get_submodule(name).weight.shape[0] for name in self.task.spaces["inner"]}}
            self._add(OURS, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _run(self, method: Method, ratio: float, missing: Sequence[str]) -> None:
        setting, cut, began = self.setting(ratio), copy.deepcopy(self.task.original), time.perf_counter()
        with track_kept_indices(cut) as kept:
            method.cut(setting, cut)
        self.memory["kept"] = kept
        seconds = time.perf_counter() - began
        for finish in missing:
            plain = finish in REFIT_FINISHES or method.weights is None
            more = {"kept": fingerprint(kept)} if plain else {}
            key = self.key(method.name, finish, ratio)
            same = (
                self.book.find(**{name: value for name, value in key.items() if name != "method"}, **more)
                if plain
                else None
            )
            if same is not None:  # another criterion chose the very same channels
                self.book.add({**same, "method": method.name})
                continue
            model, began = copy.deepcopy(cut), time.perf_counter()
            self._finish(setting, method, finish, model, kept)
            self._add(method.name, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _finish(self, setting: MethodContext, method: Method, finish: str, model: nn.Module, kept: Any) -> None:
        if finish not in REFIT_FINISHES and method.weights is not None:
            method.weights(setting, model)
        if finish == "statistics":
            recompute_statistics(model, setting.batches)
        if finish in REFIT_FINISHES:
            self._refit(setting, model, kept, BLOCK_STEPS if finish == "blocks" else 0)

    def _refit(self, setting: MethodContext, model: nn.Module, kept: Any, block_steps: int) -> None:
        options = {
            "max_images": len(setting.data.images),
            "block_steps": block_steps,
            "seed": self.seed,
            "progress": False,
        }
        ki.refit(model, self.task.original, setting.batches, kept=kept, **options)

    def _add(self, method: str, finish: str, ratio: float, model: nn.Module, seconds: float, **more: Any) -> None:
        batches, labels, original, parts = self.judges
        said = predict(model, batches).argmax(1)
        accuracy = {
            name: round(100 * float((said[part] == labels[part]).float().mean()), 3) for name, part in parts.items()
        }
        agreement = {
            name: round(100 * float((said[part] == original.argmax(1)[part]).float().mean()), 3)
            for name, part in parts.items()
        }
        macs = self.task.macs
        share = macs(model) / macs(self.task.original)
        row = {
            **self.key(method, finish, ratio),
            "macs": round(share, 5),
            "seconds": round(seconds, 1),
            "accuracy": accuracy,
            "agreement": agreement,
        }
        self.book.add({**row, **more, "algorithm_version": ALGORITHM_VERSION})

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """A method that fails leaves no row, and the others go on; the run ends with an error that names it."""
        try:
            work()
        except Exception:
            traceback.print_exc()
            self.failures.append(f"{self.task.name}, seed {self.seed}: {name}")


def run_screening(
    task: Task, seed: int, book: ResultsStore, wanted: Callable[[Method], bool], finishes: Sequence[str], ratio: float
) -> list[str]:
    runner = Runner(task, seed, book, True, finishes)
    runner.run(filter(wanted, baseline_methods(task)), ratio, lambda method: method.finishes)
    return runner.failures


def run_full(
    task: Task,
    seed: int,
    book: ResultsStore,
    wanted: Callable[[Method], bool],
    ratios: Sequence[float],
    finishes: Sequence[str],
    afterwards: Sequence[str],
) -> list[str]:
    """Ours and the best rivals at every ratio."""
    runner, pairs = Runner(task, seed, book, False, finishes, afterwards), select_baselines(task, book)
    if not pairs and any(map(wanted, baseline_methods(task))):
        raise SystemExit(f"nothing of {task.name} is screened yet: run with --screen first")
    for ratio in ratios:
        methods = [
            method
            for method in baseline_methods(task)
            if wanted(method) and any(method.name == name for name, _ in pairs)
        ]
        runner.run(methods, ratio, lambda method: [finish for name, finish in pairs if name == method.name])
    return runner.failures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screen", action="store_true", help="all rivals at one ratio and the first seed")
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--ratios", nargs="+", type=float, help="times fewer multiply-adds")
    parser.add_argument(
        "--methods", nargs="*", help="those whose name contains one of these; `--methods` alone runs ki.prune alone"
    )
    parser.add_argument(
        "--finishes",
        nargs="+",
        choices=FINISHES,
        help="all but blocks in the screening, all those of the best after it",
    )
    parser.add_argument(
        "--afterwards",
        nargs="*",
        choices=FINETUNINGS,
        default=["tuned"],
        help="trainings after ki.prune; all, for ResNet-56: half an hour a seed",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few images, one ratio, one seed; rows of its own, no results file"
    )
    parser.add_argument(
        "--tables", action="store_true", help="run nothing, print what is there and write the results file"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    warnings.filterwarnings("ignore", module="torch_pruning")
    book = (
        ResultsStore(CACHE / "rows_quick.jsonl")
        if args.quick
        else ResultsStore(CACHE / "rows.jsonl", RESULTS / f"{RESULTS_NAME}.json")
    )
    tasks = [TASKS[name](args.quick) for name in args.networks]
    failures: list[str] = []

    def wanted(method: Method) -> bool:
        return args.methods is None or any(part in method.name for part in args.methods)

    for task in tasks if not args.tables else []:
        ratios = args.ratios or task.ratios
        seeds = args.seeds[:1] if args.quick else args.seeds
        if args.screen or args.quick:
            for ratio in args.ratios or [task.screened]:
                failures += run_screening(task, seeds[0], book, wanted, args.finishes or FINISHES[:3], ratio)
        if not args.screen:
            for seed in seeds:
                failures += run_full(
                    task,
                    seed,
                    book,
                    wanted,
                    [task.screened] if args.quick else ratios,
                    args.finishes or FINISHES,
                    args.afterwards,
                )
    report(tasks, book, write=not args.quick and not args.screen)
    if failures:
        sys.exit("failed, without a row:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
