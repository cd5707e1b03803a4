"""What commands say at their end."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mlc.heads.run_folder import Run
from mlc.report.console import print_table, shares
from mlc.report.table import Report
from mlc.report.written import PARTIAL, footnote, to_records

if TYPE_CHECKING:  # timm takes seconds to import, and training does without it
    from mlc.extract.run import ExtractReport


def print_extraction(report: "ExtractReport") -> None:
    """Print what an extraction did: backbone, bad images, shares of time, where the store is."""
    click.echo(f"backbone: {report.backbone}, weights {report.weights}, licence {report.licence}")
    print_bad(report.bad)
    if report.extracted:
        rate = report.extracted / report.wall_seconds
        click.echo(
            f"{report.extracted:,} images in {report.wall_seconds:.1f} s, {rate:.1f} images/s: "
            f"{shares(report.seconds, tuple(report.seconds))}"
        )
    else:
        click.echo(f"nothing to do, all {report.images:,} images were there")
    click.echo(f"store: {report.path}")


def print_bad(bad: Mapping[str, str]) -> None:
    """List bad images on standard error."""
    for file, reason in bad.items():
        click.echo(f"bad image: {file}: {reason}", err=True)


def print_run(run: Run) -> None:
    """Print the figures of a run and where it is."""
    config, results = run.config, run.results
    click.echo(
        f"{config.loss}, lr {config.lr:g}, batch {config.batch_size}, {config.labels} labels: best "
        f"epoch {results['best_epoch']} of {config.epochs}, val mAP {results['selection_mAP']:.2f}"
    )
    print_metrics(results["test"], "test")
    if not results["truth_known"]:
        click.echo(PARTIAL)
    click.echo(f"run: {run.path}")


def print_metrics(metrics: Mapping[str, Any], split: str) -> None:
    """Print the figures of one split."""
    click.echo(f"{split}, {metrics['images']:,} images: {_figures(metrics, AP)}")
    click.echo(f"at threshold {metrics['threshold']:g}: {_figures(metrics, PRECISION_RECALL)}")
    if metrics["classes_without_positives"]:
        click.echo(
            f"{metrics['classes_without_positives']} classes have no positive here: they count 0 "
            "in mAP and are left out of mAP_asl and mAP_voc"
        )


def print_report(report: Report) -> None:
    """Print a table of runs and its footnote."""
    print_table(to_records(report))
    click.echo(footnote(report))


def _figures(metrics: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {metrics[name]:.2f}" for name in names)


AP = ("mAP", "mAP_asl", "mAP_voc")
PRECISION_RECALL = ("CP", "CR", "CF1", "OP", "OR", "OF1")
