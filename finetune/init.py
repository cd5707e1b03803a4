"""Where a fine-tuning starts: from a run of a head on cached features, or of a whole model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract.backbone import resolve_name
from mlc.extract.weights import hash_weights
from mlc.finetune.config import OF_BACKBONE, OF_FEATURES, FinetuneConfig
from mlc.finetune.model import ImageModel
from mlc.heads.config import TrainConfig
from mlc.heads.inputs import Split
from mlc.heads.recipe import RecipeConfig
from mlc.heads.run_folder import Run, read_run
from mlc.losses.role import OBSERVED_LOGIT
from mlc.losses.table import LOSSES
from mlc.models.whole import backbone_settings

# Of a run: what its head is, and what it was taught; not how it was trained.
OF_TRAINING = {"lr", "weight_decay", "batch_size", "epochs", "out", "device"} | (
    # A head that was selected on test has seen what would be the validation split.
    set(RecipeConfig.model_fields) - {"select_on"}
)
FIXED = ("backbone", "head", "layer")  # of the run, whatever is asked


def init_flags(run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags of a fine-tuning that goes on from a run: its backbone, head, loss and labels.

    Args:
        run: of features that a backbone here made.
        given: flags and settings; they win, but for those that say which model it is.

    Raises:
        MlcError: it was trained on imported features, or what is given is of another model.
    """
    fields = set(TrainConfig.model_fields) - OF_TRAINING - set(OF_FEATURES)
    own = run.config.model_dump(mode="json", include=fields, exclude_defaults=True)
    made = backbone_settings(run)
    own |= {name: made[name] for name in OF_BACKBONE if made.get(name) is not None}
    fixed = {"backbone": own["backbone"], "head": run.config.head, "layer": run.config.layer}
    for name in FIXED:
        asked = given.get(name)
        if asked is None or asked == fixed[name]:
            continue
        if name != "backbone" or resolve_name(asked) != resolve_name(fixed[name]):
            raise MlcError(f"init: {run.path} has {name} {fixed[name]}, got {asked}; leave it out")
    return own | {name: value for name, value in given.items() if value is not None}


def start_from(
    config: FinetuneConfig, model: ImageModel, train: Split, classes: tuple[str, ...]
) -> Tensor | None:
    """Give a model the head of the run that its config starts from, if it does.

    Args:
        config: of the fine-tuning.
        model: its backbone is the run's already, see ``init_flags``.
        train: the training split.
        classes: of the data set.

    Returns:
        (n, L) float32: probabilities that the label estimator starts from; None if it has its own
        start, or there is none.

    Raises:
        MlcError: the run's head or classes are others, or it read features of other weights.
    """
    if config.init is None:
        return None
    run = read_run(config.init)
    if run.classes != classes:
        lacking = [name for name in classes if name not in run.classes]
        raise MlcError(
            f"init: {run.path} has {len(run.classes)} classes, the data has {len(classes)}, of "
            f"which the run does not know {', '.join(lacking[:5]) or 'the order'}; name the run's "
            "with --classes"
        )
    _require_its_weights(run, model)
    try:
        model.head.load_state_dict(run.head().state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MlcError(f"init: the head of {run.path} does not fit: {reason}") from None
    if not LOSSES[config.loss].has_estimator or run.config.loss != config.loss:
        return None
    return _estimates(run, train, len(classes))


def labels_note(config: FinetuneConfig, source: str) -> list[str]:
    """Return what is to be told of the labels that the run to start from was trained on.

    Args:
        config: of the fine-tuning.
        source: hash of its label table.
    """
    if config.init is None or read_run(config.init).results["labels_digest"] == source:
        return []
    return [
        f"init: {config.init} is not known to have been trained on these labels and splits; it may "
        "have seen images that select the epoch here, or that it is tested on"
    ]


def _require_its_weights(run: Run, model: ImageModel) -> None:
    """Raise an MlcError if a run read features of a backbone with other weights."""
    key = run.results["features"]["key"]
    # At another size a vision transformer has other position codes.
    if key["size_px"] == model.network.size_px and key["weights"] != hash_weights(model.backbone):
        raise MlcError(
            f"init: {run.path} was trained on features of {model.name} with other weights; pass "
            "the file of theirs as --weights"
        )


def _estimates(run: Run, train: Split, classes: int) -> Tensor:
    """Return what a run's estimator says of images, of others what a new one would in the mean."""
    ids, probabilities = run.estimates()
    row = {image_id: index for index, image_id in enumerate(ids.tolist())}
    observed = train.observed.cpu()
    start = (observed * OBSERVED_LOGIT).sigmoid()
    rows = torch.tensor([row.get(each, -1) for each in train.image_id.tolist()])
    known = rows >= 0
    start[known] = torch.from_numpy(probabilities)[rows[known]]
    return start
