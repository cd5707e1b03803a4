"""fit(): from a config to a run folder: ``mlc train-head``, and each head of a sweep."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.device import choose_device
from mlc.configs.errors import choose
from mlc.configs.progress import Progress, silent
from mlc.datasets.labels import SPLITS, LabelTable
from mlc.datasets.protocol import apply_protocol
from mlc.datasets.source import absolute_data
from mlc.heads.checkpoint import discard_checkpoint
from mlc.heads.config import (
    NOT_SETTINGS,
    ProtocolConfig,
    TrainConfig,
    check_config,
    default_labels,
    settle_knobs,
    splits_in_views,
)
from mlc.heads.inputs import Features, Split, join, read_features, read_labels, relabel
from mlc.heads.modules import AFFINE, DECODERS, HEADS
from mlc.heads.run_folder import Run, folder_aside, read_run, require_free
from mlc.heads.train import train_head
from mlc.heads.trained import Diverged, TrainedHead
from mlc.heads.training_labels import check_labels
from mlc.heads.written import Prepared, write_trained

OF_BACKBONE = ("backbone", "weights_licence", "backbone_config")  # of what a store recorded
NOT_OF_OPTIMUM = {"lr", "batch_size", "weight_decay", "epochs", "seed", "order_seed"}


def read_inputs(config: ProtocolConfig) -> tuple[Features, LabelTable]:
    """Read the features and labels that a config names, all views where it has a use for them.

    Raises:
        MlcError: see ``read_features`` and ``read_labels``.
    """
    features = read_features(
        config.features,
        config.layer,
        choose(HEADS, config.head, "head").reads,
        all_views=bool(splits_in_views(config)),
        check=config.check,
    )
    return features, read_labels(config, features.path)


def prepare(
    config: TrainConfig, features: Features, table: LabelTable, like: Prepared | None = None
) -> Prepared:
    """Apply a config's protocol to a table as read, and join it with the features.

    Args:
        config: of the protocol.
        features: by ``read_inputs``.
        table: as read.
        like: the same table under another protocol of the same split seed, whose features are
            shared: those of COCO are a gigabyte.

    Raises:
        MlcError: see ``apply_protocol``, ``join`` and ``choose_device``.
    """
    shown, names = shown_labels(config, table)
    if like is None:
        device, views = choose_device(config.device), splits_in_views(config)
        splits = join(features, shown, device, names, in_all_views=views)
        splits = {name: _as_seen(config.head, split) for name, split in splits.items()}
    else:
        splits = relabel({name: like.splits[name] for name in names}, shown)
    splits.setdefault("val", splits["test"])
    return Prepared(table.digest() if like is None else like.source, shown, splits)


def shown_labels(config: TrainConfig, table: LabelTable) -> tuple[LabelTable, tuple[str, ...]]:
    """Return a table as a config's protocol shows it, and the splits that it then has.

    Raises:
        MlcError: see ``apply_protocol``.
    """
    shown = apply_protocol(
        table,
        default_labels(config, table),
        split_seed=config.split_seed,
        corruption_seed=config.corruption_seed,
        label_share=config.label_share,
        negatives=config.negatives,
    )
    if config.select_on == "val":
        return shown, SPLITS
    # All that is not test is trained on.
    shown = replace(shown, split=np.where(shown.split == "test", "test", "train"))
    return shown, ("train", "test")


def resolve(config: TrainConfig, features: Features, prepared: Prepared) -> TrainConfig:
    """Return a config with nothing left open: enough to repeat the run from any folder.

    Raises:
        MlcError: see ``check_config``, ``settle_knobs`` and ``require_free``.
    """
    check_config(config)
    table = prepared.table
    path = config.out or run_path(config, features, prepared.source)
    require_free(path)
    settled: dict[str, Any] = {
        "labels": default_labels(config, table),
        **{name: _absolute(getattr(config, name)) for name in ("root", "labels_file")},
        "data": None if config.data is None else absolute_data(config.data),
        "features": features.path.resolve(),
        "knobs": settle_knobs(config, table),
        "out": path,
    }
    return config.model_copy(update=settled)


def fit(
    config: TrainConfig, features: Features, prepared: Prepared, progress: Progress = silent
) -> Run:
    """Train one head and write its run folder.

    Args:
        config: what to train.
        features: of the store.
        prepared: by ``prepare``, with a config of the same protocol.
        progress: told after each epoch.

    Raises:
        MlcError: see ``check_labels``, ``resolve``, ``train_head`` and ``write_run``.
        KeyboardInterrupt: of a head of tokens with a message that says what is kept.
    """
    check_labels(config.loss, prepared.splits["train"].observed.cpu().numpy())
    resolved = resolve(config, features, prepared)
    try:
        run = keep(resolved, train_head(resolved, prepared.splits, progress), features, prepared)
    except KeyboardInterrupt:
        if prepared.splits["train"].tokens is None:
            raise
        raise KeyboardInterrupt(
            f"{resolved.out}: stopped; the same command goes on from the last state that was saved"
        ) from None
    except Diverged:
        discard_checkpoint(resolved.out)
        raise
    discard_checkpoint(resolved.out)
    return run


def keep(config: TrainConfig, trained: TrainedHead, features: Features, prepared: Prepared) -> Run:
    """Write the run folder of a trained head.

    Args:
        config: resolved.
        trained: the head.
        features: that it was trained on.
        prepared: labels and splits, likewise.
    """
    assert config.out is not None
    made = {
        "store": str(features.path.resolve()),
        "digest": features.digest,
        **({} if config.layer is None else {"layer": config.layer}),
        **_size(prepared.splits["train"]),
        "key": dict(features.key),
        **{name: features.made_by[name] for name in OF_BACKBONE},
    }
    with folder_aside(config.out) as partial:
        write_trained(partial, config, trained, prepared, made)
    return read_run(config.out)


def run_path(
    config: TrainConfig, features: Features, source: str, folder: Path = Path("runs")
) -> Path:
    """Return the default run folder: the same settings, features and labels, the same path.

    Args:
        config: of the run.
        features: what it trains on.
        source: hash of the label table as read.
        folder: that holds the run folders.
    """
    # Not the defaults: a field that a later version adds does not rename the runs of this one.
    unused = NOT_OF_OPTIMUM if config.solver == "lbfgs" else set()
    if config.layer in features.key.get("layers", ())[:1]:  # that of who names none
        unused = unused | {"layer"}
    settings = config.model_dump(mode="json", exclude=NOT_SETTINGS | unused, exclude_defaults=True)
    text = json.dumps([settings, dict(features.key), features.digest, source], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    if config.solver == "lbfgs":
        return folder / f"{config.loss}-lbfgs-{digest}"
    head = f"{config.head}-" if config.head in DECODERS else ""
    name = f"{head}{config.loss}-lr{config.lr:g}-bs{config.batch_size}-seed{config.seed}-{digest}"
    return folder / name


def _as_seen(head: str, split: Split) -> Split:
    if head not in AFFINE:
        return split
    inputs = AFFINE[head].inputs
    if split.views is None:
        return replace(split, features=inputs(split.features))
    views = inputs(split.views.flatten(0, 1)).view_as(split.views)
    return replace(split, features=views[0], views=views)


def _size(split: Split) -> dict[str, Any]:
    """Return the sizes of the features that a head was made for."""
    if split.tokens is None:
        return {"width": split.features.shape[1]}
    return {"width": split.tokens.width, "grid": split.tokens.grid}


def _absolute(path: Path | None) -> Path | None:
    """Return a path that a run can be used with from any folder."""
    return None if path is None else path.resolve()
