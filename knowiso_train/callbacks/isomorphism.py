"""Measurement at intervals during training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor, nn

from knowiso_train.callbacks._curves import plot_curves
from knowiso_train.callbacks.history import Measurement, from_plain, to_plain, to_rows, without_maps
from knowiso_train.distillation.channel_moments import ChannelMoments
from knowiso_train.distillation.loss import IsomorphismLoss
from knowiso_train.errors import FormatError, InputTypeError, KnowisoWarning, MissingDependencyError, OptionError
from knowiso_train.features.calls import forward_override
from knowiso_train.features.layer_options import layers_of_networks, matching_entries
from knowiso_train.features.modules import pair_layers
from knowiso_train.features.state import isolated_eval
from knowiso_train.features.wrappers import runnable_model, unwrap_model
from knowiso_train.measurement.config import MeasureConfig
from knowiso_train.measurement.data import SplitImageLoader
from knowiso_train.measurement.measure import Layers, run_measurement
from knowiso_train.measurement.report import Report
from knowiso_train.utils.batch import INPUT_KEYS
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.serialization import write_json
from knowiso_train.utils.validation import PositiveInt, validate_arguments

# Options of `measure` that the callback has as parameters of its own, or sets itself
RESERVED_OPTIONS = {"order", "target_transform", "device"}
MEASURE_OPTIONS = tuple(field.name for field in fields(MeasureConfig) if field.name not in RESERVED_OPTIONS)


@dataclass(frozen=True)
class _Composed:
    """Composition of two transforms."""

    first: Callable[[Any], Any]
    second: Callable[[Any], Any]

    def __call__(self, images: Any) -> Any:
        return self.second(self.first(images))


@contextmanager
def _measured_inputs(student: nn.Module) -> Iterator[ChannelMoments]:
    """Collect the moments of the images that a network receives within the context."""
    moments = ChannelMoments()

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args[:1], *(kwargs.get(key) for key in INPUT_KEYS)]
        images = next((value for value in values if isinstance(value, Tensor)), None)
        if images is not None:
            moments.add(images)

    handle = student.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield moments
    finally:
        handle.remove()


class MetricLogger(Protocol):
    """Function of metrics and `step=`, such as `accelerator.log`."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> Any:
        """Log metrics at a training step."""


class IsomorphismCallback:
    """Measurement of the shares of the teacher's features that the student explains, every n training steps.

    The measurement has no effect on the training: modes, buffers, gradients, random state and captured tensors of an
    attached `IsomorphismLoss` are restored. Networks run unwrapped, uncompiled and without autocast, so the metrics
    equal those of `measure`. (Networks that accelerate prepared for mixed precision keep it.) In several processes, all
    processes must call the same methods equally often; rank 0 logs and writes.

    Args:
        student: Network in training, possibly wrapped.
        teacher: Reference network.
        loader: Held-out images for the student; read as by `measure`.
        layers: {student layer: teacher layer}, names or globs for both networks, or tuples.
        every: Number of training steps between measurements.
        order: Highest number K of non-linear steps. Orders above 0 train small maps, which takes longer.
        log: Function that receives `{"iso/val/<source>-to-<target>/share": 0.4, …}` and `step=500`. None: no logging.
        path: Folder for the files of `end()`: `report.json` (last report), `history.json` (metrics of all measurements)
            and, if matplotlib is installed, `shares.png` (curves over steps). None: no files.
        transform: Transform of the loader's images for the student, and before `teacher_transform` for the teacher: the
            normalization that the training loop applies itself. Default: none.
        teacher_transform: Transform of the images for the teacher (resolution, normalization).
        teacher_forward: `teacher_forward(teacher, images)`, replaces `teacher(images)`.
        **options: Further options of `measure`, such as `max_images`, `kernel_size`, `directions`, `noise_floor` or
            `layout`. `progress` is False by default.

    Raises:
        OptionError: An unknown option, or an invalid value.
        LayerNameError: Layers that do not exist or cannot be paired.
        InputTypeError: A loader that can be read only once.

    Examples:
        >>> student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
        >>> validation = [torch.randn(100, 3, 6, 6)]
        >>> log = lambda values, step: print(step, sorted(values))
        >>> callback = IsomorphismCallback(student, teacher, validation, {"1": "1"}, every=2, log=log)
        >>> for _ in range(3):
        ...     _ = callback.step()  # after optimizer.step()
        2 ['iso/val/1-to-1/noise_floor', 'iso/val/1-to-1/share']
        >>> report = callback.end()
        3 ['iso/val/1-to-1/noise_floor', 'iso/val/1-to-1/share']
        >>> [measurement.step for measurement in callback.history]
        [2, 3]
        >>> report["1"].explained == callback.history[-1].metrics["iso/val/1-to-1/share"]
        True
    """

    @validate_arguments
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loader: Iterable[Any],
        layers: Layers,
        *,
        every: PositiveInt = 500,
        order: int = 0,
        log: MetricLogger | None = None,
        path: str | Path | None = None,
        transform: Callable[[Any], Any] | None = None,
        teacher_transform: Callable[[Any], Any] | None = None,
        teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
        **options: Any,
    ) -> None:
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise OptionError(f"path must be a folder for report.json, history.json and shares.png; {path} is a file")
        if teacher_forward is not None:
            if options.get("forward") is not None:
                raise OptionError(
                    "pass teacher_forward=, for the teacher alone, or forward=, for both networks, not both"
                )
            options = options | {"forward": forward_override(teacher, teacher_forward)}
        unknown = next((name for name in options if name not in MEASURE_OPTIONS), None)
        if unknown is not None:
            near = get_close_matches(unknown, MEASURE_OPTIONS, n=3)
            hint = f"nearest: {near}" if near else f"there are {list(MEASURE_OPTIONS)}"
            raise OptionError(f"{unknown!r} is no option of measure that can be passed on; {hint}")
        # Fails here, not at the first measurement
        config: dict[str, Any] = {"progress": False} | options
        target_transform = teacher_transform
        if transform is not None:
            if config.get("source_transform") is not None:
                raise OptionError("pass transform=, for both networks, or source_transform=, not both")
            config["source_transform"] = transform
            target_transform = transform if teacher_transform is None else _Composed(transform, teacher_transform)
        self._config = MeasureConfig(order=order, target_transform=target_transform, **config)
        SplitImageLoader(loader, self._config.split, self._config.seed, self._config.max_images)
        self.student, self.teacher, self.loader = student, teacher, loader
        self.pairs = tuple(pair_layers(student, teacher, layers))
        self.every, self.order, self.log, self.path = every, order, log, None if path is None else Path(path)
        self.iso: IsomorphismLoss | None = None
        self._inputs_compared = False
        self.steps = 0
        self.history: list[Measurement] = []

    @classmethod
    def of(cls, iso: IsomorphismLoss, loader: Iterable[Any], **options: Any) -> Self:
        """Create a callback for the networks, layer pairs and options of a loss.

        Args:
            iso: Loss that provides networks, pairs, the smallest kernel size of its maps, transform, teacher's forward,
                layout, `repeated` and `at`.
            loader: Held-out images.
            **options: Options of `IsomorphismCallback`; they take precedence over those of the loss. A student that is
                called with whole batches needs `forward=`.

        Raises:
            InputTypeError: Another object than a loss.
            OptionError: Layers beside those of the loss.

        Examples:
            >>> student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
            >>> iso = IsomorphismLoss(student, teacher, "1")
            >>> callback = IsomorphismCallback.of(iso, [torch.randn(100, 3, 6, 6)], every=100)
            >>> 0 < callback.measure()["1"].explained < 1
            True
        """
        if not isinstance(iso, IsomorphismLoss):
            raise InputTypeError(
                f"IsomorphismCallback.of takes an IsomorphismLoss, got {type(iso).__name__}. Without a loss use "
                "IsomorphismCallback(student, teacher, loader, layers)"
            )
        if "layers" in options:
            raise OptionError("IsomorphismCallback.of measures the layer pairs of the loss. Leave layers= out")
        networks = layers_of_networks(iso.student, iso.teacher, iso.pairs)
        loss_options: dict[str, Any] = {
            "kernel_size": min(iso.kernel_sizes.values()),
            "teacher_transform": iso.config.teacher_transform,
            # The layouts of a loss with layers="auto" may name layers that were not selected
            "layout": matching_entries(iso.config.layout, networks),
            "repeated": iso.config.repeated,
            "at": iso.config.at,
        }
        if options.get("forward") is None:
            loss_options["teacher_forward"] = iso.config.teacher_forward
        layers = [(pair.source, pair.target) for pair in iso.pairs]
        callback = cls(iso.student, iso.teacher, loader, layers, **loss_options | options)
        callback.iso = iso
        return callback

    def step(self) -> Report | None:
        """Count a training step, and measure at every n-th one; call it after each `optimizer.step()`.

        Returns:
            The report, or None if this step was not measured.

        Raises:
            KnowisoError: As `measure`. Networks and hooks are restored also then.
        """
        self.steps += 1
        return self.measure() if self.steps % self.every == 0 else None

    def measure(self) -> Report:
        """Measure at the present step and log the metrics; replace an earlier measurement of this step."""
        student, teacher = runnable_model(self.student), runnable_model(self.teacher)
        layers = [(pair.source, pair.target) for pair in self.pairs]
        with isolated_eval(self.student, self.teacher), _measured_inputs(unwrap_model(student)) as inputs:
            report = run_measurement(student, teacher, self.loader, layers, self._config)
        self._compare_inputs(inputs)
        measurement = Measurement(self.steps, without_maps(report))
        self.history = [earlier for earlier in self.history if earlier.step != self.steps] + [measurement]
        if self.log is not None and ProcessGroup().rank == 0:
            self.log(measurement.metrics, step=self.steps)
        return measurement.report

    @property
    def measured(self) -> bool:
        """True if the present step was measured."""
        return bool(self.history) and self.history[-1].step == self.steps

    def end(self, *, measure: bool = True) -> Report:
        """Measure the last step if it was not measured, write the files to `path`, and return the last report.

        Args:
            measure: False: keep the last measurement, for networks whose weights are not those of the last step.
        """
        if measure and not self.measured:
            self.measure()
        if self.path is not None and ProcessGroup().rank == 0:
            self._write(self.path)
        return self.history[-1].report

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and all measurements as plain values, loadable with `weights_only=True`."""
        return {"steps": self.steps, "history": to_plain(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            FormatError: Other values. The callback was not modified.
        """
        if not isinstance(state, Mapping) or set(state) != {"steps", "history"} or not isinstance(state["steps"], int):
            content: Any = type(state).__name__
            if isinstance(state, Mapping):
                content = {str(key): type(value).__name__ for key, value in state.items()}
            raise FormatError(
                f"expected the state of an IsomorphismCallback, {{'steps': int, 'history': list}}; got {content}. "
                "accelerate restores objects in the order of register_for_checkpointing, which must be that of the "
                "saved run"
            )
        self.history = from_plain(state["history"])
        self.steps = state["steps"]

    def _compare_inputs(self, measured: ChannelMoments) -> None:
        """Warn once if the measured images are normalized otherwise than those of the training."""
        if self.iso is None or self._inputs_compared or not self.iso.input_moments.num_images:
            return
        self._inputs_compared = True
        if measured.differ(self.iso.input_moments) and ProcessGroup().rank == 0:
            warnings.warn(
                f"the measured images have {measured}, those that the student is trained on {self.iso.input_moments}, "
                "so the measured shares are of other inputs. Pass transform=, the normalization of the training loop",
                KnowisoWarning,
                stacklevel=3,
            )

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.history[-1].report.to_json(folder / "report.json")
        write_json(folder / "history.json", to_rows(self.history))
        try:
            plot_curves(self.history, folder / "shares.png")
        except MissingDependencyError as error:
            warnings.warn(f"{folder}: shares.png is not written: {error}", KnowisoWarning, stacklevel=3)
