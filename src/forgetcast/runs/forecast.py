"""A recipe in, a forecast of its next task out: what training it would make the model forget, before it trains."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor

from forgetcast.checks import require_number
from forgetcast.forecast.network.choice import exceeds
from forgetcast.forecast.network.entry import forecast
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.result import COLUMNS, right
from forgetcast.learn.evaluate import logits_of
from forgetcast.runs.bar import counting_bar
from forgetcast.runs.begun import assembled, begun, class_names, learn
from forgetcast.runs.diagnosed import diagnosed
from forgetcast.runs.frontier import frontier, within
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import write_whole
from forgetcast.runs.upcoming import Upcoming, answers

FILE = "forecast.json"
DEFINITIONS = {
    "old_accuracy": "Share of the old samples (test samples of earlier tasks) answered right, as the scenario lets a "
    "prediction choose; now among the outputs seen so far, afterwards among those of the new task too.",
    "drop": "Accuracy of the old samples now minus afterwards.",
    "interval": "Where the measured accuracy of the old samples is expected, with about 95 % confidence.",
    "new_accuracy": "Share of the new training samples answered right, among the outputs that the loss sees.",
    "expected_cosine": "Cosine to the measured drift of the old logits that the forecast expects of itself, from the "
    "errors it measured of itself; 1 where it is exact.",
    "expected_old_cosine": "The same over the outputs of the old classes alone: their drift decides which of them "
    "suffer most; below 0.8 that order is not to be trusted.",
    "share_of_run": "Cost of the forecast relative to the training, in passes forward and backward of one sample.",
    "relative_drift": "Size of the forecast change of the old logits, relative to that of these logits.",
    "broken_precision": "Share of the answers forecast to turn wrong that did.",
    "broken_recall": "Share of the answers that turned wrong that were forecast to.",
    "share": "Part of the forecast drift of the old logits along it that a layer makes when it alone stands at its "
    "predicted end; the shares add up to 1 where layers do not act together.",
    "alone": "Size of the drift that a layer makes alone, relative to the whole.",
    "missing": "Size of the drift that all other layers make, relative to the whole.",
    "kernel_change": "Change of the tangent kernel of some old samples from the start to the predicted end of the "
    "training, relative to the start.",
    "energy": "Share of the squared drift of the old logits along a direction of outputs; the directions are those of "
    "the measured drift (right singular vectors).",
    **COLUMNS,
}


def forecast_recipe(
    recipe: Recipe,
    root: Path,
    *,
    task: int | None = None,
    max_drop: float = 0.02,
    budget: float = 0.15,
    most_old: int = 1000,
    verify: bool = False,
    diagnose: bool = False,
    console: Console | None = None,
) -> Path:
    """Forecast what a task of a recipe's run will make the model forget, and write it into the run's directory.

    The tasks before it are learnt first, as far as the run has not come yet; it goes on from there later.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs.
        task: counted from 0, at least 1; by default the one that the run comes to next.
        max_drop: largest drop of old accuracy that is within the limit.
        budget: share of the training's cost that the forecast may take; 1 replays it.
        most_old: old samples, at most.
        verify: learn the task for real afterwards and hold the forecast against it.
        diagnose: say which layers carry the forecast drift, and with `verify` along which directions it was measured.
        console: for progress bars.

    Returns:
        The forecast's record, `forecast.json`.

    Raises:
        ValueError: a method without gradient steps or with more than a forecast describes, a task that the stream does
            not have or that the run has passed, several processes, and whatever recipe, loop and forecast refuse.
    """
    require_number("max_drop", max_drop, most=1.0)
    started = monotonic()
    at = begun(recipe, root, task, most_old, console)
    made, ahead = at.made, at.ahead
    with counting_bar(made.screen, f"forecast of task {ahead.index}", ahead.training.steps) as on_step:
        found = forecast(
            ahead.model,
            ahead.old,
            ahead.new,
            ahead.training,
            parameters=ahead.trained,
            restraint=ahead.restraint,
            budget=budget,
            seed=recipe.seed,
            on_step=lambda _: on_step(1),
        )
    measured = _measured(recipe, root, console, ahead) if verify else None
    classes = class_names(made)
    record = at.record("forecast", {"max_drop": max_drop, "budget": budget, "old_samples": most_old}) | {
        **told(ahead, classes, found, max_drop, measured),
        "diagnostics": diagnosed(ahead, found, classes, measured) if diagnose else None,
        "definitions": DEFINITIONS,
        "seconds": monotonic() - started,
    }
    return write_whole(json.dumps(record, indent=1, allow_nan=False), made.folder / FILE)


def told(
    ahead: Upcoming,
    classes: Sequence[str],
    found: NetworkForecast,
    max_drop: float,
    measured: Float[Tensor, "n C"] | None = None,
) -> dict[str, Any]:
    """A forecast, and what was measured of it, in plain JSON values. Tasks and outputs count from 0.

    Args:
        ahead: the task that was forecast.
        classes: names of the outputs.
        found: the forecast.
        max_drop: the limit.
        measured: old logits after the real training.
    """
    now = answers(found.logits_before, ahead.answers_now)
    seen = replace(found, logits_before=now, drift=answers(found.logits, ahead.answers_then) - now)
    real = None if measured is None else answers(measured.to(now), ahead.answers_then)
    hits = {"before": right(now, seen.labels), "forecast": right(seen.logits, seen.labels)}
    if real is not None:
        hits["measured"] = right(real, seen.labels)
    points = frontier(found, ahead, seen.accuracy_before)
    tasks, trust = torch.from_numpy(ahead.tasks), found.trust
    drop = seen.accuracy_before - seen.accuracy
    return {
        "forecast": {
            "estimator": found.estimator,
            "share_of_run": found.share_of_run,
            "seconds": found.cost.seconds,
            "expected_cosine": trust.expected_cosine,
            "expected_old_cosine": trust.expected_old_cosine,
            "sampling_error": None if trust.sampling_error is None else asdict(trust.sampling_error),
            "surrogate_error": trust.surrogate_error,
            "blind": trust.blind,
            "trusted": trust.trusted,
            "order_trusted": trust.order_trusted,
            "reason": trust.reason,
            "accuracy_before": seen.accuracy_before,
            "accuracy": seen.accuracy,
            "interval": None if trust.expected_cosine is None else list(seen.interval),
            "drop": drop,
            "within_limit": not exceeds(drop, max_drop),
            "relative_drift": _finite(found.relative_drift),
        },
        "per_task": [{"task": task} | _shares(hits, tasks == task) for task in sorted(set(ahead.tasks.tolist()))],
        "per_class": [
            {"output": output, "class": classes[output]} | _shares(hits, seen.labels.cpu() == output)
            for output in sorted(set(seen.labels.tolist()))
        ],
        "frontier": [asdict(point) for point in points],
        "safe": asdict(within(points, max_drop)),
        "calibration": None if measured is None or real is None else _calibration(found, seen, measured, real),
    }


def _measured(recipe: Recipe, root: Path, console: Console | None, ahead: Upcoming) -> Float[Tensor, "n C"]:
    """Old logits once the task is learnt, by the run itself."""
    made = assembled(recipe, root, console)  # anew: the method of the forecast has begun the task
    learn(made, ahead.index + 1)
    batch_size = made.optimization.batch_size
    return logits_of(made.method, made.prepared.read, ahead.places, batch_size, made.accelerator.device)


def _shares(hits: Mapping[str, Bool[Tensor, " n"]], chosen: Bool[Tensor, " n"]) -> dict[str, Any]:
    """Accuracies of some of the old samples."""
    shares = {f"accuracy_{name}": float(hit.cpu()[chosen].double().mean()) for name, hit in hits.items()}
    return {"samples": int(chosen.sum())} | shares


def _calibration(found: NetworkForecast, seen: NetworkForecast, measured: Tensor, real: Tensor) -> dict[str, Any]:
    """Drift from the logits, all that is about answers from the answers."""
    of_logits, of_answers = asdict(found.compare(measured)), asdict(seen.compare(real))
    drift = ("relative_error", "cosine", "one_minus_cosine")
    return of_answers | {name: None if of_logits[name] is None else _finite(of_logits[name]) for name in drift}


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
