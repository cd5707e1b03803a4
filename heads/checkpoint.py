"""Checkpoint: the state of a training on the disk, from which the same command goes on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlc.configs.errors import MlcError
from mlc.configs.files import partial_of, written_aside

VERSION = 3  # of what is saved
EPOCH_SECONDS = 30.0  # at least, between two states after epochs


class Checkpoint:
    """A file beside a run folder that is not written yet.

    Args:
        path: of the file; None saves nothing.
        of: what tells the same training, as a hash of its settings and data.
        minutes: between two states.
    """

    def __init__(self, path: Path | None, of: str, minutes: float) -> None:
        self._path, self._of = path, f"{VERSION} {of}"
        self._seconds = 60 * minutes
        self._written = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """Return what was saved of the same training, None if there is nothing."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
        except OSError as error:  # that it cannot be read now does not make it worthless
            raise MlcError(
                f"{self._path}: the state of the training cannot be read ({error.strerror}); mend "
                "that, or remove the file to begin anew"
            ) from None
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


def checkpoint_path(out: Path | None) -> Path | None:
    """Return where the state of a training is whose run folder is to be ``out``."""
    return None if out is None else out.with_name(f".{out.name}.training")


def discard_checkpoint(out: Path | None) -> None:
    """Remove the state of a training whose run folder is written, and what a kill left of one."""
    path = checkpoint_path(out)
    if path is not None:
        path.unlink(missing_ok=True)
        partial_of(path).unlink(missing_ok=True)
