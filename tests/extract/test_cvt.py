"""CvT: tokens equal to the paper's formulas written out, and the model as a backbone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, layer_norm

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone, resolve_name
from mlc.extract.cvt import CvT, cvt_w24
from mlc.extract.own_models import OWN_MODELS

DIMS, HEADS, DEPTHS, CLASSES = (12, 24, 32), (1, 3, 4), (1, 1, 2), 5
# (size_px, side of the last grid): a convolution rounds up, so odd grids are not cut.
SIZES = [(64, 4), (96, 6), (50, 3), (75, 5), (7, 1)]


def small() -> CvT:
    """A CvT of which every tensor matters: no scale is 1, no bias or mean is 0."""
    torch.manual_seed(3)
    model = CvT(DIMS, HEADS, DEPTHS, CLASSES).eval()
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.is_floating_point():
                spread = torch.rand_like(each) if name.endswith("running_var") else each
                each.copy_(spread + 0.3 * torch.randn_like(each).abs())
    return model


@pytest.fixture
def small_cvt_w24(monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(OWN_MODELS["cvt_w24"], build=small, native_px=64)
    monkeypatch.setitem(OWN_MODELS, "cvt_w24", own)


def made(**settings: Any) -> Backbone:
    values = {"random_weights": True, "device": "cpu"} | settings
    return load_backbone(BackboneConfig(backbone="cvt_w24", **values))


def pixels(size_px: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, size_px, size_px, 3), dtype=np.uint8)


def normalised(given: np.ndarray) -> Tensor:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy((given / np.float32(255) - mean) / std).permute(0, 3, 1, 2)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def by_hand(w: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The class token (B, C) and the map (B, C, H, W) by the formulas, of a state dict."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def projected(name: str, x: Tensor, grid: list[int], skip: int, stride: int) -> Tensor:
        b, _, c = x.shape
        places = x[:, skip:].permute(0, 2, 1).reshape(b, c, *grid)
        places = conv2d(places, w[f"{name}.conv.weight"], None, stride, 1, 1, c)
        running = (w[f"{name}.bn.running_mean"], w[f"{name}.bn.running_var"])
        places = batch_norm(places, *running, w[f"{name}.bn.weight"], w[f"{name}.bn.bias"])
        return torch.cat([x[:, :skip], places.reshape(b, c, -1).permute(0, 2, 1)], 1)

    x = images
    for stage, (heads, depth) in enumerate(zip(HEADS, DEPTHS, strict=True)):
        at, skip = f"stage{stage}", int(stage == 2)
        stride, padding = (4, 2) if stage == 0 else (2, 1)
        proj = f"{at}.patch_embed.proj"
        x = conv2d(x, w[f"{proj}.weight"], w[f"{proj}.bias"], stride, padding)
        grid = list(x.shape[2:])
        x = norm(f"{at}.patch_embed.norm", x.flatten(2).permute(0, 2, 1))
        if skip:
            x = torch.cat([w["stage2.cls_token"].repeat(len(x), 1, 1), x], 1)
        for block in (f"{at}.blocks.{index}" for index in range(depth)):
            y, attn = norm(f"{block}.norm1", x), f"{block}.attn"
            q, k, v = (
                linear(
                    f"{attn}.proj_{kind}", projected(f"{attn}.conv_proj_{kind}", y, grid, skip, s)
                )
                for kind, s in (("q", 1), ("k", 2), ("v", 2))
            )
            parts = []
            for a, b, c in zip(*(each.chunk(heads, -1) for each in (q, k, v)), strict=True):
                parts.append((a @ b.mT / x.shape[-1] ** 0.5).softmax(-1) @ c)
            x = x + linear(f"{attn}.proj", torch.cat(parts, -1))
            hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
            x = x + linear(f"{block}.mlp.fc2", hidden / (1 + torch.exp(-1.702 * hidden)))
        if not skip:
            x = x.permute(0, 2, 1).reshape(len(x), -1, *grid)
    x = norm("norm", x)
    return x[:, 0], x[:, 1:].permute(0, 2, 1).reshape(len(x), -1, *grid)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size_px", "side"), SIZES)
def test_tokens_are_those_of_the_formulas(size_px: int, side: int) -> None:
    model, images = small(), torch.randn(2, 3, size_px, size_px)
    with torch.inference_mode():
        got, logits = model.forward_features(images), model(images)
    first, last = by_hand(model.state_dict(), images)
    assert last.shape == (2, DIMS[-1], side, side)
    assert_close(got[:, 0], first)
    assert_close(got[:, 1:], last.flatten(2).mT)
    assert_close(logits, model.head(first).detach())


def test_height_and_width_are_not_exchanged() -> None:
    model, images = small(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        got = model.forward_features(images)
    _, last = by_hand(model.state_dict(), images)
    assert last.shape[2:] == (4, 6)
    assert_close(got[:, 1:], last.flatten(2).mT)


def test_the_class_token_is_attended_to() -> None:
    model, images = small(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.forward_features(images)
        model.stage2.cls_token.neg_()
        after = model.forward_features(images)
    assert ((before - after).abs().amax(-1) > 1e-3).all()  # of every patch token


def test_cvt_w24_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = cvt_w24()
    assert sum(each.numel() for each in model.head.parameters()) == 1024 * 1000 + 1000
    model.head = nn.Identity()
    assert sum(each.numel() for each in model.parameters()) == 276_171_392


def test_cvt_w24_gives_24_by_24_tokens_at_384_px() -> None:
    with torch.device("meta"):
        tokens = cvt_w24().eval().forward_features(torch.empty(2, 3, 384, 384))
    assert tokens.shape == (2, 1 + 24 * 24, 1024)


# --- the backbone --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_cvt_w24")
@pytest.mark.parametrize(("size_px", "side"), [(None, 4), (50, 3), (96, 6)])
def test_pooled_is_the_class_token_which_stands_apart(size_px: int | None, side: int) -> None:
    backbone = made(size_px=size_px, features="pooled,tokens")
    given = pixels(size_px or 64)
    got = backbone.features(given)
    first, last = by_hand(small().state_dict(), normalised(given))
    assert dict(backbone.grids) == {"pre_logits": (side, side)}
    assert {name: each.shape[1:] for name, each in got.items()} == backbone.arrays
    assert_close(got["pre_logits/pooled"], first)
    assert_close(got["pre_logits/prefix"], first[:, None])
    assert_close(got["pre_logits/tokens"], last.flatten(2).mT)


@pytest.mark.usefixtures("small_cvt_w24")
def test_the_input_is_as_published() -> None:
    key = made().key
    assert (key.backbone, key.size_px, key.interpolation) == ("cvt_w24", 64, "bicubic")
    assert (key.mean, key.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert OWN_MODELS["cvt_w24"].native_px == 64
    assert made().name == "cvt_w24 with random weights"


def test_it_is_made_for_384_px() -> None:
    assert OWN_MODELS["cvt_w24"].native_px == 384


@pytest.mark.usefixtures("small_cvt_w24")
def test_layers_of_every_stage() -> None:
    layers = ("stage0", "stage1.blocks.0", "stage2.patch_embed", "stage2.blocks.0", "pre_logits")
    backbone = made(layers=layers, features="pooled,tokens")
    assert dict(backbone.grids) == dict(
        zip(layers, [(16, 16), (8, 8), (4, 4), (4, 4), (4, 4)], strict=True)
    )
    got = backbone.features(pixels(64))
    with_prefix = {name.removesuffix("/prefix") for name in got if name.endswith("/prefix")}
    assert with_prefix == {"stage2.blocks.0", "pre_logits"}
    stage0: list[Tensor] = []
    model = small()
    model.stage0.register_forward_hook(lambda _, __, output: stage0.append(output))
    with torch.inference_mode():
        model(normalised(pixels(64)))
    want = stage0[0].flatten(2).mT
    assert_close(got["stage0/tokens"], want)
    assert_close(got["stage0/pooled"], want.mean(1))


@pytest.mark.usefixtures("small_cvt_w24")
def test_its_batchnorms_are_folded() -> None:
    folded = made(engine="folded", features="pooled,tokens")
    assert (folded.key.engine, folded.note) == ("folded", "")
    with_norms = made(engine="torch", features="pooled,tokens")
    for name, want in with_norms.features(pixels(64)).items():
        assert_close(folded.features(pixels(64))[name], want)


# --- names and weights ---------------------------------------------------------------------------


def test_its_weights_cannot_be_fetched() -> None:
    expected = r"cvt_w24: .*get CvT-w24-384x384-IN-22k\.pth, .*microsoft/CvT.*pass --weights FILE"
    with pytest.raises(MlcError, match=expected):
        made(random_weights=False)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("cvt_w42", r"unknown backbone 'cvt_w42'; did you mean 'cvt_w24'"),
        ("cvt_w24.in22k", r"unknown tag 'in22k' of cvt_w24, which has none"),
        ("resnet5O", r"unknown backbone 'resnet5O'; did you mean 'resnet50"),
    ],
)
def test_a_wrong_name_gives_the_nearest(asked: str, expected: str) -> None:
    with pytest.raises(MlcError, match=expected):
        resolve_name(asked)


@pytest.mark.usefixtures("small_cvt_w24")
def test_a_published_file_is_what_runs(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight.mul_(2)
    torch.save(model.state_dict(), tmp_path / "CvT-w24.pth")  # its classifier too
    backbone = made(random_weights=False, weights=tmp_path / "CvT-w24.pth")
    first, _ = by_hand(model.state_dict(), normalised(pixels(64)))
    got = backbone.features(pixels(64))["pre_logits/pooled"]
    assert_close(got, first)
    assert backbone.name == "cvt_w24 with CvT-w24.pth"
    assert backbone.licence == "unknown, see where CvT-w24.pth is from"


@pytest.mark.usefixtures("small_cvt_w24")
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    state["stage3.norm.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "other.pth")
    expected = r"1 missing \(norm\.weight\); 1 unknown \(stage3\.norm\.weight\)"
    with pytest.raises(MlcError, match=expected):
        made(random_weights=False, weights=tmp_path / "other.pth")
