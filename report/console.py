"""How mlc talks: progress bars on a terminal, JSON lines elsewhere, tables of results."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from mlc.configs.progress import Progress

LOG_SECONDS = 5.0  # between two JSON lines
ANY_WIDTH = 10_000  # where there is no terminal, so that nothing is cut


class Speed:
    """Units a second and seconds left, from the first unit on: loading a model does not count."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> tuple[float, float]:
        """Return (units a second, seconds left); (0, 0) until there are two counts to compare."""
        now = perf_counter()
        if self._first is None or not done:
            self._first = (done, now)
        units, seconds = done - self._first[0], now - self._first[1]
        if not (units and seconds):
            return 0.0, 0.0
        return units / seconds, (total - done) * seconds / units


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Progress]:
    """Show progress on standard error while a block runs.

    Args:
        what: the job, e.g. "extract".
        unit: what is counted, e.g. "images".
    """
    if sys.stderr.isatty():
        with _bars() as bars:
            yield _bar(bars, what, unit)
    else:
        yield _json_lines(what, unit)


def print_table(records: Sequence[Mapping[str, str]]) -> None:
    """Print records of the same keys as a table; numbers are set right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in records[0]:
        numeric = any(record[column][:1] in "+-0123456789" for record in records if record[column])
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for record in records:
        table.add_row(*record.values())
    width = None if sys.stdout.isatty() else ANY_WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def shares(seconds: Mapping[str, float], stages: Sequence[str]) -> str:
    """Return e.g. ``read 2 %, decode 14 %, infer 84 %``: shares of the time that stages worked."""
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{stage} {100 * seconds.get(stage, 0) / total:.0f} %" for stage in stages)


def _bars() -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _bar(bars: Bars, what: str, unit: str) -> Progress:
    task, speed = bars.add_task(what, total=None, note=""), Speed()

    def show(done: int, total: int, note: str = "") -> None:
        rate, left = speed(done, total)
        minutes, seconds = divmod(round(left), 60)
        text = f"{rate:.1f} {unit}/s, {minutes}:{seconds:02} left  {note}"
        bars.update(task, completed=done, total=total, note=text)

    return show


def _json_lines(what: str, unit: str) -> Progress:
    speed, last = Speed(), perf_counter()

    def log(done: int, total: int, note: str = "") -> None:
        nonlocal last
        rate, left = speed(done, total)
        if 0 < done < total and perf_counter() - last < LOG_SECONDS:
            return
        last = perf_counter()
        line = {"job": what, "done": done, "total": total, "seconds_left": round(left, 1)}
        line |= {f"{unit}_per_second": round(rate, 1), "note": note}
        print(json.dumps(line), file=sys.stderr, flush=True)

    return log
