"""What lies in a folder of stores: the stores, what killed processes left, and the space it takes.

Beside a store ``NAME`` lie its labels ``NAME.labels.npz``, its ``.NAME.lock``, ``.NAME.leases``
and ``.NAME.journal``. A killed creation leaves ``.NAME.partial-PID``, a killed removal
``.NAME.removed``.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlc.store import schema

BLOCK_BYTES = 512  # the unit of st_blocks, whatever blocks the file system has
REMOVED = "removed"
# What a name says of a file; those of the second table are no leftovers while their store is there.
CUT_OFF = {
    "partial": "left by a creation that was cut off",
    REMOVED: "left by a removal that was cut off",
}
OF_A_STORE = {
    "lock": "lock without its store",
    "leases": "leases without their store",
    "journal": "journal without its store",
    "labels": "labels without their store",
}
_SUFFIX = "|".join(map(re.escape, schema.SUFFIXES))
_HIDDEN = re.compile(
    rf"\.(?P<store>.+(?:{_SUFFIX}))\."
    r"(?:labels\.npz\.)?(?P<kind>partial|removed|lock|leases|journal)(?:-[0-9]+)?"
)
_LABELS = re.compile(rf"(?P<store>.+(?:{_SUFFIX}))\.(?P<kind>labels)\.npz")


@dataclass(frozen=True)
class Beside:
    """A file or folder that belongs to a store.

    Attributes:
        path: where it is.
        store: path of the store, which may not be there.
        kind: a key of CUT_OFF or OF_A_STORE.
    """

    path: Path
    store: Path
    kind: str

    def is_leftover(self) -> bool:
        """Say whether nobody needs it: whoever was at work on it was killed, or is right now."""
        return self.kind in CUT_OFF or not os.path.lexists(self.store)

    def describe(self) -> str:
        """Return e.g. ``lock without its store``."""
        return (CUT_OFF | OF_A_STORE)[self.kind]


@dataclass(frozen=True)
class DiskUsage:
    """Space of a file, or of all that is in a folder.

    Attributes:
        allocated_bytes: what the disk gave, folders included: what comes back on removal.
        nominal_bytes: sum of the sizes of the files.
    """

    allocated_bytes: int
    nominal_bytes: int


def find_stores(folder: Path) -> list[Path]:
    """Return what is named like a store in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in schema.SUFFIXES)


def find_leftovers(folder: Path) -> list[Beside]:
    """Return what killed processes left in a folder, or living ones are at work on, by name."""
    found = filter(None, map(beside, sorted(folder.iterdir())))
    return [each for each in found if each.is_leftover()]


def find_beside(store: Path) -> list[Beside]:
    """Return all that belongs to a store, which may not be there, by name."""
    if not store.parent.is_dir():
        return []
    found = filter(None, map(beside, sorted(store.parent.iterdir())))
    return [each for each in found if each.store.name == store.name]


def beside(path: Path) -> Beside | None:
    """Return what a path says by its name, None if it is not named like a part of a store."""
    match = _HIDDEN.fullmatch(path.name) or _LABELS.fullmatch(path.name)
    if match is None:
        return None
    return Beside(path, path.with_name(match["store"]), match["kind"])


def disk_usage(path: Path) -> DiskUsage:
    """Return the space of a file or folder; links in it are not followed."""
    allocated = nominal = 0
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # a writer at work renames its files
                status = os.lstat(os.path.join(folder, name))
                allocated += status.st_blocks * BLOCK_BYTES
                nominal += status.st_size if name in files else 0
    with suppress(FileNotFoundError):
        status = path.lstat()
        allocated += status.st_blocks * BLOCK_BYTES
        nominal += 0 if path.is_dir() else status.st_size
    return DiskUsage(allocated, nominal)
