"""Training on images with a frozen backbone is training on features, however it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from finetune_data import SETTINGS, write_photos
from safetensors.numpy import load_file

from mlc.extract.config import ExtractConfig
from mlc.extract.run import extract
from mlc.finetune.command import finetune_config
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.run import finetune
from mlc.heads.config import TrainConfig
from mlc.heads.fit import fit, prepare, read_inputs
from mlc.heads.run_folder import BACKBONE as BACKBONE_FILE
from mlc.heads.run_folder import Run, read_run
from mlc.models.evaluate import evaluate_run

OF_BACKBONE = ("backbone", "random_weights", "size_px", "device")
BACKBONE = {name: SETTINGS[name] for name in OF_BACKBONE}
SLIM = {"head": "q2l", "hidden_dim": 16, "ffn_dim": 16, "attention_heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of photos whose channels that are bright are their labels."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def store(photos: Path) -> Path:
    path = photos.parent.parent / "features.zarr"
    config = {"features": ("pooled", "tokens:float32"), "engine": "torch"} | BACKBONE
    extract(ExtractConfig(data=str(photos), out=path, **config))
    return path


def cached(store: Path, out: Path, **settings: Any) -> Run:
    config = TrainConfig(features=store, out=out, device="cpu", **settings)
    features, table = read_inputs(config)
    return fit(config, features, prepare(config, features, table))


def tuned(photos: Path, out: Path, **settings: Any) -> Run:
    done = finetune(FinetuneConfig(data=str(photos), out=out, **(BACKBONE | settings)))
    assert done is not None
    assert not done.bad
    return done.run


def same(one: Run, other: Run, tolerance: float = 1e-4) -> None:
    """Assert that two runs have the same head, epochs and scores."""
    states = [run.head().state_dict() for run in (one, other)]
    for name, value in states[0].items():
        assert np.allclose(value, states[1][name], rtol=0, atol=tolerance), name
    lines = [[line["val_mAP"] for line in history(run)] for run in (one, other)]
    assert lines[0] == pytest.approx(lines[1], abs=1e-3)
    first, second = (run.scores() for run in (one, other))
    assert first["image_id"].tolist() == second["image_id"].tolist()
    assert np.allclose(first["logits"], second["logits"], rtol=0, atol=10 * tolerance)


def equal_models(one: Run, other: Run) -> bool:
    """Return whether two models are the same bit for bit."""
    states = [
        load_file(run.path / "head.safetensors") | load_file(run.path / BACKBONE_FILE)
        for run in (one, other)
    ]
    return all(np.array_equal(value, states[1][name]) for name, value in states[0].items())


def history(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "bce", "labels": "full"},
        {"loss": "bce", "labels": "full", "weight_decay": 0.3},
        {"loss": "role", "labels": "single-positive", "knobs": {"expected_positives": 1.7}},
        {"loss": "epr", "labels": "single-positive", "knobs": {"expected_positives": 1.7}},
        {"loss": "ll_cp", "labels": "single-positive", "knobs": {"delta": 0.1}},
        {"loss": "em_apl", "labels": "single-positive", "knobs": {"warm_up": 1}},
        {"loss": "crisp", "labels": "single-positive"},
        {"loss": "gr", "labels": "single-positive", "head": "attention-pool"},
        {"loss": "ll_cp", "labels": "single-positive", "head": "attention-pool"},
        {"loss": "em_apl", "knobs": {"warm_up": 1}, "head": "attention-pool"},
        {"loss": "asl", "labels": "full", **SLIM, "schedule": "one-cycle", "ema_decay": 0.9},
        {"loss": "bce", "labels": "full", "head": "attention-pool"},
    ],
    ids=[
        *("bce", "decay", "role", "epr", "ll_cp", "em_apl", "crisp"),
        *("gr-tokens", "ll_cp-tokens", "em_apl-tokens", "q2l", "attention-pool"),
    ],
)
def test_a_frozen_backbone_is_the_cached_head(
    photos: Path, store: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"lr": 1e-2, "batch_size": 8, "epochs": 3} | settings
    on_features = cached(store, tmp_path / "cached", **settings)
    on_images = tuned(photos, tmp_path / "tuned", freeze=("*",), **settings)
    same(on_features, on_images)
    assert on_images.is_finetuned
    assert not on_features.is_finetuned
    if settings["loss"] == "role":
        first, second = on_features.estimates(), on_images.estimates()
        assert first[0].tolist() == second[0].tolist()
        assert np.allclose(first[1], second[1], atol=1e-4)
        assert first[1].std() > 0.1


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 5}], ids=["whole", "parts"])
def test_a_batch_in_parts_is_the_batch(
    photos: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {"lr": 1e-3, "batch_size": 12, "epochs": 2, "frozen_batch_norm": True, "flip": True}
    whole = tuned(photos, tmp_path / "whole", loss="bce", labels="full", **given)
    other = given | (settings or {"workers": 4, "activation_checkpointing": True})
    parts = tuned(photos, tmp_path / "parts", loss="bce", labels="full", **other)
    same(whole, parts)
    still = tuned(photos, tmp_path / "still", loss="bce", **given | {"freeze": ("*",)})
    moved, unmoved = (load_file(run.path / BACKBONE_FILE) for run in (whole, still))
    assert not np.allclose(moved["conv1.0.weight"], unmoved["conv1.0.weight"], atol=1e-3)


def test_workers_change_nothing(photos: Path, tmp_path: Path) -> None:
    given = {"lr": 1e-3, "epochs": 1, "flip": True, "rand_augment": True, "cutout": 0.4}
    one, four = (tuned(photos, tmp_path / str(n), workers=n, **given) for n in (1, 4))
    assert equal_models(one, four)
    plain = tuned(photos, tmp_path / "plain", **given | {"cutout": 0.0, "rand_augment": False})
    assert not equal_models(one, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "bce", "labels": "full", "ema_decay": 0.9},
        {"loss": "role", "labels": "single-positive", "knobs": {"expected_positives": 1.7}},
        {"loss": "bce", "labels": "full", "micro_batch": 2, **SLIM},
    ],
    ids=["bce", "role", "q2l in parts"],
)
def test_two_processes_are_one(photos: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    # 9 images a step: one process has 5, the other 4; and of 12 val images, 6 each.
    given = {"lr": 1e-3, "batch_size": 9, "epochs": 2, "frozen_batch_norm": True, "flip": True}
    given |= settings | {"data": str(photos)} | BACKBONE
    alone = tuned(photos, tmp_path / "alone", **{k: v for k, v in given.items() if k != "data"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(given))
    together(2, "--config", str(recipe), "--out", str(tmp_path / "together"))
    same(alone, read_run(tmp_path / "together"))


@pytest.mark.slow
def test_more_processes_than_images_of_a_step_are_refused(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", str(photos), "--backbone", "test_resnet", "--random-weights", "--size", "32")
    done = together(2, *flags, "--batch-size", "1", "--out", str(tmp_path / "run"), check=False)
    assert done.returncode != 0
    assert "batch_size: 1 images of a step are too few for 2 processes" in done.stderr


def together(count: int, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``mlc finetune`` in several processes, as a user would."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, f"--nproc-per-node={count}", "-m", "mlc", "finetune", "--end-to-end", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, check=check, capture_output=True, text=True, timeout=300
    )


def test_it_starts_where_the_cached_head_ended(photos: Path, store: Path, tmp_path: Path) -> None:
    settings = {"lr": 1e-2, "batch_size": 8, "epochs": 4, "labels": "single-positive"}
    knobs = {"expected_positives": 1.7}
    head = cached(store, tmp_path / "head", loss="role", knobs=knobs, **settings)
    flags = {"data": str(photos), "lr": 1e-12, "epochs": 1, "frozen_batch_norm": True}
    config = finetune_config(None, (), flags | {"out": str(tmp_path / "on")}, init=head.path)
    assert (config.loss, config.backbone, config.size_px) == ("role", "test_resnet", 32)
    done = finetune(config)
    assert done is not None
    assert np.allclose(head.scores()["logits"], done.run.scores()["logits"], atol=1e-4)
    before, after = head.estimates()[1], done.run.estimates()[1]
    assert np.allclose(before.clip(1e-5, 1 - 1e-5), after, atol=1e-5)


def test_it_is_a_run_like_any_other(photos: Path, tmp_path: Path) -> None:
    run = tuned(photos, tmp_path / "run", lr=1e-3, epochs=1)
    moved = run.path.rename(tmp_path / "moved")
    metrics, bad = evaluate_run(read_run(moved), {"data": str(photos)})
    assert not bad
    assert metrics == run.results["test"]
    again, _ = evaluate_run(read_run(moved), {})  # on the images that it was trained on
    assert again == metrics


@pytest.mark.slow
def test_a_grid_is_trained_by_two_processes(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", str(photos), "--backbone", "test_resnet", "--random-weights", "--size", "32")
    out = tmp_path / "grid"
    together(2, *flags, "--lr", "1e-3,1e-4", "--epochs", "1", "--out", str(out))
    assert len([path for path in out.iterdir() if (path / "results.json").is_file()]) == 2


@pytest.mark.slow
def test_two_processes_train_on_a_layer_in_the_middle(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", str(photos), "--backbone", "test_resnet", "--random-weights", "--size", "32")
    middle = ("--set", "layer=layer3", "--set", "frozen_batch_norm=true", "--epochs", "2")
    together(2, *flags, *middle, "--out", str(tmp_path / "run"))
    assert read_run(tmp_path / "run").results["test"]["mAP"] > 0
