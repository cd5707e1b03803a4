"""Backbone: names, sizes and errors, and features equal to the straight line through timm."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torchvision.transforms.functional import normalize, to_tensor

from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.extract.backbone import (
    Backbone,
    BackboneConfig,
    load_backbone,
    resolve_name,
    resolve_precision,
)
from mlc.extract.images import decode_image
from mlc.extract.weights import hash_weights

NAMES = ("test_resnet", "test_vit")
WIDTHS = {"test_resnet": 96, "test_vit": 64}
CASES = [("test_resnet", 160), ("test_resnet", 64), ("test_vit", 160), ("test_vit", 96)]
CLOSE = {"rtol": 0, "atol": 1e-5}


@cache
def tiny(name: str = "test_resnet", **settings: Any) -> Backbone:
    values = {"random_weights": True, "device": "cpu"} | settings
    return load_backbone(BackboneConfig(backbone=name, **values))


def photos(count: int = 5) -> list[bytes]:
    return [pictures.encoded(pictures.photo(seed=seed), "JPEG") for seed in range(count)]


def pixels(files: list[bytes], size_px: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    squares = [decode_image(each, size_px=size_px, interpolation=interpolation) for each in files]
    return np.stack(squares)


def pooled(backbone: Backbone, given: NDArray[np.uint8]) -> NDArray[np.float32]:
    features = backbone.features(given)
    assert features.keys() == {"pre_logits/pooled"}
    return features["pre_logits/pooled"].numpy()


def straight_line(backbone: Backbone, name: str, data: bytes, size_px: int) -> NDArray[np.float32]:
    """One image through a model that timm builds without a classifier, for this size."""
    size = {"img_size": size_px} if "vit" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **size).eval()
    model.load_state_dict(backbone.module.state_dict())
    cfg = model.pretrained_cfg
    square = Image.fromarray(pictures.squashed(data, size_px, cfg["interpolation"]))
    image = normalize(to_tensor(square), cfg["mean"], cfg["std"])
    with torch.inference_mode():
        return model(image[None])[0].numpy()


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size_px"), CASES)
def test_features_of_a_batch_are_those_of_each_image_alone(name: str, size_px: int) -> None:
    backbone, files = tiny(name, size_px=size_px), photos()
    got = pooled(backbone, pixels(files, size_px, backbone.key.interpolation))
    want = np.stack([straight_line(backbone, name, each, size_px) for each in files])
    assert got.shape == (len(files), WIDTHS[name])
    assert got.dtype == np.float32
    assert want.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(got, want, **CLOSE)


def test_a_vit_at_another_size_has_its_position_embeddings_resampled() -> None:
    native, small = (tiny("test_vit", size_px=size_px).module for size_px in (160, 96))
    want = resample_abs_pos_embed(native.pos_embed, [6, 6], num_prefix_tokens=1)
    assert small.pos_embed.shape != native.pos_embed.shape
    torch.testing.assert_close(small.pos_embed.data, want.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(small.blocks[0].attn.qkv.weight, native.blocks[0].attn.qkv.weight)


def test_features_leave_the_pixels_alone() -> None:
    given = pixels(photos(2), 64)
    before = given.copy()
    tiny(size_px=64).features(given)
    np.testing.assert_array_equal(given, before)


def test_the_module_is_frozen() -> None:
    module = tiny().module
    assert not module.training
    assert not any(each.requires_grad for each in module.parameters())


def test_bfloat16_gives_float32_features_near_those_of_float32() -> None:
    given = pixels(photos(3), 64)
    full = tiny(size_px=64)
    half = replace(full.forward, dtype=torch.bfloat16)  # which a CPU can do, too slowly to be used
    got, want = half(torch.from_numpy(given))["pre_logits/pooled"].numpy(), pooled(full, given)
    assert got.dtype == np.float32
    assert not np.array_equal(got, want)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.03 * np.abs(want).max())


# --- key -----------------------------------------------------------------------------------------


def test_the_key_says_what_the_model_asks_for() -> None:
    key = tiny().key
    assert key.backbone == "test_resnet"
    assert key.layers == ("pre_logits",)
    assert key.views == ("orig",)
    assert (key.size_px, key.resize, key.interpolation) == (160, "squash", "bilinear")
    assert (key.mean, key.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (key.precision, key.features, key.decode) == ("float32", ("pooled:float32",), "pillow")
    assert key.weights == hash_weights(tiny().module)


def test_random_weights_are_the_same_every_time() -> None:
    config = BackboneConfig(backbone="test_resnet", random_weights=True, device="cpu")
    torch.manual_seed(7)
    first = load_backbone(config)
    torch.manual_seed(8)
    assert load_backbone(config).key == first.key
    assert first.licence == "none, they are random"
    assert first.name == "test_resnet with random weights"


def test_settings_asked_for_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc.extract.backbone.require_precision", lambda *_: None)  # as on a GPU
    asked = BackboneConfig(
        backbone="test_resnet",
        random_weights=True,
        size_px=48,
        interpolation="bicubic",
        precision="bfloat16",
        engine="torch",
        device="cpu",
        layers=("layer1", "pre_logits"),
        features=("tokens:int8", "pooled"),
        views=("orig", "flip"),
    )
    key = load_backbone(asked).key
    assert (key.size_px, key.interpolation) == (48, "bicubic")
    assert (key.precision, key.engine) == ("bfloat16", "torch")
    assert key.layers == ("layer1", "pre_logits")
    assert key.features == ("pooled:float32", "tokens:int8")
    assert key.views == ("orig", "flip")


def test_the_same_features_in_another_order_are_the_same_request() -> None:
    orders = ("tokens,pooled", "pooled,tokens:float16", "tokens:float16, pooled:float32")
    keys = {tiny(size_px=64, features=each).key for each in orders}
    assert len(keys) == 1


def test_the_order_of_layers_is_kept() -> None:
    orders = (("layer1", "layer2"), ("layer2", "layer1"))
    assert [tiny(size_px=64, layers=each).key.layers for each in orders] == list(orders)


@pytest.mark.parametrize("text", ["layer1,pre_logits", " layer1 , pre_logits,"])
def test_lists_may_be_a_text_with_commas(text: str) -> None:
    overrides = ["features=tokens,pooled:float16", "views=orig,flip"]
    asked = load(BackboneConfig, "extract", None, [*overrides, f"layers={text}"])
    assert asked.layers == ("layer1", "pre_logits")
    assert asked.features == ("tokens", "pooled:float16")
    assert asked.views == ("orig", "flip")


def test_arrays_and_grids_are_those_of_what_is_asked_for() -> None:
    assert tiny().arrays == {"pre_logits/pooled": (96,)}
    assert tiny().grids == {}
    both = tiny("test_vit", features="pooled,tokens", layers="pre_logits,blocks.1")
    assert dict(both.arrays) == {
        f"{layer}/{kind}": shape
        for layer in ("pre_logits", "blocks.1")
        for kind, shape in (("pooled", (64,)), ("tokens", (100, 64)), ("prefix", (1, 64)))
    }
    assert dict(both.grids) == {"pre_logits": (10, 10), "blocks.1": (10, 10)}
    assert tiny(size_px=96, features="tokens").arrays == {"pre_logits/tokens": (9, 96)}


def saved_model(path: Path, *, classifier: float = 0.0) -> timm.models.ResNet:
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", pretrained=False).eval()
    model.fc.bias.data.fill_(classifier)
    torch.save(model.state_dict(), path)
    return model


def test_a_weights_file_is_what_runs(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "mine.pth")
    backbone = tiny(random_weights=False, weights=tmp_path / "mine.pth", size_px=64)
    model.reset_classifier(0)
    data = photos(1)[0]
    image = normalize(to_tensor(Image.fromarray(pictures.squashed(data, 64))), [0.5] * 3, [0.5] * 3)
    with torch.inference_mode():
        want = model(image[None]).numpy()
    np.testing.assert_allclose(pooled(backbone, pixels([data], 64)), want, **CLOSE)
    assert backbone.name == "test_resnet with mine.pth"
    assert backbone.licence == "unknown, see where mine.pth is from"
    assert backbone.key.weights != tiny().key.weights


def test_a_stated_licence_is_recorded(tmp_path: Path) -> None:
    saved_model(tmp_path / "mine.pth")
    settings = {"random_weights": False, "weights": tmp_path / "mine.pth"}
    assert tiny(weights_licence="CC0", **settings).licence == "CC0"


def test_the_classifier_has_no_part_in_the_key(tmp_path: Path) -> None:
    paths = tmp_path / "a.pth", tmp_path / "b.pth"
    for path, classifier in zip(paths, (0.0, 1.0), strict=True):
        saved_model(path, classifier=classifier)
    assert paths[0].read_bytes() != paths[1].read_bytes()
    one, other = (tiny(random_weights=False, weights=path).key for path in paths)
    assert one == other


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("resnet50", "resnet50.tv_in1k"),
        ("resnet101", "resnet101.tv_in1k"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("resnet50.tv_in1k", "resnet50.tv_in1k"),
        ("test_vit", "test_vit.r160_in1k"),
        ("test_vit.r160_in1k", "test_vit.r160_in1k"),
        ("hf-hub:somebody/model", "hf-hub:somebody/model"),
    ],
)
def test_a_name_means_its_tag(asked: str, meant: str) -> None:
    assert resolve_name(asked) == meant


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("resnet5O", r"unknown backbone 'resnet5O'; did you mean 'resnet50'"),
        ("ResNet50", r"unknown backbone 'ResNet50'; did you mean 'resnet50'"),
        ("resnet-50.tv_in1k", r"unknown backbone 'resnet-50'; did you mean 'resnet50'"),
        ("qqqqqqqqqq", r"unknown backbone 'qqqqqqqqqq'; there are \d+ names and none is close"),
        ("", r"unknown backbone ''"),
    ],
)
def test_an_unknown_name_gives_the_nearest(asked: str, expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        resolve_name(asked)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("resnet50.tv_in1", r"unknown tag 'tv_in1' of resnet50; did you mean 'tv_in1k'"),
        ("test_vit.qq", r"unknown tag 'qq' of test_vit; choose from r160_in1k"),
    ],
)
def test_an_unknown_tag_gives_the_nearest(asked: str, expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        resolve_name(asked)


# --- what cannot be had --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size_px": 100}, r"size_px: test_vit\S* cannot take 100 px \(.*divisible by patch size"),
        ({"size_px": 1}, r"size_px: test_vit\S* cannot take 1 px"),
        ({"interpolation": "bilnear"}, r"unknown interpolation 'bilnear'; did you mean 'bilinear'"),
        (
            {"interpolation": "box"},
            r"unknown interpolation 'box'; choose from bicubic, bilinear",
        ),
        ({"device": "warp"}, r"device: 'warp' is not to be had here"),
        ({"device": "cuda:99"}, r"device: 'cuda:99' is not to be had here"),
        ({"layers": ("blocks.O",)}, r"unknown layer 'blocks\.O'; did you mean 'blocks\.\d'"),
        ({"layers": ("",)}, r"unknown layer ''"),
        ({"layers": ("norm", "norm")}, r"layers: got 'norm' more than once"),
        ({"features": ("token",)}, r"unknown kind of features 'token'; did you mean 'tokens'"),
        ({"features": ()}, r"features: got none; choose from pooled, tokens"),
        ({"views": ("flop",)}, r"unknown view 'flop'; did you mean 'flip'"),
        ({"views": ("flip", "orig")}, r"views: orig comes first, got flip,orig; ask for orig,flip"),
        ({"weights": Path("a.pth")}, r"weights: got both a file and --random-weights"),
        ({"weights": Path("gone.pth"), "random_weights": False}, r"gone\.pth: No such file"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_one_sentence(settings: dict[str, Any], expected: str) -> None:
    values = {"backbone": "test_vit", "random_weights": True, "device": "cpu"} | settings
    with pytest.raises(MlcError, match=expected) as caught:
        load_backbone(BackboneConfig(**values))
    assert "\n" not in str(caught.value)


OFFLINE = """
from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.extract.backbone import BackboneConfig, load_backbone
for name in ("test_resnet", "hf-hub:timm/test_resnet.r160_in1k"):
    try:
        load_backbone(BackboneConfig(backbone=name, device="cpu"))
    except MlcError as error:
        print(error)
"""


def test_weights_that_cannot_be_fetched_are_one_sentence(tmp_path: Path) -> None:
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    names = ("test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k")
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name}: its weights cannot be had (")
        assert line.endswith("or pass --weights FILE")
    assert done.stderr == ""


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_precision_asked_for_is_taken(precision: Any, device: str) -> None:
    assert resolve_precision(precision, torch.device(device)) == precision


@pytest.mark.parametrize(("has_bfloat16", "want"), [(True, "bfloat16"), (False, "float16")])
def test_auto_precision_is_full_on_a_cpu_and_half_on_a_gpu(
    has_bfloat16: bool, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    assert resolve_precision("auto", torch.device("cpu")) == "float32"
    assert resolve_precision("auto", torch.device("cuda")) == want
