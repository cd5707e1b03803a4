"""LOSSES: the methods of all files of this folder; a new one takes a new file and no more."""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules

import mlc.losses
from mlc.configs.errors import MlcError, choose, nearest
from mlc.losses.method import Method

METHODS = "METHODS"  # the table at the end of a file


def _gather() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for each in iter_modules(mlc.losses.__path__):
        methods = getattr(import_module(f"mlc.losses.{each.name}"), METHODS, None)
        if not isinstance(methods, Mapping):  # a file without a table
            continue
        if twice := found.keys() & methods.keys():
            raise MlcError(f"losses/{each.name}.py: has a loss of another file, {min(twice)!r}")
        found |= methods
    return found


LOSSES: dict[str, Method] = _gather()


def check_knobs(loss: str, knobs: Mapping[str, float | Sequence[float]]) -> None:
    """Raise an MlcError if a loss or a knob is unknown or out of range, before any work starts."""
    method = choose(LOSSES, loss, "loss")
    known = method.knobs()
    for name, value in knobs.items():
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise MlcError(f"knobs: {loss} has no knob {name!r}; {hint}")
        if isinstance(value, Sequence) and name not in method.per_class:
            raise MlcError(f"knobs.{name}: should be one number, got {list(value)}")
        low, high = method.ranges.get(name, (-math.inf, math.inf))
        for number in value if isinstance(value, Sequence) else [value]:
            if not (low <= number <= high and math.isfinite(number)):
                wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
                wanted = wanted if math.isfinite(low) else "a finite number"
                raise MlcError(f"knobs.{name}: should be {wanted}, got {number}")
