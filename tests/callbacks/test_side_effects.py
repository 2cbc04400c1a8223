"""A training that is measured notices nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from knowiso_train import FeatureTaps, IsomorphismCallback, IsomorphismLoss
from knowiso_train.features.state import isolated_eval
from tests.helpers.training import LAYERS, count_hooks, held_out, network, train


class TestTrainingNoticesNothing:
    @pytest.mark.parametrize("at", ["end", "middle"])
    @pytest.mark.parametrize("taught", [True, False])
    def test_bit_for_bit(self, at: str, taught: bool) -> None:
        student, teacher = network(1), network(2)
        alone = train(student, teacher, 6, taught=taught)
        student = network(1)
        # Draws from the global random state
        loader = DataLoader(held_out().dataset, batch_size=30, sampler=SubsetRandomSampler(range(80)))
        callback = IsomorphismCallback(student, teacher, loader, LAYERS, every=2)
        watched = train(student, teacher, 6, taught=taught, callback=callback.step, position=at)
        assert [measured.step for measured in callback.history] == [2, 4, 6]
        assert callback.history[0].metrics != callback.history[2].metrics
        assert watched.keys() == alone.keys()
        assert [name for name, value in alone.items() if not torch.equal(value, watched[name])] == []
        assert count_hooks(student, teacher) == 0

    def test_inside_one_autocast_block_the_gradients_stay(self) -> None:
        """Weights cast under no_grad stay in the cache of autocast (torch 2.8): the next forward has no gradient."""

        def gradients(watch: bool) -> list[Tensor]:
            model, teacher = network(1), network(2)
            # Its forward keeps its own autocast
            accelerated = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
            callback = IsomorphismCallback(accelerated, teacher, held_out(), LAYERS, every=1)
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                if watch:
                    callback.step()
                accelerated(torch.randn(8, 3, 8, 8)).square().sum().backward()
            return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

        alone, watched = gradients(False), gradients(True)
        assert len(alone) == len(watched) == len(list(network(1).parameters()))
        assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))

    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_compiled_student(self, in_place: bool) -> None:
        def trained(watch: bool) -> tuple[dict[str, Tensor], IsomorphismCallback, int]:
            torch.compiler.reset()
            student, teacher = network(1), network(2)
            compiled: Any = student
            graphs: list[int] = []

            def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
                graphs.append(1)
                return graph.forward

            if in_place:
                student.compile(backend=counting)
            else:
                compiled = torch.compile(student, backend=counting)
            callback = IsomorphismCallback(compiled, teacher, held_out(), LAYERS, every=2)
            return train(compiled, teacher, 4, callback=callback.step if watch else None), callback, len(graphs)

        alone, _, graphs = trained(False)
        watched, callback, graphs_watched = trained(True)
        assert [name for name, value in alone.items() if not torch.equal(value, watched[name])] == []
        assert graphs_watched == graphs > 0  # nothing is compiled anew
        assert [measured.step for measured in callback.history] == [2, 4]
        torch.compiler.reset()

    def test_captures_and_the_order_of_hooks_stand(self) -> None:
        model = network(1)
        fired: list[str] = []

        def once(*args: Any) -> None:
            fired.append("once")
            handle.remove()

        model[2].register_forward_hook(lambda *args: fired.append("before"))
        taps = FeatureTaps(model, "2").attach()
        handle = model[2].register_forward_hook(once)
        model[2].register_forward_hook(lambda *args: fired.append("after"))
        order = list(model[2]._forward_hooks.values())
        with isolated_eval(model):
            assert count_hooks(model) == 0
            model(torch.randn(2, 3, 8, 8))
        order.remove(once)  # it took itself off, and stays off
        assert list(model[2]._forward_hooks.values()) == order
        assert fired == ["before", "once", "after"]
        x = torch.randn(4, 3, 8, 8)
        model(x)
        with pytest.raises(RuntimeError, match="channels"), isolated_eval(model):
            model(torch.randn(2, 5, 8, 8))
        assert len(taps.collect()["2"]) == 4
        taps.detach()

    def test_an_error_in_the_loader_leaves_nothing(self) -> None:
        class Broken(Dataset[Tensor]):
            def __len__(self) -> int:
                return 90

            def __getitem__(self, index: int) -> Tensor:
                if index == 40:
                    raise OSError("image 40 cannot be read")
                return torch.zeros(3, 8, 8)

        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(student, teacher, DataLoader(Broken(), batch_size=9), LAYERS, every=1)
        with IsomorphismLoss(student, teacher, LAYERS) as iso:
            hooks, random = count_hooks(student, teacher), torch.get_rng_state()
            out = student(torch.randn(16, 3, 8, 8))
            with pytest.raises(OSError, match="image 40"):
                callback.step()
            assert count_hooks(student, teacher) == hooks > 0
            assert student.training
            assert all(module.training for module in student.modules())
            assert not torch.equal(torch.get_rng_state(), random)  # dropout's draw stands
            (out.sum() + iso()).backward()  # what was captured before it is still there
        assert callback.history == []
        assert count_hooks(student, teacher) == 0

    def test_count_hooks_stay_off_after_the_loss(self) -> None:
        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(student, teacher, held_out(), LAYERS, every=1)
        with IsomorphismLoss(student, teacher, LAYERS) as iso:
            callback.step()
            with pytest.raises(RuntimeError, match="the student has not run"):
                iso()  # the measurement's forward is none of the student's
        assert count_hooks(student, teacher) == 0
