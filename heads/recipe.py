"""RecipeConfig: how heads of tokens are trained beyond plain Adam."""

from typing import Literal

from mlc.configs import Config
from mlc.configs.errors import MlcError


class RecipeConfig(Config):
    """How a head of tokens is trained; the defaults are the protocol of linear heads.

    Attributes:
        optimiser: "adamw", whose decay is apart from the gradient, or "adam-l2", where it is added
            to the gradient: Query2Label's for its TResNets.
        decay: what decays: the "weights", and not biases and norms; or "all".
        schedule: "constant", or "one-cycle": see ``one_cycle``.
        loss_scale: the loss is multiplied by this; Query2Label's code has 1,000. Adam's steps do
            not depend on it, but for its epsilon and an L2 penalty.
        ema_decay: of a moving average of the parameters, which is scored too; the better of both
            is kept. None is no average.
        ema_warm_up: have the average begin fast: the decay of step t is at most
            (1 + t) / (10 + t).
        micro_batch: images that go through the head at once; the gradients of the parts of a batch
            are added. By default all.
        precision: "float32", or "bfloat16" where it is safe (autocast), on GPUs alone.
        token_dropout: share of an image's tokens that a step leaves out, drawn from ``order_seed``.
        patience: stop when more epochs than this are no better than the best before; by default
            never.
        select_on: the split whose mAP selects the epoch: "val", or "test" as Query2Label's authors
            do, with all other images to train on; such a result is too good, and says so.
        checkpoint_minutes: between two states on the disk, from which the same command goes on; one
            more is written after an epoch, if half a minute has gone by.
    """

    optimiser: Literal["adamw", "adam-l2"] = "adamw"
    decay: Literal["weights", "all"] = "weights"
    schedule: Literal["constant", "one-cycle"] = "constant"
    loss_scale: float = 1.0
    ema_decay: float | None = None
    ema_warm_up: bool = True
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    token_dropout: float = 0.0
    patience: int | None = None
    select_on: Literal["val", "test"] = "val"
    checkpoint_minutes: float = 10.0


def check_recipe(config: RecipeConfig) -> None:
    """Raise an MlcError for whatever can be seen to be wrong before any work starts."""
    for name, low in (("micro_batch", 1), ("patience", 1)):
        value = getattr(config, name)
        if value is not None and value < low:
            raise MlcError(f"{name}: should be at least {low}, got {value}")
    for name in ("token_dropout", "ema_decay"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise MlcError(f"{name}: should be at least 0 and below 1, got {value}")
    for name in ("loss_scale", "checkpoint_minutes"):
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise MlcError(f"{name}: should be a positive number, got {value}")
