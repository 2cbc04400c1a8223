"""The loss in a training loop: its maps, weights and figures, and the messages for wrong use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import WeightSchedule, suggest_layers
from knowiso_train.distillation.config import IsomorphismLossConfig
from knowiso_train.errors import (
    CaptureError,
    InputTypeError,
    LayerNameError,
    NonFiniteError,
    OptionError,
)
from tests.helpers.small_networks import built


def train(
    iso: IsomorphismLoss, student: nn.Module, calls: int, start: int = 0, more: Callable[[Tensor], Tensor] | None = None
) -> list[float]:
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.05)
    losses = []
    with iso:
        for call in range(start, start + calls):
            x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(call))
            out = student(x)
            loss = iso() + (0 if more is None else more(out))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


LINEAR: dict[str, Any] = {"scale": "linear", "weight": 1.0}
FORMS: dict[str, dict[str, Any]] = {
    "moment": {},
    "moment3": {"kernel_size": 3},
    "learned": {"solver": "learned", "order": 1},
    "consensus": {"target": "consensus", "peers": "one"},
}


def loss_for(form: str, student: nn.Module, teacher: nn.Module, **more: Any) -> IsomorphismLoss:
    options: dict[str, Any] = LINEAR | FORMS[form] | more
    if "peers" in options:
        options["peers"] = [built(3, 12)]
    return IsomorphismLoss(student, teacher, {"1": "1", "3": "3"}, **options)


class TestInALoop:
    # With no other loss the learned map leaves one direction of layer "3", so that its weight is lowered
    @pytest.mark.filterwarnings("ignore:3. the student's features have collapsed")
    @pytest.mark.parametrize("form", list(FORMS))
    def test_training_reduces_the_loss(self, form: str) -> None:
        student, teacher = built(1, 12, 2), built(2, 10, 2)
        iso = loss_for(form, student, teacher)
        losses = train(iso, student, 100)
        assert sum(losses[-5:]) < 0.9 * sum(losses[20:25])  # by then every pair is on
        log = iso.log()
        assert log["iso/train/1/share"] > 0.3
        assert log["iso/train/3/share"] > 0.3 or form == "learned"
        assert all(log[f"iso/train/{layer}/grad_norm"] > 0 for layer in "13")

    @pytest.mark.parametrize("form", list(FORMS))
    def test_resumed_equals_uninterrupted(self, form: str) -> None:
        def pair() -> tuple[nn.Module, IsomorphismLoss]:
            student = built(1)
            return student, loss_for(form, student, built(2))

        student, iso = pair()
        whole = train(iso, student, 24)
        student, iso = pair()
        train(iso, student, 13)
        saved, weights = iso.state_dict(), student.state_dict()
        student, iso = pair()
        student.load_state_dict(weights)
        iso.load_state_dict(saved)
        assert train(iso, student, 11, start=13) == whole[13:]

    def test_teacher_output_and_cached_features_save_the_forward(self) -> None:
        results = {}
        for way in ("own", "output", "cached"):
            student, teacher = built(1), built(2)
            runs: list[int] = []
            teacher.register_forward_hook(lambda *args, runs=runs: runs.append(1))
            iso = IsomorphismLoss(student, teacher, {"1": "1", "3": "3"}, example=torch.zeros(2, 3, 8, 8), **LINEAR)
            runs.clear()
            with iso:
                for call in range(4):
                    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(call))
                    with torch.no_grad():
                        out = teacher(x) if way == "output" else None
                        cached = {"1": teacher[:2](x), "3": teacher[:4](x)} if way == "cached" else None
                    student(x)
                    results[way] = iso(teacher_output=out, teacher_features=cached)
            assert len(runs) == (0 if way == "cached" else 4)
        assert results["own"] == results["output"] == results["cached"] > 0

    def test_teacher_output_equals_the_teacher_forward(self) -> None:
        student, teacher = built(1), built(2)
        with IsomorphismLoss(student, teacher, "3") as iso:
            x = torch.randn(4, 3, 8, 8)
            student(x)
            iso()
            torch.testing.assert_close(iso.teacher_output, teacher(x))
            assert not iso.teacher_output.requires_grad

    def test_grids_and_channels_may_differ(self) -> None:
        student, teacher = built(1, 6, 1), built(2, 10, 2)
        iso = IsomorphismLoss(student, teacher, {"3": "3"}, **LINEAR)
        assert list(iso.kernel_sizes.values()) == [3]
        train(iso, student, 12)
        assert 0 < iso.log()["iso/train/3/loss"] < 2

    @pytest.mark.parametrize(
        ("channels", "grids", "options", "size"),
        [
            (64, [(8, 8), (3, 4)], {}, 3),
            (65, [(8, 8), (8, 8)], {}, 1),
            (64, [(8, 8), (2, 8)], {}, 1),
            (64, [None, (8, 8)], {}, 1),
            (64, [(8, 8), (8, 8)], {"solver": "learned"}, 1),
            (64, [(8, 8), (8, 8)], {"target": "consensus"}, 1),
            (512, [None, None], {"kernel_size": 5}, 5),
        ],
    )
    def test_kernel_size_of_a_pair(
        self, channels: int, grids: list[tuple[int, int] | None], options: dict[str, Any], size: int
    ) -> None:
        assert IsomorphismLossConfig(**options).kernel_size_of(channels, grids) == size

    def test_automatic_kernel_size_of_vectors_and_tokens_is_1(self) -> None:
        class Tokens(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(2).mT

        def network(seed: int) -> nn.Sequential:
            torch.manual_seed(seed)
            body = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), Tokens(), nn.LayerNorm(8), nn.Flatten(), nn.Linear(128, 6)
            return nn.Sequential(*body)

        iso = IsomorphismLoss(network(1), network(2), ["1", "3", "5"], weight=1.0, example=torch.zeros(2, 3, 8, 8))
        assert list(iso.kernel_sizes.values()) == [3, 1, 1]
        train(iso, iso.student, 12)
        assert all(iso.log()[f"iso/train/{layer}/ready"] for layer in ("1", "3", "5"))

    def test_log_gives_loss_share_weight_and_gradient_norm(self) -> None:
        student, teacher = built(1), built(2)
        iso = IsomorphismLoss(
            student,
            teacher,
            {"1": "1", "3": "3"},
            scale="linear",
            weight={"1": 0.5, "3": 2.0},
            schedule=WeightSchedule(warmup=4),
        )
        norms: list[Tensor] = []
        with iso:
            for _ in range(4):
                x = torch.randn(16, 3, 8, 8)
                student(x)
                total = iso()
            features: list[Tensor] = []
            handle = student[3].register_forward_hook(lambda module, args, out: features.append(out))
            student(x)
            total = iso()
            norms += torch.autograd.grad(total, features, retain_graph=True)
            total.backward()
            handle.remove()
        log = iso.log()
        assert set(log) == {
            f"iso/train/{layer}/{what}" for layer in "13" for what in ("ready", "loss", "share", "weight", "grad_norm")
        }
        assert log["iso/train/1/weight"] / log["iso/train/3/weight"] == pytest.approx(0.25)
        assert 0 < log["iso/train/3/weight"] < 2
        assert log["iso/train/1/loss"] * log["iso/train/1/weight"] + log["iso/train/3/loss"] * log[
            "iso/train/3/weight"
        ] == pytest.approx(float(total.detach()))
        assert log["iso/train/3/share"] == pytest.approx(1 - log["iso/train/3/loss"])
        assert log["iso/train/3/grad_norm"] == pytest.approx(float(norms[0].norm()), rel=1e-4)

    def test_balanced_weights_keep_the_ratio_of_the_gradients(self) -> None:
        student, teacher = built(1), built(2)
        iso = IsomorphismLoss(student, teacher, {"1": "1"}, scale="linear", weight="balanced", ratio=0.5, refresh=1)
        with iso:
            for _ in range(30):
                x = torch.randn(32, 3, 8, 8)
                captured: list[Tensor] = []
                handle = student[0].register_forward_hook(
                    lambda module, args, out, captured=captured: captured.append(out)
                )
                task = 1e-3 * student(x).square().sum()
                handle.remove()
                own = iso()
                (of_task,) = torch.autograd.grad(task, captured, retain_graph=True)
                (of_own,) = torch.autograd.grad(own, captured, retain_graph=True)
                (1024.0 * (task + own)).backward()  # a loss scale cancels
        # layer 0 feeds layer 1, an in-place ReLU: the gradients at 0 are those at 1 behind the same mask
        assert float(of_own.norm() / of_task.norm()) == pytest.approx(0.5, rel=0.2)
        assert iso.log()["iso/train/1/weight"] != pytest.approx(1.0, rel=0.1)

    def test_auto_layers_selects_unexplained_pairs(self, capsys: pytest.CaptureFixture[str]) -> None:
        student, teacher = built(1, 10, 2), built(2, 10, 2)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(200, 3, 8, 8)), batch_size=50)
        iso = IsomorphismLoss(student, teacher, "auto", loader=loader)
        assert [(pair.source, pair.target) for pair in iso.pairs] == [("1", "1"), ("3", "3")]
        assert "unexplained" in capsys.readouterr().out
        with pytest.raises(LayerNameError, match="no pair has both"):
            suggest_layers(student, copy.deepcopy(student), loader, verbose=False)
        with pytest.raises(OptionError, match="loader="):
            IsomorphismLoss(student, teacher, "auto")

    def test_calls_without_gradient_and_eval_mode_do_not_update(self) -> None:
        student, teacher = built(1), built(2)
        iso = IsomorphismLoss(student, teacher, "3", **LINEAR)
        train(iso, student, 6)
        before = {name: value.clone() for name, value in iso.state_dict().items()}
        with iso, torch.no_grad():
            student(torch.randn(16, 3, 8, 8))
            assert 0 < float(iso()) < 2
        iso.eval()
        with iso:
            student(torch.randn(16, 3, 8, 8))
            assert iso().requires_grad
        assert all(torch.equal(value, before[name]) for name, value in iso.state_dict().items())


class TestMessages:
    def test_unknown_and_contradictory_options_raise(self) -> None:
        a, b = built(1), built(2)
        for wrong, message in (
            ({"solver": "other"}, "solver must be 'closed_form' or 'learned', got the string 'other'"),
            ({"target": "peers"}, "target must be 'teacher' or 'consensus', got the string 'peers'"),
            (
                {"solver": "learned", "target": "consensus", "peers": [b]},
                'target="consensus" needs solver="closed_form"',
            ),
            ({"order": 1}, 'order=1 needs solver="learned"'),
            ({"order": -1, "solver": "learned"}, "order must be an integer"),
            ({"kernel_size": 2}, "kernel_size must be odd"),
            ({"refresh": 0}, "refresh must be"),
            ({"ridge": -1.0}, "ridge must be"),
            ({"window": 0.5}, "window must be"),
            ({"weight": "heavy"}, "weight must be"),
            ({"weight": -1.0}, "weights must be finite"),
            ({"target": "consensus"}, "needs peers"),
            ({"peers": [b]}, 'peers= needs target="consensus"'),
            ({"repeated": "all"}, "repeated must be"),
        ):
            with pytest.raises(OptionError, match=message):
                IsomorphismLoss(a, b, "3", **wrong)  # type: ignore[arg-type]
        with pytest.raises(LayerNameError, match="every student layer"):
            IsomorphismLoss(a, b, "3", weight={"1": 1.0})
        with pytest.raises(LayerNameError, match="nearest"):
            IsomorphismLoss(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1))), b, {"0.1": "3"})
        with pytest.raises(OptionError, match="same network"):
            IsomorphismLoss(a, a, "3")
        with pytest.raises(InputTypeError, match=r"teacher must be a torch\.nn\.Module"):
            IsomorphismLoss(a, "resnet18", "3")  # type: ignore[arg-type]

    def test_calls_outside_the_context_or_out_of_order_raise(self) -> None:
        student, teacher = built(1), built(2)
        iso = IsomorphismLoss(student, teacher, "3")
        with pytest.raises(CaptureError, match="use `with iso:`"):
            iso()
        x = torch.randn(4, 3, 8, 8)
        with iso:
            with pytest.raises(CaptureError, match="the student has not run"):
                iso()
            student(x)
            iso()
            with pytest.raises(CaptureError, match="the student has not run"):
                iso()
            with torch.no_grad():
                student(x)
            with pytest.raises(CaptureError, match="ran without gradient"):
                iso()
            student(x)
            with pytest.raises(CaptureError, match="never fired"):
                iso(teacher_output=torch.zeros(4, 5))
            student(x)
            with pytest.raises(CaptureError, match=r"missing are \['3'\]"):
                iso(teacher_features={"1": torch.zeros(4, 8, 8, 8)})
            student(x)
            with pytest.raises(OptionError, match="not both"):
                iso(teacher_features={}, teacher_output=x)
            with pytest.raises(CaptureError, match="attached already"):
                iso.attach()

    def test_an_unknown_input_size_asks_for_an_example(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Conv2d(3, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                if x.shape[-1] != 17:
                    raise ValueError("only 17")
                out: Tensor = self.inner(x)
                return out

        with pytest.raises(OptionError, match=r"only 17. Pass example=images"):
            IsomorphismLoss(Odd(), built(1), {"inner": "3"})
        IsomorphismLoss(Odd(), nn.Sequential(nn.Conv2d(3, 4, 3)), {"inner": "0"}, example=torch.zeros(1, 3, 17, 17))

    def test_nan_in_the_images_raises_and_leaves_the_moments(self) -> None:
        student, teacher = built(1), built(2)
        iso = IsomorphismLoss(student, teacher, "3")
        train(iso, student, 4)
        before = iso.maps["3→3"].moments.xx.clone()
        with iso:
            x = torch.randn(4, 3, 8, 8)
            x[0, 0, 0, 0] = float("nan")
            student(x)
            with pytest.raises(NonFiniteError, match=r"step 4 .*student's '3': \d+ of"):
                iso()
        assert torch.equal(iso.maps["3→3"].moments.xx, before)
