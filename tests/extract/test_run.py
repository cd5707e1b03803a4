"""extract(): features by the straight line, whatever the workers, the neighbours and the stops."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from mlc.configs.errors import MlcError
from mlc.datasets.csv_file import read_csv
from mlc.datasets.labels import load_labels
from mlc.extract import config as config_module
from mlc.extract import stream
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig, worker_count
from mlc.extract.lanes import share_cores
from mlc.extract.pace import STAGES
from mlc.extract.run import extract
from mlc.extract.shards import batches_of
from mlc.report.compare_stores import compare
from mlc.store import schema
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, labels_path

SIZE_PX = 64
SHARD_ROWS = 5  # of 12 rows, so that the last shard is shorter
BATCH_SIZE = 2  # so that every shard ends with a batch of one
SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
BAD_ROWS = sorted(pictures.FILES.index(name) for name in pictures.BAD_FILES)
GOOD_ROWS = [row for row in range(len(pictures.FILES)) if row not in BAD_ROWS]
Make = Callable[..., Path]


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def out(tmp_path: Path, suffix: str) -> Path:
    return tmp_path / "out" / f"photos{suffix}"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of the data set with two bad images; not to be changed."""
    return pictures.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mended_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set with all images good; not to be changed."""
    return pictures.write_data(tmp_path_factory.mktemp("mended"), bad=False)


@pytest.fixture
def own_table(tmp_path: Path) -> Path:
    """A data set with two bad images, for one test to change."""
    return pictures.write_data(tmp_path / "own")


def config(table: Path, out: Path | None, **settings: Any) -> ExtractConfig:
    values = {
        "backbone": "test_resnet",
        "random_weights": True,
        "size_px": SIZE_PX,
        "device": "cpu",
        "batch_size": BATCH_SIZE,
        "shard_rows": SHARD_ROWS,
        "workers": 2,
    }
    return ExtractConfig(data=str(table), out=out, **(values | settings))


@pytest.fixture(scope="module")
def stores(table: Path, mended_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Finished, uninterrupted stores, each made when first asked for; not to be changed."""
    folder = tmp_path_factory.mktemp("stores")

    def store(suffix: str, *, bad: bool = True) -> Path:
        path = folder / f"{'bad' if bad else 'mended'}{suffix}"
        if not path.exists():
            extract(config(table if bad else mended_table, path))
        return path

    return store


def mend(table: Path, *names: str) -> None:
    for name in names:
        (table.parent / name).write_bytes(pictures.good_file(name))


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All that an extraction fills in, and the rows."""
    with FeatureStore(path, unfinished=True) as store:
        return {
            "image_id": store.image_id,
            "status": store.status,
            "features": store.pooled() if store.complete else np.zeros(0, np.float32),
            "content_hash": store.content_hash(),
            "error": np.array([store.errors().get(str(name), "") for name in store.file]),
        }


def assert_same_bytes(got: Path, want: Path) -> None:
    got_arrays, want_arrays = arrays(got), arrays(want)
    for name, values in want_arrays.items():
        assert got_arrays[name].dtype == values.dtype, name
        assert got_arrays[name].tobytes() == values.tobytes(), name


def stopping_after(images: int) -> Callable[..., None]:
    """Ctrl-C once so many images are through the backbone."""

    def progress(done: int, total: int, note: str = "") -> None:
        if done >= images:
            raise KeyboardInterrupt

    return progress


def interrupted(asked: ExtractConfig, images: int = 8) -> str:
    with pytest.raises(KeyboardInterrupt) as caught:
        extract(asked, stopping_after(images))
    return str(caught.value)


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass from now on."""
    sizes: list[int] = []
    features = Backbone.features

    def spy(self: Backbone, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", spy)
    return sizes


# --- what is extracted ---------------------------------------------------------------------------


@cache
def plain_model() -> torch.nn.Module:
    asked = BackboneConfig(backbone="test_resnet", random_weights=True, device="cpu")
    model = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    model.load_state_dict(load_backbone(asked).module.state_dict())
    return model


def straight_line(name: str) -> NDArray[np.float32]:
    square = Image.fromarray(pictures.squashed(pictures.good_file(name), SIZE_PX))
    image = normalize(to_tensor(square), [0.5] * 3, [0.5] * 3)
    with torch.inference_mode():
        return plain_model()(image[None])[0].numpy()


def test_features_are_those_of_the_straight_line(stores: Make, suffix: str) -> None:
    got = arrays(stores(suffix))["features"]
    want = np.stack([straight_line(pictures.FILES[row]) for row in GOOD_ROWS])
    assert want.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(got[GOOD_ROWS], want, rtol=0, atol=1e-5)


def test_formats_hold_the_same(stores: Make) -> None:
    first, *others = (stores(suffix) for suffix in SUFFIXES)
    assert others
    for other in others:
        assert_same_bytes(other, first)


def test_bad_images_keep_their_rows_and_reasons(stores: Make, suffix: str) -> None:
    with FeatureStore(stores(suffix)) as store:
        assert np.flatnonzero(store.status == schema.BAD).tolist() == BAD_ROWS
        assert np.flatnonzero(store.status == schema.OK).tolist() == GOOD_ROWS
        assert not store.pooled()[BAD_ROWS].any()
        assert store.errors().keys() == pictures.BAD_FILES.keys()
        assert store.errors()["09.png"].startswith("not an image: 16 bytes")
        assert store.errors()["04.jpg"].startswith("broken image: ")
        assert all(len(each) == schema.HASH_CHARS for each in store.content_hash())


def test_rows_are_those_of_the_table(stores: Make, suffix: str) -> None:
    with FeatureStore(stores(suffix)) as store:
        assert store.image_id.tolist() == list(pictures.FILES)
        assert store.file.tolist() == list(pictures.FILES)


def test_a_bad_neighbour_does_not_change_the_other_rows(stores: Make) -> None:
    bad, mended = (arrays(stores(".zarr", bad=bad)) for bad in (True, False))
    np.testing.assert_array_equal(bad["features"][GOOD_ROWS], mended["features"][GOOD_ROWS])
    assert mended["features"][BAD_ROWS].any(axis=1).all()


@pytest.mark.parametrize("workers", [1, 5])
def test_features_do_not_depend_on_the_workers(
    stores: Make, table: Path, tmp_path: Path, workers: int
) -> None:
    extract(config(table, tmp_path / "a.zarr", workers=workers))
    assert_same_bytes(tmp_path / "a.zarr", stores(".zarr"))


def test_missing_images_are_bad_images(own_table: Path, out: Path) -> None:
    (own_table.parent / "00.png").unlink()
    report = extract(config(own_table, out))
    assert report.bad["00.png"] == "No such file or directory"
    assert arrays(out)["content_hash"][0] == ""


def test_float16_stores_the_rounded_features(stores: Make, table: Path, out: Path) -> None:
    extract(config(table, out, features="pooled:float16"))
    want = arrays(stores(out.suffix))["features"].astype(np.float16)
    np.testing.assert_array_equal(arrays(out)["features"], want)


def test_labels_are_saved_beside_the_store(stores: Make, suffix: str, table: Path) -> None:
    saved = load_labels(labels_path(stores(suffix)))
    want = read_csv(table, table.parent).labels
    assert saved.classes == want.classes == ("cat", "cow", "dog")
    for name in ("image_id", "file", "observed", "true", "split"):
        np.testing.assert_array_equal(getattr(saved, name), getattr(want, name), err_msg=name)


def test_what_made_the_store_is_recorded(stores: Make, suffix: str, table: Path) -> None:
    with FeatureStore(stores(suffix)) as store:
        assert store.key["backbone"] == "test_resnet"
        assert store.key["size_px"] == SIZE_PX
        assert store.batch_size == BATCH_SIZE
        assert store.made_by["backbone"] == "test_resnet with random weights"
        assert store.made_by["weights_licence"] == "none, they are random"
        assert store.made_by["root"] == str(table.parent.resolve())
        assert store.made_by["timm"] == timm.__version__
        again = BackboneConfig(**store.made_by["backbone_config"])
    assert load_backbone(again).key.to_json() == store.key


# --- what is reported ----------------------------------------------------------------------------


def test_the_report_tells_what_was_done(table: Path, out: Path) -> None:
    report = extract(config(table, out))
    assert (report.path, report.images, report.extracted) == (out, 12, 12)
    assert report.bad.keys() == pictures.BAD_FILES.keys()
    assert report.pace["busy_seconds"].keys() == set(STAGES)
    assert all(seconds > 0 for seconds in report.pace["busy_seconds"].values())


def test_progress_is_told_after_every_batch(table: Path, tmp_path: Path) -> None:
    news: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, note: str = "") -> None:
        news.append((done, total, note))

    extract(config(table, tmp_path / "a.zarr"), progress)
    batches = [each for each in news if each[0]]
    assert [done for done, _, _ in batches] == [2, 4, 5, 7, 9, 10, 12]
    assert {total for _, total, _ in batches} == {12}
    assert [batches[index][2].rpartition(", ")[2] for index in (2, -1)] == ["1 bad", "2 bad"]
    assert "bad" not in batches[0][2]


# --- again ---------------------------------------------------------------------------------------


def test_running_again_does_nothing(
    stores: Make, table: Path, out: Path, batch_sizes: list[int]
) -> None:
    extract(config(table, out))
    assert sum(batch_sizes) == 10  # two batches are a bad image alone
    batch_sizes.clear()
    report = extract(config(table, out))
    assert (report.extracted, report.images, batch_sizes) == (0, 12, [])
    assert report.bad.keys() == pictures.BAD_FILES.keys()
    assert_same_bytes(out, stores(out.suffix))


def test_a_mended_image_is_picked_up(stores: Make, own_table: Path, out: Path) -> None:
    extract(config(own_table, out))
    mend(own_table, "04.jpg")
    report = extract(config(own_table, out))
    assert report.extracted == 1
    assert report.bad.keys() == {"09.png"}
    mended, bad, got = (
        arrays(stores(out.suffix, bad=False)),
        arrays(stores(out.suffix)),
        arrays(out),
    )
    for name, values in got.items():
        assert values[:9].tobytes() == mended[name][:9].astype(values.dtype).tobytes(), name
        assert values[9:].tobytes() == bad[name][9:].astype(values.dtype).tobytes(), name


def test_mending_one_image_keeps_the_features_of_a_neighbour_that_has_gone(
    stores: Make, own_table: Path, out: Path
) -> None:
    extract(config(own_table, out))
    mend(own_table, "04.jpg")
    (own_table.parent / "03.png").unlink()
    report = extract(config(own_table, out))
    assert "04.jpg" not in report.bad
    assert "03.png" not in report.bad
    want = arrays(stores(out.suffix, bad=False))["features"][:5]
    np.testing.assert_array_equal(arrays(out)["features"][:5], want)


def test_labels_that_changed_are_saved_and_nothing_is_extracted(own_table: Path, out: Path) -> None:
    extract(config(own_table, out))
    own_table.write_text(own_table.read_text().replace("cow", "elk"))
    assert extract(config(own_table, out)).extracted == 0
    assert load_labels(labels_path(out)).classes == ("cat", "dog", "elk")


# --- stopped -------------------------------------------------------------------------------------


def test_a_bad_image_stops_the_run_if_asked_and_the_same_call_goes_on(
    stores: Make, own_table: Path, out: Path
) -> None:
    mend(own_table, "04.jpg")
    strict = config(own_table, out, on_error="raise")
    with pytest.raises(MlcError, match=r"09\.png: not an image: .*--on-error skip"):
        extract(strict)
    assert (arrays(out)["status"] != schema.PENDING).tolist() == [True] * 5 + [False] * 7
    with pytest.raises(MlcError, match=r"unfinished, 5 of 12"):
        FeatureStore(out)
    mend(own_table, "09.png")
    assert extract(strict).extracted == 7
    assert_same_bytes(out, stores(out.suffix, bad=False))


def test_a_bad_image_that_was_skipped_stops_a_strict_run(
    stores: Make, table: Path, out: Path
) -> None:
    extract(config(table, out))
    with pytest.raises(MlcError, match=r"04\.jpg: broken image"):
        extract(config(table, out, on_error="raise"))
    assert_same_bytes(out, stores(out.suffix))


@pytest.mark.parametrize(("images", "kept"), [(1, 0), (4, 0), (5, 5), (9, 5), (10, 10)])
def test_ctrl_c_keeps_finished_shards_and_the_same_call_goes_on(
    stores: Make, table: Path, out: Path, images: int, kept: int
) -> None:
    message = interrupted(config(table, out), images)
    assert message.startswith(f"{out}: stopped, {kept} of 12 images are kept")
    done = arrays(out)["status"] != schema.PENDING
    assert done.tolist() == [True] * kept + [False] * (12 - kept)
    assert extract(config(table, out)).extracted == 12 - kept
    assert_same_bytes(out, stores(out.suffix))


def test_ctrl_c_leaves_no_lock(table: Path, out: Path) -> None:
    interrupted(config(table, out))
    with writer_lock(out):
        assert out.exists()


def test_an_error_of_the_backbone_keeps_finished_shards(
    stores: Make, table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    features = Backbone.features

    def out_of_memory(self: Backbone, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return features(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "features", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            extract(config(table, out))
    assert extract(config(table, out)).extracted == 7
    assert_same_bytes(out, stores(out.suffix))


def test_resuming_keeps_the_recorded_batches(
    stores: Make, table: Path, out: Path, batch_sizes: list[int]
) -> None:
    interrupted(config(table, out))
    batch_sizes.clear()
    extract(config(table, out, batch_size=4, shard_rows=12))
    assert batch_sizes == [2, 2, 2]  # and one of a bad image alone
    with FeatureStore(out) as store:
        assert store.batch_size == BATCH_SIZE
    assert_same_bytes(out, stores(out.suffix))


# --- another request -----------------------------------------------------------------------------


def test_other_settings_at_the_same_path_are_an_error(stores: Make, table: Path, out: Path) -> None:
    extract(config(table, out))
    with pytest.raises(MlcError, match=r"size_px: stored 64, asked 32.*--out"):
        extract(config(table, out, size_px=32))
    with pytest.raises(
        MlcError, match=r"features: stored \['pooled:float32'\], asked \['pooled:float16'\]"
    ):
        extract(config(table, out, features="pooled:float16"))
    assert_same_bytes(out, stores(out.suffix))


def test_fewer_images_are_there_already_and_the_labels_of_the_others_are_kept(
    own_table: Path, out: Path
) -> None:
    extract(config(own_table, out))
    own_table.write_text("".join(own_table.read_text().splitlines(keepends=True)[:-1]))
    report = extract(config(own_table, out))
    assert (report.extracted, report.images, report.rows) == (0, 11, 12)
    assert len(load_labels(labels_path(out))) == 12


def test_a_store_that_is_being_written_is_left_alone(table: Path, out: Path) -> None:
    with writer_lock(out), pytest.raises(MlcError, match="another process is writing"):
        extract(config(table, out))
    assert not out.exists()


def test_the_default_path_carries_the_key_and_is_found_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = config(table, None, workers=1)
    report = extract(asked)
    digest = load_backbone(asked).key.digest()
    assert report.path == Path(f"features/csv-photos-test_resnet-64-{digest}.zarr")
    assert extract(asked).extracted == 0
    others = [
        config(table, None, **each) for each in ({"format": "hdf5"}, {"features": "pooled:float16"})
    ]
    paths = {report.path, *(extract(each).path for each in others)}
    assert len(paths) == 3
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("a.zarr", {"format": "hdf5"}, r"a\.zarr does not end in \.h5, as --format hdf5 asks"),
        ("a.npz", {}, r"a\.npz: a store's name ends in \.h5 or \.zarr"),
        ("a.h5", {"format": "hdf"}, r"unknown format 'hdf'; did you mean 'hdf5'"),
        ("a.h5", {"batch_size": 0}, r"batch_size: should be at least 1, got 0"),
        ("a.h5", {"shard_rows": -1}, r"shard_rows: should be at least 1, got -1"),
        ("a.h5", {"workers": 0}, r"workers: should be at least 1, got 0"),
        ("a.h5", {"size_px": 0}, r"size_px: should be at least 1, got 0"),
        ("a.h5", {"root": Path("nowhere")}, r"nowhere: not one of the 12 listed images is there"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_an_error_before_anything_is_made(
    table: Path, tmp_path: Path, name: str, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(MlcError, match=expected):
        extract(config(table, tmp_path / name, **settings))
    assert list(tmp_path.iterdir()) == []


# --- pieces --------------------------------------------------------------------------------------


def test_batches_cover_the_rows_and_none_is_too_large() -> None:
    batches = batches_of(range(5, 12), 3)
    assert batches == [range(5, 8), range(8, 11), range(11, 12)]


def test_workers_are_as_asked_else_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_count(3) == 3
    monkeypatch.setattr(config_module, "usable_cores", lambda: 3)
    assert worker_count(None) == 3


def test_decoding_is_a_few_batches_ahead_and_no_more(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[range] = []
    ahead: list[int] = []
    submit, infer = stream._submit, stream._infer
    monkeypatch.setattr(stream, "_submit", lambda *args: submitted.append(args[3]) or submit(*args))
    monkeypatch.setattr(
        stream, "_infer", lambda *args: ahead.append(len(submitted) - len(ahead)) or infer(*args)
    )
    extract(config(table, tmp_path / "a.zarr"))
    assert len(submitted) == 7
    lanes = share_cores().count
    assert stream.BATCHES_AHEAD < max(ahead) <= stream.BATCHES_AHEAD + 1 + lanes


def test_fast_decoding_makes_another_store_that_can_be_compared(
    table: Path, tmp_path: Path
) -> None:
    exact, fast = (
        extract(config(table, tmp_path / f"{decode}.zarr", decode=decode)).path
        for decode in ("pillow", "fast")
    )
    with FeatureStore(fast) as store:
        assert store.key["decode"] == "fast"
    with pytest.raises(MlcError, match="decode: stored 'pillow', asked 'fast'"):
        extract(config(table, exact, decode="fast"))
    labels_path(exact).unlink()  # of 12 images no head is trained
    compared = compare(exact, fast)
    assert compared.arrays[0].cost.cosine_worst > 0.9


def test_an_unknown_decoder_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match="decode"):
        extract(config(table, tmp_path / "a.zarr", decode="quick"))
