"""Fine-tuning of a classifier towards labels and the consensus of peers, step by step and resumable."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.distillation.kd import WeightSchedule, kd_loss
from knowiso_train.distillation.loss import IsomorphismLoss
from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.features.calls import find_logits
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.refinement.config import RefineFinetuneConfig
from knowiso_train.refinement.models import ClassifierModel, Transform, pooled_layer
from knowiso_train.refinement.peers import PeerEnsemble, PeerHead
from knowiso_train.utils.batch import get_inputs, labels_of, shuffle_loader

WARMUP_DIVISOR = 20  # the learning rate rises over this part of the steps

SaveState = Callable[[dict[str, Any]], None]


def finetune_schedules(
    method: str, config: RefineFinetuneConfig, *, labels: bool, peers: bool
) -> list[tuple[str, RefineFinetuneConfig]]:
    """List the fine-tuning runs of a method: towards the consensus, and for "auto" also on the labels alone.

    Where pseudo-labels mislead, labels alone are better; validation images decide.

    Args:
        method: Method of `refine`.
        config: Settings of the first run.
        labels: True where labeled images are given.
        peers: True where a peer is useful.

    Returns:
        Target of each run in words, and its settings.

    Examples:
        >>> [target for target, _ in finetune_schedules("auto", RefineFinetuneConfig(), labels=True, peers=True)]
        ['the consensus', 'the labels']
    """
    schedules = [("the consensus", config)] if peers and config.uses_peers else []
    if labels and (method == "auto" or not config.uses_peers):
        schedules.append(("the labels", replace(config, consensus_weight=0.0, kd_weight=0.0)))
    # Without labels and weights it is an error, which the trainer names
    return schedules or ([("the consensus", config)] if method == "consensus" else [])


class RefineTrainer:
    """Fine-tuning of a network in place, one step at a time.

    The loss is the cross-entropy of labels, plus the consensus loss between the features of the network, of its frozen
    original and of the peers, plus the distillation loss towards the mean of their predictions:

        L = CE(labels) + w_c · L_consensus + w_kd · T² KL(mean_m softmax(z_m / T) ‖ softmax(z / T))

    Frozen parameters stay frozen, except for the classifier, whose flags the end of the context restores.

    The context registers hooks and removes them. `state_dict` and `load_state_dict` continue a run to the same bits;
    the batches of a run are the caller's, see `BatchCycle`.

    Args:
        student: Network to train, on its device.
        teacher: Frozen original, on the same device, in eval mode.
        model: Description of the network; its transform applies to every batch.
        peers: Useful peers. Not used where both `consensus_weight` and `kd_weight` are 0.
        config: Settings.
        example: Batch of images, for the shapes of features. None: allowed where no peers are used.
        heads: By index of the peer, a function from its pooled features to logits. None: the peers' own classifiers
            where they have the same number of classes.
        accelerator: Accelerator of the accelerate library, for several processes and mixed precision. It saves the
            network, the optimizer and the random state itself; register the trainer with it for the rest.

    Attributes:
        num_steps: Number of steps so far.
        consensus: Consensus loss, or None.
        optimizer: SGD with Nesterov momentum.

    Raises:
        OptionError: No peers where a loss needs them, or no layer that could be compared.

    Examples:
        >>> student = nn.Sequential(nn.Linear(4, 3))
        >>> config = RefineFinetuneConfig(steps=2, lr=0.1, consensus_weight=0, kd_weight=0)
        >>> model = ClassifierModel(student, "0", "small")
        >>> x, labels = torch.eye(4)[:3], torch.arange(3)
        >>> with RefineTrainer(student, copy.deepcopy(student), model, [], config) as trainer:
        ...     losses = [trainer.step(None, (x, labels))["cross_entropy"] for _ in range(2)]
        >>> trainer.num_steps
        2
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        model: ClassifierModel,
        peers: Sequence[ClassifierModel],
        config: RefineFinetuneConfig,
        example: Any = None,
        *,
        heads: Mapping[int, PeerHead] | None = None,
        accelerator: Any = None,
    ) -> None:
        if config.uses_peers and not peers:
            raise OptionError("no useful peer is left; there is no consensus to train towards")
        self.config, self.num_steps = config, 0
        self.student = student
        classifier = replace(model, module=student).classifier
        self._classifier_flags = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
        classifier.requires_grad_(True)
        self._transform, self._accelerator = model.transform, accelerator
        set_training_mode(student, config.freeze_batch_norm)
        self.consensus: IsomorphismLoss | None = None
        if config.uses_peers:
            self.consensus = consensus_loss(student, teacher, model, peers, example, config)
        num_classes = model.num_classes if config.uses_peers and config.targets == "ensemble" else 0
        self._ensemble = PeerEnsemble(peers, heads, num_classes)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            student.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, nesterov=True
        )
        self._schedule = WeightSchedule(warmup=max(1, config.steps // WARMUP_DIVISOR), total=max(2, config.steps))
        self._forward: Callable[[Tensor], Any] = student
        if accelerator is not None:
            self._forward, self.optimizer = accelerator.prepare(student, self.optimizer)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.consensus is not None:
            self._stack.enter_context(self.consensus)
        self._stack.enter_context(self._ensemble)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._accelerator is not None:
            # Without the autocast that prepare has put around the forward
            self._accelerator.unwrap_model(self._forward, keep_fp32_wrapper=False)
        for parameter, needed in self._classifier_flags:
            parameter.requires_grad_(needed)

    def step(self, unlabeled: Any, labeled: Any) -> dict[str, Tensor]:
        """Update the network on one batch of unlabeled and one of labeled images.

        Args:
            unlabeled: Batch of images, or None.
            labeled: Batch with labels, or None.

        Returns:
            Weighted terms of the loss, detached: "consensus", "soft_targets" and "cross_entropy", where they apply.

        Raises:
            NonFiniteError: The loss is NaN or Inf. The network was not modified in this step.
            OptionError: No labels, and no loss that compares with peers.
            DataError: A labeled batch without labels.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self._schedule(self.num_steps)
        terms = self._losses(unlabeled, labeled)
        loss, *others = terms.values()
        for term in others:
            loss = loss + term
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteError(
                f"the loss is {float(loss.detach())} at step {self.num_steps}; try a lower learning rate"
            )
        self.optimizer.zero_grad()
        # Clipping: a classifier in closed form can have large weights, and large gradients behind them
        if self._accelerator is None:
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        else:
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.num_steps += 1
        return {name: term.detach() for name, term in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that continues the run. Tensors are not copied.

        With an accelerator it is the number of steps and the state of the consensus loss; without one also the
        network, the optimizer and the random state of torch.
        """
        state: dict[str, Any] = {"num_steps": self.num_steps}
        if self.consensus is not None:
            state["consensus"] = self.consensus.state_dict()
        if self._accelerator is None:
            state |= {
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random_state": torch.get_rng_state(),
            }
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                state["cuda_random_states"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`, of a trainer with the same arguments."""
        self.num_steps = int(state["num_steps"])
        if self.consensus is not None:
            self.consensus.load_state_dict(state["consensus"])
        if self._accelerator is None:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random_state"].cpu())
            if "cuda_random_states" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_random_states"])

    def _losses(self, unlabeled: Any, labeled: Any) -> dict[str, Tensor]:
        # One forward pass for both, the labeled images first
        batches = [batch for batch in (labeled, unlabeled) if batch is not None]
        inputs = torch.cat([_inputs(batch, self.student, self._transform) for batch in batches])
        logits = find_logits(self._forward(inputs))
        terms: dict[str, Tensor] = {}
        if self.consensus is not None:
            # Runs the frozen original and the peers on the captured inputs
            terms["consensus"] = self.config.consensus_weight * self.consensus()
            temperature = self.config.temperature
            targets = self._ensemble.soft_targets(find_logits(self.consensus.teacher_output), temperature)
            terms["soft_targets"] = self.config.kd_weight * kd_loss(logits, targets, temperature)
        if labeled is not None:
            labels = labels_of(labeled, "labeled images").to(logits.device)
            terms["cross_entropy"] = F.cross_entropy(logits[: len(labels)], labels)
        if not terms:
            raise OptionError(
                "nothing to train on: expected labeled images, or a positive consensus_weight or kd_weight"
            )
        return terms


class BatchCycle:
    """Endless iterator over the passes of a loader, with a state that continues it.

    The order of a shuffling DataLoader follows from torch's random state at the start of a pass. The state holds that
    random state and the position in the pass; loading reads the pass again up to this position.

    Args:
        loader: Batches, readable more than once.
        what: Kind of the images, for messages.

    Examples:
        >>> cycle = BatchCycle([1, 2], "images")
        >>> [next(cycle) for _ in range(3)]
        [1, 2, 1]
        >>> other = BatchCycle([1, 2], "images")
        >>> other.load_state_dict(cycle.state_dict())
        >>> next(other)
        2
    """

    def __init__(self, loader: Iterable[Any], what: str) -> None:
        self.loader, self.what = loader, what
        self.position = 0
        self._random_state: Tensor | None = None
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            DataError: A pass without batches.
        """
        for _ in range(2):  # where a pass has ended, the next one begins
            if self._batches is None:
                self._random_state, self.position = torch.get_rng_state(), 0
                self._batches = iter(self.loader)
            for batch in self._batches:
                self.position += 1
                return batch
            self._batches = None
        raise DataError(f"the loader of {self.what} gave no images; it must be readable more than once")

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the pass and the random state at its start."""
        return {"position": self.position, "random_state": self._random_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`. Torch's random state is changed: restore it afterwards."""
        self._batches, self.position = None, 0
        if state["random_state"] is None:
            return
        torch.set_rng_state(state["random_state"].cpu())
        for _ in range(state["position"]):
            next(self)


def finetune_classifier(
    start: nn.Module,
    model: ClassifierModel,
    peers: Sequence[ClassifierModel],
    loader: Iterable[Any],
    labeled: Iterable[Any] | None,
    config: RefineFinetuneConfig,
    *,
    heads: Mapping[int, PeerHead] | None = None,
    state: Mapping[str, Any] | None = None,
    save_state: SaveState | None = None,
    save_every: int = 100,
    progress: bool = False,
) -> nn.Module:
    """Fine-tune a copy of a network on labels and towards the consensus of its frozen original with the peers.

    With both weights of the config at 0 this is training on the labels alone: neither peers nor unlabeled images are
    used.

    Args:
        start: Network to start from. It is not modified.
        model: Description of the network, for its transform and its number of classes.
        peers: Useful peers.
        loader: Unlabeled images, readable more than once. Labels are not read.
        labeled: Images with labels, readable more than once. None: no labels.
        config: Settings.
        heads: As for `RefineTrainer`.
        state: State to continue from, as `save_state` received it. None: start a new run.
        save_state: Function that stores a state, called every `save_every` steps. It must copy or write the tensors.
        save_every: Number of steps between two states.
        progress: Show a progress bar.

    Returns:
        Network in eval mode, with the `requires_grad` of `start`. Frozen parameters other than the classifier's did
        not change.

    Raises:
        OptionError: No peers where a loss needs them, or no layer that could be compared.
        NonFiniteError: The loss is NaN or Inf.
        DataError: A loader without images.
    """
    with preserve_state(start, *(peer.module for peer in peers)):
        torch.manual_seed(config.seed)
        teacher = copy.deepcopy(unwrap_model(start)).eval().requires_grad_(False)
        student = copy.deepcopy(unwrap_model(start))
        cycles: dict[str, BatchCycle] = {}
        if config.uses_peers or labeled is None:
            cycles["unlabeled"] = BatchCycle(shuffle_loader(loader), "unlabeled images")
        if labeled is not None:
            cycles["labeled"] = BatchCycle(shuffle_loader(labeled), "labeled images")
        example = next(BatchCycle(loader, "unlabeled images")) if config.uses_peers and peers else None
        with RefineTrainer(student, teacher, model, peers, config, example, heads=heads) as trainer:
            if state is not None:
                for name, cycle in cycles.items():
                    cycle.load_state_dict(state[name])
                # Last: it restores the random state that the cycles have changed
                trainer.load_state_dict(state["trainer"])
            steps = range(trainer.num_steps, config.steps)
            for _ in tqdm(steps, desc="consensus", unit="step", disable=not progress):
                trainer.step(*(next(cycles[name]) if name in cycles else None for name in ("unlabeled", "labeled")))
                if save_state is not None and trainer.num_steps % save_every == 0:
                    states = {name: cycle.state_dict() for name, cycle in cycles.items()}
                    save_state({"trainer": trainer.state_dict(), **states})
    return student.eval()


def set_training_mode(module: nn.Module, freeze_batch_norm: bool) -> None:
    """Put a network into training mode, and optionally its batch norms into eval mode."""
    module.train()
    if freeze_batch_norm:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.training = False


def resolve_consensus_layers(
    config: RefineFinetuneConfig, model: ClassifierModel, peers: Sequence[ClassifierModel], batch: Any
) -> RefineFinetuneConfig:
    """Return the settings with layer names: where none are given, the layers before the classifiers.

    Args:
        config: Settings.
        model: Network in eval mode.
        peers: Peers in eval mode.
        batch: Batch of images.

    Raises:
        OptionError: No such layer, or a peer with another transform.
    """
    for peer in peers:
        _peer_transform(peer, model)
    if config.layers:
        return config
    layer = pooled_layer(model, batch)
    peer_layers = config.peer_layers
    if peer_layers is None:
        peer_layers = [{layer: pooled_layer(peer, batch)} for peer in peers]
    return replace(config, layers=[layer], peer_layers=peer_layers)


def consensus_loss(
    student: nn.Module,
    teacher: nn.Module,
    model: ClassifierModel,
    peers: Sequence[ClassifierModel],
    batch: Any,
    config: RefineFinetuneConfig,
) -> IsomorphismLoss:
    """Build the loss towards the part of the teacher's features that the peers reproduce.

    Args:
        student: Network to train, on its device.
        teacher: Frozen network that it started from.
        model: Description of the network, for its transform.
        peers: Useful peers.
        batch: Batch of images from the loader.
        config: Settings.

    Raises:
        OptionError: No layer that could be compared, or a peer with another transform.
    """
    config = resolve_consensus_layers(config, replace(model, module=teacher), peers, batch)
    example = _inputs(batch, student, model.transform)
    loss = IsomorphismLoss(
        student,
        teacher,
        list(config.layers or ()),
        target="consensus",
        scale="linear",
        weight=1.0,
        schedule=None,
        peers=[peer.module for peer in peers],
        peer_layers=config.peer_layers,
        peer_transforms=[_peer_transform(peer, model) for peer in peers],
        example=example[:2],
    )
    return loss.to(example.device)


def _peer_transform(peer: ClassifierModel, model: ClassifierModel) -> Transform | None:
    """Return the transform from the network's inputs to a peer's inputs.

    The consensus loss gives peers the inputs of the network, after the network's own transform.
    """
    if model.transform is None:
        return peer.transform
    if peer.transform == model.transform:
        return None
    raise OptionError(
        f"{peer.name} has another transform than the network, but fine-tuning gives peers the network's inputs. Apply "
        "the network's transform in the loader, and let peer_transforms map its outputs to the peers' inputs "
        "(recipes/refine.py is an example)"
    )


def _inputs(batch: Any, module: nn.Module, transform: Transform | None) -> Tensor:
    images = get_inputs(batch).to(device_of(module) or "cpu")
    inputs: Tensor = images if transform is None else transform(images)
    return inputs
