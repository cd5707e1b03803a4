"""Real photos and weights that are too large, or not ours, to be in the repository."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MLC_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def need(name: str) -> Path:
    """Return a file or folder of the shared data, or skip the test that asks for it."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"needs {name} in {FOLDER}; $MLC_SHARED names another folder")
    return path
