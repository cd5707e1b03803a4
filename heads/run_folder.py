"""The run folder: a trained head with everything needed to use, compare and repeat it."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from mlc.configs.files import written_aside
from mlc.heads.config import TrainConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.modules import HEADS, make_head

CONFIG, HEAD, METRICS = "config.yaml", "head.safetensors", "metrics.jsonl"
SCORES, RESULTS = "scores.npz", "results.json"
FILES = {CONFIG, HEAD, METRICS, SCORES, RESULTS}
ESTIMATOR = "estimator.npz"  # of a loss that has one
SCORE_ARRAYS = ("image_id", "logits", "true", "observed")
NEEDED = {"classes", "features", "val", "test", "selection_mAP"}  # of results.json
# A checkpoint that was imported has never been trained here, and brings its backbone. Its scores,
# and ``test`` in its results, are there once it has been evaluated.
OFFICIAL = "official"  # of results.json: its name, or null; no other run has this
BACKBONE = "backbone.safetensors"
IMPORTED_FILES = {CONFIG, HEAD, BACKBONE, RESULTS}
# So does a model that was fine-tuned; this is its whole config, of which CONFIG has the head's.
FINETUNE = "finetune.yaml"
MAY_HAVE = FILES | {ESTIMATOR, BACKBONE, FINETUNE}
IMPORTED_NEEDED = {"classes", "features", OFFICIAL}
NOT_SELECTED = {"selection_mAP": float("nan"), "labels_digest": "", "truth_known": True}


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        path: the folder.
        config: its ``config.yaml``.
        results: its ``results.json``; of an imported checkpoint with ``NOT_SELECTED``.
    """

    path: Path
    config: TrainConfig
    results: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names, in the order of the head's outputs."""
        return tuple(self.results["classes"])

    @property
    def is_imported(self) -> bool:
        """Return whether it is a checkpoint that was trained elsewhere."""
        return OFFICIAL in self.results

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return ``image_id``, ``logits``, ``true`` and ``observed`` of the test split.

        Raises:
            MlcError: they are damaged, or those of a checkpoint that was never evaluated.
        """
        if self.is_imported and not (self.path / SCORES).is_file():
            raise MlcError(
                f"{self.path}: an imported checkpoint that has no scores yet; mlc evaluate "
                "on the test images of a data set makes them"
            )
        try:
            with np.load(self.path / SCORES, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in SCORE_ARRAYS}
        except Exception as error:  # numpy, zipfile and zlib share no base for a broken file
            raise _damaged(self.path, SCORES, error) from None

    def estimates(self) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
        """Return the ids (n,) of the training images, and what their labels were estimated to be.

        As probabilities (n, L).

        Raises:
            MlcError: the run's loss has no label estimator, or the file is damaged.
        """
        if not (self.path / ESTIMATOR).is_file():
            raise MlcError(
                f"{self.path}: has no {ESTIMATOR}, which runs of losses with a label estimator "
                f"have, got the loss {self.config.loss}; train it again if it should"
            )
        try:
            with np.load(self.path / ESTIMATOR, allow_pickle=False) as arrays:
                return arrays["image_id"], arrays["probabilities"]
        except Exception as error:  # see ``scores``
            raise _damaged(self.path, ESTIMATOR, error) from None

    @property
    def is_finetuned(self) -> bool:
        """Return whether its backbone was trained too, and lies in the folder."""
        return (self.path / FINETUNE).is_file()

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
    names = {each.name for each in path.iterdir()} if path.is_dir() else set()
    if not {CONFIG, HEAD, RESULTS} <= names <= MAY_HAVE:
        raise MlcError(f"{path}: is there and is not a run folder; name another with --out")


def write_files(
    folder: Path,
    config: TrainConfig,
    state: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]],
    scores: Mapping[str, NDArray[Any]],
    results: Mapping[str, Any],
    estimates: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write the files of a run into a folder that is there, see ``folder_aside``.

    Args:
        folder: to be filled.
        config: resolved.
        state: tensors of the head.
        history: lines of ``metrics.jsonl``.
        scores: as ``Run.scores`` returns them.
        results: of ``results.json``.
        estimates: ``image_id`` and ``probabilities`` of a label estimator, if there is one.
    """
    (folder / CONFIG).write_text(dump(config))
    # A copy of its own: the numpy view of a tensor that training goes on with would be shared.
    safetensors.torch.save_file({name: each.clone() for name, each in state.items()}, folder / HEAD)
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in history))
    np.savez_compressed(folder / SCORES, allow_pickle=False, **dict(scores))
    if estimates is not None:
        np.savez_compressed(folder / ESTIMATOR, allow_pickle=False, **dict(estimates))
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of the run folder if the block succeeds.

    Raises:
        MlcError: see ``require_free``.
    """
    require_free(path)
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def record_test(run: Run, results: Mapping[str, Any], scores: Mapping[str, NDArray[Any]]) -> Run:
    """Add to an imported checkpoint what an evaluation found, and return it read again.

    Args:
        run: whose folder it goes into.
        results: fields of ``results.json``, ``test`` among them.
        scores: as ``Run.scores`` returns them.
    """
    with written_aside(run.path / SCORES) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **dict(scores))
    content = _read_results(run.path) | dict(results)
    with written_aside(run.path / RESULTS) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    return read_run(run.path)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        MlcError: it is not there, or not whole.
    """
    if not (path / RESULTS).is_file():
        raise MlcError(f"{path}: not a run folder; mlc train-head makes one")
    results = _read_results(path)
    imported = OFFICIAL in results
    missing = sorted(
        name for name in (IMPORTED_FILES if imported else FILES) if not (path / name).is_file()
    )
    if missing:
        raise _damaged(path, ", ".join(missing), "missing")
    needed = IMPORTED_NEEDED if imported else NEEDED
    if not results.keys() >= needed:
        raise _damaged(path, RESULTS, f"expected at least {', '.join(sorted(needed))}")
    if imported:
        results = NOT_SELECTED | results
    return Run(path, load(TrainConfig, "train-head", str(path / CONFIG)), results)


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads((path / RESULTS).read_text())
    except ValueError as error:
        raise _damaged(path, RESULTS, error) from None
    if not isinstance(results, dict):
        raise _damaged(path, RESULTS, f"expected fields, got {type(results).__name__}")
    return results


def _damaged(path: Path, name: str, error: object) -> MlcError:
    reason = str(error).split("\n")[0]
    return MlcError(f"{path}: a damaged run folder, {name}: {reason}; train it again")
