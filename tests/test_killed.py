"""kill -9 during extraction, again and again: the store ends as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlc.store import schema
from mlc.store.reader import FeatureStore

pytestmark = pytest.mark.slow

KILLS = 10
IMAGES = 600
PAUSE_SECONDS = 0.6  # of work before a kill, at most


def command(folder: Path, out: str) -> list[str]:
    table = folder / "some.csv"
    return [
        *(sys.executable, "-m", "mlc", "extract", "--data", str(table), "--random-weights"),
        *("--root", str(folder / "digits"), "--backbone", "tf_efficientnet_lite0"),
        *("--set", "shard_rows=16", "--out", str(folder / out)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from mlc.datasets.digits import TABLE, read_digits

    folder = tmp_path_factory.mktemp("killed")
    read_digits(folder / "digits")
    lines = (folder / "digits" / TABLE).read_text().splitlines()
    (folder / "some.csv").write_text("\n".join(lines[: IMAGES + 1]))
    return folder


def pending(path: Path) -> int:
    with FeatureStore(path, unfinished=True) as store:
        return int((store.status == schema.PENDING).sum())


def kill_at_random(asked: list[str], path: Path, generator: random.Random) -> None:
    """Start an extraction, and kill it some time after it has begun to write to the store."""
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        lock = path.with_name(f".{path.name}.lock")
        before = lock.stat().st_mtime_ns if lock.exists() else 0
        while process.poll() is None and not (lock.exists() and lock.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, PAUSE_SECONDS))
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_ten_kills_leave_no_trace(folder: Path, suffix: str) -> None:
    subprocess.run(command(folder, f"whole{suffix}"), check=True, capture_output=True)
    generator = random.Random(suffix)
    path = folder / f"killed{suffix}"
    left = []
    for _ in range(KILLS):
        kill_at_random(command(folder, path.name), path, generator)
        left.append(pending(path) if path.exists() else IMAGES)
    assert sum(count > 0 for count in left) >= KILLS // 2, left
    assert left == sorted(left, reverse=True), "a kill lost finished shards"
    subprocess.run(command(folder, path.name), check=True, capture_output=True)
    with FeatureStore(folder / f"whole{suffix}") as whole, FeatureStore(path) as killed:
        for name in ("image_id", "file", "status"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(killed, name))
        np.testing.assert_array_equal(whole.content_hash(), killed.content_hash())
        assert whole.pooled().tobytes() == killed.pooled().tobytes()
    kept = list(path.rglob("*.partial")) if path.is_dir() else []
    assert not kept
