"""The official Query2Label backbones: names, shapes and scales there and back, and features."""

from collections.abc import Mapping
from functools import cache

import golden
import official_weights
import pytest
import timm
import torch
from timm.models import swin_transformer, tresnet
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract.backbone import resolve_name
from mlc.extract.layers import LAYER, LayerReader
from mlc.extract.network import Network, Weights
from mlc.extract.own_models import OWN_MODELS, own_network
from mlc.extract.query2label import BACKBONES, from_official, to_official
from mlc.extract.timm_models import timm_network
from mlc.store.schema import TOKENS

GOLDEN = {golden.load(f"q2l/{name}.json")["backbone"]: name for name in official_weights.NAMES}
PREFIX = official_weights.BACKBONE


@cache
def meta(backbone: str) -> nn.Module:
    """Our model without a classifier and without memory for weights."""
    name = BACKBONES[backbone].backbone
    with torch.device("meta"):
        if name not in OWN_MODELS:
            return timm.create_model(name, pretrained=False, num_classes=0)
        model = OWN_MODELS[name].build()
    model.head = nn.Identity()
    return model


@cache
def state(backbone: str) -> Mapping[str, Tensor]:
    """Tensors of our model's shapes, each a number of its own above 1, as one number in memory."""
    return {
        name: torch.tensor(0 if each.dtype == torch.int64 else 1 + index, dtype=each.dtype).expand(
            each.shape
        )
        for index, (name, each) in enumerate(meta(backbone).state_dict().items())
    }


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[object]]:
    return {
        name: [list(each.shape), str(each.dtype).removeprefix("torch.")]
        for name, each in tensors.items()
    }


def drawn(backbone: str) -> dict[str, Tensor]:
    """The file's small tensors with weights of both signs, the large ones each of one number."""
    return {
        name: official_weights.tensor(PREFIX + name, each.shape, "float32")
        if each.dtype == torch.float32 and each.ndim == 1
        else each
        for name, each in to_official(backbone, state(backbone)).items()
    }


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, each in want.items():
        assert got[name].dtype == each.dtype, name
        assert torch.equal(got[name], each), name


# --- names, shapes, values -----------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_keys_shapes_and_dtypes_are_the_authors(backbone: str) -> None:
    keys = golden.load(f"q2l/{GOLDEN[backbone]}.json")["keys"]
    want = {key.removeprefix(PREFIX): each for key, each in keys.items() if key.startswith(PREFIX)}
    assert described(to_official(backbone, state(backbone))) == want


@pytest.mark.parametrize("backbone", BACKBONES)
def test_there_and_back_is_the_same_to_the_bit(backbone: str) -> None:
    ours = from_official(backbone, drawn(backbone), state(backbone))
    assert described(ours) == described(state(backbone))
    again = from_official(backbone, to_official(backbone, ours), state(backbone))
    assert_same(again, ours)
    assert list(again) == list(state(backbone))  # all of it, so that it loads strictly


@pytest.mark.parametrize("backbone", ["tresnetl", "tresnetl_v2", "swin_L_384_22k"])
def test_tensors_go_where_timms_own_filter_puts_them(backbone: str) -> None:
    library = swin_transformer if "swin" in backbone else tresnet
    official = drawn(backbone)
    renamed = {name.removeprefix("body."): each for name, each in official.items()}
    want = library.checkpoint_filter_fn(renamed, meta(backbone))
    assert_same(from_official(backbone, official, state(backbone)), want)


def test_tensors_of_the_resnet_and_the_cvt_keep_their_names() -> None:
    for backbone, prefix in (("resnet101", "body."), ("CvT_w24", "")):
        official = drawn(backbone)
        ours = from_official(backbone, official, state(backbone))
        assert all(
            torch.equal(ours[name.removeprefix(prefix)], official[name]) for name in official
        )


def test_frozen_norms_have_no_counters_and_get_them_here() -> None:
    official = to_official("resnet101", state("resnet101"))
    assert not any("num_batches_tracked" in name for name in official)
    ours = from_official("resnet101", official, meta("resnet101").state_dict())
    assert torch.equal(ours["bn1.num_batches_tracked"], torch.tensor(0))


def test_counters_are_kept_and_may_be_missing() -> None:
    official = dict(drawn("CvT_w24"))
    counters = [name for name in official if name.endswith("num_batches_tracked")]
    official[counters[0]] = torch.tensor(7)
    ours = from_official("CvT_w24", official, state("CvT_w24"))
    assert torch.equal(ours[counters[0]], torch.tensor(7))
    without = {name: each for name, each in official.items() if name not in counters}
    ours = from_official("CvT_w24", without, state("CvT_w24"))
    assert torch.equal(ours[counters[0]], torch.tensor(0))
    assert ours[counters[0]].dtype == torch.int64


def test_what_swin_computes_is_as_in_timm() -> None:
    official, model = to_official("swin_L_384_22k", state("swin_L_384_22k")), timms_small_swin()
    masks = [name for name in official if name.endswith("attn_mask")]
    assert len(masks) == 11
    for name in masks:
        mask = model.get_submodule(name.removesuffix(".attn_mask")).attn_mask
        assert torch.equal(official[name], mask), name
    index = model.layers[0].blocks[0].attn.relative_position_index
    names = [name for name in official if name.endswith("relative_position_index")]
    assert len(names) == 24
    assert all(torch.equal(official[name], index) for name in names)


@cache
def timms_small_swin() -> nn.Module:
    """A Swin with the windows and depths of Swin-L, and few channels."""
    return swin_transformer.SwinTransformer(
        img_size=384, window_size=12, embed_dim=4, depths=(2, 2, 18, 2), num_heads=(1, 2, 4, 8)
    )


# --- scales of TResNet ---------------------------------------------------------------------------

SCALED = "body.layer1.0.conv1.bn.weight"
OFFICIAL_SCALED = "body.body.layer1.0.conv1.1.weight"


def test_scales_are_absolute_values_unless_signed() -> None:
    official = drawn("tresnetl")
    weight = official[OFFICIAL_SCALED]
    assert (weight < 0).any()
    assert (weight > 0).any()
    ours = from_official("tresnetl", official, state("tresnetl"))
    assert torch.equal(ours[SCALED], weight.abs() + 1e-5)
    signed = from_official("tresnetl", official, state("tresnetl"), signed_scales=True)
    assert torch.equal(signed[SCALED], weight)
    bias = OFFICIAL_SCALED.replace("weight", "bias")
    assert torch.equal(ours[SCALED.replace("weight", "bias")], official[bias])


def test_every_scale_of_a_file_has_a_weight_that_gives_it_to_the_bit() -> None:
    random = torch.Generator().manual_seed(0)
    weights = 10 ** (10 * torch.rand(100_000, generator=random) - 7)
    weights[:6] = torch.tensor([0.0, 1e-38, 1e-5, 1.0, 1 + 2**-23, 1 - 2**-24])
    scales = weights + 1e-5
    official = to_official("tresnetl", {SCALED: scales})[OFFICIAL_SCALED]
    assert (official >= 0).all()
    assert torch.equal(official.abs() + 1e-5, scales)


def test_scales_after_training_have_one_too() -> None:
    random = torch.Generator().manual_seed(1)
    scales = 2e-4 + 3 * torch.rand(100_000, generator=random)
    official = to_official("tresnetl", {SCALED: scales})[OFFICIAL_SCALED]
    assert torch.equal(official.abs() + 1e-5, scales)


# The last is odd in steps of 2 ** -37; there the sum ends half a step off, and is rounded to even.
@pytest.mark.parametrize("scale", [0.0, 0.9e-5, -1.0, 8.286303636850789e-05])
def test_a_scale_that_no_weight_gives_is_one_sentence(scale: float) -> None:
    scales = torch.tensor([1.0, scale, 2.0, scale])
    expected = rf"{SCALED}: scales of TResNet are .*which 2 of 4 cannot be, got {scale:g}; keep"
    with pytest.raises(MlcError, match=expected):
        to_official("tresnetl", {SCALED: scales})


# --- files that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_that_does_not_fit_is_listed(backbone: str) -> None:
    tensors = to_official(backbone, state(backbone))
    names = [name for name in tensors if not name.endswith("num_batches_tracked")]
    missing, reshaped = names[3:40:4], names[5:40:4]
    extra = ["fc.weight", "body.layer5.num_batches_tracked", "norm9", "a", "b", "c"]
    tensors = {name: each for name, each in tensors.items() if name not in missing}
    tensors |= {name: torch.zeros(2, 3) for name in (*extra, *reshaped)}
    with pytest.raises(MlcError) as error:
        from_official(backbone, tensors, state(backbone))
    message = str(error.value)
    for name in (*missing, *extra):
        assert message.count(f"{name},") + message.count(f"{name})") == 1, name
    assert all(f"{name} is [2, 3], expected [" in message for name in reshaped)
    assert f"{len(missing)} missing (" in message
    assert f"{len(extra)} unknown (" in message
    assert f"{len(reshaped)} of another shape (" in message


def test_what_a_model_computes_otherwise_is_refused() -> None:
    tensors = to_official("swin_L_384_22k", state("swin_L_384_22k"))
    index, mask = "layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask"
    tensors |= {index: tensors[index].T.contiguous(), mask: 2 * tensors[mask]}
    with pytest.raises(MlcError) as error:
        from_official("swin_L_384_22k", tensors, state("swin_L_384_22k"))
    assert "2 not what the model computes (" in str(error.value)
    assert index in str(error.value)
    assert mask in str(error.value)


def test_another_backbones_file_is_refused() -> None:
    official = to_official("tresnetl_v2", state("tresnetl_v2"))
    with pytest.raises(MlcError, match=r"tresnetl: these weights are not those of the official"):
        from_official("tresnetl", official, state("tresnetl"))


def test_an_unknown_backbone_gives_the_nearest() -> None:
    with pytest.raises(
        MlcError, match=r"unknown official backbone 'swin_L'; choose from CvT_w24, "
    ):
        to_official("swin_L", {})


# --- what a model is asked to be -----------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_our_names_are_names_of_backbones(backbone: str) -> None:
    official = BACKBONES[backbone]
    assert resolve_name(official.backbone) == official.backbone
    raw = backbone.startswith("tresnet")
    assert official.mean == ((0.0, 0.0, 0.0) if raw else (0.485, 0.456, 0.406))
    assert official.std == ((1.0, 1.0, 1.0) if raw else (0.229, 0.224, 0.225))
    values = golden.load(f"q2l/{GOLDEN[backbone]}.json")
    assert values["feature_shape"][2] * official.stride == values["img_size"]


# --- features ------------------------------------------------------------------------------------


def official_network(backbone: str, size_px: int, tensors: Mapping[str, Tensor]) -> Network:
    """Our network with the tensors of an official file."""
    name = BACKBONES[backbone].backbone
    build = own_network if name in OWN_MODELS else timm_network
    network = build(name, Weights(random=True), size_px)
    wanted = network.module.state_dict()
    network.module.load_state_dict(from_official(backbone, tensors, wanted), strict=True)
    network.module.eval()
    return network


def features(name: str) -> Tensor:
    """The last map (2, C, H, W) of a golden file's model on its images."""
    values = golden.load(f"q2l/{name}.json")
    tensors = official_weights.weights(name, PREFIX)
    tensors = {key.removeprefix(PREFIX): each for key, each in tensors.items()}
    network = official_network(values["backbone"], values["img_size"], tensors)
    reader = LayerReader(network, (), (TOKENS,))
    shape = values["feature_shape"]
    images = [
        official_weights.image(values["image_seed"], index, values["img_size"])
        for index in range(shape[0])
    ]
    with torch.inference_mode():
        found = reader(torch.stack(images))[LAYER]
    assert found.grid == tuple(shape[2:])
    assert found.tokens is not None
    return found.tokens.mT.reshape(shape)


@pytest.mark.official
@pytest.mark.parametrize("name", official_weights.NAMES)
def test_features_are_those_of_the_authors_code(name: str) -> None:
    values = golden.load(f"q2l/{name}.json")
    got = features(name)
    assert list(got.shape) == values["feature_shape"]
    channels, height, width = got.shape[1:]
    found = {
        "feature_mean": got.mean((1, 2, 3)),
        "feature_std": got.std((1, 2, 3)),
        "feature_probe": got[:, :: max(1, channels // 8), height // 2, width // 2].flatten(),
    }
    for kind, each in found.items():
        want = torch.tensor(values[kind])
        print(f"{name} {kind} differs by {float((each - want).abs().max()):.1e}")
        torch.testing.assert_close(each, want, rtol=0, atol=1e-3)
