"""Taps return what layers emitted, in the step that is running, and leave nothing behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowiso_train.errors import CaptureError, LayerNameError, OptionError
from knowiso_train.features import FeatureTaps
from knowiso_train.features.recording import record_outputs


def convs(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=inplace))
    )


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Whole(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self._run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


# what is captured


def test_gradients_are_added_in_one_order_whether_cloned_or_not() -> None:
    torch.manual_seed(0)
    trunk, arms = nn.Conv2d(3, 4, 3), nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(3))
    model, x = (
        Whole(lambda self, x: sum(arm(y) for y in [self.trunk(x)] for arm in self.arms), trunk=trunk, arms=arms),
        images(8),
    )
    found = []
    for clone in (True, False):
        trunk.zero_grad()
        with FeatureTaps(model, "trunk", clone=clone) as taps:
            (model(x).square().sum() + taps.collect()["trunk"].pow(3).sum() / 3).backward()
        found.append(trunk.weight.grad.clone())
    assert torch.equal(*found)


def test_outputs_and_inputs_with_their_gradient() -> None:
    model, x = convs(), images()
    with FeatureTaps(model, ["2", "0"], at={"2": "input"}) as taps:
        out = model(x)
        assert list(taps.features) == ["2", "0"]
        found = taps.collect()
    torch.testing.assert_close(found["0"], model[0](x))
    torch.testing.assert_close(found["2"], model[0](x).relu())
    gradient = torch.autograd.grad(found["2"].square().sum(), model[0].weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(model[0](x).relu().square().sum(), model[0].weight)[0])
    assert taps.names == ("2", "0")
    assert out.shape == (2, 5, 4, 4)


def test_captured_as_emitted_under_autocast() -> None:
    model = convs()
    with FeatureTaps(model, "0") as taps, torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
        assert taps.collect()["0"].dtype == torch.bfloat16


def test_accelerate_needs_nothing_special() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(convs())
    with FeatureTaps(model, "0") as taps:
        model(images())
        assert taps.collect()["0"].dtype == torch.bfloat16


def test_input_passed_by_keyword() -> None:
    model = Whole(lambda self, x: self.a(input=x), a=nn.Linear(3, 2))
    x = torch.randn(4, 3)
    with FeatureTaps(model, "a", at="input") as taps:
        model(x)
        assert torch.equal(taps.collect()["a"], x)


@pytest.mark.parametrize(
    "pack", [lambda x: (x,), lambda x: [x, None], lambda x: (x, 3), lambda x: {"last": x, "cache": None}]
)
def test_the_only_tensor_of_a_structure(pack: Callable[[Tensor], Any]) -> None:
    model = Whole(lambda self, x: self.a(x), a=Whole(lambda self, x: pack(x)))
    x = torch.randn(4, 3)
    with FeatureTaps(model, "a") as taps:
        model(x)
        assert torch.equal(taps.collect()["a"], x)


def test_a_structure_with_more_tensors_names_its_types() -> None:
    model = Whole(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(3, 2, batch_first=True))
    with FeatureTaps(model, "rnn") as taps:
        model(torch.randn(2, 5, 3))
        with pytest.raises(
            CaptureError,
            match=r"'rnn' must hold exactly one tensor, got tuple of \(Tensor, tuple of \(Tensor, Tensor\)\); tap",
        ):
            taps.collect()
    model = Whole(lambda self, x: self.a(x), a=Whole(lambda self, x: {"a": 1}))
    with FeatureTaps(model, "a") as taps:
        model(torch.randn(1))
        with pytest.raises(CaptureError, match=r"dict of \{a: int\}"):
            taps.collect()


# in-place operations


@pytest.mark.parametrize("clone", ["auto", True])
def test_inplace_activations_do_not_show(clone: Any) -> None:
    model = convs(inplace=True)
    with FeatureTaps(model, ["0", "1", "2.0"], clone=clone) as taps:
        for _ in range(3):
            x = images()
            model(x)
            found = taps.collect()
            torch.testing.assert_close(found["0"], torch.nn.functional.conv2d(x, model[0].weight, model[0].bias))
            assert found["0"].min() < 0 <= found["1"].min()
            assert found["2.0"].min() < 0
            torch.autograd.grad(found["0"].square().sum() + found["2.0"].sum(), model[0].weight)


def test_auto_clones_only_what_is_overwritten_after_the_first_forward() -> None:
    kept: list[Tensor] = []
    model = convs(inplace=True)
    model[1].register_forward_hook(lambda module, args, out: kept.append(out))
    model[2][1].register_forward_hook(lambda module, args, out: kept.append(out))
    with FeatureTaps(model, ["0", "2.1"]) as taps:
        shared = []
        for _ in range(2):
            kept.clear()
            model(images())
            found = taps.collect()
            shared.append([found["0"].data_ptr() == kept[0].data_ptr(), found["2.1"].data_ptr() == kept[1].data_ptr()])
    assert shared == [[False, False], [False, True]]


def test_overwriting_through_a_view_is_seen() -> None:
    model = Whole(lambda self, x: self.a(x).flatten(1).relu_(), a=nn.Conv2d(3, 4, 3))
    with FeatureTaps(model, "a") as taps:
        for _ in range(2):
            model(images())
            assert taps.collect()["a"].min() < 0


def test_inplace_dropout_that_acts_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9, inplace=True))
    with FeatureTaps(model, "0") as taps:
        for training in (False, True, True, False):
            model.train(training)
            model(torch.randn(3, 4))
            assert bool((taps.collect()["0"] != 0).all())


def test_overwriting_that_begins_later_is_an_error() -> None:
    model = Whole(lambda self, x: self.a(x).relu_() if self.overwrite else self.a(x).relu(), a=nn.Linear(4, 4))
    model.overwrite = False
    with FeatureTaps(model, "a") as taps:
        model(torch.randn(3, 4))
        taps.collect()
        model.overwrite = True
        model(torch.randn(3, 4))
        with pytest.raises(CaptureError, match=r"'a' was overwritten.*no forward before.*clone=True"):
            taps.collect()
        model(torch.randn(3, 4))
        assert taps.collect()["a"].min() < 0
    with FeatureTaps(model, "a", clone=False) as taps:
        model(torch.randn(3, 4))
        with pytest.raises(CaptureError, match="clone=True"):
            taps.collect()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inplace_without_gradient(mode: Any) -> None:
    model = convs(inplace=True)
    with FeatureTaps(model, "0") as taps, mode():
        for _ in range(2):
            model(images())
            assert taps.collect()["0"].min() < 0


def test_a_real_network_with_inplace_activations() -> None:
    model = timm.create_model("resnet18").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), FeatureTaps(model, ["bn1", "layer1.0.bn1"]) as taps:
        for _ in range(2):
            model(x)
            assert all(feature.min() < 0 for feature in taps.collect().values())


# steps


def test_a_new_forward_drops_the_earlier_one() -> None:
    model = convs()
    with FeatureTaps(model, "0") as taps:
        model(images(2))
        model(images(5))
        assert taps.collect()["0"].shape[0] == 5
        with pytest.raises(CaptureError, match="never fired"):
            taps.collect()
        model(images(2))
        taps.clear()
        with pytest.raises(CaptureError, match="never fired"):
            taps.collect()


def test_a_wrapped_network_begins_a_step_too() -> None:
    model = nn.DataParallel(convs())
    with FeatureTaps(model, "module.2.*") as taps:
        model(images(2))
        model(images(5))
        assert {name: len(feature) for name, feature in taps.collect().items()} == {"2.0": 5, "2.1": 5}


def test_a_part_of_the_network_may_be_called() -> None:
    model = timm.create_model("resnet18").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), FeatureTaps(model, "layer3") as taps:
        for _ in range(2):
            out = model.forward_features(x)
            torch.testing.assert_close(model.layer4(taps.collect()["layer3"]), out)
        model.forward_features(x)
        model.forward_features(x)
        with pytest.raises(CaptureError, match="fired 2 times"):
            taps.collect()
    with torch.no_grad(), FeatureTaps(model, ["layer3", "fc"]) as taps:
        model.forward_features(x)
        with pytest.raises(CaptureError, match="'fc' never fired"):
            taps.collect()


def test_a_shared_module() -> None:
    model = Whole(lambda self, x: self.a(self.a(x)), a=nn.Linear(3, 3))
    x = torch.randn(2, 3)
    first, last = model.a(x), model.a(model.a(x))
    with FeatureTaps(model, "a") as taps:
        model(x)
        with pytest.raises(CaptureError, match=r"'a' fired 2 times.*repeated="):
            taps.collect()
    for repeated, expected in (("first", first), ("last", last)):
        with FeatureTaps(model, "a", repeated=repeated) as taps:  # type: ignore[call-overload]
            model(x)
            torch.testing.assert_close(taps.collect()["a"], expected)
    with FeatureTaps(model, "a", repeated="all") as every:
        model(x)
        torch.testing.assert_close(every.collect()["a"], [first, last])


# gradient checkpointing


def checkpointed(**options: Any) -> Whole:
    def forward(self: Any, x: Tensor) -> Any:
        return self.c(checkpoint(lambda y: self.b(self.a(y).relu_()), x, **options))

    return Whole(forward, **{name: nn.Linear(3, 3) for name in "abc"})


def test_recomputation_in_backward_is_ignored() -> None:
    model, x = checkpointed(use_reentrant=False), torch.randn(2, 3)
    with FeatureTaps(model, ["a", "b"]) as taps:
        for _ in range(2):
            loss = model(x).sum() + taps.features["a"].square().sum()
            before = taps.features
            loss.backward()
            assert all(taps.features[name] is before[name] for name in before)
            taps.collect()
            with pytest.raises(CaptureError, match="never fired"):
                taps.collect()
    plain = model.a(x).square().sum()
    with FeatureTaps(model, "a") as taps:
        model(x)
        gradient = torch.autograd.grad(taps.collect()["a"].square().sum(), model.a.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, model.a.weight))


def test_the_reentrant_kind_is_an_error() -> None:
    model, x = checkpointed(use_reentrant=True), torch.randn(2, 3, requires_grad=True)
    with FeatureTaps(model, "a") as taps:
        model(x)
        with pytest.raises(CaptureError, match="use_reentrant=False"):
            taps.collect()
    with FeatureTaps(model, "c") as taps:  # outside the checkpointed part
        model(x).sum().backward()
        assert taps.collect()["c"].requires_grad


def test_wanted_absence_of_gradient_is_no_error() -> None:
    model, x = checkpointed(use_reentrant=True), torch.randn(2, 3, requires_grad=True)
    with FeatureTaps(model, "a") as taps, torch.no_grad():
        model(x)
        taps.collect()
        model.forward(x)  # the root's hook does not fire
        taps.collect()
    with FeatureTaps(model, "a") as taps:
        with torch.no_grad():
            model(x)
        taps.collect()

    def frozen_trunk(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)

    with FeatureTaps(trunk := Whole(frozen_trunk, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), "a") as taps:
        trunk(x)
        assert not taps.collect()["a"].requires_grad


# torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "how",
    [lambda m, b: torch.compile(m, backend=b, fullgraph=True), lambda m, b: m.compile(backend=b, fullgraph=True) or m],
    ids=["wrapped", "in place"],
)
def test_compiled_in_one_graph(how: Callable[[nn.Module, str], nn.Module], backend: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = convs(inplace=True)
    compiled = how(model, backend)
    with FeatureTaps(compiled, ["0", "2.0", "2"], at={"2": "input"}) as taps:
        graphs = []
        for _ in range(3):
            x = images()
            compiled(x)
            found = taps.collect()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            expected = torch.nn.functional.conv2d(x, model[0].weight, model[0].bias)
            torch.testing.assert_close(found["0"], expected)
            torch.testing.assert_close(found["2"], expected.relu())
            assert found["2.0"].min() < 0
            torch.autograd.grad(found["0"].square().sum(), model[0].weight)
        assert graphs[0] == graphs[-1]  # captures of earlier steps cause no recompilation
        # Torch 2.8 compiles the hooks separately if the model is compiled in place.
        separate_hooks = compiled is model and torch.__version__.startswith("2.8.")
        assert separate_hooks or graphs[0] == 1
    compiled(x)
    assert all(not slot.captures for slot in taps._slots.values())  # the compiled code does not go on capturing


def test_a_compiled_block_inside() -> None:
    torch.compiler.reset()
    model = convs()
    model[2] = torch.compile(model[2], backend="eager", fullgraph=True)
    with FeatureTaps(model, "**") as taps:
        for n in (2, 2, 3):
            model(images(n))
            assert {name: len(feature) for name, feature in taps.collect().items()} == dict.fromkeys(
                ["0", "1", "2", "2.0", "2.1"], n
            )


def test_attached_after_the_first_compiled_call() -> None:
    torch.compiler.reset()
    compiled = torch.compile(convs(), backend="eager")
    compiled(images())
    with FeatureTaps(compiled, "0") as taps:
        compiled(images())
        with pytest.raises(
            CaptureError,
            match=r"never fired.*attach the taps before the first compiled call, or call torch.compiler.reset\(\)",
        ):
            taps.collect()
        torch.compiler.reset()
        compiled(images(3))
        assert taps.collect()["0"].shape == (3, 4, 6, 6)


def test_attached_after_the_first_call_of_a_module_compiled_in_place() -> None:
    torch.compiler.reset()
    model, x = convs(), images()
    model.compile(backend="eager")
    model(x)
    with FeatureTaps(model, ["0", "2.0"]) as taps:
        model(x)
        try:
            found = taps.collect()  # recent torch compiles anew when the root gets a hook
        except CaptureError as error:
            assert "before the first compiled call" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(found["0"], model[0](x))
            torch.testing.assert_close(found["2.0"], model[2][0](model[0](x).relu()))


# nothing stays behind


def test_every_hook_is_gone_after_the_context_also_after_an_error() -> None:
    def fail(self: Any, x: Tensor) -> Any:
        self.a(x)
        raise ZeroDivisionError

    def use(taps: FeatureTaps[Tensor], model: nn.Module) -> None:
        with taps:
            assert hooks(model) == 3
            model(torch.randn(2, 3))
            assert taps.features["a"].shape == (2, 3)
            raise ZeroDivisionError

    for model in (Whole(fail, a=nn.Linear(3, 3)), Whole(lambda self, x: self.a(x), a=nn.Linear(3, 3))):
        model.a.register_forward_hook(lambda *args: None)
        taps = FeatureTaps(model, "a")
        assert hooks(model) == 1
        for _ in range(2):  # can be entered again
            with pytest.raises(ZeroDivisionError):
                use(taps, model)
            assert hooks(model) == 1
            assert not any(slot.captures for slot in taps._slots.values())


def test_attached_and_detached_by_hand() -> None:
    model = convs()
    taps = FeatureTaps(model, "0").attach()
    with pytest.raises(CaptureError, match="attached already"):
        taps.attach()
    model(images())
    taps.collect()
    taps.detach()
    taps.detach()
    assert hooks(model) == 0
    with pytest.raises(CaptureError, match="not attached"):
        taps.collect()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_network_carries_no_taps(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = convs()
    with FeatureTaps(model, "0") as taps:
        model(images(2))
        twin = duplicate(model)
        twin(images(5))
        assert len(taps.collect()["0"]) == 2
        assert b"knowiso" not in pickle.dumps(model)  # what is saved loads without the library


# options


def test_options_without_meaning() -> None:
    model = convs()
    with pytest.raises(OptionError, match="repeated"):
        FeatureTaps(model, "0", repeated="sum")  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="clone"):
        FeatureTaps(model, "0", clone="never")  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="at must be"):
        FeatureTaps(model, "0", at="inside")  # type: ignore[call-overload]
    with pytest.raises(LayerNameError, match="not tapped"):
        FeatureTaps(model, "0", at={"2": "input"})
    with pytest.raises(LayerNameError):
        FeatureTaps(model, "9")


def test_record_outputs_keeps_every_call_in_order_of_completion() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    layers = {"unused": nn.ReLU(), "block": model[0], "shared": shared}
    with record_outputs(layers) as outputs:
        result = model(torch.ones(2, 3))
    assert list(outputs) == ["shared", "block"]
    assert len(outputs["shared"]) == 2
    assert outputs["shared"][1] is result


def test_record_outputs_removes_its_hooks_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError), record_outputs(dict(model.named_children())) as outputs:
        model(torch.ones(2, 3))
    assert list(outputs) == ["0"]
    assert not any(layer._forward_hooks for layer in model)
