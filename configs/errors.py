"""The one error that is a user's to mend, and the sentence for a name that is not in a table."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class MlcError(Exception):
    """A mistake that the user can mend, as ``where: what is wrong, got VALUE; what to do``."""


def nearest(name: str, names: Collection[str]) -> str:
    """Return the part of a sentence that helps with an unknown name.

    The close matches when there are any, else all the names if they are few.
    """
    close = get_close_matches(name.lower(), list(names), n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    if len(names) <= 20:
        return f"choose from {', '.join(sorted(names))}"
    return f"there are {len(names)} names and none is close"


def choose(table: Mapping[str, T], name: str, kind: str) -> T:
    """Look a name up in a literal table, e.g. ``choose(LOSSES, "role", "loss")``.

    Raises:
        MlcError: the name is not in the table; the sentence gives the nearest names.
    """
    if name not in table:
        raise MlcError(f"unknown {kind} {name!r}; {nearest(name, table.keys())}")
    return table[name]
