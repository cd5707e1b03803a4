"""timm's models as networks: names, tags, sizes."""

import logging
from collections.abc import Collection
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import (
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    split_model_name_tag,
)

from mlc.configs.errors import MlcError, nearest
from mlc.extract.network import Network, Weights, build_model, cannot_take

# A bare name means the weights that the literature means: both papers use torchvision's V1.
PAPER_TAGS = {"resnet50": "tv_in1k", "resnet101": "tv_in1k"}
HUB = "hf-hub:"
FINAL = "forward_features"  # timm's method: all of a model but its pooling and classifier


def resolve_timm_name(name: str, others: Collection[str] = ()) -> str:
    """Return the full timm name that a name means: ``resnet50`` is ``resnet50.tv_in1k``.

    Args:
        name: with or without a tag.
        others: names of models that are not timm's, to be proposed too if there is no such model.

    Raises:
        MlcError: timm has no such model, or no such tag of it.
    """
    if name.startswith(HUB):
        return name
    architecture, tag = map(str, split_model_name_tag(name))
    if not is_model(architecture):
        known = [*list_models(), *others]
        raise MlcError(f"unknown backbone {architecture!r}; {nearest(architecture, known)}")
    tags = [each.partition(".")[2] for each in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise MlcError(f"unknown tag {tag!r} of {architecture}; {nearest(tag, tags)}")
    if not tag:
        cfg = get_pretrained_cfg(architecture)
        tag = PAPER_TAGS.get(architecture) or (cfg.tag if cfg else "")
    return f"{architecture}.{tag}" if tag else architecture


def timm_network(name: str, weights: Weights, size_px: int | None) -> Network:
    """Build a timm model without its classifier.

    Args:
        name: in full, see ``resolve_timm_name``.
        weights: which ones.
        size_px: side of the square input; by default the model's own.

    Raises:
        MlcError: its weights cannot be had or do not fit, or it cannot take images of this size.
    """
    # The hub's client retries for a minute and logs each try; one sentence at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    model, licence = build_model(
        name,
        weights,
        lambda: timm.create_model(name, pretrained=weights.published),
        online=name.startswith(HUB),
    )
    cfg = resolve_model_data_config(model)
    native_px = int(cfg["input_size"][-1])
    model.reset_classifier(0)
    return Network(
        architecture=str(model.pretrained_cfg.get("architecture") or name),
        module=_resized(model, name, size_px or native_px, native_px),
        licence=licence or str(model.pretrained_cfg.get("license") or "unknown"),
        native_px=native_px,
        size_px=size_px or native_px,
        interpolation=str(cfg["interpolation"]),
        mean=tuple(float(each) for each in cfg["mean"]),
        std=tuple(float(each) for each in cfg["std"]),
        final=FINAL if hasattr(model, FINAL) else None,
        prefix=int(getattr(model, "num_prefix_tokens", 0)),
        channels_last=getattr(model, "output_fmt", None) == "NHWC",
    )


def _resized(model: Any, name: str, size_px: int, native_px: int) -> Any:
    """Let a model that is built for one size (a ViT's position embeddings) take another."""
    if size_px != native_px and hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=size_px)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise cannot_take(name, size_px, error) from None
    return model
