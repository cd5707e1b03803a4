"""import_features(): the published feature files become a store that equals them bit for bit."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.datasets.labels import load_labels
from mlc.datasets.protocol import apply_protocol
from mlc.datasets.source import DataConfig, read_images
from mlc.extract import imported
from mlc.extract.images import hash_content
from mlc.extract.imported import ImportConfig, import_features
from mlc.heads.inputs import LabelsConfig, join, read_features, read_labels
from mlc.store import schema
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, labels_path

WIDTH = 6
ROWS = {"train": 13, "val": 9}  # shards of 5: one holds rows of both files, the last is shorter
SHARD_ROWS = 5
SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
FILES = {part: f"{part}_features_imagenet_resnet50.npy" for part in ROWS}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "shard_rows_for", lambda images: SHARD_ROWS)
    monkeypatch.setattr(imported, "SCAN_ROWS", 4)


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A VOC in the authors' form: 20 classes, features of random numbers."""
    folder = tmp_path / "voc"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, rows in ROWS.items():
        names = [f"{part}_{row}.jpg" for row in generator.permutation(rows)]
        labels = (generator.random((rows, 20)) < 0.4).astype(np.float64)
        labels[:, 0] = 1
        np.save(folder / f"formatted_{part}_images.npy", np.array(names))
        np.save(folder / f"formatted_{part}_labels.npy", labels)
        write_features(folder, part, generator.standard_normal((rows, WIDTH)).astype(np.float32))
    return folder


def write_features(root: Path, part: str, values: Any) -> None:
    np.save(root / FILES[part], values)


def features_of(root: Path) -> dict[str, NDArray[Any]]:
    return {part: np.load(root / FILES[part]) for part in ROWS}


def config(root: Path, out: Path | None = None, **settings: Any) -> ImportConfig:
    return ImportConfig(**({"data": "voc-formatted", "root": root, "out": out} | settings))


def refused(asked: ImportConfig, sentence: str) -> None:
    with pytest.raises(MlcError, match=sentence):
        import_features(asked)


def content(store: FeatureStore) -> dict[str, NDArray[Any]]:
    return {
        "image_id": store.image_id,
        "file": store.file,
        "status": store.status,
        "content_hash": store.content_hash(),
        "features": store.pooled(),
    }


def test_the_store_equals_the_files_bit_for_bit(root: Path, tmp_path: Path, suffix: str) -> None:
    done = import_features(config(root, tmp_path / f"store{suffix}"))
    assert (done.images, done.imported) == (22, 22)
    table = read_images(DataConfig(data="voc-formatted", root=root)).labels
    values = features_of(root)
    with FeatureStore(done.path) as store:
        assert store.pooled().tobytes() == values["train"].tobytes() + values["val"].tobytes()
        assert store.features().shape == (22, 1, WIDTH)
        np.testing.assert_array_equal(store.image_id, table.image_id)
        np.testing.assert_array_equal(store.file, table.file)
        assert (store.status == schema.OK).all()
        assert store.errors() == {}
        rows = [*values["train"], *values["val"]]
        assert store.content_hash().tolist() == [hash_content(row.tobytes()) for row in rows]
    assert load_labels(labels_path(done.path)).digest() == table.digest()


def test_heads_get_each_image_its_own_row(root: Path, tmp_path: Path, suffix: str) -> None:
    path = import_features(config(root, tmp_path / f"store{suffix}")).path
    features = read_features(path)
    table = apply_protocol(read_labels(LabelsConfig(), path), "single-positive")
    splits = join(features, table, torch.device("cpu"))
    assert {name: len(split.image_id) for name, split in splits.items()} == {
        "train": 10,
        "val": 3,
        "test": 9,
    }
    values, seen = features_of(root), 0
    for name, split in splits.items():
        part = "val" if name == "test" else "train"
        names = np.load(root / f"formatted_{part}_images.npy").tolist()
        for image_id, row in zip(split.image_id, split.features.numpy(), strict=True):
            np.testing.assert_array_equal(row, values[part][names.index(f"{image_id}.jpg")])
            seen += 1
    assert seen == 22


def test_the_key_says_what_is_known_and_no_more(root: Path, tmp_path: Path) -> None:
    features = read_features(import_features(config(root, tmp_path / "store.zarr")).path)
    sha256 = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in FILES.values()
    }
    both = hashlib.sha256(" ".join(sha256.values()).encode()).hexdigest()
    assert features.key == {
        "backbone": "imported:resnet50",
        "weights": f"imported:{both}",
        "layers": ["features"],
        "size_px": 0,
        "engine": "unknown",
        "resize": "unknown",
        "interpolation": "unknown",
        "decode": "unknown",
        "mean": [],
        "std": [],
        "precision": "unknown",
        "views": ["unknown"],
        "features": ["pooled:float32"],
    }
    made_by = features.made_by
    assert made_by["sha256"] == sha256
    assert made_by["backbone_config"] is None  # nothing here can make these features again
    assert "imported" in made_by["backbone"]
    assert "unknown" in made_by["weights_licence"]
    assert (made_by["data"], made_by["root"]) == ("voc-formatted", str(root.resolve()))
    assert {"mlc", "command", "created"} <= made_by.keys()


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        (("float16", "float16"), "float16"),
        (("float16", "float32"), "float32"),
        (("float64", "float64"), "float32"),
    ],
)
def test_float16_is_kept_and_float64_rounded(
    root: Path, tmp_path: Path, dtypes: tuple[str, str], stored: str
) -> None:
    generator = np.random.default_rng(1)
    for (part, rows), dtype in zip(ROWS.items(), dtypes, strict=True):
        write_features(root, part, generator.standard_normal((rows, WIDTH)).astype(dtype))
    with FeatureStore(import_features(config(root, tmp_path / "store.h5")).path) as store:
        assert store.key["features"] == [f"pooled:{stored}"]
        values = features_of(root)
        want = [each.astype(np.float32) for each in values.values()]
        np.testing.assert_array_equal(store.pooled(), np.concatenate(want))
        assert store.content_hash()[0] == hash_content(values["train"][0].tobytes())


def test_a_file_in_columns_order_is_the_same(root: Path, tmp_path: Path) -> None:
    with FeatureStore(import_features(config(root, tmp_path / "a.zarr")).path) as store:
        want = content(store)
    for part, values in features_of(root).items():
        write_features(root, part, np.asfortranarray(values))
    with FeatureStore(import_features(config(root, tmp_path / "b.zarr")).path) as store:
        for name, values in content(store).items():
            np.testing.assert_array_equal(values, want[name])


def test_the_same_files_find_the_same_store_and_other_ones_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    first = import_features(config(root))
    assert first.path.parent == Path("features")
    assert first.path.name.startswith("voc-imported-resnet50-")
    assert first.path.suffix == ".zarr"
    again = import_features(config(root))
    assert (again.path, again.images, again.imported) == (first.path, 22, 0)
    digests = {read_features(first.path).digest}
    for part, values in features_of(root).items():
        values[0, 0] += 1
        write_features(root, part, values)
        other = import_features(config(root))
        assert other.imported == 22
        digests.add(read_features(other.path).digest)
    assert len(digests) == len(list(Path("features").glob("*.zarr"))) == 3
    assert import_features(config(root, format="hdf5")).path.suffix == ".h5"


def test_a_store_of_other_contents_is_not_taken(root: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"store{suffix}"
    import_features(config(root, out))
    values = features_of(root)["train"]
    values[3, 3] += 1
    write_features(root, "train", values)
    refused(config(root, out), r"store\..*: made with other settings: weights: .*; .* --out")


def test_other_names_for_the_same_features_are_not_taken(root: Path, tmp_path: Path) -> None:
    import_features(config(root, tmp_path / "store.zarr"))
    names = np.load(root / "formatted_val_images.npy")
    np.save(root / "formatted_val_images.npy", names[::-1])
    refused(config(root, tmp_path / "store.zarr"), r"holds 22 other images than the 22 asked for")


def test_labels_that_change_are_written_anew_beside_the_store(root: Path, tmp_path: Path) -> None:
    path = import_features(config(root, tmp_path / "store.zarr")).path
    labels = np.load(root / "formatted_val_labels.npy")
    np.save(root / "formatted_val_labels.npy", 1 - labels)
    assert import_features(config(root, path)).imported == 0
    np.testing.assert_array_equal(load_labels(labels_path(path)).part("test").true, labels == 0)


def stopping_after(rows: int) -> Callable[..., None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done >= rows:
            raise KeyboardInterrupt

    return progress


def test_an_import_that_was_stopped_goes_on(root: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"store{suffix}"
    with pytest.raises(KeyboardInterrupt, match=r"10 of 22 images are kept; the same command"):
        import_features(config(root, out), stopping_after(10))
    with pytest.raises(MlcError, match=r"unfinished, 10 of 22"):
        FeatureStore(out)
    assert import_features(config(root, out)).imported == 12
    whole = import_features(config(root, tmp_path / f"whole{suffix}")).path
    with FeatureStore(out) as got, FeatureStore(whole) as want:
        for name, values in content(want).items():
            assert content(got)[name].tobytes() == values.tobytes(), name


def test_progress_is_told_of_hashing_and_of_rows(root: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    import_features(config(root, tmp_path / "a.zarr"), lambda *news: told.append(news))
    assert told[:2] == [(0, 22, f"hashing {name}") for name in FILES.values()]
    assert told[2:] == [(5, 22), (10, 22), (15, 22), (20, 22), (22, 22)]


def test_another_writer_is_waited_for(root: Path, tmp_path: Path) -> None:
    with writer_lock(tmp_path / "store.zarr"):
        refused(config(root, tmp_path / "store.zarr"), r"another process is writing to it")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_their_rows(
    root: Path, tmp_path: Path, value: float, suffix: str
) -> None:
    values = features_of(root)["train"]
    values[[2, 11], [0, 5]] = value
    write_features(root, "train", values)
    sentence = rf"{FILES['train']}: .* not finite numbers in 2 of 13 rows: 2, 11; get it again"
    refused(config(root, tmp_path / f"store{suffix}"), sentence)
    values[:8, 1] = value
    write_features(root, "train", values)
    sentence = r"in 9 of 13 rows: 0, 1, 2, 3, 4, …; get"
    refused(config(root, tmp_path / f"store{suffix}"), sentence)
    assert not (tmp_path / f"store{suffix}").exists()


def test_a_number_that_float32_cannot_hold_is_not_finite(root: Path, tmp_path: Path) -> None:
    values = features_of(root)["val"].astype(np.float64)
    values[8, 0] = 1e39
    write_features(root, "val", values)
    refused(config(root, tmp_path / "a.h5"), rf"{FILES['val']}: .* in 1 of 9 rows: 8; get it")


def test_a_missing_file_is_named_with_how_to_get_it(root: Path, tmp_path: Path) -> None:
    (root / FILES["val"]).unlink()
    sentence = rf"voc: no {FILES['val']} there; get it from .*zenodo.*10162606, or pass --root"
    refused(config(root, tmp_path / "a.zarr"), sentence)
    (root / FILES["train"]).unlink()
    refused(config(root, tmp_path / "a.zarr"), rf"no {FILES['train']}, {FILES['val']} there")
    (root / "formatted_val_images.npy").unlink()
    refused(config(root, tmp_path / "a.zarr"), r"no formatted_val_images.npy there; get")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.zeros((8, WIDTH), np.float32), r"has 8 rows, and voc 9 labelled images in .*'test'"),
        (np.zeros((0, WIDTH), np.float32), r"has 0 rows, and voc 9 labelled images"),
        (np.zeros(9, np.float32), r"expected a row of floats .* float32 of shape \(9,\)"),
        (np.zeros((9, WIDTH), np.int32), r"expected a row of floats for each image, got int32"),
        (np.full((9, WIDTH), "x"), r"expected a row of floats for each image, got <U1"),
        (np.zeros((9, WIDTH + 1), np.float32), r"has rows of 7 numbers, train_.* has of 6; take"),
    ],
)
def test_a_file_of_another_shape_is_refused(
    root: Path, tmp_path: Path, values: NDArray[Any], sentence: str
) -> None:
    write_features(root, "val", values)
    refused(config(root, tmp_path / "a.zarr"), rf"{FILES['val']}: {sentence}")
    assert not (tmp_path / "a.zarr").exists()


def test_a_file_cut_short_is_refused(root: Path, tmp_path: Path) -> None:
    path = root / FILES["train"]
    path.write_bytes(path.read_bytes()[:-8])
    refused(config(root, tmp_path / "a.zarr"), rf"{path.name}: not an .npy file of numbers")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": "pascal"}, r"unknown data set with published features 'pascal'; choose from coc"),
        ({"data": "digits"}, r"unknown data set with published features 'digits'; choose .*nusw"),
        ({"data": "photos.csv"}, r"unknown data set with published features 'photos.csv'"),
        ({"out": Path("a.npz")}, r"a.npz: a store's name ends in .h5 or .zarr"),
        ({"format": "npz"}, r"unknown format 'npz'"),
        ({"out": Path("a.h5"), "format": "zarr"}, r"a.h5 does not end in .zarr, as --format zarr"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    refused(config(tmp_path / "none", **settings), sentence)
    assert not (tmp_path / "none").exists()


def test_the_data_set_must_be_named() -> None:
    with pytest.raises(MlcError, match=r"import: data: missing"):
        load(ImportConfig, "import")


def test_the_default_root_is_the_data_sets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_DATA", str(root.parent))
    root.rename(root.parent / "voc-formatted")
    monkeypatch.chdir(root.parent)
    assert import_features(ImportConfig(data="voc-formatted")).imported == 22


def test_vocs_own_lists_give_the_same_store(root: Path, tmp_path: Path) -> None:
    """Without the formatted files: their rows are sorted by file name, and so are the features'."""
    main = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main.parent.parent / "JPEGImages").mkdir()
    for part in ROWS:
        names = np.load(root / f"formatted_{part}_images.npy")
        labels = np.load(root / f"formatted_{part}_labels.npy")
        order = np.argsort(names)
        table = read_images(DataConfig(data="voc-formatted", root=root)).labels
        for name, flags in zip(table.classes, labels.T, strict=True):
            lines = [
                f"{image.removesuffix('.jpg')} {1 if flag else -1}\n"
                for image, flag in zip(names.tolist(), flags, strict=True)
            ]
            (main / f"{name}_{part}.txt").write_text("".join(lines))
        np.save(root / f"formatted_{part}_images.npy", names[order])
        np.save(root / f"formatted_{part}_labels.npy", labels[order])
    stores = [
        import_features(config(root, tmp_path / f"{data}.zarr", data=data)).path
        for data in ("voc", "voc-formatted")
    ]
    one, other = (read_features(path) for path in stores)
    assert (one.digest, one.key) == (other.digest, other.key)
    tables = [load_labels(labels_path(path)) for path in stores]
    assert tables[0].digest() == tables[1].digest()
