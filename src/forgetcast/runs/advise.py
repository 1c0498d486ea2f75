"""A recipe in, advice out: how many parameters of its model to train on the next task, before any of them trains."""

import json
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from forgetcast.checks import require_number
from forgetcast.forecast.network.advice import Advice, advise
from forgetcast.forecast.network.candidates import candidates
from forgetcast.runs.assembly import Assembly
from forgetcast.runs.bar import counting_bar
from forgetcast.runs.begun import begun
from forgetcast.runs.forecast import DEFINITIONS as OF_FORECASTS
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import write_whole
from forgetcast.runs.upcoming import Upcoming, allowed

FILE = "advice.json"
DEFINITIONS = {
    "trained": "Parameters that train, as single numbers.",
    "length": "Share of the way from the model as it is to where the training takes it, on which the model stops.",
    "old_accuracy": OF_FORECASTS["old_accuracy"],
    "drop": OF_FORECASTS["drop"],
    "new_accuracy": "Share of samples of the new task answered right, as the scenario lets a prediction choose: of its "
    "validation samples if it has some, else of a draw of those that it trains on.",
    "score": "Old and new accuracy weighted by the tasks' numbers of classes, so that every class counts alike; "
    "smoothed, a sample near the boundary counts as part right.",
    "share_of_run": OF_FORECASTS["share_of_run"],
    "old_samples": "Old samples that the old accuracy was read on: of choices that are surely not the best, fewer.",
}


def advise_recipe(
    recipe: Recipe,
    root: Path,
    *,
    task: int | None = None,
    max_drop: float | None = None,
    budget: float = 0.15,
    most_old: int = 1000,
    lengths: Sequence[float] = (1.0,),
    modules: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    console: Console | None = None,
) -> Path:
    """Advise how many parameters to train in a task of a recipe's run, and write it into the run's directory.

    The candidates are nested subsets of what the method trains. The tasks before it are learnt first, as far as the run
    has not come yet; it goes on from there later.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs.
        task: as for `forecast_recipe`.
        max_drop: largest drop of old accuracy that is fine; None for any.
        budget: cost of each candidate's forecast as a share of its training's.
        most_old: old samples, at most.
        lengths: shares of the way to where a training takes the model.
        modules: patterns of names, one a module; by default the blocks of the stack.
        counts: of the last modules that train beside the head, one a candidate; by default 0, 1, 2, 4, ... and all.
        console: for progress bars.

    Returns:
        The advice's record, `advice.json`.

    Raises:
        ValueError: as `forecast_recipe` and `forgetcast.advise`.
    """
    if max_drop is not None:
        require_number("max_drop", max_drop, most=1.0)
    started = monotonic()
    at = begun(recipe, root, task, most_old, console)
    made, ahead = at.made, at.ahead
    few = ahead.old[0][:2]
    tried = candidates(ahead.model, few, parameters=ahead.trained, modules=modules, counts=counts)
    with counting_bar(made.screen, f"advice on task {ahead.index}", len(tried) * ahead.training.steps) as on_step:
        done = 0

        def told(steps: int) -> None:
            nonlocal done
            on_step(steps - done)
            done = steps

        found = advise(
            ahead.model,
            ahead.old,
            ahead.new,
            ahead.training,
            candidates=tried,
            lengths=lengths,
            parameters=ahead.trained,
            budget=budget,
            max_drop=max_drop,
            old_weight=_old_weight(made, ahead.index),
            restraint=ahead.restraint,
            validation=_held_out(made, ahead),
            answers_now=ahead.answers_now,
            answers_then=ahead.answers_then,
            answers_new=_answers_new(made, ahead),
            seed=recipe.seed,
            on_step=told,
        )
    settings = {"max_drop": max_drop, "budget": budget, "old_samples": most_old, "lengths": list(lengths)}
    record = at.record("advice", settings) | {
        "advice": _told(found),
        "points": _points(found),
        "candidates": {candidate.name: list(candidate.parameters) for candidate in tried},
        "definitions": DEFINITIONS,
        "seconds": monotonic() - started,
    }
    return write_whole(json.dumps(record, indent=1, allow_nan=False), made.folder / FILE)


def _told(found: Advice) -> dict[str, Any]:
    return {
        "accuracy_before": found.accuracy_before,
        "old_weight": found.old_weight,
        "new_samples": found.new_samples,
        "share": found.share,
        "seconds": found.cost.seconds,
        "passes": dict(found.cost.passes),
        "within_limit": found.within_limit,
        "trusted": found.recommended.trusted,
        "reason": found.reason,
    }


def _points(found: Advice) -> list[dict[str, Any]]:
    """A row for each point, in plain JSON values."""
    rows: list[dict[str, Any]] = found.table.to_dict("records")  # type: ignore[assignment]
    return rows


def _old_weight(made: Assembly, index: int) -> float:
    """Share of the earlier tasks in the classes of all so far; in another domain the same class counts again."""
    counts = [len(task.classes) for task in made.stream.tasks[: index + 1]]
    return sum(counts[:-1]) / sum(counts)


def _held_out(made: Assembly, ahead: Upcoming) -> tuple[Tensor, Tensor] | None:
    """Validation samples of the task; without any, its own training samples where others train with them."""
    task = made.stream[ahead.index]
    if not len(task.validation) and not made.method.joint:
        return None
    places = task.validation if len(task.validation) else task.train
    return made.prepared.read(places), torch.from_numpy(made.stream.outputs[places])


def _answers_new(made: Assembly, ahead: Upcoming) -> Tensor:
    """Among which outputs a prediction for a sample of the task chooses after it."""
    own = made.stream[ahead.index].classes if made.stream.task_incremental else made.method.seen
    return allowed([own], ahead.answers_then.shape[1])
