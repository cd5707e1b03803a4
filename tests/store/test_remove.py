"""Removing stores: all of one and nothing else, whatever is killed in between."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from small_store import small_store

from mlc.configs.errors import MlcError
from mlc.store import remove, schema
from mlc.store.catalog import beside, disk_usage, find_beside, find_leftovers, find_stores
from mlc.store.journal import JournaledFile, journal_path
from mlc.store.lease import Leases
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.remove import remove_store

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"small{request.param}"


def with_all_parts(path: Path) -> Path:
    """Make a store with all that can lie beside one but a journal."""
    small_store(path)
    labels_path(path).write_bytes(b"labels")
    with writer_lock(path), Leases(path) as leases:
        leases.acquire(0)
    (path.parent / f".{path.name}.partial-123").write_bytes(b"cut off")
    (path.parent / f".{path.name}.removed").mkdir()
    (path.parent / f".{path.name}.removed/zarr.json").touch()
    return path


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_all_of_a_store_goes_and_all_of_the_others_stays(path: Path) -> None:
    others = ("small2", "2small", path.name)  # the last is e.g. small.zarr.zarr
    kept = [path.with_name(f"{name}{path.suffix}") for name in others]
    for each in kept:
        with_all_parts(each)
    (path.parent / "small.csv").touch()
    before = names(path.parent)
    with_all_parts(path)
    remove_store(path)
    assert names(path.parent) == before
    for each in kept:
        with FeatureStore(each) as store:
            assert len(store.image_id) == 4


def test_it_says_how_many_bytes_the_disk_got_back(path: Path) -> None:
    with_all_parts(path)
    before = disk_usage(path.parent).allocated_bytes
    freed = remove_store(path)
    assert freed == before - disk_usage(path.parent).allocated_bytes > 0


@pytest.mark.parametrize("pending", [2, 4])
def test_an_unfinished_store_can_go(path: Path, pending: int) -> None:
    small_store(path, good=4 - pending, bad=0, pending=pending)
    remove_store(path)
    assert names(path.parent) == set()


def test_a_store_of_another_version_can_go(path: Path) -> None:
    small_store(path)
    backend = schema.format_of(path).open(path, write=True)
    backend.set_attribute("schema_version", 9)
    backend.close()
    remove_store(path)
    assert names(path.parent) == set()


# What must never be deleted


def foreign_zarr(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=3).attrs["schema_version"] = 1


def foreign_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["schema_version"] = "1"


def folder_of_photos(path: Path) -> None:
    path.mkdir()
    (path / "1.jpg").touch()


def some_file(path: Path) -> None:
    path.write_text("my notes")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.zarr", foreign_zarr),
        ("a.zarr", folder_of_photos),
        ("a.zarr", some_file),
        ("a.h5", foreign_hdf5),
        ("a.h5", folder_of_photos),
        ("a.h5", some_file),
        ("a.h5", foreign_zarr),
        ("photos", folder_of_photos),
        ("a.txt", some_file),
        ("small.zarr.labels.npz.txt", some_file),
        (".photos.partial", folder_of_photos),
        (".zarr.removed", folder_of_photos),
    ],
)
def test_what_is_not_a_store_is_not_touched(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    before = names(tmp_path)
    with pytest.raises(MlcError, match=r"yourself|a store's name ends in"):
        remove_store(tmp_path / name)
    assert names(tmp_path) == before
    assert disk_usage(tmp_path / name).nominal_bytes or any((tmp_path / name).iterdir())


def test_a_store_without_its_attributes_is_not_touched(tmp_path: Path) -> None:
    path = small_store(tmp_path / "small.zarr")
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(MlcError, match=r"not a feature store, it has no complete, key, made_by"):
        remove_store(path)
    assert (path / "image_id").is_dir()


@pytest.mark.parametrize("error", [KeyError("key"), RuntimeError("bad heap"), OSError("no data")])
def test_what_is_too_damaged_to_tell_is_not_touched(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    small_store(path)
    with monkeypatch.context() as patch:
        patch.setattr(schema.format_of(path), "attributes", fail)
        with pytest.raises(MlcError, match=r"damaged \(.*\); if it is to go, delete it yourself"):
            remove_store(path)
    FeatureStore(path).close()


def test_a_link_is_not_followed(path: Path) -> None:
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(small_store(path))
    with pytest.raises(MlcError, match=rf"is a link to .*{path.name}; remove that"):
        remove_store(link)
    FeatureStore(path).close()


def test_nothing_there_is_an_error_and_makes_nothing(path: Path) -> None:
    for missing in (path, path.parent / "no" / path.name):
        with pytest.raises(MlcError, match="no such store"):
            remove_store(missing)
    with pytest.raises(MlcError, match="nothing there"):
        remove_store(path.with_name(f".{path.name}.removed"))
    assert names(path.parent) == set()


# Somebody writes to it


def test_a_store_that_is_written_to_stays(path: Path) -> None:
    small_store(path)
    for shared in (False, True):
        with (
            writer_lock(path, shared=shared),
            pytest.raises(MlcError, match="another process is writing to it"),
        ):
            remove_store(path)
    FeatureStore(path).close()


def test_a_store_of_which_a_worker_holds_a_shard_stays(path: Path) -> None:
    """Its lock may be unknown here: locks of other hosts are not always seen."""
    small_store(path)
    with Leases(path) as leases:
        assert leases.acquire(0) is not None
        lease = leases.acquire(11)
        with pytest.raises(MlcError, match=r"shard 0 is being written by host .*, pid \d+, seen"):
            remove_store(path)
        assert lease is not None
        assert lease.held()
    FeatureStore(path).close()
    remove_store(path)
    assert names(path.parent) == set()


def test_what_belongs_to_a_store_that_is_there_stays(path: Path) -> None:
    with_all_parts(path)
    for part in find_beside(path):
        if part.kind in ("labels", "leases", "lock"):
            with pytest.raises(MlcError, match=rf"belongs to .*{path.name}, which is there"):
                remove_store(part.path)
    assert labels_path(path).is_file()


# Cut off


@pytest.mark.parametrize("step", range(7))
def test_a_removal_that_is_killed_anywhere_can_be_repeated(
    path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_all_parts(path)
    steps = iter(range(100))
    real = {"delete": remove._delete, "rename": Path.rename}

    def dying(name: str) -> Callable[..., object]:
        def call(*arguments: Path) -> object:
            if next(steps) == step:
                raise KeyboardInterrupt
            return real[name](*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(remove, "_delete", dying("delete"))
        patch.setattr(Path, "rename", dying("rename"))
        with pytest.raises(KeyboardInterrupt):
            remove_store(path)
    if path.exists():
        with FeatureStore(path) as store:
            assert store.pooled().shape == (4, 8)
        assert labels_path(path).is_file()
    remove_store(path)
    assert names(path.parent) == set()


@pytest.mark.parametrize("after", [0.0, 0.002, 0.005, 0.01, 0.02])
def test_a_removal_that_is_killed_leaves_no_half_store(tmp_path: Path, after: float) -> None:
    path = small_store(tmp_path / "small.zarr")
    (path / "status/more").mkdir()
    for index in range(1000):  # what takes time to delete
        (path / f"status/more/{index}").touch()
    code = (
        "import sys; from pathlib import Path; from mlc.store.remove import remove_store;"
        "print(flush=True); sys.stdin.readline(); remove_store(Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    threading.Timer(after, process.kill).start()
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    if path.exists():
        with FeatureStore(path) as store:
            assert store.pooled().shape == (4, 8)
    if names(tmp_path):
        remove_store(path)
    assert names(tmp_path) == set()


def test_leftovers_go_one_by_one(path: Path) -> None:
    with_all_parts(path)
    for part in find_leftovers(path.parent):
        remove_store(part.path)
    assert names(path.parent) == {
        path.name, labels_path(path).name, f".{path.name}.lock", f".{path.name}.leases"
    }  # fmt: skip
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for part in find_leftovers(path.parent):
        if part.path.exists():  # the lock goes with whatever is removed first
            remove_store(part.path)
    assert names(path.parent) == set()


def test_the_path_of_a_store_that_is_gone_removes_what_is_left_of_it(path: Path) -> None:
    with_all_parts(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    remove_store(path)
    assert names(path.parent) == set()


def cut_off_change(path: Path) -> None:
    """Leave an HDF5 file as a process does that is killed while it adds images."""
    file = JournaledFile(path)
    file.write(b"\xff" * 4096)
    file.close()


def test_a_store_that_was_being_changed_can_go(tmp_path: Path) -> None:
    path = small_store(tmp_path / "small.h5")
    cut_off_change(path)
    assert journal_path(path).exists()
    remove_store(path)
    assert names(tmp_path) == set()


def test_a_file_of_others_with_a_journal_is_mended_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    foreign_hdf5(path)
    before = path.read_bytes()
    cut_off_change(path)
    with pytest.raises(MlcError, match="not a feature store"):
        remove_store(path)
    assert path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_changed_is_a_users_error(path: Path) -> None:
    small_store(path)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(MlcError, match="cannot be"):
            remove_store(path)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("method", ["rename", "unlink"])
def test_what_the_system_forbids_is_a_users_error(
    path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_all_parts(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(MlcError, match=r"cannot be removed \(Permission denied\)"):
            remove_store(path)
    remove_store(path)
    assert names(path.parent) == set()


# What lies in a folder


@pytest.mark.parametrize(
    ("name", "kind", "store"),
    [
        (".a.zarr.lock", "lock", "a.zarr"),
        (".a.b.h5.leases", "leases", "a.b.h5"),
        (".a.h5.journal", "journal", "a.h5"),
        (".a.h5.partial", "partial", "a.h5"),
        (".a.h5.partial-77", "partial", "a.h5"),
        (".a.h5.labels.npz.partial", "partial", "a.h5"),
        (".a.zarr.removed", "removed", "a.zarr"),
        ("a.zarr.labels.npz", "labels", "a.zarr"),
        (".a.zarr.removed.zarr.lock", "lock", "a.zarr.removed.zarr"),
    ],
)
def test_names_say_what_belongs_to_which_store(name: str, kind: str, store: str) -> None:
    part = beside(Path("x") / name)
    assert part is not None
    assert (part.path, part.kind, part.store) == (Path("x") / name, kind, Path("x") / store)
    assert part.describe()


@pytest.mark.parametrize(
    "name",
    [
        "a.zarr", ".a.zarr", "a.zarr.lock", ".a.lock", ".zarr.lock", ".a.zarr.lock2", ".azarr.lock",
        "a.npz", "a.labels.npz", ".a.zarr.partial-x", ".a.zarr.partial-1.txt", "labels.npz",
        ".digits.partial", "..zarr.lock",
    ],
)  # fmt: skip
def test_other_names_belong_to_nothing(name: str) -> None:
    assert beside(Path(name)) is None


def test_space_on_the_disk_is_what_it_gave(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(10_000_000)
    usage = disk_usage(tmp_path / "holes")
    assert usage.nominal_bytes == 10_000_000
    assert usage.allocated_bytes < 1_000_000
    (tmp_path / "a/b").mkdir(parents=True)
    for name, size in (("a/1", 5_000), ("a/b/2", 70_000)):
        (tmp_path / name).write_bytes(os.urandom(size))
    (tmp_path / "a/link").symlink_to(tmp_path / "holes")
    usage = disk_usage(tmp_path / "a")
    assert 75_000 <= usage.nominal_bytes < 76_000
    done = subprocess.run(
        ["du", "-s", "--block-size=1", tmp_path / "a"], capture_output=True, check=True
    )
    assert usage.allocated_bytes == int(done.stdout.split()[0])
    assert np.array_equal(find_stores(tmp_path), [])
