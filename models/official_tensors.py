"""The tensors of an official Query2Label checkpoint as those of our head and backbone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract.backbone import build_network, resolve_name
from mlc.extract.query2label import from_official as backbone_from_official
from mlc.heads.modules import make_head
from mlc.heads.position import sine_position
from mlc.heads.query2label import from_official as head_from_official
from mlc.heads.query2label import to_official as head_to_official
from mlc.models.official_layout import BACKBONE, HEAD, POSITION, OfficialModel

POSITION_TOLERANCE = 1e-4  # beside the rounding of a file of half precision


def split_tensors(
    model: OfficialModel, tensors: Mapping[str, Tensor], *, signed_scales: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of our head and of our backbone without a classifier.

    Args:
        model: what the checkpoint is.
        tensors: by their official names.
        signed_scales: see ``extract.query2label.from_official``.

    Raises:
        MlcError: tensors are missing, unknown, or of another shape or content; all are listed.
    """
    of_backbone = {
        name.removeprefix(BACKBONE): each
        for name, each in tensors.items()
        if name.startswith(BACKBONE)
    }
    of_head = {name: each for name, each in tensors.items() if not name.startswith(BACKBONE)}
    problems = []
    head = _bare_head(model).state_dict()
    misfits = _misfits(of_head, _official_shapes(model, head), model)
    if misfits:
        problems.append(f"head: {'; '.join(misfits)}")
    backbone: dict[str, Tensor] = {}
    try:
        wanted = _bare_backbone(model).state_dict()
        backbone = backbone_from_official(
            model.backbone, of_backbone, wanted, signed_scales=signed_scales
        )
    except MlcError as error:
        problems.append(f"{BACKBONE}: {error}")
    if problems:
        raise MlcError("; ".join(problems))
    del of_head[POSITION]  # it is made anew
    return {name: each.float() for name, each in head_from_official(of_head).items()}, backbone


def _bare_backbone(model: OfficialModel) -> nn.Module:
    """Return the backbone's module without memory for weights, at its native size."""
    config = model.backbone_config.model_copy(update={"random_weights": True, "size_px": None})
    with torch.device("meta"):
        return build_network(resolve_name(config.backbone), config).module


def position_code(grid: tuple[int, int], width: int) -> Tensor:
    """Return the sine position code as checkpoints have it, (1, width, H, W)."""
    return sine_position(grid, width).T.reshape(1, width, *grid).contiguous()


def _bare_head(model: OfficialModel) -> nn.Module:
    generator = torch.Generator()
    with torch.device("meta"):
        return make_head(HEAD, model.size, model.config, generator)


def _official_shapes(
    model: OfficialModel, head: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(each.shape) for name, each in head_to_official(head).items()}
    return {POSITION: (1, model.config.hidden_dim or 0, *model.size.of_grid())} | shapes


def _misfits(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], model: OfficialModel
) -> list[str]:
    """Return a sentence part for each kind of misfit of the head, with all names."""
    reshaped = [
        f"{name} is {list(each.shape)}, expected {list(shapes[name])}"
        for name, each in tensors.items()
        if name in shapes and tuple(each.shape) != shapes[name]
    ]
    integers = [name for name, each in tensors.items() if not each.is_floating_point()]
    kinds = {
        "missing": [name for name in shapes if name not in tensors],
        "unknown": [name for name in tensors if name not in shapes],
        "of another shape": reshaped,
        "of integers": [name for name in integers if name in shapes],
    }
    found = [f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items() if names]
    code = tensors.get(POSITION)
    if code is not None and POSITION not in integers and tuple(code.shape) == shapes[POSITION]:
        own = position_code(model.size.of_grid(), code.shape[1])
        largest = float((code.float() - own).abs().max())
        if largest > POSITION_TOLERANCE + torch.finfo(code.dtype).eps / 2:
            found.append(f"{POSITION} is no sine position code, it is off by {largest:.2g}")
    return found
