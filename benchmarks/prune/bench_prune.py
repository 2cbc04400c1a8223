"""Pruning without training and labels: `ki.prune`, all importances of torch-pruning, GRAIL and OSSCAR.

    python -m benchmarks.prune.bench_prune --screen      # every baseline at one ratio and seed, on the select images
    python -m benchmarks.prune.bench_prune               # the best eight and ki.prune; writes results/bench_prune.json
    python -m benchmarks.prune.bench_prune --quick       # smoke test, a minute, no results file

Rows are stored in `benchmarks/.cache/bench_prune/rows.jsonl` when they are finished, and an interrupted run resumes. In
a fresh clone the file starts with the rows of the results file. Delete rows to run them again.

ResNet-56 on CIFAR-10 (real weights, 93.39 %): 1,024 training images, drawn by the seed, are the calibration images.
Methods are selected on the first 2,000 test images ("select") and reported on the other 8,000. All methods prune the
inner widths of blocks, because option-A shortcuts fix the others.

timm's `tf_efficientnet_lite0` (ImageNet weights): half of the 1,000 photographs, drawn by the seed, calibrates, the
other half evaluates. Baselines are screened on the evaluation half too, which favors them. "inner" are widths with one
producer and one consumer; "all channels" is all that torch-pruning finds except the classifier's output.

Every method gets the same images and the same budget: at most 1 / ratio of the original's multiply-adds of
convolutions and linear layers, counted by one function. Pruners of torch-pruning meet it by bisection on the pruning
ratio; iterative ones take five steps of equal multiply-adds, with new scores at each. Criteria that need labels get
the predictions of the original network.

Finishes: "bare"; "statistics": batch-norm statistics recomputed on the same images; "refit": `ki.refit` on the same
images, in closed form; "blocks": "refit" with 60 gradient updates of each block (`block_steps`). ki.prune at the
screened ratio is also followed by the finetunings of `finetune.py` (`--afterwards`).
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
    """Runs all methods of one seed that have no row yet."""

    def __init__(
        self,
        task: Task,
        seed: int,
        store: ResultsStore,
        screen: bool,
        finishes: Sequence[str],
        afterwards: Sequence[str] = (),
    ) -> None:
        self.task, self.seed, self.store, self.screen = task, seed, store, screen
        self.finishes, self.afterwards = finishes, afterwards
        self.memory: dict[str, Any] = {}
        self.failures: list[str] = []

    @cached_property
    def data(self) -> CalibrationData:
        images = self.task.calibration(self.seed)
        predictions = predict(self.task.original, images.split(self.task.batch)).argmax(1)
        return CalibrationData(images, predictions, self.seed)

    @cached_property
    def evaluation_data(self) -> tuple[list[Tensor], Tensor, Tensor, dict[str, slice]]:
        return self.task.evaluation_data(self.seed, self.screen)

    def key(self, method: str, finish: str, ratio: float) -> dict[str, Any]:
        return {
            "network": self.task.name,
            "method": method,
            "finish": finish,
            "ratio": ratio,
            "seed": self.seed,
            "screen": self.screen,
        }

    def context(self, ratio: float) -> MethodContext:
        return MethodContext(self.task, self.seed, ratio, self.data, self.memory)

    def run(self, methods: Iterable[Method], ratio: float, finishes: Callable[[Method], Sequence[str]]) -> None:
        self.ours(ratio)
        for method in methods:
            requested = [finish for finish in finishes(method) if finish in self.finishes]
            missing = [
                finish for finish in requested if self.store.find(**self.key(method.name, finish, ratio)) is None
            ]
            if missing:
                self._guarded(method.name, partial(self._run, method, ratio, missing))

    def ours(self, ratio: float) -> None:
        """Run ki.prune and its finetunings."""
        finishes = (
            *(finish for finish in REFIT_FINISHES if finish in self.finishes),
            *(
                name
                for name in self.afterwards
                if ratio == self.task.screened and not self.screen and name in self.task.afterwards
            ),
        )
        missing = [name for name in finishes if self.store.find(**self.key(OURS, name, ratio)) is None]
        if missing:
            self._guarded(OURS, partial(self._ours, ratio, missing))
        row = self.store.find(**self.key(OURS, "refit", ratio))
        if row is not None:
            self.memory[f"widths {ratio}"] = row["widths"]

    def _ours(self, ratio: float, missing: Sequence[str]) -> None:
        context, began = self.context(ratio), time.perf_counter()
        images = context.data.images
        pruned = ki.prune(
            self.task.original, context.batches, macs=1 / ratio, max_images=len(images), seed=self.seed, progress=False
        )
        seconds = time.perf_counter() - began
        for finish in missing:
            model, began = copy.deepcopy(pruned.model), time.perf_counter()
            if finish.startswith("blocks"):  # equals prune(block_steps=)
                self._refit(context, model, pruned.kept, BLOCK_STEPS)
            if finish in FINETUNINGS:
                FINETUNINGS[finish](context, model)
            more = {"widths": {name: model.get_submodule(name).weight.shape[0] for name in self.task.spaces["inner"]}}
            self._add(OURS, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _run(self, method: Method, ratio: float, missing: Sequence[str]) -> None:
        context, pruned, began = self.context(ratio), copy.deepcopy(self.task.original), time.perf_counter()
        with track_kept_indices(pruned) as kept:
            method.cut(context, pruned)
        self.memory["kept"] = kept
        seconds = time.perf_counter() - began
        for finish in missing:
            reads_kept_only = finish in REFIT_FINISHES or method.weights is None
            more = {"kept": fingerprint(kept)} if reads_kept_only else {}
            key = self.key(method.name, finish, ratio)
            identical = (
                self.store.find(**{name: value for name, value in key.items() if name != "method"}, **more)
                if reads_kept_only
                else None
            )
            if identical is not None:  # another criterion chose the same channels
                self.store.add({**identical, "method": method.name})
                continue
            model, began = copy.deepcopy(pruned), time.perf_counter()
            self._finish(context, method, finish, model, kept)
            self._add(method.name, finish, ratio, model, seconds + time.perf_counter() - began, **more)

    def _finish(self, context: MethodContext, method: Method, finish: str, model: nn.Module, kept: Any) -> None:
        if finish not in REFIT_FINISHES and method.weights is not None:
            method.weights(context, model)
        if finish == "statistics":
            recompute_statistics(model, context.batches)
        if finish in REFIT_FINISHES:
            self._refit(context, model, kept, BLOCK_STEPS if finish == "blocks" else 0)

    def _refit(self, context: MethodContext, model: nn.Module, kept: Any, block_steps: int) -> None:
        options = {
            "max_images": len(context.data.images),
            "block_steps": block_steps,
            "seed": self.seed,
            "progress": False,
        }
        ki.refit(model, self.task.original, context.batches, kept=kept, **options)

    def _add(self, method: str, finish: str, ratio: float, model: nn.Module, seconds: float, **more: Any) -> None:
        batches, labels, original, parts = self.evaluation_data
        predictions = predict(model, batches).argmax(1)
        accuracy = {
            name: round(100 * float((predictions[part] == labels[part]).float().mean()), 3)
            for name, part in parts.items()
        }
        agreement = {
            name: round(100 * float((predictions[part] == original.argmax(1)[part]).float().mean()), 3)
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
        self.store.add({**row, **more, "algorithm_version": ALGORITHM_VERSION})

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Run a method; record a failure and continue.

        A failed method leaves no row, and the run ends with an error that names it.
        """
        try:
            work()
        except Exception:
            traceback.print_exc()
            self.failures.append(f"{self.task.name}, seed {self.seed}: {name}")


def run_screening(
    task: Task,
    seed: int,
    store: ResultsStore,
    is_requested: Callable[[Method], bool],
    finishes: Sequence[str],
    ratio: float,
) -> list[str]:
    """Run all baselines at one ratio; return the failures."""
    runner = Runner(task, seed, store, True, finishes)
    runner.run(filter(is_requested, baseline_methods(task)), ratio, lambda method: method.finishes)
    return runner.failures


def run_full(
    task: Task,
    seed: int,
    store: ResultsStore,
    is_requested: Callable[[Method], bool],
    ratios: Sequence[float],
    finishes: Sequence[str],
    afterwards: Sequence[str],
) -> list[str]:
    """Run ki.prune and the best baselines at every ratio; return the failures."""
    runner, pairs = Runner(task, seed, store, False, finishes, afterwards), select_baselines(task, store)
    if not pairs and any(map(is_requested, baseline_methods(task))):
        raise SystemExit(f"no screening of {task.name}: run with --screen first")
    for ratio in ratios:
        methods = [
            method
            for method in baseline_methods(task)
            if is_requested(method) and any(method.name == name for name, _ in pairs)
        ]
        runner.run(methods, ratio, lambda method: [finish for name, finish in pairs if name == method.name])
    return runner.failures


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screen", action="store_true", help="all baselines at one ratio and the first seed")
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--ratios", nargs="+", type=float, help="factors by which multiply-adds are reduced")
    parser.add_argument(
        "--methods", nargs="*", help="baselines whose name contains one of these; without values: ki.prune only"
    )
    parser.add_argument(
        "--finishes",
        nargs="+",
        choices=FINISHES,
        help="default: all but blocks in the screening, those of the best baselines after it",
    )
    parser.add_argument(
        "--afterwards",
        nargs="*",
        choices=FINETUNINGS,
        default=["tuned"],
        help="finetunings after ki.prune; all of ResNet-56: half an hour per seed",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few images, one ratio, one seed; separate rows, no results file"
    )
    parser.add_argument("--tables", action="store_true", help="only print the finished rows and write the results file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    warnings.filterwarnings("ignore", module="torch_pruning")
    store = (
        ResultsStore(CACHE / "rows_quick.jsonl")
        if args.quick
        else ResultsStore(CACHE / "rows.jsonl", RESULTS / f"{RESULTS_NAME}.json")
    )
    tasks = [TASKS[name](args.quick) for name in args.networks]
    failures: list[str] = []

    def is_requested(method: Method) -> bool:
        return args.methods is None or any(part in method.name for part in args.methods)

    for task in tasks if not args.tables else []:
        ratios = args.ratios or task.ratios
        seeds = args.seeds[:1] if args.quick else args.seeds
        if args.screen or args.quick:
            for ratio in args.ratios or [task.screened]:
                failures += run_screening(task, seeds[0], store, is_requested, args.finishes or FINISHES[:3], ratio)
        if not args.screen:
            for seed in seeds:
                failures += run_full(
                    task,
                    seed,
                    store,
                    is_requested,
                    [task.screened] if args.quick else ratios,
                    args.finishes or FINISHES,
                    args.afterwards,
                )
    report(tasks, store, write=not args.quick and not args.screen)
    if failures:
        sys.exit("failed, without a row:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
