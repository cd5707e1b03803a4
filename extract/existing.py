"""What a store holds already of the images that are asked for, and whether it still stands."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, load_labels, merge_labels
from mlc.extract.backbone import Backbone
from mlc.extract.fast_images import DECODERS
from mlc.extract.images import hash_content, load_image, read_file
from mlc.store import schema
from mlc.store.layout import Layout
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.writer import StoreWriter

OnError = Literal["skip", "raise"]
OnChanged = Literal["raise", "extract"]


def compare_with_store(path: Path, images: ImageSet) -> tuple[LabelTable, list[Path]]:
    """Return what a store at a path will need, if there is one.

    Returns:
        Its label table, of these images and of its others; the files whose features it lacks.

    Raises:
        MlcError: the others are labelled with other classes.
    """
    files = [images.root / str(name) for name in images.file]
    if not path.exists():
        return images.labels, files
    with FeatureStore(path, unfinished=True) as store:
        there = store.image_id[store.status != schema.PENDING]
        others = np.isin(store.image_id, images.image_id, invert=True).any()
    missing = np.isin(images.image_id, there, invert=True)
    lacking = [files[index] for index in np.flatnonzero(missing).tolist()]
    beside = labels_path(path)
    if not (others and beside.is_file()):
        return images.labels, lacking
    earlier = load_labels(beside)
    kept = earlier.rows(np.isin(earlier.image_id, images.image_id, invert=True))
    return merge_labels(kept, images.labels), lacking


def recorded_batches(path: Path) -> tuple[int, int]:
    """Return the images in a batch, and the rows in a shard, of the store at a path."""
    with FeatureStore(path, unfinished=True) as store:
        return store.batch_size, store.shard_rows


def from_anywhere(layout: Layout, path: Path, root: Path) -> Layout:
    """Have images of another root than the store's added under their whole paths."""
    with FeatureStore(path, unfinished=True) as store:
        if store.made_by["root"] == str(root.resolve()):
            return layout
    return replace(layout, file=np.array([str(root.resolve() / each) for each in layout.file]))


def look_for_changes(
    writer: StoreWriter,
    root: Path,
    files: Sequence[Path],
    asked: NDArray[np.bool_],
    on_changed: OnChanged,
) -> None:
    """Do not take stored features for those of another photo of the same name.

    Files that are newer than the store are compared with it by content hash; all of them, if the
    store was made from another folder.

    Args:
        writer: of the store.
        root: the folder of the images now.
        files: (N,) of every row.
        asked: (N,) rows that this extraction is about.
        on_changed: "extract" has changed photos written again.

    Raises:
        MlcError: a photo has changed, and that is to "raise".
    """
    moved = writer.made_by["root"] != str(root.resolve())
    created, stored = writer.made_by["created"], writer.content_hash()
    changed = []
    for row in np.flatnonzero(asked & (writer.status == schema.OK)).tolist():
        try:
            about = files[row].stat()
            # A photo that takes another's place may be old; that it was put there is not.
            newer = moved or max(about.st_mtime, about.st_ctime) >= created
            if newer and hash_content(read_file(files[row])) != stored[row]:
                changed.append(row)
        except OSError:
            continue  # it is gone: its features are kept
    if changed and on_changed == "raise":
        more = f", and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        raise MlcError(
            f"{writer.path}: holds features of another photo than {files[changed[0]]}, by its "
            f"content{more}; take the new ones with --on-changed extract, or name another store "
            "with --out"
        )
    if changed:
        writer.set_pending(np.array(changed, np.intp))


def find_mended(
    bad: NDArray[np.bool_], files: Sequence[Path], backbone: Backbone, on_error: OnError
) -> NDArray[np.bool_]:
    """Return which (N,) images were bad in an earlier call and can be read now.

    Raises:
        MlcError: one still is, and that is to "raise".
    """
    scratch = {backbone.squares: backbone.squares.blank(1)[:, 0]}
    decode = DECODERS[backbone.key.decode]
    mended = np.zeros(len(files), dtype=np.bool_)
    for row in np.flatnonzero(bad).tolist():
        error = load_image(files[row], scratch, decode=decode).error
        if error and on_error == "raise":
            raise MlcError(f"{files[row]}: {error}; mend it, or pass --on-error skip")
        mended[row] = not error
    return mended
