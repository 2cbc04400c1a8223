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
    assert torch.equal(to_nchw(prefixed, "nlc", prefix_tokens=2), x.flatten(2)[:, :, None])
    assert torch.equal(to_nchw(prefixed, "nlc", prefix_tokens=1, suffix_tokens=1)[:, :, 0, 1:], x.flatten(2)[:, :, :-1])
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
    # Without the input size the grid is unknown, also for square numbers of tokens
    assert describe_feature("blocks.0", model, torch.zeros(1, 25, 192)) == FeatureSpec("nlc", 192, None, 1)
    assert describe_feature("blocks.0", model, torch.zeros(1, 26, 192)) == FeatureSpec("nlc", 192, None, 1)


@pytest.mark.parametrize("tokens", [4, 5, 13, 14, 16 + 2])
def test_another_number_of_tokens_than_the_patches_raises(tokens: int) -> None:
    model = network("vit_tiny_patch16_224", img_size=64)
    with pytest.raises(LayoutError, match=rf"{tokens} tokens of layer 'blocks.0' form no grid.*4 × 4 patches"):
        describe_feature("blocks.0", model, torch.zeros(1, tokens, 192))
    assert describe_feature("blocks.0", model, torch.zeros(1, tokens, 192), "nlc:line").is_line


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_dropped_patches_raise(rate: float) -> None:
    # At 224 pixels and a rate of 0.75 there are 49 of 196 patches, which are not a pooled 7 × 7 grid
    model = timm.create_model("vit_tiny_patch16_224", img_size=224, patch_drop_rate=rate, depth=1).train()
    with pytest.raises(LayoutError, match="tokens were dropped"), Extractor(model, "blocks.0") as extractor:
        extractor.run(torch.randn(2, 3, 224, 224))


def test_a_single_pooled_token_is_one_position() -> None:
    model = network("vit_tiny_patch16_224", img_size=64)
    assert describe_feature("blocks.0", model, torch.zeros(1, 1, 192)) == FeatureSpec("nlc", 192, (1, 1), 0)


@pytest.mark.parametrize("length", [7, 9, 16, 400])
def test_a_sequence_is_a_line(length: int) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    for layer, shape in (("0", (2, length, 8)), ("1", (2, 8, length))):
        spec = describe_feature(layer, plain, torch.zeros(shape))
        assert spec.is_line
        assert spec.to_nchw(torch.zeros(shape)).shape == (2, 8, 1, length)


@pytest.mark.parametrize(
    ("layout", "tokens", "spec"),
    [
        ("nlc:4x4", 16, FeatureSpec("nlc", 8, (4, 4))),
        ("nlc:1+2x8", 17, FeatureSpec("nlc", 8, (2, 8), 1)),
        ("nlc:4x4+100", 116, FeatureSpec("nlc", 8, (4, 4), 0, 100)),
        ("nlc:1+4x4+100", 117, FeatureSpec("nlc", 8, (4, 4), 1, 100)),
        ("nlc:1+line+3", 20, FeatureSpec("nlc", 8, None, 1, 3)),
        ("nlc:line", 16, FeatureSpec("nlc", 8)),
    ],
)
def test_stated_tokens(layout: str, tokens: int, spec: FeatureSpec) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.arange(tokens).view(1, -1, 1).expand(1, -1, 8)
    assert describe_feature("0", model, x, layout) == spec
    patches = range(spec.prefix_tokens, tokens - spec.suffix_tokens)
    assert spec.to_nchw(x)[0, 0].flatten().tolist() == list(patches)
    assert describe_feature("0", model, x.transpose(1, 2), layout.replace("nlc", "ncl")).grid == spec.grid
    if spec.grid is not None:
        with pytest.raises(ShapeError, match=f"expected {spec.prefix_tokens} prefix tokens"):
            spec.to_nchw(x[:, 1:])


@pytest.mark.parametrize("layout", ["nlc:4", "nlc:0x4", "nlc:4x4+", "nlc:-1+4x4", "nhwc:4x4", "nlc:grid", "nl:4x4"])
def test_tokens_stated_in_another_form_raise(layout: str) -> None:
    with pytest.raises(LayoutError, match=r"layout|tokens"):
        describe_feature("0", nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 16, 8), layout)


def test_tokens_before_the_prefix_is_added() -> None:
    dynamic = network("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    assert describe_feature("patch_embed.norm", dynamic, torch.zeros(1, 25, 192)) == FeatureSpec("nlc", 192, None, 0)
    norm = describe_feature("patch_embed.norm", dynamic, torch.zeros(1, 25, 192), input_size=(80, 80))
    assert norm == FeatureSpec("nlc", 192, (5, 5), 0)
    dinov2 = network("vit_small_patch14_reg4_dinov2", img_size=42, depth=2)
    # 9 tokens are the 3 × 3 grid without the 5 prefix tokens
    assert describe_feature("patch_drop", dinov2, torch.zeros(1, 9, 384)) == FeatureSpec("nlc", 384, (3, 3), 0)


def test_a_block_that_permutes_back() -> None:
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model = nn.Sequential(block)
    assert infer_layout("0", block, torch.zeros(1, 8, 5, 5), model) == "nchw"
    assert infer_layout("0", block, torch.zeros(1, 8, 5, 7), model, input_size=(50, 70)) == "nchw"
    with pytest.raises(LayoutError, match="neither"):
        infer_layout("0", block, torch.zeros(1, 8, 5, 7), model)


class PatchNetwork(nn.Module):
    """Patches of 4 × 4 pixels, special tokens, and one linear layer."""

    def __init__(self, token: str = "class_token", shape: tuple[int, ...] = (1, 1, 8), patches: bool = True) -> None:
        super().__init__()
        if patches:
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.register_parameter(token, nn.Parameter(torch.zeros(shape)))
        self.encoder = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("token", "shape", "prefix"),
    [
        ("class_token", (1, 1, 8), 1),
        ("cls_token", (1, 1, 8), 1),
        ("reg_token", (1, 4, 8), 4),
        ("class_embedding", (8,), 1),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_patches_and_class_tokens_of_networks_that_are_not_timms(
    token: str, shape: tuple[int, ...], prefix: int, wrapped: bool
) -> None:
    model: nn.Module = PatchNetwork(token, shape)
    name, model = ("student.encoder", nn.ModuleDict({"student": model})) if wrapped else ("encoder", model)
    for size, grid in (((16, 16), (4, 4)), ((16, 24), (4, 6))):
        x = torch.zeros(1, prefix + grid[0] * grid[1], 8)
        assert describe_feature(name, model, x, input_size=size) == FeatureSpec("nlc", 8, grid, prefix)
        with pytest.raises(LayoutError, match="form no grid"):
            describe_feature(name, model, x[:, 3:], input_size=size)


@pytest.mark.parametrize("kind", ["CLIPVision", "ViT", "ViTMAE", "Yolos"])
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    size: Any = [64, 64] if kind == "Yolos" else 64
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=size, patch_size=16
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    layer = next(name for name, _ in model.named_modules() if name.endswith((".layer.0", "layers.0")))
    x = torch.randn(2, 3, 64, 64)
    if kind in ("ViTMAE", "Yolos"):
        # Masked patches, or 100 detection tokens at the end
        with pytest.raises(LayoutError, match="form no grid"), Extractor(model, layer) as extractor:
            extractor.run(x)
    if kind != "ViTMAE":
        with Extractor(model, layer, layout="nlc:1+4x4+100" if kind == "Yolos" else None) as extractor:
            assert extractor.run(x)[layer].shape == (2, 32, 4, 4)


def test_an_input_size_that_the_network_states() -> None:
    model = PatchNetwork()
    assert describe_feature("encoder", model, torch.zeros(1, 17, 8)) == FeatureSpec("nlc", 8, None, 1)
    model.image_size = 16
    assert describe_feature("encoder", model, torch.zeros(1, 17, 8)) == FeatureSpec("nlc", 8, (4, 4), 1)


def test_tokens_without_patches_are_a_line() -> None:
    model = PatchNetwork(patches=False)
    for tokens in (17, 26):
        found = describe_feature("encoder", model, torch.zeros(1, tokens, 8), input_size=(16, 16))
        assert found == FeatureSpec("nlc", 8, None, 1)


def test_channels_first_sequences() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU()))
    assert describe_feature("0", model, torch.zeros(1, 8, 16)) == FeatureSpec("ncl", 8)
    assert describe_feature("1", model, torch.zeros(1, 8, 16)).layout == "ncl"


@pytest.mark.parametrize("name", ["pvt_v2_b0", "levit_128s", "pit_ti_224", "mixer_s32_224", "xcit_nano_12_p16_224"])
def test_tokens_of_stages_have_the_grids_that_timm_lists(name: str) -> None:
    model = network(name)
    layers = [key for key, module in model.named_modules() if isinstance(module, nn.LayerNorm)] or ["stages.0.blocks.0"]
    with torch.no_grad(), FeatureTaps(model, layers, repeated="first") as taps:
        model(torch.randn(1, 3, 224, 224))
        found = taps.collect()
    for layer, tensor in found.items():
        if tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[1] in (56**2, 28**2, 14**2, 7**2):
            side = int(tensor.shape[1] ** 0.5)
            spec = describe_feature(layer, model, tensor, input_size=(224, 224))
            assert spec.layout == "ncl" or spec.grid == (side, side), layer


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
