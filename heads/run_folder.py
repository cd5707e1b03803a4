"""The run folder: a trained head with everything needed to use, compare and repeat it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from mlc.configs import dump, load
from mlc.configs.errors import MlcError, choose
from mlc.heads.config import TrainConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.modules import HEADS, make_head

CONFIG, HEAD, METRICS = "config.yaml", "head.safetensors", "metrics.jsonl"
SCORES, RESULTS = "scores.npz", "results.json"
FILES = {CONFIG, HEAD, METRICS, SCORES, RESULTS}
SCORE_ARRAYS = ("image_id", "logits", "true", "observed")
NEEDED = {"classes", "features", "val", "test", "selection_mAP"}  # of results.json


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
        try:
            with np.load(self.path / SCORES, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in SCORE_ARRAYS}
        except Exception as error:  # numpy, zipfile and zlib share no base for a broken file
            raise _damaged(self.path, SCORES, error) from None

    def head(self) -> nn.Module:
        """Return the trained head on the CPU."""
        choose(HEADS, self.config.head, "head")
        try:
            state = safetensors.torch.load_file(self.path / HEAD)
            head = make_head(self.config.head, self._size(state), self.config, torch.Generator())
            head.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, HEAD, error) from None
        return head.eval()

    def _size(self, state: Mapping[str, Tensor]) -> HeadSize:
        made = self.results["features"]
        grid = made.get("grid")
        # Runs of before this was recorded have heads of one matrix.
        width = made.get("width") or state["weight"].shape[1]
        return HeadSize(width, len(self.classes), None if grid is None else (grid[0], grid[1]))


def require_free(path: Path) -> None:
    """Raise an MlcError if something that is no run folder is where a run is to be written."""
    if not path.exists():
        return
    if not path.is_dir() or {each.name for each in path.iterdir()} != FILES:
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
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
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
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        MlcError: it is not there, or not whole.
    """
    missing = sorted(name for name in FILES if not (path / name).is_file())
    if RESULTS in missing:
        raise MlcError(f"{path}: not a run folder; mlc train-head makes one")
    if missing:
        raise _damaged(path, ", ".join(missing), "missing")
    try:
        results = json.loads((path / RESULTS).read_text())
    except ValueError as error:
        raise _damaged(path, RESULTS, error) from None
    if not isinstance(results, dict) or not results.keys() >= NEEDED:
        raise _damaged(path, RESULTS, f"expected at least {', '.join(sorted(NEEDED))}")
    return Run(path, load(TrainConfig, "train-head", str(path / CONFIG)), results)


def _damaged(path: Path, name: str, error: object) -> MlcError:
    reason = str(error).split("\n")[0]
    return MlcError(f"{path}: a damaged run folder, {name}: {reason}; train it again")
