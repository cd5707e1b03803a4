"""Each test of the store that asks for a path runs for every format."""

from pathlib import Path

import pytest
from store_content import SUFFIXES


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(tmp_path: Path, suffix: str) -> Path:
    return tmp_path / f"store{suffix}"
