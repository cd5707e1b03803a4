"""Heads of tokens, from a store to a run folder: the numbers are the store's, wherever they lie."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_store import IDS, WIDTH, table_of, write, write_arrays
from token_runs import BIT_EQUAL, POOLED, TOKENS, same, token_values, trained

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.datasets.labels import save_labels
from mlc.heads.config import TrainConfig
from mlc.heads.evaluate import evaluate_on_store
from mlc.heads.fit import prepare, read_inputs
from mlc.heads.inputs import LabelsConfig
from mlc.heads.metrics import mean_ap
from mlc.heads.run_folder import FILES, Run
from mlc.heads.tokens import TokenReader
from mlc.heads.train import probabilities
from mlc.store import schema
from mlc.store.batches import open_batches
from mlc.store.reader import FeatureStore, labels_path

BAD = IDS[0], IDS[101]  # of the training split and the test split


def written(path: Path, values: np.ndarray, dtype: str = "float32") -> Path:
    """Write a store of tokens, whose pooled features are their mean, and its labels."""
    scale = np.abs(values).max(axis=(0, 1, 2)) / 127
    write_arrays(
        path,
        IDS,
        {POOLED: values.mean(axis=2), TOKENS: values},
        BAD,
        features=("pooled:float32", f"tokens:{dtype}"),
        scales={TOKENS: scale} if dtype == "int8" else None,
    )
    save_labels(table_of(), labels_path(path))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tokens") / "one.zarr", token_values())


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tokens") / "views.h5", token_values(views=3))


def logits_by_hand(run: Run, store: Path, view: int) -> np.ndarray:
    """Return the logits of a run's head on the test split in one view, from the numbers stored."""
    backend = schema.format_of(store).open(store)
    values = backend.read(TOKENS)[:, view].astype(np.float32)
    if backend.attributes()["key"]["features"][1] == "tokens:int8":
        values *= backend.read(schema.scale(TOKENS))
    backend.close()
    rows = [IDS.index(each) for each in run.scores()["image_id"].tolist()]
    logits: np.ndarray = run.head()(torch.from_numpy(values[rows])).detach().numpy()
    return logits


# --- the run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_a_run_is_whole_and_scores_what_is_stored(tmp_path: Path, dtype: str, suffix: str) -> None:
    path = written(tmp_path / f"store{suffix}", token_values(), dtype)
    run = trained(path, tmp_path / "run", epochs=5)
    assert {each.name for each in run.path.iterdir()} == FILES
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 5
    assert set(run.head().state_dict()) == {"weight", "bias", "query"}
    assert run.head().query.abs().max() > 0
    scores, test = run.scores(), table_of().part("test")
    kept = ~np.isin(test.image_id, BAD)
    assert scores["image_id"].tolist() == test.image_id[kept].tolist()
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(scores["true"], test.true[kept])
    by_hand = logits_by_hand(run, path, 0)
    np.testing.assert_allclose(scores["logits"], by_hand, rtol=1e-5, atol=1e-5)
    expected = float(mean_ap(probabilities(scores["logits"]), test.true[kept]))
    assert run.results["test"]["mAP"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_head_learns_from_every_dtype(tmp_path: Path, dtype: str) -> None:
    path = written(tmp_path / "store.zarr", token_values(noise=0.1), dtype)
    run = trained(path, tmp_path / "run", epochs=25, lr=0.05)
    chance = 100 * float(table_of().part("test").true.mean())
    assert run.results["test"]["mAP"] > chance + 25


def test_a_run_is_the_same_twice_and_another_with_another_seed(store: Path, tmp_path: Path) -> None:
    first = trained(store, tmp_path / "first")
    assert same(first, trained(store, tmp_path / "second"))
    for name in ("seed", "order_seed"):
        assert not same(first, trained(store, tmp_path / name, **{name: 1}))


@pytest.mark.parametrize("loss", ["an", "bce", "epr"])
def test_losses_train_it(store: Path, tmp_path: Path, loss: str) -> None:
    run = trained(store, tmp_path / loss, loss=loss)
    losses = re.findall(r'"loss": ([-+.\de]+)', (run.path / "metrics.jsonl").read_text())
    assert float(losses[-1]) < float(losses[0])


def test_the_best_epoch_is_kept(store: Path, tmp_path: Path) -> None:
    run = trained(store, tmp_path / "long", epochs=8, lr=0.3)
    maps = re.findall(r'"val_mAP": ([\d.]+)', (run.path / "metrics.jsonl").read_text())
    best = int(np.argmax([float(each) for each in maps])) + 1
    assert run.results["best_epoch"] == best < 8
    assert run.results["val"]["mAP"] == pytest.approx(float(maps[best - 1]), abs=1e-9)
    as_long = trained(store, tmp_path / "short", epochs=best, lr=0.3)
    assert (run.path / BIT_EQUAL[0]).read_bytes() == (as_long.path / BIT_EQUAL[0]).read_bytes()


def test_weight_decay_spares_the_bias(store: Path, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 200, "lr": 1e-3}  # one step
    plain = trained(store, tmp_path / "plain", **settings).head().state_dict()
    decayed = trained(store, tmp_path / "decayed", weight_decay=10.0, **settings)
    state = decayed.head().state_dict()
    assert torch.equal(state["bias"], plain["bias"])
    assert not torch.equal(state["weight"], plain["weight"])


# --- where tokens are held -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"view_augment": True, "eval_views": "mean"}])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_off_the_disk_a_run_is_the_one_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, settings: dict
) -> None:
    path, places = written(tmp_path / "store.zarr", token_values(views=2), dtype), []

    def spy(*arguments: Any, **named: Any) -> Any:
        places.append(arguments[3])
        few = {"read_ahead_bytes": 5 * 64 * 4 * WIDTH * 4}  # of its ring, so that it is used again
        return open_batches(*arguments, **named, **few)

    monkeypatch.setattr("mlc.heads.tokens.open_batches", spy)
    held = trained(path, tmp_path / "held", **settings)
    monkeypatch.setattr("mlc.heads.tokens.place_for", lambda *_: ("disk", ""))
    assert same(held, trained(path, tmp_path / "read", **settings))
    assert places == ["ram", "disk"]


# --- views ---------------------------------------------------------------------------------------


def test_views_that_are_the_same_change_nothing(tmp_path: Path) -> None:
    values = token_values()
    path = written(tmp_path / "store.zarr", np.repeat(values, 2, axis=1))
    plain = trained(path, tmp_path / "plain")
    assert same(plain, trained(path, tmp_path / "augmented", view_augment=True))
    assert same(plain, trained(written(tmp_path / "one.zarr", values), tmp_path / "one"))


def test_views_that_differ_are_drawn(views: Path, tmp_path: Path) -> None:
    plain = trained(views, tmp_path / "plain")
    augmented = trained(views, tmp_path / "augmented", view_augment=True)
    assert not same(plain, augmented)
    assert same(augmented, trained(views, tmp_path / "again", view_augment=True))
    for run in (plain, augmented):  # whatever it trained on, it is scored in the first
        by_hand = logits_by_hand(run, views, 0)
        np.testing.assert_allclose(run.scores()["logits"], by_hand, rtol=1e-5, atol=1e-5)


def test_the_mean_of_views_is_of_their_logits(views: Path, tmp_path: Path) -> None:
    run = trained(views, tmp_path / "mean", eval_views="mean")
    by_hand = np.mean([logits_by_hand(run, views, view) for view in range(3)], axis=0)
    np.testing.assert_allclose(run.scores()["logits"], by_hand, rtol=1e-5, atol=1e-5)
    assert not np.allclose(by_hand, logits_by_hand(run, views, 0), atol=1e-2)


@pytest.mark.parametrize("settings", [{"view_augment": True}, {"eval_views": "mean"}])
def test_one_view_is_too_few_for_what_takes_several(
    store: Path, tmp_path: Path, settings: dict
) -> None:
    with pytest.raises(MlcError, match="has one view of each image"):
        trained(store, tmp_path / "run", **settings)


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_store_without_tokens_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=f"has no {TOKENS}.*mlc extract with --features tokens"):
        trained(write(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "what"), [({"loss": "role"}, "loss role"), ({"solver": "lbfgs"}, "solver lbfgs")]
)
def test_what_does_not_go_with_tokens_is_refused(
    store: Path, tmp_path: Path, settings: dict, what: str
) -> None:
    with pytest.raises(MlcError, match=f"attention-pool does not go with the {what}"):
        trained(store, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def to_number(stored: np.ndarray) -> None:
    stored[0, 0, 1, 2] += 1


def to_nan(stored: np.ndarray) -> None:
    stored[0, 0, 1, 2] = np.nan


@pytest.mark.parametrize("spoil", [to_number, to_nan])
@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("row", [50, 90, 129])
def test_a_damaged_token_of_any_split_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: int,
    place: str,
    spoil: Callable[[np.ndarray], None],
) -> None:
    path = written(tmp_path / "store.zarr", token_values())
    backend = schema.format_of(path).open(path, write=True)
    stored = backend.read(TOKENS, row, row + 1)
    spoil(stored)
    backend.write(TOKENS, row, stored)
    backend.close()
    monkeypatch.setattr("mlc.heads.tokens.place_for", lambda *_: (place, ""))
    # An epoch of 69 images in batches of 23 drops none.
    with pytest.raises(MlcError, match=rf"damaged, {TOKENS} of image {IDS[row]} "):
        trained(path, tmp_path / "run", batch_size=23)
    assert not (tmp_path / "run").exists()
    if spoil is to_number:
        trained(path, tmp_path / "run", check=False)


def test_a_rate_that_is_too_high_is_told(store: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match="training diverged"):
        trained(store, tmp_path / "run", lr=3e37)


# --- what is made of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("eval_views", ["first", "mean"])
def test_a_run_is_evaluated_as_it_was(views: Path, tmp_path: Path, eval_views: str) -> None:
    run = trained(views, tmp_path / "run", eval_views=eval_views)
    for split in ("val", "test"):
        got = evaluate_on_store(run, LabelsConfig(), split, device="cpu")
        assert got["mAP"] == pytest.approx(run.results[split]["mAP"], abs=1e-9)
    other = {"first": "mean", "mean": "first"}[eval_views]
    asked = evaluate_on_store(run, LabelsConfig(eval_views=other), device="cpu")
    assert asked["mAP"] != run.results["test"]["mAP"]


def test_a_report_has_heads_of_tokens_beside_linear_ones(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = [
        trained(store, tmp_path / head, head=head).results["test"]["mAP"]
        for head in ("attention-pool", "linear")
    ]
    assert maps[0] != maps[1]
    main(["report", str(tmp_path), "--all", "--resamples", "100"])
    out = capsys.readouterr().out
    assert "attention-pool" in out
    for each in maps:
        assert f"{each:.2f}" in out


def test_a_reader_yields_the_units_that_were_asked_for(views: Path) -> None:
    config = TrainConfig(features=views, head="attention-pool", device="cpu", view_augment=True)
    features, table = read_inputs(config)
    tokens = prepare(config, features, table).splits["val"].of_tokens()
    assert (tokens.width, tokens.views) == (WIDTH, 3)
    reader = TokenReader.open([tokens], torch.device("cpu"), 4, views=3)
    places, seen = np.array([5, 0, 5]), np.array([2, 0, 1])
    (batch,) = reader.read([tokens.units(places, seen)])
    with FeatureStore(views) as store:
        rows = [store.image_id.tolist().index(table.part("val").image_id[each]) for each in places]
    expected = token_values(views=3)[rows, seen]
    np.testing.assert_array_equal(batch.numpy(), expected)
    assert "held in memory" in reader.note
