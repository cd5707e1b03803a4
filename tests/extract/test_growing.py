"""A store that gets more images: only what is missing is extracted, and no photo twice."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.labels import load_labels
from mlc.extract.backbone import Backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.job import ExtractReport
from mlc.extract.origin import Where
from mlc.extract.repair import repair
from mlc.extract.run import extract
from mlc.store import hdf5, schema
from mlc.store.journal import JournaledFile, journal_path
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.verify import verify

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
CLASSES = ("cat", "dog", "cow")


@pytest.fixture(params=SUFFIXES)
def out(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / "out" / f"photos{request.param}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures.write_data(tmp_path / "data", bad=False)
    return tmp_path / "data"


def table(folder: Path, names: tuple[str, ...], classes: tuple[str, ...] = CLASSES) -> Path:
    """A CSV of some of the photos, and of others that lie in the folder."""
    lines = ["file,labels,split"]
    for index, name in enumerate(names):
        labels = ";".join(classes[: 1 + index % 3])
        lines.append(f"{name},{labels},{('train', 'val', 'test')[index % 3]}")
    path = folder / "photos.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(csv: Path, out: Path, **settings: Any) -> ExtractReport:
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "random_weights": True,
        "size_px": 64,
        "device": "cpu",
        "batch_size": 2,
        "shard_rows": 5,
        "workers": 2,
        "features": ("pooled", "tokens"),
    }
    return extract(ExtractConfig(data=str(csv), out=out, **(values | settings)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass from now on that are not black."""
    return pictures.count_decoded(monkeypatch)


def features_of(path: Path) -> dict[str, NDArray[Any]]:
    """Each image's pooled features and tokens, by image id."""
    with FeatureStore(path) as store:
        rows = np.arange(len(store.image_id))
        pooled = store.features(kind="pooled").read(rows)
        tokens = store.features(kind="tokens").read(rows)
        return {
            image_id: np.concatenate([pooled[row].ravel(), tokens[row].ravel()])
            for row, image_id in enumerate(store.image_id.tolist())
        }


def assert_same(got: dict[str, NDArray[Any]], want: dict[str, NDArray[Any]]) -> None:
    for image_id, values in got.items():
        # Another batch size may differ in the last bits.
        np.testing.assert_allclose(values, want[image_id], atol=1e-3, err_msg=image_id)


@pytest.fixture
def cut_off(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An HDF5 store as a process leaves it that is killed just before its growth is final."""
    path, killed = tmp_path / "photos.h5", tmp_path / "killed"
    run(table(folder, pictures.FILES[:7]), path)
    commit = JournaledFile.commit

    def leave(file: JournaledFile) -> None:
        killed.mkdir()
        for each in (path, journal_path(path)):
            shutil.copy(each, killed)
        commit(file)

    with monkeypatch.context() as patch:
        patch.setattr(JournaledFile, "commit", leave)
        run(table(folder, pictures.FILES), path)
    for each in killed.iterdir():
        each.replace(tmp_path / each.name)
    return path


def test_the_same_command_goes_on_where_a_growth_was_cut_off(folder: Path, cut_off: Path) -> None:
    assert run(table(folder, pictures.FILES), cut_off).extracted == 5
    assert not journal_path(cut_off).exists()
    assert verify(cut_off).problems == []


def test_a_store_whose_growth_was_cut_off_is_what_it_was(folder: Path, cut_off: Path) -> None:
    assert len(features_of(cut_off)) == 7
    assert not journal_path(cut_off).exists()


def test_a_store_whose_growth_was_cut_off_is_verified_and_repaired(cut_off: Path) -> None:
    journal = journal_path(cut_off).read_bytes()
    grown = cut_off.read_bytes()
    assert verify(cut_off).problems == []
    cut_off.write_bytes(grown)
    journal_path(cut_off).write_bytes(journal)
    assert repair(cut_off, Where()).rows == 0
    assert len(features_of(cut_off)) == 7


def test_a_growth_that_is_under_way_is_not_undone(
    cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "UNDO_SECONDS", 0.1)
    with writer_lock(cut_off), pytest.raises(MlcError, match="another process is writing to it"):
        FeatureStore(cut_off)
    assert journal_path(cut_off).exists()


def test_many_readers_of_a_growth_that_was_cut_off_all_read(cut_off: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(features_of, [cut_off] * 4))
    for each in found:
        assert_same(each, found[0])


def test_a_reader_without_permission_is_told_what_happened(
    cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5.os, "access", lambda *_: False)
    with pytest.raises(MlcError, match="a process was killed that added images"):
        FeatureStore(cut_off)


@pytest.mark.parametrize("first", [1, 4, 5, 7])
def test_new_images_are_rows_after_those_that_were_there(
    folder: Path, out: Path, tmp_path: Path, decoded: list[int], first: int
) -> None:
    names = pictures.FILES
    run(table(folder, names[-first:]), out)
    before = features_of(out)
    decoded.clear()
    report = run(table(folder, names), out)
    assert (report.extracted, report.rows, sum(decoded)) == (12 - first, 12, 12 - first)
    with FeatureStore(out) as store:
        assert store.image_id.tolist() == [*names[-first:], *names[:-first]]
        assert (store.status == schema.OK).all()
    after = features_of(out)
    for image_id, values in before.items():
        np.testing.assert_array_equal(after[image_id], values)
    run(table(folder, names), tmp_path / f"whole{out.suffix}")
    assert_same(after, features_of(tmp_path / f"whole{out.suffix}"))
    assert run(table(folder, names), out).extracted == 0


def test_a_subset_is_there_already_and_a_mixed_request_adds_what_is_new(
    folder: Path, out: Path
) -> None:
    names = pictures.FILES
    run(table(folder, names[:8]), out)
    assert run(table(folder, names[2:5]), out).extracted == 0
    report = run(table(folder, names[6:]), out)
    assert (report.extracted, report.images, report.rows) == (4, 6, 12)
    labels = load_labels(labels_path(out))
    assert sorted(labels.image_id.tolist()) == sorted(names)


def test_ids_longer_than_those_that_were_there(folder: Path, out: Path) -> None:
    run(table(folder, pictures.FILES[:3]), out)
    long = "写真/" + "x" * 60 + ".jpg"
    (folder / "写真").mkdir()
    (folder / long).write_bytes(pictures.good_file("07.jpg"))
    run(table(folder, (*pictures.FILES[:3], long)), out)
    with FeatureStore(out) as store:
        assert store.image_id.tolist() == [*pictures.FILES[:3], long]


def test_other_classes_are_refused_before_anything_is_extracted(folder: Path, out: Path) -> None:
    run(table(folder, pictures.FILES[:4]), out)
    with pytest.raises(MlcError, match="labelled with other classes"):
        run(table(folder, pictures.FILES[4:], ("elk", "cow", "ant")), out)
    assert load_labels(labels_path(out)).classes == ("cat", "cow", "dog")


# --- the same photo ------------------------------------------------------------------------------


def copies(folder: Path, names: dict[str, str]) -> None:
    for copy, of in names.items():
        (folder / copy).write_bytes((folder / of).read_bytes())


def test_the_same_photo_under_another_name_is_not_extracted_again(
    folder: Path, out: Path, decoded: list[int]
) -> None:
    names = pictures.FILES[:6]
    run(table(folder, names), out)
    decoded.clear()
    copies(folder, {f"copy-{name}": name for name in names})
    report = run(table(folder, (*names, *(f"copy-{name}" for name in names))), out)
    assert (report.extracted, report.copied, decoded) == (0, 6, [])
    features = features_of(out)
    for name in names:
        np.testing.assert_array_equal(features[f"copy-{name}"], features[name])


def test_copies_within_one_run_and_within_one_batch(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    copies(folder, {"a.jpg": "01.jpg", "b.jpg": "01.jpg", "c.jpg": "08.jpg"})
    names = ("01.jpg", "a.jpg", "00.png", "02.jpg", "b.jpg", "c.jpg", "08.jpg")
    report = run(table(folder, names), out)
    assert (report.extracted, report.copied) == (4, 3)
    features = features_of(out)
    for one, other in (("a.jpg", "01.jpg"), ("b.jpg", "01.jpg"), ("08.jpg", "c.jpg")):
        np.testing.assert_array_equal(features[one], features[other])
    run(table(folder, pictures.FILES), tmp_path / f"plain{out.suffix}")
    want = features_of(tmp_path / f"plain{out.suffix}")
    assert_same({name: features[name] for name in ("01.jpg", "00.png", "02.jpg")}, want)
    np.testing.assert_allclose(features["c.jpg"], want["08.jpg"], atol=1e-3)


def test_copies_of_a_broken_photo_are_broken_photos(folder: Path, out: Path) -> None:
    (folder / "01.jpg").write_bytes(pictures.broken_file("04.jpg"))
    copies(folder, {"a.jpg": "01.jpg"})
    report = run(table(folder, ("01.jpg", "a.jpg", "02.jpg")), out)
    assert report.bad.keys() == {"01.jpg", "a.jpg"}
    assert report.copied == 0


# --- a photo that changed ------------------------------------------------------------------------


def test_a_changed_photo_is_noticed_and_taken_if_asked(
    folder: Path, out: Path, tmp_path: Path, decoded: list[int]
) -> None:
    csv = table(folder, pictures.FILES)
    run(csv, out)
    before = features_of(out)
    (folder / "07.jpg").write_bytes(pictures.encoded(pictures.photo(seed=99), "JPEG"))
    with pytest.raises(
        MlcError, match=r"another photo than .*07\.jpg, by its content; .*--on-changed"
    ):
        run(csv, out)
    decoded.clear()
    report = run(csv, out, on_changed="extract")
    assert (report.extracted, sum(decoded)) == (1, 1)
    after = features_of(out)
    assert not np.allclose(after["07.jpg"], before["07.jpg"])
    for name in pictures.FILES:
        if name != "07.jpg":
            np.testing.assert_array_equal(after[name], before[name])
    assert run(csv, out).extracted == 0


def test_what_is_asked_of_a_killed_growth_is_done_by_the_same_call(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(table(folder, pictures.FILES[:7]), out)
    calls: list[int] = []
    features: Callable[..., Any] = Backbone.features

    def stop(self: Backbone, pixels: NDArray[np.uint8]) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return features(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "features", stop)
        with pytest.raises(KeyboardInterrupt):
            run(table(folder, pictures.FILES), out)
    with pytest.raises(MlcError, match="unfinished"):
        FeatureStore(out)
    run(table(folder, pictures.FILES), out)
    with FeatureStore(out) as store:
        assert store.image_id.tolist() == list(pictures.FILES)
        assert (store.status == schema.OK).all()
