"""The whole chain through the command line, and one clear sentence for each mistake."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import layouts
import made_store
import numpy as np
import pytest
import torch
from PIL import Image

from mlc.cli import cli, main

BACKBONE = ("--backbone", "test_resnet", "--random-weights", "--size", "64")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with COCO's layout below data/coco, a store of each format, and one run."""
    folder = tmp_path_factory.mktemp("work")
    layouts.coco_layout(folder / "data" / "coco")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_ok("extract", *BACKBONE)
        main_ok("extract", *BACKBONE, "--format", "hdf5", "--out", "other/store.h5")
        main_ok("train-head", "--lr", "1e-2", "--out", "runs/bce")
    return folder


@pytest.fixture
def here(work: Path, monkeypatch) -> Path:
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLC_DATA", raising=False)
    return work


def main_ok(*arguments: object) -> None:
    main([str(each) for each in arguments])


def mistake(capsys, *arguments: object) -> str:
    """Return the sentence of a command that must end with exit code 1 and nothing else."""
    with pytest.raises(SystemExit) as exit_:
        main_ok(*arguments)
    assert exit_.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_as_typed_the_commands_find_the_data_and_the_only_store(here, capsys) -> None:
    main_ok("train-head", "--loss", "role", "--epochs", "2", "--out", "runs/role")
    out = capsys.readouterr().out
    assert re.search(r"best epoch \d of 2, val mAP \d", out)
    assert (here / "runs/role/head.safetensors").is_file()


def test_a_run_folder_holds_what_the_design_promises(here) -> None:
    run = here / "runs/bce"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "head.safetensors",
        "metrics.jsonl",
        "scores.npz",
        "results.json",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    assert [line["epoch"] for line in lines] == list(range(1, 26))
    best = max(lines, key=lambda line: line["val_mAP"])
    assert results["best_epoch"] == best["epoch"]
    assert results["val"]["mAP"] == pytest.approx(best["val_mAP"], abs=1e-9)
    scores = np.load(run / "scores.npz")
    assert set(scores) == {"image_id", "logits", "true", "observed"}
    assert scores["logits"].dtype == np.float32
    assert len(scores["image_id"]) == results["test"]["images"] == 59  # one has no annotation


def test_features_of_digits_beat_the_class_prior(here) -> None:
    results = json.loads((here / "runs/bce/results.json").read_text())
    prior = 100 * np.load(here / "runs/bce/scores.npz")["true"].mean()
    assert results["test"]["mAP"] > prior + 5


def test_the_config_of_a_run_repeats_it_exactly(here) -> None:
    main_ok("train-head", "--config", "runs/bce/config.yaml", "--out", "runs/again")
    first, second = (np.load(here / f"runs/{name}/scores.npz") for name in ("bce", "again"))
    np.testing.assert_array_equal(first["logits"], second["logits"])


def test_both_formats_give_the_same_numbers(here) -> None:
    main_ok("train-head", "--features", "other/store.h5", "--lr", "1e-2", "--out", "other-runs/bce")
    first, second = (
        np.load(here / f"{name}/scores.npz")["logits"] for name in ("runs/bce", "other-runs/bce")
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


def test_evaluate_on_the_store_and_on_images_agree_with_the_run(here, capsys) -> None:
    results = json.loads((here / "runs/bce/results.json").read_text())
    main_ok("evaluate", "runs/bce", "--json", "store.json")
    main_ok("evaluate", "runs/bce", "--data", "coco", "--split", "test", "--json", "images.json")
    stored = json.loads(Path("store.json").read_text())
    live = json.loads(Path("images.json").read_text())
    assert stored == results["test"]
    assert live["mAP"] == pytest.approx(stored["mAP"], abs=0.01)
    assert live["images"] == stored["images"]


def test_evaluate_takes_any_store_of_the_backbone(here) -> None:
    main_ok("evaluate", "runs/bce", "--features", "other/store.h5", "--json", "other.json")
    results = json.loads((here / "runs/bce/results.json").read_text())
    assert json.loads(Path("other.json").read_text())["mAP"] == results["test"]["mAP"]


def test_evaluate_takes_other_labels_whatever_the_run_was_trained_with(here) -> None:
    main_ok("train-head", "--data", "coco", "--epochs", "1", "--out", "other-runs/read")
    main_ok("data", "prepare", "--out", "full.npz")
    main_ok("evaluate", "other-runs/read", "--labels-file", "full.npz", "--json", "full.json")
    results = json.loads((here / "other-runs/read/results.json").read_text())
    assert json.loads(Path("full.json").read_text())["mAP"] == results["test"]["mAP"]


def test_a_head_is_refused_its_place_before_it_is_trained(here, capsys) -> None:
    mistake(capsys, "train-head", "--out", "data")
    with pytest.raises(SystemExit):
        main_ok("train-head", "--out", "data")
    assert "epochs" not in capsys.readouterr().err


def test_predict_writes_a_line_for_each_good_image(here, capsys) -> None:
    folder = here / "photos" / "holiday"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (50, 30), "red").save(folder / name)
    (folder / "c.jpg").write_bytes(b"no image")
    main_ok("predict", "runs/bce", "photos", "--classes", "digit 3,digit 0", "--out", "s.csv")
    with Path("s.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["file"] for row in rows] == ["holiday/a.png", "holiday/b.jpg"]
    assert list(rows[0]) == ["file", "digit 3", "digit 0"]
    assert all(0 <= float(row["digit 3"]) <= 1 for row in rows)
    assert "holiday/c.jpg: not an image" in capsys.readouterr().err


def test_sweep_keeps_finished_heads_and_report_compares_them(here, capsys) -> None:
    grid = ("sweep", "--losses", "bce,an", "--lr", "1e-2,1e-3", "--seeds", "0,1", "--epochs", "3")
    main_ok(*grid, "--vary", "order", "--out", "grid")
    first = capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in Path("grid").glob("*/results.json")}
    assert len(made) == 8
    main_ok(*grid, "--vary", "order", "--out", "grid")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    main_ok("report", "grid", "--out", "table.md")
    second = capsys.readouterr().out
    assert re.search(r"^bce +\S+ +16 +2 +\d", first, re.MULTILINE)
    assert re.search(r"^class prior +\d", second, re.MULTILINE)
    assert Path("table.md").read_text().startswith("| loss | lr |")
    main_ok("report", "grid", "--all")
    assert len(re.findall(r"^(?:bce|an) ", capsys.readouterr().out, re.MULTILINE)) == 4


def test_data_prepare_shows_counts_and_writes_a_table_that_trains(here, capsys) -> None:
    main_ok("data", "prepare", "--labels", "single-positive", "--out", "labels.npz")
    out = capsys.readouterr().out
    assert "180 images, 178 of them in the label table, 10 classes" in out
    assert re.search(r"^train +95 ", out, re.MULTILINE)
    main_ok(
        "train-head", "--labels-file", "labels.npz", "--labels", "as-given", "--loss", "an",
        "--epochs", "1", "--out", "runs/given",
    )  # fmt: skip
    observed = np.load("runs/given/scores.npz")["observed"]
    assert ((observed == 1).sum(axis=1) == 1).all()


def test_keep_unlabelled_keeps_the_images_of_query2label(here, capsys) -> None:
    main_ok("data", "prepare", "--keep-unlabelled")
    assert "180 images, 180 of them in the label table" in capsys.readouterr().out


def test_store_info_describes_it(here, capsys) -> None:
    main_ok("store", "info", "other/store.h5")
    out = capsys.readouterr().out
    assert "complete, 180 good, 0 bad, 0 pending" in out
    assert "weights_licence: none" in out


def test_a_csv_of_photos_goes_all_the_way(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["file,labels"]
    for index in range(40):
        colour = ("red", "blue")[index % 2]
        Image.new("RGB", (40, 40), colour).save(f"{index}.png")
        lines.append(f"{index}.png,{colour};photo")
    Path("photos.csv").write_text("\n".join(lines))
    main_ok("extract", "--data", "photos.csv", *BACKBONE)
    main_ok("train-head", "--lr", "1e-2", "--out", "run")
    results = json.loads(Path("run/results.json").read_text())
    assert results["test"]["mAP"] == 100
    assert results["train_images"] == 28


def photos(folder: Path, colours: tuple[str, ...]) -> Path:
    """Draw a photo of each colour, by number, and a table that calls each by its colour."""
    folder.mkdir(parents=True)
    lines = ["file,labels"]
    for index, colour in enumerate(colours):
        Image.new("RGB", (40, 40), colour).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{colour}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines))
    return table


def test_features_of_other_photos_of_the_same_names_are_never_reused(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    first = photos(tmp_path / "a", ("red", "blue"))
    main_ok("extract", "--data", first, *BACKBONE)
    (labels,) = Path("features").glob("*.labels.npz")
    before = labels.read_bytes()
    second = photos(tmp_path / "b", ("blue", "red"))
    text = mistake(capsys, "extract", "--data", second, *BACKBONE)
    assert "holds features of another photo" in text
    assert labels.read_bytes() == before
    Image.new("RGB", (40, 40), "green").save(tmp_path / "a" / "1.png")
    assert "a/1.png, by its content" in mistake(capsys, "extract", "--data", first, *BACKBONE)


def test_the_same_photos_in_another_folder_are_the_same(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        table = photos(tmp_path / folder, ("red", "blue"))
        main_ok("extract", "--data", table, *BACKBONE)
    assert "nothing to do, all 2 images were there" in capsys.readouterr().out


def test_heads_of_other_photos_are_not_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for colours in (("red", "blue") * 10, ("blue", "red") * 10):
        table = tmp_path / "photos" / "photos.csv"
        table = photos(table.parent, colours) if not table.exists() else table
        for index, colour in enumerate(colours):
            Image.new("RGB", (40, 40), colour).save(table.parent / f"{index}.png")
        main_ok("extract", "--data", table, *BACKBONE, "--out", f"{colours[0]}.zarr")
        main_ok("sweep", "--features", f"{colours[0]}.zarr", "--losses", "bce", "--epochs", "1")
    assert len(list(Path("runs").iterdir())) == 2


def test_a_run_works_from_any_folder(here, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main_ok("evaluate", here / "runs/bce")
    assert "test, 59 images" in capsys.readouterr().out


def test_out_never_replaces_a_folder_that_is_no_run(here, capsys) -> None:
    folder = here / "thesis"
    folder.mkdir()
    for name in ("results.json", "chapter1.txt"):
        (folder / name).write_text("{}")
    assert "is not a run folder" in mistake(capsys, "train-head", "--out", "thesis")
    assert (folder / "chapter1.txt").exists()


def test_a_run_is_evaluated_on_photos_of_its_own_kind(here, tmp_path, capsys) -> None:
    table = tmp_path / "new.csv"
    files = sorted((here / "data/coco/val2014").glob("*.jpg"))[:5]
    table.write_text("file,labels\n" + "".join(f"{file},digit 3\n" for file in files))
    main_ok("evaluate", "runs/bce", "--data", table, "--split", "all")
    out = capsys.readouterr().out
    assert "all, 5 images" in out
    assert "9 classes have no positive here" in out


def test_observed_validation_labels_select_and_are_what_is_shown(here, capsys) -> None:
    settings = ("--loss", "an", "--set", "val_labels=observed", "--epochs", "3")
    main_ok("train-head", *settings, "--out", "other-runs/observed")
    results = json.loads((here / "other-runs/observed/results.json").read_text())
    lines = (here / "other-runs/observed/metrics.jsonl").read_text().splitlines()
    assert results["selection_mAP"] == max(json.loads(line)["val_mAP"] for line in lines)
    assert results["selection_mAP"] != results["val"]["mAP"]
    assert f"val mAP {results['selection_mAP']:.2f}" in capsys.readouterr().out


def test_partial_labels_are_said_to_be_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    table = photos(tmp_path / "a", ("red", "blue") * 10)
    main_ok("extract", "--data", table, "--set", "unlisted=unknown", *BACKBONE)
    main_ok("train-head", "--loss", "an", "--epochs", "1", "--out", "runs/an")
    main_ok("report", "runs")
    assert capsys.readouterr().out.count("The truth is not known") == 2


@pytest.mark.parametrize("name", ["head.safetensors", "scores.npz", "results.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["missing", "rubbish"])
def test_a_damaged_run_is_said_to_be_so(here, tmp_path, capsys, name: str, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(here / "runs/bce", run)
    (run / name).unlink()
    if damage == "rubbish":
        (run / name).write_text("[]")
    command = ("report", run) if name == "scores.npz" else ("evaluate", run)
    assert re.search(rf"{run}.*({name}|not a run folder)", mistake(capsys, *command))


def test_a_mistake_in_the_data(here, tmp_path, capsys) -> None:
    text = mistake(capsys, "data", "prepare", "--root", tmp_path)
    assert "no train2014" in text
    assert "https://cocodataset.org" in text
    root = layouts.coco_layout(tmp_path / "coco", 4, 3)
    path = root / "annotations" / "instances_val2014.json"
    good = path.read_text()
    path.write_text("[1, 2]")
    assert "not COCO annotations" in mistake(capsys, "data", "prepare", "--root", root)
    content = json.loads(good)
    content["images"].append(content["images"][0])
    path.write_text(json.dumps(content))
    assert "is there twice" in mistake(capsys, "data", "prepare", "--root", root)
    path.write_text(good)
    for image in root.glob("*2014/*.jpg"):
        image.unlink()
    text = mistake(capsys, "extract", *BACKBONE, "--root", root)
    assert "not one of the 7 listed images is there" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("extract", "--backbone", "resnet5O"), r"unknown backbone 'resnet5O'; did you mean"),
        (("extract", "--backbone", "resnet50.tv_in2k"), r"unknown tag 'tv_in2k' of resnet50"),
        (("extract", "--data", "coc"), r"unknown data set 'coc'; did you mean 'coco'"),
        (("extract", "--format", "hdf"), r"unknown format 'hdf'; did you mean 'hdf5'"),
        (("extract", *BACKBONE, "--weights", "none.pth"), r"pass one"),
        (("train-head", "--loss", "rol"), r"unknown loss 'rol'; did you mean 'role'"),
        (("train-head", "--head", "liner"), r"unknown head 'liner'; did you mean 'linear'"),
        (("train-head", "--classes", "digit 1,digt 2"), r"unknown class 'digt 2'; did you mean"),
        (("train-head", "--labels", "fulll"), r"labels: should be 'full', 'single-positive'"),
        (("train-head", "--set", "lrr=1"), r"lrr: unknown key, did you mean 'lr'"),
        (("train-head", "--config", "nothing"), r"no recipe and no file 'nothing'"),
        (("train-head", "--features", "features"), r"a store's name ends in .h5 or .zarr"),
        (("train-head", "--features", "no.zarr"), r"no such store"),
        (("train-head", "--lr", "-1"), r"lr: should be a positive number, got -1"),
        (("train-head", "--device", "cuda:99"), r"device: 'cuda:99' is not to be had here"),
        (("train-head", "--out", "data"), r"data: is there and is not a run folder"),
        (("train-head", "--classes", ""), r"classes: is empty"),
        (("train-head", "--device", "meta"), r"device: 'meta' is not to be had here"),
        (("train-head", "--set", "labels=&a [*a]"), r"not plain keys and values"),
        (("evaluate", "runs/bce", "--data", "coco", "--features", "x.zarr"), r"pass one of them"),
        (("evaluate", "runs/bce", "--weights", "x.pth"), r"--weights is for images"),
        (("predict", "runs/bce", "data", "--out", "."), r"is a folder; name a file"),
        (("data", "prepare", "--out", "runs"), r"is a folder; name a file"),
        (("report", "runs", "--resamples", "0"), r"0 is not in the range"),
        (
            ("extract", *BACKBONE, "--out", "/proc/x.zarr"),
            r"/proc/x.zarr: 180 images need .* 0.0 MB are free there",
        ),
        (("sweep", "--losses", "an,an"), r"losses: has a value twice"),
        (("sweep", "--seeds", ""), r"seeds: is empty"),
        (("sweep", "--losses", "an,rolle"), r"unknown loss 'rolle'; did you mean 'role'"),
        (("sweep", "--lr", "1e-2,fast"), r"--lr: expected floats with commas between"),
        (("evaluate", "runs"), r"runs: not a run folder"),
        (("evaluate", "runs/bce", "--split", "tset"), r"unknown split 'tset'; did you mean 'test'"),
        (("predict", "runs/bce", "nowhere"), r"nowhere: no such folder"),
        (("predict", "runs/bce", "runs/bce"), r"no images there"),
        (("predict", "runs/bce", "data", "--classes", "digit"), r"unknown class 'digit'"),
        (("report", "features"), r"no run folders there"),
        (("report", "runs", "--out", "t.xls"), r"unknown kind of table"),
        (("store", "info", "x.zarr"), r"no such store"),
        (("nonsense",), r"No such command 'nonsense'"),
        (("extract", "--nonsense"), r"No such option"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_a_mistake_is_one_sentence(here, capsys, arguments, sentence) -> None:
    assert re.search(sentence, mistake(capsys, *arguments))


HEAD_FILES = ("head.safetensors", "scores.npz", "metrics.jsonl")


def heads_in(folder: Path) -> dict[str, bytes]:
    """Return the files of run folders that are the same bit for bit if the heads are."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in HEAD_FILES
        for path in folder.glob(f"*/{name}")
    }


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; stores lie beside it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_head_of_a_sweep_is_the_one_that_train_head_trains(work: Path, empty: Path) -> None:
    store = ("--features", work / "other/store.h5", "--epochs", "2", "--weight-decay", "0.1")
    grid = ("--losses", "an,role", "--lr", "1e-2,1e-3", "--batch-size", "8,16", "--seeds", "0,1")
    main_ok("sweep", *store, *grid, "--out", "swept")
    swept = heads_in(empty / "swept")
    assert len(swept) == 16 * len(HEAD_FILES)
    for loss, size, seed in (("an", 8, 1), ("role", 16, 0), ("role", 8, 1)):
        settings = ("--lr", "1e-2", "--batch-size", size, "--seed", seed)
        main_ok("train-head", *store, "--loss", loss, *settings)
    alone = heads_in(empty / "runs")  # of the same names, which tell all settings
    assert len(alone) == 3 * len(HEAD_FILES)
    assert alone.items() <= swept.items()


def test_what_a_sweep_varies_is_said(work: Path, empty: Path, capsys) -> None:
    store = ("--features", work / "other/store.h5", "--epochs", "1", "--losses", "an")
    main_ok("sweep", *store, "--seeds", "0,1", "--vary", "corruption,order")
    out = capsys.readouterr().out
    assert "2 heads in runs; a seed varies: initial weights, corruption, order" in out


def test_heads_that_diverge_are_named_and_the_others_compared(
    work: Path, empty: Path, capsys
) -> None:
    grid = ("--losses", "an,role", "--lr", "1e-2,1e38", "--seeds", "0,1", "--epochs", "2")
    text = mistake(capsys, "sweep", "--features", work / "other/store.h5", *grid)
    assert text.startswith("error: runs: 4 of 8 heads diverged, try a smaller lr: runs/")
    assert len(re.findall(r"runs/(?:an|role)-lr1e\+38-bs16-seed[01]-\w+", text)) == 4
    main_ok("report", "runs")
    out = capsys.readouterr().out
    assert re.search(r"^an +0.01 +16 +2 ", out, re.MULTILINE)
    assert re.search(r"^role +0.01 +16 +2 ", out, re.MULTILINE)


FULL = made_store.table_of().observed
SINGLE = np.where(np.cumsum(FULL == 1, axis=1) * (FULL == 1) == 1, 1, 0).astype(np.int8)
NONE = np.zeros_like(FULL)


def test_all_says_what_it_leaves_out_of_fully_labelled_photos(empty: Path, capsys) -> None:
    store = made_store.write(empty.parent, made_store.csv_table(FULL))
    main_ok("sweep", "--features", store, "--losses", "all", "--epochs", "1")
    out = capsys.readouterr().out
    refusing = {
        *("pr", "an", "an_ls", "wan", "hill", "splc"),
        *("ll_r", "ll_ct", "ll_cp", "crisp", "nnpu"),
    }
    assert set(re.findall(r"^left out (\w+): labels: ", out, re.MULTILINE)) == refusing
    assert {path.name.split("-")[0] for path in (empty / "runs").iterdir()} == {
        *("bce", "bce_ls", "iun", "iu", "epr", "role", "focal", "asl", "em", "em_apl", "gr")
    }
    first = heads_in(empty / "runs")
    main_ok("sweep", "--features", store, "--losses", "all", "--epochs", "1")
    assert capsys.readouterr().out == out
    assert heads_in(empty / "runs") == first


def test_a_sweep_tells_what_the_labels_lack(empty: Path, capsys) -> None:
    observed = FULL.copy()
    observed[0], observed[:70, 2] = -1, -1
    store = made_store.write(empty.parent, made_store.csv_table(observed))
    main_ok("sweep", "--features", store, "--losses", "bce", "--epochs", "1")
    out = capsys.readouterr().out
    assert re.search(r"^labels: \d+ of 70 training images have no observed positive; they", out)
    assert "labels: 1 of 5 classes have no observed positive in training and cannot be" in out
    assert "learnt: cat" in out


def test_train_head_tells_what_the_labels_lack(empty: Path, capsys) -> None:
    observed = FULL.copy()
    observed[0], observed[:70, 2] = -1, -1
    store = made_store.write(empty.parent, made_store.csv_table(observed))
    main_ok("train-head", "--features", store, "--epochs", "1")
    out = capsys.readouterr().out
    assert re.search(r"^labels: \d+ of 70 training images have no observed positive", out)
    assert "labels: 1 of 5 classes have no observed positive in training and cannot be" in out


def nan_store(folder: Path) -> Path:
    store = made_store.write(folder)
    made_store.spoil(store, made_store.IDS[3], [float("nan")])
    return store


def store_of(observed: np.ndarray, *, partial: bool = False) -> Callable[[Path], Path]:
    table = made_store.csv_table(observed, partial=partial)
    return lambda folder: made_store.write(folder, table)


@pytest.mark.parametrize("command", ["train-head", "sweep"])
@pytest.mark.parametrize(
    ("make", "loss", "more", "sentence"),
    [
        (nan_store, "bce", (), r"zarr: features of 1 of 130 images are NaN.*image id 1003\)"),
        (store_of(FULL), "an", (), r"labels: an makes no use of observed negatives, got \d+ ce"),
        (store_of(SINGLE), "iu", (), r"labels: iu learns from observed negatives, got none in"),
        (store_of(NONE - 1), "bce", (), r"labels: no positive is observed, in 70 training imag"),
        (store_of(NONE), "role", (), r"labels: no positive is observed, in 70 training images"),
        (store_of(SINGLE, partial=True), "role", (), r"not known of partial labels; pass --set"),
        (store_of(SINGLE, partial=True), "epr", (), r"expected_positives: not known of partial"),
        (made_store.write, "an", ("--labels", "full"), r"an makes no .* use --labels single-po"),
        (made_store.write, "an", ("--weight-decay", "-0.1"), r"weight_decay: .* got -0.1"),
        (made_store.write, "an", ("--weight-decay", "1e9"), r"weight_decay: .* below 1 / lr, go"),
        (made_store.write, "an", ("--val-labels", "cleen"), r"val_labels: .*ed', got 'cleen'"),
        (made_store.write, "an", ("--set", "order_seed=-1"), r"order_seed: should be from 0 to"),
    ],
)  # fmt: skip
def test_input_that_nothing_can_be_learnt_from_is_one_sentence_and_leaves_no_trace(
    empty: Path,
    capsys,
    command: str,
    make: Callable[[Path], Path],
    loss: str,
    more: tuple[str, ...],
    sentence: str,
) -> None:
    named = ("--loss", loss) if command == "train-head" else ("--losses", f"{loss},asl")
    text = mistake(capsys, command, "--features", make(empty.parent), *named, *more)
    assert re.search(sentence, text)
    assert not list(empty.iterdir())


def test_an_unknown_thing_to_vary_is_a_mistake(empty: Path, capsys) -> None:
    text = mistake(capsys, "sweep", "--vary", "odrer")
    assert re.search(r"vary.0: should be 'order' or 'corruption', got 'odrer'", text)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let processes that are started here be stopped, though this one may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_finished_heads_and_the_same_command_goes_on(empty: Path, capsys) -> None:
    store = made_store.write(empty.parent)
    grid = ("--losses", "bce,role", "--seeds", "0,1,2,3,4,5", "--vary", "order", "--epochs", "20")
    command = ["sweep", "--features", str(store), *grid]
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "mlc", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
            text=True,
        )
    with process:
        while process.poll() is None and not list((empty / "runs").glob("*/results.json")):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    kept = heads_in(empty / "runs")
    heads = len(kept) // len(HEAD_FILES)
    assert 1 <= heads < 12
    assert err.splitlines()[-1] == (
        f"runs: stopped, {heads} of 12 heads are kept; the same command goes on from there"
    )
    assert "Traceback" not in err
    main_ok(*command)
    table = capsys.readouterr().out
    assert kept.items() < heads_in(empty / "runs").items()
    main_ok(*command, "--out", "whole")
    assert capsys.readouterr().out.replace("in whole", "in runs") == table
    assert heads_in(empty / "whole") == heads_in(empty / "runs")


def test_weights_that_do_not_fit_are_reported(here, capsys, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    text = mistake(capsys, "extract", "--backbone", "test_resnet", "--weights", path)
    assert "do not fit" in text
    assert "missing" in text


def test_a_store_made_with_other_settings_names_the_field(here, capsys) -> None:
    asked = ("--backbone", "test_resnet", "--random-weights", "--size", "32")
    text = mistake(capsys, "extract", *asked, "--out", "other/store.h5")
    assert "size_px: stored 64, asked 32" in text


def test_several_stores_are_listed_not_guessed(here, capsys) -> None:
    main_ok("extract", *BACKBONE, "--format", "hdf5")
    try:
        text = mistake(capsys, "train-head")
    finally:
        next(Path("features").glob("*.h5")).unlink()
    assert "several stores are there" in text
    assert ".zarr" in text
    assert ".h5" in text


def test_an_unfinished_store_says_how_to_go_on(here, capsys, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlc.store.writer.StoreWriter.mark", stop)
    with pytest.raises(SystemExit) as exit_:
        main_ok("extract", *BACKBONE, "--out", "half.zarr")
    assert exit_.value.code == 130
    assert "0 of 180 images are kept; the same command goes on" in capsys.readouterr().err
    text = mistake(capsys, "train-head", "--features", "half.zarr")
    assert "unfinished, 0 of 180 images" in text


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        here = (*path, name)
        found += commands(command, here) if isinstance(command, click.Group) else [here]
    return found


@pytest.mark.parametrize("path", commands(cli), ids=" ".join)
def test_every_command_and_option_has_help(path) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name
