"""The command line. Everything heavy is imported inside the commands, so that `--help` answers at once."""

from pathlib import Path

import click

from forgetcast import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Forecast what fine-tuning will make a model forget, train so that it does not, and verify the forecast."""


@main.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="An .npz with x, y (or x_train, y_train, x_test, y_test)."
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--increment", type=click.IntRange(min=1), default=2, show_default=True, help="New classes a task.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of class order and split.")
def demo(data: Path | None, output: Path, increment: int, seed: int) -> None:
    """Forecast, train and verify on real data: digits, or the arrays of a file."""
    import torch
    from rich.console import Console

    from forgetcast.demo import run_demo
    from forgetcast.streams.sources import digits, npz

    # The demo's matrices are small: a second thread brings little, and on a busy machine waiting for it costs much.
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    try:
        source = digits() if data is None else npz(data)
        page = run_demo(source, output, increment=increment, seed=seed, console=console)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console.print(f"\nreport: [bold]{page}[/] (and {page.with_suffix('.png').name}, record.json beside it)")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html and report.png again from the record.json in the folder RUN."""
    from forgetcast.report.page import write_report
    from forgetcast.runs.record import read_record

    try:
        page = write_report(read_record(run), run if run.is_dir() else run.parent)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"report: {page}")
