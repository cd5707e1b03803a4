"""What an extraction will take is told before it begins, and refused if it cannot be had."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import torch
from numpy.typing import NDArray
from store_content import arrays

from mlc.configs.errors import MlcError
from mlc.extract import forecast
from mlc.extract.backbone import Backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.forecast import Forecast
from mlc.extract.lanes import Lanes
from mlc.extract.run import extract
from mlc.store import schema

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
FLOAT32 = ("pooled:float32", "tokens:float32")
INT8 = ("pooled:float16", "tokens:int8")
OTHER_DISK = "name a folder on another disk with --out"


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_data(tmp_path_factory.mktemp("data"))


def run(csv: Path, out: Path, **settings: Any) -> list[Forecast]:
    """Extract, and return what was foretold."""
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "random_weights": True,
        "size_px": 64,
        "device": "cpu",
        "batch_size": 1,
        "shard_rows": 5,
        "workers": 1,
        "features": ("pooled", "tokens"),
    }
    told: list[Forecast] = []
    extract(ExtractConfig(data=str(csv), out=out, **(values | settings)), tell=told.append)
    return told


def feature_bytes(path: Path) -> int:
    kinds = (schema.POOLED, schema.TOKENS, schema.PREFIX)
    stored = arrays(path)
    return sum(each.nbytes for name, each in stored.items() if name.split("/")[-1] in kinds)


def set_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))


# --- space ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_forecast_has_the_exact_bytes_of_the_features(
    csv: Path, tmp_path: Path, suffix: str
) -> None:
    told, stored = [], []
    for name, features in (("wide", FLOAT32), ("narrow", INT8)):
        out = tmp_path / f"{name}{suffix}"
        (each,) = run(csv, out, features=features, views=("orig", "flip"))
        told.append(each.store_bytes)
        stored.append(feature_bytes(out))
    # What is small of an image does not depend on the dtypes: the rest is features to the byte.
    assert told[0] - told[1] == stored[0] - stored[1] > 0
    assert told[0] > stored[0]
    assert told[0] - stored[0] < 12 * 700 + 3 * 12 * 4096 + 1


def test_the_files_of_a_folder_fit_into_what_was_foretold(csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.zarr"
    (told,) = run(csv, out)
    chunks = [each for each in out.rglob("*") if each.is_file() and each.name != "zarr.json"]
    assert feature_bytes(out) < sum(each.stat().st_size for each in chunks) <= told.store_bytes


def test_images_that_are_there_are_not_counted(csv: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(csv.read_text().splitlines(keepends=True)[:5]))
    out = tmp_path / "photos.zarr"
    told = run(few, out, root=csv.parent) + run(csv, out)
    assert [each.images for each in told] == [4, 8]
    assert run(csv, out) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_forecast_alone_makes_nothing(csv: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / "folder" / f"photos{suffix}"
    (told,) = run(csv, out, forecast=True)
    assert (told.images, told.seconds) == (12, None)
    assert list(tmp_path.iterdir()) == []
    assert run(csv, out)[0].store_bytes == told.store_bytes


@pytest.mark.parametrize("alone", [True, False])
def test_what_does_not_fit_is_refused_and_nothing_is_made(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    out = tmp_path / "new" / "photos.zarr"
    (told,) = run(csv, out, forecast=True)
    set_free(monkeypatch, told.store_bytes - 1)
    with pytest.raises(MlcError, match=r"photos\.zarr: 12 images need .* MB, .* MB are free there"):
        run(csv, out, forecast=alone)
    assert list(tmp_path.iterdir()) == []
    set_free(monkeypatch, told.store_bytes)
    (fits,) = run(csv, out, forecast=True)
    assert fits.free_bytes == fits.store_bytes == told.store_bytes


@pytest.mark.parametrize(
    ("features", "advice"),
    [
        (("pooled", "tokens"), "store fewer bytes with --features tokens:int8, or "),
        (("tokens:float32",), "store fewer bytes with --features tokens:int8, or "),
        (("pooled",), "store half of it with --features pooled:float16, or "),
        (("pooled", "tokens:int8"), "store half of it with --features pooled:float16, or "),
        (("pooled:float16",), ""),
        (INT8, ""),
    ],
)
def test_a_refusal_says_how_it_would_fit(
    csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: tuple[str, ...],
    advice: str,
) -> None:
    set_free(monkeypatch, 1000)
    with pytest.raises(MlcError, match=f"are free there; {advice}{OTHER_DISK}$"):
        run(csv, tmp_path / "photos.zarr", features=features)


# --- time ----------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass from now on."""
    sizes: list[int] = []
    features = Backbone.features

    def spy(self: Backbone, pixels: NDArray[Any]) -> dict[str, torch.Tensor]:
        sizes.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", spy)
    return sizes


@pytest.mark.parametrize(
    ("lanes", "limit_seconds", "ran"),
    [(1, 100.0, 3), (1, 5.0, 3), (1, 2.0, 2), (2, 100.0, 6), (2, 2.0, 3)],
)
def test_a_large_set_is_timed_without_the_first_batch_of_each_lane(
    monkeypatch: pytest.MonkeyPatch, lanes: int, limit_seconds: float, ran: int
) -> None:
    seconds: list[float] = []

    def stream(_: object, __: object, batches: list[range], ___: int) -> Iterator[list[Any]]:
        for number, rows in enumerate(batches):
            seconds.append(10.0 if number < lanes else 3.0)
            yield [SimpleNamespace(rows=rows)]

    monkeypatch.setattr(forecast, "stream_each", stream)
    monkeypatch.setattr(forecast, "perf_counter", lambda: sum(seconds))
    monkeypatch.setattr(forecast, "PROBE_BATCHES", 3)
    monkeypatch.setattr(forecast, "PROBE_SECONDS", limit_seconds)
    backbone = SimpleNamespace(lanes=Lanes(lanes, 1))
    planned: Any = SimpleNamespace(backbone=backbone, layout=SimpleNamespace(batch_size=2))
    files = [Path(str(index)) for index in range(100)]
    assert forecast._probe([planned], files, 1) == 100 / 2 * 3.0
    assert len(seconds) == ran


def test_a_small_set_is_not_timed(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    monkeypatch.setattr(forecast, "PROBE_BATCHES", 4)
    (told,) = run(csv, tmp_path / "photos.zarr", forecast=True)
    assert (told.seconds, batches) == (None, [])


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (Forecast(12, 400_000, 5_000_000_000, None), "12 images to extract: 0.4 MB; 5.0 GB are"),
        (Forecast(1234, 10**9, 10**6, 65.4), "1,234 images to extract: 1.0 GB, about 1 min 05 s; "),
        (Forecast(9, 1, 1, 7325.0), "about 2 h 02 min; 0.0 MB are free"),
    ],
)
def test_a_forecast_in_words(told: Forecast, text: str) -> None:
    assert text in str(told)
