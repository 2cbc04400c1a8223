"""Distillation loss on the unexplained share of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation.balancing import GradientBalance
from knowiso_train.distillation.config import (
    Solver,
    Target,
    check_finite,
    check_grids,
    check_options,
    fixed_weights,
    freeze_peers,
    pair_key,
    pair_label,
)
from knowiso_train.distillation.estimators import ClosedFormMap, ConsensusMap, LearnedMap
from knowiso_train.distillation.frozen_model import FrozenModel, InputCapture, StudentInput, Transform, autocast_dtype
from knowiso_train.distillation.layer_selection import suggest_layers
from knowiso_train.distillation.shape_inference import infer_shapes
from knowiso_train.errors import CaptureError, OptionError
from knowiso_train.features.extractor import FeatureReader, align
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.features.modules import LayerPair, pair_layers, unwrap_model
from knowiso_train.utils.batch import image_size
from knowiso_train.utils.distributed import ProcessGroup, all_reduce_gradients


class IsomorphismLoss(nn.Module):
    """How much of the teacher's inner features the student's do not explain, as a loss: `Σ_pairs w · ‖x_T - g(x_S)‖² / Var(x_T)`.

    Each pair's loss is the unexplained share: 1 where nothing is explained, 0 where everything is. Student and teacher
    are not registered here:
    `parameters()` and `state_dict()` hold only what is this loss's own, and what is saved of the student is the plain
    student. Attach before the
    first call of a compiled student.

    Args:
        student: the network that is trained; bare, or wrapped by DDP, `torch.compile`, accelerate.
        teacher: the network that is asked. It is run in eval mode and without gradient, and its mode is as before
            afterwards.
        layers: {student layer: teacher layer}, names or globs for both, (student, teacher) tuples; or "auto", which
            measures on `loader` what the
            student already explains, prints it, and takes the pairs that are left to teach.
        solver: "closed_form", g is the order-0 closed form of running moments without the current batch: no
            parameters, no optimizer;
            "learned", g is the paper's network of orders 0…K and trains with the student (arXiv 1908.01581); give
            `parameters()` to the optimizer.
        target: "teacher", the teacher's features; "consensus", the part of them that `peers` reproduce.
        order: K of the learned solver; the closed form is of order 0.
        kernel_size: neighborhood of g.
        weight: of every pair; by student layer; or "balanced": the gradient at the student's feature is `ratio` times
            that of the rest of the loss,
            measured in the same backward pass (not with a compiled student).
        ratio: for "balanced".
        schedule: factor by call, such as `WeightSchedule(warmup=500, total=10_000)`; calls count from the moment that
            the loss is on.
        teacher_transform: applied to the student's images before the teacher, where resolution or normalization differ.
        teacher_forward: `teacher_forward(teacher, images)` in place of `teacher(images)`.
        example: a batch of images for the probe that finds the sizes, where it cannot be guessed.
        peers: networks for `target="consensus"`, trained on the same kind of images as the teacher.
        peer_layers: {teacher layer: peer layer}, one for all peers or one for each; None takes the teacher's names.
        peer_transforms: as `teacher_transform`, one for all or one for each.
        ridge: relative ridge of the closed forms.
        refresh: calls between solves of the closed forms, and between collective steps in several processes.
        window: calls that the moments remember; None takes 20, or what 40 effective rows per regressor need.
        penalty: λ of the learned form's `λ Σ p_k²`.
        layout: of layers whose layout cannot be inferred; "nchw", "nhwc", "nlc", "ncl", "nc", or by layer name.
        repeated: "error", "first" or "last", for layers that fire more than once in one forward.
        loader: images for `layers="auto"`, in the form that the student takes.

    Raises:
        OptionError: an option without meaning, or one that belongs to another form.
        LayerNameError: layers that do not exist or cannot be paired.
        InputTypeError: not modules.

    Example:
        >>> student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> iso = IsomorphismLoss(student, teacher, {"1": "1"})
        >>> optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.1)
        >>> with iso:
        ...     for _ in range(3):
        ...         loss = student(torch.randn(8, 3, 6, 6)).square().mean() + iso()
        ...         loss.backward()
        >>> 0 < iso.log()["iso/1/loss"] < 2
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
        kernel_size: int = 1,
        weight: float | Mapping[str, float] | str = 1.0,
        ratio: float = 1.0,
        schedule: Callable[[int], float] | None = None,
        teacher_transform: Transform | None = None,
        teacher_forward: Callable[[nn.Module, Tensor], Any] | None = None,
        example: Tensor | None = None,
        peers: Sequence[nn.Module] = (),
        peer_layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        peer_transforms: Transform | Sequence[Transform | None] | None = None,
        ridge: float = 1e-3,
        refresh: int = 10,
        window: float | None = None,
        penalty: float = 0.1,
        layout: str | Mapping[str, str] | None = None,
        repeated: str = "error",
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        check_options(
            student,
            teacher,
            solver,
            target,
            order,
            kernel_size,
            refresh,
            ridge,
            window,
            ratio,
            peers,
            repeated,
            schedule,
        )
        if layers == "auto":
            if loader is None:
                raise OptionError(
                    'layers="auto" measures what the student explains already: pass loader=, images as the student takes them'
                )
            layers = suggest_layers(
                student,
                teacher,
                loader,
                teacher_transform=teacher_transform,
                teacher_forward=teacher_forward,
                layout=layout,
                repeated=repeated,
            ).layers
        self.pairs: tuple[LayerPair, ...] = tuple(pair_layers(student, teacher, layers))
        self.solver, self.target = solver, target
        self.order, self.kernel_size, self.refresh_every = order, kernel_size, refresh
        self.schedule = schedule
        self.teacher_output: Any = None
        self._networks = (student, teacher, teacher_transform)  # in a tuple: not registered
        of_student, of_teacher = (
            list(dict.fromkeys(getattr(pair, side) for pair in self.pairs)) for side in ("source", "target")
        )
        self._input = InputCapture()
        self._taps: FeatureTaps[Tensor] = FeatureTaps(student, of_student, repeated=repeated)  # type: ignore[call-overload]
        self._reader = FeatureReader(student, of_student, "student", layout)
        self._teacher = FrozenModel(
            teacher, of_teacher, "teacher", teacher_transform, teacher_forward, layout, repeated
        )
        self._peers = freeze_peers(peers, of_teacher, peer_layers, peer_transforms, layout, repeated)
        infer_shapes(
            student, self._taps, self._reader, [self._teacher, *(network for network, _ in self._peers)], example
        )

        closed: dict[str, Any] = {"ridge": ridge, "refresh": refresh, "window": window}
        self.maps = nn.ModuleDict({pair_key(pair): self._map(pair, closed, penalty) for pair in self.pairs})
        self.balance = GradientBalance(len(self.pairs), ratio) if weight == "balanced" else None
        self._fixed = [] if self.balance is not None else fixed_weights(weight, self.pairs)
        self._handles: list[RemovableHandle] = []
        self._calls, self._calls_on = 0, 0
        self._last: dict[LayerPair, dict[str, Tensor]] = {}

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self._networks[0]

    @property
    def teacher(self) -> nn.Module:
        """The network that is asked."""
        return self._networks[1]

    @property
    def teacher_transform(self) -> Transform | None:
        """What brings the student's images to the teacher."""
        return self._networks[2]

    @property
    def teacher_forward(self) -> Callable[[nn.Module, Tensor], Any] | None:
        """How the teacher is called, where not plainly."""
        return self._teacher.forward

    @property
    def layout(self) -> str | Mapping[str, str] | None:
        """What was said of the layers' layouts."""
        return self._reader.layout

    @property
    def repeated(self) -> str:
        """What was asked for layers that fire more than once."""
        return self._taps.repeated

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return self._taps.attached

    def attach(self) -> Self:
        """Put the hooks on; needed only outside a `with` block. In several processes, own parameters are set to those of the first.

        Raises:
            CaptureError: attached already.
        """
        if self.attached:
            raise CaptureError(
                "this IsomorphismLoss is attached already; use one `with iso:` at a time, or detach() first"
            )
        try:
            for taps in (self._taps, self._teacher.taps, *(network.taps for network, _ in self._peers)):
                taps.attach()
            self._handles.append(self._input.attach(unwrap_model(self.student)))
            self._handles += all_reduce_gradients(list(self.parameters()), ProcessGroup())
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Take every hook off and forget every capture, not what the teacher said last. Safe to call twice."""
        for taps in (self._taps, self._teacher.taps, *(network.taps for network, _ in self._peers)):
            taps.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is detached, as the copied networks hold no hooks, and goes on with the moments and the calls counted so far."""
        return vars(self) | {"_handles": [], "_last": {}, "teacher_output": None}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # counts calls and keeps state; a compiled step breaks its graph here
    def forward(self, *, teacher_output: Any = None, teacher_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of the batch that the student just saw; then that batch joins the moments.

        In several processes every process calls this equally often. Without gradient, or in eval mode of this module,
        nothing is learned
        from the batch.

        Args:
            teacher_output: what `teacher(x)` returned in this step, inside the context: the teacher is then not run
                again.
            teacher_features: what the teacher's layers emit for these images, by layer name (cached): the teacher is
                not run.

        Returns:
            A scalar, float32 or better, differentiable with respect to the student and to `parameters()`.

        Raises:
            CaptureError: outside `with iso:`; the student has not run since the last call, or ran without gradient; a
                layer did not fire.
            NonFiniteError: NaN or Inf; the message names layer and step. On a GPU it comes at the next refresh.
        """
        if not self.attached:
            raise CaptureError(
                "the hooks are off: use `with iso:` around the loop (or iso.attach()), and call student(x) and iso() inside"
            )
        self.teacher_output = None
        try:
            seen = self._input.take()
            branches, of_student = self._of_student(seen.images)
            of_teacher = self._of_teacher(seen, of_student, teacher_output, teacher_features)
            return self._total(branches, of_student, of_teacher, self._of_peers(seen, of_student))
        finally:
            self._forget()

    def log(self) -> dict[str, float]:
        """Figures of the last call, as trackers take them: per pair `loss`, `share` (explained), `weight`, and, after backward, `grad_norm`.

        `grad_norm` is the norm of the weighted loss's gradient at the student's feature, as it arrived: under a
        GradScaler it carries the scale.
        Figures are of this process.
        """
        flat = {
            f"iso/{pair_label(pair, self.pairs)}/{name}": value
            for pair, values in self._last.items()
            for name, value in values.items()
        }
        values = torch.stack([value.detach().float().cpu() for value in flat.values()]).tolist() if flat else []
        return dict(zip(flat, values, strict=True))

    def get_extra_state(self) -> Tensor:
        """Number of calls, and of calls with the loss on.

        In several processes the state of any one serves all: moments are dealt out equally at every refresh, and what
        the others saw since then is
        taken to be like what this one saw.
        """
        return torch.tensor([self._calls, self._calls_on])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        self._calls, self._calls_on = (int(count) for count in state)

    def extra_repr(self) -> str:
        """Return solver, target and pairs."""
        layers = ", ".join(f"{pair.source!r}: {pair.target!r}" for pair in self.pairs)
        return f"solver={self.solver!r}, target={self.target!r}, order={self.order}, layers={{{layers}}}"

    def _of_student(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each pair a view of what its layer emitted, which the pair's loss alone reads, and that as a feature."""
        size, captured = image_size(images), self._taps.collect()
        branches = [captured[pair.source].view_as(captured[pair.source]) for pair in self.pairs]
        features = [
            self._reader.read_layer(pair.source, branch, len(images), size)
            for pair, branch in zip(self.pairs, branches, strict=True)
        ]
        taught = any(branch.requires_grad for branch in branches)
        if (
            torch.is_grad_enabled()
            and not taught
            and any(parameter.requires_grad for parameter in self.student.parameters())
        ):
            raise CaptureError(
                f"the features of {', '.join(repr(pair.source) for pair in self.pairs)} carry no gradient and cannot be taught: the student's last "
                "forward ran without gradient (an evaluation in between?), or all that lies below these layers is frozen. Call iso() right after the "
                "training forward student(x), or pair a layer that is trained; to evaluate the loss itself, call it under torch.no_grad() too."
            )
        return branches, features

    def _of_teacher(
        self, seen: StudentInput, of_student: list[Tensor], output: Any, features: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if output is not None and features is not None:
            raise OptionError("pass teacher_output= or teacher_features=, not both")
        if features is not None:
            return self._teacher.given(features, seen.images)
        if output is not None:
            self.teacher_output = output
            return self._teacher.collected(self._teacher.prepared(seen.images))
        found, self.teacher_output = self._teacher.run(seen, autocast_dtype(of_student))
        return found

    def _of_peers(self, seen: StudentInput, of_student: list[Tensor]) -> list[dict[str, Tensor]]:
        """Each peer's features by teacher layer."""
        found = []
        for network, names in self._peers:
            features, _ = network.run(seen, autocast_dtype(of_student))
            found.append({teacher: features[own] for teacher, own in names.items()})
        return found

    def _total(
        self,
        branches: list[Tensor],
        of_student: list[Tensor],
        of_teacher: dict[str, Tensor],
        of_peers: list[dict[str, Tensor]],
    ) -> Tensor:
        group, refreshing, learning = (
            ProcessGroup(),
            self._calls % self.refresh_every == 0,
            self.training and torch.is_grad_enabled(),
        )
        if learning and refreshing and self.balance is not None:
            self.balance.refresh(group)
        factor = 1.0 if self.schedule is None else float(self.schedule(self._calls_on))
        terms: list[Tensor] = []
        self._last = {}
        for index, pair in enumerate(self.pairs):
            feature, target = of_student[index], of_teacher[pair.target]
            check_grids(pair, feature, target, self._reader, self._teacher.reader)
            source = align(feature, (target.shape[2], target.shape[3]))
            target = target.to(source.device)
            loss = self._loss(
                pair,
                source,
                target,
                [align(peer[pair.target].to(source.device), (target.shape[2], target.shape[3])) for peer in of_peers],
            )
            # Reading it in every step would stall a GPU; the moments leave such a batch out anyway
            if refreshing or loss.device.type == "cpu":
                check_finite(pair, loss, feature, target, self._calls)
            weight = self._weight(index, loss, factor)
            terms.append(weight * loss)
            self._note(index, pair, loss, weight, branches[index], learning)
        if learning:
            self._calls += 1
            self._calls_on += int(any(self._map_of(pair).ready for pair in self.pairs))
        device = terms[0].device
        return torch.stack([term.to(device) for term in terms]).sum()

    def _loss(self, pair: LayerPair, source: Tensor, target: Tensor, peers: list[Tensor]) -> Tensor:
        map_ = self._map_of(pair)
        if next(map_.buffers()).device != source.device:
            map_.to(source.device)
        training, map_.training = map_.training, map_.training and torch.is_grad_enabled()
        try:
            more = (torch.cat(peers, 1),) if peers else ()
            # Moments and residuals are summed in float32 or better
            with torch.autocast(source.device.type, enabled=False):
                loss: Tensor = map_(source, target, self._calls, ProcessGroup(), *more)
            return loss
        finally:
            map_.training = training

    def _weight(self, index: int, like: Tensor, factor: float) -> Tensor:
        if self.balance is None:
            return like.new_full((), self._fixed[index] * factor)
        return self.balance.weights[index].to(like.device, like.dtype) * factor

    def _note(self, index: int, pair: LayerPair, loss: Tensor, weight: Tensor, branch: Tensor, learning: bool) -> None:
        map_, value = self._map_of(pair), loss.detach()
        share = value - map_.penalized().to(loss) if isinstance(map_, LearnedMap) else value
        kept = {"loss": value, "share": 1 - share if map_.ready else torch.zeros_like(value), "weight": weight.detach()}
        self._last[pair] = kept
        if branch.requires_grad and learning:
            branch.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: kept.update(
                    grad_norm=torch.linalg.vector_norm(
                        gradient.detach(), dtype=torch.promote_types(gradient.dtype, torch.float32)
                    )
                )
            )
            if self.balance is not None and map_.ready:
                if self.balance.weights.device != branch.device:
                    self.balance.to(branch.device)
                self.balance.watch(index, branch, weight.detach(), pair.source)

    def _map(self, pair: LayerPair, closed: dict[str, Any], penalty: float) -> nn.Module:
        source, target = self._reader.channels[pair.source], self._teacher.reader.channels[pair.target]
        name = f"{pair.source} → {pair.target}"
        if self.solver == "learned":
            return LearnedMap(
                source, target, self.order, self.kernel_size, name=name, penalty=penalty, refresh=closed["refresh"]
            )
        if self.target == "teacher":
            return ClosedFormMap(source, target, self.kernel_size, name=name, **closed)
        of_peers = sum(network.reader.channels[names[pair.target]] for network, names in self._peers)
        return ConsensusMap(source, target, of_peers, self.kernel_size, name=name, **closed)

    def _map_of(self, pair: LayerPair) -> Any:
        return self.maps[pair_key(pair)]

    def _forget(self) -> None:
        self._input.clear()
        for taps in (self._taps, self._teacher.taps, *(network.taps for network, _ in self._peers)):
            taps.clear()
