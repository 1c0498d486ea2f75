"""A recipe in, a finished run out: source, stream, backbone, method, the loop, and the record of it all."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console

from forgetcast.backbones.weights import weights_hash
from forgetcast.checks import complaint
from forgetcast.heads.base import Head
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import Checkpointing, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create, method_class
from forgetcast.protect.placement import Placement
from forgetcast.runs.bar import features_bar, progress_bar
from forgetcast.runs.data import stream_of
from forgetcast.runs.expected import judged
from forgetcast.runs.measured import measured
from forgetcast.runs.metrics_log import MetricsLog
from forgetcast.runs.options import takes_model
from forgetcast.runs.prepare import Prepared, prepare
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import provenance, write_record
from forgetcast.runs.store import open_run, run_folder
from forgetcast.runs.trackers import tracked_accelerator, tracking
from forgetcast.streams.scenarios import Stream

HEADS: dict[str, type[Head]] = {"linear": Linear, "cosine": Cosine}
FEATURES = "features"
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def execute(recipe: Recipe, root: Path, console: Console | None = None) -> Path:
    """Run a recipe to its end, or go on where it stopped; its directory holds everything.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs; features that are kept go into its folder `features`.
        console: for the progress bar, which is silent where the output is no terminal.

    Returns:
        The run's directory.

    Raises:
        ValueError: whatever source, stream, backbone, method and loop refuse; another recipe in that directory.
    """
    stream = stream_of(recipe.data, recipe.seed)
    seed_everything(recipe.seed)
    training = recipe.training
    place = run_folder(root, recipe)
    accelerator = tracked_accelerator(recipe.trackers, place, mixed_precision=PRECISIONS[training.precision])
    screen = (console or Console(stderr=True)) if accelerator.is_main_process else None
    with accelerator.main_process_first(), features_bar(screen, len(stream.source)) as on_batch:
        prepared = prepare(recipe, stream.source, root / FEATURES, device=accelerator.device, on_batch=on_batch)
    folder = open_run(root, recipe)
    options: dict[str, Any] = dict(recipe.method.options)
    if "seed" in signature(method_class(recipe.method.name)).parameters:
        options["seed"] = recipe.seed
    method = create(recipe.method.name, prepared.backbone, prepared.width, **options)
    _require_trained(recipe, method)
    if takes_model(recipe.method.name):
        method.model.head = HEADS[recipe.model.head](prepared.width)
        if recipe.model.new_rows == "placed":
            method.protections = (Placement(), *method.protections)
    started = monotonic()
    log_path = folder / "metrics.jsonl"
    log_path.unlink(missing_ok=True)  # a resumed run reports its earlier events again
    with (
        MetricsLog(log_path) as log,
        progress_bar(screen, len(stream), training.epochs) as bar,
        tracking(accelerator, folder.name, recipe.dump()) as track,
    ):

        def on_event(event: Mapping[str, Any]) -> None:
            if "stored_numbers" in event:
                event = {**event, "stored_numbers": event["stored_numbers"] + prepared.numbers_elsewhere}
            log.append(event)
            track(event)
            if bar is not None:
                bar.on_event(event)

        done = learn(
            method,
            stream,
            Optimization(**training.optimization),
            seed=recipe.seed,
            read=prepared.read,
            read_training=prepared.read_training,
            checkpointing=Checkpointing(
                folder / "checkpoints", minutes=recipe.checkpoint.minutes, keep=recipe.checkpoint.keep
            ),
            accelerator=accelerator,
            evaluate_every=training.evaluate_every,
            on_event=on_event,
            on_step=None if bar is None else bar.on_step,
        )
    numbers = measured(done, stream, method, numbers_elsewhere=prepared.numbers_elsewhere)
    record = _record(recipe, stream, prepared, numbers, weights_hash(method.model.state_dict()), monotonic() - started)
    write_record(record, folder)
    return folder


def _require_trained(recipe: Recipe, method: Method) -> None:
    """Raise if the recipe says that the backbone trains, and the method keeps it frozen."""
    trains = any(parameter.requires_grad for parameter in method.model.backbone.parameters())
    if recipe.model.trainable not in (None, "none") and not trains:
        raise complaint(
            f"got model.trainable={recipe.model.trainable!r} with {recipe.method.name}, which freezes the backbone",
            "a method that trains it",
            "Leave model.trainable out, or choose another method.",
        )


def _record(
    recipe: Recipe, stream: Stream, prepared: Prepared, numbers: dict[str, Any], end: str, seconds: float
) -> dict[str, Any]:
    return provenance() | {
        "name": recipe.name,
        "state": "finished",
        "recipe": recipe.dump(),
        "recipe_hash": recipe.hash,
        "seed": recipe.seed,
        "source": {"name": stream.source.name, "samples": len(stream.source), "hash": stream.source.hash},
        "class_order": list(stream.class_order),
        "split_hash": stream.split_hash,
        "weights_hash": {"backbone_at_start": prepared.weights, "model_at_end": end},
        **prepared.record,
        **numbers,
        "expected": judged(recipe.expected, numbers["metrics"]),
        "seconds": seconds,
    }
