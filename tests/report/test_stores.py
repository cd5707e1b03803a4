"""The list of stores: what each holds, what is broken, what killed processes left."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_store import small_store

from mlc.configs.errors import MlcError
from mlc.report.console import print_table
from mlc.report.store import describe_store
from mlc.report.stores import store_records
from mlc.store import schema
from mlc.store.lock import writer_lock
from mlc.store.reader import labels_path
from mlc.store.remove import remove_store

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"small{request.param}"


def only_record(folder: Path) -> dict[str, str]:
    (record,) = store_records(folder)
    return record


def test_a_complete_store_is_described(path: Path) -> None:
    created = time.mktime((2024, 2, 29, 13, 5, 0, 0, 0, -1))
    small_store(path, good=3, bad=1, created=created)
    labels_path(path).touch()
    record = only_record(path.parent)
    sizes = {name: record.pop(name) for name in ("on disk", "nominal")}
    assert record == {
        "store": str(path),
        "good": "3",
        "bad": "1",
        "pending": "0",
        "backbone": "test_resnet",
        "px": "64",
        "engine": "torch",
        "features": "pooled:float32,tokens:float16",
        "views": "orig,flip",
        "labels": "yes",
        "made": "2024-02-29 13:05",
        "state": "complete",
    }
    for size in sizes.values():
        assert size.endswith(" MB")


def test_an_unfinished_store_without_labels_or_date_is_too(path: Path) -> None:
    small_store(path, good=1, bad=0, pending=2)
    record = only_record(path.parent)
    assert (record["good"], record["bad"], record["pending"]) == ("1", "0", "2")
    assert (record["state"], record["labels"], record["made"]) == ("unfinished", "none", "")


def test_sizes_are_those_of_du(path: Path) -> None:
    small_store(path)
    if path.is_dir():
        (path / "status/large").write_bytes(os.urandom(3_000_000))
    else:
        with path.open("ab") as file:
            file.write(os.urandom(3_000_000))
    du = subprocess.run(["du", "-s", "--block-size=1", path], capture_output=True, check=True)
    files = path.rglob("*") if path.is_dir() else [path]
    nominal = sum(each.stat().st_size for each in files if each.is_file())
    record = only_record(path.parent)
    assert record["on disk"] == f"{int(du.stdout.split()[0]) / 1e6:.1f} MB"
    assert record["nominal"] == f"{nominal / 1e6:.1f} MB"
    assert record["nominal"].startswith("3.")


def test_stores_come_by_name_and_then_leftovers(tmp_path: Path) -> None:
    for name in ("b.zarr", "a.h5", "c.h5"):
        small_store(tmp_path / name)
    for name in (".a.h5.partial-12", ".gone.zarr.lock", "gone.h5.labels.npz"):
        (tmp_path / name).touch()
    for name in (".b.zarr.removed", ".b.zarr.leases", ".gone.zarr.leases", "photos"):
        (tmp_path / name).mkdir()
    with writer_lock(tmp_path / "b.zarr"):
        pass
    records = store_records(tmp_path)
    assert [Path(record["store"]).name for record in records] == [
        "a.h5", "b.zarr", "c.h5",
        ".a.h5.partial-12", ".b.zarr.removed", ".gone.zarr.leases", ".gone.zarr.lock",
        "gone.h5.labels.npz",
    ]  # fmt: skip
    assert [record["state"] for record in records[3:]] == [
        "left by a creation that was cut off",
        "left by a removal that was cut off",
        "leases without their store",
        "lock without its store",
        "labels without their store",
    ]
    assert all(record.keys() == records[0].keys() for record in records)


def test_what_is_listed_as_left_can_be_removed(path: Path) -> None:
    small_store(path)
    shutil.copytree(path, path.with_name(f".{path.name}.removed")) if path.is_dir() else None
    path.with_name(f".{path.name}.partial-1").write_bytes(b"x" * 100_000)
    path.with_name(f"old{path.suffix}.labels.npz").touch()
    for record in store_records(path.parent)[1:]:
        remove_store(Path(record["store"]))
    assert only_record(path.parent)["state"] == "complete"


def test_a_large_leftover_has_its_size(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial-1")
    partial.mkdir()
    (partial / "c").write_bytes(os.urandom(2_000_000))
    assert only_record(path.parent)["nominal"] == "2.0 MB"
    assert only_record(path.parent)["good"] == ""


# Stores that cannot be read


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_is_said(path: Path, version: int) -> None:
    small_store(path)
    backend = schema.format_of(path).open(path, write=True)
    backend.set_attribute("schema_version", version)
    backend.close()
    record = only_record(path.parent)
    assert record["state"].startswith("expected a feature store of version")
    assert (record["good"], record["labels"]) == ("", "none")


@pytest.mark.parametrize("content", [b"", b"not a store", b"\x89HDF\r\n\x1a\n" + b"\xff" * 3000])
def test_a_file_that_is_no_store_has_a_reason(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "not" in only_record(path.parent)["state"]


def test_an_empty_folder_that_is_named_like_a_store_has_a_reason(path: Path) -> None:
    path.mkdir()
    assert "not" in only_record(path.parent)["state"]


@pytest.mark.parametrize("attribute", ["key", "made_by"])
def test_a_lost_attribute_is_a_reason(path: Path, attribute: str) -> None:
    small_store(path)
    backend = schema.format_of(path).open(path, write=True)
    backend.set_attribute(attribute, {} if attribute == "key" else [])
    backend.close()
    assert only_record(path.parent)["state"].startswith("damaged, its attributes")


def test_a_damaged_file_is_a_reason_at_worst(tmp_path: Path) -> None:
    path = small_store(tmp_path / "small.h5")
    content = path.read_bytes()
    for start in range(0, 800, 8):
        path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
        assert only_record(tmp_path)["state"] not in ("", "unfinished")
    for length in (1, 100, 2000, len(content) // 2):
        path.write_bytes(content[:length])
        assert only_record(tmp_path)["state"].startswith("not an HDF5 file, or damaged")


@pytest.mark.parametrize("error", [KeyError("key"), RuntimeError("bad heap"), OSError("no data")])
def test_what_a_library_raises_is_a_reason(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    small_store(path)
    monkeypatch.setattr(schema.format_of(path), "attributes", fail)
    state = only_record(path.parent)["state"]
    assert state.startswith(f"damaged ({type(error).__name__}: {error})")


def test_a_damaged_folder_is_a_reason_at_worst(tmp_path: Path) -> None:
    path = small_store(tmp_path / "small.zarr")
    for name in ("status/zarr.json", "zarr.json"):
        for content in (b"", b"{", b"[]", b'{"zarr_format": 3}', b'{"node_type": "group"}'):
            copy = tmp_path / "copy.zarr"
            shutil.copytree(path, copy)
            (copy / name).write_bytes(content)
            (record,) = [each for each in store_records(tmp_path) if each["store"] == str(copy)]
            assert record["state"] not in ("", "complete"), (name, content)
            shutil.rmtree(copy)
    assert only_record(tmp_path)["state"] == "complete"


def test_a_store_that_is_being_written_is_listed(path: Path) -> None:
    small_store(path, pending=1)
    code = (
        "import sys; from pathlib import Path; from mlc.store.writer import StoreWriter;"
        "writer = StoreWriter.open(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        state = only_record(path.parent)["state"]
        process.kill()
    locked = "another process has it open; wait for it"  # by HDF5 itself
    assert state == ("unfinished" if path.suffix == ".zarr" else locked)


# Folders


def test_an_empty_folder_has_no_records(tmp_path: Path) -> None:
    assert store_records(tmp_path) == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"features: no such folder; mlc extract makes"):
        store_records(tmp_path / "features")


def test_the_records_print_as_a_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_store(path)
    path.with_name(f".{path.name}.partial-1").touch()
    print_table(store_records(path.parent))
    header, store, leftover = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["store", "good", "bad", "pending"]
    assert "test_resnet" in store
    assert leftover.rstrip().endswith("left by a creation that was cut off")


def test_the_size_of_a_store_is_told_through_a_link(tmp_path: Path) -> None:
    path = tmp_path / "small.h5"
    small_store(path, good=3)
    link = tmp_path / "link.h5"
    link.symlink_to(path.name)
    size = next(line for line in describe_store(path).splitlines() if line.startswith("size: "))
    assert size != "size: 0.0 MB"
    assert size in describe_store(link)
