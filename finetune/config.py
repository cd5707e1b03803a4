"""FinetuneConfig: a head and its backbone, trained together on images."""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from mlc.configs.errors import MlcError, choose
from mlc.extract.backbone import BackboneConfig
from mlc.finetune.augment import AugmentConfig, check_augment
from mlc.heads.config import TrainConfig, check_rate, check_settings
from mlc.heads.modules import HEADS
from mlc.losses.table import LOSSES

# Settings of heads on cached features, of which images that are streamed have no use.
OF_FEATURES = (
    "features",
    "eval_views",
    "check",
    "labels_file",
    "view_augment",
    "solver",
    "strengths",
    "token_dropout",
)
# Of BackboneConfig, by the same names.
OF_BACKBONE = (
    "backbone",
    "weights",
    "weights_licence",
    "random_weights",
    "size_px",
    "interpolation",
)


class FinetuneConfig(TrainConfig, AugmentConfig):
    """One model, backbone and head.

    What a head has on cached features it has here too, but for ``OF_FEATURES``; the recipe, see
    RecipeConfig, is of every head.

    Attributes:
        data: see DataConfig.
        backbone: a name, and what follows it, as BackboneConfig has them.
        init: a run folder to start from: its head, and if its loss has a label estimator its
            estimates; of a fine-tuned run its backbone too.
        freeze: modules of the backbone by name, as "layer1" or with wildcards, which are not
            trained, nor are those in them: their norms and dropout are as in evaluation. "*" is
            the whole backbone.
        frozen_batch_norm: no BatchNorm of the backbone is trained, or counts what it sees.
        backbone_lr: learning rate of the backbone, by default the head's.
        precision: of the forward pass: "float32", or on GPUs "bfloat16", or "float16" with one
            scale of the loss for the whole run.
        activation_checkpointing: work activations out again in the backward pass, for memory;
            BatchNorms that are not frozen then count each batch twice.
        compile: the model by torch.compile.
        workers: threads that decode and augment; by default one for each core.
        on_error: "skip" leaves a bad image out of its batch and lists it, "raise" stops at it.
        tensorboard: write what ``metrics.jsonl`` has as event files below the run folder's name
            and ``-tensorboard`` too.
    """

    data: str | None = "coco"  # type: ignore[assignment]
    lr: float = 1e-5
    epochs: int = 10
    backbone: str = "resnet50"
    weights: Path | None = None
    weights_licence: str | None = None
    random_weights: bool = False
    size_px: int | None = None
    interpolation: str | None = None
    init: Path | None = None
    freeze: tuple[str, ...] = ()
    frozen_batch_norm: bool = False
    backbone_lr: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # type: ignore[assignment]
    activation_checkpointing: bool = False
    compile: bool = False
    workers: int | None = None
    on_error: Literal["skip", "raise"] = "skip"
    tensorboard: bool = False

    @field_validator("freeze", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, list) else value

    def of_backbone(self) -> BackboneConfig:
        """Return the backbone as extraction would make features of it, for this head to read."""
        return BackboneConfig(
            **self.model_dump(include=set(OF_BACKBONE)),
            layers=() if self.layer is None else (self.layer,),
            features=(f"{HEADS[self.head].reads}:float32",),
        )


def check_finetune(config: FinetuneConfig) -> None:
    """Raise an MlcError for whatever can be seen to be wrong before any work starts."""
    choose(HEADS, config.head, "head")
    for name in sorted(config.model_dump(exclude_defaults=True).keys() & set(OF_FEATURES)):
        raise MlcError(
            f"{name}: is of heads on cached features, which mlc train-head trains; leave it out"
        )
    check_settings(config)
    check_augment(config)
    if config.backbone_lr is not None:
        check_rate("backbone_lr", config.backbone_lr)
    for name in ("workers", "size_px"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise MlcError(f"{name}: should be at least 1, got {value}")
    if config.activation_checkpointing and config.layer is not None:
        raise MlcError(
            f"activation_checkpointing: does not go with the layer {config.layer}, which is within "
            "what is worked out again; leave one of them out"
        )
    if config.schedule != "constant" and LOSSES[config.loss].has_estimator:
        raise MlcError(
            f"schedule: the label estimator of {config.loss} has a constant learning rate, got "
            f"{config.schedule}; leave it out"
        )
