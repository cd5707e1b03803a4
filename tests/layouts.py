"""Small data sets that tests draw: COCO's layout with pictures of digits."""

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from mlc.datasets.digits import draw

CATEGORIES = [{"id": 10 * digit + 1, "name": f"digit {digit}"} for digit in range(10)]


def coco_layout(root: Path, train: int = 120, test: int = 60, size_px: int = 96) -> Path:
    """Draw a COCO 2014 folder; the last image of each part has no annotation."""
    bunch = load_digits()
    (root / "annotations").mkdir(parents=True)
    first = 1
    for part, count in (("train2014", train), ("val2014", test)):
        (root / part).mkdir()
        generator = np.random.default_rng(count)
        images, annotations = [], []
        for image_id in range(first, first + count):
            picture, digits = draw(bunch.images, bunch.target, generator)
            name = f"COCO_{part}_{image_id:012}.jpg"
            picture.resize((size_px, size_px)).save(root / part / name)
            images.append({"id": image_id, "file_name": name})
            kept = [] if image_id == first + count - 1 else digits
            annotations += [
                {"id": len(annotations), "image_id": image_id, "category_id": 10 * digit + 1}
                for digit in kept
            ]
        first += count
        write_annotations(root, part, images, annotations)
    return root


def write_annotations(root: Path, part: str, images: list, annotations: list) -> None:
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
