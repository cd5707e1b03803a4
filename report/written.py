"""A report in writing: records for a terminal, Markdown, CSV, and what the columns are."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlc.configs.errors import choose
from mlc.configs.files import written_aside
from mlc.report.groups import is_full_batch
from mlc.report.table import Report, Row

PARTIAL = "The truth is not known: labels that are not observed positives count as absent here."
SELECTED_ON_TEST = (
    "Selected on the test images, as Query2Label's authors do: such figures are too good."
)
OPTIONAL = {"weight decay": 1, "C": 0}  # columns that more values than these make worth having
Records = Sequence[Mapping[str, str]]


def to_records(report: Report) -> list[dict[str, str]]:
    """Return the rows as flat records of text and numbers, for a terminal, CSV and Markdown."""
    values = {name: {row.tuned[name] for row in report.rows} - {""} for name in OPTIONAL}
    silent = {name for name, few in OPTIONAL.items() if len(values[name]) <= few}
    records = []
    for index, row in enumerate(report.rows):
        low, high = row.behind.interval
        record = {
            **row.name,
            **{name: value for name, value in row.tuned.items() if name not in silent},
            "seeds": str(row.seeds),
            "val mAP": "" if np.isnan(row.val) else f"{row.val:.2f}",
            "test mAP": f"{row.test:.2f}",
            "std": deviation_text(row),
            "to best": f"{row.behind.value:+.2f}" if index else "best",
            "95 % interval": f"{low:+.2f} to {high:+.2f}" if index else "",
        }
        records.append(record)
    prior = dict.fromkeys(records[0], "") | {"test mAP": f"{report.prior:.2f}"}
    prior[next(iter(prior))] = "class prior"
    return [*records, prior]


def over_an_records(report: Report) -> list[dict[str, str]]:
    """Return the records of ``to_records`` with what each row gains over tuned AN."""
    records = to_records(report)
    for record, row in zip(records, [*report.rows, None], strict=True):
        gain = None if row is None or row is report.baseline else row.over_an
        record["to tuned AN"] = "" if gain is None else f"{gain.value:+.2f}"
        record["of it 95 %"] = "" if gain is None else "{:+.2f} to {:+.2f}".format(*gain.interval)
        if row is not None and row is report.baseline:
            record["to tuned AN"] = "tuned AN"
    return records


def deviation_text(row: Row) -> str:
    """Return the deviation over seeds, or nothing where one run has none."""
    return "" if np.isnan(row.deviation) else f"{row.deviation:.2f}"


def footnote(report: Report) -> str:
    """Say what the columns are, and which differences are larger than the noise."""
    drawn = "images" if all(row.seeds == 1 for row in report.rows) else "images and seeds"
    lines = [
        f"{report.images:,} test images; mean over seeds at the best validation epoch; intervals: "
        f"paired bootstrap over {drawn}, {report.resamples:,} resamples."
    ]
    lines += _about_seeds(report.rows)
    if not report.truth_known:
        lines.append(PARTIAL)
    lines += _about_selection(report.rows)
    best = report.rows[0]
    if len(report.rows) > 1:
        lines.append(_against_best(best, report.rows[1:]))
    if report.baseline is not None and report.baseline is not best:
        lines.append(_against_baseline(report.baseline, report.rows))
    return "\n".join(lines)


def _about_selection(rows: Sequence[Row]) -> list[str]:
    """Say which rows were selected on what they are tested on."""
    chosen = [row for row in rows if any("selected_on" in run.results for run in row.runs)]
    if not chosen:
        return []
    which = "" if len(chosen) == len(rows) else f" These are: {_list([r.title for r in chosen])}."
    return [f"{SELECTED_ON_TEST}{which}"]


def _about_seeds(rows: Sequence[Row]) -> list[str]:
    """Say which rows have no noise of seeds, and of which it is not known."""
    corruptions = {run.config.corruption_seed for row in rows for run in row.runs}
    same_labels = len(corruptions) == 1  # else these have noise of their own
    fixed = [row for row in rows if same_labels and is_full_batch(row.runs[0])]
    others = [row for row in rows if row not in fixed]
    alone = [row.title for row in others if row.seeds == 1]
    lines = ["An optimum (lbfgs) does not depend on the seed."] if fixed else []
    if alone:
        every = "any other row" if fixed else "any row"
        whose = every if len(alone) == len(others) else _list(alone)
        lines.append(f"One seed: the noise of seeds is not covered for {whose}.")
    return lines


def to_markdown(records: Records) -> str:
    """Return records of the same keys as a Markdown table."""
    columns = list(records[0])
    lines = [columns, ["---"] * len(columns), *([each[c] for c in columns] for each in records)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def to_csv(records: Records) -> str:
    """Return records of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_table(records: Records, note: str, path: Path) -> None:
    """Write records as ``.md``, with the note under them, or as ``.csv``, without.

    Raises:
        MlcError: the path ends in neither.
    """
    check_table_path(path)
    text = TABLES[path.suffix](records)
    if path.suffix == ".md":
        text += "\n" + note.replace("\n", "  \n") + "\n"  # two spaces keep the line's end
    with written_aside(path) as partial:
        partial.write_text(text)


def check_table_path(path: Path) -> None:
    """Raise an MlcError if a path does not end as a table can be written."""
    choose(TABLES, path.suffix, "kind of table")


def _against_best(best: Row, others: Sequence[Row]) -> str:
    worse = [row.title for row in others if row.behind.is_clear]
    same = [row.title for row in others if not row.behind.is_clear]
    return _by_kind(
        {
            f"told apart from the best, {best.title}": worse,
            "cannot be told apart from the best": same,
        }
    )


def _against_baseline(baseline: Row, rows: Sequence[Row]) -> str:
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for row in rows:
        if row is baseline or row.over_an is None:
            continue
        if not row.over_an.is_clear:
            same.append(row.title)
        else:
            (better if row.over_an.value > 0 else worse).append(row.title)
    return f"Tuned AN is {baseline.title}. " + _by_kind(
        {"better": better, "worse": worse, "cannot be told apart from it": same}
    )


def _by_kind(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return the rows of each kind; the kinds that have none share one "none" at the end."""
    found = [f"{kind}: {_list(titles)}." for kind, titles in kinds.items() if titles]
    empty = " or ".join(kind for kind, titles in kinds.items() if not titles)
    sentences = [*found, f"{empty}: none."] if empty else found
    return " ".join(each[0].upper() + each[1:] for each in sentences)


def _list(titles: Iterable[str]) -> str:
    return ", ".join(titles)


TABLES = {".csv": to_csv, ".md": to_markdown}
