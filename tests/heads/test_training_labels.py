"""Labels of the wrong encoding for a loss, and what labels lack."""

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, full_labels
from mlc.datasets.protocol import Labels, apply_protocol
from mlc.heads.training_labels import check_labels, label_gaps
from mlc.losses.table import LOSSES

MAKES_NO_USE = {
    *["pr", "an", "an_ls", "wan", "hill", "splc", "ll_r", "ll_ct", "ll_cp", "crisp", "nnpu"]
}
NEEDS = {"bce", "bce_ls", "iun", "iu", "focal", "asl"}
# A loss that somebody adds is held to what it says of itself.
ADDED = LOSSES.keys() - MAKES_NO_USE - NEEDS - {"epr", "role", "em", "em_apl", "gr"}
MAKES_NO_USE |= {name for name in ADDED if LOSSES[name].observed_negatives == "refused"}
NEEDS |= {name for name in ADDED if LOSSES[name].observed_negatives == "needed"}


def shown(labels: Labels) -> np.ndarray:
    """Observed training labels of 40 images and 6 classes, as a protocol shows them."""
    true = np.random.default_rng(0).random((60, 6)) < 0.4
    names = np.arange(60).astype(str)
    split = np.array(["train"] * 50 + ["test"] * 10)
    table = LabelTable(names, names, (*"abcdef",), full_labels(true), true, split, "coco")
    return apply_protocol(table, labels).part("train").observed


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_takes_the_labels_it_is_made_for(loss: str) -> None:
    check_labels(loss, shown(LOSSES[loss].labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", ["full", "one-positive-one-negative"])
def test_negatives_are_refused_where_they_would_be_lost(loss: str, labels: Labels) -> None:
    observed = shown(labels)
    if loss not in MAKES_NO_USE:
        check_labels(loss, observed)
        return
    negatives = (observed == -1).sum()
    with pytest.raises(
        MlcError,
        match=rf"^labels: {loss} makes no use of observed negatives, got {negatives} cells of -1; "
        "use --labels single-positive, or --loss bce",
    ):
        check_labels(loss, observed)


def test_one_negative_is_enough_to_be_refused_and_to_be_enough() -> None:
    observed = shown("single-positive")
    observed[np.nonzero(observed == 0)[0][0], np.nonzero(observed == 0)[1][0]] = -1
    check_labels("iu", observed)
    with pytest.raises(MlcError, match="got 1 cells"):
        check_labels("an", observed)


@pytest.mark.parametrize("loss", LOSSES)
def test_negatives_are_asked_for_where_they_are_needed(loss: str) -> None:
    observed = shown("single-positive")
    if loss not in NEEDS:
        check_labels(loss, observed)
        return
    hint = {"iun": "one-positive-all-negatives", "iu": "one-positive-one-negative"}.get(
        loss, "full"
    )
    with pytest.raises(
        MlcError,
        match=rf"^labels: {loss} learns from observed negatives, got none in 40 training images; "
        f"use --labels {hint}$",
    ):
        check_labels(loss, observed)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [0, -1])
def test_labels_without_any_positive_are_refused(loss: str, label: int) -> None:
    with pytest.raises(
        MlcError, match=r"^labels: no positive is observed, in 1,500 training images of 3 classes"
    ):
        check_labels(loss, np.full((1500, 3), label, dtype=np.int8))


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(MlcError, match=r"unknown loss 'rol'; did you mean 'role'"):
        check_labels("rol", shown("full"))


def test_complete_labels_have_no_gaps() -> None:
    assert label_gaps(np.eye(3, dtype=np.int8), "abc") == []


def test_images_and_classes_without_a_positive_are_told() -> None:
    observed = np.array([[1, 0, 0], [0, -1, 0], [1, 1, -1], [0, 0, 0]], dtype=np.int8)
    assert label_gaps(observed, ("cat", "dog", "hair drier")) == [
        "labels: 2 of 4 training images have no observed positive; they are trained on all the "
        "same",
        "labels: 1 of 3 classes have no observed positive in training and cannot be learnt: "
        "hair drier",
    ]


@pytest.mark.parametrize(
    ("classes", "names"),
    [(6, "class 1, class 2, class 3, class 4, class 5"), (7, "class 4, class 5 and 1 more")],
)
def test_few_classes_are_named_and_the_rest_counted(classes: int, names: str) -> None:
    observed = np.zeros((2, classes), dtype=np.int8)
    observed[:, 0] = 1
    (sentence,) = label_gaps(observed, [f"class {column}" for column in range(classes)])
    assert sentence.startswith(f"labels: {classes - 1} of {classes} classes")
    assert sentence.endswith(names)
