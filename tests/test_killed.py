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

BACKBONES = ("tf_efficientnet_lite0", "test_resnet")
KILLS = 10
IMAGES = 600
PAUSE_SECONDS = 0.6  # of work before a kill, at most


def command(folder: Path, *outs: str) -> list[str]:
    """Return the command that fills stores, each of another backbone, in one pass."""
    table = folder / "some.csv"
    return [
        *(sys.executable, "-m", "mlc", "extract", "--data", str(table), "--random-weights"),
        *("--root", str(folder / "digits"), "--backbone", ",".join(BACKBONES[: len(outs)])),
        *("--set", "shard_rows=16", "--engine", "folded"),
        *("--out", ",".join(str(folder / out) for out in outs)),
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


def assert_same_bytes(whole_path: Path, killed_path: Path) -> None:
    with FeatureStore(whole_path) as whole, FeatureStore(killed_path) as killed:
        for name in ("image_id", "file", "status"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(killed, name))
        np.testing.assert_array_equal(whole.content_hash(), killed.content_hash())
        assert whole.pooled().tobytes() == killed.pooled().tobytes()
    kept = list(killed_path.rglob("*.partial")) if killed_path.is_dir() else []
    assert not kept


@pytest.mark.parametrize("suffixes", [(".zarr",), (".h5",), (".zarr", ".h5")], ids="+".join)
def test_ten_kills_leave_no_trace(folder: Path, suffixes: tuple[str, ...]) -> None:
    name = "+".join(suffixes).replace(".", "")
    whole = [f"{name}-whole{suffix}" for suffix in suffixes]
    killed = [f"{name}-killed{suffix}" for suffix in suffixes]
    subprocess.run(command(folder, *whole), check=True, capture_output=True)
    generator = random.Random(name)
    paths = [folder / each for each in killed]
    left = []
    for _ in range(KILLS):
        kill_at_random(command(folder, *killed), paths[0], generator)
        left.append([pending(path) if path.exists() else IMAGES for path in paths])
    assert sum(min(counts) > 0 for counts in left) >= KILLS // 2, left
    for counts in zip(*left, strict=True):
        assert list(counts) == sorted(counts, reverse=True), "a kill lost finished shards"
    subprocess.run(command(folder, *killed), check=True, capture_output=True)
    for one, path in zip(whole, paths, strict=True):
        assert_same_bytes(folder / one, path)
