"""Names are those of the bare network; what matches nothing says what is near."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from knowiso_train.errors import InputTypeError, LayerNameError
from knowiso_train.features import LayerPair, named_layers, pair_layers, resolve_layers, unwrap_model
from knowiso_train.features.calls import call_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv1(x))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.layer1 = nn.Sequential(*(Block() for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(self.conv1(x)))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrappers_come_off_in_any_nesting() -> None:
    net = Net()
    ddp = nn.parallel.DistributedDataParallel(torch.compile(net))
    assert unwrap_model(net) is net
    for wrapped in (ddp, torch.compile(ddp), nn.DataParallel(net), nn.DataParallel(torch.compile(net))):
        assert unwrap_model(wrapped) is net
        assert named_layers(wrapped) == named_layers(net)


@pytest.mark.usefixtures("process_group")
def test_fsdp_comes_off_also_inside() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    net = Net()
    names = list(named_layers(net))
    net.layer1 = Fsdp(net.layer1, device_id=torch.device("cpu"))
    wrapped = Fsdp(net, device_id=torch.device("cpu"))
    assert unwrap_model(wrapped) is net
    assert list(named_layers(wrapped)) == names


def test_activation_checkpoint_wrapper_comes_off() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = Net()
    names = list(named_layers(net))
    net.layer1 = checkpoint_wrapper(net.layer1)
    assert list(named_layers(net)) == names


def test_a_compiled_block_leaves_no_trace_in_names() -> None:
    net = Net()
    names, block = list(named_layers(net)), net.layer1[0]
    net.layer1[0] = torch.compile(block)
    layers = named_layers(net)
    assert list(layers) == names
    assert layers["layer1.0"] is block
    assert any("_orig_mod" in name for name, _ in net.named_modules())


def test_an_attribute_that_is_called_module_is_no_wrapper() -> None:
    net = nn.Module()
    net.module = nn.Module()
    net.module.layer1 = nn.Linear(2, 2)
    assert unwrap_model(net) is net
    assert list(named_layers(net)) == ["module", "module.layer1"]
    assert resolve_layers(nn.DataParallel(net), "module.layer1") == ["module.layer1"]
    assert resolve_layers(nn.DataParallel(net), "module.module.layer1") == ["module.layer1"]
    net.layer1 = nn.Linear(2, 2)
    # Bare names come first
    assert resolve_layers(nn.DataParallel(net), ["module.layer1", "layer1"]) == ["module.layer1", "layer1"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_named(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputTypeError, match=f"images of {name} .*Convert the images to float32"):
        call_model(net, torch.zeros(1, 3, 2, 2, dtype=dtype))


def test_other_errors_of_a_network_are_unchanged() -> None:
    class Full(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        call_model(Full(2, 2), torch.zeros(1, 2, dtype=torch.uint8))
    tokens = nn.Sequential(nn.Embedding(4, 3), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        call_model(tokens, torch.zeros(1, 2, dtype=torch.int64))


def test_a_shared_module_has_both_names() -> None:
    net = nn.Module()
    net.a = net.b = nn.Linear(2, 2)
    assert list(named_layers(net)) == ["a", "b"]
    assert resolve_layers(net, "b") == ["b"]


def test_names_equal_those_of_torch_on_a_real_network() -> None:
    net = timm.create_model("resnet18")
    assert list(named_layers(net)) == [name for name, _ in net.named_modules() if name]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1", ["layer1"]),
        ("layer*", ["layer1", "layer2"]),
        ("layer?", ["layer1", "layer2"]),
        ("layer[2-9]", ["layer2"]),
        ("layer[!2]", ["layer1"]),
        ("layer*.*", ["layer1.0", "layer1.1", "layer2.0"]),
        ("*.0.act", ["layer1.0.act", "layer2.0.act"]),
        ("**.conv1", ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]),
        ("layer1.**", ["layer1.0", "layer1.0.conv1", "layer1.0.act", "layer1.1", "layer1.1.conv1", "layer1.1.act"]),
        ("layer1.**.act", ["layer1.0.act", "layer1.1.act"]),
        (["layer2", "conv1", "layer*"], ["layer2", "conv1", "layer1"]),
    ],
)
def test_globs(pattern: str | list[str], expected: list[str]) -> None:
    assert resolve_layers(Net(), pattern) == expected


def test_names_with_the_wrappers_prefix_are_understood() -> None:
    wrapped = nn.DataParallel(torch.compile(Net()))
    assert resolve_layers(wrapped, "module._orig_mod.layer1") == ["layer1"]
    assert resolve_layers(wrapped, "module._orig_mod.layer*") == ["layer1", "layer2"]
    assert resolve_layers(wrapped, "layer1") == ["layer1"]
    with pytest.raises(LayerNameError):
        resolve_layers(Net(), "module.layer1")


def test_no_match_names_the_nearest() -> None:
    with pytest.raises(LayerNameError, match=r"'layer3'.*nearest: .*'layer2'"):
        resolve_layers(Net(), "layer3")
    # Nothing alike, but the same last segment
    with pytest.raises(LayerNameError, match=r"nearest: .*'layer1.0.act'"):
        resolve_layers(Net(), "encoder.stages.12.act")
    with pytest.raises(LayerNameError, match="its layers begin with 'conv1'"):
        resolve_layers(Net(), "zzz")
    with pytest.raises(LayerNameError, match="layer9"):  # each pattern must match, not only one of them
        resolve_layers(Net(), ["layer1", "layer9.*"])
    with pytest.raises(LayerNameError, match="empty"):
        resolve_layers(Net(), [])
    with pytest.raises(LayerNameError, match="not a valid layer pattern"):
        resolve_layers(Net(), "layer[9-1]")
    with pytest.raises(InputTypeError, match="int"):
        resolve_layers(Net(), [1])  # type: ignore[list-item]
    with pytest.raises(InputTypeError, match="Module"):
        unwrap_model("resnet18")  # type: ignore[arg-type]


def test_pairs_by_the_same_name() -> None:
    assert pair_layers(Net(), Net(), "layer*") == [LayerPair("layer1", "layer1"), LayerPair("layer2", "layer2")]
    assert pair_layers(Net(), Net(), ["layer2", "conv1", "layer2"]) == [
        LayerPair("layer2", "layer2"),
        LayerPair("conv1", "conv1"),
    ]
    with pytest.raises(LayerNameError, match=r"only in the target \(Net\) \['layer1.2'\]"):
        pair_layers(Net(2), Net(3), "layer1.*")


def test_pairs_by_two_names_or_globs() -> None:
    expected = [LayerPair("layer1.0", "layer1.1"), LayerPair("layer1.1", "layer1.2")]
    assert (
        pair_layers(Net(2), Net(3), [("layer1.0", "layer1.1"), ("layer1.1", "layer1.2"), ("layer1.0", "layer1.1")])
        == expected
    )
    assert pair_layers(Net(2), Net(3), {"layer1.*": "layer1.[12]"}) == expected
    with pytest.raises(LayerNameError, match=r"2 layer\(s\) of the source .*3 of the target"):
        pair_layers(Net(2), Net(3), {"layer1.*": "layer1.*"})
    with pytest.raises(LayerNameError):
        pair_layers(Net(), Net(), {})
    with pytest.raises(InputTypeError, match="all"):
        pair_layers(Net(), Net(), ["layer1", ("layer1", "layer2")])  # type: ignore[list-item]
    with pytest.raises(
        InputTypeError, match="layers must be a string, a list or tuple or a mapping from a string, got 3"
    ):
        pair_layers(Net(), Net(), 3)  # type: ignore[arg-type]
