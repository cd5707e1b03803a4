"""A report in writing: records for a terminal, Markdown, CSV, and what the columns are."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.errors import choose
from mlc.configs.files import written_aside
from mlc.report.table import Report, Row

PARTIAL = "The truth is not known: labels that are not observed positives count as absent here."


def to_records(report: Report) -> list[dict[str, Any]]:
    """Return the rows as flat records of text and numbers, for CSV and Markdown."""
    return [
        {
            **row.name,
            "lr": f"{row.lr:g}",
            "batch": str(row.batch_size),
            "seeds": str(row.seeds),
            "val mAP": f"{row.val:.2f}",
            "test mAP": f"{row.test:.2f}",
            "std": "" if np.isnan(row.deviation) else f"{row.deviation:.2f}",
            "to best": f"{row.behind:+.2f}" if index else "best",
            "95 % interval": f"{row.interval[0]:+.2f} to {row.interval[1]:+.2f}" if index else "",
        }
        for index, row in enumerate(report.rows)
    ] + [_prior_record(report)]


def to_markdown(report: Report) -> str:
    """Return the table as Markdown."""
    records = to_records(report)
    columns = list(records[0])
    lines = [columns, ["---"] * len(columns), *([each[c] for c in columns] for each in records)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def to_csv(report: Report) -> str:
    """Return the table as CSV."""
    records = to_records(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_table(report: Report, path: Path) -> None:
    """Write the table as ``.md`` or ``.csv``.

    Raises:
        MlcError: the path ends in neither.
    """
    check_table_path(path)
    with written_aside(path) as partial:
        partial.write_text(TABLES[path.suffix](report))


def check_table_path(path: Path) -> None:
    """Raise an MlcError if a path does not end as a table can be written."""
    choose(TABLES, path.suffix, "kind of table")


def footnote(report: Report) -> str:
    """Say what the columns are, and what cannot be told apart."""
    same = [" ".join(row.name.values()) for row in report.rows[1:] if _ties_best(row)]
    text = (
        f"{report.images:,} test images; mean over seeds at the best validation epoch; intervals: "
        f"paired bootstrap over images, {report.resamples:,} resamples."
    )
    if not report.truth_known:
        text += f" {PARTIAL}"
    if same:
        text += f" Cannot be told apart from the best: {', '.join(same)}."
    return text


def _prior_record(report: Report) -> dict[str, str]:
    names = dict.fromkeys(report.rows[0].name, "")
    names[next(iter(names))] = "class prior"
    empty = dict.fromkeys(("lr", "batch", "seeds", "val mAP"), "")
    tail = dict.fromkeys(("std", "to best", "95 % interval"), "")
    return names | empty | {"test mAP": f"{report.prior:.2f}"} | tail


def _ties_best(row: Row) -> bool:
    return row.interval[0] <= 0 <= row.interval[1]


TABLES = {".csv": to_csv, ".md": to_markdown}
