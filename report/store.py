"""What a store holds, in words: the output of ``mlc store info``."""

from pathlib import Path

from mlc.store import schema
from mlc.store.reader import FeatureStore, labels_path


def describe_store(path: Path) -> str:
    """Return the lines of ``mlc store info``; an unfinished store is described too.

    Raises:
        MlcError: there is no store, or it is damaged.
    """
    with FeatureStore(path, unfinished=True) as store:
        counts = {
            name: int((store.status == value).sum())
            for name, value in (
                ("good", schema.OK),
                ("bad", schema.BAD),
                ("pending", schema.PENDING),
            )
        }
        lines = [
            f"{path}: {'complete' if store.complete else 'unfinished'}, "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items()),
            f"size: {size_bytes(path) / 1e6:,.1f} MB",
            *(f"layer {layer}: pooled {store.shape(layer)}" for layer in store.layers),
            *(f"{field}: {value}" for field, value in store.key.items()),
            *(f"made by {field}: {value}" for field, value in store.made_by.items()),
            f"labels: {labels_path(path) if labels_path(path).is_file() else 'none beside it'}",
            *(f"bad image: {file}: {reason}" for file, reason in store.errors().items()),
        ]
    return "\n".join(lines)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())
