"""WholeModel: the backbone that made a run's features, and the run's head on top of it."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mlc.configs.device import choose_device
from mlc.configs.errors import MlcError, choose
from mlc.configs.files import written_aside
from mlc.configs.progress import Progress, silent
from mlc.datasets.images import find_images
from mlc.datasets.labels import class_columns
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.config import EACH, worker_count
from mlc.extract.engines import AUTO
from mlc.extract.shards import batches_of
from mlc.extract.stream import stream_features
from mlc.heads.inputs import mean_of_views
from mlc.heads.modules import HEADS
from mlc.heads.run_folder import Run
from mlc.heads.train import probabilities
from mlc.store.key import current_key, feature_dtypes, require_same_key
from mlc.store.schema import feature

OF_THE_MACHINE = ("device", "precision", "engine")  # of a backbone's config


@dataclass(frozen=True)
class WholeModel:
    """Images -> logits.

    Attributes:
        run: what was trained.
        backbone: as it was when the features were made, of which it gives those that the head
            reads, of its layer and of the views that the run's ``eval_views`` takes.
        head: of the run, on the backbone's device.
    """

    run: Run
    backbone: Backbone
    head: nn.Module

    def logits(
        self, files: Sequence[Path], progress: Progress = silent
    ) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Score images.

        Args:
            files: N images.
            progress: told after each batch.

        Returns:
            (N, L) float32, and the reason of each bad image by its index; its row is zeros.
        """
        logits = np.zeros((len(files), len(self.run.classes)), dtype=np.float32)
        bad: dict[int, str] = {}
        batches = batches_of(range(len(files)), self.backbone.batch_size)
        name = feature(self.backbone.key.layers[0], HEADS[self.run.config.head].reads)
        for batch in stream_features(self.backbone, files, batches, worker_count(None)):
            with torch.inference_mode():
                of_views = [self.head(view) for view in batch.features[name].unbind(1)]
                scores = mean_of_views(of_views).cpu().numpy()
            good = batch.error == ""
            logits[np.asarray(batch.rows)[good]] = scores[good]
            bad |= {
                row: str(error) for row, error in zip(batch.rows, batch.error, strict=True) if error
            }
            progress(batch.rows.stop, len(files), f"{len(bad)} bad" if bad else "")
        return logits, bad


def load_whole(run: Run, weights: Path | None = None, device: str = "auto") -> WholeModel:
    """Rebuild the model whose backbone made a run's features.

    Args:
        run: what was trained.
        weights: where the backbone's weights file is now, if it moved.
        device: where to run. The precision is that of the features; of half precision, which
            only GPUs have, float32 on a CPU.

    Raises:
        MlcError: the backbone cannot be had, or is not the same any more.
    """
    settings = backbone_settings(run)
    stored = current_key(run.results["features"]["key"])
    on_gpu = choose_device(device).type == "cuda"
    settings |= {
        "device": device,
        "precision": stored["precision"] if on_gpu else "float32",
        "engine": AUTO,  # which is as near to eager torch as the one that made the features
        "layers": (run.config.layer or stored["layers"][0],),
        "features": (choose(HEADS, run.config.head, "head").reads,),
        "views": tuple(stored["views"][: None if run.config.eval_views == "mean" else 1]),
    }
    if weights is not None:
        settings["weights"] = weights
    backbone = load_backbone(BackboneConfig(**settings))
    # What else was stored of the same images does not change what the head reads.
    asked = replace(
        backbone.key,
        precision=stored["precision"],
        engine=stored["engine"],
        layers=tuple(stored["layers"]),
        features=tuple(stored["features"]),
        views=tuple(stored["views"]),
    )
    require_same_key(run.path, stored, asked)
    return WholeModel(run, backbone, run.head().to(backbone.device))


def backbone_flags(run: Run, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of an extraction that has a run's backbone make what its head reads.

    Args:
        run: any run whose features a backbone here made, an imported checkpoint too.
        flags: what is asked beside it, in a recipe or by flags; they win, but for those that say
            which backbone it is.

    Returns:
        Values by field for ``load_each``; the run's own of the fields EACH are lists of one item,
        as a licence or a path can have commas.

    Raises:
        MlcError: it was trained on imported features, or a flag names another backbone.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("backbone", "weights", "random_weights"):
        if given.get(name):
            raise MlcError(f"{name}: got {given[name]} beside the backbone of {run.path}; pass one")
    settings = backbone_settings(run)
    stored = current_key(run.results["features"]["key"])
    kind = choose(HEADS, run.config.head, "head").reads
    own = {name: settings[name] for name in settings if name not in OF_THE_MACHINE}
    own |= {name: [own[name]] for name in EACH if own.get(name) is not None}
    own |= {
        "layers": (run.config.layer or stored["layers"][0],),
        "features": (f"{kind}:{feature_dtypes(stored['features'])[kind]}",),
    }
    return own | given


def backbone_settings(run: Run) -> dict[str, Any]:
    """Return the config of a run's backbone, its weights file where it is now."""
    settings: dict[str, Any] | None = run.results["features"]["backbone_config"]
    if settings is None:
        raise MlcError(
            f"{run.path}: was trained on imported features, and no backbone here makes the same "
            "of images; train on a store of mlc extract to use a run on images"
        )
    if settings.get("weights") is None:
        return dict(settings)
    # What an imported checkpoint brought along lies in its folder, wherever that is.
    return settings | {"weights": str(run.path.resolve() / settings["weights"])}


def predict(
    model: WholeModel,
    folder: Path,
    out: Path,
    classes: Sequence[str] | None = None,
    progress: Progress = silent,
) -> tuple[int, dict[str, str]]:
    """Write a CSV of probabilities: a line for each image below a folder, a column for each class.

    Args:
        model: backbone and head.
        folder: searched with its subfolders.
        out: the CSV, written aside and renamed.
        classes: columns, by default all of the run's.
        progress: told after each batch.

    Returns:
        How many lines were written, and the reason by file of each image that could not be read.

    Raises:
        MlcError: no images there, all of them bad, or an unknown class.
    """
    names = list(classes or model.run.classes)
    columns = class_columns(model.run.classes, names)
    files = find_images(folder)
    logits, bad = model.logits(files, progress)
    probs = probabilities(logits)[:, columns]
    if len(bad) == len(files):
        raise MlcError(f"{folder}: none of the {len(files)} images can be read, {bad[0]}")
    # File names need not be UTF-8: such bytes are written as they are.
    with (
        written_aside(out) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(["file", *names])
        for row, file in enumerate(files):
            if row not in bad:
                values = [f"{value:.6f}" for value in probs[row]]
                writer.writerow([file.relative_to(folder).as_posix(), *values])
    reasons = {files[row].relative_to(folder).as_posix(): why for row, why in bad.items()}
    return len(files) - len(bad), reasons
