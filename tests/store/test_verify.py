"""verify(): whatever is damaged is named, and nothing that is whole."""

import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from random_store import BAD, IMAGES, INT8, SHAPES, contents, copier, random_store
from zarr.codecs import GzipCodec

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.problems import CHANGED, Problem, bad_rows, consecutive
from mlc.store.reader import FeatureStore
from mlc.store.units import crc32c
from mlc.store.verify import Verification, verify

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
Copy = Callable[..., Path]
EVERY_ROW = list(range(IMAGES))
SMALL_ARRAYS = (
    *schema.ROW_ARRAYS,
    *(name(array) for array in SHAPES for name in (schema.crc, schema.clipped)),
)


SCALE_CRC32C = {
    array: int(crc32c(np.full((1, shape[-1]), 0.03, np.float32))[0])
    for array, shape in SHAPES.items()
    if not array.endswith(schema.POOLED)
}


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"store{request.param}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return copier(tmp_path_factory.mktemp("whole"))


def chunks(array: Path) -> list[Path]:
    return sorted(each for each in (array / "c").rglob("*") if each.is_file())


def edit(path: Path, change: Callable[[Backend], object]) -> None:
    """Change a store behind its writer's back."""
    backend = schema.format_of(path).open(path, write=True)
    change(backend)
    backend.close()


def found(path: Path) -> list[tuple[str, list[int], str]]:
    return [(each.array, each.rows.tolist(), each.reason) for each in verify(path).problems]


def flip(path: Path, array: str, unit: int) -> Path:
    """Flip a bit of a unit; return the file that it is in."""
    backend = schema.format_of(path).open(path)
    units = backend.units(array)
    backend.close()
    assert units is not None
    file = units.files[units.file[unit]]
    with file.open("r+b") as opened:
        opened.seek(int(units.offset[unit]) + 3)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 4]))
    return file


@pytest.mark.parametrize("features", [("pooled:float32", "tokens:float16"), INT8])
def test_a_whole_store_has_no_problems(copy: Copy, path: Path, features: tuple[str, ...]) -> None:
    copy(path, features)
    told: list[tuple[int, int]] = []
    result = verify(path, lambda done, total, note="": told.append((done, total)))
    item = {"float32": 4, "float16": 2, "int8": 1}
    size = sum(
        IMAGES * 2 * int(np.prod(shape)) * item[features["pooled" not in array].split(":")[1]]
        for array, shape in SHAPES.items()
    )
    assert result == Verification(IMAGES, 0, size, [])
    assert len(told) == len(SHAPES)


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_rows_that_are_pending_are_left_out_and_counted(path: Path, shards: int) -> None:
    random_store(path, shards=shards)
    result = verify(path)
    assert (result.pending, result.problems) == (IMAGES - 4 * shards, [])
    if shards:
        flip(path, "a/tokens", 0)
        flip(path, "a/tokens", 2 * IMAGES - 1) if path.suffix == ".h5" else None
        assert bad_rows(verify(path).problems).tolist() == [0]


@pytest.mark.parametrize("array", SHAPES)
def test_a_flipped_bit_is_named_with_its_rows_and_view(copy: Copy, path: Path, array: str) -> None:
    copy(path, INT8)
    files = {flip(path, array, unit) for unit in (2, 3, 4, 5, 2 * BAD + 1, 12, 13)}
    flip(path, array, 19)
    problems = verify(path).problems
    assert [(each.rows.tolist(), each.reason) for each in problems] == [
        ([1, 2], CHANGED), ([3], f"{CHANGED} (view flip)"), ([6], CHANGED),
        ([9], f"{CHANGED} (view flip)"),
    ]  # fmt: skip
    assert {each.array for each in problems} == {array}
    assert {each.file for each in problems[:3]} == {str(file) for file in files}
    assert bad_rows(problems).tolist() == [1, 2, 3, 6, 9]


@pytest.mark.parametrize("array", SHAPES)
def test_a_lost_or_truncated_shard_is_named(copy: Copy, tmp_path: Path, array: str) -> None:
    path = copy(tmp_path / "store.zarr")
    first, second, third = sorted(
        each for each in (path / array / "c").rglob("*") if each.is_file()
    )
    first.unlink()
    size = second.stat().st_size
    unit = size // 8 if array.endswith("pooled") else (size - 4 - 8 * 16) // 8
    with second.open("r+b") as file:
        file.truncate(size - 3 * unit + 1)  # the last three units
    with third.open("r+b") as file:
        file.truncate(11)
    short = "truncated" if array.endswith("pooled") else "its index is damaged"
    assert [(each.file, each.rows.tolist(), each.reason) for each in verify(path).problems] == [
        (str(first), [0, 1, 2, 3], "missing"),
        (str(second), [6], "truncated (view flip)"),
        (str(second), [7], "truncated"),
        (str(third), [8, 9], short),
    ]


@pytest.mark.parametrize("name", SMALL_ARRAYS)
def test_a_changed_value_is_named(copy: Copy, path: Path, name: str) -> None:
    copy(path)

    def change(backend: Backend) -> None:
        row = backend.read(name, 6, 7)
        backend.write(name, 6, np.array(["x"]) if row.dtype.kind == "U" else row ^ 1)

    edit(path, change)
    named = {(array, tuple(rows)) for array, rows, _ in found(path)}
    assert (schema.ROW_CRC32C, (6,)) in named
    assert named <= {(schema.ROW_CRC32C, (6,)), (name.removesuffix("_crc32c"), (6,))}


@pytest.mark.parametrize("name", [*SMALL_ARRAYS, *SHAPES, "a/tokens_scale"])
def test_an_array_that_is_gone_is_named_beside_the_others(
    copy: Copy, path: Path, name: str
) -> None:
    copy(path, INT8)
    with_flip = "b.c/pooled" if name.startswith("a") else "a/pooled"
    flip(path, with_flip, 4)
    if path.is_dir():
        shutil.rmtree(path / name)
    else:
        with h5py.File(path, "r+") as file:
            del file[name]
    assert (name, EVERY_ROW, "missing") in found(path)
    assert (with_flip, [2], f"{CHANGED} (view orig)") in found(path)


@pytest.mark.parametrize("name", [*SMALL_ARRAYS, "a/tokens_scale"])
def test_a_lost_chunk_is_named(copy: Copy, tmp_path: Path, name: str) -> None:
    path = copy(tmp_path / "store.zarr", INT8)
    files = chunks(path / name)
    files[-1].unlink()
    whole = name in (schema.IMAGE_ID, schema.FILE, "a/tokens_scale")
    problem = verify(path).problems[0]
    assert (problem.array, problem.reason) == (name, "missing")
    assert problem.rows.tolist() == (EVERY_ROW if whole else [8, 9])
    assert problem.file in (str(files[-1]), str(path / name))


def test_a_lost_chunk_of_images_that_were_added_is_theirs(copy: Copy, tmp_path: Path) -> None:
    path = copy(tmp_path / "store.zarr")
    random_store(path, images=13)
    (path / schema.FILE / "c/1").unlink()
    assert found(path) == [(schema.FILE, [10, 11, 12], "missing")]


@pytest.mark.parametrize("name", [schema.IMAGE_ID, schema.STATUS, "b.c/tokens_crc32c"])
def test_a_truncated_chunk_of_something_small_is_named(
    copy: Copy, tmp_path: Path, name: str
) -> None:
    path = copy(tmp_path / "store.zarr")
    last = chunks(path / name)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    ((array, rows, reason),) = found(path)
    assert (array, rows) == (name, EVERY_ROW if name == schema.IMAGE_ID else [8, 9])
    assert reason.startswith("cannot be read (")


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")  # of the library
@pytest.mark.parametrize("rubbish", [b"", b"{}", b"\xff\xfe", b"[1]", b'{"node_type": "group"}'])
@pytest.mark.parametrize("name", ["a", "a/tokens", "status", "a/prefix_crc32c"])
def test_damaged_metadata_is_named(copy: Copy, tmp_path: Path, name: str, rubbish: bytes) -> None:
    path = copy(tmp_path / "store.zarr")
    (path / name / "zarr.json").write_bytes(rubbish)
    named = [array for array, _, _ in found(path)]
    if name != "a":
        assert name in named
    else:
        assert named == (["all arrays"] if b"group" not in rubbish else [])


def test_scales_are_looked_at(copy: Copy, path: Path) -> None:
    copy(path, INT8)
    name = "b.c/tokens_scale"
    scale = np.full(3, 0.03, np.float32)
    for bad in (0.0, -1.0, np.nan, np.inf):
        edit(path, lambda backend, bad=bad: backend.write(name, 1, np.array([bad], np.float32)))
        assert found(path) == [(name, EVERY_ROW, "has numbers that are not positive")]
    edit(path, lambda backend: backend.write(name, 0, scale))
    edit(path, lambda backend: backend.set_attribute("scale_crc32c", SCALE_CRC32C))
    assert found(path) == []
    edit(path, lambda backend: backend.write(name, 0, scale * np.float32([1, 1, 1.0001])))
    assert found(path) == [(name, EVERY_ROW, CHANGED)]


def test_an_array_that_another_tool_compressed_is_read(copy: Copy, path: Path) -> None:
    copy(path)
    values = contents(path)["a/tokens"]

    def compress(values: Any) -> None:
        if path.is_dir():
            group = zarr.open_group(path)
            del group["a/tokens"]
            new = group.create_array(
                "a/tokens", shape=values.shape, dtype=values.dtype, compressors=GzipCodec()
            )
            new[:] = values
        else:
            with h5py.File(path, "r+") as file:
                del file["a/tokens"]
                file.create_dataset("a/tokens", data=values, compression="gzip")

    compress(values)
    assert found(path) == []
    values[2, 1, 0, 0] += 1
    compress(values)
    assert found(path) == [("a/tokens", [2], f"{CHANGED} (view flip)")]


def cut_rows(values: Any) -> Any:
    return values[:-1]


def cut_views(values: Any) -> Any:
    return values[:, :1]


@pytest.mark.parametrize("name", ["a/tokens", "a/tokens_crc32c", "b.c/pooled"])
@pytest.mark.parametrize("change", [cut_rows, cut_views, np.float64])
def test_an_array_of_another_shape_or_dtype_is_named(
    copy: Copy, tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    path = copy(tmp_path / "store.h5")
    values = change(contents(path)[name])
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, data=values, chunks=values.shape)
    problems = [each for each in verify(path).problems if each.array == name]
    assert bad_rows(problems).tolist() in (EVERY_ROW, [8, 9])
    assert all(
        "as it was laid out" in each.reason or "key says" in each.reason for each in problems
    )


@pytest.mark.parametrize("name", ["key", "rows", "shard_rows", "complete"])
def test_attributes_that_are_gone_are_an_error(copy: Copy, path: Path, name: str) -> None:
    copy(path)
    if path.is_dir():
        del zarr.open_group(path).attrs[name]
    else:
        with h5py.File(path, "r+") as file:
            del file.attrs[name]
    with pytest.raises(MlcError, match="damaged, its attributes"):
        verify(path)


def test_other_versions_and_no_store_are_errors(copy: Copy, path: Path) -> None:
    with pytest.raises(MlcError, match="no such store"):
        verify(path)
    copy(path)
    edit(path, lambda backend: backend.set_attribute("schema_version", 9))
    with pytest.raises(MlcError, match="update mlc"):
        verify(path)


def test_a_store_without_images_is_whole(path: Path) -> None:
    random_store(path, images=4)
    edit(path, lambda backend: backend.set_attribute("rows", 0))
    assert verify(path) == Verification(0, 0, 0, [])


def damage(path: Path, rng: random.Random) -> None:
    file = path
    if path.is_dir():
        file = rng.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    match rng.choice(["flip", "burst", "truncate", "delete"]):
        case "flip":
            data[place] ^= 1 << rng.randrange(8)
        case "burst":
            data[place : place + 64] = rng.randbytes(len(data[place : place + 64]))
        case "truncate":
            data = data[:place]
        case "delete":
            file.unlink()
            return
    file.write_bytes(data)


def readable(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return all that a reader sees of a store, its attributes aside.

    A reader asks for arrays by name: one that a damaged group does not list is there for it.
    """
    backend = schema.format_of(path).open(path)
    asked = backend.names() if names is None else set(names)
    values: dict[str, Any] = {name: backend.read(name) for name in asked - {*SHAPES}}
    backend.close()
    with FeatureStore(path) as store:
        for array in store.arrays:
            features = store.features(*array.rsplit("/", 1))
            values[array] = features.read(np.arange(2 * IMAGES))
    return values


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("rounds", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_no_damage_is_silent_and_none_is_a_crash(copy: Copy, path: Path, rounds: int) -> None:
    """What is not named is harmless: attributes aside, every number and text is as it was."""
    whole = copy(path.with_stem("whole"), INT8)
    edit(whole, lambda backend: backend.set_attribute("scale_crc32c", SCALE_CRC32C))
    before, rng = readable(whole), random.Random(rounds)
    named = 0
    for _ in range(rounds):
        shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
        damage(path, rng)
        try:
            is_named = bool(verify(path).problems)
        except MlcError:
            is_named = True
        if not is_named:
            after = readable(path, before)
            for name, values in before.items():
                np.testing.assert_array_equal(after[name], values, err_msg=name)
        named += is_named
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert named >= rounds // 8


def test_a_problem_says_where_and_what() -> None:
    rows = np.arange(4, 7)
    assert Problem("x/tokens", "a.h5", rows, "truncated").describe() == (
        "a.h5: truncated, x/tokens of rows 4 to 6"
    )
    assert Problem("x", "y", rows[:1], "missing").describe() == "y: missing, x of row 4"
    assert Problem("x", "y", rows[:0], "missing").describe() == "y: missing, x of no row"


def test_rows_of_one_fault_that_follow_each_other_go_together() -> None:
    runs = consecutive([(7, "b"), (2, "a"), (1, "a"), (4, "a"), (3, "b"), (2, "a")])
    assert [(rows.tolist(), fault) for rows, fault in runs] == [
        ([1, 2], "a"), ([3], "b"), ([4], "a"), ([7], "b")
    ]  # fmt: skip
    assert bad_rows([]).tolist() == []


def test_what_verify_calls_whole_can_be_read(copy: Copy, path: Path) -> None:
    copy(path)
    assert not verify(path).problems
    with FeatureStore(path) as store:
        for array in store.arrays:
            store.features(*array.rsplit("/", 1)).read_all()
