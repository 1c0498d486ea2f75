"""A recipe in, a finished run out: source, stream, backbone, method, the loop, and the record of it all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from forgetcast.backbones.weights import weights_hash
from forgetcast.checks import complaint, require_choice
from forgetcast.heads.base import Head
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import Checkpointing, Learnt, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.registry import create, method_class
from forgetcast.metrics.matrix import DEFINITIONS, all_metrics
from forgetcast.protect.placement import Placement
from forgetcast.runs.metrics_log import MetricsLog
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import provenance, write_record
from forgetcast.runs.store import open_run
from forgetcast.streams.addresses import source_from
from forgetcast.streams.scenarios import Stream, class_incremental

HEADS: dict[str, type[Head]] = {"linear": Linear, "cosine": Cosine}


def execute(recipe: Recipe, root: Path, console: Console | None = None) -> Path:
    """Run a recipe to its end, or go on where it stopped; its directory holds everything.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs.
        console: for the progress bar, which is silent where the output is no terminal.

    Returns:
        The run's directory.

    Raises:
        ValueError: whatever source, stream, backbone, method and loop refuse; another recipe in that directory.
    """
    stream = stream_of(recipe)
    seed_everything(recipe.seed)
    backbone, width = backbone_of(recipe.model.backbone, stream)
    start = weights_hash(backbone.state_dict())
    folder = open_run(root, recipe)
    options: dict[str, Any] = dict(recipe.method.options)
    if "seed" in signature(method_class(recipe.method.name)).parameters:
        options["seed"] = recipe.seed
    method = create(recipe.method.name, backbone, width, **options)
    if method.by_gradient:
        method.model.head = HEADS[recipe.model.head](width)
        if recipe.model.new_rows == "placed":
            method.protections = (Placement(), *method.protections)
    started = monotonic()
    log_path = folder / "metrics.jsonl"
    log_path.unlink(missing_ok=True)  # a resumed run reports its earlier events again
    steps = len(stream) * (recipe.training.epochs + 1 if method.by_gradient else 1)
    with MetricsLog(log_path) as log, _progress(console or Console(stderr=True), steps) as advance:

        def on_event(event: Mapping[str, Any]) -> None:
            log.append(event)
            advance(event)

        done = learn(
            method,
            stream,
            Optimization(**recipe.training.model_dump()),
            seed=recipe.seed,
            read=reader(stream),
            checkpointing=Checkpointing(
                folder / "checkpoints", minutes=recipe.checkpoint.minutes, keep=recipe.checkpoint.keep
            ),
            on_event=on_event,
        )
    record = _record(recipe, stream, done, start, weights_hash(method.model.state_dict()), monotonic() - started)
    write_record(record, folder)
    return folder


def stream_of(recipe: Recipe) -> Stream:
    """The stream that a recipe describes.

    Raises:
        ValueError: a scenario that one source cannot give, and whatever source and scenario refuse.
    """
    data = recipe.data
    if data.scenario == "domain_incremental":
        raise complaint(
            "got data.scenario='domain_incremental' with one source",
            "class_incremental or task_incremental",
            "Build it in Python: domain_incremental takes one source a domain.",
        )
    return class_incremental(
        source_from(data.source),
        data.increment,
        base=data.base,
        seed=recipe.seed,
        test_share=data.test_share,
        validation_share=data.validation_share,
        class_order=data.class_order,
        task_incremental=data.scenario == "task_incremental",
        online=data.online,
    )


def backbone_of(name: str, stream: Stream) -> tuple[nn.Module, int]:
    """A backbone by name, and its feature width.

    Args:
        name: "identity" (the inputs, flattened), "mlp" or "mlp:WIDTH" (one hidden ReLU layer, drawn from the seed,
            which trains), or "hf:NAME" (a Hugging Face model by name or directory).
        stream: gives the width of the inputs.

    Raises:
        ValueError: an unknown name.
    """
    kind, _, rest = name.partition(":")
    require_choice("model.backbone", kind, ("identity", "mlp", "hf"))
    if kind == "hf":
        from forgetcast.backbones.huggingface import huggingface_backbone

        pretrained = huggingface_backbone(rest)
        return pretrained, pretrained.width
    inputs = int(np.prod(stream.source.inputs.shape[1:]))
    if kind == "identity":
        return nn.Flatten(), inputs
    if rest and not (rest.isdecimal() and int(rest) > 0):
        raise complaint(f"got model.backbone={name!r}", "mlp, or mlp:WIDTH", "Give a width such as mlp:128.")
    width = int(rest) if rest else 128
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()), width


def reader(stream: Stream) -> Callable[[Int[np.ndarray, " _"]], Tensor]:
    """Reads samples of arrays: bytes as pixels (n, channels, h, w) in [0, 1], floats as they are.

    Raises:
        ValueError: a source of texts, or of images of different sizes.
    """
    source = stream.source

    def read(places: Int[np.ndarray, " _"]) -> Tensor:
        values = source.take(places)
        if not isinstance(values, np.ndarray):
            raise complaint(
                f"{source.name}: samples that are no arrays of one shape",
                "features, or images of one size",
                "Extract features first (cached_features), or give a Python run its own `read`.",
            )
        if values.dtype == np.uint8:
            return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2))).float() / 255
        return torch.from_numpy(np.ascontiguousarray(values))

    return read


def _record(recipe: Recipe, stream: Stream, done: Learnt, start: str, end: str, seconds: float) -> dict[str, Any]:
    matrix = done.task_incremental_matrix if stream.task_incremental else done.accuracy_matrix
    return provenance() | {
        "name": recipe.name,
        "state": "finished",
        "recipe": recipe.dump(),
        "recipe_hash": recipe.hash,
        "seed": recipe.seed,
        "source": {"name": stream.source.name, "samples": len(stream.source), "hash": stream.source.hash},
        "class_order": list(stream.class_order),
        "split_hash": stream.split_hash,
        "weights_hash": {"backbone_at_start": start, "model_at_end": end},
        "definitions": DEFINITIONS,
        "scenario": stream.scenario,
        "accuracy_matrix": matrix,
        "class_incremental_matrix": done.accuracy_matrix,
        "task_incremental_matrix": done.task_incremental_matrix,
        "metrics": all_metrics(matrix),
        "trainable_parameters": done.trainable_parameters,
        "stored_numbers": done.stored_numbers,
        "seconds_training": done.seconds,
        "seconds": seconds,
    }


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("task 0", total=steps)

        def advance(event: Mapping[str, Any]) -> None:
            if event["event"] == "epoch":
                text = f"task {event['task']} epoch {event['epoch']} loss {event['loss']:.3g}"
            else:
                accuracies = event["class_incremental_accuracy"]
                text = f"task {event['task']} accuracy {sum(accuracies) / len(accuracies):.1%}"
            progress.update(bar, advance=1, description=text)

        yield advance
