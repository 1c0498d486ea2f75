"""A recipe in, a finished run out: source, stream, backbone, method, the loop, and the record of it all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from forgetcast.backbones.weights import weights_hash
from forgetcast.runs.assembly import PRECISIONS, Assembly, assemble
from forgetcast.runs.bar import learnt_line, progress_bar
from forgetcast.runs.expected import judged
from forgetcast.runs.measured import measured
from forgetcast.runs.metrics_log import MetricsLog
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import provenance, write_record
from forgetcast.runs.store import run_folder
from forgetcast.runs.trackers import tracked_accelerator, tracking


def execute(recipe: Recipe, root: Path, console: Console | None = None) -> Path:
    """Run a recipe to its end, or go on where it stopped; its directory holds everything.

    Of several processes only the main one writes there.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs; features that are kept go into its folder `features`.
        console: for the progress bar, which is silent where the output is no terminal.

    Returns:
        The run's directory.

    Raises:
        ValueError: whatever source, stream, backbone, method and loop refuse; another recipe in that directory.
    """
    training = recipe.training
    place = run_folder(root, recipe)
    accelerator = tracked_accelerator(recipe.trackers, place, mixed_precision=PRECISIONS[training.precision])
    made = assemble(recipe, root, accelerator, console)
    started = monotonic()
    elsewhere = made.prepared.numbers_elsewhere
    stored: list[int] = []
    with (
        _logging(accelerator, made.folder / "metrics.jsonl") as log,
        progress_bar(made.screen, len(made.stream), training.epochs) as bar,
        tracking(accelerator, made.folder.name, recipe.dump()) as track,
    ):

        def on_event(event: Mapping[str, Any]) -> None:
            if "stored_numbers" in event:
                event = {**event, "stored_numbers": event["stored_numbers"] + elsewhere}
            log(event)
            track(event)
            if made.screen is not None and event["event"] == "decision":
                made.screen.print(event["text"], markup=False, highlight=False)
            if made.screen is not None and event["event"] == "task":
                line = learnt_line(event, len(made.stream), stored[-1] if stored else None)
                made.screen.print(line, markup=False, highlight=False, soft_wrap=True)
                stored.append(event["stored_numbers"])
            if bar is not None:
                bar.on_event(event)

        done = made.learn(on_event=on_event, on_step=None if bar is None else bar.on_step)
    numbers = measured(done, made.stream, made.method, numbers_elsewhere=elsewhere)
    if accelerator.is_main_process:
        write_record(_record(made, numbers, monotonic() - started), made.folder)
    accelerator.wait_for_everyone()  # so that all of them find the record
    return made.folder


@contextmanager
def _logging(accelerator: Accelerator, path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes events into a log that starts empty: a run that goes on reports its earlier events again."""
    if not accelerator.is_main_process:
        yield lambda _: None
        return
    path.unlink(missing_ok=True)
    with MetricsLog(path) as log:
        yield log.append


def _record(made: Assembly, numbers: dict[str, Any], seconds: float) -> dict[str, Any]:
    end = weights_hash(made.method.model.state_dict())
    return provenance() | {
        "state": "finished",
        **made.identity,
        "weights_hash": {"backbone_at_start": made.prepared.weights, "model_at_end": end},
        **numbers,
        "expected": judged(made.recipe.expected, numbers["metrics"]),
        "seconds": seconds,
    }
