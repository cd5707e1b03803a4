"""Any COCO-format JSON with its folder of images, or several of them, one for each split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from os.path import commonpath, isfile
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, full_labels

SPLITS_OF = {1: ("",), 2: ("train", "test"), 3: ("train", "val", "test")}  # by number of files
PROBED = 100  # images of a file that are looked for to find their folder


@dataclass(frozen=True)
class Part:
    """What one JSON says of its n images, rows sorted by id as text.

    Attributes:
        image_id: (n,) text, unique.
        file: (n,) text, the ``file_name`` of each image.
        classes: L names, in the order of the JSON's categories.
        category_id: L ids of the categories.
        true: (n, L) bool: whether an annotation, be it a crowd, is of the class.
    """

    image_id: NDArray[np.str_]
    file: NDArray[np.str_]
    classes: tuple[str, ...]
    category_id: tuple[int | str, ...]
    true: NDArray[np.bool_]


def read_coco_json(
    paths: Sequence[Path], root: Path | None = None, keep_unlabelled: bool = False
) -> ImageSet:
    """Read one JSON, or two (train, test) or three (train, val, test).

    Every annotation counts, crowds too. Classes are in the order of their category ids. Rows are
    in the order of the files, each with its ids sorted as text. One file leaves the split open,
    two have no validation rows; ``assign_splits`` settles that.

    A ``file_name`` is relative to the root or, if the images are not there, to the one folder of
    ``images``, ``WORD`` and ``images/WORD`` below it that has them; ``WORD`` is the last of the
    JSON's name, ``train2017`` of ``instances_train2017.json``. ``file`` of the result is always
    relative to the root.

    Tools number the images of each file from 0, and ids should tell photos apart: where two files
    share an id, the ids of all files get their split before them, ``train/17``.

    Args:
        paths: the JSON files.
        root: the folder of the images; by default the folder of each JSON and, if that is called
            ``annotations``, the folder above it too.
        keep_unlabelled: keep the images without annotations in the label table, all of their
            labels negative.

    Returns:
        All listed images, and the labels of those that the switch keeps.

    Raises:
        MlcError: a file is missing, is not COCO's format, contradicts itself or another one, or
            names an image outside the root; or several folders have the images.
    """
    if len(paths) not in SPLITS_OF:
        raise MlcError(f"data: expected train, val and test, got {len(paths)} files; merge some")
    parts = [_by_category_id(path, _checked_files(path, read_part(path))) for path in paths]
    _require_same_classes(paths, parts)
    base, file = _below_one_root(paths, parts, root)
    _require_other_photos(paths, parts, file)
    split = np.repeat(SPLITS_OF[len(paths)], [len(part.image_id) for part in parts])
    image_id = np.concatenate([part.image_id for part in parts])
    if len(np.unique(image_id)) < len(image_id):
        image_id = np.array([f"{each}/{name}" for each, name in zip(split, image_id, strict=True)])
    true = np.concatenate([part.true for part in parts])
    table = LabelTable(
        image_id=image_id,
        file=np.concatenate(file),
        classes=parts[0].classes,
        observed=full_labels(true),
        true=true,
        split=split,
        dataset=f"json-{'-'.join(dict.fromkeys(path.stem for path in paths))}",
    )
    labels = table if keep_unlabelled else table.rows(np.asarray(true.any(axis=1)))
    return ImageSet(root=base, image_id=image_id, file=table.file, labels=labels)


def read_part(path: Path) -> Part:
    """Read one JSON of ``images``, ``annotations`` and ``categories``.

    Raises:
        MlcError: there is no such file, it is not COCO's format, or it contradicts itself.
    """
    images, annotations, categories = _parse(path)
    names = {str(image["id"]): image["file_name"] for image in images}
    if len(names) != len(images):
        raise MlcError(f"{path}: image id {_first_repeat(images)} is there twice")
    for what, entries in (("images", names), ("annotations", annotations)):
        if not entries:
            raise MlcError(f"{path}: lists no {what}")
    ids = sorted(names)
    row = {image_id: index for index, image_id in enumerate(ids)}
    column = {category["id"]: index for index, category in enumerate(categories)}
    if len(column) != len(categories):
        raise MlcError(f"{path}: a category id is there twice")
    true = np.zeros((len(ids), len(categories)), dtype=np.bool_)
    for annotation in annotations:
        try:
            true[row[str(annotation["image_id"])], column[annotation["category_id"]]] = True
        except KeyError as error:
            raise MlcError(
                f"{path}: annotation {annotation.get('id')} names image or category "
                f"{error.args[0]!r}, which the file does not list"
            ) from None
    classes = tuple(str(category["name"]) for category in categories)
    file = np.array([names[each] for each in ids])
    return Part(np.array(ids), file, classes, tuple(column), true)


def _parse(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content["annotations"]
        categories = content["categories"]
        for entries in (images, annotations, categories):
            if not isinstance(entries, list):
                raise TypeError(f"a list, where {type(entries).__name__} is,")
        for entries, keys in (
            (images, ("id", "file_name")),
            (annotations, ("image_id", "category_id")),
            (categories, ("id", "name")),
        ):
            for entry in entries:
                for key in keys:
                    hash(entry[key])
        for image in images:
            if not isinstance(image["file_name"], str):
                raise TypeError(f"file_name {image['file_name']!r}")
    except OSError as error:
        raise MlcError(f"{path}: cannot be read ({error.strerror}); name a COCO JSON") from None
    except (ValueError, RecursionError) as error:
        raise MlcError(f"{path}: not JSON ({error}); unpack or export it again") from None
    except (KeyError, TypeError, IndexError) as error:
        raise MlcError(
            f"{path}: not COCO annotations, {error} is missing or of another kind; "
            "expected lists of images, annotations and categories"
        ) from None
    return images, annotations, categories


def _first_repeat(images: list[Any]) -> str:
    seen: set[str] = set()
    for image in images:
        if str(image["id"]) in seen:
            break
        seen.add(str(image["id"]))
    return repr(image["id"])


def _checked_files(path: Path, part: Part) -> Part:
    """Return a part with tidy file names, all of them below the root and different."""
    seen: dict[str, str] = {}
    for image_id, name in zip(part.image_id.tolist(), part.file.tolist(), strict=True):
        file, text = normpath(name), image_id + name
        if file == "." or "\0" in text or text.encode(errors="ignore").decode() != text:
            raise MlcError(f"{path}: image {image_id!r} has no usable file_name, got {name!r}")
        if file.startswith("/") or PurePosixPath(file).parts[0] == "..":
            raise MlcError(
                f"{path}: image {image_id!r} lies outside the root, got file_name {name!r}; "
                "make it relative to the images' folder"
            )
        if file in seen:
            raise MlcError(
                f"{path}: images {seen[file]} and {image_id} have the same file_name, {file!r}"
            )
        seen[file] = image_id
    return replace(part, file=np.array(list(seen)))


def _by_category_id(path: Path, part: Part) -> Part:
    """Return a part with its classes in the order of their category ids."""
    if not part.classes:
        raise MlcError(f"{path}: lists no categories")
    for name in part.classes:
        if part.classes.count(name) > 1:
            raise MlcError(f"{path}: {part.classes.count(name)} categories are called {name!r}")
    try:
        order = sorted(range(len(part.classes)), key=part.category_id.__getitem__)
    except TypeError:
        raise MlcError(
            f"{path}: category ids should all be numbers or all be text, got {part.category_id}"
        ) from None
    return replace(
        part,
        classes=tuple(part.classes[column] for column in order),
        category_id=tuple(part.category_id[column] for column in order),
        true=part.true[:, order],
    )


def _require_same_classes(paths: Sequence[Path], parts: Sequence[Part]) -> None:
    first = dict(zip(parts[0].category_id, parts[0].classes, strict=True))
    for path, part in zip(paths, parts, strict=True):
        other = first.items() ^ dict(zip(part.category_id, part.classes, strict=True)).items()
        if other:
            raise MlcError(
                f"{path}: has other categories than {paths[0]}, {min(other, key=repr)} is in one "
                "of them; list the same in both"
            )


def _below_one_root(
    paths: Sequence[Path], parts: Sequence[Part], root: Path | None
) -> tuple[Path, list[NDArray[np.str_]]]:
    """Return the root, and the files of each part relative to it."""
    found = [_find(path, part, root) for path, part in zip(paths, parts, strict=True)]
    bases = {base for base, _ in found}
    if len(bases) == 1:
        base = bases.pop()
    else:  # only without a root: each JSON has a folder of its own
        base = Path(commonpath([each.absolute() for each in bases]))
        found = [(base, each.absolute().relative_to(base) / place) for each, place in found]
    files = [
        np.array([(place / name).as_posix() for name in part.file.tolist()])
        for (_, place), part in zip(found, parts, strict=True)
    ]
    return base, files


def _find(path: Path, part: Part, root: Path | None) -> tuple[Path, Path]:
    """Return the base that a part's files are below, and the folder there that holds them."""
    bases = [path.parent if root is None else root]
    if root is None and path.absolute().parent.name == "annotations":
        bases.append(path.absolute().parent.parent)
    word = path.stem.rpartition("_")[2]
    places = [Path(), Path("images"), Path(word), Path("images", word)]
    found: dict[Path, tuple[Path, Path]] = {}  # by what it resolves to: a link is no other folder
    for base, place in product(bases, places):
        if any(isfile(base / place / name) for name in part.file[:PROBED].tolist()):
            found.setdefault((base / place).resolve(), (base, place))
    home = (bases[0], Path())
    if not found or home in found.values():  # none: labels can be read without their images
        return home
    if len(found) > 1:
        folders = " and ".join(str(base / place) for base, place in found.values())
        raise MlcError(f"{path}: its images are in {folders}; pass one of them as --root")
    return next(iter(found.values()))


def _require_other_photos(
    paths: Sequence[Path], parts: Sequence[Part], files: Sequence[NDArray[np.str_]]
) -> None:
    """Raise an MlcError if two parts have a photo in common: it would be tested on itself."""
    for one, other in combinations(range(len(parts)), 2):
        both = np.intersect1d(files[one], files[other])
        if len(both):
            raise MlcError(
                f"{paths[other]}: {len(both):,} images are also in {paths[one]}, the first is "
                f"{str(both[0])!r}; list each image in one of them"
            )
