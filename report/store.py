"""What a store holds, and what was found in it, in words: the output of ``mlc store``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlc.configs.errors import MlcError
from mlc.report.compare_stores import Comparison, array_records, head_records
from mlc.report.console import print_table, shares
from mlc.store import schema
from mlc.store.catalog import disk_usage
from mlc.store.problems import bad_rows
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.verify import Verification

if TYPE_CHECKING:  # timm takes seconds to import
    from mlc.extract.live import Live
    from mlc.extract.repair import Repair

LIVE_COSINE = 0.999  # int8 is closer by far; another machine's arithmetic differs by 1e-6
EXTRACTION_WORDS = {  # by name in a store's ``extraction``
    "images": "{:,} images",
    "bad": "{:,} bad",
    "seconds": "{:,.1f} s",
    "images_per_second": "{:,.1f} images/s",
    "limited_by": "{} limits",
}


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
            f"size: {disk_usage(path.resolve()).nominal_bytes / 1e6:,.1f} MB",
            *(describe_array(store, array) for array in store.arrays),
            *(f"{field}: {value}" for field, value in store.key.items()),
            *(f"made by {field}: {value}" for field, value in store.made_by.items()),
            *describe_extraction(store.extraction),
            f"labels: {labels_path(path) if labels_path(path).is_file() else 'none beside it'}",
            *(f"bad image: {file}: {reason}" for file, reason in store.errors().items()),
        ]
    return "\n".join(lines)


def describe_array(store: FeatureStore, array: str) -> str:
    """Return e.g. ``pre_logits/tokens: (300, 2, 49, 1280) float16, a grid of 7 x 7``."""
    layer, kind = array.rsplit("/", 1)
    features = store.features(layer, kind)
    grid = store.grids.get(layer) if kind == schema.TOKENS else None
    of_grid = f", a grid of {grid[0]} x {grid[1]}" if grid else ""
    clipped = store.clipped(array)
    of_clipped = ""
    if clipped.any():
        images = int((clipped > 0).any(axis=1).sum())
        of_clipped = f", {int(clipped.sum()):,} numbers of {images:,} images clipped"
    return f"{array}: {features.shape} {features.dtype}{of_grid}{of_clipped}"


def describe_extraction(summary: Mapping[str, Any]) -> list[str]:
    """Return what is known of how a store was extracted last; no lines if nothing is.

    E.g. ``last extraction: 300 images, 2 bad, 12.0 s, 25.0 images/s, decode limits`` and
    ``its stages: read 2 %, decode 76 %, infer 12 %, write 10 %; GPU 50 % idle``.

    Args:
        summary: as ``Pace.summary`` says, or some of it.
    """
    known = {name: value for name, value in summary.items() if value is not None}
    words = [form.format(known[name]) for name, form in EXTRACTION_WORDS.items() if name in known]
    busy = known.get("busy_seconds", {})
    times = [shares(busy, tuple(busy))] if busy else []
    if "idle_share" in known:
        times.append(f"GPU {100 * known['idle_share']:.0f} % idle")
    lines = {"last extraction: ": ", ".join(words), "its stages: ": "; ".join(times)}
    return [start + line for start, line in lines.items() if line]


def print_verification(path: Path, found: Verification) -> None:
    """Print what is bad in a store.

    Raises:
        MlcError: something is; the sentence says what to do.
    """
    for problem in found.problems:
        click.echo(f"bad: {problem.describe()}", err=True)
    pending = f"; {found.pending:,} are still to be extracted" if found.pending else ""
    click.echo(
        f"{found.images - found.pending:,} images, {found.read_bytes / 1e6:,.1f} MB of features "
        f"compared with their checksums{pending}"
    )
    if found.problems:
        rows = len(bad_rows(found.problems))
        raise MlcError(f"{path}: {rows:,} images are damaged; mend it with mlc store repair")
    click.echo("nothing is bad")


def print_live(path: Path, compared: Sequence["Live"]) -> None:
    """Print how far a store is from what is extracted now.

    Raises:
        MlcError: it is another, beyond what float32 arithmetic of another machine explains.
    """
    for each in compared:
        click.echo(
            f"{each.array}: {each.identical:,} of {each.units:,} equal byte for byte to what is "
            f"extracted now; cosine {each.cost.cosine_worst:.6f} at worst, largest difference "
            f"{each.cost.max_difference:.3g}"
        )
    worst = min(compared, key=lambda each: each.cost.cosine_worst)
    if worst.cost.cosine_worst < LIVE_COSINE:
        raise MlcError(
            f"{path}: {worst.array} is not what is extracted now, cosine "
            f"{worst.cost.cosine_worst:.4f}; extract again to another --out"
        )


def print_comparison(compared: Comparison) -> None:
    """Print how far two stores are apart, and what that means to heads."""
    first, second = compared.paths
    click.echo(f"{compared.images:,} images of {first} and {second}")
    print_table(array_records(compared))
    if compared.heads:
        click.echo()
        print_table(head_records(compared))
    for note in compared.notes:
        click.echo(note)


def print_repair(path: Path, done: "Repair") -> None:
    """Print what a repair did."""
    for problem in done.problems:
        click.echo(f"was bad: {problem.describe()}", err=True)
    click.echo(f"{done.rows:,} images extracted again" if done.rows else "nothing was bad")
    if done.left:
        click.echo(f"{done.left:,} images are still to be extracted, by mlc extract")
    click.echo(f"store: {path}")
