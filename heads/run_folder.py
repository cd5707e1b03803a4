"""The run folder: a trained head with everything needed to use, compare and repeat it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlc.configs import dump, load
from mlc.configs.errors import MlcError, choose
from mlc.heads.linear import HEADS
from mlc.heads.train import TrainConfig

CONFIG, HEAD, METRICS = "config.yaml", "head.safetensors", "metrics.jsonl"
SCORES, RESULTS = "scores.npz", "results.json"


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        path: the folder.
        config: its ``config.yaml``.
        results: its ``results.json``.
    """

    path: Path
    config: TrainConfig
    results: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names, in the order of the head's outputs."""
        return tuple(self.results["classes"])

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return ``image_id``, ``logits``, ``true`` and ``observed`` of the test split."""
        with np.load(self.path / SCORES, allow_pickle=False) as arrays:
            return dict(arrays)

    def head(self) -> nn.Module:
        """Return the trained head on the CPU."""
        state = safetensors.torch.load_file(self.path / HEAD)
        classes, width = state["weight"].shape
        make = choose(HEADS, self.config.head, "head")
        head = make(width, classes, torch.Generator())
        head.load_state_dict(state)
        return head.eval()


def require_free(path: Path) -> None:
    """Raise an MlcError if something that is no run folder is where a run is to be written."""
    if path.exists() and not (path / RESULTS).is_file():
        raise MlcError(f"{path}: is there and is not a run folder; name another with --out")


def write_run(
    path: Path,
    config: TrainConfig,
    state: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]],
    scores: Mapping[str, NDArray[Any]],
    results: Mapping[str, Any],
) -> None:
    """Write a run folder aside and rename it; one that is there is replaced.

    Raises:
        MlcError: see ``require_free``.
    """
    require_free(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(dump(config))
    # A copy of its own: the numpy view of a tensor that training goes on with would be shared.
    safetensors.torch.save_file(
        {name: each.clone() for name, each in state.items()}, partial / HEAD
    )
    (partial / METRICS).write_text("".join(json.dumps(line) + "\n" for line in history))
    np.savez_compressed(partial / SCORES, allow_pickle=False, **dict(scores))
    (partial / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        MlcError: it is not there, or not whole.
    """
    try:
        results = json.loads((path / RESULTS).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise MlcError(f"{path}: not a run folder; mlc train-head makes one") from None
    except ValueError as error:
        raise MlcError(f"{path}: a damaged run folder ({error}); train it again") from None
    return Run(path, load(TrainConfig, "train-head", str(path / CONFIG)), results)
