"""The two files of an official Query2Label model: ``checkpoint.pkl`` and ``config_new.json``."""

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlc.configs.errors import MlcError

WRAPPERS = ("state_dict", "model")  # around the tensors, beside the optimiser's state
PREFIX = "module."  # of a model that trained on several GPUs
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = (*FLOATS, torch.int64)  # counters of BatchNorm and indices of Swin are integers


def read_checkpoint(path: Path, unsafe: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their official names, as far as possible not in memory.

    Args:
        path: made by ``torch.save``: the tensors by name, or below "state_dict" or "model"; names
            may begin with "module.".
        unsafe: open a file even if it holds more than tensors and plain values, which can run any
            program.

    Raises:
        MlcError: the file is not there, is damaged, holds more and ``unsafe`` is off, or no named
            tensors; or tensors are of a kind that no model has, have numbers that are not finite,
            or are of one name.
    """
    content = _load(path, unsafe)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = _by_name(path, {name: each for name, each in named if isinstance(each, Tensor)})
    if not tensors:
        raise MlcError(
            f"{path}: expected named tensors, alone or below {' or '.join(WRAPPERS)}, "
            f"got {type(content).__name__}; pass the authors' checkpoint.pkl"
        )
    _require_numbers(path, tensors)
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
    if mapped:
        _require_undamaged(path)
    load = partial(torch.load, path, map_location="cpu", mmap=mapped)
    try:
        try:
            return load(weights_only=True)
        except pickle.UnpicklingError as error:
            if not unsafe:
                raise MlcError(
                    f"{path}: not a checkpoint, or holds more than tensors and plain values and is "
                    f"not opened, as pickles can run any program ({_first_line(error)}); if you "
                    "trust who made it, pass --unsafe-checkpoint"
                ) from None
            return load(weights_only=False)
    except MlcError:
        raise
    except Exception as error:  # on a file of another kind torch raises anything at all
        raise MlcError(f"{path}: not a checkpoint ({_first_line(error)})") from None


def _require_undamaged(path: Path) -> None:
    """Compare the entries of a file with its checksums, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # zipfile and zlib share no base for a broken file
        raise MlcError(f"{path}: damaged ({_first_line(error)}); get the file again") from None
    if damaged is not None:
        raise MlcError(f"{path}: {damaged} does not fit its checksum; get the file again")


def _by_name(path: Path, named: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of one model, of which two names cannot become one."""
    names = [str(name).removeprefix(PREFIX) for name in named]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise MlcError(
            f"{path}: {len(twice)} tensors are there more than once, with {PREFIX!r} before the "
            f"name and without ({', '.join(twice)}); pass a file of one model"
        )
    return dict(zip(names, named.values(), strict=True))


def _require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an MlcError for tensors that are not dense, of another dtype, or not finite."""
    others = [
        f"{name}: {each.layout} {each.dtype}"
        for name, each in tensors.items()
        if each.layout != torch.strided or each.dtype not in NUMBERS
    ]
    if others:
        raise MlcError(
            f"{path}: expected dense tensors of floating-point numbers, got {len(others)} others "
            f"({', '.join(others)}); pass the model as it was trained"
        )
    broken = [name for name, each in tensors.items() if not _is_finite(each)]
    if broken:
        raise MlcError(
            f"{path}: {len(broken)} tensors have NaN or infinite numbers ({', '.join(broken)}); "
            "get the file again"
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
