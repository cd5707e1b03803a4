"""Checkpoint: the state of a training on the disk, from which the same command goes on."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside
from mlc.heads.config import NOT_SETTINGS, TrainConfig
from mlc.heads.inputs import Split

VERSION = 2
EPOCH_SECONDS = 30.0  # at least, between two states after epochs


class Checkpoint:
    """A file beside the run folder of the first head that is trained.

    Args:
        configs: of the heads that are trained together.
        splits: what they are trained and selected on.
    """

    def __init__(self, configs: Sequence[TrainConfig], splits: Mapping[str, Split]) -> None:
        self._path = checkpoint_path(configs)
        self._seconds = 60 * configs[0].checkpoint_minutes
        self._written = time.monotonic()
        self._of = _fingerprint(configs, splits) if self._path else ""

    def restore(self) -> dict[str, Any] | None:
        """Return what was saved of the same training, None if there is nothing."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception:  # a file of anything else: what it holds cannot be gone on from
            return None
        same = isinstance(saved, dict) and saved.get("of") == self._of
        return saved["state"] if same else None

    def due(self, *, epoch_ended: bool) -> bool:
        """Return whether it is time to save."""
        least = min(self._seconds, EPOCH_SECONDS) if epoch_ended else self._seconds
        return self._path is not None and time.monotonic() - self._written > least

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state aside and rename it.

        Raises:
            MlcError: it cannot be written: the disk is full.
        """
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_aside(self._path) as partial:
                torch.save({"of": self._of, "state": state}, partial)
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            raise MlcError(
                f"{self._path}: the state of the training cannot be written "
                f"({str(error).splitlines()[0]}); free space, the same command goes on from the "
                "last one that was"
            ) from None
        self._written = time.monotonic()


def checkpoint_path(configs: Sequence[TrainConfig]) -> Path | None:
    """Return where the state of heads that are trained together is, if they have run folders."""
    out = configs[0].out
    return None if out is None else out.with_name(f".{out.name}.training")


def discard_checkpoint(configs: Sequence[TrainConfig]) -> None:
    """Remove the state of heads whose run folders are written."""
    path = checkpoint_path(configs)
    if path is not None:
        path.unlink(missing_ok=True)


def _fingerprint(configs: Sequence[TrainConfig], splits: Mapping[str, Split]) -> str:
    settings = [each.model_dump(mode="json", exclude=NOT_SETTINGS) for each in configs]
    digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode())
    for name, split in sorted(splits.items()):
        tokens = split.of_tokens()
        digest.update(name.encode() + tokens.array.crc32c.tobytes() + tokens.rows.tobytes())
        digest.update(split.observed.cpu().numpy().tobytes() + split.true.tobytes())
    return digest.hexdigest()
