"""sweep(): a grid of heads on one store; finished heads are kept and not trained again."""

from itertools import product
from pathlib import Path
from typing import Literal

from mlc.configs.errors import MlcError, choose, nearest
from mlc.configs.progress import Progress, silent
from mlc.heads.fit import Prepared, fit, prepare, run_path
from mlc.heads.inputs import read_features, read_labels
from mlc.heads.losses import LOSSES
from mlc.heads.run_folder import RESULTS, Run, read_run
from mlc.heads.train import ProtocolConfig, TrainConfig, check_config, default_labels


class SweepConfig(ProtocolConfig):
    """A grid of heads.

    Attributes:
        losses: keys of LOSSES; ("all",) is all of them.
        lr: of Adam.
        batch_size: images a step.
        seeds: of the initial weights and the label estimator.
        vary: what else a seed changes: it is then added to ``order_seed`` or to
            ``corruption_seed``.
        out: the folder of the run folders.
    """

    losses: tuple[str, ...] = ("all",)
    lr: tuple[float, ...] = (1e-3,)
    batch_size: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0,)
    vary: tuple[Literal["order", "corruption"], ...] = ()
    out: Path = Path("runs")


def sweep(config: SweepConfig, progress: Progress = silent) -> list[Run]:
    """Train every head of a grid, one after the other.

    Args:
        config: the grid.
        progress: told after each head.

    Returns:
        The runs, in the order of the grid.

    Raises:
        MlcError: whatever is wrong with any head, before the first is trained.
        KeyboardInterrupt: with a message that says what is kept.
    """
    grid = grid_of(config)
    for each in grid:
        check_config(each)
    features = read_features(config.features)
    table = read_labels(config, features.path)
    source = table.digest()
    prepared: dict[tuple[object, ...], Prepared] = {}
    runs: list[Run] = []
    try:
        for each in grid:
            path = run_path(each, features, source, config.out)
            if not (path / RESULTS).is_file():
                protocol = (default_labels(each, table), each.corruption_seed)
                if protocol not in prepared:  # only the last is kept: each holds the features
                    prepared = {protocol: prepare(each, features, table)}
                fit(each.model_copy(update={"out": path}), features, prepared[protocol])
            runs.append(read_run(path))
            progress(len(runs), len(grid), path.name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{config.out}: stopped, {len(runs)} of {len(grid)} heads are kept; "
            "the same command goes on from there"
        ) from None
    return runs


def grid_of(config: SweepConfig) -> list[TrainConfig]:
    """Return the config of each head, losses outermost and seeds innermost.

    Raises:
        MlcError: a list is empty, a loss is unknown, or a knob belongs to none of the losses.
    """
    losses = tuple(LOSSES) if config.losses == ("all",) else config.losses
    for name in ("losses", "batch_size", "lr", "seeds"):
        values = getattr(config, name)
        if not values:
            raise MlcError(f"{name}: is empty; give at least one")
        if len(set(values)) != len(values):
            raise MlcError(f"{name}: has a value twice, got {values}")
    known = {loss: choose(LOSSES, loss, "loss").knobs() for loss in losses}
    for knob in config.knobs:
        if not any(knob in knobs for knobs in known.values()):
            names = {name for knobs in known.values() for name in knobs}
            raise MlcError(f"knobs: none of these losses has {knob!r}; {nearest(knob, names)}")
    common = config.model_dump(include=set(ProtocolConfig.model_fields))
    grid = []
    for loss, size, lr, seed in product(losses, config.batch_size, config.lr, config.seeds):
        own = {
            "loss": loss,
            "batch_size": size,
            "lr": lr,
            "seed": seed,
            "knobs": {name: each for name, each in config.knobs.items() if name in known[loss]},
            **{f"{what}_seed": getattr(config, f"{what}_seed") + seed for what in config.vary},
        }
        grid.append(TrainConfig(**(common | own)))
    return grid
