"""StoreDataset: the features and labels of the right images, in any order and any process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_store import IDS, LAYER, SPLIT, WIDTH, table_of, write_arrays
from store_content import SUFFIXES
from torch.utils.data import DataLoader

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, save_labels
from mlc.heads.dataset import StoreDataset
from mlc.store import schema
from mlc.store.reader import FeatureStore, labels_path

POOLED, TOKENS = schema.feature(LAYER, "pooled"), schema.feature(LAYER, "tokens")
BAD = (IDS[3], IDS[40], IDS[75])  # two of the training split, one of the validation split
SCALE = np.geomspace(0.01, 0.1, WIDTH).astype(np.float32)
ORDER = np.random.default_rng(5).permutation(len(IDS))  # of the rows; the labels are in another


@pytest.fixture(params=SUFFIXES)
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / f"store{request.param}"


def numbers() -> dict[str, np.ndarray]:
    """Return pooled features (N, 2, WIDTH) and tokens (N, 2, 4, WIDTH), no two the same."""
    generator = np.random.default_rng(0)
    return {
        POOLED: generator.standard_normal((len(IDS), 2, WIDTH)).astype(np.float32),
        TOKENS: generator.standard_normal((len(IDS), 2, 4, WIDTH)).astype(np.float32),
    }


def written(path: Path, tokens: str = "float16", table: LabelTable | None = None) -> Path:
    """Write a store, its rows not in the order of its labels."""
    write_arrays(
        path,
        [IDS[each] for each in ORDER],
        {name: values[ORDER] for name, values in numbers().items()},
        BAD,
        features=("pooled:float32", f"tokens:{tokens}"),
        scales={TOKENS: SCALE} if tokens == "int8" else None,
    )
    save_labels(table_of() if table is None else table, labels_path(path))
    return path


def expected(path: Path, kind: str, image_ids: list[str], view: int) -> np.ndarray:
    """Return float32 features of some images, as FeatureArray reads them."""
    with FeatureStore(path) as store:
        array = store.features(None, kind)
        rows = [store.image_id.tolist().index(each) for each in image_ids]
    stored = array.read(array.units_of(np.array(rows), view)).astype(np.float32)
    return stored if array.scale is None else stored * array.scale


def good(split: str) -> list[str]:
    return [each for each, of in zip(IDS, SPLIT, strict=True) if of == split and each not in BAD]


def seen(loader: DataLoader[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return everything that a loader gives."""
    features, labels = zip(*loader, strict=True)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("pooled", "float16"), ("tokens", "float32"), ("tokens", "float16"), ("tokens", "int8")],
)
def test_it_is_the_good_images_of_a_split_as_they_are_stored(
    path: Path, kind: str, tokens: str, view: int, split: str
) -> None:
    dataset = StoreDataset(written(path, tokens), split, kind=kind, view=view)
    ids = good(split)
    assert dataset.image_id.tolist() == ids
    assert len(dataset) == len(ids)
    features, labels = seen(DataLoader(dataset, 16))
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected(path, kind, ids, view))
    table = table_of()
    rows = [table.image_id.tolist().index(each) for each in ids]
    np.testing.assert_array_equal(labels, table.observed[rows])
    assert dataset.classes == table.classes


@pytest.mark.parametrize(("tokens", "atol"), [("float32", 0), ("float16", 2e-3), ("int8", 0.051)])
def test_numbers_are_near_those_that_were_written(path: Path, tokens: str, atol: float) -> None:
    dataset = StoreDataset(written(path, tokens), "test", kind="tokens", view=1)
    values = numbers()[TOKENS][[IDS.index(each) for each in good("test")], 1]
    kept = np.clip(values, -127 * SCALE, 127 * SCALE) if tokens == "int8" else values
    np.testing.assert_allclose(seen(DataLoader(dataset, 8))[0], kept, rtol=0, atol=atol)


def test_an_image_is_the_same_alone_and_in_a_batch(path: Path) -> None:
    dataset = StoreDataset(written(path), "test", kind="tokens")
    batch = dataset.__getitems__([7, 2, 2])
    for index, (features, labels) in zip([7, 2, 2], batch, strict=True):
        alone, its_labels = dataset[index]
        assert alone.shape == (4, WIDTH)
        assert torch.equal(alone, features)
        assert torch.equal(its_labels, labels)
        assert torch.equal(its_labels, dataset.labels[index])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_shuffled_batches_hold_each_image_once_with_its_labels(path: Path, context: Any) -> None:
    dataset = StoreDataset(written(path, "int8"), kind="tokens")
    workers = {"num_workers": 2, "multiprocessing_context": context, "timeout": 60}
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, 16, shuffle=True, generator=order, **(workers if context else {}))
    features, labels = seen(loader)
    place = {values.tobytes(): index for index, (values, _) in enumerate(map(as_arrays, dataset))}
    places = [place[each.tobytes()] for each in features]
    assert places != sorted(places)
    assert sorted(places) == list(range(len(dataset)))
    np.testing.assert_array_equal(labels, dataset.labels.numpy()[places])


def as_arrays(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0].numpy(), pair[1].numpy()


def test_images_without_features_or_labels_are_left_out(path: Path) -> None:
    kept = np.arange(len(IDS)) % 3 > 0
    table = table_of().rows(kept)
    more = np.array([f"more{each}" for each in range(len(table))])
    both = LabelTable(
        **{
            **vars(table),
            "image_id": np.concatenate([more, table.image_id]),
            "file": np.concatenate([more, table.file]),
            "observed": np.concatenate([-table.observed, table.observed]),
            "true": None,
            "split": np.concatenate([table.split, table.split]),
        }
    )
    dataset = StoreDataset(written(path, table=both), "train")
    ids = [each for each in good("train") if kept[IDS.index(each)]]
    assert dataset.image_id.tolist() == ids
    features, labels = seen(DataLoader(dataset, 16))
    np.testing.assert_array_equal(features, expected(path, "pooled", ids, 0))
    np.testing.assert_array_equal(labels, table_of().observed[[IDS.index(each) for each in ids]])


@pytest.mark.parametrize("check", [True, False])
def test_damage_is_an_error_where_it_is_looked_for(path: Path, check: bool) -> None:
    backend = schema.format_of(written(path)).open(path, write=True)
    row = ORDER.tolist().index(IDS.index(good("train")[5]))
    stored = backend.read(TOKENS, row, row + 1)
    stored[0, 0, 1, 1] += 1
    backend.write(TOKENS, row, stored)
    backend.close()
    dataset = StoreDataset(path, kind="tokens", check=check)
    if check:
        with pytest.raises(MlcError, match=rf"damaged, {TOKENS} of image {IDS[6]}"):
            dataset[5]
    else:
        assert np.array_equal(dataset[5][0].numpy(), stored[0, 0].astype(np.float32))
    dataset[4]


def test_what_a_store_lacks_is_named(path: Path) -> None:
    written(path)
    with pytest.raises(MlcError, match="did you mean 'final'"):
        StoreDataset(path, layer="finale")
    with pytest.raises(MlcError, match="mlc extract with --features prefix"):
        StoreDataset(path, kind="prefix")


@pytest.mark.parametrize("view", [-1, 2])
def test_a_view_that_is_not_there_is_refused(path: Path, view: int) -> None:
    with pytest.raises(MlcError, match=rf"got {view}; count from 0"):
        StoreDataset(written(path), view=view)


def test_a_split_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(MlcError, match="did you mean 'train'"):
        StoreDataset(written(path), "trian")
