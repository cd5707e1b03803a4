"""torchvision's classifiers: names, and features equal to hooks put on by hand, of every family."""

from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import shared
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models._api import WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone, resolve_name
from mlc.extract.images import decode_image
from mlc.extract.torchvision_models import FINALS

BATCH = 2
# (model, size_px, the module of its last map, how it is laid out, grid); * marks those whose
# features are the mean of the map as it is.
SMALL = [
    ("resnet18*", 64, "layer4", "BCHW", (2, 2)),
    ("mobilenet_v2*", 64, "features", "BCHW", (2, 2)),
    ("mobilenet_v3_small", 64, "features", "BCHW", (2, 2)),
    ("squeezenet1_1*", 64, "features", "BCHW", (3, 3)),
    ("shufflenet_v2_x0_5*", 64, "conv5", "BCHW", (2, 2)),
    ("mnasnet0_5*", 64, "layers", "BCHW", (2, 2)),
    ("regnet_y_400mf*", 64, "trunk_output", "BCHW", (2, 2)),
    ("efficientnet_b0*", 64, "features", "BCHW", (2, 2)),
    ("googlenet*", 64, "inception5b", "BCHW", (2, 2)),
    ("swin_t*", 64, "norm", "BHWC", (2, 2)),
    ("vit_b_32", 96, "encoder", "BTC", (3, 3)),
]
LARGE = [
    ("alexnet", 96, "features", "BCHW", (2, 2)),
    ("vgg11", 64, "features", "BCHW", (2, 2)),
    ("densenet121*", 64, "features", "BCHW", (2, 2)),
    ("convnext_tiny", 64, "features", "BCHW", (2, 2)),
    ("inception_v3*", 107, "Mixed_7c", "BCHW", (2, 2)),
    ("maxvit_t", 224, "blocks.3", "BCHW", (7, 7)),
    ("swin_v2_t*", 64, "norm", "BHWC", (2, 2)),
]
CASES = [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)]
TRANSFORM_INPUT = {"googlenet", "inception_v3"}


def made(name: str, **settings: Any) -> Backbone:
    values = {"random_weights": True, "device": "cpu"} | settings
    return load_backbone(BackboneConfig(backbone=f"torchvision:{name}", **values))


@cache
def small() -> Backbone:
    return made("resnet18", size_px=64)


def plain(name: str, size_px: int) -> nn.Module:
    """The whole model as torchvision builds it, with the weights that mlc draws."""
    options = {"init_weights": False} if name in TRANSFORM_INPUT else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_model(name, weights=None, **options)
    model.transform_input = name in TRANSFORM_INPUT
    if name.startswith("vit"):
        state = interpolate_embeddings(size_px, model.patch_size, model.state_dict())
        model = get_model(name, weights=None, image_size=size_px)
        model.load_state_dict(state)
    return model.eval()


def pixels(size_px: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (BATCH, size_px, size_px, 3), dtype=np.uint8)


def normalised(backbone: Backbone, given: np.ndarray) -> Tensor:
    mean, std = (np.array(each, dtype=np.float32) for each in (backbone.key.mean, backbone.key.std))
    return torch.from_numpy((given / np.float32(255) - mean) / std).permute(0, 3, 1, 2)


def by_hand(model: nn.Module, module: str, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """A module's output, and what the last linear layer sees."""
    maps: list[Tensor] = []
    rows: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(
        lambda _, __, output: maps.append(output.clone())
    )
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if linear:
        linear[-1].register_forward_pre_hook(lambda _, given: rows.append(given[0].clone()))
    with torch.inference_mode():
        model(images)
    return maps[0], rows[0] if rows else None


def assert_close(got: Tensor, want: Tensor) -> None:
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("name", "size_px", "module", "layout", "grid"), CASES)
def test_features_are_those_of_hooks_by_hand(
    name: str, size_px: int, module: str, layout: str, grid: tuple[int, int]
) -> None:
    name, is_mean = name.removesuffix("*"), name.endswith("*")
    backbone = made(name, size_px=size_px, features="pooled,tokens")
    got = backbone.features(pixels(size_px))
    images = normalised(backbone, pixels(size_px))
    output, row = by_hand(plain(name, size_px), module, images)
    if name.startswith("densenet"):
        output = output.relu()  # which its forward applies after the module
    prefix = output[:, :1] if layout == "BTC" else None
    last = {"BCHW": output.movedim(1, -1), "BHWC": output, "BTC": output[:, 1:]}[layout]
    tokens = last.reshape(BATCH, grid[0] * grid[1], -1)
    assert backbone.forward.reader.network.channels_last == (layout == "BHWC")
    assert dict(backbone.grids) == {"pre_logits": grid}
    assert_close(got["pre_logits/tokens"], tokens)
    assert_close(got["pre_logits/pooled"], tokens.mean(1) if row is None else row)
    assert ("pre_logits/prefix" in got) == (prefix is not None)
    if prefix is not None:
        assert_close(got["pre_logits/prefix"], prefix)
    if is_mean:
        assert_close(got["pre_logits/pooled"], tokens.mean(1))


def test_every_kind_of_classifier_is_tested() -> None:
    kinds = {
        getattr(torchvision.models.get_model_builder(each).__annotations__["return"], "__name__", 0)
        for each in list_models(module=torchvision.models)
    }
    assert kinds == FINALS.keys()
    names = {case[0].removesuffix("*") for case in (*SMALL, *LARGE)}
    builders = map(torchvision.models.get_model_builder, names)
    assert {each.__annotations__["return"].__name__ for each in builders} == kinds


def test_a_named_module_and_the_default_layer_in_one_pass() -> None:
    layers = ("layer4", "pre_logits", "layer2.0.bn1")
    backbone = made("resnet18", size_px=64, layers=layers, features="pooled,tokens")
    got = backbone.features(pixels(64))
    assert torch.equal(got["layer4/tokens"], got["pre_logits/tokens"])
    output, _ = by_hand(plain("resnet18", 64), "layer2.0.bn1", normalised(backbone, pixels(64)))
    assert (got["layer2.0.bn1/tokens"] < 0).any()  # before the ReLU that works in its memory
    assert_close(got["layer2.0.bn1/tokens"], output.flatten(2).transpose(1, 2))
    alone = small().features(pixels(64))
    assert torch.equal(alone["pre_logits/pooled"], got["pre_logits/pooled"])


def test_a_module_that_runs_several_times_is_one_sentence() -> None:
    with pytest.raises(MlcError, match=r"layers: layer1\.0\.relu is run several times"):
        made("resnet18", size_px=64, layers=("layer1.0.relu",))


# --- names and key -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("resnet50", "resnet50.IMAGENET1K_V1"),
        ("resnet101", "resnet101.IMAGENET1K_V1"),
        ("resnet152", "resnet152.IMAGENET1K_V2"),
        ("resnet50.IMAGENET1K_V2", "resnet50.IMAGENET1K_V2"),
        ("resnet50.DEFAULT", "resnet50.IMAGENET1K_V2"),
        ("vit_h_14", "vit_h_14.IMAGENET1K_SWAG_E2E_V1"),
        ("squeezenet1_1", "squeezenet1_1.IMAGENET1K_V1"),
    ],
)
def test_a_name_means_its_weights(asked: str, meant: str) -> None:
    assert resolve_name(f"torchvision:{asked}") == f"torchvision:{meant}"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("resnet5O", r"unknown backbone of torchvision 'resnet5O'; did you mean 'resnet50'"),
        ("", r"unknown backbone of torchvision ''"),
        ("resnet50.V1", r"unknown tag 'V1' of torchvision:resnet50; choose from DEFAULT, IMAGENET"),
        ("fcn_resnet50", r"torchvision's fcn_resnet50 is not an image classifier .*'resnet50'"),
        ("fasterrcnn_resnet50_fpn", r"torchvision's fasterrcnn_resnet50_fpn is not an image"),
        ("r3d_18", r"torchvision's r3d_18 is not an image classifier"),
        ("quantized_resnet50", r"quantized_resnet50 is not an image classifier in floating point"),
    ],
)
def test_what_is_no_classifier_gives_the_nearest(asked: str, expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        resolve_name(f"torchvision:{asked}")


def test_the_key_is_not_that_of_timms_model_of_the_same_name() -> None:
    key, timms = (
        small().key,
        load_backbone(
            BackboneConfig(backbone="resnet18", random_weights=True, device="cpu", size_px=64)
        ).key,
    )
    assert (key.backbone, timms.backbone) == ("torchvision:resnet18", "resnet18")
    assert small().name == "torchvision:resnet18 with random weights"


def test_the_input_is_what_the_weights_were_evaluated_with() -> None:
    key = made("efficientnet_b1.IMAGENET1K_V1", size_px=None).key
    assert (key.size_px, key.interpolation) == (240, "bicubic")
    assert key.mean == (0.485, 0.456, 0.406)
    assert key.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "size_px", "expected"),
    [
        ("vit_b_32", 100, r"vit_b_32\S* cannot take 100 px \(not divisible by its patch size of"),
        ("squeezenet1_1", 8, r"size_px: torchvision:squeezenet1_1\S* cannot take 8 px"),
    ],
)
def test_a_size_that_cannot_be_is_one_sentence(name: str, size_px: int, expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        made(name, size_px=size_px)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_weights_file_is_what_runs(name: str, tmp_path: Path) -> None:
    options = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
    torch.manual_seed(5)
    model = get_model(name, weights=None, **options).eval()
    torch.save(model.state_dict(), tmp_path / "mine.pth")  # with heads that only training has
    backbone = made(name, random_weights=False, weights=tmp_path / "mine.pth", size_px=64)
    _, want = by_hand(model, FINALS[type(model).__name__], normalised(backbone, pixels(64)))
    assert_close(backbone.features(pixels(64))["pre_logits/pooled"], want)
    assert backbone.name == f"torchvision:{name} with mine.pth"
    assert backbone.licence == "unknown, see where mine.pth is from"


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_published_weights_are_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = plain(name, 64), []

    def get_state_dict(entry: WeightsEnum, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(entry)
        return model.state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    backbone = made(name, random_weights=False, size_px=64)
    assert asked == [get_model_weights(name).IMAGENET1K_V1]
    _, want = by_hand(model, FINALS[type(model).__name__], normalised(backbone, pixels(64)))
    assert_close(backbone.features(pixels(64))["pre_logits/pooled"], want)
    assert backbone.name == f"torchvision:{name}.IMAGENET1K_V1"
    assert backbone.licence == "unknown"


def test_random_weights_are_the_same_every_time() -> None:
    torch.manual_seed(7)
    again = made("resnet18", size_px=64)
    assert again.key == small().key
    assert again.licence == "none, they are random"


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    expected = r"torchvision:resnet18\.IMAGENET1K_V1: its weights cannot be had \(.*no route to h"
    with pytest.raises(MlcError, match=expected):
        made("resnet18", random_weights=False)


def test_squeezenets_real_weights_give_the_mean_of_its_map() -> None:
    file = shared.need("weights") / "squeezenet1_1.safetensors"
    photo = next((shared.need("coco-mini") / "val2014").glob("*.jpg"))
    backbone = made("squeezenet1_1", random_weights=False, weights=file, features="pooled,tokens")
    square = decode_image(photo.read_bytes(), size_px=224, interpolation="bilinear")
    got = backbone.features(np.stack([square]))
    model = get_model("squeezenet1_1", weights=None).eval()
    model.load_state_dict(safetensors.torch.load_file(file))
    with torch.inference_mode():
        output = model.features(normalised(backbone, square[None]))
    assert got["pre_logits/tokens"].shape == (1, 169, 512)
    assert_close(got["pre_logits/pooled"], output.mean((2, 3)))
    assert_close(got["pre_logits/tokens"], output.flatten(2).transpose(1, 2))
