"""grid_of(): the heads of a sweep."""

from itertools import product
from pathlib import Path
from typing import Any, Literal

from mlc.configs.errors import MlcError, choose, nearest
from mlc.heads.config import ProtocolConfig, TrainConfig
from mlc.heads.full_batch import CONVEX
from mlc.losses.table import LOSSES

ALL = ("all",)


class SweepConfig(ProtocolConfig):
    """A grid of heads.

    Attributes:
        losses: keys of LOSSES; ("all",) is all of them.
        solvers: "adam", "lbfgs" or both; of the latter there is a head for each convex loss, whose
            strength is its own affair.
        lr: of Adam.
        weight_decay: see TrainConfig.
        batch_size: images a step.
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
        values = getattr(config, name)
        if values is None:  # hidden_dim: the head's own
            continue
        if not values:
            raise MlcError(f"{name}: is empty; give at least one")
        if len(set(values)) != len(values):
            raise MlcError(f"{name}: has a value twice, got {values}")
    known = {loss: choose(LOSSES, loss, "loss").knobs() for loss in losses}
    if len(set(config.vary)) != len(config.vary):
        raise MlcError(f"vary: has a value twice, got {config.vary}")
    for knob in config.knobs:
        if not any(knob in knobs for knobs in known.values()):
            names = {name for knobs in known.values() for name in knobs}
            raise MlcError(f"knobs: none of these losses has {knob!r}; {nearest(knob, names)}")
    grid = [
        _config_of(
            config,
            loss=loss,
            batch_size=size,
            hidden_dim=width,
            lr=lr,
            weight_decay=decay,
            seed=seed,
        )
        for loss, size, width, lr, decay, seed in product(
            losses if "adam" in config.solvers else (),
            config.batch_size,
            config.hidden_dim or (None,),
            config.lr,
            config.weight_decay,
            config.seeds,
        )
    ]
    if "lbfgs" not in config.solvers:
        return grid
    convex = [loss for loss in losses if loss in CONVEX]
    if not convex:
        raise MlcError(f"solvers: lbfgs is for the convex losses {', '.join(CONVEX)}, got none")
    # An optimum has no learning rate and no initial weights, but it depends on the labels.
    seeds = config.seeds if "corruption" in config.vary else config.seeds[:1]
    return grid + [
        _config_of(config, loss=loss, solver="lbfgs", seed=seed)
        for loss, seed in product(convex, seeds)
    ]


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
