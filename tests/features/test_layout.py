"""Every layer of real networks comes out as (N, C, H, W), at square and oblong input sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from knowiso_train.errors import LayerNameError, LayoutError, ShapeError
from knowiso_train.features import Extractor, FeatureSpec, FeatureTaps, describe_feature, infer_layout, to_nchw


@cache
def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def described(
    model: nn.Module, size: tuple[int, int], layers: list[str], *, tell: bool = True
) -> dict[str, FeatureSpec]:
    with torch.no_grad(), FeatureTaps(model, layers) as taps:
        model(torch.randn(1, 3, *size))
        found = taps.collect()
    return {
        name: describe_feature(name, model, tensor, input_size=size if tell else None) for name, tensor in found.items()
    }


# shapes and layouts by hand


def test_to_nchw_puts_every_value_in_its_place() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tokens = x.flatten(2).transpose(1, 2)
    prefixed = torch.cat([torch.full((2, 2, 3), -1.0), tokens], dim=1)
    assert to_nchw(x, "nchw") is x
    assert torch.equal(to_nchw(x.permute(0, 2, 3, 1), "nhwc"), x)
    assert torch.equal(to_nchw(tokens, "nlc", grid=(4, 5)), x)
    assert torch.equal(to_nchw(x.flatten(2), "ncl", grid=(4, 5)), x)
    assert torch.equal(to_nchw(prefixed, "nlc", prefix_tokens=2, grid=(4, 5)), x)
    assert torch.equal(to_nchw(prefixed, "nlc", prefix_tokens=2), x.flatten(2)[..., None])
    assert torch.equal(to_nchw(x[:, :, 0, 0], "nc"), x[:, :, :1, :1])


def test_to_nchw_refuses_what_does_not_fit() -> None:
    with pytest.raises(LayoutError, match=r"'nhwc' needs 4 axes.*\(2, 3\)"):
        to_nchw(torch.zeros(2, 3), "nhwc")
    with pytest.raises(LayoutError, match="must be one of"):
        to_nchw(torch.zeros(2, 3), "cn")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="1 prefix tokens and 4 × 4 patches"):
        to_nchw(torch.zeros(2, 16, 3), "nlc", prefix_tokens=1, grid=(4, 4))
    with pytest.raises(ShapeError):
        to_nchw(torch.zeros(2, 3, 8), "nlc", prefix_tokens=3)


def test_a_spec_checks_what_it_converts() -> None:
    spec = FeatureSpec("nhwc", 8, (4, 5))
    assert spec.to_nchw(torch.zeros(2, 4, 5, 8)).shape == (2, 8, 4, 5)
    for shape in ((2, 4, 5, 7), (2, 5, 4, 8)):
        with pytest.raises(ShapeError, match="expected 8 channels"):
            spec.to_nchw(torch.zeros(shape))


# real networks, square (64) and oblong inputs, with and without being told the input size


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_every_layer_of_a_convolutional_network(name: str, size: tuple[int, int], tell: bool) -> None:
    model = network(name)
    layers = [
        key
        for key, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Sequential)) and key
    ]
    specs = described(model, size, layers, tell=tell)
    assert len(specs) > 30
    assert {spec.layout for spec in specs.values()} == {"nchw"}
    stem = "conv1" if name == "resnet18" else "conv_stem"
    assert specs[stem].grid == (size[0] // 2, size[1] // 2)


def test_activations_take_the_word_of_the_block_around_them() -> None:
    model = network("resnet18")
    assert described(model, (64, 96), ["layer1.0.act2", "maxpool"])["layer1.0.act2"] == FeatureSpec(
        "nchw", 64, (16, 24)
    )
    assert infer_layout("maxpool", model.maxpool, torch.zeros(1, 64, 16, 24), model) == "nchw"


def test_activations_in_a_network_of_convolutions_and_linear_layers_take_the_word_of_their_neighbors() -> None:
    # Act1 lies directly under the root: bn1 comes before it, layer1's convolution after it
    model = network("resnet18")
    for shape in ((1, 64, 32, 48), (1, 64, 64, 64)):
        assert infer_layout("act1", model.act1, torch.zeros(shape), model) == "nchw"
    # Other channels than bn1 gives: it is not what comes before
    with pytest.raises(LayoutError, match="neither"):
        infer_layout("act1", model.act1, torch.zeros(1, 12, 12, 12), model)
    mixed = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Sequential(nn.Conv2d(4, 4, 1)))
    late = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "act": nn.ReLU(), "fc": nn.Linear(4, 2), "last": nn.ReLU()})
    with pytest.raises(LayoutError, match="neither"):  # a convolution before it, a linear layer after it
        infer_layout("act", late["act"], torch.zeros(1, 4, 4, 4), late)
    with pytest.raises(LayoutError, match="neither"):  # nothing after it
        infer_layout("last", late["last"], torch.zeros(1, 2, 2, 2), late)
    assert infer_layout("0.0", mixed[0][0], torch.zeros(1, 4, 4, 4), mixed) == "nhwc"


def test_one_position_in_a_head_of_linear_layers() -> None:
    head = nn.Sequential(nn.Identity(), nn.Linear(8, 2))
    assert describe_feature("0", nn.Sequential(head)[0], torch.zeros(1, 8, 1, 1)) == FeatureSpec("nchw", 8, (1, 1))


def test_vectors() -> None:
    assert described(network("resnet18"), (64, 64), ["global_pool", "fc"]) == {
        "global_pool": FeatureSpec("nc", 512),
        "fc": FeatureSpec("nc", 1000),
    }


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (32, 80)])
def test_convnext_is_nhwc_only_inside_its_blocks(size: tuple[int, int], tell: bool) -> None:
    model = network("convnext_atto", conv_mlp=False)
    inner = [
        "stages.0.blocks.0.norm",
        "stages.0.blocks.0.mlp",
        "stages.0.blocks.0.mlp.fc1",
        "stages.0.blocks.0.mlp.act",
    ]
    outer = [
        "stem",
        "stem.1",
        "stages.0",
        "stages.0.blocks.0",
        "stages.0.blocks.0.conv_dw",
        "stages.1.downsample",
        "stages.1.downsample.0",
        "stages.1",
    ]
    specs = described(model, size, inner + outer, tell=tell)
    assert {name: spec.layout for name, spec in specs.items()} == {
        **dict.fromkeys(inner, "nhwc"),
        **dict.fromkeys(outer, "nchw"),
    }
    assert all(spec.grid == (size[0] // 4, size[1] // 4) for name, spec in specs.items() if "stages.1" not in name)
    assert specs["stages.1"] == FeatureSpec("nchw", 80, (size[0] // 8, size[1] // 8))


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("size", [(56, 56), (56, 112)])
def test_swin_is_nhwc(size: tuple[int, int], tell: bool) -> None:
    model = network("swin_tiny_patch4_window7_224", img_size=size)
    layers = [
        "patch_embed",
        "patch_embed.norm",
        "layers.0",
        "layers.0.blocks.1",
        "layers.0.blocks.1.norm1",
        "layers.0.blocks.1.drop_path1",
    ]
    specs = described(model, size, [*layers, "layers.1.downsample", "layers.1", "layers.3", "norm"], tell=tell)
    assert {spec.layout for spec in specs.values()} == {"nhwc"}
    assert specs["layers.0"] == FeatureSpec("nhwc", 96, (size[0] // 4, size[1] // 4))
    assert specs["layers.1"] == FeatureSpec("nhwc", 192, (size[0] // 8, size[1] // 8))
    inner = described(
        model, size, ["patch_embed.proj", "layers.0.blocks.0.mlp", "layers.1.blocks.0.mlp.act"], tell=tell
    )
    assert inner["patch_embed.proj"].layout == "nchw"
    # Timm flattens the grid around the MLP
    assert inner["layers.0.blocks.0.mlp"] == FeatureSpec("nlc", 96, (size[0] // 4, size[1] // 4))
    assert inner["layers.1.blocks.0.mlp.act"] == FeatureSpec("nlc", 768, (size[0] // 8, size[1] // 8))


def test_convnext_with_convolutions_for_its_mlp_is_nchw_throughout() -> None:
    model = network("convnext_atto")
    layers = [
        "stem",
        "stages.0.blocks.0.norm",
        "stages.0.blocks.0.mlp",
        "stages.0.blocks.0.mlp.act",
        "stages.0.blocks.0",
        "stages.3",
    ]
    for size in ((64, 64), (64, 96)):
        assert {spec.layout for spec in described(model, size, layers).values()} == {"nchw"}


def test_swin_where_all_axes_are_equal() -> None:
    model = network("swin_tiny_patch4_window7_224", img_size=(56, 56))
    assert infer_layout("layers.0", model.layers[0], torch.zeros(1, 96, 96, 96), model) == "nhwc"
    # at a width that equals the channels the shape is as for NCHW: an error, not a guess
    with pytest.raises(LayoutError, match=r"'layers.0'.*\(1, 64, 96, 96\) implies 'nchw', its modules imply 'nhwc'"):
        infer_layout("layers.0", model.layers[0], torch.zeros(1, 64, 96, 96), model)
    assert infer_layout("layers.0", model.layers[0], torch.zeros(1, 64, 96, 96), model, input_size=(256, 384)) == "nhwc"


def test_neither_decides() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Conv2d(2, 2, 1))
    with pytest.raises(LayoutError, match=r"'0': neither its shape \(1, 4, 6, 8\).*layout="):
        describe_feature("0", model, torch.zeros(1, 4, 6, 8))
    assert describe_feature("0", model, torch.zeros(1, 4, 6, 8), "nhwc") == FeatureSpec("nhwc", 8, (4, 6))
    convnext = network("convnext_atto", conv_mlp=False)
    # 40 channels on a 40 × 40 grid, in a block that holds both kinds of module
    with pytest.raises(LayoutError, match="neither"):
        infer_layout("stages.0.blocks.0", convnext.stages[0].blocks[0], torch.zeros(1, 40, 40, 40), convnext)


def test_the_input_of_a_layer() -> None:
    model = network("convnext_atto", conv_mlp=False)
    x = torch.zeros(1, 16, 24, 160)
    assert describe_feature("stages.0.blocks.0.mlp.fc2", model, x, at="input") == FeatureSpec("nhwc", 160, (16, 24))
    assert describe_feature("stages.1.downsample", model, torch.zeros(1, 40, 16, 24), at="input") == FeatureSpec(
        "nchw", 40, (16, 24)
    )


@pytest.mark.parametrize(
    ("name", "options", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, 1, (4, 4)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}, 1, (4, 6)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 2, (4, 4)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}, 5, (4, 4)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42, "depth": 2}, 5, (3, 3)),
    ],
)
def test_tokens(name: str, options: dict[str, Any], prefix: int, grid: tuple[int, int]) -> None:
    model = network(name, **options)
    width = model.embed_dim
    image = model.patch_embed.img_size
    layers = ["blocks.1", "blocks.0.attn", "blocks.0.norm1", "blocks.0.mlp.fc1", "norm"]
    specs = described(model, image, layers, tell=False)
    assert specs.pop("blocks.0.mlp.fc1") == FeatureSpec("nlc", 4 * width, grid, prefix)
    assert set(specs.values()) == {FeatureSpec("nlc", width, grid, prefix)}
    assert described(model, image, ["patch_embed"])["patch_embed"] == FeatureSpec("nlc", width, grid)
    x = torch.arange(prefix + grid[0] * grid[1]).view(1, -1, 1).expand(1, -1, width)
    assert specs["norm"].to_nchw(x)[0, 0].flatten().tolist() == list(range(prefix, prefix + grid[0] * grid[1]))


def test_tokens_at_a_size_that_changes() -> None:
    model = network("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    found = described(model, (96, 64), ["blocks.0", "patch_embed"])
    assert found == {"blocks.0": FeatureSpec("nlc", 192, (6, 4), 1), "patch_embed": FeatureSpec("nhwc", 192, (6, 4))}
    # 6 × 4 patches and a class token are 25 tokens, which are no 5 × 5 grid
    assert describe_feature("blocks.0", model, torch.zeros(1, 25, 192)) == FeatureSpec("nlc", 192, None, 1)
    assert describe_feature("blocks.0", model, torch.zeros(1, 26, 192)) == FeatureSpec("nlc", 192, (5, 5), 1)


def test_pooled_tokens_and_tokens_without_a_grid() -> None:
    model = network("vit_tiny_patch16_224", img_size=64)
    assert describe_feature("blocks.0", model, torch.zeros(1, 5, 192)) == FeatureSpec("nlc", 192, (2, 2), 1)
    assert describe_feature("blocks.0", model, torch.zeros(1, 4, 192)) == FeatureSpec("nlc", 192, (2, 2), 0)
    assert describe_feature("blocks.0", model, torch.zeros(1, 14, 192)) == FeatureSpec("nlc", 192, None, 0)
    plain = nn.Sequential(nn.Linear(8, 8))
    assert describe_feature("0", plain, torch.zeros(1, 9, 8)) == FeatureSpec("nlc", 8, (3, 3), 0)
    assert describe_feature("0", plain, torch.zeros(1, 7, 8)).to_nchw(torch.zeros(2, 7, 8)).shape == (2, 8, 7, 1)


def test_tokens_before_the_prefix_is_added() -> None:
    dynamic = network("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    assert describe_feature("patch_embed.norm", dynamic, torch.zeros(1, 25, 192)) == FeatureSpec("nlc", 192, (5, 5), 0)
    dinov2 = network(
        "vit_small_patch14_reg4_dinov2", img_size=42, depth=2
    )  # 9 tokens are the 3 × 3 grid, rather than 5 prefix tokens and a pooled 2 × 2
    assert describe_feature("patch_drop", dinov2, torch.zeros(1, 9, 384)) == FeatureSpec("nlc", 384, (3, 3), 0)
    assert describe_feature("blocks.0", dinov2, torch.zeros(1, 6, 384)) == FeatureSpec("nlc", 384, (1, 1), 5)


def test_a_block_that_permutes_back() -> None:
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model = nn.Sequential(block)
    assert infer_layout("0", block, torch.zeros(1, 8, 5, 5), model) == "nchw"
    assert infer_layout("0", block, torch.zeros(1, 8, 5, 7), model, input_size=(50, 70)) == "nchw"
    with pytest.raises(LayoutError, match="neither"):
        infer_layout("0", block, torch.zeros(1, 8, 5, 7), model)


def test_a_class_token_of_a_network_that_is_not_timms() -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.encoder = nn.Linear(8, 8)

    assert describe_feature("encoder", Vit(), torch.zeros(1, 17, 8)) == FeatureSpec("nlc", 8, (4, 4), 1)
    assert describe_feature("student.encoder", nn.ModuleDict({"student": Vit()}), torch.zeros(1, 17, 8)) == FeatureSpec(
        "nlc", 8, (4, 4), 1
    )


def test_channels_first_sequences() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU()))
    assert describe_feature("0", model, torch.zeros(1, 8, 16)) == FeatureSpec("ncl", 8, (4, 4))
    assert describe_feature("1", model, torch.zeros(1, 8, 16)).layout == "ncl"


def test_what_is_no_feature() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for shape in ((3,), (1, 2, 3, 4, 5)):
        with pytest.raises(LayoutError, match="expected 2 axes"):
            describe_feature("0", model, torch.zeros(shape))
    with pytest.raises(LayoutError, match="'nchw' needs 4 axes, but layer '0'"):
        describe_feature("0", model, torch.zeros(1, 2, 3), "nchw")
    with pytest.raises(LayerNameError):
        describe_feature("9", model, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("name", "options"),
    [("swin_tiny_patch4_window7_224", {"img_size": (56, 56)}), ("vit_tiny_patch16_224", {"img_size": 64})],
)
def test_extracted_features_have_channels_on_axis_1(name: str, options: dict[str, Any]) -> None:
    model = network(name, **options)
    layer = "layers.1" if "swin" in name else "blocks.3"
    x: Tensor = torch.randn(2, 3, *model.patch_embed.img_size)
    with Extractor(model, layer) as extractor, torch.no_grad(), FeatureTaps(model, layer) as taps:
        feature = extractor.run(x)[layer]
        raw = taps.collect()[layer]
    assert feature.shape == ((2, 192, 7, 7) if "swin" in name else (2, 192, 4, 4))
    expected = raw[1, 2, 3] if "swin" in name else raw[1, 1 + 2 * 4 + 3]
    torch.testing.assert_close(feature[1, :, 2, 3], expected)
