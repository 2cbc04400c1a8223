"""Networks run with another feature in the place of a layer's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, LayerNameError, OptionError, ShapeError
from knowiso_train.features import Extractor, preserve_state
from knowiso_train.features.substitution import Substitution


class Residual(nn.Module):
    """Block whose second activation overwrites the sum, which an in-place addition makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv2(self.act(self.conv1(x))))
        out += x
        return self.act(out)


class Network(nn.Module):
    """Stem, blocks and head, with a functional step between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Residual(6), Residual(6), Residual(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(self.blocks(x).mean((2, 3)))


class Wrapped(Network):
    """Network that returns a dict."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "loss": None}


class Hidden(Network):
    """Network with an effect that no module shows: the stem passes a value through an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stateful()

    def forward(self, x: Tensor) -> Tensor:
        self.stem.total = torch.zeros(())
        return super().forward(x) + self.stem.total


class Stateful(nn.Module):
    """Convolution that stores a sum of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        self.total = self.total + out.sum()
        return out


class Noisy(Network):
    """Network with random numbers in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


LAYERS = ["stem", "blocks.0", "blocks.1.conv1", "blocks.1.norm", "blocks", "head"]


def substituted(model: nn.Module, layers: list[str], **options: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the output of each of three batches, and by layer the output with 1 added to its feature."""
    results = []
    with preserve_state(model), Extractor(model, layers, **options) as extractor:
        substitution = Substitution(extractor)
        for count in (2, 4, 3):
            features = substitution.run(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)))
            changed = {name: substitution.replace(name, features[name] + 1) for name in layers}
            results.append((substitution.output, changed))
    return results


def by_hooks(model: nn.Module, layers: list[str]) -> list[tuple[Any, dict[str, Any]]]:
    """Compute the same in complete forward passes."""
    results = []
    with preserve_state(model), torch.no_grad():
        for count in (2, 4, 3):
            x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
            changed = {}
            output = model(x)
            for name in layers:
                handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: out + 1)
                changed[name] = model(x)
                handle.remove()
            results.append((output, changed))
    return results


@pytest.mark.parametrize("kind", [Network, Wrapped, Hidden])
def test_outputs_equal_complete_forward_passes(kind: type[Network]) -> None:
    model = kind()
    for found, expected in zip(substituted(model, LAYERS), by_hooks(model, LAYERS), strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_only_the_layers_after_the_replaced_one_run() -> None:
    model = Network().eval()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        if isinstance(module, nn.Conv2d):
            module.forward = counted(module, name, calls)  # type: ignore[method-assign]
    with Extractor(model, ["blocks.1.norm", "blocks.0"]) as extractor:
        substitution = Substitution(extractor)
        for _ in range(2):
            features = substitution.run(torch.randn(2, 3, 8, 8))
            for layer in ("blocks.0", "blocks.1.norm", "blocks.1.norm"):  # the first replacement also tries the own
                calls.clear()
                substitution.replace(layer, features[layer])
            computed = [name for name in calls if name.startswith("computed ")]
            assert computed == ["computed blocks.2.conv1", "computed blocks.2.conv2"]


def counted(module: nn.Module, name: str, calls: list[str]) -> Any:
    forward = module.forward

    def call(x: Tensor) -> Any:
        calls.append(f"computed {name}")
        return forward(x)

    return call


def test_a_module_with_hidden_effects_is_computed_again() -> None:
    model = Hidden().eval()
    with Extractor(model, "blocks.0") as extractor:
        substitution = Substitution(extractor)
        features = substitution.run(torch.randn(2, 3, 8, 8))
        torch.testing.assert_close(substitution.replace("blocks.0", features["blocks.0"]), substitution.output)
        assert substitution._replayable == {"blocks.0": False}


def test_random_outputs_are_refused() -> None:
    with Extractor(Noisy().eval(), "blocks.0", name="target") as extractor:
        substitution = Substitution(extractor)
        features = substitution.run(torch.randn(2, 3, 8, 8))
        with pytest.raises(CaptureError, match=r"target: the output changes although .* 'blocks.0' is put back"):
            substitution.replace("blocks.0", features["blocks.0"])


def test_state_is_as_before() -> None:
    model = Network()
    model.blocks[0].act.register_forward_hook(lambda module, args, out: 2 * out)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    substituted(model, LAYERS)
    with preserve_state(model), Extractor(model, LAYERS) as extractor:
        substitution = Substitution(extractor)
        features = substitution.run(torch.randn(2, 3, 8, 8))
        with pytest.raises(ShapeError, match=r"expected a feature of shape \(2, 6, 8, 8\) .* got \(2, 6, 4, 8\)"):
            substitution.replace("stem", features["stem"][:, :, ::2])
    assert model.training
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_hooks_of_the_user_are_applied_once() -> None:
    model = Network()
    model.blocks[0].register_forward_hook(lambda module, args, out: 3 * out)
    model.stem.register_forward_hook(lambda module, args, out: out * out)
    for found, expected in zip(substituted(model, LAYERS), by_hooks(model, LAYERS), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Shared(nn.Module):
    """One layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, changed: int | None = None) -> Tensor:
        for call in range(3):
            x = torch.tanh(self.layer(x)) if call != changed else torch.tanh(self.layer(x) + 1)
        return self.head(x)


@pytest.mark.parametrize(("repeated", "call"), [("first", 0), ("last", 2)])
def test_one_call_of_a_repeated_layer(repeated: str, call: int) -> None:
    model, x = Shared(), torch.randn(4, 5)
    with Extractor(model, "layer", repeated=repeated) as extractor:
        substitution = Substitution(extractor)
        for _ in range(2):
            feature = substitution.run(x)["layer"]
            torch.testing.assert_close(substitution.replace("layer", feature + 1), model(x, call), rtol=0, atol=0)


def test_input_of_a_layer() -> None:
    model, x = Network().eval(), torch.randn(2, 3, 8, 8)
    with Extractor(model, ["blocks.1.norm", "blocks"], at="input") as extractor:
        substitution = Substitution(extractor)
        for _ in range(2):
            features = substitution.run(x)
            for name in features:
                layer = model.get_submodule("blocks.0" if name == "blocks" else name)
                handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
                expected = model(x)
                handle.remove()
                torch.testing.assert_close(substitution.replace(name, features[name] + 1), expected, rtol=0, atol=0)


def test_tokens_keep_their_prefix() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, reg_tokens=2).eval()
    x = torch.randn(3, 3, 32, 32)
    with Extractor(model, ["blocks.3", "blocks.6.norm1"]) as extractor:
        substitution = Substitution(extractor)
        for _ in range(2):
            features = substitution.run(x)
            for name, feature in features.items():
                assert feature.shape == (3, 192, 2, 2)
                handle = model.get_submodule(name).register_forward_hook(
                    lambda module, args, out: torch.cat([out[:, :3], -out[:, 3:]], 1)
                )
                expected = model(x)
                handle.remove()
                torch.testing.assert_close(substitution.replace(name, -feature), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer2.0.downsample"),
        ("efficientnet_b0", "blocks.2.0.bn2"),
        ("convnext_atto", "stages.1"),
        ("swin_tiny_patch4_window7_224", "layers.1"),
        ("mobilenetv3_small_100", "blocks.2"),
    ],
)
def test_timm_networks_are_replayed(name: str, layer: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **({"img_size": 64, "window_size": 2} if "swin" in name else {}))
    x = torch.randn(2, 3, 64, 64)
    with preserve_state(model), Extractor(model, layer) as extractor:
        substitution = Substitution(extractor)
        for _ in range(2):
            features = substitution.run(x)
            output = substitution.replace(layer, features[layer])
            torch.testing.assert_close(output, substitution.output)
            swapped = substitution.replace(layer, features[layer].flip(0))
            assert not torch.equal(swapped, output)
        assert substitution._replayable[layer]


class Pair(nn.Module):
    """Layer that returns a tuple, as the blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x)[0])


def test_tuples_with_one_tensor() -> None:
    model, x = Tuples(), torch.randn(3, 5)
    with Extractor(model, "pair") as extractor:
        substitution = Substitution(extractor)
        feature = substitution.run(x)["pair"]
        expected = model.head(2 * model.pair.layer(x))
        torch.testing.assert_close(substitution.replace("pair", 2 * feature), expected, rtol=0, atol=0)


def test_wrapped_and_compiled_networks() -> None:
    model, x = Network().eval(), torch.randn(2, 3, 8, 8)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        wrapped(x)
        with Extractor(wrapped, "blocks.0") as extractor:
            substitution = Substitution(extractor)
            features = substitution.run(x)
            torch.testing.assert_close(substitution.output, model(x))
            assert not torch.equal(substitution.replace("blocks.0", features["blocks.0"] + 1), substitution.output)


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def test_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network().eval()
    with Extractor(model, "stem") as extractor:
        substitution = Substitution(extractor)
        with pytest.raises(CaptureError, match="call run\\(\\) first"):
            substitution.replace("stem", torch.zeros(1))
        substitution.run(torch.randn(2, 3, 8, 8))
        with pytest.raises(LayerNameError, match="'head' is not hooked"):
            substitution.replace("head", torch.zeros(1))
    from torch.distributed.fsdp import fully_sharded_data_parallel

    monkeypatch.setattr(fully_sharded_data_parallel, "FullyShardedDataParallel", FullyShardedDataParallel)
    sharded: Any = FullyShardedDataParallel(model)
    with pytest.raises(OptionError, match="divided between processes"):
        Substitution(Extractor(sharded, "stem", name="target"))
