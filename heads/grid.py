"""grid_of(): the heads of a sweep."""

from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mlc.configs import Config
from mlc.configs.errors import MlcError, choose, nearest
from mlc.heads.config import ProtocolConfig, TrainConfig
from mlc.heads.full_batch import CONVEX
from mlc.losses.table import LOSSES

ALL = ("all",)


class OwnGrid(Config):
    """What is tried of one loss in the place of what is tried of all; None is no other."""

    lr: tuple[float, ...] | None = None
    weight_decay: tuple[float, ...] | None = None
    batch_size: tuple[int, ...] | None = None


class SweepConfig(ProtocolConfig):
    """A grid of heads.

    Attributes:
        losses: keys of LOSSES; ("all",) is all of them.
        solvers: "adam", "lbfgs" or both; of the latter there is a head for each convex loss, whose
            strength is its own affair.
        lr: of Adam.
        weight_decay: see TrainConfig.
        batch_size: images a step.
        grids: of losses that have others of these three, e.g. ``{nnpu: {batch_size: [64, 256]}}``;
            those that are not trained are no matter.
        hidden_dim: widths of heads that attend, see DecoderConfig.
        seeds: of the initial weights and the label estimator.
        vary: what else a seed changes: it is then added to ``order_seed`` or to
            ``corruption_seed``.
        out: the folder of the run folders.
    """

    losses: tuple[str, ...] = ("all",)
    solvers: tuple[Literal["adam", "lbfgs"], ...] = ("adam",)
    lr: tuple[float, ...] = (1e-3,)
    weight_decay: tuple[float, ...] = (0.0,)
    batch_size: tuple[int, ...] = (16,)
    grids: dict[str, OwnGrid] = Field(default_factory=dict)
    hidden_dim: tuple[int, ...] | None = None  # type: ignore[assignment]
    seeds: tuple[int, ...] = (0,)
    vary: tuple[Literal["order", "corruption"], ...] = ()
    out: Path = Path("runs")


def grid_of(config: SweepConfig) -> list[TrainConfig]:
    """Return the config of each head, losses outermost and seeds innermost.

    Raises:
        MlcError: a list is empty, a loss is unknown, or a knob belongs to none of the losses.
    """
    losses = tuple(LOSSES) if config.losses == ALL else config.losses
    if ALL[0] in losses:
        raise MlcError(f"losses: 'all' stands alone, got {', '.join(losses)}")
    for name in ("losses", "solvers", "batch_size", "hidden_dim", "lr", "weight_decay", "seeds"):
        _require_values(name, getattr(config, name))
    for loss, grid in config.grids.items():
        choose(LOSSES, loss, "loss of grids")
        for name in OwnGrid.model_fields:
            _require_values(f"grids.{loss}.{name}", getattr(grid, name))
    known = {loss: choose(LOSSES, loss, "loss").knobs() for loss in losses}
    if len(set(config.vary)) != len(config.vary):
        raise MlcError(f"vary: has a value twice, got {config.vary}")
    for knob in config.knobs:
        if not any(knob in knobs for knobs in known.values()):
            names = {name for knobs in known.values() for name in knobs}
            raise MlcError(f"knobs: none of these losses has {knob!r}; {nearest(knob, names)}")
    heads = [
        _config_of(config, loss=loss, **own)
        for loss in (losses if "adam" in config.solvers else ())
        for own in _own(config, loss)
    ]
    if "lbfgs" not in config.solvers:
        return heads
    convex = [loss for loss in losses if loss in CONVEX]
    if not convex:
        raise MlcError(f"solvers: lbfgs is for the convex losses {', '.join(CONVEX)}, got none")
    # An optimum has no learning rate and no initial weights, but it depends on the labels.
    seeds = config.seeds if "corruption" in config.vary else config.seeds[:1]
    return heads + [
        _config_of(config, loss=loss, solver="lbfgs", seed=seed)
        for loss, seed in product(convex, seeds)
    ]


def _require_values(name: str, values: tuple[Any, ...] | None) -> None:
    if values is None:  # the head's own, or that of all losses
        return
    if not values:
        raise MlcError(f"{name}: is empty; give at least one")
    if len(set(values)) != len(values):
        raise MlcError(f"{name}: has a value twice, got {values}")


def _own(config: SweepConfig, loss: str) -> list[dict[str, Any]]:
    """Return in what the heads of a loss differ, seeds innermost."""
    own = config.grids.get(loss, OwnGrid())
    lists = {
        "batch_size": own.batch_size or config.batch_size,
        "hidden_dim": config.hidden_dim or (None,),
        "lr": own.lr or config.lr,
        "weight_decay": own.weight_decay or config.weight_decay,
        "seed": config.seeds,
    }
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _config_of(config: SweepConfig, *, loss: str, seed: int, **own: Any) -> TrainConfig:
    known = LOSSES[loss].knobs()
    fields = config.model_dump(include=set(ProtocolConfig.model_fields)) | {
        "hidden_dim": None,
        "loss": loss,
        "seed": seed,
        "knobs": {name: each for name, each in config.knobs.items() if name in known},
        **{f"{what}_seed": getattr(config, f"{what}_seed") + seed for what in config.vary},
        **own,
    }
    return TrainConfig(**fields)
