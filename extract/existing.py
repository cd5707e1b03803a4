"""What a store holds already of the images that are asked for, and whether it still stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, load_labels, merge_labels
from mlc.extract.backbone import Backbone
from mlc.extract.decoders import choose_decoder
from mlc.extract.images import hash_content, load_image, read_file
from mlc.store import schema
from mlc.store.key import FeatureKey, require_same_key
from mlc.store.layout import Layout
from mlc.store.reader import FeatureStore, labels_path

OnError = Literal["skip", "raise"]
OnChanged = Literal["raise", "extract"]


@dataclass(frozen=True)
class Found:
    """What there is already of a store.

    Attributes:
        labels: its label table, of the images that are asked for and of its others.
        lacking: files whose features it lacks.
        image_id: (N,) text, its rows when it has them all.
        batches: images in a batch, and rows in a shard; None if it is not there.
    """

    labels: LabelTable
    lacking: list[Path]
    image_id: NDArray[np.str_]
    batches: tuple[int, int] | None = None


def compare_with_store(path: Path, images: ImageSet, key: FeatureKey) -> Found:
    """Return what a store at a path has of some images, if there is one.

    Raises:
        MlcError: it was made with other settings, or has other images with labels of other
            classes.
    """
    files = [images.root / str(name) for name in images.file]
    if not path.exists():
        return Found(images.labels, files, images.image_id)
    with FeatureStore(path, unfinished=True) as store:
        require_same_key(path, store.key, key)
        stored, batches = store.image_id, (store.batch_size, store.shard_rows)
        there = stored[store.status != schema.PENDING]
    missing = np.isin(images.image_id, there, invert=True)
    new = images.image_id[np.isin(images.image_id, stored, invert=True)]
    return Found(
        labels=_labels(path, stored, images),
        lacking=[files[index] for index in np.flatnonzero(missing).tolist()],
        image_id=np.concatenate([stored, new]),
        batches=batches,
    )


def recorded_engine(path: Path) -> str:
    """Return the engine that made the features of the store at a path."""
    with FeatureStore(path, unfinished=True) as store:
        return str(store.key["engine"])


def files_of(image_id: NDArray[np.str_], images: ImageSet) -> tuple[list[Path], NDArray[np.bool_]]:
    """Return the file of each row (N,) of a store, and which rows are of these images."""
    name = dict(zip(images.image_id.tolist(), images.file.tolist(), strict=True))
    files = [images.root / name.get(each, "") for each in image_id.tolist()]
    return files, np.isin(image_id, images.image_id)


def find_again(
    path: Path, images: ImageSet, backbone: Backbone, on_changed: OnChanged, on_error: OnError
) -> NDArray[np.str_]:
    """Return the ids of images that a store has and that are to be extracted again.

    Those are other photos now than when they were extracted, or were bad and can be read now.

    Raises:
        MlcError: a photo has changed, or is still bad, and that is to "raise".
    """
    if not path.exists():
        return np.zeros(0, dtype=np.str_)
    with FeatureStore(path, unfinished=True) as store:
        files, asked = files_of(store.image_id, images)
        changed = _find_changed(store, images.root, files, asked)
        if changed and on_changed == "raise":
            more = f", and {len(changed) - 1:,} more" if len(changed) > 1 else ""
            raise MlcError(
                f"{path}: holds features of another photo than {files[changed[0]]}, by its "
                f"content{more}; take the new ones with --on-changed extract, or name another "
                "store with --out"
            )
        bad = asked & (store.status == schema.BAD)
        mended = _find_mended(bad, files, backbone, on_error)
        return store.image_id[np.array([*changed, *mended], np.intp)]


def from_anywhere(layout: Layout, path: Path, root: Path) -> Layout:
    """Have images of another root than the store's added under their whole paths."""
    with FeatureStore(path, unfinished=True) as store:
        if store.made_by["root"] == str(root.resolve()):
            return layout
    return replace(layout, file=np.array([str(root.resolve() / each) for each in layout.file]))


def _labels(path: Path, stored: NDArray[np.str_], images: ImageSet) -> LabelTable:
    """Return the labels of some images, and of the others that a store has."""
    beside = labels_path(path)
    if not np.isin(stored, images.image_id, invert=True).any() or not beside.is_file():
        return images.labels
    earlier = load_labels(beside)
    kept = earlier.rows(np.isin(earlier.image_id, images.image_id, invert=True))
    return merge_labels(kept, images.labels)


def _find_changed(
    store: FeatureStore, root: Path, files: Sequence[Path], asked: NDArray[np.bool_]
) -> list[int]:
    """Return the rows that hold features of another photo than the one of that name now.

    Files that are newer than the store are compared with it by content hash; all of them, if the
    store was made from another folder.
    """
    moved = store.made_by["root"] != str(root.resolve())
    created, stored = store.made_by["created"], store.content_hash()
    changed = []
    for row in np.flatnonzero(asked & (store.status == schema.OK)).tolist():
        try:
            about = files[row].stat()
            # A photo that takes another's place may be old; that it was put there is not.
            newer = moved or max(about.st_mtime, about.st_ctime) >= created
            if newer and hash_content(read_file(files[row])) != stored[row]:
                changed.append(row)
        except OSError:
            continue  # it is gone: its features are kept
    return changed


def _find_mended(
    bad: NDArray[np.bool_], files: Sequence[Path], backbone: Backbone, on_error: OnError
) -> list[int]:
    """Return which rows were bad in an earlier call and can be read now."""
    scratch = {backbone.squares: backbone.squares.blank(1)[:, 0]}
    decode = choose_decoder(backbone.key.decode, backbone.device)
    mended = []
    for row in np.flatnonzero(bad).tolist():
        error = load_image(files[row], scratch, decode=decode).error
        if error and on_error == "raise":
            raise MlcError(f"{files[row]}: {error}; mend it, or pass --on-error skip")
        if not error:
            mended.append(row)
    return mended
