"""The two files of an official Query2Label model: ``checkpoint.pkl`` and ``config_new.json``."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlc.configs.errors import MlcError

WRAPPERS = ("state_dict", "model")  # around the tensors, beside the optimiser's state
PREFIX = "module."  # of a model that trained on several GPUs


def read_checkpoint(path: Path, unsafe: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their official names, as far as possible not in memory.

    Args:
        path: made by ``torch.save``: the tensors by name, or below "state_dict" or "model"; names
            may begin with "module.".
        unsafe: open a file that holds more than tensors and plain values, which can run any
            program.

    Raises:
        MlcError: the file is not there, holds more and ``unsafe`` is off, or no named tensors; or
            a tensor has numbers that are not finite.
    """
    content = _load(path, unsafe)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        str(name).removeprefix(PREFIX): each for name, each in named if isinstance(each, Tensor)
    }
    if not tensors:
        raise MlcError(
            f"{path}: expected named tensors, alone or below {' or '.join(WRAPPERS)}, "
            f"got {type(content).__name__}; pass the authors' checkpoint.pkl"
        )
    broken = [
        name for name, each in tensors.items() if each.is_floating_point() and not _is_finite(each)
    ]
    if broken:
        raise MlcError(
            f"{path}: {len(broken)} tensors have NaN or infinite numbers ({', '.join(broken)}); "
            "get the file again"
        )
    return tensors


def read_settings(path: Path | None) -> dict[str, Any]:
    """Return the fields of a ``config_new.json``, none if there is no file.

    Raises:
        MlcError: it cannot be read, or is no JSON object.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MlcError(f"{path}: {error.strerror}; pass the authors' config_new.json") from None
    except ValueError as error:
        raise MlcError(f"{path}: not JSON ({error}); pass the authors' config_new.json") from None
    if not isinstance(content, dict):
        raise MlcError(f"{path}: expected named settings, got {type(content).__name__}")
    return content


def _load(path: Path, unsafe: bool) -> Any:
    if not path.is_file():
        raise MlcError(f"{path}: no such file; pass the authors' checkpoint.pkl")
    # Mapped, what nobody reads costs nothing: two thirds of a file may be the optimiser's state.
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not unsafe, mmap=mapped)
    except pickle.UnpicklingError as error:
        if unsafe:
            raise MlcError(f"{path}: not a checkpoint ({_first_line(error)})") from None
        raise MlcError(
            f"{path}: not a checkpoint, or holds more than tensors and plain values and is not "
            f"opened, as pickles can run any program ({_first_line(error)}); if you trust who made "
            "it, pass --unsafe-checkpoint"
        ) from None
    except Exception as error:  # on a file of another kind torch raises anything at all
        raise MlcError(f"{path}: not a checkpoint ({_first_line(error)})") from None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
