"""convert(): the same numbers in another format, or narrower ones, and never half a store."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_store import (
    BAD,
    FLOATS,
    IMAGES,
    INT8,
    KEY,
    SHAPES,
    contents,
    copier,
    features_of,
    random_store,
)

from mlc.configs.errors import MlcError
from mlc.store import convert as module
from mlc.store import quantize, schema
from mlc.store.checked_source import SourceDamaged
from mlc.store.convert import Conversion, convert
from mlc.store.layout import Layout
from mlc.store.quantize import calibrate, decode, encode
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.shard import ShardWriter
from mlc.store.verify import verify
from mlc.store.writer import StoreWriter

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
Copy = Callable[..., Path]
WIDE = ("pooled:float32", "tokens:float32")


@pytest.fixture(params=SUFFIXES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"source{request.param}"


@pytest.fixture
def target(source: Path) -> Path:
    """Return a path of the other format."""
    return source.with_name(f"target{SUFFIXES[1 - SUFFIXES.index(source.suffix)]}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return copier(tmp_path_factory.mktemp("whole"))


def record(path: Path, summary: dict[str, Any]) -> None:
    writer = StoreWriter.open(path)
    writer.record(summary)
    writer.close()


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir() if not each.name.endswith(".lock")}


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.parametrize("features", [FLOATS, INT8])
def test_another_format_has_the_same_bytes(
    copy: Copy, source: Path, target: Path, features: tuple[str, ...]
) -> None:
    copy(source, features)
    labels_path(source).write_bytes(b"labels")
    told: list[int] = []
    result = convert(source, target, progress=lambda done, total, note="": told.append(done))
    require_same(contents(source), contents(target))
    assert labels_path(target).read_bytes() == b"labels"
    assert (result.path, result.images, result.converted) == (target, IMAGES, IMAGES)
    assert result.clipped["a/tokens"] == contents(source)["a/tokens_clipped"].sum() > 0
    assert result.clipped["a/pooled"] == 0
    assert told == [4, 8, 10]
    with FeatureStore(target) as store:
        assert store.errors() == {f"photos/{BAD:02d}.jpg": "broken image"}
        assert store.grids == {"a": [2, 2], "b.c": [1, 2]}
        assert store.made_by["backbone"] == "stub"
        assert store.made_by["created"] == 1.5
        origin = store.made_by["converted_from"]
    assert origin["path"] == str(source.resolve())
    assert origin["features"] == list(features)
    assert origin["digest"] == replace(KEY, features=features).digest()
    assert "command" in origin["made_by"]
    assert not verify(target).problems


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (WIDE, ["pooled:float16", "tokens"], ("pooled:float16", "tokens:float32")),
        (WIDE, ["tokens:float16"], ("tokens:float16",)),
        (FLOATS, ["pooled"], ("pooled:float32",)),
        (FLOATS, ["tokens:int8", "pooled:int8"], ("pooled:int8", "tokens:int8")),
        (INT8, ["tokens", "pooled"], INT8),
        (INT8, ["tokens"], ("tokens:int8",)),
    ],
)
def test_narrower_numbers_are_those_that_would_have_been_stored(
    copy: Copy, source: Path, stored: tuple[str, ...], asked: list[str], got: tuple[str, ...]
) -> None:
    copy(source, stored)
    target = source.with_stem("target")
    convert(source, target, asked)
    before, after = contents(source), contents(target)
    assert tuple(after["attributes"]["key"]["features"]) == got
    assert not verify(target).problems
    dtypes = schema.array_dtypes({"features": got})
    arrays = [array for array in SHAPES if array.rsplit("/", 1)[1] in dtypes]
    assert {name for name in after if name in SHAPES} == set(arrays)
    good = np.arange(IMAGES) != BAD
    for array in arrays:
        dtype = dtypes[array.rsplit("/", 1)[1]]
        if before[array].dtype == dtype:
            np.testing.assert_array_equal(after[array], before[array])
            continue
        values = torch.from_numpy(before[array].astype(np.float32))
        scale = calibrate(values[good]) if dtype == "int8" else None
        expected, _ = encode(values, dtype, scale)
        np.testing.assert_array_equal(after[array], expected.numpy())
        if scale is not None:
            np.testing.assert_array_equal(after[f"{array}_scale"], scale.numpy())


def one_image(path: Path, values: dict[str, Any], error: str = "") -> Path:
    layout = Layout(KEY, np.array(["1"]), np.array(["1"]), SHAPES, 8, 4, {})
    writer = StoreWriter.create_or_resume(path, layout)
    writer.write_shard(range(1), values, np.array(["0" * 32]), np.array([error]))
    writer.finish()
    writer.close()
    return path


def test_what_was_clipped_stays_counted(tmp_path: Path) -> None:
    """Where float16 clipped everything, int8 has nothing to clip: that it was is told."""
    values = {array: np.full((1, 2, *shape), 7e4, np.float32) for array, shape in SHAPES.items()}
    source = one_image(tmp_path / "a.zarr", values)
    result = convert(source, tmp_path / "b.zarr", ["tokens:int8"])
    assert result.clipped == {"a/tokens": 40, "a/prefix": 10, "b.c/tokens": 12}


def test_an_earlier_conversion_is_remembered(copy: Copy, source: Path, target: Path) -> None:
    copy(source, WIDE)
    result = convert(source, target, ["tokens:float16"])
    assert result.clipped == {"a/tokens": 1, "a/prefix": 0, "b.c/tokens": 1}
    convert(target, source.with_stem("last"), ["tokens:int8"])
    with FeatureStore(source.with_stem("last")) as store:
        origin = store.made_by["converted_from"]
    assert origin["path"] == str(target.resolve())
    assert origin["converted_from"]["path"] == str(source.resolve())


def test_stored_numbers_survive_being_decoded_and_stored_again() -> None:
    """Of all float16 numbers and all int8 steps, whatever the scale."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][None, None]
    again, clipped = encode(decode(halves), "float16")
    assert torch.equal(again.view(torch.int16), halves.view(torch.int16))
    assert not clipped.any()
    scale = torch.exp(torch.empty(4000).uniform_(-60, 60, generator=torch.manual_seed(0)))
    steps = torch.arange(-127, 128, dtype=torch.int8)[:, None, None].expand(255, 1, 4000)
    again, clipped = encode(decode(steps, scale), "int8", scale)
    assert torch.equal(again, steps)
    assert not clipped.any()


def test_calibration_sees_good_images_that_are_evenly_spread(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy(tmp_path / "a.zarr", WIDE)
    monkeypatch.setattr(quantize, "SAMPLE_IMAGES", 4)
    convert(source, tmp_path / "b.zarr", ["pooled:int8"])
    values = torch.from_numpy(features_of()["b.c/pooled"])
    scale = contents(tmp_path / "b.zarr")["b.c/pooled_scale"]
    np.testing.assert_array_equal(scale, calibrate(values[[0, 4, 6, 9]]).numpy())
    monkeypatch.setattr(quantize, "SAMPLE_BYTES", 2 * 3 * 4 * 2)  # of two images
    convert(source, tmp_path / "c.zarr", ["pooled:int8"])
    scale = contents(tmp_path / "c.zarr")["b.c/pooled_scale"]
    np.testing.assert_array_equal(scale, calibrate(values[[0, 9]]).numpy())


def test_memory_is_bounded_by_batches(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy(tmp_path / "a.zarr")
    written: list[int] = []
    write = ShardWriter.write

    def count(writer: ShardWriter, rows: Any, encoded: Any) -> None:
        written.append(len(rows))
        write(writer, rows, encoded)

    monkeypatch.setattr(ShardWriter, "write", count)
    monkeypatch.setattr(module, "BATCH_BYTES", 3 * 2 * 4 * 5 * 4)  # three images of a/tokens
    convert(source, tmp_path / "b.h5", ["tokens:int8"])
    assert written[:2] == [3, 1]
    monkeypatch.undo()
    convert(source, tmp_path / "c.h5", ["tokens:int8"])
    require_same(contents(tmp_path / "b.h5"), contents(tmp_path / "c.h5"))


# Names and requests


def test_the_default_target_has_the_digest_of_its_own_key(copy: Copy, tmp_path: Path) -> None:
    name = f"coco-test_resnet-64-{replace(KEY, features=FLOATS).digest()}.zarr"
    copy(tmp_path / name)
    result = convert(tmp_path / name, features=["tokens:int8"])
    key = replace(KEY, features=("tokens:int8",))
    assert result.path == tmp_path / f"coco-test_resnet-64-{key.digest()}.zarr"
    with FeatureStore(result.path) as store:
        assert store.key == key.to_json()
    with pytest.raises(MlcError, match="has these features already"):
        convert(tmp_path / name)


@pytest.mark.parametrize("name", ["mine.zarr", "coco-0123456789.zarr"])
def test_another_name_needs_a_target(copy: Copy, tmp_path: Path, name: str) -> None:
    copy(tmp_path / name)
    with pytest.raises(MlcError, match="name a target"):
        convert(tmp_path / name, features=["tokens:int8"])
    assert names(tmp_path) == {name}


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        (INT8, ["tokens:float16"], r"has tokens as int8, got float16.*mlc extract with --features"),
        (FLOATS, ["tokens:float32"], "has tokens as float16, got float32"),
        (("pooled:int8",), ["pooled:float32"], "the precision that is gone does not come back"),
        (FLOATS, ["pooled", "pooled"], "more than once"),
        (FLOATS, ["pixels"], "unknown kind of features"),
        (FLOATS, ["tokens:int4"], "unknown dtype of tokens"),
        (FLOATS, [], "got none"),
    ],
)
def test_what_cannot_be_is_refused(
    copy: Copy, tmp_path: Path, stored: tuple[str, ...], asked: list[str], message: str
) -> None:
    if "tokens" not in stored[-1]:
        copy(tmp_path / "b.zarr", FLOATS)
        convert(tmp_path / "b.zarr", tmp_path / "a.zarr", ["pooled:int8"])
        shutil.rmtree(tmp_path / "b.zarr")
    else:
        copy(tmp_path / "a.zarr", stored)
    with pytest.raises(MlcError, match=message):
        convert(tmp_path / "a.zarr", tmp_path / "c.zarr", asked)
    assert names(tmp_path) == {"a.zarr"}


def test_a_kind_that_is_not_there_is_refused(copy: Copy, tmp_path: Path) -> None:
    copy(tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b.zarr", ["pooled"])
    with pytest.raises(MlcError, match=r"has no tokens, it has pooled; run mlc extract"):
        convert(tmp_path / "b.zarr", tmp_path / "c.zarr", ["tokens"])


def test_targets_that_cannot_be_are_refused(copy: Copy, tmp_path: Path) -> None:
    source = copy(tmp_path / "a.zarr")
    other = copy(tmp_path / "b.h5")
    before = contents(other)
    with pytest.raises(MlcError, match="is the store that is to be converted"):
        convert(source, tmp_path / "x" / ".." / "a.zarr")
    with pytest.raises(MlcError, match="was not converted from"):
        convert(source, other)
    with pytest.raises(MlcError, match="made with other settings: features"):
        convert(source, other, ["tokens:int8"])
    with pytest.raises(MlcError, match=r"ends in \.h5 or \.zarr"):
        convert(source, tmp_path / "c.npz")
    require_same(contents(other), before)
    assert names(tmp_path) == {"a.zarr", "b.h5"}


def test_an_unfinished_source_is_refused(tmp_path: Path) -> None:
    source = random_store(tmp_path / "a.zarr", shards=1)
    with pytest.raises(MlcError, match="unfinished"):
        convert(source, tmp_path / "b.zarr")
    assert names(tmp_path) == {"a.zarr"}


# Damage


@pytest.mark.parametrize("array", ["b.c/pooled", "a/prefix", "error", "a/tokens_crc32c"])
def test_a_damaged_source_is_named_and_nothing_is_made(
    copy: Copy, source: Path, target: Path, array: str
) -> None:
    copy(source)
    labels_path(source).write_bytes(b"labels")
    backend = schema.format_of(source).open(source, write=True)
    row = backend.read(array, 9, 10)
    backend.write(array, 9, np.array(["x"]) if row.dtype.kind == "U" else row + 1)
    backend.close()
    with pytest.raises(SourceDamaged, match=r"damaged.*mlc store repair"):
        convert(source, target)
    assert names(source.parent) == {source.name, labels_path(source).name}


def test_damage_removes_no_store_that_was_there(copy: Copy, tmp_path: Path) -> None:
    source = copy(tmp_path / "a.zarr")
    convert(source, tmp_path / "b.zarr")
    random_store(source, images=13)
    backend = schema.format_of(source).open(source, write=True)
    backend.write("a/pooled", 12, backend.read("a/pooled", 12, 13) + 1)
    backend.close()
    with pytest.raises(SourceDamaged):
        convert(source, tmp_path / "b.zarr")
    other = copy(tmp_path / "other.zarr", WIDE)
    with pytest.raises(MlcError, match="made with other settings"):
        convert(source, other)
    assert len(contents(tmp_path / "b.zarr")["status"]) == 13
    assert len(contents(other)["status"]) == IMAGES


# Resuming


class Stopped(Exception):
    """What ends a conversion in these tests, as a kill does."""


@pytest.mark.parametrize("after", [0, 2])
def test_what_was_killed_goes_on(copy: Copy, source: Path, target: Path, after: int) -> None:
    copy(source)
    labels_path(source).write_bytes(b"labels")
    convert(source, target.with_stem("whole"), ["tokens:int8", "pooled"])

    def stop(done: int, total: int, note: str = "") -> None:
        if done > 4 * after:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, target, ["tokens:int8", "pooled"], stop)
    with pytest.raises(MlcError, match="unfinished"):
        FeatureStore(target)
    result = convert(source, target, ["tokens:int8", "pooled"])
    assert result.converted == max(0, IMAGES - 4 * (after + 1))
    require_same(contents(target), contents(target.with_stem("whole")))
    assert convert(source, target, ["tokens:int8", "pooled"]).converted == 0


@pytest.mark.parametrize(
    "delay", [0.03, *(pytest.param(each / 100, marks=pytest.mark.slow) for each in range(0, 50, 5))]
)
def test_a_process_that_is_killed_leaves_what_goes_on(tmp_path: Path, delay: float) -> None:
    source, target = random_store(tmp_path / "a.zarr", images=60), tmp_path / "b.h5"
    convert(source, tmp_path / "whole.h5")
    code = (
        "import sys; from pathlib import Path; from mlc.store.convert import convert;"
        "print(flush=True); sys.stdin.readline(); convert(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        threading.Timer(delay, process.kill).start()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.wait()
    convert(source, target)
    require_same(contents(target), contents(tmp_path / "whole.h5"))
    assert names(tmp_path) == {"a.zarr", "b.h5", "whole.h5"}


def test_images_that_were_added_are_converted(copy: Copy, source: Path, target: Path) -> None:
    copy(source)
    convert(source, target, ["tokens:int8"])
    scale = contents(target)["a/tokens_scale"]
    random_store(source, images=13)
    result = convert(source, target, ["tokens:int8"])
    assert (result.images, result.converted) == (13, 3)
    after = contents(target)
    np.testing.assert_array_equal(after["a/tokens_scale"], scale)
    assert after["attributes"]["complete"] is True
    assert after["image_id"].tolist() == contents(source)["image_id"].tolist()
    assert not verify(target).problems


def test_other_photos_or_images_are_noticed(copy: Copy, tmp_path: Path) -> None:
    source = copy(tmp_path / "a.zarr")
    target = tmp_path / "b.zarr"
    convert(source, target)
    shutil.rmtree(source)
    random_store(source, images=8)
    with pytest.raises(MlcError, match="was not converted from"):
        convert(source, target)
    backend = schema.format_of(target).open(target, write=True)
    backend.write("content_hash", 2, np.array(["f" * 32]))
    backend.close()
    shutil.rmtree(source)
    copy(source)
    with pytest.raises(MlcError, match=r"from other photos than .* \(1, the first is 02\.jpg\)"):
        convert(source, target)


def test_other_scales_are_noticed(copy: Copy, tmp_path: Path) -> None:
    source = copy(tmp_path / "a.zarr", INT8)
    target = tmp_path / "b.zarr"
    with pytest.raises(Stopped):
        convert(source, target, progress=stopping)
    backend = schema.format_of(target).open(target, write=True)
    backend.write("a/prefix_scale", 0, np.ones(5, np.float32))
    backend.close()
    with pytest.raises(MlcError, match=r"a/prefix has other scales than"):
        convert(source, target)


def stopping(done: int, total: int, note: str = "") -> None:
    raise Stopped


def test_a_full_disk_keeps_what_there_is(
    copy: Copy, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(source)
    written = 0
    pwritev = os.pwritev

    def write(*arguments: Any) -> int:
        nonlocal written
        written += 1
        if written > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", write)
        with pytest.raises(MlcError, match=r"the disk is full, what was converted is kept"):
            convert(source, target)
    assert convert(source, target).converted in range(1, IMAGES)
    require_same(contents(source), contents(target))


def test_ctrl_c_says_what_is_kept(copy: Copy, tmp_path: Path) -> None:
    source = copy(tmp_path / "a.zarr")

    def interrupt(done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="what was converted is kept"):
        convert(source, tmp_path / "b.zarr", progress=interrupt)
    assert convert(source, tmp_path / "b.zarr") == Conversion(
        tmp_path / "b.zarr",
        IMAGES,
        IMAGES - 4,
        {"a/pooled": 0, "a/tokens": 1, "a/prefix": 0, "b.c/pooled": 0, "b.c/tokens": 1},
    )


def test_the_same_format_will_do(copy: Copy, source: Path) -> None:
    copy(source)
    convert(source, source.with_stem("target"))
    require_same(contents(source), contents(source.with_stem("target")))


def test_without_a_good_image_there_is_no_int8(tmp_path: Path) -> None:
    source = one_image(tmp_path / "a.zarr", features_of(1), "broken image")
    with pytest.raises(MlcError, match="has no good image to calibrate int8 with"):
        convert(source, tmp_path / "b.zarr", ["tokens:int8"])
    assert names(tmp_path) == {"a.zarr"}


@pytest.mark.parametrize("features", [None, INT8])
def test_a_converted_store_says_how_its_source_was_extracted(
    copy: Copy, source: Path, target: Path, features: tuple[str, ...] | None
) -> None:
    copy(source)
    for summary in ({}, {"images": IMAGES, "note": "x" * 900}, {"images": 2}):
        record(source, summary)
        convert(source, target, features)
        with FeatureStore(target) as store:
            assert store.extraction == summary
    assert verify(target).problems == []
