"""Fine-tuning: convergence to the original, selection of weights, labels, seeds, restored state and errors."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, InputTypeError, KnowisoError, NonFiniteError, OptionError, ShapeError
from knowiso_train.pruning._tracing import comparable_blocks
from knowiso_train.pruning.finetune import finetune
from knowiso_train.refinement import RefineFinetuneConfig

QUIET: dict[str, Any] = {"batch_size": 16, "lr": 1e-2, "steps": 24, "progress": False}


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, inner, 3, padding=1), nn.Conv2d(inner, 8, 1)
        self.norm, self.drop = nn.BatchNorm2d(inner), nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(self.drop(torch.relu(self.norm(self.conv1(x))))))


def network(inner: int = 6) -> nn.Sequential:
    stages = [nn.Sequential(Block(inner), Block(inner)), nn.AvgPool2d(2), nn.Sequential(Block(inner))]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.fixture
def original() -> nn.Sequential:
    model = network().train()
    with torch.no_grad():
        # Running statistics converge to those of the inputs
        for _ in range(30):
            model(torch.randn(64, 3, 6, 6))
        # Logits then differ between images
        model[6].weight *= 20
    return model.eval()


@pytest.fixture
def perturbed(original: nn.Module) -> nn.Module:
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return copied


@pytest.fixture
def images() -> Tensor:
    return torch.randn(96, 3, 6, 6)


def distance(a: nn.Module, b: nn.Module) -> float:
    parameters = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((x - y).detach().square().sum()) for x, y in parameters)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_perturbed_copy_converges_to_the_original(original: nn.Module, perturbed: nn.Module, images: Tensor) -> None:
    before, start = state(original), distance(perturbed, original)
    report = finetune(perturbed, original, images.split(32), **QUIET | {"steps": 80, "logit_weight": 0.1})
    assert same(state(original), before)
    assert distance(perturbed, original) < start
    assert sum(report.losses[-5:]) < 0.3 * sum(report.losses[:5])
    assert report.after.divergence < 0.3 * report.before.divergence
    assert report.layers == ("1.0", "1.1", "3.0")
    assert report.cached
    fresh = torch.randn(64, 3, 6, 6)
    assert (perturbed.eval()(fresh) - original(fresh)).square().mean() < 0.1 * original(fresh).var()


def test_an_exact_copy_keeps_every_bit(original: nn.Module, images: Tensor) -> None:
    copied = copy.deepcopy(original)
    # Training enables gradients by itself
    with torch.no_grad():
        report = finetune(copied, original, [images], **QUIET)
    # The first of equal objectives
    assert report.after.step == 0
    assert report.after.agreement == 1
    assert same(state(copied), state(original))


def test_weights_are_restored_if_training_makes_them_worse(
    original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    start = state(perturbed)
    report = finetune(perturbed, original, [images], **QUIET | {"lr": 1.0})
    assert len(report.validations) == 9
    assert min(point.objective for point in report.validations[1:]) > report.before.objective
    assert same(state(perturbed), start)


def test_labels_of_weight_zero_are_not_read(original: nn.Module, perturbed: nn.Module, images: Tensor) -> None:
    class Poisoned(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if name in ("cross_entropy", "one_hot", "gather", "eq", "nll_loss"):
                raise AssertionError(f"a label was read by {name}")
            return super().__torch_function__(function, types, args, kwargs or {})

    other = copy.deepcopy(perturbed)
    # No class has this number
    finetune(perturbed, original, [(images, torch.full((96,), 10**9).as_subclass(Poisoned))], **QUIET)
    finetune(other, original, [images], **QUIET)
    assert same(state(perturbed), state(other))


def test_features_improve_although_the_labels_are_fitted_perfectly(
    original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    """The cross-entropy is zero from the start, so that by itself it could only increase."""
    for model in (original, perturbed):
        with torch.no_grad():
            model[6].weight.zero_()  # type: ignore[index]
            model[6].bias.copy_(torch.tensor([0.0, 90.0, 0.0, 0.0, 0.0]))  # type: ignore[index]
    report = finetune(perturbed, original, [(images, torch.ones(96, dtype=torch.long))], **QUIET, label_weight=1.0)
    assert report.before.cross_entropy == 0
    assert report.before.feature_distance is not None
    assert report.after.feature_distance is not None
    assert report.after.feature_distance < 0.7 * report.before.feature_distance


def test_validation_objective_is_the_weighted_sum_of_its_terms(
    original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    options: dict[str, Any] = {"feature_weight": 2.0, "logit_weight": 0.3, "label_weight": 0.5}
    labels = original(images).argmax(1)
    report = finetune(perturbed, original, [(images, labels)], **QUIET, **options)
    assert len(report.validations) == 9
    for point in report.validations:
        assert point.feature_distance is not None
        assert point.cross_entropy is not None
        expected = 2 * point.feature_distance + 0.3 * point.divergence + 0.5 * point.cross_entropy
        assert point.objective == pytest.approx(expected, abs=1e-5)
    assert report.after.objective == min(point.objective for point in report.validations)


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_label_weight_lowers_the_cross_entropy(original: nn.Module, images: Tensor, form: str) -> None:
    labels = (images.mean((1, 2, 3)) > 0).long()
    batch = (images, labels) if form == "tuple" else {"image": images, "label": labels}
    options: dict[str, Any] = {
        **QUIET,
        "feature_weight": 0,
        "logit_weight": 0,
        "label_weight": 1.0,
        "lr": 2e-2,
        "steps": None,
        "epochs": 8,
    }
    pruned = copy.deepcopy(original)
    report = finetune(pruned, original, [batch], **options)
    assert report.before.cross_entropy is not None
    assert report.after.cross_entropy is not None
    assert report.after.cross_entropy < 0.7 * report.before.cross_entropy
    assert len(report.losses) == 8 * (84 // 16)
    assert "selected" in str(report)


def test_equal_seeds_give_equal_bits_with_augmentation(
    original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)

    ends = []
    for seed, drawn in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(drawn)
        pruned = copy.deepcopy(perturbed)
        report = finetune(pruned, original, [images], **QUIET, transform=noisy, seed=seed, frozen_statistics=False)
        ends.append((state(pruned), report.losses))
        assert not report.cached
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] != ends[2][1]


def test_cached_features_give_the_same_result(original: nn.Module, perturbed: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(perturbed)
    a, b = finetune(perturbed, original, [images], **QUIET), finetune(other, original, [images], **QUIET, cache_gib=0)
    assert (a.cached, b.cached) == (True, False)
    assert a.after.divergence == pytest.approx(b.after.divergence, rel=1e-2)


def test_batch_norm_statistics_change_only_on_request(
    original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    before = {name: value.clone() for name, value in perturbed.named_buffers()}
    other = copy.deepcopy(perturbed)
    finetune(perturbed, original, [images], **QUIET)
    assert same(dict(perturbed.named_buffers()), before)
    finetune(other, original, [images], **QUIET, frozen_statistics=False)
    assert not same(dict(other.named_buffers()), before)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_random_state_and_frozen_weights_are_restored(
    original: nn.Module, perturbed: nn.Module, images: Tensor, fails: bool
) -> None:
    perturbed.train()
    perturbed[1][0].eval()
    original[3].train()
    perturbed[0].weight.requires_grad_(False)
    frozen, start = perturbed[0].weight.clone(), state(perturbed)
    perturbed[6].bias.grad = gradient = torch.ones(5)
    modes = [[module.training for module in model.modules()] for model in (original, perturbed)]
    random, calls = torch.get_rng_state(), []

    def transform(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * torch.nan if fails and len(calls) == 10 else x

    if fails:
        with pytest.raises(NonFiniteError, match="step 10 of 24"):
            finetune(perturbed, original, [images], **QUIET, transform=transform)
        assert same(state(perturbed), start)
    else:
        finetune(perturbed, original, [images], **QUIET, transform=transform)
        assert not same(state(perturbed), start)
    assert torch.equal(perturbed[0].weight, frozen)
    assert not perturbed[0].weight.requires_grad
    assert all(parameter.requires_grad for name, parameter in perturbed.named_parameters() if name != "0.weight")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in original.parameters())
    assert perturbed[6].bias.grad is gradient
    assert torch.equal(gradient, torch.ones(5))
    assert all(parameter.grad is None for name, parameter in perturbed.named_parameters() if name != "6.bias")
    assert modes == [[module.training for module in model.modules()] for model in (original, perturbed)]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for model in (original, perturbed)
        for module in model.modules()
    )


@pytest.mark.parametrize("sizes", [48, 40])
def test_file_names_stay_with_their_images(
    sizes: int, original: nn.Module, perturbed: nn.Module, images: Tensor
) -> None:
    names = {tuple(image.flatten()[:3].tolist()): f"{i}.png" for i, image in enumerate(images)}
    Named = namedtuple("Named", "image path")
    seen = set()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        assert list(batch.path) == [names[tuple(image.flatten()[:3].tolist())] for image in batch.image]
        seen.update(batch.path)
        return model(batch.image)

    loader = [Named(part, [names[tuple(x.flatten()[:3].tolist())] for x in part]) for part in images.split(sizes)]
    finetune(perturbed, original, loader, **QUIET, forward=forward)
    assert len(seen) == len(images)


def test_comparable_blocks_are_those_of_unchanged_shape(original: nn.Module, images: Tensor) -> None:
    pruned = network(inner=3)

    assert comparable_blocks(pruned, original, images[:2]) == ["1.0", "1.1", "3.0"]
    assert comparable_blocks(nn.Sequential(pruned), nn.Sequential(original), images[:2]) == ["0.1.0", "0.1.1", "0.3.0"]
    plain = [nn.Sequential(nn.Conv2d(3, width, 1), nn.Flatten(), nn.Linear(width * 36, 2)) for width in (4, 2)]
    assert comparable_blocks(plain[1], plain[0], images[:2]) == []
    assert finetune(plain[1], plain[0], [images], **QUIET).layers == ()


def test_dense_outputs_are_compared_by_squared_distance(images: Tensor) -> None:
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    pruned = copy.deepcopy(original)
    pruned[2].weight.data *= 1.5
    report = finetune(pruned, original, [images], **QUIET, layers=())
    assert report.after.agreement is None
    with pytest.raises(OptionError, match=r"label_weight needs logits .* shape \(12, 1, 2, 2\)"):
        finetune(pruned, original, [(images, torch.zeros(96, dtype=torch.long))], **QUIET, layers=(), label_weight=1.0)
    assert report.after.divergence < 0.5 * report.before.divergence


def widened(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 7))


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def head_alone(model: nn.Module) -> nn.Module:
    copied = frozen(model)
    copied[6].requires_grad_(True)  # type: ignore[index]
    return copied


@pytest.mark.parametrize(
    ("pruned", "more", "error", "message"),
    [
        (lambda model: model, {}, OptionError, "same model"),
        (frozen, {}, OptionError, "frozen"),
        (head_alone, {}, OptionError, "has an effect on the compared outputs"),
        (widened, {"layers": ()}, ShapeError, r"\(12, 7\).*\(12, 5\)"),
        (lambda model: network(9), {}, ShapeError, r"'1.0.conv1.weight' of shape \(9, .*Pass the pruned model first"),
        (lambda model: nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), {}, OptionError, "none of its parameter names"),
        (lambda model: network(3), {"layers": ["1.0.conv1"]}, ShapeError, r"'1.0.conv1' has shape \(2, 3, 6, 6\)"),
        (lambda model: "model", {}, InputTypeError, "pruned: expected"),
        (copy.deepcopy, {"epochs": 1}, OptionError, "not both"),
        (copy.deepcopy, {"steps": 0}, OptionError, "steps must be an integer at least 1"),
        (copy.deepcopy, {"lr": 0}, OptionError, "lr must be a number above 0"),
        (copy.deepcopy, {"feature_weight": float("inf")}, OptionError, "feature_weight: expected a finite number"),
        (copy.deepcopy, {"lr": "fast"}, OptionError, r"lr must be a number above 0 to 1e\+06, got the string 'fast'"),
        (copy.deepcopy, {"label_weight": -1.0}, OptionError, "label_weight must be"),
        (copy.deepcopy, {"validation_fraction": 1.0}, OptionError, "validation_fraction must be below 1"),
        (copy.deepcopy, {"batch_size": 90}, DataError, "12 of them held out"),
        (copy.deepcopy, {"label_weight": 1.0}, DataError, "label_weight: expected a tensor of labels"),
        (
            copy.deepcopy,
            {"transform": lambda x: None},
            InputTypeError,
            "returns a tensor, got one that returns NoneType",
        ),
    ],
)
def test_invalid_arguments_raise(
    original: nn.Module,
    images: Tensor,
    pruned: Callable[[nn.Module], Any],
    more: dict[str, Any],
    error: type[KnowisoError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        finetune(pruned(original), original, [images], **QUIET | more)


def test_labels_that_do_not_fit_the_logits_raise(original: nn.Module, perturbed: nn.Module, images: Tensor) -> None:
    labels = torch.zeros(96, dtype=torch.long)
    with pytest.raises(ShapeError, match="one image for each of 16 labels, got 15"):
        finetune(perturbed, original, [(images, labels)], **QUIET, label_weight=0.1, transform=lambda x: x[1:])
    labels[50] = 5
    with pytest.raises(ShapeError, match="labels below 5, the number of logits, got 5"):
        finetune(perturbed, original, [(images, labels)], **QUIET, label_weight=0.1)


def test_biases_that_a_refit_adds_are_no_larger_parameters(original: nn.Module, images: Tensor) -> None:
    plain, pruned = (copy.deepcopy(original) for _ in range(2))
    plain[6].bias = None  # type: ignore[assignment]
    assert finetune(pruned, plain, [images], **QUIET | {"steps": 1}).losses


def test_biases_take_a_twentieth_of_the_learning_rate(original: nn.Module, images: Tensor) -> None:
    """Adam's first step moves every bias by its learning rate; of one step in all the schedule gives half."""
    pruned = copy.deepcopy(original)
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name in ("1.0.conv1.bias", "1.1.conv2.bias"))
    with torch.no_grad():
        for parameter in (pruned[1][0].conv1.bias, pruned[1][1].conv2.bias):  # type: ignore[index]
            parameter += 0.3
    biases = {name: value.detach().clone() for name, value in pruned.named_parameters() if value.requires_grad}
    report = finetune(pruned, original, [images], **QUIET | {"steps": 1, "lr": 0.1})
    assert report.after.step == 1
    assert len(biases) == 2
    for name, value in biases.items():
        change = (pruned.get_parameter(name) - value).detach().abs()
        torch.testing.assert_close(change, torch.full_like(value, 0.5 * 0.05 * 0.1), rtol=1e-3, atol=0)


def test_equal_objectives_select_the_earlier_weights(original: nn.Module, perturbed: nn.Module, images: Tensor) -> None:
    """Steps of 1e-7 of a weight's norm change bits, but not the six reported digits of the objective."""
    start = state(perturbed)
    bits: list[bool] = []

    def transform(x: Tensor) -> Tensor:
        bits.append(same(state(perturbed), start))
        return x

    report = finetune(perturbed, original, [images], **QUIET | {"lr": 1e-7, "steps": 2}, transform=transform)
    assert bits == [True, False]
    assert len({point.objective for point in report.validations}) == 1
    assert same(state(perturbed), start)


@pytest.mark.parametrize("option", ["transform", "forward", "progress"])
@pytest.mark.parametrize("value", ["auto", [1.0], torch.float16, torch.zeros(2)], ids=repr)
def test_functions_are_checked_before_use(option: str, value: Any, original: nn.Module, perturbed: nn.Module) -> None:
    with pytest.raises(KnowisoError, match=f"{option} must be"):
        finetune(perturbed, original, [torch.zeros(64, 3, 8, 8)], **QUIET | {option: value})


@pytest.mark.parametrize("lr", [1e300, float("inf"), 0.0, -1.0])
def test_learning_rates_without_a_use_raise(lr: float, original: nn.Module, perturbed: nn.Module) -> None:
    with pytest.raises(OptionError, match="lr must be a number"):
        finetune(perturbed, original, [torch.zeros(64, 3, 8, 8)], **QUIET | {"lr": lr})
    with pytest.raises(OptionError, match="lr must be a number"):
        RefineFinetuneConfig(lr=lr)
