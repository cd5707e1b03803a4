"""What a store says of its last extraction: recorded, replaced, never in the way of the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from store_content import (
    Content,
    arrays,
    assert_holds,
    content,
    fill,
    key_of,
    numbered,
    writing,
)

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.reader import FeatureStore
from mlc.store.verify import verify
from mlc.store.writer import StoreWriter

ONE_LAYER = key_of("pooled:float32", "tokens:float16", layers=("layer3",))
SUMMARY = {
    "images": 7,
    "bad": 2,
    "seconds": 0.1 + 0.2,
    "busy_seconds": {"read": 1e-9, "decode": 12.5, "infer": 1 / 3, "write": 0.0},
    "limited_by": "décode",
    "idle_share": None,
}
SHORT = {"images": 1}
LONG = SUMMARY | {"note": "x" * 1500}


def record(path: Path, summary: dict[str, Any]) -> None:
    writer = StoreWriter.open(path)
    writer.record(summary)
    writer.close()


def recorded(path: Path) -> dict[str, Any]:
    with FeatureStore(path, unfinished=True) as store:
        return store.extraction


def raw_attribute(path: Path) -> Any:
    """Return the attribute as the format's own library has it."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return bytes(file.attrs[schema.EXTRACTION])
    return zarr.open_group(path, mode="r").attrs[schema.EXTRACTION]


def remove_attribute(path: Path) -> None:
    """Make a store as those were that were laid out before the attribute existed."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            del file.attrs[schema.EXTRACTION]
    else:
        del zarr.open_group(path, mode="r+").attrs[schema.EXTRACTION]


# --- recorded and read back ----------------------------------------------------------------------


def test_of_a_store_that_nothing_was_recorded_of_nothing_is_known(path: Path) -> None:
    what = content()
    StoreWriter.create_or_resume(path, what.layout).close()
    assert recorded(path) == {}
    assert recorded(fill(path, what)) == {}


def test_a_summary_is_read_back_to_the_last_digit(path: Path) -> None:
    what = content()
    with writing(path, what.layout) as writer:
        for shard in writer.shards():
            writer.write_shard(*what.part(shard))
        writer.record(SUMMARY)
        writer.finish()
    assert recorded(path) == SUMMARY
    assert_holds(path, what)
    found = verify(path)
    assert (found.images, found.pending, found.problems) == (7, 0, [])


def test_a_summary_comes_after_all_that_was_handed_over(path: Path) -> None:
    what = content(reasons={})
    with writing(path, what.layout) as writer:
        for shard in writer.shards():
            _, features, content_hash, error = what.part(shard)
            writer.write(shard, {name: torch.from_numpy(each) for name, each in features.items()})
            writer.mark(shard, content_hash, error)
        writer.record(SUMMARY)
        assert (writer.status == schema.OK).all()
    assert recorded(path) == SUMMARY


def test_the_last_summary_counts_whatever_its_length(path: Path) -> None:
    what = content()
    fill(path, what)
    before = arrays(path)
    for summary in (SUMMARY, SHORT, LONG, {}, LONG, SUMMARY):
        record(path, summary)
        assert recorded(path) == summary
    after = arrays(path)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert_holds(path, what)


def test_nothing_is_recorded_as_it_was_laid_out(path: Path) -> None:
    fill(path, content())
    before = raw_attribute(path)
    record(path, SUMMARY)
    assert raw_attribute(path) != before
    record(path, {})
    assert raw_attribute(path) == before


def test_one_writer_may_record_twice(path: Path) -> None:
    with writing(path, content().layout) as writer:
        writer.record(LONG)
        writer.record(SHORT)
    assert recorded(path) == SHORT


def test_in_hdf5_nothing_but_the_bytes_of_the_summary_changes(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.h5", content())
    record(path, SHORT)
    for summary in (LONG, SHORT):
        before = np.fromfile(path, np.uint8)
        record(path, summary)
        after = np.fromfile(path, np.uint8)
        assert len(after) == len(before)
        changed = np.flatnonzero(after != before)
        assert 0 < np.ptp(changed) < schema.EXTRACTION_BYTES
        assert len(raw_attribute(path)) == schema.EXTRACTION_BYTES


def test_other_tools_read_a_summary_as_json(path: Path) -> None:
    record(fill(path, content()), SUMMARY)
    stored = raw_attribute(path)
    values = json.loads(stored) if path.suffix == ".h5" else stored
    assert {name: values[name] for name in SUMMARY} == SUMMARY


def test_a_store_that_grows_keeps_its_summary(path: Path) -> None:
    what = content()
    record(fill(path, what.first(4)), LONG)
    assert recorded(fill(path, what)) == LONG
    record(path, SUMMARY)
    assert recorded(path) == SUMMARY
    assert_holds(path, what)
    assert verify(path).problems == []


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "é", '"', "🦩"])
def test_what_does_not_fit_is_left_out_and_the_rest_is_kept(path: Path, letter: str) -> None:
    fill(path, content())
    record(path, {"images": 7, "note": letter * schema.EXTRACTION_BYTES, "seconds": 1.5})
    assert recorded(path) == {"images": 7, "seconds": 1.5}


def test_the_first_entries_have_the_room(path: Path) -> None:
    fill(path, content())
    record(path, {"a": "x" * 1200, "b": "y" * 1200, "c": 1})
    assert recorded(path) == {"a": "x" * 1200, "c": 1}


def test_room_is_used_to_the_last_byte_but_one(path: Path) -> None:
    fill(path, content())
    kept = []
    for length in range(schema.EXTRACTION_BYTES - 44, schema.EXTRACTION_BYTES - 24):
        record(path, {"note": "x" * length})
        summary = recorded(path)
        assert summary in ({}, {"note": "x" * length})
        if summary and path.suffix == ".h5":
            assert raw_attribute(path).endswith(b" ")
        kept += [length] if summary else []
    assert len(kept) > 5
    assert max(kept) < schema.EXTRACTION_BYTES - 25, "its name and a checksum take room too"


# --- stores of before, damage, kills -------------------------------------------------------------


def test_a_store_without_room_for_it_stays_without(path: Path) -> None:
    what = content()
    remove_attribute(fill(path, what.first(4)))
    assert recorded(path) == {}
    record(path, SUMMARY)
    assert recorded(path) == {}
    assert verify(path).problems == []
    assert_holds(fill(path, what), what)
    with pytest.raises(KeyError):
        raw_attribute(path)


def spoil_hdf5(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"images": 7', b'"images": 8'),  # JSON that was never recorded
        (b'"images": 7', b'"images"\xff\xfe\xfd'),
        (b'"images": 7', b'": {{{{{{{{'),
        (b'{"images": 7', b"            "),
    ],
)
def test_a_torn_summary_is_none_and_harms_nothing(tmp_path: Path, old: bytes, new: bytes) -> None:
    what = content()
    path = fill(tmp_path / "a.h5", what)
    record(path, SUMMARY)
    spoil_hdf5(path, old, new)
    assert recorded(path) == {}
    assert verify(path).problems == []
    assert_holds(path, what)
    record(path, SUMMARY)
    assert recorded(path) == SUMMARY


def test_what_must_not_change_is_not_forgiven(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.h5", content())
    spoil_hdf5(path, b'{"command": "mlc', b'{"command\xff: "mlc')
    with pytest.raises(MlcError, match="not a feature store"):
        FeatureStore(path)


@pytest.mark.parametrize("stored", [None, [], "text", 7, {"crc32c": 1}, {"images": 7}])
def test_what_was_not_recorded_by_us_is_not_believed(tmp_path: Path, stored: Any) -> None:
    path = fill(tmp_path / "a.zarr", content())
    zarr.open_group(path, mode="r+").attrs[schema.EXTRACTION] = stored
    assert recorded(path) == {}
    record(path, SUMMARY)
    assert recorded(path) == SUMMARY


NURSERY = """
import os, sys
from pathlib import Path
from mlc.store.writer import StoreWriter
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        print(os.getpid(), flush=True)
        for turn in range(int(sys.argv[1]), 9999):
            writer = StoreWriter.open(Path(line.strip()))
            writer.record({"images": turn, "note": "x" * (turn % 7 * 250)})
            writer.close()
        os._exit(1)  # not killed
    os.waitpid(process, 0)
    print("ended", flush=True)
"""
FIRST = 100  # that a killed process records
QUICK_KILLS, KILLS = 6, 48


@contextmanager
def nursery() -> Iterator[subprocess.Popen]:
    """A process that forks others, which record one summary after the other, to be killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", NURSERY, str(FIRST)]
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_and_read(path: Path, what: Content, kills: int) -> None:
    """Kill processes that record: the store is whole, and one of their summaries is there."""
    generator, last = np.random.default_rng(20261123), []
    record(fill(path, what), {"images": 0, "note": ""})
    with nursery() as forks:
        for _ in range(kills):
            forks.stdin.write(f"{path}\n")
            pid = int(forks.stdout.readline())
            time.sleep(generator.uniform(0.01, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert forks.stdout.readline() == "ended\n"
            summary = recorded(path)
            assert summary["note"] == "x" * (summary["images"] % 7 * 250)
            assert_holds(path, what)
            last.append(summary["images"])
    assert max(last) >= FIRST, "the others did not come to record anything"
    assert verify(path).problems == []
    assert_holds(fill(path, what), what)
    assert not list(path.parent.rglob("*.partial"))


def test_a_process_killed_while_it_records_leaves_the_old_summary_or_the_new(
    path: Path,
) -> None:
    kill_and_read(path, content(numbered(8), key=ONE_LAYER), QUICK_KILLS)


@pytest.mark.slow
def test_of_many_that_are_killed_while_they_record_none_leaves_anything_else(path: Path) -> None:
    kill_and_read(path, content(numbered(8), key=ONE_LAYER), KILLS)
