"""The command line. Everything heavy is imported inside the commands, so that `--help` answers at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import click

from forgetcast import __version__

Number = TypeVar("Number", int, float)

# Exit codes: 0 done, 1 refused, 2 wrongly typed (click's own), 130 interrupted, and these.
EXPECTATION_BROKEN, DROP_TOO_LARGE, NOT_TRUSTED = 3, 4, 5


def _of_a_task(command: Callable[..., None]) -> Callable[..., None]:
    """What the commands take that say something of a recipe's next task."""
    given: tuple[Callable[[Callable[..., None]], Callable[..., None]], ...] = (
        click.argument("recipe", type=click.Path(path_type=Path)),
        click.argument("overrides", metavar="[key=value ...]", nargs=-1),
        click.option(
            "--root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Of runs."
        ),
        click.option("--task", type=int, help="Counted from 0, at least 1; by default the one the run comes to next."),
        click.option(
            "--budget", type=float, default=0.15, show_default=True, help="Share of a training's cost; 1 replays it."
        ),
        click.option(
            "--old", "most_old", type=int, default=1000, show_default=True, help="Old samples at most, of all classes."
        ),
    )
    for option in reversed(given):
        command = option(command)
    return command


@contextmanager
def _of_a_run() -> Iterator[None]:
    """What is refused said in words; the tasks of the run that were learnt so far stay when it is interrupted."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("stopped: tasks learnt so far are saved", err=True)
        raise SystemExit(130) from None


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
    """Write report.html again from the record.json in the folder RUN (of the demo, report.png too).

    RUN may be a forecast.json or an advice.json, of which forecast.html or advice.html is written.
    """
    from forgetcast.report.advice_page import is_advice, write_advice_report
    from forgetcast.report.forecast_page import is_forecast, write_forecast_report
    from forgetcast.report.page import write_report
    from forgetcast.report.run_page import is_run, write_run_report
    from forgetcast.runs.record import read_record

    try:
        record = read_record(run)
        kinds = ((is_run, write_run_report), (is_forecast, write_forecast_report), (is_advice, write_advice_report))
        write = next((write for meant, write in kinds if meant(record)), write_report)
        page = write(record, run if run.is_dir() else run.parent)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"report: {page}")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[key=value ...]", nargs=-1)
@click.option("--root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Of all runs.")
@click.option("--seeds", default="", help="Several runs, such as 0,1,2; each has its own directory.")
@click.option(
    "--tracker", "trackers", multiple=True, help="Log to tensorboard, wandb, mlflow, ...; may be given several times."
)
def run(recipe: Path, overrides: tuple[str, ...], root: Path, seeds: str, trackers: tuple[str, ...]) -> None:
    """Run a RECIPE to its end; after a kill or Ctrl-C the same command goes on where it stopped.

    Several processes: `torchrun --nproc-per-node 2 -m forgetcast run RECIPE`, or `accelerate launch` likewise.

    The run's directory holds record.json, metrics.jsonl and report.html.

    Exits with 3 when a number that the recipe expects does not hold.
    """
    import json

    from accelerate import PartialState
    from rich.console import Console

    from forgetcast.report.run_page import write_run_report
    from forgetcast.runs.execute import execute
    from forgetcast.runs.expected import told
    from forgetcast.runs.recipe import load_recipe
    from forgetcast.runs.record import read_record

    held = True
    if trackers:
        overrides = (*overrides, f"trackers={json.dumps(trackers)}")
    try:
        several = [f"seed={seed.strip()}" for seed in seeds.split(",")] if seeds else [None]
        for seed in several:
            folder = execute(load_recipe(recipe, [*overrides, *([seed] if seed else [])]), root, Console(stderr=True))
            record, processes = read_record(folder), PartialState()
            held = held and all(judgement["holds"] for judgement in record["expected"])
            if processes.is_main_process:
                click.echo(f"run: {folder}\nreport: {write_run_report(record, folder)}")
                for judgement in record["expected"]:
                    click.echo(told(judgement))
            processes.wait_for_everyone()  # one that leaves with an exit code would end the others
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("stopped after saving: the same command goes on from here", err=True)
        raise SystemExit(130) from None
    if not held:
        raise SystemExit(EXPECTATION_BROKEN)


@main.command()
@_of_a_task
@click.option(
    "--max-drop", type=float, default=0.02, show_default=True, help="Largest drop of old accuracy that is fine."
)
@click.option("--verify", is_flag=True, help="Learn the task for real afterwards, and compare.")
@click.option("--diagnose", is_flag=True, help="Which layers carry the drift; with --verify, energy by direction.")
def forecast(
    recipe: Path,
    overrides: tuple[str, ...],
    root: Path,
    task: int | None,
    max_drop: float,
    budget: float,
    most_old: int,
    verify: bool,
    diagnose: bool,
) -> None:
    """Forecast what the next task of a RECIPE will make its model forget, before training.

    Tasks before it are learnt first, as far as the run in --root has not come yet. `forgetcast run` goes on from there.
    The run's directory then holds forecast.json and forecast.html.

    Exits with 4 when the forecast drop of old accuracy is above --max-drop, and with 5 when the forecast is not to be
    trusted, whatever it says.
    """
    from rich.console import Console

    from forgetcast.report.forecast_page import write_forecast_report
    from forgetcast.runs.forecast import forecast_recipe
    from forgetcast.runs.forecast_table import forecast_lines, forecast_tables
    from forgetcast.runs.recipe import load_recipe
    from forgetcast.runs.record import read_record

    with _of_a_run():
        path = forecast_recipe(
            load_recipe(recipe, overrides),
            root,
            task=task,
            max_drop=max_drop,
            budget=budget,
            most_old=most_old,
            verify=verify,
            diagnose=diagnose,
            console=Console(stderr=True),
        )
        record = read_record(path)
        page = write_forecast_report(record, path.parent)
    console = Console(highlight=False)
    for line in forecast_lines(record):
        click.echo(line)
    for table in forecast_tables(record):
        console.print(table)
    click.echo(f"forecast: {path}\nreport: {page}")
    if not record["forecast"]["trusted"]:
        raise SystemExit(NOT_TRUSTED)
    if not record["forecast"]["within_limit"]:
        raise SystemExit(DROP_TOO_LARGE)


@main.command()
@_of_a_task
@click.option("--max-drop", type=float, help="Largest drop of old accuracy that is fine; by default any.")
@click.option("--lengths", default="1", show_default=True, help="Shares of the way that the model goes, such as 0.5,1.")
@click.option("--counts", help="Of the last modules that train, such as 0,1,4; by default 0, 1, 2, 4, ... and all.")
@click.option("--module", "modules", multiple=True, help="A pattern of names, one a module; by default the blocks.")
def advise(
    recipe: Path,
    overrides: tuple[str, ...],
    root: Path,
    task: int | None,
    budget: float,
    most_old: int,
    max_drop: float | None,
    lengths: str,
    counts: str | None,
    modules: tuple[str, ...],
) -> None:
    """Advise how many parameters of a RECIPE's model to train on its next task, by forecast.

    Tasks before it are learnt first, as far as the run in --root has not come yet. `forgetcast run` goes on from there.
    The run's directory then holds advice.json and advice.html.

    Exits with 4 when nothing is forecast to stay within --max-drop, and with 5 when the forecast of what is recommended
    is not to be trusted.
    """
    from rich.console import Console

    from forgetcast.report.advice_page import write_advice_report
    from forgetcast.runs.advice_table import advice_lines, advice_table
    from forgetcast.runs.advise import advise_recipe
    from forgetcast.runs.recipe import load_recipe
    from forgetcast.runs.record import read_record

    with _of_a_run():
        path = advise_recipe(
            load_recipe(recipe, overrides),
            root,
            task=task,
            max_drop=max_drop,
            budget=budget,
            most_old=most_old,
            lengths=_numbers("--lengths", lengths, float),
            modules=modules or None,
            counts=None if counts is None else _numbers("--counts", counts, int),
            console=Console(stderr=True),
        )
        record = read_record(path)
        page = write_advice_report(record, path.parent)
    for line in advice_lines(record):
        click.echo(line)
    Console(highlight=False).print(advice_table(record))
    click.echo(f"advice: {path}\nreport: {page}")
    if not record["advice"]["within_limit"]:
        raise SystemExit(DROP_TOO_LARGE)
    if not record["advice"]["trusted"]:
        raise SystemExit(NOT_TRUSTED)


def _numbers(name: str, given: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(kind(part) for part in given.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{given!r}: numbers with commas between them, please", param_hint=name) from error


@main.command()
@click.argument("root", metavar="[ROOT]", default="runs")
@click.argument("filters", metavar="[key=value ...]", nargs=-1)
def runs(root: str, filters: tuple[str, ...]) -> None:
    """List the runs in the folder ROOT ("runs" by default) whose recipes meet every key=value."""
    from rich.console import Console

    from forgetcast.runs.listing import list_runs
    from forgetcast.runs.tables import runs_table

    if "=" in root:
        root, filters = "runs", (root, *filters)
    try:
        found = list_runs(Path(root), filters)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    Console(highlight=False).print(runs_table(found, Path(root)))
    for run in found:
        if run.problem is not None:
            click.echo(f"{run.folder}: {run.problem}", err=True)


@main.command()
@click.argument("folders", metavar="RUN RUN ...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--metric", default="average_accuracy", show_default=True, help="A key of the records' metrics.")
@click.option(
    "--better", type=click.Choice(["higher", "lower"]), help="Whether more is better, for metrics of your own."
)
@click.option(
    "--joint",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A run of joint training, for the metrics intransigence and forgetting_rate; once for each seed.",
)
def compare(
    folders: tuple[Path, ...], metric: str, better: Literal["higher", "lower"] | None, joint: tuple[Path, ...]
) -> None:
    """Compare the recipes of two or more finished runs, paired over seeds."""
    from rich.console import Console

    from forgetcast.runs.compare import compare as compare_records
    from forgetcast.runs.record import read_record
    from forgetcast.runs.references import REFERENCED, with_reference
    from forgetcast.runs.tables import comparison_tables

    try:
        records = [read_record(folder) for folder in folders]
        if joint or metric in REFERENCED:
            records = with_reference(records, [read_record(folder) for folder in joint], metric)
        comparison = compare_records(records, metric, better=better)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = Console(highlight=False)
    for table in comparison_tables(comparison):
        console.print(table)
    for pair in comparison.differences:
        if pair.no_interval is not None:
            console.print(f"{pair.second} and {pair.first}: {pair.no_interval}", markup=False)
    if comparison.definition is not None:
        console.print(f"{metric}: {comparison.definition}", markup=False)
