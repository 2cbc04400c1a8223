"""Measurement at intervals during training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor, nn

from knowiso_train.callbacks.curves import plot_curves
from knowiso_train.callbacks.history import Measurement, from_plain, to_plain, to_rows, without_maps
from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.distillation.loss import IsomorphismLoss
from knowiso_train.errors import FormatError, KnowisoWarning, MissingDependencyError, OptionError
from knowiso_train.features.modules import forward_override, pair_layers, unwrap_model
from knowiso_train.features.state import isolated_eval, preserve_state
from knowiso_train.measurement.data import SplitImageLoader
from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import Report
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.serialization import write_json

# Of measure's parameters, not passed through
_OWN = {"source", "target", "loader", "layers", "order", "target_transform", "device"}
OPTIONS = tuple(name for name in inspect.signature(measure).parameters if name not in _OWN)


class Log(Protocol):
    """What takes the figures: `accelerator.log`, or any function of values and `step=`."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> Any: ...


class IsomorphismCallback:
    """Measures every n training steps, on held-out images, how much of the teacher's features the student's explain.

    The training goes on as if nothing had happened: modes, buffers, gradients, random state and what an attached
    `IsomorphismLoss` has captured are
    as before. Networks are run bare, uncompiled and outside autocast, so a figure does not depend on where `step()` is
    called, and equals what
    `measure` gives (networks that accelerate prepared for mixed precision keep it). In several processes every process
    calls the same methods
    equally often; the first one logs and writes.

    Args:
        student: the network that is trained; bare or wrapped.
        teacher: the network that is asked.
        loader: held-out images as the student takes them; read as `measure` reads, and dealt to the processes.
        layers: as for `measure`: {student layer: teacher layer}, names or globs, or tuples.
        every: training steps between measurements.
        order: K, the highest number of non-linear steps; orders above 0 train small maps, which takes longer.
        log: called with flat figures, `log({"iso/val/<source>→<target>/share": 0.4, …}, step=500)`; `accelerator.log`
            fits.
        path: folder for `end()` to write to: `report.json` (the last report), `history.json` (figures of every
            measurement) and, where matplotlib
            is installed, `shares.png` (curves over steps).
        teacher_transform: applied to the images before the teacher, where resolution or normalization differ.
        teacher_forward: `teacher_forward(teacher, images)` in place of `teacher(images)`.
        **options: of `measure`: `max_images`, `kernel_size`, `directions`, `noise_floor`, `layout`, … No progress is
            shown unless `progress=True`.

    Raises:
        OptionError: an option without meaning.
        LayerNameError: layers that do not exist or cannot be paired.
        InputTypeError: a loader that can be read only once.

    Example:
        >>> student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
        >>> held_out = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(100, 3, 6, 6)), batch_size=25)
        >>> callback = IsomorphismCallback(student, teacher, held_out, {"1": "1"}, every=2, log=lambda values, step: print(step, sorted(values)))
        >>> for _ in range(3):
        ...     _ = callback.step()  # after optimizer.step()
        2 ['iso/val/1→1/noise_floor', 'iso/val/1→1/share']
        >>> report = callback.end()
        3 ['iso/val/1→1/noise_floor', 'iso/val/1→1/share']
        >>> [measured.step for measured in callback.history], report["1"].explained == callback.history[-1].figures["iso/val/1→1/share"]
        ([2, 3], True)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loader: Iterable[Any],
        layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str],
        *,
        every: int = 500,
        order: int = 0,
        log: Log | None = None,
        path: str | Path | None = None,
        teacher_transform: Callable[[Any], Any] | None = None,
        teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"every must be a positive number of training steps, got {every!r}")
        if log is not None and not callable(log):
            raise OptionError(
                f"log must be callable as log(values, step=step), such as accelerator.log; got {type(log).__name__}"
            )
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise OptionError(f"path must be a folder for report.json, history.json and shares.png; {path} is a file")
        if teacher_forward is not None:
            if options.get("forward") is not None:
                raise OptionError(
                    "pass teacher_forward=, for the teacher alone, or forward=, for both networks, not both"
                )
            options = options | {"forward": forward_override(teacher, teacher_forward)}
        _check_options(loader, order, options)
        self.student, self.teacher, self.loader = student, teacher, loader
        self.pairs = tuple(pair_layers(student, teacher, layers))
        self.every, self.order, self.log, self.path = every, order, log, None if path is None else Path(path)
        self.steps = 0
        self.history: list[Measurement] = []
        self._options: dict[str, Any] = {"progress": False} | options | {"target_transform": teacher_transform}

    @classmethod
    def of(cls, iso: IsomorphismLoss, loader: Iterable[Any], **options: Any) -> Self:
        """The callback that watches what a loss teaches: its networks, pairs, kernel size, transform, teacher's forward, layout and `repeated`.

        Args:
            iso: the loss.
            loader: held-out images.
            **options: of `IsomorphismCallback`; they take precedence.

        Example:
            >>> student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
            >>> callback = IsomorphismCallback.of(IsomorphismLoss(student, teacher, "1"), [torch.randn(100, 3, 6, 6)], every=100)
            >>> 0 < callback.measure()["1"].explained < 1
            True
        """
        given: dict[str, Any] = {
            "kernel_size": iso.kernel_size, "teacher_transform": iso.teacher_transform, "layout": iso.layout, "repeated": iso.repeated,
        }  # fmt: skip
        if options.get("forward") is None:
            given["teacher_forward"] = iso.teacher_forward
        return cls(
            iso.student, iso.teacher, loader, [(pair.source, pair.target) for pair in iso.pairs], **given | options
        )

    def step(self) -> Report | None:
        """Count a training step; every n-th one is measured and logged. Call it once per step, after `optimizer.step()`.

        Returns:
            The report where this step was measured.

        Raises:
            KnowisoError: as `measure`; networks and hooks are as before, also then.
        """
        self.steps += 1
        return self.measure() if self.steps % self.every == 0 else None

    def measure(self) -> Report:
        """Measure now, whatever the step: before the first one, for the curve's beginning. A second measurement of a step replaces the first."""
        with isolated_eval(self.student, self.teacher):
            layers = [(pair.source, pair.target) for pair in self.pairs]
            report = measure(
                unwrap_model(self.student),
                unwrap_model(self.teacher),
                self.loader,
                layers,
                order=self.order,
                **self._options,
            )
        measured = Measurement(self.steps, without_maps(report))
        self.history = [earlier for earlier in self.history if earlier.step != self.steps] + [measured]
        if self.log is not None and ProcessGroup().rank == 0:
            self.log(measured.figures, step=self.steps)
        return measured.report

    def end(self) -> Report:
        """The last report; measured now, unless the last step was. Reports and curves are written where there is a `path`."""
        if not self.history or self.history[-1].step != self.steps:
            self.measure()
        if self.path is not None and ProcessGroup().rank == 0:
            self._write(self.path)
        return self.history[-1].report

    def state_dict(self) -> dict[str, Any]:
        """Number of steps, and everything measured, as plain values: for `accelerator.register_for_checkpointing`, loads with `weights_only=True`."""
        return {"steps": self.steps, "history": to_plain(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            FormatError: other values; then nothing has changed.
        """
        if not isinstance(state, Mapping) or set(state) != {"steps", "history"} or not isinstance(state["steps"], int):
            got = (
                {str(key): type(value).__name__ for key, value in state.items()}
                if isinstance(state, Mapping)
                else type(state).__name__
            )
            raise FormatError(
                f"expected the state of an IsomorphismCallback, {{'steps': int, 'history': list}}; got {got}"
            )
        self.steps, self.history = state["steps"], from_plain(state["history"])

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.history[-1].report.to_json(folder / "report.json")
        write_json(folder / "history.json", to_rows(self.history))
        try:
            plot_curves(self.history, folder / "shares.png")
        except MissingDependencyError as error:
            warnings.warn(f"{folder}: shares.png is not written: {error}", KnowisoWarning, stacklevel=3)


def _check_options(loader: Iterable[Any], order: int, options: Mapping[str, Any]) -> None:
    """Now, and not after the first 500 steps."""
    for name in options:
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, n=3)
            raise OptionError(
                f"{name!r} is no option of measure that can be passed on; {f'nearest: {near}' if near else f'there are {list(OPTIONS)}'}"
            )
    DisentangleConfig(
        order=order, **{field.name: options[field.name] for field in fields(DisentangleConfig) if field.name in options}
    )
    with preserve_state():  # a sampler may draw
        SplitImageLoader(loader, **{name: options[name] for name in ("split", "seed", "max_images") if name in options})
