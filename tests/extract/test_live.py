"""Cached equals live: what a store holds is what the backbone gives now, to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

from mlc.configs.errors import MlcError
from mlc.extract.config import ExtractConfig
from mlc.extract.live import Live, compare_live
from mlc.extract.origin import Where
from mlc.extract.run import extract
from mlc.store import schema
from mlc.store.checksums import row_crc32c
from mlc.store.units import crc32c

SUFFIXES = [backend.suffix for backend in schema.FORMATS.values()]
FLOAT32 = ("pooled:float32", "tokens:float32")
BACKBONES = {"test_resnet": 64, "test_vit": None, "torchvision:swin_t": 64}
POOLED, TOKENS, PREFIX = "pre_logits/pooled", "pre_logits/tokens", "pre_logits/prefix"
# Largest (1 - cosine of the worst item, relative root mean square) of untrained backbones here.
FLOAT16_COST = (1e-6, 5e-4)
INT8_COST = (1e-4, 0.02)


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=SUFFIXES)
def out(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / f"photos{request.param}"


def run(csv: Path, out: Path, **settings: Any) -> Path:
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "random_weights": True,
        "size_px": 64,
        "device": "cpu",
        "batch_size": 4,
        "shard_rows": 8,
        "workers": 2,
        "features": FLOAT32,
    }
    extract(ExtractConfig(data=str(csv), out=out, **(values | settings)))
    return out


def compared(path: Path, images: int = 4, where: Where | None = None) -> dict[str, Live]:
    return {each.array: each for each in compare_live(path, images, where or Where(device="cpu"))}


def shift(path: Path, array: str, row: int, by: float) -> None:
    """Add to the numbers of a row, as a model that went wrong would: all checksums are good."""
    backend = schema.format_of(path).open(path, write=True)
    stored = backend.read(array, row, row + 1)
    stored += stored.dtype.type(by)
    backend.write(array, row, stored)
    backend.write(schema.crc(array), row, crc32c(stored[0])[None])
    names = list(schema.feature_arrays(backend))
    counts = [each(name) for name in names for each in (schema.crc, schema.clipped)]
    small = {each: backend.read(each, row, row + 1) for each in (*schema.ROW_ARRAYS, *counts)}
    backend.write(schema.ROW_CRC32C, row, row_crc32c(small, names))
    backend.close()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_float32_is_identical_and_costs_nothing(csv: Path, out: Path, backbone: str) -> None:
    found = compared(run(csv, out, backbone=backbone, size_px=BACKBONES[backbone]))
    assert found.keys() == {POOLED, TOKENS} | ({PREFIX} if backbone == "test_vit" else set())
    for each in found.values():
        assert (each.units, each.identical) == (4, 4)
        assert (each.cost.max_difference, each.cost.relative_rms) == (0.0, 0.0)
        assert each.cost.cosine_worst == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize(
    ("dtype", "limits"), [("float16", FLOAT16_COST), ("int8", INT8_COST)], ids=["float16", "int8"]
)
def test_smaller_dtypes_are_identical_when_encoded_alike_and_cost_little(
    csv: Path, out: Path, backbone: str, dtype: str, limits: tuple[float, float]
) -> None:
    features = ("pooled:float16", f"tokens:{dtype}")
    found = compared(
        run(csv, out, backbone=backbone, size_px=BACKBONES[backbone], features=features)
    )
    for array, each in found.items():
        assert (each.units, each.identical) == (4, 4)
        cosine, rms = FLOAT16_COST if array == POOLED else limits
        assert 1 - each.cost.cosine_worst < cosine
        assert 0 < each.cost.relative_rms < rms
        assert each.cost.max_difference > 0


def test_all_views_of_all_good_images_are_compared(csv: Path, out: Path) -> None:
    run(csv, out, views=("orig", "flip"))
    told: list[tuple[int, int]] = []
    found = compare_live(out, 12, Where(), lambda done, total, note="": told.append((done, total)))
    assert [(each.array, each.units, each.identical) for each in found] == [
        (POOLED, 20, 20),
        (TOKENS, 20, 20),
    ]
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("images", "units"), [(1, 4), (4, 4), (5, 7), (8, 7), (9, 10), (99, 10)])
def test_images_are_spread_over_the_store_in_whole_batches(
    csv: Path, out: Path, images: int, units: int
) -> None:
    # Rows 4 and 9 are bad. Two batches are the first, of rows 0 to 3, and the last, 8 to 11.
    assert compared(run(csv, out), images)[POOLED].units == units


@pytest.mark.parametrize("array", [POOLED, TOKENS])
def test_numbers_that_went_wrong_are_not_identical(csv: Path, out: Path, array: str) -> None:
    shift(run(csv, out), array, row=2, by=0.5)
    found = compared(out)
    assert {name: each.identical for name, each in found.items()} == {
        POOLED: 3 if array == POOLED else 4,
        TOKENS: 3 if array == TOKENS else 4,
    }
    assert found[array].cost.max_difference == pytest.approx(0.5, abs=1e-5)
    assert found[array].cost.cosine_worst < 0.9999


def test_a_step_of_int8_is_noticed(csv: Path, out: Path) -> None:
    shift(run(csv, out, features=("tokens:int8",)), TOKENS, row=1, by=1)
    assert compared(out)[TOKENS].identical == 3


def test_damage_is_no_difference_but_an_error(csv: Path, out: Path) -> None:
    run(csv, out)
    backend = schema.format_of(out).open(out, write=True)
    backend.write(POOLED, 1, np.zeros_like(backend.read(POOLED, 1, 2)))
    backend.close()
    with pytest.raises(MlcError, match="mlc store repair"):
        compared(out)


def test_photos_are_where_they_were_or_where_they_are_said_to_be(out: Path, tmp_path: Path) -> None:
    csv = pictures.write_data(tmp_path / "data")
    run(csv, out)
    moved = csv.parent.rename(tmp_path / "moved")
    with pytest.raises(MlcError, match=r"00\.png: No such file.*and 3 more.*--root"):
        compared(out)
    assert compared(out, where=Where(root=moved, device="cpu"))[POOLED].identical == 4
    (moved / "02.jpg").write_bytes(pictures.good_file("05.jpg"))
    with pytest.raises(MlcError, match=r"02\.jpg: is another photo now"):
        compared(out, where=Where(root=moved, device="cpu"))


def test_a_store_of_bad_images_has_nothing_to_compare(out: Path, tmp_path: Path) -> None:
    csv = pictures.write_data(tmp_path / "data")
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(each for each in lines if each.split(",")[0] in ("file", "04.jpg")))
    run(csv, out)
    with pytest.raises(MlcError, match="has no good images to compare with"):
        compared(out)
