"""What stores a folder has, and what else takes space there: the output of ``mlc store list``."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.catalog import disk_usage, find_leftovers, find_stores
from mlc.store.problems import BROKEN
from mlc.store.reader import FeatureStore, labels_path


def store_records(folder: Path) -> list[dict[str, str]]:
    """Return a record for each store of a folder, then for each leftover of a killed process.

    Of a store that cannot be read ``state`` says why. Space on disk is what the disk gave: a store
    that is being filled has holes, so its nominal size is larger.

    Raises:
        MlcError: there is no such folder.
    """
    if not folder.is_dir():
        raise MlcError(f"{folder}: no such folder; mlc extract makes features/")
    records = [_record(path, _describe(path)) for path in find_stores(folder)]
    for part in find_leftovers(folder):
        records.append(_record(part.path, {"state": part.describe()}))
    return records


def _record(path: Path, known: Mapping[str, str]) -> dict[str, str]:
    usage = disk_usage(path)
    blank = dict.fromkeys(
        ("good", "bad", "pending", "backbone", "px", "engine", "features", "views"), ""
    )
    return {
        "store": str(path),
        **blank,
        "labels": "",
        "on disk": f"{usage.allocated_bytes / 1e6:,.1f} MB",
        "nominal": f"{usage.nominal_bytes / 1e6:,.1f} MB",
        "made": "",
        **known,
    }


def _describe(path: Path) -> dict[str, str]:
    """Return what a store says of itself, or why it cannot be read."""
    labels = {"labels": "yes" if labels_path(path).is_file() else "none"}
    try:
        with FeatureStore(path, unfinished=True) as store:
            return labels | _contents(store)
    except MlcError as error:
        return labels | {"state": str(error).removeprefix(f"{path}: ")}
    except BROKEN as error:
        return labels | {"state": f"damaged ({type(error).__name__}: {error})"}


def _contents(store: FeatureStore) -> dict[str, str]:
    counts = {
        name: f"{int((store.status == value).sum()):,}"
        for name, value in (("good", schema.OK), ("bad", schema.BAD), ("pending", schema.PENDING))
    }
    return {
        **counts,
        "backbone": store.key["backbone"],
        "px": str(store.key["size_px"]),
        "engine": store.key["engine"],
        "features": ",".join(store.key["features"]),
        "views": ",".join(store.key["views"]),
        "made": _date(store.made_by),
        "state": "complete" if store.complete else "unfinished",
    }


def _date(made_by: Mapping[str, Any]) -> str:
    created = made_by.get("created")
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(created)) if created else ""
