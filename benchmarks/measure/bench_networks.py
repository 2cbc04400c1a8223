"""Shares between real pretrained networks: CIFAR-10 ResNets and two EfficientNet-Lite with ImageNet weights.

    python -m benchmarks.measure.bench_networks             # an hour on two CPU cores
    python -m benchmarks.measure.bench_networks --draw      # results/networks.png, of the recorded figures

Linear CKA (Kornblith et al. 2019) is computed on the same images for comparison.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.common.models import DATA, cifar10, cifar_resnet, efficientnet_lite
from benchmarks.common.results import RESULTS, record, table
from knowiso_train import Report, measure
from knowiso_train.features import Extractor, align
from knowiso_train.measurement import PairResult, linear_cka

STAGES = ["layer1", "layer2", "layer3"]
LITE_BLOCKS = [f"blocks.{i}" for i in (1, 2, 4, 6)]


def stage_cka(a: torch.nn.Module, b: torch.nn.Module, images: Tensor, layers: list[str]) -> list[float]:
    """Compute linear CKA over images and positions, on the grid of the target."""
    with Extractor(a, layers) as extractor_a, Extractor(b, layers) as extractor_b, torch.no_grad():
        x, y = extractor_a.run(images), extractor_b.run(images)
    values = []
    for layer in layers:
        xs, ys = align(x[layer], (y[layer].shape[2], y[layer].shape[3])), y[layer]
        rows = (feature.movedim(1, -1).flatten(0, -2) for feature in (xs, ys))
        values.append(linear_cka(*rows, debiased=False))
    return values


class Photographs(Dataset[Tensor]):
    """`imagenet1k_sample`: short side 224, center crop, normalized to [-1, 1]."""

    def __init__(self) -> None:
        self.files = sorted((DATA / "imagenet1k_sample").glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image
        from torchvision.transforms import functional as T

        image = T.center_crop(T.resize(Image.open(self.files[i]).convert("RGB"), 224), [224, 224])
        return (T.to_tensor(image) - 0.5) / 0.5


def table_rows(report: Report, cka: list[float] | None = None) -> list[dict[str, Any]]:
    """Return a row for each layer pair of a report."""
    rows = []
    for i, pair in enumerate(report.pairs):
        low, high = pair.interval
        rows.append(
            {
                "explained from": report.source if pair.direction == "forward" else report.target,
                "explained": report.target if pair.direction == "forward" else report.source,
                "layer": pair.target,
                **{f"order {k}": share for k, share in enumerate(pair.shares)},
                "unexplained": pair.unexplained,
                "95 %": f"{low:.3f}..{high:.3f}",
                "noise floor": pair.noise_floor,
                **({} if cka is None else {"linear CKA": cka[i % len(cka)]}),
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], source: str, target: str, path: Path) -> None:
    """Draw the recorded shares between two networks, in both directions."""
    pairs = []
    for row in rows:
        if {row["explained from"], row["explained"]} == {source, target}:
            shares = tuple(value for name, value in row.items() if name.startswith("order "))
            low, high = (float(end) for end in row["95 %"].split(".."))
            pair = PairResult(
                source=row["layer"],
                target=row["layer"],
                direction="forward" if row["explained from"] == source else "backward",
                shares=shares,
                unexplained=row["unexplained"],
                interval=(low, high),
                share_intervals=(),
                noise_floor=row["noise floor"],
                component_variances=(),
                additive=True,
                source_channels=0,
                target_channels=0,
                source_grid=(0, 0),
                target_grid=(0, 0),
                ridge=(),
                rows=0,
            )
            pairs.append(pair)
    title = f"CIFAR-10: shares of knowledge between {source} and {target}"
    Report(source, target, tuple(pairs), {"report": 400}, {}, 0.0, {}).plot(path, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="CIFAR-10 images")
    parser.add_argument("--order", type=int, default=1, help="highest order")
    parser.add_argument(
        "--max-rows",
        type=int,
        default=32_768,
        help="number of positions to train orders >= 1 on",
    )
    parser.add_argument(
        "--picture", type=Path, default=RESULTS / "networks.png", help="plot of ResNet-20 and ResNet-56"
    )
    parser.add_argument("--draw", action="store_true", help="only draw the picture of the recorded results")
    args = parser.parse_args()
    if args.draw:
        recorded = json.loads((RESULTS / "networks.json").read_text())["figures"]["cifar10"]
        draw(recorded, "ResNet-20", "ResNet-56", args.picture)
        return
    images, _ = cifar10("train", args.images)
    loader = DataLoader(TensorDataset(images), batch_size=200)
    rows: list[dict[str, Any]] = []
    depths = (20, 32, 44, 56)
    for i, a in enumerate(depths):
        for b in depths[i + 1 :]:
            nets = cifar_resnet(a), cifar_resnet(b)
            report = measure(
                *nets,
                loader,
                STAGES,
                order=args.order,
                kernel_size=3,
                max_rows=args.max_rows,
                directions="both",
                names=(f"ResNet-{a}", f"ResNet-{b}"),
            )
            print(report, flush=True)
            rows += table_rows(report, stage_cka(*nets, images[:600], STAGES))
    lite = efficientnet_lite(0), efficientnet_lite(1)
    photographs = DataLoader(Photographs(), batch_size=50, num_workers=1)
    report = measure(
        *lite,
        photographs,
        LITE_BLOCKS,
        order=args.order,
        max_rows=args.max_rows,
        directions="both",
        names=("lite0", "lite1"),
    )
    print(report, flush=True)
    rows_lite = table_rows(report)
    print(table(rows))
    draw(rows, "ResNet-20", "ResNet-56", args.picture)
    record("networks", {"cifar10": rows, "imagenet1k_sample": rows_lite}, settings=report.settings)


if __name__ == "__main__":
    main()
