"""import_features(): the MLSPL authors' published feature files as an ordinary store."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs import Config
from mlc.configs.errors import MlcError, choose
from mlc.configs.progress import Progress, silent
from mlc.configs.provenance import made_by
from mlc.datasets.formatted import load_array
from mlc.datasets.labels import LabelTable, save_labels
from mlc.datasets.source import DataConfig, default_root, read_images
from mlc.extract.images import hash_content
from mlc.extract.weights import file_sha256
from mlc.store import schema
from mlc.store.key import FeatureKey
from mlc.store.layout import Layout, shard_rows_for
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.writer import StoreWriter

# Data sets whose label table has its rows in the order of the published features.
PUBLISHED = dict.fromkeys(("coco", "coco-formatted", "cub", "nuswide", "voc", "voc-formatted"))
PARTS = {"train": "train", "val": "test"}  # of the files -> the split of their rows
LAYER = "features"
ARRAY = schema.feature(LAYER, schema.POOLED)
BACKBONE = "resnet50 of the MLSPL authors, imported features"
UNKNOWN = "unknown"  # the authors publish no extraction script
SCAN_ROWS = 4096  # 32 MB of 2,048 numbers
SHOWN = 5
SOURCE = "https://zenodo.org/records/10162606"


class ImportConfig(Config):
    """Which published features become a store, and where.

    Attributes:
        data: the data set whose rows they are: coco, voc, cub or nuswide, or coco-formatted or
            voc-formatted where labels and names are the authors' ``formatted_*.npy``.
        root: the folder of the feature files, and of the data set; by default as DataConfig's.
        out: path of the store; by default ``features/`` and a name that carries its key's hash.
        format: "zarr" or "hdf5"; by default what ``out`` ends in, else Zarr.
    """

    data: str
    root: Path | None = None
    out: Path | None = None
    format: str | None = None


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        path: the store.
        backbone: what is known of it.
        images: rows of the store.
        imported: rows written by this call; the others were there.
    """

    path: Path
    backbone: str
    images: int
    imported: int


def import_features(config: ImportConfig, progress: Progress = silent) -> ImportReport:
    """Make a store of ``{train,val}_features_imagenet_resnet50.npy``, (N, D) float each.

    Rows are those of the data set's label table: train, then test. float32 and float16 are kept
    bit for bit, float64 is rounded to float32, as the authors' code does when it trains. The
    store's key holds a hash of the files, and "unknown" (size 0, no mean and std) where their
    authors say nothing; the content hash of a row is that of its bytes. A killed call loses the
    shard in flight at most; the same call goes on.

    Raises:
        MlcError: the data set or a feature file is not there, they have other numbers of rows,
            features are not finite, or see ``StoreWriter.create_or_resume``.
        KeyboardInterrupt: with a message that says what is kept.
    """
    _check(config)
    table = read_images(DataConfig(data=config.data, root=config.root)).labels
    root = config.root or default_root(config.data)
    files = [root / f"{part}_features_imagenet_resnet50.npy" for part in PARTS]
    parts = _open(files, table)
    sha256 = {}
    for file in files:
        progress(0, len(table), f"hashing {file.name}")
        sha256[file.name] = file_sha256(file)
    layout = _layout(config, root, table, parts, sha256)
    path = _store_path(config, table, layout.key)
    with writer_lock(path):
        if not path.exists():  # a store that is there was made of the same files, and checked
            for file, part in zip(files, parts, strict=True):
                _require_finite(file, part)
        imported = _fill(path, layout, table, parts, progress)
    return ImportReport(path, BACKBONE, len(table), imported)


def _check(config: ImportConfig) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    choose(PUBLISHED, config.data, "data set with published features")
    if config.out is not None:
        schema.format_of(config.out)
    if config.format is not None:
        suffix = choose(schema.FORMATS, config.format, "format").suffix
        if config.out is not None and config.out.suffix != suffix:
            raise MlcError(
                f"out: {config.out} does not end in {suffix}, as --format {config.format} asks"
            )


def _open(paths: Sequence[Path], table: LabelTable) -> list[NDArray[Any]]:
    """Map the feature files (n, D), whose rows are those of the table's splits."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MlcError(
            f"{paths[0].parent}: no {', '.join(missing)} there; get it from {SOURCE}, "
            "or pass --root DIR"
        )
    parts = [load_array(path, mapped=True) for path in paths]
    for path, part, split in zip(paths, parts, PARTS.values(), strict=True):
        if part.dtype not in (np.float16, np.float32, np.float64) or part.ndim != 2:
            raise MlcError(
                f"{path}: expected a row of floats for each image, got {part.dtype} of shape "
                f"{part.shape}; get it again from {SOURCE}"
            )
        images = int((table.split == split).sum())
        if len(part) != images:
            raise MlcError(
                f"{path}: has {len(part):,} rows, and {table.dataset} {images:,} labelled images "
                f"in split {split!r}; take features and labels of the same data set"
            )
    if parts[0].shape[1] != parts[1].shape[1]:
        raise MlcError(
            f"{paths[1]}: has rows of {parts[1].shape[1]} numbers, {paths[0].name} has of "
            f"{parts[0].shape[1]}; take both from the same place"
        )
    return parts


def _layout(
    config: ImportConfig,
    root: Path,
    table: LabelTable,
    parts: Sequence[NDArray[Any]],
    sha256: dict[str, str],
) -> Layout:
    """Lay the store out; no settings of a backbone are recorded, as none here makes the same."""
    recorded = made_by() | {
        "backbone": BACKBONE,
        "weights_licence": f"{UNKNOWN}, see {SOURCE}",
        "backbone_config": None,
        "data": config.data,
        "root": str(root.resolve()),
        "sha256": sha256,
    }
    return Layout(
        key=_feature_key(list(sha256.values()), parts),
        image_id=table.image_id,
        file=table.file,
        arrays={ARRAY: parts[0].shape[1:]},
        batch_size=0,  # there was no forward pass
        shard_rows=shard_rows_for(len(table)),
        made_by=recorded,
    )


def _feature_key(sha256: Sequence[str], parts: Sequence[NDArray[Any]]) -> FeatureKey:
    half = all(part.dtype == np.float16 for part in parts)
    return FeatureKey(
        backbone="imported:resnet50",
        weights=f"imported:{hashlib.sha256(' '.join(sha256).encode()).hexdigest()}",
        layers=(LAYER,),
        size_px=0,
        resize=UNKNOWN,
        interpolation=UNKNOWN,
        decode=UNKNOWN,
        mean=(),
        std=(),
        precision=UNKNOWN,
        engine=UNKNOWN,
        views=(UNKNOWN,),
        features=("pooled:float16" if half else "pooled:float32",),
    )


def _store_path(config: ImportConfig, table: LabelTable, key: FeatureKey) -> Path:
    if config.out is not None:
        return config.out
    suffix = schema.FORMATS[config.format or "zarr"].suffix
    name = key.backbone.replace(":", "-")
    return Path("features") / f"{table.dataset}-{name}-{key.digest()}{suffix}"


def _require_finite(path: Path, part: NDArray[Any]) -> None:
    bad: list[int] = []
    for start in range(0, len(part), SCAN_ROWS):
        finite = np.isfinite(_as_stored(part[start : start + SCAN_ROWS])).all(axis=1)
        bad += (start + np.flatnonzero(~finite)).tolist()
    if bad:
        rows = ", ".join(map(str, bad[:SHOWN])) + (", …" if len(bad) > SHOWN else "")
        raise MlcError(
            f"{path}: features that are not finite numbers in {len(bad):,} of {len(part):,} rows: "
            f"{rows}; get it again from {SOURCE}"
        )


def _as_stored(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large for float32: then it is not finite
        return np.asarray(values, dtype=np.float32)


def _fill(
    path: Path,
    layout: Layout,
    table: LabelTable,
    parts: Sequence[NDArray[Any]],
    progress: Progress,
) -> int:
    """Write the shards that are not there yet, and the labels; return how many rows that were."""
    _require_same_rows(path, layout)
    writer = StoreWriter.create_or_resume(path, layout)
    pending = writer.status == schema.PENDING
    todo = [shard for shard in writer.shards() if pending[shard.start : shard.stop].any()]
    total, imported = sum(map(len, todo)), 0
    with writer.filling():
        save_labels(table, labels_path(path))
        for shard in todo:
            values = _rows(parts, shard)
            hashes = np.array([hash_content(row.tobytes()) for row in values])
            features = {ARRAY: np.concatenate([_as_stored(row) for row in values])[:, None]}
            writer.write_shard(shard, features, hashes, np.full(len(shard), ""))
            imported += len(shard)
            progress(imported, total)
    return imported


def _require_same_rows(path: Path, layout: Layout) -> None:
    """Refuse a store with other rows: which features are whose is all that the files say."""
    if not path.exists():
        return
    with FeatureStore(path, unfinished=True) as store:
        if not np.array_equal(store.image_id, layout.image_id):
            raise MlcError(
                f"{path}: holds {len(store.image_id)} other images than the "
                f"{len(layout.image_id)} asked for; name another store with --out"
            )


def _rows(parts: Sequence[NDArray[Any]], rows: range) -> list[NDArray[Any]]:
    """Return the rows (1, D) of some images, as they are in the files."""
    first = len(parts[0])
    return [
        parts[0][row : row + 1] if row < first else parts[1][row - first : row - first + 1]
        for row in rows
    ]
