"""Ours beside the published figures of the MLSPL paper: Cole et al., CVPR 2021.

Only figures that somebody has read in a source are here; of the others the table says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter
from itertools import product

from mlc.configs.errors import MlcError
from mlc.datasets.formatted import FORMATTED
from mlc.datasets.protocol import OFFICIAL_SEED
from mlc.heads.run_folder import Run
from mlc.losses.table import LOSSES as METHODS
from mlc.report.groups import is_full_batch
from mlc.report.table import Report, Row
from mlc.report.written import PARTIAL, deviation_text

NOT_VERIFIED = "not verified"
LOSSES = ("bce", "bce_ls", "iun", "iu", "an", "an_ls", "wan", "epr", "role")  # of its table
SIZE_PX, EPOCHS = 448, 25
SETTINGS = frozenset(product((1e-2, 1e-3, 1e-4, 1e-5), (8, 16)))  # lr and batch size
# torchvision's ImageNet V1, as stores name them: timm's tag, and the file under both its names.
WEIGHTS = (
    "resnet50.tv_in1k",
    "hf-hub:timm/resnet50.tv_in1k",
    "resnet50 with resnet50-19c8e357.pth",
    "resnet50 with resnet50-0676ba61.pth",
)
IMPORTED = "imported:resnet50"  # in the key of the authors' own features


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
    name = data_set_of(report.rows[0].runs[0])
    data = DATA_SETS[name]
    missing = [loss for loss in LOSSES if loss not in {_loss(row) for row in report.rows}]
    lines = [
        f"Published: Cole et al., CVPR 2021, test mAP on {data.title}, one run each, as reprinted "
        f"in Kim et al., CVPR 2022. {NOT_VERIFIED.capitalize()}: published, but not checked in any "
        "source, so no figure is given.",
        "Only the paper's linear column is the experiment of these runs, a linear head on fixed "
        "features. End to end trains the backbone too; LinearInit does so from a trained linear "
        "head.",
        f"A fair comparison has: all {data.images:,} test images; resnet50 with torchvision's "
        f"ImageNet V1 weights at {SIZE_PX} px, or the authors' features; a linear head, {EPOCHS} "
        "epochs, batch 8 and 16, lr 1e-2 to 1e-5 without weight decay, chosen on clean validation "
        f"labels; corruption and split of seed {OFFICIAL_SEED}; the losses' own knobs; all "
        f"{len(LOSSES)} losses.",
        f"Here it is otherwise: {'; '.join(_departures(report, name)) or 'nothing that is known'}.",
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


def _departures(report: Report, data: str) -> list[str]:
    """Return what is known to differ from the paper's protocol, of any row."""
    wanted = DATA_SETS[data].images
    found = [] if report.images == wanted else [f"{report.images:,} test images"]
    for row in report.rows:
        found += _of_features(row)
        found += _of_protocol(row)
        found += _of_seeds(row)
        found += _of_knobs(row, data)
        found += _of_grid(row)
    return list(dict.fromkeys(found))


def _of_features(row: Row) -> list[str]:
    features = row.runs[0].results["features"]
    size = features["key"].get("size_px")  # 0 or absent where imported features do not say
    known = features["key"]["backbone"] == IMPORTED or features["backbone"] in WEIGHTS
    checks = {features["backbone"]: not known, f"{size} px": size not in (None, 0, SIZE_PX)}
    return _that_differ(checks)


def _of_protocol(row: Row) -> list[str]:
    config, method = row.runs[0].config, METHODS.get(_loss(row))
    checks = {
        f"head {config.head}": config.head != "linear",
        f"{config.epochs} epochs": config.epochs != EPOCHS and not is_full_batch(row.runs[0]),
        f"selection on {config.val_labels} labels": config.val_labels != "clean",
        f"{config.loss} on {config.labels} labels": bool(method and config.labels != method.labels),
        f"{len(config.classes or ())} of the classes": config.classes is not None,
        "a full-batch solver": is_full_batch(row.runs[0]),
    }
    return _that_differ(checks)


def _of_seeds(row: Row) -> list[str]:
    configs = [run.config for run in row.runs]
    seeds = {
        "split": {config.split_seed for config in configs},
        # Full labels are not corrupted.
        "corruption": {each.corruption_seed for each in configs if each.labels != "full"},
    }
    other = {name: sorted(values - {OFFICIAL_SEED}) for name, values in seeds.items()}
    return [f"{name} seed {_listed(values)}" for name, values in other.items() if values]


def _of_knobs(row: Row, data: str) -> list[str]:
    method = METHODS.get(_loss(row))
    defaults = method.knobs() if method else {}
    # The one knob without a default is the authors' constant of the data set.
    k = FORMATTED[data].expected_positives
    wanted = {name: k if each is Parameter.empty else each for name, each in defaults.items()}
    return [
        f"{_loss(row)} with {name} {value:g}"
        for name, value in row.runs[0].config.knobs.items()
        if value != wanted.get(name)
    ]


def _of_grid(row: Row) -> list[str]:
    if not row.grid:
        return []
    tried = {(lr, batch) for lr, batch, _ in row.grid}
    rates, batches = (sorted(set(values)) for values in zip(*tried, strict=True))
    checks = {
        "weight decay": any(decay for _, _, decay in row.grid),
        f"a grid of {len(tried)}, lr {_listed(rates)} and batch {_listed(batches)}": (
            tried != SETTINGS
        ),
    }
    return _that_differ(checks)


def _that_differ(checks: dict[str, bool]) -> list[str]:
    return [what for what, differs in checks.items() if differs]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
