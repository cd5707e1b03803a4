"""finetune(): from a config to a run folder, or to where a stopped training was."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlc.configs import dump
from mlc.configs.allocator import keep_freed_memory
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.source import absolute_data
from mlc.extract.backbone import load_backbone
from mlc.extract.backbone_file import BackboneFile, write_backbone_file
from mlc.extract.views import Squares
from mlc.extract.weights import hash_weights
from mlc.finetune.config import FinetuneConfig, check_finetune
from mlc.finetune.events import recorder
from mlc.finetune.init import labels_note, start_from
from mlc.finetune.model import ImageModel
from mlc.finetune.objective import Objective
from mlc.finetune.prepare import PreparedImages, prepare_images
from mlc.finetune.processes import Processes, joined_processes
from mlc.finetune.saved import MAY_CHANGE, SavedState
from mlc.finetune.scoring import Images, workers_of
from mlc.finetune.steps import all_steps
from mlc.finetune.train import train
from mlc.finetune.training import FineTuning
from mlc.heads.checkpoint import discard_checkpoint
from mlc.heads.config import NOT_SETTINGS, TrainConfig, default_labels, settle_knobs
from mlc.heads.run_folder import (
    BACKBONE,
    FINETUNE,
    RESULTS,
    Run,
    folder_aside,
    read_run,
    require_free,
)
from mlc.heads.trained import Diverged, TrainedHead
from mlc.heads.written import write_trained
from mlc.models.official import REFERENCE

DIGEST_CHARS = 8
RUNS = Path("runs")
HEAD, OF_BACKBONE = "head.", "backbone."  # before the names of the tensors of each


@dataclass(frozen=True)
class Finetuned:
    """What came of a fine-tuning.

    Attributes:
        run: the run folder.
        bad: the reason of each bad image, by its file.
        waited: share of the last epoch's time that its steps waited for images.
        notes: sentences on what the labels lack.
    """

    run: Run
    bad: dict[str, str]
    waited: float = 0.0
    notes: Sequence[str] = ()


def finetune_grid(
    configs: Sequence[FinetuneConfig], progress: Progress = silent
) -> list[Finetuned]:
    """Train models one after another, those whose run folders are not there yet.

    Args:
        configs: ``out`` of the first is the folder of all run folders; by default ``runs``.
        progress: told of each step of the model that is trained.

    Returns:
        All of them, in order; none in processes that are not the first.

    Raises:
        MlcError: see ``finetune``.
    """
    folder = configs[0].out or RUNS
    for config in configs:
        check_finetune(config)
    with joined_processes(configs[0].device) as processes:
        own = [config.model_copy(update={"out": None}) for config in configs]
        done = [_finetune(config, processes, progress, folder) for config in own]
    return [each for each in done if each is not None]


def finetune(config: FinetuneConfig, progress: Progress = silent) -> Finetuned | None:
    """Train a model end to end, and write its run folder.

    Under torchrun all processes train one model, and the first writes it.

    Args:
        config: what to train.
        progress: told of each step.

    Returns:
        None in processes that are not the first.

    Raises:
        MlcError: see ``check_finetune``, ``prepare_images``, ``ImageModel`` and ``train``.
        KeyboardInterrupt: with a message that says what is kept.
    """
    check_finetune(config)
    with joined_processes(config.device) as processes:
        return _finetune(config, processes, progress)


def _finetune(
    config: FinetuneConfig, processes: Processes, progress: Progress, folder: Path | None = None
) -> Finetuned | None:
    """Train a model in processes that have joined; see ``finetune``.

    Args:
        config: checked.
        processes: that train together.
        progress: told of each step.
        folder: of run folders that are named by their settings; one that is there already is
            left alone.
    """
    keep_freed_memory()
    images = prepare_images(config, processes.device)
    resolved = resolve(config, images, folder or RUNS)
    assert resolved.out is not None
    if folder is not None and (resolved.out / RESULTS).is_file():
        return Finetuned(read_run(resolved.out), {}) if processes.first else None
    model, objective = _build(resolved, images, processes.device)
    began_with = hash_weights(model.backbone)
    _require_enough(resolved, images, processes)
    steps = all_steps(config, len(images.files["train"]))
    tuning = FineTuning(resolved, model, objective, processes, steps)
    squares = Squares(model.network.size_px, config.interpolation or model.network.interpolation)
    streamed = Images(images, squares, workers_of(config, processes))
    saved = SavedState(resolved, images.prepared.source)
    told = progress if processes.first else silent
    try:
        with recorder(resolved, processes) as record:
            trained = train(resolved, tuning, streamed, processes, saved, told, record)
    except Diverged:
        discard_checkpoint(resolved.out)
        raise
    if not processes.first:
        processes.wait()  # until the run is there: of a grid the next one begins together
        return None
    run = _write(resolved, model, trained, images, streamed.bad, began_with)
    discard_checkpoint(resolved.out)
    processes.wait()
    notes = images.prepared.notes(config.val_labels)
    notes += labels_note(resolved, images.prepared.source)
    if tuning.best.diverged:
        notes.append(
            f"training diverged after epoch {len(trained.history)}, its scores are not finite; "
            "the best epoch before is kept"
        )
    return Finetuned(run, _by_file(streamed), trained.history[-1]["waited"], notes)


def _by_file(images: Images) -> dict[str, str]:
    return {
        str(images.prepared.files[split][row]): reason
        for split, found in images.bad.items()
        for row, reason in sorted(found.items())
    }


def resolve(config: FinetuneConfig, images: PreparedImages, folder: Path) -> FinetuneConfig:
    """Return a config with nothing left open: enough to repeat the run from any folder."""
    table = images.prepared.table
    absolute = {
        name: None if getattr(config, name) is None else getattr(config, name).resolve()
        for name in ("root", "weights", "init")
    }
    assert config.data is not None
    settled: dict[str, Any] = absolute | {
        "labels": default_labels(config, table),
        "data": absolute_data(config.data),
        "knobs": settle_knobs(config, table),
    }
    settled["out"] = config.out or _run_path(config, images.prepared.source, folder)
    require_free(settled["out"])
    return config.model_copy(update=settled)


def _run_path(config: FinetuneConfig, source: str, folder: Path) -> Path:
    """Return the default run folder: the same settings and labels, the same path."""
    settings = config.model_dump(mode="json", exclude=NOT_SETTINGS, exclude_defaults=True)
    text = json.dumps([settings, source], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]
    backbone = config.backbone.rpartition("/")[2].rpartition(":")[2]
    name = f"finetune-{backbone}-{config.head}-{config.loss}-lr{config.lr:g}-bs{config.batch_size}"
    return folder / f"{name}-seed{config.seed}-{digest}"


def _build(
    config: FinetuneConfig, images: PreparedImages, device: torch.device
) -> tuple[ImageModel, Objective]:
    """Return the model on the device, and its objective, both as they start."""
    train = images.prepared.splits["train"]
    generator = torch.Generator().manual_seed(config.seed)
    model = ImageModel(config, train.observed.shape[1], generator)
    estimates = start_from(config, model, train, images.prepared.table.classes)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, Objective(config, train.observed, generator, estimates)


def _require_enough(config: FinetuneConfig, images: PreparedImages, processes: Processes) -> None:
    """Raise an MlcError if a batch has fewer images than there are processes."""
    batch = min(config.batch_size, len(images.prepared.splits["train"].image_id))
    if batch < processes.count:
        raise MlcError(
            f"batch_size: {batch} images of a step are too few for {processes.count} processes; "
            "start fewer, or pass a larger --batch-size"
        )


def _write(
    config: FinetuneConfig,
    model: ImageModel,
    trained: TrainedHead,
    images: PreparedImages,
    bad: Mapping[str, Mapping[int, str]],
    began_with: str,
) -> Run:
    """Write the run folder: that of a head, its backbone in it, and the whole config.

    Args:
        config: resolved.
        model: as it was built.
        trained: its tensors at the best epoch, and what else training gives.
        images: of the data set.
        bad: the reason of each bad image, by split and row.
        began_with: hash of the backbone's tensors at the start.
    """
    assert config.out is not None
    prepared = images.without(bad)
    head, backbone = (
        {
            name.removeprefix(part): each
            for name, each in trained.state.items()
            if name.startswith(part)
        }
        for part in (HEAD, OF_BACKBONE)
    )
    with folder_aside(config.out) as partial:
        made = _write_backbone(partial, config, model, backbone)
        made["finetuned"] = _own_settings(config) | {"began_with": began_with}
        write_trained(partial, head_config(config), replace(trained, state=head), prepared, made)
        (partial / FINETUNE).write_text(dump(config))
    return read_run(config.out)


def _own_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings of a fine-tuning that a head on features does not have."""
    fields = set(FinetuneConfig.model_fields) - set(TrainConfig.model_fields)
    settings = config.model_dump(mode="json", include=fields - MAY_CHANGE)
    return settings | {"precision": config.precision, "init": config.init is not None}


def head_config(config: FinetuneConfig) -> TrainConfig:
    """Return what a config says of the head, as if it had been trained on features."""
    fields = set(TrainConfig.model_fields) - {"precision"}
    return TrainConfig(**config.model_dump(include=fields))


def _write_backbone(
    folder: Path, config: FinetuneConfig, model: ImageModel, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Write the backbone's tensors, and return what ``results.json`` says of its features."""
    network = model.network
    path = folder / BACKBONE
    licence = config.weights_licence or network.licence
    write_backbone_file(
        BackboneFile(path, network.architecture, network.mean, network.std, licence), tensors
    )
    settings = config.of_backbone().model_copy(update={"weights": path, "random_weights": False})
    loaded = load_backbone(settings.model_copy(update=REFERENCE), batch_size=1)
    made = settings.model_dump(mode="json", exclude={*REFERENCE, "weights"})
    return {
        "digest": "",  # of no stored images
        "width": model.size.width,
        "grid": model.size.grid,
        "key": loaded.key.to_json(),
        "backbone": f"{model.name}, fine-tuned",
        "weights_licence": licence,
        # Relative to the run folder, which can be moved.
        "backbone_config": made | {"weights": BACKBONE, "backbone": network.architecture},
    }
