"""What an official Query2Label checkpoint says of itself: by its tensors, and by its JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mlc.configs.errors import MlcError, choose, nearest
from mlc.extract.backbone import BackboneConfig
from mlc.extract.query2label import BACKBONES, INTERPOLATION, OfficialBackbone
from mlc.heads.config import TrainConfig
from mlc.heads.decoder import SelfAttention
from mlc.heads.head_size import HeadSize
from mlc.heads.query2label import ATTENTION_HEADS

HEAD = "q2l"  # of HEADS
BACKBONE, POSITION = "backbone.0.", "backbone.1.pe"  # how names of tensors begin
THRESHOLD = 0.823  # gives the paper's CP to OF1 of the released Q2L-R101-448
RELEASED = {"enc_layers": 1, "dec_layers": 2}  # of all six; a file may lack layers
SINE = ("sine", "v2")  # two names of one position code
# A tensor that an official backbone has and no other one, and its shape.
MARKS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet101": ("body.layer3.22.conv3.weight", (1024, 256, 1, 1)),
    "tresnetl": ("body.body.conv1.0.weight", (76, 48, 3, 3)),
    "tresnetl_v2": ("body.body.conv1.0.weight", (64, 48, 3, 3)),
    "swin_L_384_22k": ("layers.0.blocks.0.attn.relative_position_bias_table", (529, 6)),
    "CvT_w24": ("stage0.patch_embed.proj.weight", (192, 3, 7, 7)),
}
SELF_ATTENTION: dict[tuple[bool, bool], SelfAttention] = {
    (False, False): "none",
    (True, False): "first",
    (False, True): "others",
    (True, True): "all",
}


@dataclass(frozen=True)
class OfficialModel:
    """An official model.

    Attributes:
        backbone: a key of BACKBONES.
        size: of its head: width of the backbone's tokens, classes, their grid.
        config: of its head.
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
    """

    backbone: str
    size: HeadSize
    config: TrainConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def official(self) -> OfficialBackbone:
        """Return what is known of its backbone."""
        return BACKBONES[self.backbone]

    @property
    def size_px(self) -> int:
        """Return the side of its images."""
        return self.size.of_grid()[0] * self.official.stride

    @property
    def backbone_config(self) -> BackboneConfig:
        """Return its backbone without weights, giving what its head reads."""
        return BackboneConfig(
            backbone=self.official.backbone,
            size_px=self.size_px,
            interpolation=INTERPOLATION,
            features=("tokens",),
        )


def describe(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> OfficialModel:
    """Return what a checkpoint is, by most of its tensors; what does not fit is not looked for.

    Args:
        tensors: by their official names.
        settings: fields of its JSON; those that nobody here needs are ignored. Only the number
            of attention heads, dropout and the normalisation are not seen in the tensors.

    Raises:
        MlcError: it is no Query2Label model, or one that nobody can rebuild; its backbone is not
            one of the six; or JSON and tensors contradict each other.
    """
    _require_supported(tensors, settings)
    backbone = _backbone_of(tensors, settings)
    official, seen = BACKBONES[backbone], _seen(tensors)
    grid = seen.pop("grid") or (settings.get("img_size", official.stride) // official.stride,) * 2
    if grid[0] != grid[1]:
        raise MlcError(f"{POSITION}: images here are squares, got a grid of {grid[0]} x {grid[1]}")
    found = seen | {"backbone": backbone, "img_size": grid[0] * official.stride}
    _require_agreement(found, settings)
    _require_whole(seen, settings)
    projection = tensors.get("input_proj.weight")
    width = seen["hidden_dim"]
    if projection is not None and projection.ndim == 4:
        width = projection.shape[1]
    return OfficialModel(
        backbone,
        HeadSize(width, seen["num_class"], (grid[0], grid[1])),
        _config(seen, settings),
        *_normalisation(official, settings),
    )


def _config(seen: Mapping[str, Any], settings: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(
        head=HEAD,
        loss="asl",
        labels="full",
        hidden_dim=seen["hidden_dim"],
        ffn_dim=seen["dim_feedforward"],
        attention_heads=settings.get("nheads", ATTENTION_HEADS),
        encoder_layers=seen["enc_layers"],
        decoder_layers=seen["dec_layers"],
        self_attention=SELF_ATTENTION[
            seen["keep_first_self_attn_dec"], seen.get("keep_other_self_attn_dec", False)
        ],
        input_projection=seen["keep_input_proj"],
        dropout=settings.get("dropout", 0.1),
        threshold=THRESHOLD,
    )


def _require_supported(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    norms = [name for name in tensors if name.startswith("transformer.encoder.norm.")]
    if settings.get("pre_norm") or norms:
        what = "pre_norm: true" if settings.get("pre_norm") else norms[0]
        raise MlcError(
            f"{what}: norms before attention are not of a released model, nor does the authors' "
            "code run with them; pass a model with norms after it"
        )
    position = settings.get("position_embedding", SINE[0])
    if position not in SINE:
        raise MlcError(f"position_embedding: should be sine, got {position!r}")
    for name in ("nheads", "img_size"):
        value = settings.get(name, 1)
        if type(value) is not int or value < 1:
            raise MlcError(f"{name}: should be a number from 1, got {value!r}")
    dropout = settings.get("dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise MlcError(f"dropout: should be at least 0 and below 1, got {dropout!r}")


def _backbone_of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    named = settings.get("backbone")
    if named is not None:
        choose(BACKBONES, str(named), "official backbone")
    for backbone, (name, shape) in MARKS.items():
        tensor = tensors.get(BACKBONE + name)
        if tensor is not None and tuple(tensor.shape) == shape:
            return backbone
    if named is None:
        raise MlcError(
            "backbone: its tensors are of no official Query2Label model; "
            f"{nearest('', BACKBONES)}, and name it as backbone in --config-json"
        )
    return str(named)


def _seen(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the tensors of the head say, by the names of the JSON, and their "grid".

    A width is what most tensors that have it say, so that one of another shape is found to be so.
    """
    shapes = {
        name: tuple(each.shape) for name, each in tensors.items() if not name.startswith(BACKBONE)
    }
    layers = {
        kind: {
            int(name.split(".")[3])
            for name in shapes
            if name.startswith(f"transformer.{kind}.layers.") and name.split(".")[3].isdecimal()
        }
        for kind in ("encoder", "decoder")
    }
    attends = {
        layer: any(f".decoder.layers.{layer}.self_attn." in name for name in shapes)
        for layer in layers["decoder"]
    }
    pe = shapes.get(POSITION, ())
    others = [layer for layer in attends if layer > 0]
    return {
        "hidden_dim": _most(
            shape[-1] for name, shape in shapes.items() if shape and _ends_in_width(name)
        ),
        "dim_feedforward": _most(
            shape[0] for name, shape in shapes.items() if ".linear1." in name and shape
        ),
        "num_class": _most(
            shapes[name][axis]
            for name, axis in (("query_embed.weight", 0), ("fc.W", 1), ("fc.b", 1))
            if len(shapes.get(name, ())) > axis
        ),
        "enc_layers": len(layers["encoder"]),
        "dec_layers": len(layers["decoder"]),
        "keep_input_proj": any(name.startswith("input_proj.") for name in shapes),
        "keep_first_self_attn_dec": attends.get(0, False),
        **({"keep_other_self_attn_dec": any(attends[layer] for layer in others)} if others else {}),
        "grid": pe[2:] if len(pe) == 4 else None,
    }


def _ends_in_width(name: str) -> bool:
    """Return whether the last axis of a tensor is as wide as the head."""
    return (
        name in ("query_embed.weight", "fc.W")
        or ".norm" in name
        or name.endswith((".in_proj_weight", ".out_proj.bias", ".linear1.weight", ".linear2.bias"))
    )


def _most(values: Iterable[int]) -> int:
    counted = Counter(values).most_common(1)
    if not counted:
        raise MlcError(
            "head: has no tensors of a Query2Label head (query_embed, transformer, fc); "
            "pass the authors' checkpoint.pkl"
        )
    return counted[0][0]


def _require_agreement(found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    contradictions = [
        f"{field}: the JSON has {settings[field]!r}, the tensors {value!r}"
        for field, value in found.items()
        if field in settings and settings[field] != value
    ]
    if contradictions:
        raise MlcError(f"{'; '.join(contradictions)}; pass the JSON of this checkpoint, or none")


def _require_whole(seen: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a head without classes or layers, and one of other layers that nobody asked for."""
    for field in ("dec_layers", "num_class", "hidden_dim", "dim_feedforward"):
        if seen[field] < 1:
            raise MlcError(f"{field}: should be at least 1, got {seen[field]}; pass a whole file")
    others = [
        f"{field}: should be {count} as in the released models, got {seen[field]}"
        for field, count in RELEASED.items()
        if seen[field] != count and field not in settings
    ]
    if others:
        names = " and ".join(each.partition(":")[0] for each in others)
        raise MlcError(
            f"{'; '.join(others)}; if the file is not cut short, say so with {names} in the JSON "
            "of --config-json"
        )


def _normalisation(
    official: OfficialBackbone, settings: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std: ``orid_norm`` is none at all, its absence ImageNet's."""
    if "orid_norm" not in settings:
        return official.mean, official.std
    if settings["orid_norm"]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
