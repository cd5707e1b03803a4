"""stream_features(): views, rows left out, photos that are known, and features that are broken."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.extract import backbone as backbone_module
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.images import decode_image, hash_content
from mlc.extract.lanes import Lanes
from mlc.extract.stream import NOT_FINITE, FeatureBatch, stream_features

SIZE_PX = 64
ROWS = len(pictures.FILES)
BATCHES = [range(0, 4), range(4, 8), range(8, ROWS)]
BAD_ROWS = {pictures.FILES.index(name) for name in pictures.BAD_FILES}
VIEWS = ("orig", "flip", "center")
POOLED = "pre_logits/pooled"


@cache
def backbone(**settings: Any) -> Backbone:
    values = {"backbone": "test_resnet", "random_weights": True, "device": "cpu"}
    return load_backbone(BackboneConfig(**values, size_px=SIZE_PX, **settings))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve photos, two of them broken; not to be changed."""
    folder = tmp_path_factory.mktemp("photos")
    pictures.write_data(folder)
    return [folder / name for name in pictures.FILES]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass from now on."""
    sizes: list[int] = []
    features = Backbone.features

    def spy(self: Backbone, pixels: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        sizes.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", spy)
    return sizes


def streamed(
    files: list[Path], made: Backbone | None = None, batches: list[range] = BATCHES, **options: Any
) -> list[FeatureBatch]:
    return list(stream_features(made or backbone(), files, batches, 3, **options))


def joined(batches: list[FeatureBatch], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(batch, name) for batch in batches])


def features(batches: list[FeatureBatch], name: str = POOLED) -> NDArray[np.float32]:
    return torch.cat([batch.features[name] for batch in batches]).numpy()


# --- views ---------------------------------------------------------------------------------------


def test_each_view_is_what_the_backbone_gives_of_it(files: list[Path]) -> None:
    made = backbone(views=VIEWS, features="pooled,tokens", layers="pre_logits,layer2")
    batches = streamed(files, made)
    good = [row for row in range(ROWS) if row not in BAD_ROWS]
    squares = [
        decode_image(files[row].read_bytes(), size_px=SIZE_PX, interpolation="bilinear")
        for row in good
    ]
    orig = made.features(np.stack(squares))
    flip = made.features(np.stack([square[:, ::-1] for square in squares]))
    for name, item in made.arrays.items():
        got = features(batches, name)
        assert got.shape == (ROWS, len(VIEWS), *item)
        np.testing.assert_allclose(got[good, 0], orig[name].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(got[good, 1], flip[name].numpy(), rtol=0, atol=1e-5)
        assert np.abs(got[good, 2] - got[good, 0]).max() > 1e-3


def test_the_first_view_is_the_same_with_others_beside_it(files: list[Path]) -> None:
    alone, beside = streamed(files), streamed(files, backbone(views=VIEWS))
    np.testing.assert_array_equal(features(alone)[:, 0], features(beside)[:, 0])
    assert features(alone).shape[1] == 1


def test_bad_images_have_their_reasons(files: list[Path]) -> None:
    batches = streamed(files)
    assert set(np.flatnonzero(joined(batches, "error") != "").tolist()) == BAD_ROWS
    assert set(np.flatnonzero(~joined(batches, "decoded")).tolist()) == BAD_ROWS
    want = [hash_content(file.read_bytes()) for file in files]
    assert joined(batches, "content_hash").tolist() == want


# --- rows left out, photos that are known --------------------------------------------------------


def test_rows_that_are_not_wanted_are_not_read(files: list[Path], passes: list[int]) -> None:
    everything = streamed(files)
    passes.clear()
    wanted = np.zeros(ROWS, dtype=np.bool_)
    wanted[[1, 2, 9, 10]] = True
    read = [file if wanted[row] else file.with_name("gone") for row, file in enumerate(files)]
    batches = streamed(read, wanted=wanted)
    assert [batch.rows for batch in batches] == BATCHES
    assert passes == [4, 4]  # a batch of the same images, or none
    assert joined(batches, "decoded").nonzero()[0].tolist() == [1, 2, 10]
    assert joined(batches, "error")[9].startswith("not an image")
    for name in ("error", "content_hash"):
        assert (joined(batches, name)[~wanted] == "").all()
    np.testing.assert_array_equal(features(batches)[[1, 2, 10]], features(everything)[[1, 2, 10]])


def test_a_batch_that_does_not_run_has_zeros(files: list[Path], passes: list[int]) -> None:
    made = backbone(features="pooled,tokens", views=VIEWS)
    nothing = np.zeros(ROWS, dtype=np.bool_)
    batch = streamed(files, made, wanted=nothing)[0]
    assert passes == []
    assert batch.seconds == {"read": 0.0, "decode": 0.0, "infer": 0.0}
    assert {name: tuple(each.shape) for name, each in batch.features.items()} == {
        name: (4, len(VIEWS), *item) for name, item in made.arrays.items()
    }
    assert not any(each.any() for each in batch.features.values())
    assert all(each.dtype == torch.float32 for each in batch.features.values())


def test_a_batch_of_bad_images_does_not_run(files: list[Path], passes: list[int]) -> None:
    batch = streamed(files, batches=[range(9, 10)])[0]
    assert passes == []
    assert batch.error[0].startswith("not an image")


def test_a_known_photo_is_hashed_and_not_decoded(files: list[Path], passes: list[int]) -> None:
    everything = streamed(files)
    passes.clear()
    known = {hash_content(files[row].read_bytes()) for row in (0, 1, 2, 3, 5)}
    batches = streamed(files, known=known.__contains__)
    decoded = joined(batches, "decoded")
    assert (~decoded).nonzero()[0].tolist() == sorted({0, 1, 2, 3, 5} | BAD_ROWS)
    assert passes == [4, 4]
    for name in ("error", "content_hash"):
        np.testing.assert_array_equal(joined(batches, name), joined(everything, name))
    np.testing.assert_array_equal(features(batches)[decoded], features(everything)[decoded])


# --- features that are not finite ----------------------------------------------------------------


def breaking(
    monkeypatch: pytest.MonkeyPatch, value: float, is_broken: Callable[[int], bool]
) -> None:
    """Let the backbone give a value that is none, for the images of these numbers in a batch."""
    given = Backbone.features

    def broken(self: Backbone, pixels: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        found = given(self, pixels)
        with torch.inference_mode():
            for index in filter(is_broken, range(len(pixels))):
                found[POOLED][index, 3] = value
        return found

    monkeypatch.setattr(Backbone, "features", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("views", [("orig",), VIEWS])
def test_an_image_without_finite_features_is_a_bad_one(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, value: float, views: tuple[str, ...]
) -> None:
    made = backbone(features="pooled,tokens", views=views)
    sound = streamed(files, made)
    breaking(monkeypatch, value, {1, 2}.__contains__)
    batches = streamed(files, made)
    error, decoded = joined(batches, "error"), joined(batches, "decoded")
    assert np.flatnonzero(error == NOT_FINITE).tolist() == [1, 2, 5, 6, 10]  # 9 is no image
    assert decoded[[1, 2, 5, 6, 10]].all()
    good = np.flatnonzero(error == "")
    for name in made.arrays:
        got = features(batches, name)
        assert np.isfinite(got).all()
        assert not got[[1, 2, 5, 6, 9, 10]].any()
        np.testing.assert_array_equal(got[good], features(sound, name)[good])


def test_finite_features_whose_sum_is_not_are_good(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, 3e38, lambda _: True)
    batches = streamed(files)
    assert set(np.flatnonzero(joined(batches, "error") != "").tolist()) == BAD_ROWS
    assert (features(batches)[0, 0] == np.float32(3e38)).any()


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_backbone_without_any_finite_features_stops(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    batches = [range(start, start + batch_size) for start in range(0, ROWS, batch_size)]
    breaking(monkeypatch, float("nan"), lambda _: True)
    expected = (
        r"test_resnet with random weights: none of the first \d images has finite features, in "
        r"float32: the weights are broken or the precision is too low; .*precision=float32"
    )
    with pytest.raises(MlcError, match=expected):
        streamed(files, batches=batches)


def test_a_backbone_that_gave_finite_features_goes_on(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Backbone.features
    first = decode_image(files[0].read_bytes(), size_px=SIZE_PX, interpolation="bilinear")

    def broken(self: Backbone, pixels: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        found = given(self, pixels)
        if not np.array_equal(pixels[0], first):
            with torch.inference_mode():
                found[POOLED][:] = float("nan")
        return found

    monkeypatch.setattr(Backbone, "features", broken)
    batches = streamed(files)
    assert (joined(batches, "error")[[5, 6, 7, 8, 10, 11]] == NOT_FINITE).all()


def test_a_few_bad_rows_that_are_tried_again_are_no_broken_backbone(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.zeros(ROWS, dtype=np.bool_)
    wanted[[1, 2]] = True
    breaking(monkeypatch, float("nan"), lambda _: True)
    batches = streamed(files, batches=[range(0, 8)], wanted=wanted)
    assert np.flatnonzero(joined(batches, "error") == NOT_FINITE).tolist() == [1, 2]


# --- lanes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "folded"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_do_not_depend_on_the_lanes(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, engine: str, count: int
) -> None:
    made = backbone(features="pooled,tokens", layers="pre_logits,layer2", engine=engine)
    monkeypatch.setattr(backbone_module, "share_cores", lambda: Lanes(1, 1))
    want = streamed(files, made)
    monkeypatch.setattr(backbone_module, "share_cores", lambda: Lanes(count, 1))
    got = streamed(files, made)
    assert [batch.rows for batch in got] == BATCHES
    for name in made.arrays:
        np.testing.assert_array_equal(features(got, name), features(want, name))


def test_batches_come_in_order_though_later_ones_are_done_before(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    want, given = features(streamed(files)), Backbone.features
    first = decode_image(files[0].read_bytes(), size_px=SIZE_PX, interpolation="bilinear")
    others = Semaphore(0)

    def late(self: Backbone, pixels: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        if np.array_equal(pixels[0], first):
            assert all(others.acquire(timeout=30) for _ in BATCHES[1:])
            return given(self, pixels)
        found = given(self, pixels)
        others.release()
        return found

    monkeypatch.setattr(Backbone, "features", late)
    monkeypatch.setattr(backbone_module, "share_cores", lambda: Lanes(2, 1))
    batches = streamed(files)
    assert [batch.rows for batch in batches] == BATCHES
    np.testing.assert_array_equal(features(batches), want)


@pytest.mark.parametrize("batches", [1, 3])
def test_torch_has_its_threads_back_afterwards(files: list[Path], batches: int) -> None:
    before = torch.get_num_threads()
    stream = stream_features(backbone(), files, BATCHES, 1)
    for _ in range(batches):
        next(stream)
    stream.close()
    assert torch.get_num_threads() == before
