"""The store: one suite that every format of FORMATS must pass, by StoreWriter and FeatureStore."""

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.key import FeatureKey
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, find_store, labels_path
from mlc.store.writer import Layout, StoreWriter

KEY = FeatureKey(
    backbone="test_resnet",
    weights="0123456789abcdef",
    layers=("pre_logits", "layer3"),
    size_px=64,
    resize="squash",
    interpolation="bilinear",
    decode="pillow",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.25, 0.5),
    precision="float32",
    views=("orig", "hflip"),
    dtype="float32",
)
WIDTHS = {"pre_logits": 5, "layer3": 3}
IDS = ("z/1.jpg", "a b;c.jpg", "über.png", "写真/猫.jpg", "🦩.gif", "42", " lead.jpg")
REASONS = {2: "broken image: truncated", 5: "No such file or directory"}
SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]

Part = tuple[range, dict[str, NDArray[np.float32]], NDArray[np.str_], NDArray[np.str_]]


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(tmp_path: Path, suffix: str) -> Path:
    return tmp_path / f"store{suffix}"


@dataclass(frozen=True)
class Content:
    """What a store is filled with; the features of bad images are rubbish that must not arrive."""

    layout: Layout
    features: dict[str, NDArray[np.float32]]
    content_hash: NDArray[np.str_]
    error: NDArray[np.str_]

    def part(self, shard: range) -> Part:
        rows = slice(shard.start, shard.stop)
        features = {layer: values[rows] for layer, values in self.features.items()}
        return shard, features, self.content_hash[rows], self.error[rows]

    def expected(self, layer: str) -> NDArray[np.float32]:
        return np.where((self.error != "")[:, None, None], 0, self.features[layer])


def content(
    ids: Sequence[str] = IDS,
    shard_rows: int = 3,
    *,
    key: FeatureKey = KEY,
    reasons: dict[int, str] = REASONS,
    seed: int = 0,
) -> Content:
    generator = np.random.default_rng(seed)
    rows = len(ids)
    shape = (rows, len(key.views))
    error = np.array([reasons.get(row, "") for row in range(rows)])
    features = {
        layer: generator.normal(size=(*shape, WIDTHS[layer])).astype(np.float32)
        for layer in key.layers
    }
    for values in features.values():
        values[error != ""] = np.nan
    return Content(
        layout=Layout(
            key=key,
            image_id=np.array(ids),
            file=np.array([f"photos/{each}" for each in ids]),
            widths={layer: WIDTHS[layer] for layer in key.layers},
            batch_size=8,
            shard_rows=shard_rows,
            made_by={"command": "mlc extract --out Bücher.zarr", "commit": None},
        ),
        features=features,
        content_hash=np.array([generator.bytes(16).hex() for _ in ids]),
        error=error,
    )


def numbered(rows: int) -> list[str]:
    return [f"{row * 7919 % rows}.jpg" for row in range(rows)]


@contextmanager
def writing(path: Path, layout: Layout) -> Iterator[StoreWriter]:
    writer = StoreWriter.create_or_resume(path, layout)
    try:
        yield writer
    finally:
        writer.close()


def fill(path: Path, what: Content, shards: Sequence[int] | None = None) -> Path:
    """Write some shards, or all of them and finish."""
    with writing(path, what.layout) as writer:
        parts = [what.part(shard) for shard in writer.shards()]
        for index in range(len(parts)) if shards is None else shards:
            writer.write_shard(*parts[index])
        if shards is None:
            writer.finish()
    return path


def pending(writer: StoreWriter) -> list[range]:
    return [each for each in writer.shards() if (writer.status[each.start] == schema.PENDING).any()]


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a store, as its format gives it back."""
    backend = schema.format_of(path).open(path)
    names = [schema.IMAGE_ID, schema.FILE, schema.CONTENT_HASH, schema.STATUS, schema.ERROR]
    names += [schema.pooled(layer) for layer in backend.attributes()["key"]["layers"]]
    values = {name: backend.read(name) for name in names}
    backend.close()
    return values


def assert_same_store(got: Path, want: Path) -> None:
    got_arrays, want_arrays = arrays(got), arrays(want)
    assert got_arrays.keys() == want_arrays.keys()
    for name, values in want_arrays.items():
        np.testing.assert_array_equal(got_arrays[name], values, err_msg=name)
        assert got_arrays[name].dtype == values.dtype, name
    with FeatureStore(got) as one, FeatureStore(want) as other:
        assert one.key == other.key
        assert one.batch_size == other.batch_size


def assert_holds(path: Path, what: Content) -> None:
    with FeatureStore(path) as store:
        np.testing.assert_array_equal(store.image_id, what.layout.image_id)
        np.testing.assert_array_equal(store.file, what.layout.file)
        np.testing.assert_array_equal(store.content_hash(), what.content_hash)
        good = np.where(what.error == "", schema.OK, schema.BAD)
        np.testing.assert_array_equal(store.status, good)
        for layer in what.layout.key.layers:
            for view, name in enumerate(what.layout.key.views):
                want = what.expected(layer)[:, view]
                np.testing.assert_array_equal(store.pooled(layer, name), want)


# --- what is written is read ---------------------------------------------------------------------


def test_what_is_written_is_read(path: Path) -> None:
    what = content()
    assert_holds(fill(path, what), what)


def test_attributes_are_kept(path: Path) -> None:
    what = content()
    with FeatureStore(fill(path, what)) as store:
        assert store.path == path
        assert store.complete
        assert store.key == KEY.to_json()
        assert store.layers == ("pre_logits", "layer3")
        assert store.made_by == what.layout.made_by
        assert store.batch_size == 8
        assert store.shape("layer3") == (len(IDS), 2, 3)


def test_default_layer_and_view_are_the_first(path: Path) -> None:
    what = content()
    with FeatureStore(fill(path, what)) as store:
        np.testing.assert_array_equal(store.pooled(), what.expected("pre_logits")[:, 0])


def test_features_are_read_as_contiguous_float32(path: Path) -> None:
    with FeatureStore(fill(path, content(key=replace(KEY, dtype="float16")))) as store:
        values = store.pooled(view="hflip")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous


def test_rows_keep_the_order_they_are_listed_in(path: Path) -> None:
    ids = numbered(10)
    assert ids != sorted(ids)
    with FeatureStore(fill(path, content(ids, reasons={}))) as store:
        assert store.image_id.tolist() == ids


def test_reasons_are_read_by_file(path: Path) -> None:
    want = {f"photos/{IDS[row]}": reason for row, reason in REASONS.items()}
    with FeatureStore(fill(path, content())) as store:
        assert store.errors() == want


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
    with FeatureStore(fill(path, what)) as store:
        assert store.errors() == {"photos/z/1.jpg": kept, "photos/🦩.gif": "short"}


def test_features_of_bad_images_are_zero_and_those_of_others_are_not(path: Path) -> None:
    with FeatureStore(fill(path, content())) as store:
        norms = np.abs(store.pooled()).sum(axis=1)
    assert np.flatnonzero(norms == 0).tolist() == sorted(REASONS)
    assert np.isfinite(norms).all()


def test_a_store_of_bad_images_only_is_a_store(path: Path) -> None:
    what = content(reasons=dict.fromkeys(range(len(IDS)), "bad"))
    assert_holds(fill(path, what), what)


# --- float16 -------------------------------------------------------------------------------------


def test_float16_is_the_rounded_float32(path: Path) -> None:
    what = content(key=replace(KEY, dtype="float16"))
    rounded = what.expected("layer3").astype(np.float16)
    assert (rounded != what.expected("layer3")).any()
    fill(path, what)
    with FeatureStore(path) as store:
        np.testing.assert_array_equal(store.pooled("layer3", "hflip"), rounded[:, 1])
    assert arrays(path)["layer3/pooled"].dtype == np.float16


def test_a_feature_that_float16_cannot_hold_is_an_error_and_stays_pending(path: Path) -> None:
    what = content(key=replace(KEY, dtype="float16"), reasons={})
    what.features["layer3"][4, 1, 0] = -1e5
    with writing(path, what.layout) as writer:
        first, second, _ = writer.shards()
        writer.write_shard(*what.part(first))
        expected = r"layer3 has features that float16 cannot hold, the largest is 1e\+05"
        with pytest.raises(MlcError, match=expected):
            writer.write_shard(*what.part(second))
        assert (writer.status[second.start : second.stop] == schema.PENDING).all()
    with writing(path, what.layout) as writer:
        assert (writer.status != schema.PENDING).tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_is_an_error(path: Path, value: float) -> None:
    what = content(reasons={})
    what.features["layer3"][1, 0, 2] = value
    with writing(path, what.layout) as writer, pytest.raises(MlcError, match="layer3"):
        writer.write_shard(*what.part(writer.shards()[0]))


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
        want = first.expected("pre_logits")[:, 0]
        want[2] = second.expected("pre_logits")[2, 0]
        np.testing.assert_array_equal(store.pooled(), want)
        assert (store.status[:3] == schema.OK).all()
        assert store.content_hash()[2] == second.content_hash[2]


def test_finish_refuses_while_rows_are_pending(path: Path) -> None:
    what = content()
    fill(path, what, shards=[0, 1])
    expected = pytest.raises(MlcError, match="1 images are still to be extracted")
    with writing(path, what.layout) as writer, expected:
        writer.finish()
    with pytest.raises(MlcError, match="unfinished"):
        FeatureStore(path)


def test_an_unfinished_store_opens_only_when_asked_for(path: Path) -> None:
    what = content()
    fill(path, what, shards=[1])
    with pytest.raises(MlcError, match="unfinished, 3 of 7 images are extracted"):
        FeatureStore(path)
    with FeatureStore(path, unfinished=True) as store:
        assert not store.complete
        assert (store.status != schema.PENDING).tolist() == [False] * 3 + [True] * 3 + [False]
        np.testing.assert_array_equal(store.pooled()[3:6], what.expected("pre_logits")[3:6, 0])
        assert not store.pooled()[:3].any()


def test_a_store_that_is_refused_is_not_kept_open(path: Path) -> None:
    what = content()
    fill(path, what, shards=[1])
    with pytest.raises(MlcError) as caught:
        FeatureStore(path)
    assert_holds(fill(path, what), what)
    assert "unfinished" in str(caught.value)  # its traceback, and so the reader, is still alive


def test_recorded_batch_size_and_shards_win_over_those_asked_for(path: Path) -> None:
    what = content()
    fill(path, what, shards=[0])
    with writing(path, replace(what.layout, batch_size=64, shard_rows=2)) as writer:
        assert writer.batch_size == 8
        assert [len(shard) for shard in writer.shards()] == [3, 3, 1]


def test_another_key_is_refused_and_the_store_stays_as_it_is(path: Path) -> None:
    what = content()
    fill(path, what)
    other = replace(what.layout, key=replace(KEY, size_px=96))
    with pytest.raises(MlcError, match="size_px: stored 64, asked 96") as caught:
        StoreWriter.create_or_resume(path, other)
    assert "backbone" not in str(caught.value)
    assert_holds(path, what)
    assert_holds(fill(path, what), what)


@pytest.mark.parametrize("ids", [IDS[:-1], (*IDS, "new.jpg"), IDS[::-1]], ids=len)
def test_other_images_are_refused(path: Path, ids: tuple[str, ...]) -> None:
    fill(path, content())
    with pytest.raises(MlcError, match=rf"holds 7 other images than the {len(ids)} asked for"):
        StoreWriter.create_or_resume(path, content(ids).layout)


def test_another_version_is_refused_by_reader_and_writer(path: Path) -> None:
    what = content()
    fill(path, what)
    backend = schema.format_of(path).open(path, write=True)
    backend.set_attribute("schema_version", 2)
    backend.close()
    with pytest.raises(MlcError, match="store of version 1, got version 2"):
        FeatureStore(path)
    with pytest.raises(MlcError, match="store of version 1, got version 2"):
        StoreWriter.create_or_resume(path, what.layout)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_creation_left_is_replaced(path: Path, kind: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    leftover = partial if kind == "file" else partial / "c" / "0"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_bytes(b"half a layout")
    what = content()
    assert_holds(fill(path, what), what)
    assert not partial.exists()


def test_a_chunk_that_a_killed_zarr_writer_left_is_cleared_away(tmp_path: Path) -> None:
    what = content()
    path = fill(tmp_path / "a.zarr", what, shards=[0])
    leftover = path / "status" / "c" / "1.0123456789abcdef.partial"
    leftover.write_bytes(b"half a chunk")
    assert_holds(fill(path, what), what)
    assert not leftover.exists()


# --- what is no store ----------------------------------------------------------------------------


def text_file(path: Path) -> None:
    path.write_text("not a store\n" * 100)


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def folder_of_files(path: Path) -> None:
    path.mkdir()
    for name in ("zarr.json", "a.txt"):
        (path / name).write_text('["not", "a", "group"]')


def bare_hdf5(path: Path) -> None:
    h5py.File(path, "w").close()


def foreign_hdf5_with_text(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["title"] = "somebody's data"


def foreign_hdf5_with_numbers(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["scale"] = 0.5
        file["data"] = np.arange(3)


def foreign_zarr_group(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=3).attrs["title"] = "somebody's data"


def zarr_of_version_2(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=2)


def zarr_array(path: Path) -> None:
    zarr.create_array(path, shape=(3,), dtype="f4")


JUNK = (
    text_file,
    empty_file,
    empty_folder,
    folder_of_files,
    bare_hdf5,
    foreign_hdf5_with_text,
    foreign_hdf5_with_numbers,
    foreign_zarr_group,
    zarr_of_version_2,
    zarr_array,
)


@pytest.mark.parametrize("make", JUNK, ids=lambda make: make.__name__)
def test_what_is_no_store_is_neither_read_nor_written_to(path: Path, make: Any) -> None:
    make(path)
    with pytest.raises(MlcError, match=path.name):
        FeatureStore(path)
    with pytest.raises(MlcError, match=path.name):
        StoreWriter.create_or_resume(path, content().layout)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_hdf5_file_is_damaged(tmp_path: Path, share: float) -> None:
    path = fill(tmp_path / "a.h5", content())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MlcError, match="damaged"):
        FeatureStore(path)
    with pytest.raises(MlcError, match="damaged"):
        StoreWriter.create_or_resume(path, content().layout)


@pytest.mark.parametrize("name", [schema.STATUS, schema.IMAGE_ID])
def test_a_store_without_one_of_its_arrays_is_damaged(path: Path, name: str) -> None:
    fill(path, content())
    if path.suffix == ".zarr":
        group: Any = zarr.open_group(path, mode="r+")
        del group[name]
    else:
        with h5py.File(path, "r+") as file:
            del file[name]
    with pytest.raises(MlcError, match=path.name):
        FeatureStore(path)


def chunk_of(path: Path, name: str) -> Path:
    return next(chunk for chunk in (path / name / "c").rglob("*") if chunk.is_file())


@pytest.mark.parametrize("name", ["pre_logits/pooled", "status", "image_id", "content_hash"])
def test_a_lost_chunk_is_damage_and_not_zeros(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path / "a.zarr", content())
    chunk_of(path, name).unlink()
    with pytest.raises(MlcError, match=f"damaged, 1 chunks of {name}"):
        FeatureStore(path)


def test_a_truncated_chunk_is_damage(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.zarr", content())
    chunk = chunk_of(path, "pre_logits/pooled")
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with FeatureStore(path) as store, pytest.raises(MlcError, match="damaged, a chunk of"):
        store.pooled()


def test_a_shard_of_bad_images_is_not_taken_for_lost(path: Path) -> None:
    what = content(reasons=dict.fromkeys(range(3, 6), "broken"))
    assert_holds(fill(path, what), what)


def test_a_missing_store_is_said_to_be_missing(path: Path) -> None:
    with pytest.raises(MlcError, match="no such store"):
        FeatureStore(path)


def test_an_unknown_suffix_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / "store.npz"
    expected = r"store\.npz: a store's name ends in \.h5 or \.zarr"
    with pytest.raises(MlcError, match=expected):
        FeatureStore(path)
    with pytest.raises(MlcError, match=expected):
        StoreWriter.create_or_resume(path, content().layout)
    assert list(tmp_path.iterdir()) == []


# --- several processes ---------------------------------------------------------------------------

HOLD_LOCK = """
import sys
from pathlib import Path
from mlc.store.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

HOLD_WRITER = """
import sys
from pathlib import Path
from mlc.store import schema
path = Path(sys.argv[1])
backend = schema.format_of(path).open(path, write=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def child(script: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_a_lock_that_another_process_holds_is_an_error_until_it_dies(path: Path) -> None:
    with child(HOLD_LOCK, path) as process:
        assert said(process) == "held"
        with pytest.raises(MlcError, match=r"another process is writing to it"), writer_lock(path):
            pytest.fail("two writers hold the lock")
        process.kill()
        process.wait()
    with writer_lock(path):
        assert not path.exists()


def test_locks_of_different_stores_do_not_meet(path: Path) -> None:
    other = path.with_name(f"other{path.suffix}")
    with writer_lock(path), writer_lock(other), pytest.raises(MlcError), writer_lock(path):
        pytest.fail("two writers hold the lock")


def test_a_lock_is_free_again_after_an_error(path: Path) -> None:
    with pytest.raises(KeyError), writer_lock(path):
        raise KeyError
    with writer_lock(path):
        pass


def test_an_hdf5_file_that_another_process_writes_is_said_to_be_so(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.h5", content())
    with child(HOLD_WRITER, path) as process:
        assert said(process) == "held"
        with pytest.raises(MlcError, match="another process has it open"):
            FeatureStore(path)
        with pytest.raises(MlcError, match="another process has it open"):
            StoreWriter.create_or_resume(path, content().layout)


# --- killed writers ------------------------------------------------------------------------------

WRITE_UNTIL_KILLED = """
import pickle, sys, time
from pathlib import Path
from mlc.store.writer import StoreWriter
layout, parts = pickle.load(sys.stdin.buffer)
print("ready", flush=True)
sys.stdin.buffer.read(1)
print("creating", flush=True)
writer = StoreWriter.create_or_resume(Path(sys.argv[1]), layout)
for part in parts:
    writer.write_shard(*part)
    print("written", flush=True)
time.sleep(60)
"""
KILLS = 5
SHARDS = 32


def killed(process: subprocess.Popen[bytes], path: Path, after: int, seconds: float) -> int:
    """Kill a writer some time after so many shards, 0 while it lays the store out.

    Returns:
        How many shards it had written by its own account.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"!")
    process.stdin.flush()
    assert said(process) == "creating"
    while not any(path.parent.glob(f"*{path.name}*")):
        time.sleep(0)
    for _ in range(after):
        assert said(process) == "written"
    time.sleep(seconds)
    process.kill()
    return after + process.stdout.read().count(b"written")


@contextmanager
def ready_writers(paths: Sequence[Path], what: Content) -> Iterator[list[subprocess.Popen[bytes]]]:
    starts = range(0, len(what.error), what.layout.shard_rows)
    shards = [range(start, start + what.layout.shard_rows) for start in starts]
    orders = pickle.dumps((what.layout, [what.part(shard) for shard in shards]))
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen([*command, str(path)], **pipes) for path in paths]
    try:
        for writer in writers:
            writer.stdin.write(orders)
            writer.stdin.flush()
        assert [said(writer) for writer in writers] == ["ready"] * len(writers)
        yield writers
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_killed_writer_loses_the_shard_in_flight_at_most(tmp_path: Path, suffix: str) -> None:
    what = content(numbered(3 * SHARDS), reasons=dict.fromkeys(range(0, 3 * SHARDS, 10), "bad"))
    whole = fill(tmp_path / f"whole{suffix}", what)
    generator = np.random.default_rng(20261123)
    afters = [0, 0, *generator.integers(1, 15, KILLS - 2).tolist()]
    paths = [tmp_path / f"killed{index}{suffix}" for index in range(KILLS)]
    with ready_writers(paths, what) as writers:
        for path, process, after in zip(paths, writers, afters, strict=True):
            written = killed(process, path, after, generator.uniform(0, 0.006))
            with writing(path, what.layout) as writer:
                left = pending(writer)
                assert left, "the writer was done before it was killed"
                assert written <= SHARDS - len(left) <= written + 1
                for shard in left:
                    writer.write_shard(*what.part(shard))
                writer.finish()
            assert_same_store(path, whole)


# --- any order of writes -------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@st.composite
def write_sequences(draw: st.DrawFn) -> tuple[Content, list[tuple[int, int]]]:
    """Some images, and (shard, seed of its values) in the order of writing, each once."""
    ids = draw(st.lists(TEXT, min_size=1, max_size=9, unique=True))
    shard_rows = draw(st.integers(1, 5))
    reasons = draw(st.dictionaries(st.integers(0, len(ids) - 1), TEXT, max_size=3))
    dtype = draw(st.sampled_from(["float32", "float16"]))
    shards = -(-len(ids) // shard_rows)
    order = draw(st.permutations(range(shards)))
    what = content(ids, shard_rows, key=replace(KEY, dtype=dtype), reasons=reasons)
    return what, [(shard, seed) for seed, shard in enumerate(order)]


@settings(max_examples=20, deadline=None, database=None)
@pytest.mark.parametrize("suffix", SUFFIXES)
@given(case=write_sequences())
def test_any_order_of_writes_reads_back_as_written(
    suffix: str, case: tuple[Content, list[tuple[int, int]]]
) -> None:
    what, order = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        for shard, seed in order:
            values = np.random.default_rng(seed).normal(size=what.features["layer3"].shape)
            latest = {"layer3": values.astype(what.layout.key.dtype).astype(np.float32)}
            latest["pre_logits"] = np.repeat(latest["layer3"][..., :1], 5, axis=-1)
            with writing(path, what.layout) as writer:
                rows = writer.shards()[shard]
                for layer, stored in what.features.items():
                    stored[rows.start : rows.stop] = latest[layer][rows.start : rows.stop]
                writer.write_shard(*what.part(rows))
        with writing(path, what.layout) as writer:
            writer.finish()
        assert_holds(path, what)


# --- finding one ---------------------------------------------------------------------------------


def test_a_named_store_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_store(Path("elsewhere.h5"), tmp_path) == Path("elsewhere.h5")


def test_the_only_store_of_a_folder_is_found(path: Path) -> None:
    what = content()
    with writer_lock(path):
        fill(path, what)
    labels_path(path).touch()
    assert find_store(None, path.parent) == path


@pytest.mark.parametrize("name", [".", "not-there"])
def test_a_folder_without_a_store_says_how_to_get_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(MlcError, match=r"no feature store there; run mlc extract"):
        find_store(None, tmp_path / name)


def test_several_stores_are_listed_and_none_is_guessed(tmp_path: Path) -> None:
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "c.h5"]
    for path in paths:
        path.mkdir()
    with pytest.raises(MlcError, match="several stores are there") as caught:
        find_store(None, tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


def test_labels_lie_beside_the_store(path: Path) -> None:
    assert labels_path(path) == path.with_name(f"{path.name}.labels.npz")
