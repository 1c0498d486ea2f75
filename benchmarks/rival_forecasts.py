"""What a forecast says that each task will make a row forget, before it trains, beside what it did forget."""

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.projection_runs import Table
from benchmarks.projection_settings import SETTINGS
from benchmarks.rival_runs import Job, identity_of, inherited, quietly, stream_at
from forgetcast.forecast.network.entry import forecast
from forgetcast.learn.seeding import seed_everything
from forgetcast.metrics.matrix import Matrix, triangle
from forgetcast.runs.assembly import Assembly
from forgetcast.runs.prepare import Prepared
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.sections import MethodChoice, Training
from forgetcast.runs.upcoming import answers, require_steps, upcoming

BUDGET, OLD = 0.5, 200
"""Share of each training's cost, and old samples: to read these takes a seventh of the cost of so short a training."""


def forecast_identity(job: Job, data: str) -> Any:
    """All that decides the numbers of the forecasts of a run, but for the code."""
    return {**identity_of(job, data), "budget": BUDGET, "old": OLD}


def forecast_work(job: Job) -> tuple[Job, Table]:
    """In a worker: the run again, stopped before each task but the first for its forecast; or why there is none."""
    started = process_time()
    with TemporaryDirectory() as folder, quietly():
        try:
            found = foreseen(job, Path(folder))
        except ValueError as refused:
            found = {"unsupported": str(refused).partition("; expected")[0]}
    return job, {**found, "cpu_seconds": process_time() - started}


def foreseen(job: Job, folder: Path) -> Table:
    """Forecast and measured drop of the accuracy on old tasks, at every transition of a run."""
    row, _, seed, *_ = job
    forecasts: list[Table] = []
    left_out: tuple[str, ...] = ()
    made = standing(job, folder)
    tasks = len(made.stream)
    for index in range(1, tasks):
        require_steps(made.method, row.method, index)
        made.learn(until=index)
        ahead = upcoming(made, index, OLD)
        seen = forecast(
            ahead.model,
            ahead.old,
            ahead.new,
            ahead.training,
            parameters=ahead.trained,
            restraint=ahead.restraint,
            budget=BUDGET,
            seed=seed,
        )
        now = answers(seen.logits_before, ahead.answers_now)
        told = replace(seen, logits_before=now, drift=answers(seen.logits, ahead.answers_then) - now)
        forecasts.append(
            {
                "forecast": told.accuracy_before - told.accuracy,
                "trusted": seen.trust.trusted,
                "share_of_run": seen.share_of_run,
            }
        )
        left_out = ahead.left_out
        made = standing(job, folder)  # anew: the method of the forecast has begun the task
    matrix = made.learn().accuracy_matrix
    drops = measured_drops(matrix)
    return {
        "transitions": [one | {"measured": drop} for one, drop in zip(forecasts, drops, strict=True)],
        "left_out": list(left_out),
        "accuracy_matrix": matrix,
    }


def standing(job: Job, folder: Path) -> Assembly:
    """The run as `forgetcast forecast` takes it, on samples at hand; it goes on where its folder stands."""
    row, rate, seed, validation, name = job
    setting = SETTINGS[name]
    stream = stream_at(inherited["data"][name], name, seed, validation=validation)
    seed_everything(seed)
    method = row.made(name, setting, inherited["folder"], rate, seed)
    recipe = Recipe.model_construct(
        name=row.label,
        seed=seed,
        method=MethodChoice.model_construct(name=row.method),
        training=Training.model_construct(**asdict(row.at(rate))),
    )
    inputs = torch.from_numpy(stream.source.inputs)
    prepared = Prepared(method.model.backbone, setting.width, lambda places: inputs[places], None, "", 0, {})
    return Assembly(recipe, folder, stream, prepared, method, Accelerator(), None)


def measured_drops(matrix: Matrix) -> list[float]:
    """Of each transition: mean accuracy on the tasks before it, less that on the same tasks after it."""
    rows = triangle(matrix)
    return [fmean(old - new for old, new in zip(before, after, strict=False)) for before, after in pairwise(rows)]


def report(found: Table) -> str:
    """A run in one line."""
    if "unsupported" in found:
        return f"no forecast: {found['unsupported']}"
    cells = [f"{100 * one['forecast']:z.1f} ({100 * one['measured']:z.1f})" for one in found["transitions"]]
    return f"{', '.join(cells)}, {found['cpu_seconds']:.0f} s"
