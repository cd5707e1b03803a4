"""mlc extract: several backbones and sizes in one pass, and the engine that runs them."""

from pathlib import Path

import pictures
import pytest

from mlc.cli import main
from mlc.store.reader import FeatureStore

EXTRACT = ("extract", "--data", "photos/data.csv", "--random-weights", "--device", "cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = pictures.write_data(tmp_path / "photos")
    table.rename(table.with_name("data.csv"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stores(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Backbone, size and engine of each store, by its name without the digest."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".zarr", ".h5"):
            with FeatureStore(path) as store:
                key = store.key
            found[path.stem.rpartition("-")[0] or path.name] = (
                key["backbone"],
                key["size_px"],
                key["engine"],
            )
    return found


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*EXTRACT, *arguments])
    assert exit_.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_several_backbones_have_a_store_each(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*EXTRACT, "--backbone", "test_resnet,test_vit", "--size", "64,96"])
    assert stores(here / "features") == {
        "csv-data-test_resnet-64": ("test_resnet", 64, "folded"),
        "csv-data-test_vit-96": ("test_vit", 96, "torch"),
    }
    printed = capsys.readouterr()
    assert printed.out.count("store: features/csv-data-test_") == 2
    assert printed.out.count("images/s") == 1
    assert "12 images to extract into 2 stores: " in printed.err
    main([*EXTRACT, "--backbone", "test_resnet,test_vit", "--size", "64,96"])
    assert capsys.readouterr().out.count("nothing to do, all 12 images were there") == 2


def test_one_backbone_at_several_sizes_and_places(here: Path) -> None:
    main([*EXTRACT, "--backbone", "test_resnet", "--size", "32,64", "--out", "a.zarr,b.h5"])
    assert stores(here) == {
        "a.zarr": ("test_resnet", 32, "folded"),
        "b.h5": ("test_resnet", 64, "folded"),
    }


@pytest.mark.parametrize("engine", ["torch", "folded"])
def test_an_engine_by_name_is_in_the_key(here: Path, engine: str) -> None:
    main([*EXTRACT, "--backbone", "test_resnet", "--size", "32", "--engine", engine])
    assert stores(here / "features") == {"csv-data-test_resnet-32": ("test_resnet", 32, engine)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--engine", "tensorrt"), "unknown engine 'tensorrt'"),
        (("--size", "64,x"), "expected ints with commas between, got '64,x'"),
        (
            ("--backbone", "test_resnet,test_vit", "--size", "64,96,32"),
            "backbone: should be one value, or one for each of the 3 of size_px, got 2",
        ),
        (
            ("--backbone", "test_resnet,test_resnet", "--size", "64"),
            "is asked for more than once; name each store once",
        ),
        (("--backbone", "test_resnet,test_rasnet"), "unknown backbone 'test_rasnet'"),
        (
            ("--backbone", "test_resnet,test_vit", "--out", "a.zarr"),
            "a.zarr: is asked for more than once",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in mistake(capsys, *arguments)
    assert not (here / "features").exists()
