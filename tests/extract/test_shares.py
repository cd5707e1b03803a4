"""Several workers on one Zarr store: each fills its share, and the last command ends it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

from mlc.configs.errors import MlcError
from mlc.extract.config import ExtractConfig, read_share
from mlc.extract.job import ExtractReport
from mlc.extract.run import extract
from mlc.extract.shards import Share
from mlc.store import schema
from mlc.store.finish import finish
from mlc.store.lease import Leases, lease_folder
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore
from mlc.store.verify import verify

SETTINGS = {
    "backbone": "test_resnet",
    "random_weights": True,
    "size_px": 64,
    "device": "cpu",
    "engine": "folded",  # by name, as processes of their own do not see tests/conftest.py
    "batch_size": 2,
    "shard_rows": 2,
    "workers": 1,
    "features": ("pooled", "tokens"),
}
WORKER = """
import sys
import torch
torch.set_num_threads(1)
from mlc.extract.config import ExtractConfig
from mlc.extract.run import extract
from mlc.extract.backbone import Backbone
csv, out, shard, pause = sys.argv[1:]
features = Backbone.features
def slow(self, pixels):
    import time
    time.sleep(float(pause))
    print("batch", flush=True)
    return features(self, pixels)
Backbone.features = slow
report = extract(ExtractConfig(data=csv, out=out, shard=shard, **{settings!r}))
print(report.extracted, report.left, flush=True)
""".replace("{settings!r}", repr(SETTINGS))


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "photos.zarr"


def run(csv: Path, out: Path, shard: str | None = None, **settings: Any) -> ExtractReport:
    values: dict[str, Any] = SETTINGS | settings
    return extract(ExtractConfig(data=str(csv), out=out, shard=shard, **values))


def start(csv: Path, out: Path, shard: str, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(csv), str(out), shard, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def arrays(path: Path) -> dict[str, bytes]:
    with FeatureStore(path) as store:
        rows = np.arange(len(store.image_id))
        found = {name: store.features(*name.split("/")).read(rows) for name in store.arrays}
        found |= {"id": store.image_id, "hash": store.content_hash(), "status": store.status}
        return {name: values.tobytes() for name, values in found.items()}


@pytest.fixture(scope="module")
def alone(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("alone") / "photos.zarr"
    run(csv, path)
    return arrays(path)


def test_shares_one_after_the_other_make_the_same_store(
    csv: Path, out: Path, alone: dict[str, bytes]
) -> None:
    done = [run(csv, out, f"{index}/3") for index in range(3)]
    assert [each.extracted for each in done] == [4, 4, 4]
    assert not any(each.complete for each in done)
    with pytest.raises(MlcError, match=r"unfinished, 12 of 12 .* \(mlc store finish"):
        FeatureStore(out)
    assert finish(out) == 10
    assert arrays(out) == alone
    assert not lease_folder(out).exists()


def test_four_workers_at_once_and_one_of_them_killed(
    csv: Path, out: Path, alone: dict[str, bytes]
) -> None:
    workers = [start(csv, out, f"{index}/4", pause=0.5) for index in range(4)]
    victim = workers[2]
    assert victim.stdout is not None
    victim.stdout.readline()
    victim.kill()
    for index, worker in enumerate(workers):
        _, errors = worker.communicate(timeout=120)
        assert index == 2 or worker.returncode == 0, errors
    with pytest.raises(MlcError, match=r"shards are still to be extracted \(2"):
        finish(out)
    run(csv, out, "2/4")
    finish(out)
    assert arrays(out) == alone
    assert verify(out).problems == []


def test_a_second_worker_on_the_same_share_is_told_so(csv: Path, out: Path) -> None:
    first = start(csv, out, "0/1", pause=1.0)
    assert first.stdout is not None
    first.stdout.readline()
    try:
        with pytest.raises(MlcError, match=r"another worker is on share 0/1, it holds shard \d"):
            run(csv, out, "0/1")
        with pytest.raises(MlcError, match="another process is writing to it"):
            run(csv, out)
        with pytest.raises(MlcError, match="another process is writing to it"):
            finish(out)
    finally:
        _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    finish(out)


def test_a_shard_that_another_holds_is_left_and_said(csv: Path, out: Path) -> None:
    run(csv, out, "0/6")
    with Leases(out) as others, writer_lock(out, shared=True):
        held = others.acquire(4)
        assert held is not None
        with pytest.raises(MlcError, match="another worker is on share 1/3, it holds shard 4"):
            run(csv, out, "1/3")
        held.release()
        assert run(csv, out, "1/3").extracted == 4


def test_a_plain_extraction_ends_what_workers_began(
    csv: Path, out: Path, alone: dict[str, bytes]
) -> None:
    run(csv, out, "1/2")
    assert run(csv, out).complete
    assert arrays(out) == alone


def test_another_number_of_workers_goes_on(csv: Path, out: Path, alone: dict[str, bytes]) -> None:
    run(csv, out, "1/4")
    assert sum(run(csv, out, f"{index}/3").extracted for index in range(3)) == 8
    finish(out)
    assert arrays(out) == alone


def test_new_images_are_not_added_by_workers(csv: Path, out: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(csv.read_text().splitlines(keepends=True)[:6]))
    run(few, out, root=csv.parent)
    with pytest.raises(MlcError, match=r"7 images are not in it yet.*without --shard first"):
        run(csv, out, "0/2")


def test_workers_write_zarr(csv: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match="an HDF5 file has one writer"):
        run(csv, tmp_path / "a.h5", "0/2")


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "0/0", "1.0/2"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(MlcError, match=r"shard: should be i/n with i from 0 to n - 1"):
        read_share(text)


def test_shares_cover_all_shards_once() -> None:
    shares = [read_share(f"{index}/5") for index in range(5)]
    assert all(sum(share.has(shard) for share in shares) == 1 for shard in range(23))
    assert Share().has(7)


def test_finish_says_what_is_missing(csv: Path, out: Path) -> None:
    run(csv, out, "0/2")
    with pytest.raises(MlcError, match=r"3 of 6 shards are still to be extracted \(1, 3, 5\)"):
        finish(out)
    with FeatureStore(out, unfinished=True) as store:
        assert (store.status == schema.PENDING).sum() == 6


def test_finish_says_that_a_store_is_damaged(csv: Path, out: Path) -> None:
    run(csv, out, "0/1")
    about = out / "content_hash" / "zarr.json"
    about.write_bytes(about.read_bytes()[:50])
    with pytest.raises(MlcError, match=r"damaged .*mlc store verify"):
        finish(out)
