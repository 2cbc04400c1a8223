"""Record the numbers of a fixed set of public calls, and check later that they are still the same.

    python -m benchmarks.regression_guard record benchmarks/results/regression_guard.json
    python -m benchmarks.regression_guard check benchmarks/results/regression_guard.json  # equal to the bit
    python -m benchmarks.regression_guard check FILE --rtol 1e-5          # on another machine
    python -m benchmarks.regression_guard check FILE --only loss prune    # some sections

Run `check` before and after a change that must not change any number. Everything runs on one CPU thread with fixed
seeds, on the real networks and images of benchmarks/common/models.py, and takes two to three minutes. Floats are stored
with all their digits, tensors as statistics and a SHA-256 of their bytes. Hashes are compared only when --rtol is 0.

A section also saves and loads what it computed, and fails if the loaded numbers differ from the saved ones.
"""

from __future__ import annotations

import os

os.environ.update(  # before torch is imported: one thread, and the same instructions on all x86 machines with AVX2
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    ACCELERATE_USE_CPU="true",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    ATEN_CPU_CAPABILITY="avx2",
    ONEDNN_MAX_CPU_ISA="AVX2",
    MKL_CBWR="AVX2,STRICT",
)

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

# Every import, option and report field of the library is in the part that ends with "End of the library's names".
# Follow renames there. The keys of the recorded file are this file's own and stay.
import knowiso_train as ki
from benchmarks.common.fingerprints import Numbers, compare, digest, environment, keyed, require_equal, state_numbers
from benchmarks.common.models import (
    CifarResNet,
    cifar10,
    cifar100_resnet,
    cifar_features,
    cifar_resnet,
    halve_inner_widths,
)
from knowiso_train.pruning import cutmix
from knowiso_train.refinement import RefineFinetuneConfig

QUIET: dict[str, Any] = {"progress": False}
Calls = dict[str, dict[str, Any]]
MEASURE_CALLS: Calls = {
    "order 0": {"order": 0, "directions": "both"},
    "order 0, kernel 3": {"order": 0, "kernel_size": 3, "ridge": 1e-3, "positions": 16},
    "order 1": {"order": 1, "hidden": 32, "max_rows": 8192, "solver_options": {"epochs": 2}},
    "paper": {
        "order": 1,
        "solver": "paper",
        "solver_options": {"epochs": 2},
        "max_rows": 4096,
        "noise_floor": False,
    },
}
LOSS_FORMS: Calls = {
    "moment": {},
    "moment, kernel 3": {"kernel_size": 3},
    "moment, balanced": {"weight": "balanced"},
    "learned": {"solver": "learned", "order": 1},
    "consensus": {"target": "consensus"},  # the section adds "peers"
}
PRUNE_CALLS: Calls = {
    "resnet20, blocks": {"block_steps": 3, "round_to": 4},
    "resnet20, L1": {"importance": tp.importance.MagnitudeImportance(p=1), "refit": False},
}
REFIT_CALLS: Calls = {"closed form": {}, "one ridge": {"ridge": 1e-2}, "blocks": {"block_steps": 3}}
# Recorded with 20 samples per feature over 512 images, of which the loader had 128
IMPORTANCE_CALLS: Calls = {"plain": {"rows": 5}, "alone": {"cumulative": False, "per": "channel", "rows": 5}}
TUNE_CALLS: Calls = {
    "features": {},
    "patches and logits": {
        "transform": partial(cutmix, flip=True),
        "logit_weight": 0.5,
        "frozen_statistics": False,
    },
    "labels": {"label_weight": 0.1, "logit_weight": 1.0, "temperature": 2.0},
}
REFINE_CALLS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether images with labels are given
    "auto": ({"method": "auto"}, True),
    "head": ({"method": "head"}, True),
    "consensus": ({"method": "consensus"}, False),
    "fold": ({"method": "fold"}, False),
}


def call_measure(source: nn.Module, target: nn.Module, loader: Any, **options: Any) -> Any:
    """Measure two layers."""
    return ki.measure(source, target, loader, ["layer2", "layer3"], bootstrap=50, **QUIET, **options)


def measure_numbers(report: Any) -> Numbers:
    """Return the numbers of a measurement report."""
    found: Numbers = {}
    for i, pair in enumerate(report.pairs):
        found |= keyed(
            f"pair {i}",
            shares=pair.shares,
            unexplained=pair.unexplained,
            interval=pair.interval,
            share_intervals=pair.share_intervals,
            noise_floor=pair.noise_floor,
            component_variances=pair.component_variances,
            ridge=pair.ridge,
            rows=pair.rows,
            channels=(pair.source_channels, pair.target_channels),
        )
    return found | keyed("images", counts=[report.images[part] for part in ("fit", "select", "report")])


def measure_reloaded(report: Any) -> Any:
    """Return the report after writing and reading JSON."""
    return ki.Report.from_json(report.to_json())


def fitted_maps(report: Any) -> list[nn.Module]:
    """Return the fitted disentangler of each pair."""
    return [pair.disentangler for pair in report.pairs]


def make_disentangler(order: int) -> Any:
    """Return a disentangler with a short training."""
    options = {"epochs": 2} if order else None
    return ki.Disentangler(order=order, kernel_size=3, hidden=32, seed=1, solver_options=options)


def disentangler_reloaded(maps: Any, folder: Path) -> nn.Module:
    """Return the disentangler after saving and loading it."""
    maps.save(folder)
    return ki.Disentangler.load(folder)


def make_loss(student: nn.Module, teacher: nn.Module, **options: Any) -> Any:
    """Return the loss of two layers."""
    options = {"scale": "linear", "weight": 1.0} | options
    return ki.IsomorphismLoss(student, teacher, {"layer2": "layer2", "layer3": "layer3"}, refresh=5, **options)


def loss_log(loss: Any) -> list[float]:
    """Return the numbers that the loss logs, in its own order."""
    return list(loss.log().values())


def call_prune(model: nn.Module, images: Any, **options: Any) -> Any:
    """Prune to half of the multiply-adds."""
    return ki.prune(model, images, macs=0.5, **QUIET, **options)


def prune_numbers(report: Any) -> Numbers:
    """Return the numbers of a pruning report."""
    found = keyed("cost", macs=report.macs, parameters=report.parameters, images=report.images)
    found |= keyed("widths", before=[w.before for w in report.widths], after=[w.after for w in report.widths])
    return found | refit_numbers(report)


def refit_numbers(report: Any) -> Numbers:
    """Return the numbers of a refit's report."""
    found: Numbers = {}
    for i, fit in enumerate(report.layers):
        found |= keyed(
            f"layer {i:02d}", inputs=fit.num_inputs, rows=fit.num_samples, before=fit.before, after=fit.after
        )
    for i, fit in enumerate(report.blocks):
        found |= keyed(f"block {i:02d}", before=fit.before, after=fit.after)
    return found


def call_refit(pruned: nn.Module, original: nn.Module, images: Any, **options: Any) -> Any:
    """Refit a pruned network in place."""
    return ki.refit(pruned, original, images, **QUIET, **options)


def make_importance(model: nn.Module, images: Any, **options: Any) -> Any:
    """Return the importance for torch-pruning."""
    return ki.IsomorphismImportance(model, images, **QUIET, **options)


def pruned_reloaded(pruned: Any, fresh: nn.Module, folder: Path) -> nn.Module:
    """Return the pruned network after saving and loading it."""
    ki.save_pruned(folder, pruned.model, pruned.original, kept=pruned.kept, factory="external", example=(1, 3, 32, 32))
    return ki.load_pruned(folder, model=fresh)


def call_tune(pruned: nn.Module, original: nn.Module, batches: Any, **options: Any) -> Any:
    """Tune a pruned network in place for twenty steps."""
    return ki.finetune(pruned, original, batches, steps=20, batch_size=32, **QUIET, **options)


def tune_numbers(report: Any) -> Numbers:
    """Return the numbers of a tuning report."""
    found = keyed("steps", losses=report.losses, images=report.images)
    for i, check in enumerate(report.validations):
        found |= keyed(
            f"check {i}",
            step=check.step,
            divergence=check.divergence,
            agreement=check.agreement,
            cross_entropy=check.cross_entropy,
            features=check.feature_distance,
            objective=check.objective,
        )
    return found


def call_refine(model: nn.Module, peers: Sequence[nn.Module], pool: Any, **options: Any) -> Any:
    """Refine a network."""
    return ki.refine(
        model,
        peers,
        pool,
        finetune_config=RefineFinetuneConfig(steps=4, layers=["layer3"]),
        max_images=400,
        **QUIET,
        **options,
    )


def refine_numbers(report: Any) -> Numbers:
    """Return the numbers of a refinement report."""
    found: Numbers = {}
    for i, row in enumerate(report.rows):
        for part, score in (("validation", row.validation), ("test", row.test)):
            if score is not None:
                found |= keyed(f"row {i} {part}", accuracy=score.accuracy, ece=score.ece, images=score.num_images)
    for i, peer in enumerate(report.peers):
        shares = (peer.r2_of_model, peer.r2_of_peer, peer.noise_floor)
        found |= keyed(f"peer {i}", shares=shares, useful=int(peer.useful))
    found |= keyed("shares", before_after=list(report.explained.values()))
    return found | keyed(
        "images", counts=[report.num_images[k] for k in ("unlabeled", "labeled", "validation", "test")]
    )


def refine_sets(labeled: Any, validation: Any, test: Any) -> dict[str, Any]:
    """Return the images with labels, by the names that refine gives them."""
    return {"labeled": labeled, "validation": validation, "test": test}


def refine_json_numbers(text: str) -> list[float]:
    """Return the accuracies in a refinement report's JSON."""
    rows = json.loads(text)["rows"]
    return [row[part]["accuracy"] for row in rows for part in ("validation", "test") if row[part] is not None]


# End of the library's names.


@cache
def images(count: int) -> tuple[Tensor, Tensor]:
    """Return the first training images and labels of CIFAR-10."""
    return cifar10("train", count)


@cache
def held_out_images(count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images and labels of CIFAR-10."""
    return cifar10("test", count)


def batches(x: Tensor, y: Tensor | None = None, size: int = 64) -> list[Any]:
    """Return batches as a loader gives them."""
    parts = x.split(size)
    return list(parts) if y is None else list(zip(parts, y.split(size), strict=True))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Return the logits of a few test images."""
    return model.eval()(held_out_images(400)[0][:32])


def section_measure() -> Numbers:
    """Measure at order 0 and 1, in both directions, and with the paper's solver."""
    loader = batches(*images(1000))[:6]
    source, target = cifar_resnet(20), cifar_resnet(32)
    found: Numbers = {}
    for name, options in MEASURE_CALLS.items():
        report = call_measure(source, target, loader, **options)
        numbers = measure_numbers(report)
        require_equal(numbers, measure_numbers(measure_reloaded(report)), "measure")
        for i, maps in enumerate(fitted_maps(report)):
            numbers |= state_numbers(f"maps {i}", maps, named=False)
        found |= {f"{name} / {key}": value for key, value in numbers.items()}
    return found


def section_disentangle() -> Numbers:
    """Fit disentanglers to features, split with them, and save and load them."""
    x, y = (cifar_features(depth, images(1000)[0][:192], 3) for depth in (20, 32))
    found: Numbers = {}
    for order in (0, 1):
        maps = make_disentangler(order).fit(x, y)
        parts, residual = maps.split(x, y)
        for i, part in enumerate([*parts, residual]):
            found |= keyed(f"order {order}", **{f"part {i}": part})
        found |= state_numbers(f"order {order} / maps", maps, named=False)
        with tempfile.TemporaryDirectory() as folder:
            again, _ = disentangler_reloaded(maps, Path(folder)).split(x, y)
        require_equal([digest([part]) for part in parts], [digest([part]) for part in again], "disentangler")
    return found


def section_loss() -> Numbers:
    """Train with each form of the loss for twenty steps."""
    x, y = images(1000)
    found: Numbers = {}
    for name, options in LOSS_FORMS.items():
        torch.manual_seed(0)
        student = CifarResNet(20).train()
        more = {"peers": [cifar_resnet(44)]} if name == "consensus" else {}
        loss = make_loss(student, cifar_resnet(32), **options, **more)
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.02, momentum=0.9)
        values: list[float] = []
        with loss:
            for step in range(20):
                chosen = slice(32 * step, 32 * step + 32)
                task = F.cross_entropy(student(x[chosen]), y[chosen])
                taught = loss()
                optimizer.zero_grad()
                (task + taught).backward()
                optimizer.step()
                values += [task.item(), taught.item()]
            logged = loss_log(loss)
        found |= keyed(name, task_and_loss=values, log=sorted(logged))
        found |= state_numbers(f"{name} / student", student)
        found |= state_numbers(f"{name} / loss", loss, named=False)
        other = make_loss(copy.deepcopy(student), cifar_resnet(32), **options, **more)
        other.load_state_dict(loss.state_dict())
        saved, loaded = (state_numbers("", module, named=False) for module in (loss, other))
        require_equal(saved, loaded, f"loss, {name}")
    return found


@cache
def half_of_resnet56() -> Any:
    """Prune ResNet-56 once for the sections that need it."""
    return call_prune(cifar_resnet(56), batches(images(1000)[0][:128]))


def section_prune() -> Numbers:
    """Prune ResNet-56, and save and load the result; prune ResNet-20 with blocks tuned."""
    pruned = half_of_resnet56()
    with tempfile.TemporaryDirectory() as folder:
        loaded = pruned_reloaded(pruned, CifarResNet(56), Path(folder))
    require_equal(state_numbers("", pruned.model), state_numbers("", loaded), "pruned network")
    require_equal(digest([outputs(pruned.model)]), digest([outputs(loaded)]), "outputs of the pruned network")
    found = described("resnet56", prune_numbers(pruned.report), pruned.model)
    few = batches(images(1000)[0][:128])
    for name, options in PRUNE_CALLS.items():
        other = call_prune(cifar_resnet(20), few, **options)
        found |= described(name, prune_numbers(other.report), other.model)
    return found


def described(name: str, numbers: Numbers, model: nn.Module) -> Numbers:
    """Put the numbers of a report, the weights and the outputs of a network under one name."""
    numbers = numbers | state_numbers("weights", model) | keyed("outputs", logits=outputs(model))
    return {f"{name} / {key}": value for key, value in numbers.items()}


def section_refit() -> Numbers:
    """Refit networks that lost half of their inner channels by L1 norm."""
    original, few = cifar_resnet(20), batches(images(1000)[0][:128])
    found: Numbers = {}
    for name, options in REFIT_CALLS.items():
        small = halve_inner_widths(original)
        found |= described(name, refit_numbers(call_refit(small, original, few, **options)), small)
    return found


def section_importance() -> Numbers:
    """Score the channels of two groups."""
    model, few = cifar_resnet(20), batches(images(1000)[0][:128])
    graph = tp.DependencyGraph().build_dependency(model, few[0][:1])
    found: Numbers = {}
    for name, options in IMPORTANCE_CALLS.items():
        importance = make_importance(model, few, **options)
        for stage, layer in (("layer1", model.layer1[0].conv1), ("layer3", model.layer3[1].conv1)):
            group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
            found |= keyed(name, **{stage: [float(score) for score in importance(group)]})
    return found


def section_tune() -> Numbers:
    """Tune the pruned ResNet-56 for twenty steps, in two ways."""
    x, y = images(1000)
    original = cifar_resnet(56)
    found: Numbers = {}
    for name, options in TUNE_CALLS.items():
        small = copy.deepcopy(half_of_resnet56().model)
        report = call_tune(small, original, batches(x[:128], y[:128]), **options)
        found |= described(name, tune_numbers(report), small)
    return found


def section_refine() -> Numbers:
    """Refine a CIFAR-100 ResNet-8 for CIFAR-10 by its two peers."""
    x, y = images(1000)
    test_x, test_y = held_out_images(400)
    model, peers = cifar100_resnet(8), [cifar100_resnet(20), cifar100_resnet(32)]
    parts = ((x[:100], y[:100]), (test_x[:200], test_y[:200]), (test_x[200:], test_y[200:]))
    sets = refine_sets(*(batches(*part) for part in parts))
    pool = batches(x[100:500])
    found: Numbers = {}
    for name, (options, labeled) in REFINE_CALLS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refined = call_refine(copy.deepcopy(model), peers, pool, **options, **(sets if labeled else {}))
        numbers = refine_numbers(refined.report)
        text = refined.report.to_json()
        accuracies = [value for key, value in numbers.items() if key.endswith("accuracy")]
        require_equal(accuracies, refine_json_numbers(text), "refinement report")
        found |= described(name, numbers, refined.model)
    return found


SECTIONS: dict[str, Callable[[], Numbers]] = {
    "measure": section_measure,
    "disentangle": section_disentangle,
    "loss": section_loss,
    "prune": section_prune,
    "refit": section_refit,
    "importance": section_importance,
    "tune": section_tune,
    "refine": section_refine,
}


def run(names: Sequence[str]) -> dict[str, Numbers]:
    """Run sections, one thread, deterministic."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)
    found: dict[str, Numbers] = {}
    for name in names:
        torch.manual_seed(0)
        began = time.perf_counter()
        found[name] = SECTIONS[name]()
        print(f"{name}: {len(found[name])} numbers, {time.perf_counter() - began:.1f} s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    every = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--rtol", type=float, default=0.0, help="largest relative difference that passes (default: 0)")
    options = parser.parse_args(arguments)

    here = environment()
    stored = json.loads(options.file.read_text()) if options.file.exists() else None
    if options.action == "record":
        sections = run(options.only)
        if stored is not None and len(options.only) < len(SECTIONS):  # the other sections stay
            if stored["environment"] != here:
                parser.error(f"{options.file} was recorded with other versions: record all sections")
            sections = {name: sections.get(name, stored["sections"].get(name, {})) for name in SECTIONS}
        options.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": here, "sections": sections}
        options.file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"recorded {sum(map(len, sections.values()))} numbers")
        return 0
    if stored is None:
        parser.error(f"{options.file} does not exist: record it first")
    found = run(options.only)
    differing, failing = compare(stored["sections"], found, options.rtol)
    others = [name for name in {**stored["environment"], **here} if stored["environment"].get(name) != here.get(name)]
    for name in others:
        print(f"recorded with another {name}: {stored['environment'].get(name)}, here {here.get(name)}")
    if others and failing:
        print("bits may differ between these; record on this machine before the change, or allow a small --rtol")
    total = sum(map(len, found.values()))
    print(f"{total} numbers, {differing} differ, {failing} by more than {options.rtol:g}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
