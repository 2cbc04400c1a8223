"""Claim: stronger compression discards more of a network's features, and least where redundancy is highest.

    python -m benchmarks.claims.bench_compression          # 10 minutes on one CPU core; resumes

A public ResNet-20 and two ResNet-8 trained here on CIFAR-10 are compressed without training: `ki.prune`, criteria of
torch-pruning with recomputed batch-norm statistics, and the truncated SVD of every convolution at equal multiply-adds;
8-bit integers by torch's static quantization. All use the same 1,024 training images without labels; 1,500 test images
measure the stages (order 0).

Redundancy: in three public networks, every block alone loses the half of its inner channels with the smallest L1 norms,
without further change. The lost share of the block's branch is compared with the redundancy of its inner channels: the
mean share of a channel's variance that the other channels explain linearly.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from benchmarks.baselines.grail_osscar import recompute_statistics
from benchmarks.baselines.tp_importances import IMPORTANCES, CalibrationData, prune_with
from benchmarks.baselines.tp_pruner import BudgetPruner, MacCounter
from benchmarks.claims.common import LAYERS, SEEDS, ClaimResults, judge
from benchmarks.common.models import BasicBlock, CifarResNet, cifar10, cifar_resnet
from benchmarks.common.small_networks import Training, trained_network
from benchmarks.common.stats import mean_and_error, spearman
from knowiso_train.diagnosis.comparison import StageComparison
from knowiso_train.diagnosis.comparison.report import StageFigure

# Public networks, and ResNet-8 trained here by seed
NETWORKS = ("ResNet-20", *(f"ResNet-8, seed {seed}" for seed in SEEDS[:2]))
BLOCK_NETWORKS = ("ResNet-20", "ResNet-32", "ResNet-44")
RATIOS = (1.3, 2.0, 3.0, 4.0)
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "claims_compression"
CALIBRATION_IMAGES, TEST_IMAGES, BLOCK_TEST_IMAGES, BATCH_IMAGES = 1024, 1500, 500, 125
PRUNING_SEED = 20  # of sampled positions, and of random scores
CRITERIA = {"magnitude": "L2", "Taylor": "Taylor", "random": "Random"}
OURS, LOW_RANK, INT8 = "ki.prune", "low rank", "int8"
FIGURES: tuple[StageFigure, ...] = ("kept", "lost", "gained", "agreement", "lost_agreement")
EXAMPLE = torch.zeros(1, 3, 32, 32)


def original(name: str) -> CifarResNet:
    """Return a network by its name."""
    if "seed" not in name:
        return cifar_resnet(int(name.removeprefix("ResNet-")))
    return small_network(int(name.rpartition(" ")[2]))


def small_network(seed: int) -> CifarResNet:
    """Return the ResNet-8 of a seed; the training images are loaded only if it is not in the cache."""
    training = Training(seed=seed, num_checkpoints=12)
    return trained_network(training, *cifar10("train", 1 if training.folder.exists() else None))


@cache
def calibration_images() -> Tensor:
    return cifar10("train", CALIBRATION_IMAGES)[0]


@cache
def test_loader(images: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*cifar10("test", images)), batch_size=BATCH_IMAGES)


def pruned(name: str, ratio: float) -> nn.Module:
    """Prune by the library, closed-form refit included."""
    return ki.prune(
        original(name), list(calibration_images().split(64)), macs=1 / ratio, seed=PRUNING_SEED, progress=False
    ).model


def pruned_by(criterion: str, name: str, ratio: float) -> nn.Module:
    """Prune the inner channels of all blocks evenly by a criterion of torch-pruning, and recompute the statistics."""
    model, images = original(name).requires_grad_(True), calibration_images()
    with torch.no_grad():
        predictions = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH_IMAGES)])
    macs = MacCounter(model, EXAMPLE)
    inner = [layer for layer, _ in model.named_modules() if layer.endswith(".conv1")]
    data = CalibrationData(images, predictions, seed=PRUNING_SEED)
    prune_with(BudgetPruner(model, EXAMPLE, macs, inner), IMPORTANCES[criterion], data, macs(model) / ratio, "local")
    recompute_statistics(model, images.split(BATCH_IMAGES))
    return model.eval()


def low_rank(name: str, ratio: float) -> nn.Module:
    """Replace every 3×3 convolution of the blocks by the truncated SVD of its weight: 3×3 to r channels, then 1×1."""
    model = original(name)
    for block in (module for module in model.modules() if isinstance(module, BasicBlock)):
        for conv in ("conv1", "conv2"):
            setattr(block, conv, _factored(getattr(block, conv), ratio))
    recompute_statistics(model, calibration_images().split(BATCH_IMAGES))
    return model.eval()


def _factored(conv: nn.Conv2d, ratio: float) -> nn.Sequential:
    width, inputs = conv.weight[:, 0, 0, 0].numel(), conv.weight[0].numel()
    # The multiply-adds of both factors are r · (inputs + width) at each position
    rank = max(1, int(width * inputs / (ratio * (inputs + width))))
    u, s, v = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    first = nn.Conv2d(conv.in_channels, rank, 3, conv.stride, 1, bias=False)
    second = nn.Conv2d(rank, width, 1, bias=False)
    first.weight = nn.Parameter(v[:rank].reshape(rank, *conv.weight.shape[1:]))
    second.weight = nn.Parameter((u[:, :rank] * s[:rank])[:, :, None, None])
    return nn.Sequential(first, second)


class Int8Block(BasicBlock):
    """Residual block whose addition is observed and quantized."""

    add: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        result: Tensor = self.add.add_relu(y, x)
        return result


class Int8Network(CifarResNet):
    """CIFAR-10 ResNet that computes with 8-bit integers from the images to the logits."""

    quant: nn.Module
    dequant: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.dequant(super().forward(self.quant(x)))
        return logits


def int8(name: str) -> nn.Module:
    """Quantize weights and features to 8-bit integers by torch's static quantization."""
    model = original(name)
    model.__class__ = Int8Network
    model.quant, model.dequant = quantization.QuantStub(), quantization.DeQuantStub()
    pairs = [["conv1", "bn1"]]
    for path, block in model.named_modules():
        if isinstance(block, BasicBlock):
            block.__class__ = Int8Block
            block.add = torch.ao.nn.quantized.FloatFunctional()
            pairs += [[f"{path}.conv{i}", f"{path}.bn{i}"] for i in (1, 2)]
    quantization.fuse_modules(model, pairs, inplace=True)
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(model, inplace=True)
    with torch.no_grad():
        for batch in calibration_images().split(BATCH_IMAGES):
            model(batch)
    return quantization.convert(model)


@contextmanager
def quantized_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def stages(name: str, ratios: tuple[float, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Return functions that compress the network, by method and ratio."""
    methods: dict[str, Callable[..., nn.Module]] = {OURS: partial(pruned, name)}
    methods |= {key: partial(pruned_by, criterion, name) for key, criterion in CRITERIA.items()}
    methods[LOW_RANK] = partial(low_rank, name)
    chain = {f"{key} {ratio:g}×": partial(method, ratio) for key, method in methods.items() for ratio in ratios}
    return {INT8: partial(int8, name), **chain}


def compression(name: str, ratios: tuple[float, ...] = RATIOS) -> StageComparison:
    """Compare a network with all its compressed forms."""
    with quantized_engine():
        return ki.compare_stages(
            original(name),
            stages(name, ratios),
            test_loader(TEST_IMAGES),
            list(LAYERS),
            reference_name=name,
            path=CACHE / name,
        )


def half_block(name: str, block: str) -> nn.Module:
    """Remove the half of a block's inner channels with the smallest L1 norms, and change nothing else."""
    model = original(name)
    target = model.get_submodule(block)
    norms = target.conv1.weight.detach().abs().sum((1, 2, 3))
    removed = norms.argsort()[: len(norms) // 2]
    with torch.no_grad():
        target.conv2.weight[:, removed] = 0
    return model


def blockwise(name: str) -> StageComparison:
    """Compare a network with copies in which a single block is pruned, at the branch of that block."""
    blocks = [name for name, module in original(name).named_modules() if isinstance(module, BasicBlock)]
    return ki.compare_stages(
        original(name),
        {block: partial(half_block, name, block) for block in blocks},
        test_loader(BLOCK_TEST_IMAGES),
        {block: [f"{block}.bn2"] for block in blocks},
        functional=False,
        bootstrap=0,
        path=CACHE / f"blocks of {name}",
    )


def chain_figures(name: str) -> dict[str, Any]:
    """Return figures of all compressed forms of a network, by stage."""
    comparison = compression(name)
    entries = []
    for stage in comparison:
        layers = {entry.layer: {name: entry.figure(name) for name in FIGURES} for entry in stage}
        if (output := stage.output) is None:
            raise ValueError("the outputs were not measured")
        method, _, ratio = stage.name.rpartition(" ")
        entries.append(
            {
                "method": method or stage.name,
                "ratio": float(ratio.removesuffix("×")) if method else None,
                "lost": fmean(layer["lost"] for layer in layers.values()),
                "gained": fmean(layer["gained"] for layer in layers.values()),
                "output_agreement": output.agreement,
                "top1": output.top1,
                "loss_start": comparison.loss_start(stage.name),
                "layers": layers,
            }
        )
    own = comparison.stages[0].layers[0].of_reference.target_output
    return {"own_top1": own and own.top1, "stages": entries}


def block_figures(name: str) -> dict[str, Any]:
    """Return redundancy and lost share of every block, and their rank correlation."""
    comparison, redundancies = blockwise(name), redundancy(name)
    lost = {block: comparison[block][f"{block}.bn2"].lost for block in redundancies}
    return {
        "redundancy": redundancies,
        "lost": lost,
        "spearman": spearman(list(redundancies.values()), list(lost.values())),
    }


@torch.no_grad()
def redundancy(name: str) -> dict[str, float]:
    """Return the mean share of an inner channel's variance that the other channels of its block explain, by block."""
    model = original(name)
    sums: dict[str, list[Any]] = {}

    def add_moments(block: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].movedim(1, -1).flatten(0, -2).double()
        count, total, square = sums.get(block, [0, 0.0, 0.0])
        sums[block] = [count + len(rows), total + rows.sum(0), square + rows.T @ rows]

    for block, module in model.named_modules():
        if isinstance(module, BasicBlock):
            module.conv2.register_forward_pre_hook(partial(add_moments, block))
    for images, _ in test_loader(BLOCK_TEST_IMAGES):
        model(images)
    result = {}
    for block, (count, total, square) in sums.items():
        covariance = square / count - torch.outer(total, total) / count**2
        alive = covariance.diagonal() > 1e-9 * covariance.diagonal().max()
        covariance = covariance[alive][:, alive]
        # Residual variance of a channel given the others: 1 / [S⁻¹]_jj
        unexplained = 1 / (torch.linalg.inv(covariance).diagonal() * covariance.diagonal())
        # A channel without variance is redundant altogether
        result[block] = 1 - float(unexplained.sum()) / len(alive)
    return result


def lost_shares(row: dict[str, Any], method: str) -> list[float]:
    """Return the lost share of a method by rising ratio, mean over the layers."""
    return [stage["lost"] for stage in row["stages"] if stage["method"] == method]


def claims(chains: list[dict[str, Any]], blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts, with the networks as replicates."""
    methods = list(dict.fromkeys(stage["method"] for stage in chains[0]["stages"] if stage["ratio"]))
    section = "4, information discarding of network compression"
    return [
        *(
            judge(
                f"Stronger compression discards more ({method})",
                [100 * min(b - a for a, b in pairwise(lost_shares(row, method))) for row in chains],
                section=section,
                measured="smallest rise of the lost share from one ratio to the next, points",
            )
            for method in methods
        ),
        judge(
            "Compression discards least where redundancy is highest",
            [-row["spearman"] for row in blocks],
            section=section,
            measured="− Spearman correlation of redundancy and lost share over the blocks of a network",
        ),
    ]


def summary(chains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table with one row per method and ratio, means and standard errors over the networks."""
    rows = []
    for stages_of_all in zip(*(row["stages"] for row in chains), strict=True):
        first = stages_of_all[0]
        cells = {
            layer: mean_and_error([100 * stage["layers"][layer]["lost"] for stage in stages_of_all]) for layer in LAYERS
        }
        rows.append(
            {
                "method": first["method"],
                "ratio": first["ratio"] or "–",
                **{f"lost {layer}": cell for layer, cell in cells.items()},
                "gained": mean_and_error([100 * stage["gained"] for stage in stages_of_all]),
                "kept part agrees": mean_and_error(
                    [100 * fmean(layer["agreement"] for layer in stage["layers"].values()) for stage in stages_of_all]
                ),
                "output agrees": mean_and_error([100 * stage["output_agreement"] for stage in stages_of_all]),
                "top-1": mean_and_error([100 * stage["top1"] for stage in stages_of_all]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="claims_compression", help="results file")
    args = parser.parse_args()
    settings = {
        "ratios": RATIOS,
        "calibration_images": CALIBRATION_IMAGES,
        "test_images": [TEST_IMAGES, BLOCK_TEST_IMAGES],
        "order": 0,
    }
    results = ClaimResults(args.name, settings)
    chains = [results.row(partial(chain_figures, name), part="chain", network=name) for name in NETWORKS]
    blocks = [results.row(partial(block_figures, name), part="blocks", network=name) for name in BLOCK_NETWORKS]
    results.finish(claims(chains, blocks), summary(chains))


if __name__ == "__main__":
    main()
