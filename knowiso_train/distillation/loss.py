"""Distillation loss on the unexplained share of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation._balancing import make_balance
from knowiso_train.distillation._collapse import CollapseGuard
from knowiso_train.distillation._diagnostics import InactivityDetector
from knowiso_train.distillation._feature_map import check_finite
from knowiso_train.distillation._frozen_networks import FrozenModel, freeze_peers
from knowiso_train.distillation._learned_map import is_trained
from knowiso_train.distillation._maps import make_map
from knowiso_train.distillation._outputs import connect_outputs
from knowiso_train.distillation._pairs import check_grids, map_inputs, pair_key, pair_label
from knowiso_train.distillation._scale import gradient_norm, joint_shares, log_share, log_term
from knowiso_train.distillation._schedule import FactorSchedule
from knowiso_train.distillation._shape_inference import Example, infer_shapes
from knowiso_train.distillation._state import check_state
from knowiso_train.distillation._student import StudentBatch, StudentCapture
from knowiso_train.distillation.channel_moments import ChannelMoments
from knowiso_train.distillation.config import (
    IsomorphismLossConfig,
    Repeated,
    Scale,
    Schedule,
    Solver,
    Target,
    Transform,
    Weight,
)
from knowiso_train.distillation.layer_selection import selected_pairs
from knowiso_train.errors import CaptureError, OptionError
from knowiso_train.features.hooks import FeatureTaps, Side
from knowiso_train.features.layer_options import check_named_layers, sides_of_networks
from knowiso_train.features.modules import LayerPair
from knowiso_train.utils.distributed import ProcessGroup, all_reduce_gradients


class IsomorphismLoss(nn.Module):
    """Logarithm of the unexplained share of the teacher's features given the student's, summed over layer pairs.

    The loss is `Σ_pairs w · log(u + 1e-3)` with `u = ‖x_T - g(x_S)‖² / Var(x_T)`. x_S and x_T are the features
    (N, C, H, W) of a layer pair on the teacher's grid, and g is a map of order K between them. The share u is 1 where
    nothing is explained and 0 where everything is, whatever the widths and scales. Reference: arXiv 1908.01581.

    The loss is about 0 where nothing is explained and negative below, down to `-6.9 w` per pair: the logarithm of a
    share. Only its gradient matters, which is that of u divided by u. A fixed weight therefore keeps its effect for
    every variance of the teacher and during the whole training.

    Student and teacher are not registered: `parameters()` and `state_dict()` hold only the maps, and the saved student
    is the plain student. Attach the loss before the first call of a compiled student. `input_moments` has mean and
    standard deviation of the student's images in training.

    Args:
        student: Network in training; bare, or wrapped by DDP, FSDP, `torch.compile` or accelerate.
        teacher: Frozen reference network; runs in eval mode without gradient, and its mode is restored afterwards.
        layers: {student layer: teacher layer}, names or globs for both networks, or (student, teacher) tuples. "auto":
            measure on `loader` and take the pairs with the largest unexplained shares.
        solver: "closed_form": g is the ridge regression of running moments without the current batch, and has no
            parameters. "learned": g is the paper's network and trains with the student; pass `parameters()` to the
            optimizer.
        target: "teacher": x_T is the teacher's feature. "consensus": x_T is the part of it that `peers` reproduce, with
            `solver="closed_form"` only.
        order: Number K of non-linear steps of the learned g. Default: 0, linear.
        kernel_size: Odd kernel size of g, in positions. "auto" (default): 3 for closed-form maps to the teacher if the
            student's layer has a grid and at most 64 channels, otherwise 1. Students are better with 3.
        scale: "log": the loss of a pair is `log(u + 1e-3)`, and 0 until the map is solved. The gradient at the student
            falls to 0 as the explained share falls from 0.05 to 0. A learned g trains on `u + λ Σ p_k²`, independently
            of weight and schedule, with the factor 3 / u where u > 3. "linear": the loss is u, plus the penalty of a
            learned g. The gradient of u vanishes as u does.
        weight: Factor w of every pair, or {student layer: factor}. "auto" (default): the gradient at the student's
            feature has `ratio` times the norm of that of the other losses in the same backward pass, before the factor
            of `schedule`. Weights are at most 200, and 1 before the first measurement. In a compiled student, and for
            pairs without another loss, w is `100 · ratio`, with a warning. "balanced": a compiled student raises an
            error; a pair without another loss keeps its weight, with a warning. A factor in front of the loss does not
            change balanced gradients.
        ratio: Gradient ratio of balanced weights, positive. Default: 1.
        schedule: Factor of all weights. "learning_rate" (default): 1 while the learning rate of the student's optimizer
            is above half of its maximum, then down to 0.02 with it. A function from call to factor, such as
            `WeightSchedule(warmup=500)`; calls count from the first with a solved map. None: constant 1.
        teacher_transform: Transform of the student's images for the teacher, such as another resolution or
            normalization. Default: none.
        teacher_forward: Function `teacher_forward(teacher, images)` in place of `teacher(images)`. By default the
            teacher receives all arguments of the student's call except labels.
        example: Batch of student images (N, ...) for the forward that infers shapes; a tuple of positional arguments
            or a mapping of keyword arguments of a student that takes more. Default: images of guessed sizes.
        peers: Networks of `target="consensus"`, trained on the same kind of images as the teacher.
        peer_layers: {teacher layer: peer layer}, one for all peers or one for each. Default: the teacher's names.
        peer_transforms: As `teacher_transform`, one for all peers or one for each.
        ridge: Ridge of the closed form, as a fraction of the mean variance of x_S. "auto" (default): 0.3 at first, 0.1
            after 1,000 calls and 0.01 after 14,500. A large ridge favors features whose large directions explain the
            teacher's; near 0 the share is that of `measure`.
        refresh: Calls between solves of the maps, which all processes share. Default: 10. With `scale="log"` each call
            in training also averages the shares over the processes.
        window: Time constant of the moments, in calls. Default: 40 effective samples per regressor, at least 20 calls.
        penalty: Factor λ of the learned map's `λ Σ p_k²`. Default: 0.1, as published.
        layout: Layout of layers for which it cannot be inferred: "nchw", "nhwc", "nlc", "ncl" or "nc", or one by layer.
            For tokens it can state prefix tokens, grid and suffix tokens, such as "nlc:1+14x14+100" or "nlc:line".
        repeated: Capture to use of layers that fire more than once in a forward: "first", "last", or "error" (default).
        at: Side of the layers: "output", "input" (the feature before an activation), or a mapping from student or
            teacher layer to side. Peers use the sides of the teacher's layers. Default: "output".
        loader: Batches of student images for `layers="auto"`.

    Raises:
        OptionError: An option out of bounds, or options that exclude each other.
        LayerNameError: Layers that do not exist or cannot be paired.
        InputTypeError: Networks that are not modules.

    Examples:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> iso = IsomorphismLoss(student, teacher, {"1": "1"})
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        >>> with iso:
        ...     for _ in range(6):
        ...         loss = student(torch.randn(8, 3, 6, 6)).square().mean() + iso()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> 0 < iso.log()["iso/train/1/share"] < 1
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str],
        *,
        solver: Solver = "closed_form",
        target: Target = "teacher",
        order: int = 0,
        kernel_size: int | Literal["auto"] = "auto",
        scale: Scale = "log",
        weight: Weight = "auto",
        ratio: float = 1.0,
        schedule: Schedule = "learning_rate",
        teacher_transform: Transform | None = None,
        teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
        example: Example | None = None,
        peers: Sequence[nn.Module] = (),
        peer_layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        peer_transforms: Transform | Sequence[Transform | None] | None = None,
        ridge: float | Literal["auto"] = "auto",
        refresh: int = 10,
        window: float | None = None,
        penalty: float = 0.1,
        layout: str | Mapping[str, str] | None = None,
        repeated: Repeated = "error",
        at: Side | Mapping[str, Side] = "output",
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = IsomorphismLossConfig(
            solver=solver, target=target, order=order, kernel_size=kernel_size, scale=scale, weight=weight,
            ratio=ratio, schedule=schedule, teacher_transform=teacher_transform, teacher_forward=teacher_forward,
            peer_layers=peer_layers, peer_transforms=peer_transforms, ridge=ridge, refresh=refresh, window=window,
            penalty=penalty, layout=layout, repeated=repeated, at=at,
        )  # fmt: skip
        self.config.check_networks(student, teacher, peers)
        self.pairs = selected_pairs(student, teacher, layers, loader, self.config)
        teacher_layers = list(dict.fromkeys(pair.target for pair in self.pairs))
        self.teacher_output: Any = None
        # Plain objects in place of submodules: student, teacher and peers are not registered
        sources = [pair.source for pair in self.pairs]
        student_sides, teacher_sides = sides_of_networks(at, ((student, sources), (teacher, teacher_layers)))
        self._student = StudentCapture(student, self.pairs, layout, repeated, student_sides)
        self._teacher = FrozenModel(
            teacher, teacher_layers, "teacher", teacher_transform, teacher_forward, layout, repeated, teacher_sides
        )
        self._peers = freeze_peers(peers, teacher_layers, self.config, teacher_sides)
        if layers != "auto":  # the others were checked against all candidates
            readers = [self._student.reader, self._teacher.reader, *(peer.network.reader for peer in self._peers)]
            check_named_layers("layout", layout, [(reader.model, reader.names) for reader in readers])
        infer_shapes(self._student, [self._teacher, *(peer.network for peer in self._peers)], example)

        self.maps = nn.ModuleDict({pair_key(pair): self._make_map(pair) for pair in self.pairs})
        self._fixed_weights = self.config.pair_weights(self.pairs)
        self.balance = make_balance(self.config, len(self.pairs))
        self._handles: list[RemovableHandle] = []
        self._calls = 0
        self._log: dict[LayerPair, dict[str, Tensor]] = {}
        self.input_moments = ChannelMoments()
        self._collapse, self._inactivity = CollapseGuard(self.pairs), InactivityDetector()
        self._schedule = FactorSchedule(self.config.schedule, student)

    @property
    def student(self) -> nn.Module:
        """Network in training."""
        return self._student.model

    @property
    def teacher(self) -> nn.Module:
        """Frozen reference network."""
        return self._teacher.model

    @property
    def peers(self) -> tuple[nn.Module, ...]:
        """Frozen peers of `target="consensus"`."""
        return tuple(peer.network.model for peer in self._peers)

    @property
    def kernel_sizes(self) -> dict[LayerPair, int]:
        """Kernel size of the map of every pair."""
        return {pair: self._map_of(pair).kernel_size for pair in self.pairs}

    @property
    def attached(self) -> bool:
        """True while the hooks are registered."""
        return self._student.taps.attached

    def attach(self) -> Self:
        """Register the hooks; needed only outside a `with` block.

        In several processes the parameters of the maps are set to those of the first.

        Raises:
            CaptureError: Hooks that are registered already.
        """
        if self.attached:
            raise CaptureError(
                "this IsomorphismLoss is attached already; use one `with iso:` at a time, or detach() first"
            )
        try:
            for taps in self._all_taps():
                taps.attach()
            self._handles += self._student.attach_calls()
            self._handles += all_reduce_gradients(list(self.parameters()), ProcessGroup())
            self._handles += self._schedule.attach()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Remove every hook and drop every capture, but keep `teacher_output`. Safe to call twice."""
        for taps in self._all_taps():
            taps.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear_captures()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a detached copy, as the copied networks have no hooks; moments and counts are kept."""
        return vars(self) | {"_handles": [], "_log": {}, "teacher_output": None}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    # Counts calls and keeps state, so a compiled training step has a graph break here
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        *,
        teacher_output: Any = None,
        teacher_features: Mapping[str, Tensor] | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the student's last batch, then add the batch to the moments.

        In several processes every process calls this equally often. Without gradient, or in eval mode of this module,
        the maps are not updated. A warning names pairs whose loss has no effect.

        Args:
            teacher_output: Output of `teacher(x)` in this step, inside the context; the teacher is not run again.
            teacher_features: Cached outputs of the teacher's layers for these images, by layer name; the teacher is not
                run.
            images: Images of the student, after a call of a part of it such as `student.forward_features(images)`.
                Default: those of its last forward.

        Returns:
            A scalar, float32 or better, differentiable with respect to the student and to `parameters()`.

        Raises:
            CaptureError: A call outside `with iso:`, no student forward since the last call or one without gradient, or
                a layer that did not fire.
            NonFiniteError: NaN or Inf; the message names layer and step. On a GPU it is raised at the next refresh.
        """
        if not self.attached:
            raise CaptureError(
                "the hooks are not registered: use `with iso:` around the loop (or iso.attach()), and call student(x) "
                "and iso() inside"
            )
        self.teacher_output = None
        try:
            batch = self._student.take(images)
            targets = self._teacher_features(batch, teacher_output, teacher_features)
            return self._total(
                batch, targets, [peer.features(batch.input, batch.autocast_dtype) for peer in self._peers]
            )
        finally:
            self._clear_captures()

    def log(self) -> dict[str, float]:
        """Return figures of the last call as `iso/train/<pair>/<figure>`, for trackers.

        They are of the training batch; `IsomorphismCallback` measures held-out images, named `iso/val/…`. `ready` is 1
        where the map is solved; before, `loss` and `share` are NaN. `loss` is `log(u + 1e-3)` in log scale, and u in
        linear scale, without the weight. `share` is `1 - u`. `grad_norm` is the norm of the weighted loss's gradient at
        the student's feature, after backward, with the factor of a GradScaler. Figures are of this process; in log
        scale the losses and shares of a training step are those of all processes.
        """
        figures = {
            f"iso/train/{pair_label(pair, self.pairs)}/{name}": value
            for pair, values in self._log.items()
            for name, value in values.items()
        }
        values = [value.detach().float().cpu() for value in figures.values()]
        return dict(zip(figures, torch.stack(values).tolist(), strict=True)) if values else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore the state of `state_dict`, with which a training resumes.

        Raises:
            FormatError: The state of another object or of a loss with other options. The loss was not modified.
        """
        # Versions before the detection of collapses saved at most the figures of the schedule
        check_state(self, state_dict, strict, num_old_figures=1 + len(self._schedule.state()))
        return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor:
        """Return the number of calls, the state of the schedule, and that of features that collapse.

        In several processes the state of any one can be loaded into all: moments are in equal parts after a solve, and
        later batches of the others are replaced by those of this one.
        """
        figures = [self._calls, *self._schedule.state(), *self._collapse.state()]
        return torch.tensor(figures, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`; figures that an older version does not have are kept."""
        calls, *figures = [*state.tolist(), *self.get_extra_state().tolist()[len(state) :]]
        self._calls, size = int(calls), len(self._schedule.state())
        self._schedule.set_state(*figures[:size])
        self._collapse.set_state(figures[size:])
        for pair in self.pairs:
            self._map_of(pair).calls = self._calls

    def extra_repr(self) -> str:
        """Return solver, target, order and pairs."""
        layers = ", ".join(f"{pair.source!r}: {pair.target!r}" for pair in self.pairs)
        options = ", ".join(f"{name}={getattr(self.config, name)!r}" for name in ("solver", "target", "order", "scale"))
        return f"{options}, layers={{{layers}}}"

    def _teacher_features(
        self, batch: StudentBatch, output: Any, features: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return the teacher's features by layer: from the cache, from the caller's forward, or from a forward here."""
        if output is not None and features is not None:
            raise OptionError("pass teacher_output= or teacher_features=, not both")
        if features is not None:
            return self._teacher.from_cache(features, batch.input.images)
        if output is not None:
            self.teacher_output = output
            return self._teacher.collect_called(batch.input.images)
        targets, self.teacher_output = self._teacher.features(batch.input, batch.autocast_dtype)
        return targets

    def _total(self, batch: StudentBatch, targets: dict[str, Tensor], peers: list[dict[str, Tensor]]) -> Tensor:
        """Return the weighted sum of the pairs' losses, and count the call."""
        update = self.training and torch.is_grad_enabled()
        refresh_due = self._calls % self.config.refresh == 0
        if update and refresh_due:
            self.input_moments.add(batch.input.images)
            if self.balance is not None:
                self.balance.refresh()
        sources: list[Tensor] = []
        losses: list[Tensor] = []
        for index, pair in enumerate(self.pairs):
            map_, feature, target = self._map_of(pair), batch.features[index], targets[pair.target]
            check_grids(pair, feature, target, self._student.reader, self._teacher.reader)
            others = [target, *(peer[pair.target] for peer in peers)]
            inputs = map_inputs(batch, pair, feature, others, map_.kernel_size)
            map_loss = self._map_loss(pair, inputs, update)
            sources.append(inputs[0])
            losses.append(map_loss)
            # Reading the loss in every step would stall a GPU; the moments leave a batch with NaN out in any case
            if refresh_due or map_loss.device.type == "cpu":
                check_finite(pair, map_loss, feature, target, self._calls)
            if update and refresh_due and self.config.solver == "learned":
                self._inactivity.check_learned_map(pair, float(self._unexplained(pair, map_loss).detach()), self._calls)
            if torch.is_grad_enabled():
                self._inactivity.check(
                    pair,
                    training=self.training,
                    solved=map_.ready,
                    has_gradient=feature.requires_grad,
                    calls=self._calls,
                )
        if update and refresh_due:
            weights = self._fixed_weights if self.balance is None else self.balance.weights
            self._collapse.refresh(batch.features, [targets[pair.target] for pair in self.pairs], weights)
        shares = [self._unexplained(pair, loss) for pair, loss in zip(self.pairs, losses, strict=True)]
        if update and self.config.scale == "log":
            shares = joint_shares(shares, ProcessGroup())
        self._log, terms, factor = {}, [], self._schedule.factor()
        for index in range(len(self.pairs)):
            weight, branch = self._weight(index, losses[index], factor), batch.branches[index] if update else None
            terms.append(self._term(index, sources[index], losses[index], shares[index], weight, branch))
        if update:
            self._calls += 1
            if any(self._map_of(pair).ready for pair in self.pairs):
                self._schedule.count_call()
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return connect_outputs(total, batch.outputs)

    def _map_loss(self, pair: LayerPair, inputs: list[Tensor], update: bool) -> Tensor:
        """Return the loss of the pair's map: the unexplained share, plus the penalty of a learned map."""
        map_, device = self._map_of(pair), inputs[0].device
        if next(map_.buffers()).device != device:
            map_.to(device)
        with torch.autocast(device.type, enabled=False):
            loss: Tensor = map_(*inputs, update=update)
        return loss

    def _unexplained(self, pair: LayerPair, map_loss: Tensor) -> Tensor:
        """Return the unexplained share of a pair: its loss, without the penalty and the gradient of a learned map."""
        map_ = self._map_of(pair)
        return map_loss.detach() - map_.gate_penalty().to(map_loss) if is_trained(map_) else map_loss

    def _term(
        self, index: int, source: Tensor, map_loss: Tensor, unexplained: Tensor, weight: Tensor, branch: Tensor | None
    ) -> Tensor:
        """Return the weighted loss of one pair in the scale of the options, and keep its figures for `log`."""
        pair = self.pairs[index]
        map_ = self._map_of(pair)
        if self.config.scale == "log":
            loss = log_share(unexplained)
            term, factor = log_term(map_loss, unexplained, weight, source, is_trained(map_))
        else:
            loss, term, factor = map_loss, weight * map_loss, torch.ones_like(weight)
        missing = torch.full_like(unexplained.detach(), 0.0 if map_.ready else math.nan)
        self._log[pair] = {
            "ready": torch.full_like(missing, float(map_.ready)),
            "loss": loss.detach() + missing,
            "share": 1 - unexplained.detach() + missing,
            "weight": weight.detach(),
        }
        if branch is not None and branch.requires_grad:
            self._record_gradient(index, pair, branch, weight.detach() * factor)
        return term

    def _weight(self, index: int, like: Tensor, factor: float) -> Tensor:
        factor *= self._collapse.factor(index)
        if self.balance is None:
            return like.new_full((), self._fixed_weights[index] * factor)
        return self.balance.weights[index].to(like.device, like.dtype) * factor

    def _record_gradient(self, index: int, pair: LayerPair, branch: Tensor, factor: Tensor) -> None:
        """Measure the gradient at the branch of a pair in the coming backward pass, for `log` and the balancing.

        Args:
            index: Index of the pair.
            pair: Layer pair.
            branch: View of the captured feature that only this pair's loss uses.
            factor: Factor of the gradient of the pair's loss, which balanced weights do not compensate.
        """
        figures = self._log[pair]

        def record_norm(gradient: Tensor) -> None:
            figures["grad_norm"] = gradient_norm(gradient)

        branch.register_hook(record_norm)  # type: ignore[no-untyped-call]
        if self.balance is not None and self._map_of(pair).ready:
            if self.balance.weights.device != branch.device:
                self.balance.to(branch.device)
            self.balance.watch(index, branch, factor, pair.source)

    def _make_map(self, pair: LayerPair) -> nn.Module:
        channels = self._student.reader.channels[pair.source], self._teacher.reader.channels[pair.target]
        grids = self._student.reader.grids.get(pair.source), self._teacher.reader.grids.get(pair.target)
        peer_channels = sum(peer.num_channels(pair.target) for peer in self._peers)
        kernel_size = self.config.kernel_size_of(channels[0], grids)
        return make_map(self.config, pair, channels, kernel_size, peer_channels)

    def _map_of(self, pair: LayerPair) -> Any:
        return self.maps[pair_key(pair)]

    def _all_taps(self) -> list[FeatureTaps[Tensor]]:
        return [self._student.taps, self._teacher.taps, *(peer.network.taps for peer in self._peers)]

    def _clear_captures(self) -> None:
        self._student.clear()
        for taps in self._all_taps():
            taps.clear()
