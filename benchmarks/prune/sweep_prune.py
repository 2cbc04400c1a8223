"""Prune many architectures with random weights, and list what was pruned, refused, failed or took too long.

    python -m benchmarks.prune.sweep_prune                          # about 240 networks, an hour of one core; resumes
    python -m benchmarks.prune.sweep_prune --only torchvision       # or timm, transformers
    python -m benchmarks.prune.sweep_prune --names timm/test_resnet transformers/vit --limit 60

Every torchvision classifier, the smallest variant of every timm module and a small configuration of every image
classifier of transformers is pruned to 0.6 of its multiply-adds. A network is "ok" when the pruned network runs, its
outputs are finite and have the shape of the original's, and torch's own flop counter finds at most that share (0.02
more where widths are coarse). "refused" is a KnowisoError, with its reason, "skipped" a network that does not run here.
Anything else is "failed".

The limit is one of CPU seconds of the process, so that a shared core does not change the outcome. Wide networks take
minutes in the linear algebra of the refit: they are pruned by weight magnitude and without the refit ("structure" in
the column "method"), which traces, tries, cuts and checks the same groups. Rows are appended to a file; a run that is
started again skips the networks that it holds, and --redo drops rows of some outcomes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.results import record, table

MACS, IMAGES, BATCH = 0.6, 32, 16
SMALL_SIZE = 96  # pixels
TOLERANCE = 0.02
WALL_FACTOR = 20  # wall-clock limit as a multiple of the limit of CPU seconds
MAX_REFIT_OPERATIONS = 3e9  # sum of fan-in³ over all layers; 3.5e11 take 146 s of one core (ResNet-18)
TOKEN_MODELS = ("imagegpt", "shieldgemma2")
# The first that runs is taken
SMALL_CONFIGS: tuple[dict[str, int], ...] = (
    {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 64,
        "patch_size": 16, "embed_dim": 48, "num_labels": 5, "num_latents": 16, "d_latents": 64,
        "num_self_attends_per_block": 2,
    },
    {"image_size": 64, "num_hidden_layers": 2, "num_labels": 5},
    {"num_labels": 5},
)  # fmt: skip


def main() -> None:
    """Run the sweep and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["transformers", "timm", "torchvision"], help="libraries to sweep")
    parser.add_argument("--names", nargs="+", help="networks, as library/name")
    parser.add_argument("--limit", type=float, default=60.0, help="CPU seconds for each network")
    parser.add_argument("--redo", nargs="+", default=[], help="outcomes of which rows are computed again")
    parser.add_argument("--rows", type=Path, default=Path("output/sweep_prune.jsonl"), help="rows of this sweep")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/sweep_prune.json")
    args = parser.parse_args()
    names = args.names or [
        f"{library}/{name}" for library in (args.only or BUILDERS) for name in BUILDERS[library][0]()
    ]
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    rows = [row for row in rows if row["outcome"] not in args.redo or row["network"] not in names]
    args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {row["network"] for row in rows}
    worker = Worker()
    for i, name in enumerate(names):
        if name not in done:
            row = worker.run(name, args.limit)
            rows.append(row)
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"[{i + 1}/{len(names)}] {name}: {row['outcome']} {row['seconds']:.1f} s {row['reason'][:100]}",
                flush=True,
            )
    worker.stop()
    rows = [row for row in rows if row["network"] in set(names)]
    if listed := [row | {"reason": row["reason"][:120]} for row in rows if row["outcome"] != "ok"]:
        print(table([{key: row[key] for key in ("network", "outcome", "seconds", "reason")} for row in listed]))
    counts = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} networks: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if args.record:
        record("sweep_prune", rows, macs=MACS, images=IMAGES, limit_seconds=args.limit)


class Worker:
    """A process that prunes one network after the other, and is replaced when a network takes too long."""

    def __init__(self) -> None:
        self.process: Any = None
        self.pipe: Any = None

    def run(self, name: str, limit: float) -> dict[str, Any]:
        """Prune a network within a limit in CPU seconds, and return its row."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()  # so that the end of the process ends the pipe
            self.pipe.recv()  # imports are done: they do not count
        time_out = {"outcome": "time-out", "seconds": limit, "reason": f"over {limit:g} CPU seconds"}
        self.pipe.send((name, limit))
        try:
            row = self.pipe.recv() if self.pipe.poll(WALL_FACTOR * limit) else time_out
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            ended = {"outcome": "failed", "seconds": 0.0, "reason": f"the process ended with exit code {code}"}
            row = time_out if code == -signal.SIGPROF else ended
        if row["outcome"] == "time-out":
            self.stop()
        return {"network": name, **row}

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def serve(pipe: Connection[Any, Any]) -> None:
    """Prune the networks whose names arrive, one after the other."""
    import knowiso_train as ki

    _ = ki.prune
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send("ready")
    while True:
        name, limit = pipe.recv()
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)  # its signal ends the process
        row = prune_one(name)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send({"seconds": round(time.process_time() - start, 1), **row})


def prune_one(name: str) -> dict[str, Any]:
    """Build and prune one network, and return outcome, reason and shares of multiply-adds."""
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    import knowiso_train as ki

    torch.manual_seed(0)
    library, _, leaf = name.partition("/")
    try:
        model, size, forward = BUILDERS[library][1](leaf)
        model.eval()
        images = torch.randn(IMAGES, 3, *size)
        with torch.no_grad():
            before = logits(forward(model, images[:2]))
    except Exception as error:
        return {"outcome": "skipped", "reason": f"cannot be built or run: {type(error).__name__}: {error}"[:300]}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    full = refit_operations(model) <= MAX_REFIT_OPERATIONS
    options = {} if full else {"importance": GroupMagnitudeImportance(), "refit": False}
    try:
        result = ki.prune(model, list(images.split(BATCH)), macs=MACS, forward=forward, progress=False, **options)
        pruned = result.model
        with torch.no_grad():
            after = logits(forward(pruned, images[:2]))
        counted = flops(pruned, images[:1], forward) / flops(model, images[:1], forward)
        row = {"outcome": "ok", "reason": "", "counted": round(counted, 4)}
        if after.shape != before.shape or not torch.isfinite(after).all():
            row |= {
                "outcome": "failed",
                "reason": f"outputs {tuple(after.shape)}, finite: {torch.isfinite(after).all()}",
            }
        elif counted > MACS + TOLERANCE:
            row |= {"outcome": "failed", "reason": f"asked for {MACS}, torch counts {counted:.3f} of the original"}
    except ki.KnowisoError as error:
        row = {"outcome": "refused", "reason": f"{type(error).__name__}: {error}"[:400]}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row = {
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"[:400],
        }
    row["method"] = "full" if full else "structure"
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if changed or hooks:
        row |= {"outcome": "failed", "reason": f"original changed: {changed[:3]}, {hooks} hooks left. {row['reason']}"}
    return row


def refit_operations(model: nn.Module) -> float:
    """Return the sum of fan-in³ over convolutions and linear layers, to which the time of a refit is proportional."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return float(sum(layer.weight[0].numel() ** 3 for layer in layers))


def logits(output: Any) -> Tensor:
    """Return the first tensor of an output."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return logits(next(iter(output.values() if isinstance(output, dict) else output)))


def flops(model: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], Any]) -> float:
    """Return the multiply-adds of one forward pass by torch's flop counter."""
    counter = FlopCounterMode(display=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter fails on parameters that are passed to modules and require gradients
    # The counter has no entry for the fused attention of CPUs
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward(model, images)
    for parameter in trained:
        parameter.requires_grad_(True)
    return float(counter.get_total_flops())


def torchvision_names() -> list[str]:
    """Return the classifiers of torchvision, those with the fewest parameters first."""
    import torchvision

    def size(name: str) -> int:
        return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])

    return sorted(torchvision.models.list_models(module=torchvision.models), key=size)


def build_torchvision(name: str) -> tuple[nn.Module, tuple[int, int], Callable[[nn.Module, Tensor], Any]]:
    """Return a torchvision classifier with random weights, its image size and its forward."""
    import torchvision

    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224 if name.startswith(("vit", "maxvit", "swin")) else SMALL_SIZE
    return torchvision.models.get_model(name, weights=None, **options), (size, size), lambda model, x: model(x)


def timm_names() -> list[str]:
    """Return the variant with the fewest parameters of every timm module, tests aside."""
    import timm

    names = []
    for module in timm.list_modules():
        variants = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        small = [
            n for n in variants if any(w in n for w in ("atto", "femto", "pico", "nano", "tiny", "xxs", "_s0", "b0"))
        ]
        # Names say little about sizes: the shortest are counted
        sizes = {}
        for name in sorted(small or variants, key=lambda n: (len(n), n))[:6]:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
            except Exception:
                sizes[name] = 10**9
        if sizes:
            names.append(min(sizes, key=lambda n: sizes[n]))
    return names + timm.list_models("test_*")


def build_timm(name: str) -> tuple[nn.Module, tuple[int, int], Callable[[nn.Module, Tensor], Any]]:
    """Return a timm network with random weights, an image size and its forward.

    Images are small where the network takes them, else of its own size.
    """
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    height, width = timm.data.resolve_model_data_config(model)["input_size"][1:]
    try:
        with torch.no_grad():
            model(torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE))
        height = width = SMALL_SIZE
    except Exception:  # of a network for one size only
        model = timm.create_model(name, pretrained=False, num_classes=5)
    return model, (height, width), lambda model, x: model(x)


def transformers_names() -> list[str]:
    """Return the image classifiers of transformers, but those that take tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return [name for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if name not in TOKEN_MODELS]


def build_transformers(name: str) -> tuple[nn.Module, tuple[int, int], Callable[[nn.Module, Tensor], Any]]:
    """Return an image classifier of transformers in a small configuration, its image size and its forward."""
    from transformers import AutoConfig, AutoModelForImageClassification

    def forward(model: nn.Module, x: Tensor) -> Any:
        return model(pixel_values=x)

    error: Exception | None = None
    for options in SMALL_CONFIGS:
        config = AutoConfig.for_model(name)
        config.architectures = []  # transformers reads a list where it has two classes (DeiT)
        vision = getattr(config, "vision_config", config)
        for target in {id(config): config, id(vision): vision}.values():
            for key, value in options.items():
                if isinstance(getattr(target, key, None), int):
                    setattr(target, key, value)
        size = getattr(vision, "image_size", SMALL_SIZE)
        height, width = (size, size) if isinstance(size, int) else size
        try:
            model = AutoModelForImageClassification.from_config(config).eval()
            with torch.no_grad():
                forward(model, torch.randn(2, 3, height, width))
        except Exception as problem:  # of widths that do not fit one another
            error = problem
        else:
            return model, (height, width), forward
    raise RuntimeError(f"no configuration runs: {error}")


BUILDERS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Any]]] = {
    "transformers": (transformers_names, build_transformers),
    "timm": (timm_names, build_timm),
    "torchvision": (torchvision_names, build_torchvision),
}

if __name__ == "__main__":
    main()
