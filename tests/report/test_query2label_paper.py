"""Ours beside Query2Label's figures: the table as printed, who is compared, and why they differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import IMAGES, KEY, TRUE, logits_of, write

from mlc.configs.errors import MlcError
from mlc.heads.metrics import evaluate
from mlc.heads.run_folder import FINETUNE, Run
from mlc.heads.train import probabilities
from mlc.report import query2label_paper
from mlc.report.query2label_paper import (
    NAMES,
    PAPER,
    paper_name,
    query2label_note,
    query2label_records,
    require_coco,
)
from mlc.report.table import Report, make_report

R101_KEY = KEY | {"backbone": "resnet101", "size_px": 448}
CLASSES = ("class 0", "class 1", "class 2")


def made(
    folder: Path, name: str, threshold: float = 0.823, true: np.ndarray = TRUE, **more: Any
) -> Run:
    """Write a run whose test figures are those of its scores."""
    seed = more.pop("seed", 0)
    results = {"dataset": "coco"} | more.pop("results", {})
    probs = probabilities(logits_of(1.0, seed, true))
    test = evaluate(probs, true, CLASSES, threshold) | more.pop("test", {})
    return write(folder, name, seed=seed, true=true, more=results | {"test": test}, **more)


def official(folder: Path, name: str, **more: Any) -> Run:
    key = KEY | {"backbone": name}  # an official checkpoint is known by its name alone
    return made(folder, name, key=key, results={"official": name}, **more)


def report_of(*runs: Run) -> Report:
    return make_report(runs, resamples=20)


def values(record: dict[str, str], names: tuple[str, ...] = NAMES) -> list[float]:
    return [float(record[name]) for name in names]


@pytest.mark.parametrize("name", PAPER)
def test_f1_of_the_table_is_the_harmonic_mean_but_for_rounding(name: str) -> None:
    """A figure copied wrongly would not fit the two beside it."""
    for cp, cr, cf1, *overall in (PAPER[name].above, PAPER[name].top3):
        op, recall, of1 = overall
        assert cf1 == pytest.approx(2 * cp * cr / (cp + cr), abs=0.1)
        assert of1 == pytest.approx(2 * op * recall / (op + recall), abs=0.1)


def test_map_of_the_table_is_the_readmes() -> None:
    assert {name: row.mean_ap for name, row in PAPER.items()} == {
        "Q2L-R101-448": 84.9,
        "Q2L-R101-576": 86.5,
        "Q2L-TResL-448": 87.3,
        "Q2L-TResL_22k-448": 89.2,
        "Q2L-SwinL-384": 90.5,
        "Q2L-CvT_w24-384": 91.3,
    }
    assert all(name.endswith(f"-{row.size_px}") for name, row in PAPER.items())


def test_only_the_anomaly_cannot_be_a_part_of_its_other_predictions() -> None:
    """In units of the positives, hits are OR and guesses OR / OP: a part loses no more hits."""
    impossible = []
    for name, row in PAPER.items():
        (op, recall), (op3, recall3) = row.above[3:5], row.top3[3:5]
        lost_guesses = 100 * (recall / op - recall3 / op3)
        if recall - recall3 > lost_guesses:
            impossible.append(name)
        assert op3 > recall3  # which three guesses for each image cannot give
    assert impossible == [query2label_paper.ANOMALY]


def test_ours_the_papers_and_the_difference_stand_below_each_other(tmp_path: Path) -> None:
    records = query2label_records(report_of(official(tmp_path, "Q2L-SwinL-384")))
    assert [(each["labels"], each["figures"]) for each in records] == [
        *(("above 0.823", figures) for figures in ("ours", "paper", "difference")),
        *(("of top 3 above 0.823", figures) for figures in ("ours", "paper", "difference")),
        ("top 3", "ours"),
    ]
    assert {each["model"] for each in records} == {"Q2L-SwinL-384"}
    ours, paper, difference, _, paper3, *_ = records
    assert values(paper, ("mAP", *NAMES)) == [90.5, 89.4, 81.7, 85.4, 89.8, 83.2, 86.4]
    assert values(paper3) == [93.9, 70.4, 80.5, 94.8, 71.0, 81.2]
    for name in ("mAP", *NAMES):
        assert difference[name][0] in "+-"
        want = float(ours[name]) - float(paper[name])
        assert float(difference[name]) == pytest.approx(want, abs=0.011)


def test_our_map_is_the_interpolated_one(tmp_path: Path) -> None:
    run = official(tmp_path, "Q2L-R101-448", test={"mAP_voc": 12.345, "mAP_asl": 1.0})
    assert query2label_records(report_of(run))[0]["mAP"] == "12.35"


def test_top_3_is_shown_with_and_without_the_cut_at_the_threshold(tmp_path: Path) -> None:
    true = np.random.default_rng(1).random((IMAGES, 3)) < 0.3
    true = np.hstack([true, true[::-1]])  # six classes, so that three are not all
    scores = logits_of(1.0, 0, true)
    probs = probabilities(scores)
    test = evaluate(probs, true, [f"class {column}" for column in range(6)], 0.7)
    more = {"dataset": "coco", "official": "Q2L-R101-448", "test": test}
    records = query2label_records(report_of(write(tmp_path, "run", true=true, more=more)))
    best = np.argsort(-probs, axis=1)[:, :3]
    for record, cut in ((records[3], 0.7), (records[6], 0.0)):
        predicted = np.zeros_like(true)
        np.put_along_axis(predicted, best, True, axis=1)
        predicted &= probs > cut
        hits = (predicted & true).sum()
        assert float(record["OP"]) == pytest.approx(100 * hits / predicted.sum(), abs=0.006)
        assert float(record["OR"]) == pytest.approx(100 * hits / true.sum(), abs=0.006)
    assert records[3]["labels"] == "of top 3 above 0.7"
    assert records[3]["OP"] != records[6]["OP"]
    assert records[3]["OP"] != records[0]["OP"]


def test_figures_are_means_over_seeds(tmp_path: Path) -> None:
    runs = [official(tmp_path / str(seed), "Q2L-R101-448", seed=seed) for seed in (0, 1)]
    ours = query2label_records(report_of(*runs))[0]
    for name, source in {"mAP": "mAP_voc", "CP": "CP", "OF1": "OF1"}.items():
        want = np.mean([run.results["test"][source] for run in runs])
        assert float(ours[name]) == pytest.approx(want, abs=0.006)


def test_a_run_that_is_not_of_the_paper_has_ours_alone(tmp_path: Path) -> None:
    report = report_of(made(tmp_path, "bce", loss="bce"))
    assert [each["figures"] for each in query2label_records(report)] == ["ours"] * 3
    assert query2label_note(report).endswith("None of these runs is a model of the paper.")


@pytest.mark.parametrize(
    ("head", "backbone", "size_px", "name"),
    [
        ("q2l", "resnet101", 448, "Q2L-R101-448"),
        ("q2l", "torchvision:resnet101", 576, "Q2L-R101-576"),
        ("q2l", "tresnet_l", 448, "Q2L-TResL-448"),
        ("q2l", "tresnet_v2_l", 448, "Q2L-TResL_22k-448"),
        ("q2l", "swin_large_patch4_window12_384", 384, "Q2L-SwinL-384"),
        ("q2l", "cvt_w24", 384, "Q2L-CvT_w24-384"),
        ("q2l", "resnet101", 512, None),
        ("q2l", "resnet50", 448, None),
        ("linear", "resnet101", 448, None),
    ],
)
def test_our_own_heads_are_known_by_backbone_and_size(
    tmp_path: Path, head: str, backbone: str, size_px: int, name: str | None
) -> None:
    run = made(tmp_path, "run", key=KEY | {"backbone": backbone, "size_px": size_px})
    config = run.config.model_copy(update={"head": head})
    assert paper_name(Run(run.path, config, run.results)) == name


def test_what_an_imported_checkpoint_says_is_believed(tmp_path: Path) -> None:
    run = made(tmp_path, "run", key=R101_KEY, results={"official": "Q2L-R101-576"})
    assert paper_name(run) == "Q2L-R101-576"
    other = made(tmp_path, "other", key=R101_KEY, results={"official": "Q2L-VOC"})
    assert paper_name(other) is None


@pytest.mark.parametrize("dataset", ["voc", "json-val", None])
def test_other_data_sets_are_refused(tmp_path: Path, dataset: str | None) -> None:
    run = made(tmp_path, "run", results={"dataset": dataset})
    config = run.config.model_copy(update={"data": None})
    with pytest.raises(MlcError, match=r"run: the Query2Label figures .* COCO 2014, got data set"):
        require_coco(Run(run.path, config, run.results))


def note_of(folder: Path, images: int, name: str = "Q2L-R101-448", **more: Any) -> str:
    report = report_of(official(folder, name, **more))
    return query2label_note(Report(**{**vars(report), "images": images}))


def test_the_authors_own_protocol_gives_no_reason_but_the_top_3(tmp_path: Path) -> None:
    text = note_of(tmp_path, 40_504).splitlines()
    assert [line.split(":")[0] for line in text[1:-1]] == ["Top 3"]
    assert text[-1].startswith("The paper's top-3 figures of Q2L-R101-448 are copied as printed")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (40_137, "40,137 test images: those without a label are left out"),
        (900, "900 test images, not val2014's 40,504: no figure compares."),
    ],
)
def test_other_images_are_a_reason(tmp_path: Path, images: int, words: str) -> None:
    assert f"\n{words}" in note_of(tmp_path, images)


@pytest.mark.parametrize(
    ("name", "threshold", "words"),
    [
        ("Q2L-R101-448", 0.5, "\nCP to OF1 are at threshold 0.5, the paper's at one that "),
        ("Q2L-SwinL-384", 0.5, "0.823 gives its row for Q2L-R101-448; score with that one."),
        ("Q2L-SwinL-384", 0.823, "which is known to be the paper's for Q2L-R101-448 alone."),
    ],
)
def test_the_threshold_is_a_reason(tmp_path: Path, name: str, threshold: float, words: str) -> None:
    assert words in note_of(tmp_path, 40_504, name, threshold=threshold)


def test_what_was_left_out_of_map_is_a_reason(tmp_path: Path) -> None:
    true = TRUE.copy()
    true[:, 1] = False
    assert "\n1 classes have no positive and are left out" in note_of(tmp_path, 40_504, true=true)


def test_a_reason_names_its_rows_unless_it_is_of_all(tmp_path: Path) -> None:
    one = official(tmp_path, "Q2L-R101-448", threshold=0.5)
    other = official(tmp_path, "Q2L-SwinL-384", seed=1)
    text = query2label_note(report_of(one, other, made(tmp_path, "bce", loss="bce")))
    assert "\nQ2L-R101-448: CP to OF1 are at threshold 0.5" in text
    assert "\nQ2L-SwinL-384: CP to OF1 are at threshold 0.823" in text
    assert "\n80 test images, not val2014's" in text


def test_average_pooling_is_there_for_the_backbones_that_have_it(tmp_path: Path) -> None:
    text = note_of(tmp_path, 40_504, "Q2L-SwinL-384")
    assert text.endswith("the paper has mAP 89.6 for Q2L-SwinL-384.")
    assert "average pooling" not in note_of(tmp_path / "other", 40_504)
    assert query2label_paper.POOLED == {"Q2L-SwinL-384": 89.6, "Q2L-CvT_w24-384": 90.5}


def own_note(folder: Path, weights: str = "resnet101.tv_in1k", **more: Any) -> str:
    """The note of a head that was trained here and is otherwise the paper's."""
    results = more.pop("results", {})
    features = {"backbone": weights, "key": R101_KEY, "digest": "photos"}
    run = made(
        folder,
        "own",
        head="q2l",
        **{"loss": "asl", "labels": "full", "key": R101_KEY} | more,
        results=results | {"features": features},
    )
    return query2label_note(Report(**{**vars(report_of(run)), "images": 40_504}))


def test_what_was_trained_here_as_the_paper_says_is_not_end_to_end_alone(tmp_path: Path) -> None:
    lines = own_note(tmp_path).splitlines()
    assert lines[1] == "The head was trained here on fixed features, not end to end."
    assert lines[2].startswith("Top 3: ")


def test_selection_on_test_is_a_reason_and_the_papers_too(tmp_path: Path) -> None:
    text = own_note(tmp_path, results={"selected_on": "test"})
    assert "such figures are too good. The paper's were selected on val2014 too.\n" in text


def test_other_labels_are_a_reason(tmp_path: Path) -> None:
    text = own_note(tmp_path, labels="single-positive")
    assert "\nTrained on single-positive labels, the paper's on all of them (full).\n" in text


@pytest.mark.parametrize(
    ("weights", "is_paper"),
    [
        ("resnet101.tv_in1k", True),
        ("torchvision:resnet101.IMAGENET1K_V1", True),
        ("resnet101.tv_in1k, fine-tuned", True),
        ("torchvision:resnet101.IMAGENET1K_V2", False),
        ("resnet101.a1h_in1k, fine-tuned", False),
        ("resnet101 with random weights", False),
    ],
)
def test_other_pretrained_weights_are_a_reason(
    tmp_path: Path, weights: str, is_paper: bool
) -> None:
    text = own_note(tmp_path, weights)
    name = weights.removesuffix(", fine-tuned")
    reason = (
        f"\nThe backbone started as {name}, the paper's as resnet101.tv_in1k or "
        "torchvision:resnet101.IMAGENET1K_V1. In a reproduction torchvision's IMAGENET1K_V2 made "
        "2.7 mAP more than V1.\n"
    )
    assert (reason in text) == (not is_paper)
    assert ("2.7 mAP" in text) == (not is_paper)


def test_what_was_fine_tuned_was_not_trained_on_fixed_features(tmp_path: Path) -> None:
    run = made(tmp_path, "own", head="q2l", loss="asl", key=R101_KEY)
    (run.path / FINETUNE).touch()
    assert "fixed features" not in query2label_note(report_of(run))
