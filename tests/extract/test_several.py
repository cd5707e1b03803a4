"""extract_each(): several stores in one pass, each as if it had been made alone."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.labels import load_labels
from mlc.extract import images
from mlc.extract.backbone import Backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.forecast import Forecast
from mlc.extract.run import extract, extract_each
from mlc.store import schema
from mlc.store.finish import finish
from mlc.store.reader import FeatureStore, labels_path

# Of each store: a CNN and a ViT, and one network at two sizes; views that differ.
STORES: dict[str, dict[str, Any]] = {
    "cnn.zarr": {"backbone": "test_resnet", "size_px": 64},
    "vit.h5": {"backbone": "test_vit", "size_px": 96, "features": ("pooled", "tokens")},
    "large.zarr": {"backbone": "test_resnet", "size_px": 96, "views": ("orig", "flip")},
}
BAD_ROWS = [pictures.FILES.index(name) for name in pictures.BAD_FILES]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of twelve photos, two of them bad and two alike; not to be changed."""
    return write_photos(tmp_path_factory.mktemp("data"))


def write_photos(folder: Path) -> Path:
    table = pictures.write_data(folder)
    (folder / pictures.FILES[10]).write_bytes((folder / pictures.FILES[1]).read_bytes())
    return table


def add_photo(table: Path, name: str = "12.png", seed: int = 12) -> None:
    (table.parent / name).write_bytes(pictures.encoded(pictures.photo(seed=seed)))
    table.write_text(f"{table.read_text().rstrip()}\n{name},cat,train\n")


def config(table: Path, out: Path, **settings: Any) -> ExtractConfig:
    values = {"random_weights": True, "device": "cpu", "workers": 2, "batch_size": 2}
    values |= {"shard_rows": 5} | STORES.get(out.name, {}) | settings
    return ExtractConfig(data=str(table), out=out, **values)


def configs(table: Path, folder: Path, **settings: Any) -> list[ExtractConfig]:
    return [config(table, folder / name, **settings) for name in STORES]


@pytest.fixture(scope="module")
def alone(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of stores that were made one by one; not to be changed."""
    folder = tmp_path_factory.mktemp("alone")
    for asked in configs(table, folder):
        extract(asked)
    return folder


def content(path: Path) -> dict[str, bytes]:
    """Return all that is stored of images."""
    with FeatureStore(path) as store:
        rows = np.arange(len(store.image_id))
        values = {name: store.features(*name.split("/")).read(rows) for name in store.arrays}
        values |= {"id": store.image_id, "status": store.status, "hash": store.content_hash()}
        return {name: each.tobytes() for name, each in values.items()} | {
            "error": repr(store.errors()).encode()
        }


def assert_as_alone(folder: Path, alone: Path) -> None:
    for name in STORES:
        assert content(folder / name) == content(alone / name), name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is read from now on."""
    counts: Counter[str] = Counter()
    read_file = images.read_file

    def spy(path: Path) -> bytes:
        counts[path.name] += 1
        return read_file(path)

    monkeypatch.setattr(images, "read_file", spy)
    return counts


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many batches each backbone runs from now on, by architecture and size."""
    counts: Counter[str] = Counter()
    features = Backbone.features

    def spy(self: Backbone, pixels: Any) -> Any:
        counts[f"{self.key.backbone} {self.key.size_px}"] += 1
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", spy)
    return counts


def stopping_after(count: int) -> Callable[..., None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


# --- as alone ------------------------------------------------------------------------------------


def test_each_store_is_what_it_is_alone_and_a_photo_is_read_once(
    table: Path, tmp_path: Path, alone: Path, reads: Counter[str]
) -> None:
    done = extract_each(configs(table, tmp_path))
    assert reads == dict.fromkeys(pictures.FILES, 1)
    assert_as_alone(tmp_path, alone)
    assert [report.path.name for report in done] == list(STORES)
    assert [(report.extracted, report.copied) for report in done] == [(11, 1)] * 3
    assert all(report.complete and len(report.bad) == 2 for report in done)
    for name in STORES:
        assert load_labels(labels_path(tmp_path / name)).image_id.tolist() == list(pictures.FILES)
        with FeatureStore(tmp_path / name) as store:
            assert store.extraction["images"] == len(pictures.FILES)


@pytest.mark.parametrize("decode", ["pillow", "fast"])
def test_both_decoders_give_each_store_what_it_is_alone(
    decode: str, table: Path, tmp_path: Path
) -> None:
    extract_each(configs(table, tmp_path / "each", decode=decode))
    for asked in configs(table, tmp_path / "one", decode=decode):
        extract(asked)
    assert_as_alone(tmp_path / "each", tmp_path / "one")


def test_a_stopped_pass_goes_on_in_all_stores(table: Path, tmp_path: Path, alone: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"stopped, \d+ of 12 images are kept"):
        extract_each(configs(table, tmp_path), stopping_after(8))
    done = extract_each(configs(table, tmp_path))
    assert all(0 < report.extracted < 11 for report in done)
    assert_as_alone(tmp_path, alone)


def test_stores_that_were_stopped_at_different_places_go_on_together(
    table: Path, tmp_path: Path, alone: Path, passes: Counter[str]
) -> None:
    first, second, third = configs(table, tmp_path)
    extract(first)
    with pytest.raises(KeyboardInterrupt):
        extract(second, stopping_after(8))
    passes.clear()
    done = extract_each([first, second, third])
    assert passes["test_resnet 64"] == 0
    assert 0 < passes["test_vit 96"] < 6
    assert [report.extracted for report in done][::2] == [0, 11]
    assert_as_alone(tmp_path, alone)


def test_a_photo_that_one_store_lacks_is_not_shown_to_the_others(
    tmp_path: Path, passes: Counter[str]
) -> None:
    table = write_photos(tmp_path / "data")
    first, second, _ = configs(table, tmp_path)
    extract(first)
    add_photo(table)
    extract(second)
    passes.clear()
    done = extract_each([first, second])
    assert passes == {"test_resnet 64": 1}
    assert [report.extracted for report in done] == [1, 0]


def test_images_are_added_to_all_stores(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "data")
    extract_each(configs(table, tmp_path / "grown"))
    add_photo(table)
    assert [each.extracted for each in extract_each(configs(table, tmp_path / "grown"))] == [1] * 3
    extract_each(configs(table, tmp_path / "whole"))
    assert_as_alone(tmp_path / "grown", tmp_path / "whole")


def test_a_bad_image_that_is_mended_is_extracted_for_all(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "data")
    extract_each(configs(table, tmp_path))
    name = next(iter(pictures.BAD_FILES))
    (table.parent / name).write_bytes(pictures.good_file(name))
    assert [each.extracted for each in extract_each(configs(table, tmp_path))] == [1] * 3


def test_int8_has_the_scales_that_it_has_alone(table: Path, tmp_path: Path) -> None:
    asked = configs(table, tmp_path / "each", features=("pooled:int8",))
    extract_each(asked)
    for each in configs(table, tmp_path / "one", features=("pooled:int8",)):
        extract(each)
    assert_as_alone(tmp_path / "each", tmp_path / "one")


def test_workers_fill_shares_of_all_stores(table: Path, tmp_path: Path) -> None:
    names = ("cnn.zarr", "large.zarr")
    for index in range(2):
        asked = [config(table, tmp_path / name, shard=f"{index}/2") for name in names]
        done = extract_each(asked)
        assert not any(report.complete for report in done)
    for name in names:
        assert finish(tmp_path / name) == 10
        extract(config(table, tmp_path / "one" / name))
        assert content(tmp_path / name) == content(tmp_path / "one" / name)


# --- batches -------------------------------------------------------------------------------------


def test_a_new_store_follows_the_batches_of_one_that_goes_on(table: Path, tmp_path: Path) -> None:
    first, second, _ = configs(table, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        extract(first, stopping_after(8))
    other = second.model_copy(update={"batch_size": 3, "shard_rows": 4})
    extract_each([other, first])
    with FeatureStore(tmp_path / "vit.h5") as store:
        assert (store.batch_size, store.shard_rows) == (2, 5)


def test_new_stores_take_the_smallest_batch_of_them(table: Path, tmp_path: Path) -> None:
    first, second, _ = configs(table, tmp_path)
    extract_each([first.model_copy(update={"batch_size": 4}), second])
    for name in ("cnn.zarr", "vit.h5"):
        with FeatureStore(tmp_path / name) as store:
            assert store.batch_size == 2


def test_stores_with_other_batches_are_not_filled_in_one_pass(table: Path, tmp_path: Path) -> None:
    first, second, _ = configs(table, tmp_path)
    second = second.model_copy(update={"batch_size": 3})
    for each in (first, second):
        with pytest.raises(KeyboardInterrupt):
            extract(each, stopping_after(8))
    with pytest.raises(MlcError, match=r"vit.h5: has batches of 3, not 2 as .*cnn.zarr, and so"):
        extract_each([first, second])
    for each in (first, second):
        assert extract(each).complete


def test_a_new_store_follows_a_finished_one_that_has_an_image_mended(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "data")
    first, second, _ = configs(table, tmp_path)
    extract(first)
    name = next(iter(pictures.BAD_FILES))
    (table.parent / name).write_bytes(pictures.good_file(name))
    done = extract_each([first, second.model_copy(update={"batch_size": 3})])
    assert [each.extracted for each in done] == [1, 11]


# --- refused -------------------------------------------------------------------------------------


def state(path: Path) -> tuple[bool, int, dict[str, bytes]]:
    with FeatureStore(path) as store:
        return store.complete, len(store.image_id), content(path)


def other_backbone(table: Path, first: ExtractConfig, second: ExtractConfig) -> ExtractConfig:
    """The second store was made with another size."""
    extract(first)
    extract(second)
    add_photo(table)
    return second.model_copy(update={"size_px": 32, "backbone": "test_resnet"})


def other_batches(table: Path, first: ExtractConfig, second: ExtractConfig) -> ExtractConfig:
    extract(first)
    extract(second.model_copy(update={"batch_size": 3}))
    add_photo(table)
    return second


def other_order(table: Path, first: ExtractConfig, second: ExtractConfig) -> ExtractConfig:
    """The first store has the rows 00 to 11, 13, 12."""
    lines = table.read_text()
    add_photo(table, "13.png", seed=13)
    extract(first)
    table.write_text(lines)
    add_photo(table, "12.png")
    table.write_text(f"{table.read_text().rstrip()}\n13.png,cat,train\n")
    extract(second)
    extract(first)
    add_photo(table, "14.png", seed=14)
    return second


def changed_photo(table: Path, first: ExtractConfig, second: ExtractConfig) -> ExtractConfig:
    """A photo of the second store is another one now, and the first lacks another photo."""
    extract(first)
    (table.parent / pictures.FILES[2]).write_bytes(pictures.encoded(pictures.photo(seed=77)))
    extract(second)
    (table.parent / pictures.FILES[2]).write_bytes(pictures.good_file(pictures.FILES[2]))
    add_photo(table)
    return second


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (other_backbone, "made with other settings: backbone: stored 'test_vit'"),
        (other_batches, "has batches of 3, not 2 as"),
        (other_order, "has its images in another order than"),
        (changed_photo, "holds features of another photo than"),
    ],
)
def test_a_pass_that_is_refused_leaves_finished_stores_finished(
    prepare: Callable[..., ExtractConfig], sentence: str, tmp_path: Path
) -> None:
    table = write_photos(tmp_path / "data")
    first, second, _ = configs(table, tmp_path)
    second = prepare(table, first, second)
    paths = [tmp_path / "cnn.zarr", tmp_path / "vit.h5"]
    before = [state(path) for path in paths]
    with pytest.raises(MlcError, match=sentence):
        extract_each([first, second])
    assert [state(path) for path in paths] == before


def test_a_refused_worker_keeps_no_lease(table: Path, tmp_path: Path) -> None:
    extract(config(table, tmp_path / "large.zarr"))
    first, _, third = configs(table, tmp_path, shard="0/2")
    with pytest.raises(MlcError, match="made with other settings"):
        extract_each([first, third.model_copy(update={"size_px": 32})])
    assert not [each for each in threading.enumerate() if "lease" in each.name]


def test_a_store_that_is_asked_for_twice_is_refused(table: Path, tmp_path: Path) -> None:
    first, *_ = configs(table, tmp_path)
    with pytest.raises(MlcError, match=r"cnn.zarr: is asked for more than once"):
        extract_each([first, first])
    assert not (tmp_path / "cnn.zarr").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("workers", 1), ("decode", "fast"), ("on_error", "raise")]
)
def test_what_is_of_the_pass_is_the_same_for_all(
    name: str, value: object, table: Path, tmp_path: Path
) -> None:
    first, second, _ = configs(table, tmp_path)
    with pytest.raises(MlcError, match=rf"^{name}: is the same for all stores of one pass"):
        extract_each([first, second.model_copy(update={name: value})])


def test_nothing_is_made_where_one_backbone_cannot_be_had(table: Path, tmp_path: Path) -> None:
    first, second, _ = configs(table, tmp_path)
    with pytest.raises(MlcError, match="test_vot"):
        extract_each([first, second.model_copy(update={"backbone": "test_vot"})])
    assert not list(tmp_path.iterdir())


def test_a_bad_image_stops_the_pass_if_asked(table: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=next(iter(pictures.BAD_FILES))):
        extract_each(configs(table, tmp_path, on_error="raise"))
    for name in STORES:
        with FeatureStore(tmp_path / name, unfinished=True) as store:
            assert (store.status != schema.BAD).all()


# --- engines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_auto_keeps_the_engine_of_the_store_that_is_there(
    named: bool, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a.zarr" if named else None
    asked = config(table, tmp_path / "cnn.zarr", engine="torch").model_copy(update={"out": out})
    first = extract(asked)
    again = extract(asked.model_copy(update={"engine": "auto"}))
    assert (again.path, again.extracted, again.engine) == (first.path, 0, "torch")
    other = extract(asked.model_copy(update={"out": tmp_path / "b.zarr", "engine": "auto"}))
    assert other.engine == "folded"


# --- forecast ------------------------------------------------------------------------------------


def test_the_forecast_is_of_all_stores(table: Path, tmp_path: Path) -> None:
    told: list[Forecast] = []
    extract_each(configs(table, tmp_path, forecast=True), tell=told.append)
    each: list[Forecast] = []
    for asked in configs(table, tmp_path, forecast=True):
        extract(asked, tell=each.append)
    assert (told[0].images, told[0].stores) == (12, 3)
    assert told[0].store_bytes == sum(one.store_bytes for one in each)
    assert "12 images to extract into 3 stores: " in str(told[0])
    assert not list(tmp_path.iterdir())
