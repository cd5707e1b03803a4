"""Damage of every kind is mended: the same bytes again, and only what is bad is extracted."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from store_content import arrays

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.imported import ImportConfig, import_features
from mlc.extract.origin import Where
from mlc.extract.repair import Repair, repair
from mlc.extract.run import extract
from mlc.store import schema
from mlc.store.problems import bad_rows
from mlc.store.reader import FeatureStore
from mlc.store.verify import verify

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
POOLED, TOKENS = "pre_logits/pooled", "pre_logits/tokens"
BAD = {4, 9}  # rows of photos that are broken
CPU = Where(device="cpu")
COUNTS = [name(array) for array in (POOLED, TOKENS) for name in (schema.crc, schema.clipped)]
SMALL = (schema.CONTENT_HASH, schema.STATUS, schema.ERROR, schema.ROW_CRC32C, *COUNTS)

Stored = dict[str, NDArray[Any]]


def run(csv: Path, out: Path, **settings: Any) -> Path:
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "random_weights": True,
        "size_px": 64,
        "device": "cpu",
        "batch_size": 2,
        "shard_rows": 5,
        "workers": 1,
        "features": ("pooled", "tokens"),
    }
    extract(ExtractConfig(data=str(csv), out=out, **(values | settings)))
    return out


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound stores, one of each format."""
    folder = tmp_path_factory.mktemp("whole")
    for suffix in SUFFIXES:
        run(csv, folder / f"photos{suffix}")
    return folder


@pytest.fixture
def path(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a sound store: of the format that is asked for, else of each."""
    shutil.copytree(whole, tmp_path / "stores")
    return tmp_path / "stores" / f"photos{request.param}"


every_format = pytest.mark.parametrize("path", SUFFIXES, indirect=True)
zarr_only = pytest.mark.parametrize("path", [".zarr"], indirect=True)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[int]:
    """The number of images of each forward pass from now on that are not black."""
    return pictures.count_decoded(monkeypatch)


def flip(path: Path, array: str, row: int) -> None:
    """Flip a bit of an image's features."""
    backend = schema.format_of(path).open(path)
    units = backend.units(array)
    backend.close()
    assert units is not None
    with units.files[units.file[row]].open("r+b") as file:
        file.seek(int(units.offset[row]) + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def change(path: Path, array: str, row: int) -> None:
    """Change what is stored of an image in one of the small arrays."""
    backend = schema.format_of(path).open(path, write=True)
    stored = backend.read(array, row, row + 1)
    if stored.dtype.kind == "U":
        other = np.array(["0" * 32 if array == schema.CONTENT_HASH else "other"])
    else:
        other = stored ^ stored.dtype.type(2)
    assert (other != stored).all()
    backend.write(array, row, other)
    backend.close()


def chunk(path: Path, array: str, shard: int) -> Path:
    return sorted(each for each in (path / array / "c").rglob("*") if each.is_file())[shard]


def content(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(each): each.read_bytes() for each in files if each.is_file()}


def assert_mended(path: Path, want: Stored) -> None:
    """A store is sound, finished, and the same to the last bit as it was."""
    assert verify(path).problems == []
    FeatureStore(path).close()  # it is finished
    got = arrays(path)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].dtype.kind == values.dtype.kind, name
        np.testing.assert_array_equal(got[name], values, err_msg=name)
        if values.dtype.kind != "U":
            assert got[name].tobytes() == values.tobytes(), name


def mended(path: Path, want: Stored, decoded: list[int], rows: set[int]) -> None:
    """Repair: just these rows were bad and were extracted, broken photos without the backbone."""
    done = repair(path, CPU)
    assert set(bad_rows(done.problems).tolist()) == rows
    assert (done.rows, done.left) == (len(rows), 0)
    assert sum(decoded) == len(rows - BAD)
    assert_mended(path, want)


# --- features and what is small of an image ------------------------------------------------------


@every_format
def test_a_sound_store_is_left_as_it_is(path: Path, decoded: list[int]) -> None:
    before = content(path)
    assert repair(path, CPU) == Repair([], 0, 0)
    assert (content(path), decoded) == (before, [])


@every_format
@pytest.mark.parametrize("array", [POOLED, TOKENS])
@pytest.mark.parametrize("rows", [{0}, {3}, {4}, {11}, {1, 2, 6, 9}], ids=str)
def test_flipped_bits_of_features(
    path: Path, decoded: list[int], array: str, rows: set[int]
) -> None:
    want = arrays(path)
    for row in rows:
        flip(path, array, row)
    mended(path, want, decoded, rows)


@every_format
@pytest.mark.parametrize("array", SMALL)
@pytest.mark.parametrize("row", [3, 4])
def test_a_changed_value_of_what_is_small(
    path: Path, decoded: list[int], array: str, row: int
) -> None:
    want = arrays(path)
    change(path, array, row)
    mended(path, want, decoded, {row})


@zarr_only
@pytest.mark.parametrize("array", [POOLED, TOKENS, *SMALL])
def test_a_lost_chunk(path: Path, decoded: list[int], array: str) -> None:
    want = arrays(path)
    chunk(path, array, 1).unlink()
    mended(path, want, decoded, {5, 6, 7, 8, 9})


@zarr_only
@pytest.mark.parametrize("array", [schema.CONTENT_HASH, schema.ERROR, schema.STATUS, *COUNTS])
def test_a_chunk_that_cannot_be_read(path: Path, decoded: list[int], array: str) -> None:
    want = arrays(path)
    chunk(path, array, 2).write_bytes(b"?")
    mended(path, want, decoded, {10, 11})


@zarr_only
def test_the_damaged_index_of_a_shard(path: Path, decoded: list[int]) -> None:
    want = arrays(path)
    with chunk(path, TOKENS, 1).open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\x00\xff")
    mended(path, want, decoded, {5, 6, 7, 8, 9})


@zarr_only
@pytest.mark.parametrize(("array", "rows"), [(POOLED, {2, 3}), (TOKENS, {2, 3, 4})])
def test_a_shard_that_was_cut_off(
    path: Path, decoded: list[int], array: str, rows: set[int]
) -> None:
    # Pooled features get their length again, and the zeros of the broken photo 4 with it.
    want = arrays(path)
    file = chunk(path, array, 0)
    unit_bytes = want[array][0].nbytes
    os.truncate(file, file.stat().st_size - 2 * unit_bytes - 1)
    mended(path, want, decoded, rows)


@pytest.mark.parametrize("path", [".h5"], indirect=True)
@pytest.mark.parametrize("part", [0.6, 0.9])
def test_an_hdf5_file_that_was_cut_off(path: Path, decoded: list[int], part: float) -> None:
    want = arrays(path)
    os.truncate(path, int(part * path.stat().st_size))
    with pytest.raises(MlcError, match="mlc store repair"):
        FeatureStore(path)
    done = repair(path, CPU)
    rows = set(bad_rows(done.problems).tolist())
    assert 0 < len(rows) == done.rows
    assert sum(decoded) == len(rows - BAD)
    assert_mended(path, want)


# --- names ---------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("array", [schema.IMAGE_ID, schema.FILE])
def test_a_changed_name_is_taken_from_the_data_set(
    path: Path, decoded: list[int], array: str
) -> None:
    want = arrays(path)
    change(path, array, 3)
    assert repair(path, CPU).rows == 0
    assert decoded == []
    assert_mended(path, want)


@zarr_only
@pytest.mark.parametrize("array", [schema.IMAGE_ID, schema.FILE])
@pytest.mark.parametrize("lost", [True, False])
def test_names_that_are_gone_are_taken_from_the_data_set(
    path: Path, decoded: list[int], array: str, lost: bool
) -> None:
    want = arrays(path)
    file = chunk(path, array, 0)
    file.unlink() if lost else file.write_bytes(b"\xff\xff")
    assert repair(path, CPU).rows == 0
    assert decoded == []
    assert_mended(path, want)


@every_format
def test_a_data_set_of_other_images_does_not_tell_names(path: Path, tmp_path: Path) -> None:
    csv = pictures.write_data(tmp_path / "data")
    out = run(csv, tmp_path / f"own{path.suffix}")
    change(out, schema.IMAGE_ID, 3)
    csv.write_text("".join(csv.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(MlcError, match=r"12 images are damaged.* has 11 now"):
        repair(out, CPU)


# --- what cannot be mended, and what can with some help ------------------------------------------


@every_format
def test_photos_that_are_elsewhere_now(path: Path, tmp_path: Path) -> None:
    csv = pictures.write_data(tmp_path / "data")
    out = run(csv, tmp_path / f"own{path.suffix}")
    want = arrays(out)
    flip(out, TOKENS, 1)
    moved = csv.parent.rename(tmp_path / "moved")
    with pytest.raises(MlcError, match=r"01\.jpg: No such file or directory; pass .* --root"):
        repair(out, CPU)
    assert bad_rows(verify(out).problems).tolist() == [1]
    assert repair(out, Where(root=moved, device="cpu")).rows == 1
    assert_mended(out, want)


@every_format
def test_a_photo_that_has_changed(path: Path, tmp_path: Path) -> None:
    csv = pictures.write_data(tmp_path / "data")
    out = run(csv, tmp_path / f"own{path.suffix}")
    want = arrays(out)
    flip(out, POOLED, 1)
    originals = shutil.copytree(csv.parent, tmp_path / "originals")
    (csv.parent / "01.jpg").write_bytes(pictures.good_file("05.jpg"))
    with pytest.raises(MlcError, match=r"01\.jpg: is another photo now, by its content"):
        repair(out, CPU)
    assert bad_rows(verify(out).problems).tolist() == [1]
    assert repair(out, Where(root=originals, device="cpu")).rows == 1
    assert_mended(out, want)


@every_format
def test_a_damaged_scale_is_told(path: Path, csv: Path, tmp_path: Path) -> None:
    out = run(csv, tmp_path / f"int8{path.suffix}", features=("tokens:int8",))
    backend = schema.format_of(out).open(out, write=True)
    backend.write(schema.scale(TOKENS), 0, 2 * backend.read(schema.scale(TOKENS)))
    backend.close()
    with pytest.raises(MlcError, match=r"tokens_scale.*extract the images again to another --out"):
        repair(out, CPU)


@every_format
def test_imported_features_are_no_backbones(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    root.mkdir()
    for part in ("train", "val"):
        names = [f"{part}_{row}.jpg" for row in range(6)]
        np.save(root / f"formatted_{part}_images.npy", np.array(names))
        np.save(root / f"formatted_{part}_labels.npy", np.ones((6, 20)))
        values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
        np.save(root / f"{part}_features_imagenet_resnet50.npy", values)
    out = tmp_path / f"imported{path.suffix}"
    asked = ImportConfig(data="voc-formatted", root=root, out=out)
    import_features(asked)
    with FeatureStore(out) as store:
        (array,) = store.arrays
        before = store.pooled()
    flip(out, array, 2)
    with pytest.raises(MlcError, match=r"holds imported features.* run the same mlc import again"):
        repair(out, CPU)
    assert import_features(asked).imported > 0
    assert verify(out).problems == []
    with FeatureStore(out) as store:
        np.testing.assert_array_equal(store.pooled(), before)


# --- killed and unfinished -----------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Have a forward pass stopped by Ctrl-C."""
    calls: list[int] = []
    features: Callable[..., Any] = Backbone.features

    def stop(self: Backbone, pixels: NDArray[np.uint8]) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", stop)


@every_format
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("extracted", [True, False])
def test_a_killed_repair_is_ended_by_the_same_call_or_an_extraction(
    path: Path, csv: Path, monkeypatch: pytest.MonkeyPatch, call: int, extracted: bool
) -> None:
    want = arrays(path)
    for array, row in ((POOLED, 0), (TOKENS, 6), (TOKENS, 11)):
        flip(path, array, row)
    with monkeypatch.context() as patch:
        interrupt(patch, call)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            repair(path, CPU)
    with pytest.raises(MlcError, match="unfinished"):
        FeatureStore(path)
    if extracted:
        run(csv, path)
    else:
        assert 0 < repair(path, CPU).rows <= 3
    assert_mended(path, want)


@every_format
def test_what_was_never_extracted_is_left_to_the_extraction(
    path: Path, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = arrays(path)
    out = tmp_path / f"own{path.suffix}"
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(csv, out)
    pending = verify(out).pending
    assert 0 < pending < 12
    flip(out, TOKENS, 0)
    done = repair(out, CPU)
    assert (done.rows, done.left) == (1, pending)
    assert verify(out).problems == []
    run(csv, out)
    assert_mended(out, want)
