"""Official Query2Label checkpoints: into run folders, and back into the authors' layout."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mlc.configs import dump
from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside
from mlc.configs.provenance import made_by
from mlc.datasets.formatted import COCO_CLASSES
from mlc.extract.backbone import Backbone, load_backbone, resolve_name
from mlc.extract.backbone_file import BackboneFile, read_backbone_file, write_backbone_file
from mlc.extract.query2label import to_official as backbone_to_official
from mlc.extract.weights import file_sha256
from mlc.heads.query2label import to_official as head_to_official
from mlc.heads.run_folder import (
    BACKBONE,
    CONFIG,
    HEAD,
    OFFICIAL,
    RESULTS,
    Run,
    folder_aside,
    read_run,
)
from mlc.models.checkpoint_file import read_checkpoint, read_settings
from mlc.models.official_layout import BACKBONE as OF_BACKBONE
from mlc.models.official_layout import POSITION, OfficialModel, describe
from mlc.models.official_tensors import position_code, split_tensors
from mlc.store.schema import TOKENS, feature

# By backbone and side of the images; all of them know the classes of COCO.
NAMES = {
    ("resnet101", 448): "Q2L-R101-448",
    ("resnet101", 576): "Q2L-R101-576",
    ("tresnetl", 448): "Q2L-TResL-448",
    ("tresnetl_v2", 448): "Q2L-TResL_22k-448",
    ("swin_L_384_22k", 384): "Q2L-SwinL-384",
    ("CvT_w24", 384): "Q2L-CvT_w24-384",
}
CHECKPOINT = "checkpoint"  # of results.json: which file a run folder is of
DIGEST_CHARS = 8
# Their heads are as wide as the tokens; of such a layer, between its two matrices.
FFN_DIMS = {
    "Q2L-R101-448": 8192,
    "Q2L-R101-576": 8192,
    "Q2L-TResL-448": 2432,
    "Q2L-TResL_22k-448": 2048,
    "Q2L-SwinL-384": 6144,
    "Q2L-CvT_w24-384": 4096,
}
# Settings that make a float32 forward pass the same anywhere; they are not the run's own.
REFERENCE = {"device": "cpu", "precision": "float32", "engine": "torch"}


@dataclass(frozen=True)
class ImportOptions:
    """How a checkpoint is imported.

    Attributes:
        config_json: the authors' ``config_new.json`` beside it, if you have it.
        out: the run folder; by default below ``runs/``, named for the model and the file.
        classes: names in the order of its outputs; by default COCO's if there are 80.
        signed_scales: of a TResNet alone, see ``extract.query2label.from_official``.
        unsafe: see ``read_checkpoint``.
    """

    config_json: Path | None = None
    out: Path | None = None
    classes: tuple[str, ...] | None = None
    signed_scales: bool = False
    unsafe: bool = False


def import_checkpoint(path: Path, options: ImportOptions | None = None) -> Run:
    """Make a run folder of an official checkpoint, or return the one that is there.

    Args:
        path: the authors' ``checkpoint.pkl``, or a file of its layout.
        options: see ``ImportOptions``.

    Raises:
        MlcError: the file cannot be read, is no such model, or does not fit it in every tensor;
            the JSON or an option contradicts it; another run is where its folder is to be, or
            the folder cannot be written.
    """
    options = options or ImportOptions()
    tensors = read_checkpoint(path, options.unsafe)
    settings = read_settings(options.config_json)
    try:
        model = describe(tensors, settings)
    except MlcError as error:
        raise MlcError(f"{path}: {error}") from None
    if options.signed_scales and not model.official.abn:
        raise MlcError(
            f"{path}: --signed-scales is of models with InPlaceABN, TResNets, got a backbone "
            f"{model.backbone}; leave it out"
        )
    classes = _class_names(model.size.classes, options.classes)
    about = _about(path, model, settings, classes, options)
    name = _official_name(model, classes)
    out = options.out
    if out is None:
        out = Path("runs") / f"{name or f'q2l-{model.backbone}-{model.size_px}'}-{about['digest']}"
    if (out / RESULTS).is_file():
        return _same_run(out, about)
    with folder_aside(out) as partial:
        backbone = _write_weights(partial, path, model, tensors, options)
        config = model.config.model_copy(update={"out": out.absolute()})
        (partial / CONFIG).write_text(dump(config))
        results = {
            OFFICIAL: name,
            "dataset": "coco" if classes == COCO_CLASSES else None,
            "classes": list(classes),
            CHECKPOINT: about,
            "features": _features(model, backbone),
            "made_by": made_by(),
        }
        (partial / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    return read_run(out)


def write_official(run: Run, path: Path) -> None:
    """Write an imported run as a file of the authors' layout: it imports to the same bits.

    Args:
        run: of ``import_checkpoint``.
        path: of the file, written aside and renamed.

    Raises:
        MlcError: the run was trained here, or its backbone is of no official file any more, see
            ``extract.query2label.to_official``; or the file cannot be written.
    """
    file = read_backbone_file(run.path / BACKBONE) if run.is_imported else None
    if file is None:
        raise MlcError(f"{run.path}: is no imported checkpoint, with its backbone in the folder")
    about = run.results[CHECKPOINT]
    backbone = backbone_to_official(
        about["backbone"], file.tensors(), signed_scales=about["signed_scales"]
    )
    grid = run.results["features"]["grid"]
    state = head_to_official(run.head().state_dict())
    width = state["query_embed.weight"].shape[1]
    tensors = {OF_BACKBONE + name: each for name, each in backbone.items()}
    tensors |= {POSITION: position_code((grid[0], grid[1]), width), **state}
    with written_aside(path) as partial, _saving(path):
        torch.save({"state_dict": tensors}, partial)


def _write_weights(
    folder: Path,
    path: Path,
    model: OfficialModel,
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> Backbone:
    """Write the weights of head and backbone, and return the backbone as it is read again."""
    try:
        head, backbone = split_tensors(model, tensors, signed_scales=options.signed_scales)
    except MlcError as error:
        raise MlcError(f"{path}: does not fit a model of {model.backbone}: {error}") from None
    # Tensors of a file that is mapped are written as copies.
    copies = {name: each.clone() for name, each in head.items()}
    architecture = resolve_name(model.official.backbone).partition(".")[0]
    licence = f"unknown, see where {path.name} is from"
    file = BackboneFile(folder / BACKBONE, architecture, model.mean, model.std, licence)
    with _saving(folder.parent):
        safetensors.torch.save_file(copies, folder / HEAD)
        write_backbone_file(file, backbone)
    config = model.backbone_config.model_copy(update={"weights": file.path, **REFERENCE})
    loaded = load_backbone(config, batch_size=1)
    layer = loaded.key.layers[0]
    width, grid = loaded.arrays[feature(layer, TOKENS)][-1], loaded.grids[layer]
    if (width, grid) != (model.size.width, model.size.grid):
        raise MlcError(
            f"{path}: its head reads tokens of {model.size.width} numbers on a grid of "
            f"{model.size.grid}, its backbone gives {width} on {grid}"
        )
    return loaded


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Make one sentence of what the libraries that save tensors raise on a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise MlcError(
            f"{path}: cannot be written ({reason}); see that the disk has room, and try again"
        ) from None


def _features(model: OfficialModel, backbone: Backbone) -> dict[str, Any]:
    """Return what results.json says of features, as if the head had been trained on them."""
    settings = model.backbone_config.model_dump(mode="json", exclude=set(REFERENCE))
    return {
        "digest": "",  # of no images
        "width": model.size.width,
        "grid": list(model.size.of_grid()),
        "key": backbone.key.to_json(),
        "backbone": model.official.backbone,
        "weights_licence": backbone.licence,
        # Relative to the run folder, which can be moved.
        "backbone_config": settings | {"weights": BACKBONE, "weights_licence": backbone.licence},
    }


def _class_names(count: int, given: tuple[str, ...] | None) -> tuple[str, ...]:
    if given is not None:
        if len(given) != count or len(set(given)) != count:
            raise MlcError(
                f"classes: the checkpoint has {count}, got {len(set(given))} different names; "
                "name each of them once, in the order of its outputs"
            )
        return given
    if count == len(COCO_CLASSES):
        return COCO_CLASSES
    return tuple(f"class {index}" for index in range(count))


def _official_name(model: OfficialModel, classes: tuple[str, ...]) -> str | None:
    """Return which of the released models it is by all of its sizes, or None."""
    name, config = NAMES.get((model.backbone, model.size_px)), model.config
    if name is None or classes != COCO_CLASSES:
        return None
    found = (
        config.hidden_dim,
        config.ffn_dim,
        config.encoder_layers,
        config.decoder_layers,
        config.self_attention,
        config.input_projection,
    )
    return name if found == (model.size.width, FFN_DIMS[name], 1, 2, "none", False) else None


def _about(
    path: Path,
    model: OfficialModel,
    settings: Mapping[str, Any],
    classes: tuple[str, ...],
    options: ImportOptions,
) -> dict[str, Any]:
    """Return which checkpoint it is, and a digest of all that the run folder depends on."""
    about = {
        "file": path.name,
        "sha256": file_sha256(path),
        "backbone": model.backbone,
        "config_json": dict(settings),
        "signed_scales": options.signed_scales,
    }
    parts = {name: each for name, each in about.items() if name != "file"}
    text = json.dumps([parts, classes], sort_keys=True)
    return about | {"digest": hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]}


def _same_run(out: Path, about: Mapping[str, Any]) -> Run:
    run = read_run(out)
    found = run.results.get(CHECKPOINT, {}).get("digest")
    if found != about["digest"]:
        raise MlcError(
            f"{out}: holds another run than this checkpoint with these settings "
            f"({found or 'not imported'}, asked {about['digest']}); name another with --out"
        )
    return run
