"""What a label table holds, in words and numbers: the output of ``mlc data prepare``."""

import numpy as np

from mlc.datasets.labels import SPLITS, LabelTable


def split_records(table: LabelTable) -> list[dict[str, str]]:
    """Return a record for each split: images, and positives of an image, true and observed."""
    records = []
    for name in SPLITS:
        part = table.part(name)
        counts = part.targets().sum(axis=1)
        seen = (part.observed == 1).sum(axis=1)
        records.append(
            {
                "split": name,
                "images": f"{len(part):,}",
                "positives per image": f"{counts.mean():.2f}",
                "least": str(counts.min()),
                "most": str(counts.max()),
                "observed positives": f"{seen.mean():.2f}",
                "observed negatives": f"{(part.observed == -1).sum(axis=1).mean():.2f}",
                "without a positive": f"{(counts == 0).sum():,}",
            }
        )
    return records


def class_records(table: LabelTable) -> list[dict[str, str]]:
    """Return a record for each class: its images in each split, and its share of the training."""
    positives = {name: table.part(name).targets().sum(axis=0) for name in SPLITS}
    train = np.maximum(1, (table.split == "train").sum())
    return [
        {
            "class": name,
            **{split: f"{positives[split][column]:,}" for split in SPLITS},
            "train share": f"{100 * positives['train'][column] / train:.2f} %",
        }
        for column, name in enumerate(table.classes)
    ]
