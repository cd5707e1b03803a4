"""Ours beside the published figures of the MLSPL paper: Cole et al., CVPR 2021.

Only figures that somebody has read in a source are here; of the others the table says so.
"""

from dataclasses import dataclass

from mlc.configs.errors import MlcError
from mlc.heads import losses
from mlc.heads.run_folder import Run
from mlc.report.table import Report, Row
from mlc.report.written import PARTIAL, deviation_text

NOT_VERIFIED = "not verified"
LOSSES = ("bce", "bce_ls", "iun", "iu", "an", "an_ls", "wan", "epr", "role")  # of its table
BACKBONE, SIZE_PX, EPOCHS = "resnet50", 448, 25


@dataclass(frozen=True)
class DataSet:
    """Attributes: title: in the paper; images: of its test split."""

    title: str
    images: int


DATA_SETS = {
    "voc": DataSet("VOC12", 5_823),
    "coco": DataSet("COCO", 40_137),
    "nuswide": DataSet("NUS", 60_260),
    "cub": DataSet("CUB", 5_794),
}

# Test mAP in per cent by mode, loss and data set. All are of the paper's main table as reprinted
# in the main table of Kim et al., CVPR 2022, https://arxiv.org/abs/2206.03740. A pair of loss and
# mode that is not here is published too, but nobody has read it in a source: add it with one.
LINEAR: dict[str, dict[str, float]] = {}
END_TO_END = {
    "an": {"voc": 85.1, "coco": 64.1, "nuswide": 42.0, "cub": 19.1},
    "an_ls": {"voc": 86.7, "coco": 66.9, "nuswide": 44.9, "cub": 17.9},
    "wan": {"voc": 86.5, "coco": 64.8, "nuswide": 46.3, "cub": 20.3},
    "epr": {"voc": 85.5, "coco": 63.3, "nuswide": 46.0, "cub": 20.0},
    "role": {"voc": 87.9, "coco": 66.3, "nuswide": 43.1, "cub": 15.0},
}
LINEAR_INIT = {
    "an_ls": {"voc": 86.5, "coco": 69.2, "nuswide": 50.5, "cub": 16.6},
    "role": {"voc": 88.2, "coco": 69.0, "nuswide": 51.0, "cub": 16.8},
}


def data_set_of(run: Run) -> str:
    """Return the key of DATA_SETS that a run is of.

    Raises:
        MlcError: it is not one of the paper's, or the run does not say which it is.
    """
    name = run.results.get("dataset") or run.config.data
    if name is None:
        raise MlcError(
            f"{run.path}: does not say which data set it is of; train it again to compare it with "
            "the paper"
        )
    data = str(name).removesuffix("-formatted")
    if data not in DATA_SETS:
        raise MlcError(
            f"{run.path}: the paper has no figures for data set {name!r}; it has them for "
            f"{', '.join(DATA_SETS)}"
        )
    return data


def published(mode: dict[str, dict[str, float]], loss: str, data: str) -> str:
    """Return a figure of the paper as text, or that it is not verified."""
    value = mode.get(loss, {}).get(data)
    return NOT_VERIFIED if value is None else f"{value:.1f}"


def mlspl_records(report: Report) -> list[dict[str, str]]:
    """Return the rows, each beside the paper's figures for its loss and data set.

    Raises:
        MlcError: the data set is not one of the paper's, or no run says which it is.
    """
    data = data_set_of(report.rows[0].runs[0])
    return [
        {
            **row.name,
            "seeds": str(row.seeds),
            "test mAP": f"{row.test:.2f}",
            "std": deviation_text(row),
            **_paper_columns(row, data),
        }
        for row in report.rows
    ]


def mlspl_note(report: Report) -> str:
    """Say where the figures are from, what must match, and what does not.

    Raises:
        MlcError: see ``mlspl_records``.
    """
    data = DATA_SETS[data_set_of(report.rows[0].runs[0])]
    missing = [loss for loss in LOSSES if loss not in {_loss(row) for row in report.rows}]
    lines = [
        f"Published: Cole et al., CVPR 2021, test mAP on {data.title}, one run each, as reprinted "
        f"in Kim et al., CVPR 2022. {NOT_VERIFIED.capitalize()}: published, but not checked in any "
        "source, so no figure is given.",
        "Only the paper's linear column is the experiment of these runs, a linear head on fixed "
        "features. End to end trains the backbone too; LinearInit does so from a trained linear "
        "head.",
        f"A fair comparison has: all {data.images:,} test images; {BACKBONE} with ImageNet "
        f"weights at {SIZE_PX} px; a linear head, {EPOCHS} epochs, batch 8 and 16, lr 1e-2 to 1e-5 "
        "without weight decay, chosen on clean validation labels; all "
        f"{len(LOSSES)} losses.",
        f"Here it is otherwise: {'; '.join(_departures(report, data)) or 'nothing that is known'}.",
    ]
    if missing:
        lines.append(f"Not run here: {', '.join(missing)}.")
    return "\n".join(lines if report.truth_known else [*lines, PARTIAL])


def _paper_columns(row: Row, data: str) -> dict[str, str]:
    known = _loss(row) in LOSSES
    init = _loss(row) in LINEAR_INIT
    return {
        "paper linear": published(LINEAR, _loss(row), data) if known else "",
        "paper end to end": published(END_TO_END, _loss(row), data) if known else "",
        "paper LinearInit": published(LINEAR_INIT, _loss(row), data) if init else "",
    }


def _loss(row: Row) -> str:
    return row.runs[0].config.loss


def _departures(report: Report, data: DataSet) -> list[str]:
    """Return what is known to differ from the paper's protocol, of any row."""
    found = [] if report.images == data.images else [f"{report.images:,} test images"]
    for row in report.rows:
        found += _departures_of(row)
    return list(dict.fromkeys(found))


def _departures_of(row: Row) -> list[str]:
    config, features = row.runs[0].config, row.runs[0].results["features"]
    size = features["key"].get("size_px")  # 0 or absent where imported features do not say
    method = losses.LOSSES.get(config.loss)
    checks = {
        features["backbone"]: features["backbone"].split()[0].split(".")[0] != BACKBONE,
        f"{size} px": size not in (None, 0, SIZE_PX),
        f"head {config.head}": config.head != "linear",
        f"{config.epochs} epochs": config.epochs != EPOCHS,
        f"selection on {config.val_labels} labels": config.val_labels != "clean",
        f"{config.loss} on {config.labels} labels": method and config.labels != method.labels,
        f"{len(config.classes or ())} of the classes": config.classes is not None,
        "weight decay": row.tuned["weight decay"] not in ("", "0"),
        "a full-batch solver": not row.tuned["lr"],
    }
    return [what for what, differs in checks.items() if differs]
