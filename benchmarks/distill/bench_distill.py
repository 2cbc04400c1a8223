"""Accuracy of students by loss: `IsomorphismLoss` at its defaults, and published distillation losses, tuned.

    python -m benchmarks.distill.bench_distill --pair resnet56_resnet8_cifar10 --budget 10 --tune
    python -m benchmarks.distill.bench_distill --pair resnet56_resnet8_cifar10 --budget 10 --seeds 5
    python -m benchmarks.distill.bench_distill --pair resnet56_resnet8_cifar10 --costs
    python -m benchmarks.distill.bench_distill --part tuning --arms kd+ours kd+ours,weight=100,schedule=decay
    python -m benchmarks.distill.bench_distill --table

All arms of a pair, budget and seed have equal initial weights, images, order, augmentation and number of steps. An arm
is a sum of terms beside the cross-entropy, see `arms.py`. Rows are written as soon as a group of arms is finished, and
a later call continues after them: an arm that is added later costs only its student.

`--tune` tries three weights a decade apart around the published one for every rival, and a fourth where the best is at
the edge, with a seed of its own on a part of the training images, and validates on the other training images. The final
runs train on all training images and are evaluated on the test images. `IsomorphismLoss` at its defaults is not tuned.

The augmentation is a function of data set, epoch and image. The outputs of the teacher are therefore computed once for
all seeds and arms, in bfloat16, and kept in `benchmarks/.cache/distill`: at most 6 GB (`KNOWISO_DISTILL_CACHE_GB`).
Images beyond that are computed in every run. Students are trained in bfloat16 where that is faster. `--costs` measures
the step of all arms side by side: CPU time of one thread without the teacher, and peak memory.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import knowiso_train.distillation
from benchmarks.common.results import table
from benchmarks.distill.arms import METHODS, RIVALS, TUNED, Arm, parse_arm
from benchmarks.distill.pairs import PAIRS, Images
from benchmarks.distill.store import COSTS, REFERENCE_ARM, ResultsStore, loss_defaults, summary
from benchmarks.distill.teacher_cache import RecordedTeacher, TeacherCache
from benchmarks.distill.training import Run, train

TUNING_SEED, COST_STEPS = 1000, 100
DEFAULT_ARMS = ("ce", REFERENCE_ARM, *(str(parse_arm(text).with_weight(TUNED)) for text in RIVALS))


def prepare(name: str) -> tuple[Images, TeacherCache]:
    """Load the images of a pair and its teacher, whose outputs all pairs with it share."""
    pair = PAIRS[name]
    images, model = Images(pair), pair.teacher()
    teacher = RecordedTeacher(model, list(pair.layers.values()), pair.classifiers[1])
    folder = f"{name.split('_')[0]}_{pair.dataset}"
    return images, TeacherCache(teacher, folder, len(images.labels), images.training[:1].float())


class Bench:
    """Runs of the arms of a pair at a budget, and their rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.store = args, ResultsStore(args.pair)
        self.images, self.cache = prepare(args.pair)
        self.provenance = {"library": library_digest(), "date": datetime.date.today().isoformat()}

    def run(self, arms: Sequence[Arm], seed: int, part: Any, again: bool = False) -> list[dict[str, Any]]:
        """Return the rows of the arms; train those without a row, a group at a time."""
        budget, size = self.args.budget, self.args.group
        missing = [arm for arm in arms if again or self.store.find(part, budget, seed, arm) is None]
        for group in (missing[i : i + size] for i in range(0, len(missing), size)):
            print(f"{self.args.pair}, {part}, {budget} epochs, seed {seed}:", *group, flush=True)
            rows = [self._key(s.arm, part, budget, seed) | s.row() for s in train(group, self._run(part, budget, seed))]
            self.store.add(rows)
            print(table([{"arm": row["arm"], "accuracy": row["accuracy"]} for row in rows]), flush=True)
        return [row for arm in arms if (row := self.store.find(part, budget, seed, arm)) is not None]

    def measure_costs(self, arms: Sequence[Arm]) -> None:
        """Time some steps of all arms side by side, once for all weights."""
        unweighted = [str(arm.unweighted()) for arm in arms]
        distinct = [parse_arm(text) for text in dict.fromkeys(unweighted)]
        students = train(distinct, self._run("tuning", 1, TUNING_SEED), COST_STEPS)
        self.store.add([self._key(student.arm, COSTS, 0, TUNING_SEED) | student.costs() for student in students])

    def _run(self, part: Any, budget: int, seed: int) -> Run:
        pair, model = PAIRS[self.args.pair], self.cache.teacher.model
        return Run(pair, self.images, self.cache, model.get_submodule(pair.classifiers[1]), part, budget, seed)

    def _key(self, arm: Arm, part: str, budget: int, seed: int) -> dict[str, Any]:
        """Return what identifies a row, and where it comes from."""
        key = {"part": part, "budget": budget, "seed": seed, "arm": str(arm), "defaults": loss_defaults(arm)}
        return key | self.provenance

    def tune(self, arms: Sequence[Arm]) -> None:
        """Try three weights a decade apart for each arm, and a fourth where the best one is at the edge."""
        grids = {arm: [round(METHODS[arm.names[-1]].weight * factor, 6) for factor in (0.1, 1.0, 10.0)] for arm in arms}
        self.run([arm.with_weight(w) for arm, grid in grids.items() for w in grid], TUNING_SEED, "tuning")
        edges = []
        for arm, grid in grids.items():
            best = self.store.best_weight(arm, self.args.budget)
            if best == grid[0]:
                edges.append(arm.with_weight(round(grid[0] / 10, 6)))
            elif best == grid[-1]:
                edges.append(arm.with_weight(grid[-1] * 10))
        self.run(edges, TUNING_SEED, "tuning")


def library_digest() -> str:
    """Return a digest of the sources of the loss, so that rows of its versions can be distinguished."""
    folder = Path(knowiso_train.distillation.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:8]


def print_tables(part: Any) -> None:
    """Print the tables of all results files, and the means over the pairs."""
    stores = [ResultsStore(name) for name in PAIRS]
    for budget in sorted({row["budget"] for store in stores for row in store.rows if row["part"] == part}):
        for store in stores:
            if rows := store.table(part, budget):
                print(f"\n{store.pair}, {part}, {budget} epochs\n{table(rows)}")
        if rows := summary(stores, part, budget):
            print(f"\nmean over the pairs, {part}, {budget} epochs\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="resnet56_resnet8_cifar10")
    parser.add_argument("--budget", type=int, default=10, help="epochs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0, or from 1000 for --part tuning")
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, help="loss terms, such as kd+fitnet,weight=tuned")
    parser.add_argument("--part", choices=("final", "tuning"), default="final", help="images of the runs")
    parser.add_argument("--tune", action="store_true", help="tune the rivals among the arms")
    parser.add_argument("--costs", action="store_true", help="measure time and memory of a step of the arms")
    parser.add_argument("--again", action="store_true", help="run arms again that have a row")
    parser.add_argument("--group", type=int, default=4, help="arms that are trained side by side")
    parser.add_argument("--table", action="store_true", help="print the recorded tables and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        print_tables(args.part)
        return
    bench = Bench(args)
    arms = [parse_arm(text) for text in args.arms]
    if args.tune:
        bench.tune([arm for arm in arms if arm.terms and arm.terms[-1].option("weight", None) == TUNED])
        return
    if args.costs:
        bench.measure_costs(arms)
        return
    first_seed = TUNING_SEED if args.part == "tuning" else 0
    resolved = [bench.store.resolve(arm, args.budget) for arm in arms]
    for seed in range(first_seed, first_seed + args.seeds):
        bench.run(resolved, seed, args.part, args.again)
    print(table(bench.store.table(args.part, args.budget)))


if __name__ == "__main__":
    main()
