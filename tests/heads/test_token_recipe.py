"""Training heads of tokens beyond plain Adam: every way that should give the same numbers does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_store import LAYER, table_of, write_arrays
from token_runs import POOLED, TOKENS, same, token_values, trained

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.datasets.labels import save_labels
from mlc.heads import checkpoint as checkpoints
from mlc.heads import train_tokens as training
from mlc.heads.config import TrainConfig, check_config
from mlc.heads.evaluate import evaluate_on_store
from mlc.heads.fit import fit, prepare, read_inputs
from mlc.heads.grid import SweepConfig
from mlc.heads.inputs import LabelsConfig
from mlc.heads.order import stream_seed
from mlc.heads.run_folder import Run
from mlc.heads.sweep import sweep
from mlc.heads.token_training import TokenTraining
from mlc.report.summary import print_run
from mlc.store.reader import labels_path

SMALL = {"head": "q2l", "ffn_dim": 16, "lr": 3e-3, "batch_size": 20}
RECIPE = {**SMALL, "schedule": "one-cycle", "ema_decay": 0.9, "token_dropout": 0.25}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of tokens on a grid of 2 x 2, in two views."""
    path, values = tmp_path_factory.mktemp("grid") / "two.zarr", token_values(views=2)
    features = ("pooled:float32", "tokens:float32")
    arrays = {POOLED: values.mean(axis=2), TOKENS: values}
    write_arrays(
        path,
        [str(each) for each in table_of().image_id],
        arrays,
        (),
        features=features,
        grids={LAYER: (2, 2)},
    )
    save_labels(table_of(), labels_path(path))
    return path


def lines(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def weights(run: Run) -> dict[str, Any]:
    return dict(run.head().state_dict())


def far(one: Run, other: Run) -> float:
    """Return the largest difference of two runs' weights."""
    states = weights(one), weights(other)
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


@pytest.mark.parametrize("head", ["q2l", "ml-decoder"])
def test_a_decoder_learns_and_is_evaluated_as_it_was(
    store: Path, tmp_path: Path, head: str
) -> None:
    sizes = {"hidden_dim": 16, "attention_heads": 2, "ffn_dim": 32, "dropout": 0.0}
    run = trained(
        store, tmp_path / "run", **{**SMALL, **sizes, "head": head, "epochs": 40, "lr": 1e-2}
    )
    chance = 100 * float(table_of().part("test").true.mean())
    assert run.results["test"]["mAP"] > chance + 10
    assert lines(run)[-1]["loss"] < lines(run)[0]["loss"]
    got = evaluate_on_store(run, LabelsConfig(), "test", device="cpu")
    assert got["mAP"] == pytest.approx(run.results["test"]["mAP"], abs=1e-9)


def test_a_run_is_the_same_twice_and_dropout_is_of_its_seed(store: Path, tmp_path: Path) -> None:
    first = trained(store, tmp_path / "first", **RECIPE)
    torch.manual_seed(99)  # other numbers of torch's make no difference, and are left alone
    before = torch.random.get_rng_state()
    assert same(first, trained(store, tmp_path / "second", **RECIPE))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(first, trained(store, tmp_path / "other", **RECIPE, seed=1))
    without = trained(store, tmp_path / "without", **{**RECIPE, "dropout": 0.0})
    assert far(first, without) > 1e-3


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize(
    "loss",
    [
        {},
        {
            "loss": "ll_cp",
            "labels": "single-positive",
            "knobs": {"delta": 0.1},
            "micro_batch": None,
        },
        {"loss": "em_apl", "labels": "single-positive", "knobs": {"warm_up": 1}},
        {"loss": "crisp", "labels": "single-positive", "micro_batch": None},
    ],
    ids=["asl", "ll_cp", "em_apl", "crisp"],
)
def test_what_was_killed_goes_on_to_the_same_numbers(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    loss: dict[str, Any],
) -> None:
    settings = {**RECIPE, "epochs": 4, "view_augment": True, "checkpoint_minutes": 1e-9, **loss}
    whole = trained(store, tmp_path / "whole", **settings)
    taken, deaths, original = [], [True], TokenTraining.step

    def dies(self: TokenTraining, number: int) -> None:
        if number == step and deaths:
            deaths.pop()
            raise Killed
        taken.append(number)
        original(self, number)

    monkeypatch.setattr(TokenTraining, "step", dies)
    with pytest.raises(Killed):
        trained(store, tmp_path / "resumed", **settings)
    assert taken == list(range(step))
    resumed = trained(store, tmp_path / "resumed", **settings)
    assert same(whole, resumed)
    assert taken == list(range(12))  # nothing was done twice
    assert not list(tmp_path.glob(".*training*"))


def test_a_state_of_another_training_is_not_gone_on_from(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RECIPE, "epochs": 2, "checkpoint_minutes": 1e-9}
    monkeypatch.setattr("mlc.heads.fit.discard_checkpoint", lambda configs: None)
    trained(store, tmp_path / "run", **{**settings, "lr": 1e-2})
    state = checkpoints.checkpoint_path(tmp_path / "run")
    assert state is not None
    assert state.is_file()
    want = trained(store, tmp_path / "want", **settings)
    assert same(want, trained(store, tmp_path / "run", **settings))
    state.write_bytes(b"not a state")
    assert same(want, trained(store, tmp_path / "run", **settings))


def test_parts_of_a_batch_add_up_to_it(store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "dropout": 0.0, "epochs": 3}
    whole = trained(store, tmp_path / "whole", **settings)
    for size in (1, 7, 20):
        parts = trained(store, tmp_path / f"parts{size}", **settings, micro_batch=size)
        scores = [run.scores()["logits"] for run in (whole, parts)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-3)
        assert lines(parts)[-1]["loss"] == pytest.approx(lines(whole)[-1]["loss"], rel=1e-4)


def test_heads_in_one_pass_are_those_alone(store: Path, tmp_path: Path) -> None:
    grid = SweepConfig(
        features=store,
        head="q2l",
        losses=("bce", "asl"),
        hidden_dim=(8, 16),
        seeds=(0, 1),
        attention_heads=2,
        batch_size=(20,),
        lr=(3e-3,),
        epochs=2,
        out=tmp_path / "sweep",
        device="cpu",
        schedule="one-cycle",
        ema_decay=0.9,
    )
    swept = sweep(grid)
    assert len(swept.runs) == 8
    assert swept.plan is not None
    assert len(swept.plan.blocks) == 1
    for run in swept.runs:
        config = run.config.model_copy(update={"out": tmp_path / "alone" / run.path.name})
        features, table = read_inputs(config)
        assert same(run, fit(config, features, prepare(config, features, table)))
    assert sweep(grid).plan is None


def test_tokens_are_read_once_for_all_heads_of_a_pass(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], training.TokenReader.read

    def spy(self: Any, batches: Any) -> Any:
        read.extend(batches)
        return original(self, batches)

    monkeypatch.setattr(training.TokenReader, "read", spy)
    settings = {"features": store, "head": "q2l", "epochs": 2, "batch_size": (20,), "device": "cpu"}
    counts = []
    for seeds in ((0,), (0, 1, 2)):
        read.clear()
        sweep(SweepConfig(**settings, losses=("bce",), seeds=seeds, out=tmp_path / str(len(seeds))))
        counts.append(len(read))
    assert counts[0] == counts[1] > 0


def test_the_better_of_head_and_average_is_kept(store: Path, tmp_path: Path) -> None:
    run = trained(store, tmp_path / "run", **RECIPE, epochs=6)
    for line in lines(run):
        assert line["val_mAP"] == max(line["val_mAP_raw"], line["val_mAP_average"])
    best = lines(run)[run.results["best_epoch"] - 1]
    assert best["val_mAP"] == max(line["val_mAP"] for line in lines(run))
    assert run.results["val"]["mAP"] == pytest.approx(best["val_mAP"], abs=1e-9)


def test_patience_ends_training(store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 30, "lr": 0.05}
    long = [line["val_mAP"] for line in lines(trained(store, tmp_path / "long", **settings))]
    short = [
        line["val_mAP"]
        for line in lines(trained(store, tmp_path / "short", **settings, patience=2))
    ]
    assert short == long[: len(short)]
    best = int(np.argmax(short))
    assert len(short) == best + 1 + 3 < 30  # the third epoch that is no better is the last


def test_the_scale_of_the_loss_hardly_matters_to_adam(store: Path, tmp_path: Path) -> None:
    plain = trained(store, tmp_path / "plain", **SMALL, epochs=1)
    scaled = trained(store, tmp_path / "scaled", **SMALL, epochs=1, loss_scale=1000.0)
    assert 0 < far(plain, scaled) < 1e-2
    assert lines(scaled)[0]["loss"] == pytest.approx(lines(plain)[0]["loss"], rel=1e-3)


def test_selecting_on_test_trains_on_all_else_and_says_so(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = trained(store, tmp_path / "val", **SMALL)
    run = trained(store, tmp_path / "test", **SMALL, select_on="test")
    assert "selected_on" not in held_out.results
    assert run.results["selected_on"] == "test"
    assert (held_out.results["train_images"], run.results["train_images"]) == (70, 100)
    assert run.results["val"]["mAP"] == run.results["test"]["mAP"] == run.results["selection_mAP"]
    for split in ("train", "test"):
        evaluate_on_store(run, LabelsConfig(), split, device="cpu")
    with pytest.raises(MlcError, match="was trained on the images of val too"):
        evaluate_on_store(run, LabelsConfig(), "val", device="cpu")
    print_run(run)
    main(["evaluate", str(run.path)])
    main(["report", str(tmp_path), "--resamples", "100"])
    assert capsys.readouterr().out.count("Selected on the test images") == 3
    main(["report", str(held_out.path), "--resamples", "100"])
    assert "Selected on the test images" not in capsys.readouterr().out


def test_dropped_tokens_are_drawn_anew_for_each_image_and_step(store: Path) -> None:
    config = TrainConfig(features=store, **RECIPE, device="cpu")
    features, table = read_inputs(config)
    tokens = prepare(config, features, table).splits["train"].of_tokens()
    batches = [each for epoch in training._batches(config, tokens) for each in epoch]
    kept = [training._kept_tokens(config, tokens, batch) for batch in batches[:2]]
    assert [each.shape for each in kept if each is not None] == [(20, 3), (20, 3)]
    assert not torch.equal(*kept)
    for row in kept[0]:
        assert len(set(row.tolist())) == 3
    assert len({tuple(sorted(row.tolist())) for row in kept[0]}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"head": "linear", "hidden_dim": 8},
            r"hidden_dim: is of heads that attend \(ml-decoder, q2l\)",
        ),
        ({"head": "attention-pool", "ffn_dim": 8}, "ffn_dim: is of heads that attend"),
        ({"head": "linear", "ema_decay": 0.9}, "ema_decay: is of heads of tokens"),
        (
            {"head": "q2l", "loss": "epr", "micro_batch": 2},
            "micro_batch: the loss epr is of a whole",
        ),
        (
            {"head": "q2l", "precision": "bfloat16"},
            "precision: bfloat16 is ten times slower on a CPU",
        ),
        ({"head": "q2l", "token_dropout": 1.0}, "token_dropout: should be at least 0 and below 1"),
        ({"head": "q2l", "dropout": 1.0}, "dropout: should be at least 0 and below 1, got 1.0"),
        ({"head": "q2l", "decoder_layers": 0}, "decoder_layers: should be at least 1, got 0"),
        ({"head": "q2l", "encoder_layers": 101}, "encoder_layers: should be at most 100, got 101"),
        ({"head": "ml-decoder", "encoder_layers": 3}, r"encoder_layers: is of Query2Label \(q2l\)"),
        ({"head": "q2l", "query_groups": 3}, r"query_groups: is of ML-Decoder \(ml-decoder\)"),
        ({"head": "q2l", "patience": 0}, "patience: should be at least 1, got 0"),
        ({"head": "q2l", "loss_scale": 0.0}, "loss_scale: should be a positive number, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MlcError, match=message):
        check_config(TrainConfig(**settings, device="cpu"))


def test_heads_that_no_memory_holds_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"head: 1 of q2l take [\d,.]+ GB of memory to train, of"):
        trained(store, tmp_path / "run", **{**SMALL, "hidden_dim": 4_000_000})


def test_a_head_that_diverged_leaves_nothing(store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "lr": 3e37, "epochs": 3, "checkpoint_minutes": 1e-9}
    with pytest.raises(MlcError, match="training diverged"):
        trained(store, tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


def test_a_stopped_training_says_that_it_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenTraining, "step", stop)
    with pytest.raises(KeyboardInterrupt, match="run: stopped; the same command goes on"):
        trained(store, tmp_path / "run", **SMALL)


def test_streams_of_random_numbers_are_apart() -> None:
    seeds = [stream_seed(*each) for each in ((0,), (0, 0), (0, 0, 0), (7,), (0, 7), (0, 7, 0))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= each < 2**63 for each in seeds)
