"""What ``mlc store info`` says of a store's last extraction."""

from pathlib import Path
from typing import Any

import pytest
from small_store import small_store

from mlc.extract.pace import Machine, Pace
from mlc.report.store import describe_extraction, describe_store
from mlc.store import schema
from mlc.store.reader import FeatureStore
from mlc.store.writer import StoreWriter

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"small{request.param}"


def summary_of(*, on_gpu: bool) -> dict[str, Any]:
    """Return what an extraction of 1,234 images in 40 s says."""
    times = iter([0.0, 20.0, 40.0, *[40.0] * 100])
    pace = Pace(1234, Machine(workers=4, cores=4, threads=1, on_gpu=on_gpu), lambda: next(times))
    pace.add(34, {"read": 1.0, "decode": 100.0})
    pace.add(1200, {"decode": 20.0, "infer": 20.0, "write": 9.0}, bad=2)
    return pace.summary()


def record(path: Path, summary: dict[str, Any]) -> None:
    writer = StoreWriter.open(path)
    writer.record(summary)
    writer.close()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_all_of_a_pace_is_recorded_and_described(path: Path, on_gpu: bool) -> None:
    summary = summary_of(on_gpu=on_gpu)
    record(small_store(path), summary)
    with FeatureStore(path) as store:
        assert store.extraction == summary
    lines = describe_store(path).splitlines()
    index = lines.index(
        "last extraction: 1,234 images, 2 bad, 40.0 s, 30.9 images/s, decode limits"
    )
    idle = "; GPU 50 % idle" if on_gpu else ""
    assert lines[index + 1] == f"its stages: read 1 %, decode 80 %, infer 13 %, write 6 %{idle}"


def test_of_a_store_that_says_nothing_nothing_is_said(path: Path) -> None:
    description = describe_store(small_store(path))
    assert "extraction" not in description
    assert "its stages" not in description


def test_what_is_not_known_is_left_out() -> None:
    assert describe_extraction({}) == []
    assert describe_extraction({"workers": 2, "limited_by": None, "busy_seconds": {}}) == []
    assert describe_extraction({"images": 3, "limited_by": None, "idle_share": None}) == [
        "last extraction: 3 images"
    ]
    assert describe_extraction({"idle_share": 0.0}) == ["its stages: GPU 0 % idle"]
