"""Layers: tokens, prefix and grids of every family, equal to a hook put on by hand."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.layers import LAYER, LayerReader, check_layers, read_layer
from mlc.extract.network import Network

BATCH = 2
CNN, NHWC, VIT = "(B, C, H, W)", "(B, H, W, C)", "(B, T, C)"
SWIN = "swin_tiny_patch4_window7_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"  # a class token and 4 registers
# (model, size_px, module, how it is laid out, number of prefix tokens, grid)
CASES = [
    ("test_resnet", 64, "layer2", CNN, 0, (8, 8)),
    ("test_convnext", 64, "stages.1", CNN, 0, (8, 8)),
    ("test_efficientnet", 64, "blocks.1", CNN, 0, (16, 16)),
    ("test_maxvit", 160, "stages.1", CNN, 0, (20, 20)),
    ("test_mambaout", 64, "stages.1", NHWC, 0, (8, 8)),
    (SWIN, 224, "layers.1", NHWC, 0, (28, 28)),
    ("test_vit", 96, "blocks.0", VIT, 1, (6, 6)),
    ("test_vit_relpos", 160, "blocks.0", VIT, 0, (10, 10)),
    (REGISTERS, 70, "blocks.3", VIT, 5, (5, 5)),
]
FINAL_GRIDS = {
    "test_resnet": (2, 2),
    "test_convnext": (2, 2),
    "test_efficientnet": (2, 2),
    "test_maxvit": (5, 5),
    "test_mambaout": (2, 2),
    SWIN: (7, 7),
}


@cache
def backbone(name: str, size_px: int, **settings: Any) -> Backbone:
    values = {"random_weights": True, "device": "cpu"} | settings
    return load_backbone(BackboneConfig(backbone=name, size_px=size_px, **values))


def both_layers(name: str, size_px: int, module: str) -> Backbone:
    return backbone(name, size_px, layers=(LAYER, module), features="pooled,tokens")


@cache
def _plain(name: str, size_px: int) -> nn.Module:
    size = {"img_size": size_px} if any(each in name for each in ("vit", "swin")) else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **size).eval()


def plain(made: Backbone) -> nn.Module:
    """The model as timm builds it for this size, with the same weights and no hook of ours."""
    model = _plain(made.key.backbone, made.key.size_px)
    model.load_state_dict(made.module.state_dict())
    return model


def pixels(size_px: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (BATCH, size_px, size_px, 3), dtype=np.uint8)


def normalised(made: Backbone, given: np.ndarray) -> Tensor:
    mean, std = (np.array(each, dtype=np.float32) for each in (made.key.mean, made.key.std))
    return torch.from_numpy((given / np.float32(255) - mean) / std).permute(0, 3, 1, 2)


def hooked(model: nn.Module, module: str, images: Tensor) -> Tensor:
    """What a module gives, copied before any other module sees it."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, __, output: seen.append(output.clone())
    )
    with torch.inference_mode():
        model(images)
    handle.remove()
    return seen[0]


def by_hand(output: Tensor, layout: str, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens (B, T, C) and prefix tokens (B, P, C), place by place."""
    if layout == VIT:
        return output[:, prefix:].numpy(), output[:, :prefix].numpy()
    if layout == CNN:
        rows, columns = output.shape[2:]
        places = [output[:, :, row, column] for row in range(rows) for column in range(columns)]
    else:
        rows, columns = output.shape[1:3]
        places = [output[:, row, column] for row in range(rows) for column in range(columns)]
    return torch.stack(places, 1).numpy(), np.empty((BATCH, 0))


def assert_close(got: Tensor, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    scale = np.abs(want).max()
    assert scale > 0
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=2e-5 * scale)


# --- of every family -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size_px", "module", "layout", "prefix", "grid"), CASES)
def test_a_modules_features_are_those_of_a_hook_by_hand(
    name: str, size_px: int, module: str, layout: str, prefix: int, grid: tuple[int, int]
) -> None:
    made = both_layers(name, size_px, module)
    got = made.features(pixels(size_px))
    output = hooked(plain(made), module, normalised(made, pixels(size_px)))
    tokens, first = by_hand(output, layout, prefix)
    assert made.forward.reader.network.channels_last == (layout == NHWC)
    assert made.grids[module] == grid
    assert tokens.shape[1] == grid[0] * grid[1]
    assert_close(got[f"{module}/tokens"], tokens)
    assert_close(got[f"{module}/pooled"], tokens.mean(axis=1))
    assert (f"{module}/prefix" in got) == (prefix > 0)
    if prefix:
        assert_close(got[f"{module}/prefix"], first)
    assert {key: tuple(each.shape[1:]) for key, each in got.items()} == dict(made.arrays)


@pytest.mark.parametrize(("name", "size_px", "module", "layout", "prefix", "grid"), CASES)
def test_the_default_layers_tokens_are_those_of_forward_features(
    name: str, size_px: int, module: str, layout: str, prefix: int, grid: tuple[int, int]
) -> None:
    made = both_layers(name, size_px, module)
    got = made.features(pixels(size_px))
    images = normalised(made, pixels(size_px))
    with torch.inference_mode():
        output = plain(made).forward_features(images)
        pooled = plain(made)(images).numpy()
    tokens, first = by_hand(output, layout, prefix)
    assert made.grids[LAYER] == FINAL_GRIDS.get(name, grid)
    assert_close(got[f"{LAYER}/tokens"], tokens)
    assert_close(got[f"{LAYER}/pooled"], pooled)
    assert (f"{LAYER}/prefix" in got) == (prefix > 0)
    if prefix:
        assert_close(got[f"{LAYER}/prefix"], first)


@pytest.mark.parametrize(("name", "size_px"), [("test_resnet", 64), ("test_vit", 96)])
def test_pooled_features_are_the_same_whatever_else_is_asked_for(name: str, size_px: int) -> None:
    alone = backbone(name, size_px).features(pixels(size_px))
    module = "layer2" if name == "test_resnet" else "blocks.0"
    more = backbone(name, size_px, features="pooled,tokens", layers=(LAYER, module))
    got = more.features(pixels(size_px))
    assert torch.equal(got[f"{LAYER}/pooled"], alone[f"{LAYER}/pooled"])
    only = backbone(name, size_px, layers=(module,)).features(pixels(size_px))
    assert only.keys() == {f"{module}/pooled"}
    assert torch.equal(only[f"{module}/pooled"], got[f"{module}/pooled"])


def test_a_batch_gives_what_its_images_give_alone() -> None:
    made = backbone("test_resnet", 64, features="pooled,tokens", layers=("layer1", LAYER))
    given = pixels(64)
    together = made.features(given)
    for index in range(BATCH):
        alone = made.features(given[index : index + 1])
        for name, values in alone.items():
            torch.testing.assert_close(values[0], together[name][index], rtol=0, atol=1e-5)


def test_a_module_before_the_class_token_has_patch_tokens_only() -> None:
    made = backbone("test_vit", 96, layers=("patch_embed",), features="tokens")
    got = made.features(pixels(96))
    want = hooked(plain(made), "patch_embed", normalised(made, pixels(96)))
    assert dict(made.grids) == {"patch_embed": (6, 6)}
    assert got.keys() == {"patch_embed/tokens"}
    assert_close(got["patch_embed/tokens"], want.flatten(1, 2).numpy())


# --- one pass, nothing in its way ----------------------------------------------------------------


def test_many_layers_are_one_forward_pass() -> None:
    layers = ("layer3", LAYER, "conv1", "layer4.0")
    settings = {"layers": layers, "features": "pooled,tokens", "engine": "torch"}
    made = backbone("test_resnet", 64, **settings)
    passes: list[int] = []
    handle = made.module.conv1.register_forward_hook(lambda *_: passes.append(1))
    got = made.features(pixels(64))
    handle.remove()
    assert len(passes) == 1
    assert list(got) == [f"{layer}/{kind}" for layer in layers for kind in ("pooled", "tokens")]


def test_pooled_features_of_the_default_layer_need_no_hook() -> None:
    module = backbone("test_resnet", 64).module
    assert not any(each._forward_hooks for each in module.modules())
    assert "forward_features" not in vars(module)


def test_a_layer_is_kept_as_it_was_when_a_later_module_works_in_its_memory() -> None:
    made = backbone("test_resnet", 64, layers=("bn1",), features="tokens")
    got = made.features(pixels(64))["bn1/tokens"]
    assert plain(made).act1.inplace
    assert (got < 0).any()


def test_features_of_one_batch_stay_when_the_next_one_runs() -> None:
    made = backbone("test_resnet", 64, layers=("layer2",), features="tokens")
    first = made.features(pixels(64))["layer2/tokens"]
    before = first.clone()
    made.features(255 - pixels(64))
    assert torch.equal(first, before)


def test_half_precision_gives_float32_tokens() -> None:
    settings = {"layers": ("blocks.1", LAYER), "features": "pooled,tokens"}
    made = backbone("test_vit", 96, **settings)
    half = replace(made.forward, dtype=torch.bfloat16)  # which a CPU can do, too slowly to be used
    got, want = half(torch.from_numpy(pixels(96))), made.features(pixels(96))
    for name, values in got.items():
        assert values.dtype == torch.float32
        assert not torch.equal(values, want[name])
        assert (values - want[name]).abs().max() < 0.05 * want[name].abs().max()


# --- shapes --------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Gives what a test wants, and runs its parts as a test wants."""

    def __init__(self, output: Any = None, times: int = 1) -> None:
        super().__init__()
        self.part, self.output, self.times = nn.Identity(), output, times

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(self.times):
            self.part(self.output)
        return images.mean((2, 3))


def network(module: nn.Module | None = None, **settings: Any) -> Network:
    values: dict[str, Any] = {
        "architecture": "toy",
        "licence": "none",
        "native_px": 8,
        "size_px": 8,
        "interpolation": "bilinear",
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "final": "part",
    }
    return Network(module=module or Toy(), **(values | settings))


@pytest.mark.parametrize(
    ("shape", "channels_last", "grid"),
    [
        ((1, 3, 4, 4), True, (4, 4)),  # only one reading is square
        ((1, 4, 4, 3), False, (4, 4)),
        ((1, 4, 4, 4), False, (4, 4)),  # both are
        ((1, 2, 3, 4), False, (3, 4)),  # none is
        ((1, 2, 3, 4), True, (2, 3)),
    ],
)
def test_a_map_is_read_the_way_that_makes_it_square_else_as_the_model_says(
    shape: tuple[int, ...], channels_last: bool, grid: tuple[int, int]
) -> None:
    output = torch.arange(float(np.prod(shape))).reshape(shape)
    got = read_layer("part", output, network(channels_last=channels_last))
    assert got.grid == grid
    last = shape[1:3] == grid and (channels_last or shape[2:] != grid)
    place = output[0, 0, 1] if last else output[0, :, 0, 1]
    assert torch.equal(got.tokens[0, 1], place)


def test_a_map_whose_two_readings_are_both_square_is_read_as_the_model_says() -> None:
    output = torch.arange(64.0).reshape(1, 4, 4, 4)
    first, last = (
        read_layer("part", output, network(channels_last=each)).tokens for each in (False, True)
    )
    assert torch.equal(last[0], output[0].reshape(16, 4))
    assert torch.equal(first[0], output[0].reshape(4, 16).T)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ((torch.ones(1, 4),), r"part gives a tuple, expected one tensor"),
        (torch.ones(4), r"part gives a tensor of shape \[4\], expected one tensor of 2, 3 or 4"),
        (torch.ones(1, 2, 3, 4, 5), r"part gives a tensor of shape \[1, 2, 3, 4, 5\]"),
        (torch.ones(1, 7, 4), r"part gives 7 tokens, which are not a square, with or without 1"),
        (torch.ones(4, 5, 8), r"part gives 4 rows for 1 images"),
    ],
)
def test_an_output_of_another_kind_is_one_sentence(output: Any, expected: str) -> None:
    reader = LayerReader(network(Toy(output), prefix=1), ("part",), ("pooled",))
    with pytest.raises(MlcError, match=expected):
        reader(torch.zeros(1, 3, 8, 8))


def test_tokens_without_the_prefix_are_all_patches() -> None:
    output = torch.arange(64.0).reshape(1, 16, 4)
    got = read_layer("part", output, network(prefix=1))
    assert (got.grid, got.prefix) == ((4, 4), None)
    assert torch.equal(got.tokens, output)


def test_one_token_is_a_patch_and_not_a_prefix() -> None:
    got = read_layer("part", torch.ones(1, 1, 4), network(prefix=1))
    assert (got.grid, got.prefix) == ((1, 1), None)


@pytest.mark.parametrize(
    ("times", "expected"),
    [(0, r"part is not run in a forward pass"), (2, r"part is run several times")],
)
def test_a_layer_runs_once(times: int, expected: str) -> None:
    reader = LayerReader(network(Toy(torch.ones(1, 4), times)), ("part",), ("pooled",))
    with pytest.raises(MlcError, match=expected):
        reader(torch.zeros(1, 3, 8, 8))


def test_a_pass_that_broke_off_leaves_nothing_behind() -> None:
    toy = Toy(torch.ones(1, 4))
    reader = LayerReader(network(toy), ("part",), ("pooled",))
    with pytest.raises(IndexError):
        reader(torch.zeros(3))  # after the part has run
    assert reader(torch.zeros(1, 3, 8, 8)).keys() == {"part"}


def test_a_layer_that_gives_one_row_has_pooled_features() -> None:
    reader = LayerReader(network(Toy(torch.full((1, 4), 5.0))), ("part",), ("pooled",))
    got = reader(torch.zeros(1, 3, 8, 8))["part"]
    assert got.pooled.tolist() == [[5.0] * 4]


@pytest.mark.parametrize("layer", ["part", LAYER])
def test_a_layer_that_gives_one_row_has_no_tokens(layer: str) -> None:
    reader = LayerReader(network(Toy(torch.ones(1, 4))), (layer,), ("pooled", "tokens"))
    expected = rf"layers: {layer} gives one row of \d numbers for an image and no tokens; ask for"
    with pytest.raises(MlcError, match=expected):
        reader(torch.zeros(1, 3, 8, 8))


def test_a_model_of_unknown_tokens_has_pooled_features() -> None:
    unknown = replace(network(), final=None)
    with pytest.raises(MlcError, match=r"not known where toy has the tokens of pre_logits; name"):
        LayerReader(unknown, (), ("tokens",))
    got = LayerReader(unknown, (), ("pooled",))(torch.ones(1, 3, 8, 8))
    assert got[LAYER].pooled.tolist() == [[1.0] * 3]


def test_features_of_an_image_are_one_row() -> None:
    reader = LayerReader(network(nn.Identity()), (), ("pooled",))
    with pytest.raises(MlcError, match=r"toy: gives features of a tensor of shape \[1, 3, 8, 8\]"):
        reader(torch.zeros(1, 3, 8, 8))


def test_no_layers_are_the_default_layer() -> None:
    assert check_layers((), ["part"]) == (LAYER,)
    assert check_layers(("part", LAYER), ["part"]) == ("part", LAYER)
