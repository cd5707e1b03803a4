"""compare(): what narrower numbers cost, in the numbers and in the heads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_store import IDS, features_of, table_of, write_arrays
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.labels import save_labels
from mlc.heads.config import TrainConfig
from mlc.heads.fit import prepare
from mlc.heads.inputs import read_features
from mlc.heads.metrics import mean_ap
from mlc.heads.train import probabilities, train_head
from mlc.report import compare_stores
from mlc.report.compare_stores import array_records, compare, head_records
from mlc.store import schema
from mlc.store.convert import convert
from mlc.store.quantize import cost
from mlc.store.reader import labels_path

CONFIG = TrainConfig(epochs=2, device="cpu")


def numbers(seed: int = 3) -> dict[str, NDArray[np.float32]]:
    """Return pooled features and tokens in two views, whose mean is the pooled ones."""
    pooled = features_of(table_of())[:, None]
    noise = np.random.default_rng(seed).normal(size=(len(pooled), 2, 3, pooled.shape[-1]))
    tokens = (pooled[:, :, None] + noise - noise.mean(axis=2, keepdims=True)).astype(np.float32)
    tokens[5, 1, 0, 0] = 1e4  # an outlier, which int8 clips, in a view that heads do not see
    return {"final/pooled": tokens.mean(axis=2), "final/tokens": tokens}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    features = ("pooled:float32", "tokens:float32")
    path = write_arrays(tmp_path / "first.zarr", IDS, numbers(), bad=IDS[:2], features=features)
    save_labels(table_of(), labels_path(path))
    return path


def mean_aps(path: Path, seeds: tuple[int, ...], **changes: Any) -> list[float]:
    """Return what heads of pooled features score, by the steps of ``mlc train-head``."""
    prepared = prepare(CONFIG, read_features(path), table_of())
    trained = [
        train_head(CONFIG.model_copy(update={"seed": seed, **changes}), prepared.splits)
        for seed in seeds
    ]
    truth = prepared.splits["test"].true
    return [float(mean_ap(probabilities(each.logits["test"]), truth)) for each in trained]


def test_another_format_costs_nothing(first: Path) -> None:
    second = first.with_name("second.h5")
    convert(first, second)
    told: list[tuple[int, int]] = []
    result = compare(
        first, second, CONFIG, progress=lambda done, total, note="": told.append((done, total))
    )
    assert (result.images, result.notes) == (len(IDS) - 2, [])
    for each in result.arrays:
        assert (each.cost.relative_rms, each.cost.max_difference) == (0.0, 0.0)
        assert each.cost.cosine_worst == pytest.approx(1, abs=1e-12)
        assert each.dtypes == ("float32", "float32")
    (heads,) = result.heads
    assert heads.inputs() == "final/pooled"
    assert heads.differences() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(heads.mean_ap[0], mean_aps(first, (0, 1, 2)), rtol=0, atol=1e-9)
    assert told == [(1, 2), (2, 2)] * 2


def test_the_cost_of_narrower_numbers_is_that_of_a_sample(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = first.with_name("second.zarr")
    convert(first, second, ["pooled:float16", "tokens:int8"])
    result = compare(first, second, CONFIG, (5,))
    assert [each.dtypes for each in result.arrays] == [("float32", "float16"), ("float32", "int8")]
    backend = schema.format_of(second).open(second)
    scale = backend.read("final/tokens_scale")
    stored = backend.read("final/tokens") * scale
    clipped = backend.read("final/tokens_clipped")[2:].sum() / stored[2:].size
    backend.close()
    tokens = torch.from_numpy(numbers()["final/tokens"])[2:].flatten(0, 2)
    expected = cost(tokens, torch.from_numpy(stored)[2:].flatten(0, 2))
    found = result.arrays[1]
    assert found.images == len(IDS) - 2
    np.testing.assert_allclose(
        [*vars(found.cost).values()], [*vars(expected).values()], rtol=1e-9, atol=0
    )
    assert found.clipped == (0.0, pytest.approx(clipped))
    assert clipped > 0
    assert 0 < result.arrays[0].cost.relative_rms < found.cost.relative_rms
    (pooled, of_tokens, looking) = result.heads
    assert (looking.head, looking.inputs()) == ("attention-pool", "final/tokens")
    assert pooled.mean_ap[1] == pytest.approx(mean_aps(second, (5,)), abs=1e-9)
    assert of_tokens.inputs() == "the mean of final/tokens"
    # The pooled features of the first store are the means of its tokens.
    np.testing.assert_allclose(of_tokens.mean_ap[0], pooled.mean_ap[0], rtol=0, atol=1e-9)
    monkeypatch.setattr(compare_stores, "SAMPLE_IMAGES", 7)
    sampled = compare(first, second, CONFIG, (5,)).arrays
    assert [each.images for each in sampled] == [7, 7]
    assert sampled[1].cost.max_difference <= found.cost.max_difference
    assert compare(first, second, CONFIG, (5,)).arrays == sampled
    monkeypatch.setattr(compare_stores, "SAMPLE_BYTES", 3 * 2 * 3 * 12 * 4)
    assert [each.images for each in compare(first, second, CONFIG, (5,)).arrays] == [7, 3]


def test_tokens_alone_are_averaged_in_pieces(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = first.with_name("second.zarr")
    convert(first, second, ["tokens:int8"])
    whole = compare(first, second, CONFIG, (0, 1))
    assert whole.notes == [f"only {first} has final/pooled"]
    monkeypatch.setattr(compare_stores, "READ_BYTES", 500)
    assert compare(first, second, CONFIG, (0, 1)).heads == whole.heads
    record, other = head_records(whole)
    assert record["head"] == "linear on the mean of final/tokens"
    assert other["head"] == "attention-pool on final/tokens"
    assert record["seeds"] == "0,1"
    assert record["difference"][0] in "+-"
    assert "±" in record["mAP first"]
    assert array_records(whole)[0]["dtypes"] == "float32 / int8"


def test_rows_are_found_by_their_ids(tmp_path: Path, first: Path) -> None:
    order = np.random.default_rng(0).permutation(len(IDS))[:-4]
    values = {name: each[order] for name, each in numbers().items()}
    second = write_arrays(
        tmp_path / "second.h5", [IDS[row] for row in order], values,
        features=("pooled:float32", "tokens:float32"),
    )  # fmt: skip
    result = compare(first, second, CONFIG, (0,))
    assert result.images == len(set(IDS[2:]) & {IDS[row] for row in order})
    assert [each.cost.max_difference for each in result.arrays] == [0.0, 0.0]
    assert result.heads[0].differences() == [0.0]
    assert result.notes == [
        f"{len(IDS) - 2 - result.images:,} good images of {first} are not in the other",
        f"{len(order) - result.images:,} good images of {second} are not in the other",
    ]


def test_without_labels_there_are_no_heads(first: Path) -> None:
    second = first.with_name("second.zarr")
    convert(first, second, ["pooled:float16"])
    labels_path(first).unlink()
    result = compare(first, second)
    assert result.heads == []
    assert result.notes[-1] == f"no heads were trained: {labels_path(first)} is not there"
    labels = first.with_name("mine.npz")
    save_labels(table_of(), labels)
    with_labels = CONFIG.model_copy(update={"labels_file": labels})
    assert len(compare(first, second, with_labels, (0,)).heads) == 1


@pytest.mark.parametrize(
    ("features", "arrays", "ids", "message"),
    [
        (("pooled:float32",), ("final/pooled",), ["x"] * 1, "none of the images"),
        (("tokens:float32",), ("final/tokens",), IDS, "nothing to compare"),
    ],
)
def test_stores_that_have_nothing_in_common_are_refused(
    tmp_path: Path, features: tuple[str, ...], arrays: tuple[str, ...], ids: list[str], message: str
) -> None:
    one = write_arrays(tmp_path / "a.zarr", IDS, {"final/pooled": numbers()["final/pooled"]})
    values = {name: each[: len(ids)] for name, each in numbers().items() if name in arrays}
    other = write_arrays(tmp_path / "b.zarr", ids, values, features=features)
    with pytest.raises(MlcError, match=message):
        compare(one, other, CONFIG)


def test_other_settings_and_other_photos_are_refused(tmp_path: Path, first: Path) -> None:
    values = {"other/pooled": numbers()["final/pooled"]}
    other = write_arrays(tmp_path / "b.zarr", IDS, values)
    with pytest.raises(MlcError, match=r"made with other settings than .*: layers: \['other'\]"):
        compare(first, other)
    second = first.with_name("second.h5")
    convert(first, second)
    backend = schema.format_of(second).open(second, write=True)
    backend.write("content_hash", 9, np.array(["f" * 32]))
    backend.close()
    with pytest.raises(MlcError, match=rf"other photos than .*\(1, the first is {IDS[9]}\)"):
        compare(first, second)
    with pytest.raises(MlcError, match="leave view options out"):
        compare(first, first, CONFIG.model_copy(update={"view_augment": True}))
