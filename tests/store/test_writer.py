"""StoreWriter: what it keeps, what it resumes, what it adds, and what it refuses."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from store_content import (
    FEATURES,
    IDS,
    KEY,
    REASONS,
    Content,
    arrays,
    assert_holds,
    assert_same_store,
    content,
    fill,
    key_of,
    numbered,
    pending,
    writing,
)

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store import writer as module
from mlc.store.checksums import row_crc32c
from mlc.store.layout import rows_of
from mlc.store.reader import FeatureStore
from mlc.store.shard import ShardWriter
from mlc.store.units import crc32c
from mlc.store.writer import StoreWriter

FLOAT16 = ("pooled:float16", "tokens:float16")
INT8 = ("pooled:int8", "tokens:int8")


def tensors(what: Content, rows: range) -> dict[str, torch.Tensor]:
    """Features as extraction hands them over, those of bad images 0."""
    zeroed = {
        name: np.where((what.error != "").reshape(-1, *[1] * (values.ndim - 1)), 0, values)
        for name, values in what.features.items()
    }
    return {
        name: torch.from_numpy(values[rows.start : rows.stop].astype(np.float32))
        for name, values in zeroed.items()
    }


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "shard_rows", "sizes"),
    [
        (7, 3, [3, 3, 1]),
        (6, 3, [3, 3]),
        (5, 256, [5]),
        (1, 1, [1]),
        (1, 256, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_any_number_of_rows_is_cut_into_shards(
    path: Path, rows: int, shard_rows: int, sizes: list[int]
) -> None:
    what = content(numbered(rows), shard_rows)
    with writing(path, what.layout) as writer:
        shards = writer.shards()
    assert [len(shard) for shard in shards] == sizes
    assert [row for shard in shards for row in shard] == list(range(rows))
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_of_a_shard_make_the_same_store_as_a_whole_shard(path: Path, batch: int) -> None:
    what = content()
    with writing(path, what.layout) as writer:
        for shard in writer.shards():
            for start in range(shard.start, shard.stop, batch):
                rows = range(start, min(start + batch, shard.stop))
                writer.write(rows, tensors(what, rows))
            _, _, content_hash, error = what.part(shard)
            writer.mark(shard, content_hash, error)
        writer.finish()
    assert_same_store(path, fill(path.with_name(f"whole{path.suffix}"), what))


def test_a_shard_that_is_written_and_not_marked_is_pending_for_the_next_writer(path: Path) -> None:
    what = content()
    with writing(path, what.layout) as writer:
        writer.write(range(3), tensors(what, range(3)))
        writer.drain()
        assert (writer.status == schema.PENDING).all()
    with writing(path, what.layout) as writer:
        assert pending(writer) == writer.shards()
    assert_holds(fill(path, what), what)


def test_features_are_on_the_disk_before_anything_says_so_and_the_status_comes_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = content()
    backend = schema.format_of(path)
    steps, write, fsync = [], backend.write, os.fsync

    def noted_write(self: Any, name: str, start: int, values: Any) -> None:
        steps.append(name)
        write(self, name, start, values)

    def noted_fsync(descriptor: int) -> None:
        steps.append("fsync")
        fsync(descriptor)

    with writing(path, what.layout) as writer:
        monkeypatch.setattr(backend, "write", noted_write)
        monkeypatch.setattr(os, "fsync", noted_fsync)
        writer.write_shard(*what.part(range(3)))
    files = 1 if path.suffix == ".h5" else len(what.features)
    assert steps[:files] == ["fsync"] * files
    assert steps[-1] == schema.STATUS
    assert schema.ROW_CRC32C in steps[files:-1]


def test_rows_that_are_not_done_stay_as_they_are(path: Path) -> None:
    what = content(reasons={})
    shard, features, content_hash, error = what.part(range(3))
    done = np.array([True, False, True])
    with writing(path, what.layout) as writer:
        writer.write(shard, {name: torch.from_numpy(each) for name, each in features.items()})
        writer.mark(shard, content_hash, error, done)
        writer.drain()
        assert (writer.status[:3] == schema.OK).tolist() == done.tolist()
        assert (writer.content_hash()[:3] == content_hash).tolist() == done.tolist()
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize("features", [FEATURES, FLOAT16, INT8], ids="/".join)
def test_what_was_handed_over_may_be_changed_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...]
) -> None:
    """More batches than wait to be written, in memory that is used again."""
    what = content(numbered(40), 3, key=key_of(*features), reasons={})
    may_write, write = threading.Event(), ShardWriter.write

    def late(*arguments: Any) -> None:
        may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(ShardWriter, "write", late)
    with writing(path, what.layout) as writer:
        for shard in writer.shards():
            _, _, content_hash, error = what.part(shard)
            for rows in (range(shard.start, shard.start + 1), range(shard.start + 1, shard.stop)):
                given = tensors(what, rows)
                if len(rows):
                    writer.write(rows, given)
                for each in given.values():
                    each.zero_()
            writer.mark(shard, content_hash, error)
            may_write.set()
        writer.finish()
    assert_holds(path, what)


# --- every number is accounted for ---------------------------------------------------------------


@pytest.mark.parametrize("features", [FEATURES, FLOAT16, INT8], ids="/".join)
def test_checksums_and_counts_are_those_of_what_is_stored(
    path: Path, features: tuple[str, ...]
) -> None:
    what = content(key=key_of(*features))
    what.features["layer3/tokens"][0, 1] = 1e9
    got = arrays(fill(path, what))
    for name in what.features:
        stored, clipped = what.encoded(name)
        np.testing.assert_array_equal(got[name], stored, err_msg=name)
        assert got[name].dtype == stored.dtype
        crc = crc32c(stored.reshape(-1, *stored.shape[2:])).reshape(clipped.shape)
        np.testing.assert_array_equal(got[schema.crc(name)], crc, err_msg=name)
        np.testing.assert_array_equal(got[schema.clipped(name)], clipped, err_msg=name)
    np.testing.assert_array_equal(got[schema.ROW_CRC32C], row_crc32c(got, list(what.features)))


def test_the_checksum_of_a_row_covers_whatever_is_small(path: Path) -> None:
    what = content()
    got = arrays(fill(path, what))
    for name in (*schema.ROW_ARRAYS[:-1], "layer3/tokens_crc32c", "layer3/pooled_clipped"):
        changed = got[name].copy()
        changed[4] = "x" if changed.dtype.kind == "U" else changed[4] + 1
        now = row_crc32c(got | {name: changed}, list(what.features))
        assert np.flatnonzero(now != got[schema.ROW_CRC32C]).tolist() == [4], name


def test_float16_is_the_rounded_float32(path: Path) -> None:
    what = content(key=key_of(*FLOAT16))
    values = np.where((what.error != "")[:, None, None], 0, what.features["layer3/pooled"])
    rounded = values.astype(np.float16)
    assert (rounded != values).any()
    with FeatureStore(fill(path, what)) as store:
        np.testing.assert_array_equal(store.pooled("layer3", "hflip"), rounded[:, 1])


def test_what_float16_cannot_hold_is_clipped_and_counted(path: Path) -> None:
    what = content(key=key_of(*FLOAT16), reasons={})
    what.features["layer3/pooled"][4, 1, :2] = -1e5, 7e4
    got = arrays(fill(path, what))
    assert got["layer3/pooled"][4, 1, :2].tolist() == [-65504, 65504]
    counts = got["layer3/pooled_clipped"]
    assert counts[4].tolist() == [0, 2]
    assert counts.sum() == 2


def test_what_is_beyond_the_scale_of_int8_is_clipped_and_counted(path: Path) -> None:
    what = content(key=key_of(*INT8), reasons={})
    scale = what.layout.scales["pre_logits/tokens"]
    what.features["pre_logits/tokens"][:] = 0
    what.features["pre_logits/tokens"][1, 0, 3] = scale * [1000, 127.4, -127.6, -3, 0]
    got = arrays(fill(path, what))
    assert got["pre_logits/tokens"][1, 0, 3].tolist() == [127, 127, -127, -3, 0]
    assert got["pre_logits/tokens_clipped"].tolist() == [[0, 0], [2, 0], *[[0, 0]] * 5]
    with FeatureStore(path) as store:
        read = store.features("pre_logits", "tokens").read_all()
    np.testing.assert_array_equal(read[1, 3], scale * np.float32([127, 127, -127, -3, 0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_is_an_error_and_stays_pending(
    path: Path, value: float
) -> None:
    what = content(reasons={})
    what.features["layer3/tokens"][4, 0, 1, 2] = value
    with writing(path, what.layout) as writer:
        first, second, _ = writer.shards()
        writer.write_shard(*what.part(first))
        with pytest.raises(MlcError, match="layer3/tokens has features that are not numbers"):
            writer.write_shard(*what.part(second))
    with writing(path, what.layout) as writer:
        assert (writer.status != schema.PENDING).tolist() == [True] * 3 + [False] * 4


# --- bad images ----------------------------------------------------------------------------------


def test_features_of_bad_images_are_zero_and_those_of_others_are_not(path: Path) -> None:
    with FeatureStore(fill(path, content())) as store:
        norms = np.abs(store.pooled()).sum(axis=1)
    assert np.flatnonzero(norms == 0).tolist() == sorted(REASONS)
    assert np.isfinite(norms).all()


def test_a_store_of_bad_images_only_is_a_store(path: Path) -> None:
    what = content(reasons=dict.fromkeys(range(len(IDS)), "bad"))
    assert_holds(fill(path, what), what)


def test_a_shard_of_bad_images_is_not_taken_for_lost(path: Path) -> None:
    what = content(reasons=dict.fromkeys(range(3, 6), "broken"))
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200),
        ("é" * 150, "é" * 100),
        ("x" + "é" * 150, "x" + "é" * 99),
        ("xx" + "🦩" * 80, "xx" + "🦩" * 49),
    ],
    ids=["fits", "ascii", "two-byte", "two-byte-cut", "four-byte-cut"],
)
def test_a_long_reason_is_clipped_between_characters(path: Path, reason: str, kept: str) -> None:
    what = content(reasons={0: reason, 4: "short"})
    with writing(fill(path, what), what.layout) as writer:
        assert writer.errors() == {"photos/z/1.jpg": kept, "photos/🦩.gif": "short"}


# --- resuming ------------------------------------------------------------------------------------


def test_only_pending_shards_are_left_after_reopening(path: Path) -> None:
    what = content()
    fill(path, what, shards=[2, 0])
    with writing(path, what.layout) as writer:
        assert pending(writer) == [range(3, 6)]
        writer.write_shard(*what.part(range(3, 6)))
        writer.finish()
    assert_same_store(path, fill(path.with_name(f"whole{path.suffix}"), what))


def test_written_again_a_shard_takes_what_was_bad_and_keeps_what_was_good(path: Path) -> None:
    first, second = content(), content(reasons={0: "went bad"}, seed=1)
    fill(path, first)
    with writing(path, first.layout) as writer:
        writer.write_shard(*second.part(range(3)))
        assert "photos/über.png" not in writer.errors()
        assert "went bad" not in writer.errors().values()
    with FeatureStore(path) as store:
        for name in first.features:
            want = first.expected(name)
            want[2] = second.expected(name)[2]
            read = store.features(*name.rsplit("/", 1)).read_all(1)
            np.testing.assert_array_equal(read, want[:, 1])
        assert (store.status[:3] == schema.OK).all()
        assert store.content_hash()[2] == second.content_hash[2]
    got = arrays(path)
    np.testing.assert_array_equal(got[schema.ROW_CRC32C], row_crc32c(got, list(first.features)))


def test_rows_set_pending_are_written_again(path: Path) -> None:
    first, second = content(reasons={}), content(reasons={}, seed=1)
    fill(path, first)
    with writing(path, first.layout) as writer:
        writer.set_pending(np.array([1, 6]))
    with pytest.raises(MlcError, match="unfinished, 5 of 7 images"):
        FeatureStore(path)
    fill(path, second)
    rows = [1, 6]
    with FeatureStore(path) as store:
        want = first.expected("pre_logits/tokens")
        want[rows] = second.expected("pre_logits/tokens")[rows]
        read = store.features("pre_logits", "tokens").read_all(1)
        np.testing.assert_array_equal(read, want[:, 1])


def test_finish_refuses_while_rows_are_pending(path: Path) -> None:
    what = content()
    fill(path, what, shards=[0, 1])
    expected = pytest.raises(MlcError, match="1 of 7 images are still to be extracted")
    with writing(path, what.layout) as writer, expected:
        writer.finish()
    with pytest.raises(MlcError, match="unfinished"):
        FeatureStore(path)


def test_recorded_batch_size_and_shards_win_over_those_asked_for(path: Path) -> None:
    what = content()
    fill(path, what, shards=[0])
    with writing(path, replace(what.layout, batch_size=64, shard_rows=2)) as writer:
        assert writer.batch_size == 8
        assert [len(shard) for shard in writer.shards()] == [3, 3, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size_px": 96}, "size_px: stored 64, asked 96"),
        ({"features": FLOAT16}, r"features: stored \['pooled:float32', 'tokens:float16'\], asked"),
        ({"views": ("orig",)}, r"views: stored \['orig', 'hflip'\], asked \['orig'\]"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_another_key_is_refused_and_the_store_stays_as_it_is(
    path: Path, changes: dict[str, Any], expected: str
) -> None:
    what = content()
    fill(path, what)
    other = replace(what.layout, key=replace(KEY, **changes))
    with pytest.raises(MlcError, match=expected) as caught:
        StoreWriter.create_or_resume(path, other)
    assert "backbone" not in str(caught.value)
    assert_holds(path, what)
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize(("version", "advice"), [(1, "extract it again"), (3, "update mlc")])
def test_another_version_is_refused_by_reader_and_writer(
    path: Path, version: int, advice: str
) -> None:
    what = content()
    fill(path, what)
    backend = schema.format_of(path).open(path, write=True)
    backend.set_attribute("schema_version", version)
    backend.close()
    expected = f"{path.name}: .* store of version 2, got version {version}; {advice}"
    for opens in (
        FeatureStore,
        StoreWriter.open,
        lambda path: StoreWriter.create_or_resume(path, what.layout),
    ):
        with pytest.raises(MlcError, match=expected):
            opens(path)


# --- more images, and fewer ----------------------------------------------------------------------


@pytest.mark.parametrize("subset", [slice(-1), slice(2, 3), slice(None, None, -1)], ids=str)
def test_a_subset_of_the_images_is_that_store(path: Path, subset: slice) -> None:
    what = content()
    fill(path, what)
    asked = replace(
        what.layout, image_id=what.layout.image_id[subset], file=what.layout.file[subset]
    )
    with writing(path, asked) as writer:
        assert pending(writer) == []
        np.testing.assert_array_equal(writer.image_id, what.layout.image_id)
        rows = rows_of(writer.image_id, asked.image_id)
        np.testing.assert_array_equal(writer.image_id[rows], asked.image_id)
    assert_holds(path, what)


@pytest.mark.parametrize("steps", [(4, 5), (3, 6), (1, 2, 7), (6, 7)], ids=str)
def test_images_that_are_added_make_the_store_they_would_have_made_at_once(
    path: Path, steps: tuple[int, ...]
) -> None:
    what = content(reasons={1: "broken", 6: "missing"})
    for rows in steps:
        assert_holds(fill(path, what.first(rows)), what.first(rows))
    whole = path.with_name(f"whole{path.suffix}")
    assert_same_store(path, fill(whole, what.first(steps[-1])))


def test_added_images_come_last_and_may_have_longer_names(path: Path) -> None:
    what = content(["b", "写真/猫" * 40, "a"], reasons={})
    fill(path, what.first(1))
    order = [1, 0, 2]  # the known image among the new ones
    asked = replace(what.layout, image_id=what.layout.image_id[order], file=what.layout.file[order])
    with writing(path, asked) as writer:
        np.testing.assert_array_equal(writer.image_id, what.layout.image_id)
        assert (writer.status == schema.PENDING).tolist() == [False, True, True]
    assert_holds(fill(path, what), what)


def test_a_grown_store_is_unfinished_until_the_new_rows_are_there(path: Path) -> None:
    what = content()
    fill(path, what.first(4))
    with writing(path, what.layout):
        pass
    with pytest.raises(MlcError, match="unfinished, 4 of 7 images are extracted"):
        FeatureStore(path)
    assert_holds(fill(path, what), what)


def test_what_was_stored_before_growth_keeps_its_bytes(path: Path) -> None:
    what, other = content(reasons={}), content(reasons={}, seed=1)
    fill(path, what.first(4))
    before = arrays(path)
    other = replace(other, layout=what.layout)
    fill(path, other)  # with other features, which only the new rows must take
    after = arrays(path)
    for name, values in before.items():
        if not name.endswith("_scale"):
            np.testing.assert_array_equal(after[name][:4], values, err_msg=name)


def test_a_worker_among_others_adds_no_images(path: Path) -> None:
    what = content()
    fill(path, what.first(4))
    with pytest.raises(MlcError, match=r"3 images are not in it yet, .* without --shard first"):
        StoreWriter.create_or_resume(path, what.layout, alone=False)
    assert_holds(path, what.first(4))


# --- copies --------------------------------------------------------------------------------------


def test_a_copied_row_is_the_other_to_the_last_bit(path: Path) -> None:
    what = content(reasons={})
    what.features["layer3/tokens"][0, 0] = 1e9  # so that a count is copied, too
    with writing(path, what.layout) as writer:
        writer.write(range(3), tensors(what, range(3)))
        writer.copy(0, 1)  # of the same shard, not marked yet
        writer.mark(range(3), *what.part(range(3))[2:])
        writer.write_shard(*what.part(range(3, 6)))
        writer.copy(0, 6)
        writer.mark(range(6, 7), *what.part(range(6, 7))[2:])
        writer.finish()
    got = arrays(path)
    for name in what.features:
        for each in (name, schema.crc(name), schema.clipped(name)):
            np.testing.assert_array_equal(got[each][[1, 6]], got[each][[0, 0]], err_msg=each)
            assert (got[each][2] != got[each][0]).any() or each.endswith("clipped"), each
    np.testing.assert_array_equal(got[schema.ROW_CRC32C], row_crc32c(got, list(what.features)))


def test_a_damaged_row_is_not_copied(path: Path) -> None:
    what = content(reasons={})
    fill(path, what, shards=[0, 1])
    backend = schema.format_of(path).open(path, write=True)
    backend.write("layer3/pooled", 1, np.ones((1, 2, 3), np.float32))
    backend.close()
    with writing(path, what.layout) as writer:
        writer.copy(1, 6)
        with pytest.raises(MlcError, match="layer3/pooled of row 1 is damaged; run mlc store rep"):
            writer.drain()


# --- in the background ---------------------------------------------------------------------------


def test_a_writer_that_falls_behind_makes_its_caller_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = content(numbered(module.WRITES_AHEAD + 3), 1, reasons={})
    go_on, writes = threading.Event(), []

    def write(self: ShardWriter, rows: NDArray[np.intp], encoded: object) -> None:
        go_on.wait(2)
        writes.append(rows.tolist())

    monkeypatch.setattr(ShardWriter, "write", write)
    with writing(path, what.layout) as writer:
        submitted = []

        def submit() -> None:
            for shard in writer.shards():
                writer.write(shard, tensors(what, shard))
                submitted.append(shard.start)

        thread = threading.Thread(target=submit)
        thread.start()
        thread.join(0.5)
        assert len(submitted) == module.WRITES_AHEAD
        go_on.set()
        thread.join(10)
        writer.drain()
    assert writes == [[row] for row in range(len(what.error))]


def test_what_is_wrong_in_the_background_is_told_and_nothing_more_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = content(reasons={})
    calls, asked = [], threading.Event()

    def write(self: ShardWriter, rows: NDArray[np.intp], encoded: object) -> None:
        asked.wait(2)  # until the mark waits behind it
        calls.append(rows.tolist())
        raise ZeroDivisionError

    monkeypatch.setattr(ShardWriter, "write", write)
    _, _, content_hash, error = what.part(range(3))
    with writing(path, what.layout) as writer:
        writer.write(range(3), tensors(what, range(3)))
        writer.mark(range(3), content_hash, error)
        asked.set()
        with pytest.raises(ZeroDivisionError):
            writer.drain()
        with pytest.raises(ZeroDivisionError):
            writer.write(range(3, 6), tensors(what, range(3, 6)))
        with pytest.raises(ZeroDivisionError):
            writer.finish()
    assert calls == [[0, 1, 2]]
    with FeatureStore(path, unfinished=True) as store:
        assert (store.status == schema.PENDING).all()


def test_filling_finishes_closes_and_says_what_is_kept(path: Path) -> None:
    what = content()
    writer = StoreWriter.create_or_resume(path, what.layout)
    stopped = rf"{path.name}: stopped, 3 of 7 images are kept; the same command goes on from there"
    writer.write_shard(*what.part(range(3)))
    with pytest.raises(KeyboardInterrupt, match=stopped), writer.filling():
        raise KeyboardInterrupt
    writer = StoreWriter.create_or_resume(path, what.layout)
    with writer.filling(finish=False):
        writer.write_shard(*what.part(range(3, 6)))
    with pytest.raises(MlcError, match="unfinished, 6 of 7"):
        FeatureStore(path)
    writer = StoreWriter.create_or_resume(path, what.layout)
    with writer.filling():
        writer.write_shard(*what.part(range(6, 7)))
    assert_holds(path, what)


# --- leftovers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_creation_left_is_replaced(path: Path, kind: str) -> None:
    partial = path.with_name(f".{path.name}.partial-123")
    leftover = partial if kind == "file" else partial / "c" / "0"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_bytes(b"half a layout")
    what = content()
    assert_holds(fill(path, what), what)
    assert not partial.exists()


def test_what_another_worker_is_creating_is_left_alone(path: Path) -> None:
    what = content()
    partial = path.with_name(f".{path.name}.partial-123")
    partial.write_bytes(b"half a layout")
    StoreWriter.create_or_resume(path, what.layout, alone=False).close()
    assert partial.exists()


@pytest.mark.parametrize(
    "name", ["status/c/1.0123456789abcdef.partial", "zarr.0123456789abcdef.partial"]
)
def test_a_file_that_a_killed_zarr_writer_left_is_cleared_away(tmp_path: Path, name: str) -> None:
    what = content()
    path = fill(tmp_path / "a.zarr", what, shards=[0])
    leftover = path / name
    leftover.write_bytes(b"half a chunk")
    with FeatureStore(path, unfinished=True) as store:
        assert list(store.arrays) == list(what.features)
    StoreWriter.create_or_resume(path, what.layout, alone=False).close()
    assert leftover.exists()  # it may be another worker's
    assert_holds(fill(path, what), what)
    assert not leftover.exists()
